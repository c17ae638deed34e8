"""Fitting within a cap on resident memory: kept to, told before, refused where nothing keeps to it."""

import errno
import importlib
import io
import json
import multiprocessing
import os
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import memfit
from memfit import demo
from memfit.account.account import Account, Phase
from memfit.account.malloc import FAST, LEVELS
from memfit.account.meter import Meter
from memfit.account.watch import Unwatched
from memfit.cap import _SPREAD, Cap, cap_of_jobs, keep, keep_as_planned
from memfit.compensate import Thrift, compensate
from memfit.compress import compress
from memfit.errors import DoesNotFit, OverBudget
from memfit.format.integers import Integers
from memfit.format.resume import WorkDirectory
from memfit.format.safetensors import TensorSpec, Writer
from memfit.models import load_model
from memfit.packed.forms import LowRank
from memfit.packed.scheme import Scheme
from memfit.plan.allowed import Allowed
from memfit.plan.plan import dumps
from memfit.planning import uniform_plan
from memfit.report.terminal import render_report
from memfit.source.source import open_source
from memfit.steps import asked_plainly, predict_choosing
from memfit.study import Study
from memfit.technique.quantize import dequantize, quantize
from memfit.technique.tune import Tuning
from memfit.worker import Process

worker = importlib.import_module("memfit.worker")
ALLOWED = Allowed(bits=(4,), groups={4: (64,)}, kv_bits=(16,), keep=("embeddings", "lm_head"))
TASK = memfit.Infer(prompt=16, new_tokens=2)


@pytest.fixture(scope="module")
def model(make_llama) -> Path:
    return make_llama(hidden_size=128, intermediate_size=448, num_hidden_layers=3)


@pytest.fixture(scope="module")
def planned(model):
    study = Study(open_source(model), TASK, ALLOWED)
    return study.source, uniform_plan(study, 1 << 40)


def text(**options) -> memfit.Text:
    words = demo.heldout_text().read_text(encoding="utf-8")
    shape = {"length": 48, "calibration_windows": 6, "evaluation_windows": 2}
    return memfit.Text(calibration=words[:6000], evaluation=words[6000:9000], **shape | options)


def test_what_the_fastest_and_the_leanest_way_take_is_predicted(planned, tmp_path: Path) -> None:
    source, plan = planned
    ids = torch.randint(0, 200, (6, 48), generator=torch.Generator().manual_seed(0))
    peaks = []
    for thrift in (Thrift(batch=2), Thrift(batch=2, wait=False), Thrift(batch=1, wait=False, spill=True, hold=False)):
        told = predict_choosing(source, plan, torch.Size((6, 48)), thrift)
        meter, integers = Meter(), Integers(tmp_path / f"integers-{len(peaks)}")
        compensate(source, ids, plan.schemes(), integers, watch=meter, thrift=thrift, scratch=tmp_path)
        assert told.peak_nbytes == pytest.approx(meter.account().peak_nbytes, rel=0.02)
        peaks.append(told.peak_nbytes)
    assert peaks[2] < 0.8 * peaks[1] < 0.8 * peaks[0]


def test_blocks_that_learn_come_nearer_and_what_that_takes_is_predicted(model, tmp_path: Path) -> None:
    allowed = replace(ALLOWED, bits=(2,), groups={2: (64,)})
    source = open_source(model)
    plan = uniform_plan(Study(source, TASK, allowed), 1 << 40)
    schemes = plan.schemes()
    ids = torch.randint(0, 200, (8, 48), generator=torch.Generator().manual_seed(0))
    told = predict_choosing(source, plan, ids.shape, Thrift(), algorithm="tuned")
    errors = []
    for tuning in (None, Tuning(steps=30)):
        meter, integers = Meter(), Integers(tmp_path / f"integers-{tuning}")
        compensate(source, ids, schemes, integers, watch=meter, tuning=tuning)
        errors.append(error_of(source, {name: integers.weight(name, schemes[name]) for name in schemes}, ids))
    assert told.peak_nbytes == pytest.approx(meter.account().peak_nbytes, rel=0.02)
    assert errors[1] < 0.98 * errors[0]


