"""The life of the backend as one literal table. `/readyz` shows the step; a failure names it and what to do."""

from dataclasses import dataclass
from enum import StrEnum


class Step(StrEnum):
    """The steps of a backend's life."""

    PREFLIGHT = "PREFLIGHT"
    KEYS = "KEYS"
    EVIDENCE = "EVIDENCE"
    SELF_VERIFIED = "SELF_VERIFIED"
    GPU_READY = "GPU_READY"
    WEIGHTS = "WEIGHTS"
    ENGINES = "ENGINES"
    CANARY = "CANARY"
    SERVING = "SERVING"
    DRAINING = "DRAINING"
    FAILED = "FAILED"


NEXT: dict[Step, frozenset[Step]] = {
    Step.PREFLIGHT: frozenset({Step.KEYS, Step.FAILED}),
    Step.KEYS: frozenset({Step.EVIDENCE, Step.FAILED}),
    Step.EVIDENCE: frozenset({Step.SELF_VERIFIED, Step.FAILED}),
    Step.SELF_VERIFIED: frozenset({Step.GPU_READY, Step.FAILED}),
    Step.GPU_READY: frozenset({Step.WEIGHTS, Step.FAILED}),
    Step.WEIGHTS: frozenset({Step.ENGINES, Step.FAILED}),
    Step.ENGINES: frozenset({Step.CANARY, Step.FAILED}),
    Step.CANARY: frozenset({Step.SERVING, Step.FAILED}),
    Step.SERVING: frozenset({Step.DRAINING, Step.FAILED}),
    Step.DRAINING: frozenset(),
    Step.FAILED: frozenset(),
}

WAITS_FOR: dict[Step, str] = {
    Step.PREFLIGHT: "checking configuration, folders and the engines' environment",
    Step.KEYS: "making the channel's keys",
    Step.EVIDENCE: "collecting evidence for the keys",
    Step.SELF_VERIFIED: "the clients' verifier accepted this backend's own evidence",
    Step.GPU_READY: "setting the GPUs ready, without which they refuse to compute",
    Step.WEIGHTS: "checking the models' files against their manifests",
    Step.ENGINES: "starting the engines",
    Step.CANARY: "comparing each engine's answers with the golden ones",
    Step.SERVING: "nothing",
    Step.DRAINING: "streams in progress to end",
    Step.FAILED: "an operator",
}


_UNVERIFIED = frozenset({Step.PREFLIGHT, Step.KEYS, Step.EVIDENCE, Step.FAILED})
_VERIFIED = frozenset(Step) - _UNVERIFIED


class StepFailed(Exception):
    """A step failed. The message states the reason and what the operator should do, and never contains content or
    keys."""


@dataclass
class Lifecycle:
    """The current step. Only the moves of `NEXT` are possible."""

    step: Step = Step.PREFLIGHT
    progress: str = ""
    """How far the step is, for `/readyz`: a model's name and a percentage, nothing else."""

    def advance(self, step: Step) -> None:
        """Moves on. Raises `ValueError` for a move that is not in the table."""
        if step not in NEXT[self.step]:
            raise ValueError(f"{self.step} is not followed by {step}")
        self.step = step
        self.progress = ""

    @property
    def waits_for(self) -> str:
        """What the step waits for, and how far it is."""
        return WAITS_FOR[self.step] + (f" ({self.progress})" if self.progress else "")

    @property
    def evidence_ready(self) -> bool:
        """Whether evidence may be shown: it has passed the clients' verifier."""
        return self.step in _VERIFIED

    @property
    def serving(self) -> bool:
        """Whether requests are accepted."""
        return self.step is Step.SERVING
