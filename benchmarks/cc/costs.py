"""A model, not a measurement: the cost of CC-On per decode step, from published constants or a machine's own transfers.

A decode step of a batch consists of the host's part, the reading of all weights, and a part for each sequence. CC-On
adds a fixed time: some small copies and kernel launches, each slower by some microseconds, and the bytes that cross the
bus. `PUBLISHED` has the results of others, and `errors` the model's distance from each. Nothing is fitted to them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COPIES_PER_STEP, LAUNCHES_PER_STEP = 35, 36
"""Assumed, and chosen so that the published costs of one (22 us a copy, 5 us a launch) add up to the middle of the
published tax per step. A trace of a real engine would replace them."""
SATURATED = 256
"""Sequences in a batch that a publication calls "saturated": vLLM's usual limit."""
_CONTEXT = 512
_EFFICIENCY = 0.8
"""The share of the memory's bandwidth that large reads reach."""
_HOST_MS = 1.5
"""Assumed: the time of a step that is neither the GPU's reading nor its computing."""


@dataclass(frozen=True)
class Tax:
    """What CC-On adds: milliseconds to each step, and nanoseconds to each byte that crosses the bus."""

    step_ms: float
    byte_ns: float


# NVIDIA's and vLLM's issues, and papers: 0.6 to 1.3 ms a step whatever the model's size; 2.6 to 5 GB/s instead of 40.
LOW, MIDDLE, HIGH = (Tax(step, 1 / 3.8 - 1 / 40) for step in (0.6, 0.95, 1.3))


@dataclass(frozen=True)
class Workload:
    """A model on a GPU. `weights_gb`: read in each step. `kv_kib`: per token of context. `tflops`: reachable."""

    name: str
    gpu: str
    weights_gb: float
    parameters_b: float
    bandwidth_tb_s: float
    kv_kib: float
    tflops: float
    steps_ms: Mapping[int, float] | None = None
    """A step without CC by batch size, if the publication has them."""

    def step_ms(self, batch: int) -> float:
        """A decode step of `batch` sequences with CC off."""
        if self.steps_ms is not None and batch in self.steps_ms:
            return self.steps_ms[batch]
        reading = self.weights_gb / self.bandwidth_tb_s / _EFFICIENCY
        context = self.kv_kib * 1024 * _CONTEXT / self.bandwidth_tb_s / _EFFICIENCY / 1e9
        computing = 2 * self.parameters_b / self.tflops
        return _HOST_MS + reading + batch * (context + computing)


# Bandwidths are from the GPUs' data sheets. A decode's dense bf16 kernel reaches about 400 TFLOP/s, a 4-bit one half.
_LLAMA_NVL = Workload("llama-3.1-8b", "H100 NVL", 16.1, 8.0, 3.94, 128, 400)
_LLAMA_AWQ = Workload("llama-3-8b-awq", "H100", 5.7, 8.0, 3.35, 128, 200)
_GEMMA = Workload("gemma-2-27b", "H200", 54.5, 27.2, 4.8, 368, 400)
_LLAMA_70B = Workload("llama-3.3-70b-int4", "H100", 39.8, 70.6, 3.35, 320, 200)
# The pull request's own column without CC: batch over tokens per second.
_SGLANG_RATES = {1: 172.896, 16: 1758.951, 64: 2980.74, 256: 3309.584}
_SGLANG = Workload(
    "sglang-15188", "not named", 0, 0, 1, 0, 1, {batch: 1000 * batch / rate for batch, rate in _SGLANG_RATES.items()}
)
WORKLOADS = {item.name: item for item in (_LLAMA_NVL, _LLAMA_AWQ, _GEMMA, _LLAMA_70B)}
"""Those that the synthetic engine can simulate at any batch size."""


@dataclass(frozen=True)
class Published:
    """A row of a publication. `kind`: "throughput" (per cent lost) or "step" (per cent that ITL or TPOT grew)."""

    work: str
    load: str
    kind: str
    workload: Workload | None
    batch: int
    percent: float


