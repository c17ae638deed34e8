"""Integers for a whole model by GPTQ: block after block, each for the inputs that those before it now give.

The model's own forward pass calls each block once, with all of the text twice: the first half of the windows goes
through the model as it was (x), the second through what it has become (x̂). There the block's weights are read, and its
layers are taken in the order of their calls: those that read the same input share one H = E[x̂ x̂ᵀ] and one
E[(x − x̂) x̂ᵀ], made by running the block as it was and with what is already rounded in it. A layer is to give for x̂
what it gave for x (`gptq.corrected`), as far as two halves of the text agree on what that takes (`gptq.agreement`).
Then the block runs on with its new weights, and both are let go.

Legend of shapes: W windows, T time, N outputs, K inputs, S sums of rows with random signs.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from memfit.account.ledger import Shape
from memfit.account.structure import structure_of
from memfit.account.watch import Watch
from memfit.calibrate.collect import arguments_of
from memfit.calibrate.stream import Streamed
from memfit.format.integers import Integers
from memfit.packed.fake import blocks_to_run, is_fake, repeated
from memfit.packed.scheme import Scheme
from memfit.source.source import Source
from memfit.technique.gptq import DAMPING, Factor, agreement, corrected, factor, gptq
from memfit.technique.quantize import Quantized, dequantize, quantize

_SUMS: Final = 32
"""Random sums of a weight's rows that stand for all of them in `agreement`."""


@torch.no_grad()
def compensate(
    source: Source,
    windows_WT: Tensor,
    schemes: Mapping[str, Scheme],
    integers: Integers,
    *,
    batch: int,
    watch: Watch,
    importance: Callable[[str], Tensor | None] = lambda _: None,
    damping: float = DAMPING,
) -> None:
    """Choose the integers of every linear layer in the model's blocks, and keep them in `integers`.

    Blocks that are there already are read and run: a run that was stopped goes on, to the same bytes.

    Args:
        windows_WT: token ids.
        schemes: module name to scheme; tables among them are rounded as they are looked up.
        batch: windows that go through a block at once.
        importance: of a table's inputs, as it will be rounded with.
        damping: see `gptq.factor`.

    Raises:
        ValueError: a layer whose inputs are not finite, or all 0.
    """
    streamed = Streamed(source)
    dry = is_fake(windows_WT)
    known: dict[Any, Any] = {}

    count = windows_WT.shape[0]
    twice_WT = torch.cat([windows_WT, windows_WT])

    def rounded(name: str, rows_ND: Tensor) -> Tensor:
        if name not in schemes:
            return rows_ND
        was, now = rows_ND.chunk(2)
        return torch.cat([was, dequantize(quantize(now, schemes[name], importance=importance(name)))])

    def visit(name: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # A phase for each block, as an allocator's events are kept until their phase ends; without a gap between
        # two, so that none is missed.
        phase.close()
        phase.enter_context(watch.phase("compensate"))
        # Nothing but what a block gives outlives its call, so of equal blocks two need to be run: the model may keep
        # what came into the first for itself.
        kind = (structure_of(block), tuple(schemes.get(f"{name}.{below}") for below, _ in block.named_modules()))
        if dry and len(known.setdefault(kind, [])) == 2:
            return tree_map(_another, known[kind][-1])
        call = _Call(forward, args, kwargs, 2 * count)
        was, now = _Run(call, 0, count, batch), _Run(call, count, 2 * count, batch)
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        layers = {
            full: module
            for below, module in block.named_modules()
            if isinstance(module, nn.Linear) and (full := f"{name}.{below}") in schemes
        }
        out = was.whole()
        if layers:
            _choose(name, layers, was, now, schemes, integers, damping, random)
        out = now.whole(out)
        if dry:
            known[kind].append(tree_map(_shape, out))
        return out

    streamed.rounded, streamed.visit = rounded, visit
    with ExitStack() as phase:
        phase.enter_context(watch.phase("compensate"))
        streamed.model(twice_WT, **arguments_of(streamed.model, twice_WT))


def _choose(
    block: str, layers: Mapping[str, nn.Linear], was: "_Run", now: "_Run", schemes: Mapping[str, Scheme],
    integers: Integers, damping: float, random: torch.Generator,
) -> None:  # fmt: skip
    """Put the integers' values into a block's layers: those that are kept, or new ones."""
    if integers.holds(block):
        for name, layer in layers.items():
            layer.weight.copy_(dequantize(integers.read(name, schemes[name])))
        return
    found: dict[str, Quantized] = {}
    used: dict[str, float] = {}
    weights = {name: layer.weight.data for name, layer in layers.items()}
    for stage in _stages(layers, now):
        hessian, moved, halves = _moments(stage, layers, weights, was, now, random)
        made = factor(hessian, damping=damping)
        del hessian
        for name in stage:
            share = agreement(*halves[name], made) if name in halves else 0.0
            moved[name].mul_(share)
            found[name] = _rounded(name, corrected(weights[name], moved.pop(name), made), made, schemes[name])
            used[name] = made.damping
            layers[name].weight.data = dequantize(found[name])
        del made
    integers.write(block, found, used)


def _rounded(name: str, weight: Tensor, made: Factor, scheme: Scheme) -> Quantized:
    """What `gptq` makes of a weight; a dry run tells it from an equal one."""

    def call() -> tuple[Tensor | None, ...]:
        found = gptq(weight, made, scheme).quantized
        return found.q, found.scale, found.zero, found.table

    given = lambda: (weight, made.order, made.coupling, made.weights, made.importance, made.dead)  # noqa: E731
    q, scale, zero, table = repeated(("gptq", scheme), None, name, given, call)
    return Quantized(scheme=scheme, q=q, scale=scale, zero=zero, table=table)


def _stages(layers: Mapping[str, nn.Linear], run: "_Run") -> list[list[str]]:
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
        run.first()
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in calls]


