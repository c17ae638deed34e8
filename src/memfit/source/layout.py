"""Which stored tensors make which parameter of the model: renames, prefixes, experts merged, ties.

The renames are transformers' own (its conversion mapping), so that memfit reads what transformers reads.
Letters: E experts, I the width between gate/up and down, D the model's width.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from memfit.errors import BrokenInput
from memfit.source.checkpoint import TensorInfo


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One stored tensor and the contiguous part of a parameter that it fills."""

    tensor: str
    index: int | None = None
    """The expert that it is, of a parameter [E, ...]; None: the parameter has no such dimension."""
    start: int | None = None
    """First row that it fills; None: it fills them all."""
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each parameter and persistent buffer of a model is found in a checkpoint."""

    pieces: Mapping[str, tuple[Piece, ...]]
    """Model name to the stored tensors that fill it; tied parameters under the name of the one they share."""
    duplicates: Mapping[str, str] = field(default_factory=dict)
    """Stored tensors that are second copies of a tied parameter, to the stored tensor that is read."""
    ignored: tuple[str, ...] = ()
    """Stored tensors that the model has no use for, by transformers' own declarations."""
    unexpected: tuple[str, ...] = ()
    """Stored tensors that nothing accounts for."""


# Masks and tables that older versions of transformers stored and newer ones compute.
_OLD_BUFFERS = (
    r"rotary_emb\.inv_freq$",
    r"(^|\.)position_ids$",
    r"(^|\.)embed_scale$",
    r"(^|\.)attn\.(bias|masked_bias)$",
    r"(^|\.)attention\.(bias|masked_bias)$",
)


