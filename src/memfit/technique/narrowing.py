"""Narrowing of a model that is read from the disk: what stays found by a text, and layers that make up for the rest.

Three passes, each block by block: which blocks stay (of a few windows), which heads, channels and experts, and the
correction. In the last the model runs twice, as it was (x) and as it becomes (x̂), in the shapes that it had: a narrower
block computes what the whole one does where the layers that read what is gone have zeros in its place.

Legend of shapes: W windows, T time (of inputs: tokens), N outputs, K inputs, J inputs that stay.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from memfit.account.ledger import Shape
from memfit.account.structure import structure_of
from memfit.account.watch import Anew, Unwatched, Watch
from memfit.calibrate.collect import arguments_of, collect
from memfit.calibrate.importance import BlockLosses
from memfit.calibrate.passes import input_of
from memfit.calibrate.runs import AllDone, Call, Run, another
from memfit.calibrate.spill import Spill
from memfit.calibrate.statistics import Statistics
from memfit.calibrate.stream import Streamed, rows_of
from memfit.calibrate.versions import Versions
from memfit.errors import UsageError
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.source.checkpoint import SafetensorsCheckpoint
from memfit.source.cuts import Counts, Cuts, counts_of, find_cuts, readers_of, stack_of
from memfit.source.load import load
from memfit.source.narrowed import Kept, LiveCheckpoint, entries_of, live_source, narrowed
from memfit.source.safetensors import read_header
from memfit.source.source import Source

from .gptq import DAMPING, corrected, factor
from .narrow import Narrow, best, channel_scores, choose_blocks, choose_heads, head_scores

NARROWED: Final = "narrowed.json"
"""In the work directory: what stays."""
_FOLDER: Final = "narrowed"
"""And the weights that were made anew."""
BLOCK_WINDOWS: Final = 4
"""Windows that blocks are measured on."""
_TOKENS: Final = 2048
"""Tokens whose inputs are in fp32 at a time."""


@dataclass(frozen=True, kw_only=True)
class Readers:
    """The layers that read what can be dropped, by block, and the experts' down projections."""

    heads: Mapping[int, str]
    channels: Mapping[int, str]
    experts: Mapping[int, str]

    def modules(self) -> frozenset[str]:
        """Names of the modules that calibration listens to."""
        fused = {name.rpartition(".")[0] for name in self.experts.values()}
        return frozenset({*self.heads.values(), *self.channels.values(), *fused})


def choose_kept(
    source: Source, windows_WT: Tensor, narrow: Narrow, *, watch: Watch, batch: int = 4,
    dtype: torch.dtype = torch.bfloat16,
) -> Kept:  # fmt: skip
    """What stays of a model, by what it does to the text.

    Args:
        windows_WT: token ids.
        batch: windows run at once.
        dtype: that the model runs in.

    Raises:
        UsageError: it cannot be narrowed so; told before anything is read.
    """
    whole, counts = counts_of(source.config), narrow.counts(source.config)
    narrowed(source, first_kept(source, narrow))
    blocks = None
    if narrow.dropped:
        blocks = tuple(number for number in range(whole.blocks) if number not in narrow.dropped)
    elif counts.blocks < whole.blocks:
        with watch.phase("narrow"):
            losses = BlockLosses(source, windows_WT[:BLOCK_WINDOWS], batch=batch, dtype=dtype)
            blocks = choose_blocks(losses.influences, whole.blocks - counts.blocks, _where_it_can_be(losses.without))
            del losses
    left = whole if blocks is None else replace(whole, blocks=len(blocks))
    if replace(counts, blocks=left.blocks) == left:
        return Kept(blocks=blocks)
    shallow = narrowed(source, Kept(blocks=blocks))
    readers = _readers(shallow, find_cuts(shallow, counts), whole)
    dry = is_fake(windows_WT)
    with watch.phase("narrow"):
        # From the third batch on, all that a batch needs was needed before.
        windows_WT = windows_WT[: 2 * batch] if dry else windows_WT
        statistics = collect(shallow, windows_WT, readers.modules(), batch=batch, dtype=dtype)
    with watch.phase("narrow"):
        found = _by_scores(shallow, statistics, readers, counts, whole)
    numbers = blocks or tuple(range(whole.blocks))
    kinds: dict[str, Any] = {kind: {numbers[at]: kept for at, kept in mine.items()} for kind, mine in found.items()}
    return Kept(blocks=blocks, **kinds)


