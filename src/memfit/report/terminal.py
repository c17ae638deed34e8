"""Accounts, plans and reports on a terminal, with rich."""

import math
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfit.account.account import Account, Difference, compare
from memfit.evaluate.quality import Quality
from memfit.evaluate.speed import Speed
from memfit.packed.kv_states import least_window
from memfit.report.choices import narrowed_line, rows, smoothed_line
from memfit.report.report import Report
from memfit.report.techniques import HEAD, LEGEND, technique_rows, tried_line
from memfit.units import format_size

_BAR: Final = 24
COLORS: Final = {
    "parameter": "blue",
    "gradient": "magenta",
    "optimizer": "yellow",
    "activation": "green",
    "kv_cache": "cyan",
    "buffer": "bright_black",
    "temporary": "red",
    "statistics": "bright_magenta",
    "outside": "white",
}


_BY_WEIGHTS: Final = ("rtn", "magnitude", "svd")
"""Algorithms that look at weights alone."""


def render_account(
    account: Account, *, top: int = 10, budget_nbytes: int | None = None, told: str = ""
) -> RenderableType:
    """The phases with their peaks, what was alive at the highest, and the `top` largest entries.

    `told`: whether it is predicted or measured, where both stand near each other.
    """
    told = told and f", {told}"
    # A line of its own: a table's title would be wrapped to the table's width.
    title = Text(f"At the peak ({account.peak.name}{told})", style="italic")
    parts: list[RenderableType] = [_phases(account, budget_nbytes, told), Text(), title, _at_peak(account)]
    if account.entries and top:
        parts += [Text(), _entries(account, top)]
    if notes := _notes(account):
        parts += [Text(), Text(notes, style="dim")]
    return Group(*parts)


def render_plan(plan: Mapping[str, Any]) -> RenderableType:
    """A plan's JSON: a row for each kind of tensor and scheme, layers with the same choice together."""
    # A line of its own: a table's title would be wrapped to the table's width.
    title = Text(plan_title(plan), style="italic")
    table = _table("")
    for name in ("layers", "tensors", "stored as"):
        table.add_column(name)
    table.add_column("bytes", justify="right")
    found = rows(plan["choices"])
    priced = any(row.price for row in found)
    if priced:
        table.add_column("price", justify="right")
    for row in found:
        style = "dim" if row.bits == 16 else ""
        price = [f"{row.price:.2g}" if row.price else ""] if priced else []
        table.add_row(row.where, row.what, row.scheme, format_size(row.nbytes), *price, style=style)
    parts: list[RenderableType] = [title, table]
    if smoothed := plan.get("smoothed"):
        parts.append(Text(f"Activations of 8 bits. {smoothed_line(smoothed)}"))
    if narrowed := plan.get("narrowed"):
        parts.append(Text(narrowed_line(narrowed)))
    if (short := _short_line(plan)) is not None:
        parts.append(Text(short))
    if predicted := plan.get("predicted"):
        account = Account.from_json(dict(predicted))
        parts += [Text(), render_account(account, top=0, budget_nbytes=plan.get("budget_nbytes"))]
    return Group(*parts)


def render_comparison(predicted: Account, measured: Account, *, title: str = "Predicted and measured") -> Table:
    """Predicted beside measured, with the error; entries only where they differ."""
    table = _table(title)
    table.add_column("")
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right")
    shown, equal = comparison_lines(predicted, measured)
    for line in shown:
        error = format_error(line)
        worst = abs(line.error) > 0.03
        table.add_row(
            line.what,
            format_size(line.predicted_nbytes),
            format_size(line.measured_nbytes),
            Text(error, style="red" if worst else ""),
            style="bold" if line.what == "peak" else "",
        )
    if equal:
        table.add_row(Text(f"{equal} entries equal to the byte", style="dim"), "", "", "")
    return table


