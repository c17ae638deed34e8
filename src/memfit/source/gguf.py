"""A GGUF file as a source: its keys make a config, its blocks are unpacked to bf16 as they are read."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from transformers import BertConfig, Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from memfit.errors import BrokenInput
from memfit.packed.fake import is_fake
from memfit.source.checkpoint import TensorInfo, cast_into, finite
from memfit.source.configuration import LAYERS_MAX
from memfit.source.gguf_header import Array, Header, Stored, read_header, read_rows, refuse
from memfit.source.skeleton import build_skeleton

Numbers = np.ndarray[Any, np.dtype[np.float32]]

BLOCK_NUMBERS: Final = 1 << 18
"""Numbers unpacked at a time: 1 MiB in float32, and some times that inside gguf's own unpacking."""


@dataclass(frozen=True, kw_only=True)
class GgufCheckpoint:
    """The tensors of a GGUF file under the model's names, unpacked when read.

    Read in rows with pread: a mapped file's pages would count as resident.
    """

    file: Path
    tensors: Mapping[str, TensorInfo]
    stored: Mapping[str, Stored]
    """The model's name to what the file holds."""
    heads: Mapping[str, int]
    """Names of the weights whose rows llama.cpp has reordered for its rotary embedding, to their heads."""
    shift: float
    """What is added to the weights of norms: −1 for Gemma, whose GGUF holds 1 + w."""

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, out)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.tensors[name]
        if name in self.heads:  # their rows lie in another order
            return self.read(name)[start:stop].clone()
        out = torch.empty((stop - start, info.shape[-1]), dtype=info.dtype)
        self._fill(name, out, start, stop)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        self._fill(name, out, 0, None)

    def _fill(self, name: str, out: torch.Tensor, start: int, stop: int | None) -> None:
        if is_fake(out):
            return
        stored = self.stored[name]
        first = start * stored.shape[-1]
        flat = out.view(-1)
        shift = np.float32(self.shift if name.endswith("norm.weight") else 0.0)
        heads = self.heads.get(name)
        head_dim = None if heads is None else stored.shape[0] // heads
        for at, numbers in self._unpacked(stored, head_dim, start, stop):
            if not finite(numbers.reshape(-1).view(np.uint8), torch.float32):
                raise BrokenInput(
                    f"{self.file}: tensor {stored.name!r} holds NaN or infinity, so the model would answer "
                    "nonsense. Fetch the file again."
                )
            if shift:
                numbers += shift
            if head_dim is not None:
                numbers = _unpermuted(numbers, head_dim)
            cast_into(flat[at - first : at - first + numbers.size], torch.from_numpy(numbers.reshape(-1)))

    def _unpacked(
        self, stored: Stored, head_dim: int | None, start: int, stop: int | None
    ) -> Iterator[tuple[int, Numbers]]:
        """Pieces of whole rows, and of whole heads where there are any, with the position of their first
        number. All in numpy, since what torch allocates is predicted.
        """
        width = stored.shape[-1] if len(stored.shape) > 1 or head_dim is None else 1
        step = max(BLOCK_NUMBERS // width, 1)
        if len(stored.shape) == 1:
            step = 1  # the one row that a vector is
        elif head_dim is not None:
            step = -(-step // head_dim) * head_dim
        for row, data in read_rows(self.file, stored, step=step, start=start, stop=stop):
            # As one row: gguf unpacks sixteen rows at a time, and its blocks do not care where a row ends.
            packed = np.frombuffer(data, dtype=np.uint8).reshape(1, -1)
            numbers = gguf.quants.dequantize(packed, stored.kind).astype(np.float32, copy=False)
            # frombuffer is read-only, which torch warns of
            numbers = numbers if numbers.flags.writeable else numbers.copy()
            yield row * stored.shape[-1], numbers.reshape(-1, width)


def _unpermuted(numbers: Numbers, head_dim: int) -> Numbers:
    """Rows [heads · head_dim, width] as the model has them.

    llama.cpp stores, within each head, the model's row i as 2i and row i + head_dim/2 as 2i + 1 (its
    converter's `permute`).
    """
    pairs = numbers.reshape(-1, head_dim // 2, 2, numbers.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(numbers.shape)


def open_gguf(file: Path) -> tuple[PretrainedConfig, GgufCheckpoint]:
    """The config and the weights of a GGUF file; no weight is read yet.

    Raises:
        BrokenInput: the file is broken, or of an architecture that memfit does not read.
    """
    header = read_header(file)
    keys = Keys(header)
    config = config_from(keys, header)
    tensors, stored = _names(header, config, keys.architecture)
    llama = keys.architecture == "llama"
    heads = {
        name: config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        for name in stored
        if llama and re.search(r"\.[qk]_proj\.", name)
    }
    for name, count in heads.items():
        if stored[name].shape[0] % (2 * count):
            raise refuse(
                file, f"tensor {stored[name].name!r} of shape {stored[name].shape} is not of {count} heads"
            )
    shift = -1.0 if keys.architecture == "gemma3" else 0.0
    return config, GgufCheckpoint(file=file, tensors=tensors, stored=stored, heads=heads, shift=shift)


class Keys:
    """The keys of one architecture, asked for by type."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.architecture: Any = header.keys.get("general.architecture")
        if self.architecture not in _CONFIGS:
            raise BrokenInput(
                f"{header.file}: the architecture {self.architecture!r} is not read from GGUF; "
                f"{', '.join(_CONFIGS)} are. Give memfit the model's safetensors."
            )
        if header.keys.get("split.count", 1) not in (0, 1):
            raise BrokenInput(
                f"{header.file}: is one of several files. Join them with llama-gguf-split --merge."
            )

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """`<architecture>.<key>`, or `key` as it is if it has a dot too many; BrokenInput if missing or of
        another type.
        """
        name = key if key.startswith(("tokenizer.", "general.")) else f"{self.architecture}.{key}"
        value = self.header.keys.get(name, default)
        if value is default and default is not None:
            return default
        fits = type(value) is kind and (not isinstance(value, float) or math.isfinite(value))
        if not fits:
            raise refuse(self.header.file, f"key {name!r} is {value!r:.60} where {kind.__name__} was due")
        return value

    def count(self, key: str, default: int | None = None, *, most: int = 1 << 24) -> int:
        """A whole number from 1 to `most`."""
        value = self.get(key, int, default)
        if not 1 <= value <= most:
            raise refuse(self.header.file, f"key {key!r} is {value}; 1 to {most} are believed")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        return float(self.get(key, float, default))

    def token(self, key: str) -> int | None:
        """The id of a special token; None where there is none."""
        value = self.header.keys.get(f"tokenizer.ggml.{key}_token_id")
        return value if type(value) is int else None

    def refuse_scaling(self) -> None:
        """Raise BrokenInput for a stretched rotary embedding that memfit would leave out."""
        kind = self.header.keys.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind != "none":
            raise BrokenInput(
                f"{self.header.file}: stretches its rotary embedding ({kind!r}), which memfit does "
                "not read from GGUF. "
                "Give memfit the model's safetensors."
            )


def config_from(keys: Keys, header: Header) -> PretrainedConfig:
    """transformers' config of a GGUF file's keys."""
    vocabulary = header.keys.get("tokenizer.ggml.tokens")
    names = {tensor.name: tensor for tensor in header.tensors}
    embedding = names.get("token_embd.weight")
    if embedding is None:
        raise refuse(header.file, "tensor 'token_embd.weight' is missing")
    if isinstance(vocabulary, Array) and vocabulary.count > embedding.shape[0]:
        raise refuse(
            header.file, f"has {vocabulary.count} tokens and an embedding of {embedding.shape[0]} rows"
        )
    heads = keys.count("attention.head_count")
    width = keys.count("embedding_length")
    layers = keys.count("block_count", most=LAYERS_MAX)
    if layers > len(names):
        raise refuse(header.file, f"declares {layers} blocks and has {len(names)} tensors")
    common: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": keys.count("context_length"),
        "bos_token_id": keys.token("bos"),
        "eos_token_id": keys.token("eos"),
        "pad_token_id": keys.token("padding"),
        "dtype": _main_dtype(header),
    }
    if keys.architecture != "bert":
        common |= {
            "num_key_value_heads": keys.count("attention.head_count_kv", heads),
            "head_dim": keys.count("attention.key_length", width // heads),
            "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in names,
        }
    try:
        return _CONFIGS[keys.architecture](keys, common)
    except BrokenInput:
        raise
    except Exception as error:  # each config class checks its values with exceptions of its own choice
        raise refuse(header.file, f"transformers refuses its config: {str(error)[:200]}") from error


def _llama(keys: Keys, common: dict[str, Any]) -> PretrainedConfig:
    keys.refuse_scaling()
    biased = any(tensor.name.endswith("attn_q.bias") for tensor in keys.header.tensors)
    theta = keys.number("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if any(tensor.name == "rope_freqs.weight" for tensor in keys.header.tensors):
        rope |= _llama3_rope(keys, head_dim=common["head_dim"], theta=theta)
    return LlamaConfig(
        **common, rope_parameters=rope, attention_bias=biased, architectures=["LlamaForCausalLM"]
    )


def _qwen2(keys: Keys, common: dict[str, Any]) -> PretrainedConfig:
    keys.refuse_scaling()
    rope = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    common = {key: value for key, value in common.items() if key != "head_dim"}
    return Qwen2Config(**common, rope_parameters=rope, architectures=["Qwen2ForCausalLM"])


def _qwen3(keys: Keys, common: dict[str, Any]) -> PretrainedConfig:
    keys.refuse_scaling()
    rope = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    return Qwen3Config(**common, rope_parameters=rope, architectures=["Qwen3ForCausalLM"])


def _gemma3(keys: Keys, common: dict[str, Any]) -> PretrainedConfig:
    whole: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 1e6)}
    kind = keys.header.keys.get("gemma3.rope.scaling.type", "none")
    if kind == "linear":
        whole |= {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    elif kind != "none":
        keys.refuse_scaling()
    heads, layers = common["num_attention_heads"], common["num_hidden_layers"]
    # llama.cpp scales by the width over the heads for the 27 B of 62 layers, and by the head's width for
    # all others.
    scalar = common["hidden_size"] // heads if layers == 62 else common["head_dim"]
    local = keys.number("rope.freq_base_swa", 1e4)
    return Gemma3TextConfig(
        **common,
        query_pre_attn_scalar=scalar,
        sliding_window=keys.count("attention.sliding_window"),
        rope_parameters={
            "full_attention": whole,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        architectures=["Gemma3ForCausalLM"],
    )


def _bert(keys: Keys, common: dict[str, Any]) -> PretrainedConfig:
    if keys.header.keys.get("bert.attention.causal", False):
        raise refuse(keys.header.file, "is a BERT that looks back only (attention.causal), which memfit does not run")
    kinds = next((one.shape[0] for one in keys.header.tensors if one.name == "token_types.weight"), 0)
    if not kinds:
        raise refuse(keys.header.file, "tensor 'token_types.weight' is missing")
    positions = next((one.shape[0] for one in keys.header.tensors if one.name == "position_embd.weight"), 0)
    if positions != common["max_position_embeddings"]:
        raise refuse(
            keys.header.file,
            f"declares a context of {common['max_position_embeddings']} and has {positions} rows of positions",
        )
    # llama.cpp leaves the pooler out: embeddings are means of the last hidden states, or the first of them.
    return BertConfig(
        **common, type_vocab_size=kinds, layer_norm_eps=keys.number("attention.layer_norm_epsilon"),
        architectures=["BertModel"], add_pooling_layer=False,
    )  # fmt: skip


_CONFIGS: Final[dict[Any, Callable[[Keys, dict[str, Any]], PretrainedConfig]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "bert": _bert,
}


def _llama3_rope(keys: Keys, *, head_dim: int, theta: float) -> dict[str, Any]:
    """The llama3 stretch that `rope_freqs.weight` [head_dim/2] stands for: factors that divide the
    frequencies.

    The file keeps the factors only; the stretch that makes the same ones is found by its largest factor, with
    the low and high frequency factors 1 and 4 and the 8192 positions that every Llama 3 has.
    """
    header = keys.header
    stored = next(tensor for tensor in header.tensors if tensor.name == "rope_freqs.weight")
    if stored.kind != gguf.GGMLQuantizationType.F32 or stored.shape != (head_dim // 2,):
        raise refuse(header.file, f"tensor 'rope_freqs.weight' is {stored.kind.name} {stored.shape}")
    factors = np.concatenate(
        [np.frombuffer(data, "<f4") for _, data in read_rows(header.file, stored, step=1)]
    )
    factor, low, high, context = float(factors.max()), 1.0, 4.0, 8192
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / waves - low) / (high - low), 0.0, 1.0)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise BrokenInput(
            f"{header.file}: tensor 'rope_freqs.weight' stretches the rotary embedding in a way that "
            "memfit does not "
            "know. Give memfit the model's safetensors."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _main_dtype(header: Header) -> torch.dtype:
    """float32 if nothing in the file is anything else, bf16 otherwise."""
    plain = all(tensor.kind == gguf.GGMLQuantizationType.F32 for tensor in header.tensors)
    return torch.float32 if plain else torch.bfloat16


def _names(
    header: Header, config: PretrainedConfig, architecture: str
) -> tuple[dict[str, TensorInfo], dict[str, Stored]]:
    """The file's tensors under the model's names."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    wanted: dict[str, str] = {}
    try:
        model = build_skeleton(config, dtype=torch.bfloat16)
    except BrokenInput:
        raise
    except Exception as error:  # a model's constructor raises whatever a senseless value makes it raise
        raise refuse(header.file, f"transformers cannot make its model: {str(error)[:200]}") from error
    for name in model.state_dict(keep_vars=True):
        base, _, part = name.rpartition(".")
        short = table.get_name(base)
        if short is not None:
            wanted.setdefault(f"{short}.{part}", name)
    tensors: dict[str, TensorInfo] = {}
    stored: dict[str, Stored] = {}
    for tensor in header.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        # What the model has no place for keeps its own name, and is refused as unexpected.
        name = wanted.get(tensor.name, tensor.name)
        plain = tensor.kind == gguf.GGMLQuantizationType.F32
        dtype = torch.float32 if plain else torch.bfloat16
        tensors[name] = TensorInfo(
            name=name,
            dtype=dtype,
            shape=tensor.shape,
            nbytes=math.prod(tensor.shape) * dtype.itemsize,
            file=header.file,
            offset=tensor.offset,
        )
        stored[name] = tensor
    return tensors, stored
