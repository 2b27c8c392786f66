"""How long verification takes, on recorded evidence of real machines.

    python -m adytum.benchmarks.parts.attestation [--vectors ../shared/vectors] [--repetitions 60]

Microseconds, median and 95th percentile. Everything is parsed anew each time; nothing is cached.
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.certificates import load_all
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.nvidia.verify import verify_gpu
from adytum.attestation.snp.verify import verify_snp
from adytum.attestation.tdx.verify import verify_tdx
from adytum.benchmarks.runfile import stats

_VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"


def _der(*paths: Path) -> tuple[bytes, ...]:
    return tuple(item.public_bytes(Encoding.DER) for path in paths for item in load_all(path.read_bytes(), path.name))


def _snp(vectors: Path, case: str, product: str) -> Callable[[], object]:
    folder, roots = vectors / "sev-snp" / case, vectors / "sev-snp" / "amd-roots"
    report = (folder / "report.bin").read_bytes()
    chain = _der(folder / "vcek.der", roots / f"{product}_ask.pem", roots / f"{product}_ark.pem")
    begins = json.loads((folder / "case.json").read_text())["vek_validity"][0]
    now = datetime.datetime.fromisoformat(begins) + datetime.timedelta(days=30)
    ark = TrustRoots().amd_ark
    return lambda: verify_snp(report, chain, ark=ark, now=now, checks=Checks())


def _gpu(vectors: Path, *, rims: bool) -> Callable[[], object]:
    folder = vectors / "nvidia-gpu" / "h100-550.90.07-full"
    report, chain = (folder / "report.bin").read_bytes(), _der(folder / "chain.pem")
    nonce = bytes.fromhex(json.loads((folder / "case.json").read_text())["nonce"])
    manifests = [(folder / f"{name}_rim.xml").read_bytes() for name in ("driver", "vbios")] if rims else []
    now = datetime.datetime(2025, 8, 21, 12, tzinfo=datetime.UTC)
    roots = TrustRoots()
    return lambda: verify_gpu(report, chain, nonce=nonce, roots=roots, now=now, checks=Checks(), rims=manifests)


def _tdx(vectors: Path) -> Callable[[], object]:
    quote = (vectors / "tdx" / "v4-uptodate-phala" / "quote.bin").read_bytes()
    now = datetime.datetime(2025, 6, 20, 10, 32, tzinfo=datetime.UTC)
    roots = TrustRoots().intel_sgx
    return lambda: verify_tdx(quote, collateral=None, roots=roots, now=now, checks=Checks())


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, default=_VECTORS)
    parser.add_argument("--repetitions", type=int, default=60)
    options = parser.parse_args()
    if not options.vectors.is_dir():
        raise SystemExit(f"{options.vectors} is missing: --vectors names the folder of the recorded evidence")
    jobs = {
        "SEV-SNP, Milan": _snp(options.vectors, "milan-v3-azure-2", "milan"),
        "SEV-SNP, Genoa": _snp(options.vectors, "genoa-v3-azure", "genoa"),
        "SEV-SNP, Turin": _snp(options.vectors, "turin-v5-microsoft", "turin"),
        "H100, report and chain": _gpu(options.vectors, rims=False),
        "H100, with both manifests": _gpu(options.vectors, rims=True),
        "TDX quote, no collateral": _tdx(options.vectors),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(options.repetitions + 3):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append((time.perf_counter() - start) * 1e6)
    print(f"{'':<28} {'p50 us':>8} {'p95 us':>8}")
    for name, found in times.items():
        kept = found[3:]
        print(f"{name:<28} {stats.percentile(kept, 0.5):>8.0f} {stats.percentile(kept, 0.95):>8.0f}")


if __name__ == "__main__":
    main()
