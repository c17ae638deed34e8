"""Text into windows of tokens."""

from pathlib import Path
from typing import Any, Final

import torch
from torch import LongTensor, Tensor

from memfit.errors import UsageError

_CHARACTERS: Final = 6
"""Of a token, at first sight; prose has four."""
_SPARE: Final = 1024
"""Tokens between those that are used and where a text is cut, which might change the last ones before it."""


def read_text(path: str | Path) -> str:
    """The text of a file, which must be UTF-8.

    Raises:
        UsageError: there is no such file, or it is no UTF-8; the message names the offset of the first bad
        byte.
    """
    path = Path(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise UsageError(
            f"{path}: no UTF-8 text (byte 0x{bad:02x} at offset {error.start}). "
            "Convert it, or name another file."
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}). Name a file of UTF-8 text.") from error


def windows(
    tokenizer: Any, text: str, *, length: int = 512, count: int | None = None, skip: int = 0, most: int | None = None
) -> LongTensor:
    """Consecutive windows of the text's tokens, [W, length], each with the special tokens the model expects.

    Where the tokenizer begins a text with a special token (BOS, [CLS]) or ends it with one, every window has
    it too: models such as Gemma are far off their training without. What does not fill a window is left out.

    `skip`: windows left out at the start, as those that a calibration has seen. `count`: how many; None: all that
    there are, `most` of them.

    Raises:
        UsageError: the text has fewer tokens than asked for.
    """
    if length < 2:
        raise UsageError(f"a window of {length} token has nothing to predict. Use 2 or more.")
    if skip < 0 or (count is not None and count < 1):
        raise UsageError(f"count must be 1 or more and skip 0 or more, got count {count}, skip {skip}.")
    prefix, suffix = special_tokens(tokenizer)
    body = length - len(prefix) - len(suffix)
    if body < 1:
        raise UsageError(
            f"windows of {length} tokens leave no room beside {len(prefix) + len(suffix)} special ones."
        )
    wanted = skip + (1 if count is None else count)
    upto = most if count is None else count
    ids = first_tokens(tokenizer, text, None if upto is None else (skip + upto) * body)
    if len(ids) < wanted * body:
        raise UsageError(
            f"there are {len(ids)} tokens, and {wanted * body} are needed for "
            f"{'a window' if wanted == 1 else f'{wanted} windows'} of {length}"
            + (f" ({skip} of them skipped)" if skip else "")
            + f". Give a longer text, or shorter{'' if wanted == 1 else ' or fewer'} windows."
        )
    last = len(ids) // body if count is None else skip + count
    rows = [prefix + ids[start * body : (start + 1) * body] + suffix for start in range(skip, last)]
    result: Tensor = torch.tensor(rows, dtype=torch.long)
    return result  # type: ignore[return-value]  # torch types LongTensor as a class of its own


def first_tokens(tokenizer: Any, text: str, most: int | None = None) -> list[int]:
    """The first `most` tokens of a text, without special ones; all if it has fewer, or for None.

    No more of the text is read than has them and some to spare: a tokenizer takes 200 bytes for each token.
    """
    end = len(text) if most is None else _CHARACTERS * (most + _SPARE)
    while True:
        ids: list[int] = tokenizer(text[:end], add_special_tokens=False, verbose=False)["input_ids"]
        if most is None or end >= len(text) or len(ids) >= most + _SPARE:
            return ids[:most]
        end *= 2


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    sample = "a b"
    bare = tokenizer(sample, add_special_tokens=False)["input_ids"]
    full = tokenizer(sample)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start]), list(full[start + len(bare) :])
    raise UsageError(
        "the tokenizer encodes a text differently with special tokens; windows cannot be cut for it."
    )
