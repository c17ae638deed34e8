"""The steps of fitting: the jobs to run, what they will take, and what belongs beside the weights."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

import torch
from torch._subclasses import FakeTensorMode

from memfit.account.account import Account, Entry, Phase
from memfit.account.dry_run import no_collection
from memfit.account.follow import Follow
from memfit.account.malloc import FAST
from memfit.account.mend import values_as_usual
from memfit.account.replay import Blocks
from memfit.account.settle import settle
from memfit.account.structure import inside_blocks
from memfit.calibrate.statistics import Statistics
from memfit.calibrate.stream import head_name
from memfit.compensate import Thrift, searched_for
from memfit.compress import Calibrated, asked_of, calibrate, choose_integers, compress
from memfit.errors import UsageError
from memfit.format.companions import save_companions
from memfit.format.directory import OutputDirectory, write_json
from memfit.format.gguf import write_gguf
from memfit.format.integers import Integers
from memfit.format.onnx import onnx_parts, read_all
from memfit.packed.forms import LowRank, Narrow, Shared, techniques_of
from memfit.packed.scheme import Scheme
from memfit.plan.allowed import Allowed
from memfit.plan.plan import Plan, dumps
from memfit.planning import plan_files
from memfit.report.card import is_hub_id, model_card
from memfit.report.machine import describe_versions
from memfit.report.page import render_page
from memfit.report.report import Report
from memfit.source.source import Source
from memfit.study import Study
from memfit.technique.attune import Attuning
from memfit.technique.tune import Tuning
from memfit.text import Text, write_windows

Algorithm = Literal["rtn", "search", "gptq-plain", "gptq", "tuned"]
"""How integers are chosen: each weight to the nearest of the usual scale, of the searched one, making up for errors in
its own layer, in those before it, too, or learning from there with all of its block."""
_OF_FACTORS: Final = {"svd": "rtn", "scaled": "search", "whitened": "gptq"}
ALGORITHMS: Final = {
    "quantize": {name: name for name in get_args(Algorithm)},
    "prune": {"magnitude": "rtn", "wanda": "search", "sparsegpt": "gptq"},
    "low-rank": _OF_FACTORS,
    "share": _OF_FACTORS,
}
"""By technique, its names for how it decides: by the weights alone, by what their inputs are on a text, making up for
errors on it."""
BY_TEXT: Final = ("gptq-plain", "gptq", "tuned")
"""What goes through the text block by block, to choose integers."""


def algorithm_of(name: str | None, *, text: bool, techniques: Sequence[str] = ("quantize",)) -> Algorithm:
    """The algorithm that a name means; by default what the most is known for.

    Raises:
        UsageError: there is none of this name, it needs a text, or is not for what else is allowed.
    """
    known = {called: meant for names in ALGORITHMS.values() for called, meant in names.items()}
    found = known.get(name) if name is not None else "gptq" if text else "search"
    if found is None:
        raise UsageError(f"no algorithm is called {name!r}: take one of {', '.join(known)}")
    if found in BY_TEXT and not text:
        raise UsageError(
            f"GPTQ chooses integers for a text (--algorithm {name}), and there is none. Give one (--text FILE)."
        )
    if found == "gptq-plain" and (others := [technique for technique in techniques if technique != "quantize"]):
        raise UsageError(f"--algorithm {name} is to quantize alone, and {others[0]} is allowed. Take gptq.")
    return cast(Algorithm, found)


def called(algorithm: Algorithm, chosen: Plan) -> str:
    """What an algorithm is called where a plan's weights are made by it: of integers, if there are any."""
    used = {kind for form in chosen.schemes().values() for kind in techniques_of(form)}
    kinds = [kind for kind in ALGORITHMS if kind in used]
    names: dict[str, str] = {meant: name for kind in reversed(kinds) for name, meant in ALGORITHMS[kind].items()}
    return names.get(algorithm, algorithm)


def calibration_key(study: Study, text: Text | None, threads: int, algorithm: Algorithm) -> dict[str, Any]:
    """All that calibration depends on."""
    files = sorted({info.file for info in study.source.tensors.values()})
    words = None if text is None else repr(text).encode()
    return {
        "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "config": study.source.config.to_dict(),
        "text": words and hashlib.sha256(words).hexdigest(),
        "allowed": asdict(study.allowed),
        "task": study.task.to_json(),
        "by_text": algorithm in BY_TEXT,
        "threads": threads,
        "versions": describe_versions(),
    }


