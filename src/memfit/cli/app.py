"""The command line itself: options that several commands share, what is printed where, how an error ends."""

import json
import os
import signal
import sys
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from memfit.errors import DoesNotFit, Interrupted, MemfitError, OverBudget, QualityMissed, UsageError
from memfit.worker import end_without_collection

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Give it a language model and a memory budget: it makes the model fit, and proves it.\n\n"
    "Try [bold]memfit fit[/bold] without arguments: it fits the demo model into half of its bytes, offline."
    "\n\n"
    "MODEL is a directory, a .gguf file, a hub id or `demo`. Sizes: 400MiB, 0.5GB, 50% (of the original's peak).\n\n"
    "Exit codes: 0 done, 2 usage, 3 does not fit, 4 unsafe or broken input, 5 quality gate missed, "
    "6 measured over budget, 75 interrupted, 1 anything else.",
)


_FILE_COLUMNS = 200
_INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt."""


def _version(wanted: bool) -> None:
    if wanted:
        from memfit import __version__

        show(f"memfit {__version__}")
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


class Rounding(StrEnum):
    """How integers are chosen; what pruning keeps; how factors are found."""

    rtn = "rtn"
    search = "search"
    gptq_plain = "gptq-plain"
    gptq = "gptq"
    tuned = "tuned"
    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    svd = "svd"
    scaled = "scaled"
    whitened = "whitened"


class Technique(StrEnum):
    """What is applied to everything, with one setting."""

    quantize = "quantize"
    prune = "prune"
    low_rank = "low-rank"
    share = "share"
    narrow = "narrow"


class Routing(StrEnum):
    """How tokens go to experts."""

    balanced = "balanced"
    worst = "worst"


Model = Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub id, or demo.", show_default=False)]
Budget = Annotated[
    str,
    typer.Option(
        "--budget", "-b",
        help="Bytes allowed at the peak of the task: 400MiB, 0.5GB, or a share of the original's peak, 50%.",
    ),
]
Batch = Annotated[int, typer.Option(help="Texts at once.", min=1)]
Prompt = Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)]
NewTokens = Annotated[int, typer.Option(help="Tokens written after the prompt.", min=0)]
TextFile = Annotated[
    Path | None,
    typer.Option("--text", help="UTF-8 text: its first half prices choices, its second half judges the result."),
]
Bits = Annotated[str, typer.Option(help="Widths that may be chosen, of 8, 6, 5, 4, 3, 2 (16, as it is, always may).")]
GroupSizes = Annotated[
    str | None,
    typer.Option("--groups", "--group", help="Group sizes that may be chosen, of 128, 64, 32. Default: by width."),
]
ValuesOption = Annotated[
    str,
    typer.Option(
        "--values",
        help="What a weight's bits may stand for, one or several: int, nf4 (4 bits), fp8 (E4M3, 8 bits), mxfp4 (4), "
        "codebook (levels learned for each tensor, at --bits). nf4 and codebooks are written for memfit alone.",
    ),
]
Vector = Annotated[
    int,
    typer.Option(
        help="Weights beside each other that one level of a codebook stands for: at most 1, 2 or 4, and as many as fit "
        "into a code of 8 bits. More lose less."
    ),
]
Allow = Annotated[
    str,
    typer.Option(
        help="Techniques that the search may mix, group by group: quantize, prune, low-rank, share. What is no "
        "integer is written for memfit alone."
    ),
]
KvBits = Annotated[str, typer.Option(help="KV-cache widths that may be chosen, of 16, 8, 4, 2.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="Leave tensors of this name in 16 bits (a part is enough); `embeddings`: all tables."),
]
Asymmetric = Annotated[
    bool,
    typer.Option("--asymmetric", help="Use zero points (8 bits a value on disk for stock transformers)."),
]
Activations = Annotated[
    int,
    typer.Option(help="16; or 8: linear layers of 8 bits are multiplied in integers, inputs rounded token by token."),
]
Smooth = Annotated[
    bool,
    typer.Option(
        "--smooth/--no-smooth", help="With --activations 8 and a text: even out the channels of activations before."
    ),
]

Blocks = Annotated[
    str | None,
    typer.Option(
        help="Blocks that stay, a number or a share as 70%: like --heads, --channels and --experts it makes the model "
        "really smaller, by what the text says is missed least.",
        show_default=False,
    ),
]
Heads = Annotated[str | None, typer.Option(help="Attention heads that stay in a block.", show_default=False)]
Channels = Annotated[
    str | None, typer.Option(help="Channels of a block's MLP that stay (intermediate size).", show_default=False)
]
Experts = Annotated[str | None, typer.Option(help="Experts that stay in a block.", show_default=False)]


class Task(StrEnum):
    """What is planned for."""

    run = "run"
    train = "train"


TaskOption = Annotated[Task, typer.Option("--task", help="Run the model, or train it.")]
Sequence = Annotated[int, typer.Option(help="Tokens of a text, in training.", min=1)]
Optimizer = Annotated[str, typer.Option(help="adamw, sgd, adafactor, galore, apollo, muon; in training.")]
FullOnly = Annotated[bool, typer.Option("--full", help="Train the whole model, never adapters.")]
AdaptersOnly = Annotated[bool, typer.Option("--adapters", help="Train low-rank adapters, the model frozen.")]
Slowdown = Annotated[
    float | None, typer.Option(help="A training step may take so many times as long as a plain one.", min=1.0)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Threads = Annotated[int | None, typer.Option(help="Threads of what is measured.", min=1)]


def main() -> None:
    """Run the command line; a MemfitError ends it with its own exit code and its message on stderr."""
    end_without_collection()
    alone = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if alone else None
    try:
        app()
    except MemfitError as error:
        _fail(error)
    except SystemExit as done:
        if done.code != _INTERRUPTED:
            raise
        stderr().print(f"Interrupted; no half-written output is left.{_goes_on(sys.argv[1:])}", soft_wrap=True)
        sys.exit(Interrupted.exit_code)
    except ValueError as error:
        _fail(UsageError(str(error)))
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _goes_on(words: list[str]) -> str:
    """How what a command has done so far is not lost, if that is so."""
    if words[:1] == ["train"]:
        return " It goes on from its last checkpoint with --resume."
    if words[:1] != ["fit"]:
        return ""
    if any("gguf:" in word for word in words):
        return " A GGUF file is begun anew."
    return (
        " What is finished of it (calibration, blocks) stays in a hidden directory beside it, .NAME.memfit-work, and "
        "the same command goes on from there."
    )


def _fail(error: MemfitError) -> None:
    stderr().print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    if "--json" in sys.argv:
        extra: dict[str, Any] = {}
        if isinstance(error, DoesNotFit):
            extra = {"fits": False, "smallest_nbytes": error.smallest_nbytes, "levers": error.levers}
        elif isinstance(error, (OverBudget, QualityMissed)):
            extra = {"kept": True}
            if error.report is not None:
                extra |= {"report": error.report.to_json()}  # type: ignore[attr-defined]
        print_json({"error": type(error).__name__, "message": str(error), **extra})
    sys.exit(error.exit_code)


def write(file: Path, text: str) -> None:
    """Write a text file; a UsageError where that cannot be done."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}). Choose another place.") from error


