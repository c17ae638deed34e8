"""The report of a training run: what was planned, what happened, what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from statistics import median
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfit.units import format_size

VERSION: Final = 1
_WIDTH, _HEIGHT = 760, 240


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """All that is known of a run."""

    model: str
    data: str
    out: str
    plan: Mapping[str, Any]
    """The plan's JSON, its `predicted` account with it."""
    records: tuple[Mapping[str, Any], ...]
    """Each step."""
    scores: tuple[Mapping[str, float], ...] = ()
    """Each evaluation."""
    notes: tuple[tuple[int, str], ...] = ()
    """What had to be changed on the way, and at which step."""
    data_notes: tuple[str, ...] = ()
    """What of the data is left out or cut, or makes one doubt it."""
    measured_nbytes: int | None = None
    """The largest peak of a step: allocated on a GPU, resident growth on a CPU while no freed memory waited."""
    classification: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        return [float(record["loss"]) for record in self.records]

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps."""
        rates = [record["tokens"] / max(record["seconds"], 1e-9) for record in self.records]
        return float(median(rates)) if rates else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self), "tokens_per_second": self.tokens_per_second}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrainReport":
        kept = {key: value for key, value in data.items() if key not in ("version", "tokens_per_second")}
        kept |= {"records": tuple(kept["records"]), "scores": tuple(kept["scores"])}
        kept["data_notes"] = tuple(kept.get("data_notes", ()))
        kept["notes"] = tuple((int(step), str(what)) for step, what in kept["notes"])
        return cls(**kept)


def lines_of(report: TrainReport) -> list[tuple[str, str]]:
    """Name and figure of each thing worth knowing."""
    plan = report.plan
    found = [("trained", f"{len(report.records)} steps on {report.data}")]
    if report.losses:
        found.append(("loss", f"{report.losses[0]:.4f} at the first step, {report.losses[-1]:.4f} at the last"))
    if report.scores:
        last = report.scores[-1]
        told = [(name, value) for name, value in last.items() if name not in ("step", "score", "loss")]
        found += [(f"held-out {name}", f"{value:.4f}") for name, value in told]
        found.append(("held-out loss", f"{last['loss']:.4f}"))
    if report.classification is not None:
        low, high = report.classification["accuracy_interval"]
        found.append(("accuracy, 95 %", f"{low:.4f} to {high:.4f} ({report.classification['rows']} rows)"))
        low, high = report.classification["f1_interval"]
        found.append(("F1, 95 %", f"{low:.4f} to {high:.4f}"))
        of = report.classification
        found.append(("precision, recall", f"{of['precision']:.4f}, {of['recall']:.4f}"))
    found.append(("speed", f"{report.tokens_per_second:.0f} tokens/s"))
    found.append(("budget", format_size(plan["budget_nbytes"])))
    found.append(("peak, predicted", f"{format_size(plan['predicted']['peak_nbytes'])} allocated"))
    if report.measured_nbytes is not None:
        what = "allocated" if plan["device"] == "cuda" else "resident growth: what was allocated, and libraries' own"
        over = report.measured_nbytes - plan["budget_nbytes"]
        if over > 0 and plan["device"] != "cuda":
            what += ", which the budget does not bound"
        found.append(("peak, measured", f"{format_size(report.measured_nbytes)} {what}"))
    if (waited := _waited(report)) is not None:
        found.append(("freed memory", waited))
    found += [("learned otherwise", change) for change in plan["changes"]] or [("learned otherwise", "nothing")]
    found += [("the data", note) for note in report.data_notes]
    found += [(f"at step {step}", what) for step, what in report.notes]
    if report.certificate is not None:
        gap, floor = report.certificate["gap"], report.certificate["floor"]
        apart = f"loss at most {gap:.2g} apart; plain training whose batches are cut otherwise, {floor:.2g}"
        found.append(("beside plain training", apart))
    return found


def _waited(report: TrainReport) -> str | None:
    """From which step on freed blocks were held to be used again, and what the process had grown by then."""
    waiting = [int(record.get("waiting_nbytes", 0)) for record in report.records]
    later = [record for record, nbytes in zip(report.records, waiting, strict=True) if nbytes > min(waiting)]
    if not later:
        return None
    peak = max(int(record["peak_nbytes"]) for record in later)
    return (
        f"held from step {later[0]['step']} on, to be used again, as the budget has room: steps are faster, and grow "
        f"the process by {format_size(peak)} instead"
    )


def render_training(report: TrainReport) -> RenderableType:
    """The report on a terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in lines_of(report):
        table.add_row(Text(name, style="dim"), value)
    return Group(Text(f"Trained {report.model}", style="bold"), table)


