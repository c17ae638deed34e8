"""Gradients of embeddings and heads, made some rows at a time: none of the table's size ever exists.

A table's gradient is a sum of what its uses leave: a lookup leaves the gradients of the rows it read, one a token;
a head leaves its hidden states (see `chunk_loss`). Both are small, and rows of the sum are made when the table is
updated. In a model with a large vocabulary this is its largest gradient, and, where head and embedding are tied,
one that would have to be kept through the whole backward pass.

Legend: N tokens, D width, V rows of the table.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MakeRows = Callable[[Tensor, int, int], Tensor]
"""(the table, first row, one past the last) -> those rows of a gradient."""


@dataclass(eq=False)
class RowGradients:
    """The gradient of one table."""

    table: nn.Parameter
    _lookups: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _heads: list[tuple[int, MakeRows]] = field(default_factory=list)

    def add_lookup(self, ids: Tensor, gradient: Tensor) -> None:
        """What a lookup of `ids` leaves: ids [..], gradient [.., D]."""
        wide = torch.float32 if gradient.dtype in (torch.bfloat16, torch.float16) else gradient.dtype
        self._lookups.append((ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1]).to(wide)))

    def add_head(self, tokens: int, make: MakeRows) -> None:
        """What a head's call on so many tokens leaves."""
        self._heads.append((tokens, make))

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest head call: its logits are [tokens, rows] while rows are made."""
        return max((tokens for tokens, _ in self._heads), default=0)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the gradient, in fp32 (fp64 for fp64): [stop − start, D]."""
        wide = torch.float64 if self.table.dtype == torch.float64 else torch.float32
        made: Tensor | None = None
        for _, make in self._heads:
            part = make(self.table.detach(), start, stop)
            part = part.to(wide) if part.dtype != wide else part
            made = part if made is None else made.add_(part)
            del part
        count = stop - start
        for ids, gradient in self._lookups:
            # Rows elsewhere are sent to a padding row, which is skipped: how much there is does not depend on data.
            here = ids.ge(start).logical_and_(ids.lt(stop))
            own = torch.where(here, ids - start, count)
            part = torch.ops.aten.embedding_dense_backward(gradient, own, count + 1, count, False)[:count]
            del here, own
            made = part if made is None else made.add_(part)
            del part
        return torch.zeros(count, self.table.shape[1], dtype=wide, device=self.table.device) if made is None else made

    def clear(self) -> None:
        """Forget what was left."""
        self._lookups.clear()
        self._heads.clear()


def known_lookup(module: nn.Module) -> bool:
    """Whether calling an embedding is a lookup, scaled or not, whose rows' gradients can be told."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.scale_grad_by_freq:
        return False
    kind = type(module)
    plain = kind.forward is nn.Embedding.forward
    return plain or (kind.__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale"))


@contextmanager
def rows_on(modules: "list[nn.Embedding]", sinks: "dict[int, RowGradients]") -> Iterator[None]:
    """Inside, each embedding leaves the gradients of the rows it read with `sinks[id(its weight)]`."""
    try:
        for module in modules:
            module.forward = _Forward(module, sinks[id(module.weight)])  # type: ignore[method-assign, assignment]
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


class _Forward:
    def __init__(self, module: nn.Embedding, sink: RowGradients) -> None:
        self.module, self.sink, self.plain = module, sink, module.forward

    def __call__(self, ids: Tensor) -> Tensor:
        weight = self.module.weight
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return self.plain(ids)
        out: Tensor = _Lookup.apply(ids, weight, self.module.padding_idx, self.sink)  # type: ignore[no-untyped-call]
        scale = getattr(self.module, "embed_scale", None)
        return out if scale is None else out * scale.to(weight.dtype)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, sink: RowGradients) -> Tensor:
        ctx.ids, ctx.padding, ctx.sink = ids, padding, sink
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ids = ctx.ids
        if ctx.padding is not None:
            # The padding's row gets no gradient: no row of the table is −1.
            ids = ids.masked_fill(ids.eq(ctx.padding), -1)
        ctx.sink.add_lookup(ids, gradient)
        return None, None, None, None
