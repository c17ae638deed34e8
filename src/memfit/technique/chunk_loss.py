"""Head and cross-entropy in chunks, so that no logits of a whole batch exist.

    L = scale · Σ_n [ logsumexp_v z_nv − z_n,y_n ],    z = multiplier · cap(x W^T + b),   over labels y_n ≠ −100
    ∂L/∂z_nv = scale · (softmax(z)_nv − [v = y_n])

The gradient of the hidden states is made in the forward pass, while the chunk's logits are there; that of the head
either as well, or by whoever updates the head, some rows at a time, from what is kept for it: the hidden states and
each token's logsumexp. Then no gradient of the head's size exists, for one product more.

A chunk is of tokens, with the whole vocabulary, where it holds enough of them: three products. For each chunk the head
is read twice and its gradient added up once, so with a large vocabulary, of which few tokens fit in a chunk, memory
would be waited for most of the time (measured: 24 s of 4096 tokens, 262144 entries, 32 tokens a chunk). Then a chunk is
of entries, with all tokens, and each is made twice: for the logsumexp and for the gradients (6 s).

Legend: N tokens, D width, V vocabulary, c tokens of a chunk, v entries of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run

IGNORED: Final = -100
_HALVES: Final = (torch.bfloat16, torch.float16)
_TILE: Final = 1 << 20
"""Values of a whole gradient's tile that is added at a time."""
_FEW_TOKENS: Final = 256
"""With fewer tokens in a chunk, chunks are of the vocabulary."""
_FEW_ENTRIES: Final = 64
"""Entries of the vocabulary in a chunk, at the least."""


class Buffers:
    """Blocks that every chunk is made in: the pages of fresh ones would take longer to come than the softmax."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, size: tuple[int, int], like: Tensor, dtype: torch.dtype) -> Tensor:
        """The block of that name, with what was last written there."""
        numel = size[0] * size[1]
        flat = self._flat.get(name)
        if flat is None or flat.numel() < numel:
            self._flat.pop(name, None)
            del flat
            flat = self._flat[name] = torch.empty(numel, dtype=dtype, device=like.device)
        return flat[:numel].view(size)

    def clear(self) -> None:
        """Free them."""
        self._flat.clear()


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a head does to its product: z = multiplier · softcap · tanh(x W^T / softcap)."""

    softcap: float | None = None
    multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True)
class HeadCall:
    """What is kept of a head's call, to make rows of its gradient from later."""

    hidden_ND: Tensor
    """In what products are computed in."""
    logsumexp_N1: Tensor
    labels_N: Tensor
    weights_N1: Tensor
    """scale where the label counts, 0 elsewhere."""
    head: Head
    buffers: Buffers = field(default_factory=Buffers)

    def rows_of_gradient(self, weight_VD: Tensor, bias_V: Tensor | None, start: int, stop: int) -> Tensor:
        """See the function of that name."""
        return rows_of_gradient(self, weight_VD, bias_V, start, stop)


@dataclass(frozen=True, kw_only=True)
class ChunkLoss:
    """The technique: the loss of a language model without its logits."""

    chunk_nbytes: int = 32 << 20
    """Most bytes of one chunk's logits, in the precision of the softmax; at least 64 entries of all tokens."""

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
        options = _Options(self.chunk_nbytes, scale, head or Head(), keep, learns=torch.is_grad_enabled())
        return _ChunkedLoss.apply(hidden_ND, weight_VD, bias_V, labels_N, options)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Options:
    chunk_nbytes: int
    scale: float
    head: Head
    keep: "Callable[[HeadCall], None] | None"
    learns: bool
    """Whether anyone will ask for gradients; `needs_input_grad` knows nothing of `no_grad`."""


