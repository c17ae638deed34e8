"""The main job, told in order: account, calibrate, plan, compress, prove, report.

What takes the model's bytes runs in processes of its own; this one holds plans and figures.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from memfit import demo
from memfit.account.account import Account
from memfit.account.dry_run import dry_run, no_collection
from memfit.account.outside import Outside, predict_resident
from memfit.answers import adopted, allowed_by, front_lines, kv_prices_of, planned, prices_of, smoothed_of, task_of
from memfit.cap import cap_of_jobs, keep_as_planned
from memfit.errors import OverBudget, QualityMissed, UsageError
from memfit.evaluate.quality import Quality
from memfit.evaluate.speed import Speed
from memfit.format.directory import OutputDirectory
from memfit.format.resume import WorkDirectory
from memfit.models import load_model, load_to_train, loader_for, require_device
from memfit.narrower import announced, narrow_as_asked, narrow_first, require_text, with_settings
from memfit.outside import known_outside, outside_of_machine
from memfit.packed.cache import generating_with
from memfit.packed.fake import aiming_at
from memfit.plan.allowed import Allowed
from memfit.plan.plan import Plan
from memfit.planning import ALL_TOGETHER, account_of, require_fit, uniform_plan
from memfit.report.machine import describe_machine, describe_versions
from memfit.report.report import Report
from memfit.source.check import check_original, require_weights
from memfit.source.live import fake_copy
from memfit.source.source import Source, open_source
from memfit.steps import (
    algorithm_of,
    asked_plainly,
    calibration_job,
    calibration_key,
    called,
    default_output,
    joined,
    move_written,
    predict_fit,
    proof_job,
    write_papers,
)
from memfit.study import Study
from memfit.task.infer import Infer, generates
from memfit.technique.narrow import Narrow
from memfit.text import Text, text_of, told_of
from memfit.train.plan import TrainPlan
from memfit.train.task import Train
from memfit.train_planning import plan_to_train
from memfit.trials import Made, account_of_all, judge, make, rivals
from memfit.units import format_size, parse_size
from memfit.worker import Process, run_job

Progress = Callable[[str], None]
"""Told, in a few words, what is done next."""


def account(
    model: str | Path | nn.Module,
    task: Infer | Train | None = None,
    *,
    device: str = "cpu",
    routing: str = "balanced",
    resident: bool = False,
    progress: Progress = lambda _: None,
) -> Account:
    """Who will hold which bytes, when, if `model` runs `task`. No weights are read.

    Args:
        model: a hub id, a directory, a `.gguf` file, or any live module (which is left as it is).
        task: `Infer` or `Train`; default: one prompt of 512 tokens and 32 new ones.
        device: `cpu` or `cuda`; nothing needs to be installed for it.
        routing: where experts are chosen by data, `balanced` or `worst`.
        resident: predict the process's resident peak too, for which this machine is measured once, in five minutes.
            It is predicted in any case where the machine has been measured before.
        progress: told how far measuring this machine has come.

    Raises:
        BrokenInput: the model is unsafe or broken.
    """
    from memfit.packed.routing import ROUTING

    task = task or Infer()
    token = ROUTING.set(routing)  # type: ignore[arg-type]
    try:
        if isinstance(model, nn.Module):
            made = dry_run(lambda: fake_copy(model), task, device=device)
        else:
            source = open_source(model, weights=False)
            if isinstance(task, Train):
                recipe = task.recipe
                made = dry_run(lambda: load_to_train(source, recipe), task, device=device)
            else:
                task = replace(task, kv_bits=source.kv_bits) if task.kv_bits == 16 else task
                made = account_of(source, task, device=device)
        measures = resident and device == "cpu"
        return _with_resident(made, outside_of_machine(progress=progress) if measures else known_outside())
    finally:
        ROUTING.reset(token)


@overload
def plan(model: str | Path, budget: str | int, *, task: Train, **options: Any) -> TrainPlan: ...


@overload
def plan(model: str | Path, budget: str | int, *, task: Infer | None = None, **options: Any) -> Plan: ...


def plan(
    model: str | Path, budget: str | int, *, task: Infer | Train | None = None, **options: Any
) -> Plan | TrainPlan:
    """A plan whose traced peak is within `budget`: to run the model (`plan_to_run`) or to train it.

    Options: see `plan_to_run`; for a `Train` task `memfit.train_planning.plan_to_train`.
    """
    if isinstance(task, Train):
        return plan_to_train(model, budget, task=task, **options)
    with aiming_at(options.get("device", "cpu")):
        return plan_to_run(model, budget, task=task, **options)


def plan_to_run(
    model: str | Path,
    budget: str | int,
    *,
    task: Infer | None = None,
    text: Text | str | Path | None = None,
    allowed: Allowed | None = None,
    given: Plan | None = None,
    uniform: bool = False,
    narrow: Narrow | None = None,
    device: str = "cpu",
    progress: Progress = lambda _: None,
) -> Plan:
    """The plan of least expected loss whose traced peak is within `budget`.

    Args:
        budget: bytes at the peak of the task, a size as `400MiB`, or a share of the original's peak, `50%`.
        text: prices choices by what they do to this text; without one, weights are rounded and compared, and
            without weights, shapes alone decide. The demo model has its own.
        given: a plan to check and predict instead, within the budget that stands in it.
        uniform: no search: everything in the first scheme of `allowed` that can hold it.
        narrow: how much of the model stays; the plan is of what does.

    Raises:
        DoesNotFit: nothing fits; names what binds, the smallest budget that works, and the levers.
        BrokenInput: `given` is no plan for the model.
    """
    task = task or Infer()
    source = open_source(model)
    check_original(source, "fitted again")
    narrow = narrow_as_asked(narrow, given)
    if given is not None:
        study = Study(announced(source, narrow), task_of(given), allowed or allowed_by(given), device=device)
        return adopted(study, given)
    original, texts = source, text_of(text, source)
    nbytes = parse_size(budget, whole_nbytes=lambda: account_of(original, task, device=device).peak_nbytes)
    source = announced(source, narrow)
    require_text(narrow, source, texts)
    with no_collection():
        study = Study(source, task, allowed or Allowed(), device=device)
        if uniform:
            return with_settings(uniform_plan(study, nbytes), narrow)
        require_fit(study, nbytes)
        if source.checkpoint is None:
            return with_settings(planned(study, nbytes, {}), narrow)
    with tempfile.TemporaryDirectory(prefix="memfit-") as work:
        job = calibration_job(study, texts, Path(work), reference=False)
        if narrow is not None:
            progress("finding what is missed least")
            source, narrow, *_ = narrow_first(Path(work), original, narrow, job)
            study = Study(source, task, study.allowed, device=device)
        progress("pricing choices")
        return with_settings(planned(study, nbytes, run_job(job)), narrow)


def fit(
    model: str | Path | None = None,
    budget: str | int = "50%",
    out: str | Path | None = None,
    *,
    task: Infer | None = None,
    text: Text | str | Path | None = None,
    allowed: Allowed | None = None,
    given: Plan | None = None,
    uniform: bool = False,
    narrow: Narrow | None = None,
    beside: str | Path | None = None,
    learned: str | None = None,
    algorithm: str | None = None,
    enforce: bool = False,
    overwrite: bool = False,
    max_kl: float | None = None,
    ram: str | int | None = None,
    measure: bool = True,
    resume: bool = True,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> Report:
    """Make a model fit a budget, write it to `out`, measure it, and report prediction and measurement.

    Args:
        model: a hub id, a directory or a `.gguf` file; None: the demo model with its own text.
        budget: see `plan`.
        out: where the fitted model goes, a Hugging Face directory; default: `NAME-fitted` here.
        given: a plan made before, carried out within the budget and for the task that stand in it, and priced anew if
            it has prices.
        uniform: no search: everything in the first scheme of `allowed` that can hold it.
        narrow: how much of the model stays: it is made narrower first, by what a text says is missed least, and what is
            left is fitted. Judged beside the whole model.
        beside: the model that `model` was made of: the fitted one is judged beside it, shares of a budget are of it,
            and the report is of it; default: `model`.
        learned: how it was made, for the report.
        algorithm: `rtn`: to the nearest of the scale that the largest weight asks for; `search`: of the scale that
            loses least; `gptq`: of that, and linear layers make up for the errors of those before them, on the text;
            `gptq-plain`: each makes up for its own alone, in two thirds of the time, to quantize only;
            `tuned`: and each block, then the whole, learns on it, in ten to twenty times the time.
            Pruning calls them `magnitude`, `wanda`, `sparsegpt`, factors `svd`, `scaled`, `whitened`.
            Default: `gptq` where there is a text, else `search`.
        enforce: measure under a hard limit of the budget; more memory is refused by the system.
        max_kl: the quality gate, nats a token.
        ram: what each process that makes the fitted model may be resident with; the system refuses more. What that
            asks for waits on the disk, and quality is judged only if the original fits in it. Measuring the fitted
            model keeps to `budget` alone.
        measure: False: the fitted model is not run; the report predicts.
        resume: go on with what the same run has left when it was stopped; False: begin anew.
        threads: of the measured process; default: torch's own.

    Raises:
        DoesNotFit, BrokenInput, UsageError: before anything is written.
        Interrupted: the disk is full; what is done is kept, and the same call goes on.
        OverBudget: measured over the budget. QualityMissed: worse than `max_kl`. The output is kept in both.
    """
    if model is None:
        model, text = demo.model_directory(), text or Text.of_demo()
    task = task or Infer()
    progress("reading the model's shapes")
    source = open_source(model)
    check_original(source, "fitted again", needed_by="fit")
    process = Process(copied=True)  # so what a class of models brings in is there once
    target = Path(out) if out is not None else default_output(source)
    output = OutputDirectory(target, overwrite=overwrite)
    if max_kl is not None and not measure:
        raise UsageError("a quality gate needs a measurement: leave out --max-kl or --no-measure.")
    ram_nbytes = None if ram is None else parse_size(ram)
    threads = threads or torch.get_num_threads()
    task = task_of(given) if given is not None else task
    plainly = uniform if given is None else not given.is_priced
    texts, narrow, whole = text_of(text, source), narrow_as_asked(narrow, given), source
    require_text(narrow, source, texts)
    with _threads(threads):
        original = process.aside(lambda: account_of(source if beside is None else open_source(beside), task))
        source = announced(source, narrow)
        nbytes = given.budget_nbytes if given else parse_size(budget, whole_nbytes=original.peak_nbytes)
        study = Study(source, task, allowed or allowed_by(given))
        if given is not None:
            given = process.aside(partial(adopted, study, given))
        elif uniform:
            given = process.aside(lambda: uniform_plan(study, nbytes))
        else:
            process.begin_anew()
            require_fit(study, nbytes)
    by = algorithm_of(algorithm, text=texts is not None, techniques=study.allowed.techniques)
    key = calibration_key(study, texts, threads, by)
    key |= {"asked": [ram_nbytes, measure], "narrow": narrow and asdict(narrow)}
    if plainly and given is not None:
        # Calibration finds out no more than what making this plan reads.
        key["schemes"] = [[name, form.to_json()] for name, form in given.schemes().items()]
    key |= {} if beside is None else {"beside": str(beside)}
    work = WorkDirectory(target, key=key, resume=resume)
    with _threads(threads), output, work, process:
        job = process.aside(
            lambda: calibration_job(study, texts, work.path, reference=measure, threads=threads, algorithm=by)
        )
        job |= {} if beside is None else {"beside": str(beside)}
        cap = None
        if ram_nbytes is None:
            job = asked_plainly(job, study, given, by, uniform=plainly)
        else:
            progress("finding out what fits in the cap")
            cap, job = cap_of_jobs(
                work, ram_nbytes, study, given, job, original, by, uniform=plainly, process=process
            )  # fmt: skip
        jobs: dict[str, Any] = {}
        narrowing = None
        if narrow is not None:
            progress("finding what is missed least")
            process.end()  # it would wait beside the job
            process.begin_anew()
            source, narrow, narrowing, jobs["narrow"] = narrow_first(work, whole, narrow, job, cap)
            study = Study(source, task, study.allowed)
            if uniform:
                given = uniform_plan(study, nbytes)
        if job["wanted"]:
            asked = {"calibrating": job["do"] == "calibrate", "asking the original": job["reference"]}
            first = ", and ".join(what for what, wanted in asked.items() if wanted)
            progress("going on with what a stopped run has calibrated" if work.holds("calibrated") else first)
        calibrated = work.once("calibrated", lambda: run_job(job, process=process) if job["wanted"] else {})
        if cap is not None and job["wanted"]:
            process.end()  # what follows is predicted from a process that has done nothing yet
        lines: dict[str, Any] = {}
        if given is None:
            progress("searching the plan")
            chosen = planned(study, nbytes, calibrated)
            lines = front_lines(study, nbytes, calibrated)
            judged = measure and texts is not None and cap is None
            plans = rivals(study, chosen, calibrated) if judged else {ALL_TOGETHER: chosen}
        else:
            chosen = study.adopt(given, prices_of(calibrated), kv_prices_of(calibrated))
            chosen = replace(
                chosen, predicted=given.predicted, smoothed=smoothed_of(calibrated),
                priced_by=calibrated.get("priced_by", chosen.priced_by),
            )  # fmt: skip
            plans = {ALL_TOGETHER: chosen}
        progress("predicting the fitting itself")
        if cap is not None:
            predicted_fit = keep_as_planned(work, cap, source, chosen, job, by, process=process)
        else:
            each = [process.aside(partial(predict_fit, source, plan, job, algorithm=by)) for plan in plans.values()]
            predicted_fit = joined(*([] if narrowing is None else [narrowing]), *each)
        jobs |= {"calibrate": calibrated} if "account" in calibrated else {}
        made: dict[str, Made] = {}
        for name, plan in plans.items():
            told = progress if len(plans) == 1 else lambda what, name=name: progress(f"{name}: {what}")
            plan = replace(with_settings(plan, narrow), predicted_fit=predicted_fit.to_json())
            made[name] = make(source, plan, job, by, process=process, cap=cap, progress=told)
        process.end()
        lost = judge(made, job, work, progress=progress)
        taken = made[min(lost, key=lost.__getitem__, default=ALL_TOGETHER)]
        chosen, predicted = taken.plan, Account.from_json(dict(taken.plan.predicted or {}))
        move_written(taken.directory, output)
        if cap is not None:
            done = jobs | taken.jobs
            cap.measured.update({name: answer["resident"] for name, answer in done.items() if answer})
        proof: dict[str, Any] = {}
        if measure:
            progress("measuring the fitted model")
            limit: dict[str, Any] = {"enforce_nbytes": nbytes, "kernels": predicted.kernels} if enforce else {}
            ran = {key: value for key, value in chosen.task.items() if key != "task"}
            proof = run_job(proof_job(output.path, ran, job), **limit)
        progress("writing plan and report")
        lineage = source if beside is None else open_source(beside)
        chosen = chosen if beside is None else replace(chosen, model=lineage.name)
        report = Report(
            model=lineage.name,
            budget_nbytes=nbytes,
            plan=chosen.to_json(),
            task=chosen.task,
            predicted=_with_resident(predicted, known_outside()),
            fronts=lines,
            tried=lost,
            measured=Account.from_json(proof["account"]) if proof else None,
            predicted_fit=predicted_fit,
            measured_fit=account_of_all(jobs, made.values()) if cap is None else None,
            ram=None if cap is None else cap.to_json(),
            resumed=work.resumed,
            algorithm=called(by, chosen) if chosen.schemes() else None,
            text=None if texts is None else told_of(texts, work.path),
            rounding="\n".join(line for line in (learned, taken.rounding) if line) or None,
            original=original,
            quality=Quality.from_json(proof["quality"]) if proof.get("quality") else None,
            speed=Speed(**proof["speed"]) if proof else None,
            speed_original=Speed(**calibrated["speed"]) if calibrated.get("speed") else None,
            kernels=proof.get("kernels", {}),
            machine=describe_machine(),
            versions=describe_versions(),
            files=taken.jobs["compress"]["files"],
        )
        write_papers(output, report, chosen, lineage)
    if not report.fits:
        peak = report.best.peak
        raise OverBudget(
            f"{format_size(peak.peak_nbytes)} measured in {peak.name}, {format_size(nbytes)} allowed, "
            f"{format_size(predicted.peak_nbytes)} predicted. {target} is kept; `memfit report {target}` shows it.",
            report=report,
        )
    if max_kl is not None and report.quality is not None and (report.quality.kl or 0.0) > max_kl:
        raise QualityMissed(
            f"KL divergence {report.quality.kl:.4f}, at most {max_kl} allowed. {target} is kept. "
            f"{'More bits or another algorithm' if plainly else 'A larger budget'}, or a longer text to calibrate on, "
            "brings it down.",
            report=report,
        )
    return report


def load(model: str | Path, plan: TrainPlan | None = None, *, device: str = "cpu") -> nn.Module:
    """A model with its weights: a fitted one runs from its packed weights.

    Its `generate` keeps the KV cache as planned; in a loop of one's own `forward` is given
    `make_cache(model.config, kv_bits=...)`.

    Args:
        model: a directory, a `.gguf` file or a hub id.
        plan: of training: the model comes in its dtype, with what it packs packed and what it keeps on the disk there,
            and takes no more on its way than it says. For `train_step`.
        device: `cpu` or `cuda`, for which packed weights are laid out.

    Raises:
        UsageError: no CUDA device is here; a config without weights.
        BrokenInput: a weight is missing, of another shape or type, or not finite.
    """
    require_device(device)
    source = loader_for(str(model))
    if isinstance(source, Source):
        require_weights(source, "load")
    if plan is not None:
        return load_to_train(source, plan.recipe, device=device)
    loaded = load_model(source, device=device)
    kv_bits = source.kv_bits if isinstance(source, Source) else 16
    return generating_with(loaded, kv_bits=kv_bits) if kv_bits < 16 and generates(loaded) else loaded


# -- parts --------------------------------------------------------------------------------------------


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, torch runs on `count` threads, as what is measured will: kernels take scratch for each of them."""
    before = torch.get_num_threads()
    if count == before:  # to set them begins some, and a process that has threads can not be copied
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _with_resident(account: Account, outside: Outside | None) -> Account:
    return account if outside is None else predict_resident(account, outside)


__all__ = ["Text", "account", "fit", "load", "plan"]
