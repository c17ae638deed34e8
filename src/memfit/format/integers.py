"""Integers that were chosen for a model's layers, on the disk until the output is written: a directory a block.

A block's modules are written as they come, each into a directory of its own below `BLOCK.part`, so that none stays in
memory; the name without `.part` says that all are there.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from memfit.packed.fake import blocks_to_run
from memfit.packed.forms import FORM_PARTS, Form, LowRank, Narrow, Own, Shared
from memfit.packed.scheme import Scheme
from memfit.source.checkpoint import Checkpoint
from memfit.source.planned import planned_checkpoint
from memfit.source.safetensors import open_checkpoint
from memfit.technique.made import Made, dense
from memfit.technique.quantize import Quantized, dequantize

from .safetensors import TensorSpec, Writer

_ROWS_NBYTES: Final = 1 << 18
"""Of integers read at a time: less than what the heap gives back to the system."""
_DAMPING: Final = "damping.json"
_UNFINISHED: Final = ".part"
_ATTUNED: Final = "attuned.safetensors"


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
        self.attuned: dict[str, float] | None = None
        """What the whole model lost `before` and `after` scales and vectors learned; None: they have not."""
        self.vectors: dict[str, Tensor] = {}
        """Norms' weights and biases that have learned, by parameter, bf16."""
        self._scales: dict[str, Tensor] = {}
        self._files: dict[str, Checkpoint] = {}
        self._blocks: set[str] = set()
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(directory.iterdir()):
            if path.name == _ATTUNED:
                self._open_attuned(path)
            elif path.suffix == _UNFINISHED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            else:
                self._open_block(path)

    def __contains__(self, module: str) -> bool:
        return module in self._files

    def holds(self, block: str) -> bool:
        """Whether a block is done."""
        return block in self._blocks

    def read(self, module: str, scheme: Scheme) -> Quantized:
        """The integers that were chosen for a module."""
        rows = self._files[module].tensors[f"{module}.q"].shape[0]
        return self._read(module, scheme, 0, rows)

    def made(self, module: str, form: Own, shape: tuple[int, int]) -> Made:
        """The parts that were made of a module, of a weight of this shape."""
        file = self._files[module]
        parts = {part: file.read(name) for part in FORM_PARTS if (name := f"{module}.{part}") in file.tensors}
        base = form.base if isinstance(form, LowRank | Narrow) and isinstance(form.base, Scheme) else None
        return Made(form=form, shape=shape, parts=parts, base=None if base is None else self.read(module, base))

    def weight(
        self, module: str, schemes: Scheme | Mapping[str, Form], shape: tuple[int, int] | None = None
    ) -> Tensor:
        """ŵ [N, K] of a module in bf16; beside it some rows of its integers, or its parts, are in memory.

        Args:
            schemes: by module, so that what is shared finds its owner's; or the module's own.
            shape: [N, K], which parts do not tell.
        """
        scheme = schemes if isinstance(schemes, Scheme) else schemes[module]
        if not isinstance(scheme, Scheme):
            assert shape is not None and not isinstance(schemes, Scheme)
            return dense(self.made(module, scheme, shape), self._owner(scheme, schemes, shape))
        out = torch.empty(self._files[module].tensors[f"{module}.q"].shape, dtype=torch.bfloat16)
        for start, some in self.rows(module, scheme):
            out[start : start + some.q.shape[0]] = dequantize(some)
            del some
        return out

    def _owner(
        self, form: Own, schemes: Mapping[str, Form], shape: tuple[int, int]
    ) -> Made | Quantized | None:
        """What the owner of what a form shares was made into. Of a right factor, its other shapes do not matter."""
        if not isinstance(form, Shared):
            return None
        theirs = schemes[form.owner]
        return self.read(form.owner, theirs) if isinstance(theirs, Scheme) else self.made(form.owner, theirs, shape)

    def rows(self, module: str, scheme: Scheme) -> Iterator[tuple[int, Quantized]]:
        """(first row, what was chosen for some rows) of a module, from its first row to its last."""
        rows, width = self._files[module].tensors[f"{module}.q"].shape
        step = max(1, _ROWS_NBYTES // width)
        for start in blocks_to_run(range(0, rows, step)):
            yield start, self._read(module, scheme, start, min(start + step, rows))

    def _read(self, module: str, scheme: Scheme, start: int, stop: int) -> Quantized:
        file = self._files[module]
        zero = None if scheme.symmetric else file.read_rows(f"{module}.zero", start, stop)
        q, scale = file.read_rows(f"{module}.q", start, stop), self.scale(module, start, stop)
        table = file.read(f"{module}.table") if scheme.values == "codebook" else None
        return Quantized(scheme=scheme, q=q, scale=scale, zero=zero, table=table)

    def scale(self, module: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The scales of a module's rows start to stop, by default of all [N, G], bf16."""
        if module in self._scales:
            return self._scales[module][start:stop]
        file, name = self._files[module], f"{module}.scale"
        return file.read_rows(name, start, file.tensors[name].shape[0] if stop is None else stop)

    def attune(
        self, scales: Mapping[str, Tensor], vectors: Mapping[str, Tensor], lost: Mapping[str, float]
    ) -> None:
        """Keep what the whole model has learned: scales by module, in place of those that were chosen, and vectors."""
        self.attuned = dict(lost)
        if self.directory is None:
            return
        parts = {"scale": scales, "vector": vectors}
        tensors = {f"{part}:{name}": t.contiguous() for part, found in parts.items() for name, t in found.items()}
        part = self.directory / f"{_ATTUNED}{_UNFINISHED}"
        save_file(tensors, str(part), metadata={"lost": json.dumps(self.attuned)})
        os.rename(part, self.directory / _ATTUNED)
        self._open_attuned(self.directory / _ATTUNED)

    def add(self, block: str, module: str, quantized: Quantized | Made) -> None:
        """Keep what was chosen for a module of a block that is not done yet, in place of what was chosen before."""
        tensors = dict(_parts(module, quantized))
        specs = [TensorSpec(name=name, dtype=t.dtype, shape=tuple(t.shape)) for name, t in tensors.items()]
        if self.directory is None:
            self._files[module] = planned_checkpoint((spec.name, spec.dtype, spec.shape) for spec in specs)
            return
        place = self.directory / f"{block}{_UNFINISHED}" / module
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        with Writer(place, specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        self._open(place)

    def announce(self, block: str, like: str) -> None:
        """In a dry run: of a block's modules there will be what there is of an equal one's."""
        for name, file in [found for found in self._files.items() if found[0].startswith(f"{like}.")]:
            module = block + name.removeprefix(like)
            parts = [(module + part.removeprefix(name), info) for part, info in file.tensors.items()]
            self._files[module] = planned_checkpoint((part, info.dtype, info.shape) for part, info in parts)

    def finish(self, block: str, damping: Mapping[str, float]) -> None:
        """All modules of a block are there."""
        if self.directory is None:
            return
        part = self.directory / f"{block}{_UNFINISHED}"
        part.mkdir(exist_ok=True)
        (part / _DAMPING).write_text(json.dumps(dict(damping)), encoding="utf-8")
        os.rename(part, self.directory / block)
        self._open_block(self.directory / block)

    def _open_attuned(self, path: Path) -> None:
        parts: dict[str, dict[str, Tensor]] = {"scale": self._scales, "vector": self.vectors}
        with safe_open(str(path), framework="pt") as file:
            self.attuned = json.loads(file.metadata()["lost"])
            for key in sorted(file.keys()):
                part, _, name = key.partition(":")
                parts[part][name] = file.get_tensor(key)

    def _open_block(self, path: Path) -> None:
        self.damping |= json.loads((path / _DAMPING).read_text(encoding="utf-8"))
        self._blocks.add(path.name)
        for module in sorted(path.iterdir()):
            if module.is_dir():
                self._open(module)

    def _open(self, path: Path) -> None:
        # Of a module that is as another is, nothing is stored.
        self._files[path.name] = open_checkpoint(path) or planned_checkpoint(())


def _parts(module: str, quantized: Quantized | Made) -> Iterator[tuple[str, Tensor]]:
    if isinstance(quantized, Made):
        for part, tensor in quantized.parts.items():
            yield f"{module}.{part}", tensor
        if quantized.base is not None:
            yield from _parts(module, quantized.base)
        return
    yield f"{module}.q", quantized.q
    yield f"{module}.scale", quantized.scale
    if quantized.zero is not None:
        yield f"{module}.zero", quantized.zero
    if quantized.table is not None:
        yield f"{module}.table", quantized.table
