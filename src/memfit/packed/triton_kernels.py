"""CUDA kernels of packed weights, in Triton: a weight's planes are read once, and unpacked where they are used.

N rows of the weight, K inputs, M rows of activations, G groups, E = K/8 bytes of a plane of one bit. Input k = s·E + j
of segment s (0 to 7) lies in byte (s mod p)·E + j of a plane of p bits, from bit p·(s div p) on (`bits.split_planes`).

A program has some rows of the weight, and some bytes j at a time; if `EVEN`, their inputs in a segment have one scale.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_BY_ONE: Final = 4
"""Up to so many rows of activations each is multiplied on its own; more go to the tensor cores together."""
_SPANS: Final = (128, 64, 32)
_SPAN: Final = 64
"""Bytes j at a time; of inputs that have different scales."""


@triton.jit  # type: ignore[untyped-decorator]
def _bits(plane, n, j, mask, E, s: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The P bits of inputs s·E + j of rows n."""
    place = plane + n[:, None] * (E * P) + ((s % P) * E + j)[None, :]
    byte = tl.load(place) if EVEN else tl.load(place, mask=mask, other=0)
    return (byte.to(tl.int32) >> (P * (s // P))) & ((1 << P) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _codes(  # type: ignore[no-untyped-def]
    plane0, plane1, plane2, n, j, mask, E, s: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The codes of inputs s·E + j of rows n."""
    code = _bits(plane0, n, j, mask, E, s, P0, EVEN) << (P1 + P2)
    if P1:
        code |= _bits(plane1, n, j, mask, E, s, P1, EVEN) << P2
    if P2:
        code |= _bits(plane2, n, j, mask, E, s, P2, EVEN)
    return code


@triton.jit  # type: ignore[untyped-decorator]
def _weights(  # type: ignore[no-untyped-def]
    code, scale, zero, table, n, start, j, mask, E, G, group, s: tl.constexpr, BITS: tl.constexpr,
    ZERO: tl.constexpr, TABLE: tl.constexpr, EXPONENTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Of rows n, inputs s·E + j, in fp32: what the codes stand for, and the scales, a column of them if `EVEN`."""
    first = n * G
    if EVEN:  # noqa: SIM108
        place = (first + (s * E + start) // group)[:, None]
    else:
        place = first[:, None] + ((s * E + j) // group)[None, :]
    found = tl.load(scale + place) if EVEN else tl.load(scale + place, mask=mask, other=0)
    if EXPONENTS:
        # E8M0: the byte is the exponent's field of a float; 2^-127 alone is subnormal there.
        field = found.to(tl.int32)
        factor = tl.where(field == 0, 0x00400000, field << 23).to(tl.float32, bitcast=True)
    else:
        factor = found.to(tl.float32)
    if TABLE:
        value = tl.load(table + code).to(tl.float32)
    else:
        # A code in the last bits of 2^23 is 2^23 + code: no conversion, which takes eight times as long.
        below = 8388608.0 + (1 << (BITS - 1))
        if ZERO:
            z = tl.load(zero + place) if EVEN else tl.load(zero + place, mask=mask, other=0)
            value = (code | 0x4B000000).to(tl.float32, bitcast=True) - (below + z.to(tl.float32))
        else:
            value = (code | 0x4B000000).to(tl.float32, bitcast=True) - below
    return value, factor


@triton.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    sums, code, x, scale, zero, table, n, start, j, mask, M, E, G, group, s: tl.constexpr, BITS: tl.constexpr,
    ZERO: tl.constexpr, TABLE: tl.constexpr, EXPONENTS: tl.constexpr, EVEN: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Add the products of inputs s·E + j of one row of activations, or of up to 16 (`MANY`)."""
    value, factor = _weights(
        code, scale, zero, table, n, start, j, mask, E, G, group, s, BITS, ZERO, TABLE, EXPONENTS, EVEN
    )
    if MANY:
        m = tl.arange(0, 16)
        given = (j < E)[:, None] & (m < M)[None, :]
        x_KM = tl.load(x + m[None, :] * (8 * E) + (s * E + j)[:, None], mask=given, other=0.0)
        if EVEN:
            sums += tl.dot(value.to(tl.bfloat16), x_KM) * factor
        else:
            sums = tl.dot((value * factor).to(tl.bfloat16), x_KM, sums)
    else:
        x_K = tl.load(x + s * E + j) if EVEN else tl.load(x + s * E + j, mask=j < E, other=0.0)
        sums += (value * x_K.to(tl.float32)[None, :]) * factor
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x, y, plane0, plane1, plane2, scale, zero, table, M, N, E, G, group,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr,
    EXPONENTS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] · ŵᵀ: a program for `ROWS` of the weight and a row of x, or all of up to 16 (`MANY`)."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.minimum(rows, N - 1)
    x += tl.program_id(0) * (8 * E)
    sums = tl.zeros((ROWS, 16 if MANY else SPAN), tl.float32)
    for start in range(0, E, SPAN):
        j = start + tl.arange(0, SPAN)
        mask = (j < E)[None, :]
        for s in tl.static_range(8):
            code = _codes(plane0, plane1, plane2, n, j, mask, E, s, P0, P1, P2, EVEN)
            sums = _add(
                sums, code, x, scale, zero, table, n, start, j, mask, M, E, G, group, s, P0 + P1 + P2, ZERO, TABLE,
                EXPONENTS, EVEN, MANY,
            )  # fmt: skip
    if MANY:
        m = tl.arange(0, 16)
        kept = (rows < N)[:, None] & (m < M)[None, :]
        tl.store(y + m[None, :] * N + rows[:, None], sums.to(tl.bfloat16), mask=kept)
    else:
        tl.store(y + tl.program_id(0) * N + rows, tl.sum(sums, 1).to(tl.bfloat16), mask=rows < N)


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(  # type: ignore[no-untyped-def]
    out, plane0, plane1, plane2, scale, zero, table, N, E, G, group,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr,
    EXPONENTS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """ŵ bf16 [N, K], rounded as `levels.dequantize` and `levels.look_up` round it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.minimum(rows, N - 1)
    start = tl.program_id(1) * SPAN
    j = start + tl.arange(0, SPAN)
    mask = (j < E)[None, :]
    kept = (rows < N)[:, None] & mask
    for s in tl.static_range(8):
        code = _codes(plane0, plane1, plane2, n, j, mask, E, s, P0, P1, P2, EVEN)
        value, factor = _weights(
            code, scale, zero, table, n, start, j, mask, E, G, group, s, P0 + P1 + P2, ZERO, TABLE, EXPONENTS, EVEN
        )
        place = rows.to(tl.int64)[:, None] * (8 * E) + (s * E + j)[None, :]
        tl.store(out + place, (value * factor).to(tl.bfloat16), mask=kept)


def product(
    x: Tensor, planes: list[Tensor], widths: tuple[int, ...], scale: Tensor, zero: Tensor | None, table: Tensor | None
) -> Tensor:
    """bf16 x [M, K], M ≤ 16, times a weight of N rows, transposed: bf16 [M, N].

    Args:
        planes: uint8 [N, K·p/8] of each width p, contiguous.
        widths: bits of each plane.
        scale: bf16 or, of MXFP4, uint8 [N, G].
        zero: int8 [N, G].
        table: bf16 [2^b], what the codes stand for if not integers.
    """
    count, rows = x.shape[0], planes[0].shape[0]
    y = x.new_empty(count, rows)
    given, constants = _arguments(planes, widths, scale, zero, table, x.shape[1])
    many = count > ONE_BY_ONE
    # Few rows a program where there are few, so that every multiprocessor has some.
    tall = (32 if rows >= 8192 else 16) if many else 16 if rows >= 8192 else 8 if rows >= 2048 else 4
    grid = (1 if many else count, triton.cdiv(rows, tall))
    _product[grid](x, y, *given[:6], count, *given[6:], **constants, ROWS=tall, MANY=many)
    return y


def unpack(
    planes: list[Tensor], widths: tuple[int, ...], scale: Tensor, zero: Tensor | None, table: Tensor | None
) -> Tensor:
    """The weight itself, bf16 [N, K]. Arguments: see `product`."""
    rows, inputs = planes[0].shape[0], planes[0].shape[1] * 8 // widths[0]
    out = torch.empty(rows, inputs, dtype=torch.bfloat16, device=scale.device)
    given, constants = _arguments(planes, widths, scale, zero, table, inputs)
    grid = (triton.cdiv(rows, 16), triton.cdiv(inputs // 8, constants["SPAN"]))
    _unpack[grid](out, *given, **constants, ROWS=16)
    return out


def _arguments(
    planes: list[Tensor], widths: tuple[int, ...], scale: Tensor, zero: Tensor | None, table: Tensor | None, inputs: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernels are given: tensors and sizes, and constants. What is missing is a tensor that is not read."""
    given, bits = [*planes, *[planes[0]] * (3 - len(planes))], (*widths, 0, 0)
    none, octet, groups = planes[0], inputs // 8, scale.shape[1]
    group = inputs // groups
    span = next((n for n in _SPANS if octet % n == 0 and (groups == 1 or group % n == 0)), None)
    tensors = (*given, scale, none if zero is None else zero, none if table is None else table)
    constants = {
        "P0": bits[0], "P1": bits[1], "P2": bits[2], "ZERO": zero is not None, "TABLE": table is not None,
        "EXPONENTS": scale.dtype == torch.uint8, "EVEN": span is not None, "SPAN": span or _SPAN,
    }  # fmt: skip
    return (*tensors, planes[0].shape[0], octet, groups, group), constants
