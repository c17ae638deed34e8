"""The main job on a model that is narrowed first: predicted as measured, written as stock transformers reads it."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import memfit
from memfit import demo
from memfit.cli import main
from memfit.errors import BrokenInput, DoesNotFit, UsageError
from memfit.jobs import JOBS
from memfit.plan.plan import read_plan

ROOMS = [importlib.import_module(f"memfit.{name}") for name in ("fit", "trials", "narrower", "cap")]
TASK = memfit.Infer(prompt=16, new_tokens=3)
NARROW = memfit.Narrow(blocks=2, heads=2, channels=128)
PLAIN = memfit.Allowed(bits=(), kv_bits=(16,))
HOW: dict[str, Any] = {"task": TASK, "threads": 1}


@pytest.fixture(autouse=True)
def jobs(monkeypatch) -> list[dict[str, Any]]:
    """What jobs were told; they run here, as a process for each would take most of the time."""
    told: list[dict[str, Any]] = []

    def run(job: dict[str, Any], **_: Any) -> Any:
        told.append(job)
        return json.loads(json.dumps(JOBS[job["do"]](job)))

    for room in ROOMS:
        monkeypatch.setattr(room, "run_job", run)
    return told


@pytest.fixture(scope="module")
def model(make_llama) -> Path:
    made: Path = make_llama(hidden_size=64, intermediate_size=256, num_hidden_layers=3, initializer_range=0.2)
    return made


def text() -> memfit.Text:
    words = demo.heldout_text().read_text(encoding="utf-8")
    return memfit.Text(
        calibration=words[:6000], evaluation=words[6000:12000], length=32, calibration_windows=4, evaluation_windows=2
    )


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["memfit", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--technique", "narrow"], "say how much stays, with --blocks, --heads, --channels or --experts"),
        (["--technique", "narrow", "--channels", "70%", "--bits", "4"], "--bits beside --technique narrow"),
        (["--channels", "most"], "a number from 1 or a share as 70%, got 'most'"),
        (["--technique", "narrow", "--heads", "3"], "--heads 3: of 4 heads, 2, 4 can stay"),
        (["--technique", "narrow", "--experts", "3"], "counts no experts"),
        (["--channels", "70%", "--format", "gguf:q4_k_m"], "--channels beside --format gguf:q4_k_m"),
        (["--channels", "70%", "--plan", "plan.json"], "--channels beside --plan"),
    ],
)
def test_options_that_do_not_go_together_are_told(command, tmp_path, words, told):
    code, err = command("fit", str(demo.model_directory()), "-o", str(tmp_path / "out"), "--quiet", *words)
    assert code == 2 and told in err


def peaks(account: Any) -> dict[str, int]:
    return {phase.name: phase.peak_nbytes for phase in account.phases}


def test_what_is_written_is_predicted_and_stock_transformers_runs_it(model, tmp_path):
    out = tmp_path / "out"
    report = memfit.fit(
        model, "100%", out, text=text(), narrow=NARROW, uniform=True, allowed=PLAIN, algorithm="rtn", **HOW
    )
    assert report.fits and report.measured is not None
    assert report.measured.peak_nbytes == report.predicted.peak_nbytes < report.original.peak_nbytes
    measured, predicted = peaks(report.measured_fit), peaks(report.predicted_fit)
    assert measured["narrow"] == pytest.approx(predicted["narrow"], rel=0.005)
    # Some KiB of a kernel's own stay from the pass before.
    assert measured["correct"] == pytest.approx(predicted["correct"], rel=0.005, abs=32 << 10)
    assert report.quality is not None and report.quality.kl > 0
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (2, 2, 1)
    assert (config["intermediate_size"], config["head_dim"]) == (128, 16) and "quantization_config" not in config
    card = (out / "README.md").read_text()
    assert "quantized" not in card and "is gone. In each block 2 heads and 128 channels stay." in card
    stock, told = hf.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(stock.eval()(ids, use_cache=False).logits, memfit.load(out)(ids, use_cache=False).logits)


def test_a_plan_searches_bits_of_what_stays_and_its_file_makes_the_same_again(model, tmp_path, jobs):
    allowed = memfit.Allowed(bits=(8, 4), groups={8: (None,), 4: (64,)}, kv_bits=(16,))
    narrow = memfit.Narrow(blocks=2, channels="50%")
    first, again = tmp_path / "first", tmp_path / "again"
    report = memfit.fit(
        model, "60%", first, text=text(), narrow=narrow, allowed=allowed, algorithm="search", measure=False, **HOW
    )
    plan = read_plan(first / "plan.json")
    assert plan.narrowed is not None and len(plan.narrowed["dropped"]) == 1 and plan.narrowed["channels"] == 128
    assert any(choice.scheme is not None for choice in plan.choices) and report.fits
    assert [job["do"] for job in jobs] == ["narrow", "calibrate", "compress"]
    memfit.fit(model, out=again, text=text(), given=plan, algorithm="search", measure=False, **HOW)
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert read_plan(again / "plan.json").narrowed == plan.narrowed
    with pytest.raises(UsageError, match="said beside a plan"):
        memfit.fit(model, out=tmp_path / "third", text=text(), given=plan, narrow=narrow)


def test_a_cap_on_resident_memory_counts_narrowing_in(model, tmp_path, jobs):
    how: dict[str, Any] = HOW | {"text": text(), "narrow": NARROW, "uniform": True, "allowed": PLAIN}
    with pytest.raises(DoesNotFit, match=r"\(--ram\)"):
        memfit.fit(model, "100%", tmp_path / "out", algorithm="rtn", measure=False, ram="1KiB", **how)
    assert [job["do"] for job in jobs] == ["idle"], "refused before anything is read"


def test_a_plan_of_a_config_needs_no_weights(tmp_path):
    config = hf.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    made = memfit.plan(str(tmp_path), "1GiB", task=TASK, narrow=NARROW)
    assert isinstance(made, memfit.Plan) and made.narrowed == NARROW.to_json()
    assert {member.split(".")[2] for choice in made.choices for member in choice.members if "layers" in member} == {
        "0", "1",
    }  # fmt: skip


def test_without_a_text_nothing_says_what_is_missed_least(model, tmp_path):
    with pytest.raises(UsageError, match=r"found on a text, and there is none. Give one \(--text FILE\)"):
        memfit.fit(model, "100%", tmp_path / "out", narrow=NARROW, task=TASK)


def test_a_plan_whose_narrowing_is_none_is_refused(model, tmp_path):
    plan = memfit.plan(model, "100%", task=TASK, uniform=True, allowed=PLAIN)
    assert isinstance(plan, memfit.Plan)
    data = plan.to_json() | {"narrowed": {"width": 3}}
    with pytest.raises(BrokenInput, match="the plan's narrowed: what stays is told by"):
        memfit.fit(model, out=tmp_path / "out", given=memfit.Plan.from_json(data), text=text())
