"""The commands that make a model fit to run: account, plan, fit, eval, report."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from memfit.errors import OverBudget, QualityMissed, UsageError

from .app import (
    Activations,
    AdaptersOnly,
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
    Rounding,
    Routing,
    Sequence,
    Slowdown,
    Smooth,
    Task,
    TaskOption,
    Technique,
    TextFile,
    Threads,
    ValuesOption,
    app,
    print_json,
    progress_to,
    refuse_beside_a_plan,
    refuse_both,
    said,
    show,
    write,
)
from .choosing import allowed_by, bits_of, narrow_by, narrows_alone, require_one_setting
from .training import show_training_plan, training_task

COMPRESSED_TENSORS = "compressed-tensors"
ONNX = "onnx"


@app.command()
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
    top: Annotated[int, typer.Option(help="Entries to list.", min=0)] = 10,
    as_json: Json = False,
) -> None:
    """Say who will hold which bytes, when: to run a model, or to train it plainly. No weights are read."""
    import memfit

    _refuse_of_the_other_task(context, task)
    chosen: memfit.Infer | memfit.Train
    if task is Task.train:
        chosen = memfit.plain_training(model, training_task(batch, sequence, optimizer))
    else:
        chosen = memfit.Infer(batch=batch, prompt=prompt, new_tokens=new_tokens, kv_bits=kv_bits)
    share = (routing or Routing.balanced).value
    first = memfit.account(model, chosen, device=device.value, routing=share, resident=resident)
    worst = None
    if routing is None and first.routing is not None:
        worst = memfit.account(model, chosen, device=device.value, routing="worst")
    if as_json:
        print_json(first.to_json() | ({} if worst is None else {"worst_routing": worst.to_json()}))
        return
    from memfit.report.terminal import render_account

    show(render_account(first, top=top))
    if worst is not None:
        show("If one expert gets every token:")
        show(render_account(worst, top=0))


@app.command()
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
    kv_bits: KvBits = "16,8,4",
    keep: Keep = None,
    asymmetric: Asymmetric = False,
    activations: Activations = 16,
    smooth: Smooth = True,
    blocks: Blocks = None,
    heads: Heads = None,
    channels: Channels = None,
    experts: Experts = None,
    device: Device = Device.cpu,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan's JSON here.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what to do to fit a budget, and what it will cost. The plan shown was traced whole."""
    import memfit
    from memfit.plan.plan import dumps
    from memfit.report.terminal import render_plan

    _refuse_of_the_other_task(context, task)
    if task is Task.train:
        refuse_both(full, adapters)
        planned = memfit.plan(
            model, budget, task=training_task(batch, sequence, optimizer), full=not adapters, adapters=not full,
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
        allowed=allowed_by(context, bits, groups, kv_bits, keep, asymmetric, values, activations, smooth),
        narrow=narrow_by(blocks, heads, channels, experts),
        device=device.value,
        progress=progress_to(quiet),
    )
    if output is not None:
        write(output, dumps(made))
    if as_json:
        print_json(_plan_json(made))
        return
    show(render_plan(made.to_json()))


