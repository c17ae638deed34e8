"""A model id, a directory, a GGUF or a live module: a model, fake or real, read strictly."""

from memfit.source.check import check
from memfit.source.live import fake_copy
from memfit.source.load import load
from memfit.source.source import Source, open_source, source_from_config

__all__ = ["Source", "check", "fake_copy", "load", "open_source", "source_from_config"]
