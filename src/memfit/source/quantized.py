"""Checkpoints that GPTQ and AWQ tools wrote, as sources: their weights are unpacked as they are read.

A weight [N, K] is stored by its inputs: integers q [K, N], and for each group of inputs scales s [G, N] and zero
points z [G, N], which stand for

    w[n, k] = (q[k, n] − z[g, n]) · s[g, n]          g = g_idx[k], or k // group

computed in the scales' own dtype, as AutoGPTQ's, GPTQModel's and AutoAWQ's plain kernels do it. Fields of b bits fill
int32 words from their lowest bits on; 32 fields of 3 bits fill three words.

    gptq   qweight [K·b/32, N] packed along K, qzeros [G, N·b/32] along N, scales [G, N], g_idx [K]; b of 2, 3, 4, 8.
           Format `gptq` keeps z − 1 (0 as all ones), `gptq_v2` keeps z.
    awq    qweight [K, N/8] and qzeros [G, N/8], both along N, 4 bits; the fields of a word are the outputs
           0 2 4 6 1 3 5 7. This is AutoAWQ's `gemm`; its other versions are refused.

They run as the dense weights that they stand for: as 16 bits in every account and plan. A plan packs them anew.

Legend of shapes: N outputs, K inputs, G groups, U groups met in a tile.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from memfit.errors import BrokenInput
from memfit.packed.fake import is_fake
from memfit.source.checkpoint import BLOCK_NBYTES, SafetensorsCheckpoint, TensorInfo, bytes_of, open_regular
from memfit.source.safetensors import check_within, read_json

Numbers = np.ndarray[Any, np.dtype[Any]]

METHODS: Final = ("gptq", "awq")
_TILE_NUMBERS: Final = 1 << 18
"""Numbers unpacked at a time: 1 MiB in float32, in about five buffers. All in numpy, as torch's bytes are predicted."""
_TILE_OUTPUTS: Final = 8192
_FIELDS: Final = 32
"""Tiles begin and end at multiples of this many outputs and inputs, whole words at any width."""
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")

