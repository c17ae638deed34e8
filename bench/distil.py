"""How much of what a model lost by losing 30 % of its blocks or channels does distillation win back, step by step?

    python bench/distil.py --text FILE [--model DIR] [--steps 500] [--threads N]

A student is the model without the blocks whose loss costs least, or without the channels between its blocks that are
written and read least: plain ways, on purpose. It learns on the first half of the text, 8 x 256 tokens a step, as it
is planned; the KL divergence from the original on the second half is taken every 50 steps. Beside it: the same steps by
cross-entropy alone, which is what one would do without a teacher, and other ways to distil.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import memfit
from _common import RESULTS, verdict, write_result
from memfit import demo
from memfit.data.batches import batches_of
from memfit.data.read import read_data
from memfit.evaluate import read_text, windows
from memfit.evaluate.divergence import compare_logits, record_logits
from memfit.format.directory import OutputDirectory
from memfit.source.source import open_source
from memfit.technique.distil import Distil
from memfit.train.loop import draw_from
from memfit.train.output import write_model
from memfit.train.schedule import Schedule

BATCH, SEQUENCE, EVERY, SHARE = 8, 256, 50, 0.3
WAYS: dict[str, dict[str, Any] | None] = {
    "as it is": {},
    "cross-entropy alone": None,
    "half cross-entropy, T = 2": {"alpha": 0.5, "temperature": 2.0},
    "64 kept answers": {"place": "disk"},
    "with hidden states": {"match": ("hidden",)},
    "reverse KL": {"kl": "reverse"},
}  # fmt: skip


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=demo.model_directory())
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--students", default="shallower,narrower")
    parser.add_argument("--ways", default=";".join(WAYS), help="With semicolons between.")
    parser.add_argument("--budget", default="100%")
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    whole = read_text(given.text)
    half = whole.find("\n", len(whole) // 2) + 1 or len(whole) // 2
    source = open_source(given.model)
    tokenizer = source.tokenizer()
    judged = windows(tokenizer, whole[half:], length=SEQUENCE, count=given.windows).clone()
    settings = {name: getattr(given, name) for name in ("steps", "lr", "windows", "threads", "budget")}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "text.txt").write_text(whole[:half], encoding="utf-8")
        teacher = memfit.load(given.model)
        record_logits(teacher, judged, work / "logits")
        made = {"shallower": shallower, "narrower": narrower}
        for name in given.students.split(","):
            model, what = made[name](teacher, judged[:4], work)
            with OutputDirectory(work / name) as out:
                write_model(model, out, source=source, tokenizer=tokenizer)
            del model
            for way in given.ways.split(";"):
                if name == "narrower" and "hidden" in (WAYS[way] or {}).get("match", ()):
                    print(f"{name}, {way}: hidden states of other widths are not matched", flush=True)
                    continue
                keep(name, what, way, distilled(work, name, way, judged, given), settings, given.output)


def keep(name: str, what: str, way: str, row: dict[str, Any], settings: dict[str, Any], output: Path | None) -> None:
    """Add a run to the results, which may hold others of the same settings."""
    file = output or RESULTS / "distil.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    students: dict[str, Any] = before.get("students", {}) if before.get("settings") == settings else {}
    students.setdefault(name, {"what": what, "ways": {}})["ways"][way] = row
    verdicts = [
        verdict(
            f"{student}: half of the lost KL is back within {settings['steps']} steps", found["won_back"] >= 0.5,
            f"KL {found['curve'][0]['kl']:.4f} to {found['curve'][-1]['kl']:.4f}, {found['won_back']:.1%} won back",
        )
        for student, rows in students.items() for which, found in rows["ways"].items() if which == "as it is"
    ]  # fmt: skip
    write_result("distil", {"settings": settings, "students": students, "verdicts": verdicts}, output=output)


# -- students ------------------------------------------------------------------------------------------


def shallower(teacher: nn.Module, few: torch.Tensor, work: Path) -> tuple[nn.Module, str]:
    """Without the blocks that cost least, one after the other."""
    model: Any = copy.deepcopy(teacher)
    layers = list(model.model.layers)
    drop = round(SHARE * len(layers))
    record_logits(teacher, few, work / "few")
    gone: list[int] = []
    for _ in range(drop):
        costs = {}
        for number in set(range(len(layers))) - set(gone):
            model.model.layers = nn.ModuleList(
                layer for at, layer in enumerate(layers) if at not in (*gone, number)
            )
            model.config.num_hidden_layers = len(model.model.layers)
            costs[number] = compare_logits(work / "few", model, few).kl
        gone.append(min(costs, key=lambda number: costs[number]))
    model.model.layers = nn.ModuleList(layer for at, layer in enumerate(layers) if at not in gone)
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for at, kind in enumerate(model.config.layer_types) if at not in gone]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    return model, f"blocks {sorted(gone)} of {len(layers)} are gone"


def narrower(teacher: nn.Module, few: torch.Tensor, work: Path) -> tuple[nn.Module, str]:
    """With the channels between the blocks alone that are written and read the most."""
    model: Any = copy.deepcopy(teacher)
    width = model.config.hidden_size
    layers, table = model.model.layers, model.model.embed_tokens
    size = table.weight.float().square().sum(0)
    for layer in layers:
        for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
            size += writes.weight.float().square().sum(1)
    heads = model.config.num_attention_heads  # transformers asks for a multiple of them
    kept = size.topk((width - round(SHARE * width)) // heads * heads).indices.sort().values

    def cut(module: Any, dim: int) -> None:
        module.weight = nn.Parameter(module.weight.index_select(dim, kept).contiguous(), requires_grad=False)

    cut(table, 1)
    cut(model.model.norm, 0)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = table.weight
    else:
        cut(model.lm_head, 1)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            cut(reads, 1)
        for writes in (attention.o_proj, mlp.down_proj, layer.input_layernorm, layer.post_attention_layernorm):
            cut(writes, 0)
    model.config.hidden_size = len(kept)
    return model, f"{len(kept)} of {width} channels between the blocks are left"


# -- learning ------------------------------------------------------------------------------------------


def distilled(work: Path, name: str, way: str, judged: torch.Tensor, given: argparse.Namespace) -> dict[str, Any]:
    """The curve of one run."""
    settings = WAYS[way]
    distil = None if settings is None else Distil(teacher=str(given.model), **settings)
    task = memfit.Train(batch=BATCH, sequence=SEQUENCE, hyper=memfit.Hyper(lr=given.lr), distil=distil)
    plan = memfit.plan(work / name, given.budget, task=task, adapters=False)
    data: Any = batches_of(
        read_data(work / "text.txt"), open_source(work / name).tokenizer(), kind="causal", sequence=SEQUENCE,
        batch=BATCH, vocabulary=int(open_source(work / name).config.get_text_config().vocab_size),
    )  # fmt: skip
    if settings is not None and plan.task.distil is not None and plan.task.distil.place == "disk":
        from memfit.distilling import ask_beforehand

        data = ask_beforehand(plan, data, work / "answers")
    model = memfit.load(work / name, plan)
    step = memfit.train_step(model, plan)
    schedule = Schedule(steps=given.steps, warmup=given.steps // 20, kind="cosine")
    curve: list[dict[str, float]] = []

    def judge(done: int) -> None:
        model.eval()
        quality = compare_logits(work / "logits", model, judged)
        model.train()
        assert quality.kl is not None and quality.perplexity is not None
        curve.append({"step": done, "kl": quality.kl, "perplexity": quality.perplexity})
        back = 1 - quality.kl / curve[0]["kl"]
        print(f"{name}, {way}, step {done}: KL {quality.kl:.4f}, {back:.1%} won back", flush=True)

    judge(0)
    started, seconds, cpu = time.perf_counter(), 0.0, 0.0
    for number in range(given.steps):
        began, began_cpu = time.perf_counter(), time.process_time()
        step.mover.rate = schedule.factor(number)
        draw_from(0, number)
        epoch, index = divmod(number, len(data))
        step(data.batch(epoch, index))
        seconds += time.perf_counter() - began
        cpu += time.process_time() - began_cpu
        if (number + 1) % EVERY == 0 or number + 1 == given.steps:
            judge(number + 1)
    step.close()
    return {
        "curve": curve, "won_back": 1 - curve[-1]["kl"] / curve[0]["kl"], "seconds_a_step": seconds / given.steps,
        "cpu_seconds_a_step": cpu / given.steps, "planned_nbytes": plan.peak_nbytes, "changes": list(plan.changes),
        "epochs": given.steps / len(data), "seconds": time.perf_counter() - started,
    }  # fmt: skip


if __name__ == "__main__":
    main()
