"""A checkpoint that is only announced: names, dtypes and shapes of files that a plan would write."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from memfit.packed.fake import is_fake
from memfit.source.checkpoint import TensorInfo


@dataclass(frozen=True, kw_only=True)
class PlannedCheckpoint:
    """Can be read on fake tensors alone, to predict what loading the files will take."""

    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        return _fake(torch.empty(info.shape, dtype=info.dtype))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.tensors[name]
        return _fake(torch.empty((stop - start, info.shape[-1]), dtype=info.dtype))

    def read_into(self, name: str, out: torch.Tensor) -> None:
        _fake(out)


def planned_checkpoint(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> PlannedCheckpoint:
    """The checkpoint that holds these tensors: name, dtype, shape."""
    return PlannedCheckpoint(
        tensors={
            name: TensorInfo(
                name=name,
                dtype=dtype,
                shape=shape,
                nbytes=torch.Size(shape).numel() * dtype.itemsize,
                file=Path("planned.safetensors"),
            )
            for name, dtype, shape in tensors
        }
    )


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    if not is_fake(tensor):
        raise RuntimeError("a planned checkpoint holds no bytes: it can be read on fake tensors only")
    return tensor
