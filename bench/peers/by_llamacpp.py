"""llama.cpp's quantizer, through llama-cpp-python; it takes and writes GGUF, and needs neither torch nor numpy.

plain: Q8_0, Q4_K_S, Q3_K_S, Q2_K. imatrix: the same with an importance matrix. iq: IQ4_XS, IQ3_XXS, IQ2_XS with one.
Beside MODEL there are `model.gguf`, in bf16, and `importance.json` (tensor -> mean squares of its inputs).
"""

import argparse
import ctypes
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import llama_cpp as llama

K_MIXTURES = {8: "Q8_0", 4: "Q4_K_S", 3: "Q3_K_S", 2: "Q2_K"}
MIXTURES = {"plain": K_MIXTURES, "imatrix": K_MIXTURES, "iq": {4: "IQ4_XS", 3: "IQ3_XXS", 2: "IQ2_XS"}}
BF16 = 30
"""GGML's number of the type."""
CANNOT = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, default=128, help="of no effect: a type has its own blocks")
    parser.add_argument("--algorithm", choices=tuple(MIXTURES), default="plain")
    parser.add_argument("--scope", choices=("layers", "whole"), default="layers")
    parser.add_argument("--threads", type=int, default=2)
    case = parser.parse_args()
    mixture = MIXTURES[case.algorithm].get(case.bits)
    if mixture is None:
        print(f"no mixture of {case.bits} bits in {case.algorithm}", file=sys.stderr)
        sys.exit(CANNOT)
    options = llama.llama_model_quantize_default_params()
    options.nthread = case.threads
    options.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{mixture}")
    if case.scope == "layers":
        options.token_embedding_type = options.output_tensor_type = BF16
    libraries, before, cpu_before, kept = resident("VmRSS"), 0.0, 0.0, None
    if case.algorithm != "plain":
        found = json.loads((case.model.parent / "importance.json").read_text())
        before, cpu_before = found["seconds"], found["cpu_seconds"]
        kept = importance(found["tensors"])
        options.imatrix = kept
    case.out.mkdir(parents=True)
    target = case.out / "model.gguf"
    source = case.model.parent / "model.gguf"
    started, cpu_started = time.perf_counter(), sum(os.times()[:2])
    failed = llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    seconds, cpu_seconds = time.perf_counter() - started, sum(os.times()[:2]) - cpu_started
    if failed:
        sys.exit(f"llama_model_quantize gave {failed}")
    about = {
        "seconds": seconds + before,
        "cpu_seconds": cpu_seconds + cpu_before,
        "importance_seconds": before,
        "peak_nbytes": resident("VmHWM"),
        "libraries_nbytes": libraries,
        "packed_nbytes": target.stat().st_size,
        "settings": {"mixture": mixture, "importance": kept is not None},
        "versions": {"llama_cpp_python": version("llama_cpp_python")},
        "threads": case.threads,
    }
    (case.out / "peer.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def importance(tensors: dict[str, list[float]]) -> ctypes.Array:
    """The C array that the quantizer reads, ended by an empty entry."""
    entries = (llama.llama_model_imatrix_data * (len(tensors) + 1))()
    for entry, (name, values) in zip(entries, tensors.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = ctypes.cast((ctypes.c_float * len(values))(*values), ctypes.POINTER(ctypes.c_float))
    return entries


def resident(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes (proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


if __name__ == "__main__":
    sys.exit(main())
