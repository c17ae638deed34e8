"""Integers to the nearest: the step that the largest weight of a group asks for, and no search.

N outputs (rows), K inputs, G groups of a row, g inputs of a group, R rows of a block.
"""

from typing import Final

import torch
from torch import Tensor

from memfit.packed.blocks import blocks_of
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.scheme import Scheme

SMALLEST: Final = 2.0**-100
"""Groups that nowhere exceed this are stored as zeros, or where no level is 0 as less than this: their scales would be
subnormal."""
_LARGEST: Final = 2.0**120
"""Larger weights are refused: the outermost level, up to 2 steps of RTN away, could overflow bf16."""
_BLOCK_NBYTES: Final = 5 << 16
"""Of a block in fp32: all passes over it find it in the second-level cache, and its memory is that of the block before.
Measured, ns a weight: 2.4; of 1.3 MiB 3.2, as every block then comes from the system."""


def round_to_nearest(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q int8 [N, K], scale bf16 [N, G], zero int8 [N, G] or None) of weight [N, K]; ŵ = bf16((q − zero) · scale).

    With b bits a symmetric step is 2·max|w| / (2^b − 1), an asymmetric one the range from the smallest to the largest
    weight, 0 included, / (2^b − 1).

    Raises:
        ValueError: weights that are not finite or beyond 2^120.
    """
    rows, inputs = weight.shape
    groups = scheme.groups(inputs)
    q = torch.empty(rows, groups, inputs // groups, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, groups, 1, dtype=torch.bfloat16, device=weight.device)
    zero = None if scheme.symmetric else torch.empty_like(scale, dtype=torch.int8)
    for some in blocks_to_run(blocks_of(rows, _BLOCK_NBYTES // (4 * inputs), 1)):
        block = slice(*some)
        _round_rows(weight[block], q[block], scale[block], None if zero is None else zero[block], bits=scheme.bits)
    return q.view(rows, inputs), scale.squeeze(-1), None if zero is None else zero.squeeze(-1)


def _round_rows(weight: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int) -> None:
    """Fill q [R, G, g], scale and zero [R, G, 1] of weight [R, K]."""
    span, half = 2**bits - 1, 2 ** (bits - 1)
    w = torch.empty_like(q, dtype=torch.float32)
    w.view(weight.shape).copy_(weight)
    low, high = w.amin(dim=-1, keepdim=True), w.amax(dim=-1, keepdim=True)
    peak = torch.maximum(-low, high)
    require_held(peak)
    alive = peak > SMALLEST
    if zero is None:
        step = stored(torch.where(alive, peak, 1.0) / (span / 2))
    else:
        low.clamp_(max=0)
        step = stored(torch.where(alive, high.clamp_(min=0) - low, 1.0) / span)
    w.div_(step).round_()
    if zero is not None:
        offset = low.div_(step).round_().clamp_(-span, 0).neg_().sub_(half)
        w.add_(offset)
        zero.copy_(offset)
    q.copy_(w.clamp_(-half, half - 1))
    scale.copy_(step)


def stored(scale: Tensor) -> Tensor:
    """The nearest bf16 number, as float32."""
    return scale.to(torch.bfloat16).to(torch.float32)


def require_held(peak: Tensor) -> None:
    """ValueError if the largest magnitudes of some groups tell of a weight that no scale can hold."""
    if not is_fake(peak) and not bool((peak <= _LARGEST).all()):  # false for NaN too
        raise ValueError("the weight has entries that are not finite or larger than 2^120")
