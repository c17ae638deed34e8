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
from memfit.errors import BrokenInput, Interrupted, MemfitError, UsageError
from memfit.train.checkpoints import Checkpoints, SaveFailed
from memfit.train.step import LossNotFinite
from memfit.training import Options, train

TASK = memfit.Train(batch=4, sequence=32, hyper=memfit.Hyper(lr=1e-3))
STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama by chance, with the demo's tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    config = hf.LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, attention_dropout=0.1,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    hf.AutoTokenizer.from_pretrained(demo.model_directory()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(demo.calibration_text().read_text(encoding="utf-8")[:12000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def plan(model):
    return memfit.plan(model, "80%", task=TASK)


@pytest.fixture(scope="module")
def plain(model, text, plan, tmp_path_factory):
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return train(model, text, out=out, given=plan, options=Options(steps=STEPS, save_every=2)), out


class Watcher:
    """An observer that does something after a step."""

    def __init__(self, act=lambda record: None):
        self.act, self.records, self.notes = act, [], []

    def begin(self, total, budget_nbytes):
        self.total = total

    def step(self, record):
        self.records.append(record)
        self.act(record)

    def note(self, step, what):
        self.notes.append((step, what))

    def evaluated(self, step, scores):
        pass

    def end(self):
        pass


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


def test_the_report_of_a_trained_model_is_shown_again(plain, capsys, monkeypatch):
    from memfit.cli import main

    monkeypatch.setattr("sys.argv", ["memfit", "report", str(plain[1])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "peak, measured" in capsys.readouterr().out


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(model, text, plan, plain, tmp_path, at):
    class Killed(BaseException):
        pass

    def kill(record):
        if record.step == at:
            raise Killed

    options = Options(steps=STEPS, save_every=2)
    with pytest.raises(Killed):
        train(model, text, out=tmp_path / "out", given=plan, options=options, observers=(Watcher(kill),))
    report = train(model, text, out=tmp_path / "out", options=options, resume=True)
    assert weights(tmp_path / "out") == weights(plain[1])
    assert report.losses == plain[0].losses
    steps = [line["step"] for line in log_of(tmp_path / "out") if "labels" in line]
    assert steps == list(range(1, STEPS + 1))


def test_sigterm_saves_and_the_run_goes_on(model, text, plan, plain, tmp_path):
    def stop(record):
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    options = Options(steps=STEPS, save_every=0)
    with pytest.raises(Interrupted, match="after step 3 of 6") as told:
        train(model, text, out=tmp_path / "out", given=plan, options=options, observers=(Watcher(stop),))
    assert told.value.exit_code == 75
    assert Checkpoints(tmp_path / "out.training/checkpoints").steps() == [3]
    assert not (tmp_path / "out").exists()
    train(model, text, out=tmp_path / "out", options=options, resume=True)
    assert weights(tmp_path / "out") == weights(plain[1])


def test_the_command_ends_with_75_when_it_is_told_to_end(model, text, tmp_path):
    command = [
        sys.executable, "-c", "from memfit.cli import main; main()", "train", str(model), "--data", str(text), "-o",
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


def test_memory_that_runs_out_changes_the_recipe_and_nothing_else(model, text, plan, plain, tmp_path, monkeypatch):
    """An allocation that fails: the same batch again, with the same chance, by a recipe that takes less."""
    from memfit.train.step import TrainStep

    failed = []
    call = TrainStep.__call__

    def short(self, batch):
        if self.steps == 2 and not failed:
            failed.append(batch["input_ids"])
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return call(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", short)
    watcher = Watcher()
    report = train(
        model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS), observers=(watcher,)
    )
    assert "memory ran out" in report.notes[0][1]
    assert [record.rung for record in watcher.records] == [0, 0, 1, 1, 1, 1]
    assert report.losses == pytest.approx(plain[0].losses, rel=2e-2)
    assert report.losses[:2] == plain[0].losses[:2]


def test_a_run_goes_back_to_its_checkpoint_if_weights_had_moved(model, text, plan, plain, tmp_path, monkeypatch):
    from memfit.train.step import TrainStep

    failed = []
    call = TrainStep.__call__

    def short(self, batch):
        if self.steps == 3 and not failed:
            failed.append(True)
            call(self, batch)
            self._updated = 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return call(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", short)
    options = Options(steps=STEPS, save_every=2)
    report = train(model, text, out=tmp_path / "out", given=plan, options=options)
    assert [what for _, what in report.notes][1] == "went back to step 2, as some weights had been updated"
    assert report.losses == pytest.approx(plain[0].losses, rel=2e-2)
    assert [line["step"] for line in log_of(tmp_path / "out") if "labels" in line] == list(range(1, STEPS + 1))


def test_a_run_goes_down_where_room_is_short_and_up_again(model, text, plan, plain, tmp_path, monkeypatch):
    from memfit.train import ladder, loop

    monkeypatch.setattr(ladder, "PATIENCE", 2)
    rungs = plan.ladder.rungs
    room = iter([1 << 40, rungs[1].extra_nbytes] + [1 << 40] * 10)
    monkeypatch.setattr(loop, "room_nbytes", lambda device: next(room))
    watcher = Watcher()
    report = train(
        model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS), observers=(watcher,)
    )
    assert [record.rung for record in watcher.records] == [0, 1, 1, 1, 0, 0]
    assert [what.partition(":")[0] for _, what in watcher.notes] == ["memory is short", "there is room again"]
    assert report.losses == pytest.approx(plain[0].losses, rel=2e-2)


def test_a_run_goes_down_where_a_step_took_more_than_its_budget(model, text, plan, plain, tmp_path, monkeypatch):
    """Someone else's bytes in this process, as a user's own data set may hold, count as the system counts them."""
    from memfit.train.loop import Loop

    hoard = []
    call = Loop._one

    def greedy(self):
        if self.done == 2 and not hoard:
            hoard.append(b"x" * (plan.budget_nbytes + self.settings.runtime_nbytes))
        return call(self)

    monkeypatch.setattr(Loop, "_one", greedy)
    watcher = Watcher()
    report = train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS), observers=(watcher,))
    assert [record.rung for record in watcher.records][:4] == [0, 0, 0, 1]
    assert "measured" in watcher.notes[0][1] and "allowed: going on with" in watcher.notes[0][1]
    assert report.losses == pytest.approx(plain[0].losses, rel=2e-2)


def test_memory_that_is_never_enough_is_told(model, text, plan, tmp_path, monkeypatch):
    from memfit.train import loop
    from memfit.train.step import TrainStep

    def never(self, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(TrainStep, "__call__", never)
    waited = []
    monkeypatch.setattr(loop.time, "sleep", waited.append)
    with pytest.raises(MemfitError, match="memory ran out at step 1 with the most frugal recipe"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS))
    assert waited == [1, 2, 4, 8, 16]


class Short:
    """Calls that run out of memory at given numbers, from 1."""

    def __init__(self, call, *numbers):
        self.call, self.numbers, self.done = call, numbers, 0

    def __call__(self, *args, **options):
        self.done += 1
        if not self.numbers or self.done in self.numbers:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return self.call(*args, **options)


def test_memory_that_runs_out_in_evaluation_changes_the_recipe(model, text, plan, plain, tmp_path, monkeypatch):
    from memfit.train.step import TrainStep

    short = Short(TrainStep.evaluate, 1)
    monkeypatch.setattr(TrainStep, "evaluate", lambda *args: short(*args))
    report = train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS, evaluate_every=3))
    assert [step for step, what in report.notes if "memory ran out" in what] == [4]
    assert [score["step"] for score in report.scores] == [3, 6]
    assert report.losses == pytest.approx(plain[0].losses, rel=2e-2)


