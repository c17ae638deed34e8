"""The header of a GGUF file, read with every count held against the size of the file.

All little endian: `GGUF`, version u32, number of tensors u64, number of keys u64; the keys, each a string,
a type u32 and a value; the tensors, each a string, a rank u32, dimensions u64 (fastest first), a type u32
and an offset u64; then, aligned, the data. A string is a length u64 and its bytes.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf

from memfit.errors import BrokenInput
from memfit.source.checkpoint import open_regular

_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING: Final = 8
_ARRAY: Final = 9
_STRING_NBYTES_MAX: Final = 16 << 20
_WINDOW: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Array:
    """An array among the keys: not kept, since a vocabulary of strings would take tens of MB."""

    kind: int
    """Type of its items."""
    count: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor as the file stores it."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    """Slowest dimension first, as torch has it."""
    offset: int
    """From the start of the file."""
    row_nbytes: int
    """Bytes of one row: all of the last dimension."""

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.rows * self.row_nbytes


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says of itself."""

    file: Path
    keys: Mapping[str, Any]
    """Key to number, text, truth, or `Array`; to a list, where the array was asked for."""
    tensors: tuple[Stored, ...]


class _Bytes:
    """A file read forward through a window, never beyond its end."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self.file, self.descriptor = file, descriptor
        self.size = os.fstat(descriptor).st_size
        self.at = 0
        self._window, self._start = b"", 0

    @property
    def left(self) -> int:
        return self.size - self.at

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.left:
            raise refuse(self.file, f"ends within its header, {nbytes - self.left} bytes short")
        begin = self.at - self._start
        if begin < 0 or begin + nbytes > len(self._window):
            self._window = os.pread(self.descriptor, max(nbytes, _WINDOW), self.at)
            self._start, begin = self.at, 0
            if len(self._window) < nbytes:
                raise refuse(self.file, "ends within its header")
        self.at += nbytes
        return self._window[begin : begin + nbytes]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> bytes:
        length = self.number("<Q")
        if length > min(self.left, _STRING_NBYTES_MAX):
            raise refuse(self.file, f"declares a string of {length} bytes; {self.left} are left in the file")
        return self.take(length)

    def text(self) -> str:
        raw = self.string()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise refuse(self.file, f"has a name that is no UTF-8: {raw[:40]!r}") from error


def read_header(file: Path, *, arrays: frozenset[str] = frozenset()) -> Header:
    """The keys and tensors of a GGUF file.

    Args:
        file: a regular file.
        arrays: keys whose arrays are kept.

    Raises:
        BrokenInput: another format or version, a count or size that the file cannot hold, a doubled name,
            a type of which nothing is known, tensors that overlap or lie outside.
    """
    descriptor = open_regular(file)
    try:
        return _read(file, _Bytes(file, descriptor), arrays)
    finally:
        os.close(descriptor)


def _read(file: Path, data: _Bytes, arrays: frozenset[str]) -> Header:
    if data.size < 24:
        raise refuse(file, f"is {data.size} bytes long, too short for a GGUF")
    if data.take(4) != b"GGUF":
        raise refuse(file, "does not begin with GGUF")
    version = data.number("<I")
    if version not in (2, 3):
        raise refuse(file, f"is of version {version} (big endian files look so too); 2 and 3 are read")
    tensor_count, key_count = data.number("<Q"), data.number("<Q")
    # The smallest key is 8 + 4 + 1 bytes long, the smallest tensor 8 + 4 + 8 + 4 + 8.
    if key_count > data.left // 13 or tensor_count > data.left // 32:
        raise refuse(
            file, f"declares {key_count} keys and {tensor_count} tensors, which {data.left} bytes cannot hold"
        )
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        key = data.text()
        if key in keys:
            raise refuse(file, f"has the key {key!r} twice")
        keys[key] = _value(file, data, key, kept=key in arrays)
    entries = [_entry(file, data) for _ in range(tensor_count)]
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise refuse(file, f"has an alignment of {alignment!r}")
    start = -(-data.at // alignment) * alignment
    tensors = [_stored(file, *entry, start=start, alignment=alignment, size=data.size) for entry in entries]
    _check_apart(file, tensors)
    return Header(file=file, keys=keys, tensors=tuple(tensors))


def _value(file: Path, data: _Bytes, key: str, *, kept: bool) -> Any:
    kind = data.number("<I")
    if kind in _SCALARS:
        return data.number(_SCALARS[kind])
    if kind == _STRING:
        return data.string().decode("utf-8", errors="replace")
    if kind != _ARRAY:
        raise refuse(file, f"key {key!r} has the type {kind}, of which nothing is known")
    item, count = data.number("<I"), data.number("<Q")
    if item in _SCALARS:
        nbytes = struct.calcsize(_SCALARS[item])
        if count > data.left // nbytes:
            raise refuse(file, f"key {key!r} declares {count} items; {data.left} bytes are left in the file")
        if kept:
            return [number for (number,) in struct.iter_unpack(_SCALARS[item], data.take(count * nbytes))]
        data.at += count * nbytes
    elif item == _STRING:
        if count > data.left // 8:
            raise refuse(
                file, f"key {key!r} declares {count} strings; {data.left} bytes are left in the file"
            )
        if kept:
            return [data.string().decode("utf-8", errors="replace") for _ in range(count)]
        for _ in range(count):
            data.string()
    else:
        raise refuse(file, f"key {key!r} is an array of the type {item}, which is not read")
    return Array(kind=item, count=count)


def _entry(file: Path, data: _Bytes) -> tuple[str, list[int], int, int]:
    name, rank = data.text(), data.number("<I")
    if not 1 <= rank <= 4:
        raise refuse(file, f"tensor {name!r} has {rank} dimensions; 1 to 4 are allowed")
    dimensions = [data.number("<Q") for _ in range(rank)]
    return name, dimensions, data.number("<I"), data.number("<Q")


def _stored(
    file: Path,
    name: str,
    dimensions: list[int],
    kind: int,
    offset: int,
    *,
    start: int,
    alignment: int,
    size: int,
) -> Stored:
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise refuse(file, f"tensor {name!r} has the type {kind}, of which nothing is known") from error
    block, block_nbytes = gguf.GGML_QUANT_SIZES[known]
    if 0 in dimensions:
        raise refuse(file, f"tensor {name!r} of dimensions {dimensions} has no elements")
    if dimensions[0] % block:
        raise refuse(
            file, f"tensor {name!r} has rows of {dimensions[0]}, no multiple of {known.name}'s {block}"
        )
    stored = Stored(
        name=name,
        kind=known,
        shape=tuple(reversed(dimensions)),
        offset=start + offset,
        row_nbytes=dimensions[0] // block * block_nbytes,
    )
    if offset % alignment or stored.offset + stored.nbytes > size:
        raise refuse(
            file,
            f"tensor {name!r} has {stored.nbytes} bytes at {stored.offset}; the file has {size}, "
            f"and tensors begin at multiples of {alignment}",
        )
    return stored


def _check_apart(file: Path, tensors: list[Stored]) -> None:
    """Raise BrokenInput where two tensors have one name or share bytes."""
    names: set[str] = set()
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda one: one.offset):
        if tensor.name in names:
            raise refuse(file, f"has the tensor {tensor.name!r} twice")
        names.add(tensor.name)
        if tensor.offset < end:
            raise refuse(file, f"tensor {tensor.name!r} overlaps {before!r}")
        end, before = tensor.offset + tensor.nbytes, tensor.name


def read_rows(
    file: Path, tensor: Stored, *, step: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """The stored bytes of a tensor's rows `start` to `stop`, `step` rows at a time, each with the number of
    its first row.
    """
    end = tensor.rows if stop is None else stop
    descriptor = open_regular(file)
    try:
        for row in range(start, end, step):
            nbytes = min(step, end - row) * tensor.row_nbytes
            data = os.pread(descriptor, nbytes, tensor.offset + row * tensor.row_nbytes)
            if len(data) != nbytes:
                raise refuse(file, f"ends within tensor {tensor.name!r}")
            yield row, data
    finally:
        os.close(descriptor)


def refuse(file: Path, reason: str) -> BrokenInput:
    """The error for a GGUF file that is not as it should be."""
    return BrokenInput(f"{file}: {reason}. It is cut short, damaged or made to mislead: fetch it again.")
