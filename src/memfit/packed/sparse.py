"""A pruned weight [N, K] as it is stored, and its products: rows are made dense a few at a time, and dropped.

N outputs, K inputs, k values kept in a row, M rows of activations.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from memfit.packed.blocks import blocks_of
from memfit.packed.fake import blocks_to_run
from memfit.packed.forms import BLOCK, Sparse
from memfit.packed.gradient import product
from memfit.packed.parts import Parts

WORKSPACE_NBYTES: Final = 4 << 20
"""The largest dense block of a weight that is ever made."""
_NBYTES: Final = 4
"""Bytes made of each weight as it is unpacked: a bit in a byte twice, and the weight in bf16."""


class SparseWeight(Parts):
    """A weight of which some values are kept. Buffers: `kept` and `mask`, of blocks `kept` and `index`."""

    kernel: Final = "sparse"
    kept: Tensor
    mask: Tensor
    index: Tensor

    def __init__(self, shape: tuple[int, int], scheme: Sparse, *, device: str | torch.device = "meta") -> None:
        super().__init__(shape, scheme, device=device)
        self.scheme = scheme

    def matmul(self, x: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """x [..., K] times rows start to stop, transposed: [..., stop − start], in the dtype of x."""
        stop = self.shape[0] if stop is None else stop
        flat = x.reshape(-1, self.shape[1])
        return product(self, flat, start, stop).view(*x.shape[:-1], stop - start)

    def product(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x [M, K] times rows start to stop, transposed: [M, stop − start]."""
        blocks = blocks_to_run(self._blocks(stop - start))
        if len(blocks) == 1:
            return F.linear(x, self.dense_rows(start, stop, dtype=x.dtype))
        out = x.new_empty(x.shape[0], stop - start)
        for low, high in blocks:
            out[:, low:high].copy_(F.linear(x, self.dense_rows(start + low, start + high, dtype=x.dtype)))
        return out

    def product_back(self, g: Tensor, start: int, stop: int) -> Tensor:
        """The gradient of `product`'s x: g [M, stop − start] times rows start to stop, [M, K]; summed in fp32."""
        out = torch.zeros(g.shape[0], self.shape[1], dtype=torch.float32, device=g.device)
        for low, high in blocks_to_run(self._blocks(stop - start)):
            out.add_(g[:, low:high] @ self.dense_rows(start + low, start + high, dtype=g.dtype))
        return out.to(g.dtype)

    def dense_rows(self, start: int, stop: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows start to stop, dense [stop − start, K]; both on the border of blocks, where it is made of these."""
        if self.scheme.pattern == "blocks":
            bands = slice(start // BLOCK[0], stop // BLOCK[0])
            return _of_blocks(self.kept[bands], self.index[bands], self.shape[1]).to(dtype)
        return _of_mask(self.kept[start:stop], self.mask[start:stop], self.shape[1]).to(dtype)

    def rows(self, index: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The rows in `index` [...], dense: [..., K]. Only they (of blocks: their bands) are unpacked."""
        flat = index.reshape(-1)
        if self.scheme.pattern == "blocks":
            band, inside = torch.div(flat, BLOCK[0], rounding_mode="floor"), flat % BLOCK[0]
            kept = self.kept[band].gather(2, inside.view(-1, 1, 1, 1).expand(-1, self.kept.shape[1], 1, BLOCK[1]))
            dense = _of_blocks(kept, self.index[band], self.shape[1])
        else:
            dense = _of_mask(self.kept[flat], self.mask[flat], self.shape[1])
        return dense.to(dtype).view(*index.shape, self.shape[1])

    def _blocks(self, rows: int) -> list[tuple[int, int]]:
        multiple = BLOCK[0] if self.scheme.pattern == "blocks" else 1
        return list(blocks_of(rows, WORKSPACE_NBYTES // (_NBYTES * self.shape[1]), multiple))


def pack_mask(mask_NK: Tensor) -> Tensor:
    """bool [N, K] to uint8 [N, K/8], the first input in the lowest bit."""
    bits = mask_NK.view(mask_NK.shape[0], -1, 8).to(torch.uint8)
    return bits.mul_(_bit_values(mask_NK.device)).sum(dim=2, dtype=torch.uint8)


def unpack_mask(mask: Tensor, inputs: int) -> Tensor:
    """uint8 [N, K/8] to bool [N, K]."""
    return mask.unsqueeze(2).bitwise_and(_bit_values(mask.device)).ne(0).view(mask.shape[0], inputs)


def _bit_values(device: torch.device) -> Tensor:
    return torch.bitwise_left_shift(torch.ones(8, dtype=torch.uint8, device=device), torch.arange(8, dtype=torch.uint8))


def _of_mask(kept: Tensor, mask: Tensor, inputs: int) -> Tensor:
    """kept [n, k] at the places that mask [n, K/8] tells, 0 elsewhere: [n, K]."""
    dense = kept.new_zeros(kept.shape[0], inputs)
    return dense.masked_scatter_(unpack_mask(mask, inputs), kept)


def _of_blocks(kept: Tensor, index: Tensor, inputs: int) -> Tensor:
    """kept [b, k, r, c] at the places that index [b, k] tells, 0 elsewhere: [b·r, K]."""
    bands, count, rows, columns = kept.shape
    dense = kept.new_zeros(bands, inputs // columns, rows, columns)
    where = index.to(torch.int64).view(bands, count, 1, 1).expand(-1, -1, rows, columns)
    return dense.scatter_(1, where, kept).transpose(1, 2).reshape(bands * rows, inputs)
