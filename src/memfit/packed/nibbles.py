"""The layout that torch's int4 CPU kernel reads, and how every other width is brought to it.

N rows (a multiple of 64), K inputs, G groups of g inputs.

`aten._weight_int4pack_mm_for_cpu` computes x · ŵᵀ, ŵ = (v − 8)·scale + zero, v of 4 bits. With AVX-512 its
weight is blocks of 64 rows: bytes [N/64, K, 32], where byte d holds row d of the block in its low half
and row d + 32 in its high half. A width other than 4 is one or two such weights, each made of one 4-bit plane
that the kernel reads as it lies, or of 2- and 1-bit planes that two or three byte operators spread into it:

    8 bits: q = 16·(v₁ − 8) + (v₂ − 8) + 8        two 4-bit planes
    6 bits: q =  4·(v₁ − 8) + (v₂ − 8)/4 + 2      a 4-bit plane, a 2-bit plane spread to v₂ = 4u
    5 bits: q =  2·(v₁ − 8) + (v₂ − 8)/2 + 4      a 4-bit plane, a 1-bit plane spread to v₂ = 2u
    4 bits: q =      v₁ − 8
    3 bits: q =     (v₁ − 8)/2                    a 2-bit and a 1-bit plane spread to v₁ = 2u
    2 bits: q =     (v₁ − 8)/4                    a 2-bit plane spread to v₁ = 4u

All factors are powers of two, so scale · factor is exact in bf16, and so is scale · constant.
"""

import functools
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

ROWS: Final = 64
"""Rows of a block of the layout."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One call of the kernel: Σ over terms of factor · (v − 8) + constant is q."""

    factor: float
    constant: float
    widths: tuple[int, ...]
    """Widths of the planes that this term is made of; the terms take a weight's planes in their order."""


