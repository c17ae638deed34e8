"""Training predicted and measured: 13 models, each lever alone and combinations of them, first step and steady state.

    python bench/train_account.py [--only llama,t5] [--output bench/results/train_account.json]

Every model is a process of its own; the allocated bytes are the CPU allocator's events. Which expert a token goes to is
data: the account assumes that all get alike, and so experts are measured twice, as assumed and as it fell. The resident
peak is predicted
and measured for two recipes of each kind of model, twice as wide and deep, each in a fresh process. Beside it:
DeepSpeed's estimator for ZeRO-2 on one device (4 bytes and 16 for each parameter) and accelerate's (four times the
weights). Then: planning a Llama-3-8B shape, which `--planning` does alone, into `train_planning.json`. Beside the time
by the clock it tells the processor's: on a busy machine the clock's is others' too.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))

import torch  # noqa: E402

from _common import verdict, write_result  # noqa: E402
from memfit.account.account import Account  # noqa: E402
from memfit.account.dry_run import dry_run  # noqa: E402
from memfit.account.meter import Meter  # noqa: E402
from memfit.account.outside import predict_resident  # noqa: E402
from memfit.account.structure import stacked_blocks  # noqa: E402
from memfit.errors import DoesNotFit, UsageError  # noqa: E402
from memfit.models import load_to_train, loader_for  # noqa: E402
from memfit.outside import outside_of_machine  # noqa: E402
from memfit.source.source import Source  # noqa: E402
from memfit.technique.adapters import Adapters  # noqa: E402
from memfit.train.hyper import Hyper  # noqa: E402
from memfit.train.objective import objective_of  # noqa: E402
from memfit.train.recipe import Recipe, describe  # noqa: E402
from memfit.train.task import Train  # noqa: E402
from memfit.train_planning import plan_training  # noqa: E402
from memfit.worker import run_job  # noqa: E402

BATCH, SEQUENCE, THREADS = 4, 96, 2
ROOMY = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _decoder(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "vocab_size": 8000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    } | ROOMY | more  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "llama": _decoder("llama"),
    "qwen3": _decoder("qwen3", head_dim=32, tie_word_embeddings=True),
    "mistral": _decoder("mistral", sliding_window=64),
    "gemma3": _decoder("gemma3_text", head_dim=32, vocab_size=20000, sliding_window=64, tie_word_embeddings=True),
    "phi3": _decoder("phi3", num_key_value_heads=8),
    "gpt_neox": _decoder("gpt_neox"),
    "gpt2": {"model_type": "gpt2", "vocab_size": 8000, "n_embd": 256, "n_layer": 4, "n_head": 8},
    "opt": {
        "model_type": "opt", "vocab_size": 8000, "hidden_size": 256, "ffn_dim": 1024, "num_attention_heads": 8,
        "num_hidden_layers": 4, "max_position_embeddings": 512, "word_embed_proj_dim": 256,
    },
    "mixtral": _decoder("mixtral", num_local_experts=4, sliding_window=None),
    "qwen3_moe": _decoder("qwen3_moe", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256),
    "bert": {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 8000,
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024,
    },
    "t5": {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 8000, "d_model": 256,
        "d_ff": 1024, "num_layers": 4, "num_heads": 8, "d_kv": 32, "decoder_start_token_id": 0, "pad_token_id": 0,
    },
    "mamba": {"model_type": "mamba", "vocab_size": 8000, "hidden_size": 256, "num_hidden_layers": 4, "state_size": 16},
}  # fmt: skip
SPECS: dict[str, Any] = {name: {"config": config} for name, config in MODELS.items()} | {
    "lstm": {
        "factory": "lstm:make_trainable", "settings": {"vocabulary": 8000, "width": 256, "modules": 3, "layers": 1},
    }
}  # fmt: skip
ALL = ("all",)
SMALL = 1 << 20
RECIPES = {
    "plain fp32": Recipe(chunk_nbytes=None),
    "autocast": Recipe(precision="autocast", chunk_nbytes=None),
    "master": Recipe(precision="master", chunk_nbytes=None),
    "stochastic": Recipe(precision="stochastic", chunk_nbytes=None),
    "kahan": Recipe(precision="kahan", chunk_nbytes=None),
    "recompute": Recipe(recompute=ALL, chunk_nbytes=None),
    "recompute, inputs in 8 bits": Recipe(recompute=ALL, store="int8", chunk_nbytes=None),
    "recompute, inputs on disk": Recipe(recompute=ALL, store="disk", chunk_nbytes=None),
    "micro-batches": Recipe(micro_batch=1, gradients="fp32", chunk_nbytes=None),
    "chunked loss": Recipe(chunk_nbytes=SMALL),
    "states 16": Recipe(state_bits=16, chunk_nbytes=None),
    "states 8": Recipe(state_bits=8, chunk_nbytes=None),
    "states 4": Recipe(state_bits=4, chunk_nbytes=None),
    "states on disk": Recipe(states="disk", chunk_nbytes=None),
    "sgd": Recipe(optimizer="sgd", chunk_nbytes=None),
    "adafactor": Recipe(optimizer="adafactor", chunk_nbytes=None),
    "galore": Recipe(optimizer="galore", chunk_nbytes=None),
    "apollo": Recipe(optimizer="apollo", chunk_nbytes=None),
    "muon": Recipe(optimizer="muon", chunk_nbytes=None),
    "gradients in 8 bits": Recipe(gradients="int8", micro_batch=2, chunk_nbytes=None),
    "in backward": Recipe(in_backward=True, recompute=ALL, chunk_nbytes=None),
    "lora": Recipe(adapters=Adapters(), chunk_nbytes=None),
    "dora": Recipe(adapters=Adapters(kind="dora"), chunk_nbytes=None),
    # combinations
    "master, recompute in slices, in backward": Recipe(
        precision="master", recompute=ALL, slices=4, in_backward=True, chunk_nbytes=SMALL
    ),
    "the same, by rows": Recipe(
        precision="master", recompute=ALL, slices=4, in_backward=True, rows=True, chunk_nbytes=SMALL
    ),
    "stochastic, 8 bits, by rows": Recipe(
        precision="stochastic", state_bits=8, recompute=ALL, slices=2, in_backward=True, rows=True, chunk_nbytes=SMALL
    ),
    "stochastic, 4 bits": Recipe(precision="stochastic", state_bits=4, recompute=ALL, chunk_nbytes=SMALL),
    "autocast, micro-batches, 8 bits": Recipe(
        precision="autocast", micro_batch=2, gradients="fp32", state_bits=8, chunk_nbytes=SMALL
    ),
    "kahan, sgd, recompute": Recipe(precision="kahan", optimizer="sgd", recompute=ALL, chunk_nbytes=SMALL),
    "master, states on disk, recompute on disk": Recipe(
        precision="master", states="disk", recompute=ALL, store="disk", chunk_nbytes=SMALL
    ),
    "adafactor, recompute in slices": Recipe(optimizer="adafactor", recompute=ALL, slices=2, chunk_nbytes=SMALL),
    "weights on disk": Recipe(recompute=ALL, weights="disk", chunk_nbytes=None),
    "master, in backward by rows, all on disk": Recipe(
        precision="master", recompute=ALL, slices=4, in_backward=True, rows=True, chunk_nbytes=SMALL, states="disk",
        store="disk", weights="disk",
    ),
    "lora, weights on disk": Recipe(adapters=Adapters(), recompute=ALL, weights="disk", chunk_nbytes=SMALL),
    "qlora, recompute": Recipe(
        precision="master", adapters=Adapters(base_bits=4), recompute=ALL, slices=2, chunk_nbytes=SMALL
    ),
}  # fmt: skip
RESIDENT = ("plain fp32", "master, recompute in slices, in backward")


def make(spec: dict[str, Any], recipe: Recipe) -> torch.nn.Module:
    return load_to_train(loader_for(spec), recipe)


def task_of(spec: dict[str, Any], recipe: Recipe) -> Train | None:
    """The task of one case; None where the recipe is not one for the model."""
    model = make(spec, Recipe())
    if recipe.recompute:
        names = tuple(name for name, _ in stacked_blocks(model))
        if not names or "lstm" in str(spec):
            return None
        recipe = replace(recipe, recompute=names)
    if recipe.rows:
        from memfit.technique.chunk_loss import ChunkLoss

        objective = objective_of(model, chunks=ChunkLoss())
        if getattr(objective, "chunks", None) is None:
            return None
    return Train(batch=BATCH, sequence=SEQUENCE, recipe=recipe, hyper=Hyper(clip=1.0))


def share_out(model: torch.nn.Module) -> bool:
    """From now on the tokens go to all experts alike, whatever the router says; whether there are any experts."""
    found = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    for module in found:
        even = torch.arange(BATCH * SEQUENCE * 8).remainder_(module.num_experts)

        def send(_: Any, arguments: tuple[torch.Tensor, ...], even: torch.Tensor = even) -> None:
            index = arguments[1].data
            index.copy_(even[: index.numel()].view_as(index))

        module.register_forward_pre_hook(send)
    return bool(found)


def measure(spec: dict[str, Any], task: Train, *, even: bool) -> tuple[Account, bool]:
    """The account of training, by the allocator; whether there are experts, to which tokens go alike if `even`."""
    gc.collect()
    meter, routed = Meter(), False
    with meter.phase("load"):
        model = make(spec, task.recipe)
    if even:
        routed = share_out(model)
        gc.collect()
    task.run(model, meter)
    return meter.account(), routed


def peak(account: Account, first: bool) -> int:
    return max(p.peak_nbytes for p in account.phases if p.name.startswith("first") == first)


def measure_model(name: str) -> list[dict[str, Any]]:
    """All cases of one model, in this process."""
    torch.set_num_threads(THREADS)
    spec, rows = SPECS[name], []
    for label, recipe in RECIPES.items():
        task = task_of(spec, recipe)
        if task is None:
            continue
        try:
            started = time.perf_counter()
            predicted = dry_run(lambda task=task: make(spec, task.recipe), task)
            seconds = time.perf_counter() - started
            measured, routed = measure(spec, task, even=True)
            fell = measure(spec, task, even=False)[0] if routed else measured
        except UsageError as error:
            print(f"{name}, {label}: left out ({error})", file=sys.stderr)
            continue
        rows.append(
            {
                "model": name, "recipe": label, "seconds": seconds,
                "first": [peak(predicted, True), peak(measured, True)],
                "steady": [peak(predicted, False), peak(measured, False)],
                "as_it_fell": [peak(predicted, False), peak(fell, False)],
                "phases": [[p.name, p.peak_nbytes, measured.phase(p.name).peak_nbytes] for p in predicted.phases],
                "parameters": sum(e.nbytes for e in predicted.entries if e.kind == "parameter"),
            }
        )  # fmt: skip
    return rows


def larger(spec: dict[str, Any]) -> dict[str, Any]:
    """The same kind of model, eight blocks of twice the width: its own bytes are more than its process's."""
    twice = ("hidden_size", "intermediate_size", "n_embd", "d_model", "d_ff", "d_kv", "ffn_dim", "head_dim",
             "word_embed_proj_dim", "moe_intermediate_size", "width")  # fmt: skip
    deeper = ("num_hidden_layers", "n_layer", "num_layers", "modules")
    key = "config" if "config" in spec else "settings"
    grown = {name: value * 2 if name in twice or name in deeper else value for name, value in spec[key].items()}
    return spec | {key: grown}


