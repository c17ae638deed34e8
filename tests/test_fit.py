"""The whole job on a tiny model: what is promised is in the report, and OUT is whole or not there."""

import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import memfit
from memfit import demo
from memfit.account.account import Account
from memfit.errors import BrokenInput, DoesNotFit, MemfitError, OverBudget, QualityMissed, UsageError
from memfit.packed.scheme import Scheme
from memfit.plan.plan import Plan, read_plan
from memfit.report.report import Report
from memfit.source.source import open_source, source_from_config
from memfit.technique.quantize import dequantize, quantize
from memfit.units import format_size

steps = importlib.import_module("memfit.steps")
room = importlib.import_module("memfit.fit")  # the attribute of the package is the function

TASK = memfit.Infer(prompt=32, new_tokens=5)
ALLOWED = memfit.Allowed(bits=(8, 4), groups={8: (None,), 4: (64,)}, kv_bits=(16, 8))
LOGITS = textwrap.dedent("""
    import sys, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = sys.argv[1]
    model, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto")
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    ids = AutoTokenizer.from_pretrained(path)("def main(argv):\\n    return 0", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    torch.save({"ids": ids, "logits": logits}, sys.argv[2])
    assert "memfit" not in sys.modules
""")


def text(**options: Any) -> memfit.Text:
    words = demo.heldout_text().read_text(encoding="utf-8")
    return memfit.Text(
        calibration=words[:8000], evaluation=words[8000:16000], length=64, calibration_windows=4,
        evaluation_windows=4, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(make_llama) -> Path:
    return make_llama(hidden_size=128, intermediate_size=256, initializer_range=0.2)


def run_jobs_by(patch: pytest.MonkeyPatch, run: Any) -> None:
    """All of fitting's jobs are run by another function."""
    for module in (room, importlib.import_module("memfit.trials")):
        patch.setattr(module, "run_job", run)


class Jobs:
    """Runs jobs and keeps their answers, or gives the answers kept."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.limits: list[int | None] = []

    def run(self, job: dict[str, Any], **limit: int) -> dict[str, Any]:
        self.asked.append(job)
        self.limits.append(limit.get("enforce_nbytes"))
        self.answers[job["do"]] = worker.run_job(job, **limit)
        return self.answers[job["do"]]

    def again(self, made: Path, **changes: Any) -> Any:
        def answer(job: dict[str, Any], **limit: int) -> dict[str, Any]:
            if job["do"] == "compress":
                shutil.copy(made / "model.safetensors", job["output"])
            return self.answers[job["do"]] | changes.get(job["do"], {})

        return answer


worker = importlib.import_module("memfit.worker")


@pytest.fixture(scope="module")
def fitted(model, tmp_path_factory) -> tuple[Report, Path, Jobs]:
    out, jobs = tmp_path_factory.mktemp("fitted") / "out", Jobs()
    with pytest.MonkeyPatch.context() as patch:
        run_jobs_by(patch, jobs.run)
        report = memfit.fit(
            model, "75%", out, task=TASK, text=text(), allowed=ALLOWED, enforce=True, threads=1
        )
    return report, out, jobs


@pytest.fixture
def plan(fitted) -> Plan:
    return read_plan(fitted[1] / "plan.json")


def test_the_measured_peak_is_the_predicted_one_and_within_the_budget(fitted):
    report = fitted[0]
    assert report.fits and report.measured.peak_nbytes <= report.budget_nbytes
    for phase in report.measured.phases:
        told = report.predicted.phase(phase.name).peak_nbytes
        assert told == pytest.approx(phase.peak_nbytes, rel=0.005), phase.name


def test_fitting_itself_is_predicted(fitted):
    report = fitted[0]
    assert report.predicted_fit.peak_nbytes == pytest.approx(report.measured_fit.peak_nbytes, rel=0.03)
    assert {phase.name for phase in report.measured_fit.phases} == {"calibrate", "price", "compensate", "compress"}
    for phase in report.measured_fit.phases:
        told = report.predicted_fit.phase(phase.name).peak_nbytes
        assert told == pytest.approx(phase.peak_nbytes, rel=0.01), phase.name


def test_a_fitted_model_is_not_trained_or_fitted_again(fitted, model, tmp_path):
    for call in (
        lambda: memfit.train(fitted[1], ["some text " * 50], out=tmp_path / "out"),
        lambda: memfit.train(
            fitted[1], ["some text " * 50], out=tmp_path / "out", distil=memfit.Distil(teacher=str(model))
        ),
        lambda: memfit.fit(fitted[1], "50%", tmp_path / "out"),
        lambda: memfit.plan(fitted[1], "50%"),
    ):
        with pytest.raises(memfit.UsageError, match=r"its weights are packed .* Give the model that it was made from"):
            call()
    assert not (tmp_path / "out").exists()


def test_the_report_has_the_promised_keys(fitted):
    report, out, _ = fitted
    told = json.loads((out / "report.json").read_text())
    account = {"peak_nbytes", "peak_phase", "phases", "entries"}
    assert account | {"budget_nbytes", "fits", "measured", "resident_nbytes", "quality", "speed"} <= told.keys()
    assert account <= told["measured"].keys()
    assert {"kl", "kl_interval", "perplexity", "perplexity_reference", "top1"} <= told["quality"].keys()
    low, high = told["quality"]["kl_interval"]
    assert 0 <= low <= told["quality"]["kl"] <= high
    assert told["resident_nbytes"] > told["measured"]["peak_nbytes"]
    words = text()
    digest = hashlib.sha256((words.calibration + words.evaluation).encode()).hexdigest()
    assert told["algorithm"] == "gptq"
    assert told["text"] == {
        "name": "the text", "sha256": digest, "window": 64, "calibration_windows": 4, "evaluation_windows": 4,
    }  # fmt: skip
    assert Report.from_json(told).to_json() == told == json.loads(json.dumps(report.to_json()))


def test_out_is_a_model_directory_and_nothing_else_is_left(fitted):
    _, out, _ = fitted
    names = {path.name for path in out.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert wanted | {"plan.json", "report.json", "report.html"} <= names
    assert not any(path.is_dir() for path in out.iterdir())
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert "# tiny, made to fit by memfit" in (out / "README.md").read_text()


def test_the_measured_process_ran_under_the_budget_as_its_limit(fitted):
    report, _, jobs = fitted
    assert [job["do"] for job in jobs.asked] == ["calibrate", "choose", "compress", "prove"]
    assert jobs.limits == [None, None, None, report.budget_nbytes]


def test_stock_transformers_loads_it_and_agrees(fitted, tmp_path):
    out = fitted[1]
    done = subprocess.run(
        [sys.executable, "-c", LOGITS, str(out), str(tmp_path / "stock.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stock = torch.load(tmp_path / "stock.pt")
    with torch.no_grad():
        ours = memfit.load(out)(input_ids=stock["ids"], use_cache=False).logits
    difference = (ours.float() - stock["logits"].float()).norm()
    assert difference <= 1e-2 * stock["logits"].float().norm()


def test_a_job_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(job: Any, **more: Any) -> Any:
        raise MemfitError("the job ended with signal 9")

    run_jobs_by(monkeypatch, fail)
    with pytest.raises(MemfitError, match="signal 9"):
        memfit.fit(model, "60%", tmp_path / "out", task=TASK, text=text())
    assert not any(tmp_path.iterdir())


def test_an_out_that_exists_is_refused_and_kept(fitted, model):
    out = fitted[1]
    before = (out / "report.json").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        memfit.fit(model, "60%", out, task=TASK, text=text())
    assert (out / "report.json").read_bytes() == before


def test_overwriting_replaces_it_and_a_given_plan_is_carried_out(fitted, model, plan, tmp_path, monkeypatch):
    report, made, jobs = fitted
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "old").write_text("old")
    monkeypatch.setattr(room, "predict_fit", lambda *_, **__: fitted[0].predicted_fit)
    run_jobs_by(monkeypatch, jobs.again(made))
    again = memfit.fit(model, out=out, task=TASK, text=text(), given=plan, overwrite=True)
    assert not (out / "old").exists() and again.budget_nbytes == report.budget_nbytes
    assert read_plan(out / "plan.json").choices == plan.choices
    assert (out / "config.json").read_bytes() == (made / "config.json").read_bytes()


def test_a_quality_that_is_missed_is_an_error_and_the_output_is_kept(fitted, model, plan, tmp_path, monkeypatch):
    _, made, jobs = fitted
    monkeypatch.setattr(room, "predict_fit", lambda *_, **__: fitted[0].predicted_fit)
    run_jobs_by(monkeypatch, jobs.again(made))
    with pytest.raises(QualityMissed, match=r"at most 1e-09 allowed\. .*A larger budget, or a longer text"):
        memfit.fit(model, out=tmp_path / "out", task=TASK, text=text(), given=plan, max_kl=1e-9)
    assert (tmp_path / "out" / "report.json").is_file()


def test_a_peak_measured_over_the_budget_is_an_error_and_the_output_is_kept(
    fitted, model, plan, tmp_path, monkeypatch
):
    report, made, jobs = fitted
    monkeypatch.setattr(room, "predict_fit", lambda *_, **__: fitted[0].predicted_fit)
    run_jobs_by(monkeypatch, jobs.again(made, prove={"account": report.original.to_json()}))
    with pytest.raises(OverBudget, match=format_size(report.original.peak_nbytes)) as caught:
        memfit.fit(model, out=tmp_path / "out", task=TASK, text=text(), given=plan)
    assert caught.value.report.measured.peak_nbytes == report.original.peak_nbytes
    assert (tmp_path / "out" / "report.json").is_file()


def test_a_config_without_weights_cannot_be_fitted(tmp_path):
    source_from_config(hf.LlamaConfig(num_hidden_layers=1)).config.save_pretrained(tmp_path / "m")
    with pytest.raises(UsageError, match="no weights"):
        memfit.fit(tmp_path / "m", "1GiB", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="`load` needs the weights"):
        memfit.load(tmp_path / "m")
    with pytest.raises(UsageError, match="`eval` needs the weights"):
        memfit.evaluate(tmp_path / "m", demo.model_directory())
    (tmp_path / "m" / "model.onnx").touch()
    with pytest.raises(UsageError, match="ONNX Runtime in place of weights"):
        memfit.load(tmp_path / "m")


def test_a_model_is_judged_on_a_text(fitted, model):
    with pytest.raises(UsageError, match=r"is judged on a text, and there is none\. Give one \(--text FILE\)"):
        memfit.evaluate(fitted[1], model)


def test_a_fitted_model_is_accounted_with_its_own_cache(fitted):
    report, out, _ = fitted
    found = memfit.account(out, TASK)
    assert isinstance(found, Account)
    assert found.peak_nbytes == report.predicted.peak_nbytes
    assert open_source(out).kv_bits == read_plan(out / "plan.json").kv_bits


def test_a_loaded_model_generates_with_the_plans_cache(fitted, tmp_path):
    copied = tmp_path / "out"
    shutil.copytree(fitted[1], copied)
    config = json.loads((copied / "config.json").read_text())
    config["memfit"]["kv_bits"] = 4
    (copied / "config.json").write_text(json.dumps(config))
    kinds: set[str] = set()
    model = memfit.load(copied)
    model.register_forward_pre_hook(
        lambda _, inputs, given: kinds.update(type(layer).__name__ for layer in given["cache"].layers), with_kwargs=True
    )
    model.generate(torch.arange(1, 9).unsqueeze(0), max_new_tokens=2, do_sample=False)
    assert kinds == {"PackedCacheLayer"}


def test_a_stopped_run_goes_on_where_it_was(fitted, model, tmp_path, monkeypatch):
    made, jobs = fitted[1], fitted[2]
    asked = []

    def stopped(job, **limit):
        asked.append(job["do"])
        if job["do"] == "compress" and asked.count("compress") == 1:
            raise KeyboardInterrupt
        return jobs.again(made)(job, **limit)

    run_jobs_by(monkeypatch, stopped)
    call = partial(memfit.fit, model, "75%", tmp_path / "out", task=TASK, allowed=ALLOWED, threads=1)
    with pytest.raises(KeyboardInterrupt):
        call(text=text())
    assert [path.name for path in tmp_path.iterdir()] == [".out.memfit-work"]
    call(text=text())
    assert asked == ["calibrate", "choose", "compress", "choose", "compress", "prove"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_calibrated_for_another_question_is_not_used(fitted, model, tmp_path, monkeypatch):
    asked = []

    def stopped(job, **limit):
        asked.append(job["do"])
        if job["do"] == "compress":
            raise KeyboardInterrupt
        return fitted[2].again(fitted[1])(job, **limit)

    run_jobs_by(monkeypatch, stopped)
    for allowed in (ALLOWED, replace(ALLOWED, kv_bits=(16,))):
        with pytest.raises(KeyboardInterrupt):
            memfit.fit(
                model, "75%", tmp_path / "out", task=TASK, text=text(), allowed=allowed, threads=1
            )
    assert asked.count("calibrate") == 2


@pytest.mark.parametrize("searched", [False, True])
def test_a_given_plan_is_calibrated_for_as_when_it_was_made(fitted, model, plan, tmp_path, monkeypatch, searched):
    """In one setting nothing was priced, and statistics were no more than what rounding reads: so it is again."""
    asked = []

    def stopped(job, **limit):
        asked.append(job)
        if job["do"] != "reference":
            raise KeyboardInterrupt
        return {}

    run_jobs_by(monkeypatch, stopped)
    given = plan if searched else memfit.plan(model, "100%", task=TASK, text=text(), allowed=ALLOWED, uniform=True)
    assert (given.expected_kl is not None) is searched
    with pytest.raises(KeyboardInterrupt):
        memfit.fit(model, out=tmp_path / "out", text=text(), given=given, threads=1)
    assert asked[0]["do"] == "calibrate" and (asked[0]["allowed"] is not None) is searched
    assert asked[0].get("weighing", False) is not searched
    if searched:
        assert tuple(asked[0]["allowed"]["kv_bits"]) == tuple(dict.fromkeys((16, plan.kv_bits)))


def test_the_base_model_is_the_hubs_id_wherever_it_can_be_told(tmp_path):
    made = source_from_config(hf.LlamaConfig(), weights=False)
    cache = tmp_path / "models--owner--name" / "snapshots" / "abc"
    named = source_from_config(hf.LlamaConfig(name_or_path="owner/other"), weights=False)
    for source, expected in (
        (replace(made, name="owner/name"), "owner/name"),
        (replace(made, name=str(cache), directory=cache), "owner/name"),
        (replace(named, name=str(tmp_path)), "owner/other"),
        (replace(made, name=str(tmp_path)), tmp_path.name),
    ):
        assert steps.base_model(source) == expected


def test_an_edited_plan_is_counted_anew(model, plan):
    four = replace(plan.choices[-1].scheme or Scheme(bits=4, group=64), bits=4, group=64)
    edited = replace(plan, choices=(*plan.choices[:-1], replace(plan.choices[-1], scheme=four)))
    made = memfit.plan(model, given=replace(edited, budget_nbytes=10**9), budget=0)
    assert made.choices[-1].scheme == four
    assert made.choices[-1].nbytes == four.nbytes((plan.choices[-1].weights // 128, 128))
    assert made.predicted["peak_nbytes"] > 0 and made.expected_kl is None


def test_a_plan_for_another_model_is_refused_before_any_work(model, plan):
    first = plan.choices[0]
    for choices, what in (
        ((replace(first, members=("model.nope",)), *plan.choices[1:]), "model.nope"),
        (plan.choices[1:], first.name),
        ((replace(first, scheme=Scheme(bits=4, group=96)), *plan.choices[1:]), "g96"),
    ):
        with pytest.raises(BrokenInput, match=re.escape(what)):
            memfit.plan(model, given=replace(plan, choices=choices), budget=0)


def test_a_given_plan_that_cannot_keep_its_budget_is_told_at_once(model, plan):
    with pytest.raises(DoesNotFit) as caught:
        memfit.plan(model, given=replace(plan, budget_nbytes=1000), budget=0)
    assert caught.value.smallest_nbytes == plan.predicted["peak_nbytes"]


def test_what_is_to_be_kept_must_be_there(model):
    with pytest.raises(UsageError, match="--keep nothing: no tensor has this in its name"):
        memfit.plan(model, "75%", task=TASK, allowed=replace(ALLOWED, keep=("nothing",)))


def test_gptq_is_what_a_text_brings_and_is_predicted_and_told(fitted, model, plan, tmp_path):
    report = fitted[0]
    assert report.rounding is not None and report.rounding.startswith("GPTQ: ")
    assert report.predicted_fit.peak_nbytes == pytest.approx(report.measured_fit.peak_nbytes, rel=0.03)
    assert {phase.name for phase in report.measured_fit.phases} >= {"calibrate", "compensate", "compress"}
    assert Report.from_json(json.loads((fitted[1] / "report.json").read_text())).rounding == report.rounding
    plain = memfit.fit(
        model, out=tmp_path / "out", given=plan, text=text(), allowed=ALLOWED, threads=1, algorithm="search"
    )
    schemes = [[choice["scheme"] for choice in one.plan["choices"]] for one in (plain, report)]
    assert plain.rounding is None and schemes[0] == schemes[1], "prices are another's: what GPTQ will make costs less"
    assert report.quality.kl < 1.05 * plain.quality.kl  # of a model by chance; see test_compensate for its gain
    with pytest.raises(memfit.UsageError, match="GPTQ chooses integers for a text"):
        memfit.fit(model, out=tmp_path / "other", given=plan, algorithm="sparsegpt")
    with pytest.raises(memfit.UsageError, match="no algorithm is called 'best': take one of rtn, search"):
        memfit.fit(model, out=tmp_path / "other", given=plan, algorithm="best")


def test_plain_gptq_is_to_quantize_alone(model, tmp_path):
    both = replace(ALLOWED, techniques=("quantize", "low-rank"))
    with pytest.raises(UsageError, match="gptq-plain is to quantize alone, and low-rank is allowed"):
        memfit.fit(model, "75%", tmp_path / "out", task=TASK, text=text(), allowed=both, algorithm="gptq-plain")
    with pytest.raises(QualityMissed, match="More bits or another algorithm, or a longer text") as missed:
        memfit.fit(
            model, "100%", tmp_path / "out", task=TASK, text=text(), allowed=ALLOWED, uniform=True,
            algorithm="gptq-plain", max_kl=1e-9, threads=1,
        )  # fmt: skip
    report = missed.value.report
    assert report.algorithm == "gptq-plain" and "errors of the layers before not made up for" in report.rounding
    told, found = report.predicted_fit.phase("compensate"), report.measured_fit.phase("compensate")
    assert told.peak_nbytes == pytest.approx(found.peak_nbytes, rel=0.03)


def test_one_setting_for_everything_is_rounding_as_anyone_would(model, tmp_path):
    setting = memfit.Allowed(bits=(4,), groups={4: (64,)}, symmetric=False, kv_bits=(16,), keep=("embeddings",))
    told = {"task": TASK, "allowed": setting, "uniform": True}
    said: list[str] = []
    memfit.fit(
        model, "100%", tmp_path / "out", algorithm="rtn", measure=False, threads=1, progress=said.append, **told
    )
    assert all(said) and not any("calibrat" in line for line in said), "nothing is asked of a text"
    schemes = read_plan(tmp_path / "out" / "plan.json").schemes()
    source = open_source(model)
    found, right = memfit.load(tmp_path / "out"), source.build(dtype=torch.bfloat16)
    layers = {name for name, module in right.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert set(schemes) == layers and set(schemes.values()) == {Scheme(bits=4, group=64, symmetric=False)}
    for name in layers:
        plain = quantize(source.read_parameter(f"{name}.weight", dtype=torch.bfloat16), schemes[name], search=False)
        assert torch.equal(found.get_submodule(name).store.dense_rows(0, plain.q.shape[0]), dequantize(plain)), name
    with pytest.raises(memfit.DoesNotFit, match="needed with this setting") as refused:
        memfit.fit(model, 1000, tmp_path / "no", **told)
    assert memfit.plan(model, refused.value.smallest_nbytes, **told).predicted
    assert not (tmp_path / "no").exists()
