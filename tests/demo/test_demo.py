"""The demo model is small, loads offline, keeps text, and has learned something."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from memfit import demo
from memfit.source.source import open_source
from memfit.text import text_of

WINDOW = 512


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo.model_directory())


def card_perplexity(row: str) -> float:
    card = (demo.model_directory() / "README.md").read_text(encoding="utf-8")
    match = re.search(rf"^\| {row} \| ([\d.]+) \|$", card, re.MULTILINE)
    assert match, f"the model card has no row {row!r}"
    return float(match[1])


def test_everything_shipped_is_at_most_12_megabytes():
    files = [f for f in Path(demo.__file__).parent.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(file.stat().st_size for file in files) <= 12_000_000


def test_it_has_a_name_unless_a_directory_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = open_source("demo")
    assert named.is_demo and named.directory == demo.model_directory() and text_of(None, named) is not None
    shutil.copytree(demo.model_directory(), tmp_path / "demo")
    assert not open_source("demo").is_demo


def test_perplexity_is_the_one_on_the_card_and_far_below_the_unigram_one(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(demo.model_directory(), dtype=torch.float32)
    text = demo.heldout_text().read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    # Every tenth window: 17 of them stand for the text to within a third, in about a second.
    windows = torch.stack([window for window in tokens.split(WINDOW)[::10] if len(window) == WINDOW])
    with torch.inference_mode():
        perplexity = math.exp(model(windows, labels=windows).loss)
    assert perplexity < card_perplexity("unigram model") / 10
    assert perplexity == pytest.approx(card_perplexity("this model"), rel=1 / 3)


def test_every_linear_input_is_a_multiple_of_128():
    model = AutoModelForCausalLM.from_pretrained(demo.model_directory())
    assert all(m.in_features % 128 == 0 for m in model.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize("text", ["def f(x):\n\treturn  x  # ok .\n", "naïve ☃ \r\n 漢字 🙂", " a ,  b 's"])
def test_tokenizer_gives_back_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_gives_back_both_shipped_texts(tokenizer):
    for file in (demo.heldout_text(), demo.calibration_text()):
        text = file.read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer(text, verbose=False).input_ids) == text


def test_a_separator_is_one_token_and_ends_generation(tokenizer):
    config = AutoModelForCausalLM.from_pretrained(demo.model_directory()).generation_config
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id] == [config.eos_token_id]


def test_texts_share_no_line_run():
    """Held-out files are not in the calibration text: no run of five long lines is in both."""
    held_out, calibration = (
        [line for line in file.read_text(encoding="utf-8").splitlines() if len(line) > 30]
        for file in (demo.heldout_text(), demo.calibration_text())
    )
    runs = {tuple(held_out[i : i + 5]) for i in range(len(held_out) - 4)}
    assert not any(tuple(calibration[i : i + 5]) in runs for i in range(len(calibration) - 4))
