"""A 7B-shaped model compressed to 4 bits within 2.5 GiB of resident memory: how long, beside reading and writing it?

    python bench/stream.py [--layers 32] [--ram 2.5GiB] [--scratch DIR] [--only rtn] [--output FILE]

Llama-2-7B's shape, weights by chance, bf16, in shards (14 GB for 32 layers; they are made here, and deleted). Linear
layers go to 4 bits in groups of 128, to the nearest and by GPTQ on 8 x 512 tokens; embedding and head stay in 16 bits.
The peak of a block does not depend on how many there are: with fewer `--layers` only the time is another.

The cap is enforced by the system (RLIMIT_DATA in the jobs); what counts here is the largest resident size that the
system has seen of any process of the command, planning among them: ru_maxrss of its descendants (getrusage(2)), and
VmHWM of each job, as a process that does several resets what the first one counts.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from transformers import LlamaConfig

from _common import verdict, write_result
from memfit import demo
from memfit.format.companions import save_companions
from memfit.format.safetensors import TensorSpec, Writer
from memfit.source.source import source_from_config
from memfit.units import format_size, parse_size

POOL = 1 << 24
PIECE = 8 << 20


def make_model(directory: Path, layers: int) -> int:
    """Write the model; its bytes."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, dtype="bfloat16",
        bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    directory.mkdir(parents=True)
    source = source_from_config(config, weights=False)
    shapes = {name: shape for name, (shape, _, own) in source.parameters.items() if own == name}
    pool = torch.empty(POOL).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    specs = [TensorSpec(name=name, dtype=torch.bfloat16, shape=shape) for name, shape in shapes.items()]

    def parts(at: int, spec: TensorSpec) -> Iterator[torch.Tensor]:
        """Pieces of the pool, which begin elsewhere in each tensor."""
        left = spec.nbytes // 2
        offset = (at * 7919 * 64) % (POOL // 2)
        while left:
            count = min(left, POOL - offset)
            yield torch.ones(count, dtype=torch.bfloat16) if len(spec.shape) == 1 else pool[offset : offset + count]
            left, offset = left - count, (offset * 31 + 17) % (POOL // 2)

    with Writer(directory, specs) as writer:
        for at, spec in enumerate(specs):
            writer.write_parts(spec.name, parts(at, spec))
    (directory / "config.json").write_text(json.dumps(config.to_dict(), default=str), encoding="utf-8")
    save_companions(directory, source=demo.model_directory())
    return writer.nbytes


def seconds_of_copying(source: Path, target: Path, written: int) -> dict[str, float]:
    """Reading all of the model's bytes, and writing as many as the output has, both from and to the disk."""
    files = sorted(source.glob("*.safetensors"))
    buffer = bytearray(PIECE)
    started = time.monotonic()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        at = 0
        while got := os.preadv(descriptor, [buffer], at):
            at += got
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    read = time.monotonic() - started
    started = time.monotonic()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT)
    for start in range(0, written, PIECE):
        os.write(descriptor, buffer[: min(PIECE, written - start)])
    os.fsync(descriptor)
    os.close(descriptor)
    target.unlink()
    return {"read_seconds": read, "write_seconds": time.monotonic() - started}


def fit(model: Path, out: Path, algorithm: str, ram: str, text: Path) -> dict[str, Any]:
    """Run the command; what it reported and what the system saw."""
    words = [
        "fit", str(model), "--technique", "quantize", "--bits", "4", "--groups", "128", "--keep", "embed_tokens",
        "--keep", "lm_head", "--algorithm", algorithm, "--text", str(text), "--window", "512", "--windows", "8",
        "--ram", ram, "--no-measure", "--out", str(out), "--json",
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", "from memfit_command import main; main()", *words], stdout=subprocess.PIPE, check=False
    )
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"memfit ended with {done.returncode}: {done.stdout[-2000:]!r}")
    report = json.loads(done.stdout)
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "maxrss_nbytes": after.ru_maxrss * 1024,
        "ram": report["ram"],
        "output_nbytes": sum(file.stat().st_size for file in out.iterdir()),
        "rounding": report["rounding"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ram", default="2.5GiB")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--text", type=Path, default=demo.calibration_text())
    parser.add_argument("--only", choices=["rtn", "gptq"])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    cap = parse_size(given.ram)
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.scratch) as directory:
        work = Path(directory)
        model_nbytes = make_model(work / "model", given.layers)
        print(f"{given.layers} layers, {format_size(model_nbytes)}", flush=True)
        for algorithm in ("rtn", "gptq") if given.only is None else (given.only,):
            found = fit(work / "model", work / "out", algorithm, given.ram, given.text)
            found |= seconds_of_copying(work / "model", work / "copy", found["output_nbytes"])
            shutil.rmtree(work / "out")
            runs[algorithm] = found
            print(algorithm, json.dumps(found), flush=True)
    verdicts = []
    for algorithm, found in runs.items():
        jobs = found["ram"]["jobs"].values()
        told = max(job["predicted_nbytes"] for job in jobs)
        seen = max(job["measured_nbytes"] for job in jobs)
        held = max(found["maxrss_nbytes"], seen)
        copying = found["read_seconds"] + found["write_seconds"]
        verdicts += [
            verdict(
                f"{algorithm}: resident within {given.ram}", held <= cap, f"{format_size(held)} of any process",
            ),
            verdict(
                f"{algorithm}: predicted within 5 %", abs(told / seen - 1) <= 0.05,
                f"{format_size(told)} predicted, {format_size(seen)} measured, {100 * (told / seen - 1):+.2f} %",
            ),
        ]  # fmt: skip
        print(f"{algorithm}: {found['seconds']:.0f} s ({found['cpu_seconds']:.0f} of CPU), copying {copying:.0f} s")
    result = {"layers": given.layers, "cap_nbytes": cap, "model_nbytes": model_nbytes, "runs": runs}
    write_result("stream", result | {"verdicts": verdicts}, output=given.output)


if __name__ == "__main__":
    main()
