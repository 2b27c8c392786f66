"""The table: its rows, whether it meets a requirement, and its forms for people and for machines."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

OK, WRONG, UNKNOWN = "ok", "wrong", "unknown"
NOT_KNOWN = "not known"
"""`found`, if nothing could be found out."""
REQUIREMENTS: dict[str, frozenset[str]] = {
    "cc-on": frozenset(
        {
            "cpu",
            "confidential-vm",
            "reports",
            "kernel",
            "os",
            "swap",
            "core-dumps",
            "crash-dump",
            "gpu",
            "vbios",
            "driver",
            "cc-mode",
            "devtools",
            "switches",
            "ready",
        }
    )
}
"""Keys of the rows that must be present and ok."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    key: str
    """For machines. A machine with several GPUs has several rows `gpu` and `vbios`."""
    name: str
    found: str
    wanted: str
    verdict: str
    """ok, wrong or unknown."""
    advice: str = ""
    """What to do; empty if the verdict is ok."""


def meets(table: Iterable[Row], requirement: str) -> bool:
    """Whether every row that `requirement` needs is present and ok. Raises `KeyError` for an unknown one."""
    needed = REQUIREMENTS[requirement]
    concerned = [row for row in table if row.key in needed]
    return {row.key for row in concerned} == needed and all(row.verdict == OK for row in concerned)


def as_json(table: Iterable[Row]) -> str:
    """For machines: the rows as a JSON list of objects, and for each requirement whether it is met."""
    listed = list(table)
    met = {requirement: meets(listed, requirement) for requirement in REQUIREMENTS}
    return json.dumps({"rows": [asdict(row) for row in listed], "meets": met}, indent=2)


def as_text(table: Iterable[Row], *, colour: bool = False) -> str:
    """For people: one aligned line per row, and under it what to do if it is not ok."""
    listed = [(row, [_plain(cell) for cell in (row.name, row.found, row.wanted)]) for row in table]
    names, found = (max((len(cells[column]) for _, cells in listed), default=0) for column in (0, 1))
    paint = {OK: "32", WRONG: "31", UNKNOWN: "33"}
    lines = []
    for row, (name, value, wanted) in listed:
        verdict = row.verdict.ljust(len(UNKNOWN))
        mark = f"\x1b[{paint[row.verdict]}m{verdict}\x1b[0m" if colour else verdict
        lines.append(f"{mark}  {name.ljust(names)}  {value.ljust(found)}  {wanted}".rstrip())
        if row.advice:
            lines.append(f"{' ' * len(UNKNOWN)}  -> {_plain(row.advice)}")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text from the machine's files and drivers goes to a terminal, so control characters are replaced."""
    return "".join(char if char.isprintable() else "?" for char in text)
