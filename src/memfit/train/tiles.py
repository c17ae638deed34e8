"""The parts that a parameter is read, moved and written in, so that no copy of it is ever whole."""

import math
from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 256
"""Weights that share a scale in states of few bits: a tile begins at a multiple of it."""
_CPU_TILE: Final = 1 << 18
"""Weights of a tile on a CPU: what an update needs of it lies in the second-level cache."""
_CUDA_TILE: Final = 1 << 24
_ROW_LOGITS_NBYTES: Final = 12 << 20
"""Most bytes of logits, 16 and 32 bits of each, while rows of a head's gradient are made; of a small table's, a
quarter of the table: they are to take less than its gradient would."""

_TABLE_TILES: Final = 16
"""A table has so many at least: an update needs several times a tile, and is to take less than the table."""


def tiles(numel: int, device: torch.device) -> list[tuple[int, int]]:
    """[start, stop) of each tile of so many weights."""
    size = _CUDA_TILE if device.type == "cuda" else _CPU_TILE
    return [(start, min(start + size, numel)) for start in range(0, numel, size)]


def row_tiles(table: Tensor, tokens: int) -> list[tuple[int, int]]:
    """Tiles of a table [V, D] that are whole rows, few enough that logits [tokens, rows] stay small."""
    count, width = table.shape
    most = max(min(_CPU_TILE * 4 // width, count // _TABLE_TILES), 1)
    if tokens:
        nbytes = min(_ROW_LOGITS_NBYTES, table.numel() * table.element_size() // 4)
        most = min(most, max(nbytes // (6 * tokens), 1))
    whole = BLOCK // math.gcd(BLOCK, width)
    rows = max(most // whole, 1) * whole
    return [(start * width, min(start + rows, count) * width) for start in range(0, count, rows)]
