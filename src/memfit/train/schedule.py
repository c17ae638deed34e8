"""The learning rate over a run: a warm-up from nothing, then constant, or down to nothing."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

Kind = Literal["cosine", "linear", "constant"]
KINDS: Final = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A factor of the learning rate for each step: rises linearly over `warmup` steps, then follows `kind`."""

    steps: int
    """Of the whole run."""
    warmup: int = 0
    kind: Kind = "cosine"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must be from 0 to the {self.steps} steps of the run, got {self.warmup}")

    def factor(self, step: int) -> float:
        """Of step 0, 1, ...: above 0 at the first, 1 at the end of the warm-up, and at the last just above 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = max(0.0, 1.0 - done)
        return left if self.kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
