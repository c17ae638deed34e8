"""A checkpoint whose weights are read as smoothing leaves them: some vectors others, some inputs multiplied."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run
from memfit.source.checkpoint import Checkpoint, TensorInfo
from memfit.source.source import Source

_BLOCK: Final = 1 << 20
"""Entries multiplied at a time, in float32."""


@dataclass(frozen=True, kw_only=True)
class SmoothedCheckpoint:
    """`base` with other vectors, and with matrices [N, K] whose inputs are multiplied, by stored name."""

    base: Checkpoint
    vectors: Mapping[str, Tensor]
    """[K], in place of what is stored."""
    columns: Mapping[str, Tensor]
    """float32 [K]: what input k of a stored matrix is multiplied by."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.base.tensors

    def read(self, name: str) -> Tensor:
        if name in self.vectors:
            return self.vectors[name].to(self.tensors[name].dtype, copy=True)
        return self._multiplied(name, self.base.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.vectors:
            raise ValueError(f"{name} is a vector; no rows {start} to {stop}")
        return self._multiplied(name, self.base.read_rows(name, start, stop))

    def read_into(self, name: str, out: Tensor) -> None:
        if name in self.vectors:
            out.copy_(self.vectors[name])
        else:
            self.base.read_into(name, out)
            self._multiplied(name, out)

    def _multiplied(self, name: str, out: Tensor) -> Tensor:
        if name in self.columns:
            columns = self.columns[name]
            rows = out.view(-1, columns.shape[0])
            # The factors are no bf16 numbers: the product is rounded once, after float32.
            for start in blocks_to_run(range(0, rows.shape[0], max(1, _BLOCK // columns.shape[0]))):
                part = rows[start : start + max(1, _BLOCK // columns.shape[0])]
                part.copy_(part.to(torch.float32, copy=True).mul_(columns))
        return out


def smoothed(source: Source, *, vectors: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Source:
    """The source that reads so. Names are the model's parameters; see `stored_alone`."""
    if source.checkpoint is None or not (vectors or columns):
        return source
    checkpoint = SmoothedCheckpoint(
        base=source.checkpoint,
        vectors={_stored(source, name): vector for name, vector in vectors.items()},
        columns={_stored(source, name): column for name, column in columns.items()},
    )
    made = dataclasses.replace(source, checkpoint=checkpoint)
    made._cache.update(source._laid_out)  # the same model, laid out the same
    return made


def stored_alone(source: Source, parameter: str) -> bool:
    """Whether one stored tensor is the parameter and nothing else: what is read of it can then be changed."""
    pieces = source.layout.pieces.get(parameter, ())
    if len(pieces) != 1 or pieces[0].index is not None or pieces[0].start is not None:
        return False
    users = [name for name, found in source.layout.pieces.items() if any(p.tensor == pieces[0].tensor for p in found)]
    shape = source.parameters[parameter][0]
    return users == [parameter] and math.prod(source.tensors[pieces[0].tensor].shape) == math.prod(shape)


def _stored(source: Source, parameter: str) -> str:
    return source.layout.pieces[parameter][0].tensor
