"""Whole runs: what is learned does not depend on memory, on being stopped or on being killed; trouble is told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import memfit
from memfit import demo
from memfit.errors import BrokenInput, Interrupted, UsageError
from memfit.train.checkpoints import Checkpoints, SaveFailed
from memfit.train.step import LossNotFinite
from memfit.training import Options, train

TASK = memfit.Train(batch=4, sequence=32, hyper=memfit.Hyper(lr=1e-3))
STEPS = 6


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in Path(f"{out}.training/log.jsonl").read_text().splitlines()]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_a_run_learns_and_its_output_loads(plain):
    report, out = plain
    assert report.losses[-1] < report.losses[0]
    found, told = hf.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert found.dtype == torch.bfloat16
    assert log_of(out)[-1]["step"] == STEPS
    assert json.loads((out / "training.json").read_text())["measured_nbytes"] > 0
    assert "<svg" in (out / "training.html").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_that_was_trained_on_a_gpu_is_written(model, text, tmp_path):
    report = train(model, text, out=tmp_path / "out", task=TASK, options=Options(steps=2), device="cuda")
    assert report.measured_nbytes == pytest.approx(report.plan["predicted"]["peak_nbytes"], rel=0.005)
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert not torch.equal(found.model.embed_tokens.weight, memfit.load(model).model.embed_tokens.weight)


def test_the_report_of_a_trained_model_is_shown_again(plain, capsys, monkeypatch):
    from memfit.cli import main

    monkeypatch.setattr("sys.argv", ["memfit", "report", str(plain[1])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "peak, measured" in capsys.readouterr().out


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(model, text, plan, plain, tmp_path, watcher, at):
    class Killed(BaseException):
        pass

    def kill(record):
        if record.step == at:
            raise Killed

    watcher.act = kill
    options = Options(steps=STEPS, save_every=2)
    with pytest.raises(Killed):
        train(model, text, out=tmp_path / "out", given=plan, options=options, observers=(watcher,))
    report = train(model, text, out=tmp_path / "out", options=options, resume=True)
    assert weights(tmp_path / "out") == weights(plain[1])
    assert report.losses == plain[0].losses
    steps = [line["step"] for line in log_of(tmp_path / "out") if "labels" in line]
    assert steps == list(range(1, STEPS + 1))


def test_sigterm_saves_and_the_run_goes_on(model, text, plan, plain, tmp_path, watcher):
    def stop(record):
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher.act = stop
    options = Options(steps=STEPS, save_every=0)
    with pytest.raises(Interrupted, match="after step 3 of 6") as told:
        train(model, text, out=tmp_path / "out", given=plan, options=options, observers=(watcher,))
    assert told.value.exit_code == 75
    assert Checkpoints(tmp_path / "out.training/checkpoints").steps() == [3]
    assert not (tmp_path / "out").exists()
    train(model, text, out=tmp_path / "out", options=options, resume=True)
    assert weights(tmp_path / "out") == weights(plain[1])


def test_the_command_ends_with_75_when_it_is_told_to_end(model, text, tmp_path):
    command = [
        sys.executable, "-c", "from memfit_command import main; main()", "train", str(model), "--data", str(text), "-o",
        str(tmp_path / "out"), "--batch", "4", "--sequence", "32", "--steps", "100000",
    ]  # fmt: skip
    log = tmp_path / "out.training" / "log.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        process.terminate()
        told = process.communicate()[1]
    assert process.returncode == 75, told
    assert "--resume goes on" in " ".join(told.split())


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(model, text, plan, tmp_path, monkeypatch):
    from memfit.train.step import TrainStep

    call = TrainStep.__call__

    def broken(self, batch):
        if self.steps == 4:
            with torch.no_grad():
                next(self.model.parameters())[0] = torch.nan
            batch = batch | {"input_ids": torch.zeros_like(batch["input_ids"])}
        return call(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", broken)
    with pytest.raises(LossNotFinite, match="nan at step 5"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS, save_every=2))
    assert Checkpoints(tmp_path / "out.training/checkpoints").steps() == [4]
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_stops_the_run_and_keeps_the_last_checkpoint(model, text, plan, tmp_path, monkeypatch):
    real = shutil.disk_usage

    def usage(path):
        full = Checkpoints(tmp_path / "out.training/checkpoints").steps()
        return real(path)._replace(free=1000 if full else 1 << 40)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(SaveFailed, match=r"step 4 could not be saved.*1000 B free.*checkpoint of step 2 is kept"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS, save_every=2))
    assert Checkpoints(tmp_path / "out.training/checkpoints").steps() == [2]


def test_a_run_is_not_gone_on_with_otherwise(model, text, plan, plain, tmp_path):
    shutil.copytree(f"{plain[1]}.training", tmp_path / "out.training")
    with pytest.raises(UsageError, match="a run was here"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS))
    with pytest.raises(UsageError, match=f"9 steps with --resume: the run was begun for {STEPS}"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=9), resume=True)
    with pytest.raises(UsageError, match="steps with --resume: the run was begun for"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(epochs=2), resume=True)
    with pytest.raises(UsageError, match="another seed"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS, seed=1), resume=True)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    with pytest.raises(UsageError, match="another data"):
        train(model, other, out=tmp_path / "out", given=plan, options=Options(steps=STEPS), resume=True)
    place = next((tmp_path / "out.training/checkpoints").iterdir()) / "place.json"
    place.write_text("{")
    with pytest.raises(BrokenInput, match="cannot be read"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS), resume=True)


def test_a_body_gets_a_head_and_learns_classes(tmp_path):
    directory, out = tmp_path / "bert", tmp_path / "out"
    config = hf.BertConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.BertModel(config).save_pretrained(directory)
    tokenizer = hf.AutoTokenizer.from_pretrained(demo.model_directory())
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    words = {"yes": "good fine", "no": "bad poor"}
    rows = [{"text": f"{words[label]} {n}", "label": label} for n in range(40) for label in words]
    task = memfit.Train(batch=8, sequence=16, hyper=memfit.Hyper(lr=3e-3))
    report = train(directory, rows, "100%", out, task=task, adapters=False, options=Options(epochs=4))
    assert report.classification["accuracy"] > 0.9
    found, told = hf.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert found.config.id2label == {0: "no", 1: "yes"}
    ids = hf.AutoTokenizer.from_pretrained(out)("good fine 3", return_tensors="pt")
    assert found.eval()(**ids).logits.argmax() == 1
    with pytest.raises(UsageError, match="row 3 has the label 2, and the model has 2 classes"):
        train(out, [{"text": str(n), "label": n % 3} for n in range(60)], out=tmp_path / "no", task=task)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(128, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 128)

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0])


def test_a_module_of_ones_own_is_trained(tmp_path):
    torch.manual_seed(0)
    report = train(
        Recurrent(), ["abcdefgh" * 200], "100%", tmp_path / "out", tokenizer=lambda text: list(text.encode()),
        task=memfit.Train(batch=4, sequence=16, hyper=memfit.Hyper(lr=1e-2)), options=Options(steps=20),
    )  # fmt: skip
    assert report.losses[-1] < 0.8 * report.losses[0]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_certificate_compares_with_plain_training(model, text, plan, tmp_path):
    report = train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=1, certify=2))
    assert report.certificate["steps"] == 2
    assert report.certificate["gap"] <= 5 * max(report.certificate["floor"], 1e-3)
    assert len(report.certificate["losses"]["planned"]) == 2


def test_adapters_are_trained_and_written_as_peft_does(model, text, tmp_path):
    report = train(
        model, text, "60%", tmp_path / "out", task=TASK, full=False, options=Options(steps=2)
    )
    assert "LoRA" in report.plan["changes"][0]
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    from peft import AutoPeftModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is going
        assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_the_trainer_trains_as_planned(model, text, plan, tmp_path):
    from memfit.data.batches import batches_of
    from memfit.data.read import read_data

    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    made = batches_of(
        read_data(text), tokenizer, kind="causal", sequence=32, batch=4, vocabulary=4096, shuffle=False
    )
    rows = [
        {name: tensor[row] for name, tensor in made.batch(0, n).items()} for n in range(3) for row in range(4)
    ]
    settings = {
        "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip

    class InOrder(hf.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(rows)

    there = hf.AutoModelForCausalLM.from_pretrained(model, dtype="auto", attention_dropout=0.0)
    arguments = hf.TrainingArguments(output_dir=str(tmp_path / "trainer"), **settings)
    trainer = InOrder(model=there, args=arguments, train_dataset=rows, callbacks=[plan.callback()])
    trainer.train()
    assert all(line["grad_norm"] > 0 for line in trainer.state.log_history if "grad_norm" in line)
    ours = hf.AutoModelForCausalLM.from_pretrained(model, dtype="auto", attention_dropout=0.0)
    step = memfit.train_step(ours, plan, seed=42)
    torch.manual_seed(42)
    for n in range(3):
        step(made.batch(0, n))
    step.close()
    for (name, a), b in zip(there.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=4e-3), name
    assert "forward" not in vars(there)
    larger = hf.TrainingArguments(output_dir=str(tmp_path / "no"), **settings | {"per_device_train_batch_size": 6})
    with pytest.raises(UsageError, match="a batch of 6 x 32 tokens, and the plan is for 4 x 32"):
        hf.Trainer(model=there, args=larger, train_dataset=rows, callbacks=[plan.callback()]).train()
    vars(there).pop("forward")
    refused = hf.TrainingArguments(output_dir=str(tmp_path / "no"), **settings, gradient_accumulation_steps=2)
    with pytest.raises(UsageError, match="gradient_accumulation_steps is 2"):
        hf.Trainer(model=there, args=refused, train_dataset=rows, callbacks=[plan.callback()]).train()


def test_the_command_does_not_go_on_with_other_settings(plain, model, text, monkeypatch, capsys):
    from memfit.cli import main

    words = ["train", str(model), "--data", str(text), "-o", str(plain[1]), "--resume", "--quiet"]
    monkeypatch.setattr("sys.argv", ["memfit", *words, "--lr", "3e-4"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--lr 0.0003 with --resume: the run was begun with 0.001" in told
    for words_, message in (
        (("--budget", "3MiB"), "--budget 3MiB with --resume: the run was begun with"),
        (("--adapters",), "--adapters True with --resume: the run was begun with False"),
        (("--slowdown", "1.1"), "--slowdown 1.1 with --resume: the run was begun with None"),
        (("--schedule", "linear"), "--schedule linear with --resume: the run was begun with"),
    ):
        monkeypatch.setattr("sys.argv", ["memfit", *words, *words_])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_sigterm_before_anything_is_learned_ends_the_command_as_an_interruption(model, text, monkeypatch, capsys):
    from memfit.cli import main

    monkeypatch.setattr("memfit.training.read_data", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("sys.argv", ["memfit", "train", str(model), "--data", str(text), "--quiet"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 75
    assert "Interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_step_that_was_closed_says_so(model, plan):
    step = memfit.train_step(memfit.load(model, plan), plan)
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "labels": torch.ones(2, 8, dtype=torch.int64)}
    step(batch)
    step.close()
    with pytest.raises(UsageError, match="the step is closed"):
        step(batch)


def test_a_run_that_is_gone_on_with_has_as_many_steps_as_it_was_begun_with(model, text, plan, plain, tmp_path):
    shutil.copytree(f"{plain[1]}.training", tmp_path / "out.training")
    report = train(model, text, out=tmp_path / "out", given=plan, resume=True)
    assert len(report.records) == STEPS and weights(tmp_path / "out") == weights(plain[1])


@pytest.mark.parametrize("out", ["text.txt/out", "/proc/out"])
def test_a_place_that_cannot_be_written_is_told(model, plan, text, tmp_path, out):
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UsageError, match=r"out.training: cannot be written \(.*\). Choose another place"):
        train(model, text, out=tmp_path / out, given=plan, options=Options(steps=1))
    assert (tmp_path / "text.txt").read_text() == "text"


def test_adapters_alone_are_no_model(text, tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/adapter_config.json").write_text("{}")
    with pytest.raises(BrokenInput, match=r"has adapters and no model. Merge them"):
        train(tmp_path / "adapters", text, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
