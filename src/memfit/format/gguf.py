"""Writing a GGUF file: keys and tensors' places first, then each tensor, some rows at a time, as its blocks.

The file appears whole or not at all: it is built beside its place, under a name of its own, and renamed at the end.
"""

import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import gguf
import numpy as np
import torch
from torch import Tensor

from memfit.account.watch import Unwatched, Watch
from memfit.errors import MemfitError, UsageError, disk_full
from memfit.format.gguf_mixture import PLAIN, Stack, checked_types, file_type, type_nbytes, type_of
from memfit.format.gguf_model import (
    Place,
    architecture_of,
    as_stored,
    in_order,
    keys_of,
    places_of,
    rope_frequencies,
)
from memfit.format.gguf_rounding import encode_layers
from memfit.format.gguf_tokenizer import add_tokenizer
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.source import Source, check
from memfit.source.checkpoint import bytes_of
from memfit.source.layout import Piece
from memfit.technique.gguf_blocks import encode
from memfit.units import format_size

ROWS_NUMBERS: Final = 1 << 22
"""Numbers of a tensor read, and held in float32, at a time: 16 MiB."""
_ALIGNMENT: Final = 32
_LARGEST_HALF: Final = 65504.0


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of a file that is to be written."""

    place: Place
    kind: str
    """Its type: a block type's name, F32, F16 or BF16."""

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def nbytes(self) -> int:
        return type_nbytes(self.kind, self.place.shape)


def gguf_tensors(
    source: Source, *, mixture: str = "Q4_K_M", types: Mapping[str, str] | None = None, important: bool = False
) -> tuple[GgufTensor, ...]:
    """The tensors that a file will hold, in its order; no weight is read.

    Args:
        source: safetensors with a config.
        mixture: llama.cpp's name of one (`gguf_mixture.MIXTURES`).
        types: of single tensors, by their names in GGUF; they win over the mixture.
        important: whether importances will be given, which decides one rule of Q4_0.

    Raises:
        UsageError: an architecture, a mixture or a type that is not written.
    """
    places, config = places_of(source), source.config
    shapes = {place.name: place.shape for place in places}
    checked_types(types or {}, shapes)
    heads = config.num_attention_heads
    stack = Stack(
        layers=config.num_hidden_layers,
        heads_a_key=heads // (getattr(config, "num_key_value_heads", None) or heads),
        tied="output.weight" not in shapes,
        important=important,
    )
    chosen = {place.name: type_of(place.name, place.shape, mixture, stack) for place in places} | dict(types or {})
    return tuple(GgufTensor(place=place, kind=chosen[place.name]) for place in places)


