"""A model whose fitting is killed at random moments and run again: are its bytes those of one that was left alone?

    python bench/killed.py [--kills 20] [--output bench/results/killed.json]

The demo model goes to 4 bits by GPTQ within a cap that has all wait on the disk that may. SIGKILL hits the command, not
the jobs that it has started: these end with it. Each kill comes after a time drawn at random; if the run ends before
all kills were made, it begins anew.
"""

import argparse
import hashlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _common import verdict, write_result


def command(out: Path, ram: str) -> list[str]:
    return [
        sys.executable, "-c", "from memfit.cli import main; main()", "fit", "--technique", "quantize", "--bits", "4",
        "--groups", "128", "--keep", "embeddings", "--windows", "8", "--ram", ram, "--no-measure", "--resume",
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
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.iterdir())
        if file.suffix == ".safetensors" or file.name == "config.json"
    }


def doing(out: Path) -> str:
    """What a killed run was at."""
    work = out.parent / f".{out.name}.memfit-work"
    if any(file.stat().st_size for file in work.glob("written-*/*")):
        return "writing"
    blocks = [path for path in work.glob("integers-*/*") if path.suffix != ".part"]
    if (work / "calibrated.json").exists():
        return f"choosing, {len(blocks)} blocks done"
    return "before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        ram = str(smallest_cap(work / "refused") + (8 << 20))
        started = time.monotonic()
        subprocess.run(command(work / "whole", ram), check=True, stdout=subprocess.DEVNULL)
        longest = time.monotonic() - started
        wanted, out = digests(work / "whole"), work / "killed"
        at: list[str] = []
        same: list[bool] = []
        while len(at) < given.kills or not out.exists():
            process = subprocess.Popen(command(out, ram), stdout=subprocess.DEVNULL)
            try:
                process.wait(chance.uniform(0.2, 1.0) * longest if len(at) < given.kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                at.append(doing(out))
                print(f"killed: {at[-1]}", flush=True)
                continue
            if process.returncode:
                raise SystemExit(f"the run ended with {process.returncode}")
            same.append(digests(out) == wanted)
            if len(at) < given.kills:
                shutil.rmtree(out)
    verdicts = [
        verdict("same bytes after kills", all(same) and bool(same), f"{len(at)} kills, {len(same)} runs ended"),
        verdict("kills at different moments", len(set(at)) >= 4, str(dict(Counter(at)))),
    ]
    result = {"sha256": wanted, "kills": len(at), "at": at, "cap_nbytes": int(ram), "seconds": longest}
    write_result("killed", result | {"verdicts": verdicts}, output=given.output)


if __name__ == "__main__":
    main()
