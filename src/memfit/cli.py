"""The commands: account, plan, fit, eval, report. Data goes to stdout, progress to stderr."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from memfit.errors import DoesNotFit, Interrupted, MemfitError, OverBudget, QualityMissed, UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Give it a language model and a memory budget: it makes the model fit, and proves it.\n\n"
    "Try [bold]memfit fit[/bold] without arguments: it fits the demo model into half of its bytes, offline."
    "\n\n"
    "MODEL is a directory, a .gguf file or a hub id. Sizes: 400MiB, 0.5GB, 50% (of the original's peak).\n\n"
    "Exit codes: 0 done, 2 usage, 3 does not fit, 4 unsafe or broken input, 5 quality gate missed, "
    "6 measured over budget, 75 interrupted.",
)


_FILE_COLUMNS = 200
_INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt."""


def _version(wanted: bool) -> None:
    if wanted:
        from memfit import __version__

        _print(f"memfit {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """What comes before any command."""


class Device(StrEnum):
    """Whose allocator is meant; what is installed does not matter."""

    cpu = "cpu"
    cuda = "cuda"


class Routing(StrEnum):
    """How tokens go to experts."""

    balanced = "balanced"
    worst = "worst"


Model = Annotated[str, typer.Argument(help="A directory, a .gguf file or a hub id.", show_default=False)]
Budget = Annotated[
    str, typer.Option("--budget", "-b", help="Bytes allowed at the peak of the task: 400MiB, 0.5GB, 50%.")
]
Batch = Annotated[int, typer.Option(help="Texts at once.", min=1)]
Prompt = Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)]
NewTokens = Annotated[int, typer.Option(help="Tokens written after the prompt.", min=0)]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text", help="UTF-8 text: its first half prices choices, its second half judges the result."
    ),
]
Bits = Annotated[
    str, typer.Option(help="Widths that may be chosen, of 8, 6, 5, 4, 3, 2 (16, as it is, always may).")
]
GroupSizes = Annotated[
    str | None,
    typer.Option("--groups", help="Group sizes that may be chosen, of 128, 64, 32. Default: by width."),
]
KvBits = Annotated[str, typer.Option(help="KV-cache widths that may be chosen, of 16, 8, 4, 2.")]
Keep = Annotated[
    list[str] | None, typer.Option(help="Leave tensors of this name in 16 bits (a part is enough).")
]
Asymmetric = Annotated[
    bool,
    typer.Option("--asymmetric", help="Use zero points (8 bits a value on disk for stock transformers)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Threads = Annotated[int | None, typer.Option(help="Threads of what is measured.", min=1)]


@app.command()
def account(
    model: Model,
    batch: Batch = 1,
    prompt: Prompt = 512,
    new_tokens: NewTokens = 32,
    kv_bits: Annotated[int, typer.Option(help="Bits of the KV cache: 16, 8, 4, 2.")] = 16,
    device: Device = Device.cpu,
    routing: Annotated[Routing | None, typer.Option(help="For experts; default: both are shown.")] = None,
    resident: Annotated[
        bool,
        typer.Option("--resident", help="Predict the whole process, too; measures this machine once, two minutes."),
    ] = False,
    top: Annotated[int, typer.Option(help="Entries to list.", min=0)] = 10,
    as_json: Json = False,
) -> None:
    """Say who will hold which bytes, when. No weights are read."""
    import memfit

    task = memfit.Infer(batch=batch, prompt=prompt, new_tokens=new_tokens, kv_bits=kv_bits)
    share = (routing or Routing.balanced).value
    first = memfit.account(model, task, device=device.value, routing=share, resident=resident)
    worst = None
    if routing is None and first.routing is not None:
        worst = memfit.account(model, task, device=device.value, routing="worst")
    if as_json:
        _print_json(first.to_json() | ({} if worst is None else {"worst_routing": worst.to_json()}))
        return
    from memfit.report.terminal import render_account

    _print(render_account(first, top=top))
    if worst is not None:
        _print("If one expert gets every token:")
        _print(render_account(worst, top=0))


@app.command()
def plan(
    model: Model,
    budget: Budget = "50%",
    batch: Batch = 1,
    prompt: Prompt = 512,
    new_tokens: NewTokens = 32,
    text: TextFile = None,
    bits: Bits = "8,6,5,4,3,2",
    groups: GroupSizes = None,
    kv_bits: KvBits = "16,8,4",
    keep: Keep = None,
    asymmetric: Asymmetric = False,
    device: Device = Device.cpu,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan's JSON here.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what to do to fit a budget, and what it will cost. The plan shown was traced whole."""
    import memfit
    from memfit.plan.plan import dumps
    from memfit.report.terminal import render_plan

    made = memfit.plan(
        model,
        budget,
        task=memfit.Infer(batch=batch, prompt=prompt, new_tokens=new_tokens),
        text=text,
        allowed=_allowed(bits, groups, kv_bits, keep, asymmetric),
        device=device.value,
        progress=_progress(quiet),
    )
    if output is not None:
        _write(output, dumps(made))
    if as_json:
        _print_json(_plan_json(made))
        return
    _print(render_plan(made.to_json()))


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
    kv_bits: KvBits = "16,8,4",
    keep: Keep = None,
    asymmetric: Asymmetric = False,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Carry out this plan: its budget, task and schemes; the rest is computed anew."),
    ] = None,
    enforce: Annotated[
        bool,
        typer.Option("--enforce", help="Measure under a hard limit: more memory is refused by the system."),
    ] = False,
    max_kl: Annotated[float | None, typer.Option(help="Exit with 5 if the KL divergence is larger.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model at --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and stop; nothing is written.")] = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a model fit a budget, write it, measure it, and show prediction and measurement side by side."""
    import memfit
    from memfit import demo
    from memfit.fit import default_output
    from memfit.plan.plan import read_plan
    from memfit.report.terminal import render_plan, render_report
    from memfit.source.source import open_source

    task = memfit.Infer(batch=batch, prompt=prompt, new_tokens=new_tokens)
    allowed = _allowed(bits, groups, kv_bits, keep, asymmetric)
    source = str(demo.model_directory()) if model is None else model
    given = None
    if plan_file is not None:
        _refuse_beside_a_plan(context)
        given = read_plan(plan_file)
    if dry_run:
        progress = _progress(quiet)
        made = memfit.plan(
            source, budget, task=task, text=text, allowed=allowed, given=given, progress=progress
        )
        if as_json:
            _print_json(_plan_json(made))
        else:
            _print(render_plan(made.to_json()))
        return
    out = out or default_output(open_source(source))
    try:
        report = memfit.fit(
            source,
            budget,
            out,
            task=task,
            text=text,
            allowed=allowed,
            given=given,
            enforce=enforce,
            overwrite=overwrite,
            max_kl=max_kl,
            threads=threads,
            progress=_progress(quiet),
        )
    except (OverBudget, QualityMissed) as error:
        if isinstance(error.report, memfit.Report) and not as_json:
            _print(render_report(error.report))
        raise
    if as_json:
        _print_json(report.to_json())
        return
    _print(render_report(report))
    _print(f"\nWritten to {out}. The same as a page: {out / 'report.html'}")


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
    found = memfit.evaluate(model, reference, text, task=task, threads=threads, progress=_progress(quiet))
    if as_json:
        measured = found["account"].to_json()
        _print_json(
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
    _print(render_quality(found["quality"]))
    _print(render_account(found["account"], top=0))
    from memfit.report.terminal import speed_lines

    for name, value in speed_lines(found["speed"], found["speed_original"]):
        _print(f"{name}  {value}")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A fitted model's directory.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show the report of a fitted model again. Its page is report.html in the directory."""
    from memfit.report.report import Report
    from memfit.report.terminal import render_report

    try:
        data = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        found = Report.from_json(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{directory}: no report can be read from report.json ({error}). "
            "Give a directory made by `memfit fit`."
        ) from error
    if as_json:
        _print_json(data)
    else:
        _print(render_report(found))


