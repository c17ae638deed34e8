"""A live module, copied onto fake tensors: the same modules and ties, no bytes."""

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def fake_copy(module: nn.Module, *, mode: FakeTensorMode | None = None) -> nn.Module:
    """A deep copy of `module` whose parameters and buffers are fake CPU tensors; the original is not touched.

    Tensors that share a storage, or are the same, do so in the copy. Every other attribute is copied deeply.

    Args:
        module: anything that `copy.deepcopy` can copy.
        mode: whose fake tensors they are; default: the one that is active.

    Raises:
        RuntimeError: no fake mode is active and none was given.
    """
    mode = mode or active_fake_mode()
    if mode is None:
        raise RuntimeError("fake_copy needs a FakeTensorMode: call it within one, or give one.")
    twins: dict[int, Any] = {}
    storages: dict[int, torch.Tensor] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        twin = _twin(tensor, mode, storages)
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        twins[id(tensor)] = twin
    return copy.deepcopy(module, twins)


def active_fake_mode() -> FakeTensorMode | None:
    """The innermost FakeTensorMode that is active; None if there is none."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, FakeTensorMode):
            return mode
    return None


def _twin(tensor: torch.Tensor, mode: FakeTensorMode, storages: dict[int, torch.Tensor]) -> torch.Tensor:
    """A fake CPU tensor with this tensor's shape, strides and dtype, on the fake twin of its storage."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    with mode:
        if key not in storages:
            storages[key] = torch.empty(storage.nbytes(), dtype=torch.uint8)
        flat = storages[key]
        if flat.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        usable = flat[: flat.numel() // tensor.dtype.itemsize * tensor.dtype.itemsize]
        return usable.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
