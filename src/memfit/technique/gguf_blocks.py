"""GGUF's blocks as a technique: a weight [rows, columns] to the bytes of one of GGML's types.

The error that is made small is Σ_k importance_k (w_k − ŵ_k)², the importance of a column the mean square of what
it is multiplied with: the same that llama.cpp calls importance matrix.
"""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from memfit.errors import UsageError
from memfit.packed.fake import blocks_to_run, is_fake, repeated
from memfit.technique.gguf_layout import KINDS, Fields, Kind, empty_fields, kind_of
from memfit.technique.gguf_search import LARGEST, NOTHING, search

__all__ = ["KINDS", "Kind", "checked", "encode", "kind_of", "searched"]

TILE: Final = 1 << 17
"""Weights worked on at a time, in six buffers of 512 KiB. Smaller ones are slower by what torch takes for a call."""
_ROWS: Final = 256
"""Most rows of a tile. Wide enough for vector instructions; what is left goes to more columns."""
_FLOOR: Final = 1e-8
"""Of the largest importance of a block: where all columns of a sub-block are unimportant, it is not arbitrary."""


@torch.no_grad()
def encode(weight: Tensor, kind: str, *, importance: Tensor | None = None, meant: Tensor | None = None) -> Tensor:
    """The bytes of `weight` as blocks of `kind`, uint8 [rows, row_nbytes].

    Args:
        weight: [rows, columns] of any float dtype, columns a multiple of the kind's block.
        kind: `Q8_0`, `Q6_K`, …: a name of `KINDS`.
        importance: [columns], not negative; None: all equal.
        meant: float32 [rows, columns]; is filled with the weights that the bytes stand for.

    Raises:
        UsageError: a shape that has no whole blocks, weights that are not finite or beyond fp16, importances that
            are negative or not finite.
    """
    one = kind_of(kind)
    rows, columns = checked(weight, one)
    h = _importance(importance, columns, one, weight.device)
    out = torch.empty(rows, one.row_nbytes(columns), dtype=torch.uint8, device=weight.device)
    for lines, blocks in blocks_to_run(_tiles(rows, columns // one.block, one.block)):
        piece = weight[lines, blocks.start * one.block : blocks.stop * one.block]
        found = _search(_turned(piece, one), h[blocks], one)
        packed = out[lines, blocks.start * one.nbytes : blocks.stop * one.nbytes]
        packed.copy_(found.packed().view(piece.shape[0], -1))
        if meant is not None:
            meant[lines, blocks.start * one.block : blocks.stop * one.block] = found.values().view(piece.shape)
    return out


@torch.no_grad()
def searched(weight: Tensor, kind: Kind, importance: Tensor | None) -> Fields:
    """The numbers of all blocks of some rows [R, K], row after row, before they are packed. Arguments: see `encode`."""
    rows, columns = checked(weight, kind)
    h = _importance(importance, columns, kind, weight.device)
    per_row = columns // kind.block
    out = empty_fields(kind, rows * per_row, weight.device)
    for lines, blocks in blocks_to_run(_tiles(rows, per_row, kind.block)):
        piece = weight[lines, blocks.start * kind.block : blocks.stop * kind.block]
        found = _search(_turned(piece, kind), h[blocks], kind)
        for whole, part in zip(out.parts(), found.parts(), strict=True):
            whole.view(rows, per_row, *whole.shape[1:])[lines, blocks].copy_(
                part.view(piece.shape[0], -1, *part.shape[1:])
            )
        del found
    return out


def _search(x: Tensor, h: Tensor, kind: Kind) -> Fields:
    """`search`; a dry run tells a tile from an equal one."""
    found = repeated(("gguf", kind.name), None, "", lambda: (x, h), lambda: search(x, h, kind).parts())
    return Fields(kind=kind, **dict(zip(("q", "k", "m", "d", "dmin"), found, strict=True)))


def _turned(piece: Tensor, kind: Kind) -> Tensor:
    """Rows [R, columns] as the search takes them, [G, S, n, R] in float32."""
    _require_held(piece, kind)
    x = torch.empty(piece.shape[1], piece.shape[0], dtype=torch.float32, device=piece.device)
    x.copy_(piece.t())
    x.masked_fill_(x.abs() < NOTHING, 0.0)
    return x.view(-1, kind.parts, kind.width, piece.shape[0])


def checked(weight: Tensor, kind: Kind) -> tuple[int, int]:
    """Rows and columns of a weight that is whole blocks; UsageError if it is not."""
    if weight.dim() != 2 or weight.shape[1] % kind.block or not weight.numel():
        raise UsageError(
            f"{kind.name} takes matrices whose rows are multiples of {kind.block} weights, not {list(weight.shape)}. "
            "Choose a type of smaller blocks, or F16."
        )
    return weight.shape[0], weight.shape[1]


def _require_held(piece: Tensor, kind: Kind) -> None:
    if is_fake(piece):
        return
    if not bool((piece.abs() <= LARGEST).all()):  # false for NaN too
        raise UsageError(
            f"the weight has entries that are not finite or beyond {LARGEST:.0f}, which {kind.name}, whose scales "
            "are fp16, cannot hold. Keep it in F32."
        )


def _importance(importance: Tensor | None, columns: int, kind: Kind, device: torch.device) -> Tensor:
    """Importances [blocks of a row, S, n, 1], the largest of each block 1; blocks of zeros become ones."""
    if importance is None:
        return torch.ones(columns, device=device).view(-1, kind.parts, kind.width, 1)
    if tuple(importance.shape) != (columns,):
        raise UsageError(f"the importance has shape {list(importance.shape)}; the weight has {columns} columns.")
    h = importance.to(device=device, dtype=torch.float32).view(-1, kind.parts, kind.width, 1)
    if not is_fake(h) and not bool((h.isfinite() & (h >= 0)).all()):
        raise UsageError("importances must be finite and not negative; calibrate again.")
    largest = h.amax(dim=(1, 2), keepdim=True)
    return torch.where(largest > 0, h / largest, 1.0).clamp_min_(_FLOOR)


def _tiles(rows: int, blocks: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Rows and blocks of a row, cut so that no tile has more weights than `TILE` (but at least one block)."""
    high = min(rows, _ROWS)
    wide = max(1, TILE // (high * block))
    for row in range(0, rows, high):
        for at in range(0, blocks, wide):
            yield slice(row, min(row + high, rows)), slice(at, min(at + wide, blocks))
