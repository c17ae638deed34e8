"""Files for other programs, on a terminal: what came of a GGUF file, and of ONNX ones."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfit.evaluate.quality import Quality
from memfit.report.terminal import on_text, render_quality
from memfit.units import format_size


def render_export(made: Mapping[str, Any]) -> RenderableType:
    """A file for another program: its size, its types, what writing it took, how near it is."""
    table = Table(box=None, pad_edge=False, show_header=False)
    text = made["text"]
    kinds = ", ".join(f"{kind} ({count})" for kind, count in made["kinds"].items())
    told, measured = made["predicted"]["peak_nbytes"], made["measured"]["peak_nbytes"]
    for name, what in (
        ("size", f"{format_size(made['nbytes'])}, {made['bits_a_weight']:.2f} bits a weight"),
        ("tensors", kinds),
        ("peak of writing", f"{format_size(told)} predicted, {format_size(measured)} measured"),
        ("made", "by the weights alone, without a text" if text is None else on_text(text, judged=True)),
    ):
        table.add_row(name, what)
    parts: list[RenderableType] = [Text(f"Written: {made['out']}, {made['mixture']}", style="bold"), table]
    if made["quality"] is not None:
        parts += [Text(), render_quality(Quality.from_json(dict(made["quality"])))]
    return Group(*parts)


def onnx_lines(made: Mapping[str, Any]) -> list[str]:
    """What came of an ONNX file, from its JSON: a line for each name and figure."""
    operators = ", ".join(f"{name} ({count})" for name, count in made["operators"].items())
    told, measured = made["predicted"]["peak_nbytes"], made["measured"]["peak_nbytes"]
    speed = f"{made['prompt_tokens_per_s']:.1f} tokens/s of the prompt"
    if made["decode_tokens_per_s"] is not None:
        speed += f", {made['decode_tokens_per_s']:.1f} tokens/s of new ones"
    figures = [
        ("ONNX files", f"{format_size(made['nbytes'])}: {operators}"),
        ("peak of writing their weights", f"{format_size(told)} predicted, {format_size(measured)} measured"),
        ("largest difference from memfit's float32", f"{made['difference']:.1e}"),
        ("in ONNX Runtime", f"{format_size(made['resident_nbytes'])} resident, {speed}"),
    ]
    return [f"{name}  {figure}" for name, figure in figures]
