"""The loop: batches in their order, steps by a recipe that follows the memory there is, evaluation, checkpoints.

What a run learns is a function of model, data, seed and settings: the batch of step n is the n-th, and chance in step
n is drawn from (seed, n). So a step can be repeated, and a run that was killed goes on as if it had not been.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from memfit.account.malloc import LEVELS
from memfit.account.meter import resident_nbytes, trim
from memfit.errors import Interrupted, MemfitError, UsageError
from memfit.technique.checkpoint import is_out_of_memory
from memfit.units import format_size

from .checkpoints import Checkpoints
from .freed import Freed
from .ladder import Ladder
from .recipe import describe
from .room import room_nbytes
from .schedule import Schedule
from .step import TrainStep

T = TypeVar("T")

_WAITS: Final = 5
"""Times that a step is tried again where no recipe is left, after 1, 2, 4, ... seconds."""


class Data(Protocol):
    """Batches by epoch and number, always the same."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def batch(self, epoch: int, index: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step."""

    step: int
    """From 1."""
    loss: float
    labels: int
    tokens: int
    rate: float
    """The learning rate."""
    seconds: float
    peak_nbytes: int
    """Of the step: allocated on a GPU; resident on a CPU, beyond what was there before the model, less files' pages."""
    rung: int
    gradient_norm: float | None = None
    skipped: bool = False
    waiting_nbytes: int = LEVELS[0]
    """On a CPU: blocks of fewer bytes that the step freed waited in the heap (see `freed`)."""


class Observer(Protocol):
    """Is told what happens: a progress bar, a log."""

    def begin(self, total: int, budget_nbytes: int | None) -> None: ...

    def step(self, record: Record) -> None: ...

    def note(self, step: int, what: str) -> None: ...

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long a run is, and what it does on its way."""

    schedule: Schedule
    seed: int = 0
    save_every: int = 0
    """Steps between checkpoints; 0: one at the end."""
    evaluate_every: int = 0
    budget_nbytes: int | None = None
    runtime_nbytes: int = 0
    """On a CPU, what the process may grow by beyond the budget, which bounds allocated bytes: the runtime's own."""