@torch.no_grad()
def error_of(source, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> float:
    """Mean square of what the last block gives less than the original."""
    states = []
    for new in ({}, weights):
        model = load_model(source, dtype=torch.bfloat16)
        for name, weight in new.items():
            model.get_submodule(name).weight.copy_(weight)
        states.append(model.model(ids, use_cache=False).last_hidden_state.float())
    return float((states[0] - states[1]).square().mean())


def job_of(model: Path, work: Path) -> dict:
    work.mkdir(exist_ok=True)
    ids = torch.randint(3, 200, (6, 48), generator=torch.Generator().manual_seed(0))
    torch.save({"calibration": ids}, work / "windows.pt")
    told = {"model": str(model), "work": str(work), "threads": 1}
    return told | {"do": "calibrate", "allowed": None, "batch": 4, "wanted": True}


def account(nbytes: int) -> Account:
    return Account(phases=(Phase(name="all", peak_nbytes=nbytes, end_nbytes=0),), entries=())


MIB = 1 << 20


def test_the_fastest_way_that_keeps_to_the_cap_is_taken(planned, model, tmp_path, monkeypatch) -> None:
    source, plan = planned
    job = job_of(model, tmp_path / "work")
    room = importlib.import_module("memfit.cap")

    def choosing(source, plan, windows, thrift: Thrift, *, algorithm: str) -> Account:
        spared = 100 * thrift.wait + 200 * thrift.hold + 100 * (not thrift.spill)
        waiting = {LEVELS[0]: 0, LEVELS[1]: 100, FAST: 300}[thrift.waiting_nbytes]
        return account((200 + 25 * thrift.batch + spared + waiting) * MIB)

    monkeypatch.setattr(room, "predict_choosing", choosing)
    monkeypatch.setattr(room, "predict_compressing", lambda *_, **__: account(50 * MIB))
    monkeypatch.setattr(room, "predict_calibrating", lambda _, job: account(100 * job["batch"] * MIB))

    def kept(nbytes: int) -> Cap:
        cap = Cap(nbytes=nbytes, idle_nbytes=300 * MIB, kernel_nbytes=MIB, untouched_nbytes=7)
        keep(cap, source, plan, job, "gptq", calibrates=True)
        return Cap.of_kept(json.loads(json.dumps(cap.kept())))

    much = kept(2000 * MIB)
    fast = Thrift(batch=4, waiting_nbytes=FAST)
    assert much.ways == {"choose": fast, "calibrate": 4, "compress": None}
    told = {"ram_nbytes": 2000 * MIB, "untouched_nbytes": 0, "waiting_nbytes": MIB}
    assert much.told("choose") == told | {"thrift": fast.to_json(), "waiting_nbytes": FAST}
    assert much.told("calibrate") == told | {"batch": 4, "spill": True}
    assert much.predicted["choose"].resident_nbytes == 1300 * MIB
    assert kept(1600 * MIB).ways["choose"] == Thrift(batch=4, waiting_nbytes=LEVELS[1])
    less = kept(1200 * MIB)
    assert less.ways["choose"] == Thrift(batch=4) and less.told("choose")["waiting_nbytes"] == MIB
    assert less.predicted["choose"].resident_nbytes == 1000 * MIB
    assert kept(800 * MIB).ways["choose"] == Thrift(batch=4, wait=False, spill=True, hold=False)
    with pytest.raises(DoesNotFit, match=r"\(--ram\).*needed at the least to choose.*works is (\d+) bytes") as refused:
        kept(400 * MIB)
    with pytest.raises(DoesNotFit, match=r"needed at the least to choose integers .*bytes \(--ram \d+\)\.$"):
        kept(200 * MIB)  # Python alone takes more, and no text is short enough
    least = kept(refused.value.smallest_nbytes)
    assert least.ways["choose"].batch == 1 and least.ways["calibrate"] == 2
    with pytest.raises(DoesNotFit, match=rf"--ram {least.nbytes}\)\. Shorter or fewer windows"):
        kept(least.nbytes - _SPREAD - 1)  # a cap that is named has room for an idle process that holds more


def test_what_code_reserves_and_never_touches_is_no_part_of_a_cap() -> None:
    predicted = {"choose": replace(account(50 * MIB), kernels=3)}
    cap = Cap(nbytes=500 * MIB, idle_nbytes=300 * MIB, kernel_nbytes=MIB, untouched_nbytes=7, predicted=predicted)
    assert cap.resident(predicted["choose"]).resident_nbytes == 353 * MIB
    assert cap.told("choose") == {"ram_nbytes": 500 * MIB, "untouched_nbytes": 21, "waiting_nbytes": MIB}
    assert Cap.of_kept(json.loads(json.dumps(cap.kept()))) == cap


@pytest.mark.parametrize("smooth", [True, False])
def test_what_smoothing_asks_for_is_gathered_within_a_cap_too(smooth: bool, model, tmp_path, monkeypatch) -> None:
    """To the nearest, in one setting, statistics and prices decide nothing else."""
    allowed = Allowed(bits=(8,), kv_bits=(16,), activations=8, smooth=smooth)
    study = Study(open_source(model), TASK, allowed)
    job = job_of(model, tmp_path / "work") | {"reference": False, "allowed": asdict(allowed)}
    idle = {"now": 400 * MIB, "kernel_nbytes": MIB, "untouched_nbytes": MIB}
    monkeypatch.setattr(importlib.import_module("memfit.cap"), "run_job", lambda job, **_: idle)
    with WorkDirectory(tmp_path / "out", key={"smooth": smooth}, resume=False) as work:
        cap, told = cap_of_jobs(work, 1 << 40, study, None, job, account(0), "rtn", uniform=True, process=Process())
    assert told["wanted"] == smooth and (told["do"] == "calibrate") == smooth and told["allowed"] is not None
    assert ("calibrate" in cap.predicted) == smooth


@pytest.mark.parametrize("wanted", [True, False])
def test_what_fits_is_found_out_again_only_where_something_was_found_out_since(
    wanted: bool, planned, model, tmp_path, monkeypatch
) -> None:
    source, plan = planned
    job = job_of(model, tmp_path / "work") | {"wanted": wanted}
    monkeypatch.setattr(importlib.import_module("memfit.cap"), "predict_compressing", lambda *_, **__: account(5 * MIB))
    found = {"compress": replace(account(9 * MIB), resident_nbytes=11 * MIB)}
    cap = Cap(nbytes=1 << 40, idle_nbytes=MIB, kernel_nbytes=0, predicted=found, ways={"compress": None})
    with WorkDirectory(tmp_path / "out", key={"wanted": wanted}, resume=False) as work:
        kept = keep_as_planned(work, cap, source, plan, job, "rtn", process=Process())
    assert kept.peak_nbytes == (5 if wanted else 9) * MIB
    assert kept.resident_nbytes == cap.predicted["compress"].resident_nbytes == (6 if wanted else 11) * MIB


@pytest.mark.parametrize(
    ("algorithm", "scheme", "weighs"),
    [
        ("gptq", Scheme(bits=4, group=64), True),
        ("search", Scheme(bits=4, group=64), False),
        ("gptq", LowRank(rank=8), False),
    ],
    ids=["by GPTQ", "scales by statistics", "factors"],
)
def test_a_part_of_the_text_is_read_where_tables_alone_are_weighed(
    algorithm: Any, scheme: Any, weighs: bool, model, tmp_path, monkeypatch
) -> None:
    study = Study(open_source(model), TASK, Allowed(bits=(4,), kv_bits=(16,)))
    given = uniform_plan(study, 1 << 40)
    given = replace(given, choices=tuple(replace(choice, scheme=scheme) for choice in given.choices))
    job = job_of(model, tmp_path / "work") | {"reference": False}
    assert asked_plainly(job, study, given, algorithm, uniform=True)["weighing"] == weighs
    assert "weighing" not in asked_plainly(job, study, given, algorithm, uniform=False), "prices read it all"


def test_a_fit_within_a_cap_keeps_to_it_and_tells(model, tmp_path) -> None:
    cap = 1 << 30
    report = fitted(model, tmp_path / "capped", ram=cap)
    jobs = report.ram["jobs"]
    assert set(jobs) == {"choose", "compress"}, "no statistics are read, so none are gathered"
    for job in jobs.values():
        assert job["measured_nbytes"] <= cap
        assert job["predicted_nbytes"] == pytest.approx(job["measured_nbytes"], rel=0.1)
        assert 0 < job["file_backed_nbytes"] < job["measured_nbytes"]
    assert report.measured is None and report.quality is None and report.fits
    assert memfit.Report.from_json(report.to_json()).ram == report.ram
    assert "resident, within 1.00 GiB" in shown(report)


def test_where_the_original_cannot_be_asked_the_fitted_model_is_measured_alone(model, tmp_path, monkeypatch) -> None:
    fit = importlib.import_module("memfit.fit")

    def too_low(*given, **how):
        cap, job = cap_of_jobs(*given, **how)
        return cap, job | {"reference": False, "wanted": False}

    monkeypatch.setattr(fit, "cap_of_jobs", too_low)
    report = fitted(model, tmp_path / "out", ram=1 << 30, measure=True)
    assert report.measured is not None and report.quality is None
    assert "not judged: to ask the original takes " in shown(report)


def shown(report: memfit.Report) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render_report(report))
    return console.export_text()