def _moments(
    stage: list[str], layers: Mapping[str, nn.Linear], weights: Mapping[str, Tensor], was: "_Run", now: "_Run",
    random: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:  # fmt: skip
    """Of layers that read one input: H [K, K]; of each D = W E[(x − x̂) x̂ᵀ] [N, K], and of each half of the text P D
    [S, K], P random signs. Of one window there are no halves.

    Sums are kept in products with W: they take less than E[(x − x̂) x̂ᵀ] where that is largest.
    """
    layer = layers[stage[0]]
    hessian = torch.zeros(layer.in_features, layer.in_features)
    moved = {name: torch.zeros(weights[name].shape) for name in stage}
    signs = {name: _signs(weights[name].shape[0], random) for name in stage}
    halves: dict[str, list[Tensor]] = {name: [] for name in stage}
    count = 0
    for was_half, now_half in zip(was.halves(), now.halves(), strict=True):
        cross = torch.zeros_like(hessian)
        tokens = _add_moments(layer, was_half, now_half, _as_they_were(layers, weights), hessian, cross)
        for name in stage:
            weight = weights[name].to(cross.dtype)
            moved[name].addmm_(weight, cross)
            halves[name].append((signs[name] @ weight @ cross).div_(max(tokens, 1)))
            del weight
        count += tokens
        del cross
    for sums in (hessian, *moved.values()):
        sums.div_(max(count, 1))
    return hessian, moved, {name: (both[0], both[1]) for name, both in halves.items() if len(both) == 2}


def _signs(rows: int, random: torch.Generator) -> Tensor:
    """[S, rows] of −1 and 1."""
    return torch.randint(0, 2, (_SUMS, rows), generator=random).mul_(2).sub_(1).float()


def _add_moments(
    layer: nn.Linear, was: "_Run", now: "_Run", as_they_were: Callable[[], AbstractContextManager[None]],
    hessian: Tensor, cross: Tensor,
) -> int:  # fmt: skip
    """Add Σ x̂ x̂ᵀ and Σ (x − x̂) x̂ᵀ over a layer's inputs; how many there were."""
    count = 0
    for part, part_now in zip(was.parts(), now.parts(), strict=True):
        with as_they_were():
            off_NK = _input(layer, part)
        x_NK = _input(layer, part_now)
        off_NK.sub_(x_NK)
        hessian.addmm_(x_NK.t(), x_NK)
        cross.addmm_(off_NK.t(), x_NK)
        count += x_NK.shape[0]
        del off_NK, x_NK
    return count


def _input(layer: nn.Linear, part: Callable[[], Any]) -> Tensor:
    """What comes to a layer in a block's call, [N, K] in float32; the call goes no further."""
    heard: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard.append(inputs[0].reshape(-1, layer.in_features).to(torch.float32, copy=True))
        raise _Heard

    handle = layer.register_forward_pre_hook(hook)
    try:
        part()
    except _Heard:
        pass
    finally:
        handle.remove()
    return heard.pop()


def _as_they_were(
    layers: Mapping[str, nn.Linear], weights: Mapping[str, Tensor]
) -> Callable[[], AbstractContextManager[None]]:
    """What makes a context in which the layers have these weights."""

    @contextmanager
    def made() -> Iterator[None]:
        now = {name: layer.weight.data for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.weight.data = weights[name]
        try:
            yield
        finally:
            for name, layer in layers.items():
                layer.weight.data = now[name]

    return made


def _count(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _shape(leaf: Any) -> Any:
    return Shape.of(leaf) if isinstance(leaf, Tensor) else leaf


def _another(leaf: Any) -> Any:
    return leaf.empty() if isinstance(leaf, Shape) else leaf


class _Heard(Exception):  # no error: what follows in the block is of no use
    """A layer's input has come by."""


@dataclass(frozen=True)
class _Call:
    """What a block was called with, for all windows."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    windows: int


@dataclass(frozen=True)
class _Run:
    """A block's call for the windows from `start` to `stop`, `batch` of them at a time."""

    call: _Call
    start: int
    stop: int
    batch: int

    def halves(self) -> "list[_Run]":
        """Two runs of half of the windows each; this one alone if there is but one window."""
        middle = self.start + (self.stop - self.start) // 2
        bounds = [(self.start, middle), (middle, self.stop)]
        return [replace(self, start=first, stop=last) for first, last in bounds if last > first]

    def parts(self) -> Iterator[Callable[[], Any]]:
        """The call for each of the parts."""
        leaves, spec = tree_flatten((self.call.args, dict(self.call.kwargs)))
        for rows in blocks_to_run(self._rows()):
            mine = [leaf[rows] if self._of_windows(leaf, self.call.windows) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(mine, spec)
            yield lambda args=args, kwargs=kwargs: self.call.forward(*args, **kwargs)  # type: ignore[misc]

    def first(self) -> Any:
        """The call for the first part alone."""
        return next(self.parts())()

    def whole(self, before: Any = None) -> Any:
        """What the call gives, with room for all windows; into what another run gave `before`, if it is given."""
        rows, windows = self._rows(), self.call.windows
        joined: list[Any] = []
        if before is not None:
            joined, spec = tree_flatten(before)
        for part, run in zip(blocks_to_run(rows), self.parts(), strict=True):
            leaves, spec = tree_flatten(run())
            if not joined:
                # What has no row for each window is the same for all of them, as T5's position bias.
                joined = [
                    leaf.new_empty((windows, *leaf.shape[1:])) if self._of_windows(leaf, _count(part)) else leaf
                    for leaf in leaves
                ]
            for whole, leaf in zip(joined, leaves, strict=True):
                if whole is not leaf and isinstance(leaf, Tensor) and self._of_windows(leaf, _count(part)):
                    whole[part] = leaf
            del leaves
        return tree_unflatten(joined, spec)

    def _rows(self) -> list[slice]:
        starts = range(self.start, self.stop, self.batch)
        return [slice(start, min(start + self.batch, self.stop)) for start in starts]

    @staticmethod
    def _of_windows(leaf: Any, windows: int) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == windows
