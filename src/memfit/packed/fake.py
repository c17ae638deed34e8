"""Fake tensors have shapes and dtypes and no storage; what only makes sense on real ones is guarded here."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_Block = TypeVar("_Block")


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has no bytes to read: it was made under `FakeTensorMode`."""
    return isinstance(tensor, FakeTensor)


_target = "cpu"


@contextmanager
def aiming_at(device: str) -> Iterator[None]:
    """Inside, fake tensors, which are on the CPU, stand for tensors on `device`; packed weights are laid out for it."""
    global _target
    before, _target = _target, device
    try:
        yield
    finally:
        _target = before


def aimed_at() -> str:
    """`cpu` or `cuda`: what fake tensors stand for, and where what is loaded will be."""
    return _target


def device_meant(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is, or would be if it were no fake one."""
    return torch.device(_target) if is_fake(tensor) else tensor.device


def blocks_to_run(blocks: Iterable[_Block]) -> list[_Block]:
    """All turns of a loop: blocks of something too large to be worked on at once, candidates tried in turn.

    Under a fake mode the first two and the last: those between are of one size, nothing of one outlives it,
    and so the third takes what the second took.
    """
    found = list(blocks)
    modes = _get_current_dispatch_mode_stack()
    if len(found) > 3 and any(isinstance(mode, FakeTensorMode) for mode in modes):
        return [*found[:2], found[-1]]
    return found


@contextmanager
def copies_of_fakes() -> Iterator[None]:
    """Inside, fake tensors may be copied deeply.

    A copy of one has a copy of its mode, and in that copies of weak references to storages, which torch (2.13) gives
    back once for each copy: the count of a storage that is long gone, in memory that is someone else's by then, falls.
    """
    FakeTensorMode.__deepcopy__ = lambda mode, memo: mode  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del FakeTensorMode.__deepcopy__  # type: ignore[attr-defined]


Repeat = Callable[[Any, nn.Module | None, str, Callable[[], Sequence[Any]], Callable[[], Any], bool, str | None], Any]
_repeat: Repeat | None = None


def repeated(
    key: Any,
    block: nn.Module | None,
    name: str,
    given: Callable[[], Sequence[Any]],
    call: Callable[[], Any],
    *,
    any_recipe: bool = False,
    prefix: str | None = None,
) -> Any:
    """What `call` does and returns: in a dry run, work like earlier work is told from that and not run.

    Args:
        key: what decides the course of `call` beside the block and what is given; hashable.
        block: whose structure decides it; of equal structure, equal work.
        name: of the block or parameter, under which births are written down.
        given: tells all tensors that `call` reads, changes or frees.
        call: returns every tensor that it leaves behind, in tuples, lists or dicts.
        any_recipe: whether its course is the same in training by any recipe.
        prefix: what the names of its phases begin with this time; None: it has no phases of its own.
    """
    return call() if _repeat is None else _repeat(key, block, name, given, call, any_recipe, prefix)


@contextmanager
def repeating(repeat: Repeat) -> Iterator[None]:
    """Inside, `repeat` stands behind `repeated`."""
    global _repeat
    before, _repeat = _repeat, repeat
    try:
        yield
    finally:
        _repeat = before
