"""The `config.json` of a fitted model: what stock transformers and vLLM read, and what only memfit reads."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

from memfit.format.packed import FLOAT, MXFP4, OWN, stored_as
from memfit.packed.forms import Form
from memfit.packed.scheme import Scheme

Path = tuple[str, ...]
"""A module's name, split at its dots."""


def quantization_config(
    schemes: Mapping[str, Form], *, ignore: Iterable[str] = (), embeddings: Iterable[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors: a config group for each scheme and format.

    The targets are anchored regular expressions that match the modules of `schemes` and no others.
    If one of them is of no format of compressed-tensors, the `quant_method` is memfit's own.
    `ignore`: the linear modules left in bf16, by name; vLLM refuses a linear module that is neither a target
    nor ignored. `embeddings`: the modules of `schemes` that are tables, and the heads tied to them.

    Raises:
        ValueError: a module is both quantized and ignored, or an embedding has no scheme.
    """
    ignore, embeddings = set(ignore), set(embeddings)
    if both := sorted(ignore & schemes.keys()):
        raise ValueError(f"both quantized and ignored: {', '.join(both)}")
    if unknown := sorted(embeddings - schemes.keys()):
        raise ValueError(f"embeddings that no scheme is given for: {', '.join(unknown)}")
    modules_of: dict[tuple[Form, str], list[str]] = defaultdict(list)
    for module, scheme in schemes.items():
        modules_of[scheme, stored_as(scheme, embedding=module in embeddings)].append(module)
    groups: dict[str, Any] = {}
    for scheme, form in sorted(modules_of, key=lambda key: _widest_first(*key)):
        groups[f"group_{len(groups)}"] = {
            "targets": module_patterns(modules_of[scheme, form]),
            "weights": _weights(scheme, form),
            "input_activations": _input_activations(scheme),
            "output_activations": None,
            "format": form,
        }
    formats = sorted({form for _, form in modules_of})
    return {
        "quant_method": OWN if OWN in formats else "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": module_patterns(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(scheme: Form, form: str) -> dict[str, Any]:
    """What a config group says of its weights: the arguments of compressed-tensors, or a form of memfit's own."""
    if not isinstance(scheme, Scheme):
        return scheme.to_json()
    kinds = {FLOAT: "float", MXFP4: "float", OWN: scheme.values}
    told: dict[str, Any] = {
        "num_bits": 8 if form == FLOAT else scheme.bits,
        "type": kinds.get(form, "int"),
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group is None else "group",
        "group_size": scheme.group,
        "dynamic": False,
    }
    if scheme.vector != 1:
        told["vector"] = scheme.vector
    return told | ({"scale_dtype": "torch.uint8"} if form == MXFP4 else {})


def _widest_first(scheme: Form, form: str) -> tuple[int, int, bool, str, int, str]:
    if not isinstance(scheme, Scheme):
        return -scheme.bits, 0, True, scheme.name, 0, form
    # The None of a row-wise group does not compare with a number.
    return -scheme.bits, scheme.group or 0, scheme.symmetric, scheme.values, -scheme.activations, form


def _input_activations(scheme: Form) -> dict[str, Any] | None:
    """Symmetric integers with one scale for each token, found as it comes; None: activations stay as they are."""
    if scheme.activations == 16:
        return None
    return {
        "num_bits": scheme.activations, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
        "group_size": None,
    }  # fmt: skip


def model_config(
    config: PretrainedConfig,
    *,
    schemes: Mapping[str, Form],
    version: str,
    ignore: Iterable[str] = (),
    embeddings: Iterable[str] = (),
    tied: Mapping[str, str] | None = None,
    kv_bits: int = 16,
) -> dict[str, Any]:
    """What goes into `config.json`: the original's, in bf16, with `quantization_config` and memfit's own
    part.

    `ignore`, `embeddings`: see `quantization_config`. `tied`: module -> the module whose table it shares, as
    `{"lm_head": "model.embed_tokens"}`, both in `embeddings`: the table is in the file once, and stock
    transformers ties it as it ties the original's; only the scales are there for both.
    """
    embeddings = tuple(embeddings)
    # The library's own text, so that special floats and nested configurations come out as it writes them.
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    data.pop("quantization_config", None)
    data.pop("torch_dtype", None)
    nested = [v for k, v in data.items() if k.endswith("_config") and isinstance(v, dict)]
    for part in nested:
        if "dtype" in part:
            part["dtype"] = "bfloat16"
    data["dtype"] = "bfloat16"
    if schemes:
        data["quantization_config"] = quantization_config(schemes, ignore=ignore, embeddings=embeddings)
    data["memfit"] = {"version": version, "tied": dict(tied or {}), "kv_bits": kv_bits}
    # Stored as FP8 in groups of 32, and no config group can say that they are more than that.
    if mx := [name for name in embeddings if name in schemes and _is_mxfp4(schemes[name])]:
        data["memfit"]["mxfp4"] = module_patterns(mx)
    return data


def _is_mxfp4(scheme: Form) -> bool:
    return isinstance(scheme, Scheme) and scheme.values == "mxfp4"


def module_patterns(modules: Iterable[str]) -> list[str]:
    """Few anchored `re:` patterns that match these module names and nothing else.

    >>> module_patterns(f"model.layers.{i}.mlp.{p}_proj" for i in range(12) for p in ("up", "gate"))
    ['re:^model\\\\.layers\\\\.([0-9]|1[01])\\\\.mlp\\\\.(gate_proj|up_proj)$']
    """
    return [f"re:^{pattern}$" for pattern in _patterns({tuple(name.split(".")) for name in modules})]


def _patterns(names: set[Path]) -> list[str]:
    """Patterns that cover `names`, each name once: first segments with the same continuation are merged."""
    rests: dict[str, set[Path]] = defaultdict(set)
    for name in names:
        rests[name[0]].add(name[1:])
    heads_of: dict[str, list[str]] = defaultdict(list)
    for head in sorted(rests, key=_natural):
        if () in rests[head]:
            heads_of[""].append(head)
        for rest in _patterns(rests[head] - {()}):
            heads_of[rest].append(head)
    return [_either(heads) + (rf"\.{rest}" if rest else "") for rest, heads in heads_of.items()]


def _natural(segment: str) -> tuple[int, str]:
    return (int(segment), "") if segment.isdecimal() else (-1, segment)


def _either(segments: list[str]) -> str:
    """One pattern for all of `segments`; numbers as digit ranges, so that 80 layers stay readable."""
    numbers = [s for s in segments if s.isdecimal()]
    words = [re.escape(s) for s in segments if not s.isdecimal()]
    options = _number_patterns(numbers) + words
    return options[0] if len(segments) == 1 else f"({'|'.join(options)})"


def _number_patterns(numbers: list[str]) -> list[str]:
    """`0` to `27` becomes `[0-9]|1[0-9]|2[0-7]`; leading parts with equal last digits are merged."""
    lasts: dict[str, list[str]] = defaultdict(list)
    for number in numbers:
        lasts[number[:-1]].append(number[-1])
    stems: dict[str, list[str]] = defaultdict(list)
    for stem, digits in lasts.items():
        # Keyed by length too: a stem of one digit and none at all cannot share a pattern.
        stems[f"{len(stem)}:{_digits(digits)}"].append(stem)
    patterns = []
    for key, group in stems.items():
        last = key.split(":", 1)[1]
        fronts = [""] if group == [""] else _number_patterns(group)
        patterns += [front + last for front in fronts]
    return patterns


def _digits(digits: list[str]) -> str:
    """A character class for these digits: `7`, `[36]`, `[0-7]`."""
    if len(digits) == 1:
        return digits[0]
    values = sorted(int(digit) for digit in digits)
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"[{values[0]}-{values[-1]}]"
    return f"[{''.join(map(str, values))}]"
