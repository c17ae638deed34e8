"""A model in a file for other programs: written, predicted, compared, and nothing lost where it cannot be."""

import re
from pathlib import Path

import gguf
import pytest
import torch
from rich.console import Console

import memfit
from memfit import demo
from memfit.export import export, mixture_of
from memfit.report.exported import render_export
from memfit.source.source import open_source


@pytest.fixture(scope="module")
def model(make_llama) -> Path:
    return make_llama(hidden_size=256, intermediate_size=256)


@pytest.fixture(scope="module")
def text() -> memfit.Text:
    words = demo.heldout_text().read_text(encoding="utf-8")
    return memfit.Text(
        calibration=words[:8000], evaluation=words[8000:16000], length=64, calibration_windows=4, evaluation_windows=4
    )


def test_a_file_is_written_predicted_and_compared(model: Path, text: memfit.Text, tmp_path: Path) -> None:
    made = export(model, "gguf:q4_k_m", tmp_path / "a.gguf", text=text, threads=1)
    read = gguf.GGUFReader(tmp_path / "a.gguf")
    assert read.fields["general.name"].contents() == model.name
    assert open_source(demo.model_directory()).stem == "demo"
    kinds = [tensor.tensor_type.name for tensor in read.tensors]
    assert made.kinds == {kind: kinds.count(kind) for kind in set(kinds)} and "Q4_K" in kinds
    assert made.nbytes == (tmp_path / "a.gguf").stat().st_size
    weights = sum(torch.Size(shape).numel() for shape in open_source(model).parameter_shapes().values())
    assert made.bits_a_weight == pytest.approx(8 * sum(int(t.n_bytes) for t in read.tensors) / weights)
    assert made.predicted.peak_nbytes == pytest.approx(made.measured.peak_nbytes, rel=0.03)
    assert made.quality is not None and made.quality.kl is not None and 0 < made.quality.kl < 0.1
    assert made.to_json()["quality"]["kl"] == made.quality.kl
    assert made.text is not None and (made.text["window"], made.text["calibration_windows"]) == (64, 4)
    console = Console(width=100, color_system=None)
    with console.capture() as shown:
        console.print(render_export(made.to_json()))
    assert re.search(r"made +on 4 windows of 64 tokens of .+, judged on 4 others", shown.get())


def test_what_is_there_is_kept_unless_it_may_go(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(memfit.UsageError, match=r"a\.gguf exists\. Choose another place"):
        export(model, "gguf:q8_0", tmp_path / "a.gguf", threads=1)
    assert (tmp_path / "a.gguf").read_text() == "mine"
    made = export(model, "gguf:q8_0", tmp_path / "a.gguf", overwrite=True, threads=1)
    assert made.quality is None and made.bits_a_weight == pytest.approx(8.5, abs=0.1)
    with pytest.raises(memfit.UsageError, match="of a directory with weights in safetensors"):
        export(tmp_path / "a.gguf", "gguf:q4_0", tmp_path / "b.gguf")


@pytest.mark.parametrize("before", [None, "mine"])
def test_a_run_that_is_stopped_while_it_compares_leaves_what_was_there(
    model: Path, text: memfit.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    file, seen = tmp_path / "a.gguf", []
    if before is not None:
        file.write_text(before)

    def stop(written: Path, *given: object, **more: object) -> None:
        seen.append(gguf.GGUFReader(written).fields["general.name"].contents())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("memfit.export.evaluate", stop)
        export(model, "gguf:q8_0", file, text=text, overwrite=True, threads=1)
    assert seen == [model.name]
    assert [one.read_text() for one in tmp_path.iterdir()] == ([] if before is None else ["mine"])
    # The same command goes through then, and the file is as of a run that nothing has stopped.
    export(model, "gguf:q8_0", file, text=text, overwrite=before is not None, threads=1)
    export(model, "gguf:q8_0", tmp_path / "b.gguf", text=text, threads=1)
    assert file.read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_a_directory_is_not_replaced_by_a_file(model: Path, tmp_path: Path) -> None:
    with pytest.raises(memfit.UsageError, match="is a directory, and the output is a file"):
        export(model, "gguf:q8_0", tmp_path, overwrite=True, threads=1)


def test_a_place_below_a_file_is_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(memfit.MemfitError, match="notes: cannot write here"):
        export(model, "gguf:q8_0", tmp_path / "notes" / "a.gguf", threads=1)


@pytest.mark.parametrize("form", ["gguf", "gguf:q9", "onnx", "q4_k_m"])
def test_a_form_that_is_not_written_names_those_that_are(form: str) -> None:
    with pytest.raises(memfit.UsageError, match=r"is not written. Known are compressed-tensors, .*gguf:q4_k_m"):
        mixture_of(form)
