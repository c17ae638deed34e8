"""A training plan, as a value: what is trained, how, what it will take, and what it changes in what is learned."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memfit.account.account import Account
from memfit.errors import BrokenInput

from .ladder import Ladder, Rung
from .recipe import Recipe
from .task import Train

if TYPE_CHECKING:
    from .callback import PlanCallback

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
    rungs: tuple[Rung, ...] = ()
    """The recipe chosen, and more frugal ones that learn the same, should memory become short."""

    @property
    def recipe(self) -> Recipe:
        return self.task.recipe

    @property
    def peak_nbytes(self) -> int:
        return int(self.predicted["peak_nbytes"])

    @property
    def fits(self) -> bool:
        return self.peak_nbytes <= self.budget_nbytes

    @property
    def ladder(self) -> Ladder:
        """The rungs, to go down and up while a run goes on."""
        end = Account.from_json(self.predicted).phase("step").end_nbytes
        first = Rung(recipe=self.recipe, peak_nbytes=self.peak_nbytes, extra_nbytes=self.peak_nbytes - end)
        return Ladder(self.rungs or (first,))

    def callback(self) -> "PlanCallback":
        """For transformers' Trainer: `Trainer(..., callbacks=[plan.callback()])` trains each batch as planned."""
        from .callback import PlanCallback

        return PlanCallback(self)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION, "model": self.model, "task": self.task.to_json(), "budget_nbytes": self.budget_nbytes,
            "fits": self.fits, "changes": list(self.changes), "seconds": self.seconds, "slowdown": self.slowdown,
            "device": self.device, "rungs": [rung.to_json() for rung in self.rungs], "predicted": self.predicted,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TrainPlan":
        """The plan that `to_json` wrote.

        Raises:
            BrokenInput: it is none, or of another version.
        """
        try:
            if "choices" in data:
                raise BrokenInput("this is a plan to run a model (`memfit fit --plan`). Make one with --task train.")
            if data["version"] != VERSION:
                raise BrokenInput(f"the plan is of version {data['version']}, this memfit reads {VERSION}. Plan again.")
            return cls(
                model=data["model"], task=Train.from_json(data["task"]), budget_nbytes=int(data["budget_nbytes"]),
                predicted=data["predicted"], changes=tuple(data["changes"]), seconds=float(data["seconds"]),
                slowdown=float(data["slowdown"]), device=data["device"],
                rungs=tuple(Rung.from_json(rung) for rung in data["rungs"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise BrokenInput(f"this is no training plan ({type(error).__name__}: {error}).") from error

    def dumps(self) -> str:
        """As a file's text; the same plan gives the same text."""
        return json.dumps(self.to_json(), indent=1) + "\n"


def read_train_plan(file: str | Path) -> TrainPlan:
    """The plan in a file.

    Raises:
        BrokenInput: it cannot be read, or is none.
    """
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenInput(f"{file}: no plan can be read here ({error}).") from error
    try:
        return TrainPlan.from_json(data)
    except BrokenInput as error:
        raise BrokenInput(f"{file}: {error}") from error
