"""Weights by chance, for a model that is only a config: to account for it, to try it, to test it."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from memfit.packed.fake import is_fake
from memfit.source.checkpoint import TensorInfo


@dataclass(frozen=True, kw_only=True)
class RandomCheckpoint:
    """Every parameter drawn from a normal distribution of deviation 0.02; the weights of norms are 1.

    A tensor depends on its name and the seed alone, so it is the same in whatever order they are read.
    """

    tensors: Mapping[str, TensorInfo]
    seed: int = 0

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, out)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name).view(-1, self.tensors[name].shape[-1])[start:stop].clone()

    def read_into(self, name: str, out: torch.Tensor) -> None:
        if is_fake(out):  # torch fills in place; its rule for fake tensors would claim a second tensor
            return
        if len(self.tensors[name].shape) == 1 and name.endswith("weight"):
            out.fill_(1)
            return
        # crc32 and not hash(): the latter differs from process to process
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
        out.normal_(0, 0.02, generator=generator)


def random_checkpoint(model: nn.Module, *, seed: int = 0) -> RandomCheckpoint:
    """A checkpoint for every parameter of `model`, a tied one once."""
    tensors = {
        name: TensorInfo(
            name=name,
            dtype=parameter.dtype,
            shape=tuple(parameter.shape),
            nbytes=parameter.numel() * parameter.dtype.itemsize,
            file=Path("config.json"),
        )
        for name, parameter in model.named_parameters()
    }
    return RandomCheckpoint(tensors=tensors, seed=seed)
