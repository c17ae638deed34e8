"""Integers that were chosen for a model's layers, on the disk until the output is written: a directory a block."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from memfit.packed.fake import blocks_to_run
from memfit.packed.scheme import Scheme
from memfit.source.checkpoint import Checkpoint
from memfit.source.planned import planned_checkpoint
from memfit.source.safetensors import open_checkpoint
from memfit.technique.quantize import Quantized

from .safetensors import TensorSpec, Writer

_ROWS_NBYTES: Final = 8 << 20
_DAMPING: Final = "damping.json"
_UNFINISHED: Final = ".part"


class Integers:
    """What is kept of each block; it appears whole or not at all.

    Args:
        directory: of the blocks; made if it is not there. None: a dry run, where blocks are announced and nothing is
            written or read.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.damping: dict[str, float] = {}
        """Module to the damping that its H was given."""
        self._files: dict[str, Checkpoint] = {}
        self._blocks: set[str] = set()
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(directory.iterdir()):
            if path.suffix == _UNFINISHED:
                shutil.rmtree(path)
            else:
                self._open(path)

    def __contains__(self, module: str) -> bool:
        return module in self._files

    def holds(self, block: str) -> bool:
        """Whether a block is done."""
        return block in self._blocks

    def read(self, module: str, scheme: Scheme) -> Quantized:
        """What was chosen for a module."""
        rows = self._files[module].tensors[f"{module}.q"].shape[0]
        return self._read(module, scheme, 0, rows)

    def rows(self, module: str, scheme: Scheme) -> Iterator[tuple[int, Quantized]]:
        """(first row, what was chosen for some rows) of a module, from its first row to its last."""
        rows, width = self._files[module].tensors[f"{module}.q"].shape
        step = max(1, _ROWS_NBYTES // width)
        for start in blocks_to_run(range(0, rows, step)):
            yield start, self._read(module, scheme, start, min(start + step, rows))

    def _read(self, module: str, scheme: Scheme, start: int, stop: int) -> Quantized:
        file = self._files[module]
        zero = None if scheme.symmetric else file.read_rows(f"{module}.zero", start, stop)
        q, scale = (file.read_rows(f"{module}.{part}", start, stop) for part in ("q", "scale"))
        table = file.read(f"{module}.table") if scheme.values == "codebook" else None
        return Quantized(scheme=scheme, q=q, scale=scale, zero=zero, table=table)

    def write(self, block: str, found: Mapping[str, Quantized], damping: Mapping[str, float]) -> None:
        """Keep what was chosen for the modules of a block."""
        tensors = {name: tensor for module, quantized in found.items() for name, tensor in _parts(module, quantized)}
        specs = [TensorSpec(name=name, dtype=t.dtype, shape=tuple(t.shape)) for name, t in tensors.items()]
        if self.directory is None:
            announced = planned_checkpoint((spec.name, spec.dtype, spec.shape) for spec in specs)
            self._files |= dict.fromkeys(found, announced)
            return
        part = self.directory / f"{block}{_UNFINISHED}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        with Writer(part, specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        (part / _DAMPING).write_text(json.dumps(dict(damping)), encoding="utf-8")
        os.rename(part, self.directory / block)
        self._open(self.directory / block)

    def _open(self, path: Path) -> None:
        self.damping |= json.loads((path / _DAMPING).read_text(encoding="utf-8"))
        found = open_checkpoint(path)
        assert found is not None, "a block that is there is whole"
        self._blocks.add(path.name)
        self._files |= {name.removesuffix(".q"): found for name in found.tensors if name.endswith(".q")}


def _parts(module: str, quantized: Quantized) -> Iterator[tuple[str, Tensor]]:
    yield f"{module}.q", quantized.q
    yield f"{module}.scale", quantized.scale
    if quantized.zero is not None:
        yield f"{module}.zero", quantized.zero
    if quantized.table is not None:
        yield f"{module}.table", quantized.table
