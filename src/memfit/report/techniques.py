"""What each technique alone was expected to give, and all together: one table for the terminal and the page."""

from typing import Any, Final

from memfit.report.report import Report
from memfit.units import format_size

HEAD: Final = ("technique", "smallest, about", "expected KL", "within the budget", "expected KL", "alone dominated by")

LEGEND: Final = (
    "The smallest peak that each can reach and what is expected there; then its best plan within the budget. A "
    "technique is dominated by another that is expected to lose no more at any peak."
)


def technique_rows(report: Report) -> list[tuple[str, ...]]:
    """A row for each: its smallest peak and the divergence expected there, and the same of its best plan within the
    budget; none where one technique alone was allowed."""
    if len(report.fronts) < 2:
        return []
    return [_row(name, line, report.budget_nbytes) for name, line in report.fronts.items() if line["points"]]


def tried_line(report: Report) -> str | None:
    """What the plans lost that were made and judged beside each other; None where only one was made."""
    if not report.tried:
        return None
    taken = min(report.tried, key=report.tried.__getitem__)
    what = "1 - cosine" if report.quality is not None and report.quality.kl is None else "KL"
    told = ", ".join(f"{name} {lost:.3g}" for name, lost in report.tried.items())
    return f"Made and judged beside each other, {what}: {told}. Taken: {taken}."


def _row(name: str, line: dict[str, Any], budget_nbytes: int | None) -> tuple[str, ...]:
    least = min(line["points"], key=lambda point: (point["nbytes"], point["kl"]))
    within = [point for point in line["points"] if budget_nbytes is None or point["nbytes"] <= budget_nbytes]
    best = min(within, key=lambda point: (point["kl"], point["nbytes"]), default=None)
    told = ("does not fit", "") if best is None else (format_size(best["nbytes"]), f"{best['kl']:.2g}")
    return (name, format_size(least["nbytes"]), f"{least['kl']:.2g}", *told, line["dominated_by"] or "")
