"""What a task takes on a GPU, predicted and measured: the caching allocator's blocks and segments.

    python bench/cuda_account.py [--only llama,t5] [--jobs 8] [--output FILE]      on a machine with a GPU
    python bench/cuda_account.py --predict FILE                                    on any machine
    python bench/cuda_account.py --given FILE                                      measured beside those predictions

Running: the models of `account.py`, in bf16 and fp32, at two points. Training: the models of `train_account.py`, each
lever alone and in combinations. Every model is a process of its own. The prediction follows fake tensors on the CPU;
the measurement asks `torch.cuda.max_memory_allocated` and `max_memory_reserved`, phase by phase.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))

import torch  # noqa: E402

from _common import verdict, write_result  # noqa: E402
from memfit.account.account import Account  # noqa: E402
from memfit.account.dry_run import Task, dry_run  # noqa: E402
from memfit.account.meter import CudaMeter  # noqa: E402
from memfit.models import load_model, load_to_train, loader_for  # noqa: E402
from memfit.task.infer import Infer  # noqa: E402
from memfit.train.task import Train  # noqa: E402
from models_to_account import specs  # noqa: E402
from train_account import RECIPES, SPECS, share_out, task_of  # noqa: E402

POINTS = ({"batch": 4, "prompt": 128, "new_tokens": 6}, {"batch": 1, "prompt": 512, "new_tokens": 6})
MODELS = [f"infer/{name}" for name in specs()] + [f"train/{name}" for name in SPECS]


def cases(name: str) -> Iterator[tuple[str, dict[str, Any], Task, Any]]:
    """(what, spec, task, how it is loaded) of one model."""
    kind, _, model = name.partition("/")
    if kind == "infer":
        spec = specs()[model]
        for dtype in (torch.bfloat16, torch.float32):
            for point in POINTS:
                what = f"{str(dtype).removeprefix('torch.')}, {point['batch']} x {point['prompt']}"
                yield what, spec, Infer(**point), dtype
        return
    for label, recipe in RECIPES.items():
        task = task_of(SPECS[model], recipe)
        if task is not None:
            yield label, SPECS[model], task, task.recipe


def make(spec: dict[str, Any], how: Any, device: str = "cpu") -> torch.nn.Module:
    made = loader_for(spec)
    if isinstance(how, torch.dtype):
        return load_model(made, dtype=how, device=device)
    return load_to_train(made, how, device=device)


def measure(spec: dict[str, Any], task: Task, how: Any) -> tuple[Account, float]:
    """The account by the allocator, and the seconds of the task itself."""
    meter = CudaMeter()
    with meter.phase("load"):
        model = make(spec, how, "cuda")
    if isinstance(task, Train):
        share_out(model)
    started = time.perf_counter()
    task.run(model, meter)
    return meter.account(), time.perf_counter() - started


def of_model(name: str, given: dict[str, Any] | None, predict: bool) -> list[dict[str, Any]]:
    """All cases of one model, in this process."""
    torch.set_num_threads(2)
    rows = []
    for what, spec, task, how in cases(name):
        row: dict[str, Any] = {"model": name, "case": what}
        try:
            if given is None:
                account = dry_run(lambda spec=spec, how=how: make(spec, how), task, device="cuda")
                row["predicted"] = told(account)
            else:
                row["predicted"] = given[f"{name}: {what}"]
            gc.collect()
            if not predict:
                account, row["seconds"] = measure(spec, task, how)
                row["measured"] = told(account)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
            row["where"] = traceback.format_exc().splitlines()[-8:]
        rows.append(row)
    return rows


def told(account: Account) -> dict[str, list[int | None]]:
    return {p.name: [p.peak_nbytes, p.end_nbytes, p.reserved_nbytes] for p in account.phases}


def fresh(name: str, given: Path | None, predict: bool) -> list[dict[str, Any]]:
    """What a fresh process of this file says of one model."""
    words = ["--model", name, *(["--given", str(given)] if given else []), *(["--alone"] if predict else [])]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return [{"model": name, "case": "all", "error": f"exit code {done.returncode}"}]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    worst = max((abs(error(row)) for row in rows if "measured" in row), default=0.0)
    print(name, len(rows), "cases, worst", f"{worst:.3%},", sum("error" in row for row in rows), "failed", flush=True)
    return rows


def peak(told: dict[str, list[int]], index: int = 0) -> int:
    """The largest of all phases."""
    return max(phase[index] for phase in told.values())


def error(row: dict[str, Any], index: int = 0) -> float:
    """How far the prediction of the peak is from what was measured, as a share of it."""
    measured = peak(row["measured"], index)
    return (peak(row["predicted"], index) - measured) / measured


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all but recurrent layers, whose workspace cuDNN chooses; theirs are told beside."""
    lstm = [row for row in rows if "measured" in row and row["model"].endswith("lstm")]
    good = [row for row in rows if "measured" in row and row not in lstm]
    if lstm:
        print("recurrent layers, not judged: largest", f"{max(abs(error(row)) for row in lstm):.3%}")
    found = []
    for kind, index in (("allocated", 0), ("reserved", 2)):
        errors = [abs(error(row, index)) for row in good]
        within = sum(e <= 0.005 for e in errors)
        text = f"{within} of {len(errors)} within 0.5 %, {errors.count(0.0)} to the byte, median "
        text += f"{statistics.median(errors):.4%}, largest {max(errors):.3%}"
        found.append(verdict(f"{kind} on CUDA", within == len(errors), text))
    refused = "UsageError"  # a lever that is not for this model, as everywhere
    failed = [f"{row['model']}: {row['case']}" for row in rows if not row.get("error", refused).startswith(refused)]
    found.append(verdict("every case runs", not failed, ", ".join(failed) or f"{len(good)}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--predict", type=Path)
    parser.add_argument("--given", type=Path)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    if asked.model:
        given = json.loads(asked.given.read_text()) if asked.given else None
        print(json.dumps(of_model(asked.model, given, asked.alone)))
        return
    predict = asked.predict is not None
    with ThreadPoolExecutor(asked.jobs) as pool:
        answers = list(pool.map(lambda name: fresh(name, asked.given, predict), asked.only.split(",")))
    rows = [row for found in answers for row in found]
    if predict:
        told = {f"{row['model']}: {row['case']}": row["predicted"] for row in rows if "predicted" in row}
        asked.predict.write_text(json.dumps(told))
        return
    verdicts = judged(rows)
    found = [side_by_side(row) for row in rows]
    write_result("cuda_account", {"cases": found, "verdicts": verdicts}, output=asked.output)


def side_by_side(row: dict[str, Any]) -> dict[str, Any]:
    """For each phase: blocks predicted, measured, segments predicted, measured."""
    if "measured" not in row:
        return row
    both = {name: (row["predicted"].get(name, [None] * 3), found) for name, found in row["measured"].items()}
    phases = {name: [told[0], found[0], told[2], found[2]] for name, (told, found) in both.items()}
    return {"model": row["model"], "case": row["case"], "phases": phases}


if __name__ == "__main__":
    main()
