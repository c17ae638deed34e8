"""From a model, a batch and a budget to a training plan: every lever under one byte bound, least time first.

Ways to train are in tiers by what they change in what is learned: nothing, then fewer bits of optimizer states, then
weights without a master, then adapters. A later tier is looked at only if nothing of an earlier one fits. Within a tier
the ways are tried from the fastest on; one that failed rules out all that use no lever more. The way that wins is
traced whole. Deep stacks are tried on the first few of their blocks and drawn out to all: peaks grow by the block.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn

from memfit.account.account import Account
from memfit.account.dry_run import trace
from memfit.account.replay import Products
from memfit.account.settle import settle
from memfit.account.structure import stacked_blocks
from memfit.distilling import plan_with_teacher
from memfit.errors import DoesNotFit, UsageError
from memfit.models import load_to_train
from memfit.planning import account_of
from memfit.source.check import check
from memfit.source.source import Source, open_source
from memfit.technique.adapters import NOT_INSTALLED, Adapters, is_installed
from memfit.train.classifier import kind_of
from memfit.train.ladder import Rung
from memfit.train.plan import TrainPlan
from memfit.train.recipe import Recipe, describe
from memfit.train.task import SteadyStep, Train, packing
from memfit.train.work import Make, Shape, products_per_second, seconds_of, shape_of, static_nbytes
from memfit.units import both_sizes, format_size, parse_size

_DEEP: Final = 4
"""Blocks of a stack from which on ways are tried on fewer."""
_CUTS: Final = (2, 4)
"""Blocks that they are tried on."""


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
    """How far each lever is pulled: a way with no lever further takes no fewer bytes. The second and the third are
    the parts that blocks, or all, are run in."""

    @property
    def parts(self) -> int:
        return max(self.levers[1:3])

    @property
    def family(self) -> tuple[int, ...]:
        """All ways that differ in the number of parts alone."""
        return (self.levers[0], *self.levers[3:])


def plan_to_train(
    model: str | Path,
    budget: str | int,
    *,
    task: Train,
    full: bool = True,
    adapters: bool = True,
    slowdown: float | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> TrainPlan:
    """The fastest way to train the task's batch within `budget` that changes least of what is learned.

    Args:
        budget: bytes at the peak of a step, of evaluation and of saving; a share is of what plain training takes.
        task: batch, sequence and hyperparameters; of its recipe, the optimizer.
        full: whether the whole model may be trained; adapters: whether adapters may, if nothing else fits.
        slowdown: the most times the duration of a plain step.

    Raises:
        DoesNotFit: nothing fits; names the smallest budget and the way that takes it.
    """
    source = open_source(model)
    check(source)
    stored = stored_dtype(source)

    make: Make = lambda recipe: load_to_train(source, recipe)  # noqa: E731
    plain = task.with_recipe(plain_recipe(stored, task))
    nbytes = parse_size(
        budget, whole_nbytes=lambda: account_of(source, plain, device=device, dtype=plain.dtype).peak_nbytes
    )
    return plan_with_teacher(
        lambda task: plan_training(
            make, source.name, task, nbytes, stored=stored, full=full,
            adapters=adapters, slowdown=slowdown, device=device, progress=progress,
        ), task, kind_of(source), device=device,
    )  # fmt: skip


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
        UsageError: the model has a sequence too short for the task, or nothing may be trained.
    """
    if not (full or adapters):
        raise UsageError("neither the whole model nor adapters may be trained (full=False, adapters=False): allow one.")
    missing = full and adapters and not is_installed()  # then adapters are not looked at
    shape = shape_of(make)
    tracer = _Tracer(make, task, device, shape)
    rate = products_per_second(torch.float32 if stored == torch.float32 else torch.bfloat16)
    frugal: list[Recipe] = []
    plain = seconds_of(shape, task, Recipe(), rate)
    for tier in tiers(task, stored, full=full, adapters=adapters and not missing):
        ways = list(_ways(shape, task, tier, rate, slowdown, plain))
        if not ways:
            continue
        frugal.append(max(ways, key=lambda way: way.levers).recipe)
        for chosen in _feasible(ways, tracer, budget_nbytes, progress):
            progress("counting the whole of what was found")
            recipe = _keep_blocks(chosen.recipe, shape, tracer, budget_nbytes)
            account = tracer.whole(recipe)
            if account.peak_nbytes > budget_nbytes and recipe != chosen.recipe:
                recipe, account = chosen.recipe, tracer.whole(chosen.recipe)
            if account.peak_nbytes <= budget_nbytes:
                seconds = seconds_of(shape, task, recipe, rate)
                return TrainPlan(
                    model=name, task=task.with_recipe(recipe), budget_nbytes=budget_nbytes,
                    predicted=account.to_json(), changes=tier.changes, seconds=seconds, slowdown=seconds / plain,
                    device=device, rungs=_rungs(recipe, account, tracer),
                )  # fmt: skip
    raise _refusal(frugal, tracer, budget_nbytes, slowdown, missing=missing)


