"""The whole way to an ONNX directory: planned, written, run by ONNX Runtime alone, and nothing lost where it fails."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import memfit
from memfit.cli.app import app
from memfit.evaluate.onnx_model import OnnxModel
from memfit.export_onnx import OnnxExport, export_onnx
from memfit.worker import JOBS

room = importlib.import_module("memfit.export_onnx")
fit_room = importlib.import_module("memfit.fit")  # the attribute of the package is the function
trials = importlib.import_module("memfit.trials")

TASK = memfit.Infer(prompt=16, new_tokens=2)
ALLOWED = memfit.Allowed(bits=(4,), groups={4: (64,)}, kv_bits=(16,))
ALONE = textwrap.dedent("""
    import sys
    import numpy as np, onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options)
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in session.get_inputs() if i.name.startswith("past")}
    ids = np.arange(5, 17)[None]
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(12)[None]}
    np.save(sys.argv[2], session.run(["logits"], given | past)[0])
    assert "torch" not in sys.modules and "memfit" not in sys.modules
""")


def here(job: dict[str, Any], **limit: Any) -> dict[str, Any]:
    """A job in this process: what it is to do is the same, and nothing is imported anew."""
    return JOBS[job["do"]](json.loads(json.dumps(job)))


@pytest.fixture(scope="module")
def model(make_llama) -> Path:
    return make_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=1, initializer_range=0.2)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory) -> OnnxExport:
    out = tmp_path_factory.mktemp("onnx") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for module in (fit_room, trials, room):
            patch.setattr(module, "run_job", here)
        return export_onnx(model, "100%", out, task=TASK, threads=1, allowed=ALLOWED, uniform=True)


def test_a_plan_is_carried_out_and_proven(made: OnnxExport) -> None:
    out = Path(made.out)
    assert made.report.fits and made.difference < 1e-4
    schemes = [choice["scheme"] for choice in made.report.choices]
    assert schemes and all(scheme == {"bits": 4, "group": 64, "symmetric": True} for scheme in schemes)
    assert {name.rpartition(" ")[0] for name in made.written.operators} == {"MatMulNBits 4", "GatherBlockQuantized 4"}
    assert made.predicted.peak_nbytes == pytest.approx(made.measured.peak_nbytes, rel=0.03)
    assert made.resident_nbytes > 0 and made.prompt_tokens_per_s > 0 and (made.decode_tokens_per_s or 0) > 0
    assert made.directory_nbytes > 0
    assert not [path for path in out.parent.iterdir() if path != out]
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "plan.json", "report.json"} <= {
        path.name for path in out.iterdir()
    }
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    told = json.loads((out / "onnx.json").read_text())
    assert told["difference"] == made.difference == made.to_json()["onnx"]["difference"]
    card = (out / "README.md").read_text()
    assert "onnxruntime.InferenceSession(" in card and "library_name: onnxruntime" in card
    assert "memfit.load" not in card and "compressed-tensors" not in card.split("Made with")[0]
    assert set(json.loads((out / "report.json").read_text())["files"]) == {"model.onnx", "model.onnx.data"}


def test_its_report_tells_of_onnx_runtime_too(made: OnnxExport, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["report", made.out])
    assert shown.exit_code == 0 and "in ONNX Runtime  " in shown.output and "MatMulNBits 4" in shown.output
    shutil.copyfile(Path(made.out) / "report.json", tmp_path / "report.json")
    assert "ONNX" not in CliRunner().invoke(app, ["report", str(tmp_path)]).output
    (tmp_path / "onnx.json").write_text("{}", encoding="utf-8")
    broken = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(broken.exception, memfit.UsageError) and "onnx.json: not what" in str(broken.exception)


def test_the_code_on_the_card_runs_it(made: OnnxExport) -> None:
    card = (Path(made.out) / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("DIRECTORY", made.out), names)
    whole, _ = OnnxModel(Path(made.out) / "model.onnx").run(names["ids"])
    assert np.abs(names["answers"][0] - whole).max() < 1e-5


def test_the_file_is_sound_and_holds_a_tied_table_once(made: OnnxExport) -> None:
    onnx.checker.check_model(str(Path(made.out) / "model.onnx"))
    graph = onnx.load(Path(made.out) / "model.onnx", load_external_data=False).graph
    places = {
        item.name: next(int(entry.value) for entry in item.external_data if entry.key == "offset")
        for item in graph.initializer if item.external_data
    }  # fmt: skip
    assert places["lm_head.qweight"] == places["model.embed_tokens.qweight"]
    assert {item.name for item in graph.output} == {"logits", "present.0.key", "present.0.value"}
    assert {"past_key_values.0.key", "past_key_values.0.value"} <= {item.name for item in graph.input}


def test_onnx_runtime_alone_runs_it_and_steps_equal_the_whole(made: OnnxExport, tmp_path: Path) -> None:
    file = tmp_path / "logits.npy"
    words = [sys.executable, "-c", ALONE, made.out, str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, ids = np.load(file), np.arange(5, 17)[None]
    model = OnnxModel(Path(made.out) / "model.onnx")
    part, past = model.run(ids[:, :7])
    parts = [part]
    for at in range(7, 12):
        part, past = model.run(ids[:, at : at + 1], past)
        parts.append(part)
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() < 1e-4
    # Padding on the left moves nothing.
    padded = np.concatenate([np.zeros_like(ids[:, :3]), ids], axis=1)
    mask = np.concatenate([np.zeros_like(ids[:, :3]), np.ones_like(ids)], axis=1)
    assert np.abs(model.run(padded, mask_BPT=mask)[0][:, 3:] - whole).max() < 1e-4


@pytest.fixture
def answer(model: Path, made: OnnxExport, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the jobs answer, in place of running them: `difference` and, if `fit` is to end so, `late`."""
    told: dict[str, Any] = {"difference": 0.0, "late": None}

    def fitted(model: Any, budget: Any, out: Path, **options: Any) -> memfit.Report:
        shutil.copytree(made.out, out)
        if told["late"] is not None:
            raise told["late"](f"over; {out} is kept.", report=made.report)
        return made.report

    def job(job: dict[str, Any]) -> dict[str, Any]:
        if job["do"] == "onnx":
            written = {"nbytes": 1, "files": {}, "operators": {}, "repeated_nbytes": 0}
            return {"account": made.measured.to_json(), "written": written}
        speed = {"resident_nbytes": 1, "prompt_tokens_per_s": 1.0, "decode_tokens_per_s": None}
        return {"difference": told["difference"], **speed}

    plain = room.open_source
    monkeypatch.setattr(room, "open_source", lambda path: plain(model))
    monkeypatch.setattr(room, "predict_onnx", lambda fitted: made.predicted)
    monkeypatch.setattr(room, "fit", fitted)
    monkeypatch.setattr(room, "run_job", job)
    return told


