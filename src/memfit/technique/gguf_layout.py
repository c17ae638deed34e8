"""GGML's blocks: what each kind can express, and how its bytes lie.

A block holds S sub-blocks of n weights. A weight is an integer q, scaled by what its sub-block has:

    symmetric    w = (d · k) · q                     d one a block in fp16, k one a sub-block
    affine       w = (d · k) · q − (dmin · m)        dmin one a block in fp16, m one a sub-block

Kinds without sub-blocks are cases of it with S = 1 and k = m = 1. All products are exact in float32, so one
subtraction rounds, and every reader of the format gets the same numbers.

Legend of shapes: B blocks, S sub-blocks of a block, n weights of a sub-block.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from memfit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of GGML's types, by the name that GGML gives it."""

    name: str
    bits: int
    """Of q."""
    parts: int
    """S."""
    width: int
    """n."""
    affine: bool
    low: int
    """The lowest q; of affine kinds 0."""
    high: int
    scales: tuple[int, int]
    """The lowest and highest k, and m. (1, 1) where there are no sub-blocks."""
    nbytes: int
    """Of a block."""

    @property
    def block(self) -> int:
        """Weights of a block."""
        return self.parts * self.width

    @property
    def flat(self) -> bool:
        """Whether there are no sub-blocks."""
        return self.scales == (1, 1)

    def row_nbytes(self, columns: int) -> int:
        """Bytes of one row."""
        return columns // self.block * self.nbytes


def _flat(name: str, bits: int, *, affine: bool = False, nbytes: int) -> Kind:
    half = 1 << bits - 1
    # GGML's own encoder leaves −128 out, and kernels may count on it.
    low = 0 if affine else -127 if bits == 8 else -half
    high = 2 * half - 1 if affine else half - 1
    return Kind(
        name=name, bits=bits, parts=1, width=32, affine=affine, low=low, high=high, scales=(1, 1), nbytes=nbytes
    )


def _super(name: str, bits: int, *, parts: int, scales: tuple[int, int], nbytes: int) -> Kind:
    affine, half = scales[0] == 0, 1 << bits - 1
    low, high = (0, 2 * half - 1) if affine else (-half, half - 1)
    return Kind(
        name=name, bits=bits, parts=parts, width=256 // parts, affine=affine, low=low, high=high, scales=scales,
        nbytes=nbytes,
    )  # fmt: skip


KINDS: Final[dict[str, Kind]] = {
    kind.name: kind
    for kind in (
        _super("Q2_K", 2, parts=16, scales=(0, 15), nbytes=84),
        _super("Q3_K", 3, parts=16, scales=(-32, 31), nbytes=110),
        _super("Q4_K", 4, parts=8, scales=(0, 63), nbytes=144),
        _super("Q5_K", 5, parts=8, scales=(0, 63), nbytes=176),
        _super("Q6_K", 6, parts=16, scales=(-128, 127), nbytes=210),
        _flat("Q4_0", 4, nbytes=18),
        _flat("Q4_1", 4, affine=True, nbytes=20),
        _flat("Q5_0", 5, nbytes=22),
        _flat("Q5_1", 5, affine=True, nbytes=24),
        _flat("Q8_0", 8, nbytes=34),
    )
}


