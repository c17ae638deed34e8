"""The commands about running a model: account, plan, eval, report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from memfit.errors import UsageError

from .app import (
    Activations,
    AdaptersOnly,
    Allow,
    Asymmetric,
    Batch,
    Bits,
    Blocks,
    Budget,
    Channels,
    Device,
    Experts,
    FullOnly,
    GroupSizes,
    Heads,
    Json,
    Keep,
    KvBits,
    Model,
    NewTokens,
    Optimizer,
    Prompt,
    Quiet,
    Routing,
    Sequence,
    Slowdown,
    Smooth,
    Task,
    TaskOption,
    TextFile,
    Threads,
    ValuesOption,
    Vector,
    app,
    plan_json,
    print_json,
    progress_to,
    refuse_both,
    said,
    show,
    write,
)
from .choosing import allowed_by, narrow_by
from .panels import Panelled
from .training import show_training_plan, training_task


@app.command(cls=Panelled)
def account(
    context: typer.Context,
    model: Model,
    task: TaskOption = Task.run,
    batch: Batch = 1,
    prompt: Prompt = 512,
    new_tokens: NewTokens = 32,
    sequence: Sequence = 512,
    optimizer: Optimizer = "adamw",
    kv_bits: Annotated[int, typer.Option(help="Bits of the KV cache: 16, 8, 4, 2.")] = 16,
    device: Device = Device.cpu,
    routing: Annotated[Routing | None, typer.Option(help="For experts; default: both are shown.")] = None,
    resident: Annotated[
        bool,
        typer.Option("--resident", help="Predict the whole process, too; measures this machine once, five minutes."),
    ] = False,
    measured: Annotated[
        bool,
        typer.Option("--measure", help="Run it, too, in a process of its own, and show what the allocator counted."),
    ] = False,
    top: Annotated[int, typer.Option(help="Entries to list.", min=0)] = 10,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say who will hold which bytes, when: to run a model, or to train it plainly. No weights are read for that."""
    import memfit

    _refuse_of_the_other_task(context, task)
    chosen: memfit.Infer | memfit.Train
    if task is Task.train:
        chosen = memfit.plain_training(model, training_task(batch, sequence, optimizer))
    else:
        chosen = memfit.Infer(batch=batch, prompt=prompt, new_tokens=new_tokens, kv_bits=kv_bits)
    share = (routing or Routing.balanced).value
    first = memfit.account(
        model, chosen, device=device.value, routing=share, resident=resident, progress=progress_to(quiet)
    )
    worst = None
    if routing is None and first.routing is not None:
        worst = memfit.account(model, chosen, device=device.value, routing="worst")
    ran = memfit.measure(model, chosen, device=device.value) if measured else None
    if as_json:
        more = {"worst_routing": worst, "measured": ran}
        print_json(first.to_json() | {name: found.to_json() for name, found in more.items() if found is not None})
        return
    from memfit.report.terminal import render_account, render_comparison

    show(render_account(first, top=top))
    if worst is not None:
        show("If one expert gets every token:")
        show(render_account(worst, top=0))
    if ran is not None:
        show(render_comparison(first, ran))


