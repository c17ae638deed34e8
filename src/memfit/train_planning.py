"""From a model, a batch and a budget to a training plan: every lever under one byte bound, least time first.

Ways to train are in tiers by what they change in what is learned: nothing, then fewer bits of optimizer states, then
weights without a master, then adapters. A later tier is looked at only if nothing of an earlier one fits. Within a tier
the ways are tried from the fastest on; one that failed rules out all that use no lever more. The way that wins is traced
whole. Deep stacks are tried on the first few of their blocks and drawn out to all: peaks grow by the block.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from memfit.account.account import Account
from memfit.account.dry_run import dry_run, no_collection
from memfit.account.replay import stacked_blocks
from memfit.errors import DoesNotFit, UsageError
from memfit.technique.adapters import Adapters
from memfit.technique.row_gradients import known_lookup
from memfit.train.objective import output_head, why_no_chunks
from memfit.train.plan import TrainPlan
from memfit.train.recipe import Recipe
from memfit.train.task import Train
from memfit.units import format_size

Make = Callable[[torch.dtype], nn.Module]
"""From a dtype to the model with its weights in it; called on fake tensors."""

_DEEP: Final = 6
"""Blocks of a stack from which on ways are tried on fewer."""
_CUTS: Final = (2, 4)
"""Blocks that they are tried on."""
_DISK_NBYTES: Final = 1.0e9
"""Bytes a second to a disk and back: an estimate, on the low side of what is common."""
_EACH_SLICE: Final = 0.02
"""Share of a step's time that each doubling of slices or micro-batches costs: products get smaller."""


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Settings that learn alike."""

    settings: dict[str, Any]
    changes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train a tier's settings, and what makes it slower."""

    recipe: Recipe
    seconds: float
    levers: tuple[int, ...]
    """How far each lever is pulled: a way with no lever further takes no fewer bytes."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What counts of a model: parameters of its blocks, of its head, of all; the names of its blocks."""

    blocks: tuple[str, ...]
    in_blocks: int
    in_head: int
    parameters: int
    chunks: bool
    tables: bool


