"""How good a classifier is: accuracy, precision, recall, F1, each with its interval.

Of two classes, class 1 is the positive one; of more, precision, recall and F1 are means over the classes (macro).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

Interval = tuple[float, float]
_RESAMPLES: Final = 2000
_Z: Final = 1.959963984540054
"""95 % of a normal distribution lie within so many standard deviations."""


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Scores of predictions beside labels; intervals of 95 %."""

    rows: int
    accuracy: float
    accuracy_interval: Interval
    """Wilson's (1927)."""
    precision: float
    recall: float
    f1: float
    f1_interval: Interval
    """Percentiles of the F1 of resampled rows (bootstrap)."""
    confusion: tuple[tuple[int, ...], ...]
    """Rows of each class (first index) that were taken for each class (second)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Classification":
        low, high = data["accuracy_interval"]
        f_low, f_high = data["f1_interval"]
        table = tuple(tuple(int(count) for count in row) for row in data["confusion"])
        return cls(**(data | {"accuracy_interval": (low, high), "f1_interval": (f_low, f_high), "confusion": table}))


def classify_score(
    predicted: Sequence[int], labels: Sequence[int], classes: int, *, seed: int = 0
) -> Classification:
    """Scores of `predicted` beside `labels`, both numbers of classes.

    Raises:
        ValueError: there are no rows, or not as many of the one as of the other, or a class is out of range.
    """
    if len(predicted) != len(labels) or not len(labels):
        raise ValueError(f"{len(predicted)} predictions and {len(labels)} labels: as many as labels, and one at least")
    joint = np.asarray(labels, dtype=np.int64) * classes + np.asarray(predicted, dtype=np.int64)
    if not (min(*predicted, *labels) >= 0 and max(*predicted, *labels) < classes):
        raise ValueError(f"a class is not among the {classes} from 0 to {classes - 1}")
    table = np.bincount(joint, minlength=classes**2).reshape(classes, classes)
    precision, recall, f1 = _scores(table)
    # Resampling rows is drawing counts of the table's cells.
    drawn = np.random.Generator(np.random.PCG64(seed)).multinomial(
        len(labels), table.reshape(-1) / len(labels), size=_RESAMPLES
    )
    f1s = _f1(drawn.reshape(-1, classes, classes))
    return Classification(
        rows=len(labels), accuracy=float(np.trace(table)) / len(labels),
        accuracy_interval=wilson(int(np.trace(table)), len(labels)),
        precision=precision, recall=recall, f1=f1,
        f1_interval=(float(np.quantile(f1s, 0.025)), float(np.quantile(f1s, 0.975))),
        confusion=tuple(tuple(int(count) for count in row) for row in table),
    )  # fmt: skip


def wilson(right: int, rows: int) -> Interval:
    """The 95 % interval of a share `right` of `rows` (Wilson 1927)."""
    share, square = right / rows, _Z * _Z
    middle = (share + square / (2 * rows)) / (1 + square / rows)
    half = _Z * math.sqrt(share * (1 - share) / rows + square / (4 * rows * rows)) / (1 + square / rows)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def _scores(table: np.ndarray) -> tuple[float, float, float]:
    """(precision, recall, F1) of a confusion table; 0 where nothing was predicted, or nothing was there."""
    right = np.diag(table).astype(float)
    precision = right / np.maximum(table.sum(0), 1)
    recall = right / np.maximum(table.sum(1), 1)
    f1 = float(_f1(table[None])[0])
    if len(table) == 2:
        return float(precision[1]), float(recall[1]), f1
    return float(precision.mean()), float(recall.mean()), f1


def _f1(tables: np.ndarray) -> np.ndarray:
    """The F1 of each of several confusion tables."""
    right = np.diagonal(tables, axis1=1, axis2=2).astype(float)
    each: np.ndarray = 2 * right / np.maximum(tables.sum(1) + tables.sum(2), 1)
    return each[:, 1] if tables.shape[1] == 2 else each.mean(1)
