"""A small trained model and two texts, shipped so that memfit can be tried and tested without a download.

`tools/train_demo.py` made them; `model/README.md` is the model card.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["calibration_text", "heldout_text", "model_directory"]

_HERE = Path(__file__).parent


def model_directory() -> Path:
    """Directory of the model and its tokenizer, as `from_pretrained` takes it."""
    return _HERE / "model"


def calibration_text() -> Path:
    """About 300 kB of the text the model was trained on, in pieces of about 2 kB, for calibrating."""
    return _HERE / "calibration.txt"


def heldout_text() -> Path:
    """About 300 kB of text the model was not trained on, for measuring its quality."""
    return _HERE / "heldout.txt"
