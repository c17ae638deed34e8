"""What an optimizer is to memfit: how weights move by their gradients and states, a tile at a time.

An element rule moves each weight by its own gradient and states: any part of a tensor can be updated alone, and
states can be kept in blocks of few bits. A matrix rule needs the whole matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One flat state of a tensor: so many entries for so many weights."""

    dtype: torch.dtype
    per: int = 1
    """Weights that share an entry: 256 for a scale of each block, 2 for two codes a byte."""

    def entries(self, weights: int) -> int:
        """Entries for so many weights, the last one perhaps shared by fewer."""
        return -(-weights // self.per)


Tiles = dict[str, Tensor]
"""State to its tile: flat, changed in place."""


class ElementRule(Protocol):
    """AdamW, SGD: each weight by itself."""

    def layout(self) -> Mapping[str, Layout]:
        """The states of a tensor, by name; all begin as zeros."""
        ...

    def update(
        self, weight: Tensor, gradient: Tensor, state: Tiles, *, lr: float, weight_decay: float, step: int, seed: int
    ) -> None:
        """Move a tile. `weight` and `gradient` are flat, fp32, and changed in place; `step` counts from 1; `seed`
        differs for each step, tensor and tile."""
        ...


class MatrixRule(Protocol):
    """Adafactor, projected gradients, Muon: a matrix at a time."""

    def applies(self, shape: torch.Size) -> bool:
        """Whether tensors of this shape are moved by it."""
        ...

    def shapes(self, shape: torch.Size) -> Mapping[str, tuple[int, ...]]:
        """The fp32 states of a tensor, by name; all begin as zeros."""
        ...

    def update(
        self, weight: Tensor, gradient: Tensor, state: Tiles, *, lr: float, weight_decay: float, step: int, seed: int
    ) -> None:
        """Move a tensor: fp32, of its own shape, in place; the gradient may be used up."""
        ...
