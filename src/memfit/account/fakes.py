"""Make fake tensors at once, by their shapes: several times as fast as asking the fake mode."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only

_CPU: Final = torch.device("cpu")


def fake_mode() -> FakeTensorMode | None:
    """The innermost fake mode that is on."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, FakeTensorMode):
            return mode
    return None


def _fake(mode: FakeTensorMode, meta: Tensor) -> Tensor:
    """`FakeTensor(mode, meta, cpu)`, whose attributes are the same of all: the first one's are taken."""
    if not _ATTRIBUTES:
        _ATTRIBUTES.update(vars(FakeTensor(mode, torch.empty((), device="meta"), _CPU)))
        del _ATTRIBUTES["fake_mode"]
    made: FakeTensor = Tensor._make_subclass(
        FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=_CPU
    )
    if mode._allow_unsafe_data_ptr_access:
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)  # `copy.deepcopy` asks, and clones what has none
    else:
        torch._C._set_throw_on_mutable_data_ptr(made)
    vars(made).update(_ATTRIBUTES, fake_mode=mode)
    return made


_ATTRIBUTES: Final[dict[str, Any]] = {}
"""What a fake tensor's constructor, which takes four times as long, gives to each on the CPU."""


def make_fake(mode: FakeTensorMode, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A fake CPU tensor on a storage of its own."""
    with torch._C._DisableTorchDispatch():
        meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return _fake(mode, meta)


def view_fake(base: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    """A fake tensor on the storage of the fake tensor `base`, over all of which any view may range."""
    assert isinstance(base, FakeTensor)
    with torch._C._DisableTorchDispatch():
        meta = torch.empty((0,), dtype=dtype, device="meta")
        meta.set_(base.untyped_storage(), offset, tuple(shape), tuple(stride))
        return _fake(base.fake_mode, meta)


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
        return _fake(mode, meta)


def _new_empty(mode: FakeTensorMode, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if not _is_plain(tensor):
        return NotImplemented
    return _empty(mode, args[1:], {"dtype": tensor.dtype} | {k: v for k, v in kwargs.items() if v is not None})


def _view(func: Any) -> Callable[[FakeTensorMode, Any, Any], Any]:
    def quick(mode: FakeTensorMode, args: Any, kwargs: Any) -> Any:
        if not _is_plain(args[0]):
            return NotImplemented
        with torch._C._DisableTorchDispatch():
            meta = func(*args, **kwargs)
            if isinstance(meta, Tensor):
                return _fake(mode, meta)
            return [_fake(mode, part) for part in meta]

    return quick


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is fake, on the CPU, and of unknown value."""
    return type(tensor) is FakeTensor and tensor.fake_device == _CPU and tensor.constant is None


def shaped(mode: FakeTensorMode, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The output of an operator whose shape function is torch's own, of plain tensors alone; None if it is another."""
    if func not in _SHAPED or kwargs.get("device") not in (None, _CPU):
        return None
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    joined = func is aten.cat.default
    parts: list[Any] = [func, torch.get_default_dtype()]
    for arg in args[0] if joined else args:
        if isinstance(arg, Tensor):
            if not _is_plain(arg):
                return None
            parts.append((arg.shape, arg.stride(), arg.dtype))
        else:
            parts.append((type(arg), tuple(arg) if isinstance(arg, list) else arg))
    parts += args[1:] if joined else ()
    key = (*parts, *kwargs.items())
    found = _SHAPES.get(key)
    if found is None:
        found = _SHAPES[key] = _shape_of_output(func, args, kwargs)
    return make_fake(mode, *found)


_SHAPES: Final[dict[Any, tuple[Any, Any, torch.dtype]]] = {}
"""Shape, stride and dtype of an output, by the operator and all that decides them: a model asks the same again and
again, and torch's functions take ten times as long as looking it up."""


def _shape_of_output(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, torch.dtype]:
    """What the operator's function for meta tensors tells."""

    def plain(arg: Any) -> Any:
        # A new one: a fake tensor's kernels ask it for its device, again and again, and believe the answer.
        return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")

    with torch._C._DisableTorchDispatch():
        meta = func(*tree_map_only(Tensor, plain, args), **kwargs)
    return tuple(meta.shape), meta.stride(), meta.dtype


def written(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The output of an operator that writes elementwise into a tensor that is there; None if it is another."""
    out = kwargs.get("out") if func in _INTO else args[0] if func.overloadpacket in _IN_PLACE else None
    if not _is_plain(out) or not all(_is_plain(arg) for arg in args if isinstance(arg, Tensor)):
        return None
    assert isinstance(out, Tensor)
    return out if out.numel() else None  # an empty one may be made larger


aten = torch.ops.aten
_VIEWS: Final = (
    aten._unsafe_view.default,
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten.view.dtype,
)
_IN_PLACE: Final = frozenset(
    {
        aten.add_, aten.addcdiv_, aten.addcmul_, aten.bitwise_and_, aten.bitwise_left_shift_, aten.bitwise_or_,
        aten.bitwise_right_shift_, aten.bitwise_xor_, aten.clamp_, aten.copy_, aten.div_, aten.exp_, aten.fill_,
        aten.lerp_, aten.logical_and_, aten.mul_, aten.neg_, aten.pow_, aten.sub_, aten.zero_,
    }
)  # fmt: skip
_INTO: Final = frozenset(
    {
        aten.bitwise_and.Scalar_out, aten.bitwise_right_shift.Tensor_Scalar_out, aten.maximum.out, aten.mm.out,
        aten.sqrt.out,
    }
)  # fmt: skip
_SHAPED: Final = frozenset(
    {
        aten._to_copy.default, aten.add.Tensor, aten.addmm.default, aten.amax.default,
        aten.bmm.default, aten.cat.default, aten.clone.default, aten.div.Scalar, aten.div.Tensor, aten.ge.Scalar,
        aten.gelu.default, aten.gelu_backward.default, aten.le.Scalar, aten.lt.Scalar, aten.mean.dim, aten.mm.default,
        aten.mul.Scalar, aten.mul.Tensor, aten.neg.default, aten.pow.Tensor_Scalar, aten.rsqrt.default,
        aten.silu.default, aten.silu_backward.default, aten.slice_backward.default, aten.sub.Tensor, aten.sum.default,
        aten.sum.dim_IntList, aten.tanh.default,
    }
)  # fmt: skip
"""Those that models and optimizers call most; asked without the fake mode, a fifth of the time."""
QUICK: Final[dict[Any, Callable[[FakeTensorMode, Any, Any], Any]]] = {
    aten.empty.memory_format: _empty,
    aten.new_empty.default: _new_empty,
} | {func: _view(func) for func in _VIEWS}
"""Operators answered here that take no scratch. A view's strides are its kernel's, over dimensions of size 1 too:
products look at them, and the fake mode's may differ."""
