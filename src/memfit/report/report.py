"""The report: what was asked, planned, predicted and measured. A value, shown by page, card and terminal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from memfit.account.account import Account
from memfit.evaluate.quality import Quality
from memfit.evaluate.speed import Speed

VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything known of one fitted model. What was not done is None."""

    model: str
    """What was fitted, as the user named it."""
    budget_nbytes: int | None = None
    plan: Mapping[str, Any] | None = None
    """The plan's JSON."""
    task: Mapping[str, Any] | None = None
    """The task's JSON: what is run within the budget."""
    predicted: Account
    """The fitted model running the task."""
    measured: Account | None = None
    predicted_fit: Account | None = None
    """The fitting itself: load, calibrate, compress, write."""
    measured_fit: Account | None = None
    original: Account | None = None
    """The unfitted model running the task, predicted."""
    quality: Quality | None = None
    speed: Speed | None = None
    speed_original: Speed | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    """Kernel -> modules that run on it."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    algorithm: str | None = None
    """By what integers, masks or factors were made, as `--algorithm` has it."""
    text: Mapping[str, Any] | None = None
    """What it was made and judged on: `name`, `sha256`, tokens of a `window`, `calibration_windows`,
    `evaluation_windows`."""
    rounding: str | None = None
    """What is to be told of how integers were chosen, if not by scales alone."""
    ram: Mapping[str, Any] | None = None
    """Of a fit within a cap: the cap, how it was kept to, and the resident peak of each job, predicted and measured."""
    resumed: bool = False
    """Whether it went on where a stopped run was: `measured_fit` is of what was left to do then."""
    fronts: Mapping[str, Any] = field(default_factory=dict)
    """Technique -> points of bytes at the peak and expected KL, and which other technique is nowhere worse."""
    tried: Mapping[str, float] = field(default_factory=dict)
    """Where plans were made and judged beside each other: technique -> KL of its plan (encoders: 1 - cosine). The least
    was taken."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File of weights -> sha256."""
    created: str | None = None
    """ISO 8601, if it is to be said; left out, the same run gives the same report."""

    @property
    def best(self) -> Account:
        """The measured account, or where nothing was measured the predicted one."""
        return self.measured or self.predicted

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the budget, measured if it was; None without a budget."""
        return None if self.budget_nbytes is None else self.best.peak_nbytes <= self.budget_nbytes

    @property
    def choices(self) -> list[Mapping[str, Any]]:
        """The plan's choices; empty without a plan."""
        return list(self.plan["choices"]) if self.plan is not None else []

    def to_json(self) -> dict[str, Any]:
        """One object for programs: the keys of the predicted account, the plan's, and what came of it."""
        return self.predicted.to_json() | {
            "version": VERSION,
            "model": self.model,
            "task": None if self.task is None else dict(self.task),
            "budget_nbytes": self.budget_nbytes,
            "fits": self.fits,
            "choices": self.choices,
            # Its own accounts would be these once more.
            "plan": None if self.plan is None else {**self.plan, "predicted": None, "predicted_fit": None},
            "measured": _json(self.measured),
            # The account's own key: here it is what the process held, where it was measured.
            "resident_nbytes": self.best.resident_nbytes,
            "predicted_resident_nbytes": self.predicted.resident_nbytes,
            # So is this, of which `kernels` below says something else.
            "predicted_kernels": self.predicted.kernels,
            "fit": {"predicted": _json(self.predicted_fit), "measured": _json(self.measured_fit)},
            "original": _json(self.original),
            "quality": _json(self.quality),
            "speed": _json(self.speed),
            "speed_original": _json(self.speed_original),
            "kernels": dict(self.kernels),
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "algorithm": self.algorithm,
            "text": None if self.text is None else dict(self.text),
            "rounding": self.rounding,
            "fronts": dict(self.fronts),
            "tried": dict(self.tried),
            "ram": None if self.ram is None else dict(self.ram),
            "resumed": self.resumed,
            "files": dict(self.files),
            "created": self.created,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Report":
        """The report that `to_json` gave, as for `memfit report DIR`."""
        own = {"resident_nbytes": "predicted_resident_nbytes", "kernels": "predicted_kernels"}
        predicted = dict(data) | {key: data[name] for key, name in own.items()}
        return cls(
            model=data["model"],
            budget_nbytes=data["budget_nbytes"],
            plan=data["plan"],
            task=data["task"],
            predicted=Account.from_json(predicted),
            measured=_account(data["measured"]),
            predicted_fit=_account(data["fit"]["predicted"]),
            measured_fit=_account(data["fit"]["measured"]),
            original=_account(data["original"]),
            quality=Quality.from_json(data["quality"]) if data["quality"] else None,
            speed=Speed(**data["speed"]) if data["speed"] else None,
            speed_original=Speed(**data["speed_original"]) if data["speed_original"] else None,
            kernels=data["kernels"],
            machine=data["machine"],
            versions=data["versions"],
            algorithm=data.get("algorithm"),
            text=data.get("text"),
            rounding=data.get("rounding"),
            ram=data.get("ram"),
            resumed=data.get("resumed", False),
            fronts=data.get("fronts") or {},
            tried=data.get("tried") or {},
            files=data["files"],
            created=data["created"],
        )


def _json(value: Account | Quality | Speed | None) -> dict[str, Any] | None:
    return None if value is None else value.to_json()


def _account(data: Mapping[str, Any] | None) -> Account | None:
    return None if data is None else Account.from_json(dict(data))
