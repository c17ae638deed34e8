"""A pruned weight [N, K] as it is stored, and its products: rows are made dense a few at a time, and dropped.

N outputs, K inputs, k values kept in a row, G = K/4 groups of four, M rows of activations.

Rows are made dense plane by plane: of "any" first all inputs in the lowest bits of the mask's bytes (0, 8, 16, ...),
then those in the next, of "2:4" the first of each four, then the second. Each plane is a few operations on whole
vectors, and x is put into that order instead of the weight. "any" must look the place of each value up, and is bound by
that: 1.3 ns a weight where a dense product with one row takes 0.12, and 2:4 some 0.5. Of "blocks" a row's values
are one run: for few rows of activations x is gathered, and nothing is made dense.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from memfit.errors import BrokenInput
from memfit.packed.blocks import Read, blocks_of
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.forms import BLOCK, Sparse
from memfit.packed.gradient import product
from memfit.packed.parts import Parts

WORKSPACE_NBYTES: Final = 4 << 20
"""Most bytes made at a time of a weight's rows, or of x gathered for them, but never less than a row takes."""
_GATHER: Final = 0x0102040810204080
"""Sum of 2^(56 − 7i), i from 0 to 7."""
FEW_ROWS: Final = 32
"""Up to so many rows of activations are gathered for blocks that are kept; for more, the weight is made dense."""
_NBYTES: Final[dict[str, int]] = {"any": 5, "2:4": 5, "blocks": 3}
"""Bytes made of each weight of a row as it is made dense in bf16, about."""
_PLANES: Final[dict[str, int]] = {"any": 8, "2:4": 4, "blocks": 1}
"""Inputs that lie side by side and go to planes of their own."""


