"""Host to GPU and back, kernel launches and small copies, with torch. A script for the engines' Python.

Prints one JSON object: {"error": text}, or the figures that `transfer` keeps. All times are the host's, because under
confidential computing an asynchronous copy is not asynchronous: `issue` until the call returns, `done` until the GPU
has finished.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

SIZES = tuple(4096 * 4**power for power in range(10))
"""4 KiB to 1 GiB."""
_SECONDS = 0.5
"""For each size, direction and kind of memory; at least 5 times, at most 2,000."""
_SMALL = 4096


def main() -> None:
    """Measures, or prints why it cannot."""
    try:
        import torch
    except ImportError as error:
        print(json.dumps({"error": f"this Python has no torch ({error})"}))
        return
    if not torch.cuda.is_available():
        print(json.dumps({"error": f"torch {torch.__version__} sees no GPU"}))
        return
    torch.cuda.init()
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(0),
        "copies": [
            _copy(torch, size, direction, pinned)
            for size in SIZES
            for direction in ("host to device", "device to host")
            for pinned in (True, False)
        ],
    }
    host = torch.zeros(_SMALL, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(_SMALL, dtype=torch.uint8, device="cuda")
    one = torch.zeros(1, device="cuda")
    found["small_copy_us"] = _times(torch, lambda: device.copy_(host, non_blocking=True), 2000)["done"]
    found["launch_us"] = _launches(torch, one)
    found["launch_and_wait_us"] = _times(torch, lambda: one.add_(1), 2000)["done"]
    # Each decode step ends with this: one number back to the host.
    found["read_back_us"] = _times(torch, lambda: one.item(), 2000)["issue"]
    json.dump(found, sys.stdout)


def _copy(torch: Any, size: int, direction: str, pinned: bool) -> dict[str, Any]:
    host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    host.fill_(1)  # Otherwise the first touch of each page would be measured instead of the copy.
    device = torch.ones(size, dtype=torch.uint8, device="cuda")
    source, target = (host, device) if direction == "host to device" else (device, host)
    copy: Callable[[], Any] = lambda: target.copy_(source, non_blocking=True)  # noqa: E731 (one expression)
    copy()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    copy()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - begun, 1e-6)
    times = _times(torch, copy, min(2000, max(5, int(_SECONDS / once))))
    return {
        "bytes": size,
        "direction": direction,
        "memory": "pinned" if pinned else "pageable",
        "issue_us": times["issue"],
        "done_us": times["done"],
        "gb_s": size / times["done"]["p50"] / 1000,
    }


def _launches(torch: Any, one: Any) -> dict[str, float]:
    """Microseconds per launch, over series of 1,000 without waiting; the wait at the end of each does not count."""
    found = []
    for _ in range(50):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(1000):
            one.add_(1)
        found.append((time.perf_counter() - begun) * 1000)
        torch.cuda.synchronize()
    return _summary(found[5:])


def _times(torch: Any, work: Callable[[], Any], count: int) -> dict[str, dict[str, float]]:
    """Microseconds of each call, after a tenth as warm-up."""
    issue, done = [], []
    for _ in range(count + count // 10):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        issued = time.perf_counter()
        torch.cuda.synchronize()
        issue.append((issued - begun) * 1e6)
        done.append((time.perf_counter() - begun) * 1e6)
    return {"issue": _summary(issue[count // 10 :]), "done": _summary(done[count // 10 :])}


def _summary(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "count": len(values)}


if __name__ == "__main__":
    main()
