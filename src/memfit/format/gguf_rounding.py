"""A model's layers as GGUF blocks by GPTQ, block of the model after block, each for the inputs that those before give.

The model runs from the disk over all of the text once. Where its forward pass calls a block, the block runs to tell
H = E[x xᵀ] of each of its linear layers' inputs, its layers are encoded, and it runs again with what their bytes stand
for. So the inputs of a layer hold the errors of the blocks before its own.

Legend of shapes: W windows, T time, N tokens, K inputs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from memfit.account.watch import Anew, Watch
from memfit.calibrate.collect import arguments_of
from memfit.calibrate.stream import Streamed
from memfit.errors import UsageError
from memfit.packed.fake import blocks_to_run, repeated
from memfit.source.source import Source
from memfit.technique.gguf_gptq import encode_compensated
from memfit.technique.gptq import Factor, damping_for, factor


@torch.no_grad()
def encode_layers(
    source: Source, windows_WT: Tensor, kinds: Mapping[str, str], put: Callable[[str, Tensor], None], *, batch: int,
    watch: Watch,
) -> None:  # fmt: skip
    """Encode the linear layers in the model's blocks, and hand each to `put` as soon as it is made.

    Args:
        windows_WT: token ids.
        kinds: a layer's name to its type of blocks; what is not named stays as it is.
        put: is given a layer's name and its bytes, uint8 [rows, row_nbytes], rows in the model's order.
        batch: windows that go through a block at once.

    Raises:
        UsageError: the text says nothing of a layer: its inputs are not finite, or all 0.
    """
    streamed = Streamed(source)
    count = windows_WT.shape[0]

    def visit(name: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        anew()
        run = _Windows(forward, args, kwargs, count, batch)
        layers = {
            full: module
            for below, module in block.named_modules()
            if isinstance(module, nn.Linear) and (full := f"{name}.{below}") in kinds
        }
        hessians, readers = _hessians(layers, run) if layers else ({}, {})
        for first in list(hessians):
            hessian = hessians.pop(first)
            try:
                made = factor(hessian, damping=damping_for(hessian.shape[0], windows_WT.numel()))
            except ValueError as error:
                raise UsageError(f"{first}: {error}") from error
            del hessian
            for full in readers[first]:
                put(full, _encoded(full, layers[full].weight.data, kinds[full], made))
            del made
        return run.whole()

    streamed.visit = visit
    with Anew(watch, "encode") as anew:
        streamed.model(windows_WT, **arguments_of(streamed.model, windows_WT))


def _encoded(layer: str, weight: Tensor, kind: str, made: Factor) -> Tensor:
    """The layer's bytes; its weight becomes what they stand for. A dry run tells it from an equal one."""
    call = lambda: encode_compensated(weight, kind, made, meant=weight)  # noqa: E731
    given = lambda: (weight, made.order, made.coupling, made.weights, made.importance, made.dead)  # noqa: E731
    packed: Tensor = repeated(("gguf gptq", kind), None, layer, given, call)
    return packed


def _hessians(layers: Mapping[str, nn.Linear], run: "_Windows") -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """H [K, K] of each input of a block's layers under the name of the first layer that reads it, and all that do."""
    sums: dict[str, Tensor] = {}
    first_of: dict[str, str] = {}
    heard: list[tuple[Tensor, str]] = []
    tokens: dict[str, int] = {}

    def hear(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name not in first_of:
                first_of[name] = next((first for tensor, first in heard if tensor is inputs[0]), name)
            heard.append((inputs[0], name))
            if first_of[name] != name:
                return
            x_NK = inputs[0].reshape(-1, inputs[0].shape[-1]).to(torch.float32)
            if name not in sums:
                sums[name] = torch.zeros(x_NK.shape[1], x_NK.shape[1])
            sums[name].addmm_(x_NK.t(), x_NK)
            tokens[name] = tokens.get(name, 0) + x_NK.shape[0]

        return hook

    handles = [layer.register_forward_pre_hook(hear(name)) for name, layer in layers.items()]
    try:
        for part in run.parts():
            part()
            heard.clear()
    finally:
        for handle in handles:
            handle.remove()
    for name, total in sums.items():
        total.div_(tokens[name])
    return sums, {first: [name for name in first_of if first_of[name] == first] for first in sums}


@dataclass(frozen=True)
class _Windows:
    """A block's call for all windows, `batch` of them at a time."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    windows: int
    batch: int

    def parts(self) -> Iterator[Callable[[], Any]]:
        """The call for some windows after the others."""
        leaves, spec = tree_flatten((self.args, dict(self.kwargs)))
        for rows in blocks_to_run(self._rows()):
            mine = [leaf[rows] if _has_rows(leaf, self.windows) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(mine, spec)
            yield lambda args=args, kwargs=kwargs: self.forward(*args, **kwargs)  # type: ignore[misc]

    def whole(self) -> Any:
        """What the call gives for all windows."""
        joined: list[Any] = []
        for rows, part in zip(blocks_to_run(self._rows()), self.parts(), strict=True):
            leaves, spec = tree_flatten(part())
            size = rows.stop - rows.start
            if not joined:
                # What has no row for each window is the same for all of them, as T5's position bias.
                joined = [
                    leaf.new_empty((self.windows, *leaf.shape[1:])) if _has_rows(leaf, size) else leaf
                    for leaf in leaves
                ]
            for whole, leaf in zip(joined, leaves, strict=True):
                if whole is not leaf and _has_rows(leaf, size):
                    whole[rows] = leaf
            del leaves
        return tree_unflatten(joined, spec)

    def _rows(self) -> list[slice]:
        starts = range(0, self.windows, self.batch)
        return [slice(start, min(start + self.batch, self.windows)) for start in starts]


def _has_rows(leaf: Any, windows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == windows