class SparseWeight(Parts):
    """A weight of which some values are kept. Buffers: `kept` and `mask`, of blocks `kept` and `index`."""

    kernel: Final = "sparse"
    kept: Tensor
    mask: Tensor
    index: Tensor

    def __init__(self, shape: tuple[int, int], scheme: Sparse, *, device: str | torch.device = "meta") -> None:
        super().__init__(shape, scheme, device=device)
        self.scheme = scheme

    def load_from(self, read: Read, prefix: str, *, device: str | torch.device = "cpu") -> None:
        """Fill from the parts below `prefix`; see `Parts.load_from`.

        Raises:
            BrokenInput: also if what tells the places of the values is no such pattern.
        """
        super().load_from(read, prefix, device=device)
        part, rows = ("index", BLOCK[0]) if self.scheme.pattern == "blocks" else ("mask", 1)
        for start, stop in blocks_to_run(self._blocks(self.shape[0])):
            wrong = self._wrong(start // rows, stop // rows)
            if not is_fake(wrong) and bool(wrong.any()):
                first = start // rows + int(wrong.to(torch.uint8).argmax())
                form = self.scheme.name
                raise BrokenInput(f"{prefix}.weight_{part}: row {first} does not tell places as {form} does")
            del wrong

    def _wrong(self, start: int, stop: int) -> Tensor:
        """Of rows (of blocks: bands) start to stop: whether the places of values are not those of the pattern."""
        if self.scheme.pattern == "blocks":
            index = self.index[start:stop]
            wrong = (index < 0).logical_or_(index >= self.shape[1] // BLOCK[1])
            wrong[:, 1:].logical_or_(index[:, 1:] <= index[:, :-1])
            return wrong.any(1)
        mask = self.mask[start:stop]
        if self.scheme.pattern == "2:4":
            return _count_bits(mask & 15).ne(2).logical_or_(_count_bits(mask >> 4).ne(2)).any(1)
        return _count_bits(mask).sum(1).ne(self.kept.shape[1])

    def matmul(self, x: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """x [..., K] times rows start to stop, transposed: [..., stop − start], in the dtype of x.

        Of blocks, start and stop lie on their borders.
        """
        stop = self.shape[0] if stop is None else stop
        y = product(self, x.reshape(-1, self.shape[1]), start, stop)
        # A view of the product could not be changed in place without a copy of its gradient in the backward pass.
        return y if x.dim() == 2 else y.view(*x.shape[:-1], stop - start)

    def product(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x [M, K] times rows start to stop, transposed: [M, stop − start]."""
        if self.scheme.pattern == "blocks" and x.shape[0] <= FEW_ROWS and x.dtype == self.kept.dtype:
            return self._times_gathered(x, start, stop)
        blocks = blocks_to_run(self._blocks(stop - start, dtype=x.dtype))
        x = self._in_order(x)
        if len(blocks) == 1:
            return F.linear(x, self._dense(start, stop, x.dtype))
        out = x.new_empty(x.shape[0], stop - start)
        for low, high in blocks:
            out[:, low:high].copy_(F.linear(x, self._dense(start + low, start + high, x.dtype)))
        return out

    def product_back(self, g: Tensor, start: int, stop: int) -> Tensor:
        """The gradient of `product`'s x: g [M, stop − start] times rows start to stop, [M, K]; summed in fp32."""
        blocks = blocks_to_run(self._blocks(stop - start, dtype=g.dtype))
        if len(blocks) == 1:
            return self._as_it_was(g @ self._dense(start, stop, g.dtype))
        out = torch.zeros(g.shape[0], self.shape[1], dtype=torch.float32, device=g.device)
        for low, high in blocks:
            out.add_(g[:, low:high] @ self._dense(start + low, start + high, g.dtype))
        return self._as_it_was(out.to(g.dtype))

    def dense_rows(self, start: int, stop: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows start to stop, dense [stop − start, K]; both on the border of blocks, where it is made of these."""
        return self._as_it_was(self._dense(start, stop, dtype))

    def rows(self, index: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The rows in `index` [...], dense: [..., K]. Only they are unpacked."""
        flat = index.reshape(-1)
        kept = self.kept.index_select(0, flat)
        if self.scheme.pattern == "blocks":
            band = torch.div(flat, BLOCK[0], rounding_mode="floor")
            dense = _of_blocks(kept, self.index.index_select(0, band), self.shape[1], 1)
        else:
            made = _of_groups if self.scheme.pattern == "2:4" else _of_mask
            dense = self._as_it_was(made(kept, self.mask.index_select(0, flat)))
        return dense.to(dtype).view(*index.shape, self.shape[1])

    def _dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start to stop [stop − start, K], inputs as `_in_order` has them."""
        kept = self.kept[start:stop]
        if self.scheme.pattern == "blocks":
            dense = _of_blocks(kept, self.index[start // BLOCK[0] : stop // BLOCK[0]], self.shape[1], BLOCK[0])
        elif self.scheme.pattern == "2:4":
            dense = _of_groups(kept, self.mask[start:stop])
        else:
            dense = _of_mask(kept, self.mask[start:stop])
        return dense.to(dtype)

    def _in_order(self, x: Tensor) -> Tensor:
        """x [M, K] with its inputs in the order that `_dense` has them in."""
        planes = _PLANES[self.scheme.pattern]
        return x if planes == 1 else x.reshape(x.shape[0], -1, planes).transpose(1, 2).reshape(x.shape)

    def _as_it_was(self, x: Tensor) -> Tensor:
        """The inverse of `_in_order`."""
        planes = _PLANES[self.scheme.pattern]
        return x if planes == 1 else x.view(x.shape[0], planes, -1).transpose(1, 2).reshape(x.shape)

    def _times_gathered(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Few rows [M, K] in bf16 times the blocks that are kept, x gathered for each band: [M, stop − start]."""
        height, width = BLOCK
        count, tokens, bands = self.kept.shape[1], x.shape[0], (stop - start) // height
        blocks = blocks_to_run(blocks_of(bands, WORKSPACE_NBYTES // (2 * tokens * max(count, 1)), 1))
        by_block = x.view(tokens, -1, width)
        out = x.new_empty(tokens, bands, height)
        for low, high in blocks:
            first = start // height + low
            index = self.index[first : first + high - low].reshape(-1).to(torch.int32)
            gathered = by_block.index_select(1, index).view(tokens, high - low, count).transpose(0, 1)
            weight = self.kept[start + low * height : start + high * height].view(-1, height, count)
            out[:, low:high].copy_(torch.bmm(gathered, weight.transpose(1, 2)).transpose(0, 1))
            del index, gathered
        return out.view(tokens, stop - start)

    def _blocks(self, rows: int, *, dtype: torch.dtype = torch.bfloat16) -> list[tuple[int, int]]:
        pattern = self.scheme.pattern
        nbytes = _NBYTES[pattern] + (0 if dtype == torch.bfloat16 else dtype.itemsize)
        multiple = BLOCK[0] if pattern == "blocks" else 1
        return list(blocks_of(rows, WORKSPACE_NBYTES // (nbytes * self.shape[1]), multiple))


def pack(weight: Tensor, mask: Tensor, form: Sparse) -> dict[str, Tensor]:
    """The parts of rows [n, K] of which the weights in `mask` are kept, as `form.parts` says.

    Args:
        weight: in any float type; stored in bf16.
        mask: bool [n, K], of blocks [n/16, K/16]: as many in each row as the form keeps, and of 2:4 two of each four.
    """
    rows, inputs = weight.shape
    stored = weight.to(torch.bfloat16)
    if form.pattern == "blocks":
        bands, across = mask.shape
        width = inputs // across
        places = torch.arange(across, dtype=torch.int16, device=weight.device).expand(bands, across)
        index = _compacted(places, mask, form.kept(inputs))
        chosen = index.to(torch.int64).view(bands, 1, -1, 1).expand(bands, rows // bands, -1, width)
        by_block = stored.view(bands, rows // bands, across, width)
        return {"weight_kept": by_block.gather(2, chosen).view(rows, -1), "weight_index": index}
    kept = _compacted(stored, mask, form.kept(inputs))
    if form.pattern == "any":
        return {"weight_kept": kept, "weight_mask": pack_mask(mask)}
    apart = kept.view(rows, -1, 2).transpose(1, 2).reshape(rows, -1)
    groups = mask.view(rows, 2, -1, 4)  # those in the lower half of each byte, and those in the upper
    in_order = torch.cat([groups[:, 0], groups[:, 1]], dim=2)
    return {"weight_kept": apart, "weight_mask": pack_mask(in_order.view(rows, -1))}


def pack_mask(mask_NK: Tensor) -> Tensor:
    """bool [N, K] to uint8 [N, K/8], the first input in the lowest bit."""
    # Of the eight bytes of an integer, the i-th moves by 56 − 7i bits: their lowest bits are the upper byte then.
    octets = mask_NK.reshape(-1).view(torch.int64).mul(_GATHER)
    return octets.bitwise_right_shift_(56).to(torch.uint8).view(mask_NK.shape[0], -1)


def unpack_mask(mask: Tensor, inputs: int) -> Tensor:
    """uint8 [N, K/8] to bool [N, K]."""
    out = torch.empty(mask.shape[0], mask.shape[1], 8, dtype=torch.uint8, device=mask.device)
    for bit in range(8):
        torch.bitwise_and(mask >> bit, 1, out=out[:, :, bit])
    return out.view(torch.bool).view(mask.shape[0], inputs)


def _compacted(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """The `count` values of each row [n, K] that are in the mask, in their order: [n, count]."""
    # Those that are not go to a column in front.
    place = mask.cumsum(1).mul_(mask)
    out = values.new_empty(values.shape[0], count + 1)
    return out.scatter_(1, place, values)[:, 1:].contiguous()


def _of_mask(kept: Tensor, mask: Tensor) -> Tensor:
    """kept [n, k] at the places that mask [n, K/8] tells, 0 elsewhere: [n, K], bit by bit of the mask's bytes."""
    rows, count = kept.shape
    planes = torch.empty(rows, 8, mask.shape[1], dtype=torch.int16, device=kept.device)
    values = kept.new_zeros(1 + rows * count, dtype=torch.int16)  # one in front, as none may be kept before a place
    values[1:].view(rows, count).copy_(kept.view(torch.int16))
    set_ = _count_bits(mask)
    place = set_.cumsum(1, dtype=torch.int32).sub_(set_)  # of the last value before each byte, in `values`
    place.add_(torch.arange(rows, dtype=torch.int32, device=mask.device).mul_(count).unsqueeze(1))
    del set_
    for bit in range(8):
        here = (mask >> bit).bitwise_and_(1).to(torch.int16)
        place.add_(here)
        torch.mul(values.index_select(0, place.view(-1)).view(mask.shape), here, out=planes[:, bit])
    return planes.view(torch.bfloat16).view(rows, -1)


def _count_bits(mask: Tensor) -> Tensor:
    """How many bits of each byte are set, uint8."""
    pairs = mask - (mask >> 1).bitwise_and_(0x55)
    fours = (pairs >> 2).bitwise_and_(0x33).add_(pairs.bitwise_and_(0x33))
    return (fours >> 4).add_(fours).bitwise_and_(15)


def _of_groups(kept: Tensor, mask: Tensor) -> Tensor:
    """kept [n, 2 · G], first and second of each four, at the places that mask [n, G/2] tells: [n, 4 · G], by place."""
    rows, groups = kept.shape[0], kept.shape[1] // 2
    values = kept.view(torch.int16).view(rows, 2, groups)
    first, second = values[:, 0], values[:, 1]
    planes = torch.empty(rows, 4, groups, dtype=torch.int16, device=kept.device)

    def here(place: int, plane: Tensor) -> Tensor:
        """1 where a value is at this place of its four, else 0; held by `plane` until it has its values."""
        for half in (0, 1):
            plane[:, half * groups // 2 : (half + 1) * groups // 2].copy_((mask >> (place + 4 * half)).bitwise_and_(1))
        return plane

    # On whole numbers, which wrap: first + (second − first) is second, to the bit.
    more = second - first
    m0, m1, m2, m3 = (here(place, planes[:, place]) for place in range(4))
    m1.mul_((more * m0).add_(first))  # the second of its four if there is one at 0
    m2.mul_((more * m3).neg_().add_(second))  # the first if there is one at 3
    m0.mul_(first)
    m3.mul_(second)
    return planes.view(torch.bfloat16).view(rows, 4 * groups)


def _of_blocks(kept: Tensor, index: Tensor, inputs: int, height: int) -> Tensor:
    """kept [n, k · 16] at the places that index [n/height, k] tells, 0 elsewhere: [n, K]."""
    rows, width = kept.shape[0], BLOCK[1]
    across = inputs // width
    dense = kept.new_zeros(rows * across, width)
    first = torch.arange(0, rows * across, across, device=kept.device).view(-1, height, 1)
    place = index.to(torch.int64).unsqueeze(1) + first
    # By eight bytes at a time: they are copied one at a time.
    dense.view(torch.int64).index_copy_(0, place.view(-1), kept.reshape(-1, width).view(torch.int64))
    return dense.view(rows, inputs)
