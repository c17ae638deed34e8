"""A parity certificate: planned training beside plain training, on the same batches, from the same weights.

Two runs that are the same on paper differ by rounding. How much, is told by plain training with its batch cut in two:
that is the floor that the plan's gap is held against.
"""

import gc
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from memfit.account.watch import Unwatched

from .distil import load_teaching
from .loop import Data, draw_from
from .plan import TrainPlan
from .recipe import Recipe
from .step import TrainStep
from .task import make_trainable

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def certify(
    make: Callable[[Recipe], nn.Module],
    plan: TrainPlan,
    data: Data,
    steps: int,
    *,
    loss: Loss | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Losses of `steps` steps: planned, plain, and plain with each batch in two parts; the largest gaps.

    Args:
        make: the model with its weights, anew each time it is called.
        plan: what is certified. Plain training beside it is not bounded by its budget.
    """
    precision = plan.recipe.precision
    plain = Recipe(
        precision=precision, optimizer=plan.recipe.optimizer, chunk_nbytes=None, adapters=plan.recipe.adapters
    )
    rows = plan.task.batch
    halves = Recipe(**(vars(plain) | {"micro_batch": max(1, -(-rows // 2)), "gradients": "fp32"}))
    found = {
        name: _losses(make, recipe, plan, data, steps, loss=loss, seed=seed)
        for name, recipe in (("plain", plain), ("halves", halves), ("planned", plan.recipe))
    }
    return {
        "steps": steps, "losses": found, "gap": apart(found["planned"], found["plain"]),
        "floor": apart(found["halves"], found["plain"]),
    }  # fmt: skip


def _losses(
    make: Callable[[Recipe], nn.Module],
    recipe: Recipe,
    plan: TrainPlan,
    data: Data,
    steps: int,
    *,
    loss: Loss | None,
    seed: int,
) -> list[float]:
    draw_from(seed, 0)
    model = make(recipe)
    make_trainable(model, recipe)
    teaching = load_teaching(plan.task.distil, Unwatched())
    step = TrainStep(model, recipe, hyper=plan.task.hyper, loss=loss, seed=seed, teaching=teaching)
    found = []
    for number in range(steps):
        draw_from(seed, number)
        epoch, index = divmod(number, len(data))
        found.append(step(data.batch(epoch, index)).loss)
    step.close()
    del step, model, teaching
    gc.collect()
    return found


def apart(one: list[float], other: list[float]) -> float:
    """The largest distance of two runs' losses, step by step."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
