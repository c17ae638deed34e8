"""Writing safetensors as the tensors come: the header first, then each tensor straight from its own memory.

The format: 8 bytes, little endian, the length of the header; the header, JSON, name -> {dtype, shape,
data_offsets [begin, end) into what follows}, padded with spaces; the tensors, without gaps.
Source: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor

from memfit.errors import MemfitError
from memfit.packed.fake import is_fake
from memfit.source.checkpoint import bytes_of
from memfit.units import format_size

SHARD_NBYTES: Final = 4 * 2**30
INDEX: Final = ".safetensors.index.json"
# One write call takes at most 2^31 − 4096 bytes on Linux; smaller pieces also let a signal through.
_PIECE_NBYTES: Final = 64 * 2**20
_READ_NBYTES: Final = 4 * 2**20

DTYPES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What one tensor of a file will be."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            known = ", ".join(DTYPES.values())
            raise ValueError(f"{self.name}: safetensors has no name for {self.dtype}; it knows {known}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file that was written."""

    name: str
    nbytes: int
    sha256: str


class Writer:
    """Writes tensors, announced before, one at a time, in the order announced, into one file or several
    shards.

        with Writer(directory, specs) as writer:
            writer.write("model.norm.weight", tensor)

    No tensor is copied on its way: the bytes go from its memory to the file. On fake tensors all is checked
    and nothing is written, so that a dry run runs the same lines. After the block `shards` says what was
    written. Files are named after `stem`, as `model.safetensors` or `model-00001-of-00002.safetensors`.

    With `resume` it goes on where a process that was killed has stopped: tensors that are whole in the files stay
    (`has`), one that was cut short is written anew.

    Raises:
        ValueError: a tensor that is not the next one announced, in name, dtype or shape, or is not
        contiguous;
            a name announced twice; leaving the block before the last tensor.
        MemfitError: the disk has less room than the tensors need.
    """

    def __init__(
        self,
        directory: Path,
        specs: Iterable[TensorSpec],
        *,
        shard_nbytes: int = SHARD_NBYTES,
        dry: bool = False,
        stem: str = "model",
        resume: bool = False,
    ) -> None:
        self.directory = directory
        self.specs = tuple(specs)
        self.shards: tuple[Shard, ...] = ()
        self._dry = dry
        self._stem = stem
        self._parts = _split(self.specs, shard_nbytes)
        self._next = 0
        self._file: int | None = None
        self._digest = hashlib.sha256()
        self._there = 0
        if resume and not dry:
            self._go_on()
        self._check(directory)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers left out."""
        return sum(spec.nbytes for spec in self.specs)

    def _check(self, directory: Path) -> None:
        if sys.byteorder != "little":
            raise MemfitError(
                "safetensors files are little endian and this machine is not; nothing was written."
            )
        names = [spec.name for spec in self.specs]
        if len(set(names)) != len(names):
            twice = sorted(name for name in set(names) if names.count(name) > 1)
            raise ValueError(f"announced twice: {', '.join(twice)}")
        if self._dry:
            return
        free, needed = shutil.disk_usage(directory).free, self.nbytes - self._there
        if free < needed:
            raise MemfitError(
                f"{directory}: {format_size(free)} free, {format_size(needed)} needed for the weights. "
                "Free some space or write to another disk."
            )

    def has(self, name: str) -> bool:
        """Whether a tensor was written already."""
        return any(spec.name == name for spec in self.specs[: self._next])

    def _go_on(self) -> None:
        """Count what is whole in the files; the last of them is cut after it, and left open."""
        for shard, part in enumerate(self._parts):
            file, header = self.directory / self._name(shard), header_bytes(part)
            if not file.exists():
                return
            descriptor = os.open(file, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            size, end, whole = os.fstat(descriptor).st_size, len(header), 0
            if os.pread(descriptor, end, 0) != header:
                os.close(descriptor)
                file.unlink()
                return
            for spec in part:
                if end + spec.nbytes > size:
                    break
                end, whole = end + spec.nbytes, whole + 1
            os.ftruncate(descriptor, end)
            self._digest = hashlib.sha256()
            for start in range(0, end, _READ_NBYTES):
                self._digest.update(os.pread(descriptor, min(_READ_NBYTES, end - start), start))
            os.lseek(descriptor, 0, os.SEEK_END)
            self._file, self._next, self._there = descriptor, self._next + whole, self._there + end - len(header)
            if whole < len(part):
                return
            self._close(shard)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, which must be `name`, contiguous and on the CPU."""
        spec = self._announced(name)
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            got, due = f"{tensor.dtype} {list(tensor.shape)}", f"{spec.dtype} {list(spec.shape)}"
            raise ValueError(f"{name}: announced as {due}, got {got}")
        if not tensor.is_contiguous() or tensor.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{name}: writing takes a contiguous tensor on the CPU, got {tensor.stride()} {tensor.device}"
            )
        if not (self._dry or is_fake(tensor)):
            self._write_bytes(tensor)
        self._next += 1

    def write_parts(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write the next tensor, which must be `name`, as flat parts that come in order; each is real and on the CPU.
        A dry writer lets them come."""
        spec = self._announced(name)
        entries, real = 0, not self._dry
        if real:
            self._begin()
        for part in parts:
            if part.dtype != spec.dtype or part.dim() != 1 or not part.is_contiguous() or part.device.type != "cpu":
                got = f"{part.dtype} {list(part.shape)} on {part.device}"
                raise ValueError(f"{name}: a flat, contiguous part of {spec.dtype} on the CPU is due, got {got}")
            entries += part.numel()
            if real:
                self._put(memoryview(bytes_of(part)))  # type: ignore[arg-type]  # an array is a buffer; its stub says not
        if real:
            if entries != math.prod(spec.shape):
                raise ValueError(f"{name}: {math.prod(spec.shape)} entries were announced, {entries} came")
            self._end()
        self._next += 1

    def pass_over(self, names: Iterable[str]) -> None:
        """Count the next tensors, which must be `names`, as written; only of a dry writer."""
        for name in names:
            if not self._dry or self.specs[self._next].name != name:
                raise ValueError(f"{name}: only a dry writer passes over tensors, and only in order")
            self._next += 1

    def _announced(self, name: str) -> TensorSpec:
        """The next tensor's, which must be `name`."""
        if self._next == len(self.specs):
            raise ValueError(f"{name}: all {len(self.specs)} announced tensors are written already")
        spec = self.specs[self._next]
        if name != spec.name:
            raise ValueError(
                f"{name}: the next tensor announced is {spec.name} ({self._next + 1} of {len(self.specs)})"
            )
        return spec

    def _write_bytes(self, tensor: Tensor) -> None:
        self._begin()
        if tensor.numel():
            self._put(memoryview(bytes_of(tensor)))  # type: ignore[arg-type]
        self._end()

    def _begin(self) -> None:
        shard, first, _ = self._place(self._next)
        if self._next == first and self._file is None:
            self._open(shard)

    def _end(self) -> None:
        shard, _, last = self._place(self._next)
        if self._next == last:
            self._close(shard)

    def _place(self, index: int) -> tuple[int, int, int]:
        """Of the tensor: its shard, and that shard's first and last tensor."""
        first = 0
        for shard, part in enumerate(self._parts):
            if index < first + len(part):
                return shard, first, first + len(part) - 1
            first += len(part)
        raise IndexError(index)

    def _name(self, shard: int) -> str:
        many = len(self._parts)
        return f"{self._stem}{'' if many == 1 else f'-{shard + 1:05d}-of-{many:05d}'}.safetensors"

    def _open(self, shard: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        self._file = os.open(self.directory / self._name(shard), flags, 0o666)
        self._digest = hashlib.sha256()
        self._put(memoryview(header_bytes(self._parts[shard])))

    def _put(self, content: memoryview) -> None:
        assert self._file is not None
        for start in range(0, len(content), _PIECE_NBYTES):
            piece = content[start : start + _PIECE_NBYTES]
            self._digest.update(piece)
            while len(piece):
                piece = piece[os.write(self._file, piece) :]

    def _close(self, shard: int) -> None:
        assert self._file is not None
        os.fsync(self._file)
        nbytes = os.fstat(self._file).st_size
        os.close(self._file)
        self._file = None
        self.shards += (Shard(name=self._name(shard), nbytes=nbytes, sha256=self._digest.hexdigest()),)

    def _write_index(self) -> None:
        where = {spec.name: self._name(shard) for shard, part in enumerate(self._parts) for spec in part}
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": where}
        (self.directory / f"{self._stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if error is not None:
            return
        if self._next != len(self.specs):
            missing = self.specs[self._next].name
            raise ValueError(f"{self._next} of {len(self.specs)} tensors were written; {missing} is missing")
        # Without shards on disk the tensors were fake, and there is nothing to index.
        if len(self._parts) > 1 and self.shards:
            self._write_index()


def header_bytes(specs: Sequence[TensorSpec]) -> bytes:
    """Length and header of a file that holds `specs` in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for spec in specs:
        end = begin + spec.nbytes
        header[spec.name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _split(specs: Sequence[TensorSpec], shard_nbytes: int) -> list[list[TensorSpec]]:
    """Shards of at most `shard_nbytes`, in order; a tensor larger than that has a shard to itself."""
    parts: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not parts or spec.nbytes > room:
            parts.append([])
            room = shard_nbytes
        parts[-1].append(spec)
        room -= spec.nbytes
    return parts
