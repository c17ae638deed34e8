"""Calibrate and compress: the two passes over the weights, the same on fake tensors and on real ones.

Neither holds more of the model than a block, or a weight as packed and some rows of it as it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from memfit.account.watch import Watch
from memfit.attune import attune
from memfit.calibrate.cache_loss import cache_losses, without_floor
from memfit.calibrate.collect import collect
from memfit.calibrate.statistics import Statistics
from memfit.calibrate.stream import row_shape, rows_of
from memfit.compensate import Thrift, compensate
from memfit.format.integers import Integers
from memfit.format.output import Stored, stored_tensors, weights_of
from memfit.format.packed import OWN, stored_as, stored_scale, stored_values
from memfit.format.safetensors import Writer
from memfit.made_prices import made_prices
from memfit.packed.fake import is_fake
from memfit.packed.forms import FORM_PARTS, Own
from memfit.packed.scheme import Scheme
from memfit.plan.allowed import Allowed
from memfit.plan.groups import Group, find_groups
from memfit.plan.plan import Plan, PricedBy
from memfit.plan.price import Prices, Weighting, prices, weighting_of
from memfit.sharing import Sharing
from memfit.source.smoothed import smoothed
from memfit.source.source import Source
from memfit.technique.attune import Attuning
from memfit.technique.made import Made, joined
from memfit.technique.making import make, shared_by_rows
from memfit.technique.prune import empty_parts, put_rows
from memfit.technique.quantize import Quantized, learned, quantize
from memfit.technique.smoothing import Smoothing, find_smoothing
from memfit.technique.tune import Tuning

KV_WINDOWS: Final = 2
"""Windows that a KV cache is priced on: every position of them is compared, none is sampled."""

WEIGHING_TOKENS: Final = 4096
"""Tokens of statistics that do no more than weigh the errors of tables and heads against each other: diagonals alone,
known well from so few. The gradients of a head of many words take most of calibrating."""

_FEW_NBYTES: Final = 1 << 19
"""Of rows that are passed over but a few times: less than what the heap gives back to the system, so that no block's
pages are asked for anew."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What a pass over the text and the weights has found."""

    statistics: Statistics | None
    """None without a text."""
    prices: Prices
    """Of every scheme for every group, nats a token."""
    kv_prices: dict[int, float]
    """By bits of the KV cache, nats a token; empty without a text or a cache."""
    smoothing: Smoothing = field(default_factory=Smoothing)
    """Of the model that `statistics` and `prices` are of, and that is to be compressed."""


