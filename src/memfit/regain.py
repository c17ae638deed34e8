"""A model made narrower, taught by the whole one to win back what it lost, and then fitted as any other."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from memfit.data.read import read_data
from memfit.errors import UsageError
from memfit.fit import fit
from memfit.format.directory import OutputDirectory
from memfit.measuring import evaluate
from memfit.plan.allowed import Allowed
from memfit.report.report import Report
from memfit.source.source import open_source
from memfit.steps import default_output
from memfit.technique.distil import Distil
from memfit.technique.narrow import Narrow
from memfit.text import Text, text_of
from memfit.train.hyper import Hyper
from memfit.train.task import Train
from memfit.training import Options, train

LR = 1e-3
"""Learning rate of a student that has just lost something: far above that of fine-tuning."""


def fit_and_distil(
    model: str | Path,
    budget: str | int,
    out: str | Path | None = None,
    *,
    narrow: Narrow | None,
    distil: Any,
    steps: int,
    training_budget: str | int = "100%",
    lr: float = LR,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    **how: Any,
) -> Report:
    """Make a model narrower, let it learn for `steps` what the whole one answers on the data `distil`, and fit what
    came of that within `budget`; judged beside the whole one.

    What is done stays in `.NAME.memfit-student-...` beside `out` until all is done: the same call goes on there.

    With a text, what has learned is kept only if it is nearer to the whole model than before.

    Args:
        narrow: how much of the model stays. Other techniques leave no weights that can be trained.
        training_budget: bytes at the peak of learning; see `memfit.train`.
        lr: learning rate.
        how: of the fit at the end; see `memfit.fit`.

    Raises:
        UsageError: nothing is made narrower. And all that `fit` and `train` raise.
    """
    if narrow is None:
        raise UsageError(
            "what learns from the whole model is a narrower one, and nothing says how much is to stay. Add "
            "--blocks, --heads, --channels or --experts. (Quantized, pruned and factored weights are not trained.)"
        )
    target = Path(out) if out is not None else default_output(open_source(model))
    OutputDirectory(target, overwrite=overwrite)  # refuses what may not be written, before hours of learning
    asked = json.dumps(
        [str(model), narrow.to_json(), str(distil), steps, str(training_budget), lr, repr(how.get("text"))]
    )
    place = target.parent / f".{target.name}.memfit-student-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    student, taught = place / "student", place / "taught"
    text = how.get("text")
    if not student.exists():
        read_data(distil)  # refuses what cannot be read, before anything is made
        place.mkdir(parents=True, exist_ok=True)
        progress("making the model narrower")
        fit(
            model, "1000%", student, narrow=narrow, text=text, allowed=Allowed(bits=(), kv_bits=(16,)), uniform=True,
            algorithm="rtn", measure=False, progress=progress,
        )  # fmt: skip
    if not (taught / "training.json").exists():
        progress(f"learning from the whole model, {steps} steps")
        task = Train(batch=8, sequence=256, hyper=Hyper(lr=lr))
        train(
            student, distil, training_budget, taught, task=task, distil=Distil(teacher=str(model)),
            options=replace(Options(), steps=steps), resume=True, adapters=False, progress=progress,
        )  # fmt: skip
    progress("judging what was learned")
    stays = ", ".join(f"{what} {size}" for what, size in narrow.sizes.items())
    chosen, learned = taught, f"Narrower: {stays} stay. Learned: {steps} steps from {model} on {distil}."
    texts = text_of(text, open_source(model))
    if texts is not None:
        before, after = (_divergence(place, model, texts, how.get("threads")) for place in (student, taught))
        chosen = taught if after < before else student
        kept = "" if after < before else " That was worse, and is not kept: take more steps, or another --lr."
        learned = f"{learned} On other text, KL from the whole model: {before:.4g} before, {after:.4g} after.{kept}"
    progress("fitting it")
    report = fit(
        chosen, budget, target, beside=model, learned=learned, overwrite=overwrite, progress=progress, **how
    )
    shutil.rmtree(place)
    return report


def _divergence(model: Path, reference: str | Path, text: Text, threads: int | None) -> float:
    """KL from the whole model, nats a token; of an encoder 1 - cosine."""
    quality = evaluate(model, reference, text, threads=threads)["quality"]
    return float(1 - quality.cosine if quality.kl is None else quality.kl)