def kind_of(name: str) -> Kind:
    """The kind of that name; UsageError if memfit writes none."""
    if name not in KINDS:
        raise UsageError(f"{name!r} is no type of blocks that memfit writes. Choose one of {', '.join(KINDS)}.")
    return KINDS[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fields:
    """The numbers of B blocks, before they are packed."""

    kind: Kind
    q: Tensor
    """int32 [B, S·n]."""
    k: Tensor
    """int32 [B, S]."""
    m: Tensor
    """int32 [B, S]; 0 in symmetric kinds."""
    d: Tensor
    """float16 [B]."""
    dmin: Tensor
    """float16 [B]; 0 in symmetric kinds."""

    def parts(self) -> tuple[Tensor, ...]:
        """All numbers: q, k, m, d, dmin."""
        return self.q, self.k, self.m, self.d, self.dmin

    def grid(self) -> tuple[Tensor, Tensor]:
        """(d · k, dmin · m) of each sub-block [B, S], float32: w = (d · k) q − (dmin · m)."""
        return self.d.float().unsqueeze(1) * self.k.float(), self.dmin.float().unsqueeze(1) * self.m.float()

    def values(self) -> Tensor:
        """The weights [B, S·n] that these numbers stand for, float32, as every reader of the format has them."""
        step, shift = self.grid()
        q = self.q.view(*self.k.shape, -1).float()
        weights = q * step.unsqueeze(2)
        if self.kind.affine:
            weights -= shift.unsqueeze(2)
        return weights.view(self.q.shape)

    def packed(self) -> Tensor:
        """The bytes of the blocks, uint8 [B, nbytes]."""
        return torch.cat(_PACKERS[self.kind.name](self), dim=1)


def empty_fields(kind: Kind, blocks: int, device: torch.device) -> Fields:
    """Room for the numbers of so many blocks."""

    def room(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    return Fields(
        kind=kind, q=room(blocks, kind.block), k=room(blocks, kind.parts), m=room(blocks, kind.parts),
        d=room(blocks, dtype=torch.float16), dmin=room(blocks, dtype=torch.float16),
    )  # fmt: skip


def _fold(q: Tensor, bits: int, width: int) -> Tensor:
    """Bytes that hold 8/bits numbers each: the l-th of `width` bytes has the numbers l, l + width, l + 2 width, …
    of its piece of 8/bits · width numbers, the first in its lowest bits.
    """
    count = 8 // bits
    pieces = q.reshape(q.shape[0], -1, count, width)
    out = pieces[:, :, 0].clone()
    for at in range(1, count):
        out |= pieces[:, :, at] << bits * at
    return out.to(torch.uint8).view(q.shape[0], -1)


def _bytes(half: Tensor) -> Tensor:
    """float16 [B] as uint8 [B, 2]."""
    return half.contiguous().view(torch.uint8).view(-1, 2)


def _q8_0(one: Fields) -> tuple[Tensor, ...]:
    return _bytes(one.d), one.q.to(torch.int8).view(torch.uint8)


def _q4_0(one: Fields) -> tuple[Tensor, ...]:
    return _bytes(one.d), _fold(one.q + 8, 4, 16)


def _q4_1(one: Fields) -> tuple[Tensor, ...]:
    return _bytes(one.d), _bytes(-one.dmin), _fold(one.q, 4, 16)


def _q5_0(one: Fields) -> tuple[Tensor, ...]:
    q = one.q + 16
    return _bytes(one.d), _fold(q >> 4, 1, 1), _fold(q & 15, 4, 16)


def _q5_1(one: Fields) -> tuple[Tensor, ...]:
    return _bytes(one.d), _bytes(-one.dmin), _fold(one.q >> 4, 1, 1), _fold(one.q & 15, 4, 16)


def _q2_k(one: Fields) -> tuple[Tensor, ...]:
    scales = (one.k | one.m << 4).to(torch.uint8)
    return scales, _fold(one.q, 2, 32), _bytes(one.d), _bytes(one.dmin)


def _q3_k(one: Fields) -> tuple[Tensor, ...]:
    q, k = one.q + 4, one.k + 32
    scales = torch.cat([_fold(k & 15, 4, 8), _fold(k >> 4, 2, 4)], dim=1)
    return _fold(q >> 2, 1, 32), _fold(q & 3, 2, 32), scales, _bytes(one.d)


def _scales_of_6_bits(one: Fields) -> Tensor:
    """Eight k and eight m in twelve bytes: the high two bits of the last four ride on the first four's bytes."""
    k, m = one.k, one.m
    first = k[:, :4] | k[:, 4:] >> 4 << 6
    second = m[:, :4] | m[:, 4:] >> 4 << 6
    third = k[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    return torch.cat([first, second, third], dim=1).to(torch.uint8)


def _q4_k(one: Fields) -> tuple[Tensor, ...]:
    return _bytes(one.d), _bytes(one.dmin), _scales_of_6_bits(one), _fold(one.q, 4, 32)


def _q5_k(one: Fields) -> tuple[Tensor, ...]:
    high, low = _fold(one.q >> 4, 1, 32), _fold(one.q & 15, 4, 32)
    return _bytes(one.d), _bytes(one.dmin), _scales_of_6_bits(one), high, low


def _q6_k(one: Fields) -> tuple[Tensor, ...]:
    q = one.q + 32
    scales = one.k.to(torch.int8).view(torch.uint8)
    return _fold(q & 15, 4, 64), _fold(q >> 4, 2, 32), scales, _bytes(one.d)


_PACKERS: Final = {
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
}  # fmt: skip