def test_a_cap_below_the_smallest_is_refused_before_anything_is_written(model, tmp_path, monkeypatch) -> None:
    idle = {"now": 400 << 20, "kernel_nbytes": 1 << 19, "untouched_nbytes": 1 << 19}
    monkeypatch.setattr(importlib.import_module("memfit.cap"), "run_job", lambda job, **_: idle)
    with pytest.raises(DoesNotFit, match=r"1.00 KiB allowed \(--ram\).*works is \d+ bytes") as refused:
        fitted(model, tmp_path / "out", ram="1KiB")
    assert refused.value.exit_code == 3 and refused.value.smallest_nbytes > 400 << 20 and refused.value.of_cap
    assert list(tmp_path.iterdir()) == []


def fitted(model: Path, out: Path, measure: bool = False, **how) -> memfit.Report:
    return memfit.fit(
        model, "100%", out, task=TASK, text=text(), allowed=ALLOWED, uniform=True, measure=measure, threads=1, **how
    )


def test_the_system_refuses_what_is_over_the_cap(model, planned, tmp_path) -> None:
    job = job_of(model, tmp_path / "work")
    (tmp_path / "work" / "plan.json").write_text(dumps(planned[1]))
    told = job | {"do": "choose", "integers": str(tmp_path / "work" / "integers"), "ram_nbytes": 200 << 20}
    with pytest.raises(OverBudget, match=f"enforced {200 << 20} bytes|hard limit of {200 << 20} bytes"):
        worker.run_job(told | {"thrift": Thrift(batch=4).to_json()})


