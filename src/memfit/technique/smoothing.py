"""Smoothing of a model that is read from the disk: found norm by norm, kept as what each tensor is read with."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from memfit.account.mend import values_as_usual
from memfit.account.watch import Watch
from memfit.calibrate.collect import arguments_of
from memfit.calibrate.statistics import Moments, Statistics
from memfit.calibrate.stream import row_shape, rows_of
from memfit.source.load import load
from memfit.source.smoothed import smoothed, stored_alone
from memfit.source.source import Source
from memfit.technique.smooth import Feed, Reader, choose, find_feeds, folded

SMOOTHING: Final = "smoothing.safetensors"
"""In the work directory: how the model's norms were smoothed."""
ROWS: Final = 128
"""Rows of each layer on which the error of a share is measured."""


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """What smoothing makes of a model, by the names of its parameters and modules."""

    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Weights and biases of norms, bf16 [K]."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """Layer to f, float32 [K]: what the inputs of its weight are multiplied by."""
    alphas: dict[str, Tensor] = field(default_factory=dict)
    """Norm to the share that was chosen, 0: left as it is."""

    def of_source(self, source: Source) -> Source:
        """The source whose weights are read smoothed."""
        columns = {f"{layer}.weight": made for layer, made in self.columns.items()}
        return smoothed(source, vectors=self.vectors, columns=columns)

    def of_statistics(self, statistics: Statistics) -> Statistics:
        """The statistics of the smoothed model: inputs are smaller by f, gradients of outputs the same."""
        moments: dict[str, Moments] = dict(statistics.moments)
        for layer, made in self.columns.items():
            moments[layer] = replace(moments[layer], inputs=moments[layer].inputs / made.square())
        return Statistics(moments=moments, tokens=statistics.tokens)

    def told(self) -> dict[str, float]:
        """Norm to its share, as numbers."""
        return {norm: round(float(alpha), 2) for norm, alpha in self.alphas.items()}

    def save(self, path: Path) -> None:
        parts = {"vectors": self.vectors, "columns": self.columns, "alphas": self.alphas}
        tensors = {f"{part}:{name}": t.contiguous() for part, found in parts.items() for name, t in found.items()}
        save_file(tensors, str(path))

    @classmethod
    def read(cls, path: Path) -> "Smoothing":
        parts: dict[str, dict[str, Tensor]] = {"vectors": {}, "columns": {}, "alphas": {}}
        with safe_open(str(path), framework="pt") as file:
            for key in sorted(file.keys()):
                part, _, name = key.partition(":")
                parts[part][name] = file.get_tensor(key)
        return cls(**parts)


def smoothed_in(work: Path, source: Source) -> Source:
    """The source as calibration has smoothed it, if it did: what there is of statistics in `work` is of that."""
    file = work / SMOOTHING
    return Smoothing.read(file).of_source(source) if file.exists() else source


def find_smoothing(source: Source, statistics: Statistics, wanted: frozenset[str], *, watch: Watch) -> Smoothing:
    """The best share for each norm that feeds one of the `wanted` layers, by the statistics of a text.

    Weights are read some rows at a time. Norms that cannot be smoothed, or lose by it, are left as they are.
    """
    found = Smoothing()
    for feed in feeds_of(source):
        if not wanted.intersection(feed.layers) or not _can_be_read_so(source, feed, statistics):
            continue
        # A phase for each: an allocator's events are kept until their phase ends.
        with watch.phase("smooth"):
            _smooth(source, feed, statistics.moments, found)
    return found


def smoothing_of_all(source: Source, wanted: frozenset[str]) -> Smoothing:
    """Every norm that can be smoothed, by factors of 1: to read with these takes what it takes with those found later.

    No weight is read.
    """
    found = Smoothing()
    for feed in feeds_of(source):
        if wanted.intersection(feed.layers) and _are_stored_alone(source, feed):
            for layer in feed.layers:
                found.columns[layer] = torch.ones(row_shape(source, f"{layer}.weight")[1])
    return found


def feeds_of(source: Source) -> tuple[Feed, ...]:
    """The norms of a model that may be smoothed. No weight is read."""
    with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), values_as_usual():
        model = load(source, dtype=torch.bfloat16)
        ids_WT = torch.ones(1, 8, dtype=torch.int64)
        return find_feeds(model, lambda: model(ids_WT, **arguments_of(model, ids_WT)))


def _can_be_read_so(source: Source, feed: Feed, statistics: Statistics) -> bool:
    return all(layer in statistics.pairs() for layer in feed.layers) and _are_stored_alone(source, feed)


def _are_stored_alone(source: Source, feed: Feed) -> bool:
    names = [f"{feed.norm}.weight", *(f"{layer}.weight" for layer in feed.layers)]
    return all(stored_alone(source, name) for name in names)


def _smooth(source: Source, feed: Feed, moments: Mapping[str, Moments], into: Smoothing) -> None:
    """Choose the share of one norm, and keep what follows from it."""
    squares = moments[feed.layers[0]].inputs
    largest = torch.zeros_like(squares)
    readers = []
    for layer in feed.layers:
        rows, costs = _read(source, layer, moments[layer], largest)
        readers.append(Reader(rows=rows, costs=costs))
    made, alpha = choose(squares, largest, readers)
    del readers
    gain = source.read_parameter(f"{feed.norm}.weight", dtype=torch.float32)
    # Files are written in bf16.
    weight, used = folded(gain, made, offset=feed.offset, dtype=torch.bfloat16)
    into.alphas[feed.norm] = alpha
    into.vectors[f"{feed.norm}.weight"] = weight
    if f"{feed.norm}.bias" in source.parameters:
        bias = source.read_parameter(f"{feed.norm}.bias", dtype=torch.float32)
        into.vectors[f"{feed.norm}.bias"] = bias.div_(used).to(torch.bfloat16)
    for layer in feed.layers:
        into.columns[layer] = used.clone()  # a file holds no tensor twice


def _read(source: Source, layer: str, moments: Moments, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of a layer [n, K] and the costs of errors in them [n]; `largest` [K] is raised to its magnitudes."""
    name = f"{layer}.weight"
    total, width = row_shape(source, name)
    count = min(ROWS, total)
    picked = torch.div(torch.arange(count) * total, count, rounding_mode="floor")
    rows = torch.zeros(count, width, dtype=torch.bfloat16)
    for start, block in rows_of(source, name, dtype=torch.bfloat16):
        torch.maximum(largest, block.abs().amax(0).to(torch.float32), out=largest)
        place = (picked - start).clamp_(0, block.shape[0] - 1)
        inside = ((picked >= start) & (picked < start + block.shape[0])).unsqueeze(1)
        torch.where(inside, block[place], rows, out=rows)
        del block
    assert moments.gradients is not None
    # Each row stands for as many of the layer's.
    return rows, moments.gradients[picked] * (total / count)
