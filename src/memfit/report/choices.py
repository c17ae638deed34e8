"""A plan's choices as few rows for people: equal layers of one kind of block become one row."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memfit.packed.forms import form_of

_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<leaf>.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The same choice for the same tensors of several layers."""

    what: str
    """The tensors, as `self_attn q/k/v_proj` or `lm_head`."""
    layers: tuple[int, ...]
    """Empty for what stands once in the model."""
    scheme: str
    bits: int
    nbytes: int
    price: float
    stack: str = ""

    @property
    def where(self) -> str:
        return ranges(self.layers)


def rows(choices: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of a plan's `choices`, as they stand in its JSON, in the order of the model."""
    merged: dict[tuple[str, str, str], list[tuple[int | None, Mapping[str, Any]]]] = {}
    for choice in choices:
        stack, layer, what = locate(choice["members"] or [choice["name"]])
        merged.setdefault((stack, what, scheme_name(choice["scheme"])), []).append((layer, choice))
    result = [
        Row(
            what=what,
            stack=stack,
            layers=tuple(sorted({layer for layer, _ in found if layer is not None})),
            scheme=scheme,
            bits=bits_of(found[0][1]["scheme"]),
            nbytes=sum(choice["nbytes"] for _, choice in found),
            price=sum(choice.get("price") or 0.0 for _, choice in found),
        )
        for (stack, what, scheme), found in merged.items()
    ]
    order = {(row.stack, row.what): n for n, row in reversed(list(enumerate(result)))}
    return sorted(result, key=lambda row: (order[row.stack, row.what], row.layers))


def grid(choices: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, Mapping[str, Any]]]:
    """(stack, what) -> layer -> choice; layer −1 for what stands once."""
    table: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for choice in choices:
        stack, layer, what = locate(choice["members"] or [choice["name"]])
        table.setdefault((stack, what), {})[-1 if layer is None else layer] = choice
    return table


def locate(members: Iterable[str]) -> tuple[str, int | None, str]:
    """Of a group of modules: the stack it is in, its layer, and its name within the layer."""
    members = list(members)
    found = [_LAYER.fullmatch(name) for name in members]
    layers = {match["layer"] for match in found if match}
    if None in found or len(layers) != 1:
        return "", None, _joined(members)
    match = found[0]
    assert match is not None
    return match["stack"], int(match["layer"]), _joined([m["leaf"] for m in found if m])


def _joined(names: list[str]) -> str:
    """`self_attn.q_proj`, `self_attn.k_proj` -> `self_attn q/k_proj`; experts' numbers become `*`."""
    names = list(dict.fromkeys(_NUMBER.sub("*", name) for name in names))
    if len(names) > 4 and len({name.rpartition(".")[0] for name in names}) > 1:
        return f"{names[0]} and {len(names) - 1} more"
    parents: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parents.setdefault(parent, []).append(leaf)
    parts = []
    for parent, leaves in parents.items():
        tails = {leaf.rpartition("_")[2] for leaf in leaves if "_" in leaf}
        if len(leaves) > 1 and len(tails) == 1 and all("_" in leaf for leaf in leaves):
            leaf = "/".join(leaf.rpartition("_")[0] for leaf in leaves) + "_" + tails.pop()
        else:
            leaf = "/".join(leaves)
        parts.append(f"{parent} {leaf}".strip())
    return ", ".join(parts)


def smoothed_line(norms: Iterable[str]) -> str:
    """`Smoothed: input_layernorm (0-17), pre_feedforward_layernorm (0-3, 5-17)`, layers in brackets."""
    layers: dict[str, list[int]] = {}
    for name in norms:
        _, layer, what = locate([name])
        layers.setdefault(what, []).extend([] if layer is None else [layer])
    return "Smoothed: " + ", ".join(f"{what} ({ranges(n)})" if n else what for what, n in layers.items())


def narrowed_line(narrowed: Mapping[str, Any]) -> str:
    """`Blocks 3, 7-8 are gone. Of each that is left stay 1408 channels.`, of a plan's `narrowed`."""
    gone, stay = narrowed.get("dropped") or [], []
    for what in ("heads", "channels", "experts"):
        if narrowed.get(what) is not None:
            stay.append(f"{narrowed[what]} {what}")
    lines = []
    if gone:
        lines.append(f"Block {gone[0]} is gone." if len(gone) == 1 else f"Blocks {ranges(gone)} are gone.")
    return " ".join(lines + ([f"In each block {' and '.join(stay)} stay."] if stay else []))


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7, 9-17`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def scheme_name(scheme: Mapping[str, Any] | None) -> str:
    """`int4 g128`, or `bf16` for what stays as it is."""
    return "bf16" if scheme is None else form_of(scheme).name


def bits_of(scheme: Mapping[str, Any] | None) -> int:
    """Bits of one value."""
    return 16 if scheme is None else form_of(scheme).bits
