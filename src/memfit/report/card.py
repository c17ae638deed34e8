"""The model card: README.md of a fitted directory, for the hub and for whoever finds the directory."""

import json
import re
from typing import Any, Final

from memfit.packed.scheme import OWN_VALUES
from memfit.report.choices import narrowed_line, rows
from memfit.report.report import Report
from memfit.report.terminal import comparison_lines, format_error, made_line, quality_lines, speed_lines
from memfit.units import format_size

# A hub's name for a model: owner/name. A path or a file is no `base_model` that the hub could link to.
_HUB_ID: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def model_card(
    report: Report,
    *,
    base_model: str | None = None,
    license: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
    pipeline_tag: str | None = None,
    onnx: bool = False,
) -> str:
    """The card, Markdown with YAML in front.

    `base_model`: the hub's id of the original, `owner/name`; what is no such id is left out. `license`: the
    original's, if it is known. `auto_class`: the class of transformers that loads the model. `onnx`: the directory is
    one for ONNX Runtime.
    """
    name = base_model or report.model
    parts = [
        _front_matter(report, base_model, license, pipeline_tag, "onnxruntime" if onnx else None),
        f"# {name}, made to fit by memfit",
        _summary(report, name),
        _ONNX_USE if onnx else _OWN_USE if _own(report) else _how_to_load(auto_class, packed=_packed(report)),
        _plan(report),
        _comparison(report),
        _figures(report),
        _made_with(report, " --format onnx" if onnx else ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a model on the hub rather than a path."""
    return _HUB_ID.fullmatch(name) is not None


def _own(report: Report) -> bool:
    """Whether memfit alone reads the weights."""
    schemes = [choice.get("scheme") or {} for choice in report.choices]
    return any("form" in scheme or scheme.get("values") in OWN_VALUES for scheme in schemes)


def _packed(report: Report) -> bool:
    """Whether anything is stored other than in 16 bits."""
    return any(choice.get("scheme") for choice in report.choices)


def _front_matter(
    report: Report, base_model: str | None, license: str | None, pipeline_tag: str | None, library: str | None
) -> str:
    own, packed, narrowed = _own(report), _packed(report), bool(_narrowed(report))
    # A JSON string is a YAML string, whatever it contains.
    fields: list[tuple[str, Any]] = []
    if base_model is not None and is_hub_id(base_model):
        fields += [("base_model", base_model), ("base_model_relation", "finetune" if narrowed else "quantized")]
    fields.append(("library_name", library or ("memfit" if own else "transformers")))
    if license is not None:
        fields.append(("license", license))
    if pipeline_tag is not None:
        fields.append(("pipeline_tag", pipeline_tag))
    lines = [f"{key}: {_yaml(value)}" for key, value in fields]
    tags = ["- memfit", "- compressed-tensors"] if packed and not own and not library else ["- memfit"]
    return "\n".join(["---", *lines, "tags:", *tags, "---"])


def _narrowed(report: Report) -> Any:
    """How much of the model stays, by the plan; None: all of it."""
    return (report.plan or {}).get("narrowed")


def _yaml(text: str) -> str:
    # `no`, `1.0` and the like would be read as something else than a string.
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in (
        "yes",
        "no",
        "on",
        "off",
        "true",
        "false",
        "null",
    )
    return text if plain else json.dumps(text)


_DONE: Final = {
    "scheme": ("quantized",), "sparse": ("pruned",), "low-rank": ("factored",), "shared": ("shared",),
    "whole": ("shared",), "narrow": ("factored",),
}  # fmt: skip
"""Form of a weight to what was done to it."""


def _summary(report: Report, name: str) -> str:
    how = "measured" if report.measured is not None else "predicted"
    peak = format_size(report.best.peak_nbytes)
    task = report.task or {}
    doing = ""
    if {"batch", "prompt", "new_tokens"} <= task.keys():
        doing = (
            f" for batch {task['batch']}, {task['prompt']} tokens of prompt and {task['new_tokens']} new ones"
        )
    schemes = [choice.get("scheme") for choice in report.choices]
    kinds = sorted({word for scheme in schemes if scheme for word in _DONE[scheme.get("form", "scheme")]})
    done = f"its weights {' and '.join(kinds)}" if kinds else ""
    if _narrowed(report):
        done = "fewer blocks, heads, channels or experts" + (f", {done}," if done else "")
    done = done or "its weights in 16 bits"
    text = f"`{name}` with {done} so that its peak of memory is **{peak}** ({how}{doing})"
    if report.budget_nbytes is not None:
        text += f", within a budget of {format_size(report.budget_nbytes)}"
    if report.original is not None:
        text += f"; the original needs {format_size(report.original.peak_nbytes)}"
    return text + "."


def _how_to_load(auto_class: str, *, packed: bool) -> str:
    needed = "transformers and compressed-tensors" if packed else "transformers"
    how = ", which runs it from its packed weights, within the bytes given here" if packed else ""
    return f"""## Use

With {needed} (`pip install {needed.replace(" and", "")}`):

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("DIRECTORY", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

With memfit{how}:

```python
import memfit

model = memfit.load("DIRECTORY")
```"""


_OWN_USE: Final = """## Use

With memfit alone: no format that transformers or vLLM read holds NF4 values, codebooks, factors or what pruning left.

```python
import memfit

model = memfit.load("DIRECTORY")
```"""


_ONNX_USE: Final = """## Use

With ONNX Runtime (`pip install onnxruntime`), which needs neither memfit nor torch. Bytes and speeds told here are of
memfit's own run; what ONNX Runtime took is in `onnx.json`.

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("DIRECTORY/model.onnx")
ids = np.array([[1, 2, 3]])  # [batch, tokens], by the tokenizer that lies beside the model
given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
given["position_ids"] = np.arange(ids.shape[1])[None].repeat(len(ids), axis=0)
for one in session.get_inputs():
    if one.name.startswith("past_key_values."):  # keys and values of the tokens before: none yet
        given[one.name] = np.zeros((len(ids), one.shape[1], 0, one.shape[3]), np.float32)
answers = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
print(answers[0].shape)  # logits, or the last hidden states of an encoder
```

What a decoder answers after the logits is named `present.N.key` and `present.N.value`: give it to the next call as
`past_key_values.N.key` and `past_key_values.N.value`, with the new tokens alone, their positions, and a mask that has
the tokens before in it, too."""


def _plan(report: Report) -> str:
    if not report.choices:
        return ""
    lines = [
        "## What is stored how",
        "",
        "| layers | tensors | stored as | bytes |",
        "| --- | --- | --- | ---: |",
    ]
    lines += [
        f"| {row.where} | {_cell(row.what)} | {row.scheme} | {format_size(row.nbytes)} |"
        for row in rows(report.choices)
    ]
    if narrowed := _narrowed(report):
        lines += ["", narrowed_line(narrowed)]
    kv_bits = (report.plan or {}).get("kv_bits")
    if kv_bits is not None and kv_bits != 16:
        lines += ["", f"The KV cache is kept in {kv_bits} bits when memfit runs the model."]
    return "\n".join(lines)


def _comparison(report: Report) -> str:
    if report.measured is None:
        return ""
    lines, equal = comparison_lines(report.predicted, report.measured, entries=0)
    text = [
        "## Predicted and measured",
        "",
        "| | predicted | measured | error |",
        "| --- | ---: | ---: | ---: |",
    ]
    for line in lines:
        sizes = f"{format_size(line.predicted_nbytes)} | {format_size(line.measured_nbytes)}"
        text.append(f"| {line.what} | {sizes} | {format_error(line)} |")
    if equal:
        text += ["", f"{equal} entries (parameters, buffers, caches) are equal to the byte."]
    return "\n".join(text)


def _figures(report: Report) -> str:
    figures = quality_lines(report.quality) if report.quality else []
    figures += speed_lines(report.speed, report.speed_original) if report.speed else []
    if not figures:
        return ""
    return "\n".join(
        ["## Quality and speed", "", "| | |", "| --- | ---: |", *(f"| {a} | {b} |" for a, b in figures)]
    )


def _made_with(report: Report, form: str) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report.versions.items() if k != "commit")
    if not versions:
        return ""
    machine = report.machine.get("cpu")
    lines = [f"Made with {versions}" + (f" on {machine}." if machine else ".")]
    if made := made_line(report):
        sha256 = f"The SHA-256 of both parts together is `{report.text['sha256']}`." if report.text else ""
        lines.append(f"{made} {sha256}".rstrip())
    same = ["`--text`", "`--window`", "`--windows`", "`--algorithm`"] if report.text else ["`--algorithm`"]
    if report.ram is not None:
        same.append(f"`--ram {report.ram['cap_nbytes']}`")
    again = f"`memfit fit MODEL --plan plan.json{form}` makes it again of the same model"
    lines.append(f"{again}, with the same {', '.join(same)}.")
    return " ".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
