"""The teacher of a training run: whether it suits the student, where it is, and what it is asked beforehand."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from memfit.account.account import Account
from memfit.account.dry_run import dry_run
from memfit.data.batches import Batches, Kind, vocabulary_of
from memfit.errors import DoesNotFit, UsageError
from memfit.models import load_model
from memfit.source.check import check
from memfit.source.source import Source, open_source
from memfit.technique.distil import Distil
from memfit.train.classifier import is_classifier, kind_of
from memfit.train.distil import top_for
from memfit.train.distil_store import Answered, Asking, Kept, Rows
from memfit.train.plan import TrainPlan
from memfit.train.task import Train
from memfit.train.work import products_per_second
from memfit.units import format_size
from memfit.worker import run_job

_KEEPS: Final = ("causal", "classifier")
"""Kinds of models whose answers can wait: what they are asked is the same each time a row is learned from."""
_AT_ONCE: Final = (16, 8, 4, 2, 1)
"""Rows that a teacher is asked of together, the most that the budget allows."""
_PROBE: Final = "The quick brown fox, 1234.5 times: naïve — “déjà vu”\n\tx += 1; // ok?"


@dataclass(frozen=True, kw_only=True)
class Student:
    """What a teacher has to suit."""

    name: str
    kind: Kind
    tokenizer: Any
    vocabulary: int
    classes: int | None = None
    source: Source | None = None


def check_teacher(distil: Distil, student: Student, text: str) -> None:
    """Refuse a teacher that does not suit the student.

    Args:
        text: some of what will be learned from: both must read it alike.

    Raises:
        UsageError: they are of other kinds, vocabularies, tokenizers or classes, named both.
        BrokenInput: the teacher is unsafe or broken.
    """
    teacher = open_source(distil.teacher)
    check(teacher)
    if teacher.checkpoint is None:
        raise UsageError(f"{teacher.name}: has a config and no weights; a teacher needs them.")
    if (kind := kind_of(teacher)) != student.kind:
        raise UsageError(
            f"the teacher {teacher.name} is a {_CALLED[kind]}, and the student {student.name} is to be a "
            f"{_CALLED[student.kind]}. Give a teacher of the student's kind."
        )
    vocabulary = int(teacher.config.get_text_config().vocab_size)
    if kind == "classifier":
        if not is_classifier(teacher):
            raise UsageError(f"the teacher {teacher.name} has no head for classes. Give a classifier.")
        if teacher.config.num_labels != student.classes:
            raise UsageError(
                f"the teacher {teacher.name} has {teacher.config.num_labels} classes, and the student {student.name} "
                f"{student.classes}. Give a teacher of the same classes."
            )
    elif vocabulary != student.vocabulary:
        raise UsageError(
            f"the teacher {teacher.name} has a vocabulary of {vocabulary} entries, and the student {student.name} one "
            f"of {student.vocabulary}. Give a teacher of the same tokenizer and vocabulary."
        )
    _check_tokenizers(teacher, vocabulary, student, text)
    if kind != "classifier":
        top_for(distil, vocabulary)
    if distil.place == "disk" and kind not in _KEEPS:
        raise UsageError(
            f"the answers of a {_CALLED[kind]} cannot wait on the disk: what it is asked of a row differs each time. "
            "Leave the teacher in memory."
        )


_CALLED: Final = {
    "causal": "language model that reads forwards", "masked": "masked language model",
    "seq2seq": "encoder with a decoder", "classifier": "classifier",
}  # fmt: skip


def _check_tokenizers(teacher: Source, vocabulary: int, student: Student, text: str) -> None:
    theirs, ours = teacher.tokenizer(), student.tokenizer
    known = [tokenizer.get_vocab() for tokenizer in (theirs, ours) if hasattr(tokenizer, "get_vocab")]
    if len(known) == 2 and known[0] != known[1]:
        off = sorted(token for token in {**known[0], **known[1]} if known[0].get(token) != known[1].get(token))
        raise UsageError(
            f"the tokenizers of the teacher {teacher.name} and the student {student.name} differ in {len(off)} tokens, "
            f"{off[0]!r} the first. Give a teacher of the student's tokenizer."
        )
    encodes = [vocabulary_of(tokenizer, vocabulary).encode for tokenizer in (theirs, ours)]
    for sample in (text[:2000], _PROBE):
        if list(encodes[0](sample)) != list(encodes[1](sample)):
            raise UsageError(
                f"the tokenizers of the teacher {teacher.name} and the student {student.name} cut {sample[:40]!r} "
                "otherwise. Give a teacher of the student's tokenizer."
            )


# -- where it is ---------------------------------------------------------------------------------------


def plan_with_teacher(
    plan_for: Callable[[Train], TrainPlan], task: Train, kind: Kind, *, device: str = "cpu"
) -> TrainPlan:
    """The plan of a task that may have a teacher: beside the student, or, where that would change more of what is
    learned or not fit, asked beforehand.

    Raises:
        DoesNotFit: neither fits; names what is needed at the least.
    """
    distil = task.distil
    if distil is None or not distil.asks:
        return plan_for(task)

    def at(place: Any) -> TrainPlan:
        plan = plan_for(replace(task, distil=replace(distil, place=place)))
        return _slower(plan) if place == "memory" else _told(plan, kind, device)

    if distil.place != "auto":
        return at(distil.place)
    beside: TrainPlan | None = None
    apart: TrainPlan | None = None
    failed: list[DoesNotFit] = []
    try:
        beside = at("memory")
    except DoesNotFit as error:
        failed.append(error)
    if (beside is None or beside.changes) and kind in _KEEPS and not distil.match:
        try:
            apart = at("disk")
        except DoesNotFit as error:
            failed.append(error)
    # Of answers kept the one change is what they are; what more is changed decides.
    if apart is not None and (beside is None or len(apart.changes) - 1 < len(beside.changes)):
        return apart
    if beside is not None:
        return beside
    raise min(failed, key=lambda error: error.smallest_nbytes)


def _slower(plan: TrainPlan) -> TrainPlan:
    """A plan whose teacher is asked in each step, with the time of its forward pass in it."""
    task = plan.task
    assert task.distil is not None
    weights = sum(parameter.numel() for parameter in open_source(task.distil.teacher).build().parameters())
    seconds = 2.0 * weights * task.batch * task.sequence / products_per_second(torch.bfloat16)
    return replace(plan, seconds=plan.seconds + seconds)


def _told(plan: TrainPlan, kind: Kind, device: str) -> TrainPlan:
    """A plan whose teacher is asked beforehand: what that changes; and that the asking fits."""
    distil = plan.task.distil
    assert distil is not None
    asking_within(distil, kind, plan.task.sequence, plan.budget_nbytes, device=device)
    if kind == "classifier":
        return plan
    kept = distil.top if distil.top is not None else "64"
    change = f"of each token's answer the teacher's {kept} likeliest are told apart, the others are one"
    return replace(plan, changes=(change, *plan.changes))


def asking_within(
    distil: Distil, kind: Kind, sequence: int, budget_nbytes: int, *, masked: bool = True, device: str = "cpu"
) -> tuple[Asking, Account]:
    """The pass that asks the teacher, of as many rows at once as fit, and its account.

    Args:
        masked: whether rows are of different lengths, which takes more.

    Raises:
        DoesNotFit: the teacher alone does not fit.
    """
    source = open_source(distil.teacher)
    entries = int(source.config.num_labels if kind == "classifier" else source.config.get_text_config().vocab_size)
    top = entries if kind == "classifier" else top_for(distil, entries)
    account: Account | None = None
    for rows in _AT_ONCE:
        asking = Asking(rows=rows, sequence=sequence, top=top, temperature=distil.temperature, masked=masked)
        account = dry_run(lambda: load_model(source), asking, device=device)
        if account.peak_nbytes <= budget_nbytes:
            return asking, account
    assert account is not None
    raise DoesNotFit(
        f"{format_size(budget_nbytes)} allowed, {format_size(account.peak_nbytes)} needed at the least to ask the "
        f"teacher {source.name}. The smallest budget that works is {account.peak_nbytes} bytes. A teacher that "
        "memfit has fitted takes less.",
        smallest_nbytes=account.peak_nbytes,
    )


def ask_beforehand(
    plan: TrainPlan,
    batches: Batches,
    directory: Path,
    *,
    enforce: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Answered:
    """The batches with the teacher's answers in them, asked by a job of its own unless they are there.

    Args:
        directory: where the answers lie from then on, 12 bytes for each entry and token and 4 for each token.

    Raises:
        Interrupted: the disk is full; what was answered is kept.
        OverBudget: with `enforce`, the job needed more than the budget.
    """
    distil = plan.task.distil
    assert distil is not None
    rows = Rows.of(batches)
    asking, account = asking_within(
        distil, rows.kind, plan.task.sequence, plan.budget_nbytes, masked=not rows.packed, device=plan.device
    )
    about = _about(distil, asking, rows)
    if not directory.exists():
        progress(f"asking the teacher of {len(rows)} rows, {asking.rows} at once")
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = directory.with_name("rows.npz")
        rows.save(file)
        job = {
            "do": "teach", "teacher": distil.teacher, "rows": str(file), "directory": str(directory), "about": about,
            "at_once": asking.rows, "top": asking.top, "temperature": asking.temperature, "device": plan.device,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        run_job(job, enforce_nbytes=plan.budget_nbytes if enforce else None, kernels=account.kernels)
        file.unlink()
    return Answered(batches, Kept(directory, rows, about=about, top=asking.top))


def _about(distil: Distil, asking: Asking, rows: Rows) -> dict[str, Any]:
    """All that the answers depend on."""
    source = open_source(distil.teacher)
    files = sorted({info.file for info in source.tensors.values()})
    of: Mapping[str, Any] = {
        "teacher": source.name, "config": source.config.to_json_string(use_diff=True),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "rows": rows.fingerprint, "at_once": asking.rows, "top": asking.top, "temperature": asking.temperature,
    }  # fmt: skip
    found: dict[str, Any] = json.loads(json.dumps(of))
    return found