def test_a_quality_gate_needs_a_measurement(model, tmp_path) -> None:
    with pytest.raises(memfit.UsageError, match="--no-measure"):
        memfit.fit(model, "100%", tmp_path / "out", text=text(), measure=False, max_kl=0.1)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["write", "posix_fallocate"])
def test_a_disk_that_fills_is_told_and_nothing_called_done(call, model, planned, tmp_path, monkeypatch, capsys) -> None:
    """In the job itself, as the disk of a test cannot be filled."""
    job = job_of(model, tmp_path / "work")
    (tmp_path / "work" / "plan.json").write_text(dumps(planned[1]))
    integers = tmp_path / "work" / "integers"
    told = job | {"do": "choose", "integers": str(integers), "thrift": Thrift(spill=True).to_json()}
    monkeypatch.setattr(os, call, full)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(told)))
    worker.main()
    said = capsys.readouterr().out
    answer = json.loads(next(line for line in said.splitlines() if "{" in line).partition(":")[2])
    assert answer["error"] == "Interrupted"
    assert f"the disk is full ({os.strerror(errno.ENOSPC)}). The output is as it was before" in answer["message"]
    assert answer["message"].endswith("what is done is kept beside it. Free some space and run the same command again.")
    assert all(path.suffix == ".part" for path in integers.iterdir()), "no block is called done"


