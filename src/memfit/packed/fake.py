"""Fake tensors have shapes and dtypes and no storage; what only makes sense on real ones is guarded here."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_Block = TypeVar("_Block")


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has no bytes to read: it was made under `FakeTensorMode`."""
    return isinstance(tensor, FakeTensor)


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
