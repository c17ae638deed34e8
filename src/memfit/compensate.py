"""Integers for a whole model by GPTQ: block after block, each for the inputs that those before it now give.

The model's own forward pass calls each block once, with all of the text twice: the first half of the windows goes
through the model as it was (x), the second through what it has become (x̂). There the block's weights are read, and its
layers are taken in the order of their calls: those that read the same input share one H = E[x̂ x̂ᵀ] and one
E[(x − x̂) x̂ᵀ], made by running the block as it was and with what is already rounded in it. A layer is to give for x̂
what it gave for x (`gptq.corrected`), as far as two halves of the text agree on what that takes (`gptq.agreement`).
Plain GPTQ (`corrects` is False) wants what the layer as it was gives for x̂, and is done with one text and H alone.
Where that is asked for, the block's layers then learn together (`tune`). At last the block runs on with its new
weights, and both are let go.

A linear layer outside of the blocks, as an encoder's pooler, may see too few tokens for H: its integers are searched
for, weighed by the mean squares of what comes to it.

Legend of shapes: W windows, T time (of inputs: tokens), N outputs, K inputs, S sums of rows with random signs.
"""

import zlib
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from memfit.account.malloc import LEVELS
from memfit.account.structure import inside_blocks, structure_of
from memfit.account.watch import Anew, Watch
from memfit.calibrate.attention import attention_by_products
from memfit.calibrate.collect import arguments_of
from memfit.calibrate.inputs import add_products
from memfit.calibrate.moved import Inputs, Moved
from memfit.calibrate.passes import Pass
from memfit.calibrate.runs import AllDone, Call, Run, another, shape_alone
from memfit.calibrate.spill import Spill
from memfit.calibrate.statistics import Sums
from memfit.calibrate.stream import Streamed, head_name
from memfit.calibrate.versions import Versions
from memfit.errors import UsageError
from memfit.format.integers import Integers
from memfit.looked_up import LookedUp
from memfit.packed.fake import is_fake, repeated
from memfit.packed.forms import Form, LowRank, Narrow, Shared, basis_of, like_of, output_of
from memfit.packed.scheme import Scheme
from memfit.plan.price import Weighting
from memfit.source.source import Source
from memfit.technique.gptq import Factor, agreement, corrected, damping_for, factor
from memfit.technique.heads import fitted_output, narrow_heads
from memfit.technique.made import Made
from memfit.technique.making import make, make_for, of_tensors, order_of, tensors_of
from memfit.technique.quantize import Quantized, dequantize
from memfit.technique.share import Member, share
from memfit.technique.tune import Learner, Tuning, is_tunable, relative_error, tune

_ROWS: Final = 1024
"""Rows of a weight that are in fp32 at a time."""


Ridge = Callable[[int], float]
"""From inputs K to the damping of H [K, K]."""


