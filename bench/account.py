"""Predicted beside measured bytes, over 16 architectures; scaled against whole; shapes too big to load.

    python bench/account.py [--only llama,t5] [--output bench/results/account.json]

Every measurement is a fresh process. The allocated peak must be right to the byte in the median case and
within 0.5 % in all; the resident peak within 3 % or 16 MiB, and never more than 1 % under. Beside it stands
what `accelerate estimate-memory` says of the same model. On a busy machine the bytes are the same, and the
times are not.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = 2
MIB = 1 << 20
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))

import torch  # noqa: E402

import memfit  # noqa: E402
from _common import verdict, write_result  # noqa: E402
from memfit.account.account import Account  # noqa: E402
from memfit.account.dry_run import dry_run  # noqa: E402
from memfit.account.outside import predict_resident  # noqa: E402
from memfit.models import load_model, loader_for  # noqa: E402
from memfit.outside import outside_of_machine  # noqa: E402
from memfit.source.source import Source  # noqa: E402
from memfit.task.infer import Infer  # noqa: E402
from memfit.worker import run_job  # noqa: E402
from models_to_account import BIG, BIG_BUDGETS, BIG_TASK, DTYPES, POINTS, SCALED, specs  # noqa: E402


def estimate_of_accelerate(spec: dict[str, Any], dtype: str) -> int:
    """The `Total Size` of `accelerate estimate-memory`: its own function, on the same model without weights."""
    from accelerate.utils import calculate_maximum_sizes

    made = loader_for(spec)
    if isinstance(made, Source):
        model = made.build(dtype=torch.float32)
    else:
        with torch.device("meta"):
            model = made()
    total, _ = calculate_maximum_sizes(model)
    return int(total if dtype == "float32" else total / 2)


def parameters(spec: dict[str, Any]) -> int:
    made = loader_for(spec)
    model = made.build() if isinstance(made, Source) else made()
    return sum(parameter.numel() for parameter in model.parameters())


def compare_case(name: str, spec: dict[str, Any], dtype: str, point: dict[str, int], outside: Any) -> dict[str, Any]:
    """One row: what is predicted, what is measured in a fresh process."""
    made = loader_for(spec)
    told = predict_resident(dry_run(lambda: load_model(made, dtype=dtype), Infer(**point)), outside)
    answer = run_job({"do": "measure", "model": spec, "task": point, "dtype": dtype, "threads": THREADS})
    found = Account.from_json(answer["account"])
    assert told.resident_nbytes is not None and found.resident_nbytes is not None
    return {
        "model": name,
        "dtype": dtype,
        **point,
        "predicted_nbytes": told.peak_nbytes,
        "measured_nbytes": found.peak_nbytes,
        "phases": {phase.name: [phase.peak_nbytes, found.phase(phase.name).peak_nbytes] for phase in told.phases},
        "predicted_resident_nbytes": told.resident_nbytes,
        "measured_resident_nbytes": found.resident_nbytes,
        "outside_nbytes": told.outside_nbytes,
        "accelerate_nbytes": estimate_of_accelerate(spec, dtype),
        "seconds": told.seconds,
    }


def print_row(row: dict[str, Any]) -> None:
    error = row["predicted_nbytes"] - row["measured_nbytes"]
    resident = row["predicted_resident_nbytes"] - row["measured_resident_nbytes"]
    print(
        f"{row['model']:10} {row['dtype']:9} {row['batch']:2}x{row['prompt']:<4} "
        f"{row['predicted_nbytes'] / MIB:9.2f} {row['measured_nbytes'] / MIB:9.2f} {error:8d} "
        f"{100 * error / row['measured_nbytes']:7.3f} %  "
        f"{row['predicted_resident_nbytes'] / MIB:8.1f} {row['measured_resident_nbytes'] / MIB:8.1f} "
        f"{resident / MIB:6.1f} {100 * resident / row['measured_resident_nbytes']:6.2f} %  "
        f"{row['accelerate_nbytes'] / MIB:8.1f} "
        f"{100 * (row['accelerate_nbytes'] / row['measured_nbytes'] - 1):6.1f} %  {row['seconds']:5.2f}",
        flush=True,
    )


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The criteria of the table."""
    errors = [abs(row["predicted_nbytes"] - row["measured_nbytes"]) for row in rows]
    shares = [error / row["measured_nbytes"] for error, row in zip(errors, rows, strict=True)]
    residents = [
        (row["predicted_resident_nbytes"] - row["measured_resident_nbytes"], row["measured_resident_nbytes"])
        for row in rows
    ]
    off = [(error, size) for error, size in residents if abs(error) > max(0.03 * size, 16 * MIB)]
    under = min(error / size for error, size in residents)
    foreign = [abs(row["accelerate_nbytes"] / row["measured_nbytes"] - 1) for row in rows]
    exact = sum(error == 0 for error in errors)
    print(
        f"\naccelerate estimate-memory on the same cases: median error {100 * statistics.median(foreign):.1f} %, "
        f"largest {100 * max(foreign):.1f} %"
    )
    return [
        verdict(
            "allocated peak to the byte in the median case",
            statistics.median(errors) == 0,
            f"{exact} of {len(rows)} to the byte",
        ),
        verdict("allocated peak within 0.5 %", max(shares) <= 0.005, f"largest {100 * max(shares):.4f} %"),
        verdict(
            "resident peak within 3 % or 16 MiB",
            not off,
            f"{len(off)} off; largest {max(abs(error) for error, _ in residents) / MIB:.1f} MiB",
        ),
        verdict("resident peak at most 1 % under", under >= -0.01, f"lowest {100 * under:+.2f} %"),
    ]


