"""What a GGUF file says of a model: its keys, and which tensor holds which parameter.

As llama.cpp's convert_hf_to_gguf.py writes it. The reader's side is `source/gguf.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import gguf
import torch
from torch import Tensor

from memfit.errors import BrokenInput, UsageError
from memfit.source import Source
from memfit.source.safetensors import read_json

ROPE_FREQUENCIES: Final = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One tensor of the file, and what of the model fills it."""

    name: str
    """In the file."""
    parameter: str | None
    """In the model; None: it is computed from the config."""
    shape: tuple[int, ...]
    """Slowest dimension first."""
    heads: int = 0
    """Heads whose rows are stored in pairs, as llama.cpp's rotary embedding wants them; 0: as they are."""
    shift: float = 0.0
    """What is added: 1 for Gemma's norms, which multiply by 1 + w."""


def architecture_of(source: Source) -> str:
    """llama.cpp's name of the source's architecture.

    Raises:
        UsageError: memfit writes no GGUF of it, or not of what the source is.
    """
    kind = str(source.config.model_type)
    if kind not in _ARCHITECTURES:
        raise UsageError(
            f"{source.name}: a {kind!r} model cannot be written as GGUF; {', '.join(_ARCHITECTURES)} can."
        )
    if source.gguf is not None or source.quantized or source.checkpoint is None:
        raise UsageError(f"{source.name}: GGUF is written from the original weights. Give their directory or hub id.")
    return _ARCHITECTURES[kind]


def keys_of(source: Source) -> dict[str, int | float | bool | str]:
    """The keys that describe the model; `general.` and `tokenizer.` left out.

    llama.cpp runs Mistral without its sliding window, which only text longer than that shows.

    Raises:
        UsageError: the config asks for something that llama.cpp does otherwise or not at all.
    """
    architecture, config = architecture_of(source), source.config
    heads = config.num_attention_heads
    keys: dict[str, int | float | bool | str] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
    }
    if architecture == "bert":
        return _prefixed(architecture, keys | _bert_keys(source))
    if architecture != "gemma3":
        _require(config, "hidden_act", "silu")
    if architecture != "llama":
        _require(config, "use_sliding_window" if architecture != "gemma3" else "use_bidirectional_attention", False)
        _require(config, "attention_bias", False)
    keys |= {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        "rope.dimension_count": _head_dim(config),
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
    }
    keys |= _gemma_keys(config) if architecture == "gemma3" else _rope_keys(dict(config.rope_parameters), architecture)
    return _prefixed(architecture, keys)


def places_of(source: Source) -> tuple[Place, ...]:
    """The tensors of the file, in its order.

    Raises:
        UsageError: the model has a parameter that the architecture has no place for.
    """
    architecture, config = architecture_of(source), source.config
    numbers = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    places: list[Place] = []
    for name, (shape, _, canonical) in source.parameters.items():
        if name in source.buffers or canonical != name or (architecture == "bert" and _left_out(name)):
            continue
        base, _, part = name.removeprefix("bert.").rpartition(".")
        short = table.get_name(base)
        if short is None:
            raise UsageError(f"{source.name}: {name} has no place in a GGUF of the architecture {architecture!r}.")
        shift = 1.0 if architecture == "gemma3" and name.endswith("norm.weight") else 0.0
        heads = _paired_heads(name, config) if architecture == "llama" else 0
        places.append(Place(name=f"{short}.{part}", parameter=name, shape=shape, heads=heads, shift=shift))
    if rope_frequencies(config) is not None:
        places.append(Place(name=ROPE_FREQUENCIES, parameter=None, shape=(_head_dim(config) // 2,)))
    return tuple(places)


def rope_frequencies(config: Any) -> Tensor | None:
    """Llama 3's stretch as factors [head_dim/2] that divide the frequencies; None where there is none.

    The formula is transformers' `_compute_llama3_parameters`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    head_dim = _head_dim(config)
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors.to(torch.float32)


_ARCHITECTURES: Final[dict[str, str]] = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3", "bert": "bert",
}  # fmt: skip
"""transformers' model_type to llama.cpp's architecture."""


def _prefixed(architecture: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _require(config: Any, key: str, value: Any) -> None:
    if getattr(config, key, value) != value:
        raise UsageError(
            f"the config has {key} = {getattr(config, key)!r}; llama.cpp runs {config.model_type} with {value!r} only."
        )


def _paired_heads(name: str, config: Any) -> int:
    module = name.split(".")[-2]
    return int({"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module, 0))


def _rope_keys(rope: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    keys: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "default" or (kind == "llama3" and architecture == "llama"):
        return keys
    raise UsageError(f"a rotary embedding stretched by {kind!r} is not written to GGUF; 'linear' and 'llama3' are.")


def _gemma_keys(config: Any) -> dict[str, Any]:
    _require(config, "hidden_activation", "gelu_pytorch_tanh")
    layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    # What llama.cpp assumes of Gemma 3, as `source/gguf.py` does too.
    _require(config, "query_pre_attn_scalar", width // heads if layers == 62 else _head_dim(config))
    _require(config, "attn_logit_softcapping", None)
    for layer, kind in enumerate(config.layer_types):
        if (kind == "full_attention") != (layer % 6 == 5):
            raise UsageError(
                f"layer {layer} is of {kind}; llama.cpp runs gemma3 with every sixth layer of full_attention only."
            )
    rope = config.rope_parameters
    keys = _rope_keys(rope["full_attention"], "gemma3")
    keys |= {"attention.sliding_window": config.sliding_window}
    keys |= {"rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"])}
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return keys


_POOLINGS: Final = {
    "pooling_mode_mean_tokens": gguf.PoolingType.MEAN,
    "pooling_mode_cls_token": gguf.PoolingType.CLS,
    "pooling_mode_lasttoken": gguf.PoolingType.LAST,
}


def _bert_keys(source: Source) -> dict[str, Any]:
    config = source.config
    _require(config, "hidden_act", "gelu")
    keys = {"attention.causal": False, "attention.layer_norm_epsilon": float(config.layer_norm_eps)}
    file = source.directory / "1_Pooling" / "config.json" if source.directory is not None else None
    if file is not None and file.is_file():
        pooling = read_json(file)
        kinds = [kind for key, kind in _POOLINGS.items() if isinstance(pooling, dict) and pooling.get(key)]
        if len(kinds) != 1:
            raise BrokenInput(f"{file}: names {len(kinds)} ways of pooling that llama.cpp knows; one is due.")
        keys["pooling_type"] = int(kinds[0])
    return keys


def _left_out(name: str) -> bool:
    """What llama.cpp leaves out of a BERT, which it runs for embeddings alone."""
    return name.removeprefix("bert.").startswith(("pooler.", "cls.", "embeddings.position_ids"))


def as_stored(rows: Tensor, place: Place) -> Tensor:
    """Whole heads of a parameter's rows, or all of it, in float32 and in the order of the file."""
    numbers = rows.to(torch.float32)
    if place.shift:
        numbers = numbers + place.shift
    return in_order(numbers, place)


def in_order(rows: Tensor, place: Place) -> Tensor:
    """Whole heads of a parameter's rows [R, ...], numbers or bytes, in the order of the file."""
    if not place.heads:
        return rows
    # llama.cpp turns neighbours, transformers the halves: within each head, rows i and i + head_dim/2 meet.
    half = place.shape[0] // place.heads // 2
    return rows.reshape(-1, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