def test_a_writer_goes_on_after_the_last_whole_tensor(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.arange(n * 7 + 5, dtype=torch.int32) for n in range(9)}
    specs = [TensorSpec(name=name, dtype=t.dtype, shape=tuple(t.shape)) for name, t in tensors.items()]

    def write(directory: Path, *, stop: int | None = None) -> tuple:
        writer = Writer(directory, specs, shard_nbytes=300, resume=True)
        names = [name for name in tensors if not writer.has(name)]
        for name in names[:stop]:
            writer.write(name, tensors[name])
        if stop is None:
            writer.__exit__(None, None, None)
        return writer.shards, names

    (tmp_path / "whole").mkdir()
    shards, _ = write(tmp_path / "whole")
    assert len(shards) > 2
    sizes = [(tmp_path / "whole" / shard.name).stat().st_size for shard in shards]
    for cut in range(0, sum(sizes), 37):
        place = tmp_path / f"cut-{cut}"
        place.mkdir()
        left = cut
        for shard, size in zip(shards, sizes, strict=True):
            if left:
                content = (tmp_path / "whole" / shard.name).read_bytes()[:left]
                (place / shard.name).write_bytes(content)
                left = max(0, left - size)
        again, names = write(place)
        assert again == shards
        assert len(names) < len(tensors) or cut < sizes[0]
        for file in (tmp_path / "whole").iterdir():
            assert (place / file.name).read_bytes() == file.read_bytes()


def test_a_compression_killed_goes_on_to_the_same_bytes(planned, tmp_path: Path, monkeypatch) -> None:
    source, plan = planned
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, killed):
        place.mkdir()
    wanted = compress(source, plan, None, whole, watch=Unwatched(), search=False)
    count, write = [0], os.write

    class Killed(BaseException):
        pass

    def dies(descriptor, content):
        count[0] += 1
        if count[0] % 9 == 0:
            write(descriptor, content[: len(content) // 2])
            raise Killed
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", dies)
    kills = 0
    while True:
        try:
            found = compress(source, plan, None, killed, watch=Unwatched(), search=False)
            break
        except Killed:
            kills += 1
    assert kills >= 2 and found == wanted
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()


def test_a_block_is_done_when_all_its_modules_are_there(tmp_path: Path) -> None:
    scheme, integers = Scheme(bits=4, group=32), Integers(tmp_path)
    w = torch.randn(8, 64)
    integers.add("block", "block.layer", quantize(w + 1, scheme))
    integers.add("block", "block.layer", made := quantize(w, scheme))
    assert torch.equal(integers.weight("block.layer", scheme), dequantize(made))
    assert not integers.holds("block") and "block.layer" in integers
    integers.finish("block", {"block.layer": 0.1})
    again = Integers(tmp_path)
    assert again.holds("block") and again.damping == {"block.layer": 0.1}
    assert torch.equal(again.weight("block.layer", scheme), integers.weight("block.layer", scheme))


CHOOSE_AND_WRITE = """
from pathlib import Path
import torch
from memfit.account.watch import Unwatched
from memfit.compensate import Thrift, compensate
from memfit.compress import compress
from memfit.format.integers import Integers
from memfit.format.resume import WorkDirectory
from memfit.plan.plan import read_plan
from memfit.source.source import open_source

torch.set_num_threads(1)
source, plan, work = open_source({model!r}), read_plan({plan!r}), Path({work!r})
integers, output = Integers(work / "integers"), work / "written"
output.mkdir(exist_ok=True)
ids = torch.randint(0, 200, (6, 48), generator=torch.Generator().manual_seed(0))
thrift = Thrift(batch=2, spill=True, hold=False)
compensate(source, ids, plan.schemes(), integers, watch=Unwatched(), thrift=thrift, scratch=work)
compress(source, plan, None, output, watch=Unwatched(), integers=integers)
"""


def test_killed_at_any_moment_it_ends_in_the_same_bytes(model, planned, tmp_path: Path) -> None:
    """By SIGKILL, in what the jobs of a fit do; what a process has begun, the next one takes up."""
    context, chance = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["memfit.compress"])
    (tmp_path / "plan.json").write_text(dumps(planned[1]))

    def run(name: str, seconds: float | None) -> bool:
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        code = CHOOSE_AND_WRITE.format(model=str(model), plan=str(tmp_path / "plan.json"), work=str(work))
        process = context.Process(target=exec, args=(code, {}))
        process.start()
        process.join(seconds)
        killed = process.is_alive()
        process.kill()
        process.join()
        assert killed or process.exitcode == 0
        return killed

    started = time.monotonic()
    run("whole", None)
    longest = time.monotonic() - started
    kills = sum(run("killed", chance.uniform(0.1, 0.9) * longest) for _ in range(6))
    run("killed", None)
    whole, again = (tmp_path / name / "written" / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == again.read_bytes(), kills
