"""What is learned, in numbers: settings that a plan never changes."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Learning rate and what belongs to it."""

    lr: float = 1e-5
    weight_decay: float = 0.01
    """Decoupled, of matrices alone: vectors (norms, biases) are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    """Of sgd and muon."""
    clip: float | None = 1.0
    """The largest norm of a gradient; None: as it is."""
    rank: int = 128
    """Of a projected gradient (galore, apollo)."""

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise ValueError(f"lr must be at least 0, got {self.lr}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, or None, got {self.clip}")

    def decay_of(self, parameter: Tensor) -> float:
        """The weight decay of a parameter: its group is told by its shape."""
        return self.weight_decay if parameter.dim() > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Hyper":
        return cls(**(data | {"betas": tuple(data["betas"])}))
