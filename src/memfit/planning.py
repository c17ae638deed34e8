"""From what a study tells and a budget to a plan: price, search, trace the winner whole.

The plan that wins is traced whole, so the figure shown is no sum.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from memfit import __version__
from memfit.account.account import Account
from memfit.account.dry_run import Task, trace
from memfit.account.replay import Products
from memfit.account.settle import settle
from memfit.errors import DoesNotFit, UsageError
from memfit.format.config import model_config
from memfit.format.output import stored_tensors
from memfit.models import load_model
from memfit.packed.forms import Form, LowRank, techniques_of
from memfit.packed.scheme import BITS, Scheme
from memfit.plan.allowed import Allowed
from memfit.plan.front import Point, front
from memfit.plan.plan import Plan
from memfit.plan.price import Prices, prices_without_weights
from memfit.plan.search import Option, merge, smallest_budget, solve
from memfit.source.load import load
from memfit.source.planned import planned_checkpoint
from memfit.source.source import Source
from memfit.study import KV_PRICES, Study
from memfit.task.infer import Infer
from memfit.units import both_sizes, format_size

_TIGHTER: Final = 8
"""Times that less is asked of the search, by doubling steps, where its plan traced whole is over the budget."""


def make_plan(
    study: Study,
    budget_nbytes: int,
    *,
    prices: Prices | None = None,
    kv_prices: Mapping[int, float] | None = None,
    priced_by: str = "weights",
) -> Plan:
    """The plan of least expected loss whose traced peak is within the budget.

    Args:
        study: of the model, the task and what the search may choose from. No weights are read here.
        budget_nbytes: allowed at the peak of the task, allocated bytes.
        prices: by (group name, scheme); default: from shapes alone.
        kv_prices: by KV bits; those not given are as in `KV_PRICES`.
        priced_by: `text` or `weights`, for the record.

    Raises:
        DoesNotFit: nothing allowed fits; says what binds and what would help.
    """
    costs = KV_PRICES | dict(kv_prices or {})
    if prices is None:
        prices = prices_without_weights(study.groups, study.schemes)
    plan = best_plan(study, budget_nbytes, prices=prices, kv_prices=costs, priced_by=priced_by)
    if plan is None:
        raise _refusal(study, study.items(prices, costs), budget_nbytes)
    return plan


def best_plan(
    study: Study, budget_nbytes: int, *, prices: Prices, kv_prices: Mapping[int, float], priced_by: str,
    technique: str | None = None,
) -> Plan | None:  # fmt: skip
    """As `make_plan`, of what one technique alone makes if it is given; None where nothing fits."""
    costs = KV_PRICES | dict(kv_prices)
    items, kept = _options_of(study, prices, costs, technique)

    def traced(chosen: Mapping[str, int]) -> tuple[Plan, int]:
        options = {name: kept[name][index] for name, index in chosen.items()}
        plan = study.plan(options, prices, budget_nbytes, costs, priced_by)
        predicted = predict_with(study, plan)
        return replace(plan, predicted=predicted.to_json()), predicted.peak_nbytes - budget_nbytes

    merged, tried, excess = merge(items), budget_nbytes, 0
    for n in range(_TIGHTER):
        tried -= excess << max(n - 1, 0)
        solution = solve(merged, bases=study.traced.bases, budget_nbytes=tried)
        if solution is None:
            break
        plan, excess = traced(solution.chosen)
        if excess <= 0:
            return plan
        # The rows of the search are bounds from parts; where the whole is a little over, ask for less.
    plan, excess = traced(smallest_budget(merged, bases=study.traced.bases).chosen)
    return plan if excess <= 0 else None


def best_alone(
    study: Study, budget_nbytes: int, *, prices: Prices, kv_prices: Mapping[int, float], priced_by: str
) -> tuple[str, Plan] | None:
    """The technique that alone expects to lose least, and its plan, which alone is traced; None where none fits."""
    costs = KV_PRICES | dict(kv_prices)

    def expected(name: str) -> float:
        items = merge(_options_of(study, prices, costs, name)[0])
        found = solve(items, bases=study.traced.bases, budget_nbytes=budget_nbytes)
        return math.inf if found is None else found.price

    for name in sorted(study.allowed.techniques, key=expected):
        plan = best_plan(
            study, budget_nbytes, prices=prices, kv_prices=costs, priced_by=priced_by, technique=name
        )
        if plan is not None:
            return name, plan
    return None


def _options_of(
    study: Study, prices: Prices, kv_prices: Mapping[int, float], technique: str | None
) -> tuple[dict[str, list[Option]], dict[str, list[int]]]:
    """By item, the options that one technique alone has, or all, and what each is among all of the item's."""
    items = study.items(prices, kv_prices)
    kept = {name: list(range(len(options))) for name, options in items.items()}
    if technique is not None:
        for name in study.schemes:
            forms = study.forms(name, prices)
            kept[name] = [n for n, form in enumerate(forms) if form is None or techniques_of(form) == {technique}]
    return {name: [options[n] for n in kept[name]] for name, options in items.items()}, kept


