"""The report as one HTML page, with nothing outside itself: it opens offline, and can be sent as it is."""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from memfit.account.account import Account
from memfit.report.choices import narrowed_line, rows
from memfit.report.drawing import bars_at_peak, fronts, strip_of_bits
from memfit.report.report import Report
from memfit.report.techniques import HEAD, LEGEND, technique_rows, tried_line
from memfit.report.terminal import (
    comparison_lines,
    format_error,
    made_line,
    plan_title,
    quality_lines,
    resumed_line,
    speed_lines,
    task_line,
    why_not_judged,
)
from memfit.units import format_size


def render_page(report: Report) -> str:
    """The page, HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["size"] = format_size
    template = environment.from_string(
        files("memfit.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    accounts = [
        (label, account)
        for label, account in (
            ("original, predicted", report.original),
            ("predicted", report.predicted),
            ("measured", report.measured),
        )
        if account is not None
    ]
    kinds = sorted({kind for _, account in accounts for kind in account.peak.alive})
    choices = report.choices
    return template.render(
        report=report,
        bars=Markup(bars_at_peak(accounts, budget_nbytes=report.budget_nbytes)),
        kinds=kinds,
        strip=Markup(strip_of_bits(choices)) if choices else "",
        bits=sorted({row.bits for row in rows(choices)}),
        rows=rows(choices),
        priced=any(row.price for row in rows(choices)),
        lines=_lines(report),
        comparisons=_comparisons(report),
        resumed=resumed_line(report),
        phases=report.best.phases,
        quality=quality_lines(report.quality) if report.quality else [("quality", why_not_judged(report))],
        speed=speed_lines(report.speed, report.speed_original) if report.speed else [],
        front=Markup(_fronts(report)) if report.fronts else "",
        techniques=technique_rows(report),
        techniques_head=HEAD,
        techniques_legend=LEGEND,
        tried=tried_line(report),
    )


def _lines(report: Report) -> list[str]:
    """What was asked, planned and done, in sentences, as on the terminal."""
    plan = report.plan or {}
    lines = [task_line(report.task), made_line(report), f"{plan_title(plan)}." if plan else ""]
    if narrowed := plan.get("narrowed"):
        lines.append(narrowed_line(narrowed))
    return [line for line in (*lines, *(report.rounding or "").splitlines()) if line]


def _fronts(report: Report) -> str:
    lines = {name: line["points"] for name, line in report.fronts.items()}
    quality = report.quality
    made = None if quality is None or quality.kl is None else (report.best.peak_nbytes, quality.kl)
    return fronts(lines, made=made)


def _comparisons(report: Report) -> list[tuple[str, list[tuple[str, str, str, str]], int]]:
    """Title, lines as text and the count of equal entries, for the run and for the fitting."""
    pairs: list[tuple[str, Account | None, Account | None]] = [
        ("Running it", report.predicted, report.measured),
        ("Fitting it", report.predicted_fit, report.measured_fit),
    ]
    found = []
    for title, predicted, measured in pairs:
        if predicted is None or measured is None:
            continue
        lines, equal = comparison_lines(predicted, measured)
        texts = [
            (
                line.what,
                format_size(line.predicted_nbytes),
                format_size(line.measured_nbytes),
                format_error(line),
            )
            for line in lines
        ]
        found.append((title, texts, equal))
    return found
