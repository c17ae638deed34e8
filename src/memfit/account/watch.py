"""What a running task tells whoever watches it: the phase it is in, and what tensors are for."""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Protocol, Self

import torch

from .account import Kind


class Watch(Protocol):
    """Follows a task while it runs. A dry run and a measurement are both watches."""

    @property
    def may_skip(self) -> bool:
        """Whether steps between the first and the last may be left out (their peaks lie between)."""
        ...

    @property
    def prefix(self) -> str:
        """What it puts before the names of phases that it is told."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """All that is allocated until it closes belongs to the phase `name`."""
        ...

    def holds(self, kind: Kind, module: str, tensor: torch.Tensor) -> None:
        """Say what `tensor`'s storage is for."""
        ...

    def on_disk(self, tensor: torch.Tensor) -> None:
        """Say that `tensor`'s bytes lie in a file, whoever made it."""
        ...


class Unwatched:
    """A watch that looks away: the task is run for its results alone."""

    may_skip, prefix = False, ""

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def holds(self, kind: Kind, module: str, tensor: torch.Tensor) -> None:
        return None

    def on_disk(self, tensor: torch.Tensor) -> None:
        return None


class Anew:
    """A phase that begins anew whenever it is called, without a gap between two, so that no event is missed.

    An allocator's events are kept until their phase ends: where many small ones come, they take far more memory than
    what they tell of.
    """

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch, self._name, self._open = watch, name, ExitStack()

    def __enter__(self) -> Self:
        self._open.enter_context(self._watch.phase(self._name))
        return self

    def __call__(self) -> None:
        self._open.close()
        self._open.enter_context(self._watch.phase(self._name))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