def lay_out(model: nn.Module, tensors: Mapping[str, TensorInfo], *, ties: Mapping[str, str]) -> Layout:
    """The layout of `model` in a checkpoint with these tensors.

    Args:
        model: a skeleton; only names and shapes are looked at.
        tensors: what the checkpoint holds.
        ties: name of a tied parameter to the name of the one it shares.

    Raises:
        BrokenInput: two stored tensors claim the same place, or a conversion that memfit cannot do is needed.
    """
    wanted = model.state_dict(keep_vars=True)  # as it is: detaching would dispatch
    found: dict[str, list[Piece]] = {}
    leftover: list[str] = []
    claims = _claims(model, tensors, wanted)
    for target, sources in claims.items():
        if target in wanted:
            found[target] = _pieces(target, sources, tensors)
        else:
            leftover += [tensor for names in sources.by_pattern.values() for tensor in names]
    duplicates: dict[str, str] = {}
    for target, source in ties.items():
        mine = found.pop(target, None)
        if mine is None:
            continue
        if source not in found:
            found[source] = mine
        elif len(mine) == len(found[source]):
            duplicates |= {a.tensor: b.tensor for a, b in zip(mine, found[source], strict=True)}
    ignore = [*_OLD_BUFFERS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    pattern = re.compile("|".join(f"({one})" for one in ignore))
    # A table that the model computes may be stored too, as memfit does for stock transformers' sake.
    computed = {name for name, _ in model.named_buffers()}
    ignored = {name for name in leftover if pattern.search(name) or name in computed}
    return Layout(
        pieces={name: tuple(found[name]) for name in wanted if name in found},
        duplicates=duplicates,
        ignored=tuple(sorted(ignored)),
        unexpected=tuple(sorted(set(leftover) - ignored)),
    )


@dataclass
class _Claim:
    """The stored tensors that go into one parameter, by the pattern that sent them there."""

    converter: Any
    by_pattern: dict[str | None, list[str]]


def _claims(model: nn.Module, tensors: Iterable[str], wanted: Mapping[str, Any]) -> dict[str, _Claim]:
    """Each stored tensor's target in the model, by the rules that transformers loads with."""
    renamings, converters, prefix = _rules(model)
    if renamings or converters:
        from transformers.core_model_loading import rename_source_key
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    claims: dict[str, _Claim] = {}
    for name in sorted(tensors, key=_natural):
        pattern = None
        if name in wanted:
            target = name
        elif renamings or converters:
            target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        else:
            target = name
        claim = claims.setdefault(target, _Claim(by_pattern.get(pattern), {}))
        claim.by_pattern.setdefault(pattern, []).append(name)
    return claims


def _rules(model: nn.Module) -> tuple[list[Any], list[Any], str | None]:
    """transformers' renamings and converters for this model, and its base model's prefix."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    if not isinstance(model, PreTrainedModel):
        return [], [], None
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return renamings, converters, model.base_model_prefix


def _pieces(target: str, claim: _Claim, tensors: Mapping[str, TensorInfo]) -> list[Piece]:
    """Where in `target` each of its stored tensors goes."""
    names = claim.by_pattern
    every = [name for group in names.values() for name in group]
    if claim.converter is None or None in names:
        if len(every) > 1:
            raise BrokenInput(
                f"{tensors[every[1]].file}: tensors {every[0]!r} and {every[1]!r} are both meant for "
                f"{target!r}. "
                "Remove the one that is not right."
            )
        return [Piece(tensor=every[0])]
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in claim.converter.operations]
    merged = steps[:1] == [("MergeModulelist", 0)]
    rows_at = 1 if merged else 0
    if steps[1 if merged else 0 :] not in ([], [("Concatenate", rows_at)]):
        raise BrokenInput(
            f"{tensors[every[0]].file}: {target!r} would have to be made of {len(every)} tensors, "
            f"{every[0]!r} the "
            f"first, by {', '.join(name for name, _ in steps)}, which memfit does not do. Load the "
            "model with "
            "transformers, save it with save_original_format=False, and give that to memfit."
        )
    pieces: list[Piece] = []
    start = 0
    for pattern in claim.converter.source_patterns:
        group = names.get(pattern, [])
        if not group:
            raise BrokenInput(
                f"{tensors[every[0]].file}: {target!r} lacks its part {pattern!r}; only {every[0]!r} "
                "and the like "
                "are there. Fetch the whole checkpoint."
            )
        rows = tensors[group[0]].shape[0] if tensors[group[0]].shape else 1
        for number, name in enumerate(group):
            pieces.append(Piece(tensor=name, index=number if merged else None, start=start, rows=rows))
        start += rows
    return pieces


def check_pieces(
    name: str,
    pieces: Iterable[Piece],
    tensors: Mapping[str, TensorInfo],
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Raise BrokenInput unless these stored tensors fill exactly `shape`, with `dtype`'s kind of numbers."""
    numbers = 0
    for piece in pieces:
        info = tensors[piece.tensor]
        wanted = shape if piece.index is None else shape[1:]
        if piece.rows is not None:
            wanted = (piece.rows, *wanted[1:])
        numbers += info.nbytes // info.dtype.itemsize
        if info.shape != wanted or (piece.index is not None and piece.index >= shape[0]):
            raise BrokenInput(
                f"{info.file}: tensor {info.name!r} has the shape {info.shape}; {name!r} of the model "
                f"takes {wanted}. "
                "Config and weights do not belong together: fetch both again."
            )
        if info.dtype.is_floating_point != dtype.is_floating_point:
            raise BrokenInput(
                f"{info.file}: tensor {info.name!r} has the dtype {info.dtype}; {name!r} of the model "
                f"takes {dtype}. "
                "Take a checkpoint whose weights are stored in the kind of numbers that the model "
                "computes with."
            )
    if numbers != torch.Size(shape).numel():
        raise BrokenInput(
            f"{info.file}: tensor {info.name!r} and those like it hold {numbers} numbers for {name!r} "
            f"of shape {shape}. "
            "Config and weights do not belong together: fetch both again."
        )


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which expert 10 comes after expert 9."""
    return [
        (0, int(part), "") if part.isdecimal() and part.isascii() else (1, 0, part)
        for part in name.split(".")
    ]
