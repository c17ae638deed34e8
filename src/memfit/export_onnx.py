"""A fitted model as ONNX for ONNX Runtime, told in order: fit it, write graph and integers, compare, put it in place.

Unlike a GGUF mixture, an ONNX file can hold a plan: all that `fit` chooses is chosen within the widths that ONNX
Runtime has, and the file holds the integers of the fitted directory.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from memfit.account.account import Account
from memfit.account.dry_run import no_collection
from memfit.errors import MemfitError, OverBudget, QualityMissed, UsageError
from memfit.evaluate.onnx_proof import LARGEST_DIFFERENCE
from memfit.fit import fit
from memfit.format.companions import save_companions
from memfit.format.directory import OutputDirectory
from memfit.format.onnx import OnnxFiles
from memfit.format.onnx_graph import require_kind, require_onnx
from memfit.format.onnx_modules import ONNX_BITS, require_onnx_scheme
from memfit.packed.modules import is_experts
from memfit.plan.allowed import Allowed
from memfit.plan.plan import Plan
from memfit.report.card import model_card
from memfit.report.page import render_page
from memfit.report.report import Report
from memfit.source.check import check
from memfit.source.source import Source, open_source
from memfit.steps import base_model, job_on, predict_onnx
from memfit.task.infer import Infer
from memfit.text import Text, text_of, write_windows
from memfit.worker import run_job

ONNX: Final = "onnx"
ALLOWED: Final = Allowed(bits=ONNX_BITS, kv_bits=(16,))
"""What a plan may choose from; a cache's width is ONNX Runtime's own."""


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """What was written, and what came of it."""

    out: str
    report: Report
    """Of the fitted model, run by memfit; its files are the ONNX ones."""
    written: OnnxFiles
    directory_nbytes: int
    """Of the same integers as safetensors for transformers."""
    predicted: Account
    """Of writing the weights: allocated bytes."""
    measured: Account
    difference: float
    """The largest of a logit, ONNX Runtime's from memfit's in float32."""
    resident_nbytes: int
    """What ONNX Runtime took for the task, with the file's pages."""
    prompt_tokens_per_s: float
    decode_tokens_per_s: float | None
    """None for encoders."""

    def to_json(self) -> dict[str, Any]:
        own = {
            "nbytes": self.written.nbytes, "directory_nbytes": self.directory_nbytes,
            "operators": dict(self.written.operators), "repeated_nbytes": self.written.repeated_nbytes,
            "difference": self.difference,
            "predicted": self.predicted.to_json(), "measured": self.measured.to_json(),
            "resident_nbytes": self.resident_nbytes, "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }  # fmt: skip
        return self.report.to_json() | {"out": self.out, "onnx": own}


def export_onnx(
    model: str | Path,
    budget: str | int = "50%",
    out: str | Path | None = None,
    *,
    task: Infer | None = None,
    text: Text | str | Path | None = None,
    allowed: Allowed | None = None,
    given: Plan | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> OnnxExport:
    """Fit `model` into a budget and write it as a directory for ONNX Runtime.

    Args:
        model: see `fit`.
        budget: see `fit`. It bounds memfit's own run, which is predicted; what ONNX Runtime takes is measured.
        out: the directory; default: `NAME-onnx` here.
        task: see `fit`; so are `text`, `given`, `threads` and further options.
        allowed: what the plan may choose from; default: integers of 8, 4 and 2 bits, a cache that is not packed.
        overwrite: whether a model at `out` is replaced.

    Raises:
        UsageError: a library, the model's kind, a width or the target is not fit for it; before anything is made.
        MemfitError: ONNX Runtime answers otherwise than memfit; nothing is written.
        OverBudget, QualityMissed: see `fit`; the output is kept.
    """
    require_onnx()
    allowed = ALLOWED if allowed is None else allowed
    require_widths(allowed, given)
    source = open_source(model)
    check(source)
    _require_model(source)
    target = Path(out) if out is not None else Path(f"{source.stem}-{ONNX}")
    output = OutputDirectory(target, overwrite=overwrite)
    threads = threads or torch.get_num_threads()
    task = task or Infer()
    fitted = output.target.parent / f".{output.target.name}.memfit-fitted"
    words = text_of(text, source)
    late: OverBudget | QualityMissed | None = None
    try:
        try:
            report = fit(
                model, budget, fitted, task=task, text=text, allowed=allowed, given=given, overwrite=True,
                threads=threads, progress=progress, **options,
            )  # fmt: skip
        except (OverBudget, QualityMissed) as missed:
            if not isinstance(missed.report, Report):
                raise
            late, report = missed, missed.report
        with output, tempfile.TemporaryDirectory(prefix="memfit-") as directory:
            made = _written(source, fitted, output, report, words, Path(directory), threads, progress)
    finally:
        shutil.rmtree(fitted, ignore_errors=True)
    if late is not None:
        raise type(late)(str(late).replace(str(fitted), str(target)), report=made.report)
    return made


def _written(
    source: Source,
    fitted: Path,
    output: OutputDirectory,
    report: Report,
    words: Text | None,
    work: Path,
    threads: int,
    progress: Callable[[str], None],
) -> OnnxExport:
    """The ONNX files of the fitted directory, in the output as far as it is built."""
    progress("writing graph and weights")
    made = open_source(fitted)
    with no_collection():
        predicted = predict_onnx(made)
    job = job_on(made, work, threads)
    wrote = run_job(job | {"do": "onnx", "target": str(output.path)})
    written = OnnxFiles(**wrote["written"])
    progress("comparing ONNX Runtime's answers with memfit's")
    if words is not None:
        write_windows(source, words, work)
    ran = {key: value for key, value in dict(report.task or {}).items() if key != "task"}
    proof = run_job(job | {"do": "onnx_proof", "file": str(output.path / "model.onnx"), "task": ran})
    if not proof["difference"] <= LARGEST_DIFFERENCE:
        raise MemfitError(
            f"{output.target}: ONNX Runtime's answers differ from memfit's by {proof['difference']:.3g}, and "
            f"{LARGEST_DIFFERENCE:g} is the most that rounding explains. Nothing was written; choose another format."
        )
    report = replace(report, files=dict(written.files))
    config = json.loads((fitted / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization_config", "memfit"):
        config.pop(key, None)
    output.write_json("config.json", config)
    save_companions(output.path, source=fitted)
    shutil.copyfile(fitted / "plan.json", output.path / "plan.json")
    output.write_json("report.json", report.to_json())
    output.write_text("report.html", render_page(report))
    output.write_text("README.md", model_card(report, base_model=base_model(source), onnx=True))
    export = OnnxExport(
        out=str(output.told), report=report, written=written, predicted=predicted,
        directory_nbytes=sum(file.stat().st_size for file in fitted.glob("*.safetensors")),
        measured=Account.from_json(wrote["account"]), **proof,
    )  # fmt: skip
    output.write_json("onnx.json", export.to_json()["onnx"])
    return export


def require_widths(allowed: Allowed | None, given: Plan | None) -> None:
    """Raise UsageError where something may be chosen, or was, that a file cannot hold."""
    allowed = allowed or Allowed(bits=ONNX_BITS, kv_bits=(16,))
    if others := [technique for technique in allowed.techniques if technique != "quantize"]:
        raise UsageError(
            f"what {others[0]} makes of a weight cannot be in an ONNX file: ONNX Runtime multiplies integers. Allow "
            f"quantize alone (--allow quantize), or leave --format {ONNX} out."
        )
    if wide := [bits for bits in allowed.bits if bits < 16 and bits not in ONNX_BITS]:
        known = ",".join(map(str, ONNX_BITS))
        raise UsageError(
            f"weights of {wide[0]} bits cannot be in an ONNX file: ONNX Runtime multiplies integers of {known} bits. "
            f"Choose among these (--bits {known})."
        )
    if values := [kind for kind in allowed.values if kind != "int"]:
        raise UsageError(
            f"values of {values[0]} cannot be in an ONNX file: ONNX Runtime multiplies integers. Leave --values out."
        )
    if allowed.activations != 16:
        raise UsageError(
            f"activations of {allowed.activations} bits cannot be in an ONNX file: its products are of floats. "
            "Leave --activations out."
        )
    narrow = [bits for bits in (*allowed.kv_bits, *([given.kv_bits] if given else [])) if bits != 16]
    if narrow:
        raise UsageError(
            f"a KV cache of {narrow[0]} bits cannot be in an ONNX file: its keys and values are floats. Leave it at 16 "
            "(--kv-bits 16)."
        )
    for name, scheme in (given.schemes() if given else {}).items():
        require_onnx_scheme(scheme, name)


def _require_model(source: Source) -> None:
    """Raise UsageError where it can be told from the model's shape that it has no form in ONNX."""
    skeleton = source.build(dtype=torch.bfloat16)
    require_kind(skeleton)
    experts = next((name for name, module in skeleton.named_modules() if is_experts(module)), None)
    if experts is not None:
        raise UsageError(
            f"{experts}: fused experts cannot be in an ONNX file. Give a model without, or choose another format."
        )


__all__ = ["OnnxExport", "export_onnx", "require_widths"]
