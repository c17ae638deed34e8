"""H = E[x xᵀ] of what a model's linear layers read, whole: block after block, in one pass of all of a text.

A block's H are there while the block is, one matrix for all layers that read the same tensor.

Legend of shapes: W windows, T tokens, K inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from memfit.account.structure import structure_of
from memfit.account.watch import Anew, Watch
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.source.source import Source

from .attention import attention_by_products
from .collect import arguments_of
from .runs import AllDone, Call, Run, another, shape_alone
from .spill import Spill
from .stream import Streamed

_TOKENS = 2048
"""Tokens whose inputs are in fp32 at a time."""

Heard = Callable[[Mapping[str, nn.Linear], Sequence[str], Tensor, Anew], None]
"""Told the layers of the block, the names of those that read one input, in the order of their calls, its H [K, K],
which is nobody else's, and the phase that the watch is in."""


@torch.no_grad()
def hear_inputs(
    source: Source, windows_WT: Tensor, wanted: Mapping[str, Any], heard: Heard, *, watch: Watch, phase: str,
    batch: int = 4, scratch: Path | None = None,
) -> None:  # fmt: skip
    """Run the windows through the model, and tell of every wanted linear layer of its blocks.

    Args:
        windows_WT: token ids.
        wanted: module name to what else decides the course of `heard`: of blocks that are alike in that and in their
            structure, a dry run hears two.
        phase: what the watch is told, anew for every block: an allocator's events are kept until their phase ends.
        batch: windows that go through a block at once.
        scratch: where what blocks give each other waits in files; None: in memory.
    """
    streamed, spill = Streamed(source), Spill(scratch, watch)
    count, dry = windows_WT.shape[0], is_fake(windows_WT)
    known: dict[Any, list[Any]] = {}

    def visit(name: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        anew()
        left.discard(name)
        # Nothing but what a block gives outlives its call; the model may keep what came into the first for itself.
        kind = (structure_of(block), tuple(wanted.get(f"{name}.{below}") for below, _ in block.named_modules()))
        if dry and len(known.setdefault(kind, [])) == 2:
            if not left:
                raise AllDone
            return tree_map(lambda leaf: another(leaf, spill), known[kind][-1])
        layers = {
            full: module
            for below, module in block.named_modules()
            if isinstance(module, nn.Linear) and (full := f"{name}.{below}") in wanted
        }
        out = _hear(layers, Run(Call(forward, args, kwargs, count, spill), 0, count, batch), heard, anew)
        if not left:
            raise AllDone
        if dry:
            known[kind].append(tree_map(shape_alone, out))
        return out

    streamed.visit, streamed.empty = visit, spill.empty
    left = set(streamed.blocks)
    with Anew(watch, phase) as anew, attention_by_products(), suppress(AllDone):
        streamed.model(windows_WT, **arguments_of(streamed.model, windows_WT))


def add_products(total_KK: Tensor, x_TK: Tensor) -> None:
    """total += Σ x xᵀ over the tokens, some of which are in fp32 at a time."""
    for start in blocks_to_run(range(0, x_TK.shape[0], _TOKENS)):
        x = x_TK[start : start + _TOKENS].float()
        total_KK.addmm_(x.t(), x)
        del x


def _hear(layers: Mapping[str, nn.Linear], run: Run, heard: Heard, anew: Anew) -> Any:
    """Run a block, and tell of its layers; what the block gives."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    leader: dict[str, str] = {}
    calls: list[tuple[Tensor, str]] = []

    def hear(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name not in leader:
                leader[name] = next((first for tensor, first in calls if tensor is inputs[0]), name)
                calls.append((inputs[0], name))
            if leader[name] != name:
                return
            x_TK = inputs[0].reshape(-1, inputs[0].shape[-1])
            total = sums.setdefault(name, torch.zeros(x_TK.shape[1], x_TK.shape[1]))
            add_products(total, x_TK)
            counts[name] = counts.get(name, 0) + x_TK.shape[0]
            if len(leader) == len(layers):
                calls.clear()

        return hook

    handles = [layer.register_forward_pre_hook(hear(name)) for name, layer in layers.items()]
    try:
        out = run.whole()
    finally:
        for handle in handles:
            handle.remove()
        calls.clear()
    for name in list(sums):
        readers = [other for other, first in leader.items() if first == name]
        heard(layers, readers, sums.pop(name).div_(counts[name]), anew)
    return out
