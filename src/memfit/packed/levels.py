"""What codes stand for, integers and others: the levels of NF4, E2M1 and E4M3, and of codebooks.

Codes are u in [0, 2^b); tensors of values hold q = u − 2^(b−1), int8, as for integers, so that both are packed alike.

    ŵ = bf16(level[u] · s)          levels and s are bf16 numbers; s is a power of two for MXFP4

A level of a codebook may be a vector of v weights that lie beside each other: their u, each of b bits, are the digits
of its place, the first the lowest. So codes are packed as those of single weights are.

N rows, K inputs, G groups of a row.
"""

from typing import Final

import torch
from torch import Tensor

from memfit.packed.bits import pack_values, pack_zeros
from memfit.packed.fake import is_fake
from memfit.packed.forms import FORM_PARTS, Form, LowRank, Narrow
from memfit.packed.scheme import Scheme

NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution (QLoRA, Dettmers et al. 2023, appendix E); used rounded to bf16."""
E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""FP4 by its three low bits; the fourth is the sign (OCP Microscaling Formats 1.0, table 3)."""
_WHOLE: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What so many bytes are one number of."""
NO_EXPONENT: Final = 255
"""E8M0's NaN; any other byte e is 2^(e − 127)."""


def level_table(scheme: Scheme) -> Tensor:
    """bf16 [2^b]: what each code of a format stands for. Two codes of E4M3 are NaN.

    Raises:
        ValueError: integers have no levels, and a codebook's are its own.
    """
    if scheme.values == "nf4":
        return torch.tensor(NF4, dtype=torch.bfloat16)
    if scheme.values == "mxfp4":
        return torch.tensor((*E2M1, *(-level for level in E2M1)), dtype=torch.bfloat16)
    if scheme.values == "fp8":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.bfloat16)
    raise ValueError(f"{scheme.name} has no levels of its own")


def scale_values(scale: Tensor) -> Tensor:
    """Scales as bf16 numbers: as they are, or 2^(e − 127) of E8M0's bytes e."""
    if scale.dtype != torch.uint8:
        return scale
    # e is the exponent's field of a bf16 number; 2^-127 alone is subnormal there.
    return (scale.to(torch.int16) << 7).clamp_(min=0x40).view(torch.bfloat16)


def exponents(scale: Tensor) -> Tensor:
    """E8M0's bytes of scales that are powers of two, 2^-126 to 2^127, in any float type."""
    return (scale.to(torch.bfloat16).view(torch.int16) >> 7).to(torch.uint8)


