"""Predict by dry run: the same loading and the same task, on tensors that have shapes and no storage."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Final, Protocol

from torch import nn
from torch._subclasses import FakeTensorMode

from memfit.packed.fake import aiming_at

from .account import Account
from .cuda_autocast import CudaAutocast
from .cuda_kernels import kernels_of_cuda
from .cuda_workspaces import with_workspaces
from .follow import Follow, has_no_bytes
from .ledger import Ledger
from .mend import lstm_of_kernels, values_as_usual
from .replay import Blocks, Products
from .settle import settle
from .watch import Watch

TRAINING: Final = " training"
"""After the library's name: a process that learns holds more."""


class Task(Protocol):
    """Something that can be run on a model, fake or real."""

    def run(self, model: nn.Module, watch: Watch) -> None:
        """Run all phases, telling `watch` where the task is."""
        ...


class Loaded:
    """A model loaded on fake tensors, on which tasks are run one after the other, each as if it were the first.

    Args:
        make: makes or loads the model; called on fake tensors.
        device: `cpu` or `cuda`, whose allocator is meant.
        whole: trace every block, also those equal to one already traced.
        products: of earlier traces on as many threads, to go on from.
        repeats: of earlier traces of training by the same recipe, whichever blocks are recomputed.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        *,
        device: str = "cpu",
        whole: bool = False,
        products: Products | None = None,
        repeats: Products | None = None,
    ) -> None:
        self.whole, self.products, self.repeats = whole, products, repeats
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.follow = Follow(device=device)
        blocks = Blocks(self.follow, products=products)
        with no_collection(), aiming_at(device), self.mode, self.follow, self.follow.phase("load"):
            with nullcontext() if whole else blocks.on_loading():
                self.model = make()
            hold_model(self.model, self.follow)
            tensors = (*self.model.parameters(), *self.model.buffers())
            self.held = {self.follow.number_of(t): t.untyped_storage() for t in tensors if not has_no_bytes(t)}
        ledger = self.follow.ledger
        ledger.routed = has_experts(self.model)
        ledger.experts_a_token = getattr(getattr(self.model, "config", None), "num_experts_per_tok", None) or 1
        if any(type(module).__module__.startswith("transformers.") for module in self.model.modules()):
            ledger.runtime = "transformers"

    def run(self, task: Task) -> Ledger:
        """What was born and what ended in loading and in the task, in order."""
        follow = self.follow.again(self.held)
        blocks = Blocks(follow, products=self.products, repeats=self.repeats)
        learns = getattr(task, "learns", False)
        if learns:
            follow.ledger.runtime += TRAINING
            self.held.clear()  # What training casts or packs ends; and no other task is run on what has learned.
        # A block that learns leaves a graph behind, which no recording tells: it is traced, unless it is recomputed.
        repeated = blocks.on_training() if learns else blocks.on(self.model)
        replayed = nullcontext() if self.whole else repeated
        kernels = lstm_of_kernels() if follow.device == "cpu" else kernels_of_cuda()
        casts = CudaAutocast() if follow.device == "cuda" and _casts(task) else nullcontext()
        with (
            no_collection(), aiming_at(follow.device), values_as_usual(), kernels, casts, self.mode, follow,
            follow.inside(self.model), replayed,
        ):  # fmt: skip
            task.run(self.model, follow)
        return follow.ledger if follow.device == "cpu" else with_workspaces(follow.ledger)


def _casts(task: Task) -> bool:
    recipe = getattr(task, "recipe", None)
    return getattr(recipe, "precision", "") == "autocast"


def trace(
    make: Callable[[], nn.Module],
    task: Task,
    *,
    device: str = "cpu",
    whole: bool = False,
    products: Products | None = None,
    repeats: Products | None = None,
) -> Ledger:
    """Make a model and run a task on it, on fake tensors; what was born, and what ended, in order.

    Arguments: see `Loaded`.
    """
    return Loaded(make, device=device, whole=whole, products=products, repeats=repeats).run(task)


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
