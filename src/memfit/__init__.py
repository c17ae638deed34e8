"""Give memfit a language model and a memory budget: it makes the model fit, and proves it."""

__version__ = "0.1.0"