def look_up(u: Tensor, scale: Tensor, table: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """ŵ [n, k] in `dtype` of codes uint8 [n, k], contiguous; scale [n, c], table bf16 [2^b], of vectors [2^(b·v), v].

    Makes 4 bytes a code on the way.
    """
    place = places(u, table).view(-1).to(torch.int32)
    levels = table.to(dtype)
    if table.dim() > 1 and (whole := _WHOLE.get(levels.element_size() * table.shape[1])) is not None:
        # A vector as one number: taken by rows it takes ten times as long.
        dense = levels.view(whole).view(-1).index_select(0, place).view(dtype).view(u.shape)
    else:
        dense = levels.index_select(0, place if table.dim() == 1 else place.to(torch.int64)).view(u.shape)
    dense.view(u.shape[0], scale.shape[1], -1).mul_(scale_values(scale).to(dtype)[..., None])
    return dense


def places(u: Tensor, table: Tensor) -> Tensor:
    """The place of each level, [n, k/v], of codes uint8 [n, k], contiguous."""
    if table.dim() == 1:
        return u
    count, vector = table.shape
    bits = (count.bit_length() - 1) // vector
    # The bytes of a vector are one word. Multiplied, each code comes to its own bits of the highest byte; what is above
    # falls off, and nothing else comes there.
    top = 8 * (vector - 1)
    moves = sum(1 << top - (8 - bits) * at for at in range(vector))
    return u.view(_WHOLE[vector]).mul(moves).bitwise_right_shift_(top).bitwise_and_(count - 1)


def digits(place: Tensor, bits: int, vector: int) -> Tensor:
    """The codes uint8 [n, k] of places [n, k/v], of any integers."""
    mask = (1 << bits) - 1
    parts = [place.bitwise_right_shift(at * bits).bitwise_and_(mask) for at in range(vector)]
    return torch.stack(parts, dim=-1).to(torch.uint8).view(*place.shape[:-1], -1)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(q − z) · s, in `dtype`, as compressed-tensors' `_dequantize`. q [n, k], scale and zero [n, c]."""
    dense = torch.empty(q.shape, dtype=dtype, device=q.device)
    dense.copy_(q)  # every integer of at most 8 bits, and every difference of two, is exact in bf16
    by_group = dense.view(q.shape[0], scale.shape[1], q.shape[1] // scale.shape[1])
    if zero is not None:
        by_group.sub_(zero.to(dtype)[..., None])
    by_group.mul_(scale.to(dtype)[..., None])
    return dense


def expand(q: Tensor, scheme: Scheme, scale: Tensor, table: Tensor | None) -> Tensor:
    """ŵ bf16 [n, K] of q int8 [n, K] as `Quantized` holds them."""
    u = q.contiguous().view(torch.uint8) + (1 << (scheme.bits - 1))
    return look_up(u, scale, level_table(scheme) if table is None else table)


# -- as files hold them ------------------------------------------------------------------------------------


def words_of(stored: Tensor, scheme: Scheme) -> Tensor:
    """int32 words [n, K·b/32] of a weight's rows, whichever way a file holds their codes.

    int32: these words. uint8: two codes a byte, which is the same layout. float8 [n, K]: E4M3 itself, or the levels of
    E2M1. int8 [n, K]: one integer a value.

    Raises:
        ValueError: a float8 that is none of E2M1's levels.
    """
    if stored.dtype == torch.int32:
        return stored
    if stored.dtype == torch.uint8 or (stored.dtype == torch.float8_e4m3fn and scheme.values == "fp8"):
        return stored.view(torch.int32)
    if stored.dtype == torch.float8_e4m3fn:
        code_of = torch.full((256,), 16, dtype=torch.uint8)
        code_of[level_table(scheme).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int64)] = torch.arange(
            16, dtype=torch.uint8
        )
        u = code_of.index_select(0, stored.view(torch.uint8).view(-1).to(torch.int32))
        if _tells(u.amax() > 15):
            raise ValueError("a value is none of E2M1's levels")
        return pack_values(u.view(stored.shape).sub_(8).view(torch.int8), scheme.bits)
    return pack_values(stored, scheme.bits)


def part_of(part: str, stored: Tensor, scheme: Form) -> Tensor:
    """A stored part of a packed weight as `PackedWeight.load_from` takes it: `weight_packed` as `words_of`, MXFP4's
    `weight_scale` as E8M0's bytes, zero points packed along the rows.

    Raises:
        ValueError: what MXFP4 has no code for.
    """
    if isinstance(scheme, LowRank | Narrow) and scheme.base is not None and part not in FORM_PARTS:
        scheme = scheme.base
    if not isinstance(scheme, Scheme):
        return stored
    if part == "weight_packed":
        return words_of(stored, scheme)
    if part == "weight_zero_point" and stored.dtype == torch.int8:
        return pack_zeros(stored, scheme.bits)
    if part != "weight_scale" or scheme.values != "mxfp4":
        return stored
    scale = stored if stored.dtype == torch.uint8 else exponents(stored)
    if _tells(scale.amax() == NO_EXPONENT):
        raise ValueError("a scale is E8M0's NaN")
    if scale is not stored and _tells((scale_values(scale) != stored).any()):
        raise ValueError("a scale is no power of two")
    return scale


def _tells(condition: Tensor) -> bool:
    """Whether it holds; not of fakes, which take the bytes that finding out takes."""
    return not is_fake(condition) and bool(condition)
