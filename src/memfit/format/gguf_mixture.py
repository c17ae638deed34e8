"""Which tensor of a GGUF file gets which type: llama.cpp's own mixtures.

The rules are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp, for models without experts: more
bits where an error costs most (values, what leads back into the residual stream, the head), and a smaller block
where rows are not whole blocks.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import gguf

from memfit.errors import UsageError
from memfit.technique.gguf_blocks import KINDS

PLAIN: Final[dict[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}
"""Types without blocks, and their bytes a number."""

_BASES: Final[dict[str, str]] = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K",
    "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q4_0": "Q4_0", "Q3_K_L": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K",
    "Q2_K": "Q2_K",
}  # fmt: skip
MIXTURES: Final = tuple(_BASES)
"""Names of the mixtures, as llama.cpp has them."""
_FALLBACKS: Final[dict[str, str]] = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Types of blocks of 32 for rows that are no multiples of 256."""
_KEPT: Final = re.compile(r"(_norm\.weight|^position_embd\.weight|^token_types\.weight|^rope_freqs\.weight)$")
"""Stored in F32 in every mixture: too small to matter, or read as numbers."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What the rules ask of a model."""

    layers: int
    heads_a_key: int
    """Attention heads for each head of keys and values."""
    tied: bool
    """Whether the embedding is the head too: no `output.weight`."""
    important: bool
    """Whether importances weigh the columns."""


def file_type(mixture: str) -> int:
    """The number of a mixture that GGUF's `general.file_type` has."""
    kinds = gguf.LlamaFileType
    return int(kinds.ALL_F32 if mixture == "F32" else kinds[f"MOSTLY_{mixture}"])


def type_of(name: str, shape: tuple[int, ...], mixture: str, stack: Stack) -> str:
    """The type of one tensor in a mixture.

    Args:
        name: the tensor's, in GGUF.
        shape: slowest dimension first.
        mixture: one of `MIXTURES`.
        stack: of the model.
    """
    if mixture not in _BASES:
        raise UsageError(f"{mixture!r} is no mixture of types. Choose one of {', '.join(MIXTURES)}.")
    if len(shape) < 2 or not name.endswith("weight") or _KEPT.search(name):
        return "F32"
    base = _BASES[mixture]
    if base in PLAIN:
        return base
    if name == "output.weight" or (name == "token_embd.weight" and stack.tied):
        # The head is read at every token and judged by all of them.
        chosen = "Q8_0" if base == "Q8_0" or shape[-1] % KINDS[base].block else "Q6_K"
    else:
        rule = _RULES.get(name.split(".")[-2])
        chosen = base if rule is None else rule(mixture, base, _layer(name), stack)
    return fitting(chosen, shape[-1])


def fitting(kind: str, columns: int) -> str:
    """The type, or what llama.cpp takes for it where rows are not whole blocks."""
    if kind in PLAIN or not columns % KINDS[kind].block:
        return kind
    smaller = _FALLBACKS.get(kind, "F16")
    return smaller if smaller == "F16" or not columns % KINDS[smaller].block else "F16"


def type_nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that type."""
    if kind in PLAIN:
        return PLAIN[kind] * math.prod(shape)
    return math.prod(shape[:-1]) * KINDS[kind].row_nbytes(shape[-1])


def checked_types(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UsageError where a tensor is not there, or cannot have the type that it is given."""
    for name, kind in types.items():
        if name not in shapes:
            raise UsageError(f"a type is given to {name!r}, and the file has no such tensor.")
        if kind not in PLAIN and kind not in KINDS:
            raise UsageError(f"{name}: {kind!r} is no type that memfit writes: {', '.join((*PLAIN, *KINDS))} are.")
        shape = shapes[name]
        if len(shape) < 2 and kind != "F32":
            raise UsageError(f"{name}: vectors are stored in F32, not {kind}: llama.cpp adds and multiplies by them.")
        if fitting(kind, shape[-1]) != kind:
            raise UsageError(
                f"{name}: has rows of {shape[-1]}, no multiple of {kind}'s {KINDS[kind].block}. "
                f"Take {fitting(kind, shape[-1])}."
            )


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _values(mixture: str, base: str, layer: int, stack: Stack) -> str:
    chosen = base
    if mixture == "Q2_K":
        chosen = "Q4_K" if stack.heads_a_key >= 4 else "Q3_K"
    elif mixture == "Q3_K_M":
        chosen = "Q5_K" if layer < 2 else "Q4_K"
    elif mixture == "Q3_K_L" or (mixture == "Q4_K_S" and layer < 4):
        chosen = "Q5_K"
    elif mixture in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, stack.layers):
        chosen = "Q6_K"
    # Models of 80 layers are those of 70 B, where eight heads share their values: small, and worth more.
    large = stack.layers == 80 and stack.heads_a_key > 1
    return "Q5_K" if large and chosen in ("Q3_K", "Q4_K") else chosen


def _down(mixture: str, base: str, layer: int, stack: Stack) -> str:
    if mixture == "Q2_K":
        return "Q3_K"
    if mixture == "Q3_K_M":
        return "Q5_K" if layer < stack.layers // 16 else "Q4_K"
    if mixture == "Q3_K_L":
        return "Q5_K"
    if mixture in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, stack.layers):
        return "Q6_K"
    if mixture == "Q4_K_S" and layer < stack.layers // 8:
        return "Q5_K"
    if mixture == "Q4_0" and stack.important and layer < stack.layers // 8:
        return "Q4_1"
    return base


def _output(mixture: str, base: str, layer: int, stack: Stack) -> str:
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mixture, base)


_RULES: Final[dict[str, Callable[[str, str, int, Stack], str]]] = {
    "attn_v": _values,
    "ffn_down": _down,
    "attn_output": _output,
}