def _where_it_can_be(loss_of: Callable[[tuple[int, ...]], float]) -> Callable[[tuple[int, ...]], float]:
    """The same, and infinite where the config cannot say which blocks stay."""

    def loss(blocks: tuple[int, ...]) -> float:
        try:
            return loss_of(blocks)
        except UsageError:
            return math.inf

    return loss


def first_kept(source: Source, narrow: Narrow) -> Kept:
    """As many as are to stay, the first of all: enough to know what the narrower model takes."""
    whole, counts = counts_of(source.config), narrow.counts(source.config)
    numbers = tuple(range(whole.blocks))
    blocks: tuple[int, ...] | None = tuple(number for number in numbers if number not in narrow.dropped)
    if not narrow.dropped:
        blocks = numbers[: counts.blocks]
    model = source.build()
    stack = stack_of(source, model)
    cut = {
        (dim.kind, int(name[len(stack) + 1 :].partition(".")[0]))
        for name, dims in find_cuts(source, counts).items() for dim in dims if dim is not None
    }  # fmt: skip
    kinds: dict[str, Any] = {}
    for kind, number in sorted(cut):
        if number in (blocks or ()):
            kinds.setdefault(kind, {})[number] = tuple(range(getattr(counts, kind)))
    if "heads" in kinds:
        both = choose_heads(torch.zeros(whole.heads or 1), counts, whole)
        kinds["heads"] = dict.fromkeys(kinds["heads"], both[0])
        kinds["kv_heads"] = dict.fromkeys(kinds["heads"], both[1])
    return Kept(blocks=None if blocks == numbers else blocks, **kinds)


def narrow_model(
    model: nn.Module, how: Narrow | Kept, windows_WT: Tensor | None = None, *, batch: int = 4
) -> nn.Module:
    """A narrower copy of a model of transformers in memory, with its own config; the model itself is not changed.

    Args:
        how: how much is to stay, found and corrected by the text; or what stays, as it is.
        windows_WT: token ids of a text; with `Narrow`.

    Raises:
        UsageError: it cannot be narrowed so, or there is no text to choose by.
    """
    source = live_source(model)
    if isinstance(how, Kept):
        return load(narrowed(source, how), dtype=source.dtype)
    if windows_WT is None:
        raise UsageError("what is missed least is found on a text: give its windows, or a `Kept` that says what stays.")
    kept = choose_kept(source, windows_WT, how, watch=Unwatched(), batch=batch, dtype=source.dtype)
    made: dict[str, Tensor] = {}
    if how.correct:
        correct(source, kept, windows_WT, made.__setitem__, watch=Unwatched(), batch=batch, dtype=source.dtype)
    return load(narrowed(source, kept, instead=LiveCheckpoint(state=made)), dtype=source.dtype)