@app.command()
def fit(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="As elsewhere; left out: the demo model, offline.", show_default=False),
    ] = None,
    budget: Budget = "50%",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The directory to write. Default: NAME-fitted, here.")
    ] = None,
    batch: Batch = 1,
    prompt: Prompt = 512,
    new_tokens: NewTokens = 32,
    text: TextFile = None,
    bits: Bits = "8,6,5,4,3,2",
    groups: GroupSizes = None,
    values: ValuesOption = "int",
    kv_bits: KvBits = "16,8,4",
    keep: Keep = None,
    asymmetric: Asymmetric = False,
    activations: Activations = 16,
    smooth: Smooth = True,
    blocks: Blocks = None,
    heads: Heads = None,
    channels: Channels = None,
    experts: Experts = None,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Carry out this plan: its budget, task and schemes; the rest is computed anew."),
    ] = None,
    technique: Annotated[
        Technique | None,
        typer.Option(help="Everything in one setting, no plan is searched: quantize, with one of --bits; or narrow."),
    ] = None,
    algorithm: Annotated[
        Rounding | None,
        typer.Option(
            help="rtn: to the nearest; search: with searched scales; gptq: and rounding errors are made up for on the "
            "text; tuned: and each block then learns on it. Default: gptq with a text, else search.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="compressed-tensors; onnx: for ONNX Runtime; or a file for llama.cpp: gguf:q4_k_m and its other "
            "mixtures.",
        ),
    ] = COMPRESSED_TENSORS,
    window: Annotated[int, typer.Option(help="Tokens of a window of the text.", min=8)] = 256,
    windows: Annotated[int, typer.Option(help="Windows to calibrate on, at the most.", min=1)] = 16,
    enforce: Annotated[
        bool,
        typer.Option("--enforce", help="Measure under a hard limit: more memory is refused by the system."),
    ] = False,
    max_kl: Annotated[float | None, typer.Option(help="Exit with 5 if the KL divergence is larger.")] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            help="What making it may be resident with, as 4GiB: the rest waits on the disk. Default: no cap.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Run the fitted model, and judge it beside the original.")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with what the same run has left when it was stopped.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model at --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and stop; nothing is written.")] = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a model fit a budget, write it, measure it, and show prediction and measurement side by side."""
    import memfit
    from memfit import demo
    from memfit.export_onnx import export_onnx, require_widths
    from memfit.plan.plan import read_plan
    from memfit.report.terminal import onnx_lines, render_plan, render_report
    from memfit.source.source import open_source
    from memfit.steps import default_output

    task = memfit.Infer(batch=batch, prompt=prompt, new_tokens=new_tokens)
    source = str(demo.model_directory()) if model is None else model
    shape = {"length": window, "calibration_windows": windows}
    cut = None
    if text is not None:
        cut = memfit.Text.from_file(text, **shape)
    elif model is None:
        cut = memfit.Text.of_demo(**shape)
    if form not in (COMPRESSED_TENSORS, ONNX):
        plainly: dict[str, Any] = {"text": cut, "overwrite": overwrite, "threads": threads}
        _export(context, source, form, out, as_json=as_json, quiet=quiet, **plainly)
        return
    given = None
    if plan_file is not None:
        refuse_beside_a_plan(context, _IN_THE_PLAN)
        given = read_plan(plan_file)
    narrow = narrow_by(blocks, heads, channels, experts)
    plain = narrows_alone(context, technique, narrow)
    uniform = technique is Technique.quantize or plain
    if plain:
        budget, bits, algorithm = "100%", "16", algorithm or Rounding.rtn
        kv_bits = kv_bits if said(context, "kv_bits") else "16"
    elif uniform:
        budget = budget if said(context, "budget") else "100%"
        kv_bits = kv_bits if said(context, "kv_bits") else "16"
        bits = bits_of(values, bits if said(context, "bits") else "")
        require_one_setting(bits, groups, kv_bits, values)
    if form == ONNX:
        # What ONNX Runtime has; another width that is asked for is refused by name.
        bits, kv_bits = bits if said(context, "bits") else "8,4,2", kv_bits if said(context, "kv_bits") else "16"
    settings = (bits, groups, kv_bits, keep, asymmetric, values, activations, smooth)
    allowed = allowed_by(context, *settings, uniform=uniform) if given is None else None
    if form == ONNX:
        require_widths(allowed, given)
    asked: dict[str, Any] = {
        "task": task, "text": cut, "allowed": allowed, "given": given, "uniform": uniform, "narrow": narrow,
        "progress": progress_to(quiet),
    }  # fmt: skip
    if dry_run:
        made = memfit.plan(source, budget, **asked)
        if as_json:
            print_json(_plan_json(made))
        else:
            show(render_plan(made.to_json()))
        return
    how = asked | {
        "algorithm": None if algorithm is None else algorithm.value, "overwrite": overwrite, "max_kl": max_kl,
        "enforce": enforce, "ram": ram, "measure": measure, "resume": resume, "threads": threads,
    }  # fmt: skip
    lines: list[str] = []
    try:
        if form == ONNX:
            exported = export_onnx(source, budget, out, **how)
            out, report, told = Path(exported.out), exported.report, exported.to_json()
            lines = [f"{name}  {value}" for name, value in onnx_lines(told["onnx"])]
        else:
            out = out or default_output(open_source(source))
            report = memfit.fit(source, budget, out, **how)
            told = report.to_json()
    except (OverBudget, QualityMissed) as error:
        if isinstance(error.report, memfit.Report) and not as_json:
            show(render_report(error.report))
        raise
    if as_json:
        print_json(told)
        return
    show(render_report(report))
    for line in lines:
        show(line)
    show(f"\nWritten to {out}. The same as a page: {out / 'report.html'}")