def write_gguf(
    source: Source,
    target: Path,
    *,
    mixture: str = "Q4_K_M",
    types: Mapping[str, str] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    windows_WT: Tensor | None = None,
    batch: int = 4,
    watch: Watch | None = None,
    overwrite: bool = False,
    dry: bool = False,
) -> tuple[GgufTensor, ...]:
    """Write the model of `source` as one GGUF file; what was written.

    Beyond the header, some rows of one tensor are in memory at a time; with a text, one block of the model, what comes
    out of it, and the moments of its inputs. On fake tensors the same lines run.

    Args:
        source: safetensors with a config and a tokenizer.
        target: the file.
        mixture: see `gguf_tensors`.
        types: see `gguf_tensors`.
        importance: mean squares of a linear layer's inputs [columns], by the layer's name in the model. A tied
            embedding takes those of the head; what has none is weighed evenly.
        windows_WT: token ids of a text: the layers of the model's blocks are encoded by GPTQ for it, see
            `gguf_rounding`. None: every weight by itself.
        batch: windows that go through a block at once.
        watch: is told the phases `encode` and `write`.
        overwrite: whether a file may be there.
        dry: make every tensor and write nothing.

    Raises:
        UsageError: the source, a type or the target is not fit for it.
        BrokenInput: the source's files are not as they should be.
        MemfitError: the disk has less room than the file takes.
    """
    check(source)
    watch = watch or Unwatched()
    weights = dict(importance or {})
    tensors = gguf_tensors(source, mixture=mixture, types=types, important=bool(weights))
    made = _Made(source, tensors, weights, windows_WT, batch, watch)
    if dry:
        made.all(lambda tensor, parts: None)
        return tensors
    writer = gguf.GGUFWriter(None, architecture_of(source))
    _add_keys(writer, source, mixture)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        # float32 here says that the shape counts numbers and not bytes.
        writer.add_tensor_info(tensor.name, tensor.place.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    with _whole(target, sum(tensor.nbytes for tensor in tensors), overwrite=overwrite) as partial:
        writer.write_header_to_file(path=partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with partial.open("r+b") as file:
            ends = list(itertools.accumulate((_padded(tensor.nbytes) for tensor in tensors), initial=_end_of(file)))
            starts = {tensor.name: start for tensor, start in zip(tensors, ends, strict=False)}
            file.truncate(ends[-1])

            def put(tensor: GgufTensor, part: Tensor) -> None:
                file.seek(starts[tensor.name])
                starts[tensor.name] += file.write(memoryview(bytes_of(part)))  # type: ignore[arg-type]  # a buffer

            made.all(put)
            file.flush()
            os.fsync(file.fileno())
    return tensors


@dataclass(frozen=True)
class _Made:
    """All tensors as they are stored, made one after the other."""

    source: Source
    tensors: tuple[GgufTensor, ...]
    importance: Mapping[str, Tensor]
    windows_WT: Tensor | None
    batch: int
    watch: Watch

    def all(self, put: Callable[[GgufTensor, Tensor], None]) -> None:
        """Hand each tensor to `put`, in pieces that follow each other; those of the model's blocks first."""
        done: set[str] = set()
        if self.windows_WT is not None:
            layers = {
                tensor.place.parameter.removesuffix(".weight"): tensor
                for tensor in self.tensors
                if tensor.place.parameter is not None and tensor.kind not in PLAIN and not tensor.place.shift
            }

            def keep(layer: str, packed: Tensor) -> None:
                done.add(layers[layer].name)
                put(layers[layer], in_order(packed, layers[layer].place))

            kinds = {layer: tensor.kind for layer, tensor in layers.items()}
            encode_layers(self.source, self.windows_WT, kinds, keep, batch=self.batch, watch=self.watch)
        with self.watch.phase("write"):
            for tensor in self.tensors:
                if tensor.name not in done:
                    for part in _parts(self.source, tensor, _importance_of(self.source, tensor, self.importance)):
                        put(tensor, part)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _end_of(file: BinaryIO) -> int:
    """Where the first tensor begins."""
    return _padded(file.seek(0, os.SEEK_END))


def _add_keys(writer: Any, source: Source, mixture: str) -> None:
    writer.add_type("model")
    writer.add_name(source.stem)
    for key, value in keys_of(source).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    writer.add_file_type(file_type(mixture))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, source, rows=source.config.vocab_size)


def _importance_of(source: Source, tensor: GgufTensor, weights: Mapping[str, Tensor]) -> Tensor | None:
    """[columns]; None where all count alike."""
    if tensor.place.parameter is None:
        return None
    module = tensor.place.parameter.removesuffix(".weight")
    if tensor.name != "token_embd.weight":
        return weights.get(module)
    # An embedding's own statistics are of its rows. As a head it has inputs, under the name that is tied to it.
    for name, (_, _, first) in source.parameters.items():
        if first == tensor.place.parameter != name and name.removesuffix(".weight") in weights:
            return weights[name.removesuffix(".weight")]
    return None


def _parts(source: Source, tensor: GgufTensor, importance: Tensor | None) -> Iterator[Tensor]:
    """A tensor as it is stored, in pieces."""
    for rows in _rows(source, tensor.place):
        try:
            packed = _packed(as_stored(rows, tensor.place), tensor.kind, importance)
        except UsageError as error:
            raise UsageError(f"{tensor.name}: {error}") from error
        yield packed.contiguous()


def _packed(rows: Tensor, kind: str, importance: Tensor | None) -> Tensor:
    if kind not in PLAIN:
        return encode(rows, kind, importance=importance)
    if kind == "F16" and not is_fake(rows) and float(rows.abs().max()) > _LARGEST_HALF:
        raise UsageError(f"has entries beyond {_LARGEST_HALF:.0f}, which F16 cannot hold. Take BF16 or F32.")
    return rows.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])


def _rows(source: Source, place: Place) -> Iterator[Tensor]:
    """A parameter some rows at a time, whole heads together; a vector as it is."""
    if place.parameter is None:
        made = rope_frequencies(source.config)
        assert made is not None
        yield made
        return
    piece = _only_piece(source, place.parameter)
    if len(place.shape) != 2 or piece is None or source.checkpoint is None:
        yield source.read_parameter(place.parameter, dtype=torch.float32)
        return
    step = max(ROWS_NUMBERS // place.shape[1], 1)
    if place.heads:
        head = place.shape[0] // place.heads
        step = -(-step // head) * head
    for start in blocks_to_run(range(0, place.shape[0], step)):
        yield source.checkpoint.read_rows(piece.tensor, start, min(start + step, place.shape[0]))


def _only_piece(source: Source, parameter: str) -> Piece | None:
    """The stored tensor that a parameter is; None where it is put together from several."""
    pieces = source.layout.pieces.get(source.parameters[parameter][2], ())
    if len(pieces) != 1 or pieces[0].index is not None or pieces[0].start is not None:
        return None
    return pieces[0]


def require_place(target: Path, *, overwrite: bool) -> None:
    """Raise UsageError where a file may not be written: a directory is there, or a file that is not to be replaced."""
    if target.is_dir():
        raise UsageError(f"{target} is a directory, and the output is a file. Choose another place (--out).")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists. Choose another place (--out), or overwrite it (--overwrite).")


@contextmanager
def _whole(target: Path, nbytes: int, *, overwrite: bool) -> Iterator[Path]:
    """A place beside `target` to build it in; at the end it gets its name, on an error it goes.

    The lock tells a run that still writes from what a killed one left, which is written over.
    """
    require_place(target, overwrite=overwrite)
    target = target.resolve()
    partial = target.with_name(f".{target.name}.memfit-partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise MemfitError(f"{target.parent}: cannot write here ({error.strerror}). Choose another place.") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{target}: another run is writing it. Wait for it, or choose another place.") from error
        try:
            free = shutil.disk_usage(target.parent).free
            if free < nbytes:
                raise MemfitError(
                    f"{target.parent}: {format_size(free)} free, {format_size(nbytes)} needed for the weights. "
                    "Free some space or write to another disk."
                )
            yield partial
            partial.replace(target)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and (clear := disk_full(error, target.parent)):
                raise clear from error
            raise
    finally:
        os.close(lock)
