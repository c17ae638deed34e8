"""What a training run keeps to go on from: weights, optimizer states, counters, randomness."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memfit.errors import BrokenInput
from memfit.format.safetensors import TensorSpec, Writer
from memfit.packed.fake import blocks_to_run
from memfit.source.safetensors import open_checkpoint

from .away import changed, here
from .gradients import trained
from .step import TrainStep
from .tiles import tiles

_COUNTERS = "step.json"


def state_specs(step: TrainStep) -> list[TensorSpec]:
    """What will be written: trained weights, then states, in the model's order."""
    specs = [
        TensorSpec(name=f"weight/{name}", dtype=parameter.dtype, shape=tuple(parameter.shape))
        for name, parameter in trained(step.model)
    ]
    for name in step.mover.states.names():
        for state, (dtype, entries) in step.mover.states.slots(name).items():
            specs.append(TensorSpec(name=f"state/{name}/{state}", dtype=dtype, shape=(entries,)))
    return specs


def save_states(step: TrainStep, directory: Path | None) -> list[TensorSpec]:
    """Write weights and states into `directory`, a tile at a time; None: run all but the writing."""
    specs = state_specs(step)
    with Writer(directory or Path("."), specs, dry=directory is None) as writer:
        for name, parts in _tensors(step):
            writer.write_parts(name, parts)
    if directory is not None:
        scaler = step.scaler
        counters = {"steps": step.steps, "loss_scale": None if scaler is None else [scaler.value, scaler.good]}
        (directory / _COUNTERS).write_text(json.dumps(counters), encoding="utf-8")
    return specs


def _tensors(step: TrainStep) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """(name, its flat tiles on the CPU) of each tensor to be written."""
    for name, parameter in trained(step.model):
        yield f"weight/{name}", _weight(parameter)
    states = step.mover.states
    for name in states.names():
        for state, (_, entries) in states.slots(name).items():
            parts = (states.read(name, state, start, stop).cpu() for start, stop in _tiles(entries))
            yield f"state/{name}/{state}", parts


def _weight(parameter: nn.Parameter) -> Iterator[Tensor]:
    with here((parameter,)):
        flat = parameter.detach().reshape(-1)
        for start, stop in _tiles(flat.numel()):
            yield flat[start:stop].cpu()


def _tiles(entries: int) -> list[tuple[int, int]]:
    return blocks_to_run(tiles(entries, torch.device("cpu")))


def restore_states(step: TrainStep, source: "Path | list[TensorSpec]") -> None:
    """Read weights and states back, a tile at a time; from specs, without a file: all but the reading.

    Raises:
        BrokenInput: the files do not hold what the model and the recipe ask for.
    """
    read, has = _from_files(source) if isinstance(source, Path) else _from_specs(source)
    states = step.mover.states
    with torch.no_grad():
        for name, parameter in trained(step.model):
            with here((parameter,)):
                flat = parameter.detach().view(-1)
                for start, stop in _tiles(flat.numel()):
                    tile = flat[start:stop]
                    back = tile if tile.device.type == "cpu" else torch.empty_like(tile, device="cpu")
                    read(f"weight/{name}", tuple(parameter.shape), start, back)
                    if back is not tile:
                        tile.copy_(back)
                    del tile, back
                changed(parameter)
                del flat
            wanted = step.mover.slots(parameter)
            if not all(has(f"state/{name}/{state}") for state in wanted):
                continue  # a parameter that never had a gradient has no states
            step.mover.make(name, parameter)
            for state, (_, entries) in wanted.items():
                for start, stop in _tiles(entries):
                    target = states.read(name, state, start, stop)
                    back = target.cpu()
                    read(f"state/{name}/{state}", (entries,), start, back)
                    states.write(name, state, start, target if back is target else target.copy_(back))
                    del target, back
    if isinstance(source, Path):
        counters: dict[str, Any] = json.loads((source / _COUNTERS).read_text(encoding="utf-8"))
        step.steps = counters["steps"]
        if step.scaler is not None and counters["loss_scale"] is not None:
            step.scaler.value, step.scaler.good = counters["loss_scale"]


def _from_specs(specs: list[TensorSpec]) -> Any:
    known = {spec.name for spec in specs}
    return (lambda name, shape, start, out: None), known.__contains__


def _from_files(directory: Path) -> Any:
    found = open_checkpoint(directory)
    if found is None:
        raise BrokenInput(f"{directory}: no training state is here (no .safetensors file).")

    def read(name: str, shape: tuple[int, ...], start: int, out: Tensor) -> None:
        info = found.tensors.get(name)
        if info is None:
            raise BrokenInput(f"{directory}: {name} is missing. It was saved from another model or recipe.")
        if tuple(info.shape) != shape or info.dtype != out.dtype:
            raise BrokenInput(
                f"{directory}: {name} is {info.dtype} {list(info.shape)}, {out.dtype} {list(shape)} was expected. "
                "It was saved from another model or recipe."
            )
        found.read_part(name, start, out)

    return read, found.tensors.__contains__
