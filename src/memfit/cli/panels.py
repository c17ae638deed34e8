"""Where each option stands in `--help`: those that belong together, together."""

from typing import Any, Final

from typer.core import TyperCommand

_PANELS: Final = {
    "The task": ("task", "batch", "prompt", "new_tokens", "sequence", "device", "routing"),
    "What may be chosen": (
        "bits", "groups", "values", "vector", "kv_bits", "keep", "asymmetric", "activations", "smooth", "allow", "full",
        "adapters", "slowdown",
    ),
    "One setting for everything": ("technique", "sparsity", "pattern", "rank", "algorithm"),
    "A narrower model": (
        "blocks", "heads", "channels", "experts", "distil", "steps", "lr", "training_budget",
    ),
    "The text, and quality": ("text", "window", "windows", "max_kl"),
    "Learning": (
        "epochs", "weight_decay", "clip", "schedule", "warmup", "optimizer", "seed", "certify",
    ),
    "A teacher": ("teacher", "alpha", "temperature", "kl", "match", "match_weight", "teacher_top", "teacher_in"),
    "Evaluating and saving": (
        "evaluation", "evaluate_every", "save_every", "text_column", "label_column", "tensorboard",
    ),
    "The work itself": ("ram", "enforce", "resume", "overwrite", "threads", "measure", "measured", "resident"),
    "What is printed": ("as_json", "quiet", "top"),
}  # fmt: skip
_IN_TRAINING: Final = {"steps": "Learning", "lr": "Learning"}
"""Of `train`, where they are not about distilling on the way."""


class Panelled(TyperCommand):
    """A command whose options stand in panels by what they are about; the rest comes first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        panels = {name: panel for panel, names in _PANELS.items() for name in names}
        if self.name == "train":
            panels |= _IN_TRAINING
        for parameter in self.params:
            if parameter.param_type_name == "option" and parameter.name in panels:
                parameter.rich_help_panel = panels[parameter.name]  # type: ignore[attr-defined]
