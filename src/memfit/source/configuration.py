"""Reading config.json without trusting it, and the quantization that it declares."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from transformers import CONFIG_MAPPING, PretrainedConfig

from memfit.errors import BrokenInput
from memfit.packed.forms import Form, form_of
from memfit.packed.scheme import MX_GROUP, OWN_VALUES, Scheme, Values
from memfit.source.safetensors import check_within, read_json

LAYERS_MAX: Final = 4096
"""More layers than any model has; a config that asks for more would only keep the machine busy."""
_COUNTS: Final = re.compile(r"(num_.*layers|n_layers?|num_.*experts|n_routed_experts|.*_layers)")
_JSON_NBYTES_MAX: Final = 16 << 20


def read_config(directory: Path) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config of a model directory, as transformers' object (without its quantization) and as it stands.

    Raises:
        BrokenInput: no config.json, no JSON, code of its own to be run, an unknown model type, or values that
            transformers refuses.
    """
    file = directory / "config.json"
    if not (file.exists() or file.is_symlink()):
        if (directory / "adapter_config.json").is_file():
            raise BrokenInput(
                f"{directory}: has adapters and no model. Merge them into theirs with peft "
                "(PeftModel.from_pretrained(...).merge_and_unload()), and give what that saves."
            )
        raise BrokenInput(
            f"{file}: is missing. A model directory needs it; give memfit the directory that has one."
        )
    raw = read_json(check_within(file, directory), limit=_JSON_NBYTES_MAX)
    refuse_remote_code(raw, file)
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.exists():
        refuse_remote_code(read_json(check_within(tokenizer, directory), limit=_JSON_NBYTES_MAX), tokenizer)
    return config_of(raw, file), raw


def refuse_remote_code(raw: Any, file: Path) -> None:
    """Raise BrokenInput where a config asks for code from the checkpoint to be run, at whatever depth."""
    if isinstance(raw, dict):
        if "auto_map" in raw:
            raise BrokenInput(
                f"{file}: the key 'auto_map' asks to run code that comes with the checkpoint "
                f"({raw['auto_map']!s:.80}). "
                "memfit never does. Use a model whose type transformers knows, or remove the key if it does."
            )
        for value in raw.values():
            refuse_remote_code(value, file)