class Loop:
    """One run.

    Args:
        step: what trains.
        data: what it is trained on.
        ladder: recipes that learn the same, the planned one first.
        checkpoints: None: nothing is saved.
        evaluate: gives scores; `score`, the lower the better, tells the best checkpoint.
        outside_nbytes: resident bytes of the process before the model, on a CPU.
        stop: asked after every step; True: save, and raise Interrupted.
    """

    def __init__(
        self,
        step: TrainStep,
        data: Data,
        settings: Settings,
        *,
        ladder: Ladder,
        checkpoints: Checkpoints | None = None,
        evaluate: Callable[[TrainStep], Mapping[str, float]] | None = None,
        observers: tuple[Observer, ...] = (),
        outside_nbytes: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.step, self.data, self.settings, self.ladder = step, data, settings, ladder
        self.checkpoints, self.evaluate, self.observers = checkpoints, evaluate, observers
        self.outside_nbytes, self.stop = outside_nbytes, stop
        self.device = next(step.model.parameters()).device
        self.done = 0
        self._waited, self._trouble = 0, ""
        self.freed = Freed(settings.budget_nbytes, active=None if self.device.type == "cpu" else False)
        self._files = resident_nbytes()["file"]
        self.records: list[Record] = []
        """Of the steps done; of those before a resumption, what the caller puts here."""
        self.notes: list[tuple[int, str]] = []
        self.scores: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None

    # -- the run ----------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Go on from the last checkpoint, if there is one; the steps that were done.

        Raises:
            UsageError: it is of other data, another seed or other settings.
        """
        assert self.checkpoints is not None
        known = self.checkpoints.steps()
        if not known:
            return 0
        place = self.checkpoints.place(known[-1])
        for name, ours in self._identity().items():
            theirs = place["identity"].get(name)
            if theirs != ours:
                raise UsageError(
                    f"{self.checkpoints.at(known[-1])}: was made with another {name} ({theirs}, now {ours}). Go on "
                    "with the same, or start anew in another directory."
                )
        self._take(self.checkpoints.restore(self.step, known[-1]))
        return self.done

    @property
    def as_predicted(self) -> list[Record]:
        """Steps that freed memory as the prediction has it: the others chose to hold more, for speed."""
        least = min((record.waiting_nbytes for record in self.records), default=0)
        return [record for record in self.records if record.waiting_nbytes == least]

    def run(self) -> None:
        """All steps that are left.

        Raises:
            Interrupted: `stop` said so; the run was saved before.
            LossNotFinite: and the last checkpoint is kept.
            MemfitError: memory was too short for the most frugal recipe.
        """
        total = self.settings.schedule.steps
        for observer in self.observers:
            observer.begin(total, self.settings.budget_nbytes)
        try:
            self._run(total)
        finally:
            self.freed.give_back()
            for observer in self.observers:
                observer.end()

    def _run(self, total: int) -> None:
        while self.done < total:
            if (why := self.ladder.fit(self._room())) is not None:
                self._move(why)
            record = self._one()
            if record is None:
                continue
            self.done += 1
            self._waited = 0
            self.records.append(record)
            for observer in self.observers:
                observer.step(record)
            self._watch_budget(record)
            last = self.done == total
            scored = self._is_time(self.settings.evaluate_every, last) and self._evaluate()
            if self._is_time(self.settings.save_every, last) or (scored and self._is_best):
                self.save()
            if self.stop() and not last:
                self.save()
                raise Interrupted(
                    f"stopped after step {self.done} of {total}; "
                    + ("it is saved, and the same command with --resume goes on." if self.checkpoints else "not saved.")
                )

    def save(self) -> None:
        """Write a checkpoint."""
        if self.checkpoints is None:
            return
        best = None if self.best is None else int(self.best["step"])
        place = {
            "step": self.done, "identity": self._identity(), "schedule": self.settings.schedule.to_json(),
            "epoch": self.done // len(self.data), "index": self.done % len(self.data), "rung": self.ladder.at,
            "best": self.best, "scores": self.scores, "notes": self.notes,
        }  # fmt: skip
        self.checkpoints.save(self.step, place, keep=set() if best is None else {best})

    # -- a step -----------------------------------------------------------------------------------------

    def _one(self) -> Record | None:
        """The next step; None: it has to be done again, by a recipe that takes less."""
        epoch, index = divmod(self.done, len(self.data))
        batch = {name: tensor.to(self.device) for name, tensor in self.data.batch(epoch, index).items()}
        factor = self.settings.schedule.factor(self.done)
        self.step.mover.rate = factor
        draw_from(self.settings.seed, self.done)
        self._reset_peak()
        started = time.perf_counter()
        outcome = self._tried(lambda: self.step(batch))
        if outcome is None:
            self._recover()
            return None
        return Record(
            step=self.done + 1, loss=outcome.loss, labels=outcome.labels, tokens=batch["input_ids"].numel(),
            rate=self.step.hyper.lr * factor,
            seconds=time.perf_counter() - started, peak_nbytes=self._peak(), rung=self.ladder.at,
            gradient_norm=outcome.gradient_norm, skipped=outcome.skipped, waiting_nbytes=self.freed.waiting_nbytes,
        )  # fmt: skip

    def tried(self, do: Callable[[], T], what: str) -> T:
        """What `do` gives, which changes nothing; where memory runs out, by a recipe that takes less.

        Raises:
            MemfitError: memory was too short for the most frugal recipe; what was learned is saved.
        """
        while (found := self._tried(do)) is None:
            if not self._make_room():
                self.save()
                raise self._too_little(what)
        self._waited = 0
        return found

    def _tried(self, do: Callable[[], T]) -> T | None:
        """What `do` gives; None: memory ran out. Outside of the `except` block nothing holds its tensors."""
        try:
            return do()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._trouble = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None

    def _make_room(self) -> bool:
        """Memory ran out: free what is held and go down a rung, or wait; False: there is nothing more to do."""
        self.step.discard()
        gc.collect()
        trim()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.freed.give_back():
            self._note("memory ran out: freed memory goes back at once from here on")
        elif self.ladder.failed():
            self._move("memory ran out")
        elif self._waited < _WAITS:
            # Who took the memory may give it back.
            self._note(f"memory ran out with the most frugal recipe: trying again in {1 << self._waited} s")
            time.sleep(1 << self._waited)
            self._waited += 1
        else:
            return False
        return True

    def _too_little(self, what: str) -> MemfitError:
        known = [] if self.checkpoints is None else self.checkpoints.steps()
        return MemfitError(
            f"memory ran out {what} with the most frugal recipe that learns the same ({self._trouble}). "
            + (f"The checkpoint of step {known[-1]} is kept. " if known else "There is no checkpoint yet. ")
            + "Free some memory, or plan again with a smaller budget."
        )

    def _recover(self) -> None:
        """A step ran out of memory: make room; go back to the last checkpoint if weights have moved."""
        begun = self.step.updates_begun
        if not self._make_room():
            raise self._too_little(f"at step {self.done + 1}")
        if not begun:
            return
        known = [] if self.checkpoints is None else self.checkpoints.steps()
        if self.checkpoints is None or not known:
            raise MemfitError(
                f"memory ran out at step {self.done + 1} when some weights had been updated, and there is no "
                "checkpoint to go back to. Save more often (--save-every), or plan with a smaller budget."
            )
        # All as it was then, but the recipe and what is known of why it was changed.
        rung, notes = self.ladder.at, self.notes
        self._take(self.checkpoints.restore(self.step, known[-1]) | {"rung": rung})
        self.notes = notes
        self._note(f"went back to step {self.done}, as some weights had been updated")

    def _move(self, why: str) -> None:
        recipe = self.ladder.rung.recipe
        self.step.change(recipe)
        blocks = max((len(rung.recipe.recompute) for rung in self.ladder.rungs), default=0)
        self._note(f"{why}: going on with {describe(recipe, blocks)}")

    def _watch_budget(self, record: Record) -> None:
        """A measured peak over the budget: the next steps take less."""
        budget = self.settings.budget_nbytes
        measured = record.peak_nbytes
        if self.freed.watch(measured) or budget is None:
            return
        allowed = budget if self.device.type == "cuda" else budget + self.settings.runtime_nbytes
        if measured > allowed and self.ladder.failed():
            self._move(f"{format_size(measured)} measured, {format_size(allowed)} allowed")

    # -- parts ------------------------------------------------------------------------------------------

    def _evaluate(self) -> bool:
        if self.evaluate is None:
            return False
        evaluate = self.evaluate
        found = self.tried(lambda: evaluate(self.step), f"in the evaluation after step {self.done}")
        scores = dict(found) | {"step": self.done}
        self.scores.append(scores)
        for observer in self.observers:
            observer.evaluated(self.done, scores)
        score = scores.get("score", math.inf)
        if self.best is None or score < self.best["score"]:
            self.best = {"step": self.done, "score": score}
        return True

    @property
    def _is_best(self) -> bool:
        return self.checkpoints is not None and self.best is not None and self.best["step"] == self.done

    def _is_time(self, every: int, last: bool) -> bool:
        return last or (every > 0 and self.done % every == 0)

    def _identity(self) -> dict[str, Any]:
        """What decides what is learned, the length of the run aside."""
        recipe, teaching = self.step.recipe, self.step.teaching
        distil = {} if teaching is None else {"teacher": teaching.distil.to_json()}
        return distil | {
            "seed": self.settings.seed, "data": self.data.fingerprint, "settings": self.step.hyper.to_json(),
            "precision": recipe.precision, "optimizer": recipe.optimizer, "state_bits": recipe.state_bits,
        }  # fmt: skip

    def _take(self, place: Mapping[str, Any]) -> None:
        self.done = int(place["step"])
        self.best, self.scores = place["best"], list(place["scores"])
        self.notes = [(int(step), str(what)) for step, what in place["notes"]]
        self.records = [record for record in self.records if record.step <= self.done]
        at = min(int(place["rung"]), len(self.ladder.rungs) - 1)
        if at != self.ladder.at:
            self.ladder.at = at
            self.step.change(self.ladder.rung.recipe)

    def _note(self, what: str) -> None:
        self.notes.append((self.done + 1, what))
        for observer in self.observers:
            observer.note(self.done + 1, what)

    def _room(self) -> int:
        return room_nbytes(self.device) + self.freed.free_nbytes()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of the resident size begins anew

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Code that a step was the first to run, and files that were read, are no part of the model.
        found = resident_nbytes()
        return max(0, found["peak"] - self.outside_nbytes - max(0, found["file"] - self._files))


def draw_from(seed: int, step: int) -> None:
    """Let all that chance decides in a step follow from the seed and the step."""
    state = (seed * 1_000_003 + step + 1) % (1 << 63)
    torch.manual_seed(state)
    random.seed(state)