@dataclass(frozen=True, kw_only=True)
class Thrift:
    """What choosing integers spares memory by, at the price of time; the integers differ by the rounding of sums."""

    batch: int = 4
    """Windows that go through a block at once."""
    hold: bool = True
    """Whether a block's weights, old and new, stay in memory until it is done; else each is read for each use."""
    spill: bool = False
    """Whether what blocks give to each other waits in files."""
    wait: bool = True
    """Whether a block's calls, for all windows, wait where the next layers' input comes by; else each begins anew."""
    rows: int | None = None
    """Rows of a weight that are rounded at once; None: as many as is fast."""
    waiting_nbytes: int = LEVELS[0]
    """Freed blocks of fewer bytes wait in the heap, which is faster (see `account.malloc`)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def compensate(
    source: Source,
    windows_WT: Tensor,
    schemes: Mapping[str, Form],
    integers: Integers,
    *,
    watch: Watch,
    thrift: Thrift | None = None,
    scratch: Path | None = None,
    weighting: Callable[[str], Weighting | None] = lambda _: None,
    damping: float | None = None,
    tuning: Tuning | None = None,
    corrects: bool = True,
) -> None:
    """Choose the integers of every linear layer but the head, and keep them in `integers`.

    Blocks that are there already are read and run: a run that was stopped goes on, to the same bytes.

    Args:
        windows_WT: token ids.
        schemes: module name to scheme; tables among them are rounded as they are looked up.
        thrift: how memory is spared.
        scratch: where files go if it spills.
        weighting: what errors of a module's weight count: of a table as it will be made with, of factors and narrow
            heads what their outputs do. None: all alike.
        damping: see `gptq.factor`; None: as `gptq.damping_for` has it.
        tuning: how each block's layers learn together, once they are chosen; None: they do not.
        corrects: whether layers make up for the errors of those before them, too; of integers alone, that do not learn,
            they need not.

    Raises:
        UsageError: a layer whose inputs are not finite, or all 0 in a block: it is named.
    """
    thrift = thrift or Thrift()
    if thrift.spill and scratch is None:
        raise ValueError("what is spilled needs a directory: give `scratch`")
    streamed, spill = Streamed(source), Spill(scratch if thrift.spill else None, watch)
    tables = LookedUp(streamed, schemes, weighting)
    dry = is_fake(windows_WT)
    known: dict[Any, Any] = {}

    owners = {owner for form in schemes.values() if (owner := like_of(form)) is not None}
    count = windows_WT.shape[0]
    ids_WT = torch.cat([windows_WT, windows_WT]) if corrects else windows_WT
    first = ids_WT.shape[0] - count
    """Of the windows that go through the model as it becomes."""

    def ridge(inputs: int) -> float:
        return damping_for(inputs, windows_WT.numel()) if damping is None else damping

    def outputs(name: str) -> Tensor | None:
        counts = weighting(name)
        return None if counts is None else counts.rows()

    def rounded(name: str, rows_ND: Tensor) -> Tensor:
        # A table of positions is looked up once for all windows, and stays as it was.
        if rows_ND.shape[0] == ids_WT.numel():
            tables.round(name, rows_ND[-windows_WT.numel() :])
        spill.let_go(rows_ND)
        return rows_ND

    def visit(name: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        anew()
        left.discard(name)
        # Nothing but what a block gives outlives its call, so of equal blocks two need to be run: the model may keep
        # what came into the first for itself. What a later block has a layer like is run whatever it equals.
        full_names = [f"{name}.{below}" for below, _ in block.named_modules()]
        kind = (structure_of(block), tuple(map(schemes.get, full_names)))
        if dry and len(known.setdefault(kind, [])) >= 2 and owners.isdisjoint(full_names):
            like, gave = known[kind][-1]
            integers.announce(name, like)
            if not left:
                raise AllDone
            return tree_map(lambda leaf: another(leaf, spill), gave)
        call = Call(forward, args, kwargs, ids_WT.shape[0], spill)
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        layers: dict[str, nn.Linear] = {
            full: module
            for below, module in block.named_modules()
            if isinstance(module, nn.Linear) and (full := f"{name}.{below}") in schemes
        }
        versions = Versions(layers, streamed.weight_of, hold=thrift.hold)
        now = Pass(Run(call, first, ids_WT.shape[0], thrift.batch), waits=thrift.wait)
        was = now  # where nothing is made up for, what a layer gave is what it gives for the same inputs
        if corrects:
            was = Pass(Run(call, 0, count, thrift.batch), within=versions.as_they_were, waits=thrift.wait)
        out: Any = None

        def learn(learners: Mapping[str, Learner]) -> dict[str, Quantized]:
            nonlocal out
            assert tuning is not None, "only then is anything learned"
            out = was.whole()
            now.close()
            return _tuned(learners, versions, now.run, out, count, tuning, spill)

        with versions.in_place(), closing(was), closing(now):
            if layers:
                _choose(
                    name, versions, was, now, schemes, integers, ridge, random, rows=thrift.rows, outputs=outputs,
                    learn=learn if tuning is not None else None,
                )  # fmt: skip
            if not left:
                raise AllDone
            if out is None and corrects:
                out = was.whole()
            out = now.whole(out)
        if dry:
            known[kind].append((name, tree_map(shape_alone, out)))
        return out

    def beside(name: str, x: Tensor) -> None:
        if name not in outside:
            return
        left.discard(name)
        if not integers.holds(name):
            _search(name, x[-count:] if x.shape[0] == ids_WT.shape[0] else x, streamed, schemes[name], integers)
        if not left:
            raise AllDone

    streamed.rounded, streamed.visit, streamed.empty, streamed.beside = rounded, visit, spill.empty, beside
    streamed.apart = frozenset(f"{name}.weight" for name in schemes)
    outside = searched_for(streamed.model, schemes)
    left = {*streamed.blocks, *outside}
    with Anew(watch, "compensate") as anew, attention_by_products(), suppress(AllDone):
        streamed.model(ids_WT, **arguments_of(streamed.model, ids_WT))


def searched_for(model: nn.Module, schemes: Mapping[str, Form]) -> set[str]:
    """The modules whose integers `compensate` searches for: linear layers outside of the blocks, but for the head."""
    blocks, head = inside_blocks(model), head_name(model)
    return {
        name
        for name, form in schemes.items()
        if isinstance(form, Scheme) and not name.startswith(blocks) and name != head
        if isinstance(model.get_submodule(name), nn.Linear)
    }


def _search(name: str, x: Tensor, streamed: Streamed, form: Form, integers: Integers) -> None:
    """Keep the integers of a layer outside of the blocks, for the inputs x [..., K]."""
    sums = Sums()
    sums.add(name, "inputs", x)
    try:
        made = make(streamed.weight_of(name), form, importance_K=sums.mean(name, "inputs"))
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    integers.add(name, name, made)
    integers.finish(name, {})


def _choose(
    block: str, versions: Versions, was: Pass, now: Pass, schemes: Mapping[str, Form], integers: Integers,
    ridge: Ridge, random: torch.Generator, *, rows: int | None, outputs: Callable[[str], Tensor | None],
    learn: Callable[[Mapping[str, Learner]], dict[str, Quantized]] | None,
) -> None:  # fmt: skip
    """Let a block's layers become what their integers say: those that are kept, or new ones.

    `learn` makes better ones of those that can be tuned; until then none of them is kept. `outputs` tells what errors
    of a layer's outputs count.
    """

    def become(name: str) -> None:
        versions.become(name, lambda: integers.weight(name, schemes, versions.shape(name)))

    def keep(name: str, made: Quantized | Made) -> None:
        integers.add(block, name, made)
        become(name)

    if integers.holds(block):
        for name in versions.layers:
            become(name)
        return
    used: dict[str, float] = {}
    learners: dict[str, Learner] = {}
    narrow: dict[str, Tensor] = {}
    for stage in _stages(versions.layers, now.run):
        moved = None if was is now else _moved(stage, versions, was, now, random)
        hessian = _inputs(stage, versions, now).hessian() if moved is None else moved.hessian()
        for name in [name for name in stage if name in narrow]:
            assert moved is not None, "integers alone are made without"
            amount, halves = moved.of(name)
            form = schemes[name]
            assert isinstance(form, Narrow), "as its values are"
            fitted, used[name] = fitted_output(
                versions.was(name), narrow.pop(name), amount, halves, hessian, form,
                damping=ridge(len(form.columns(hessian.shape[0]))),
            )
            del amount, halves
            keep(name, fitted)
            stage.remove(name)
            del fitted
        if not stage:
            continue
        order = order_of([schemes[name] for name in stage], hessian)
        try:
            made = factor(hessian, damping=ridge(hessian.shape[0]), overwrite=True, order=order)
        except ValueError as error:
            raise UsageError(f"{stage[0]}: {error}") from error
        del hessian
        owners = {owner for name in stage if (owner := basis_of(schemes[name])) is not None}
        together: dict[str, dict[str, Member]] = {owner: {} for owner in sorted(owners)}
        for name in stage:
            if moved is None:
                weight = versions.was(name).float()
            else:
                amount, halves = moved.of(name)
                part = 0.0 if halves is None else agreement(*halves, made)
                weight = corrected(versions.was(name), amount.mul_(part), made, rows=rows or _ROWS)
                del amount, halves
            used[name] = made.damping
            if (owner := basis_of(schemes[name]) or name) in together:
                together[owner][name] = Member.of(weight, factor=made, rows_N=outputs(name))
                continue
            if isinstance(form := schemes[name], Narrow):
                output = output_of(name)
                value, narrow[output] = _narrow(weight, made, output, form, versions, was, ridge, outputs(output))
                keep(name, value)
                del weight, value
                continue
            if (owner := like_of(schemes[name])) is not None:
                weight.sub_(integers.weight(owner, schemes, versions.shape(name)))
            quantized = _rounded(name, weight, made, schemes[name], rows, outputs)
            if learn is None or not isinstance(quantized, Quantized) or not is_tunable(quantized.scheme):
                keep(name, quantized)
            else:
                learners[name] = Learner(quantized, weight)
                versions.become(name, partial(dequantize, quantized))
            del weight, quantized
        for owner, members in together.items():
            basis = schemes[owner]
            assert isinstance(basis, LowRank), "a basis is a right factor"
            for name, shared in share(members, "right", basis.rank).items():
                keep(name, shared)
        del made, moved, together
    if learn is not None and learners:
        for name, quantized in learn(learners).items():
            keep(name, quantized)
    integers.finish(block, used)


def _narrow(
    weight: Tensor, made: Factor, output: str, form: Narrow, versions: Versions, was: Pass, ridge: Ridge,
    rows_M: Tensor | None,
) -> tuple[Made, Tensor]:  # fmt: skip
    """Narrow values, and the output O′ [M, D] in their basis: for what came to the output in the model as it was."""
    layer = versions.layers[output]
    total, tokens = torch.zeros(layer.in_features, layer.in_features), 0
    read = Pass(was.run, within=versions.as_they_were, waits=False)
    for half in range(len(read.halves)):
        for x_TK in read.inputs(half, layer):
            tokens += x_TK.shape[0]
            add_products(total, x_TK)
            del x_TK
    inputs = factor(total.div_(tokens), damping=ridge(layer.in_features), overwrite=True)
    del total
    value, whole = narrow_heads(
        weight, versions.was(output), width=weight.shape[0] // form.heads, kept=form.kept, factor_Q=inputs,
        rows_M=rows_M, value_base=form.base, factor_K=made,
    )  # fmt: skip
    return value, whole.parts["weight_narrow"]


def _tuned(
    learners: Mapping[str, Learner], versions: Versions, now: Run, wanted: Any, count: int, tuning: Tuning, spill: Spill
) -> dict[str, Quantized]:
    """The integers of a block's layers after they have learned together to give the first `count` windows of `wanted`;
    as they were found where that did not bring the output nearer."""
    target = next(leaf for leaf in tree_leaves(wanted) if isinstance(leaf, Tensor))

    def loss(start: int) -> Tensor:
        stop = min(start + tuning.windows, count)
        part = replace(now, start=now.start + start, stop=now.start + stop, batch=tuning.windows)
        with versions.given({name: learner.weight for name, learner in learners.items()}):
            out = next(leaf for leaf in tree_leaves(part.first()) if isinstance(leaf, Tensor))
        return relative_error(out, spill.rows(target, slice(start, start + out.shape[0])))

    before, after = tune(learners, loss, list(range(0, count, tuning.windows)), tuning=tuning)
    if not after <= before:  # of NaN too
        return {name: learner.found for name, learner in learners.items()}
    return {name: learner.result() for name, learner in learners.items()}


def _rounded(
    name: str, weight: Tensor, made: Factor, scheme: Form, rows: int | None, outputs: Callable[[str], Tensor | None]
) -> Quantized | Made:
    """What is made of a weight; a dry run tells it from an equal one."""
    counts = outputs(name) if isinstance(scheme, LowRank | Shared) else None

    def call() -> tuple[Any, ...]:
        return tensors_of(make_for(weight, scheme, made, rows=rows, rows_N=counts))

    given = lambda: (weight, made.order, made.coupling, made.weights, made.importance, made.dead)  # noqa: E731
    tensors = repeated(("made", scheme, rows), None, name, given, call)
    return of_tensors(scheme, (weight.shape[0], weight.shape[1]), tensors)


def _stages(layers: Mapping[str, nn.Linear], run: Run) -> list[list[str]]:
    """Layers that read the same tensor, in the order of their calls."""
    calls: list[tuple[Tensor, list[str]]] = []

    def hear(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if any(name in names for _, names in calls):
                return
            for tensor, names in calls:
                if tensor is inputs[0]:
                    names.append(name)
                    return
            calls.append((inputs[0], [name]))

        return hook

    handles = [layer.register_forward_pre_hook(hear(name)) for name, layer in layers.items()]
    try:
        # One window tells.
        replace(run, stop=run.start + 1, batch=1).first()
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in calls]


def _inputs(stage: list[str], versions: Versions, now: Pass) -> Inputs:
    """What layers that read one input read."""
    layer = versions.layers[stage[0]]
    inputs = Inputs(layer.in_features)
    for half in range(len(now.halves)):
        for x_TK in now.inputs(half, layer):
            inputs.add(x_TK)
            del x_TK
    return inputs


def _moved(stage: list[str], versions: Versions, was: Pass, now: Pass, random: torch.Generator) -> Moved:
    """What layers that read one input are to make up for."""
    layers = {name: versions.layers[name] for name in stage}
    first = layers[stage[0]]
    outputs = {name: layer.out_features for name, layer in layers.items()}
    moved = Moved(outputs, first.in_features, versions.was, random)
    for half in range(len(was.halves)):
        for before_TK, x_TK in zip(was.inputs(half, first), now.inputs(half, first), strict=True):
            moved.add(before_TK, x_TK)
            del before_TK, x_TK
        moved.end_half()
    return moved

