"""Integers for a whole model by GPTQ: block after block, each for the inputs that those before it now give.

The model's own forward pass calls each block once, with all of the text. There the block's weights are read, and its
layers are taken in the order of their calls: those that read the same input share one H = E[x xᵀ], made by running the
block with what is already rounded in it. Then the block runs on with its new weights, and they are let go.

Legend of shapes: W windows, T time, N outputs, K inputs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from memfit.account.ledger import Shape
from memfit.account.structure import structure_of
from memfit.account.watch import Watch
from memfit.calibrate.collect import arguments_of
from memfit.calibrate.stream import Streamed
from memfit.format.integers import Integers
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.scheme import Scheme
from memfit.source.source import Source
from memfit.technique.gptq import DAMPING, factor, gptq
from memfit.technique.quantize import Quantized, dequantize, quantize


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

    def rounded(name: str, rows_ND: Tensor) -> Tensor:
        if name not in schemes:
            return rows_ND
        return dequantize(quantize(rows_ND, schemes[name], importance=importance(name)))

    def visit(name: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # A phase for each block, as an allocator's events are kept until their phase ends; without a gap between
        # two, so that none is missed.
        phase.close()
        phase.enter_context(watch.phase("compensate"))
        # Nothing but what a block gives outlives its call, so equal blocks need to be run once.
        kind = (structure_of(block), tuple(schemes.get(f"{name}.{below}") for below, _ in block.named_modules()))
        if dry and kind in known:
            return tree_map(_another, known[kind])
        run = _Run(forward, args, kwargs, windows_WT.shape[0], batch)
        layers = {
            full: module
            for below, module in block.named_modules()
            if isinstance(module, nn.Linear) and (full := f"{name}.{below}") in schemes
        }
        if layers:
            _choose(name, layers, run, schemes, integers, damping)
        out = run.whole()
        if dry:
            known[kind] = tree_map(_shape, out)
        return out

    streamed.rounded, streamed.visit = rounded, visit
    with ExitStack() as phase:
        phase.enter_context(watch.phase("compensate"))
        streamed.model(windows_WT, **arguments_of(streamed.model, windows_WT))


def _choose(
    block: str, layers: Mapping[str, nn.Linear], run: "_Run", schemes: Mapping[str, Scheme], integers: Integers,
    damping: float,
) -> None:  # fmt: skip
    """Put the integers' values into a block's layers: those that are kept, or new ones."""
    if integers.holds(block):
        for name, layer in layers.items():
            layer.weight.copy_(dequantize(integers.read(name, schemes[name])))
        return
    found: dict[str, Quantized] = {}
    used: dict[str, float] = {}
    for stage in _stages(layers, run):
        made = factor(_second_moments(layers[stage[0]], run), damping=damping)
        for name in stage:
            found[name] = gptq(layers[name].weight, made, schemes[name]).quantized
            used[name] = made.damping
            layers[name].weight.copy_(dequantize(found[name]))
        del made
    integers.write(block, found, used)


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


def _second_moments(layer: nn.Linear, run: "_Run") -> Tensor:
    """E[x xᵀ] [K, K] of a layer's inputs, float32."""
    total = torch.zeros(layer.in_features, layer.in_features)
    count = 0

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        x_NK = inputs[0].reshape(-1, layer.in_features).float()
        total.addmm_(x_NK.t(), x_NK)
        count += x_NK.shape[0]
        raise _Heard

    handle = layer.register_forward_pre_hook(hook)
    try:
        for part in run.parts():
            try:
                part()
            except _Heard:
                continue
    finally:
        handle.remove()
    return total.div_(max(count, 1))


def _count(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _shape(leaf: Any) -> Any:
    return Shape.of(leaf) if isinstance(leaf, Tensor) else leaf


def _another(leaf: Any) -> Any:
    return leaf.empty() if isinstance(leaf, Shape) else leaf


class _Heard(Exception):  # no error: what follows in the block is of no use
    """A layer's input has come by."""


@dataclass(frozen=True)
class _Run:
    """A block's call, some windows at a time."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    windows: int
    batch: int

    def parts(self) -> Iterator[Callable[[], Any]]:
        """The call for each of the parts."""
        leaves, spec = tree_flatten((self.args, dict(self.kwargs)))
        for rows in blocks_to_run(self._rows()):
            mine = [leaf[rows] if self._of_windows(leaf, self.windows) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(mine, spec)
            yield lambda args=args, kwargs=kwargs: self.forward(*args, **kwargs)  # type: ignore[misc]

    def first(self) -> Any:
        """The call for the first part alone."""
        return next(self.parts())()

    def whole(self) -> Any:
        """What the call gives for all windows."""
        rows = self._rows()
        spec: Any = None
        joined: list[Any] = []
        for part, run in zip(blocks_to_run(rows), self.parts(), strict=True):
            leaves, spec = tree_flatten(run())
            if part == rows[0]:
                # What has no row for each window is the same for all of them, as T5's position bias.
                joined = [
                    leaf.new_empty((self.windows, *leaf.shape[1:])) if self._of_windows(leaf, _count(part)) else leaf
                    for leaf in leaves
                ]
            for whole, leaf in zip(joined, leaves, strict=True):
                if whole is not leaf and isinstance(leaf, Tensor) and self._of_windows(leaf, _count(part)):
                    whole[part] = leaf
            del leaves
        return tree_unflatten(joined, spec)

    def _rows(self) -> list[slice]:
        starts = range(0, self.windows, self.batch)
        return [slice(start, min(start + self.batch, self.windows)) for start in starts]

    @staticmethod
    def _of_windows(leaf: Any, windows: int) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == windows
