"""Where a model uses its parameters: in one block, in several, in tables whose gradients can be made by rows."""

from torch import nn

from memfit.account.structure import stacked_blocks
from memfit.errors import UsageError
from memfit.technique.row_gradients import RowGradients, known_lookup

from .objective import LanguageModel, Objective, output_head


def in_one_block(model: nn.Module) -> set[int]:
    """Numbers (`id`) of the parameters that belong to one block of a stack, under one name: their gradient is whole
    when it arrives."""
    count: dict[int, int] = {}
    for _, block in stacked_blocks(model):
        for key in {id(p) for p in block.parameters()}:
            count[key] = count.get(key, 0) + 1
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    return {key for key, number in count.items() if number == 1 and names[key] == 1}


def used_outside(model: nn.Module, blocks: tuple[str, ...]) -> set[int]:
    """Numbers of the parameters that modules outside of the blocks of these names hold."""
    inside = tuple(name + "." for name in blocks)
    named = model.named_parameters(remove_duplicate=False)
    return {id(parameter) for name, parameter in named if not name.startswith(inside)}


def find_tables(model: nn.Module, objective: Objective) -> dict[int, RowGradients]:
    """Trained embeddings and the head whose gradients can be made by rows, by their numbers.

    Raises:
        UsageError: the loss is not made in chunks.
    """
    if not isinstance(objective, LanguageModel) or objective.chunks is None:
        raise UsageError("gradients by rows need the loss in chunks, which this model does not allow.")
    head = output_head(model)
    assert head is not None
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    found: dict[int, RowGradients] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad or weight.dim() != 2:
            continue
        if all(user is head or known_lookup(user) for user in users[id(weight)]) and isinstance(
            module, nn.Embedding | nn.Linear
        ):
            found[id(weight)] = RowGradients(weight)
    return found