def _refusal(
    frugal: list[Recipe], tracer: "_Tracer", budget_nbytes: int, slowdown: float | None, *, missing: bool
) -> DoesNotFit:
    if not frugal:
        raise UsageError(f"no way to train takes at most {slowdown} times as long as plain training. Allow more.")
    # Of every tier the most frugal way; the whole of the smallest, as a user will ask for just that.
    recipe = min(frugal, key=tracer.peak)
    least, how = (account := tracer.whole(recipe)).peak_nbytes, describe(recipe, len(tracer.shape.blocks))
    worst = max(account.phases, key=lambda phase: phase.peak_nbytes)
    levers = {}
    for what, other in _smaller(tracer.task).items():
        there = _Tracer(tracer.make, other, tracer.device, tracer.shape)
        levers[what] = max(0, least - there.whole(recipe).peak_nbytes)
    helps = "".join(f" {what} frees {format_size(nbytes)}." for what, nbytes in levers.items() if nbytes)
    helps += f" A --slowdown above {slowdown:g} may, too." if slowdown is not None else ""
    helps += f" Adapters may take less, and were not looked at: {NOT_INSTALLED}." if missing else ""
    return DoesNotFit(
        f"{both_sizes(budget_nbytes, least)} needed at the least (in {worst.name}), with "
        f"{how}. The smallest budget that works is {least} bytes.{helps}",
        smallest_nbytes=least, levers=levers,
    )  # fmt: skip


