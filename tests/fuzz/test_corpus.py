"""Every target's sentence holds for what the search kept, for the seeds, and for random bytes."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import CORPUS
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS, Broken, json_admission


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_breaks_nothing(name: str) -> None:
    kept = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert kept, f"no corpus: python -m tests.fuzz {name}"
    for data in (*kept, *seeds()[name], b""):
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=600))
@example(data=b"\x01" * 40)
def test_random_bytes_break_nothing(name: str, data: bytes) -> None:
    TARGETS[name](data)


def test_a_target_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that passed a body on as it came would fail the sentence."""
    monkeypatch.setattr(
        "adytum.inference.gateway.admission.rewrite.for_engine", lambda body, salt: (b'{"cache_salt":"mine"}', 1)
    )
    with pytest.raises(Broken):
        json_admission(seeds()["json_admission"][0])