def _what_stays(source: Source, kept: Kept) -> tuple[Source, dict[str, np.ndarray]]:
    """The model without the blocks and experts that go, and of each layer in it that reads heads or channels that go,
    the inputs that stay.

    Experts are not missing from a sum: without them tokens go elsewhere. The model without them is what to keep to.
    """
    first = narrowed(source, replace(kept, heads={}, kv_heads={}, channels={}))
    blocks = kept.blocks or tuple(range(counts_of(source.config).blocks))
    mine = {number: at for at, number in enumerate(blocks)}
    kinds: dict[str, Any] = {
        kind: {mine[number]: numbers for number, numbers in getattr(kept, kind).items() if number in mine}
        for kind in ("heads", "kv_heads", "channels")
    }
    whole = counts_of(first.config)
    model = first.build()
    readers = readers_of(model, find_cuts(first, Kept(**kinds).counts(whole)), stack_of(first, model))
    stay: dict[str, np.ndarray] = {}
    for kind, layers in readers.items():
        for at, layer in layers.items():
            width = _inputs_of(model.get_submodule(layer))
            stay[layer] = entries_of(kinds[kind][at], width // getattr(whole, kind))
    return first, stay


@torch.no_grad()
def correct(
    source: Source, kept: Kept, windows_WT: Tensor, give: Callable[[str, Tensor], None], *, watch: Watch,
    batch: int = 4, dtype: torch.dtype = torch.bfloat16, damping: float = DAMPING, scratch: Path | None = None,
) -> None:  # fmt: skip
    """Make the weights [N, J] of the layers that read what is gone; each is given under its name in the narrower model.

    Args:
        source: the whole model.
        windows_WT: token ids.
        give: called with a parameter's name and its weight, block after block.
        damping: λ, of the mean of E[x̂²].
        scratch: where what blocks give to each other waits in files; None: in memory.
    """
    first, stay = _what_stays(source, kept)
    if not stay:
        return
    streamed, spill = Streamed(first, dtype=dtype), Spill(scratch, watch)
    dry = is_fake(windows_WT)
    known: dict[Any, list[Any]] = {}
    count = windows_WT.shape[0]
    twice_WT = torch.cat([windows_WT, windows_WT])

    def visit(name: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        anew()
        left.discard(name)
        layers: dict[str, Any] = {
            full: module for below, module in block.named_modules() if (full := f"{name}.{below}") in stay
        }
        kind = (structure_of(block), len(layers))
        if dry and len(known.setdefault(kind, [])) == 2:
            if not left:
                raise AllDone
            return tree_map(lambda leaf: another(leaf, spill), known[kind][-1])
        call = Call(forward, args, kwargs, 2 * count, spill)
        was, now = Run(call, 0, count, batch), Run(call, count, 2 * count, batch)
        versions = Versions(layers, streamed.weight_of, hold=True)
        become: dict[str, Tensor] = {}
        try:
            with versions.in_place():
                for layer in _in_order(layers, now):
                    _correct(layer, stay[layer], versions, was, now, give, become, damping=damping)
                if not left:
                    raise AllDone
                with versions.as_they_were():
                    out = was.whole()
                out = now.whole(out)
        finally:
            become.clear()  # the classes that stand in for the layers' live until they are collected, and know of it
        if dry:
            known[kind].append(tree_map(lambda leaf: Shape.of(leaf) if isinstance(leaf, Tensor) else leaf, out))
        return out

    streamed.visit, streamed.empty = visit, spill.empty
    streamed.apart = frozenset(f"{name}.weight" for name in stay)
    left = {name for name in streamed.blocks if any(layer.startswith(f"{name}.") for layer in stay)}
    with Anew(watch, "correct") as anew, suppress(AllDone):
        streamed.model(twice_WT, **arguments_of(streamed.model, twice_WT))


def _correct(
    layer: str, stay: np.ndarray, versions: Versions, was: Run, now: Run, give: Callable[[str, Tensor], None],
    become: dict[str, Tensor], *, damping: float,
) -> None:  # fmt: skip
    """Let one layer become the one that reads only what stays."""
    turned = isinstance(versions.layers[layer], Conv1D)
    index = torch.from_numpy(stay)
    weight = versions.was(layer)
    whole = weight.t() if turned else weight
    wide = torch.float64 if whole.dtype == torch.float64 else torch.float32
    rows, width = whole.shape
    whole_NK = whole.to(wide)
    part = whole_NK.index_select(1, index)
    hessian = torch.zeros(index.shape[0], index.shape[0], dtype=wide)
    moved = torch.zeros(rows, index.shape[0], dtype=wide)
    count = 0
    for before, after in zip(was.parts(), now.parts(), strict=True):
        with versions.as_they_were():
            x_TK = input_of(versions.layers[layer], before).reshape(-1, width)
        x_TJ = input_of(versions.layers[layer], after).reshape(-1, width)
        count += x_TK.shape[0]
        for start in blocks_to_run(range(0, x_TK.shape[0], _TOKENS)):
            x = x_TJ[start : start + _TOKENS].index_select(1, index).to(wide)
            missing = F.linear(x_TK[start : start + _TOKENS].to(wide), whole_NK).sub_(F.linear(x, part))
            hessian.addmm_(x.t(), x)
            moved.addmm_(missing.t(), x)
            del x, missing
        del x_TK, x_TJ, before, after
    del whole_NK
    made = factor(hessian.div_(max(count, 1)), damping=damping, overwrite=True)
    del hessian
    better = corrected(part, moved.div_(max(count, 1)), made).to(weight.dtype)
    del made, moved, part
    full = torch.zeros_like(whole).index_copy_(1, index, better)
    give(f"{layer}.weight", better.t().contiguous() if turned else better)
    become[layer] = full.t().contiguous() if turned else full
    versions.become(layer, lambda: become[layer])


def _by_scores(
    source: Source, statistics: Statistics, readers: Readers, counts: Counts, whole: Counts
) -> dict[str, dict[int, tuple[int, ...]]]:
    """What stays by kind and block; weights are read some rows at a time."""
    model = source.build()

    def scores_of(layer: str) -> Tensor:
        return _scores(source, layer, statistics, turned=isinstance(model.get_submodule(layer), Conv1D))

    found: dict[str, dict[int, tuple[int, ...]]] = {"heads": {}, "kv_heads": {}, "channels": {}, "experts": {}}
    for number, layer in readers.channels.items():
        found["channels"][number] = best(scores_of(layer), counts.channels or 0)
    for number, layer in readers.heads.items():
        scores = head_scores(scores_of(layer), whole.heads or 1)
        found["heads"][number], found["kv_heads"][number] = choose_heads(scores, counts, whole)
    for number, weight in readers.experts.items():
        moments = statistics.moments[weight]
        assert moments.gradients is not None
        total = torch.zeros(moments.inputs.shape[0])
        rows = moments.gradients.shape[1]
        for start, block in rows_of(source, weight, dtype=torch.float32):
            # Rows of several experts may come together.
            at = torch.arange(start, start + block.shape[0])
            expert = torch.div(at, rows, rounding_mode="floor")
            lost = (block.square_() * moments.inputs[expert]).sum(1) * moments.gradients.view(-1)[at] / 2
            total.index_add_(0, expert, lost)
            del block, lost, at, expert
        found["experts"][number] = best(total, counts.experts or 0)
    return found


def _scores(source: Source, layer: str, statistics: Statistics, *, turned: bool) -> Tensor:
    """Of each input of a layer, [K]; `turned`: its weight is stored [K, N]."""
    moments = statistics.moments[layer]
    inputs, gradients = moments.inputs, moments.gradients
    total = torch.zeros_like(inputs)
    for start, block in rows_of(source, f"{layer}.weight", dtype=torch.float32):
        part = slice(start, start + block.shape[0])
        if turned:
            total[part] = channel_scores(block.t(), inputs[part], gradients)
        else:
            total += channel_scores(block, inputs, None if gradients is None else gradients[part])
        del block
    return total


def _readers(source: Source, cuts: Cuts, whole: Counts) -> Readers:
    model = source.build()
    stack = stack_of(source, model)
    found = readers_of(model, cuts, stack)
    experts: dict[int, str] = {}
    for name, dims in cuts.items():
        if name.endswith(".down_proj") and dims[0] is not None and dims[0].kind == "experts":
            experts[int(name[len(stack) + 1 :].partition(".")[0])] = name
    return Readers(heads=found["heads"], channels=found["channels"], experts=experts)


def _inputs_of(layer: nn.Module) -> int:
    weight = layer.get_parameter("weight")
    return int(weight.shape[0 if isinstance(layer, Conv1D) else 1])



def _in_order(layers: Mapping[str, nn.Module], run: Run) -> list[str]:
    """Layers in the order of their calls."""
    called: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, layer in layers.items()
    ]
    try:
        run.first()
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(called))


