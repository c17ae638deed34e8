"""The command that trains a model within a budget."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from memfit.errors import UsageError

from .app import (
    AdaptersOnly,
    Budget,
    Device,
    FullOnly,
    Json,
    Model,
    Optimizer,
    Quiet,
    Slowdown,
    Threads,
    app,
    print_json,
    progress_to,
    refuse_beside_a_plan,
    refuse_both,
    said,
    show,
    stderr,
)
from .panels import Panelled

_IN_THE_PLAN = (
    "budget", "batch", "sequence", "lr", "weight_decay", "clip", "optimizer", "full", "adapters", "slowdown", "teacher",
)  # fmt: skip
"""What a plan says itself."""
_OF_A_TEACHER = ("alpha", "temperature", "kl", "match", "match_weight", "teacher_top", "teacher_in")


def training_task(batch: int, sequence: int, optimizer: str = "adamw", **settings: Any) -> Any:
    """A training task, of what was said on the command line; `settings` of `Hyper`."""
    import memfit

    given = {name: value for name, value in settings.items() if value is not None}
    return memfit.Train(
        batch=batch, sequence=sequence, recipe=memfit.Recipe(optimizer=optimizer), hyper=memfit.Hyper(**given)
    )


def distillation(context: typer.Context, teacher: str | None) -> Any:
    """A teacher and how to learn from it, of what was said on the command line; None without one."""
    from memfit.technique.distil import Distil

    given = {name: context.params[name] for name in _OF_A_TEACHER}
    if teacher is None:
        for name in _OF_A_TEACHER:
            if said(context, name):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} says how to learn from a teacher: name one with --teacher.")
        return None
    match = tuple(part.strip() for part in (given["match"] or "").split(",") if part.strip())
    return Distil(
        teacher=teacher, alpha=given["alpha"], temperature=given["temperature"], kl=given["kl"], match=match,
        match_weight=given["match_weight"], top=given["teacher_top"], place=given["teacher_in"],
    )  # fmt: skip


def show_training_plan(plan: Any, *, as_json: bool) -> None:
    """A plan, for a reader or a program."""
    from memfit.report.training import render_training_plan
    from memfit.train.recipe import describe

    if as_json:
        data = plan.to_json()
        print_json(data.pop("predicted") | data)
        return
    blocks = max((len(rung.recipe.recompute) for rung in plan.rungs), default=0)
    show(render_training_plan(plan.to_json(), describe(plan.recipe, blocks)))


@app.command(cls=Panelled)
def train(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str,
        typer.Option(help="A .txt, .jsonl, .tsv or .csv file, a saved data set, or the id of one.", show_default=False),
    ],
    budget: Budget = "100%",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The directory to write. Default: NAME-trained, here.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts of a step. It is never changed.", min=1)] = 8,
    sequence: Annotated[int, typer.Option(help="Most tokens of a text.", min=1)] = 512,
    epochs: Annotated[float, typer.Option(help="Times through the data.", min=0.0)] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Steps, in place of epochs.", min=1)] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Data to evaluate on. Default: a twentieth is held out.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.  [default: 1e-5]", show_default=False)] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of matrices.  [default: 0.01]", show_default=False)
    ] = None,
    clip: Annotated[float, typer.Option(help="Largest norm of a gradient; 0: any.", min=0.0)] = 1.0,
    schedule: Annotated[str, typer.Option(help="cosine, linear, constant.")] = "cosine",
    warmup: Annotated[int | None, typer.Option(help="Steps. Default: a twentieth of the run.", min=0)] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Distil: learn what this model of the same tokenizer answers.", show_default=False),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Share of the text's own tokens in the loss, beside the teacher.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of both distributions; their divergence counts T² times.")] = 1.0,
    kl: Annotated[str, typer.Option(help="forward: of the student from the teacher; or reverse.")] = "forward",
    match: Annotated[
        str | None, typer.Option(help="hidden, attention, or both: match what is between the layers.")
    ] = None,
    match_weight: Annotated[float, typer.Option(help="Of each of these in the loss.")] = 1.0,
    teacher_top: Annotated[
        int | None, typer.Option(help="Tokens told apart where answers wait on the disk.  [default: 64]")
    ] = None,
    teacher_in: Annotated[
        str, typer.Option(help="memory; disk: asked beforehand; auto: as the budget allows.")
    ] = "auto",
    optimizer: Optimizer = "adamw",
    full: FullOnly = False,
    adapters: AdaptersOnly = False,
    slowdown: Slowdown = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Train by this plan: its batch, budget and settings.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, and replace what is at --out.")] = False,
    enforce: Annotated[
        bool, typer.Option("--enforce", help="Under a hard limit: more memory is refused by the system.")
    ] = False,
    certify: Annotated[int, typer.Option(help="Steps of plain training to run first, and to compare with.", min=0)] = 0,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps. Default: ten times in a run, 20 steps apart at the least.", min=0)
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps. Default: as evaluated.", min=0)] = None,
    text_column: Annotated[str | None, typer.Option(help="The name of the text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="The name of the label.")] = None,
    seed: Annotated[int, typer.Option(help="Of the data's order and of chance.")] = 0,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write TensorBoard events into this directory.", show_default=False)
    ] = None,
    device: Device = Device.cpu,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model on data within a budget: the batch asked for is the batch that is learned from.

    Stopped by SIGTERM or Ctrl-C, a run is saved, and goes on with --resume.
    """
    refuse_both(full, adapters)
    if plan_file is not None:
        refuse_beside_a_plan(context, _IN_THE_PLAN)
    distil = distillation(context, teacher)
    if resume:
        _refuse_other_settings(context, out or Path(f"{Path(model).name.removesuffix('.gguf')}-trained"))
    import torch

    from memfit.report.training import render_training
    from memfit.train.watching import Bar, TensorBoard
    from memfit.training import Options
    from memfit.training import train as run

    if threads is not None:
        torch.set_num_threads(threads)
    observers: list[Any] = []
    if tensorboard is not None:
        observers.append(TensorBoard(tensorboard))
    if not quiet:
        observers.append(Bar(stderr()))
    task = training_task(batch, sequence, optimizer, lr=lr, weight_decay=weight_decay)
    task = replace(task, hyper=replace(task.hyper, clip=clip or None))
    report = run(
        model, data, budget, out,
        task=task, distil=distil, given=plan_file, full=not adapters, adapters=not full, slowdown=slowdown,
        resume=resume, overwrite=overwrite, enforce=enforce, device=device.value, observers=tuple(observers),
        progress=progress_to(quiet),
        options=Options(
            epochs=epochs, steps=steps, schedule=schedule, warmup=warmup, seed=seed,  # type: ignore[arg-type]
            evaluation=evaluation, evaluate_every=evaluate_every, save_every=save_every, certify=certify,
            text_column=text_column, label_column=label_column,
        ),
    )  # fmt: skip
    if as_json:
        print_json(report.to_json())
        return
    show(render_training(report))
    show(f"\nWritten to {report.out}. The same as a page: {Path(report.out) / 'training.html'}")