def compare_scaled() -> list[dict[str, Any]]:
    """The account from one block of each kind, and from all blocks."""
    rows = []
    print("\nscaled against whole      scaled        whole  difference    s scaled   s whole")
    for name in SCALED:
        made, task = loader_for(specs()[name]), Infer(**POINTS[1])
        scaled = dry_run(lambda made=made: load_model(made, dtype="bfloat16"), task)
        whole = dry_run(lambda made=made: load_model(made, dtype="bfloat16"), task, whole=True)
        same = scaled.phases == whole.phases and scaled.entries == whole.entries
        print(
            f"{name:18} {scaled.peak_nbytes:13d} {whole.peak_nbytes:12d} "
            f"{'none' if same else scaled.peak_nbytes - whole.peak_nbytes:>11} "
            f"{scaled.seconds:11.2f} {whole.seconds:9.2f}",
            flush=True,
        )
        rows.append({
            "model": name, "scaled_nbytes": scaled.peak_nbytes, "whole_nbytes": whole.peak_nbytes, "equal": same,
            "scaled_seconds": scaled.seconds, "whole_seconds": whole.seconds,
        })  # fmt: skip
    return rows


def run_big(name: str) -> dict[str, Any]:
    """In this process: the plan of a shape by `memfit.plan`, and the time since its imports."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as directory:
        loader_for({"config": BIG[name]}).config.save_pretrained(directory)  # type: ignore[union-attr]
        started = time.perf_counter()
        plan = memfit.plan(directory, BIG_BUDGETS[name], task=Infer(**BIG_TASK))
        seconds = time.perf_counter() - started
    assert plan.predicted is not None
    return {
        "model": name,
        "budget_nbytes": plan.budget_nbytes,
        "planned_nbytes": plan.predicted["peak_nbytes"],
        "average_bits": plan.average_bits,
        "kv_bits": plan.kv_bits,
        "seconds": seconds,
        "resident_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def compare_big() -> list[dict[str, Any]]:
    """Each shape planned three times, in processes of its own; the median time, the largest resident size."""
    rows = []
    print("\nplan without weights  budget GiB  planned GiB  bits   KV  seconds (median of 3)  resident MiB")
    for name in BIG:
        runs = []
        for _ in range(3):
            command = [sys.executable, __file__, "--big", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        row = runs[0] | {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "all_seconds": [run["seconds"] for run in runs],
            "resident_nbytes": max(run["resident_nbytes"] for run in runs),
        }
        print(
            f"{name:20} {row['budget_nbytes'] / 2**30:11.2f} {row['planned_nbytes'] / 2**30:12.2f} "
            f"{row['average_bits']:5.2f} {row['kv_bits']:4d} {row['seconds']:22.2f} "
            f"{row['resident_nbytes'] / MIB:13.0f}",
            flush=True,
        )
        rows.append(row)
    return rows


def judge_big(big: list[dict[str, Any]]) -> list[dict[str, Any]]:
    most, seconds = max(row["resident_nbytes"] for row in big), max(row["seconds"] for row in big)
    each = ", ".join(f"{row['model']} {row['seconds']:.2f} s" for row in big)
    return [
        verdict("a plan of a big shape in a process of 1.5 GiB", most <= 1.5 * 2**30, f"{most / MIB:.0f} MiB"),
        verdict("a plan of a big shape within 5 s after imports", seconds <= 5, each),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of models, with commas between")
    parser.add_argument("--big", help=argparse.SUPPRESS)
    parser.add_argument("--planning", action="store_true", help="only the plans of big shapes, to planning.json")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.big:
        print(json.dumps(run_big(options.big)))
        return
    if options.planning:
        big = compare_big()
        print(write_result("planning", {"criteria": judge_big(big), "big": big}, output=options.output))
        return
    torch.set_num_threads(THREADS)
    outside = outside_of_machine(threads=THREADS)
    chosen = {name: spec for name, spec in specs().items() if not options.only or name in options.only.split(",")}
    print("model      dtype     texts     predicted  measured  error B              ", end="")
    print("resident: predicted, measured, error      accelerate, error     s")
    rows = []
    for name, spec in chosen.items():
        for dtype in DTYPES:
            for point in POINTS:
                rows.append(compare_case(name, spec, dtype, point, outside))
                print_row(rows[-1])
    print()
    criteria = judge(rows)
    scaled = compare_scaled()
    criteria.append(
        verdict("scaled equals whole to the byte", all(row["equal"] for row in scaled), f"{len(scaled)} models")
    )
    big = compare_big()
    criteria += judge_big(big)
    result = {
        "threads": THREADS,
        "parameters": {name: parameters(spec) for name, spec in chosen.items()},
        "outside": {"runtime_nbytes": dict(outside.runtime_nbytes), "kernel_nbytes": outside.kernel_nbytes},
        "criteria": criteria,
        "cases": rows,
        "scaled": scaled,
        "big": big,
    }
    print(write_result("account", result, output=options.output))


if __name__ == "__main__":
    main()
