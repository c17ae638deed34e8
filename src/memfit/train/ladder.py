"""Which recipe a run is on: down a rung where memory is short, up again where there is room."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from .recipe import Recipe

PATIENCE: Final = 20
"""Steps without trouble before a larger recipe is tried again; twice as many after each that failed."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A recipe that learns the same as the others, and what it takes."""

    recipe: Recipe
    peak_nbytes: int
    extra_nbytes: int
    """Of the peak, what a step takes beyond what stays between steps."""

    def to_json(self) -> dict[str, Any]:
        return {"recipe": self.recipe.to_json(), "peak_nbytes": self.peak_nbytes, "extra_nbytes": self.extra_nbytes}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Rung":
        return cls(
            recipe=Recipe.from_json(data["recipe"]), peak_nbytes=int(data["peak_nbytes"]),
            extra_nbytes=int(data["extra_nbytes"]),
        )  # fmt: skip


class Ladder:
    """Rungs from the planned one down to the most frugal, and the one in use."""

    def __init__(self, rungs: Sequence[Rung], *, at: int = 0) -> None:
        self.rungs = tuple(rungs)
        self.at = min(at, len(self.rungs) - 1)
        self._quiet = 0
        self._patience = PATIENCE

    @property
    def rung(self) -> Rung:
        return self.rungs[self.at]

    def down(self) -> bool:
        """To the next rung that takes less; False: this is the last."""
        self._quiet = 0
        if self.at + 1 >= len(self.rungs):
            return False
        self.at += 1
        return True

    def failed(self) -> bool:
        """Down, after memory ran out: the rung above is not tried again so soon."""
        self._patience *= 2
        return self.down()

    def fit(self, room_nbytes: int) -> str | None:
        """Before a step: go down as far as the room asks for, or up if there has been room for long. What was done."""
        before = self.at
        while self.rung.extra_nbytes > room_nbytes and self.down():
            pass
        if self.at != before:
            return "memory is short"
        self._quiet += 1
        if self.at and self._quiet > self._patience and self.rungs[self.at - 1].extra_nbytes <= room_nbytes:
            self.at -= 1
            self._quiet = 0
            return "there is room again"
        return None
