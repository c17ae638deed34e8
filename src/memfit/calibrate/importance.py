"""What a model's blocks do: how much each changes what comes in, and what the model is without some.

Legend: W windows, T time, N positions, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from memfit.packed.fake import is_fake
from memfit.source.narrowed import Kept, narrowed
from memfit.source.source import Source

from .cache_loss import divergences
from .collect import arguments_of, hidden_of, one_text_a_row
from .stream import Streamed


class BlockLosses:
    """The windows read once by the whole model; then, as often as asked, by what stays without some blocks.

    Args:
        windows_WT: token ids; few are enough to tell blocks apart.
        batch: windows run at once.
    """

    def __init__(
        self, source: Source, windows_WT: Tensor, *, batch: int = 4, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self._source, self._windows_WT, self._batch, self._dtype = source, windows_WT, batch, dtype
        self._streamed = Streamed(source, dtype=dtype)
        self.influences: list[float] = []
        """Of each block 1 − cos(in, out), the mean over positions (block influence; Men et al. 2024)."""
        changes: dict[str, list[float]] = {name: [] for name in self._streamed.blocks}

        def visit(name: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            before, after = _first_tensor((args, kwargs)), _first_tensor(out)
            cosine = F.cosine_similarity(before.float(), after.float(), dim=-1).mean()
            del before, after
            changes[name].append(0.0 if is_fake(cosine) else 1 - float(cosine))
            return out

        self._streamed.visit = visit
        self._states = self._read(self._streamed)
        self.influences = [sum(found) / len(found) for found in changes.values()]

    def without(self, blocks: tuple[int, ...]) -> float:
        """The KL divergence, nats a token, of the model of which only `blocks` stay; of one without a head, half the
        squared error of its output in units of that output's variance, as `collect` has it."""
        streamed = Streamed(narrowed(self._source, Kept(blocks=blocks)), dtype=self._dtype)
        states = self._read(streamed)
        if streamed.head is not None:
            return divergences(streamed, {16: self._states, 1: states})[1]
        spread = self._states.float().var()
        error = (states.float() - self._states.float()).square_().sum(1).mean().div(2 * spread)
        return 0.0 if is_fake(error) else float(error)

    def _read(self, streamed: Streamed) -> Tensor:
        """Hidden states [N, D] that the head would read, of all windows."""
        found = []
        with torch.no_grad(), one_text_a_row(dry=is_fake(self._windows_WT)):
            for start in range(0, self._windows_WT.shape[0], self._batch):
                ids_WT = self._windows_WT[start : start + self._batch]
                hidden = hidden_of(streamed.model(ids_WT, **arguments_of(streamed.model, ids_WT)))[0]
                found.append(hidden.flatten(0, 1).to(self._dtype))
                del hidden
        return torch.cat(found)


def _first_tensor(tree: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
