"""Make fake tensors at once, by their shapes: several times as fast as asking the fake mode."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_CPU: Final = torch.device("cpu")


def fake_mode() -> FakeTensorMode | None:
    """The innermost fake mode that is on."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, FakeTensorMode):
            return mode
    return None


def make_fake(mode: FakeTensorMode, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A fake CPU tensor on a storage of its own."""
    with torch._C._DisableTorchDispatch():
        meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(mode, meta, _CPU)


def view_fake(base: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    """A fake tensor on the storage of the fake tensor `base`, over all of which any view may range."""
    assert isinstance(base, FakeTensor)
    with torch._C._DisableTorchDispatch():
        meta = torch.empty((0,), dtype=dtype, device="meta")
        meta.set_(base.untyped_storage(), offset, tuple(shape), tuple(stride))
        return FakeTensor(base.fake_mode, meta, _CPU)


def _empty(mode: FakeTensorMode, args: Any, kwargs: Any) -> Any:
    known = {"dtype": torch.get_default_dtype(), "device": _CPU, "pin_memory": False, "layout": None}
    if len(args) != 1 or not kwargs.keys() <= known.keys() or kwargs.get("device", _CPU).type != "cpu":
        return NotImplemented
    if kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided):
        return NotImplemented
    shape = args[0]
    if not all(type(size) is int for size in shape):
        return NotImplemented
    with torch._C._DisableTorchDispatch():
        meta = torch.empty(shape, dtype=kwargs.get("dtype"), device="meta")
        return FakeTensor(mode, meta, _CPU)


def _detach(mode: FakeTensorMode, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    # A parameter's data, with nothing to derive: a second tensor on the same storage.
    if type(tensor) is not FakeTensor or tensor.requires_grad or tensor.device != _CPU:
        return NotImplemented
    return view_fake(tensor, tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


QUICK: Final[dict[Any, Callable[[FakeTensorMode, Any, Any], Any]]] = {
    torch.ops.aten.empty.memory_format: _empty,
    torch.ops.aten.detach.default: _detach,
}
"""Operators answered here: loading asks nothing else, and that thousands of times."""
