"""Head and cross-entropy in chunks of tokens, so that no logits of a whole batch exist.

    L = scale · Σ_n [ logsumexp_v z_nv − z_n,y_n ],    z = multiplier · cap(x W^T + b),   over labels y_n ≠ −100
    ∂L/∂z_nv = scale · (softmax(z)_nv − [v = y_n])

The gradient of the hidden states is made in the forward pass, while the chunk's logits are there; that of the head
either as well (`whole`), or by whoever updates the head, some rows at a time (`rows`), from what is kept for it:
the hidden states and each token's logsumexp. Then no gradient of the head's size exists, for one product more.

Legend: N tokens, D width, V vocabulary, c tokens of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from memfit.packed.fake import blocks_to_run

IGNORED: Final = -100
_HALVES: Final = (torch.bfloat16, torch.float16)
_TILE: Final = 1 << 20
"""Values of a whole gradient's tile that is added at a time."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a head does to its product: z = multiplier · softcap · tanh(x W^T / softcap)."""

    softcap: float | None = None
    multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True)
class HeadCall:
    """What is kept of a head's call, to make rows of its gradient from later."""

    hidden_ND: Tensor
    logsumexp_N: Tensor
    labels_N: Tensor
    scale: float
    head: Head


@dataclass(frozen=True, kw_only=True)
class ChunkLoss:
    """The technique: the loss of a language model without its logits."""

    chunk_nbytes: int = 32 << 20
    """Most bytes of one chunk's logits, in the precision of the softmax; at least one token's."""

    def __post_init__(self) -> None:
        if self.chunk_nbytes < 1:
            raise ValueError(f"chunk_nbytes must be at least 1, got {self.chunk_nbytes}")

    def apply(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        *,
        bias_V: Tensor | None = None,
        scale: float = 1.0,
        head: Head | None = None,
        keep: "Callable[[HeadCall], None] | None" = None,
    ) -> Tensor:
        """scale · Σ cross-entropy of the tokens whose label is not −100, a number in fp32 (fp64 for fp64).

        Args:
            hidden_ND: hidden states, in the weight's dtype.
            weight_VD: the head.
            labels_N: int64, each token's label.
            bias_V: of the head.
            scale: 1 / (all labels of the batch), times the loss scale in fp16.
            head: what else the head does; default: nothing.
            keep: is given what rows of the head's gradient are made of; the weight then gets none here.
        """
        options = _Options(self.chunk_nbytes, scale, head or Head(), keep)
        return _ChunkedLoss.apply(hidden_ND, weight_VD, bias_V, labels_N, options)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Options:
    chunk_nbytes: int
    scale: float
    head: Head
    keep: "Callable[[HeadCall], None] | None"


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options
    ) -> Tensor:
        wide = _wide(hidden.dtype)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] and options.keep is None, ctx.needs_input_grad[2])
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
        d_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if wanted[2] else None
        lse = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device) if options.keep is not None else None
        step = max(1, options.chunk_nbytes // (weight.shape[0] * wide.itemsize))
        for start in blocks_to_run(range(0, hidden.shape[0], step)):
            rows = slice(start, start + step)
            x, y = hidden[rows], labels[rows]
            z, slope = logits(x, weight, bias, options.head)
            top = z.amax(-1, keepdim=True)
            counted = y.ne(IGNORED)
            target = y.clamp(min=0).unsqueeze(1)
            picked = z.gather(1, target)
            z.sub_(top).exp_()
            total = z.sum(-1, keepdim=True)
            own = total.log().add_(top)
            if lse is not None:
                lse[rows].copy_(own.squeeze(1))
            weights = counted.to(wide).mul_(options.scale).unsqueeze(1)
            loss.add_(own.sub_(picked).mul_(weights).sum())
            if any(wanted):
                z.div_(total).scatter_add_(1, target, torch.full_like(picked, -1.0)).mul_(weights)
                if slope is not None:
                    z.mul_(slope)
                if d_bias is not None:
                    d_bias.add_(z.sum(0))
                g = z.to(hidden.dtype) if z.dtype != hidden.dtype else z
                del z, slope
                if d_hidden is not None:
                    torch.mm(g, weight, out=d_hidden[rows])
                if d_weight is not None:
                    _add_products(d_weight, g, x)
                del g
            else:
                del z, slope
        if options.keep is not None and any(ctx.needs_input_grad):
            assert lse is not None
            options.keep(
                HeadCall(
                    hidden_ND=hidden.detach(), logsumexp_N=lse, labels_N=labels, scale=options.scale, head=options.head
                )
            )
        if d_weight is not None and d_weight.dtype != weight.dtype:
            d_weight = d_weight.to(weight.dtype)
        ctx.found = (d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found, ctx.found = ctx.found, (None, None, None)
        return (*(None if t is None else t.mul_(gradient.to(t.dtype)) for t in found), None, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the softmax is taken in."""
    return torch.float32 if dtype in _HALVES else dtype


def logits(x_cD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """(z [c, V] in the softmax's precision, its slope ∂z/∂(x W^T) where that is not 1 everywhere)."""
    plain = F.linear(x_cD, weight_VD, bias_V)
    wide = _wide(plain.dtype)
    z = plain.to(wide) if plain.dtype != wide else plain
    del plain
    slope = None
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = z.square().neg_().add_(1.0)
        z.mul_(head.softcap)
    if head.multiplier != 1.0:
        z.mul_(head.multiplier)
        slope = torch.full_like(z, head.multiplier) if slope is None else slope.mul_(head.multiplier)
    return z, slope


def _add_products(whole_VD: Tensor, g_cV: Tensor, x_cD: Tensor) -> None:
    """whole += g^T x, some rows at a time; the sum over chunks is kept in the wider precision."""
    if whole_VD.dtype == x_cD.dtype:
        whole_VD.addmm_(g_cV.t(), x_cD)
        return
    step = max(1, _TILE // whole_VD.shape[1])
    for start in blocks_to_run(range(0, whole_VD.shape[0], step)):
        rows = slice(start, start + step)
        product = torch.mm(g_cV[:, rows].t(), x_cD)
        whole_VD[rows].add_(product.to(whole_VD.dtype))
        del product


def rows_of_gradient(call: HeadCall, weight_VD: Tensor, bias_V: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the head's gradient [V, D] that a call with `keep` left out, in the weight's dtype."""
    x = call.hidden_ND
    z, slope = logits(x, weight_VD[start:stop], None if bias_V is None else bias_V[start:stop], call.head)
    z.sub_(call.logsumexp_N.unsqueeze(1)).exp_()
    here = call.labels_N.ge(start).logical_and_(call.labels_N.lt(stop))
    target = call.labels_N.sub(start).clamp_(0, stop - start - 1).unsqueeze(1)
    z.scatter_add_(1, target, here.to(z.dtype).neg_().unsqueeze(1))
    z.mul_(call.labels_N.ne(IGNORED).to(z.dtype).mul_(call.scale).unsqueeze(1))
    if slope is not None:
        z.mul_(slope)
    g = z.to(x.dtype) if z.dtype != x.dtype else z
    del z, slope
    return torch.mm(g.t(), x)
