"""Jobs answer, fail by name, and cannot take more than they are given."""

import pytest
import torch

from memfit import worker
from memfit.errors import BrokenInput, MemfitError, OverBudget, UsageError
from memfit.limits import RUNTIME_NBYTES, limited
from memfit.technique.checkpoint import is_out_of_memory
from memfit.worker import run_job

MODEL = {
    "config": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }
}  # fmt: skip


def test_under_a_limit_more_memory_is_refused_and_after_it_there_is_plenty():
    wanted = RUNTIME_NBYTES + (256 << 20)
    with limited(1 << 20), pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(wanted, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert torch.empty(wanted, dtype=torch.uint8).numel() == wanted


def test_under_a_limit_what_is_allowed_can_be_had():
    with limited(64 << 20):
        assert torch.ones(60 << 20, dtype=torch.uint8)[-1] == 1


def test_no_limit_is_no_limit():
    with limited(None):
        assert torch.empty(1 << 28, dtype=torch.uint8).numel() == 1 << 28


def test_a_job_measures_in_a_process_of_its_own():
    task = {"prompt": 16, "new_tokens": 2}
    answer = run_job({"do": "measure", "model": MODEL, "task": task, "threads": 1, "dtype": "bfloat16"})
    account = answer["account"]
    assert set(account["phases"]) == {"load", "prefill", "decode"}
    assert account["resident_nbytes"] > account["peak_nbytes"] > 0


@pytest.mark.parametrize("kind", [BrokenInput, OverBudget, UsageError, MemfitError])
def test_an_error_comes_back_by_class_and_message(kind, monkeypatch, capsys):
    def fail(job):
        raise kind("what is off, and what to do")

    monkeypatch.setitem(worker.JOBS, "fail", fail)
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"read": lambda self: '{"do": "fail"}'})())
    worker.main()
    told = capsys.readouterr().out

    class Done:
        stdout, stderr, returncode = told, "", 0

    monkeypatch.setattr(worker.subprocess, "run", lambda *args, **more: Done())
    with pytest.raises(kind, match="what is off, and what to do"):
        run_job({"do": "fail"})


@pytest.mark.parametrize(("code", "how"), [(-9, "signal 9"), (1, "exit code 1")])
def test_a_job_that_dies_is_told_with_its_last_words(code, how, monkeypatch):
    class Done:
        stdout, stderr, returncode = "", "last words", code

    monkeypatch.setattr(worker.subprocess, "run", lambda *args, **more: Done())
    with pytest.raises(MemfitError, match=f"(?s)'measure'.*{how}.*last words"):
        run_job({"do": "measure"})
    with pytest.raises(OverBudget, match="1234 bytes"):
        run_job({"do": "measure"}, enforce_nbytes=1234)