def render_training_plan(plan: Mapping[str, Any], how: str) -> RenderableType:
    """A training plan on a terminal: what is done, what it takes, what it changes."""
    from memfit.account.account import Account

    from .terminal import render_account

    table = Table(box=None, show_header=False, pad_edge=False)
    rows = [("how", how)]
    rows += [("learned otherwise", change) for change in plan["changes"]] or [("learned otherwise", "nothing")]
    slow = plan["slowdown"]
    rows.append(("a step takes", f"about {plan['seconds']:.3g} s, {slow:.2f} times a plain step (from counted work)"))
    if len(plan["rungs"]) > 1:
        least = format_size(plan["rungs"][-1]["peak_nbytes"])
        rows.append(("if memory gets short", f"{len(plan['rungs']) - 1} more frugal ways of the same, down to {least}"))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), value)
    account = Account.from_json(dict(plan["predicted"]))
    title = Text(f"Training plan within {format_size(plan['budget_nbytes'])}", style="italic")
    return Group(title, table, Text(), render_account(account, top=0, budget_nbytes=plan["budget_nbytes"]))


def render_training_page(report: TrainReport) -> str:
    """The report as one HTML page that opens offline: figures, the curve of the loss, peaks beside the budget."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in lines_of(report))
    held = [(float(score["step"]), float(score["loss"])) for score in report.scores]
    curve = _curve([(float(r["step"]), float(r["loss"])) for r in report.records], held, "Loss", None)
    peaks = [(float(r["step"]), float(r["peak_nbytes"]) / 2**20) for r in report.records]
    memory = _curve(peaks, [], "Peak of each step, MiB", report.plan["budget_nbytes"] / 2**20)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{escape(report.model)}: training</title>"
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:800px;margin:2rem auto;padding:0 1rem}"
        "th{text-align:left;font-weight:400;color:#666;padding-right:1rem;vertical-align:top}"
        "svg{width:100%}polyline{fill:none;stroke:#2563eb;stroke-width:1.5}.held{stroke:#d97706;stroke-width:2}"
        ".budget{stroke:#dc2626;stroke-dasharray:4}text{font:12px sans-serif;fill:#666}line{stroke:#ddd}</style>"
        f"<h1>{escape(report.model)}: training</h1><table>{rows}</table>"
        f"<h2>Loss</h2>{curve}<h2>Memory</h2>{memory}</html>\n"
    )


def _curve(
    points: Sequence[tuple[float, float]], held: Sequence[tuple[float, float]], label: str, limit: float | None
) -> str:
    known = [value for _, value in (*points, *held)] + ([] if limit is None else [limit])
    if not points or not known:
        return ""
    low, high = (0.0 if limit is not None else min(known)), max(known)
    first, last = points[0][0], points[-1][0]

    def at(step: float, value: float) -> str:
        x = 60 + (_WIDTH - 80) * (step - first) / max(last - first, 1)
        return f"{x:.1f},{10 + (_HEIGHT - 40) * (high - value) / max(high - low, 1e-12):.1f}"

    parts = []
    for value in (low, (low + high) / 2, high):
        y = at(first, value).split(",")[1]
        parts.append(f'<line x1="60" x2="{_WIDTH - 20}" y1="{y}" y2="{y}"/><text x="4" y="{y}">{value:.4g}</text>')
    parts.append(f'<polyline points="{" ".join(at(*point) for point in points)}"/>')
    if held:
        parts.append(f'<polyline class="held" points="{" ".join(at(*point) for point in held)}"/>')
    if limit is not None:
        y = at(first, limit).split(",")[1]
        parts.append(f'<line class="budget" x1="60" x2="{_WIDTH - 20}" y1="{y}" y2="{y}"/>')
    parts.append(f'<text x="60" y="{_HEIGHT - 8}">step {first:g}</text>')
    parts.append(f'<text x="{_WIDTH - 20}" y="{_HEIGHT - 8}" text-anchor="end">step {last:g}</text>')
    body = "".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'
