"""README's table of what `quality.py` has found, in Markdown.

    python bench/quality_table.py [results/quality.json]

Divergence of memfit's algorithms, llm-compressor's GPTQ and AutoRound; in brackets processor seconds, unless it ran on
a GPU; at last memfit's best as a share of the best of all peers at the same rate. An empty cell: not run.
"""

import json
import sys
from pathlib import Path
from typing import Any

from _common import RESULTS
from quality import best_and_equals, divergence, ratio_of

COLUMNS = {
    "memfit GPTQ": ("memfit", "gptq"),
    "GPTQ, codebook": ("memfit", "gptq-codebook"),
    "tuned": ("memfit", "tuned"),
    "tuned, codebook": ("memfit", "tuned-codebook"),
    "llm-compressor GPTQ": ("llmcompressor", "gptq"),
    "AutoRound": ("autoround", "tuned"),
}
MODELS = {"demo": "demo", "gemma": "Gemma 3 270M", "minilm": "MiniLM (1 - cosine)"}


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "quality.json"
    rows = [row for row in json.loads(file.read_text())["rows"] if "quality" in row]
    print(line("", [*COLUMNS, "memfit to the best peer"]))
    print("|" + " --- |" * (2 + len(COLUMNS)))
    for model, called in MODELS.items():
        for scope in ("layers", "whole"):
            for bits in (8, 4, 3, 2):
                here = [row for row in rows if (row["model"], row["scope"], row["bits"]) == (model, scope, bits)]
                by = {(row["tool"], row["algorithm"]): row for row in here}
                if here:
                    where = f"{called}{', all of it' if scope == 'whole' else ''}, {bits} bits"
                    print(line(where, [*(cell(by.get(column)) for column in COLUMNS.values()), share(here)]))


def line(first: str, cells: list[str]) -> str:
    return " ".join(["|", *(f"{text} |" if text else "|" for text in [first, *cells])])


def share(here: list[dict[str, Any]]) -> str:
    best, equals = best_and_equals(here)
    return f"{ratio_of(best, min(equals, key=divergence)):.2f}" if equals else ""


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    value = divergence(row)[0]
    told = f"{value:.4g}" if value >= 1 else f"{value:.4f}" if value >= 2e-4 else f"{value:.5f}"
    on_gpu = row.get("settings", {}).get("device_map", "cpu") != "cpu"
    return told if on_gpu else f"{told} ({row['cpu_seconds']:.0f} s)"


if __name__ == "__main__":
    main()
