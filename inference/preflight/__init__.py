"""Whether this machine is one that this version supports: a table with a verdict and advice per row.

Advice for operators, and no proof: a host can show its guest another CPU, and drivers are asked, not verified. What
clients rely on is the evidence. Nothing is changed here. What could not be found out is "unknown", and never "ok".
"""

from adytum.inference.preflight import gpus, machine
from adytum.inference.preflight.probe import Probe
from adytum.inference.preflight.table import REQUIREMENTS, Row, as_json, as_text, meets

__all__ = ["REQUIREMENTS", "Probe", "Row", "as_json", "as_text", "meets", "rows"]


def rows(probe: Probe) -> list[Row]:
    """The whole table, always with every key of `REQUIREMENTS`. Raises nothing that a machine can cause."""
    vm = machine.vm(probe)
    return [
        machine.cpu(probe, vm),
        vm.row,
        machine.reports(probe, vm),
        machine.kernel(probe, vm),
        machine.system(probe),
        machine.swap(probe),
        machine.core_dumps(probe),
        machine.crash_dump(probe),
        *gpus.gpus(probe),
    ]
