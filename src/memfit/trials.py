"""Plans that are made and judged beside each other before one of them is taken.

A plan's expected loss adds up what each group's choice costs by itself. Where techniques are mixed one choice moves
what another costs: layers make up for some errors of those before them and not for others. So the plan of all
techniques together has a rival, the best of one technique alone, unless it expects to lose far less.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from memfit.account.account import Account
from memfit.answers import kv_prices_of, prices_of, smoothed_of
from memfit.cap import Cap
from memfit.evaluate.quality import Quality
from memfit.format.resume import WorkDirectory
from memfit.plan.plan import Plan
from memfit.planning import ALL_TOGETHER, best_alone
from memfit.source.source import Source
from memfit.steps import (
    BY_TEXT,
    Algorithm,
    choosing_job,
    compression_job,
    joined,
    judging_job,
    rounding_line,
    write_companions,
)
from memfit.study import Study
from memfit.worker import Process, run_job

_CLEAR: Final = 0.5
"""Of a rival's expected loss: what expects less than that is taken at its word."""


def rivals(study: Study, chosen: Plan, answer: dict[str, Any]) -> dict[str, Plan]:
    """By name, a plan of all techniques together, and the best plan of one technique where it is to be tried too.

    Args:
        answer: of the job of calibration, by which `chosen` was planned.
    """
    plans = {ALL_TOGETHER: chosen}
    prices = prices_of(answer)
    if not prices or len(study.allowed.techniques) < 2:
        return plans
    found = best_alone(
        study, chosen.budget_nbytes, prices=prices, kv_prices=kv_prices_of(answer), priced_by=chosen.priced_by
    )
    if found is None:
        return plans
    name, rival = found
    same = (rival.schemes(), rival.kv_bits) == (chosen.schemes(), chosen.kv_bits)
    if same or (chosen.expected_kl or 0.0) < _CLEAR * (rival.expected_kl or 0.0):
        return plans
    return plans | {name: replace(rival, smoothed=smoothed_of(answer))}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A plan, and what the jobs that made it answered."""

    plan: Plan
    jobs: dict[str, dict[str, Any]]
    """By job."""
    directory: Path
    """Of the files, from which the model can be loaded."""
    rounding: str | None
    """What is to be told of how weights were made."""


def make(
    source: Source, chosen: Plan, job: dict[str, Any], by: Algorithm, *, process: Process, cap: Cap | None,
    progress: Callable[[str], None],
) -> Made:  # fmt: skip
    """Make what a plan says: a directory in the work directory, from which the model can be loaded.

    Args:
        job: of calibration.
        cap: that its jobs keep to.
    """
    told = cap.told if cap is not None else lambda _: {}
    jobs: dict[str, dict[str, Any]] = {}
    integers, rounding = None, None
    if by in BY_TEXT:
        progress("choosing what is stored, block by block")
        choosing = choosing_job(chosen, job, algorithm=by) | told("choose")
        jobs["choose"] = found = run_job(choosing, process=process)
        integers, rounding = choosing["integers"], rounding_line(chosen, found, by)
    progress("compressing")
    compressing = compression_job(chosen, job, integers=integers, algorithm=by) | told("compress")
    jobs["compress"] = run_job(compressing, process=process)
    directory = Path(compressing["output"])
    write_companions(source, chosen, directory)
    return Made(plan=chosen, jobs=jobs, directory=directory, rounding=rounding)


def judge(
    made: Mapping[str, Made], job: dict[str, Any], work: WorkDirectory, *, progress: Callable[[str], None]
) -> dict[str, float]:
    """What each loses on the text, by name; nothing of a single one, which is judged when it is measured."""
    if len(made) < 2:
        return {}
    progress("judging one plan beside the other")

    def lost(one: Made) -> float:
        asked = judging_job(one.directory, one.plan, job)
        found = work.once(f"judged-{one.directory.name}", lambda: run_job(asked))
        return Quality.from_json(found["quality"]).lost

    return {name: lost(one) for name, one in made.items()}


def account_of_all(jobs: Mapping[str, dict[str, Any]], made: Iterable[Made]) -> Account:
    """One account of jobs, and of those that made each plan."""
    answers = [*jobs.values(), *(done for one in made for done in one.jobs.values())]
    return joined(*(Account.from_json(done["account"]) for done in answers))


__all__ = ["Made", "account_of_all", "judge", "make", "rivals"]
