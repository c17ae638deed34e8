"""GGUF's blocks by GPTQ: scales as they are searched, integers that make up for the errors of those before them.

The format does not say how integers are found. With its scales frozen, every sub-block is a grid with a step D = d k
and a shift M = dmin m, and nearest plane chooses on it as `gptq` does, column by column in the order of diag(H):

    t_j = w_j + Σ_{i<j} (w_i − ŵ_i) M_ij          q_j = (t_j + M) / D, rounded          ŵ_j = D q_j − M

so errors of neighbours, across sub-blocks and blocks, cancel in the layer's output instead of adding up. The scales of
scales are coarse, and searching them for what a column's own error counts then, R_jj², fits a short text: they are
searched with its geometric mean with diag(H). Files of Q4_K_M and Q2_K lose 0.97 and 0.96 of what they lose by R_jj²
(MiniLM, 8192 tokens), 0.98 and 0.94 (demo).

Legend of shapes: N outputs (rows), K inputs (columns), R rows of a piece, S sub-blocks of a row, B columns of a block.
"""

from typing import Final

import torch
from torch import Tensor

from memfit.errors import UsageError
from memfit.packed.fake import blocks_to_run
from memfit.technique.gguf_blocks import checked, searched
from memfit.technique.gguf_layout import Fields, Kind, kind_of
from memfit.technique.gptq import Factor

_PIECE: Final = 1 << 22
"""Weights of a piece: 16 MiB in float32, in about six buffers. More rows make the loop over columns cheaper."""
_ROWS: Final = (128, 1024)
"""Fewest and most rows of a piece."""
_COLUMNS: Final = 128
"""Columns whose errors are spread one at a time; those of earlier ones come by one product."""


@torch.no_grad()
def encode_compensated(weight: Tensor, kind: str, made: Factor, *, meant: Tensor | None = None) -> Tensor:
    """The bytes of `weight` as blocks of `kind` for inputs with the H that `made` is of, uint8 [N, row_nbytes].

    Args:
        weight: [N, K] of any float dtype, K a multiple of the kind's block.
        kind: a name of `KINDS`.
        made: see `gptq.factor`.
        meant: [N, K] of any float dtype; is filled with the weights that the bytes stand for.

    Raises:
        UsageError: as `encode`, or an H of another width.
    """
    one = kind_of(kind)
    rows, columns = checked(weight, one)
    if made.order.shape[0] != columns:
        raise UsageError(f"the Hessian is of {made.order.shape[0]} inputs, the weight has {columns}.")
    out = torch.empty(rows, one.row_nbytes(columns), dtype=torch.uint8, device=weight.device)
    importance = made.own_weights().mul_(made.importance.to(torch.float32)).sqrt_()
    step = min(max(_PIECE // columns, _ROWS[0]), _ROWS[1])
    for start in blocks_to_run(range(0, rows, step)):
        part = slice(start, min(start + step, rows))
        found = searched(weight[part], one, importance)
        values = _compensate(weight[part], found, one, made)
        if meant is not None:
            meant[part].copy_(values)
        out[part].copy_(found.packed().view(values.shape[0], -1))
        del found, values
    return out


def _compensate(weight_RK: Tensor, found: Fields, kind: Kind, made: Factor) -> Tensor:
    """Choose the integers of some rows anew, in place; the weights [R, K] that they stand for, float32."""
    rows, columns = weight_RK.shape
    wide, order = made.coupling.dtype, made.order
    w_KR = weight_RK.to(wide).t().index_select(0, order)
    w_KR.masked_fill_(made.dead[order].unsqueeze(1), 0.0)
    step_SR, shift_SR = (part.view(rows, -1).t().contiguous() for part in found.grid())
    sub_K = (torch.arange(columns, device=weight_RK.device) // kind.width).index_select(0, order)
    d_KR, q_KR = torch.empty_like(w_KR), torch.empty_like(w_KR, dtype=torch.int8)
    for first in blocks_to_run(range(0, columns, _COLUMNS)):
        part = slice(first, min(first + _COLUMNS, columns))
        near = made.coupling[part, part]
        t_BR = w_KR[part].clone()
        t_BR.addmm_(made.coupling[:first, part].t(), d_KR[:first])
        steps_BR, shifts_BR = step_SR.index_select(0, sub_K[part]), shift_SR.index_select(0, sub_K[part])
        inverse_BR = steps_BR.reciprocal().nan_to_num_(0.0, 0.0, 0.0)  # nothing is a multiple of 0
        for j in blocks_to_run(range(t_BR.shape[0])):
            level = torch.add(t_BR[j], shifts_BR[j]).mul_(inverse_BR[j]).round_().clamp_(kind.low, kind.high)
            q_KR[first + j].copy_(level)
            read = level.mul_(steps_BR[j]).sub_(shifts_BR[j])
            d = torch.sub(w_KR[first + j], read, out=d_KR[first + j])
            t_BR[j + 1 :].addr_(near[j, j + 1 :], d)
    q_KR = torch.empty_like(q_KR).index_copy_(0, order, q_KR)
    found.q.copy_(q_KR.t().reshape(found.q.shape))
    return found.values().view(rows, columns)