def calibration_job(
    study: Study, text: Text | None, work: Path, *, reference: bool, threads: int | None = None,
    algorithm: Algorithm = "gptq",
) -> dict[str, Any]:  # fmt: skip
    """The job that prices every choice on the text, made by `algorithm`; with `reference`, it keeps the original's
    answers, too."""
    if text is not None:
        write_windows(study.source, text, work)
    return job_on(study.source, work, threads) | {
        "do": "calibrate",
        "allowed": asdict(study.allowed),
        "reference": reference,
        "wanted": True,
        "task": asdict(replace(study.task, kv_bits=16)),
        "batch": 4,
        "waiting_nbytes": FAST,
        "by_text": text is not None and algorithm in BY_TEXT,
    }


def job_on(source: Source, work: Path, threads: int | None) -> dict[str, Any]:
    """What every job is told: the model, where the jobs leave things for each other, and the threads."""
    return {"model": str(source.gguf or source.directory), "work": str(work), "threads": threads}


def predict_fit(source: Source, chosen: Plan, job: dict[str, Any], *, algorithm: Algorithm) -> Account:
    """The account of calibrating, choosing integers and compressing: the same functions, on fake tensors."""
    with on_fakes() as follow:
        ids = fake_ids(windows_of(job))
        found = Calibrated(statistics=None, prices={}, kv_prices={})
        if job["do"] == "calibrate":
            allowed = None if job["allowed"] is None else Allowed.from_json(job["allowed"])
            found = calibrate(source, ids, allowed, watch=follow, **asked_of(job))
        source = found.smoothing.of_source(source)
        integers = None
        if algorithm in BY_TEXT and ids is not None:
            integers = Integers(None)
            choose_integers(source, chosen, found.statistics, ids, integers, watch=follow, **variant_of(algorithm))
        compress(
            source, chosen, found.statistics, Path(job["work"]), watch=follow, dry=True, integers=integers,
            search=algorithm != "rtn",
        )  # fmt: skip
    return settle(follow.ledger)


def predict_calibrating(source: Source, job: dict[str, Any]) -> Account:
    """The account of the job of calibration alone."""
    with on_fakes() as follow:
        allowed = None if job["allowed"] is None else Allowed.from_json(job["allowed"])
        calibrate(source, fake_ids(windows_of(job)), allowed, watch=follow, **asked_of(job))
    return settle(follow.ledger)


def predict_choosing(
    source: Source, chosen: Plan, windows: torch.Size, thrift: Thrift, *, algorithm: Algorithm = "gptq"
) -> Account:
    """The account of the job that chooses integers alone."""
    with on_fakes() as follow:
        ids = torch.zeros(windows, dtype=torch.int64)
        choose_integers(
            source, chosen, None, ids, Integers(None), watch=follow, thrift=thrift, scratch=Path("dry"),
            **variant_of(algorithm),
        )  # fmt: skip
    return settle(follow.ledger, waiting_nbytes=thrift.waiting_nbytes)


def predict_compressing(source: Source, chosen: Plan, job: dict[str, Any], *, algorithm: Algorithm) -> Account:
    """The account of the job that writes the output alone, all integers chosen in it, which takes no less."""
    with on_fakes() as follow:
        compress(source, chosen, None, Path(job["work"]), watch=follow, dry=True, search=algorithm != "rtn")
    return settle(follow.ledger)


@contextmanager
def on_fakes() -> Iterator[Follow]:
    """Inside, everything is done on fake tensors, and followed."""
    follow = Follow()
    repeated = Blocks(follow).on_training()
    with no_collection(), values_as_usual(), FakeTensorMode(allow_non_fake_inputs=True), follow, repeated:
        yield follow


def fake_ids(windows_WT: torch.Tensor | None) -> torch.Tensor | None:
    """Windows of that shape, fake."""
    return None if windows_WT is None else torch.zeros_like(torch.empty(windows_WT.shape, dtype=torch.int64))


def predict_gguf(source: Source, work: Path, mixture: str) -> Account:
    """The account of writing a GGUF file: the same function, on fake tensors."""
    file = work / "statistics.safetensors"
    found = Statistics.read(file).moments if file.exists() else {}
    windows_WT = windows_of({"work": str(work)})
    follow = Follow()
    repeated = Blocks(follow).on_training()
    with no_collection(), values_as_usual(), FakeTensorMode(allow_non_fake_inputs=True), follow, repeated:
        with follow.phase("read"):
            importance = {name: torch.empty_like(moments.inputs) for name, moments in found.items()}
            ids = None if windows_WT is None else torch.zeros_like(torch.empty(windows_WT.shape, dtype=torch.int64))
        write_gguf(
            source, Path("dry.gguf"), mixture=mixture, importance=importance, windows_WT=ids, watch=follow, dry=True
        )
    return settle(follow.ledger)


def predict_onnx(fitted: Source) -> Account:
    """The account of writing a fitted model as ONNX: the same reads, on fake tensors."""
    parts = onnx_parts(fitted)
    follow = Follow()
    with FakeTensorMode(allow_non_fake_inputs=True), follow, follow.phase("onnx"):
        read_all(fitted, parts)
    return settle(follow.ledger)


