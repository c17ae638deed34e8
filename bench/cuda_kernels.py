"""Products with packed weights on a GPU beside bf16: how far from float64, and how long.

    python bench/cuda_kernels.py [--size 8192] [--output FILE]

A weight [N, N] in every format, for 1, 16 and 512 rows of activations. Times are medians of replayed graphs of products
with eight different weights, one after the other, so that none is in the cache and no launch is waited for; `eager` is
without a graph. Every format's lines stand beside bf16's of the same run.
"""

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _common import verdict, write_result
from memfit.packed.fake import aiming_at
from memfit.packed.modules import store_of
from memfit.packed.scheme import Scheme
from memfit.technique.quantize import quantize

COPIES, ROUNDS = 8, 30
SCHEMES = {
    "8 bits, a scale a row": Scheme(bits=8, group=None),
    "8 bits, g128": Scheme(bits=8, group=128, symmetric=False),
    "6 bits, g128": Scheme(bits=6, group=128, symmetric=False),
    "4 bits, g128": Scheme(bits=4, group=128, symmetric=False),
    "4 bits, g128, symmetric": Scheme(bits=4, group=128),
    "3 bits, g128": Scheme(bits=3, group=128, symmetric=False),
    "2 bits, g64": Scheme(bits=2, group=64, symmetric=False),
    "NF4": Scheme(bits=4, group=64, values="nf4"),
    "MXFP4": Scheme(bits=4, group=32, values="mxfp4"),
    "FP8": Scheme(bits=8, group=None, values="fp8"),
    "W8A8": Scheme(bits=8, group=None, activations=8),
}


def packed(weight: Tensor, scheme: Scheme) -> Any:
    """The weight packed as it is loaded for CUDA, and there."""
    made = quantize(weight, scheme)
    with aiming_at("cuda"):
        store = store_of((weight.shape[0], weight.shape[1]), scheme)
    store.fill(made.q, made.scale, made.zero, *([made.table] if made.table is not None else []))  # type: ignore
    return store.to("cuda")


def times(products: list[Any]) -> tuple[float, float]:
    """Microseconds of one product: of a replayed graph of them all, and called one by one."""
    for product in products:
        product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product()

    def eager() -> None:
        for product in products:
            product()

    return _median(graph.replay) / len(products), _median(eager) / len(products)


def _median(run: Any) -> float:
    found = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return statistics.median(found[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    size, lines = given.size, []
    torch.manual_seed(0)
    weight = torch.randn(size, size).to(torch.bfloat16)
    plain = [weight.cuda() for _ in range(COPIES)]
    few, many = {}, {}
    for rows in (1, 16, 512):
        x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
        few[rows], many[rows] = times([lambda w=w, x=x: x @ w.t() for w in plain])
        lines.append({"format": "bf16", "rows": rows, "microseconds": few[rows], "eager": many[rows]})
        print(lines[-1], flush=True)
    del plain
    for name, scheme in SCHEMES.items():
        store = packed(weight, scheme)
        stores = [store, *(copy.deepcopy(store) for _ in range(COPIES - 1))]
        for rows in (1, 16, 512):
            x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
            exact = x.double() @ store.dense_rows(0, size, dtype=torch.float32).double().t()
            got = store.matmul(x).double()
            far = float((got - exact).norm() / exact.norm())
            took, eager = times([lambda s=s, x=x: s.matmul(x) for s in stores])
            lines.append(
                {
                    "format": name, "rows": rows, "microseconds": took, "eager": eager, "error": far,
                    "of_bf16": took / few[rows], "eager_of_bf16": eager / many[rows], "nbytes": store.nbytes,
                }
            )  # fmt: skip
            print(lines[-1], flush=True)
        del store, stores
    # bf16 outputs are rounded to 8 bits; W8A8 rounds the activations too.
    bad = [line for line in lines if line.get("error", 0.0) > (0.02 if line["format"] == "W8A8" else 0.004)]
    decode = {line["format"]: round(line["of_bf16"], 2) for line in lines if line["rows"] == 1 and "of_bf16" in line}
    fewer = all(share < 1 for name, share in decode.items() if name[0] in "234")
    found = [
        verdict("each product is that of its weight", not bad, f"{bad}"),
        verdict("4 bits and fewer decode faster than bf16", fewer, f"{decode}"),
    ]
    write_result("cuda_kernels", {"size": size, "lines": lines, "verdicts": found}, output=given.output)


if __name__ == "__main__":
    main()
