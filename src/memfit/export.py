"""A model in a file that other programs run, told in order: calibrate, write, compare with the original.

GGUF, in llama.cpp's own mixtures: its widths are the format's, so there is no plan, and no budget but the mixture's.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from memfit.account.account import Account
from memfit.account.dry_run import no_collection
from memfit.errors import UsageError
from memfit.evaluate.quality import Quality
from memfit.format.gguf import require_place
from memfit.format.gguf_mixture import MIXTURES
from memfit.format.gguf_model import architecture_of
from memfit.measuring import evaluate
from memfit.plan.allowed import Allowed
from memfit.source.check import check
from memfit.source.source import Source, open_source
from memfit.steps import job_on, predict_gguf
from memfit.task.infer import Infer
from memfit.text import Text, text_of, told_of, write_windows
from memfit.worker import run_job

GGUF: Final = "gguf:"


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, what it took, and how near it is."""

    model: str
    out: str
    mixture: str
    nbytes: int
    """Of the file."""
    bits_a_weight: float
    """Of the tensors in it."""
    kinds: dict[str, int]
    """Type of blocks to the number of tensors of it."""
    predicted: Account
    """Of writing it: allocated bytes."""
    measured: Account
    text: Mapping[str, Any] | None
    """What it was made and judged on, as a report has it; None without a text."""
    quality: Quality | None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model, "out": self.out, "mixture": self.mixture, "nbytes": self.nbytes,
            "bits_a_weight": self.bits_a_weight, "kinds": self.kinds, "predicted": self.predicted.to_json(),
            "measured": self.measured.to_json(), "text": None if self.text is None else dict(self.text),
            "quality": None if self.quality is None else self.quality.to_json(),
        }  # fmt: skip


def mixture_of(form: str) -> str:
    """`gguf:q4_k_m` -> `Q4_K_M`.

    Raises:
        UsageError: no form, or no mixture, that is written.
    """
    mixture = form.removeprefix(GGUF).upper()
    if not form.startswith(GGUF) or mixture not in MIXTURES:
        known = ", ".join(GGUF + name.lower() for name in MIXTURES)
        raise UsageError(f"the format {form!r} is not written. Known are compressed-tensors, onnx, {known}.")
    return mixture


def export(
    model: str | Path,
    form: str,
    out: str | Path | None = None,
    *,
    text: Text | str | Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Export:
    """Write `model` in a form that other programs run.

    Args:
        model: a hub id or a directory, with its tokenizer.
        form: `gguf:` and llama.cpp's name of a mixture, as `gguf:q4_k_m`.
        out: the file; default: `NAME-MIXTURE.gguf` here. It is there once it is whole and judged, not before.
        text: what weighs the errors, by its first half; the second judges the result. The demo model has its own.

    Raises:
        UsageError: the form, the architecture or the target is not fit for it.
    """
    mixture = mixture_of(form)
    source = open_source(model)
    target = Path(out) if out is not None else Path(f"{source.stem}-{mixture.lower()}.gguf")
    require_place(target, overwrite=overwrite)
    check(source)
    if source.checkpoint is None or source.gguf is not None:
        raise UsageError(f"{source.name}: a GGUF file is written of a directory with weights in safetensors.")
    architecture_of(source)
    words = text_of(text, source)
    threads = threads or torch.get_num_threads()
    # Its name is for the file that is whole and judged: one that is stopped before leaves nothing at the target.
    place = target.resolve()
    unjudged = place.with_name(f".{place.stem}.memfit-unjudged.gguf")
    try:
        with tempfile.TemporaryDirectory(prefix="memfit-") as directory:
            work = Path(directory)
            job = job_on(source, work, threads)
            said = None
            if words is not None:
                progress("calibrating")
                write_windows(source, words, work)
                said = told_of(words, work)
                nothing = {"allowed": asdict(Allowed(bits=(), kv_bits=(16,))), "reference": False, "batch": 4}
                run_job(job | nothing | {"do": "calibrate", "task": asdict(Infer())})
            with no_collection():
                predicted = predict_gguf(source, work, mixture)
            progress(f"writing {target}")
            # What a killed run has left is written over.
            told = {"do": "gguf", "target": str(unjudged), "mixture": mixture, "overwrite": True}
            written = run_job(job | told)
        quality = None
        if words is not None:
            progress("comparing it with the original")
            quality = evaluate(unjudged, model, words, threads=threads)["quality"]
        # Something may have appeared while the file was made.
        require_place(target, overwrite=overwrite)
        unjudged.replace(place)
    finally:
        with suppress(OSError):  # it has its name, or was never begun: what went wrong then is told
            unjudged.unlink()
    return Export(
        model=source.name, out=str(target), mixture=mixture, nbytes=target.stat().st_size,
        bits_a_weight=_bits(source, written["nbytes"]), kinds=written["kinds"], predicted=predicted,
        measured=Account.from_json(written["account"]), text=said, quality=quality,
    )  # fmt: skip


def _bits(source: Source, nbytes: int) -> float:
    """Bits of a weight, tied ones counted once."""
    weights = sum(torch.Size(shape).numel() for shape in source.parameter_shapes().values())
    return 8 * nbytes / max(weights, 1)


__all__ = ["Export", "export", "mixture_of"]
