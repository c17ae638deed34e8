"""A training plan, as a value: what is trained, how, what it will take, and what it changes in what is learned."""

import json
from dataclasses import dataclass
from typing import Any, Final

from memfit.errors import BrokenInput

from .recipe import Recipe
from .task import Train

VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How to train within a budget."""

    model: str
    task: Train
    """With the recipe that was chosen."""
    budget_nbytes: int
    predicted: dict[str, Any]
    """The account of the whole model trained so (`Account.to_json`)."""
    changes: tuple[str, ...] = ()
    """What is learned otherwise than by plain training, and why it was chosen; empty: nothing is."""
    seconds: float = 0.0
    """Of a step, about: from counted work, at the speed of this machine's products."""
    slowdown: float = 1.0
    """`seconds` to those of a plain step, if memory were no matter."""
    device: str = "cpu"

    @property
    def recipe(self) -> Recipe:
        return self.task.recipe

    @property
    def peak_nbytes(self) -> int:
        return int(self.predicted["peak_nbytes"])

    @property
    def fits(self) -> bool:
        return self.peak_nbytes <= self.budget_nbytes

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION, "model": self.model, "task": self.task.to_json(), "budget_nbytes": self.budget_nbytes,
            "fits": self.fits, "changes": list(self.changes), "seconds": self.seconds, "slowdown": self.slowdown,
            "device": self.device, "predicted": self.predicted,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TrainPlan":
        """The plan that `to_json` wrote.

        Raises:
            BrokenInput: it is none, or of another version.
        """
        try:
            if data["version"] != VERSION:
                raise BrokenInput(f"the plan is of version {data['version']}, this memfit reads {VERSION}. Plan again.")
            return cls(
                model=data["model"], task=Train.from_json(data["task"]), budget_nbytes=int(data["budget_nbytes"]),
                predicted=data["predicted"], changes=tuple(data["changes"]), seconds=float(data["seconds"]),
                slowdown=float(data["slowdown"]), device=data["device"],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise BrokenInput(f"this is no training plan ({type(error).__name__}: {error}).") from error

    def dumps(self) -> str:
        """As a file's text; the same plan gives the same text."""
        return json.dumps(self.to_json(), indent=1) + "\n"