ALL_TOGETHER: Final = "all together"
"""What everything that is allowed gives."""


def fronts(
    study: Study, budget_nbytes: int, *, prices: Prices, kv_prices: Mapping[int, float], count: int = 8
) -> dict[str, tuple[Point, ...]]:
    """Bytes at the peak against expected loss, for each technique that is allowed alone, and for all of them together:
    of budgets from the smallest that works, and of the one that is asked for.

    The bytes are the search's, sums of parts: a plan that is made is traced whole.
    """
    costs = KV_PRICES | dict(kv_prices)
    names = study.allowed.techniques if len(study.allowed.techniques) > 1 else ()
    return {
        name or ALL_TOGETHER: front(
            merge(_options_of(study, prices, costs, name)[0]), bases=study.traced.bases, count=count,
            also=(budget_nbytes,),
        )
        for name in (*names, None)
    }


def uniform_plan(study: Study, budget_nbytes: int) -> Plan:
    """`plainest_plan`, where something comes of it.

    Raises:
        UsageError: there is something to choose from, and nothing in the model can have it.
        DoesNotFit: that is more than the budget.
    """
    if study.allowed.asks_for_less and not any(_first_choices(study).values()):
        why = _why_nothing(study)
        raise UsageError(f"nothing in the model can be stored as asked for.{why} Choose another setting or technique.")
    return plainest_plan(study, budget_nbytes)