def windows_of(job: dict[str, Any]) -> torch.Tensor | None:
    """The windows to calibrate on, where there is a text."""
    file = Path(job["work"]) / "windows.pt"
    if not file.exists():
        return None
    found: torch.Tensor = torch.load(file, weights_only=True)["calibration"]
    return found


Statistic = Literal["none", "weighing", "all"]
"""What making a plan reads of calibration: nothing; how errors of tables and of the head weigh, which see every token,
so that a part of the text tells it; or more, as of an expert, which sees few tokens, or of an encoder, whose pooled
output is of one token a window (all of MiniLM in codebooks of 2 bits: 0.143 by a quarter of the text, 0.126 by all)."""


def statistics_read(source: Source, chosen: Plan, algorithm: Algorithm) -> Statistic:
    """What making what is planned reads of calibration's statistics: scales that are searched do, but for those of
    linear layers, which choosing integers finds by itself; and factors, which are made for what reads their outputs.
    """
    if algorithm not in BY_TEXT:
        return "all" if algorithm == "search" and chosen.schemes() else "none"
    model = source.build(dtype=torch.bfloat16)
    blocks, head = inside_blocks(model), head_name(model)
    schemes = chosen.schemes()
    searched = searched_for(model, schemes)
    found: Statistic = "none"
    for name, form in schemes.items():
        module, factored = model.get_submodule(name), isinstance(form, LowRank | Shared | Narrow)
        chosen_in_block = isinstance(module, torch.nn.Linear) and name.startswith(blocks) and not factored
        if chosen_in_block or name in searched:
            continue
        weighed = isinstance(module, torch.nn.Embedding) or name == head
        if head is None or not weighed or not isinstance(form, Scheme):
            return "all"
        found = "weighing"
    return found


def variant_of(algorithm: Algorithm) -> dict[str, Any]:
    """What `choose_integers` does otherwise by this algorithm: whether it corrects; what learns and how, blocks one by
    one (`tuning`) and then the whole (`attuning`)."""
    if algorithm == "gptq-plain":
        return {"corrects": False}
    return {"tuning": Tuning(), "attuning": Attuning()} if algorithm == "tuned" else {}


def asked_plainly(
    job: dict[str, Any], study: Study, given: Plan | None, algorithm: Algorithm, *, uniform: bool
) -> dict[str, Any]:
    """The job of calibration without what a plan in one setting has no use for: prices, which would decide nothing, and
    statistics, unless rounding reads them; of a part of the text, if it reads them for tables and heads alone."""
    if not uniform or given is None or layers_to_smooth(job, study):
        return job
    reads = statistics_read(study.source, given, algorithm)
    if reads == "none":
        return job | {"do": "reference", "wanted": job["reference"]}
    return job | {"allowed": None, "weighing": reads == "weighing"}


def layers_to_smooth(job: dict[str, Any], study: Study) -> frozenset[str]:
    """The layers whose inputs calibration is to even out."""
    return study.allowed.smoothed(study.groups) if windows_of(job) is not None else frozenset()


def choosing_job(chosen: Plan, job: dict[str, Any], *, algorithm: Algorithm) -> dict[str, Any]:
    """The job that chooses integers by GPTQ; the plan goes to `work`, and integers to a directory of the plan's own."""
    work = Path(job["work"])
    (work / "plan.json").write_text(dumps(chosen), encoding="utf-8")
    variant = variant_of(algorithm)
    variant = {how: settings if isinstance(settings, bool) else asdict(settings) for how, settings in variant.items()}
    kinds = ([name, scheme.to_json()] for name, scheme in chosen.schemes().items())
    schemes = json.dumps(["corrected and weighed", variant, *kinds])
    integers = work / f"integers-{hashlib.sha256(schemes.encode()).hexdigest()[:16]}"
    told = {key: job[key] for key in ("model", "work", "threads")}
    return told | {"do": "choose", "integers": str(integers), "variant": variant, "waiting_nbytes": FAST}


def compression_job(
    chosen: Plan, job: dict[str, Any], *, algorithm: Algorithm, integers: str | None = None
) -> dict[str, Any]:
    """The job that quantizes what has no integers yet and writes the model's files; the plan goes to `work`, and the
    files to a directory of the plan's own there, so that a run that is killed finds them again."""
    (Path(job["work"]) / "plan.json").write_text(dumps(chosen), encoding="utf-8")
    schemes = json.dumps([algorithm, *([name, scheme.to_json()] for name, scheme in chosen.schemes().items())])
    written = Path(job["work"]) / f"written-{hashlib.sha256(schemes.encode()).hexdigest()[:16]}"
    written.mkdir(exist_ok=True)
    told = {key: job[key] for key in ("model", "work", "threads")}
    return told | {"do": "compress", "output": str(written), "integers": integers, "search": algorithm != "rtn"}


