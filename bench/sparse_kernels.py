"""How fast products with pruned weights run against bf16: one row (decode), 16 and 512 rows (prompt).

    python bench/sparse_kernels.py [--rounds 9] [--threads 1]

A figure is the least of its rounds, in which all take turns: processor seconds of one thread, and of two the seconds
that pass. Ratios are to `F.linear` with the dense weight. Pruning itself is timed too, at 4096 x 4096.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from _common import write_result
from memfit.packed.forms import Sparse
from memfit.packed.sparse import SparseWeight
from memfit.technique.gptq import factor
from memfit.technique.prune import prune
from memfit.technique.sparsegpt import order_for, sparsegpt

SHAPES = ((2048, 2048), (14336, 4096))
FORMS = (Sparse(), Sparse(sparsity=0.8), Sparse(pattern="2:4"), Sparse(pattern="blocks"))
ROWS = (1, 16, 512)


def least_seconds(run: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Least seconds of each over `rounds` rounds, after one that does not count."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found = dict.fromkeys(run, float("inf"))
    for turn in range(rounds + 1):
        for name, call in run.items():
            started = clock()
            call()
            if turn:
                found[name] = min(found[name], clock() - started)
    return found


def products(threads: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    lines = []
    for shape in SHAPES:
        weights = shape[0] * shape[1]
        dense = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        stores = {}
        for form in FORMS:
            stores[form.name] = SparseWeight(shape, form)
            stores[form.name].fill(dict(prune(dense, form).parts))
        for rows in ROWS:
            x = torch.randn(rows, shape[1]).to(torch.bfloat16)
            run: dict[str, Callable[[], Any]] = {"bf16": lambda x=x, dense=dense: F.linear(x, dense)}
            run |= {name: lambda x=x, store=store: store.matmul(x) for name, store in stores.items()}
            with torch.inference_mode():
                seconds = least_seconds(run, rounds if rows < 512 else max(rounds // 3, 2))
            print(f"\n{shape[0]} x {shape[1]}, {rows} rows, {threads} threads")
            for name, taken in seconds.items():
                bits = 8 * stores[name].nbytes / weights if name in stores else 16.0
                ratio = taken / seconds["bf16"]
                each = taken / weights * 1e9
                print(f"{name:20}{bits:8.2f} bits{taken * 1e3:10.2f} ms{each:8.3f} ns/weight{ratio:8.2f}")
                lines.append({
                    "shape": list(shape), "rows": rows, "threads": threads, "variant": name, "seconds": taken,
                    "bits_per_weight": round(bits, 4), "time_to_bf16": round(ratio, 3),
                })  # fmt: skip
    return lines


def pruning() -> list[dict[str, Any]]:
    """Processor seconds of making them, 4096 x 4096."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 4096, generator=generator) * torch.randn(4096, generator=generator).exp()
    x += 0.5 * x.roll(1, 1)
    hessian = x.t() @ x / 4096
    weight = torch.randn(4096, 4096, generator=generator).to(torch.bfloat16)
    lines = []
    print("\nprocessor seconds, 4096 x 4096")
    for form in FORMS:
        made = factor(hessian, order=order_for(hessian.diagonal(), form))
        ways: dict[str, Callable[[], Any]] = {
            "magnitude": lambda form=form: prune(weight, form),
            "wanda": lambda form=form: prune(weight, form, importance=hessian.diagonal()),
            "sparsegpt": lambda form=form, made=made: sparsegpt(weight, made, form),
        }
        taken = least_seconds(ways, 1)
        print(f"{form.name:20}" + "".join(f"{name} {seconds:.2f}   " for name, seconds in taken.items()))
        lines.append({"form": form.name, "seconds": {name: round(seconds, 3) for name, seconds in taken.items()}})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    options = parser.parse_args()
    made = pruning()
    lines = [line for threads in options.threads for line in products(threads, options.rounds)]
    print("\nwritten to", write_result("sparse_kernels", {"rounds": options.rounds, "pruning": made, "lines": lines}))


if __name__ == "__main__":
    main()
