"""The page's pictures: SVG written by hand, so that the page needs nothing beside itself.

Colours come from the page's style sheet (`--parameter`, `--ink` ...), so that they follow its light and dark
themes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from memfit.account.account import Account
from memfit.report.choices import bits_of, grid, scheme_name
from memfit.units import format_size

_WIDTH: Final = 720
_LABEL: Final = 150
_ROW: Final = 26
_CELL: Final = 16


def bars_at_peak(accounts: Sequence[tuple[str, Account]], *, budget_nbytes: int | None = None) -> str:
    """A stacked bar for each account: its bytes at the peak by kind; the budget is a line through all."""
    scale = max([account.peak_nbytes for _, account in accounts] + [budget_nbytes or 0, 1]) * 1.02
    width = _WIDTH - _LABEL - 90
    parts: list[str] = []
    for n, (label, account) in enumerate(accounts):
        top = n * (_ROW + 8) + 18
        parts.append(_text(_LABEL - 8, top + 17, label, anchor="end"))
        left = float(_LABEL)
        for kind, nbytes in sorted(account.peak.alive.items(), key=lambda item: -item[1]):
            length = width * nbytes / scale
            share = 100 * nbytes / max(account.peak_nbytes, 1)
            title = f"{kind}: {format_size(nbytes)} ({share:.1f} %)"
            parts.append(_box(left, top, length, _ROW, f"var(--{kind.replace('_', '-')})", title))
            left += length
        parts.append(_text(left + 6, top + 17, format_size(account.peak_nbytes)))
    height = len(accounts) * (_ROW + 8) + 18
    if budget_nbytes is not None:
        x = _LABEL + width * budget_nbytes / scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{height}" class="budget"/>')
        anchor = "end" if x > _WIDTH - 180 else "start"
        parts.append(_text(x, 11, f"budget {format_size(budget_nbytes)}", anchor=anchor))
    return _svg(_WIDTH, height + 4, parts, "Bytes at the peak, by kind")


def strip_of_bits(choices: Iterable[Mapping[str, Any]]) -> str:
    """A row for each kind of tensor, a cell for each layer, coloured by its bits."""
    table = grid(choices)
    layers = max((layer for row in table.values() for layer in row), default=0) + 1
    label = 230
    cell = max(3.0, min(float(_CELL), (_WIDTH - label) / max(layers, 1)))
    parts: list[str] = []
    for n, ((_, what), row) in enumerate(table.items()):
        top = n * (_CELL + 3)
        parts.append(_text(label - 8, top + 13, what, anchor="end"))
        for layer, choice in sorted(row.items()):
            where = f"layer {layer}, " if layer >= 0 else ""
            bits, name = bits_of(choice["scheme"]), scheme_name(choice["scheme"])
            title = f"{where}{what}: {name}, {format_size(choice['nbytes'])}"
            # What stands once in the model has no layer; it is drawn as wide as two.
            left, width = (label + layer * cell, cell - 1) if layer >= 0 else (float(label), 2 * cell - 1)
            parts.append(_box(left, top, width, _CELL, f"var(--bits-{bits})", title))
    axis = len(table) * (_CELL + 3) + 12
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if layers / s <= 20) if layers <= 2000 else layers
    if layers > 1:
        parts += [
            _text(label + (layer + 0.5) * cell, axis, str(layer), anchor="middle")
            for layer in range(0, layers, step)
        ]
    return _svg(_WIDTH, axis + 6, parts, "Bits of each tensor, by layer")


_STYLES: Final = ("parameter", "activation", "kv-cache", "temporary", "buffer")
_LEAST_KL: Final = 1e-6


def fronts(lines: Mapping[str, Sequence[Mapping[str, Any]]], *, made: tuple[int, float] | None = None) -> str:
    """KL against bytes, on a logarithmic scale: a line of points `{nbytes, kl}` for each name; `made`: bytes and KL
    that were measured, a filled point."""
    every = [(p["nbytes"], p["kl"]) for points in lines.values() for p in points] + ([made] if made else [])
    if not every:
        return ""
    height, left, bottom = 280, 70, 34
    least, most = min(nbytes for nbytes, _ in every), max(nbytes for nbytes, _ in every)
    span = max(most - least, 1)
    exponents = [math.log10(max(kl, _LEAST_KL)) for _, kl in every]
    low, high = math.floor(min(exponents)), max(math.ceil(max(exponents)), math.floor(min(exponents)) + 1)

    def at(nbytes: float, kl: float) -> tuple[float, float]:
        x = left + 12 + (_WIDTH - left - 150) * (nbytes - least) / span
        return x, (height - bottom) * (high - math.log10(max(kl, _LEAST_KL))) / (high - low) + 6

    parts = []
    for exponent in range(low, high + 1):
        _, y = at(least, 10.0**exponent)
        parts.append(f'<line class="grid" x1="{left}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{10.0**exponent:g}", anchor="end"))
    for n, (name, points) in enumerate(lines.items()):
        style = f"stroke:var(--{_STYLES[n % len(_STYLES)]})"
        ordered = sorted((at(p["nbytes"], p["kl"]), p) for p in points)
        line = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _ in ordered)
        parts.append(f'<polyline class="front" style="{style}" points="{line}"/>')
        for (x, y), point in ordered:
            title = escape(f"{name}, {format_size(point['nbytes'])}: KL {point['kl']:.4g}")
            circle = f'<circle class="point" style="{style}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            parts.append(f"{circle}<title>{title}</title></circle>")
        parts.append(f'<line class="front" style="{style}" x1="{_WIDTH - 122}" x2="{_WIDTH - 104}" '
                     f'y1="{14 + 18 * n}" y2="{14 + 18 * n}"/>')  # fmt: skip
        parts.append(_text(_WIDTH - 98, 18 + 18 * n, name))
    if made is not None:
        x, y = at(*made)
        title = escape(f"measured, {format_size(made[0])}: KL {made[1]:.4g}")
        parts.append(f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{title}</title></circle>')
    for nbytes in dict.fromkeys((least, most)):
        x, _ = at(nbytes, 1.0)
        parts.append(_text(x, height - 8, format_size(nbytes), anchor="middle"))
    return _svg(_WIDTH, height, parts, "KL divergence against bytes")


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _box(x: float, y: float, width: float, height: float, fill: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:g}" width="{max(width, 0.0):.1f}" height="{height:g}" style="fill:{fill}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