def _export(
    context: typer.Context, source: str, form: str, out: Path | None, *, as_json: bool, quiet: bool, **how: Any
) -> None:
    """Write a file for another program, and show what it is."""
    from memfit.export import export, mixture_of
    from memfit.report.terminal import render_export

    mixture_of(form)
    for name in _OF_A_PLAN:
        if said(context, name):
            as_it_is = "what is written is the model as it is (--technique narrow makes one to give here)"
            why = as_it_is if name in _OF_NARROWING else "a mixture has widths of its own"
            raise UsageError(f"--{name.replace('_', '-')} beside --format {form}: {why}. Leave it out.")
    made = export(source, form, out, progress=progress_to(quiet), **how)
    if as_json:
        print_json(made.to_json())
        return
    show(render_export(made.to_json()))


@app.command(name="eval")
def evaluate(
    model: Model,
    reference: Annotated[str, typer.Option(help="The original model.", show_default=False)],
    text: Annotated[Path, typer.Option(help="UTF-8 text; its second half is used.", show_default=False)],
    batch: Batch = 1,
    prompt: Prompt = 512,
    new_tokens: NewTokens = 32,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge a model beside its original: KL divergence, perplexity, agreement, speed, measured bytes."""
    import memfit
    from memfit.report.terminal import render_account, render_quality

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
    show(render_account(found["account"], top=0))
    from memfit.report.terminal import speed_lines

    for name, value in speed_lines(found["speed"], found["speed_original"]):
        show(f"{name}  {value}")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A fitted model's directory.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show the report of a fitted or trained model again. Its page is report.html or training.html there."""
    from memfit.report.report import Report
    from memfit.report.terminal import render_report
    from memfit.report.training import TrainReport, render_training

    if not directory.is_dir():
        raise UsageError(f"{directory}: there is no such directory. Give one made by `memfit fit` or `memfit train`.")
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


_OF_NARROWING = ("blocks", "heads", "channels", "experts")
_IN_THE_PLAN = (
    "budget", "batch", "prompt", "new_tokens", "bits", "groups", "values", "kv_bits", "keep", "asymmetric", "technique",
    "activations", "smooth", *_OF_NARROWING,
)  # fmt: skip
"""What a plan says itself."""
_OF_A_PLAN = (
    *_IN_THE_PLAN, "plan_file", "algorithm", "enforce", "max_kl", "dry_run", "ram", "measure", "resume",
)  # fmt: skip
"""What a file for another program has no use for."""


_OF_RUNNING = (
    "prompt", "new_tokens", "text", "bits", "groups", "values", "kv_bits", "keep", "asymmetric", "routing",
    "activations", "smooth", *_OF_NARROWING,
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


def _plan_json(made: Any) -> dict[str, Any]:
    predicted = dict(made.predicted or {})
    data = {key: value for key, value in made.to_json().items() if key not in ("predicted", "predicted_fit")}
    fits = predicted["peak_nbytes"] <= made.budget_nbytes
    return predicted | data | {"fits": fits}
