"""Which safetensors files a directory holds, and what their headers declare."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch

from memfit.errors import BrokenInput
from memfit.source.checkpoint import SafetensorsCheckpoint, TensorInfo, open_regular

HEADER_NBYTES_MAX: Final = 100_000_000
"""The format's own limit for a header."""
STEMS: Final = ("model", "memfit")
"""What a checkpoint's files are named after; memfit's own where no other program is to find them."""
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip


def open_checkpoint(directory: Path) -> SafetensorsCheckpoint | None:
    """The checkpoint in `directory`; None where there are no weights at all.

    Raises:
        BrokenInput: weights as pickles only, a broken or lying header or index, a file outside the directory.
    """
    for stem in STEMS:
        single = directory / f"{stem}.safetensors"
        if single.is_symlink() or single.exists():  # before an index, as transformers looks
            return SafetensorsCheckpoint(tensors=_by_name(read_header(check_within(single, directory))))
        index = directory / f"{stem}.safetensors.index.json"
        if index.is_symlink() or index.exists():
            return _open_sharded(directory, index)
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(others) == 1:
        return SafetensorsCheckpoint(
            tensors=_by_name(read_header(check_within(directory / others[0], directory)))
        )
    if others:
        raise BrokenInput(
            f"{directory}: has {', '.join(others[:4])} and neither model.safetensors nor "
            "model.safetensors.index.json that would say which tensor is where. Fetch the index too."
        )
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    pickles = [name for name in pickles if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if pickles:
        raise BrokenInput(
            f"{directory / pickles[0]}: is a pickle or another format that memfit does not read, and "
            "there are no "
            "safetensors beside it. A pickle can run any code when read. Convert it where you trust it: "
            "from_pretrained(...).save_pretrained(...) writes safetensors."
        )
    return None


def check_within(file: Path, directory: Path) -> Path:
    """`file`, if what it leads to lies in `directory`, or in the blobs of the same model in a hub cache.

    The hub's cache is `models--x/snapshots/<revision>/<file>`, each a link to `models--x/blobs/<hash>`.
    """
    root, target = directory.resolve(), file.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise BrokenInput(
            f"{file}: leads to {target}, outside of the model's directory. Copy the file into {directory}."
        )
    return file


def _open_sharded(directory: Path, index: Path) -> SafetensorsCheckpoint:
    raw = read_json(check_within(index, directory))
    places = raw.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BrokenInput(f"{index}: has no 'weight_map' from tensors to files. Fetch it again.")
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, dict[str, TensorInfo]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise BrokenInput(
                f"{index}: places tensor {name!r} in {file!r}, which is no name of a safetensors file "
                "in this "
                "directory. An index may not lead out of it. Do not trust this checkpoint."
            )
        if file not in shards:
            path = directory / file
            if not path.exists():
                raise BrokenInput(f"{path}: is missing; {index.name} places {name!r} in it. Fetch the shard.")
            shards[file] = _by_name(read_header(check_within(path, directory)))
        if name not in shards[file]:
            raise BrokenInput(
                f"{directory / file}: has no tensor {name!r}, which {index.name} places there. "
                "Index and shards do not belong together: fetch both again."
            )
        tensors[name] = shards[file][name]
    for file, held in shards.items():
        for name in held:
            if name not in tensors or tensors[name] is not held[name]:
                raise BrokenInput(
                    f"{directory / file}: tensor {name!r} is not placed there by {index.name}. "
                    "Index and shards do not belong together: fetch both again."
                )
    return SafetensorsCheckpoint(tensors=tensors)


def _is_plain(file: str) -> bool:
    """A bare file name: no folders, no way up, no absolute path, on any system."""
    return file.endswith(".safetensors") and not any(part in file for part in ("/", "\\", ":", "\0"))


def _by_name(infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    return {info.name: info for info in infos}


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors that one safetensors file declares, in the order of their bytes.

    Raises:
        BrokenInput: anything at all that is not as the format says: see `_refuse` for each reason.
    """
    descriptor = open_regular(file)
    try:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise _refuse(file, f"is {size} bytes long, too short for any tensor")
        header_nbytes = int.from_bytes(_pread(descriptor, file, 8, 0), "little")
        if header_nbytes > min(HEADER_NBYTES_MAX, size - 8):
            raise _refuse(
                file,
                f"declares a header of {header_nbytes} bytes; the file has {size - 8} after its first 8, "
                f"and {HEADER_NBYTES_MAX} are allowed",
            )
        raw = parse_json(_pread(descriptor, file, header_nbytes, 8), file)
    finally:
        os.close(descriptor)
    infos = [
        _tensor(file, name, entry, data_start=8 + header_nbytes)
        for name, entry in raw.items()
        if name != "__metadata__"
    ]
    if not infos:
        raise _refuse(file, "declares no tensor")
    infos.sort(key=lambda info: info.offset)
    at = 8 + header_nbytes
    for info in infos:
        if info.offset != at:
            what = (
                "overlaps the tensor before it"
                if info.offset < at
                else f"leaves a hole of {info.offset - at} bytes"
            )
            raise _refuse(file, f"tensor {info.name!r} {what}")
        at += info.nbytes
    if at != size:
        reason = (
            f"ends {at - size} bytes before its last tensor"
            if at > size
            else f"has {size - at} bytes too many"
        )
        raise _refuse(file, f"{reason} ({infos[-1].name!r})")
    return infos


def _tensor(file: Path, name: str, entry: Any, *, data_start: int) -> TensorInfo:
    """One entry of a header, checked by itself: keys, dtype, shape, and a size that equals shape times
    dtype.
    """
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(file, f"tensor {name!r} is not described by dtype, shape and data_offsets alone")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise _refuse(file, f"tensor {name!r} has the dtype {entry['dtype']!r}, of which nothing is known")
    dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > 16:
        raise _refuse(file, f"tensor {name!r} has no valid shape: {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _refuse(file, f"tensor {name!r} has no valid data_offsets: {str(offsets)[:80]}")
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        raise _refuse(file, f"tensor {name!r} of shape {shape} has no elements")
    if end - begin != nbytes:
        raise _refuse(
            file,
            f"tensor {name!r}: shape {shape} of {entry['dtype']} needs {nbytes} bytes, and has {end - begin}",
        )
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), nbytes=nbytes, file=file, offset=data_start + begin
    )


def _are_sizes(value: Any) -> bool:
    # bool is an int to Python, and not to the format
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _refuse(file: Path, reason: str) -> BrokenInput:
    return BrokenInput(f"{file}: {reason}. It is cut short, damaged or made to mislead: fetch it again.")


def _pread(descriptor: int, file: Path, nbytes: int, offset: int) -> bytes:
    data = os.pread(descriptor, nbytes, offset)
    if len(data) != nbytes:
        raise _refuse(file, "ends within its header")
    return data


def read_json(file: Path, *, limit: int = HEADER_NBYTES_MAX) -> dict[str, Any]:
    """The one JSON object in a file. Raises BrokenInput for anything else, doubled keys included."""
    descriptor = open_regular(file)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise BrokenInput(f"{file}: is {size} bytes of JSON; {limit} are allowed. Look at what it holds.")
        data = _pread(descriptor, file, size, 0)
    finally:
        os.close(descriptor)
    return parse_json(data, file)


def parse_json(data: bytes, file: Path) -> dict[str, Any]:
    """The one JSON object in `data`; `file` is for the message."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(pairs)
        if len(unique) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise BrokenInput(
                f"{file}: the key {double!r} stands there twice, and one would hide the other. Remove one."
            )
        return unique

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise BrokenInput(f"{file}: is no valid JSON ({str(error)[:120]}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise BrokenInput(
            f"{file}: holds a JSON {type(value).__name__} where an object was due. Fetch it again."
        )
    return value
