"""Who looks on while a model trains: a file with a line for each step, a line on the terminal, TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from memfit.errors import UsageError
from memfit.units import format_size

from .loop import Record


class Bar:
    """A line that moves: step, loss, tokens a second, the peak of the last step beside the budget."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            BarColumn(bar_width=12), TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]}  {task.fields[peak]}"),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task: Any = None
        self._most = 0
        self._total: int | None = None
        self._budget: int | None = None

    def begin(self, total: int, budget_nbytes: int | None) -> None:
        """How many steps there are, and what they may take."""
        self._total, self._budget = total, budget_nbytes
        self._task = self.progress.add_task("training", total=total, loss="", speed="", peak="")
        self.progress.start()

    def step(self, record: Record) -> None:
        """Move on."""
        self._most = max(self._most, record.peak_nbytes)
        allowed = "" if self._budget is None else f" of {format_size(self._budget)}"
        self.progress.update(
            self._task, completed=record.step, loss=f"{record.loss:.4f}",
            speed=f"{record.tokens / max(record.seconds, 1e-9):.0f} tok/s",
            peak=f"{format_size(record.peak_nbytes)} (most {format_size(self._most)}){allowed}",
        )  # fmt: skip

    def note(self, step: int, what: str) -> None:
        """Say what was changed."""
        self.progress.console.print(f"step {step}: {what}", style="yellow", markup=False)

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Say how good it is."""
        told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name not in ("step", "score"))
        self.progress.console.print(f"step {step}, held out: {told}", style="dim", markup=False)

    def end(self) -> None:
        """Leave the line as it is."""
        self.progress.stop()


class TensorBoard:
    """Events for TensorBoard: loss, rate, peak, speed of each step; scores."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError("TensorBoard is not installed: pip install tensorboard.") from error
        self.writer: Any = SummaryWriter(str(directory))

    def begin(self, total: int, budget_nbytes: int | None) -> None:
        """The budget, as a line to compare peaks with."""
        self.budget_nbytes = budget_nbytes

    def step(self, record: Record) -> None:
        """The figures of a step."""
        figures = {
            "train/loss": record.loss, "train/learning_rate": record.rate, "memory/peak_nbytes": record.peak_nbytes,
            "train/tokens_per_second": record.tokens / max(record.seconds, 1e-9),
        }  # fmt: skip
        if self.budget_nbytes is not None:
            figures["memory/budget_nbytes"] = self.budget_nbytes
        if record.gradient_norm is not None:
            figures["train/gradient_norm"] = record.gradient_norm
        for name, value in figures.items():
            self.writer.add_scalar(name, value, record.step)

    def note(self, step: int, what: str) -> None:
        """What was changed."""
        self.writer.add_text("changes", what, step)

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Scores on what was held out."""
        for name, value in scores.items():
            if name not in ("step", "score"):
                self.writer.add_scalar(f"held_out/{name}", value, step)

    def end(self) -> None:
        """Write what is left."""
        self.writer.close()


class LogFile:
    """A line of JSON for each step, evaluation and change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = 0

    def __enter__(self) -> "LogFile":
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def cut(self, step: int) -> list[Record]:
        """Leave what was written up to `step`, as what came after it is done again; the records of the steps left."""
        self._file.close()
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A run that was killed may have left half a line.
        known = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        kept = [(line, data) for line, data in known if data["step"] <= step or "note" in data]
        part = self.path.with_suffix(".part")
        part.write_text("".join(line for line, _ in kept), encoding="utf-8")
        os.replace(part, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._last = step
        return [Record(**data) for _, data in kept if "labels" in data]

    def begin(self, total: int, budget_nbytes: int | None) -> None:
        """Nothing: steps are written."""

    def end(self) -> None:
        """Nothing: each line is written at once."""

    def step(self, record: Record) -> None:
        """A step."""
        if record.step <= self._last:
            self.cut(record.step - 1)  # the run went back to a checkpoint
        self._last = record.step
        self._write(vars(record))

    def note(self, step: int, what: str) -> None:
        """What was changed."""
        self._write({"step": step, "note": what})

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Scores on what was held out."""
        self._write(dict(scores) | {"step": step, "evaluation": True})

    def _write(self, data: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(data) + "\n")
        self._file.flush()
