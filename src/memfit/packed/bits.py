"""Integers of 2 to 8 bits in memory: as files hold them, and as planes that unpack fast.

N rows, K inputs (a multiple of 32 wherever rows are packed), b bits, p the width of a plane.
Values are q in [−2^(b−1), 2^(b−1) − 1]; what is stored is u = q + 2^(b−1).
"""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .fake import blocks_to_run

PLANES: Final[dict[int, tuple[int, ...]]] = {
    8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,),
}  # fmt: skip
"""Widths of the planes of each b, the most significant bits first; widths that divide a byte unpack fast."""

_WIDEST: Final = {2: torch.int16, 4: torch.int32}
"""By b, what holds all b bytes of eight values at once: such bytes are copied fastest."""
_TOGETHER: Final = 1 << 14
"""Words of eight values that close up at once: half of a second-level cache holds what that takes."""


def pack_values(q: Tensor, bits: int) -> Tensor:
    """int8 q [..., K] → int32 words [..., ⌈K·b/32⌉], dense across words, least significant bits first.

    The layout of compressed-tensors' `pack-quantized` (compressors/pack_quantized/helpers.py,
    `pack_to_int32`). Eight values fill b bytes exactly, so they close up in words of 64 bits. K is padded to whole
    words of 32 values.
    """
    *lead, inputs = q.shape
    u = q.view(torch.uint8) + (1 << (bits - 1))  # wraps, as it should for 8 bits
    if inputs % 32:
        u = F.pad(u, (0, 32 - inputs % 32))
    if bits < 8:
        eights = u.view(-1).view(torch.int64)  # flat: a dimension of one entry may have any stride
        for start in blocks_to_run(range(0, eights.shape[0], _TOGETHER)):
            _close_up(eights[start : start + _TOGETHER], bits)
        widest = _WIDEST.get(bits, torch.uint8)
        u = eights.view(widest).view(-1, 8 // widest.itemsize)[:, : bits // widest.itemsize].contiguous()
    words = u.view(-1).view(torch.int32).view(*lead, -1)
    needed = math.ceil(inputs * bits / 32)
    return words if words.shape[-1] == needed else words[..., :needed].contiguous()


def _close_up(eights: Tensor, bits: int) -> None:
    """Let the values of eight bytes, b bits of each, follow each other, in place: in pairs, in fours, all."""
    for double in range(3):
        lane, held = 8 << double, bits << double
        lower = sum(((1 << held) - 1) << at for at in range(0, 64, 2 * lane))
        upper = (eights & (lower << lane)).bitwise_right_shift_(lane - held)
        eights.bitwise_and_(lower).bitwise_or_(upper)


def unpack_values(words: Tensor, bits: int, inputs: int) -> Tensor:
    """int32 words [..., ⌈K·b/32⌉] → int8 q [..., K]; the inverse of `pack_values`. `inputs` is K."""
    u = unpack_unsigned(words, bits, inputs)
    return u.sub_(1 << (bits - 1)).view(torch.int8)


def unpack_unsigned(words: Tensor, bits: int, inputs: int) -> Tensor:
    """int32 words [..., ⌈K·b/32⌉] → uint8 u = q + 2^(b−1) [..., K]; transients of K/4 bytes a row."""
    if words.shape[-1] * 32 < inputs * bits:
        raise ValueError(f"{words.shape[-1]} words hold fewer than {inputs} values of {bits} bits")
    if (short := -words.shape[-1] % bits) != 0:
        words = F.pad(words, (0, short))
    octets = words.contiguous().view(torch.uint8)
    octets = octets.view(*octets.shape[:-1], -1, bits)
    u = torch.empty(*octets.shape[:-1], 8, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        part = octets[..., byte] >> offset
        if offset + bits > 8:
            part.bitwise_or_(octets[..., byte + 1] << (8 - offset))
        torch.bitwise_and(part, mask, out=u[..., i])
    u = u.view(*u.shape[:-2], -1)
    return u if u.shape[-1] == inputs else u[..., :inputs].contiguous()


def pack_zeros(zero: Tensor, bits: int) -> Tensor:
    """int8 zero points [N, G] → int32 [⌈N·b/32⌉, G]: packed along the rows, as files hold them."""
    return pack_values(zero.t().contiguous(), bits).t().contiguous()


def unpack_zeros(words: Tensor, bits: int, rows: int) -> Tensor:
    """int32 [⌈N·b/32⌉, G] → int8 zero points [N, G]; the inverse of `pack_zeros`. `rows` is N."""
    return unpack_values(words.t().contiguous(), bits, rows).t().contiguous()


def split_planes(u: Tensor, widths: tuple[int, ...]) -> list[Tensor]:
    """uint8 u [N, K] → one uint8 plane [N, K·p/8] for each width p.

    A plane is planar: its row's byte j holds, from the low bits up, the p bits of inputs j, j + K·p/8, j +
    2·K·p/8, ...
    """
    planes, below = [], sum(widths)
    for width in widths:
        below -= width
        part = (u >> below).bitwise_and_((1 << width) - 1)
        length = u.shape[-1] * width // 8
        plane = part[..., :length].contiguous()
        for i in range(1, 8 // width):
            plane.bitwise_or_(part[..., i * length : (i + 1) * length] << (i * width))
        planes.append(plane)
    return planes


def join_planes(planes: list[Tensor], widths: tuple[int, ...]) -> Tensor:
    """The planes of `split_planes` → uint8 u [N, K]. One transient of the widest segment."""
    inputs = planes[0].shape[-1] * 8 // widths[0]
    u = torch.empty(*planes[0].shape[:-1], inputs, dtype=torch.uint8, device=planes[0].device)
    below = sum(widths)
    for first, (plane, width) in enumerate(zip(planes, widths, strict=True)):
        below -= width
        if width == 8:
            u.copy_(plane)
            continue
        length, mask = plane.shape[-1], ((1 << width) - 1) << below
        for i in range(8 // width):
            segment, shift = u[..., i * length : (i + 1) * length], i * width - below
            out = segment if first == 0 else torch.empty_like(plane)
            if shift > 0:
                torch.bitwise_right_shift(plane, shift, out=out)
            elif shift < 0:
                torch.bitwise_left_shift(plane, -shift, out=out)
            else:
                out.copy_(plane)
            if below or i < 8 // width - 1:  # the last segment of the lowest plane has no neighbours to mask
                out.bitwise_and_(mask)
            if first:
                segment.bitwise_or_(out)
    return u