@dataclass(slots=True)
class _Wanted:
    """The gradients that are wanted."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @property
    def any(self) -> bool:
        return not (self.hidden_ND is None and self.weight_VD is None and self.bias_V is None)


def _as_given(wanted: _Wanted, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients in the dtypes of what they are of."""
    pairs = ((wanted.hidden_ND, hidden), (wanted.weight_VD, weight), (wanted.bias_V, bias))
    return tuple(None if gradient is None or of is None else gradient.to(of.dtype) for gradient, of in pairs)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options
    ) -> Tensor:
        device = hidden.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wide = _wide(weight.dtype)
        tokens, entries = labels.shape[0], weight.shape[0]
        with torch.autocast(device, enabled=False):
            call = HeadCall(
                hidden_ND=hidden.detach().to(low),
                logsumexp_N1=torch.empty(tokens, 1, dtype=wide, device=hidden.device),
                labels_N=labels,
                weights_N1=labels.ne(IGNORED).to(wide).mul_(options.scale).unsqueeze(1),
                head=options.head,
            )
            at_once = options.chunk_nbytes // (entries * wide.itemsize)
            by_tokens = at_once >= min(tokens, _FEW_TOKENS)
            one_product = tokens <= at_once or not by_tokens
            wants = [options.learns and needed for needed in ctx.needs_input_grad]
            wanted = _Wanted(None, None, None)
            if wants[0]:
                wanted.hidden_ND = torch.empty_like(hidden, dtype=hidden.dtype if by_tokens else wide)
            if wants[1] and options.keep is None:
                make = torch.empty_like if one_product else torch.zeros_like
                wanted.weight_VD = make(weight, dtype=weight.dtype if one_product else wide)
            if wants[2] and bias is not None:
                wanted.bias_V = torch.zeros_like(bias, dtype=wide)
            if by_tokens:
                loss = _by_tokens(call, weight, bias, wanted, step=max(1, at_once))
            else:
                step = max(_FEW_ENTRIES, options.chunk_nbytes // (tokens * wide.itemsize))
                loss = _by_vocabulary(call, weight, bias, wanted, step=step)
            call.buffers.clear()
            if options.keep is not None and any(wants):
                options.keep(call)
            ctx.found = _as_given(wanted, hidden, weight, bias)
            del wanted
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found, ctx.found = ctx.found, (None, None, None)
        return (*(None if t is None else t.mul_(gradient.to(t.dtype)) for t in found), None, None)


def _by_tokens(call: HeadCall, weight_VD: Tensor, bias_V: Tensor | None, wanted: _Wanted, *, step: int) -> Tensor:
    """The loss, and the gradients that are wanted, some tokens at a time."""
    x_ND, weights_N1 = call.hidden_ND, call.weights_N1
    loss = torch.zeros((), dtype=weights_N1.dtype, device=x_ND.device)
    weight = weight_VD.detach().to(x_ND.dtype)
    for start in blocks_to_run(range(0, x_ND.shape[0], step)):
        rows = slice(start, min(start + step, x_ND.shape[0]))
        x, counted = x_ND[rows], weights_N1[rows]
        z, slope = _logits(x, weight, bias_V, call.head, call.buffers)
        top = z.amax(-1, keepdim=True)
        target = call.labels_N[rows].clamp(min=0).unsqueeze(1)
        picked = z.gather(1, target)
        z.sub_(top).exp_()
        total = z.sum(-1, keepdim=True)
        own = total.log().add_(top)
        call.logsumexp_N1[rows].copy_(own)
        loss.add_(own.sub_(picked).mul_(counted).sum())
        if wanted.any:
            z.div_(total).scatter_add_(1, target, torch.full_like(picked, -1.0)).mul_(counted)
            if slope is not None:
                z.mul_(slope)
            if wanted.bias_V is not None:
                wanted.bias_V.add_(z.sum(0))
            g = _narrow(z, x.dtype, call.buffers)
            if wanted.hidden_ND is not None:
                _product(g, weight, out=wanted.hidden_ND[rows])
            if wanted.weight_VD is not None:
                if x.shape == x_ND.shape:
                    _product(g.t(), x, out=wanted.weight_VD)
                else:
                    _add_products(wanted.weight_VD, g, x)
            del g
        del z, slope
    return loss


def _by_vocabulary(call: HeadCall, weight_VD: Tensor, bias_V: Tensor | None, wanted: _Wanted, *, step: int) -> Tensor:
    """The same, some entries of the vocabulary at a time: once for each token's logsumexp, once for the gradients."""
    x, entries, buffers = call.hidden_ND, weight_VD.shape[0], call.buffers
    parts = [slice(start, min(start + step, entries)) for start in range(0, entries, step)]
    top = torch.full_like(call.logsumexp_N1, -torch.inf)
    total, picked = torch.zeros_like(top), torch.zeros_like(top)
    for part in blocks_to_run(parts):
        z, _ = _logits(x, weight_VD[part].detach().to(x.dtype), _part(bias_V, part), call.head, buffers)
        target, here = _targets(call.labels_N, part)
        picked.add_(z.gather(1, target).masked_fill_(here.logical_not(), 0.0))
        higher = z.amax(-1, keepdim=True)
        torch.maximum(higher, top, out=higher)
        total.mul_(top.sub_(higher).exp_())
        total.add_(z.sub_(higher).exp_().sum(-1, keepdim=True))
        top = higher
        del z, _, target, here, higher
    torch.log(total, out=call.logsumexp_N1).add_(top)
    loss = call.logsumexp_N1.sub(picked).mul_(call.weights_N1).sum()
    del top, total, picked
    if wanted.hidden_ND is not None:
        wanted.hidden_ND.zero_()
    for part in blocks_to_run(parts if wanted.any else []):
        weight = weight_VD[part].detach().to(x.dtype)
        z = _slope_of_loss(call, weight, _part(bias_V, part), part)
        if wanted.bias_V is not None:
            wanted.bias_V[part].copy_(z.sum(0))
        g = _narrow(z, x.dtype, buffers)
        del z
        if wanted.hidden_ND is not None:
            if g.dtype == wanted.hidden_ND.dtype:
                wanted.hidden_ND.addmm_(g, weight)
            else:
                product = buffers.take("hidden", (x.shape[0], x.shape[1]), x, x.dtype)
                wanted.hidden_ND.add_(torch.mm(g, weight, out=product))
                del product
        if wanted.weight_VD is not None:
            _product(g.t(), x, out=wanted.weight_VD[part])
        del g, weight
    return loss


def rows_of_gradient(call: HeadCall, weight_VD: Tensor, bias_V: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the head's gradient [V, D] that a call with `keep` left out, in the product's dtype."""
    part = slice(start, stop)
    z = _slope_of_loss(call, weight_VD[part].to(call.hidden_ND.dtype), _part(bias_V, part), part)
    return torch.mm(_narrow(z, call.hidden_ND.dtype, call.buffers).t(), call.hidden_ND)


def _slope_of_loss(call: HeadCall, weight_vD: Tensor, bias_v: Tensor | None, part: slice) -> Tensor:
    """∂L/∂(x W^T) [N, v] for some entries of the vocabulary, in the softmax's precision."""
    z, slope = _logits(call.hidden_ND, weight_vD, bias_v, call.head, call.buffers)
    z.sub_(call.logsumexp_N1).exp_()
    target, here = _targets(call.labels_N, part)
    z.scatter_add_(1, target, here.to(z.dtype).neg_())
    z.mul_(call.weights_N1)
    return z if slope is None else z.mul_(slope)


def _targets(labels_N: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Each token's label as an entry of the part [N, 1], and whether it is there at all."""
    here = labels_N.ge(part.start).logical_and_(labels_N.lt(part.stop))
    return labels_N.sub(part.start).clamp_(0, part.stop - part.start - 1).unsqueeze(1), here.unsqueeze(1)


def _logits(
    x_cD: Tensor, weight_vD: Tensor, bias_v: Tensor | None, head: Head, buffers: Buffers
) -> tuple[Tensor, Tensor | None]:
    """(z [c, v] in the softmax's precision, its slope ∂z/∂(x W^T) where that is not 1 everywhere), in buffers."""
    size = (x_cD.shape[0], weight_vD.shape[0])
    plain, wide = buffers.take("product", size, x_cD, x_cD.dtype), _wide(x_cD.dtype)
    if bias_v is None:
        torch.mm(x_cD, weight_vD.t(), out=plain)
    else:
        torch.addmm(bias_v.detach().to(x_cD.dtype), x_cD, weight_vD.t(), out=plain)
    z = plain if plain.dtype == wide else buffers.take("softmax", size, x_cD, wide).copy_(plain)
    slope = None
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = torch.mul(z, z, out=buffers.take("slope", size, z, wide)).neg_().add_(1.0)
        z.mul_(head.softcap)
    if head.multiplier != 1.0:
        z.mul_(head.multiplier)
        slope = buffers.take("slope", size, z, wide).fill_(1.0) if slope is None else slope
        slope.mul_(head.multiplier)
    return z, slope


def _narrow(z: Tensor, dtype: torch.dtype, buffers: Buffers) -> Tensor:
    """`z` in the dtype of products, where the logits were that it was made from."""
    return z if z.dtype == dtype else buffers.take("product", (z.shape[0], z.shape[1]), z, dtype).copy_(z)


def _product(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """out = left · right, whatever dtype `out` has."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(torch.mm(left, right))


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


def _part(bias_V: Tensor | None, part: slice) -> Tensor | None:
    return None if bias_V is None else bias_V[part]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the softmax is taken in."""
    return torch.float32 if dtype in _HALVES else dtype
