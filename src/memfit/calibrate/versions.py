"""A block's linear layers in two versions: as they were, and as they become."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Read = Callable[[], Tensor]
"""A weight [N, K], read anew."""


class Versions:
    """Inside `in_place`, the layers compute with the version that is asked for.

    Args:
        layers: by full name; their weights may be on meta.
        was: of a layer's name, its weight as it was.
        hold: keep each weight from its first use on; else it is read for each use, and let go after.
    """

    def __init__(
        self, layers: Mapping[str, nn.Linear], was: Callable[[str], Tensor], *, hold: bool
    ) -> None:
        self.layers, self.hold = layers, hold
        self._read_was = was
        self._read_now: dict[str, Read] = {}
        self._held: dict[tuple[str, bool], Tensor] = {}
        self._as_they_were = False
        self._given: Mapping[str, Read] = {}

    def become(self, name: str, now: Read) -> None:
        """From now on a layer has another weight."""
        self._read_now[name] = now
        self._held.pop((name, True), None)

    def shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a layer."""
        layer = self.layers[name]
        return layer.out_features, layer.in_features

    def was(self, name: str) -> Tensor:
        """A layer's weight as it was."""
        return self._version(name, new=False)

    def now(self, name: str) -> Tensor:
        """A layer's weight as it has become; if it has not, as it was."""
        return self._version(name, new=name in self._read_now)

    @contextmanager
    def as_they_were(self) -> Iterator[None]:
        """Inside, the layers have the weights that they had."""
        self._as_they_were = True
        try:
            yield
        finally:
            self._as_they_were = False

    @contextmanager
    def given(self, weights: Mapping[str, Read]) -> Iterator[None]:
        """Inside, the layers of these names have the weights that are read here, each time anew."""
        self._given = weights
        try:
            yield
        finally:
            self._given = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, a layer that is asked for its weight has the version asked for, and keeps none."""
        kinds = {name: type(layer) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.__class__ = self._reading(name, kinds[name])
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.__class__ = kinds[name]
            self._held.clear()

    def _reading(self, name: str, kind: type[nn.Module]) -> Any:
        """The layer's class, but that `weight` answers from here."""

        def weight(_: nn.Module) -> Tensor:
            if name in self._given:
                return self._given[name]()
            return self.was(name) if self._as_they_were else self.now(name)

        return type(kind.__name__, (kind,), {"weight": property(weight), "__module__": kind.__module__})

    def _version(self, name: str, *, new: bool) -> Tensor:
        found = self._held.get((name, new))
        if found is None:
            found = self._read_now[name]() if new else self._read_was(name)
            if self.hold:
                self._held[name, new] = found
        return found