def comparison_lines(predicted: Account, measured: Account, *, entries: int = 8) -> tuple[list[Difference], int]:
    """Peak, phases, kinds, resident and the worst entries; and how many entries are equal."""
    lines = compare(predicted, measured)
    single = [line for line in lines if line.what.startswith("entry ")]
    differing = [line for line in single if line.predicted_nbytes != line.measured_nbytes]
    differing.sort(key=lambda line: -abs(line.predicted_nbytes - line.measured_nbytes))
    peak = Difference(what="peak", predicted_nbytes=predicted.peak_nbytes, measured_nbytes=measured.peak_nbytes)
    rest = [line for line in lines if not line.what.startswith("entry ")]
    return [peak, *rest, *differing[:entries]], len(single) - len(differing)


def format_error(line: Difference) -> str:
    """`+0.02 %`; `exact` where both are the same."""
    if line.predicted_nbytes == line.measured_nbytes:
        return "exact"
    if line.measured_nbytes == 0:
        return "not measured"
    return f"{100 * line.error:+.2f} %"


def render_quality(quality: Quality) -> Table:
    """The quality, a line for each figure the model has."""
    table = _table("Quality", header=False)
    for name, text in quality_lines(quality):
        table.add_row(name, text)
    return table


def quality_lines(quality: Quality) -> list[tuple[str, str]]:
    """Name and figure of all that is known."""
    lines = []
    if quality.kl is not None:
        spread = ""
        if quality.kl_interval is not None:
            low, high = quality.kl_interval
            spread = f" (95 %: {low:.4f} to {high:.4f})"
        lines.append(("KL from the original, nats a token", f"{quality.kl:.4f}{spread}"))
    if quality.perplexity is not None:
        before = ""
        if quality.perplexity_reference is not None:
            before = f" (original {quality.perplexity_reference:.3f})"
        lines.append(("perplexity", f"{quality.perplexity:.3f}{before}"))
    if quality.top1 is not None:
        lines.append(("same likeliest token", f"{100 * quality.top1:.1f} %"))
    if quality.cosine is not None:
        lines.append(("cosine of the embeddings", f"{quality.cosine:.5f}"))
    lines.append(("compared on", f"{quality.tokens} tokens in {quality.windows} windows"))
    return lines


def speed_lines(speed: Speed, original: Speed | None = None) -> list[tuple[str, str]]:
    """Name and figure of the speeds, beside the original's where it was timed."""

    def beside(now: float, then: float | None) -> str:
        return f"{now:.1f} tokens/s" + (f" (original {then:.1f})" if then else "")

    lines = [
        ("prompt", beside(speed.prompt_tokens_per_s, original.prompt_tokens_per_s if original else None))
    ]
    if speed.decode_tokens_per_s is not None:
        lines.append(
            ("decode", beside(speed.decode_tokens_per_s, original.decode_tokens_per_s if original else None))
        )
    return lines


def render_report(report: Report) -> RenderableType:
    """The whole report: verdict, plan, predicted and measured, quality, speed."""
    parts: list[RenderableType] = [_verdict(report)]
    if report.plan is not None:
        parts += [Text(), *(Text(line) for line in (task_line(report.task), made_line(report)) if line)]
        parts.append(render_plan({**report.plan, "predicted": None}))  # its account is the report's own
    if report.rounding is not None:
        parts.append(Text(report.rounding))
    # As predicted, which knows the worst moments; what was measured stands beside it below.
    told = "" if report.measured is None else "predicted"
    parts += [Text(), render_account(report.predicted, top=0, budget_nbytes=report.budget_nbytes, told=told)]
    if report.measured is not None:
        parts += [Text(), render_comparison(report.predicted, report.measured, title="Running it")]
    if report.predicted_fit is not None and report.measured_fit is not None:
        parts += [Text(), render_comparison(report.predicted_fit, report.measured_fit, title="Fitting it")]
    if report.ram is not None:
        parts += [Text(), _render_ram(report.ram)]
    if (resumed := resumed_line(report)) is not None:
        parts.append(Text(resumed, style="dim"))
    if report.quality is not None:
        parts += [Text(), render_quality(report.quality)]
    else:
        parts += [Text(), Text(f"Quality: {why_not_judged(report)}")]
    if (expected := _expected_line(report)) is not None:
        parts.append(Text(expected, style="dim"))
    if found := technique_rows(report):
        table = _table("Each technique alone, and those allowed together")
        for name in HEAD:
            table.add_column(name, justify="left" if name in (HEAD[0], HEAD[-1]) else "right")
        for row in found:
            table.add_row(*row)
        parts += [Text(), table, Text(LEGEND, style="dim")]
    if (tried := tried_line(report)) is not None:
        parts.append(Text(tried, style="dim"))
    if report.speed is not None:
        table = _table("Speed", header=False)
        for name, text in speed_lines(report.speed, report.speed_original):
            table.add_row(name, text)
        parts += [Text(), table]
    if report.kernels:
        kernels = ", ".join(f"{name} ({count})" for name, count in sorted(report.kernels.items()))
        parts += [Text(), Text(f"Kernels: {kernels}", style="dim")]
    return Group(*parts)


