"""A run killed at random moments ends in the same bytes as one that was not; one that is squeezed ends, too.

    python bench/resume.py [--kills 20] [--output bench/results/resume.json]

The demo model is trained by the command line. The killed run gets SIGKILL after a time drawn at random, again and
again, and is gone on with by `--resume`. The squeezed run gets a limit on its data from outside (prlimit(2)) after a
few steps, which is taken off again later.
"""

import argparse
import hashlib
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _common import verdict, write_result
from memfit import demo

STEPS = 30


def command(out: Path, plan: Path, *more: str) -> list[str]:
    return [
        "memfit", "train", str(demo.model_directory()), "--data", str(demo.calibration_text()), "--plan", str(plan),
        "--steps", str(STEPS), "--save-every", "3", "--evaluate-every", "0", "-o", str(out), "--quiet", *more,
    ]  # fmt: skip


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def log(out: Path) -> list[dict[str, Any]]:
    file = Path(f"{out}.training/log.jsonl")
    lines = file.read_text().splitlines() if file.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # the line that is being written
    return found


def killed(out: Path, plan: Path, kills: int, chance: random.Random, longest: float) -> tuple[int, list[int]]:
    """Run, kill, go on; how often it was killed, and after which steps."""
    done, after = 0, []
    while True:
        process = subprocess.Popen(command(out, plan, "--resume"))
        if done < kills:
            try:
                process.wait(chance.uniform(0.3, 1.0) * longest)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                after.append(max((line["step"] for line in log(out)), default=0))
                continue
        if process.wait() != 0:
            raise SystemExit(f"the run ended with {process.returncode}")
        if done >= kills:
            return done, after
        # It came to its end before all kills: begin anew.
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(f"{out}.training", ignore_errors=True)


def squeezed(out: Path, plan: Path) -> dict[str, Any]:
    """Run with a limit on its data that comes after some steps and goes again."""
    process = subprocess.Popen(command(out, plan, "--overwrite"))
    while len(log(out)) < 4 and process.poll() is None:
        time.sleep(0.05)
    held = []
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        status = Path(f"/proc/{process.pid}/status").read_text()
        held.append(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData")))
        time.sleep(0.01)
    # What is there between steps, and what the most frugal recipe needs with some room.
    rungs = json.loads(plan.read_text())["rungs"]
    limit = min(held) + rungs[-1]["extra_nbytes"] * 3 // 2 + (16 << 20)
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    while len(log(out)) < 14 and process.poll() is None:
        time.sleep(0.05)
    if process.poll() is None:
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    code = process.wait()
    lines = log(out)
    return {
        "exit_code": code, "limit_nbytes": limit, "held_nbytes": [min(held), max(held)],
        "notes": [line for line in lines if "note" in line],
        "rungs": [line["rung"] for line in lines if "rung" in line],
        "losses": [line["loss"] for line in lines if "rung" in line],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        plan = work / "plan.json"
        words = ["--task", "train", "-b", "100%", "--batch", "8", "--sequence", "128", "-o", str(plan), "--quiet"]
        subprocess.run(["memfit", "plan", str(demo.model_directory()), *words], check=True, stdout=subprocess.DEVNULL)
        started = time.monotonic()
        subprocess.run(command(work / "whole", plan), check=True)
        longest = time.monotonic() - started
        losses = [line["loss"] for line in log(work / "whole") if "rung" in line]
        wanted = digest(work / "whole")
        count, after = killed(work / "killed", plan, given.kills, random.Random(0), longest)
        same = digest(work / "killed") == wanted
        short = squeezed(work / "short", plan)
        apart = max((abs(a - b) for a, b in zip(losses, short["losses"], strict=False)), default=1.0)
    verdicts = [
        verdict("same bytes after kills", same, f"{count} kills, after steps {after}"),
        verdict(
            "squeezed run ends", short["exit_code"] == 0 and len(short["losses"]) == len(losses),
            f"{len(short['losses'])} of {len(losses)} steps, rungs {sorted(set(short['rungs']))}, "
            f"loss {apart:.2g} apart",
        ),
        verdict("the squeeze was felt", len(short["notes"]) > 0, str([note["note"] for note in short["notes"]])),
    ]  # fmt: skip
    result = {"sha256": wanted, "kills": count, "after": after, "losses": losses, "squeezed": short}
    write_result("resume", result | {"verdicts": verdicts}, output=given.output)


if __name__ == "__main__":
    main()
