"""What a step costs in time: from counted work, at the speed of this machine's products."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from memfit.account.dry_run import no_collection
from memfit.account.structure import stacked_blocks
from memfit.technique.row_gradients import known_lookup

from .objective import output_head, why_no_chunks
from .recipe import Recipe
from .task import Train

Make = Callable[[Recipe], nn.Module]
"""From a recipe to the model with its weights, in the recipe's dtype and packed if it packs; called on fake tensors."""

_DISK_NBYTES: Final = 1.0e9
"""Bytes a second to a disk and back: an estimate, on the low side of what is common."""
_EACH_SLICE: Final = 0.02
"""Share of a step's time that each doubling of slices or micro-batches costs: products get smaller."""
_EACH_SUM: Final = {"fp32": 2.0e-9, "weights": 5.0e-10, "int8": 4.0e-9}
"""Seconds to add one entry of a micro-batch's gradient to the batch's, by what they add up in."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What counts of a model: parameters of its blocks, of its head, of all; the names of its blocks."""

    blocks: tuple[str, ...]
    in_blocks: int
    in_head: int
    parameters: int
    chunks: bool
    tables: bool


def shape_of(make: Make) -> Shape:
    """What counts of the model that `make` makes."""
    with no_collection(), FakeTensorMode(allow_non_fake_inputs=True):
        model = make(Recipe(precision="bf16"))
        blocks = tuple(stacked_blocks(model))
        head = output_head(model)
        in_blocks = sum(p.numel() for _, block in blocks for p in block.parameters())
        chunks = why_no_chunks(model) is None and not type(model).__name__.endswith("ForSequenceClassification")
        return Shape(
            blocks=tuple(name for name, _ in blocks),
            in_blocks=in_blocks,
            in_head=0 if head is None else head.weight.numel(),
            parameters=sum(p.numel() for p in model.parameters()),
            chunks=chunks,
            tables=chunks and any(known_lookup(module) for module in model.modules()),
        )


def seconds_of(shape: Shape, task: Train, recipe: Recipe, rate: float) -> float:
    """Of a step, from counted work: 2 operations for each weight and token and pass; 20 bytes for each weight moved."""
    tokens = task.batch * task.sequence
    forward = 2.0 * shape.in_blocks * tokens / rate
    head = 2.0 * shape.in_head * tokens / rate
    share = len(recipe.recompute) / max(len(shape.blocks), 1)
    whole = recipe.adapters is None
    # A loss in chunks makes logits once more, and once more again where the head's gradient is made later.
    products = (3 if whole else 2) + int(recipe.chunk_nbytes is not None) + int(recipe.rows)
    seconds = forward * ((3 if whole else 2) + share) + head * products
    if task.hyper.clip is not None:
        # For the gradient's norm alone: a pass that goes before, or the rows of the head's gradient once more.
        seconds += seconds if recipe.in_backward else 2 * head * int(recipe.rows)
    batches = -(-task.batch // (recipe.micro_batch or task.batch))
    parts = max(recipe.slices, batches)
    seconds *= 1.0 + _EACH_SLICE * (parts.bit_length() - 1)
    if whole:
        seconds += (batches - 1) * shape.parameters * _EACH_SUM[recipe.gradients]
        seconds += shape.parameters * (4e-9 if recipe.state_bits >= 16 else 6e-9)
        if recipe.states == "disk":
            seconds += 2 * shape.parameters * recipe.state_bits / 4 / _DISK_NBYTES
    if recipe.weights == "disk":
        passes = (2 + int(whole)) * (2 if recipe.in_backward and task.hyper.clip is not None else 1)
        seconds += passes * share * shape.in_blocks * recipe.dtype.itemsize / _DISK_NBYTES
    if recipe.store == "disk":
        width = (shape.in_blocks / max(len(shape.blocks), 1) / 12) ** 0.5
        seconds += 2 * len(recipe.recompute) * tokens * width * 2 / _DISK_NBYTES
    return seconds


def static_nbytes(shape: Shape, recipe: Recipe) -> int:
    """Bytes that are there at some moment of every step, at the least: weights, states, gradients that wait."""
    if recipe.adapters is not None:
        return 0 if recipe.weights != "memory" else shape.in_blocks * recipe.adapters.base_bits // 8
    bits = {"fp32": 32, "autocast": 32, "master": 32, "kahan": 32, "fp16": 48}.get(recipe.precision, 16)
    states = {"adamw": 2, "sgd": 1}.get(recipe.optimizer, 0)
    if recipe.states == "memory":
        bits += states * recipe.state_bits
    elif recipe.precision in ("master", "kahan", "fp16"):
        bits = 16  # what a master adds to the weights waits with the states
    nbytes = shape.parameters * bits // 8
    if recipe.weights != "memory":
        nbytes -= shape.in_blocks * recipe.dtype.itemsize
    if not recipe.in_backward:
        each = {"int8": 1, "fp32": 4}.get(recipe.gradients, 4 if recipe.precision in ("fp32", "autocast") else 2)
        nbytes += each * (shape.in_blocks if recipe.rows else shape.parameters)
    return nbytes


def products_per_second(dtype: torch.dtype) -> float:
    """Floating-point operations a second of this machine's products, by a short probe."""
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    left @ right
    started, turns = time.perf_counter(), 0
    while time.perf_counter() - started < 0.05:
        left @ right
        turns += 1
    return 2.0 * 512 * 1024 * 1024 * turns / (time.perf_counter() - started)