def _smaller(task: Train) -> dict[str, Train]:
    """What a user could ask for in place of the task."""
    found = {}
    if task.batch > 1:
        found[f"--batch {task.batch // 2}"] = replace(task, batch=task.batch // 2)
    if task.sequence > 1:
        found[f"--sequence {task.sequence // 2}"] = replace(task, sequence=task.sequence // 2)
    return found


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype of most of a checkpoint's weights; of a config alone, what it says, or bf16."""
    nbytes: dict[torch.dtype, int] = {}
    if source.checkpoint is not None:
        for info in source.tensors.values():
            nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
        return max(nbytes, key=nbytes.__getitem__, default=torch.bfloat16)
    said = getattr(source.config, "dtype", None)
    return said if isinstance(said, torch.dtype) else torch.bfloat16


def plain_recipe(stored: torch.dtype, task: Train) -> Recipe:
    """Plain training: nothing saved, as a user would write it. Shares of its peak are what a budget in % means."""
    half = stored in (torch.bfloat16, torch.float16)
    return Recipe(precision="master" if half else "fp32", optimizer=task.recipe.optimizer, chunk_nbytes=None)


def plain_training(model: str | Path, task: Train) -> Train:
    """The task with the recipe of plain training, in the precision that the model is stored in."""
    return task.with_recipe(plain_recipe(stored_dtype(open_source(model)), task))


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
    recomputes: tuple[tuple[str, ...], ...] = ((), shape.blocks) if shape.blocks and not task.keeps_blocks else ((),)
    places: tuple[Literal["memory", "disk"], ...] = ("memory", "disk")
    options = itertools.product(
        recomputes, splits, rows, (False, True) if whole else (False,), places, places, places
    )  # fmt: skip
    packs = not whole and tier.settings["adapters"].base_bits < 16
    for recompute, split, by_rows, in_backward, states, store, weights in options:
        # The inputs of blocks are small beside the states: they go to the disk last, and are few ways more to try.
        if store == "disk" and (states == "memory" or not recompute):
            continue
        # Weights go there after the inputs, and whatever else waits beside them: they are read in every pass.
        if weights == "disk" and (store == "memory" or packs or (whole and not in_backward)):
            continue
        if split > 1 and not recompute and (in_backward or by_rows):
            continue  # each micro-batch would leave rows until the update, or have its update wait for the last
        settings = dict(tier.settings)
        if split > 1:
            if recompute:
                settings["slices"] = split
            else:
                settings["micro_batch"] = -(-task.batch // split)
                settings["gradients"] = "fp32" if settings["precision"] != "fp32" else "weights"
        recipe = Recipe(
            **settings, recompute=recompute, rows=by_rows, in_backward=in_backward, states=states, store=store,
            weights=weights, chunk_nbytes=chunk,
        )  # fmt: skip
        seconds = seconds_of(shape, task, recipe, rate)
        if slowdown is not None and seconds > slowdown * plain:
            continue
        levers = (
            int(bool(recompute)), split if recompute else 0, 0 if recompute else split, int(by_rows),
            int(in_backward), int(states == "disk"), int(store == "disk"), int(weights == "disk"),
        )  # fmt: skip
        found.append(Way(recipe=recipe, seconds=seconds, levers=levers))
    yield from sorted(found, key=lambda way: (way.seconds, way.levers))


def _feasible(
    ways: Sequence[Way], tracer: "_Tracer", budget_nbytes: int, progress: Callable[[str], None]
) -> Iterator[Way]:
    """The ways that seem to fit, the fastest first; what pulls no lever further than one that failed is left out.

    Ways that differ in the number of parts alone are looked at together: the most parts tell whether any fits, and
    halving finds the fewest that do.
    """
    failed: list[tuple[int, ...]] = []

    def fits(way: Way) -> bool:
        if any(all(a <= b for a, b in zip(way.levers, other, strict=True)) for other in failed):
            return False
        tried = tracer.lower_bound(way.recipe)
        if tried <= budget_nbytes:
            tried = tracer.peak(way.recipe)
            progress(f"{format_size(tried)} with {describe(way.recipe, len(tracer.shape.blocks))}")
        if tried > budget_nbytes:
            failed.append(way.levers)
        return tried <= budget_nbytes

    families: dict[tuple[int, ...], list[Way]] = {}
    for way in ways:
        families.setdefault(way.family, []).append(way)
    found: set[tuple[int, ...]] = set()
    if not fits(max(ways, key=lambda way: way.levers)):
        return
    for way in ways:
        family = sorted(families[way.family], key=lambda one: one.parts)
        if way.family not in found:
            if not fits(family[-1]):
                continue
            found.add(way.family)
            low, high = 0, len(family) - 1  # the fewest parts that fit are at one of low..high
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if fits(family[middle]) else (middle + 1, high)
        if fits(way):
            yield way


def _keep_blocks(recipe: Recipe, shape: Shape, tracer: "_Tracer", budget_nbytes: int) -> Recipe:
    """With room left, the last blocks keep their activations: they are the first to be used and freed.

    What a kept block costs is told by the two ends, all recomputed and all kept.
    """
    every = len(recipe.recompute)
    if not every or recipe.slices > 1 or recipe.weights != "memory":
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


def _rungs(recipe: Recipe, account: Account, tracer: "_Tracer") -> tuple[Rung, ...]:
    """The recipe, and others that learn the same in less memory: more parts, then every lever that needs no states."""
    blocks, batch = tracer.shape.blocks, tracer.task.batch
    end = account.phase("step").end_nbytes
    found = [Rung(recipe=recipe, peak_nbytes=account.peak_nbytes, extra_nbytes=account.peak_nbytes - end)]
    if blocks and not tracer.task.keeps_blocks:
        parts = max(recipe.slices, -(-batch // (recipe.micro_batch or batch)))
        whole = replace(recipe, recompute=blocks, micro_batch=None, gradients="weights")
        tried = [replace(whole, slices=min(batch, 2 * parts)), replace(whole, slices=batch)]
        if recipe.adapters is None:
            rows = tracer.shape.tables and recipe.optimizer in ("adamw", "sgd")
            tried.append(replace(whole, slices=batch, in_backward=True, rows=rows))
    else:
        tried = [replace(recipe, micro_batch=size) for size in (max(1, batch // 4), 1)]
    for other in tried:
        peak = tracer.peak(other)
        if peak < found[-1].peak_nbytes:
            found.append(Rung(recipe=other, peak_nbytes=peak, extra_nbytes=max(0, peak - end)))
    return tuple(found)


# -- bytes --------------------------------------------------------------------------------------------


class _Tracer:
    """Traces ways, and remembers what it found."""

    def __init__(self, make: Make, task: Train, device: str, shape: Shape) -> None:
        self.make, self.task, self.device, self.shape = make, task, device, shape
        self._peaks: dict[Recipe, int] = {}
        self._whole: dict[Recipe, Account] = {}
        self._products: Products = {}
        self._repeats: dict[Recipe, Products] = {}

    def whole(self, recipe: Recipe) -> Account:
        """The account of the whole model."""
        if recipe not in self._whole:
            self._whole[recipe] = self._account(recipe, None)
        return self._whole[recipe]

    def lower_bound(self, recipe: Recipe) -> int:
        """Bytes that the recipe takes at the least, whatever the batch."""
        return static_nbytes(self.shape, recipe)

    def peak(self, recipe: Recipe) -> int:
        """The peak of a steady step, of deep models from few of their blocks."""
        if recipe in self._whole or len(self.shape.blocks) <= _DEEP:
            return self.whole(recipe).peak_nbytes
        if recipe not in self._peaks:
            few, more = (self._account(recipe, count) for count in _CUTS)
            left = len(self.shape.blocks) - _CUTS[1]
            self._peaks[recipe] = max(
                b.peak_nbytes + left * (b.peak_nbytes - a.peak_nbytes) // (_CUTS[1] - _CUTS[0])
                for a, b in zip(few.phases, more.phases, strict=True)
                if b.name != "load" or packing(recipe) is None
            )
        return self._peaks[recipe]

    def _account(self, recipe: Recipe, count: int | None) -> Account:
        task = self.task.with_recipe(recipe)

        def made() -> nn.Module:
            if count is None:
                return self.make(recipe)
            # Packed when it is cut, to save time: so it is not loaded as the whole will be, which is left out above.
            model = self.make(replace(recipe, adapters=None))
            _cut(model, count)
            return model

        if count is not None:
            kept = {name for name in recipe.recompute if int(name.rpartition(".")[2]) < count}
            task = task.with_recipe(replace(recipe, recompute=tuple(n for n in recipe.recompute if n in kept)))
        traced = task if count is None else SteadyStep(task)
        repeats = self._repeats.setdefault(replace(recipe, recompute=("some",) if recipe.recompute else ()), {})
        ledger = trace(made, traced, device=self.device, products=self._products, repeats=repeats)
        return settle(ledger, device=self.device, heap=count is None)


def _cut(model: nn.Module, count: int) -> None:
    """Leave the first `count` blocks of every stack."""
    stacks = {name.rpartition(".")[0] for name, _ in stacked_blocks(model)}
    for name in stacks:
        stack = model.get_submodule(name)
        assert isinstance(stack, nn.ModuleList)
        del stack[count:]
