"""Training as a task: two steps, the first of which makes the optimizer's states, then evaluation, save and resume.

The same lines run on fake tensors, to predict, and on real ones, to measure.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from memfit.account.account import Kind
from memfit.account.dry_run import hold_model
from memfit.account.watch import Unwatched, Watch
from memfit.errors import UsageError
from memfit.packed.scheme import Scheme
from memfit.task.infer import vocabulary
from memfit.technique.distil import Distil
from memfit.technique.quantize import quantize

from .distil import Teacher, Teaching, load_teaching, made_up_answers
from .gradients import trained
from .hyper import Hyper
from .objective import Classifier, LanguageModel
from .recipe import Recipe
from .save import restore_states, save_states
from .states import InMemory
from .step import TrainStep

if TYPE_CHECKING:
    from .plan import TrainPlan


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train on `batch` texts of `sequence` tokens a step."""

    batch: int = 8
    sequence: int = 512
    recipe: Recipe = field(default_factory=Recipe)
    hyper: Hyper = field(default_factory=Hyper)
    distil: Distil | None = None
    """A teacher to learn from beside the text."""
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        found = {
            "task": "train", "batch": self.batch, "sequence": self.sequence,
            "recipe": self.recipe.to_json(), "hyper": self.hyper.to_json(),
        }  # fmt: skip
        return found if self.distil is None else found | {"distil": self.distil.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Train":
        return cls(
            batch=data["batch"], sequence=data["sequence"],
            recipe=Recipe.from_json(data["recipe"]), hyper=Hyper.from_json(data["hyper"]),
            distil=None if data.get("distil") is None else Distil.from_json(data["distil"]),
        )  # fmt: skip

    @property
    def keeps_blocks(self) -> bool:
        """Whether no block may be run again: attention that is matched must be there in the backward pass."""
        return self.distil is not None and "attention" in self.distil.match

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are loaded in."""
        return self.recipe.dtype

    def with_recipe(self, recipe: Recipe) -> "Train":
        return replace(self, recipe=recipe)

    def run(self, model: nn.Module, watch: Watch) -> None:
        """Run every phase on `model`, telling `watch` where the task is."""
        with watch.phase("load"):
            make_trainable(model, self.recipe)
            told = _Steps(watch)
            teaching = load_teaching(self.distil, watch, device=next(model.parameters()).device)
            step = TrainStep(model, self.recipe, hyper=self.hyper, watch=told, teaching=teaching)
            hold_model(model, watch)
            batch = made_up_batch(model, step, self.batch, self.sequence)
        try:
            told.prefix = "first "
            step(batch)
            tell_states(step, watch)
            told.prefix = ""
            step(batch)
            with watch.phase("evaluation"):
                step.evaluate(batch)
            with watch.phase("save"):
                saved = save_states(step, None)
            with watch.phase("resume"):
                restore_states(step, saved)
        finally:
            step.close()


@dataclass(frozen=True)
class SteadyStep:
    """The second step of a task alone: enough to compare ways to train, in half of the time."""

    task: Train
    learns: ClassVar[bool] = True

    def run(self, model: nn.Module, watch: Watch) -> None:
        """Make the states as a first step would, and run one step."""
        with watch.phase("load"):
            make_trainable(model, self.task.recipe)
            teaching = load_teaching(self.task.distil, watch, device=next(model.parameters()).device)
            step = TrainStep(model, self.task.recipe, hyper=self.task.hyper, watch=watch, teaching=teaching)
            batch = made_up_batch(model, step, self.task.batch, self.task.sequence)
        try:
            for name, parameter in trained(model):
                step.mover.make(name, parameter)
            step(batch)
        finally:
            step.close()


def make_trainable(model: nn.Module, recipe: Recipe) -> None:
    """Give the model its adapters; without, let every float parameter be trained, unless some are chosen already."""
    if recipe.adapters is not None:
        recipe.adapters.apply(model, quantize=_rounded)
    elif not any(parameter.requires_grad for parameter in model.parameters()):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())


def packing(recipe: Recipe) -> Callable[[nn.Module, Callable[[str], Tensor]], None] | None:
    """What packs a model as `make_trainable` would, while it is loaded (`source.load`); None if nothing is packed."""
    adapters = recipe.adapters
    if adapters is None or adapters.base_bits == 16:
        return None
    return lambda model, read: adapters.pack(model, _rounded, read)


def _rounded(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    found = quantize(weight, scheme)
    return found.q, found.scale, found.zero


def made_up_batch(model: nn.Module, step: TrainStep, rows: int, tokens: int) -> dict[str, Tensor]:
    """Random token ids [B, T] and labels, as the step's objective wants them, and answers if a teacher gave them."""
    objective = step.objective
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if isinstance(most, int) and tokens > most and not getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"sequences of {tokens} tokens, and the model's context has {most} (max_position_embeddings). "
            "Choose a shorter --sequence."
        )
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.randint(0, vocabulary(model), (rows, tokens), generator=generator).to(device)
    if isinstance(objective, LanguageModel):
        return made_up_answers({"input_ids": ids, "labels": ids.clone()}, objective, step.teaching, vocabulary(model))
    if isinstance(objective, Classifier):
        classes = getattr(config, "num_labels", 2)
        labels = torch.randint(0, classes, (rows,), generator=generator).to(device)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # rows are of different lengths: a mask without a gap would be dropped by some models
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return made_up_answers(batch, objective, step.teaching, classes)
    return {"input_ids": ids}