def narrow_into(
    work: Path, source: Source, windows_WT: Tensor, narrow: Narrow, *, watch: Watch, batch: int = 4, spill: bool = False
) -> Kept:
    """Find what stays and make what is corrected, and leave both in `work`, for `narrowed_in`. On fake tensors nothing
    is written."""
    kept = choose_kept(source, windows_WT, narrow, watch=watch, batch=batch)
    folder, dry = work / _FOLDER, is_fake(windows_WT)
    if not dry:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def give(name: str, weight: Tensor) -> None:
        if not dry:
            save_file({name: weight}, str(folder / f"{name}.safetensors"))

    if narrow.correct:
        correct(source, kept, windows_WT, give, watch=watch, batch=batch, scratch=work if spill else None)
    if not dry:
        (work / NARROWED).write_text(json.dumps(kept.to_json()), encoding="utf-8")
    return kept


def kept_in(work: Path) -> Kept | None:
    """What `narrow_into` found to stay, if it has been at work here."""
    file = work / NARROWED
    return Kept.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def narrowed_in(work: Path, source: Source) -> Source:
    """The source as `narrow_into` has narrowed it, if it did."""
    kept = kept_in(work)
    if kept is None:
        return source
    files = sorted((work / _FOLDER).glob("*.safetensors"))
    tensors = {info.name: info for file in files for info in read_header(file)}
    return narrowed(source, kept, instead=SafetensorsCheckpoint(tensors=tensors) if tensors else None)
