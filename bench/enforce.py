"""Under `--enforce` a training plan's run never exceeds its budget: the system would refuse it the memory.

    python bench/enforce.py --text FILE [--work DIRECTORY] [--output bench/results/enforce.json]

Gemma 3 270M is trained by the command line, four steps at each budget, from loading to the saved model, with the limit
on. A run passes if it ends well on the recipe that was planned: an allocation that is refused would send it down a
rung. As a control, a limit well below a plan's peak must be felt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from _common import verdict, write_result  # noqa: E402
from train import gemma  # noqa: E402

SHARES = (25, 12, 10)
STEPS = 4
CONTROL = 0.6


def run(model: Path, text: Path, plan: Path, out: Path) -> dict[str, Any]:
    """One enforced run: how it ended, its rungs and what it noted."""
    words = ["--data", str(text), "--plan", str(plan), "--steps", str(STEPS), "--evaluate-every", "0", "--enforce"]
    done = subprocess.run(
        ["memfit", "train", str(model), *words, "-o", str(out), "--quiet"], capture_output=True, text=True
    )
    file = Path(f"{out}.training/log.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    steps = [line for line in lines if "rung" in line]
    return {
        "exit_code": done.returncode, "steps": len(steps), "rungs": [line["rung"] for line in steps],
        "peak_nbytes": max((line["peak_nbytes"] for line in steps), default=0),
        "notes": [line["note"] for line in lines if "note" in line], "message": " ".join(done.stderr.split())[-300:],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    import memfit

    task = memfit.Train(batch=4, sequence=256, hyper=memfit.Hyper(lr=1e-5, clip=1.0))
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        work = given.work or Path(directory)
        model = gemma(work)
        whole = memfit.account(model, memfit.plain_training(model, task)).peak_nbytes
        for share in SHARES:
            plan = memfit.plan(model, whole * share // 100, task=task, adapters=False)
            file = Path(directory) / f"plan-{share}.json"
            file.write_text(plan.dumps())
            row = run(model, given.text, file, Path(directory) / f"out-{share}")
            row |= {"share": share, "budget_nbytes": plan.budget_nbytes, "predicted_nbytes": plan.peak_nbytes}
            rows.append(row)
            print(share, {name: value for name, value in row.items() if name != "message"}, flush=True)
        told = json.loads(file.read_text())
        told["budget_nbytes"] = int(plan.peak_nbytes * CONTROL)
        file.write_text(json.dumps(told))
        control = run(model, given.text, file, Path(directory) / "out-control")
        print("control", control, flush=True)
    good = [row for row in rows if row["exit_code"] == 0 and row["steps"] == STEPS and not any(row["rungs"])]
    verdicts = [
        verdict(
            "no run exceeds its budget", len(good) == len(rows),
            "; ".join(f"{r['share']} %: {r['predicted_nbytes'] >> 20} of {r['budget_nbytes'] >> 20} MiB" for r in rows),
        ),
        verdict(
            "the limit is felt below the peak", control["exit_code"] != 0 or any(control["rungs"]),
            f"exit code {control['exit_code']}, rungs {control['rungs']}, {control['message'][-200:]!r}",
        ),
    ]  # fmt: skip
    write_result("enforce", {"runs": rows, "control": control, "verdicts": verdicts}, output=given.output)


if __name__ == "__main__":
    main()
