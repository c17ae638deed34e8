"""Stored tensors, read strictly: nothing is believed that the bytes do not show.

A safetensors file is 8 bytes of header length n (little endian), n bytes of JSON that maps each name to
its dtype, shape and [begin, end) within the rest of the file, then that rest, without holes.
"""

import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch

from memfit.errors import BrokenInput
from memfit.packed.fake import is_fake

BLOCK_NBYTES: Final = 4 << 20
"""Bytes read, checked and cast at a time: far below the 16 MiB that a transient may take, and cached."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One stored tensor, as its file declares it and as its file's size bears out."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    """Bytes that the tensor has when read, shape times dtype."""
    file: Path
    offset: int = 0
    """Where its bytes begin, from the start of the file."""


class Checkpoint(Protocol):
    """Where weights come from: files of safetensors, a GGUF, or chance."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor, by the name it is stored under."""

    def read(self, name: str) -> torch.Tensor:
        """A fresh CPU tensor in its own dtype. Raises BrokenInput where the bytes are not what they should
        be.
        """

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, all dimensions but the last taken as one: [stop − start,
        width].
        """

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill the contiguous CPU tensor `out` of the same shape, cast to its dtype in blocks."""


@dataclass(frozen=True, kw_only=True)
class SafetensorsCheckpoint:
    """The tensors of one or more safetensors files. Nothing is mapped: bytes are read into the tensors."""

    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, out)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.tensors[name]
        width = info.shape[-1] if info.shape else 1
        out = torch.empty((stop - start, width), dtype=info.dtype)
        if not is_fake(out):
            with _opened(info.file) as descriptor:
                _read_checked(
                    descriptor, info, info.offset + start * width * info.dtype.itemsize, bytes_of(out)
                )
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        info = self.tensors[name]
        if not out.is_contiguous() or out.shape != info.shape:
            raise ValueError(
                f"{name} is {info.shape}; it cannot fill {tuple(out.shape)}, stride {out.stride()}"
            )
        if out.dtype == info.dtype:
            if not is_fake(out):
                with _opened(info.file) as descriptor:
                    _read_checked(descriptor, info, info.offset, bytes_of(out))
            return
        # Cast through one block, so that the tensor as stored and as wanted are never both whole in memory.
        flat, step = out.view(-1), max(BLOCK_NBYTES // info.dtype.itemsize, 1)
        block = torch.empty(min(step, flat.numel()), dtype=info.dtype)
        if is_fake(out):
            return
        with _opened(info.file) as descriptor:
            for start in range(0, flat.numel(), step):
                part = block[: min(step, flat.numel() - start)]
                _read_checked(descriptor, info, info.offset + start * info.dtype.itemsize, bytes_of(part))
                cast_into(flat[start : start + part.numel()], part)

    def read_part(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill flat `out`, of the stored dtype, with the tensor's entries from `start` on, all dimensions as one."""
        info = self.tensors[name]
        if out.dtype != info.dtype or not out.is_contiguous() or not 0 <= start <= math.prod(info.shape) - out.numel():
            raise ValueError(f"{name} is {info.dtype} {info.shape}; no {out.dtype} {out.numel()} from {start} on")
        with _opened(info.file) as descriptor:
            _read_checked(descriptor, info, info.offset + start * info.dtype.itemsize, bytes_of(out))

    def blocks(self, name: str) -> Iterator[bytes]:
        """The stored bytes of one tensor, a block at a time, unchecked: for comparing and hashing."""
        info = self.tensors[name]
        with _opened(info.file) as descriptor:
            for start in range(0, info.nbytes, BLOCK_NBYTES):
                size = min(BLOCK_NBYTES, info.nbytes - start)
                block = os.pread(descriptor, size, info.offset + start)
                if len(block) != size:
                    raise _ended_early(info)
                yield block


def cast_into(out: torch.Tensor, block: torch.Tensor) -> None:
    """Copy flat `block` to flat `out` of another dtype.

    A quarter of a million values at a time: a measurement keeps every operator it sees, and smaller pieces made
    gigabytes of records of a model that is read several times.
    """
    piece = 1 << 18
    for start in range(0, block.numel(), piece):
        out[start : start + piece].copy_(block[start : start + piece])


def bytes_of(tensor: torch.Tensor) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """The memory of a contiguous CPU tensor as bytes; shared, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _read_checked(
    descriptor: int, info: TensorInfo, offset: int, into: "np.ndarray[tuple[int], np.dtype[np.uint8]]"
) -> None:
    """Fill `into` from the file at `offset`, block by block, each checked while it is still in the cache."""
    for start in range(0, into.nbytes, BLOCK_NBYTES):
        block = into[start : start + BLOCK_NBYTES]
        done = 0
        while done < block.nbytes:
            got = os.preadv(descriptor, [memoryview(block[done:])], offset + start + done)  # type: ignore[arg-type]
            if got == 0:
                raise _ended_early(info)
            done += got
        if not finite(block, info.dtype):
            raise BrokenInput(
                f"{info.file}: tensor {info.name!r} holds NaN or infinity, so the model would answer "
                "nonsense. "
                "Fetch the file again, or take a checkpoint whose weights are all finite."
            )


def _ended_early(info: TensorInfo) -> BrokenInput:
    return BrokenInput(
        f"{info.file}: ends within tensor {info.name!r}; it was cut short after it was opened. Fetch "
        "it again."
    )


# Bits that are all set only in NaN and infinity, by dtype. float8_e4m3fn has no infinity, and one NaN a sign.
_EXPONENT: Final[dict[torch.dtype, tuple[str, int]]] = {
    torch.float64: ("<u8", 0x7FF0000000000000),
    torch.float32: ("<u4", 0x7F800000),
    torch.float16: ("<u2", 0x7C00),
    torch.bfloat16: ("<u2", 0x7F80),
    torch.float8_e5m2: ("u1", 0x7C),
    torch.float8_e4m3fn: ("u1", 0x7F),
}


def finite(block: "np.ndarray[tuple[int], np.dtype[np.uint8]]", dtype: torch.dtype) -> bool:
    """Whether no number in these bytes is NaN or infinite; integers always are finite.

    Done on bits with numpy, in pieces: `torch.isfinite` would allocate, and has no kernel for some dtypes.
    """
    if dtype not in _EXPONENT:
        return True
    word, mask = _EXPONENT[dtype]
    numbers = block.view(word)
    piece = 1 << 16
    for start in range(0, numbers.size, piece):
        bits = numbers[start : start + piece] & numbers.dtype.type(mask)
        if bits.max(initial=0) == mask:
            return False
    return True


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    descriptor = open_regular(file)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_regular(file: Path) -> int:
    """A descriptor of a regular file. A pipe or a device would hang or never end; it is refused unread."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BrokenInput(f"{file}: cannot be opened: {error.strerror}. Fetch the model again.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BrokenInput(f"{file}: is no regular file. Put the checkpoint's own file there.")
    return descriptor