PUBLISHED = (
    Published("arXiv 2409.03992", "batch 1", "throughput", _LLAMA_NVL, 1, 6.9),
    Published("arXiv 2409.03992", "saturated", "throughput", _LLAMA_NVL, SATURATED, 3.2),
    Published("arXiv 2409.03992", "TTFT", "TTFT", None, 1, 19.0),
    Published("ISPASS'25 artifact", "batch 1", "throughput", _LLAMA_AWQ, 1, 14.5),
    Published("ISPASS'25 artifact", "batch 8", "throughput", _LLAMA_AWQ, 8, 13.5),
    Published("ISPASS'25 artifact", "batch 32", "throughput", _LLAMA_AWQ, 32, 8.8),
    Published("ISPASS'25 artifact", "batch 128", "throughput", _LLAMA_AWQ, 128, 3.9),
    Published("Gemma-2-27B, H200", "1 request/s, ITL", "step", _GEMMA, 1, 3.9),
    Published("Gemma-2-27B, H200", "1 request/s, TTFT", "TTFT", None, 1, 22.0),
    Published("Gemma-2-27B, H200", "saturated", "throughput", _GEMMA, SATURATED, 14.7),
    Published("sglang#15188", "concurrency 1", "throughput", _SGLANG, 1, 18.4),
    Published("sglang#15188", "concurrency 16", "throughput", _SGLANG, 16, 13.9),
    Published("sglang#15188", "concurrency 64", "throughput", _SGLANG, 64, 7.4),
    Published("sglang#15188", "concurrency 256", "throughput", _SGLANG, 256, 2.8),
    Published("Llama-3.3-70B int4", "rate 1, TPOT", "step", _LLAMA_70B, 1, 0.8),
    Published("Llama-3.3-70B int4", "rate 50, TPOT", "step", _LLAMA_70B, SATURATED, -0.6),
    Published("Llama-3.3-70B int4", "rate 100, TPOT", "step", _LLAMA_70B, SATURATED, -1.5),
)


@dataclass(frozen=True)
class Error:
    """A published row and the model's values for it, in per cent; None if the model does not cover it."""

    row: Published
    low: float | None
    middle: float | None
    high: float | None

    @property
    def points(self) -> float | None:
        return None if self.middle is None else self.middle - self.row.percent

    @property
    def inside(self) -> bool:
        """Whether the published value lies between the model's results for the lowest and the highest published tax."""
        return self.low is not None and self.high is not None and self.low <= self.row.percent <= self.high


def overhead(row: Published, tax: Tax) -> float | None:
    """Per cent, in the row's own terms; None if the model has no base for the row."""
    if row.workload is None:
        return None
    base = row.workload.step_ms(row.batch)
    return 100 * tax.step_ms / (base if row.kind == "step" else base + tax.step_ms)


def errors(rows: Sequence[Published] = PUBLISHED) -> list[Error]:
    """The errors of all rows, with the lowest, middle and highest published tax."""
    return [Error(row, *(overhead(row, tax) for tax in (LOW, MIDDLE, HIGH))) for row in rows]


def table() -> str:
    """The errors in Markdown."""
    lines = [
        "| published | load | CC-On costs, % | model, % (0.6 to 1.3 ms) | error, points |",
        "|---|---|---:|---:|---:|",
    ]
    for item in errors():
        says = "not modelled" if item.middle is None else f"{item.middle:.1f} ({item.low:.1f} to {item.high:.1f})"
        points = "" if item.points is None else f"{item.points:+.1f}" + ("" if item.inside else ", outside")
        lines.append(f"| {item.row.work} | {item.row.load} | {item.row.percent:.1f} | {says} | {points} |")
    return "\n".join(lines)


def from_transfers(off: Mapping[str, Any], on: Mapping[str, Any]) -> Tax:
    """The tax from two files that `transfer` wrote on one machine, in its two modes."""
    copy_us = on["small_copy_us"]["p50"] - off["small_copy_us"]["p50"]
    launch_us = on["launch_us"]["p50"] - off["launch_us"]["p50"]
    step = (COPIES_PER_STEP * copy_us + LAUNCHES_PER_STEP * launch_us) / 1000
    return Tax(step, 1 / bulk_gb_s(on) - 1 / bulk_gb_s(off))


def bulk_gb_s(transfers: Mapping[str, Any]) -> float:
    """The best rate to the device of any size and memory."""
    return max(float(item["gb_s"]) for item in transfers["copies"] if item["direction"] == "host to device")
