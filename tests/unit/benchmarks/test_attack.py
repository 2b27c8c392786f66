"""The attacker of the leakage benchmark finds what the traces leak, and nothing if they leak nothing."""

import numpy as np
import pytest

from adytum.benchmarks.leakage import attack
from adytum.benchmarks.leakage.attack import FEATURES, Seen

pytestmark = pytest.mark.slow

TOPICS, QUESTIONS, WORDINGS = 3, 5, 6


def traces(told_by: str, writes: int = 8) -> list[Seen]:
    """Traces in which `told_by` ("sizes", "times" or "") differs from topic to topic, and noise is in both."""
    rng = np.random.default_rng(1)
    found = []
    for topic in range(TOPICS):
        for question in range(QUESTIONS):
            for wording in range(WORDINGS):
                sizes = rng.integers(500, 520, writes) + (100 * topic if told_by == "sizes" else 0)
                gaps = rng.normal(0.010, 0.001, writes) + (0.01 * topic if told_by == "times" else 0)
                found.append(
                    Seen(
                        f"t{topic}",
                        f"t{topic} q{question}",
                        f"t{topic} q{question} w{wording}",
                        sizes.tolist(),
                        np.cumsum(gaps).tolist(),
                    )
                )
    return found


def auc(seen: list[Seen], features: str) -> float:
    """ROC AUC of the attacker who never had the answer."""
    topics = np.repeat(np.arange(TOPICS), QUESTIONS * WORDINGS)
    questions = np.repeat(np.arange(TOPICS * QUESTIONS), WORDINGS)
    return attack.measured(topics, attack.scored(attack.matrix_of(seen, features), topics, questions))[0]


@pytest.mark.parametrize(("told_by", "blind"), [("sizes", "times"), ("times", "sizes")])
def test_what_tells_topics_is_found_and_only_there(told_by: str, blind: str) -> None:
    seen = traces(told_by)
    assert auc(seen, told_by) > 0.99
    assert auc(seen, "all") > 0.95
    assert 0.25 < auc(seen, blind) < 0.75


def test_equal_traces_tell_nothing() -> None:
    equal = [
        Seen(one.topic, one.question, one.wording, [512] * 8, [0.01 * i for i in range(1, 9)]) for one in traces("")
    ]
    for features in FEATURES:
        assert auc(equal, features) <= 0.5


@pytest.mark.parametrize("writes", [1, 2, 300])
@pytest.mark.parametrize("features", FEATURES)
def test_a_trace_of_any_length_has_a_row(features: str, writes: int) -> None:
    matrix = attack.matrix_of([*traces("", writes), *traces("", 5)], features)
    assert matrix.shape[0] == 2 * TOPICS * QUESTIONS * WORDINGS
    assert np.isfinite(matrix).all()


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "_TREES", 10)
    lines = list(attack.rows(traces("sizes")))
    assert len(lines) == 2 * len(FEATURES)
    assert all("nan" not in line for line in lines)
    with pytest.raises(ValueError, match="topics"):
        list(attack.rows(traces("")[: QUESTIONS * WORDINGS]))
