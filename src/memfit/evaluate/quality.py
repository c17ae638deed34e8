"""How close a fitted model is to its original: a value, and the interval of a mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

LEVEL: Final = 0.95
INTERVAL: Final = "Student t over windows, 95 %"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A fitted model beside its original, on the same text. What a kind of model does not have is None."""

    kl: float | None
    """Mean KL(original ‖ fitted) of the predicted distributions, in nats a token."""
    kl_interval: tuple[float, float] | None
    """95 % confidence interval of `kl`; how it is made is said by `interval`."""
    perplexity: float | None
    """exp of the mean negative log-likelihood of the text's next tokens, fitted model."""
    perplexity_reference: float | None
    """The same of the original."""
    top1: float | None
    """Share of positions where both find the same token likeliest."""
    tokens: int
    """Positions compared."""
    windows: int = 0
    cosine: float | None = None
    """Encoders without a head: mean cosine of the two models' pooled embeddings of each window."""
    cosine_interval: tuple[float, float] | None = None
    interval: str = INTERVAL

    @property
    def lost(self) -> float:
        """How far it is from the original: KL, or 1 − cosine where there is none."""
        return self.kl if self.kl is not None else 1.0 - (self.cosine or 0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "kl": self.kl,
            "kl_interval": _listed(self.kl_interval),
            "perplexity": self.perplexity,
            "perplexity_reference": self.perplexity_reference,
            "top1": self.top1,
            "tokens": self.tokens,
            "windows": self.windows,
            "cosine": self.cosine,
            "cosine_interval": _listed(self.cosine_interval),
            "interval": self.interval,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Quality":
        pairs = {k: tuple(data[k]) if data[k] else None for k in ("kl_interval", "cosine_interval")}
        return cls(**(data | pairs))


def _listed(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)


def mean_interval(clusters: Sequence[float], *, level: float = LEVEL) -> tuple[float, float]:
    """Confidence interval of the mean of what `clusters` are independent, equally large samples of.

    mean ± t(n − 1) · s / √n, s the standard deviation of the cluster means (Student). Tokens of one window
    depend on each other, so the windows are the sample. Student's t rather than a bootstrap of percentiles,
    which with the ten to fifty windows of an evaluation covers too little; and it needs no random numbers.
    One cluster alone says nothing of the spread: (mean, mean).
    """
    # Not scipy.stats: that import alone takes longer than most evaluations of a small model.
    from scipy.special import stdtrit

    n = len(clusters)
    mean = math.fsum(clusters) / n
    if n == 1:
        return mean, mean
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in clusters) / (n - 1))
    half = float(stdtrit(n - 1, (1 + level) / 2)) * deviation / math.sqrt(n)
    return mean - half, mean + half
