"""The file that recorded logits lie in: a header of 4 KiB, JSON and spaces, then the raw numbers."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from memfit.errors import BrokenInput, MemfitError
from memfit.evaluate.outputs import Kind
from memfit.packed.fake import is_fake
from memfit.units import format_size

_FORMAT: Final = "memfit logits 1"
HEADER_NBYTES: Final = 4096
DTYPES: Final = {str(d): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the file of logits holds: [W / B, chunks, B, C, V], or embeddings [W, D]."""

    kind: Kind
    dtype: str
    windows: int
    length: int
    positions: int
    width: int
    """V, or D for encoders."""
    batch: int
    tokens_sha256: str
    format: str = _FORMAT

    @property
    def nbytes(self) -> int:
        rows = self.windows * (self.positions if self.kind != "encoder" else 1)
        return rows * self.width * DTYPES[self.dtype].itemsize


def header_bytes(header: Header) -> memoryview:
    """The header as it stands at the beginning of the file."""
    return memoryview(json.dumps(asdict(header)).encode().ljust(HEADER_NBYTES))


def read_header(path: Path, handle: int) -> Header:
    """The header of the file, which must be as long as it announces; BrokenInput if not."""
    try:
        data: dict[str, Any] = json.loads(os.pread(handle, HEADER_NBYTES, 0))
        header = Header(**data)
        expected = HEADER_NBYTES + header.nbytes
    except (ValueError, TypeError, KeyError) as error:
        raise BrokenInput(f"{path}: no recorded logits (its header cannot be read).") from error
    if header.format != _FORMAT:
        raise BrokenInput(f"{path}: format {header.format!r}, this version reads {_FORMAT!r}.")
    size = os.fstat(handle).st_size
    if size != expected:
        raise BrokenInput(f"{path}: {size} bytes, {expected} announced. Record the logits again.")
    return header


def check_room(path: Path, header: Header) -> None:
    """Refuse, before anything is written, what the disk cannot hold."""
    free = shutil.disk_usage(path.parent).free
    if free < header.nbytes:
        raise MemfitError(
            f"{path.parent}: {format_size(free)} free, {format_size(header.nbytes)} needed for the "
            f"original's logits ({header.windows} windows of {header.length} tokens, {header.width} each). "
            "Use fewer windows, or name a directory on another disk."
        )


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_bytes(handle: int, content: memoryview) -> None:
    """Write all of `content`; one call to the system may take less."""
    while len(content):
        content = content[os.write(handle, content) :]


def read_into(path: Path, handle: int, offset: int, tensor: Tensor) -> int:
    """Fill `tensor` from the file at `offset`; the offset after it."""
    end = offset + tensor.nbytes
    if is_fake(tensor):
        return end
    content = bytes_of(tensor)
    while len(content):
        got = os.preadv(handle, [content], offset)
        if got == 0:
            raise BrokenInput(f"{path}: ends {len(content)} bytes too early.")
        content, offset = content[got:], offset + got
    return end