def config_of(raw: Mapping[str, Any], file: Path) -> PretrainedConfig:
    """transformers' config object of a raw config; `file` is for messages."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise BrokenInput(
            f"{file}: the model_type {kind!r} is none that transformers knows. "
            "Update transformers if it is newer, or correct the key."
        )
    _refuse_counts(raw, file)
    parts = {key: value for key, value in raw.items() if key not in ("quantization_config", "memfit")}
    try:
        config = CONFIG_MAPPING[kind].from_dict(parts)
    except Exception as error:  # each config class checks its values with exceptions of its own choice
        raise BrokenInput(
            f"{file}: transformers refuses it: {str(error)[:300]}. Correct the value."
        ) from error
    return config


def _refuse_counts(raw: Mapping[str, Any], file: Path) -> None:
    for key, value in raw.items():
        if isinstance(value, dict):
            _refuse_counts(value, file)
        elif _COUNTS.fullmatch(key) and isinstance(value, int) and not 0 <= value <= LAYERS_MAX:
            raise BrokenInput(f"{file}: {key} is {value}; 0 to {LAYERS_MAX} are believed. Correct the value.")


def parse_schemes(
    raw: Mapping[str, Any], modules: Iterable[str] | Mapping[str, str], *, file: Path = Path("config.json")
) -> dict[str, Form]:
    """The scheme of each module that a config's `quantization_config` covers; empty where there is none.

    A target is a module's name, `re:` and an expression that matches a name from its start, or the name of a
    class; the first kind that matches decides, as in compressed-tensors.

    Args:
        raw: config.json as it stands.
        modules: names of the modules that could be quantized, or these names with the names of their classes.
        file: for messages.

    Raises:
        BrokenInput: a method, a format or a setting that memfit does not run.
    """
    quantization = raw.get("quantization_config", raw.get("compression_config"))
    if quantization is None:
        return {}
    groups, ignore = _checked_groups(quantization, file)
    classes = modules if isinstance(modules, Mapping) else dict.fromkeys(modules, "Linear")
    own = raw.get("memfit")
    mx = _strings((own.get("mxfp4") if isinstance(own, dict) else None) or [], "memfit.mxfp4", file)
    schemes: dict[str, Form] = {}
    for module, kind in classes.items():
        if min((_rank(target, module, kind) for target in ignore), default=_NEVER) < _NEVER:
            continue
        ranked = [(_rank(target, module, kind), scheme) for targets, scheme in groups for target in targets]
        rank, scheme = min(ranked, key=lambda one: one[0], default=(_NEVER, None))
        if scheme is not None and rank < _NEVER:
            # A table of MXFP4 is stored as FP8, whose levels include all of its.
            if scheme == _FP8_AS_MX and any(_rank(target, module, kind) < _NEVER for target in mx):
                scheme = Scheme(bits=4, group=MX_GROUP, values="mxfp4")
            schemes[module] = scheme
    return schemes


_NEVER: Final = 3
_FP8_AS_MX: Final = Scheme(bits=8, group=MX_GROUP, values="fp8")
_FORMATS: Final[dict[str, tuple[str, ...]]] = {
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "mxfp4-pack-quantized": ("float",),
    "memfit": OWN_VALUES,
}
"""Formats of weights that memfit runs, and the types of their values."""


def _rank(target: str, module: str, kind: str) -> int:
    """How closely a target means a module: 0 by name, 1 by expression, 2 by class, 3 not at all."""
    if target == module:
        return 0
    if target.startswith("re:") and re.match(target[3:], module):
        return 1
    return 2 if target == kind else _NEVER


def _checked_groups(quantization: Any, file: Path) -> tuple[list[tuple[list[str], Form]], list[str]]:
    """The groups of a quantization_config, targets and scheme, and the modules that it leaves alone."""
    if not isinstance(quantization, dict):
        raise _refuse(file, "quantization_config is no object")
    method = quantization.get("quant_method")
    if method not in ("compressed-tensors", "memfit"):
        raise _refuse(
            file,
            f"the quant_method {method!r} is not known to memfit, which runs 'compressed-tensors' and reads "
            "'gptq' and 'awq'",
        )
    for key in ("sparsity_config", "kv_cache_scheme", "transform_config"):
        value = quantization.get(key)
        if value and not (key == "sparsity_config" and value.get("format") in (None, "dense")):
            raise _refuse(file, f"quantization_config.{key} is set, which memfit does not run")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refuse(file, "quantization_config has no config_groups")
    checked = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise _refuse(file, f"config group {name!r} is no object")
        form = group.get("format") or quantization.get("format")
        if form not in _FORMATS or (form == "memfit") > (method == "memfit"):
            raise _refuse(
                file,
                f"config group {name!r} has the format {form!r}; memfit runs 'pack-quantized', "
                "'mxfp4-pack-quantized', 'int-quantized' and 'float-quantized'",
            )
        if group.get("output_activations") is not None:
            raise _refuse(file, f"config group {name!r} quantizes output_activations, which memfit does not run")
        checked.append(
            (_strings(group.get("targets"), f"targets of {name!r}", file), _scheme(group, name, form, file))
        )
    return checked, _strings(quantization.get("ignore") or [], "ignore", file)


def _scheme(group: Mapping[str, Any], name: str, form: str, file: Path) -> Form:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _refuse(file, f"config group {name!r} has no weights")
    if "form" in weights and form == "memfit":
        try:
            return form_of(weights)
        except (ValueError, TypeError) as error:
            raise _refuse(file, f"config group {name!r}: {error}") from error
    kind, strategy, bits = weights.get("type", "int"), weights.get("strategy"), weights.get("num_bits")
    if kind not in _FORMATS[form] or type(bits) is not int:
        raise _refuse(
            file,
            f"config group {name!r} has weights of {bits!r} bits, type {kind!r}; in the format {form!r} memfit runs "
            f"{' and '.join(_FORMATS[form])}",
        )
    if weights.get("dynamic") or weights.get("actorder") not in (None, False, "weight", "static"):
        raise _refuse(
            file, f"config group {name!r} has dynamic or reordered weights, which memfit does not run"
        )
    if strategy not in ("group", "channel"):
        raise _refuse(
            file, f"config group {name!r} has the strategy {strategy!r}; memfit runs 'group' and 'channel'"
        )
    size = weights.get("group_size") if strategy == "group" else None
    if strategy == "group" and type(size) is not int:
        raise _refuse(file, f"config group {name!r} has the group_size {size!r}")
    try:
        floats: dict[str, Values] = {"float-quantized": "fp8", "mxfp4-pack-quantized": "mxfp4"}
        return Scheme(
            bits=bits, group=size, symmetric=bool(weights.get("symmetric", True)), values=floats.get(form) or kind,
            activations=_activations(group.get("input_activations"), name, file), vector=weights.get("vector", 1),
        )  # fmt: skip
    except ValueError as error:
        raise _refuse(file, f"config group {name!r}: {error}") from error


def _activations(told: Any, name: str, file: Path) -> int:
    """Bits of the activations that a group is multiplied with: 16, or 8 if they are rounded by token as they come."""
    if told is None:
        return 16
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    found = {key: told.get(key) for key in wanted} if isinstance(told, dict) else told
    if found != wanted:
        raise _refuse(
            file, f"config group {name!r} has the input_activations {found}; memfit runs none, or {wanted}"
        )
    return 8


def _strings(value: Any, what: str, file: Path) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _refuse(file, f"{what} is no list of names")
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error as error:
                raise _refuse(file, f"{what}: {item!r} is no regular expression: {error}") from error
    return value


def _refuse(file: Path, reason: str) -> BrokenInput:
    return BrokenInput(
        f"{file}: {reason}. Stock transformers would run such a model with random weights; take the "
        "unquantized "
        "checkpoint and let memfit quantize it."
    )
