"""The run file: everything that another person needs to judge a run, and each request's own times.

JSON that follows run.schema.json, which is checked on writing and on reading. A fact that a machine lacks is `null`
with the reason beside it, and never omitted. A file whose name ends with .gz is compressed.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import jsonschema

from adytum.benchmarks.errors import Unusable

SCHEMA = Path(__file__).with_name("run.schema.json")
VERSION = "adytum benchmark run 1"
MODEL_NOTE = "model, not measurement"


@dataclass(frozen=True, order=True)
class Level:
    """The load: `closed` with that many clients, or `poisson` with that many requests per second."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.value:.0f} at once" if self.kind == "closed" else f"{self.value:g}/s"


@dataclass(frozen=True)
class Request:
    """One request, in seconds. `start_s` from the load's start; `gaps_s` between events with content.

    `ttft_s` and `start_s` are None if the generator reports none (embeddings). `error` is empty if it was answered.
    """

    start_s: float | None
    ttft_s: float | None
    e2e_s: float
    gaps_s: tuple[float, ...]
    tokens: int
    prompt_tokens: int
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        if self.ttft_s is None or self.tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.tokens - 1)

    def record(self) -> dict[str, Any]:
        """The form in the file: whole microseconds."""
        if self.error:
            return {"error": self.error[:300]}
        return {
            "start_us": _us(self.start_s),
            "ttft_us": _us(self.ttft_s),
            "e2e_us": _us(self.e2e_s),
            "gaps_us": [_us(gap) for gap in self.gaps_s],
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        if "error" in record:
            return cls(None, None, 0.0, (), 0, 0, record["error"])
        return cls(
            _s(record["start_us"]),
            _s(record["ttft_us"]),
            record["e2e_us"] / 1e6,
            tuple(gap / 1e6 for gap in record["gaps_us"]),
            record["tokens"],
            record["prompt_tokens"],
        )


def _us(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e6)


def _s(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1e6


@dataclass(frozen=True)
class Repetition:
    """One load through one arm. `order`: its place among all loads of the run. CPU seconds are the gateway's."""

    arm: str
    level: Level
    index: int
    order: int
    wall_s: float
    gateway_cpu_s: float | None
    requests: tuple[Request, ...]

    def record(self) -> dict[str, Any]:
        return {
            "arm": self.arm,
            "level": {"kind": self.level.kind, "value": self.level.value},
            "index": self.index,
            "order": self.order,
            "wall_s": round(self.wall_s, 6),
            "gateway_cpu_s": None if self.gateway_cpu_s is None else round(self.gateway_cpu_s, 3),
            "requests": [request.record() for request in self.requests],
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        return cls(
            record["arm"],
            Level(record["level"]["kind"], record["level"]["value"]),
            record["index"],
            record["order"],
            record["wall_s"],
            record["gateway_cpu_s"],
            tuple(Request.of(item) for item in record["requests"]),
        )


@dataclass(frozen=True)
class Run:
    """A run. `head` is the file's content without the repetitions."""

    head: dict[str, Any]
    repetitions: tuple[Repetition, ...]

    @property
    def label(self) -> str:
        return str(self.head["label"])

    @property
    def is_model(self) -> bool:
        """Whether it was computed, not measured."""
        return bool(self.head["kind"] == MODEL_NOTE)

    @property
    def arms(self) -> list[str]:
        return [str(arm["name"]) for arm in self.head["arms"]]

    @property
    def levels(self) -> list[Level]:
        return sorted({item.level for item in self.repetitions})

    def cell(self, arm: str, level: Level) -> list[Repetition]:
        """The repetitions of one arm at one level, in their order."""
        found = [item for item in self.repetitions if (item.arm, item.level) == (arm, level)]
        return sorted(found, key=lambda item: item.index)

    def save(self, path: Path) -> None:
        """Raises `Unusable` if the content breaks the schema (a fault of this program) or cannot be written."""
        content = {**self.head, "repetitions": [item.record() for item in self.repetitions]}
        _check(content, "the run")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The head is indented, then each repetition is one line: this keeps diffs and the file small.
            head = json.dumps({**content, "repetitions": []}, indent=1)
            lines = ",\n".join(json.dumps(item, separators=(",", ":")) for item in content["repetitions"])
            text = head.removesuffix("[]\n}") + f"[\n{lines}\n]\n}}\n"
            path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
        except OSError as error:
            raise Unusable(f"{path} cannot be written: {error.strerror}") from error


def load(path: Path) -> Run:
    """Reads a run file. Raises `Unusable` if it is not one."""
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a gzip file"
        raise Unusable(f"{path} cannot be read: {reason}") from error
    except ValueError as error:
        raise Unusable(f"{path} is not JSON: {error}") from error
    _check(content, str(path))
    repetitions = tuple(Repetition.of(item) for item in content.pop("repetitions"))
    return Run(content, repetitions)


def _check(content: Any, name: str) -> None:
    error = jsonschema.exceptions.best_match(_validator().iter_errors(content))
    if error is not None:
        where = "/".join(str(part) for part in error.absolute_path) or "its top"
        raise Unusable(f"{name} does not follow run.schema.json: at {where}: {error.message[:300]}")


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def differences(a: Run, b: Run) -> Iterator[str]:
    """What makes two runs incomparable: model, load, flags, versions. The modes of their machines may differ."""
    for name, kind in (("kind", "kind"), ("load", "load"), ("models", "model"), ("engine_flags", "engine flags")):
        yield from _different(kind, a.head[name], b.head[name])
    for name in ("engine", "generator"):
        yield from _different(f"versions of the {name}", a.head["software"][name], b.head["software"][name])
    if a.levels != b.levels:
        yield f"levels: {_listed(a.levels)} against {_listed(b.levels)}"
    if not set(a.arms) & set(b.arms):
        yield f"arms: {_listed(a.arms)} against {_listed(b.arms)}"


def _different(what: str, a: Any, b: Any) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _different(f"{what}: {key}", a.get(key), b.get(key))
    elif a != b:
        yield f"{what}: {json.dumps(a)} against {json.dumps(b)}"


def _listed(items: Sequence[object]) -> str:
    return ", ".join(str(item) for item in items)