@pytest.mark.parametrize("difference", [0.02, float("nan")])
def test_answers_that_differ_leave_nothing_behind(
    model: Path, answer: dict[str, Any], tmp_path: Path, difference: float
) -> None:
    answer["difference"] = difference
    with pytest.raises(memfit.MemfitError, match=r"differ from memfit's by (0.02|nan), and 0.01 is the most"):
        export_onnx(model, out=tmp_path / "out", task=TASK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [memfit.OverBudget, memfit.QualityMissed])
def test_what_misses_its_gate_is_written_and_told(
    model: Path, answer: dict[str, Any], tmp_path: Path, kind: type[memfit.MemfitError]
) -> None:
    answer["late"] = kind
    with pytest.raises(kind, match=r"/out is kept") as caught:
        export_onnx(model, out=tmp_path / "out", task=TASK)
    assert caught.value.report is not None and ".memfit" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "onnx.json").is_file()


def test_what_is_there_is_kept_unless_it_may_go(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(memfit.UsageError, match="exists"):
        export_onnx(model, out=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--bits", "8,3"), "weights of 3 bits cannot be in an ONNX file"),
        (("--technique", "quantize", "--bits", "6", "--dry-run"), "weights of 6 bits cannot be in an ONNX file"),
        (("--kv-bits", "8"), "KV cache of 8 bits cannot be in an ONNX file"),
        (("--allow", "quantize,low-rank", "--dry-run"), "what low-rank makes of a weight cannot be in an ONNX file"),
        (("--technique", "prune", "--sparsity", "0.5"), "what prune makes of a weight cannot be in an ONNX file"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(model: Path, words: tuple[str, ...], match: str) -> None:
    done = CliRunner().invoke(app, ["fit", str(model), "--format", "onnx", *words])
    assert isinstance(done.exception, memfit.UsageError) and match in str(done.exception)
