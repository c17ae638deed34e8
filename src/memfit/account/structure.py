"""What decides the course of a call: a block's structure, its layer of the cache, the objects it is given."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LAYER_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "block_idx"})
PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""Kinds of values that are the same where they are equal."""


@dataclass(frozen=True, slots=True)
class Itself:
    """In a description, an object that only it is like."""

    kind: type
    number: int


def stacked_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, block) of each block in a stack: a `ModuleList` of two or more; outermost stacks only."""
    stacks: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(stack + ".") for stack in stacks):
            continue
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            stacks.append(name)
            for number, block in enumerate(module):
                yield f"{name}.{number}", block


def inside_blocks(model: nn.Module) -> tuple[str, ...]:
    """What the name of any module in such a block begins with, one of these."""
    return tuple(f"{name}." for name, _ in stacked_blocks(model))


def packed_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that run from packed weights: equal ones recur in blocks that are not equal as a whole."""
    for name, module in model.named_modules():
        if any(getattr(child, "holds_weights", False) for child in module.children()):
            yield name, module


def structure_of(block: nn.Module) -> Any:
    """All of a block that decides what it allocates: classes, settings, shapes; not its number or values."""
    parts: list[Any] = []
    for name, module in block.named_modules():
        plain = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, PLAIN) and key not in _LAYER_NUMBERS
        )
        tensors = tuple(
            (key, shape_of(tensor))
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        )
        parts.append((name, type(module), plain, tensors))
    return tuple(parts)


def shape_of(tensor: Tensor) -> tuple[Any, ...]:
    """All of a tensor but its values and its storage."""
    return (
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.requires_grad,
    )


def layer_number(block: nn.Module) -> int | None:
    """Which of the model's layers a block says that it is."""
    for module in block.modules():
        for name in _LAYER_NUMBERS:
            number = vars(module).get(name)
            if isinstance(number, int):
                return number
    return None


def is_cache(value: Any) -> bool:
    """Whether it is a cache of transformers."""
    return hasattr(value, "layers") or hasattr(value, "self_attention_cache")


def cache_layers(cache: Any, number: int | None) -> tuple[list[Any], Any] | None:
    """The cache's layers that block `number` may touch, and what else of the cache decides its course."""
    if number is None:
        return None
    if hasattr(cache, "self_attention_cache"):
        inner = (cache.self_attention_cache, cache.cross_attention_cache)
        if any(number >= len(part.layers) for part in inner):
            return None
        # The block itself sets the flag that says the cross-attention is filled: tell such calls apart.
        updated = cache.is_updated.get(number)
        return ([part.layers[number] for part in inner], ("cross", updated)) if updated else None
    if number >= len(cache.layers):
        return None
    return [cache.layers[number]], type(cache)


def take_apart(value: Any, parts: list[Any], tensors: list[Tensor]) -> None:
    """Add to `parts` all of an attribute that decides what is allocated, and to `tensors` those inside it."""
    if isinstance(value, Tensor):
        tensors.append(value)
        parts.append("tensor")
    elif isinstance(value, PLAIN):
        parts.append(value)
    elif isinstance(value, (list, tuple)):
        parts.append((type(value), len(value)))
        for item in value:
            take_apart(item, parts, tensors)
    elif isinstance(value, dict):
        parts.append((dict, tuple(value)))
        for item in value.values():
            take_apart(item, parts, tensors)
    elif is_record(value):
        parts.append((type(value), tuple(vars(value))))
        for item in vars(value).values():
            take_apart(item, parts, tensors)
    else:
        parts.append(Itself(type(value), id(value)))


def is_record(value: Any, *also: type) -> bool:
    """Whether an object is tensors, settings and what is `also` named, under names, and no more."""
    if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
        return False
    return all(isinstance(item, (Tensor, *PLAIN, *also)) for item in vars(value).values())