def progress_to(quiet: bool) -> Any:
    """A function that tells progress on stderr, with the time."""
    console = stderr()
    started = _now()

    def tell(what: str) -> None:
        if not quiet:
            console.print(f"{_now() - started:6.0f} s  {what} ...", style="dim", highlight=False, soft_wrap=True)

    return tell


def _now() -> float:
    return time.monotonic()


def stderr() -> Console:
    """The console of progress and errors."""
    return Console(stderr=True)


def show(what: RenderableType) -> None:
    """Print for a reader, on stdout."""
    # In a file nothing is cut or wrapped to the width of a terminal that is not there.
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if known else _FILE_COLUMNS).print(what)


def print_json(data: Any) -> None:
    """Print for a program, on stdout."""
    sys.stdout.write(json.dumps(data) + "\n")


def refuse_both(full: bool, adapters: bool) -> None:
    """`--full` rules out what `--adapters` asks for."""
    if full and adapters:
        raise UsageError("--full and --adapters exclude each other: leave out one, or both to let the plan choose.")


def said(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_beside_a_plan(context: typer.Context, own: tuple[str, ...]) -> None:
    """A plan has settings of its `own`: what contradicts them on the command line is not ignored."""
    for name in own:
        if said(context, name):
            option = name.replace("_", "-")
            raise UsageError(f"--{option} beside --plan: the plan has its own. Leave it out, or edit the plan.")


def plan_json(made: Any) -> dict[str, Any]:
    """A plan as JSON for a program: its account, its choices, whether it fits."""
    predicted = dict(made.predicted or {})
    data = {key: value for key, value in made.to_json().items() if key not in ("predicted", "predicted_fit")}
    fits = predicted["peak_nbytes"] <= made.budget_nbytes
    return predicted | data | {"fits": fits}


def with_default_budget(context: typer.Context, error: DoesNotFit) -> DoesNotFit:
    """The refusal, which says what the budget was where none was asked for."""
    if said(context, "budget") or error.of_cap:
        return error
    told = f"{error} The budget is the default here: give --budget, a size or a share of the original's peak."
    return DoesNotFit(told, smallest_nbytes=error.smallest_nbytes, levers=error.levers)
