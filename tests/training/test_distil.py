"""Whole runs with a teacher: in memory or asked beforehand, stopped and gone on with; what does not suit is told."""

import importlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

import memfit
from memfit import demo
from memfit.account.dry_run import dry_run
from memfit.account.meter import Meter
from memfit.data.batches import batches_of
from memfit.data.read import read_data
from memfit.distilling import asking_within, plan_with_teacher
from memfit.errors import BrokenInput, DoesNotFit, Interrupted, UsageError
from memfit.jobs import JOBS
from memfit.models import load_model
from memfit.source.source import open_source
from memfit.technique.distil import Distil, top_of
from memfit.train.distil import IDS, LOG_PROBS, REST, Teacher
from memfit.train.distil_store import Answered, Asking, Kept, Rows, record
from memfit.train.plan import TrainPlan
from memfit.train.work import shape_of
from memfit.train_planning import _ways, tiers
from memfit.training import Options, train

TASK = memfit.Train(batch=4, sequence=32, hyper=memfit.Hyper(lr=1e-3))
STEPS = 4


@pytest.fixture(scope="module")
def teacher(make_llama):
    return make_llama(hidden_size=48, intermediate_size=96, num_hidden_layers=3)


def weights(out):
    return (out / "model.safetensors").read_bytes()


def here(job, **limits):
    """What `run_job` does, without the seconds that a process takes to begin."""
    told = json.loads(json.dumps(job))
    return json.loads(json.dumps(JOBS[told["do"]](told)))


def planned(model, task):
    """A plan without a search."""
    account = memfit.account(model, task)
    return TrainPlan(
        model=str(model), task=task, budget_nbytes=2 * account.peak_nbytes, predicted=account.to_json(), seconds=1.0
    )


