"""A checkpoint of which some blocks, heads, channels and experts are never read: a narrower model in a whole one."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from memfit.errors import UsageError
from memfit.packed.fake import blocks_to_run
from memfit.source.checkpoint import BLOCK_NBYTES, Checkpoint, TensorInfo
from memfit.source.cuts import (
    Counts,
    Cuts,
    block_number,
    counts_of,
    find_cuts,
    narrower_config,
    renumbered,
    require_blocks,
    stack_of,
)
from memfit.source.source import Source

_KINDS: Final = ("heads", "kv_heads", "channels", "experts")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays of a model, by the numbers that it has there, rising; what is not named stays whole.

    As one config counts heads, channels and experts for all blocks, of each as many stay in every block; which ones is
    the block's own affair.
    """

    blocks: tuple[int, ...] | None = None
    """Numbers of the blocks that stay; None: all."""
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Query heads by the block's number in the whole model."""
    kv_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Heads of keys and values."""
    channels: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Channels between an MLP's layers."""
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def counts(self, whole: Counts) -> Counts:
        """How many stay of a model that has `whole`.

        Raises:
            UsageError: none of something stays, more of it than there is, or not as many in every block.
        """
        blocks = tuple(range(whole.blocks)) if self.blocks is None else self.blocks
        _require_rising("blocks", "the model", blocks, whole.blocks)
        found: dict[str, Any] = {"blocks": len(blocks)}
        for kind in _KINDS:
            kept, of = getattr(self, kind), getattr(whole, kind)
            if not kept:
                found[kind] = of
                continue
            if of is None:
                raise UsageError(f"{kind} are to be dropped, and the model's config counts none.")
            for number, numbers in kept.items():
                _require_rising(kind, f"block {number}", numbers, of)
            sizes = {len(numbers) for numbers in kept.values()}
            if len(sizes) != 1:
                raise UsageError(
                    f"{kind}: {min(sizes)} stay in one block and {max(sizes)} in another; a config has one for all."
                )
            found[kind] = sizes.pop()
        return Counts(**found)

    def to_json(self) -> dict[str, Any]:
        """As an object."""
        kinds = {kind: {str(n): list(kept) for n, kept in getattr(self, kind).items()} for kind in _KINDS}
        return kinds | {"blocks": None if self.blocks is None else list(self.blocks)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Kept":
        kinds = {kind: {int(n): tuple(kept) for n, kept in data[kind].items()} for kind in _KINDS}
        return cls(blocks=None if data["blocks"] is None else tuple(data["blocks"]), **kinds)


@dataclass(frozen=True, kw_only=True)
class NarrowedCheckpoint:
    """The narrower model's parameters, by its own names, read some rows at a time from those of `base`."""

    base: Source
    tensors: Mapping[str, TensorInfo]
    parts: Mapping[str, tuple[str, tuple[np.ndarray | None, ...]]]
    """Parameter to the one of `base` that it is a part of, and the entries of each dimension that stay; None: all."""
    instead: Checkpoint | None = None
    """Parameters that were made anew for the narrower model."""

    def read(self, name: str) -> Tensor:
        out = torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype)
        self.read_into(name, out)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if self.instead is not None and name in self.instead.tensors:
            return self.instead.read_rows(name, start, stop)
        info = self.tensors[name]
        out = torch.empty((stop - start, info.shape[-1]), dtype=info.dtype)
        self._fill(name, start, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        if self.instead is not None and name in self.instead.tensors:
            self.instead.read_into(name, out)
            return
        old, kept = self.parts[name]
        if all(entries is None for entries in kept):
            self.base.read_into(self.base.parameters[old][2], out)
        else:
            self._fill(name, 0, out.view(-1, out.shape[-1]))

    def _fill(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` [R, width] with the rows from `start` on, all dimensions but the last taken as one."""
        old, kept = self.parts[name]
        shape, _, canonical = self.base.parameters[old]
        rows, columns = _rows(shape[:-1], kept[:-1]), kept[-1]
        mine = np.arange(start, start + out.shape[0]) if rows is None else rows[start : start + out.shape[0]]
        most = max(1, BLOCK_NBYTES // (shape[-1] * self.tensors[name].dtype.itemsize))
        for first, stop in blocks_to_run(list(_stretches(mine, most))):
            low, high = int(mine[first]), int(mine[stop - 1]) + 1
            block = stored_rows(self.base, canonical, low, high)
            if high - low != stop - first:
                block = block.index_select(0, torch.from_numpy(mine[first:stop] - low))
            if columns is not None:
                block = block.index_select(1, torch.from_numpy(columns))
            out[first:stop].copy_(block)
            del block


def narrowed(source: Source, kept: Kept, *, instead: Checkpoint | None = None) -> Source:
    """The narrower model of which `kept` stays, as a source: its config, and its weights read from those of `source`.

    Args:
        instead: parameters of the narrower model to be read from here.

    Raises:
        UsageError: the model is packed, or cannot be narrowed so; see `find_cuts` and `narrower_config`.
    """
    if source.quantized:
        raise UsageError(f"{source.name}: its weights are packed. Narrow the model that they were made from.")
    whole = counts_of(source.config)
    counts = kept.counts(whole)
    if counts == whole and instead is None:
        return source
    model = source.build()
    stack = stack_of(source, model)
    blocks = tuple(range(whole.blocks)) if kept.blocks is None else kept.blocks
    cuts = find_cuts(source, counts)
    raw = {key: value for key, value in source.raw.items() if key != "memfit"}
    config = narrower_config(source.config, counts, blocks)
    empty = dataclasses.replace(source, config=config, checkpoint=None, raw=raw)
    if len(blocks) != whole.blocks:
        require_blocks(source, model, empty.build(), blocks, stack)
    parts: dict[str, tuple[str, tuple[np.ndarray | None, ...]]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, (shape, _, canonical) in empty.parameters.items():
        new = block_number(name, stack)
        number = None if new is None else blocks[new]
        old = name if number is None else renumbered(name, stack, number)
        entries = _entries(source, old, number, cuts, kept)
        _require_shape(source, name, old, shape, entries)
        if canonical != name or (source.checkpoint is not None and not source.holds(old)):
            continue
        parts[name] = (old, entries)
        tensors[name] = _info(source, name, old, shape)
    if source.checkpoint is None:
        return empty
    view = NarrowedCheckpoint(base=source, tensors=tensors, parts=parts, instead=instead)
    return dataclasses.replace(empty, checkpoint=view)


def stored_rows(source: Source, parameter: str, start: int, stop: int) -> Tensor:
    """Rows of a parameter as stored [stop − start, width], from whichever stored tensors hold them."""
    shape = source.parameters[parameter][0]
    assert source.checkpoint is not None, "there is something to read"
    found = []
    for piece in source.layout.pieces[parameter]:
        each = shape[-2] if piece.index is not None else math.prod(shape[:-1])
        at = (piece.index or 0) * each + (piece.start or 0)
        low, high = max(start, at), min(stop, at + (each if piece.rows is None else piece.rows))
        if low < high:
            found.append((low, source.checkpoint.read_rows(piece.tensor, low - at, high - at)))
    if len(found) == 1:
        return found[0][1]
    return torch.cat([rows for _, rows in sorted(found, key=lambda one: one[0])])


@dataclass(frozen=True, kw_only=True)
class LiveCheckpoint:
    """The parameters and buffers of a module in memory."""

    state: Mapping[str, Tensor]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(
                name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), nbytes=tensor.nbytes, file=Path("in memory")
            )
            for name, tensor in self.state.items()
        }  # fmt: skip

    def read(self, name: str) -> Tensor:
        return self.state[name].clone()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self.state[name]
        return tensor.reshape(-1, tensor.shape[-1])[start:stop].clone()

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.state[name])


def live_source(model: nn.Module) -> Source:
    """A model of transformers in memory, as a source; nothing is copied.

    Raises:
        UsageError: it has no config.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise UsageError(f"a {type(model).__name__} has no config to be narrowed by. Give a model of transformers.")
    if not config.architectures:
        config = type(config).from_dict(config.to_dict() | {"architectures": [type(model).__name__]})
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    state = {key: tensor.detach() for key, tensor in model.state_dict(keep_vars=True).items()}
    return Source(name=name, directory=None, config=config, checkpoint=LiveCheckpoint(state=state))


def entries_of(numbers: tuple[int, ...], each: int) -> np.ndarray:
    """The entries that belong to these numbers, `each` of them to one."""
    return (np.asarray(numbers)[:, None] * each + np.arange(each)).ravel()


def _require_rising(what: str, where: str, numbers: tuple[int, ...], of: int) -> None:
    rising = all(a < b for a, b in itertools.pairwise(numbers))
    if not numbers or not rising or numbers[0] < 0 or numbers[-1] >= of:
        shown = ", ".join(map(str, numbers[:8])) or "none"
        raise UsageError(
            f"of the {of} {what} of {where}, {shown} are to stay: give rising numbers from 0 to {of - 1}, at least one."
        )


def _entries(
    source: Source, old: str, number: int | None, cuts: Cuts, kept: Kept
) -> tuple[np.ndarray | None, ...]:
    """Which entries of each dimension of a parameter stay."""
    shape = source.parameters[old][0]
    found: list[np.ndarray | None] = []
    for size, cut in zip(shape, cuts.get(old, (None,) * len(shape)), strict=True):
        numbers = None if cut is None or number is None else getattr(kept, cut.kind).get(number)
        if cut is None or numbers is None:
            found.append(None)
            continue
        one = entries_of(numbers, cut.each)
        stretch = size // cut.repeats
        found.append(np.concatenate([one + stretch * n for n in range(cut.repeats)]))
    return tuple(found)


def _require_shape(
    source: Source, name: str, old: str, shape: tuple[int, ...], entries: tuple[np.ndarray | None, ...]
) -> None:
    if old not in source.parameters:
        raise UsageError(f"{source.name}: the narrower model has a {name!r} {shape}, and there is no {old!r} for it.")
    was = source.parameters[old][0]
    made = tuple(size if kept is None else len(kept) for size, kept in zip(was, entries, strict=True))
    if made != shape:
        raise UsageError(
            f"{source.name}: of {old!r} {was} would stay {made}, and {name!r} of the narrower model takes {shape}. Not "
            "every block that has such a part was given what stays of it."
        )


def _info(source: Source, name: str, old: str, shape: tuple[int, ...]) -> TensorInfo:
    """The narrower tensor, of the dtype and in the file of the one that it is a part of."""
    dtype, file = source.parameters[old][1], Path("config.json")
    pieces = source.layout.pieces.get(source.parameters[old][2], ())
    if pieces:
        first = source.tensors[pieces[0].tensor]
        dtype, file = first.dtype, first.file
    return TensorInfo(name=name, dtype=dtype, shape=shape, nbytes=math.prod(shape) * dtype.itemsize, file=file)


def _rows(shape: tuple[int, ...], kept: tuple[np.ndarray | None, ...]) -> np.ndarray | None:
    """Numbers of the rows that stay, of all dimensions but the last taken as one; None: all of them."""
    if all(entries is None for entries in kept):
        return None
    grid = np.ix_(*(np.arange(size) if entries is None else entries for size, entries in zip(shape, kept, strict=True)))
    return np.ravel_multi_index(grid, shape).ravel()


def _stretches(numbers: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """(first, stop) of stretches of rising `numbers` [R] that span at most `most` each."""
    first, known = 0, numbers.tolist()
    while first < len(known):
        stop = bisect.bisect_left(known, known[first] + most, first)
        yield first, stop
        first = stop