def main() -> None:
    """Run the command line; a MemfitError ends it with its own exit code and its message on stderr."""
    try:
        app()
    except MemfitError as error:
        _fail(error)
    except SystemExit as done:
        if done.code != _INTERRUPTED:
            raise
        _stderr().print(
            "Interrupted; no half-written output is left. What was calibrated to the end is kept in a hidden directory "
            "beside the output (.NAME.memfit-work), and the same command goes on from there.",
            soft_wrap=True,
        )
        sys.exit(Interrupted.exit_code)
    except ValueError as error:
        _fail(UsageError(str(error)))


def _fail(error: MemfitError) -> None:
    _stderr().print(
        f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    if "--json" in sys.argv:
        extra: dict[str, Any] = {}
        if isinstance(error, DoesNotFit):
            extra = {"fits": False, "smallest_nbytes": error.smallest_nbytes, "levers": error.levers}
        elif isinstance(error, (OverBudget, QualityMissed)):
            extra = {"kept": True}
            if error.report is not None:
                extra |= {"report": error.report.to_json()}  # type: ignore[attr-defined]
        _print_json({"error": type(error).__name__, "message": str(error), **extra})
    sys.exit(error.exit_code)


_IN_THE_PLAN = (
    "budget", "batch", "prompt", "new_tokens", "bits", "groups", "kv_bits", "keep", "asymmetric",
)  # fmt: skip
"""What a plan says itself."""


def _refuse_beside_a_plan(context: typer.Context) -> None:
    """A plan has its own budget, task and choices: what contradicts it is not ignored."""
    for name in _IN_THE_PLAN:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = name.replace("_", "-")
            raise UsageError(f"--{option} beside --plan: the plan has its own. Leave it out, or edit the plan.")


def _allowed(bits: str, groups: str | None, kv_bits: str, keep: list[str] | None, asymmetric: bool) -> Any:
    import memfit

    widths = _numbers(bits, "--bits", (16, 8, 6, 5, 4, 3, 2))
    sizes = None
    if groups is not None:
        chosen = _numbers(groups, "--groups", (128, 64, 32))
        sizes = {width: (None,) if width == 8 else chosen for width in widths if width != 16}
    return memfit.Allowed(
        bits=tuple(width for width in widths if width != 16),
        groups=sizes,
        symmetric=not asymmetric,
        kv_bits=_numbers(kv_bits, "--kv-bits", (16, 8, 4, 2)),
        keep=tuple(keep or ()),
    )


def _numbers(text: str, option: str, known: tuple[int, ...]) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: write numbers with commas between, as 8,4.") from error
    if unknown := [number for number in found if number not in known]:
        raise UsageError(f"{option}: {unknown[0]} is none of {', '.join(map(str, known))}.")
    return found


def _plan_json(made: Any) -> dict[str, Any]:
    predicted = dict(made.predicted or {})
    data = {key: value for key, value in made.to_json().items() if key not in ("predicted", "predicted_fit")}
    fits = predicted["peak_nbytes"] <= made.budget_nbytes
    return predicted | data | {"fits": fits}


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}). Choose another place.") from error


def _progress(quiet: bool) -> Any:
    console = _stderr()
    started = _now()

    def tell(what: str) -> None:
        if not quiet:
            console.print(f"{_now() - started:6.0f} s  {what} ...", style="dim", highlight=False)

    return tell


def _now() -> float:
    import time

    return time.monotonic()


def _stderr() -> Console:
    return Console(stderr=True)


def _print(what: RenderableType) -> None:
    # In a file nothing is cut or wrapped to the width of a terminal that is not there.
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if known else _FILE_COLUMNS).print(what)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
