"""The command that makes a model fit: fit."""

from pathlib import Path
from typing import Annotated, Any

import typer

from memfit.errors import DoesNotFit, OverBudget, QualityMissed, UsageError
from memfit.steps import ALGORITHMS

from .app import (
    Activations,
    Allow,
    Asymmetric,
    Batch,
    Bits,
    Blocks,
    Budget,
    Channels,
    Experts,
    GroupSizes,
    Heads,
    Json,
    Keep,
    KvBits,
    NewTokens,
    Prompt,
    Quiet,
    Rounding,
    Smooth,
    Technique,
    TextFile,
    Threads,
    ValuesOption,
    Vector,
    app,
    plan_json,
    print_json,
    progress_to,
    refuse_beside_a_plan,
    said,
    show,
    with_default_budget,
)
from .choosing import (
    allowed_by,
    bits_of,
    narrow_by,
    narrows_alone,
    require_algorithm,
    require_one_setting,
    setting_of,
    techniques_in,
)
from .panels import Panelled

COMPRESSED_TENSORS = "compressed-tensors"
ONNX = "onnx"


@app.command(cls=Panelled)
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
    vector: Vector = 4,
    kv_bits: KvBits = "16,8,4",
    keep: Keep = None,
    asymmetric: Asymmetric = False,
    activations: Activations = 16,
    smooth: Smooth = True,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Carry out this plan: its budget, task and schemes; the rest is computed anew."),
    ] = None,
    blocks: Blocks = None,
    heads: Heads = None,
    channels: Channels = None,
    experts: Experts = None,
    allow: Allow = "quantize",
    technique: Annotated[
        Technique | None,
        typer.Option(
            help="Everything in one setting, plainly, and no plan is searched: quantize with one of --bits, prune with "
            "--sparsity or --pattern 2:4, low-rank with --rank, share (one basis for layers of one input), with --rank "
            "too; narrow with --blocks, --heads, --channels, --experts. The budget is all of the original's peak then, "
            "unless one is given."
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Of --technique prune: the share of weights that go, as 0.5 or 50%.", show_default=False),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="Of --technique prune: any, 2:4, or blocks (of 16 x 16). Default: any.", show_default=False),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(help="Of --technique low-rank and share: a number, or a share of the bytes.", show_default=False),
    ] = None,
    distil: Annotated[
        str | None,
        typer.Option(
            help="Data as of `memfit train`: a narrower model learns on it what the whole one answers, before it is "
            "fitted.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of --distil, 8 x 256 tokens each.", min=1)] = 500,
    lr: Annotated[float, typer.Option(help="Learning rate of --distil.", min=0.0)] = 1e-3,
    training_budget: Annotated[
        str, typer.Option(help="Of --distil: bytes at the peak of learning; a share is of what plain training takes.")
    ] = "100%",
    algorithm: Annotated[
        Rounding | None,
        typer.Option(
            help="rtn: to the nearest; search: with searched scales; gptq: and rounding errors are made up for on the "
            "text; gptq-plain: those within each layer alone, in two thirds of the time; tuned: and blocks, then the "
            "whole, learn on it. To prune: magnitude, wanda, sparsegpt; for factors: svd, scaled by the inputs, "
            "whitened. Default: gptq (sparsegpt, whitened) with a text, else search.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="compressed-tensors: a directory for transformers and vLLM; onnx: one for ONNX Runtime; or a file for "
            "llama.cpp in one of its mixtures: gguf:q8_0, q6_k, q5_k_m, q4_k_m, q4_0, q3_k_m, q2_k and others.",
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
    from memfit.regain import fit_and_distil
    from memfit.report.exported import onnx_lines
    from memfit.report.terminal import render_plan, render_report
    from memfit.source.source import open_source
    from memfit.steps import default_output

    task = memfit.Infer(batch=batch, prompt=prompt, new_tokens=new_tokens)
    source = str(demo.model_directory()) if model is None else model
    shape = {"length": window, "calibration_windows": windows}
    cut = None
    if text is not None:
        cut = memfit.Text.from_file(text, **shape)
    elif open_source(source, weights=False).is_demo:
        cut = memfit.Text.of_demo(**shape)
    if form not in (COMPRESSED_TENSORS, ONNX):
        plainly: dict[str, Any] = {"text": cut, "overwrite": overwrite, "threads": threads}
        _export(context, source, form, out, as_json=as_json, quiet=quiet, **plainly)
        return
    given = None
    if plan_file is not None:
        refuse_beside_a_plan(context, _IN_THE_PLAN)
        given = read_plan(plan_file)
    for name in ("steps", "lr", "training_budget"):
        if distil is None and said(context, name):
            raise UsageError(f"--{name.replace('_', '-')} says how a narrower model learns: add --distil FILE.")
    if distil is not None and (form != COMPRESSED_TENSORS or dry_run):
        raise UsageError("--distil goes with a directory that is written: leave out --format and --dry-run.")
    narrow = narrow_by(blocks, heads, channels, experts)
    plain = narrows_alone(context, technique, narrow)
    uniform = plain or technique not in (None, Technique.narrow)
    if plain:
        budget, bits, algorithm = "100%", "16", algorithm or Rounding.rtn
        kv_bits = kv_bits if said(context, "kv_bits") else "16"
    elif uniform:
        budget = budget if said(context, "budget") else "100%"
        kv_bits = kv_bits if said(context, "kv_bits") else "16"
        if technique is Technique.quantize:
            bits = bits_of(values, bits if said(context, "bits") else "")
            require_one_setting(bits, groups, kv_bits, values)
    if form == ONNX:
        # What ONNX Runtime has; another width that is asked for is refused by name.
        bits, kv_bits = bits if said(context, "bits") else "8,4,2", kv_bits if said(context, "kv_bits") else "16"
    settings = (bits, groups, kv_bits, keep, asymmetric, values, vector, activations, smooth)
    searched = allow if technique is None else "quantize" if technique is Technique.narrow else technique.value
    known = techniques_in(searched) if given is None else tuple(ALGORITHMS)
    require_algorithm(algorithm and algorithm.value, known)
    setting = _setting(context, technique, allow, sparsity, pattern, rank)
    allowed = None
    if given is None:
        allowed = allowed_by(context, *settings, allow=searched, setting=setting, uniform=uniform)
    if form == ONNX:
        require_widths(allowed, given)
    asked: dict[str, Any] = {
        "task": task, "text": cut, "allowed": allowed, "given": given, "uniform": uniform, "narrow": narrow,
        "progress": progress_to(quiet),
    }  # fmt: skip
    if dry_run:
        try:
            made = memfit.plan(source, budget, **asked)
        except DoesNotFit as error:
            raise with_default_budget(context, error) from error
        if as_json:
            print_json(plan_json(made))
        else:
            show(render_plan(made.to_json()))
        return
    how = asked | {
        "algorithm": algorithm and algorithm.value, "overwrite": overwrite, "max_kl": max_kl,
        "enforce": enforce, "ram": ram, "measure": measure, "resume": resume, "threads": threads,
    }  # fmt: skip
    lines: list[str] = []
    try:
        if form == ONNX:
            exported = export_onnx(source, budget, out, **how)
            out, report, told = Path(exported.out), exported.report, exported.to_json()
            lines = onnx_lines(told["onnx"])
        else:
            out = out or default_output(open_source(source))
            if distil is None:
                report = memfit.fit(source, budget, out, **how)
            else:
                report = fit_and_distil(
                    source, budget, out, distil=distil, steps=steps, lr=lr, training_budget=training_budget, **how
                )
            told = report.to_json()
    except DoesNotFit as error:
        raise with_default_budget(context, error) from error
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


def _setting(
    context: typer.Context, technique: Technique | None, allow: str, sparsity: str | None, pattern: str | None,
    rank: str | None,
) -> dict[str, Any] | None:  # fmt: skip
    """What one setting of a technique that is no quantization says; None of others."""
    factored = (Technique.low_rank, Technique.share)
    of = {"sparsity": (Technique.prune,), "pattern": (Technique.prune,), "rank": factored}
    for name, owners in of.items():
        if said(context, name) and technique not in owners:
            owner = " or ".join(owner.value for owner in owners)
            raise UsageError(f"--{name} is a setting of --technique {owner}: add that, or leave --{name} out.")
    if technique is not None and said(context, "allow"):
        raise UsageError(f"--allow {allow} beside --technique {technique.value}: leave one of them out.")
    if technique in (None, Technique.quantize, Technique.narrow):
        return None
    assert technique is not None
    for name in ("bits", "groups", "values", "vector", "asymmetric", "activations", "smooth"):
        if said(context, name):
            raise UsageError(f"--{name} says something of integers, and this is --technique {technique.value}.")
    return setting_of(technique.value, sparsity, pattern, rank)


def _export(
    context: typer.Context, source: str, form: str, out: Path | None, *, as_json: bool, quiet: bool, **how: Any
) -> None:
    """Write a file for another program, and show what it is."""
    from memfit.export import export, mixture_of
    from memfit.report.exported import render_export

    mixture_of(form)
    for name in _OF_A_PLAN:
        if said(context, name):
            why = next((reason for names, reason in _NOT_IN_A_FILE if name in names), "a mixture has widths of its own")
            raise UsageError(f"--{name.replace('_', '-')} beside --format {form}: {why}. Leave it out.")
    made = export(source, form, out, progress=progress_to(quiet), **how)
    if as_json:
        print_json(made.to_json())
        return
    show(render_export(made.to_json()))


_OF_NARROWING = ("blocks", "heads", "channels", "experts")
_IN_THE_PLAN = (
    "budget", "batch", "prompt", "new_tokens", "bits", "groups", "values", "vector", "kv_bits", "keep", "asymmetric",
    "technique", "activations", "smooth", "allow", "sparsity", "pattern", "rank", *_OF_NARROWING,
)  # fmt: skip
"""What a plan says itself."""
_OF_A_PLAN = (
    *_IN_THE_PLAN, "plan_file", "algorithm", "enforce", "max_kl", "dry_run", "ram", "measure", "resume",
)  # fmt: skip
"""What a file for another program has no use for."""
_NOT_IN_A_FILE = (
    (_OF_NARROWING, "what is written is the model as it is (--technique narrow makes one to give here)"),
    (("algorithm",), "its integers are chosen by GPTQ where there is a --text, else by searched scales"),
    (("ram",), "it is written tensor by tensor, and no cap is kept to there"),
    (("enforce", "max_kl", "measure", "dry_run"), "another program runs it, so it is not measured within a budget"),
    (("resume",), "it is written in one go"),
)
"""Why not, of what is no setting of its widths."""
