"""Jobs answer, fail by name, and cannot take more than they are given."""

import pytest
import torch

from memfit import worker
from memfit.errors import BrokenInput, MemfitError, OverBudget, UsageError
from memfit.limits import RUNTIME_NBYTES, limited
from memfit.technique.checkpoint import is_out_of_memory
from memfit.worker import Process, run_job

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


FAKE = """
import sys
from memfit import worker
from memfit.errors import BrokenInput, OverBudget, UsageError, MemfitError
def fail(job):
    raise globals()[job["kind"]]("what is off, and what to do")
def die(job):
    print("last words", file=sys.stderr, flush=True)
    import os
    os.kill(os.getpid(), 9) if job["signal"] else sys.exit(1)
worker.JOBS.update(fail=fail, die=die, count=lambda job, seen=[]: seen.append(1) or {"seen": len(seen)})
worker.main()
"""
"""A worker with jobs that fail, die, and tell what came before in the same process."""


@pytest.fixture
def fake_jobs(monkeypatch):
    started = []
    begin = worker.subprocess.Popen

    def fake(words, **how):
        started.append(words)
        return begin([words[0], "-c", FAKE], **how)

    monkeypatch.setattr(worker.subprocess, "Popen", fake)
    return started


def test_jobs_of_one_process_follow_each_other_and_an_error_comes_back_by_class_and_message(fake_jobs):
    with Process() as process:
        assert run_job({"do": "count"}, process=process) == {"seen": 1}
        for kind in (BrokenInput, OverBudget, UsageError, MemfitError):
            with pytest.raises(kind, match="what is off, and what to do"):
                run_job({"do": "fail", "kind": kind.__name__}, process=process)
        assert run_job({"do": "count"}, process=process) == {"seen": 2}
        assert len(fake_jobs) == 1
        process.end()
        assert run_job({"do": "count"}, process=process) == {"seen": 1}


@pytest.mark.parametrize(("signal", "how"), [(True, "signal 9"), (False, "exit code 1")])
def test_a_job_that_dies_is_told_with_its_last_words(signal, how, fake_jobs):
    job = {"do": "die", "signal": signal}
    with pytest.raises(MemfitError, match=f"(?s)'die'.*{how}.*last words"):
        run_job(job)
    if signal:
        with pytest.raises(OverBudget, match="1234 bytes"):
            run_job(job, enforce_nbytes=1234)