def measure_resident(name: str, label: str) -> dict[str, Any] | None:
    """Resident peak of a fresh process that trains the larger model, and what was predicted."""
    spec = larger(SPECS[name])
    task = task_of(spec, RECIPES[label])
    if task is None:
        return None
    told = {"do": "measure", "model": spec, "task": task.to_json(), "threads": THREADS}
    measured = Account.from_json(run_job(told)["account"])
    predicted = dry_run(lambda: make(spec, task.recipe), task)
    predicted = predict_resident(predicted, outside_of_machine(threads=THREADS))
    return {
        "model": name, "recipe": label, "allocated": [predicted.peak_nbytes, measured.peak_nbytes],
        "resident": [predicted.resident_nbytes, measured.resident_nbytes],
    }  # fmt: skip


def fresh(*words: str) -> Any:
    """What a fresh process of this file answers."""
    from memfit_command import QUIET

    done = subprocess.run(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | QUIET
    )
    return json.loads(done.stdout.splitlines()[-1])


def planning() -> list[dict[str, Any]]:
    """Planning to train a Llama-3-8B shape at several budgets."""
    config = _decoder(
        "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    source = loader_for({"config": config})
    assert isinstance(source, Source)
    found = []
    for budget in (200, 100, 60, 40, 20, 8):
        started, worked = time.perf_counter(), time.process_time()
        try:
            plan = plan_training(
                lambda recipe: load_to_train(source, recipe), "Llama-3-8B", Train(batch=8, sequence=2048),
                budget << 30, stored=torch.bfloat16,
            )  # fmt: skip
            how, peak = describe(plan.recipe, 32), plan.peak_nbytes
        except DoesNotFit as error:
            how, peak = str(error), error.smallest_nbytes
        row = {
            "budget_gib": budget, "seconds": time.perf_counter() - started,
            "processor_seconds": time.process_time() - worked, "peak_nbytes": peak, "how": how,
        }  # fmt: skip
        print(row, file=sys.stderr)
        found.append(row)
    return found


def judge_planning(found: list[dict[str, Any]]) -> dict[str, Any]:
    each = "; ".join(
        f"{row['budget_gib']} GiB: {row['seconds']:.1f} s, {row['processor_seconds']:.1f} of the processor"
        for row in found
    )
    return verdict("planning Llama-3-8B in 10 s", max(row["seconds"] for row in found) <= 10, each)


def error(pair: list[int]) -> float:
    return abs(pair[0] - pair[1]) / pair[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SPECS))
    parser.add_argument("--measure")
    parser.add_argument("--resident", nargs=2)
    parser.add_argument("--plans", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--planning", action="store_true", help="only the plans, to train_planning.json")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    for answer in (
        given.measure and measure_model(given.measure),
        given.resident and measure_resident(*given.resident),
        given.plans and planning(),
    ):
        if answer:
            print(json.dumps(answer))
            return
    if given.resident:
        print("null")
        return
    if given.planning:
        found = fresh("--plans")
        write_result("train_planning", {"verdicts": [judge_planning(found)], "planning": found}, output=given.output)
        return
    rows: list[dict[str, Any]] = []
    for name in given.only.split(","):
        found = fresh("--measure", name)
        worst = max(max(error(row["first"]), error(row["steady"])) for row in found)
        print(f"{name}: {len(found)} recipes, largest error {worst:.4%}", flush=True)
        rows += found
    resident = []
    for name in given.only.split(","):
        for label in RESIDENT:
            row = fresh("--resident", name, label)
            if row is not None:
                resident.append(row)
                print(f"{name}, {label}: resident {error(row['resident']):.2%} off", flush=True)
    errors = [error(row[step]) for row in rows for step in ("first", "steady")]
    plain = [row for row in rows if row["recipe"] == "plain fp32"]
    others = {
        "DeepSpeed's ZeRO-2 estimator": [abs(5 * r["parameters"] - r["steady"][1]) / r["steady"][1] for r in plain],
        "accelerate's estimator": [abs(4 * r["parameters"] - r["steady"][1]) / r["steady"][1] for r in plain],
    }
    for name, found in others.items():
        print(f"{name}: median error {statistics.median(found):.1%}, largest {max(found):.1%}")
    fell = max((error(row["as_it_fell"]), row["model"], row["recipe"]) for row in rows)
    print(f"tokens to experts as the router has it: largest error {fell[0]:.4%} ({fell[1]}, {fell[2]})")
    times = fresh("--plans")
    exact = sum(e == 0 for e in errors)
    verdicts = [
        verdict(
            "allocated peak within 0.5 %", max(errors) <= 0.005,
            f"{sum(e <= 0.005 for e in errors)} of {len(errors)}, largest {max(errors):.4%}, {exact} to the byte",
        ),
        verdict(
            "resident peak within 3 %", max(error(r["resident"]) for r in resident) <= 0.03,
            f"{sum(error(r['resident']) <= 0.03 for r in resident)} of {len(resident)}, largest "
            f"{max((error(r['resident']), r['model'], r['recipe']) for r in resident)}, median "
            f"{statistics.median(error(r['resident']) for r in resident):.2%}",
        ),
        verdict("median within 0.01 %", statistics.median(errors) <= 1e-4, f"{statistics.median(errors):.6%}"),
        judge_planning(times),
    ]  # fmt: skip
    result = {"cases": rows, "resident": resident, "others": others, "planning": times, "verdicts": verdicts}
    write_result("train_account", result, output=given.output)


if __name__ == "__main__":
    main()
