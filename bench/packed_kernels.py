"""How fast packed weights run against bf16: one row (decode) and 512 rows (prompt).

    python bench/packed_kernels.py [--rounds 15] [--rows 1 512] [--threads 2] [--output bench/results/kernels.json]

Prints 10⁹ weights/s, GFLOP/s and each one's ratio to bf16. The variants take turns within a round, so that
what else the machine does falls on all of them; a figure is the median of its rounds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from memfit.packed.scheme import Scheme
from memfit.packed.store import PackedWeight

SHAPES = {"mlp 14336 x 4096": (14336, 4096), "head 262144 x 640": (262144, 640)}
SCHEMES = (
    Scheme(bits=8, group=None),
    Scheme(bits=8, group=128),
    Scheme(bits=6, group=128),
    Scheme(bits=5, group=128),
    Scheme(bits=4, group=128),
    Scheme(bits=4, group=32),
    Scheme(bits=4, group=128, symmetric=False),
    Scheme(bits=4, group=None),
    Scheme(bits=3, group=128),
    Scheme(bits=2, group=64),
)
ROWS = (1, 512)


def make_store(shape: tuple[int, int], scheme: Scheme) -> PackedWeight:
    """Random bytes: how long a product takes does not depend on the values."""
    store = PackedWeight(shape, scheme, device="cpu")
    for name, buffer in store.named_buffers():
        if buffer.is_floating_point():
            buffer.fill_(0.01)
        else:
            info = torch.iinfo(buffer.dtype) if name != "zero" else None
            buffer.random_(info.min, info.max + 1) if info else buffer.random_(-2, 2)
    return store


def measure_seconds(run: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant over `rounds` rounds, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for turn in range(rounds + 1):
        for name, call in run.items():
            started = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def describe_machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    flags: set[str] = set()
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() == "flags":
                flags = {f for f in value.split() if f.startswith(("avx", "amx"))}
    return {
        "cpu": cpu,
        "instructions": sorted(
            flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"}
        ),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def find_commit() -> str | None:
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip() if found.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    for title, shape in SHAPES.items():
        weights = shape[0] * shape[1]
        dense = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        stores = {
            scheme.name: make_store(shape, scheme) for scheme in SCHEMES if scheme.why_not(shape) is None
        }
        for rows in options.rows:
            x = torch.randn(rows, shape[1]).to(torch.bfloat16)
            run: dict[str, Callable[[], Any]] = {"bf16": lambda x=x, dense=dense: F.linear(x, dense)}
            for name, store in stores.items():
                run[name] = lambda x=x, store=store: store.matmul(x)
            with torch.inference_mode():
                seconds = measure_seconds(run, options.rounds if rows == 1 else max(options.rounds // 5, 2))
            print(f"\n{title}, {rows} row{'s' if rows > 1 else ''}")
            print(f"{'':18}{'kernel':>10}{'bits/w':>8}{'ms':>9}{'1e9 w/s':>9}{'GFLOP/s':>9}{'to bf16':>9}")
            for name, taken in seconds.items():
                kernel = stores[name].kernel if name in stores else "F.linear"
                bits = stores[name].nbytes * 8 / weights if name in stores else 16.0
                ratio = seconds["bf16"] / taken
                print(
                    f"{name:18}{kernel:>10}{bits:8.3f}{taken * 1e3:9.2f}{weights / taken / 1e9:9.1f}"
                    f"{2 * rows * weights / taken / 1e9:9.0f}{ratio:9.2f}"
                )
                lines.append(
                    {
                        "shape": list(shape),
                        "rows": rows,
                        "variant": name,
                        "kernel": kernel,
                        "bits_per_weight": round(bits, 4),
                        "seconds": taken,
                        "weights_per_second": weights / taken,
                        "ratio_to_bf16": ratio,
                    }
                )
        del dense, stores
    result = {
        "machine": describe_machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": find_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.rounds,
        "lines": lines,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