_TOLD: Final = {
    "quant_method", "bits", "w_bit", "group_size", "q_group_size", "desc_act", "sym", "zero_point", "format",
    "checkpoint_format", "version", "pack_dtype", "dynamic", "is_marlin_format", "adapter", "lm_head",
}  # fmt: skip
# What says how the integers were found, or how some kernel should run them; not what they mean.
_HARMLESS: Final = {
    "damp_percent", "damp_auto_increment", "act_group_aware", "true_sequential", "static_groups", "meta",
    "quantizer", "uri", "mse", "backend", "tokenizer", "dataset", "model_seqlen", "block_name_to_quantize",
    "module_name_preceding_first_block", "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs",
    "modules_in_block_to_quantize", "modules_to_not_convert", "model_name_or_path", "model_file_base_name",
    "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "do_fuse", "modules_to_fuse",
    "fuse_max_seq_len", "parallel_packing",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a quantization_config says of the stored integers, checked."""

    method: str
    bits: int
    group: int
    """Inputs of a group; −1: all of them."""
    added: int
    """To every stored zero point, modulo 2^bits."""
    ordered: bool
    """Whether groups may lie in any order, so that g_idx is needed."""


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """One weight, and the stored tensors that it is made of."""

    values: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    group_of: TensorInfo | None
    info: TensorInfo
    """The weight as it is read."""


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    """A checkpoint of GPTQ or AWQ under the names and shapes of the dense weights that it stands for."""

    tensors: Mapping[str, TensorInfo]
    stored: SafetensorsCheckpoint
    weights: Mapping[str, Unpacked]
    declared: Declared

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, out)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self.weights:
            return self.stored.read_rows(name, start, stop)
        info = self.tensors[name]
        out = torch.empty((stop - start, info.shape[-1]), dtype=info.dtype)
        self._fill(name, out, start)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        if name not in self.weights:
            self.stored.read_into(name, out)
            return
        if not out.is_contiguous() or out.shape != self.tensors[name].shape:
            raise ValueError(f"{name} is {self.tensors[name].shape}; it cannot fill {tuple(out.shape)}")
        self._fill(name, out, 0)

    def blocks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor as it is read, a block at a time: for comparing and hashing."""
        if name not in self.weights:
            yield from self.stored.blocks(name)
            return
        rows, width = self.tensors[name].shape
        step = max(1, BLOCK_NBYTES // (width * self.tensors[name].dtype.itemsize))
        for start in range(0, rows, step):
            yield bytes_of(self.read_rows(name, start, min(rows, start + step))).tobytes()

    def is_zero_bias(self, name: str) -> bool:
        """Whether `name` is the bias of a quantized module, and 0: AutoGPTQ gave one to layers that had none."""
        module, _, part = name.rpartition(".")
        if part != "bias" or f"{module}.weight" not in self.weights:
            return False
        return not any(any(block) for block in self.stored.blocks(name))

    def _fill(self, name: str, out: torch.Tensor, start: int) -> None:
        """Fill `out` [rows, K] with the weight's rows from `start` on."""
        if is_fake(out):
            return
        one = self.weights[name]
        (outputs, inputs), stop = one.info.shape, start + out.shape[0]
        wide = min(_TILE_OUTPUTS, outputs)
        deep = max(_FIELDS, _TILE_NUMBERS // wide // _FIELDS * _FIELDS)
        first = start - start % _FIELDS
        with _Files() as files:
            group_K = self._groups(files, one, inputs)
            for left in range(first, stop, wide):
                right = min(left + wide, -(-stop // _FIELDS) * _FIELDS, outputs)
                for top in range(0, inputs, deep):
                    bottom = min(top + deep, inputs)
                    numbers_KN = self._tile(files, one, group_K[top:bottom], (top, bottom), (left, right))
                    held = slice(max(left, start), min(right, stop))
                    numbers_NK = np.ascontiguousarray(numbers_KN.T[held.start - left : held.stop - left])
                    part = out[held.start - start : held.stop - start, top:bottom]
                    part.copy_(torch.from_numpy(numbers_NK))

    def _groups(self, files: "_Files", one: Unpacked, inputs: int) -> Numbers:
        """The group of each input [K]."""
        groups = one.scales.shape[0]
        if one.group_of is None:
            size = self.declared.group if self.declared.group > 0 else inputs
            return np.arange(inputs) // size
        group_K = files.integers(one.group_of)
        if group_K.min() < 0 or group_K.max() >= groups:
            wrong = int(np.argmax((group_K < 0) | (group_K >= groups)))
            raise _refuse(
                one.group_of.file,
                f"tensor {one.group_of.name!r} puts input {wrong} into group {group_K[wrong]}; there are {groups}",
            )
        return group_K

    def _tile(
        self, files: "_Files", one: Unpacked, group_K: Numbers, ks: tuple[int, int], ns: tuple[int, int]
    ) -> Numbers:
        """Weights [K, N] of some inputs and outputs, float32, rounded to the scales' dtype."""
        bits, mask = self.declared.bits, (1 << self.declared.bits) - 1
        words_of = (ns[0] * bits // 32, ns[1] * bits // 32)
        if self.declared.method == "awq":
            order: tuple[int, ...] | None = _AWQ_ORDER
            q_KN = _fields(files.words(one.values, ks, words_of).T, bits, order).T
        else:
            order = None
            q_KN = _fields(files.words(one.values, (ks[0] * bits // 32, ks[1] * bits // 32), ns), bits)
        met, group_K = np.unique(group_K, return_inverse=True)
        packed_UW = np.concatenate([files.words(one.zeros, (g, g + 1), words_of) for g in met])
        z_UN = (_fields(packed_UW.T, bits, order).T.astype(np.int16) + self.declared.added) & mask
        s_UN = np.concatenate([files.floats(one.scales, g, ns) for g in met])
        numbers: Numbers = q_KN.astype(np.float32)
        numbers -= z_UN[group_K]
        numbers *= s_UN[group_K]  # exact: at most 11 and 9 bits, if the scales are of 16
        numbers = _rounded(numbers, one.info.dtype)
        if not np.isfinite(numbers).all():
            raise BrokenInput(
                f"{one.scales.file}: tensor {one.scales.name!r} makes weights that are NaN or infinite, so the model "
                "would answer nonsense. Fetch the file again."
            )
        return numbers


class _Files:
    """Descriptors of the files that one weight lies in."""

    def __init__(self) -> None:
        self.open: dict[Path, int] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *args: object) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)

    def words(self, info: TensorInfo, rows: tuple[int, int], columns: tuple[int, int]) -> Numbers:
        """Rows and columns of a stored int32 matrix, as uint32."""
        width = info.shape[1]
        if columns == (0, width):
            raw = self._bytes(info, rows[0] * width * 4, (rows[1] - rows[0]) * width * 4)
        else:
            cut = (columns[1] - columns[0]) * 4
            raw = b"".join(self._bytes(info, (row * width + columns[0]) * 4, cut) for row in range(*rows))
        return np.frombuffer(raw, "<u4").reshape(rows[1] - rows[0], -1)

    def floats(self, info: TensorInfo, row: int, columns: tuple[int, int]) -> Numbers:
        """Columns of one row [1, N] of a stored matrix of floats, in float32."""
        size = info.dtype.itemsize
        raw = self._bytes(info, (row * info.shape[1] + columns[0]) * size, (columns[1] - columns[0]) * size)
        if info.dtype == torch.bfloat16:
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)[None]
        form = "<f2" if info.dtype == torch.float16 else "<f4"
        return np.frombuffer(raw, form).astype(np.float32)[None]

    def integers(self, info: TensorInfo) -> Numbers:
        """A stored vector of int32 or int64."""
        return np.frombuffer(self._bytes(info, 0, info.nbytes), "<i4" if info.dtype == torch.int32 else "<i8")

    def _bytes(self, info: TensorInfo, offset: int, nbytes: int) -> bytes:
        if info.file not in self.open:
            self.open[info.file] = open_regular(info.file)
        data = os.pread(self.open[info.file], nbytes, info.offset + offset)
        if len(data) != nbytes:
            raise _refuse(info.file, f"ends within tensor {info.name!r}")
        return data


def _fields(words_WR: Numbers, bits: int, order: tuple[int, ...] | None = None) -> Numbers:
    """The fields of columns of words, uint8 [W · 32/bits, R]; `order`: which output each field of a word is."""
    whole = math.lcm(32, bits)
    count, each = whole // bits, whole // 32
    words = words_WR.reshape(-1, each, words_WR.shape[1])
    out: Numbers = np.empty((words.shape[0], count, words.shape[2]), dtype=np.uint8)
    for field in range(count):
        word, shift = divmod(field * bits, 32)
        found = words[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            found = found | words[:, word + 1] << np.uint32(32 - shift)
        out[:, field if order is None else order[field]] = found & np.uint32((1 << bits) - 1)
    return out.reshape(-1, words.shape[2])


def _rounded(numbers: Numbers, dtype: torch.dtype) -> Numbers:
    """float32 rounded to the nearest of `dtype`, ties to even; still float32."""
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16).astype(np.float32)
    if dtype == torch.bfloat16:
        raw = numbers.view(np.uint32)
        rounded: Numbers = ((raw + (0x7FFF + (raw >> 16 & 1))) >> 16 << 16).view(np.float32)
        return rounded
    return numbers


def quantization_of(directory: Path, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Any:
    """The quantization_config of a model; AutoGPTQ and AutoAWQ once kept it in a file beside config.json."""
    given = raw.get("quantization_config")
    if given is not None or not any(name.endswith(".qweight") for name in tensors):
        return given
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        file = directory / name
        if file.is_file() or file.is_symlink():
            return {"quant_method": method} | read_json(check_within(file, directory), limit=1 << 20)
    return None


def unpack(quantization: Mapping[str, Any], stored: SafetensorsCheckpoint, *, file: Path) -> QuantizedCheckpoint:
    """The checkpoint of dense weights that `stored` stands for; nothing is read yet.

    Args:
        quantization: what `quantization_of` gave, its method one of `METHODS`.
        stored: the checkpoint as it lies on the disk.
        file: for messages: where `quantization` is from.

    Raises:
        BrokenInput: a setting that memfit does not read, a part that is missing, or of another shape or dtype.
    """
    declared = _declared(quantization, file)
    tensors = dict(stored.tensors)
    weights: dict[str, Unpacked] = {}
    for name, values in stored.tensors.items():
        module, _, part = name.rpartition(".")
        if part != "qweight":
            continue
        parts = {part: tensors.pop(f"{module}.{part}", None) for part in _PARTS}
        weight = f"{module}.weight"
        if weight in stored.tensors:
            raise _refuse(values.file, f"has both {weight!r} and {name!r}, and they may differ")
        weights[weight] = _checked(module, parts, declared, values.file)
        tensors[weight] = weights[weight].info
    if not weights:
        raise _refuse(file, f"declares a model quantized by {declared.method}, and no tensor ends in .qweight")
    return QuantizedCheckpoint(tensors=tensors, stored=stored, weights=weights, declared=declared)


def _declared(given: Mapping[str, Any], file: Path) -> Declared:
    method = given["quant_method"]
    for key in sorted(given):
        if key not in _TOLD | _HARMLESS:
            raise _unread(file, f"quantization_config.{key} = {given[key]!r:.80}, of which memfit knows nothing")
    bits = given.get("bits", given.get("w_bit", 4 if method == "awq" else None))
    group = given.get("group_size", given.get("q_group_size", 128))
    allowed = (4,) if method == "awq" else (2, 3, 4, 8)
    if type(bits) is not int or bits not in allowed:
        raise _unread(file, f"{method} of {bits!r} bits; {', '.join(map(str, allowed))} are read")
    if type(group) is not int or not (group == -1 or group > 0):
        raise _unread(file, f"a group_size of {group!r}; a number of inputs, or -1 for all, was due")
    if given.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise _unread(file, f"integers packed into {given['pack_dtype']!r}; int32 is read")
    # Entries that begin with "-" leave modules as they were, which their tensors show.
    changed = [key for key in given.get("dynamic") or {} if not str(key).startswith("-")]
    if changed:
        raise _unread(file, f"other settings for the modules {changed[0]!r} (dynamic)")
    for key in ("is_marlin_format", "adapter"):
        if given.get(key):
            raise _unread(file, f"{key} = {given[key]!r:.80}")
    if method == "awq":
        layout = str(given.get("version", given.get("format", "gemm"))).lower()
        if layout != "gemm" or given.get("backend") == "llm-awq":
            layout = "llm-awq" if layout == "gemm" else layout
            raise _unread(file, f"AWQ in the layout {layout!r}; gemm is read")
        if given.get("zero_point", True) is not True:
            raise _unread(file, "AWQ without zero points; those of gemm have them")
        return Declared(method=method, bits=bits, group=group, added=0, ordered=False)
    layout = str(given.get("checkpoint_format") or given.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise _unread(file, f"GPTQ in the layout {layout!r}; gptq and gptq_v2 are read")
    ordered = given.get("desc_act", False)
    return Declared(method=method, bits=bits, group=group, added=int(layout == "gptq"), ordered=bool(ordered))


def _checked(module: str, parts: Mapping[str, TensorInfo | None], declared: Declared, file: Path) -> Unpacked:
    """One weight's parts, of shapes that belong to each other."""
    values, zeros, scales, group_of = (parts[part] for part in _PARTS)
    assert values is not None
    if declared.method == "awq" and group_of is not None:
        raise _refuse(file, f"tensor {group_of.name!r} is there, and AWQ has no order of inputs")
    for part, info in (("qzeros", zeros), ("scales", scales)):
        if info is None:
            raise _refuse(file, f"tensor {f'{module}.{part}'!r} is missing, which belongs to {values.name!r}")
    assert zeros is not None and scales is not None
    if group_of is None and declared.ordered:
        raise _refuse(file, f"tensor {f'{module}.g_idx'!r} is missing, and desc_act says that it is needed")
    for info in (values, zeros):
        _require(info, dtypes=(torch.int32,), rank=2)
    _require(scales, dtypes=(torch.float16, torch.bfloat16, torch.float32), rank=2)
    bits = declared.bits
    along = (values.shape[0], values.shape[1]) if declared.method == "gptq" else (values.shape[1], values.shape[0])
    packed, other = along
    if packed * 32 % bits:
        raise _refuse(values.file, f"tensor {values.name!r} {values.shape} holds no whole fields of {bits} bits")
    inputs, outputs = (packed * 32 // bits, other) if declared.method == "gptq" else (other, packed * 32 // bits)
    groups = math.ceil(inputs / declared.group) if declared.group > 0 else 1
    if outputs * bits % 32:
        raise _refuse(values.file, f"tensor {values.name!r} is of {outputs} outputs, whose zeros fill no whole words")
    due: dict[TensorInfo, tuple[int, ...]] = {zeros: (groups, outputs * bits // 32), scales: (groups, outputs)}
    if group_of is not None:
        _require(group_of, dtypes=(torch.int32, torch.int64), rank=1)
        due[group_of] = (inputs,)
    for info, shape in due.items():
        if info.shape != shape:
            raise _refuse(
                info.file,
                f"tensor {info.name!r} has the shape {info.shape}; {values.name!r} {values.shape} in groups of "
                f"{declared.group} takes {shape}",
            )
    info = TensorInfo(
        name=f"{module}.weight", dtype=scales.dtype, shape=(outputs, inputs),
        nbytes=outputs * inputs * scales.dtype.itemsize, file=values.file,
    )  # fmt: skip
    return Unpacked(values=values, zeros=zeros, scales=scales, group_of=group_of, info=info)


def _require(info: TensorInfo, *, dtypes: tuple[torch.dtype, ...], rank: int) -> None:
    if info.dtype not in dtypes or len(info.shape) != rank:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise _refuse(
            info.file, f"tensor {info.name!r} is {info.dtype} {info.shape}; {names} of {rank} dimensions was due"
        )


def _refuse(file: Path, reason: str) -> BrokenInput:
    return BrokenInput(f"{file}: {reason}. Config and weights do not belong together: fetch both again.")


def _unread(file: Path, reason: str) -> BrokenInput:
    return BrokenInput(f"{file}: declares {reason}. Take the unquantized checkpoint and let memfit quantize it.")
