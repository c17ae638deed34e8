"""The loss of a distillation in chunks: neither the student's logits nor the teacher's ever exist as a whole.

    ∂L/∂z = w · [ α (softmax(z) − [v = y]) + (1 − α) T · K ],   w = scale where the label counts
    forward: K_v = q_v − p_v            reverse: K_v = q_v (log q_v − log p_v − KL)
    of answers kept on the disk, r the class of all entries that were not kept:
    forward: K_v = q_v (1 − p_r / q_r)  reverse: K_v = q_v (log q_r − log p_r − KL)      for v in r

Chunks are those of `chunk_loss`: of tokens where enough fit, with one product for the student's logits and one for the
teacher's; else of the vocabulary, where each is made twice. Both use the same lines: a chunk is some tokens times some
entries, first for each token's sums over the vocabulary, then for the gradients.

Legend: N tokens, D the student's width, E the teacher's, V vocabulary, k kept entries, c tokens of a chunk, v entries.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run
from memfit.technique.chunk_loss import (
    _FEW_ENTRIES,
    _FEW_TOKENS,
    IGNORED,
    Buffers,
    Head,
    _add_products,
    _as_given,
    _ChunkedLoss,
    _logits,
    _narrow,
    _part,
    _product,
    _targets,
    _Wanted,
    _wide,
)
from memfit.technique.distil import Answers, Distil, FromLogits, Top


@dataclass(frozen=True, kw_only=True)
class DistilCall:
    """A head's call: what it was given, and each token's sums, of which rows of its gradient can be made later."""

    hidden_ND: Tensor
    """In what products are computed in."""
    labels_N: Tensor
    weights_N1: Tensor
    """scale where the label counts, 0 elsewhere."""
    head: Head
    answers: Answers
    distil: Distil
    logsumexp_N1: Tensor
    """Of the student's logits."""
    tempered_N1: Tensor
    """Of the student's logits divided by T."""
    teacher_N1: Tensor
    """Of the teacher's, divided by T; of kept answers, what entries that were not kept multiply q by."""
    kl_N1: Tensor
    kept_Nk: Tensor | None
    """Of kept answers, what is added to an entry that was kept."""
    buffers: Buffers = field(default_factory=Buffers)
    theirs: Buffers = field(default_factory=Buffers)

    def rows_of_gradient(self, weight_VD: Tensor, bias_V: Tensor | None, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the head's gradient [V, D], in the product's dtype."""
        part, rows = slice(start, stop), slice(0, self.hidden_ND.shape[0])
        chunk = _chunk(self, weight_VD[part].to(self.hidden_ND.dtype), bias_V, rows, part)
        g = _narrow(_slope(self, chunk, rows, part), self.hidden_ND.dtype, self.buffers)
        return torch.mm(g.t(), self.hidden_ND)


@dataclass(frozen=True, slots=True)
class _Options:
    answers: Answers
    distil: Distil
    chunk_nbytes: int
    scale: float
    head: Head
    keep: Callable[[DistilCall], None] | None
    learns: bool


def chunked_distil_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    answers: Answers,
    distil: Distil,
    *,
    chunk_nbytes: int,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    head: Head | None = None,
    keep: Callable[[DistilCall], None] | None = None,
) -> Tensor:
    """What `distil_loss` says of a head's logits, a number in fp32 (fp64 for fp64).

    Args:
        hidden_ND: hidden states, in the weight's dtype.
        weight_VD, bias_V, head: the student's head, and what else it does.
        labels_N: int64, each token's label.
        chunk_nbytes: most bytes of one chunk's logits, the student's and the teacher's, in the softmax's precision.
        scale: 1 / (all labels of the batch), times the loss scale in fp16.
        keep: is given what rows of the head's gradient are made of; the weight then gets none here.
    """
    learns = torch.is_grad_enabled()
    options = _Options(answers, distil, chunk_nbytes, scale, head or Head(), keep, learns)
    return _ChunkedDistil.apply(hidden_ND, weight_VD, bias_V, labels_N, options)  # type: ignore[no-any-return, no-untyped-call]


class _ChunkedDistil(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options
    ) -> Tensor:
        device = hidden.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wide = _wide(weight.dtype)
        tokens, entries = labels.shape[0], weight.shape[0]
        with torch.autocast(device, enabled=False):
            call = _call(hidden.detach().to(low), labels, wide, options)
            # Of a chunk there are two logits, the student's and the teacher's.
            at_once = options.chunk_nbytes // (2 * entries * wide.itemsize)
            by_tokens = at_once >= min(tokens, _FEW_TOKENS)
            one_product = tokens <= at_once or not by_tokens
            wants = [options.learns and needed for needed in ctx.needs_input_grad]
            wanted = _Wanted(None, None, None)
            if wants[0]:
                make = torch.empty_like if by_tokens else torch.zeros_like
                wanted.hidden_ND = make(hidden, dtype=hidden.dtype if by_tokens else wide)
            if wants[1] and options.keep is None:
                make = torch.empty_like if one_product else torch.zeros_like
                wanted.weight_VD = make(weight, dtype=weight.dtype if one_product else wide)
            if wants[2] and bias is not None:
                wanted.bias_V = torch.zeros_like(bias, dtype=wide)
            step = max(1, at_once) if by_tokens else tokens
            size = entries if by_tokens else max(_FEW_ENTRIES, options.chunk_nbytes // (2 * tokens * wide.itemsize))
            loss = _in_chunks(call, weight, bias, wanted, step=step, size=size)
            call.buffers.clear()
            call.theirs.clear()
            if options.keep is not None and any(wants):
                options.keep(call)
            ctx.found = _as_given(wanted, hidden, weight, bias)
            del wanted
        return loss

    backward = staticmethod(_ChunkedLoss.backward)


def distil_loss(
    logits_NV: Tensor, labels_N: Tensor, answers: Answers, distil: Distil, *, scale: float, chunk_nbytes: int = 32 << 20
) -> Tensor:
    """The loss of logits that are there as a whole: masked language models, classifiers. Their gradient is made with
    the loss, some tokens at a time."""
    options = _Options(answers, distil, chunk_nbytes, scale, Head(), None, torch.is_grad_enabled())
    return _OfLogits.apply(logits_NV, labels_N, options)  # type: ignore[no-any-return, no-untyped-call]


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, options: _Options) -> Tensor:
        wide, (tokens, entries) = _wide(logits.dtype), logits.shape
        step = max(1, options.chunk_nbytes // (2 * entries * wide.itemsize))
        call, part = _call(logits.detach(), labels, wide, options), slice(0, entries)
        learns = options.learns and ctx.needs_input_grad[0]
        ctx.found = torch.empty_like(logits) if learns else None
        loss = torch.zeros((), dtype=wide, device=logits.device)
        for start in blocks_to_run(range(0, tokens, step)):
            rows = slice(start, min(start + step, tokens))
            z = call.buffers.take("softmax", (rows.stop - start, entries), logits, wide).copy_(logits[rows])
            chunk, sums = _Chunk(z, None, _theirs(call, z, rows, part)), _Sums(call, rows)
            sums.add(chunk, part)
            loss.add_(sums.finish(entries))
            if learns:
                ctx.found[rows].copy_(_slope(call, chunk, rows, part))
            del z, chunk, sums
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found, ctx.found = ctx.found, None
        return None if found is None else found.mul_(gradient.to(found.dtype)), None, None


def _call(x_ND: Tensor, labels_N: Tensor, wide: torch.dtype, options: _Options) -> DistilCall:
    """The call, its sums not known yet."""
    tokens, answers = labels_N.shape[0], options.answers
    sums = [torch.empty(tokens, 1, dtype=wide, device=x_ND.device) for _ in range(4)]
    kept = None
    if isinstance(answers, Top):
        kept = torch.empty(answers.ids_Nk.shape, dtype=wide, device=x_ND.device)
    return DistilCall(
        hidden_ND=x_ND, labels_N=labels_N, weights_N1=labels_N.ne(IGNORED).to(wide).mul_(options.scale).unsqueeze(1),
        head=options.head, answers=answers, distil=options.distil, logsumexp_N1=sums[0], tempered_N1=sums[1],
        teacher_N1=sums[2], kl_N1=sums[3], kept_Nk=kept,
    )  # fmt: skip


def _in_chunks(
    call: DistilCall, weight_VD: Tensor, bias_V: Tensor | None, wanted: _Wanted, *, step: int, size: int
) -> Tensor:
    """The loss, and the gradients that are wanted: `step` tokens and `size` entries at a time."""
    x_ND = call.hidden_ND
    tokens, entries = x_ND.shape[0], weight_VD.shape[0]
    parts = [slice(start, min(start + size, entries)) for start in range(0, entries, size)]
    loss = torch.zeros((), dtype=call.weights_N1.dtype, device=x_ND.device)
    whole = weight_VD.detach().to(x_ND.dtype) if len(parts) == 1 else None
    for start in blocks_to_run(range(0, tokens, step)):
        rows = slice(start, min(start + step, tokens))
        sums = _Sums(call, rows)
        for part in blocks_to_run(parts):
            chunk = _chunk(call, _rows(whole, weight_VD, part, x_ND.dtype), bias_V, rows, part)
            sums.add(chunk, part)
        loss.add_(sums.finish(entries))
        del sums
        for part in blocks_to_run(parts if wanted.any else []):
            weight = _rows(whole, weight_VD, part, x_ND.dtype)
            if len(parts) > 1:
                chunk = _chunk(call, weight, bias_V, rows, part)
            z = _slope(call, chunk, rows, part)
            _use(call, z, weight, wanted, rows, part, alone=len(parts) == 1)
            del z, weight
        del chunk
    return loss


def _rows(whole: Tensor | None, weight_VD: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    return weight_VD[part].detach().to(dtype) if whole is None else whole


def _use(
    call: DistilCall, z: Tensor, weight_vD: Tensor, wanted: _Wanted, rows: slice, part: slice, *, alone: bool
) -> None:
    """What a chunk's ∂L/∂(x W^T) [c, v] adds to the gradients; `alone`: it has the whole vocabulary."""
    x = call.hidden_ND[rows]
    if wanted.bias_V is not None:
        wanted.bias_V[part].add_(z.sum(0))
    g = _narrow(z, x.dtype, call.buffers)
    if wanted.hidden_ND is not None:
        if alone:
            _product(g, weight_vD, out=wanted.hidden_ND[rows])
        elif g.dtype == wanted.hidden_ND.dtype:
            wanted.hidden_ND[rows].addmm_(g, weight_vD)
        else:
            product = call.buffers.take("hidden", (x.shape[0], x.shape[1]), x, x.dtype)
            wanted.hidden_ND[rows].add_(torch.mm(g, weight_vD, out=product))
    if wanted.weight_VD is not None:
        if x.shape == call.hidden_ND.shape:
            _product(g.t(), x, out=wanted.weight_VD[part])
        else:
            _add_products(wanted.weight_VD[part], g, x)


# -- a chunk -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Chunk:
    """Logits of some tokens and entries, in buffers: the student's, their slope, the teacher's if it is asked whole."""

    z_cv: Tensor
    slope_cv: Tensor | None
    teacher_cv: Tensor | None


def _chunk(call: DistilCall, weight_vD: Tensor, bias_V: Tensor | None, rows: slice, part: slice) -> _Chunk:
    z, slope = _logits(call.hidden_ND[rows], weight_vD, _part(bias_V, part), call.head, call.buffers)
    return _Chunk(z, slope, _theirs(call, z, rows, part))


def _theirs(call: DistilCall, z: Tensor, rows: slice, part: slice) -> Tensor | None:
    """The teacher's logits of the same tokens and entries, in a buffer and the same dtype; None of kept answers."""
    answers = call.answers
    if isinstance(answers, Top):
        return None
    if isinstance(answers, FromLogits):
        theirs = answers.logits_NV[rows, part]
    else:
        weight, bias = answers.weight_VE[part], _part(answers.bias_V, part)
        theirs = _logits(answers.hidden_NE[rows], weight, bias, answers.head, call.theirs)[0]
        if theirs.dtype == z.dtype:
            return theirs
    return call.theirs.take("wide", (z.shape[0], z.shape[1]), z, z.dtype).copy_(theirs)


class _Sums:
    """What some tokens' sums over the vocabulary come to, one block of entries after the other."""

    def __init__(self, call: DistilCall, rows: slice) -> None:
        self.call, self.rows = call, rows
        like = call.weights_N1[rows]
        self.top, self.teacher_top = (torch.full_like(like, -torch.inf) for _ in range(2))
        """The largest logit so far: all sums are of e^(z − top)."""
        self.plain, self.tempered, self.picked = (torch.zeros_like(like) for _ in range(3))
        self.teacher, self.cross = (torch.zeros_like(like) for _ in range(2))
        """Of the teacher; and Σ p (log p − log q), or with q in front, before both are made to sum to 1."""
        self.kept: Tensor | None = None
        answers = call.answers
        if isinstance(answers, Top):
            self.kept = torch.zeros(answers.ids_Nk[rows].shape, dtype=like.dtype, device=like.device)

    def add(self, chunk: _Chunk, part: slice) -> None:
        """Count a block of entries in."""
        call, z, distil = self.call, chunk.z_cv, self.call.distil
        size, t = (z.shape[0], z.shape[1]), distil.temperature
        e = call.buffers.take("scratch", size, z, z.dtype)
        if distil.alpha:
            target, here = _targets(call.labels_N[self.rows], part)
            self.picked.add_(z.gather(1, target).masked_fill_(here.logical_not(), 0.0))
        higher = torch.maximum(z.amax(-1, keepdim=True), self.top)
        shrink = self.top.sub_(higher)
        if distil.alpha and t != 1:
            self.plain.mul_(shrink.exp())
            self.plain.add_(torch.sub(z, higher, out=e).exp_().sum(-1, keepdim=True))
        shrink.div_(t).exp_()
        torch.sub(z, higher, out=e).div_(t).exp_()
        if self.kept is not None:
            self._keep(z, e, part)
        self.tempered.mul_(shrink).add_(e.sum(-1, keepdim=True))
        if chunk.teacher_cv is not None:
            off = torch.sub(z, chunk.teacher_cv, out=call.buffers.take("off", size, z, z.dtype)).div_(t)
            if distil.kl == "reverse":
                self.cross.mul_(shrink).add_(off.mul_(e).sum(-1, keepdim=True))
            theirs = torch.maximum(chunk.teacher_cv.amax(-1, keepdim=True), self.teacher_top)
            shrink = self.teacher_top.sub_(theirs).div_(t).exp_()
            torch.sub(chunk.teacher_cv, theirs, out=e).div_(t).exp_()
            if distil.kl == "forward":
                self.cross.mul_(shrink).sub_(off.mul_(e).sum(-1, keepdim=True))
            self.teacher.mul_(shrink).add_(e.sum(-1, keepdim=True))
            self.teacher_top = theirs
        self.top = higher

    def _keep(self, z: Tensor, e: Tensor, part: slice) -> None:
        """Note the logits of kept entries, and leave them out of the sum: what is left would be lost beside them."""
        answers, kept = self.call.answers, self.kept
        assert isinstance(answers, Top) and kept is not None
        target, here = _places(answers.ids_Nk[self.rows], part)
        kept.add_(z.gather(1, target).mul_(here))
        e.scatter_add_(1, target, e.gather(1, target).mul_(here).neg_())

    def finish(self, entries: int) -> Tensor:
        """Write the sums of these tokens down; their part of the loss."""
        call, rows, t = self.call, self.rows, self.call.distil.temperature
        top = self.top / t
        kl = call.kl_N1[rows]
        tempered = call.tempered_N1[rows]
        if self.kept is not None:
            self._finish_kept(top, entries)
        else:
            torch.log(self.tempered, out=tempered).add_(top)
            teacher = torch.log(self.teacher, out=call.teacher_N1[rows]).add_(self.teacher_top / t)
            if call.distil.kl == "forward":
                kl.copy_(self.cross.div_(self.teacher).sub_(teacher).add_(tempered))
            else:
                kl.copy_(self.cross.div_(self.tempered).sub_(tempered).add_(teacher))
        if call.distil.alpha:
            own = call.logsumexp_N1[rows]
            own.copy_(tempered if t == 1 else self.plain.log_().add_(self.top))
        else:
            call.logsumexp_N1[rows].zero_()
        loss = call.logsumexp_N1[rows].sub(self.picked).mul_(call.distil.alpha)
        loss.add_(kl, alpha=(1 - call.distil.alpha) * t * t)
        return loss.mul_(call.weights_N1[rows]).sum()

    def _finish_kept(self, top: Tensor, entries: int) -> None:
        call, rows, t, kept = self.call, self.rows, self.call.distil.temperature, self.kept
        answers = call.answers
        assert isinstance(answers, Top) and kept is not None and call.kept_Nk is not None
        log_q = kept.div_(t)
        rest = self.tempered  # all but what was kept
        total = log_q.sub(top).exp_().sum(-1, keepdim=True).add_(rest).log_().add_(top)
        call.tempered_N1[rows].copy_(total)
        log_q.sub_(total)
        log_p = answers.log_probs_Nk[rows].to(log_q.dtype)
        off, forward = log_q - log_p, call.distil.kl == "forward"
        kl = (log_p.exp().mul_(off).neg_() if forward else log_q.exp().mul_(off)).sum(-1, keepdim=True)
        # ∂KL/∂b of an entry that was not kept is q times a number, of one that was kept a number of its own.
        times = torch.ones_like(kl) if forward else torch.zeros_like(kl)
        if log_q.shape[1] < entries:
            least = torch.finfo(rest.dtype).tiny
            rest_q = rest.clamp_(min=least).log_().add_(top).sub_(total)
            rest_p = answers.rest_N[rows].to(log_q.dtype).unsqueeze(1)
            apart = rest_q - rest_p
            kl.add_(rest_p.exp().mul_(apart).neg_() if forward else rest_q.exp().mul_(apart))
            times = 1 - torch.exp(-apart) if forward else apart - kl
        elif not forward:
            times = -kl
        own = log_q.exp() - log_p.exp() if forward else log_q.exp() * (off - kl)
        call.kept_Nk[rows].copy_(own.sub_(log_q.exp_().mul_(times)))
        call.teacher_N1[rows].copy_(times)
        call.kl_N1[rows].copy_(kl)


def _places(ids_ck: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Kept entries as places in a block of entries [c, k], and 1 where an entry is there, 0 elsewhere."""
    here = ids_ck.ge(part.start).logical_and_(ids_ck.lt(part.stop))
    return ids_ck.to(torch.int64).sub_(part.start).clamp_(0, part.stop - part.start - 1), here


def _slope(call: DistilCall, chunk: _Chunk, rows: slice, part: slice) -> Tensor:
    """∂L/∂(x W^T) [c, v] of a chunk, in its buffers: its logits are gone."""
    z, distil, t = chunk.z_cv, call.distil, call.distil.temperature
    e = call.buffers.take("scratch", (z.shape[0], z.shape[1]), z, z.dtype)
    torch.div(z, t, out=e).sub_(call.tempered_N1[rows]).exp_()
    theirs = chunk.teacher_cv
    if theirs is None:
        assert isinstance(call.answers, Top) and call.kept_Nk is not None
        e.mul_(call.teacher_N1[rows])
        target, here = _places(call.answers.ids_Nk[rows], part)
        e.scatter_add_(1, target, call.kept_Nk[rows] * here)
    elif distil.kl == "forward":
        e.sub_(theirs.div_(t).sub_(call.teacher_N1[rows]).exp_())
    else:
        known = call.teacher_N1[rows].sub(call.tempered_N1[rows]).sub_(call.kl_N1[rows])
        e.mul_(theirs.neg_().add_(z).div_(t).add_(known))
    e.mul_((1 - distil.alpha) * t)
    if distil.alpha:
        z.sub_(call.logsumexp_N1[rows]).exp_()
        target, here = _targets(call.labels_N[rows], part)
        z.scatter_add_(1, target, here.to(z.dtype).neg_())
        e.add_(z, alpha=distil.alpha)
    e.mul_(call.weights_N1[rows])
    return e if chunk.slope_cv is None else e.mul_(chunk.slope_cv)