def why_not_judged(report: Report) -> str:
    """Of a report without quality: why it has none, and what to do."""
    if report.measured is None:
        return "not judged, as nothing was run (--no-measure). See `memfit eval`."
    if report.ram is not None and report.text is not None:
        takes, cap = (format_size(report.ram[key]) for key in ("asking_nbytes", "cap_nbytes"))
        return f"not judged: to ask the original takes {takes}, and the cap is {cap}. See `memfit eval`."
    return "not judged: there was no text. Give --text, or see `memfit eval`."


def resumed_line(report: Report) -> str | None:
    """Of a run that went on where another was stopped: why fitting it took less than predicted."""
    if not report.resumed or (report.measured_fit is None and report.ram is None):
        return None
    return "It went on where a stopped run was: what was done before is predicted here, and not measured."


def _short_line(plan: Mapping[str, Any]) -> str | None:
    """Of a plan whose KV cache is never long enough to be packed: from when on it is."""
    bits, task = plan.get("kv_bits", 16), plan.get("task") or {}
    tokens = task.get("prompt", 0) + task.get("new_tokens", 0)
    if bits == 16 or not task or tokens >= least_window():
        return None
    return f"The KV cache has {bits} bits from {least_window()} tokens on; the {tokens} of this task stay in 16."


def _expected_line(report: Report) -> str | None:
    """Beside a divergence that is far above what was expected: what the expected one is."""
    expected, quality = (report.plan or {}).get("expected_kl"), report.quality
    if not expected or quality is None or quality.kl is None or quality.kl < 2 * expected:
        return None
    if (report.plan or {}).get("narrowed"):
        return f"Expected was {expected:.2g} above the narrower model's own: what each choice costs alone, added up."
    return f"Expected was {expected:.2g}: what each choice costs alone, added up."


def _render_ram(ram: Mapping[str, Any]) -> RenderableType:
    """What each job of fitting was resident with, predicted and measured, beside the cap."""
    table = _table(f"Fitting it, resident, within {format_size(ram['cap_nbytes'])}")
    for name in ("", "predicted", "measured", "of that, pages of files", "error"):
        table.add_column(name, justify="left" if not name else "right")
    for name, job in ram["jobs"].items():
        told, found = job["predicted_nbytes"], job["measured_nbytes"]
        if found is None:
            table.add_row(name, format_size(told), "", "", "")
            continue
        error = f"{100 * (told / found - 1):+.2f} %"
        table.add_row(name, format_size(told), format_size(found), format_size(job["file_backed_nbytes"]), error)
    thrift = ram.get("thrift")
    lines: list[RenderableType] = [table]
    if at_once := ram["jobs"].get("calibrate", {}).get("windows"):
        lines.append(Text(f"Calibrating: {_windows(at_once)} of the text at once."))
    if thrift is not None:
        held = "held" if thrift["hold"] else "read for each use"
        states = "in files" if thrift["spill"] else "in memory"
        windows = _windows(thrift["batch"])
        how = f"{windows} of the text at once, a block's weights {held}, what blocks give each other {states}"
        lines.append(Text(f"Choosing integers: {how}."))
    return Group(*lines)


