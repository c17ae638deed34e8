"""What each lever changes in what is learned: exact ones beside the floor of rounding, lossy ones beside chance.

    python bench/parity.py [--steps 100] [--output bench/results/parity.json]

The demo model is trained on its own text. Exact levers, in fp32: the largest distance of the loss from plain training's
over 10 steps; the floor is what cutting the batch into other micro-batches makes of plain training. Lossy levers: the
loss on text kept apart after 100 steps less plain fp32 training's, beside the spread of plain training under three
seeds, which order the data otherwise.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

from _common import verdict, write_result
from memfit import Hyper, Recipe, demo
from memfit.data.batches import batches_of
from memfit.data.read import read_data
from memfit.models import load_to_train
from memfit.source.source import open_source
from memfit.technique.adapters import Adapters
from memfit.train.certify import apart
from memfit.train.loop import draw_from
from memfit.train.step import TrainStep
from memfit.train.task import Train, make_trainable

BATCH, SEQUENCE, THREADS, LR = 8, 64, 2, 1e-4
SOURCE = open_source(demo.model_directory())
BLOCKS = tuple(f"model.layers.{n}" for n in range(SOURCE.config.num_hidden_layers))
PLAIN = Recipe(chunk_nbytes=None)
SMALL = 1 << 18
NEAREST = "bf16, to the nearest"
SPLITS = {size: Recipe(micro_batch=size, gradients="fp32", chunk_nbytes=None) for size in (4, 2, 1)}
EXACT = {
    "recompute": Recipe(recompute=BLOCKS, chunk_nbytes=None),
    "recompute every second block": Recipe(recompute=BLOCKS[::2], chunk_nbytes=None),
    "recompute in slices": Recipe(recompute=BLOCKS, slices=4, chunk_nbytes=None),
    "inputs on the host": Recipe(recompute=BLOCKS, store="host", chunk_nbytes=None),
    "inputs on the disk": Recipe(recompute=BLOCKS, store="disk", chunk_nbytes=None),
    "loss in chunks of tokens": Recipe(chunk_nbytes=256 * SOURCE.config.vocab_size * 4),
    "loss in chunks of the vocabulary": Recipe(chunk_nbytes=SMALL),
    "head and embedding by rows": Recipe(chunk_nbytes=SMALL, rows=True),
    "update in the backward pass": Recipe(recompute=BLOCKS, in_backward=True, chunk_nbytes=None),
    "states on the disk": Recipe(states="disk", chunk_nbytes=None),
    "states on the host": Recipe(states="host", chunk_nbytes=None),
    "weights of blocks on the disk": Recipe(recompute=BLOCKS, weights="disk", chunk_nbytes=None),
    "all of them": Recipe(
        recompute=BLOCKS, slices=8, store="disk", chunk_nbytes=SMALL, rows=True, in_backward=True, states="disk",
        weights="disk",
    ),
}
LOSSY = {
    "autocast": Recipe(precision="autocast"),
    "bf16 with an fp32 master": Recipe(precision="master"),
    "fp16 with an fp32 master": Recipe(precision="fp16"),
    "bf16, Kahan": Recipe(precision="kahan"),
    "bf16, stochastic": Recipe(precision="stochastic"),
    NEAREST: Recipe(precision="bf16"),
    "states of 16 bits": Recipe(state_bits=16),
    "states of 8 bits": Recipe(state_bits=8),
    "states of 4 bits": Recipe(state_bits=4),
    "gradients of 8 bits": Recipe(gradients="int8", micro_batch=2),
    "inputs of blocks in 8 bits": Recipe(recompute=BLOCKS, store="int8"),
    "stochastic, states of 8 bits": Recipe(precision="stochastic", state_bits=8),
    "stochastic, states of 4 bits": Recipe(precision="stochastic", state_bits=4),
    "adafactor": Recipe(optimizer="adafactor"),
    "galore": Recipe(optimizer="galore"),
    "apollo": Recipe(optimizer="apollo"),
    "muon": Recipe(optimizer="muon"),
    "lora": Recipe(adapters=Adapters()),
    "dora": Recipe(adapters=Adapters(kind="dora")),
    "qlora": Recipe(precision="master", adapters=Adapters(base_bits=4)),
}
RATES = {"lora": 1e-3, "dora": 1e-3, "qlora": 1e-3, "adafactor": 1e-4, "muon": 1e-4, "galore": 1e-4, "apollo": 1e-4}
"""Learning rates of what learns otherwise than AdamW on all weights; it is no part of the last verdict."""


def data(file: Path, seed: int) -> Any:
    return batches_of(
        read_data(file), SOURCE.tokenizer(), kind="causal", sequence=SEQUENCE, batch=BATCH, seed=seed,
        vocabulary=SOURCE.config.vocab_size,
    )  # fmt: skip


HELD_OUT = data(demo.heldout_text(), 0)


def learn(recipe: Recipe, steps: int, *, seed: int = 0, lr: float = LR) -> tuple[list[float], float, float]:
    """(losses, mean loss on 16 batches kept apart, seconds a step)."""
    draw_from(seed, 0)
    task = Train(batch=BATCH, sequence=SEQUENCE, recipe=recipe, hyper=Hyper(lr=lr))
    model = load_to_train(SOURCE, recipe)
    make_trainable(model, recipe)
    step, batches = TrainStep(model, recipe, hyper=task.hyper, seed=seed), data(demo.calibration_text(), seed)
    losses = []
    started = time.perf_counter()
    for number in range(steps):
        draw_from(seed, number)
        losses.append(step(batches.batch(*divmod(number, len(batches)))).loss)
    seconds = (time.perf_counter() - started) / steps
    found = [step.evaluate(HELD_OUT.batch(0, number)) for number in range(16)]
    step.close()
    return losses, sum(loss for loss, _, _ in found) / len(found), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    plain, _, _ = learn(PLAIN, 10)
    splits = {size: apart(plain, learn(recipe, 10)[0]) for size, recipe in SPLITS.items()}
    floor = max(splits.values())
    print(f"floor {floor:.3g}: {splits}", flush=True)
    exact = {}
    for name, recipe in EXACT.items():
        exact[name] = apart(plain, learn(recipe, 10)[0])
        print(f"{name}: {exact[name]:.3g}, {exact[name] / floor:.2f} of the floor", flush=True)
    seeds = {seed: learn(PLAIN, given.steps, seed=seed)[1:] for seed in (0, 1, 2)}
    whole, seconds = seeds[0]
    spread = max(loss for loss, _ in seeds.values()) - min(loss for loss, _ in seeds.values())
    before = learn(PLAIN, 1, lr=0.0)[1]
    print(f"kept apart: {before:.4f} before, {whole:.4f} after, spread of three seeds {spread:.4f}", flush=True)
    lossy = {}
    for name, recipe in LOSSY.items():
        losses, after, each = learn(recipe, given.steps, lr=RATES.get(name, LR))
        lossy[name] = {"loss": after, "gap": after - whole, "seconds": each, "last": statistics.mean(losses[-10:])}
        print(f"{name}: gap {after - whole:+.4f}, {(after - whole) / spread:+.2f} of the spread", flush=True)
    verdicts = [
        verdict("exact levers within 5 times the floor", max(exact.values()) <= 5 * floor, f"{max(exact.values()):.3g} "
                f"beside {floor:.3g}"),
        verdict("every lever learns", all(row["loss"] < before for row in lossy.values()), f"from {before:.4f}"),
        verdict(
            "precisions and states within the spread of three seeds",
            all(abs(row["gap"]) <= spread for name, row in lossy.items() if name not in RATES and name != NEAREST),
            f"spread {spread:.4f}, largest gap "
            f"{max((abs(row['gap']), name) for name, row in lossy.items() if name not in RATES and name != NEAREST)}",
        ),
    ]  # fmt: skip
    assert math.isfinite(whole)
    write_result(
        "parity",
        {
            "splits": splits, "exact": exact, "before": before, "lossy": lossy,
            "seeds": {seed: loss for seed, (loss, _) in seeds.items()}, "plain_seconds": seconds, "verdicts": verdicts,
        },
        output=given.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