def move_written(directory: Path, output: OutputDirectory) -> None:
    """Put what was made in a directory where the output is made; nothing is copied."""
    for file in directory.iterdir():
        os.rename(file, output.path / file.name)


def rounding_line(chosen: Plan, found: Mapping[str, Any], algorithm: Algorithm) -> str:
    """What is to be told of the algorithm: how many layers went by GPTQ, how H was damped, what learned.

    found: what the job that chose integers answered.
    """
    damping: dict[str, float] = found["damping"]
    least, most = (find(damping.values(), default=0.0) for find in (min, max))
    names = {"quantize": "GPTQ", "prune": "SparseGPT", "low-rank": "whitened factors", "share": "shared factors"}
    used = dict.fromkeys(names[kind] for form in chosen.schemes().values() for kind in sorted(techniques_of(form)))
    what = "quantized modules" if list(used) == ["GPTQ"] else "modules"
    told = f"{', '.join(used) or 'GPTQ'}: {len(damping)} of {len(chosen.schemes())} {what}, damping {least:.2g}"
    told += f" to {most:.2g}" if most > least else ""
    variant = variant_of(algorithm)
    told += ", errors of the layers before not made up for" if algorithm == "gptq-plain" else ""
    if "tuning" in variant:
        told += f"\nThen {variant['tuning'].steps} steps of learning for each block"
    if (lost := found.get("attuned")) is not None:
        kept = "" if lost["after"] <= lost["before"] else ", which was not kept"
        told += (
            f", and {variant['attuning'].steps} for the whole: {lost['before']:.4g} lost before and "
            f"{lost['after']:.4g} after{kept}, on the text that it learned from (any other gains less)"
        )
    return told


def write_companions(source: Source, chosen: Plan, directory: Path) -> None:
    """The config with the plan's schemes, the tokenizer and what else belongs to the model."""
    write_json(directory / "config.json", plan_files(source, chosen)[1])
    tokenizer = source.tokenizer() if source.gguf is not None else None
    companions = source.directory if source.gguf is None else None
    save_companions(directory, source=companions, tokenizer=tokenizer)


def proof_job(model: str | Path, task: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The job that measures a fitted model, and compares it with what the original answered to `job`, if it was
    asked."""
    kept = {key: job[key] for key in ("work", "threads", "reference")}
    return kept | {"do": "prove", "model": str(model), "task": task}


def judging_job(model: str | Path, chosen: Plan, job: dict[str, Any]) -> dict[str, Any]:
    """The job that compares a fitted model with what the original answered to `job`, and no more."""
    return proof_job(model, {"kv_bits": chosen.kv_bits}, job) | {"do": "judge"}


def joined(*accounts: Account) -> Account:
    """One account of jobs that ran one after the other: of a phase that several had, the one with the higher peak."""
    phases: dict[str, Phase] = {}
    entries: dict[tuple[str, str, str, str], Entry] = {}
    for account in accounts:
        for phase in account.phases:
            if phase.name not in phases or phase.peak_nbytes > phases[phase.name].peak_nbytes:
                phases[phase.name] = phase
        for entry in account.entries:
            key = (entry.kind, entry.module, entry.device, entry.dtype)
            if key not in entries or entry.nbytes > entries[key].nbytes:
                entries[key] = entry
    told = [account.resident_nbytes for account in accounts if account.resident_nbytes is not None]
    return replace(
        accounts[0], phases=tuple(phases.values()), entries=tuple(entries.values()),
        resident_nbytes=max(told, default=None),
    )  # fmt: skip


def write_papers(output: OutputDirectory, report: Report, chosen: Plan, source: Source) -> None:
    """The plan, the report and the model card."""
    output.write_text("plan.json", dumps(chosen))
    output.write_json("report.json", report.to_json())
    output.write_text("report.html", render_page(report))
    output.write_text("README.md", model_card(report, base_model=base_model(source)))


def base_model(source: Source) -> str:
    """The hub's id of the original, as it was asked for, stored by the hub's cache, or written into its config;
    else the name it has here."""
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{source.directory}/")
    for name in (
        source.name if not Path(source.name).exists() else "",
        "/".join(cached.groups()) if cached else "",
        str(getattr(source.config, "_name_or_path", "")),
    ):
        if is_hub_id(name) and not Path(name).exists():
            return name
    return source.stem


def default_output(source: Source) -> Path:
    """Where a fitted model goes if nothing is said: `NAME-fitted`, here."""
    return Path(f"{source.stem}-fitted")
