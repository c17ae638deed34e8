"""Sizes as people write them, bytes as integers inside."""

import re
from collections.abc import Callable
from typing import Final

_UNITS: Final = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
}  # fmt: skip
_SIZE: Final = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z%]*)\s*")


def parse_size(text: str | int, *, whole_nbytes: int | Callable[[], int] | None = None) -> int:
    """Bytes meant by `text`: `400MiB`, `0.5GB`, `1073741824`, or `50%` of `whole_nbytes`; a function is asked only
    where there is a share.

    Raises:
        ValueError: the text is no size, or a share was given with nothing to take it of.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size. Write 400MiB, 0.5GB, 50% or a number of bytes.")
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        if whole_nbytes is None:
            raise ValueError(
                f"{text!r} is a share, and there is nothing here to take it of. Write a size, as 400MiB."
            )
        return int((whole_nbytes if isinstance(whole_nbytes, int) else whole_nbytes()) * number / 100)
    if unit not in _UNITS:
        raise ValueError(
            f"{text!r}: unknown unit {match[2]!r}. Known: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, %."
        )
    return int(number * _UNITS[unit])


def share_of(text: object) -> float | None:
    """The share meant by a text as `70%`: 0.7; None if it is none."""
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    return float(match[1]) / 100 if match is not None and match[2] == "%" else None


def format_size(nbytes: int) -> str:
    """`nbytes` in the largest binary unit that keeps a digit before the point: `11.50 GiB`."""
    size, sign = float(abs(nbytes)), "-" if nbytes < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.2f} {unit}"
        size /= 1024
    return f"{sign}{size:.2f} TiB"


def both_sizes(allowed: int, needed: int) -> str:
    """`9.00 MiB allowed, 9.04 MiB`: in bytes where the two would else look the same."""
    sizes = [format_size(allowed), format_size(needed)]
    if sizes[0] == sizes[1]:
        sizes = [f"{allowed} bytes", f"{needed} bytes"]
    return f"{sizes[0]} allowed, {sizes[1]}"