def test_memory_that_is_never_enough_for_evaluation_loses_nothing(model, text, plan, plain, tmp_path, monkeypatch):
    from memfit.train import loop
    from memfit.train.step import TrainStep

    monkeypatch.setattr(loop.time, "sleep", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "evaluate", Short(TrainStep.evaluate))
        with pytest.raises(MemfitError, match=r"in the evaluation after step 6 .* checkpoint of step 6 is kept"):
            train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS, evaluate_every=0))
    report = train(
        model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS, evaluate_every=0), resume=True
    )
    assert len(report.losses) == STEPS


@pytest.mark.parametrize(
    ("where", "what", "message"),
    [
        ("memfit.training", "make_trainable", "memory ran out while the model was loaded"),
        ("memfit.train.checkpoints", "save_states", "step 2 could not be saved: .*There is no earlier checkpoint"),
        ("memfit.training", "write_model", "memory ran out while the model was written; its last checkpoint is kept"),
    ],
)
def test_memory_that_runs_out_elsewhere_is_told(model, text, plan, tmp_path, monkeypatch, where, what, message):
    monkeypatch.setattr(sys.modules[where], what, Short(None))
    with pytest.raises(MemfitError, match=message):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=2))
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(UsageError, match="another seed"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=9, seed=1), resume=True)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    with pytest.raises(UsageError, match="another data"):
        train(model, other, out=tmp_path / "out", given=plan, options=Options(steps=9), resume=True)
    place = next((tmp_path / "out.training/checkpoints").iterdir()) / "place.json"
    place.write_text("{")
    with pytest.raises(BrokenInput, match="cannot be read"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=9), resume=True)


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
        "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip

    class InOrder(hf.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(rows)

    there = hf.AutoModelForCausalLM.from_pretrained(model, dtype="auto", attention_dropout=0.0)
    arguments = hf.TrainingArguments(output_dir=str(tmp_path / "trainer"), **settings)
    InOrder(model=there, args=arguments, train_dataset=rows, callbacks=[plan.callback()]).train()
    ours = hf.AutoModelForCausalLM.from_pretrained(model, dtype="auto", attention_dropout=0.0)
    step = memfit.train_step(ours, plan, seed=42)
    torch.manual_seed(42)
    for n in range(3):
        step(made.batch(0, n))
    step.close()
    for (name, a), b in zip(there.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=4e-3), name
    assert "forward" not in vars(there)
    refused = hf.TrainingArguments(output_dir=str(tmp_path / "no"), **settings, gradient_accumulation_steps=2)
    with pytest.raises(UsageError, match="gradient_accumulation_steps is 2"):
        hf.Trainer(model=there, args=refused, train_dataset=rows, callbacks=[plan.callback()]).train()