def plan_training(
    make: Make,
    name: str,
    task: Train,
    budget_nbytes: int,
    *,
    stored: torch.dtype,
    full: bool = True,
    adapters: bool = True,
    slowdown: float | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> TrainPlan:
    """The fastest way to train `task`'s batch within the budget that changes least of what is learned.

    Args:
        make: the model, on fake tensors.
        name: of the model, for messages.
        task: batch, sequence and hyperparameters; of its recipe, the optimizer.
        budget_nbytes: allowed at the peak, allocated bytes.
        stored: the dtype of the checkpoint's weights: those in 16 bits are trained in bf16 with an exact fp32 master.
        full: whether the whole model may be trained.
        adapters: whether adapters may be trained instead, if nothing else fits; without `full`, from the start.
        slowdown: the most times the duration of a plain step.
        device: `cpu` or `cuda`, whose allocator is meant.

    Raises:
        DoesNotFit: nothing fits; names the smallest budget and the nearest ways.
        UsageError: the model has a sequence too short for the task, or no way to be trained.
    """
    shape = shape_of(make)
    tracer = _Tracer(make, task, device, shape)
    rate = products_per_second(torch.float32 if stored == torch.float32 else torch.bfloat16)
    nearest: tuple[int, str] | None = None
    plain = _seconds(shape, task, Recipe(), rate)
    for tier in tiers(task, stored, full=full, adapters=adapters):
        ways = list(_ways(shape, task, tier, rate, slowdown, plain))
        if not ways:
            continue
        frugal = max(ways, key=lambda way: way.levers)
        least = tracer.peak(frugal.recipe)
        if nearest is None or least < nearest[0]:
            nearest = (least, describe(frugal.recipe, len(shape.blocks)))
        if least > budget_nbytes:
            continue
        progress("searching the way that is fastest")
        for chosen in _feasible(ways, tracer, budget_nbytes):
            recipe = _keep_blocks(chosen.recipe, shape, tracer, budget_nbytes)
            account = tracer.whole(recipe)
            if account.peak_nbytes > budget_nbytes and recipe != chosen.recipe:
                recipe, account = chosen.recipe, tracer.whole(chosen.recipe)
            if account.peak_nbytes <= budget_nbytes:
                seconds = _seconds(shape, task, recipe, rate)
                return TrainPlan(
                    model=name, task=task.with_recipe(recipe), budget_nbytes=budget_nbytes,
                    predicted=account.to_json(), changes=tier.changes, seconds=seconds, slowdown=seconds / plain,
                    device=device,
                )  # fmt: skip
    raise _refusal(nearest, budget_nbytes, task, slowdown)


def _refusal(nearest: tuple[int, str] | None, budget_nbytes: int, task: Train, slowdown: float | None) -> DoesNotFit:
    if nearest is None:
        raise UsageError(f"no way to train is at most {slowdown} times as slow as plain training. Allow more --slowdown.")
    least, how = nearest
    helps = ""
    if task.batch > 1 or task.sequence > 1:
        helps = f" A batch of {max(1, task.batch // 2)} or a sequence of {max(1, task.sequence // 2)} tokens takes less."
    return DoesNotFit(
        f"{format_size(budget_nbytes)} allowed, {format_size(least)} needed at the least, with {how}. "
        f"The smallest budget that works is {least} bytes.{helps}",
        smallest_nbytes=least,
    )


# -- what may be chosen -------------------------------------------------------------------------------


def tiers(task: Train, stored: torch.dtype, *, full: bool, adapters: bool) -> Iterator[Tier]:
    """Settings by what they change, the least first."""
    half = stored in (torch.bfloat16, torch.float16)
    optimizer = task.recipe.optimizer
    exact = "master" if half else "fp32"
    if full:
        yield Tier(settings={"precision": exact, "optimizer": optimizer}, changes=())
        if optimizer in ("adamw", "sgd"):
            for bits in (16, 8):
                yield Tier(
                    settings={"precision": exact, "optimizer": optimizer, "state_bits": bits},
                    changes=(f"optimizer states of {bits} bits",),
                )
            for bits in (8, 4):
                yield Tier(
                    settings={"precision": "stochastic", "optimizer": optimizer, "state_bits": bits},
                    changes=("bf16 weights, rounded stochastically", f"optimizer states of {bits} bits"),
                )
    if adapters:
        for base in (16, 4):
            changes = ["LoRA adapters of rank 16 are trained in place of the weights"]
            changes += [f"the frozen weights have {base} bits"] if base < 16 else []
            yield Tier(
                settings={
                    "precision": exact if base == 16 else "master",
                    "optimizer": optimizer,
                    "adapters": Adapters(base_bits=base),
                },
                changes=tuple(changes),
            )


def _ways(
    shape: Shape, task: Train, tier: Tier, rate: float, slowdown: float | None, plain: float
) -> Iterator[Way]:
    """All ways to train a tier's settings, the fastest first."""
    found = []
    whole = tier.settings.get("adapters") is None
    chunk = 32 << 20 if shape.chunks else None
    splits = [1 << n for n in range(task.batch.bit_length()) if 1 << n <= task.batch]
    rows = (False, True) if shape.tables and whole and tier.settings["optimizer"] in ("adamw", "sgd") else (False,)
    recomputes: tuple[tuple[str, ...], ...] = ((), shape.blocks) if shape.blocks else ((),)
    options = itertools.product(
        recomputes, splits, rows, (False, True) if whole else (False,), ("memory", "disk"), ("memory", "disk")
    )
    for recompute, split, by_rows, in_backward, states, store in options:
        if (store == "disk" and not recompute) or (in_backward and not recompute and split > 1):
            continue
        settings = dict(tier.settings)
        if split > 1:
            if recompute:
                settings["slices"] = split
            else:
                settings["micro_batch"] = -(-task.batch // split)
                settings["gradients"] = "fp32" if settings["precision"] != "fp32" else "weights"
        recipe = Recipe(
            **settings, recompute=recompute, rows=by_rows, in_backward=in_backward, states=states, store=store,
            chunk_nbytes=chunk,
        )  # fmt: skip
        seconds = _seconds(shape, task, recipe, rate)
        if slowdown is not None and seconds > slowdown * plain:
            continue
        levers = (
            int(bool(recompute)), split if recompute else 0, 0 if recompute else split, int(by_rows),
            int(in_backward), int(states == "disk"), int(store == "disk"),
        )  # fmt: skip
        found.append(Way(recipe=recipe, seconds=seconds, levers=levers))
    yield from sorted(found, key=lambda way: (way.seconds, way.levers))


def _feasible(ways: Sequence[Way], tracer: "_Tracer", budget_nbytes: int) -> Iterator[Way]:
    """The ways that seem to fit, the fastest first; what pulls no lever further than one that failed is left out."""
    failed: list[tuple[int, ...]] = []
    for way in ways:
        if any(all(a <= b for a, b in zip(way.levers, other, strict=True)) for other in failed):
            continue
        if tracer.peak(way.recipe) <= budget_nbytes:
            yield way
        else:
            failed.append(way.levers)


def _keep_blocks(recipe: Recipe, shape: Shape, tracer: "_Tracer", budget_nbytes: int) -> Recipe:
    """With room left, the last blocks keep their activations: they are the first to be used and freed.

    What a kept block costs is told by the two ends, all recomputed and all kept.
    """
    every = len(recipe.recompute)
    if not every or recipe.slices > 1:
        return recipe
    least = tracer.whole(recipe).peak_nbytes
    most = tracer.peak(replace(recipe, recompute=(), store="memory"))
    kept = int((budget_nbytes - least) * every // max(most - least, 1))
    while 0 < kept < every:
        mixed = replace(recipe, recompute=recipe.recompute[: every - kept])
        if tracer.whole(mixed).peak_nbytes <= budget_nbytes:
            return mixed
        kept = kept * 3 // 4
    return recipe


# -- bytes --------------------------------------------------------------------------------------------


class _Tracer:
    """Traces ways, and remembers what it found."""

    def __init__(self, make: Make, task: Train, device: str, shape: Shape) -> None:
        self.make, self.task, self.device, self.shape = make, task, device, shape
        self._peaks: dict[Recipe, int] = {}
        self._whole: dict[Recipe, Account] = {}

    def whole(self, recipe: Recipe) -> Account:
        """The account of the whole model."""
        if recipe not in self._whole:
            self._whole[recipe] = self._account(recipe, None)
        return self._whole[recipe]

    def peak(self, recipe: Recipe) -> int:
        """The peak, of deep models from few of their blocks."""
        if recipe in self._whole or len(self.shape.blocks) <= _DEEP:
            return self.whole(recipe).peak_nbytes
        if recipe not in self._peaks:
            few, more = (self._account(recipe, count) for count in _CUTS)
            left = len(self.shape.blocks) - _CUTS[1]
            self._peaks[recipe] = max(
                b.peak_nbytes + left * (b.peak_nbytes - a.peak_nbytes) // (_CUTS[1] - _CUTS[0])
                for a, b in zip(few.phases, more.phases, strict=True)
            )
        return self._peaks[recipe]

    def _account(self, recipe: Recipe, count: int | None) -> Account:
        task = self.task.with_recipe(recipe)

        def made() -> nn.Module:
            model = self.make(task.dtype)
            if count is not None:
                _cut(model, count)
            return model

        if count is not None:
            kept = {name for name in recipe.recompute if int(name.rpartition(".")[2]) < count}
            task = task.with_recipe(replace(recipe, recompute=tuple(n for n in recipe.recompute if n in kept)))
        return dry_run(made, task, device=self.device)


def _cut(model: nn.Module, count: int) -> None:
    """Leave the first `count` blocks of every stack."""
    stacks = {name.rpartition(".")[0] for name, _ in stacked_blocks(model)}
    for name in stacks:
        stack = model.get_submodule(name)
        assert isinstance(stack, nn.ModuleList)
        del stack[count:]
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = min(count, config.num_hidden_layers)


def shape_of(make: Make) -> Shape:
    """What counts of the model that `make` makes."""
    with no_collection(), FakeTensorMode(allow_non_fake_inputs=True):
        model = make(torch.bfloat16)
        blocks = tuple(stacked_blocks(model))
        head = output_head(model)
        in_blocks = sum(p.numel() for _, block in blocks for p in block.parameters())
        chunks = why_no_chunks(model) is None and not type(model).__name__.endswith("ForSequenceClassification")
        return Shape(
            blocks=tuple(name for name, _ in blocks),
            in_blocks=in_blocks,
            in_head=0 if head is None else head.weight.numel(),
            parameters=sum(p.numel() for p in model.parameters()),
            chunks=chunks,
            tables=chunks and any(known_lookup(module) for module in model.modules()),
        )


# -- time ---------------------------------------------------------------------------------------------


def _seconds(shape: Shape, task: Train, recipe: Recipe, rate: float) -> float:
    """Of a step, from counted work: 2 operations for each weight and token and pass; 20 bytes for each weight moved."""
    tokens = task.batch * task.sequence
    forward = 2.0 * shape.in_blocks * tokens / rate
    head = 2.0 * shape.in_head * tokens / rate
    share = len(recipe.recompute) / max(len(shape.blocks), 1)
    whole = recipe.adapters is None
    seconds = forward * (3 if whole else 2) + head * (3 if whole else 2) + share * forward
    clipped = task.hyper.clip is not None
    if recipe.rows:
        seconds += head * (3 if clipped else 1)
    if recipe.in_backward and clipped:
        seconds += forward * (3 + share) + head * 3
    parts = max(recipe.slices, -(-task.batch // (recipe.micro_batch or task.batch)))
    seconds *= 1.0 + _EACH_SLICE * (parts.bit_length() - 1)
    if whole:
        seconds += shape.parameters * (4e-9 if recipe.state_bits >= 16 else 6e-9)
        if recipe.states == "disk":
            seconds += 2 * shape.parameters * recipe.state_bits / 4 / _DISK_NBYTES
    if recipe.store == "disk":
        width = (shape.in_blocks / max(len(shape.blocks), 1) / 12) ** 0.5
        seconds += 2 * len(recipe.recompute) * tokens * width * 2 / _DISK_NBYTES
    return seconds


def products_per_second(dtype: torch.dtype) -> float:
    """Floating-point operations a second of this machine's products, by a short probe."""
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    left @ right
    started, turns = time.perf_counter(), 0
    while time.perf_counter() - started < 0.05:
        left @ right
        turns += 1
    return 2.0 * 512 * 1024 * 1024 * turns / (time.perf_counter() - started)


def describe(recipe: Recipe, blocks: int) -> str:
    """A recipe in words."""
    parts = [
        {
            "fp32": "fp32 weights", "autocast": "fp32 weights and bf16 products",
            "master": "bf16 weights with an fp32 master", "stochastic": "bf16 weights rounded stochastically",
            "kahan": "bf16 weights with a remainder", "bf16": "bf16 weights", "fp16": "fp16 weights, an fp32 master",
        }[recipe.precision],
        f"{recipe.optimizer} with states of {recipe.state_bits} bits",
    ]  # fmt: skip
    if recipe.adapters is not None:
        base = f" over {recipe.adapters.base_bits}-bit weights" if recipe.adapters.base_bits < 16 else ""
        parts.append(f"{recipe.adapters.kind} adapters of rank {recipe.adapters.rank}{base}")
    if recipe.micro_batch is not None:
        parts.append(f"micro-batches of {recipe.micro_batch}")
    if recipe.recompute:
        parts.append(f"{len(recipe.recompute)} of {blocks} blocks recomputed")
    if recipe.slices > 1:
        parts.append(f"in {recipe.slices} slices")
    if recipe.in_backward:
        parts.append("updates within the backward pass")
    if recipe.rows:
        parts.append("embedding and head updated by rows")
    for place, what in ((recipe.states, "optimizer states"), (recipe.store, "inputs of blocks")):
        if place != "memory":
            parts.append(f"{what} in {place}" if place == "int8" else f"{what} on the {place}")
    return ", ".join(parts)