def tell_states(step: TrainStep, watch: Watch) -> None:
    """Name the optimizer's states."""
    states = step.mover.states
    if isinstance(states, InMemory):
        for name, tensors in states.tensors.items():
            for tensor in tensors.values():
                watch.holds("optimizer", name.rpartition(".")[0], tensor)


class _Steps:
    """A watch that calls the phases of the first step by names of their own."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.prefix = watch, ""

    @property
    def may_skip(self) -> bool:
        return self.watch.may_skip

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self.watch.phase(self.prefix + name)

    def holds(self, kind: Kind, module: str, tensor: Tensor) -> None:
        self.watch.holds(kind, module, tensor)

    def on_disk(self, tensor: Tensor) -> None:
        self.watch.on_disk(tensor)


def train_step(
    model: nn.Module,
    plan: "TrainPlan | Train",
    *,
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] | None = None,
    directory: str | None = None,
    seed: int = 0,
    teacher: nn.Module | None = None,
) -> TrainStep:
    """What trains `model` as planned, in a loop of one's own: `step(batch)` is one step, and tells its loss.

    Args:
        model: is changed: cast, given adapters if the plan has any, its blocks wrapped. `step.close()` unwraps them.
            If none of its parameters requires a gradient, all are trained.
        plan: of `memfit.plan`, or a task with a recipe of one's own.
        loss: `loss(model, batch)` -> mean over the batch's rows; default: by the model's class.
        directory: where states go that the plan puts on the disk.
        seed: of stochastic rounding.
        teacher: of a task with `distil`; default: loaded, unless its answers come with each batch.

    Where the plan keeps weights on the disk, the blocks' parameters have no values of their own between steps;
    `step.close()` gives them back.

    A batch has `input_ids` and `labels` (−100 is ignored) of a language model; or `input_ids`, `attention_mask` and one
    label a row of a classifier.
    """
    task = plan if isinstance(plan, Train) else plan.task
    if teacher is not None and task.distil is None:
        raise UsageError("a teacher was given, and the task says nothing of one: Train(distil=Distil(...)).")
    make_trainable(model, task.recipe)
    if teacher is not None and task.distil is not None:
        teaching: Teaching | None = Teaching(distil=task.distil, teacher=Teacher(teacher))
    else:
        teaching = load_teaching(task.distil, Unwatched(), device=next(model.parameters()).device)
    step = TrainStep(
        model, task.recipe, hyper=task.hyper, loss=loss, directory=directory, seed=seed, teaching=teaching
    )
    step.most = (task.batch, task.sequence)
    return step