def calibrate(
    source: Source, windows_WT: Tensor | None, allowed: Allowed | None, *, batch: int, watch: Watch,
    by_text: bool = False, weighing: bool = False, scratch: Path | None = None,
) -> Calibrated:  # fmt: skip
    """Statistics of the text's windows, and the price of every choice.

    Without windows there are no statistics, and prices come from the weights alone. With `allowed` None nothing is
    priced.

    Args:
        by_text: whether `choose_integers` will make the linear layers of blocks: they are priced by what it errs by.
        weighing: whether statistics do no more than weigh errors of tables and heads: then a part of the text will do.
        scratch: where what blocks give each other waits in files, while that is found out; None: in memory.
    """
    groups = find_groups(source.build(dtype=torch.bfloat16))
    if weighing and windows_WT is not None:
        windows_WT = windows_WT[: -(-WEIGHING_TOKENS // windows_WT.shape[1])]
    statistics, kv_prices, everything_WT = None, {}, windows_WT
    dry = windows_WT is not None and is_fake(windows_WT)
    if windows_WT is not None:
        # From the third batch on, all that a batch needs was needed before.
        windows_WT = windows_WT[: 2 * batch] if dry else windows_WT
        wanted = frozenset(member for group in groups for member in group.members)
        with watch.phase("calibrate"):
            statistics = collect(source, windows_WT, wanted, batch=batch)
            if allowed is not None and any(bits != 16 for bits in allowed.kv_bits):
                # Two widths tell what any change costs, so a price is the same whatever else is asked for.
                widths = sorted({8, 4, *allowed.kv_bits} - {16}, reverse=True)
                kv_prices = without_floor(cache_losses(source, windows_WT[:KV_WINDOWS], widths))
    if allowed is None:
        return Calibrated(statistics=statistics, prices={}, kv_prices={})
    schemes = allowed.schemes_of(groups)
    smoothing = Smoothing()
    if statistics is not None and (members := allowed.smoothed(groups)):
        smoothing = find_smoothing(source, statistics, members, watch=watch)
        source, statistics = smoothing.of_source(source), smoothing.of_statistics(statistics)
    pairs = _complete(groups, statistics)
    found: Prices = {}
    if by_text and everything_WT is not None and pairs is not None:
        found = made_prices(
            source, everything_WT, groups, schemes, lambda name: pairs[name][1], watch=watch, batch=batch,
            scratch=scratch, narrow=allowed.narrowed(source.build(dtype=torch.bfloat16), groups),
        )  # fmt: skip
    rest = [group for group in groups if any((group.name, form) not in found for form in schemes[group.name])]
    # One of each kind is enough to know what pricing takes.
    priced = {(group.shapes, len(schemes[group.name])): group for group in rest}.values() if dry else rest
    for group in priced:
        # A phase for each group: an allocator's events are kept until their phase ends.
        with watch.phase("price"):
            found |= prices(
                groups,
                {group.name: [form for form in schemes[group.name] if (group.name, form) not in found]},
                lambda name: source.read_parameter(name, dtype=torch.bfloat16),
                pairs,
            )
    return Calibrated(statistics=statistics, prices=found, kv_prices=kv_prices, smoothing=smoothing)


def asked_of(job: dict[str, Any]) -> dict[str, Any]:
    """The options of `calibrate` as its job is told them."""
    scratch = Path(job["work"]) if job.get("spill") else None
    told = {name: job.get(name, False) for name in ("by_text", "weighing")}
    return {"batch": job["batch"], "scratch": scratch, **told}


def priced_by(source: Source, statistics: Statistics | None) -> PricedBy:
    """What `calibrate` took prices from: the text if it says something of every group, else the weights."""
    groups = find_groups(source.build(dtype=torch.bfloat16))
    return "weights" if _complete(groups, statistics) is None else "text"


def _complete(groups: tuple[Group, ...], statistics: Statistics | None) -> Any:
    """The statistics as prices take them; None unless every group that can be packed has its own."""
    if statistics is None:
        return None
    pairs = statistics.pairs()
    for group in groups:
        if group.blocked is not None:
            continue
        named = group.parameters if group.kind == "experts" else group.members
        missing = [member for member in named if member not in pairs]
        if len(missing) == len(named) or (missing and group.kind != "embedding"):
            return None
        # One of several names of a table, itself never called, as T5's `shared`: the text says nothing of it.
        if missing:
            rows, width = group.shapes[0]
            pairs |= {member: (torch.zeros(rows), torch.zeros(width)) for member in missing}
    return pairs


def choose_integers(
    source: Source, plan: Plan, statistics: Statistics | None, windows_WT: Tensor, integers: Integers, *, watch: Watch,
    thrift: Thrift | None = None, scratch: Path | None = None, tuning: Tuning | None = None,
    attuning: Attuning | None = None, corrects: bool = True,
) -> None:  # fmt: skip
    """Choose the integers of the plan's linear layers by GPTQ, block after block; see `compensate`. Then, if that is
    asked for, scales and vectors of the whole model learn; see `attune`.

    What is no linear layer of a block (tables, heads, fused experts) is left to `compress`.
    """
    groups = find_groups(source.build(dtype=torch.bfloat16))
    group_of = {member: group for group in groups for member in group.members}
    pairs = _complete(groups, statistics)

    def weighting(module: str) -> Weighting | None:
        group = group_of[module]
        parameter = next((p for p in group.parameters if p == f"{module}.weight"), group.parameters[0])
        return weighting_of(group, parameter, pairs)

    schemes = plan.schemes()
    how: dict[str, Any] = {"watch": watch, "thrift": thrift, "scratch": scratch, "weighting": weighting}
    compensate(source, windows_WT, schemes, integers, tuning=tuning, corrects=corrects, **how)
    if attuning is not None:
        attune(source, windows_WT, schemes, integers, attuning=attuning, **how)


def compress(
    source: Source,
    plan: Plan,
    statistics: Statistics | None,
    directory: Path,
    *,
    watch: Watch,
    dry: bool = False,
    integers: Integers | None = None,
    search: bool = True,
) -> dict[str, str]:
    """Quantize every weight as planned and write the model's files into `directory`.

    Weights are read some rows at a time, and each is written before the next is read; what a run that was killed has
    written into `directory` stays. Those whose integers have been
    chosen already, by `compensate`, are written with these; the others' scales are searched for, or the usual ones.

    Returns: file name to the sha256 of what was written.
    """
    if integers is not None:
        source = smoothed(source, vectors=integers.vectors, columns={})
    model = source.build(dtype=torch.bfloat16)
    schemes = plan.schemes()
    stored = stored_tensors(model, schemes)
    groups = {member: group for group in find_groups(model) for member in group.members}
    pairs = _complete(tuple(dict.fromkeys(groups.values())), statistics)
    seen: set[Any] = set()
    stem = "memfit" if stored.own else "model"

    def importance_for(module: str) -> Tensor | None:
        weighting = weighting_of(groups[module], f"{module}.weight", pairs) if search else None
        return None if weighting is None else weighting.importance()

    sharing = Sharing(source, schemes, integers, importance_for)
    with Writer(directory, stored.specs, dry=dry, stem=stem, resume=True) as writer:
        for name in stored.plain_and_packed():
            if all(writer.has(part) for part in stored.packed.get(name, (name,))):
                continue
            if dry and not sharing.concerns(stored.module_of.get(name, "")):
                # Nothing else outlives its own turn, so equal weights need to be run once.
                kind = (schemes.get(stored.module_of.get(name, "")), stored.shape_of(name))
                if kind in seen:
                    writer.pass_over(stored.packed.get(name, (name,)))
                    continue
                seen.add(kind)
            with watch.phase("compress"):
                if name in stored.packed:
                    module = stored.module_of[name]
                    group = groups[module]
                    parameter = _parameter_of(model, module, name)
                    weighting = weighting_of(group, parameter, pairs)
                    scheme = schemes[module]
                    shape = row_shape(source, parameter)
                    chosen = integers if integers is not None and module in integers else None
                    if not isinstance(scheme, Scheme):
                        if chosen is not None:
                            made = chosen.made(module, scheme, shape)
                        elif sharing.concerns(module):
                            made = sharing.made(module)
                        else:
                            made = _made(source, parameter, scheme, weighting if search else None, search=search)
                        _write_made(writer, stored, name, shape, made)
                        del made
                        continue
                    if chosen is not None:
                        rounded = chosen.rows(module, scheme)
                    else:
                        importance = None if weighting is None else weighting.importance()
                        rounded = _rounded(source, parameter, scheme, importance, search=search)
                    form = stored_as(scheme, embedding=name in stored.embeddings)
                    _write_packed(writer, stored, name, shape, scheme, rounded, form)
                else:
                    _write_plain(writer, source, model, name)
    return {shard.name: shard.sha256 for shard in writer.shards}


def _parameter_of(model: torch.nn.Module, module: str, stored: str) -> str:
    weights = weights_of(model, module)
    return stored if stored != module and stored in weights else f"{module}.weight"


def _write_plain(writer: Writer, source: Source, model: torch.nn.Module, name: str) -> None:
    spec = next(spec for spec in writer.specs if spec.name == name)
    if name in source.parameters and source.holds(name):
        if len(spec.shape) < 2:
            writer.write(name, source.read_parameter(name, dtype=spec.dtype))
        else:  # a table can be the largest tensor there is
            blocks = rows_of(source, name, dtype=spec.dtype, nbytes=_FEW_NBYTES)
            writer.write_parts(name, (rows.view(-1) for _, rows in blocks))
    else:
        owner, _, leaf = name.rpartition(".")
        writer.write(name, getattr(model.get_submodule(owner), leaf).to(spec.dtype).contiguous())


def _rounded(
    source: Source, parameter: str, scheme: Scheme, importance: Tensor | None, *, search: bool
) -> Iterator[tuple[int, Quantized]]:
    """(first row, integers of some rows) of a parameter [N, K], from its first row to its last.

    What all rows share, a codebook, is learned first, in a pass of its own.
    """
    everything = (block for _, block in rows_of(source, parameter, dtype=torch.bfloat16))
    table = learned(scheme, everything, importance)
    nbytes = None if search else _FEW_NBYTES
    for start, block in rows_of(source, parameter, dtype=torch.bfloat16, nbytes=nbytes):
        yield start, quantize(block, scheme, importance=importance, search=search, table=table)
        del block


def _write_made(writer: Writer, stored: Stored, name: str, shape: tuple[int, int], made: Made) -> None:
    """Write the parts of a form that is no scheme."""
    if made.base is not None:
        _write_packed(writer, stored, name, shape, made.base.scheme, iter([(0, made.base)]), OWN)
    for part, tensor in made.parts.items():
        if not writer.has(f"{name}.{part}"):
            writer.write(f"{name}.{part}", tensor)


def _made(
    source: Source, parameter: str, form: Own, weighting: Weighting | None, *, search: bool
) -> Made:
    """The parts of a parameter [N, K], made some rows at a time."""
    rows, inputs = row_shape(source, parameter)
    importance, counts = (None, None) if weighting is None else (weighting.importance(), weighting.rows_in_common())
    everything = (block for _, block in rows_of(source, parameter, dtype=torch.bfloat16))
    shared = shared_by_rows(form, everything, importance, counts)
    parts = empty_parts(form, (rows, inputs), torch.device("cpu"))
    base: list[Quantized] = []
    for start, block in rows_of(source, parameter, dtype=torch.bfloat16):
        some = make(block, form, importance_K=importance, search=search, shared=shared)
        assert isinstance(some, Made)
        if "weight_right" in some.parts:  # is of all rows
            parts["weight_right"] = some.parts["weight_right"]
        put_rows(parts, {part: t for part, t in some.parts.items() if part != "weight_right"}, start, rows)
        base += [] if some.base is None else [some.base]
        del some, block
    return Made(form=form, shape=(rows, inputs), parts=parts, base=joined(base) if base else None)


def _write_packed(
    writer: Writer,
    stored: Stored,
    name: str,
    shape: tuple[int, int],
    scheme: Scheme,
    rounded: Iterator[tuple[int, Quantized]],
    form: str,
) -> None:
    """Pack the integers of one weight [N, K] by blocks of rows, then write its parts in a format's form."""
    rows, width = shape
    due = {spec.name.rpartition(".")[2]: spec for spec in stored.specs if spec.name in stored.packed[name]}
    values, scale = (
        torch.empty(spec.shape, dtype=spec.dtype)
        for spec in (due.get("weight_packed") or due["weight"], due["weight_scale"])
    )
    zero = None if scheme.symmetric else torch.empty(scale.shape, dtype=torch.int8)
    table = None
    for start, made in rounded:
        part = slice(start, start + made.q.shape[0])
        values[part] = stored_values(made, form)
        scale[part] = stored_scale(made, form)
        if zero is not None and made.zero is not None:
            zero[part] = made.zero
        table = made.table
        del made
    for part_name in stored.packed[name]:
        kind = part_name.rpartition(".")[2]
        if writer.has(part_name) or kind in FORM_PARTS:
            continue
        if kind == "weight_shape":
            writer.write(part_name, torch.tensor([rows, width], dtype=torch.int64))
        elif kind == "weight_scale":
            writer.write(part_name, scale)
        elif kind == "weight_zero_point":
            assert zero is not None
            writer.write(part_name, zero)
        elif kind == "weight_codebook":
            assert table is not None
            writer.write(part_name, table)
        else:
            writer.write(part_name, values)