def _windows(count: int) -> str:
    return "one window" if count == 1 else f"{count} windows"


def _table(title: str, *, header: bool = True) -> Table:
    return Table(
        title=title or None,
        title_justify="left",
        box=None,
        pad_edge=False,
        show_header=header,
        header_style="bold",
    )


def _verdict(report: Report) -> Text:
    how = "measured" if report.measured is not None else "predicted"
    peak = format_size(report.best.peak_nbytes)
    text = Text(f"Fitted: {peak} at the peak, {how}", style="bold")
    if report.budget_nbytes is not None:
        word, style = ("it fits", "bold green") if report.fits else ("it does not fit", "bold red")
        text.append(f", of {format_size(report.budget_nbytes)} allowed: ").append(word, style=style)
    if report.original is not None:
        text.append(f". The original needs {format_size(report.original.peak_nbytes)}")
    return text.append(".")


def task_line(task: Mapping[str, Any] | None) -> str:
    """What is run, in a sentence."""
    if not task:
        return ""
    texts = "1 text" if task.get("batch") == 1 else f"{task.get('batch')} texts"
    return f"Task: {texts}, a prompt of {task.get('prompt')} tokens, {task.get('new_tokens')} new ones."


def made_line(report: Report) -> str:
    """By what algorithm on what text the model was made and judged."""
    made = f"Made by {report.algorithm}" if report.algorithm else "Made"
    if (text := report.text) is None:
        return f"{made}, without a text." if report.algorithm else ""
    judged = report.quality is not None
    if report.algorithm in _BY_WEIGHTS and (report.plan or {}).get("priced_by") != "text":
        windows = f"{text['evaluation_windows']} {_windows_of(text)}"
        return f"{made}, without a text" + (f", judged on {windows}." if judged else ".")
    return f"{made} {on_text(text, judged=judged)}."


def on_text(text: Mapping[str, Any], *, judged: bool) -> str:
    """On what of a text, as a report has it, a model was made, and judged."""
    others = f", judged on {text['evaluation_windows']} others" if judged else ""
    return f"on {text['calibration_windows']} {_windows_of(text)}{others}"


def _windows_of(text: Mapping[str, Any]) -> str:
    return f"windows of {text['window']} tokens of {text['name']}"


def plan_title(plan: Mapping[str, Any]) -> str:
    """A plan's JSON in a line: what it was made for, and what is expected of it."""
    parts = ["Plan"]
    if (budget := plan.get("budget_nbytes")) is not None:
        parts.append(f"within {format_size(budget)}")
    if (bits := plan.get("average_bits")) is not None:
        parts.append(f"{bits:.2f} bits a weight")
    if (kv_bits := plan.get("kv_bits")) is not None:
        parts.append(f"KV cache {kv_bits} bits")
    choices = [choice for choice in plan.get("choices", ()) if choice.get("scheme")]
    if choices and not any(choice.get("price") for choice in choices):
        parts.append("not priced")
    # What narrowing costs is measured, never expected.
    elif (kl := plan.get("expected_kl")) is not None and (choices or not plan.get("narrowed")):
        parts.append(f"expected KL {_nats(kl)}{_of_the_cache(plan)}")
        if plan.get("priced_by") == "weights":
            parts.append("priced by the weights, without a text")
    elif choices:
        parts.append("expected KL unknown: some choices have no price")
    return parts[0] + ": " + ", ".join(parts[1:]) if len(parts) > 1 else parts[0]


def _nats(kl: float) -> str:
    return f"{kl:.2g}" if 0 < kl < 1e-3 else f"{kl:.4f}"


