"""What a narrower config takes away: which entries of which parameter belong to a channel, a head or an expert.

Nothing is known by name but the config's counts. A skeleton is made of the config with one count smaller, and the
dimensions of parameters that became smaller with it are those that hold the channels, heads or experts. What no such
difference explains is refused: so whatever stock transformers would load otherwise than meant is never written.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from memfit.errors import UsageError
from memfit.packed.modules import is_experts
from memfit.source.source import Source

Kind = Literal["heads", "kv_heads", "channels", "experts"]
"""Of what a block has many: query heads, heads of keys and values, channels between an MLP's layers, experts."""

_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "blocks": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "channels": ("intermediate_size", "n_inner", "ffn_dim"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
"""The config's keys for a count; the first that the config has."""
_NUMBERED: Final = ("mlp_only_layers",)
"""Keys whose lists name blocks by number."""
_BY_NUMBER: Final = ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers")
"""Keys that, set, make what a block computes depend on its number."""
_LAYER_NUMBERS: Final = ("layer_idx", "layer_id", "layer_number", "block_idx")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many blocks a model has, and how many heads, channels and experts each; None: it counts none."""

    blocks: int
    heads: int | None = None
    kv_heads: int | None = None
    channels: int | None = None
    experts: int | None = None


@dataclass(frozen=True)
class Cut:
    """How a dimension is made up: of `repeats` stretches, in each `each` entries for every one of a kind."""

    kind: Kind
    each: int = 1
    repeats: int = 1


Cuts = Mapping[str, tuple[Cut | None, ...]]
"""Parameter to what each of its dimensions is made up of; None: of nothing that is dropped."""


def counts_of(config: PretrainedConfig) -> Counts:
    """What a config counts."""
    text = config.get_text_config()
    found = {what: _count(text, what) for what in _KEYS}
    if found["blocks"] is None:
        raise UsageError(f"a {config.model_type!r} config counts no blocks (num_hidden_layers): none can be dropped.")
    if found["channels"] is None and getattr(text, "n_inner", 0) is None:  # GPT-2
        found["channels"] = 4 * text.hidden_size
    if found["kv_heads"] is None:
        found["kv_heads"] = found["heads"]
    return Counts(**found)  # type: ignore[arg-type]


def narrower_config(config: PretrainedConfig, counts: Counts, blocks: tuple[int, ...]) -> PretrainedConfig:
    """The config with these counts and only these of its `blocks`, as transformers reads it back from a file.

    A list with one entry for each block loses those of the blocks that go, and the width of a head, which many
    configs leave to be the model's width over the heads, is written down.

    Raises:
        UsageError: transformers refuses it.
    """
    before = counts_of(config)
    made = copy.deepcopy(config)
    text: Any = made.get_text_config()
    if counts.heads != before.heads or counts.kv_heads != before.kv_heads:
        text.head_dim = head_width(config)
    for what in dataclasses.fields(Counts):
        old, new = getattr(before, what.name), getattr(counts, what.name)
        key = _key(text, what.name)
        if new != old and key is not None:
            setattr(text, key, new)
    if len(blocks) != before.blocks:
        for key, value in config.get_text_config().to_dict().items():
            if key in _NUMBERED and value:
                setattr(text, key, [new for new, old in enumerate(blocks) if old in value])
            elif isinstance(value, list | tuple) and len(value) == before.blocks and hasattr(text, key):
                setattr(text, key, [value[number] for number in blocks])
    told = json.loads(made.to_json_string(use_diff=True))
    try:
        again: PretrainedConfig = CONFIG_MAPPING[config.model_type].from_dict(told)
    except Exception as error:  # each config class checks its values with exceptions of its own choice
        why = f"{type(error).__name__}: {str(error)[-300:]}"
        raise UsageError(f"transformers refuses a {config.model_type!r} config with these counts: {why}") from error
    again._name_or_path = config._name_or_path
    return again


def head_width(config: PretrainedConfig) -> int:
    """Entries of a head."""
    text: Any = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def find_cuts(source: Source, counts: Counts) -> Cuts:
    """What the dimensions of each parameter are made up of, as far as `counts` are smaller than the source's.

    Raises:
        UsageError: the model has parts that this narrows in a way that memfit does not know, or not at all.
    """
    before, every = counts_of(source.config), tuple(range(counts_of(source.config).blocks))
    found: dict[str, list[Cut | None]] = {}
    for group in (("heads", "kv_heads"), ("channels",), ("experts",)):
        smaller = {kind: getattr(counts, kind) for kind in group if getattr(counts, kind) != getattr(before, kind)}
        if not smaller:
            continue
        _refuse_grouped(source, group[0])
        config = narrower_config(source.config, dataclasses.replace(before, **smaller), every)
        changed = 0
        for name, (shape, _, _) in _shapes(source, config).items():
            old = source.parameters[name][0]
            for dim, (was, now) in enumerate(zip(old, shape, strict=True)):
                if was != now:
                    cut = _explained(source, name, was, now, before, smaller)
                    found.setdefault(name, [None] * len(old))[dim] = cut
                    changed += 1
        if not changed:
            raise _unsupported(source, group[0], "no weight gets another shape by them")
    cuts = {name: tuple(dims) for name, dims in found.items()}
    return cuts


def readers_of(model: nn.Module, cuts: Cuts, stack: str) -> dict[str, dict[int, str]]:
    """By kind (heads, channels) and block, the layer that reads what they give: what is dropped is missing in its sum.

    Raises:
        UsageError: a block has two such layers, or one that is no linear layer.
    """
    found: dict[str, dict[int, str]] = {"heads": {}, "channels": {}}
    for name, dims in cuts.items():
        module, _, leaf = name.rpartition(".")
        layer = model.get_submodule(module)
        read = {nn.Linear: 1, Conv1D: 0}.get(type(layer))
        cut = dims[read] if read is not None and leaf == "weight" and len(dims) == 2 else None
        if cut is None or cut.kind not in found:
            continue
        number = block_number(name, stack)
        if number is None or number in found[cut.kind]:
            raise UsageError(f"{module}: reads {cut.kind} outside of blocks, or beside another layer: all must stay.")
        found[cut.kind][number] = module
    return found


def stack_of(source: Source, model: nn.Module) -> str:
    """The name of the one list of blocks that the config counts.

    Raises:
        UsageError: there is none, or several.
    """
    blocks = counts_of(source.config).blocks
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [name for name, module in lists if len(module) == blocks]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1 or getattr(source.config, "is_encoder_decoder", False):
        what = ", ".join(outer) or "none"
        raise UsageError(
            f"{source.name}: narrowing takes models with one stack of {blocks} blocks; this "
            f"{source.config.model_type!r} model has {what}. Decoders (llama, mistral, qwen, gemma, gpt2, mixtral) and "
            "encoders as BERT are taken."
        )
    return str(outer[0])


def block_number(parameter: str, stack: str) -> int | None:
    """Which block a parameter is of; None if of none."""
    if not parameter.startswith(f"{stack}."):
        return None
    return int(parameter[len(stack) + 1 :].partition(".")[0])


def renumbered(parameter: str, stack: str, number: int) -> str:
    """The parameter of that name in another block."""
    rest = parameter[len(stack) + 1 :].partition(".")[2]
    return f"{stack}.{number}.{rest}"


def require_blocks(source: Source, old: nn.Module, new: nn.Module, blocks: tuple[int, ...], stack: str) -> None:
    """Each block of the shallower model is built as the one whose weights it gets.

    Raises:
        UsageError: it is not, as the config has no way to say so.
    """
    text = source.config.get_text_config()
    if numbered := next((key for key in _BY_NUMBER if getattr(text, key, None)), None):
        raise _unsupported(source, "blocks", f"with {numbered}, what they compute depends on their number")
    for number, was in enumerate(blocks):
        one, other = (model.get_submodule(f"{stack}.{at}") for model, at in ((old, was), (new, number)))
        for (name, before), (_, after) in zip(_settings(one), _settings(other), strict=False):
            differing = {key: (value, after.get(key)) for key, value in before.items() if after.get(key) != value}
            if differing:
                key, (wanted, made) = next(iter(differing.items()))
                raise UsageError(
                    f"{source.name}: {stack}.{was} would become {stack}.{number}, and a {source.config.model_type!r} "
                    f"config builds that with {f'{name}.' if name else ''}{key} {made!r} in place of {wanted!r}. Drop "
                    "other blocks, or none."
                )


def _settings(block: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """(module, all that is plain of it but sizes and the block's number) of a block's modules."""
    for name, module in block.named_modules():
        plain = {
            key: value for key, value in vars(module).items()
            if isinstance(value, bool | str | float | type(None)) or (isinstance(value, int) and "window" in key)
        }  # fmt: skip
        yield name, {"class": type(module).__name__} | {key: v for key, v in plain.items() if key not in _LAYER_NUMBERS}


def _count(text: Any, what: str) -> int | None:
    for key in _KEYS[what]:
        value = getattr(text, key, None)
        if type(value) is int:
            return value
    return None


def _key(text: Any, what: str) -> str | None:
    known = [key for key in _KEYS[what] if hasattr(text, key)]
    return next((key for key in known if getattr(text, key) is not None), known[0] if known else None)


def _shapes(source: Source, config: PretrainedConfig) -> Mapping[str, tuple[tuple[int, ...], Any, str]]:
    return dataclasses.replace(source, config=config, checkpoint=None, directory=None, gguf=None, raw={}).parameters


def _explained(
    source: Source, name: str, was: int, now: int, before: Counts, smaller: Mapping[str, int]
) -> Cut:
    """The cut that turns a dimension of `was` entries into one of `now`."""
    found: list[Cut] = []
    for kind, count in smaller.items():
        whole = getattr(before, kind)
        widths = (head_width(source.config), 1) if kind in ("heads", "kv_heads") else (1,)
        for each in widths:
            for repeats in (1, 2) if kind == "channels" and _is_gate_and_up(source, name) else (1,):
                if (was, now) == (whole * each * repeats, count * each * repeats):
                    found.append(Cut(kind, each, repeats))  # type: ignore[arg-type]
    if len({(cut.each, cut.repeats) for cut in found}) == 1:  # as many heads of keys as of queries: the same ones
        return found[0]
    why = f"{name} would go from {was} entries to {now}, and which of them are meant is not known"
    raise _unsupported(source, next(iter(smaller)), why)


def _is_gate_and_up(source: Source, name: str) -> bool:
    """Whether the parameter is a gate above an up projection in one linear layer."""
    return name.endswith("gate_up_proj.weight")


def _refuse_grouped(source: Source, kind: str) -> None:
    text = source.config.get_text_config()
    if kind == "experts" and (getattr(text, "n_group", 1) or 1) > 1:
        raise _unsupported(source, kind, f"they are routed in {text.n_group} groups (n_group)")
    if kind == "channels":
        model = source.build()
        fused = [name for name, module in model.named_modules() if is_experts(module)]
        if fused:
            raise _unsupported(source, kind, f"{fused[0]} has them in experts, which go as a whole (--experts)")


def _unsupported(source: Source, kind: str, why: str) -> UsageError:
    return UsageError(
        f"{source.name}: {kind} cannot be dropped from a {source.config.model_type!r} model: {why}. Heads can be where "
        "the config has a head_dim (llama, mistral, qwen2, qwen3, gemma, mixtral), channels where it counts them "
        "(these, BERT, gpt2), experts where they are fused (mixtral, qwen3_moe), blocks in all of them."
    )
