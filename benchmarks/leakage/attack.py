"""An attacker who knows the service and tells topics by an answer's sizes and times (`benchmarks/leakage/leakage.py`).

The attacker has asked the same service the same page of questions, and has labelled traces of the answers. Two cases:

- known: the attacker has had the answer before, for another wording of its question (folds hold out wordings);
- unseen: the attacker has never had this answer, only others of its topic (folds hold out questions).

One classifier for all topics (extremely randomised trees) scores each trace without having seen its fold. The results
are the means over topics of ROC AUC and AUPRC, each topic against all others, with 95 % bootstrap intervals over
questions (traces of one question are alike, so they are drawn together). "Guessing" is the same attacker with shuffled
labels: the score without any information, including cross-validation's own bias.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]

_SEED = 20261123
_FOLDS = 5
_TREES = 100
_FIRST = 16  # Writes at an answer's start that all traces have; a later one would also tell their number.
_MOST = 160
_RESAMPLES = 300
_SHUFFLES = 8
FEATURES = ("sizes", "amount", "times", "all")
"""`sizes`: of the first writes. `amount`: the number of writes and of bytes. `times`: gaps, first write, last write."""

HEAD = (
    f"{'protocol':>8} {'shape':>18} {'attacker':>8} {'sees':>7} {'ROC AUC [95 %]':>22} {'AUPRC [95 %]':>22} "
    f"{'guessing: ROC AUC':>18} {'AUPRC':>14}"
)


@dataclass(frozen=True)
class Seen:
    """One trace: `sizes` in bytes and `times` in seconds of the writes."""

    topic: str
    question: str
    wording: str
    sizes: Sequence[int]
    times: Sequence[float]


def rows(seen: Sequence[Seen]) -> Iterator[str]:
    """The table's rows for one shape and protocol. Raises `ValueError` for fewer than two topics."""
    names = sorted({item.topic for item in seen})
    if len(names) < 2:
        raise ValueError("topics have to differ")
    topics = np.array([names.index(item.topic) for item in seen])
    questions = _numbered([item.question for item in seen])
    wordings = _numbered([item.wording for item in seen])
    for case, groups in (("known", wordings), ("unseen", questions)):
        for features in FEATURES:
            matrix = matrix_of(seen, features)
            scores = scored(matrix, topics, groups)
            auc, precision = measured(topics, scores)
            low, high = _interval(topics, scores, questions)
            guessed = ""
            if features == "all":
                found = np.array(_guessing(matrix, topics, groups, questions if case == "unseen" else None))
                (a, b), (c, d) = (found.min(0)[0], found.max(0)[0]), (found.min(0)[1], found.max(0)[1])
                guessed = f"{a:.3f} to {b:.3f}".rjust(19) + f"{c:.3f} to {d:.3f}".rjust(15)
            yield (
                f"{case:>8} {features:>7} {f'{auc:.3f} [{low[0]:.3f}, {high[0]:.3f}]':>22} "
                f"{f'{precision:.3f} [{low[1]:.3f}, {high[1]:.3f}]':>22}{guessed}"
            )


def matrix_of(seen: Sequence[Seen], features: str) -> Matrix:
    """A row of numbers for each trace. Raises `ValueError` for features that are not in `FEATURES`."""
    rows: list[Sequence[float]] = []
    for item in seen:
        gaps = np.diff(item.times) if len(item.times) > 1 else np.zeros(1)  # One write has no gap.
        sizes = [*item.sizes[:_FIRST], *[0] * (_FIRST - len(item.sizes))]
        amount = [len(item.sizes), sum(item.sizes)]
        times = [item.times[0], item.times[-1], *np.quantile(gaps, [0.1, 0.25, 0.5, 0.75, 0.9]), *_long(gaps)]
        if features == "sizes":
            rows.append(sizes)
        elif features == "amount":
            rows.append(amount)
        elif features == "times":
            rows.append(times)
        elif features == "all":
            rows.append([*_long(item.sizes), *amount, *times])
        else:
            raise ValueError(features)
    return np.array(rows, dtype=np.float64)


def _long(values: Sequence[float] | Matrix) -> list[float]:
    """The first `_MOST` values, padded with zeros."""
    return [*values[:_MOST], *[0.0] * (_MOST - len(values))]


def _numbered(names: Sequence[str]) -> Labels:
    order = {name: at for at, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names])


def scored(matrix: Matrix, topics: Labels, groups: Labels) -> Matrix:
    """The likelihood of each topic for each trace, from a classifier that never saw the trace's group."""
    scores = np.zeros((len(topics), topics.max() + 1))
    folds = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=_SEED)
    for train, test in folds.split(matrix, topics, groups):
        trees = ExtraTreesClassifier(_TREES, min_samples_leaf=2, random_state=_SEED, n_jobs=-1)
        trees.fit(matrix[train], topics[train])
        # A fold's training part may lack a topic; its column stays at zero.
        scores[np.ix_(test, trees.classes_)] = trees.predict_proba(matrix[test])
    return scores


def measured(topics: Labels, scores: Matrix, weights: Matrix | None = None) -> tuple[float, float]:
    """ROC AUC and AUPRC, each the mean over topics against all others."""
    auc, precision = [], []
    for topic in range(scores.shape[1]):
        truth = topics == topic
        if weights is not None and not (weights[truth].any() and weights[~truth].any()):
            continue  # A resample without this topic.
        auc.append(roc_auc_score(truth, scores[:, topic], sample_weight=weights))
        precision.append(average_precision_score(truth, scores[:, topic], sample_weight=weights))
    return float(np.mean(auc)), float(np.mean(precision))


def _interval(topics: Labels, scores: Matrix, questions: Labels) -> tuple[Matrix, Matrix]:
    """The 95 % bootstrap interval of ROC AUC and AUPRC: questions are drawn with all their traces."""
    rng = np.random.default_rng(_SEED)
    count = questions.max() + 1
    found = []
    for _ in range(_RESAMPLES):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)
        found.append(measured(topics, scores, drawn[questions]))
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    return low, high


def _guessing(matrix: Matrix, topics: Labels, groups: Labels, together: Labels | None) -> list[tuple[float, float]]:
    """The same attack on shuffled labels. `together`: groups that keep one label, if the folds hold groups out."""
    rng = np.random.default_rng(_SEED)
    found = []
    for _ in range(_SHUFFLES):
        if together is None:
            shuffled = rng.permutation(topics)
        else:
            of_group = np.array([topics[together == group][0] for group in range(together.max() + 1)])
            shuffled = rng.permutation(of_group)[together]
        with warnings.catch_warnings():
            # Shuffled topics do not fill every fold evenly, as intended.
            warnings.simplefilter("ignore", UserWarning)
            found.append(measured(shuffled, scored(matrix, shuffled, groups)))
    return found