def _refuse_other_settings(context: typer.Context, out: Path) -> None:
    """A run goes on as it was planned: an option that says otherwise is not ignored."""
    file = Path(f"{out}.training") / "plan.json"
    if not file.is_file():
        return
    from memfit.train.plan import read_train_plan
    from memfit.training import ASKED

    task = read_train_plan(file).task
    known = {
        "batch": task.batch, "sequence": task.sequence, "optimizer": task.recipe.optimizer, "lr": task.hyper.lr,
        "weight_decay": task.hyper.weight_decay, "clip": task.hyper.clip or 0.0,
    }  # fmt: skip
    if (distil := task.distil) is not None:
        known |= {
            "teacher": distil.teacher, "alpha": distil.alpha, "temperature": distil.temperature, "kl": distil.kl,
            "match": ",".join(distil.match) or None, "match_weight": distil.match_weight, "teacher_top": distil.top,
        }  # fmt: skip
    elif said(context, "teacher"):
        raise UsageError("--teacher with --resume: the run was begun without one. Begin anew with --overwrite.")
    asked = file.with_name(ASKED)
    if asked.is_file():
        known |= json.loads(asked.read_text(encoding="utf-8"))
    for name, before in known.items():
        now = context.params[name]
        if said(context, name) and now != before:
            raise UsageError(
                f"--{name.replace('_', '-')} {now} with --resume: the run was begun with {before}. Leave it out to go "
                "on, or begin anew with --overwrite."
            )


__all__ = ["show_training_plan", "train", "training_task"]
