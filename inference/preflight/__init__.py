"""Whether this version supports this machine: a table with a verdict and advice per row.

This is advice for operators, not proof: a host can show its guest another CPU, and the drivers' answers are not
verified. Clients rely on the evidence. Nothing is changed here. A fact that cannot be found out is "unknown", never
"ok".
"""

from adytum.inference.preflight import gpus, machine
from adytum.inference.preflight.probe import Probe
from adytum.inference.preflight.table import REQUIREMENTS, Row, as_json, as_text, meets

__all__ = ["REQUIREMENTS", "Probe", "Row", "as_json", "as_text", "meets", "rows"]


def rows(probe: Probe) -> list[Row]:
    """The whole table, always with every key of `REQUIREMENTS`. No state of the machine makes it raise."""
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