@app.command(cls=Panelled)
def plan(
    context: typer.Context,
    model: Model,
    budget: Budget = "50%",
    task: TaskOption = Task.run,
    batch: Batch = 1,
    prompt: Prompt = 512,
    new_tokens: NewTokens = 32,
    sequence: Sequence = 512,
    optimizer: Optimizer = "adamw",
    full: FullOnly = False,
    adapters: AdaptersOnly = False,
    slowdown: Slowdown = None,
    text: TextFile = None,
    bits: Bits = "8,6,5,4,3,2",
    groups: GroupSizes = None,
    values: ValuesOption = "int",
    vector: Vector = 4,
    kv_bits: KvBits = "16,8,4",
    keep: Keep = None,
    asymmetric: Asymmetric = False,
    activations: Activations = 16,
    smooth: Smooth = True,
    allow: Allow = "quantize",
    blocks: Blocks = None,
    heads: Heads = None,
    channels: Channels = None,
    experts: Experts = None,
    device: Device = Device.cpu,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan's JSON here.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what to do to fit a budget, and what it will cost. The plan shown was traced whole.

    With `--task train` the budget is by default all that plain training takes, 100%.
    """
    import memfit
    from memfit.plan.plan import dumps
    from memfit.report.terminal import render_plan

    _refuse_of_the_other_task(context, task)
    if task is Task.train:
        refuse_both(full, adapters)
        allowed = budget if said(context, "budget") else "100%"  # as `train` has it
        planned = memfit.plan(
            model, allowed, task=training_task(batch, sequence, optimizer), full=not adapters, adapters=not full,
            slowdown=slowdown, device=device.value, progress=progress_to(quiet),
        )  # fmt: skip
        if output is not None:
            write(output, planned.dumps())
        show_training_plan(planned, as_json=as_json)
        return
    made = memfit.plan(
        model,
        budget,
        task=memfit.Infer(batch=batch, prompt=prompt, new_tokens=new_tokens),
        text=text,
        allowed=allowed_by(
            context, bits, groups, kv_bits, keep, asymmetric, values, vector, activations, smooth, allow=allow
        ),
        narrow=narrow_by(blocks, heads, channels, experts),
        device=device.value,
        progress=progress_to(quiet),
    )
    if output is not None:
        write(output, dumps(made))
    if as_json:
        print_json(plan_json(made))
        return
    show(render_plan(made.to_json()))


@app.command(name="eval")
def evaluate(
    model: Model,
    reference: Annotated[str, typer.Option(help="The original model.", show_default=False)],
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text; its second half is used. The demo model has its own.", show_default=False),
    ] = None,
    batch: Batch = 1,
    prompt: Prompt = 512,
    new_tokens: NewTokens = 32,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge a model beside its original: KL divergence, perplexity, agreement, speed, measured bytes."""
    import memfit
    from memfit.report.terminal import render_account, render_quality, speed_lines

    task = memfit.Infer(batch=batch, prompt=prompt, new_tokens=new_tokens)
    found = memfit.evaluate(model, reference, text, task=task, threads=threads, progress=progress_to(quiet))
    if as_json:
        measured = found["account"].to_json()
        print_json(
            measured
            | {
                "measured": measured,
                "quality": found["quality"].to_json(),
                "speed": found["speed"].to_json(),
                "speed_original": found["speed_original"].to_json(),
                "kernels": found["kernels"],
            }
        )
        return
    show(render_quality(found["quality"]))
    show("")
    show(render_account(found["account"], top=0, told="measured"))
    show("")
    for name, value in speed_lines(found["speed"], found["speed_original"]):
        show(f"{name}  {value}")


@app.command(cls=Panelled)
def report(
    directory: Annotated[Path, typer.Argument(help="A fitted model's directory.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show the report of a fitted or trained model again. Its page is report.html or training.html there."""
    from memfit.report.report import Report
    from memfit.report.terminal import render_report
    from memfit.report.training import TrainReport, render_training

    if not directory.is_dir():
        what = "is a file, and reports are in directories" if directory.exists() else "there is no such directory"
        raise UsageError(f"{directory}: {what}. Give one made by `memfit fit` or `memfit train`.")
    trained = (directory / "training.json").is_file()
    name = "training.json" if trained else "report.json"
    try:
        data = json.loads((directory / name).read_text(encoding="utf-8"))
        shown = render_training(TrainReport.from_json(data)) if trained else render_report(Report.from_json(data))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{directory}: no report can be read from {name} ({error}). Give a directory made by `memfit fit` or "
            "`memfit train`."
        ) from error
    if as_json:
        print_json(data)
    else:
        show(shown)
        for line in _of_onnx(directory):
            show(line)


def _of_onnx(directory: Path) -> list[str]:
    """What came of the ONNX files of a directory that has some."""
    from memfit.report.exported import onnx_lines

    file = directory / "onnx.json"
    try:
        return onnx_lines(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: not what `memfit fit --format onnx` writes ({error}). Make it anew.") from error


_OF_RUNNING = (
    "prompt", "new_tokens", "text", "bits", "groups", "values", "vector", "kv_bits", "keep", "asymmetric", "routing",
    "activations", "smooth", "allow", "blocks", "heads", "channels", "experts",
)  # fmt: skip
_OF_TRAINING = ("sequence", "optimizer", "full", "adapters", "slowdown")


def _refuse_of_the_other_task(context: typer.Context, task: Task) -> None:
    """An option that says nothing of the task is not ignored."""
    for name in _OF_RUNNING if task is Task.train else _OF_TRAINING:
        if said(context, name):
            other = "run" if task is Task.train else "train"
            raise UsageError(
                f"--{name.replace('_', '-')} says something of --task {other}, and this is --task {task.value}. Leave "
                "one of them out."
            )