def run(model, text, out, distil, **options):
    given = planned(model, replace(TASK, distil=distil, recipe=memfit.Recipe(precision="master")))
    return train(model, text, out=out, given=given, options=Options(steps=STEPS, save_every=2), **options)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(model, teacher, text, tmp_path, watcher, monkeypatch, place):
    distil = Distil(teacher=str(teacher), place=place, top=None if place == "memory" else 32)
    monkeypatch.setattr("memfit.distilling.run_job", here)
    plain = run(model, text, tmp_path / "plain", distil)
    assert plain.losses[-1] < plain.losses[0]
    assert (tmp_path / "plain.training" / "answers").exists() == (place == "disk")

    class Killed(BaseException):
        pass

    def kill(record):
        if record.step == 3:
            raise Killed

    watcher.act = kill
    with pytest.raises(Killed):
        run(model, text, tmp_path / "out", distil, observers=(watcher,))
    report = train(model, text, out=tmp_path / "out", options=Options(steps=STEPS, save_every=2), resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    assert report.losses == plain.losses
    assert report.plan["task"]["distil"]["place"] == place
    file = tmp_path / "out.training" / "plan.json"
    told = json.loads(file.read_text())
    told["task"]["distil"]["alpha"] = 0.25
    file.write_text(json.dumps(told))
    with pytest.raises(UsageError, match="another teacher"):
        train(model, text, out=tmp_path / "out", options=Options(steps=STEPS), resume=True)


def test_cross_entropy_alone_is_plain_training_to_the_bit(model, teacher, text, tmp_path):
    plain = run(model, text, tmp_path / "plain", None)
    alone = run(model, text, tmp_path / "out", Distil(teacher=str(teacher), alpha=1.0))
    assert alone.losses == plain.losses
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


# -- where the teacher is ------------------------------------------------------------------------------

CHANGE = "of each token's answer the teacher's 64 likeliest are told apart, the others are one"


@pytest.mark.parametrize(
    ("memory", "disk", "chosen"),
    [
        ((), (), "memory"),
        (("8 bits",), (), "disk"),
        (("8 bits",), ("8 bits",), "memory"),
        (None, ("8 bits",), "disk"),
        (("LoRA", "4 bits"), None, "memory"),
        (None, None, None),
    ],
)
def test_a_teacher_is_where_least_is_changed(teacher, memory, disk, chosen):
    """None: nothing fits."""
    task, asked = replace(TASK, distil=Distil(teacher=str(teacher))), []

    def plan_for(task):
        asked.append(task.distil.place)
        changes = {"memory": memory, "disk": disk}[task.distil.place]
        if changes is None:
            raise DoesNotFit("no", smallest_nbytes={"memory": 9, "disk": 7}[task.distil.place])
        return TrainPlan(model="m", task=task, budget_nbytes=1 << 30, predicted={}, changes=changes)

    if chosen is None:
        with pytest.raises(DoesNotFit) as told:
            plan_with_teacher(plan_for, task, "causal")
        assert told.value.smallest_nbytes == 7
        return
    plan = plan_with_teacher(plan_for, task, "causal")
    assert plan.task.distil.place == chosen
    assert plan.changes == ((CHANGE, *disk) if chosen == "disk" else memory)
    assert plan.seconds > 0 or chosen == "disk"
    assert asked == ["memory"] if memory == () else asked == ["memory", "disk"]
    for kind, match in (("masked", ()), ("causal", ("hidden",))):
        asked.clear()
        alone = replace(task, distil=replace(task.distil, match=match))
        if memory is None:
            with pytest.raises(DoesNotFit):
                plan_with_teacher(plan_for, alone, kind)
        else:
            assert plan_with_teacher(plan_for, alone, kind).task.distil.place == "memory"
        assert asked == ["memory"]


def test_a_large_teacher_is_asked_beforehand(make_llama):
    model = make_llama(hidden_size=32, intermediate_size=64, vocab_size=512)
    large = str(make_llama(hidden_size=64, intermediate_size=8192, vocab_size=512))
    asking = dry_run(lambda: load_model(open_source(large)), Asking(rows=1, sequence=32, top=64, temperature=1.0))
    tight = asking.peak_nbytes + (64 << 10)
    plan = memfit.plan(model, tight, task=replace(TASK, distil=Distil(teacher=large, place="disk")), adapters=False)
    assert plan.peak_nbytes <= tight
    assert plan.changes == (CHANGE,)
    with pytest.raises(DoesNotFit, match="needed at the least to ask the teacher") as told:
        asking_within(Distil(teacher=large), "causal", 32, tight // 2, masked=False)
    assert told.value.smallest_nbytes == asking.peak_nbytes


def test_attention_is_matched_without_blocks_run_again(model):
    task = replace(TASK, distil=Distil(teacher=str(model), match=("attention",)))
    shape = shape_of(lambda recipe: memfit.load(model))
    tier = next(tiers(task, torch.bfloat16, full=True, adapters=False))
    for each, found in ((task, False), (TASK, True)):
        assert any(way.recipe.recompute for way in _ways(shape, each, tier, 1e9, None, 1.0)) == found
    again = replace(task, recipe=memfit.Recipe(recompute=("model.layers.0",)))
    with pytest.raises(UsageError, match="needs each block's attention kept"):
        memfit.train_step(memfit.load(model), again)


# -- answers on the disk -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(model, text):
    batches = batches_of(
        read_data(text), hf.AutoTokenizer.from_pretrained(model), kind="causal", sequence=32, batch=4, vocabulary=4096
    )
    return batches, Rows.of(batches)


def test_answers_are_those_of_each_row_in_any_order(rows, teacher, tmp_path):
    batches, own = rows
    model = memfit.load(teacher)
    record(Teacher(model), own, tmp_path / "answers", about={"a": 1}, at_once=8, top=9, temperature=2.0)
    kept = Kept(tmp_path / "answers", own, about={"a": 1}, top=9)
    data = Answered(batches, kept)
    assert data.fingerprint == batches.fingerprint and len(data) == len(batches)
    for epoch, index in ((0, 0), (3, 2)):
        batch = data.batch(epoch, index)
        right = top_of(model(batch["input_ids"]).logits.flatten(0, 1), top=9, temperature=2.0)
        assert batch[IDS].shape == (4, 32, 9) and batch[IDS].dtype == torch.int32
        assert torch.allclose(batch[LOG_PROBS].flatten(0, 1), right.log_probs_Nk, atol=2e-2)
        assert torch.allclose(batch[REST].flatten(), right.rest_N, atol=2e-2)
        assert (batch[IDS].flatten(0, 1)[:, 0] == right.ids_Nk[:, 0]).float().mean() > 0.9
        total = batch[LOG_PROBS].exp().sum(-1) + batch[REST].exp()
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def test_rows_of_other_lengths_keep_their_places(teacher, tmp_path):
    pairs = [{"prompt": "one two " * n, "completion": "three four"} for n in range(1, 9)]
    tokenizer = hf.AutoTokenizer.from_pretrained(teacher)
    batches = batches_of(read_data(pairs), tokenizer, kind="causal", sequence=24, batch=3, vocabulary=4096)
    own, model = Rows.of(batches), memfit.load(teacher).float()
    record(Teacher(model), own, tmp_path / "answers", about={}, at_once=4, top=5, temperature=1.0)
    data = Answered(batches, Kept(tmp_path / "answers", own, about={}, top=5))
    for index in range(len(data)):
        batch = data.batch(0, index)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        right = top_of(logits.flatten(0, 1), top=5, temperature=1.0)
        read = batch["attention_mask"].bool().flatten()
        assert torch.allclose(batch[LOG_PROBS].flatten(0, 1)[read], right.log_probs_Nk[read], atol=1e-4)
        assert bool(torch.isfinite(batch[LOG_PROBS]).all())


def test_a_pass_that_is_stopped_goes_on_to_the_same_bytes(rows, teacher, tmp_path):
    _, own = rows
    model = memfit.load(teacher)
    settings = {"about": {"a": 1}, "at_once": 8, "top": 9, "temperature": 2.0}
    record(Teacher(model), own, tmp_path / "whole", **settings)

    class Killed(BaseException):
        pass

    def kill(done):
        if done >= 24:
            raise Killed

    with pytest.raises(Killed):
        record(Teacher(model), own, tmp_path / "part", **settings, progress=kill)
    assert not (tmp_path / "part").exists()
    with (tmp_path / "part.part" / "rest").open("ab") as file:
        file.write(b"abc")  # half of what was to follow
    done = []
    record(Teacher(model), own, tmp_path / "part", **settings, progress=done.append)
    assert done[0] > 24
    for name in ("ids", "log_probs", "rest"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(BrokenInput, match="another teacher, text or setting"):
        Kept(tmp_path / "part", own, about={"a": 2}, top=9)
    with (tmp_path / "part" / "ids").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(BrokenInput, match="missing or cut short"):
        Kept(tmp_path / "part", own, about={"a": 1}, top=9)


def test_a_disk_that_fills_keeps_what_was_answered(rows, teacher, tmp_path, monkeypatch):
    _, own = rows
    model = memfit.load(teacher)
    settings = {"about": {}, "at_once": 4, "top": 9, "temperature": 2.0}
    store = importlib.import_module("memfit.train.distil_store")
    asked = store._asked

    def full(teacher, rows, start, *rest):
        if start >= 12:
            raise OSError(28, "No space left on device")
        return asked(teacher, rows, start, *rest)

    monkeypatch.setattr(store, "_asked", full)
    message = r"the disk is full .* with the answers of 12 of .* rows. They are kept"
    with pytest.raises(Interrupted, match=message) as told:
        record(Teacher(model), own, tmp_path / "answers", **settings)
    assert told.value.exit_code == 75
    monkeypatch.setattr(store, "_asked", asked)
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(Interrupted, match=r"needed for the teacher's answers, 1000 B free"):
        record(Teacher(model), own, tmp_path / "answers", **settings)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    done = []
    record(Teacher(model), own, tmp_path / "answers", **settings, progress=done.append)
    assert done[0] == 16


@pytest.mark.parametrize("masked", [False, True])
def test_what_asking_takes_is_predicted(teacher, masked):
    asking = Asking(rows=4, sequence=32, top=64, temperature=2.0, masked=masked)
    predicted = dry_run(lambda: load_model(open_source(teacher)), asking)
    meter = Meter()
    with meter.phase("load"):
        model = load_model(open_source(teacher))
    asking.run(model, meter)
    for phase in predicted.phases:
        assert abs(phase.peak_nbytes - meter.account().phase(phase.name).peak_nbytes) <= 8192, phase.name


# -- classifiers ---------------------------------------------------------------------------------------


def bert(directory, seed, **settings):
    config = hf.BertConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    hf.BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer = hf.AutoTokenizer.from_pretrained(demo.model_directory())
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    return directory


def test_a_classifier_learns_from_a_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr("memfit.distilling.run_job", here)
    rows = [{"text": f"{word} {n}", "label": label} for n in range(40) for label, word in enumerate(("good", "bad"))]
    one, other = bert(tmp_path / "one", 0), bert(tmp_path / "other", 1)
    task = memfit.Train(batch=8, sequence=16, hyper=memfit.Hyper(lr=3e-3))
    train(one, rows, out=tmp_path / "teacher", given=planned(one, task), options=Options(epochs=4))
    mixed = [row | {"label": n % 2} for n, row in enumerate(rows[::-1])]  # labels that say nothing
    found = {}
    for place in ("memory", "disk"):
        distil = Distil(teacher=str(tmp_path / "teacher"), alpha=0.0, place=place)
        given = planned(other, replace(task, distil=distil))
        report = train(other, mixed, out=tmp_path / place, given=given, options=Options(epochs=2))
        found[place] = report.losses
        assert report.losses[-1] < 0.5 * report.losses[0]
    # All classes are kept, so the two are the same but for rounding.
    assert found["memory"][:4] == pytest.approx(found["disk"][:4], rel=1e-3)
    with pytest.raises(UsageError, match=r"has 3 classes, and the student .* 2"):
        three = bert(tmp_path / "three", 1, num_labels=3)
        train(other, rows, out=tmp_path / "no", task=task, distil=Distil(teacher=str(three)))


# -- what does not suit --------------------------------------------------------------------------------


def refused(model, text, tmp_path, teacher, message, error=UsageError, **settings):
    with pytest.raises(error, match=message):
        train(model, text, out=tmp_path / "no", task=TASK, distil=Distil(teacher=str(teacher), **settings))
    assert not (tmp_path / "no").exists()


def test_teachers_that_do_not_suit_are_refused(model, teacher, text, make_llama, tmp_path):
    refused(
        model, text, tmp_path, make_llama(hidden_size=32, intermediate_size=64, vocab_size=5000),
        r"has a vocabulary of 5000 entries, and the student .* one of 4096",
    )  # fmt: skip
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    file = other / "tokenizer.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = told["model"]["vocab"]
    one, two = list(vocabulary)[2000:2002]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(told), encoding="utf-8")
    refused(model, text, tmp_path, other, r"tokenizers of the teacher .*other and the student .* differ in 2 tokens")
    refused(model, text, tmp_path, bert(tmp_path / "bert", 0), r"is a classifier, and the student .* is to be a lang")
    refused(model, text, tmp_path, teacher, "5000 of the teacher's answers are to be kept, and it has 4096", top=5000)
    refused(
        model, text, tmp_path, teacher, "student's layers have 32 wide and the teacher's 48", match=("hidden",)
    )
    refused(
        model, text, tmp_path, make_llama(hidden_size=32, intermediate_size=64, num_attention_heads=2),
        "student's layers have 4 heads and the teacher's 2", match=("attention",),
    )  # fmt: skip
    refused(model, text, tmp_path, tmp_path / "nowhere", "nowhere", error=memfit.MemfitError)


def test_a_loss_of_ones_own_has_nothing_to_distil_into(model, teacher, text, tmp_path):
    with pytest.raises(UsageError, match="a loss of one's own"):
        train(model, text, task=TASK, distil=Distil(teacher=str(teacher)), loss=lambda model, batch: None)


def test_a_batch_without_answers_is_told(model, teacher):
    task = memfit.Train(batch=2, sequence=16, distil=Distil(teacher=str(teacher), place="disk"))
    step = memfit.train_step(memfit.load(model), task)
    ids = torch.ones(2, 16, dtype=torch.int64)
    with pytest.raises(UsageError, match="the batch has no tensor 'teacher_ids'"):
        step({"input_ids": ids, "labels": ids})


def test_the_command_passes_on_what_was_said(model, teacher, text, monkeypatch, capsys):
    from memfit.cli import main

    seen = {}

    def called(*given, **options):
        seen.update(options)
        raise UsageError("that will do")

    monkeypatch.setattr("memfit.training.train", called)

    def command(*words):
        seen.clear()
        monkeypatch.setattr("sys.argv", ["memfit", "train", str(model), "--data", str(text), "--quiet", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    command("--teacher", str(teacher))
    assert seen["distil"] == Distil(teacher=str(teacher))
    command(
        "--teacher", str(teacher), "--alpha", "0.5", "--temperature", "2", "--kl", "reverse", "--match",
        "hidden,attention", "--match-weight", "0.1", "--teacher-top", "32", "--teacher-in", "memory",
    )  # fmt: skip
    assert seen["distil"] == Distil(
        teacher=str(teacher), alpha=0.5, temperature=2.0, kl="reverse", match=("hidden", "attention"), match_weight=0.1,
        top=32, place="memory",
    )  # fmt: skip
    command()
    assert seen["distil"] is None
    assert "--alpha says how to learn from a teacher: name one with --teacher" in command("--alpha", "0.5")
    assert "alpha must be from 0 to 1, got 1.5" in command("--teacher", str(teacher), "--alpha", "1.5")
    assert "matching hidden needs the teacher in memory" in command(
        "--teacher", str(teacher), "--match", "hidden", "--teacher-in", "disk"
    )
    plan = ["--plan", str(text)]
    assert "--teacher beside --plan: the plan has its own" in command("--teacher", str(teacher), *plan)


def test_the_trainers_batches_have_no_teacher(model, teacher):
    plan = TrainPlan(
        model="m", task=replace(TASK, distil=Distil(teacher=str(teacher))), budget_nbytes=1 << 30, predicted={}
    )
    with pytest.raises(UsageError, match="the plan has a teacher"):
        plan.callback().on_train_begin(SimpleNamespace(gradient_accumulation_steps=1), None, None)
