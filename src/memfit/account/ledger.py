"""Births and ends of storages, in order: what a dry run writes and an account is read from."""

from dataclasses import dataclass
from typing import Any

import torch

from .account import Kind


@dataclass(slots=True)
class Storage:
    """One storage: how big, what for, who made it."""

    nbytes: int
    kind: Kind
    module: str
    operator: str
    dtype: torch.dtype
    unwritten: int = 0
    """Bytes of it that no kernel writes to: no page is given for them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """A kernel may need scratch for a slice that it does not need for a tensor without gaps."""
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Shape":
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


class Ledger:
    """Births and ends of storages, in order, and where the phases begin.

    An event is (storage number, +1 or -1). Replaying a block writes the same events that tracing it would.
    """

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self.events: list[tuple[int, int]] = []
        self.marks: list[tuple[int, str]] = []
        self.gone: set[int] = set()
        self.calls: dict[tuple[str, str], tuple[Any, ...]] = {}
        """(phase, module) to the positional arguments of its first call, tensors as `Shape`s."""
        self.routed = False
        """Whether the model has experts, chosen by the data."""
        self.experts_a_token = 1
        """How many of them each token goes to, where the model says so."""
        self.runtime = "torch"
        """`transformers` where the model is one of its classes."""
        self.kernels: set[tuple[Any, ...]] = set()
        """Shapes of the products that oneDNN makes code for."""

    def copy(self) -> "Ledger":
        """Another ledger that begins with all that is in this one."""
        made = Ledger()
        made.storages, made.events, made.marks = list(self.storages), list(self.events), list(self.marks)
        made.gone, made.calls, made.kernels = set(self.gone), dict(self.calls), set(self.kernels)
        made.routed, made.runtime = self.routed, self.runtime
        made.experts_a_token = self.experts_a_token
        return made

    def born(self, storage: Storage) -> int:
        """Write down a birth; returns the storage's number."""
        self.storages.append(storage)
        number = len(self.storages) - 1
        self.events.append((number, 1))
        return number

    def ended(self, number: int) -> None:
        """Write down an end, once."""
        if number not in self.gone:
            self.gone.add(number)
            self.events.append((number, -1))


def phase_spans(ledger: Ledger) -> list[tuple[str, int, int]]:
    """Phases as (name, first event, one past the last event)."""
    spans = []
    for (start, name), (end, closing) in zip(ledger.marks, ledger.marks[1:], strict=False):
        if name:
            assert closing == "" or closing != name
            spans.append((name, start, end))
    return spans
