"""What cannot be done is said clearly, and what was there before is there after."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import memfit
from memfit import demo
from memfit.cli import main
from memfit.errors import DoesNotFit, MemfitError, UsageError
from memfit.export import export
from memfit.format.directory import OutputDirectory
from memfit.format.gguf import write_gguf
from memfit.format.safetensors import TensorSpec, Writer
from memfit.source.source import open_source
from memfit.text import write_windows
from memfit.worker import run_job

LIMIT = 200_000


@pytest.fixture(scope="module")
def model(make_llama) -> Path:
    return make_llama(hidden_size=64, intermediate_size=96)


@contextmanager
def disk_of(nbytes: int) -> Iterator[None]:
    """Inside, no file grows beyond this, as on a disk that is full then; processes that are started inherit it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def text(calibration: str, evaluation: str) -> memfit.Text:
    return memfit.Text(calibration=calibration, evaluation=evaluation, length=64, calibration_windows=4)


WORDS = demo.heldout_text().read_text(encoding="utf-8")[:8000]
TEXTS = {
    "too short to calibrate": (text("a few words", WORDS), r"to calibrate on.* too short: there are \d+ tokens"),
    "too short to evaluate": (text(WORDS, ""), r"to judge on.* too short: there are 0 tokens, and 64 are needed"),
    "one token to calibrate": (text(" x" * 500, WORDS), r"to calibrate on is one token, ' x', 256 times over"),
    "one token to evaluate": (text(WORDS, " x" * 500), r"to judge on is one token, ' x', \d+ times over"),
    "a word to calibrate": (text("import " * 500, WORDS), r"to calibrate on repeats itself: of its 228 runs of 8"),
    "a word to evaluate": (text(WORDS, "import " * 500), r"to judge on repeats itself: .* \d are different"),
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_a_text_that_says_nothing_is_refused_before_anything_is_written(what: str, tmp_path: Path) -> None:
    words, reason = TEXTS[what]
    with pytest.raises(UsageError, match=reason):
        write_windows(open_source(demo.model_directory()), words, tmp_path)
    assert not list(tmp_path.iterdir())


def test_judging_alone_asks_nothing_of_the_part_to_calibrate_on(tmp_path: Path) -> None:
    write_windows(open_source(demo.model_directory()), text("", WORDS), tmp_path, calibrates=False)
    assert list(torch.load(tmp_path / "windows.pt", weights_only=True)) == ["evaluation"]


@pytest.mark.parametrize(("words", "share"), [("a line\n" * 900, 0.5), ("a word " * 900 + "\n", 0.5), ("", 0.0)])
def test_a_file_is_cut_in_the_middle_at_a_line_if_one_is_near(words: str, share: float, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(words)
    cut = memfit.Text.from_file(tmp_path / "words.txt")
    assert cut.calibration + cut.evaluation == words
    assert len(cut.calibration) == pytest.approx(share * len(words), abs=8)
    assert not words.startswith("a line") or cut.calibration.endswith("\n")


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_written(make_llama, tmp_path: Path) -> None:
    small = open_source(make_llama(hidden_size=64, intermediate_size=96, vocab_size=300))
    with pytest.raises(UsageError, match=r"the tokenizer gives the id \d+, and the model knows 300 ids"):
        write_windows(small, text(WORDS, WORDS), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_there_stays_when_the_text_is_too_short(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_text("mine")
    with pytest.raises(UsageError, match="too short"):
        export(model, "gguf:q4_0", file, text=text("a", "b"), overwrite=True, threads=1)
    assert [one.name for one in tmp_path.iterdir()] == ["a.gguf"] and file.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--bits", "9"], "9"),
        (["--bits", "1"], "1"),
        (["--bits", "4", "--group", "48"], "--group: 48 is none of 128, 64, 32"),
        (["--bits", "4", "--group", "96"], "--group: 96 is none of 128, 64, 32"),
        (["--bits", "8,4", "--groups", "64,96"], "--groups: 96 is none of 128, 64, 32"),
        (["--format", "gguf:q7_k"], "gguf:q7_k"),
    ],
)
def test_a_width_or_group_that_no_format_holds_is_refused(
    options: list[str], reason: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    technique = [] if {"--format", "--groups"} & {*options} else ["--technique", "quantize"]
    monkeypatch.setattr("sys.argv", ["memfit", "fit", str(model), "-o", str(out), *technique, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def odd(make_llama) -> Path:
    """A model none of whose rows ends on a packed word."""
    return make_llama(hidden_size=48, intermediate_size=80)


def test_a_setting_that_no_weight_can_have_is_refused_and_says_why(odd: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for bits in (8, 4):
        four = memfit.Allowed(bits=(bits,), groups={bits: (128,)})
        with pytest.raises(UsageError, match=r"nothing in the model can be .*48 inputs are not a multiple of 32"):
            memfit.fit(odd, "60%", out, allowed=four, uniform=True, measure=False)
    kept = memfit.Allowed(bits=(4,), keep=("model", "lm_head"))
    with pytest.raises(UsageError, match=r"All that could change is kept \(--keep\)"):
        memfit.fit(odd, "100%", out, allowed=kept, uniform=True, measure=False)
    with pytest.raises(DoesNotFit, match=r"packed weights 0 B.* Nothing in it can be packed\. .* multiple of 32"):
        memfit.plan(odd, "60%")
    assert memfit.plan(odd, "100%", allowed=memfit.Allowed(bits=()), uniform=True).schemes() == {}


def test_a_model_that_is_not_there_is_named_with_what_a_model_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such directory or file\. A model is a directory with"):
        memfit.account(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"nowhere\.gguf: no such directory or file\."):
        memfit.account("nowhere.gguf")
    with pytest.raises(UsageError, match=r"--keep lm_heed: no tensor has this in its name\. There is model\."):
        memfit.plan(demo.model_directory(), "100%", allowed=memfit.Allowed(keep=("lm_heed",)))


@pytest.mark.parametrize("before", [False, True])
def test_a_disk_that_fills_while_a_gguf_is_written_leaves_what_was_there(
    before: bool, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.gguf"
    if before:
        file.write_text("mine")
    with disk_of(LIMIT), pytest.raises(MemfitError, match=r"the disk is full .*nothing half-written is left"):
        write_gguf(open_source(model), file, mixture="BF16", overwrite=True)
    assert [one.name for one in tmp_path.iterdir()] == ["a.gguf"] * before
    assert not before or file.read_text() == "mine"


def test_a_disk_that_fills_in_a_job_is_told_by_its_caller(model: Path, tmp_path: Path) -> None:
    work, file = tmp_path / "work", tmp_path / "a.gguf"
    work.mkdir()
    job = {"do": "gguf", "model": str(model), "work": str(work), "threads": 1, "target": str(file)}
    with disk_of(LIMIT), pytest.raises(MemfitError, match=r"the disk is full"):
        run_job(job | {"mixture": "F16", "overwrite": False})
    assert [one.name for one in tmp_path.iterdir()] == ["work"]


def test_a_disk_that_fills_while_a_directory_is_written_leaves_nothing(tmp_path: Path) -> None:
    specs = [TensorSpec(name="a", dtype=torch.float32, shape=(400, 400))]
    with (
        disk_of(LIMIT),
        pytest.raises(MemfitError, match=r"the disk is full"),
        OutputDirectory(tmp_path / "out") as out,
        Writer(out.path, specs) as writer,
    ):
        writer.write("a", torch.zeros(400, 400))
    assert not list(tmp_path.iterdir())
