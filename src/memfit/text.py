"""The text that quality is priced and measured on, and its windows, cut for the jobs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from memfit import demo
from memfit.errors import UsageError
from memfit.evaluate.text import read_text, special_tokens, windows
from memfit.source.source import Source

_LOGITS_NBYTES: Final = 2 << 30
"""The most the original's logits may take on the disk, unless the windows are counted by the caller."""
_RUN: Final = 8
"""Tokens in a row by which a text that repeats itself is told."""
_LEAST_DIFFERENT: Final = 0.02
"""Share of all such runs: of prose and of programs nearly all are different, of one paragraph over and over fewer."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text that quality is priced and measured on: one part to calibrate on, another to evaluate on."""

    calibration: str
    evaluation: str
    length: int = 256
    """Tokens of a window."""
    calibration_windows: int = 16
    evaluation_windows: int | None = None
    """None: up to 16, fewer where the vocabulary is so large that their logits would not fit 2 GiB."""
    name: str = "the text"
    """For messages: the file that it was read from."""

    @classmethod
    def from_file(cls, file: str | Path, **options: Any) -> "Text":
        text = read_text(file)
        half = _middle(text)
        return cls(calibration=text[:half], evaluation=text[half:], name=str(file), **options)

    @classmethod
    def of_demo(cls, **options: Any) -> "Text":
        """The text shipped with the demo model; the part to evaluate on was never trained on."""
        return cls(
            calibration=read_text(demo.calibration_text()),
            evaluation=read_text(demo.heldout_text()),
            name="the demo model's own text",
            **options,
        )


def _middle(text: str) -> int:
    """Where a text is cut in two: after the first line that ends in its second half, if that leaves enough of it."""
    half = len(text) // 2
    end = text.find("\n", half) + 1
    return end if 0 < end < len(text) - half // 2 else half


def text_of(text: Text | str | Path | None, source: Source) -> Text | None:
    """What a caller gave: a text cut already, or a file to cut in two halves. The demo model has its own."""
    if text is None and source.is_demo:
        return Text.of_demo()
    return text if isinstance(text, Text) or text is None else Text.from_file(text)


def write_windows(source: Source, text: Text, work: Path, *, calibrates: bool = True) -> None:
    """Cut the text into windows and leave them in `work`, for the jobs; those to calibrate on, if anything does.

    Raises:
        UsageError: a part of the text is too short or says nothing; the tokenizer does not match the model.
    """
    tokenizer = source.tokenizer()
    vocabulary: int | None = getattr(source.config.get_text_config(), "vocab_size", None)
    affordable = max(1, _LOGITS_NBYTES // (2 * (vocabulary or 1) * text.length))
    evaluated = text.evaluation_windows or min(16, affordable)
    cut = {"evaluation": _windows(tokenizer, text, "judge", text.evaluation, evaluated)}
    if calibrates:
        cut["calibration"] = _windows(tokenizer, text, "calibrate", text.calibration, text.calibration_windows)
    largest = max(int(windows_WT.max()) for windows_WT in cut.values())
    if vocabulary is not None and largest >= vocabulary:
        # A table's rows are looked up as they pass by: what is not among them would be left as memory happens to be.
        raise UsageError(
            f"{source.name}: the tokenizer gives the id {largest}, and the model knows {vocabulary} ids: they do not "
            "belong together. Give the model's own tokenizer."
        )
    torch.save(cut, work / "windows.pt")


def told_of(text: Text, work: Path) -> dict[str, Any]:
    """For the record: the text's name and the SHA-256 of all of it, and how much of it was used, by the windows that
    `write_windows` has left in `work`."""
    cut = torch.load(work / "windows.pt", weights_only=True)
    return {
        "name": text.name,
        "sha256": hashlib.sha256((text.calibration + text.evaluation).encode()).hexdigest(),
        "window": text.length,
        "calibration_windows": len(cut["calibration"]),
        "evaluation_windows": len(cut["evaluation"]),
    }


def _windows(tokenizer: Any, text: Text, use: str, words: str, most: int) -> torch.Tensor:
    """As many windows as a part of the text has, up to `most`."""
    try:
        found = windows(tokenizer, words, length=text.length, most=most)
    except UsageError as error:
        raise UsageError(
            f"{text.name}: the part to {use} on, half of a file, is too short: {error} The other half takes as many; "
            "--window of `fit` sets the length of a window."
        ) from error
    before, after = (len(tokens) for tokens in special_tokens(tokenizer))
    body = found[:, before : text.length - after]
    if bool((body == body[0, 0]).all()):
        token = tokenizer.decode(body[0, :1])
        raise UsageError(
            f"{text.name}: the part to {use} on is one token, {token!r}, {body.numel()} times over: it says nothing of "
            "what the model does with others. Give a text such as the model is used on."
        )
    run = min(_RUN, body.shape[1])
    runs = body.unfold(1, run, 1).flatten(0, 1)
    different = torch.unique(runs, dim=0).shape[0]
    if different < _LEAST_DIFFERENT * runs.shape[0]:
        raise UsageError(
            f"{text.name}: the part to {use} on repeats itself: of its {runs.shape[0]} runs of {run} tokens "
            f"{different} are different. It says little of what the model does with others. Give a text such as the "
            "model is used on."
        )
    return found
