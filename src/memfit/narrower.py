"""Narrowing as a step of fitting: the narrower model before it is found, its job, and what that takes.

How many heads, channels and blocks stay says what the narrower model will take; so it is accounted for, and refused
where it does not fit, before a text has said which. From then on it is a source as any other.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from memfit.account.account import Account
from memfit.account.settle import settle
from memfit.cap import Cap, first_that_keeps
from memfit.errors import BrokenInput, UsageError
from memfit.format.resume import WorkDirectory
from memfit.plan.plan import Plan
from memfit.source.cuts import counts_of
from memfit.source.narrowed import narrowed
from memfit.source.source import Source
from memfit.steps import fake_ids, on_fakes, windows_of
from memfit.technique.narrow import Narrow
from memfit.technique.narrowing import first_kept, kept_in, narrow_into, narrowed_in
from memfit.text import Text
from memfit.worker import run_job

_WAYS: Final = ((4, False), (4, True), (1, True))
"""Windows at once, and whether what blocks give to each other waits in files: from the fastest on."""


def narrow_as_asked(narrow: Narrow | None, given: Plan | None) -> Narrow | None:
    """How a model is to be narrowed: as it is asked for, or as a given plan says.

    Raises:
        UsageError: both say something.
        BrokenInput: the plan's `narrowed` is none.
    """
    if given is None:
        return narrow
    if narrow is not None:
        raise UsageError("how much of the model stays is said beside a plan, which has its own. Leave it out.")
    try:
        return None if given.narrowed is None else Narrow.from_json(given.narrowed)
    except UsageError as error:
        raise BrokenInput(f"the plan's narrowed: {error}") from error


def announced(source: Source, narrow: Narrow | None) -> Source:
    """The narrower model, of the size that it will have; which of its parts stay is still to be found.

    Raises:
        UsageError: the model cannot be narrowed so, or all of it would stay.
    """
    if narrow is None:
        return source
    if narrow.counts(source.config) == counts_of(source.config):
        asked = ", ".join(f"--{what} {size}" for what, size in narrow.sizes.items())
        raise UsageError(f"{asked}: to the nearest number that works, all that there is stays. Ask for fewer.")
    return narrowed(source, first_kept(source, narrow))


def require_text(narrow: Narrow | None, source: Source, texts: Text | None) -> None:
    """Nothing, if what stays can be found.

    Raises:
        UsageError: there is no text to find it by.
    """
    if narrow is not None and texts is None and source.checkpoint is not None:
        raise UsageError(
            "what is missed least of a model is found on a text, and there is none. Give one (--text FILE), such as "
            "the model is used on."
        )


def narrow_first(
    work: Path | WorkDirectory, source: Source, narrow: Narrow, job: dict[str, Any], cap: Cap | None = None
) -> tuple[Source, Narrow, Account, dict[str, Any]]:
    """The narrower model: the source, what came of the settings, and the account that was predicted and what was seen
    of the job that found it.

    Args:
        work: where jobs leave things for each other; of a `WorkDirectory` a job that was done before is not done again.
        job: of calibration: its model, work, threads, and windows.

    Raises:
        DoesNotFit: no way to find it keeps to the cap.
    """
    told = {key: job[key] for key in ("model", "work", "threads")} | {"do": "narrow", "narrow": narrow.to_json()}
    batch, spill = _WAYS[0]
    if cap is None:
        predicted = predict_narrowing(source, narrow, job, batch=batch, spill=spill)
    else:
        ways = ((predict_narrowing(source, narrow, job, batch=b, spill=s), (b, s)) for b, s in _WAYS)
        predicted, (batch, spill) = first_that_keeps(cap, "narrow", ways)
        cap.predicted["narrow"] = predicted
        told |= {"ram_nbytes": cap.nbytes}
    told |= {"batch": batch, "spill": spill}
    found = work.once("narrowing", lambda: run_job(told)) if isinstance(work, WorkDirectory) else run_job(told)
    folder = Path(job["work"])
    kept = kept_in(folder)
    assert kept is not None, "the job leaves it"
    return narrowed_in(folder, source), narrow.found(kept, source.config), predicted, found


def predict_narrowing(source: Source, narrow: Narrow, job: dict[str, Any], *, batch: int, spill: bool) -> Account:
    """The account of finding what stays and correcting it: the same functions, on fake tensors."""
    windows = windows_of(job)
    assert windows is not None, "nothing is narrowed without a text"
    with on_fakes() as follow:
        with follow.phase("narrow"):
            ids_WT = fake_ids(windows)
        assert isinstance(ids_WT, torch.Tensor)
        narrow_into(Path(job["work"]), source, ids_WT, narrow, watch=follow, batch=batch, spill=spill)
    return settle(follow.ledger)


def with_settings(plan: Plan, narrow: Narrow | None) -> Plan:
    """The plan that says how much of the model stays."""
    return plan if narrow is None else replace(plan, narrowed=narrow.to_json())
