"""How good and how fast a fitted model is."""

from memfit.evaluate.divergence import compare_logits, compare_models, record_logits, recording
from memfit.evaluate.quality import Quality
from memfit.evaluate.speed import Speed, measure_speed
from memfit.evaluate.text import read_text, windows

__all__ = [
    "Quality",
    "Speed",
    "compare_logits",
    "compare_models",
    "measure_speed",
    "read_text",
    "record_logits",
    "recording",
    "windows",
]
