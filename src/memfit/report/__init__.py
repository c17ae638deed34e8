"""What was asked, planned, predicted and measured: on a terminal, as a page, a card, and JSON."""

from memfit.report.card import model_card
from memfit.report.machine import describe_machine, describe_versions
from memfit.report.page import render_page
from memfit.report.report import Report
from memfit.report.terminal import (
    render_account,
    render_comparison,
    render_plan,
    render_quality,
    render_report,
)

__all__ = [
    "Report",
    "describe_machine",
    "describe_versions",
    "model_card",
    "render_account",
    "render_comparison",
    "render_page",
    "render_plan",
    "render_quality",
    "render_report",
]