PLANES: Final[dict[int, tuple[int, ...]]] = {8: (4, 4), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
TERMS: Final[dict[int, tuple[Term, ...]]] = {
    8: (Term(factor=16, constant=0, widths=(4,)), Term(factor=1, constant=8, widths=(4,))),
    6: (Term(factor=4, constant=0, widths=(4,)), Term(factor=0.25, constant=2, widths=(2,))),
    5: (Term(factor=2, constant=0, widths=(4,)), Term(factor=0.5, constant=4, widths=(1,))),
    4: (Term(factor=1, constant=0, widths=(4,)),),
    3: (Term(factor=0.5, constant=0, widths=(2, 1)),),
    2: (Term(factor=0.25, constant=0, widths=(2,)),),
}
_SPREAD_2: Final = ((2, -0x33333334), (0, -0x33333334))
"""(left shift, mask) that bring each half of a 2-bit plane to bits 2 and 3 of every nibble."""
_SPREAD_1: Final = ((1, 0x22222222), (0, 0x22222222), (-1, 0x22222222), (-2, 0x22222222))
"""The same for the quarters of a 1-bit plane, to bit 1."""


@functools.cache
def kernel_layout_is_known() -> bool:
    """Whether this CPU's int4 kernel reads the layout above: tried on a small matrix, never assumed."""
    with _disable_current_modes():
        q = torch.arange(2 * ROWS * 64, dtype=torch.int32).mul_(7).view(2 * ROWS, 64).remainder_(15)
        try:
            theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        except (RuntimeError, NotImplementedError, AttributeError):
            return False
        ours = pack_rows(q.to(torch.uint8), 4)[0]
        return theirs.numel() == ours.numel() and bool(torch.equal(theirs.view(-1), ours.view(-1)))


def pack_rows(u: Tensor, bits: int) -> list[Tensor]:
    """uint8 u = q + 2^(b−1) [n, K] → a plane uint8 [n/64, K·p/4, 32] for each width p. 64 divides n."""
    rows, inputs = u.shape
    u = u.view(rows // ROWS, 2, 32, inputs)
    planes, below = [], bits
    for width in PLANES[bits]:
        below -= width
        pairs = (u[:, 0] >> below).bitwise_and_((1 << width) - 1)
        high = (u[:, 1] >> below).bitwise_and_((1 << width) - 1)
        pairs.bitwise_or_(high.bitwise_left_shift_(4))
        del high
        nibbles = pairs.transpose(1, 2).contiguous()
        del pairs
        length = inputs * width // 4
        plane = nibbles[:, :length].contiguous()
        for i in range(1, 4 // width):
            plane.bitwise_or_(nibbles[:, i * length : (i + 1) * length] << (i * width))
        planes.append(plane)
        del nibbles, plane
    return planes


def _spread(plane: Tensor, out: Tensor, steps: tuple[tuple[int, int], ...], *, add: bool) -> None:
    """Bring a narrow plane [n, K/s, 32] to its bits of each nibble of `out` [n, K, 32], s = len(steps)."""
    source, target = plane.view(torch.int32), out.view(torch.int32)  # words: four bytes an operation
    length = source.shape[1]
    transient = torch.empty_like(source) if add else None
    for i, (shift, mask) in enumerate(steps):
        segment = target[:, i * length : (i + 1) * length]
        into = segment if transient is None else transient
        if shift > 0:
            torch.bitwise_left_shift(source, shift, out=into)
            into.bitwise_and_(mask)
        elif shift < 0:
            torch.bitwise_right_shift(source, -shift, out=into)  # the sign it smears into the top is masked
            into.bitwise_and_(mask)
        else:
            torch.bitwise_and(source, mask, out=into)
        if transient is not None:
            segment.bitwise_or_(transient)


def term_nibbles(planes: list[Tensor], term: Term) -> Tensor:
    """What the kernel reads for `term`, made of its `planes` [n, K·p/4, 32] → uint8 [n, K, 32].

    A 4-bit plane is returned as it is; others are spread into a new tensor, with a transient of a quarter of
    its size.
    """
    first = planes[0]
    if term.widths == (4,):
        return first
    steps = _SPREAD_2 if term.widths[0] == 2 else _SPREAD_1
    out = torch.empty(first.shape[0], first.shape[1] * len(steps), 32, dtype=torch.uint8, device=first.device)
    _spread(first, out, steps, add=False)
    if term.widths == (2, 1):
        _spread(planes[1], out, _SPREAD_1, add=True)
    return out


def unpack_half(planes: list[Tensor], bits: int, half: int) -> Tensor:
    """int8 q [n, K, 32] of rows 32·half to 32·half + 31 of each block; inputs still before rows."""
    result: Tensor | None = None
    below = bits
    for plane, width in zip(planes, PLANES[bits], strict=True):
        below -= width
        part = _unpack_plane(plane, width, half)
        if below:
            part.bitwise_left_shift_(below)
        result = part if result is None else result.bitwise_or_(part)
        del part
    assert result is not None
    return result.sub_(1 << (bits - 1)).view(torch.int8)


def _unpack_plane(plane: Tensor, width: int, half: int) -> Tensor:
    """The `width` bits of each value of one half of the rows: uint8 [n, K, 32] from [n, K·width/4, 32]."""
    blocks, length, _ = plane.shape
    mask = (1 << width) - 1
    mask |= mask << 8 | mask << 16 | mask << 24
    source = plane.view(torch.int32)
    out = torch.empty(blocks, length * 4 // width, 32, dtype=torch.uint8, device=plane.device)
    target = out.view(torch.int32)
    for i in range(4 // width):
        segment = target[:, i * length : (i + 1) * length]
        shift = half * 4 + i * width
        if shift:
            torch.bitwise_right_shift(source, shift, out=segment)
            segment.bitwise_and_(mask)
        else:
            torch.bitwise_and(source, mask, out=segment)
    return out


def gather_rows(planes: list[Tensor], bits: int, index: Tensor) -> Tensor:
    """int8 q [n, K] of the rows in `index` [n]; only their bytes are touched."""
    block, row = index // ROWS, index % ROWS
    half, column = (row // 32).to(torch.uint8).mul_(4)[:, None], row % 32
    result: Tensor | None = None
    below = bits
    for plane, width in zip(planes, PLANES[bits], strict=True):
        below -= width
        part = (plane[block, :, column] >> half).bitwise_and_(15)  # [n, K·width/4]
        segments = [(part >> (i * width)).bitwise_and_((1 << width) - 1) for i in range(4 // width)]
        part = segments[0] if len(segments) == 1 else torch.cat(segments, dim=-1)
        if below:
            part.bitwise_left_shift_(below)
        result = part if result is None else result.bitwise_or_(part)
    assert result is not None
    return result.sub_(1 << (bits - 1)).view(torch.int8)


def scale_zero(scale: Tensor, zero: Tensor | None, bits: int, n: int) -> Tensor:
    """bf16 [G, n, 2] for term `n`: the scale, and what to add to a whole group; scale and zero are [G, n].

    A zero point of the weight adds −z·s, which bf16 has to round: the last term carries the rest of it.
    """
    term = TERMS[bits][n]
    if zero is None and term.constant == 0:
        # A pair (scale, 0) is the scale's bits in the low half of a word, and one word is written faster than
        # two halves.
        pair = torch.empty(scale.shape, dtype=torch.int32, device=scale.device)
        pair.copy_((scale * term.factor if term.factor != 1 else scale).view(torch.int16))
        return pair.bitwise_and_(0xFFFF).view(torch.bfloat16).view(*scale.shape, 2)
    pair = torch.empty(*scale.shape, 2, dtype=torch.bfloat16, device=scale.device)
    torch.mul(scale, term.factor, out=pair[..., 0])
    if zero is None:
        torch.mul(scale, term.constant, out=pair[..., 1])
        return pair
    exact = zero.to(torch.float32).neg_().mul_(scale.to(torch.float32))
    if n > 0:
        exact.sub_(exact.to(torch.bfloat16).to(torch.float32))
        exact.add_((scale * term.constant).to(torch.float32))
    pair[..., 1].copy_(exact)
    return pair
