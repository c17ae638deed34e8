"""Predict by dry run: the same loading and the same task, on tensors that have shapes and no storage."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Protocol

from torch import nn
from torch._subclasses import FakeTensorMode

from .account import Account
from .follow import Follow
from .ledger import Ledger
from .replay import Blocks, Products
from .settle import settle
from .watch import Watch


class Task(Protocol):
    """Something that can be run on a model, fake or real."""

    def run(self, model: nn.Module, watch: Watch) -> None:
        """Run all phases, telling `watch` where the task is."""
        ...


def trace(
    make: Callable[[], nn.Module],
    task: Task,
    *,
    device: str = "cpu",
    whole: bool = False,
    products: Products | None = None,
) -> Ledger:
    """Make a model and run a task on it, on fake tensors; what was born, and what ended, in order.

    Args:
        products: of earlier traces on as many threads, to go on from.
        others: see `dry_run`.
    """
    follow = Follow(device=device)
    blocks = Blocks(follow, products=products)
    with no_collection(), FakeTensorMode(allow_non_fake_inputs=True), follow:
        with follow.phase("load"), nullcontext() if whole else blocks.on_loading():
            model = make()
            hold_model(model, follow)
        follow.ledger.routed = has_experts(model)
        if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
            follow.ledger.runtime = "transformers"
        with follow.inside(model):
            if whole:
                task.run(model, follow)
            else:
                with blocks.on(model):
                    task.run(model, follow)
    return follow.ledger


def dry_run(make: Callable[[], nn.Module], task: Task, *, device: str = "cpu", whole: bool = False) -> Account:
    """The account of making a model and running a task on it.

    Args:
        make: makes or loads the model; called on fake tensors.
        task: what is run on it.
        device: `cpu` or `cuda`, whose allocator is meant; what is installed does not matter.
        whole: trace every block, also those equal to one already traced.
    """
    started = time.perf_counter()
    account = settle(trace(make, task, device=device, whole=whole), device=device)
    return replace(account, seconds=time.perf_counter() - started)


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside, Python does not look for unreachable cycles: among all that is imported, a fifth of a trace's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def has_experts(model: nn.Module) -> bool:
    """Whether tokens are sent to experts: transformers calls the modules that hold them so."""
    return any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules())


def hold_model(model: nn.Module, watch: Watch) -> None:
    """Tell `watch` the parameters and buffers of `model`, each under its module's name."""
    for name, tensor in model.named_parameters():
        watch.holds("parameter", name.rpartition(".")[0], tensor)
    for name, buffer in model.named_buffers():
        owner = name.rpartition(".")[0]
        packed = getattr(model.get_submodule(owner), "holds_weights", False)
        watch.holds("parameter" if packed else "buffer", owner, buffer)
