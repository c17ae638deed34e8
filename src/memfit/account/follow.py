"""Follow every storage from its birth to its end, on fake tensors, operator by operator.

A dispatch mode sees each operator's outputs; a storage not seen before is born there, and a weak
reference tells when the last tensor on it is gone. What a CPU kernel allocates for itself and frees
before it returns is added by `workspace`. For CUDA as the target, sizes are its allocator's (`cuda`).
"""

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .account import Kind
from .cuda_kernels import SCRATCH
from .fakes import QUICK, fake_mode, shaped, written
from .ledger import Ledger, Shape, Storage
from .mend import MENDED
from .workspace import NONE, kernel_of, unwritten, workspace


class Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While on: each new storage of fake tensors is written into `ledger`, and its end too.

    Enter it inside a `FakeTensorMode`, so that it sees operators before the fake mode answers them.
    """

    may_skip, prefix = True, ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: the guard against it that torch puts around each call is a tenth of a trace."""
        return False

    def __init__(self, *, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.ledger = Ledger()
        self.path: list[str] = [""]
        self._numbers: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._paused = 0
        self._phase = ""
        self.mode: FakeTensorMode | None = None

    def __enter__(self) -> "Follow":
        self.mode = fake_mode()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    # -- what the dispatcher tells ------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device  # half of all that a mode is asked
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func is torch.ops.aten.add.Tensor and _adds_up_in_place(*args):
            return args[0]
        quick = QUICK.get(func)
        if quick is not None and self.mode is not None:
            made = quick(self.mode, args, kwargs)
            if made is not NotImplemented:
                for tensor in made if isinstance(made, list) else (made,):
                    self.number_of(tensor, func)
                return made
        if _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        mend = MENDED[self.device].get(func)
        if mend is None:
            out = written(func, args, kwargs)
            if out is None and self.mode is not None:
                out = shaped(self.mode, func, args, kwargs)
            if out is None:
                out = func(*args, **kwargs)
        else:
            with self.paused():
                out = mend(func, args, kwargs)
        if self.device == "cpu":
            before, after = workspace(func, args, kwargs, out)
        else:  # CUDA's kernels cast and wrap numbers in registers: most take nothing beside their outputs.
            before, after = NONE[0], [SCRATCH[func](args)] if func in SCRATCH else NONE[1]
        if self.device == "cpu" and (kernel := kernel_of(func, args)) is not None:
            self.ledger.kernels.add(kernel)
        name = func.name() if before or after else ""
        scratch = [self._scratch(nbytes, name) for nbytes in before]
        # cuBLASLt adds what has one dimension alone.
        plain = self.device == "cuda" and func is _ADDMM and args[0].dim() > 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not has_no_bytes(leaf):
                self.number_of(leaf, torch.ops.aten.mm.default if plain else func)
        if self.device == "cpu" and (left := unwritten(func, args, out)) is not None:
            self.ledger.storages[self.number_of(left[0])].unwritten = left[1]
        scratch += [self._scratch(nbytes, name) for nbytes in after]
        for number in scratch:
            self.ledger.ended(number)
        return out

    def _scratch(self, nbytes: int, operator: str) -> int:
        return self.ledger.born(Storage(nbytes, "temporary", self.path[-1], operator, torch.uint8))

    def number_of(self, tensor: torch.Tensor, func: Any = None) -> int:
        """The number of the tensor's storage; a storage not seen before is born now."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        number = self._numbers.get(key)
        if number is not None:
            return number
        operator = func.name() if func is not None else ""
        number = self.ledger.born(Storage(storage.nbytes(), "activation", self.path[-1], operator, tensor.dtype))
        self.adopt(storage, number)
        return number

    def adopt(self, storage: torch.UntypedStorage, number: int) -> None:
        """Let the end of `storage` be the end of storage `number`."""
        key = storage._cdata
        self._numbers[key] = number
        self._alive[number] = weakref.ref(storage, lambda _: self._on_end(key, number))

    def again(self, held: Mapping[int, torch.UntypedStorage]) -> "Follow":
        """Another one that goes on from here, with a ledger of its own; of what is alive it knows `held`."""
        other = Follow(device=self.device)
        other.ledger = self.ledger.copy()
        for number, storage in held.items():
            other.adopt(storage, number)
        return other

    def _on_end(self, key: int, number: int) -> None:
        del self._alive[number]
        if self._numbers.get(key) == number:
            del self._numbers[key]
        self.ledger.ended(number)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Tensors made in here are not written down."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    # -- the watch that a task talks to -------------------------------------------------------------

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.ledger.marks.append((len(self.ledger.events), name))
        self._phase = name
        yield
        self.ledger.marks.append((len(self.ledger.events), ""))

    def holds(self, kind: Kind, module: str, tensor: torch.Tensor) -> None:
        if has_no_bytes(tensor):
            return
        storage = self.ledger.storages[self.number_of(tensor)]
        storage.kind, storage.module = kind, module

    def on_disk(self, tensor: torch.Tensor) -> None:
        self.ledger.storages[self.number_of(tensor)].nbytes = 0

    @contextmanager
    def inside(self, model: torch.nn.Module) -> Iterator[None]:
        """Write births down under the dotted name of the module that is running."""
        names = {id(module): name for name, module in model.named_modules()}

        def enter(module: torch.nn.Module, arguments: Any) -> None:
            name = names.get(id(module), self.path[-1])
            self.path.append(name)
            if (self._phase, name) not in self.ledger.calls:
                self.ledger.calls[self._phase, name] = tree_map(_without_values, arguments)

        def leave(module: torch.nn.Module, _: Any, __: Any) -> None:
            self.path.pop()

        hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(enter),
            torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


_DEVICE = torch.ops.prim.device.default
_ADDMM = torch.ops.aten.addmm.default
_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_WRAPPERS = ("_fn", "inner")
"""Functions of torch's that stand between a dispatch mode and its caller."""
_ALONE = (4, 2)
"""References to a tensor and to its storage, seen from a dispatch mode, where the caller alone has it."""


def _adds_up_in_place(old: Any, new: Any, **_: Any) -> bool:
    """Whether autograd adds up two gradients, the first of which nobody else holds: it then does so in place, on real
    tensors, and not on those that a mode sees (autograd/input_buffer.cpp, `can_accumulate_inplace`)."""
    if torch.is_grad_enabled() or not isinstance(old, FakeTensor) or not isinstance(new, FakeTensor):
        return False
    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    frame = sys._getframe(2)
    while frame.f_code.co_name in _WRAPPERS and frame.f_back is not None:
        frame = frame.f_back
    if frame.f_code is not _ENGINE:
        return False
    uses = old._use_count(), torch._C._storage_Use_Count(old.untyped_storage()._cdata)  # type: ignore[attr-defined]
    return uses == _ALONE


def has_no_bytes(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on meta. A fake tensor asked for its device would ask the modes, thousands of times."""
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return device.type == "meta"


def _without_values(argument: Any) -> Any:
    """An argument to write down: nothing may be kept that would keep a tensor alive."""
    if isinstance(argument, torch.Tensor):
        return Shape.of(argument)
    return argument if isinstance(argument, (int, float, bool, str, torch.dtype)) else None


@cache
def _is_composite(func: Any) -> bool:
    """Whether the operator is only a way of writing others, which are then what runs; `silu_backward` has both."""
    if func.has_kernel_for_dispatch_key(torch.DispatchKey.CPU):
        return False
    return bool(func.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd))
