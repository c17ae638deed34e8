"""Checkpoints of a run: each appears whole or not at all; the last and the best are kept.

`DIRECTORY/step-00000120/` holds the weights that are trained, the optimizer's states and `place.json`: the step, the
place in the data, the schedule, the best score so far. Randomness is a function of the seed and the step, so those two
are its state.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from memfit.errors import BrokenInput, MemfitError, UsageError
from memfit.format.directory import OutputDirectory
from memfit.technique.checkpoint import is_out_of_memory
from memfit.units import format_size

from .save import restore_states, save_states, state_specs
from .step import TrainStep

_PLACE: Final = "place.json"
_NAME: Final = "step-"


class SaveFailed(MemfitError):
    """A checkpoint could not be written; the one before is as it was."""


class Checkpoints:
    """The checkpoints in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in order."""
        if not self.directory.is_dir():
            return []
        names = [path.name for path in self.directory.iterdir() if (path / _PLACE).is_file()]
        return sorted(int(name.removeprefix(_NAME)) for name in names if name.startswith(_NAME))

    def at(self, step: int) -> Path:
        """The directory of one."""
        return self.directory / f"{_NAME}{step:08d}"

    def place(self, step: int) -> dict[str, Any]:
        """What `save` was given.

        Raises:
            BrokenInput: it cannot be read.
        """
        file = self.at(step) / _PLACE
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BrokenInput(
                f"{file}: cannot be read ({error}). Remove the directory to use an earlier one."
            ) from error
        return found

    def save(self, step: TrainStep, place: Mapping[str, Any], *, keep: set[int]) -> None:
        """Write a checkpoint of `place["step"]`, then remove all others but those to keep.

        Raises:
            SaveFailed: the disk is full, cannot be written, or memory ran out; what was there is kept.
        """
        number = int(place["step"])
        if self.at(number).exists():
            shutil.rmtree(self.at(number))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._require_space(step)
            with OutputDirectory(self.at(number)) as out:
                save_states(step, out.path)
                out.write_json(_PLACE, dict(place))
        except (OSError, RuntimeError, MemoryError, MemfitError) as error:
            if isinstance(error, RuntimeError | MemoryError) and not is_out_of_memory(error):
                raise
            kept = self.steps()
            last = f"The checkpoint of step {kept[-1]} is kept." if kept else "There is no earlier checkpoint."
            raise SaveFailed(f"step {number} could not be saved: {str(error).rstrip('. ')}. {last}") from error
        for other in self.steps():
            if other != number and other not in keep:
                shutil.rmtree(self.at(other))

    def restore(self, step: TrainStep, number: int) -> dict[str, Any]:
        """Put weights and states back as they were; returns the place."""
        place = self.place(number)
        restore_states(step, self.at(number))
        return place

    def _require_space(self, step: TrainStep) -> None:
        needed = sum(spec.nbytes for spec in state_specs(step))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UsageError(
                f"{self.directory}: {format_size(needed)} needed, {format_size(free)} free. Free some space."
            )
