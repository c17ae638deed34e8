"""A model before it is loaded: what it is, where its weights are, and how each of them is read."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

from memfit import demo
from memfit.errors import BrokenInput, UsageError
from memfit.packed.fake import is_fake
from memfit.packed.forms import FORM_PARTS, Form
from memfit.packed.levels import part_of
from memfit.source.chance import random_checkpoint
from memfit.source.checkpoint import Checkpoint, TensorInfo
from memfit.source.configuration import parse_schemes, read_config
from memfit.source.layout import Layout, check_pieces, lay_out
from memfit.source.quantized import METHODS, quantization_of, unpack
from memfit.source.safetensors import check_within, open_checkpoint, read_json
from memfit.source.skeleton import build_skeleton, config_dtype, tie_modules, ties_of

DEMO = "demo"
"""Names the demo model, unless a directory of that name is here."""
PACKED_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_codebook", *FORM_PARTS)
"""What compressed-tensors, or memfit itself, stores for a quantized module, in place of `weight`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model that can be built without its weights and read one parameter at a time."""

    name: str
    directory: Path | None
    config: PretrainedConfig
    checkpoint: Checkpoint | None
    """None: there are no weights, only a config."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """config.json as it stands, where there is one."""
    gguf: Path | None = None
    """The GGUF file that this is, if it is one."""

    @property
    def stem(self) -> str:
        """What the model is called where its output is named after it."""
        name = self.gguf.stem if self.gguf is not None else Path(self.name).name
        return DEMO if self.is_demo else name

    @property
    def is_demo(self) -> bool:
        """Whether it is the demo model, for which there is text."""
        return self.directory == demo.model_directory()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What the checkpoint stores, by stored name; empty without one."""
        return {} if self.checkpoint is None else self.checkpoint.tensors

    @cached_property
    def dtype(self) -> torch.dtype:
        """The float dtype that holds most of the checkpoint's bytes; the config's own where that is
        unknown.
        """
        nbytes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
        if nbytes and not self.quantized:
            return max(nbytes, key=lambda dtype: nbytes[dtype])
        return config_dtype(self.config) or torch.float32

    @property
    def quantized(self) -> bool:
        """Whether the weights are stored packed."""
        return "quantization_config" in self.raw or "compression_config" in self.raw

    @property
    def kv_bits(self) -> int:
        """Bits of the KV cache that a fitted model was planned with; 16 for any other."""
        bits = _section(self.raw).get("kv_bits", 16)
        if bits not in (16, 8, 4, 2):
            raise BrokenInput(
                f"{self.name}: config.json's memfit.kv_bits is {bits!r}; 16, 8, 4 or 2 are known."
            )
        return int(bits)

    @cached_property
    def schemes(self) -> Mapping[str, Form]:
        """The scheme of each module that is stored packed; empty for a model that is not."""
        if not self.quantized:
            return {}
        return self._schemes_of(self._skeleton(None))

    def build(self, *, dtype: torch.dtype | None = None) -> nn.Module:
        """The model with all parameters on `meta` and all buffers made: no weight is read, nothing of size
        held.

        In evaluation mode, without gradients, tied; packed modules stand where the weights are stored packed.

        Args:
            dtype: of its float parameters; default: the config's own, else the checkpoint's.

        Raises:
            BrokenInput: the config is of no model that transformers can make.
        """
        model = self._skeleton(dtype)
        if not self._cache:
            self._lay_out(model)
        schemes = self._schemes_of(model)
        if schemes:
            from memfit.packed.modules import pack_module_skeleton

            tied = {target: source for target, source in self.tied.items() if target in schemes}
            pack_module_skeleton(model, schemes, tied=tied)
        return model

    @property
    def tied(self) -> Mapping[str, str]:
        """Modules that memfit stored twice because stock transformers cannot tie them packed, to the first
        copy.
        """
        tied = _section(self.raw).get("tied", {})
        if not isinstance(tied, dict) or not all(isinstance(value, str) for value in tied.values()):
            raise BrokenInput(f"{self.name}: config.json's memfit.tied is no object of module names.")
        return tied

    @property
    def layout(self) -> Layout:
        """Which stored tensors make which parameter."""
        return self._laid_out["layout"]  # type: ignore[no-any-return]

    @property
    def parameters(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype, str]]:
        """Of each entry of the unpacked model's state dict: shape, dtype, and the name of the one it is
        tied to,
        or its own."""
        return self._laid_out["parameters"]  # type: ignore[no-any-return]

    @property
    def buffers(self) -> frozenset[str]:
        """Names of the entries of the state dict that are buffers: a checkpoint may lack them."""
        return self._laid_out["buffers"]  # type: ignore[no-any-return]

    @property
    def prefix(self) -> str:
        """The base model's prefix with its dot, as `model.`, that a checkpoint may have or lack; may be
        empty.
        """
        return self._laid_out["prefix"]  # type: ignore[no-any-return]

    def stored_info(self, name: str) -> TensorInfo | None:
        """What is stored under a name, the base model's prefix left out or not; None if nothing is."""
        if name not in self.tensors and self.prefix:
            bare = name.removeprefix(self.prefix)
            name = bare if bare != name else self.prefix + name
        return self.tensors.get(name)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name, each tied one once."""
        return {name: tuple(parameter.shape) for name, parameter in self.build().named_parameters()}

    def read_parameter(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A fresh CPU tensor of the model's parameter or persistent buffer `name`.

        Allocates the result, and at most one block of 4 MiB to cast through.

        Raises:
            BrokenInput: it is stored nowhere, has another shape or type, or holds NaN or infinity.
            KeyError: the model has no such parameter.
        """
        shape, own, canonical = self.parameters[name]
        out = torch.empty(shape, dtype=dtype or own)
        self.read_into(canonical, out)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill `out` [as the parameter] with the parameter `name`, cast to its dtype. Raises as
        `read_parameter`.
        """
        if self.checkpoint is None:
            if is_fake(out):  # an account needs no weights
                return
            raise UsageError(f"{self.name}: has a config and no weights, so {name!r} cannot be read.")
        pieces = self.layout.pieces.get(name)
        if pieces is None:
            raise self.missing(name)
        check_pieces(name, pieces, self.tensors, shape=tuple(out.shape), dtype=out.dtype)
        for piece in pieces:
            part = out if piece.index is None else out[piece.index]
            if piece.start is not None and piece.rows is not None:
                part = part[piece.start : piece.start + piece.rows]
            self.checkpoint.read_into(piece.tensor, part)

    def read_stored(self, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """A fresh CPU tensor by the name it is stored under, the base model's prefix left out or not.

        With `start` and `stop`: these rows of it, [stop − start, width], all dimensions but the last taken
        as one.
        """
        if self.checkpoint is None:
            raise UsageError(f"{self.name}: has a config and no weights, so {name!r} cannot be read.")
        info = self.stored_info(name)
        if info is None:
            raise self.missing(name)
        if start is None or stop is None:
            return self.checkpoint.read(info.name)
        return self.checkpoint.read_rows(info.name, start, stop)

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has the parameter or buffer `name`; without one, whether the model has."""
        canonical = self.parameters[name][2]
        return name not in self.buffers if self.checkpoint is None else canonical in self.layout.pieces

    def stored_by_value(self, module: str) -> torch.dtype | None:
        """int8 or float8 where a quantized module is stored `int-quantized` or `float-quantized`: one a value, whatever
        its bits; else None."""
        info = self.stored_info(f"{self.tied.get(module, module)}.weight")
        known = (torch.int8, torch.float8_e4m3fn)
        return info.dtype if info is not None and info.dtype in known else None

    def scheme_of(self, module: str) -> Form:
        """The scheme of a packed module, or of a weight of fused experts."""
        return self.schemes.get(module) or self.schemes[module.rpartition(".")[0]]

    def read_packed(self, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """A part of a packed module as `PackedWeight.load_from` takes it, whichever format it is stored in.

        Arguments: see `read_stored`.

        Raises:
            BrokenInput: MXFP4's values or scales are none that it has.
        """
        module, _, part = name.rpartition(".")
        by_value, scheme = self.stored_by_value(module), self.scheme_of(module)
        if part == "weight_packed" and by_value is not None:
            name = f"{module}.weight"
        stored = self.read_stored(name, start, stop)
        try:
            return part_of(part, stored, scheme)
        except ValueError as error:
            raise BrokenInput(f"{self.name}: {name}: {error}. Fetch the checkpoint again.") from error

    def tokenizer(self) -> Any:
        """The model's tokenizer, never by code of the checkpoint's own.

        Raises:
            UsageError: the source has none.
        """
        if self.directory is None:
            raise UsageError(
                f"{self.name}: is a config only and has no tokenizer. Give a directory that has one."
            )
        try:
            if self.gguf is not None:
                from memfit.source.gguf_tokenizer import gguf_tokenizer

                return gguf_tokenizer(self.gguf)
            return AutoTokenizer.from_pretrained(
                str(self.directory), local_files_only=True, trust_remote_code=False
            )
        except BrokenInput:
            raise
        except Exception as error:  # tokenizers raise whatever their files make them raise
            raise UsageError(
                f"{self.name}: no tokenizer can be read ({type(error).__name__}), and a text needs one. Copy "
                "tokenizer.json and tokenizer_config.json there, or give no text."
            ) from error

    @cached_property
    def _cache(self) -> dict[str, Any]:
        return {}

    def _skeleton(self, dtype: torch.dtype | None) -> nn.Module:
        wanted = dtype or config_dtype(self.config) or self.dtype
        try:
            model: nn.Module = build_skeleton(self.config, dtype=wanted)
        except BrokenInput:
            raise
        except Exception as error:  # a model's constructor raises whatever a senseless value makes it raise
            raise BrokenInput(
                f"{self.name}: transformers cannot make a {self.config.model_type!r} model of this config: "
                f"{type(error).__name__}: {str(error)[:300]}. Correct config.json."
            ) from error
        if self.directory is not None and self.gguf is None:
            _set_generation(model, self.directory)
        schemes = self._schemes_of(model)
        tie_modules(model, {target: source for target, source in self.tied.items() if target not in schemes})
        return model

    def _schemes_of(self, model: nn.Module) -> dict[str, Form]:
        if not self.quantized:
            return {}
        classes: dict[str, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                classes[name] = type(module).__name__
            elif isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                # Fused experts: one scheme for all, or one for each of their two weights.
                classes |= dict.fromkeys(
                    (name, f"{name}.gate_up_proj", f"{name}.down_proj"), type(module).__name__
                )
        schemes = parse_schemes(self.raw, classes, file=Path(self.name) / "config.json")
        return {name: scheme for name, scheme in schemes.items() if name.rpartition(".")[0] not in schemes}

    @property
    def _laid_out(self) -> dict[str, Any]:
        if not self._cache:
            self._lay_out(self._skeleton(None))
        return self._cache

    def _lay_out(self, model: nn.Module) -> None:
        """Keep what an unpacked skeleton tells, so that no second one is made for it."""
        tensors = self.tensors
        if self.quantized:
            tensors = {
                name: info for name, info in tensors.items() if name.rpartition(".")[2] not in PACKED_PARTS
            }
        ties, prefix = ties_of(model), getattr(model, "base_model_prefix", "")
        state = model.state_dict(keep_vars=True)
        self._cache.update(
            layout=lay_out(model, tensors, ties=ties),
            parameters={n: (tuple(t.shape), t.dtype, ties.get(n, n)) for n, t in state.items()},
            buffers=frozenset(state) & {name for name, _ in model.named_buffers(remove_duplicate=False)},
            prefix=f"{prefix}." if prefix else "",
        )

    def missing(self, name: str) -> BrokenInput:
        """The error for a tensor that the model needs and the checkpoint lacks."""
        files = sorted({str(info.file) for info in self.tensors.values()}) or [self.name]
        return BrokenInput(
            f"{files[0]}{' and the other shards' if len(files) > 1 else ''}: tensor {name!r} of the "
            "model is missing; "
            "it would be random. Fetch the checkpoint again, or correct config.json."
        )


def _set_generation(model: Any, directory: Path) -> None:
    """Let `generate` start from the model's own settings, where it has some."""
    file = directory / "generation_config.json"
    if not file.exists():
        return
    raw = read_json(check_within(file, directory))
    try:
        model.generation_config = GenerationConfig.from_dict(raw)
    except Exception as error:  # it checks its values with exceptions of its own choice
        raise BrokenInput(f"{file}: transformers refuses it: {str(error)[:200]}. Correct it.") from error


def _section(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """What memfit wrote into a config.json for itself; empty where it did not."""
    section = raw.get("memfit", {})
    return section if isinstance(section, dict) else {}


def open_source(model: str | Path, *, weights: bool = True) -> Source:
    """The model that is meant by a directory, a `.gguf` file, an id on the Hugging Face hub, or `demo`.

    Args:
        model: a path wins over an id of the same name.
        weights: False: of a hub id, only the config and tokenizer are fetched.

    Raises:
        BrokenInput: something in it is unsafe, broken or unknown; weights themselves are read later.
        UsageError: there is nothing of that name.
    """
    if not isinstance(model, str | Path):
        raise UsageError(
            f"a {type(model).__name__} was given for a model. Give its directory, a .gguf file or a hub id."
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_directory(path, name=str(model))
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            from memfit.source.gguf import open_gguf

            config, checkpoint = open_gguf(path)
            return Source(
                name=str(model), directory=path.parent, config=config, checkpoint=checkpoint, gguf=path
            )
        raise UsageError(
            f"{path}: is a file, and no .gguf. Give a model's directory, a .gguf file or a hub id."
        )
    if str(model) == DEMO:
        return _open_directory(demo.model_directory(), name=DEMO)
    return _open_directory(_fetch(str(model), weights=weights), name=str(model))


def _open_directory(directory: Path, *, name: str) -> Source:
    config, raw = read_config(directory)
    stored = open_checkpoint(directory)
    checkpoint: Checkpoint | None = stored
    quantization = quantization_of(directory, raw, {} if stored is None else stored.tensors)
    if isinstance(quantization, dict) and quantization.get("quant_method") in METHODS:
        # From here on it is the dense model that it stands for.
        raw = {key: value for key, value in raw.items() if key != "quantization_config"}
        if stored is not None:
            checkpoint = unpack(quantization, stored, file=directory / "config.json")
    source = Source(name=name, directory=directory, config=config, checkpoint=checkpoint, raw=raw)
    parse_schemes(raw, (), file=directory / "config.json")  # refuse a quantization that is not known at once
    return source


def _fetch(model: str, *, weights: bool) -> Path:
    """The local directory of a hub id: from the cache if it is there or HF_HUB_OFFLINE is set, else
    downloaded.
    """
    from huggingface_hub import snapshot_download

    is_file = model.lower().endswith((".gguf", ".safetensors", ".bin", ".json"))
    if is_file or model.count("/") > 1 or model.startswith((".", "/", "~")) or os.sep * 2 in model:
        raise UsageError(
            f"{model}: no such directory or file. A model is a directory with config.json and safetensors, a .gguf "
            "file, `demo`, or a hub id (owner/name)."
        )
    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # of the network, of the hub, of the cache: one answer to all
        raise UsageError(
            f"{model}: is no directory or .gguf file here, and as a hub id it cannot be fetched "
            f"({type(error).__name__}). Check the name, the network, and HF_HUB_OFFLINE."
        ) from error


def source_from_config(config: PretrainedConfig, *, seed: int = 0, weights: bool = True) -> Source:
    """A source of a config alone, with weights drawn by chance (the weights of norms are 1).

    Args:
        config: of transformers.
        seed: of the weights.
        weights: False: there are none to read; the source can be built only.
    """
    name = f"{config.model_type} config"
    source = Source(name=name, directory=None, config=config, checkpoint=None)
    if not weights:
        return source
    checkpoint = random_checkpoint(source.build(), seed=seed)
    return dataclasses.replace(source, checkpoint=checkpoint)
