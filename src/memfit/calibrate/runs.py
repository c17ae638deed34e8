"""A block's call for all windows of a text, some windows at a time.

Legend of shapes: W windows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from memfit.account.ledger import Shape
from memfit.packed.fake import blocks_to_run

from .spill import Spill


@dataclass(frozen=True)
class Call:
    """What a block was called with, for all windows."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    windows: int
    spill: Spill
    """Where what the block gives goes."""


@dataclass(frozen=True)
class Run:
    """A block's call for the windows from `start` to `stop`, `batch` of them at a time."""

    call: Call
    start: int
    stop: int
    batch: int

    def halves(self) -> "list[Run]":
        """Two runs of half of the windows each; this one alone if there is but one window."""
        middle = self.start + (self.stop - self.start) // 2
        bounds = [(self.start, middle), (middle, self.stop)]
        return [replace(self, start=first, stop=last) for first, last in bounds if last > first]

    def parts(self, *, every: bool = False) -> Iterator[Callable[[], Any]]:
        """The call for each of the parts; in a dry run those that tell of the others, or `every` one."""
        leaves, spec = tree_flatten((self.call.args, dict(self.call.kwargs)))
        for rows in self._rows() if every else blocks_to_run(self._rows()):
            mine = [
                self.call.spill.rows(leaf, rows) if _of_windows(leaf, self.call.windows) else leaf for leaf in leaves
            ]
            args, kwargs = tree_unflatten(mine, spec)
            del mine
            yield lambda args=args, kwargs=kwargs: self.call.forward(*args, **kwargs)  # type: ignore[misc]
            del args, kwargs

    def first(self) -> Any:
        """The call for the first part alone."""
        return next(self.parts())()

    def whole(self, before: Any = None, calls: Sequence[Callable[[], Any]] | None = None) -> Any:
        """What the call gives, with room for all windows; into what another run gave `before`, if it is given.

        Args:
            calls: for every part, where they have been begun.
        """
        rows, windows, spill = self._rows(), self.call.windows, self.call.spill
        if calls is None:
            rows = blocks_to_run(rows)
        joined: list[Any] = []
        if before is not None:
            joined, spec = tree_flatten(before)
        for part, run in zip(rows, self.parts() if calls is None else calls, strict=True):
            leaves, spec = tree_flatten(run())
            del run
            if not joined:
                # What has no row for each window is the same for all of them, as T5's position bias.
                joined = [
                    spill.empty((windows, *leaf.shape[1:]), leaf.dtype) if _of_windows(leaf, _count(part)) else leaf
                    for leaf in leaves
                ]
            for whole, leaf in zip(joined, leaves, strict=True):
                if whole is not leaf and _of_windows(leaf, _count(part)):
                    whole[part] = leaf
                    spill.let_go(whole)
            del leaves
        return tree_unflatten(joined, spec)

    def _rows(self) -> list[slice]:
        starts = range(self.start, self.stop, self.batch)
        return [slice(start, min(start + self.batch, self.stop)) for start in starts]


def _count(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _of_windows(leaf: Any, windows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == windows


def shape_alone(leaf: Any) -> Any:
    """What is kept of a tensor that is made again later (`another`); anything else as it is."""
    return Shape.of(leaf) if isinstance(leaf, Tensor) else leaf


def another(leaf: Any, spill: Spill) -> Any:
    """Room for a tensor that is known by its shape alone; anything else as it is."""
    return spill.empty(leaf.shape, leaf.dtype) if isinstance(leaf, Shape) else leaf


class AllDone(Exception):  # no error: what the model makes of its last block is of no use
    """The walk through the blocks has come to the end of what was asked."""
