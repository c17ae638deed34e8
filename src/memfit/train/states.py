"""Where optimizer states are between updates: beside the weights, on the host, or in a file.

An update asks for the tiles of one part of a parameter, changes them in place, and gives them back.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from memfit.errors import UsageError
from memfit.packed.fake import is_fake
from memfit.source.checkpoint import bytes_of

from .recipe import Place

Slot = tuple[torch.dtype, int]
"""(dtype, entries) of one flat state tensor."""


class States(Protocol):
    """The states of all parameters, by the parameter's name and the state's."""

    def make(
        self, name: str, slots: Mapping[str, Slot], like: Tensor, *, held: dict[str, Tensor] | None = None
    ) -> None:
        """Zeros for a parameter that has none yet, or the states `held`."""
        ...

    def held(self, name: str) -> dict[str, Tensor] | None:
        """What of a parameter's states is in memory; None: it has none yet."""
        ...

    def names(self) -> list[str]:
        """Parameters that have states."""
        ...

    def slots(self, name: str) -> dict[str, Slot]:
        """What a parameter's states are."""
        ...

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Entries [start, stop), to be changed in place."""
        ...

    def write(self, name: str, state: str, start: int, tile: Tensor) -> None:
        """Give a tile back."""
        ...


class InMemory:
    """Tensors on the parameter's device, or on the host."""

    def __init__(self, *, on_host: bool = False) -> None:
        self.on_host = on_host
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self._devices: dict[str, torch.device] = {}

    def make(
        self, name: str, slots: Mapping[str, Slot], like: Tensor, *, held: dict[str, Tensor] | None = None
    ) -> None:
        self._devices[name] = like.device
        if held is not None:
            self.tensors[name] = held
            return
        device = torch.device("cpu") if self.on_host else like.device
        self.tensors[name] = {
            state: torch.zeros(entries, dtype=dtype, device=device) for state, (dtype, entries) in slots.items()
        }

    def held(self, name: str) -> dict[str, Tensor] | None:
        return self.tensors.get(name)

    def names(self) -> list[str]:
        return list(self.tensors)

    def slots(self, name: str) -> dict[str, Slot]:
        return {state: (tensor.dtype, tensor.numel()) for state, tensor in self.tensors[name].items()}

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][state][start:stop].to(self._devices[name])

    def write(self, name: str, state: str, start: int, tile: Tensor) -> None:
        held = self.tensors[name][state]
        if held.device != tile.device:
            held[start : start + tile.numel()].copy_(tile)


class OnDisk:
    """One file for each state, read and written by tiles. It has no name, so that nothing is left of it in the end."""

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory or tempfile.gettempdir()
        self._slots: dict[str, dict[str, Slot]] = {}
        self._files: dict[tuple[str, str], int] = {}
        self._fake: set[str] = set()
        self._devices: dict[str, torch.device] = {}

    def held(self, name: str) -> dict[str, Tensor] | None:
        return {} if name in self._slots else None

    def make(
        self, name: str, slots: Mapping[str, Slot], like: Tensor, *, held: dict[str, Tensor] | None = None
    ) -> None:
        if name in self._slots:
            return
        self._slots[name] = dict(slots)
        self._devices[name] = like.device
        if is_fake(like):
            self._fake.add(name)
            return
        for state, (dtype, entries) in slots.items():
            file, path = tempfile.mkstemp(prefix="memfit-state-", dir=self.directory)
            os.unlink(path)
            self._files[name, state] = file
            try:
                # All of it now: a disk that is full is told before the first step, not in the middle of one.
                os.posix_fallocate(file, 0, max(entries * dtype.itemsize, 1))
            except OSError as error:
                raise UsageError(
                    f"{self.directory}: {entries * dtype.itemsize} bytes for the optimizer's states cannot be had "
                    f"({error.strerror}). Free some, or keep the states in memory."
                ) from error

    def names(self) -> list[str]:
        return list(self._slots)

    def slots(self, name: str) -> dict[str, Slot]:
        return self._slots[name]

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        dtype, _ = self._slots[name][state]
        tile = torch.empty(stop - start, dtype=dtype)
        if name not in self._fake:
            _moved(os.preadv, self._files[name, state], tile, start)
        return tile.to(self._devices[name])

    def write(self, name: str, state: str, start: int, tile: Tensor) -> None:
        if name not in self._fake:
            _moved(os.pwritev, self._files[name, state], tile.cpu(), start)

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


def _moved(call: Callable[..., int], file: int, tile: Tensor, start: int) -> None:
    """Read or write a flat tile, from its entry `start` of the file on: one call moves 2 GiB at most."""
    buffer, at, done = memoryview(bytes_of(tile)), start * tile.element_size(), 0  # type: ignore[arg-type]
    while done < len(buffer):
        moved = call(file, [buffer[done:]], at + done)
        assert moved > 0, f"a file of states ends after {at + done} bytes"
        done += moved


def states_at(place: Place, directory: str | None = None) -> States:
    """A store of states at `place`."""
    if place == "disk":
        return OnDisk(directory)
    return InMemory(on_host=place == "host")
