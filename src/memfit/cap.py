"""Fitting within a cap on resident memory (`--ram`): what each job will hold, and the fastest way that keeps to it.

A job's process is resident with what it holds when it is idle, which a process like it is asked for; with code that
oneDNN makes for each shape of a product; and with what the job's dry run tells, heap included.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from memfit.account.account import Account
from memfit.account.malloc import FAST, LEVELS
from memfit.account.outside import with_outside
from memfit.compensate import Thrift
from memfit.errors import DoesNotFit
from memfit.format.resume import WorkDirectory
from memfit.plan.plan import Plan
from memfit.planning import plainest_plan
from memfit.source.source import Source
from memfit.steps import (
    BY_TEXT,
    Algorithm,
    asked_plainly,
    layers_to_smooth,
    predict_calibrating,
    predict_choosing,
    predict_compressing,
    windows_of,
)
from memfit.study import Study
from memfit.technique.smoothing import smoothed_in, smoothing_of_all
from memfit.units import format_size
from memfit.worker import Process, run_job

_SHARE: Final = 0.03
_SHARE_WAITING: Final = 0.5
"""Likewise where larger blocks wait in the heap: between those in use lie holes that no account tells of. Gemma 3 270M
by GPTQ on 32 x 512 tokens: 30 % of it."""
_NBYTES: Final = 24 << 20
"""What a job may take beyond its prediction: a share of that, and holes in the heap."""
_SPREAD: Final = 2 << 20
"""What an idle process holds differs by less from one to the next: a cap that is named is to work another time."""
_PAGES_NBYTES: Final = 4 << 20
_BATCHES: Final = (4, 2, 1)
"""Windows that calibration runs at once."""
_FEW_ROWS: Final = 256
_DOES: Final = {
    "narrow": "find what is missed least", "calibrate": "calibrate on the text", "choose": "choose integers",
    "compress": "write the model",
}  # fmt: skip
"""What each job does, for people."""
_ANY: Final = 1 << 62
"""A budget that everything is within."""


@dataclass(kw_only=True)
class Cap:
    """A cap, what an idle process holds of it, and the jobs that were found to keep to it."""

    nbytes: int
    idle_nbytes: int
    kernel_nbytes: int
    """Code of each shape of a product, resident."""
    untouched_nbytes: int = 0
    """And what is reserved for it beyond that, which the system counts and nobody touches."""
    asking_nbytes: int | None = None
    """The smallest cap under which the original is asked; None: not found out."""
    predicted: dict[str, Account] = field(default_factory=dict)
    """By job, with the resident peak."""
    measured: dict[str, dict[str, int]] = field(default_factory=dict)
    """By job: `peak` and `file` of the process, resident bytes."""
    ways: dict[str, Any] = field(default_factory=dict)
    """By job, how it keeps to the cap: a `Thrift`, or windows at once."""

    def needed_nbytes(self, account: Account, way: object = None) -> int:
        """The smallest cap under which a job with this prediction is run."""
        own = self.resident(account).resident_nbytes or 0
        waits = isinstance(way, Thrift) and way.waiting_nbytes > LEVELS[0]
        return own + int((_SHARE_WAITING if waits else _SHARE) * (own - self.idle_nbytes)) + _NBYTES

    def resident(self, account: Account) -> Account:
        """The prediction with the resident peak of its process."""
        outside = self.idle_nbytes + self.kernel_nbytes * account.kernels + account.heap_nbytes
        return with_outside(account, outside)

    def told(self, name: str) -> dict[str, Any]:
        """What a job is told, to keep to the cap and to be held to it."""
        way = self.ways.get(name)
        untouched = self.untouched_nbytes * self.predicted[name].kernels
        how: dict[str, Any] = {"ram_nbytes": self.nbytes, "untouched_nbytes": untouched, "waiting_nbytes": LEVELS[0]}
        if isinstance(way, Thrift):
            return how | {"thrift": way.to_json(), "waiting_nbytes": way.waiting_nbytes}
        return how | ({} if way is None else {"batch": way, "spill": True})

    def kept(self) -> dict[str, Any]:
        """All that was found, as JSON for `of_kept`."""
        ways = {name: way.to_json() if isinstance(way, Thrift) else way for name, way in self.ways.items()}
        predicted = {name: account.to_json() for name, account in self.predicted.items()}
        return {
            "nbytes": self.nbytes, "idle_nbytes": self.idle_nbytes, "kernel_nbytes": self.kernel_nbytes,
            "untouched_nbytes": self.untouched_nbytes, "asking_nbytes": self.asking_nbytes, "predicted": predicted,
            "ways": ways,
        }  # fmt: skip

    @classmethod
    def of_kept(cls, data: dict[str, Any]) -> "Cap":
        ways = {name: Thrift(**way) if isinstance(way, dict) else way for name, way in data["ways"].items()}
        predicted = {name: Account.from_json(account) for name, account in data["predicted"].items()}
        return cls(**data | {"predicted": predicted, "ways": ways})

    def to_json(self) -> dict[str, Any]:
        """For the report: by job, predicted and measured resident peak; of it pages of files."""
        jobs = {
            name: {
                "predicted_nbytes": account.resident_nbytes,
                "measured_nbytes": self.measured.get(name, {}).get("peak"),
                "file_backed_nbytes": self.measured.get(name, {}).get("file"),
                **({"windows": self.ways[name]} if isinstance(self.ways.get(name), int) else {}),
            }
            for name, account in self.predicted.items()
        }
        return {
            "cap_nbytes": self.nbytes,
            "idle_nbytes": self.idle_nbytes,
            "asking_nbytes": self.asking_nbytes,
            "thrift": self.ways["choose"].to_json() if "choose" in self.ways else None,
            "jobs": jobs,
        }


def cap_of(nbytes: int, job: Mapping[str, Any], process: Process) -> Cap:
    """The cap for jobs like this one: asks the process that the first of them is to be done in, what it holds before it
    begins."""
    found = run_job({"do": "idle"} | {key: job[key] for key in ("model", "threads")}, process=process)
    # Rounded up: from one process to the next it differs by some pages, and what is told to be enough must stay so.
    idle_nbytes = -(-found["now"] // _PAGES_NBYTES) * _PAGES_NBYTES
    each = {key: found[key] for key in ("kernel_nbytes", "untouched_nbytes")}
    return Cap(nbytes=nbytes, idle_nbytes=idle_nbytes, **each)


def cap_of_jobs(
    work: WorkDirectory, nbytes: int, study: Study, given: Plan | None, job: dict[str, Any], original: Account,
    algorithm: Algorithm, *, uniform: bool, process: Process,
) -> tuple[Cap, dict[str, Any]]:  # fmt: skip
    """The cap, and the job of calibration that keeps to it, asked for no more than `asked_plainly` asks for.

    The plan is not chosen yet, and what its jobs take hardly depends on it: what could not be done by any is refused
    here, before hours go into calibration. What was found is kept for a run that is stopped: other ways to the same
    integers differ by the rounding of sums.

    Raises:
        DoesNotFit: see `keep`.
    """

    def find() -> dict[str, Any]:
        source, plan = study.source, given or plainest_plan(study, _ANY)
        cap = cap_of(nbytes, job, process)
        # The original answers with all its weights in memory, or not at all.
        cap.asking_nbytes = cap.needed_nbytes(original)
        asks = job["reference"] and cap.asking_nbytes <= cap.nbytes
        asked = asked_plainly(job | {"reference": asks}, study, plan, algorithm, uniform=uniform)
        calibrates = asked["do"] == "calibrate"
        smoothed = layers_to_smooth(job, study)
        read = smoothing_of_all(source, smoothed).of_source(source) if smoothed else source
        keep(cap, source, plan, asked, algorithm, calibrates=calibrates, read=read)
        asked |= cap.told("calibrate") if calibrates else {}
        return {"cap": cap.kept(), "changes": {key: asked[key] for key in asked if job.get(key) != asked[key]}}

    found = work.once("cap", lambda: process.aside(find))
    return Cap.of_kept(found["cap"]), job | found["changes"]


def keep_as_planned(
    work: WorkDirectory, cap: Cap, source: Source, plan: Plan, job: dict[str, Any], algorithm: Algorithm, *,
    process: Process,
) -> Account:  # fmt: skip
    """Find how the jobs of the plan that was chosen keep to the cap; one account of them all.

    Raises:
        DoesNotFit: see `keep`.
    """

    def find() -> dict[str, Any]:
        if job["wanted"]:  # else the plan is the one that was given, and nothing has been found out since
            keep(cap, source, plan, job, algorithm, calibrates=False, read=smoothed_in(Path(job["work"]), source))
        return cap.kept()

    found = Cap.of_kept(work.once("cap-as-planned", lambda: process.aside(find)))
    cap.predicted, cap.ways = found.predicted, found.ways
    made = list(cap.predicted.values())
    return replace(
        made[0],
        phases=tuple(phase for account in made for phase in account.phases),
        entries=tuple(entry for account in made for entry in account.entries if entry.kind != "outside"),
        resident_nbytes=max(account.resident_nbytes or 0 for account in made),
        outside_nbytes=None,
    )


def keep(
    cap: Cap, source: Source, plan: Plan, job: dict[str, Any], algorithm: Algorithm, *, calibrates: bool,
    read: Source | None = None,
) -> None:  # fmt: skip
    """Find how each job keeps to the cap, the fastest way first.

    Args:
        calibrates: whether there is a calibration still to be run.
        read: what integers are chosen of, the source as it was smoothed; default: `source`.

    Raises:
        DoesNotFit: one of them cannot; told is the smallest cap for all.
    """
    refusals: list[DoesNotFit] = []
    read = read or source
    jobs: dict[str, Callable[[], Iterator[tuple[Account, Any]]]] = {}
    if calibrates:
        jobs["calibrate"] = lambda: _calibrating(source, job)
    if algorithm in BY_TEXT:
        jobs["choose"] = lambda: _choosing(read, plan, job, algorithm)
    jobs["compress"] = lambda: iter([(_compressing(cap, read, plan, job, algorithm), None)])
    for name, ways in jobs.items():
        try:
            cap.predicted[name], cap.ways[name] = first_that_keeps(cap, name, ways())
        except DoesNotFit as refusal:
            refusals.append(refusal)
    if refusals:
        raise max(refusals, key=lambda refusal: refusal.smallest_nbytes)


def first_that_keeps(cap: Cap, job: str, ways: Iterator[tuple[Account, Any]]) -> tuple[Account, Any]:
    """The first way to do a job that keeps to the cap, and its account with the resident peak.

    Raises:
        DoesNotFit: none does.
    """
    least: Account | None = None
    for account, way in ways:
        if cap.needed_nbytes(account, way) <= cap.nbytes:
            return cap.resident(account), way
        if least is None or cap.needed_nbytes(account) < cap.needed_nbytes(least):
            least = account
    assert least is not None, "there is always a way to try"
    needed = cap.needed_nbytes(least) + _SPREAD
    text_binds = job != "compress" and cap.nbytes >= cap.idle_nbytes + _NBYTES
    less = " Shorter or fewer windows (--window, --windows) take less." if text_binds else ""
    raise DoesNotFit(
        f"{format_size(cap.nbytes)} allowed (--ram), {format_size(needed)} needed at the least to {_DOES[job]} "
        f"({format_size(cap.idle_nbytes)} of it Python and its libraries, {format_size(least.peak_nbytes)} tensors, "
        f"{format_size(needed - cap.idle_nbytes - least.peak_nbytes)} for what no prediction tells). The smallest cap "
        f"that works is {needed} bytes (--ram {needed}).{less}",
        smallest_nbytes=needed,
        of_cap=True,
    )


def _compressing(cap: Cap, source: Source, plan: Plan, job: dict[str, Any], algorithm: Algorithm) -> Account:
    """It goes on in the process that has chosen integers, which keeps the code of its products."""
    account = predict_compressing(source, plan, job, algorithm=algorithm)
    chosen = cap.predicted.get("choose")
    return account if chosen is None else replace(account, kernels=account.kernels + chosen.kernels)


def _calibrating(source: Source, job: dict[str, Any]) -> Iterator[tuple[Account, Any]]:
    for batch in _BATCHES:
        yield predict_calibrating(source, job | {"batch": batch, "spill": True}), batch


def _choosing(
    source: Source, plan: Plan, job: dict[str, Any], algorithm: Algorithm
) -> Iterator[tuple[Account, Any]]:
    windows = windows_of(job)
    assert windows is not None, "GPTQ has a text"
    for thrift in _ways(windows.shape[0]):
        yield predict_choosing(source, plan, windows.shape, thrift, algorithm=algorithm), thrift


def _ways(windows: int) -> Iterator[Thrift]:
    """From the fastest to the one that holds least."""
    some = min(windows, 4)
    yield Thrift(batch=some, waiting_nbytes=FAST)
    yield Thrift(batch=some, waiting_nbytes=LEVELS[1])
    yield Thrift(batch=some)
    yield Thrift(batch=some, wait=False, waiting_nbytes=LEVELS[1])
    yield Thrift(batch=some, wait=False, spill=True, waiting_nbytes=LEVELS[1])
    yield Thrift(batch=some, wait=False)
    yield Thrift(batch=some, wait=False, spill=True)
    yield Thrift(batch=some, wait=False, spill=True, hold=False)
    yield Thrift(batch=1, wait=False, spill=True, hold=False, rows=_FEW_ROWS)
