"""How a batch is cut; and a micro-batch like one of an earlier step, which a dry run tells from that one."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from memfit.account.watch import Watch
from memfit.packed.fake import blocks_to_run, is_fake, repeated

from .gradients import Accumulated, trained
from .objective import Batch
from .recipe import Recipe


def micro_batches(batch: Batch, recipe: Recipe, *, slices: int, alike: bool) -> list[Batch]:
    """Parts of a batch that go through the model at once, each of them cut once more into `slices`.

    In a dry run, where they are `alike`: the first meets no gradients, the second does, and the others are like the
    second. (Where rows of a table's gradient are made, each leaves something until the update, and in an update within
    the backward pass the last is like no other.)
    """
    rows = next(iter(batch.values())).shape[0]
    size = -(-min(recipe.micro_batch or rows, rows) // slices)
    chosen = starts = list(range(0, rows, size))
    if holds_fakes(batch) and alike:
        chosen = blocks_to_run(starts) if recipe.in_backward or rows % size else starts[:2]
    return [{name: tensor[start : start + size] for name, tensor in batch.items()} for start in chosen]


def holds_fakes(batch: Mapping[str, Any]) -> bool:
    """Whether the batch is of a dry run."""
    return any(isinstance(value, Tensor) and is_fake(value) for value in batch.values())


def once(
    key: Any,
    part: Batch,
    model: nn.Module,
    recipe: Recipe,
    gradients: Accumulated,
    run: Callable[[], Any],
    watch: Watch,
) -> Any:
    """What `run` does with the micro-batch `part`, and returns.

    It is told from an earlier one where the recipe lets it leave nothing behind but gradients in 16 bits or more, and
    read nothing that is elsewhere: not with updates in the backward pass, weights on the disk, gradients in 8 bits.
    """
    if recipe.in_backward or recipe.weights != "memory" or recipe.gradients == "int8":
        return run()
    learned = [parameter for _, parameter in trained(model)]

    def given() -> list[Any]:
        return [*model.parameters(), *model.buffers(), *part.values(), *map(gradients.held, learned)]

    def call() -> tuple[Any, list[list[Tensor | None]]]:
        return run(), [gradients.held(parameter) for parameter in learned]

    found, held = repeated((key, tuple(part), recipe), model, "", given, call, prefix=watch.prefix)
    for parameter, each in zip(learned, held, strict=True):
        gradients.hold(parameter, each)
    return found
