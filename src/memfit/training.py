"""The training job, told in order: data, model, plan, the loop, the trained model, the report.

What a run keeps while it goes on is in `OUT.training`: checkpoints, a line of log for each step, the plan. OUT itself
appears when the run is done.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from memfit.account.dry_run import dry_run
from memfit.account.meter import reset_resident_peak, resident_nbytes
from memfit.account.watch import Unwatched
from memfit.data.batches import Batches, Kind, batches_of
from memfit.data.read import RawData, read_data, split_rows, with_classes_of
from memfit.distilling import Student, ask_beforehand, check_teacher, plan_with_teacher
from memfit.errors import UsageError
from memfit.format.directory import OutputDirectory
from memfit.limits import limited, runtime_nbytes_of
from memfit.models import load_to_train, require_device
from memfit.report.machine import describe_machine, describe_versions
from memfit.report.training import TrainReport, render_training_page
from memfit.source.check import check_original
from memfit.source.live import fake_copy
from memfit.source.source import Source, open_source
from memfit.technique.distil import Distil
from memfit.train.away import sending
from memfit.train.certify import certify
from memfit.train.checkpoints import Checkpoints
from memfit.train.classifier import is_classifier, kind_of, load_classifier
from memfit.train.distil import load_teaching
from memfit.train.guards import memory_for, stop_on_signals, written_in
from memfit.train.judge import classification_of, judge_on
from memfit.train.loop import Data, Loop, Observer, Settings
from memfit.train.output import write_model
from memfit.train.plan import TrainPlan, read_train_plan
from memfit.train.recipe import Recipe
from memfit.train.schedule import Kind as ScheduleKind
from memfit.train.schedule import Schedule
from memfit.train.step import TrainStep
from memfit.train.task import Train, make_trainable, packing
from memfit.train.watching import LogFile
from memfit.train.work import Make
from memfit.train_planning import plain_recipe, plan_training, stored_dtype
from memfit.units import parse_size

ASKED: Final = "asked.json"
"""In a run's directory: what was asked for in the beginning, that its plan does not say."""
_HELD_OUT: Final = 0.05
_EVALUATIONS: Final = 10
"""Of a run, unless it is said how many."""
_SELDOM: Final = 20
"""Steps between evaluations, at the least, unless it is said."""
_MOST_EVALUATED: Final = 64
"""Batches of an evaluation on the way."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long and how a run goes, what is learned aside (see `Hyper` for that)."""

    epochs: float = 1.0
    steps: int | None = None
    """In place of epochs."""
    schedule: ScheduleKind = "cosine"
    warmup: int | None = None
    """Steps; None: a twentieth of the run."""
    seed: int = 0
    evaluation: Any = None
    """Data to evaluate on; None: a twentieth of the data is held out."""
    evaluate_every: int | None = None
    """Steps; None: ten times in a run; 0: at the end alone."""
    save_every: int | None = None
    """Steps; None: whenever it is evaluated; 0: at the end alone."""
    text_column: str | None = None
    label_column: str | None = None
    certify: int = 0
    """Steps of plain training that are run beside planned ones first, to compare; the plain ones are not bounded."""

    def __post_init__(self) -> None:
        if self.steps is None and not self.epochs > 0:
            raise ValueError(f"epochs must be more than 0, got {self.epochs:g}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


def train(
    model: "str | Path | nn.Module",
    data: Any,
    budget: str | int = "100%",
    out: str | Path | None = None,
    *,
    task: Train | None = None,
    distil: Distil | None = None,
    options: Options | None = None,
    given: TrainPlan | str | Path | None = None,
    full: bool = True,
    adapters: bool = True,
    slowdown: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    enforce: bool = False,
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] | None = None,
    tokenizer: Any = None,
    device: str = "cpu",
    observers: tuple[Observer, ...] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> TrainReport:
    """Train a model on data within a budget, and write it to `out`.

    Args:
        model: a directory, a `.gguf` file, a hub id, or a module, which is trained as it is and changed.
        data: see `memfit.data.read.read_data`. Rows with labels train a classifier; a body without a head gets one.
        budget: bytes at the peak of a step, of evaluation and of saving; a share is of what plain training takes.
        out: the directory to write; default: `NAME-trained`, here.
        task: batch, sequence, hyperparameters; of its recipe the optimizer.
        distil: a teacher to learn from beside the data, and how.
        given: a plan made before, or its file: its task, budget and recipe; its teacher, if it has one.
        full, adapters, slowdown: see `plan_to_train`.
        resume: go on from the last checkpoint of `out`, if there is one.
        enforce: under a hard limit of the budget: more memory is refused by the system.
        loss, tokenizer: for a module of one's own.
        observers: are told each step.

    Raises:
        DoesNotFit, UsageError, BrokenInput: before anything is learned.
        Interrupted: by SIGTERM or SIGINT, once the run was saved.
        LossNotFinite, SaveFailed: the last good checkpoint is kept.
    """
    options = options or Options()
    if resume and overwrite:
        raise UsageError("--resume goes on with a run, --overwrite begins anew: leave out one of them.")
    require_device(device)
    Schedule(steps=1, kind=options.schedule)  # a name that is not known is told before anything is made
    task = task or Train()
    task = task if distil is None else replace(task, distil=distil)
    if given is not None and distil is not None:
        raise UsageError("a plan says itself whether there is a teacher: leave out the teacher, or plan with it.")
    if isinstance(given, str | Path):
        given = read_train_plan(given)
    if given is not None:
        task = given.task
    progress("reading the data")
    subject = Subject.of(model, tokenizer)
    target = Path(out) if out is not None else Path(f"{subject.stem}-trained")
    run = Path(f"{target}.training")
    if given is None and resume and (run / "plan.json").is_file():
        given = read_train_plan(run / "plan.json")
        task = given.task
    raw = read_data(data, text_column=options.text_column, label_column=options.label_column)
    if options.evaluation is None:
        raw, held = split_rows(raw, _HELD_OUT, options.seed)
    else:
        held = read_data(options.evaluation, text_column=options.text_column, label_column=options.label_column)
        held = with_classes_of(held, raw)
    kinds = {"text": "texts without labels", "pairs": "prompts with completions"}
    kinds["labelled"] = f"texts of {raw.classes} classes"
    progress(f"{raw.name}: {len(raw.rows)} {kinds[raw.kind]} to train on, {len(held.rows)} held out")
    subject = subject.for_data(raw, held, options.seed)
    batches = subject.batches(raw, task, options.seed, shuffle=True)
    judged = subject.batches(held, task, options.seed, shuffle=False)
    for note in batches.notes:
        progress(note)
    if task.distil is not None:
        if loss is not None:
            raise UsageError("a loss of one's own has no logits to distil into. Leave out the loss, or the teacher.")
        student = Student(
            name=subject.name, kind=subject.kind, tokenizer=subject.tokenizer, vocabulary=subject.vocabulary,
            classes=subject.classes, source=subject.source,
        )  # fmt: skip
        check_teacher(task.distil, student, raw.rows[0].text)
    output = OutputDirectory(target, overwrite=overwrite or resume)
    with written_in(run):
        _make_way(run, resume=resume, overwrite=overwrite)
    steps = _steps(options, len(batches), run / ASKED)
    plan = given
    if plan is None:
        progress("planning")
        stored = subject.stored
        plain = task.with_recipe(plain_recipe(stored, task))
        allowed_nbytes = parse_size(
            budget,
            whole_nbytes=lambda: dry_run(lambda: subject.make(plain.recipe), plain, device=device).peak_nbytes,
        )
        plan = plan_with_teacher(
            lambda task: plan_training(
                subject.make, subject.name, task, allowed_nbytes, stored=stored, full=full, adapters=adapters,
                slowdown=slowdown, device=device, progress=progress,
            ), task, subject.kind, device=device,
        )  # fmt: skip
    with written_in(run):
        run.mkdir(parents=True, exist_ok=True)
        (run / "plan.json").write_text(plan.dumps(), encoding="utf-8")
        if not (run / ASKED).exists():
            asked = {
                "budget": str(budget), "full": not adapters, "adapters": not full, "slowdown": slowdown,
                "schedule": options.schedule, "warmup": options.warmup, "steps": steps,
            }  # fmt: skip
            (run / ASKED).write_text(json.dumps(asked), encoding="utf-8")
    learned: Data = batches
    if plan.task.distil is not None and plan.task.distil.asks and plan.task.distil.place == "disk":
        learned = ask_beforehand(plan, batches, run / "answers", enforce=enforce, progress=progress)
    certificate = None
    if options.certify:
        progress(f"{options.certify} steps of plain training, to compare with")
        certificate = certify(subject.real, plan, learned, options.certify, loss=loss)
    progress(f"training {steps} steps")
    reset_resident_peak()
    outside = resident_nbytes()["now"]
    limit = plan.budget_nbytes if enforce else None
    with limited(limit, runtime_nbytes=_runtime_nbytes(plan)), stop_on_signals() as stop:
        with memory_for("the model was loaded"):
            trained = subject.real(plan.recipe, str(run), device)
            make_trainable(trained, plan.recipe)
            teaching = load_teaching(plan.task.distil, Unwatched(), device=device)
            step = TrainStep(
                trained, plan.recipe, hyper=plan.task.hyper, loss=loss, directory=str(run), seed=options.seed,
                teaching=teaching,
            )  # fmt: skip
        log = LogFile(run / "log.jsonl")
        loop = Loop(
            step, learned, _settings(options, steps, plan), ladder=plan.ladder,
            checkpoints=Checkpoints(run / "checkpoints"), evaluate=judge_on(judged, _MOST_EVALUATED),
            observers=(log, *observers), outside_nbytes=outside, stop=stop,
        )  # fmt: skip
        with log:
            if resume:
                loop.records = log.cut(loop.resume())
                progress(f"going on after step {loop.done}" if loop.done else "no checkpoint is there: from the start")
            loop.run()
        progress("writing the model")
        scores = None
        if batches.kind == "classifier":
            scores = loop.tried(lambda: classification_of(step, judged), "in the last evaluation")
        with memory_for("the model was written; its last checkpoint is kept, and --resume goes on from it"), output:
            files = write_model(trained, output, source=subject.source, tokenizer=subject.tokenizer)
            if subject.module is not None:
                step.close()
            report = TrainReport(
                model=subject.name, data=raw.name, out=str(target), plan=plan.to_json(),
                records=tuple(vars(record) for record in loop.records), scores=tuple(loop.scores),
                notes=tuple(loop.notes), measured_nbytes=max(r.peak_nbytes for r in loop.as_predicted),
                classification=None if scores is None else scores.to_json(), certificate=certificate, files=files,
                machine=describe_machine(), versions=describe_versions(), data_notes=batches.notes,
            )  # fmt: skip
            output.write_json("training.json", report.to_json())
            output.write_text("training.html", render_training_page(report))
    return report


# -- what is trained ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to be trained: how it is made, fake or real, and how its data is cut."""

    name: str
    kind: Kind
    make: Make
    """On fake tensors."""
    real: Callable[..., nn.Module]
    """With its weights: from a recipe, the directory where weights are to wait that are away, and a device."""
    stored: torch.dtype
    tokenizer: Any
    vocabulary: int
    context: int | None
    source: Source | None = None
    module: nn.Module | None = None
    classes: int | None = None

    @property
    def stem(self) -> str:
        return Path(self.name).name.removesuffix(".gguf")

    @classmethod
    def of(cls, model: "str | Path | nn.Module", tokenizer: Any = None) -> "Subject":
        """Of what a user names."""
        if isinstance(model, nn.Module):
            return cls._of_module(model, tokenizer)
        source = open_source(model)
        check_original(source, "trained", needed_by="train")

        def make(recipe: Recipe, directory: str | None = None, device: str = "cpu") -> nn.Module:
            return load_to_train(source, recipe, directory=directory, device=device)

        text: Any = source.config.get_text_config()
        return cls(
            name=source.name, kind=kind_of(source), make=make, real=make, stored=stored_dtype(source),
            tokenizer=tokenizer or source.tokenizer(), vocabulary=int(text.vocab_size), context=_context(source.config),
            source=source, classes=int(source.config.num_labels) if is_classifier(source) else None,
        )  # fmt: skip

    @classmethod
    def _of_module(cls, module: nn.Module, tokenizer: Any) -> "Subject":
        from memfit.models import _cast_floats
        from memfit.task.infer import vocabulary

        if tokenizer is None:
            raise UsageError("a module of one's own has no tokenizer: give one, or a function from text to ids.")

        def make(recipe: Recipe) -> nn.Module:
            made = fake_copy(module)
            _cast_floats(made, recipe.dtype)
            return made

        config: Any = getattr(module, "config", None)
        kind = type(module).__name__
        return cls(
            name=kind, kind="classifier" if kind.endswith("ForSequenceClassification") else "causal", make=make,
            real=lambda recipe, directory=None, device="cpu": module.to(device),
            stored=next(module.parameters()).dtype, tokenizer=tokenizer, vocabulary=vocabulary(module),
            context=_context(config), module=module,
            classes=int(config.num_labels) if kind.endswith("ForSequenceClassification") else None,
        )  # fmt: skip

    def for_data(self, raw: RawData, held: RawData, seed: int) -> "Subject":
        """With a head for the data's classes, where rows have labels.

        Raises:
            UsageError: the data has no labels and the model is no language model, or all labels are one.
        """
        source = self.source
        if source is None or (raw.kind != "labelled" and not is_classifier(source)):
            if source is not None and self.kind == "classifier":
                raise UsageError(
                    f"{self.name} is no language model, and {raw.name} has no labels. Give rows with a label, and a "
                    "head for their classes is trained with it."
                )
            return self
        if len(known := {row.label for row in (*raw.rows, *held.rows)}) < 2:
            only = raw.label_names[0] if raw.label_names else next(iter(known))
            raise UsageError(
                f"{raw.name}: all rows have the label {only}, so there is nothing to tell apart. Give rows of two "
                "classes at the least."
            )
        classes = self.classes or max(2, raw.classes, held.classes)
        pad = getattr(self.tokenizer, "pad_token_id", None)

        def make(recipe: Recipe, directory: str | None = None, device: str = "cpu") -> nn.Module:
            made = load_classifier(
                source, classes=classes, names=raw.label_names, dtype=recipe.dtype, seed=seed,
                pad=0 if pad is None else pad, pack=packing(recipe), send=sending(recipe, directory),
            )  # fmt: skip
            return made if device == "cpu" else made.to(device)

        return replace(self, kind="classifier", make=make, real=make, classes=classes)

    def batches(self, raw: RawData, task: Train, seed: int, *, shuffle: bool) -> Batches:
        """Of data, as this model reads it."""
        return batches_of(
            raw, self.tokenizer, kind=self.kind, sequence=task.sequence, batch=task.batch, seed=seed,
            vocabulary=self.vocabulary, context=self.context, num_labels=self.classes, shuffle=shuffle,
        )  # fmt: skip


def _context(config: Any) -> int | None:
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None
    for name in ("max_position_embeddings", "n_positions"):
        most = getattr(config, name, None)
        if isinstance(most, int) and most > 0:
            return most
    return None


# -- parts --------------------------------------------------------------------------------------------


def _settings(options: Options, steps: int, plan: TrainPlan) -> Settings:
    every = max(_SELDOM, steps // _EVALUATIONS) if options.evaluate_every is None else options.evaluate_every
    warmup = max(0, steps // 20) if options.warmup is None else options.warmup
    return Settings(
        schedule=Schedule(steps=steps, warmup=warmup, kind=options.schedule), seed=options.seed,
        evaluate_every=every, save_every=every if options.save_every is None else options.save_every,
        budget_nbytes=plan.budget_nbytes, runtime_nbytes=_runtime_nbytes(plan),
    )  # fmt: skip


def _runtime_nbytes(plan: TrainPlan) -> int:
    return runtime_nbytes_of(int(plan.predicted.get("kernels", 0)))


def _make_way(run: Path, *, resume: bool, overwrite: bool) -> None:
    """A run's directory is begun anew only if that was asked for."""
    if resume:
        return
    if Checkpoints(run / "checkpoints").steps() and not overwrite:
        raise UsageError(f"{run}: a run was here. Go on with it (--resume), or begin anew (--overwrite).")
    shutil.rmtree(run, ignore_errors=True)


def _steps(options: Options, batches: int, asked: Path) -> int:
    """Steps of the whole run; one that is gone on with has as many as it was begun with.

    Raises:
        UsageError: others are asked for: the learning rate of each step depends on how many there are.
    """
    wanted = options.steps or max(1, round(options.epochs * batches))
    begun = json.loads(asked.read_text(encoding="utf-8")).get("steps") if asked.is_file() else None
    if begun is None:
        return wanted
    if wanted != begun and (options.steps, options.epochs) != (None, Options.epochs):
        raise UsageError(
            f"{wanted} steps with --resume: the run was begun for {begun}. Leave them out to go on, or begin anew with "
            "--overwrite."
        )
    return int(begun)


__all__ = ["Options", "train"]