def _of_the_cache(plan: Mapping[str, Any]) -> str:
    """What of a plan's expected loss is the KV cache's: the rest of what its choices cost."""
    rest = plan["expected_kl"] - math.fsum(choice.get("price") or 0.0 for choice in plan.get("choices", ()))
    return f" ({_nats(rest)} of it by the cache)" if plan.get("kv_bits", 16) < 16 and rest > 1e-6 else ""


def _phases(account: Account, budget_nbytes: int | None, told: str) -> Table:
    table = _table(f"Phases{told}")
    table.add_column("phase")
    table.add_column("peak", justify="right")
    reserves = any(phase.reserved_nbytes is not None for phase in account.phases)
    if reserves:
        table.add_column("reserved", justify="right")
    table.add_column("")
    moments = any(phase.at for phase in account.phases)
    if moments:
        table.add_column("worst moment", style="dim")
    scale = max(account.peak_nbytes, budget_nbytes or 0, 1)
    for phase in account.phases:
        over = budget_nbytes is not None and phase.peak_nbytes > budget_nbytes
        style = "red" if over else "bold" if phase is account.peak else ""
        bar = _stack(phase.alive, phase.peak_nbytes, scale)
        size = Text(format_size(phase.peak_nbytes), style=style)
        segments = [format_size(phase.reserved_nbytes or 0)] if reserves else []
        table.add_row(Text(phase.name, style=style), size, *segments, bar, *([phase.at] if moments else []))
    if budget_nbytes is not None:
        table.add_row(
            "budget", format_size(budget_nbytes), *([""] if reserves else []),
            Text("▏".rjust(round(_BAR * budget_nbytes / scale))),
        )
    return table


def _stack(alive: Mapping[str, int], peak_nbytes: int, scale: int) -> Text:
    """A bar of the kinds alive, its length the share of `scale`."""
    bar = Text()
    done = drawn = 0
    for kind, nbytes in sorted(alive.items(), key=lambda item: -item[1]):
        done += nbytes
        # Rounded on the running sum, so that the parts add up to the bar's length.
        end = round(_BAR * done / scale)
        bar.append("█" * (end - drawn), style=COLORS.get(kind, "white"))
        drawn = end
    if not alive:
        bar.append("█" * round(_BAR * peak_nbytes / scale))
    return bar


def _at_peak(account: Account) -> Table:
    peak = account.peak
    table = _table("", header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    for kind, nbytes in sorted(peak.alive.items(), key=lambda item: -item[1]):
        share = f"{100 * nbytes / max(peak.peak_nbytes, 1):.1f} %"
        table.add_row(Text(kind, style=COLORS.get(kind, "")), format_size(nbytes), share)
    return table


def _entries(account: Account, top: int) -> Table:
    table = _table("Largest entries")
    for name in ("kind", "module", "dtype"):
        table.add_column(name)
    table.add_column("bytes", justify="right")
    table.add_column("phases", style="dim")
    allocated = [entry for entry in account.entries if entry.kind != "outside"]
    entries = sorted(allocated, key=lambda entry: (-entry.nbytes, entry.kind, entry.module))
    for entry in entries[:top]:
        module = entry.module or "(the model)"
        kind = Text(entry.kind, style=COLORS.get(entry.kind, ""))
        table.add_row(kind, module, entry.dtype, format_size(entry.nbytes), ", ".join(entry.phases))
    if len(entries) > top:
        rest = sum(entry.nbytes for entry in entries[top:])
        table.add_row("", f"{len(entries) - top} more", "", format_size(rest), "", style="dim")
    return table


def _notes(account: Account) -> str:
    sizes = (
        ("resident", account.resident_nbytes),
        ("outside the allocator", account.outside_nbytes),
        ("pages of files", account.file_backed_nbytes),
    )
    notes = [f"{what} {format_size(nbytes)}" for what, nbytes in sizes if nbytes is not None]
    if account.routing is not None:
        notes.append(f"experts at {account.routing} load")
    return ", ".join(notes)
