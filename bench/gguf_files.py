"""memfit's GGUF blocks beside llama.cpp's own, of the same model, in the same mixtures, with the same importances.

    python bench/gguf_files.py --llama PYTHON [--model DIRECTORY] [--mixtures Q4_K_M,Q2_K] [--output FILE]

PYTHON is one that has llama-cpp-python; without it only memfit's files are made. For each mixture: whether both give
each tensor the same type, the errors Σ h (w − ŵ)² of memfit's tensors over those of llama.cpp's (gguf decodes both),
the KL divergence of both files from the original on text that was never trained on, seconds, and how llama.cpp goes
on with a text from memfit's file.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import gguf
import numpy as np
import torch

from _common import verdict, write_result
from memfit import demo
from memfit.calibrate.collect import collect
from memfit.evaluate.text import read_text, windows
from memfit.format.gguf import GgufTensor, write_gguf
from memfit.source import Source, load, open_source

MIXTURES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,Q3_K_M,Q2_K"
LENGTH, WINDOWS = 256, 16
HERE = Path(__file__).parent
PROMPT = "import os\n\ndef "


def decoded(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and numbers of every tensor."""
    return {
        one.name: (one.tensor_type.name, gguf.quants.dequantize(one.data, one.tensor_type))
        for one in gguf.GGUFReader(file).tensors
    }


def importances(source: Source, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    modules = {name.removesuffix(".weight") for name, (shape, _, _) in source.parameters.items() if len(shape) == 2}
    found = collect(source, ids, frozenset(modules), dtype=torch.float32)
    return {name: moments.inputs for name, moments in found.moments.items()}


def by_tensor(source: Source, tensors: tuple[GgufTensor, ...], given: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Importances by the names of the file."""
    names = {one.place.parameter: one.name for one in tensors if len(one.place.shape) == 2}
    firsts = {name: first for name, (_, _, first) in source.parameters.items()}
    arrays = {}
    for module, moments in given.items():
        name = names.get(firsts[f"{module}.weight"])
        width = source.parameters[f"{module}.weight"][0][1]
        if name is not None and moments.numel() == width:
            arrays[name] = moments.numpy()
    return arrays


def log_probabilities(source: Source, ids: torch.Tensor) -> torch.Tensor:
    model = load(source, dtype=torch.float32)
    with torch.no_grad():
        return torch.cat([model(row[None]).logits for row in ids]).log_softmax(-1)


def divergence(file: Path, original: torch.Tensor, ids: torch.Tensor) -> float:
    found = log_probabilities(open_source(file), ids)
    return float((original.exp() * (original - found)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", help="a Python with llama-cpp-python")
    parser.add_argument("--model", type=Path, default=demo.model_directory())
    parser.add_argument("--mixtures", default=MIXTURES)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(given.model)
    tokenizer = source.tokenizer()
    calibration = windows(tokenizer, read_text(demo.calibration_text()), length=LENGTH)[:WINDOWS]
    held_out = windows(tokenizer, read_text(demo.heldout_text()), length=LENGTH)[:WINDOWS]
    moments = importances(source, calibration)
    original = log_probabilities(source, held_out)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="memfit-bench-") as directory:
        work = Path(directory)
        plain = write_gguf(source, work / "plain.gguf", mixture="F32")
        arrays = by_tensor(source, plain, moments)
        np.savez(work / "importance.npz", **arrays)
        weights = decoded(work / "plain.gguf")
        for mixture in given.mixtures.split(","):
            rows[mixture] = compare(work, source, mixture, moments, arrays, weights, (original, held_out), given.llama)
    worst = [
        (ratio, mixture, kind) for mixture, row in rows.items() for kind, ratio in row.get("errors", {}).items()
    ]
    verdicts = [
        verdict("no type of any mixture errs more than llama.cpp's", max(worst)[0] <= 1, f"most: {max(worst)}"),
        verdict(
            "no mixture diverges more than llama.cpp's",
            all(row["divergence"] <= row["divergence_llama"] for row in rows.values()),
            ", ".join(f"{name} {row['divergence'] / row['divergence_llama']:.3f}" for name, row in rows.items()),
        ),
        verdict("all tensors have llama.cpp's types", all(row["same_types"] for row in rows.values()), "by name"),
    ] if worst else []  # fmt: skip
    write_result("gguf_files", {"model": given.model.name, "mixtures": rows, "verdicts": verdicts}, output=given.output)


def compare(
    work: Path,
    source: Source,
    mixture: str,
    moments: dict[str, torch.Tensor],
    arrays: dict[str, np.ndarray],
    weights: dict[str, tuple[str, np.ndarray]],
    held_out: tuple[torch.Tensor, torch.Tensor],
    llama: str | None,
) -> dict[str, Any]:
    ours, theirs = work / f"ours-{mixture}.gguf", work / f"theirs-{mixture}.gguf"
    started = time.perf_counter()
    write_gguf(source, ours, mixture=mixture, importance=moments)
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "nbytes": ours.stat().st_size}
    row["divergence"] = divergence(ours, *held_out)
    print(f"{mixture}: {row['nbytes']} bytes in {row['seconds']:.1f} s, KL {row['divergence']:.5f}", flush=True)
    if llama is None:
        return row
    script = str(HERE / "gguf_llama.py")
    started = time.perf_counter()
    asked = [llama, script, "quantize", str(work / "plain.gguf"), str(theirs), mixture, str(work / "importance.npz")]
    subprocess.run(asked, check=True, capture_output=True)
    row |= {"seconds_llama": time.perf_counter() - started, "nbytes_llama": theirs.stat().st_size}
    row["divergence_llama"] = divergence(theirs, *held_out)
    done = subprocess.run([llama, script, "continue", str(ours), PROMPT], check=True, capture_output=True, text=True)
    row["goes_on"] = json.loads(done.stdout.splitlines()[-1])
    left, right = decoded(ours), decoded(theirs)
    row["same_types"] = {name: kind for name, (kind, _) in left.items()} == {
        name: kind for name, (kind, _) in right.items()
    }
    sums: dict[str, list[float]] = {}
    for name, (kind, numbers) in left.items():
        h = arrays.get(name, np.ones(numbers.shape[-1]))
        exact = weights[name][1].astype(np.float64)
        pair = [float((h * (exact - one.astype(np.float64)) ** 2).sum()) for one in (numbers, right[name][1])]
        if right[name][0] == kind and pair[1]:
            sums.setdefault(kind, []).append(pair[0] / pair[1])
    row["errors"] = {kind: math.exp(sum(map(math.log, found)) / len(found)) for kind, found in sums.items()}
    row["largest"] = {kind: max(found) for kind, found in sums.items()}
    nbytes, seconds = row["nbytes_llama"], row["seconds_llama"]
    print(f"  llama.cpp's: {nbytes} bytes in {seconds:.1f} s, KL {row['divergence_llama']:.5f}")
    print(f"  same types: {row['same_types']}; goes on: {row['goes_on']!r}")
    for kind, ratio in row["errors"].items():
        most = row["largest"][kind]
        print(f"  {kind}: errors {ratio:.4f} of llama.cpp's, {most:.4f} at most of {len(sums[kind])}", flush=True)
    return row


if __name__ == "__main__":
    main()