def plainest_plan(study: Study, budget_nbytes: int) -> Plan:
    """The plan that puts everything in the first scheme that may be chosen, the cache in the first width; no search,
    and no expected loss.

    Raises:
        DoesNotFit: that is more than the budget.
    """
    nothing: Prices = {(name, scheme): 0.0 for name, schemes in study.schemes.items() for scheme in schemes}
    chosen = _first_choices(study)
    if study.traced.kv_nbytes:
        chosen["kv_cache"] = study.kv_choices().index(next(iter(study.allowed.kv_bits), 16))
    plan = study.plan(chosen, nothing, budget_nbytes, KV_PRICES, "weights")
    predicted = predict_with(study, plan)
    if predicted.peak_nbytes > budget_nbytes:
        needed, alive = predicted.peak_nbytes, sorted(predicted.peak.alive.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{kind} {format_size(nbytes)}" for kind, nbytes in alive if nbytes)
        cache = " --kv-bits and a shorter --prompt make the KV cache smaller." if study.traced.kv_nbytes else ""
        raise DoesNotFit(
            f"{both_sizes(budget_nbytes, needed)} needed with this setting, in {predicted.peak_phase} ({parts}). "
            f"Give that budget (--budget {needed}), or a setting that keeps less.{cache}",
            smallest_nbytes=needed,
        )
    return replace(plan, predicted=predicted.to_json(), expected_kl=None)


def _first_choices(study: Study) -> dict[str, int]:
    """By name of the group 1, its first form, or 0, as it is."""
    # What a group may have by itself comes first: likeness to another block is never taken unasked. What would be
    # larger so than in 16 bits, as factors of a high rank are, stays.
    first_of = {group.name: next(iter(study.allowed.schemes(group)), None) for group in study.groups}
    return {
        group.name: int((form := first_of[group.name]) is not None and group.nbytes(form) <= group.nbytes(None))
        for group in study.groups
    }


def _why_nothing(study: Study) -> str:
    """Why the first group that may change cannot have what one technique was asked for; starts with a space."""
    first = next((group for group in study.groups if not study.allowed.is_kept(group)), None)
    if first is None:
        return " All that could change is kept (--keep)." if study.groups else " It has no linear layers and no tables."
    shapes = " and ".join(str(list(shape)) for shape in first.shapes)
    larger = next(iter(study.allowed.schemes(first)), None)
    if larger is not None:
        sizes = [format_size(first.nbytes(form)) for form in (larger, None)]
        return f" {first.name}, {shapes}, would be {sizes[0]} in place of {sizes[1]}."
    asked: list[Form]
    if "quantize" in study.allowed.techniques:
        asked = [Scheme(bits=8, group=None)]
    elif "prune" in study.allowed.techniques:
        asked = [*study.allowed.sparse]
    else:
        asked = [LowRank(rank=rank) for rank in study.allowed.ranks if isinstance(rank, int)]
    reason = next((f": {reason}" for form in asked if (reason := first.why_not(form)) is not None), "")
    return f" {first.name} is {shapes}{reason}."


def require_fit(study: Study, budget_nbytes: int) -> None:
    """Nothing, if some plan fits: to be known before hours go into finding a good one.

    Raises:
        DoesNotFit: as `make_plan` would.
    """
    items = study.items_for_nothing()
    if smallest_budget(merge(items), bases=study.traced.bases).needed_nbytes > budget_nbytes:
        refusal = _refusal(study, items, budget_nbytes)
        if refusal.smallest_nbytes > budget_nbytes:
            raise refusal


def predict_with(study: Study, plan: Plan) -> Account:
    """As `predict`, with what the study has made already."""
    return predict(
        study.source,
        plan,
        study.task,
        device=study.device,
        products=study.products,
        skeleton=study.skeleton,
    )


def predict(
    source: Source,
    plan: Plan,
    task: Infer,
    *,
    device: str = "cpu",
    products: Products | None = None,
    skeleton: nn.Module | None = None,
) -> Account:
    """The account of the fitted model loading from its files and running the task. Nothing is read.

    Args:
        products: of earlier traces on as many threads.
        skeleton: the model of `source` without weights, if there is one.
    """
    planned = planned_source(source, plan, skeleton)
    ran = replace(task, kv_bits=plan.kv_bits)
    ledger = trace(lambda: load(planned, dtype=torch.bfloat16), ran, device=device, products=products)
    return settle(ledger, device=device)


def account_of(
    source: Source, task: Task, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> Account:
    """The account of the model as it is."""
    return settle(trace(lambda: load_model(source, dtype=dtype), task, device=device), device=device)


def planned_source(source: Source, plan: Plan, skeleton: nn.Module | None = None) -> Source:
    """The source that the plan's output directory will be, its tensors announced and not there."""
    tensors, raw = plan_files(source, plan, skeleton)
    return Source(
        name=f"{source.name} as planned",
        directory=None,
        config=source.config,
        checkpoint=planned_checkpoint((spec.name, spec.dtype, spec.shape) for spec in tensors),
        raw=raw,
    )


def plan_files(
    source: Source, plan: Plan, skeleton: nn.Module | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """What the output will hold: its tensors (name, dtype, shape), in file order, and its config.json."""
    model = skeleton if skeleton is not None else source.build(dtype=torch.bfloat16)
    schemes = plan.schemes()
    layout = stored_tensors(model, schemes)
    raw = model_config(
        source.config,
        schemes=schemes,
        version=__version__,
        ignore=layout.ignore,
        embeddings=layout.embeddings,
        tied=layout.tied,
        kv_bits=plan.kv_bits,
    )
    raw["architectures"] = [type(model).__name__]
    return list(layout.specs), raw


def _refusal(study: Study, items: Mapping[str, Sequence[Option]], budget_nbytes: int) -> DoesNotFit:
    """The error: what binds, the smallest budget that works, and what each lever would free."""
    least = smallest_budget(merge(dict(items)), bases=study.traced.bases)
    smallest = _traced_smallest(study, least.chosen)
    held = {group.name: items[group.name][least.chosen[group.name]].persistent_nbytes for group in study.groups}
    # The first option of each is to stay as it is.
    whole = study.traced.fixed + sum(nbytes for name, nbytes in held.items() if least.chosen[name] == 0)
    packed = sum(nbytes for name, nbytes in held.items() if least.chosen[name] != 0)
    kv = (
        items["kv_cache"][least.chosen["kv_cache"]].held.get(least.moment, 0)
        if "kv_cache" in items
        else 0
    )
    rest = smallest - packed - whole - kv
    levers = _levers(study, items, least.needed_nbytes)
    nothing = all(len(items[group.name]) == 1 for group in study.groups)
    why = f" Nothing in it can be packed.{_why_nothing(study)}" if nothing else ""
    helps = "".join(f" {what} frees {format_size(n)}." for what, n in levers.items() if n > 0)
    return DoesNotFit(
        f"{both_sizes(budget_nbytes, smallest)} needed at the least, in "
        f"{least.moment} (packed weights {format_size(packed)}, KV cache {format_size(kv)}, "
        f"parts that stay in 16 bits {format_size(whole)}, temporary {format_size(max(rest, 0))}). "
        f"The smallest budget that works is {smallest} bytes (--budget {smallest}).{why}{helps}{_beyond(study)}",
        smallest_nbytes=smallest,
        levers=levers,
    )


def _beyond(study: Study) -> str:
    """What else makes a model smaller, where it is not in the search."""
    narrower = "a narrower model (--blocks, --channels), which takes a text to find"
    if len(study.allowed.techniques) > 1:
        return f" Less is possible by {narrower}."
    return f" Less is possible by other techniques (--allow quantize,prune,low-rank,share) and {narrower}."


def _traced_smallest(study: Study, chosen: Mapping[str, int]) -> int:
    free: Prices = {(name, scheme): 0.0 for name, found in study.schemes.items() for scheme in found}
    plan = study.plan(chosen, free, 0, dict.fromkeys(KV_PRICES, 0.0), "weights")
    return predict_with(study, plan).peak_nbytes


def _levers(study: Study, items: Mapping[str, Sequence[Option]], needed: int) -> dict[str, int]:
    """Lever to the bytes that it frees from the smallest budget."""
    task, found = study.task, {}
    shorter = {}
    if task.prompt > 1:
        half = max(1, task.prompt // 2)
        shorter[f"A prompt of {half} instead of {task.prompt} tokens"] = replace(task, prompt=half)
    if task.batch > 1:
        half = task.batch // 2
        shorter[f"A batch of {half} instead of {task.batch}"] = replace(task, batch=half)
    for what, changed in shorter.items():
        found[what] = needed - _least(study.source, changed, study.allowed, study.device)
    for bits in (4, 2):
        if study.traced.kv_nbytes and bits < min(study.kv_choices()):
            more = replace(study.allowed, kv_bits=(*study.allowed.kv_bits, bits))
            found[f"A KV cache of {bits} bits (--kv-bits)"] = needed - _least(study.source, task, more, study.device)
    if study.allowed.keep:
        free = replace(study.allowed, keep=())
        found["Leaving --keep out"] = needed - _least(study.source, task, free, study.device)
    if 2 not in study.allowed.bits:
        more = replace(study.allowed, bits=BITS)
        found["Allowing weights of 2 bits (--bits)"] = needed - _least(study.source, task, more, study.device)
    biggest = max((group.nbytes(None) for group in study.groups), default=0)
    held = sum(min(option.persistent_nbytes for option in items[group.name]) for group in study.groups)
    if held > biggest:
        found["Streaming weights from the disk as they are used, which memfit does not run yet,"] = held - biggest
    return found


def _least(source: Source, task: Infer, allowed: Allowed, device: str) -> int:
    """The smallest budget, as the search sees it."""
    study = Study(source, task, allowed, device=device)
    return smallest_budget(merge(study.items_for_nothing()), bases=study.traced.bases).needed_nbytes
