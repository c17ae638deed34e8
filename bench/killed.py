"""A model whose fitting is killed at random moments and run again: are its bytes those of one that was left alone?

    python bench/killed.py [--kills 20] [--jobs] [--output bench/results/killed.json]

The demo model goes to 4 bits by GPTQ within a cap that has all wait on the disk that may. SIGKILL hits the command, not
the jobs that it has started: these end with it. Each kill comes after a time drawn at random; if the run ends before
all kills were made, it begins anew. With `--jobs` the jobs themselves are killed, each forked from a process that has
all code already: choosing integers and writing, with nothing of the command around them, in a tenth of the time.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import memfit
from _common import verdict, write_result
from memfit import demo
from memfit.compensate import Thrift
from memfit.plan.allowed import Allowed
from memfit.plan.plan import dumps
from memfit.planning import uniform_plan
from memfit.source.source import open_source
from memfit.study import Study
from memfit.text import Text, write_windows


def command(out: Path, ram: str) -> list[str]:
    return [
        sys.executable, "-c", "from memfit_command import main; main()", "fit", "--technique", "quantize", "--bits",
        "4", "--groups", "128", "--keep", "embeddings", "--windows", "8", "--ram", ram, "--no-measure", "--resume",
        "--threads", "1", "--out", str(out),
    ]  # fmt: skip


def smallest_cap(out: Path) -> int:
    done = subprocess.run(command(out, "1MiB"), capture_output=True, text=True, check=False)
    found = re.search(r"works is\s+(\d+)\s+bytes", done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"no minimum was named: {done.stdout}{done.stderr}")
    return int(found[1])


def digests(out: Path) -> dict[str, str]:
    """Of what does not tell what was measured."""
    place = out / "written-here" if (out / "written-here").exists() else out
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(place.iterdir())
        if file.suffix == ".safetensors" or file.name == "config.json"
    }


def doing(out: Path) -> str:
    """What a killed run was at."""
    work = out.parent / f".{out.name}.memfit-work"
    work = work if work.exists() else out
    if any(file.stat().st_size for file in work.glob("written-*/*")):
        return "writing"
    blocks = [path for path in work.glob("integers-*/*") if path.suffix != ".part"]
    if (work / "calibrated.json").exists() or blocks:
        return f"choosing, {len(blocks)} blocks done"
    return "before"


Run = Callable[[Path, float | None], bool]
"""Runs to `out`, and kills after so many seconds; whether it came to its end."""


def by_command(ram: str) -> Run:
    def run(out: Path, seconds: float | None) -> bool:
        process = subprocess.Popen(command(out, ram), stdout=subprocess.DEVNULL)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return out.exists()  # it is put there whole, at the very end
        if process.returncode:
            raise SystemExit(f"the run ended with {process.returncode}")
        return True

    return run


def by_jobs() -> Run:
    study = Study(open_source(demo.model_directory()), memfit.Infer(), Allowed(bits=(4,), groups={4: (128,)}))
    plan = dumps(uniform_plan(study, 1 << 40))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memfit.compress"])

    def run(out: Path, seconds: float | None) -> bool:
        written = out / "written-here"
        if not out.exists():
            written.mkdir(parents=True)
            (out / "plan.json").write_text(plan, encoding="utf-8")
            write_windows(study.source, Text.of_demo(calibration_windows=8, evaluation_windows=1), out)
        told: dict[str, Any] = {"model": str(demo.model_directory()), "work": str(out), "threads": 1}
        integers = str(out / "integers-x")
        thrift = Thrift(batch=2, spill=True, hold=False).to_json()
        jobs: list[dict[str, Any]] = [
            {"do": "choose", "thrift": thrift, "integers": integers, **told},
            {"do": "compress", "output": str(written), "search": True, "integers": integers, **told},
        ]
        code = (
            f"import json\nfrom memfit.worker import JOBS\njobs = json.loads({json.dumps(jobs)!r})\n"
            "for job in jobs: JOBS[job['do']](job)"
        )
        process = context.Process(target=exec, args=(code, {}))
        process.start()
        process.join(seconds)
        ended = not process.is_alive()
        process.kill()
        process.join()
        if ended and process.exitcode:
            raise SystemExit(f"the jobs ended with {process.exitcode}")
        return ended

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", action="store_true", help="kill the jobs, not the command")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        ram = None if given.jobs else str(smallest_cap(work / "refused") + (8 << 20))
        run = by_jobs() if ram is None else by_command(ram)
        whole, out = work / "whole", work / "killed"
        run(whole, None)
        shutil.rmtree(whole)
        started = time.monotonic()
        run(whole, None)
        longest = time.monotonic() - started
        wanted = digests(whole)
        at: list[str] = []
        same: list[bool] = []
        ended = False
        while len(at) < given.kills or not ended:
            ended = run(out, chance.uniform(0.05, 1.0) * longest if len(at) < given.kills else None)
            if not ended:
                at.append(doing(out))
                print(f"killed: {at[-1]}", flush=True)
                continue
            same.append(digests(out) == wanted)
            if len(at) < given.kills:
                shutil.rmtree(out)
    verdicts = [
        verdict("same bytes after kills", all(same) and bool(same), f"{len(at)} kills, {len(same)} runs ended"),
        verdict("kills at different moments", len(set(at)) >= 4, str(dict(Counter(at)))),
    ]
    result = {
        "through": "jobs" if given.jobs else "command", "sha256": wanted, "kills": len(at), "at": at, "cap_nbytes": ram,
        "seconds": longest,
    }  # fmt: skip
    write_result("killed", result | {"verdicts": verdicts}, output=given.output)


if __name__ == "__main__":
    main()
