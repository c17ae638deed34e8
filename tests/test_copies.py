"""A copy of a process answers, fails and ends as one that was begun anew does, and shares what libraries hold."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import memfit_command
from memfit.account.malloc import LEVELS, trim_threshold
from memfit.copies import may_be_copied
from memfit_command import QUIET, is_quiet

BEGIN = """
import json, os, sys, tempfile, time
import torch
from memfit.copies import Copied, may_be_copied
assert may_be_copied()
errors = tempfile.TemporaryFile("w+")
"""
ANSWERS = """
def works():
    for line in sys.stdin:
        print(int(line) + 1, flush=True)

with_it = Copied(works, errors=errors)
for number in (1, 41):
    with_it.stdin.write(f"{number}\\n")
    with_it.stdin.flush()
    assert with_it.stdout.readline() == f"{number + 1}\\n"
with_it.__exit__()
assert with_it.wait() == 0

def fails():
    raise ValueError("what is off")

failed = Copied(fails, errors=errors)
assert failed.stdout.read() == "" and failed.wait() == 1
errors.seek(0)
assert "ValueError: what is off" in errors.read()

killed = Copied(works, errors=errors)
killed.kill()
assert killed.wait() == -9
killed.kill()
print("end")
"""
SHARES = """
def table(name):
    lines = (line.split() for line in open(f"/proc/self/{name}"))
    return {line[0]: int(line[1]) for line in lines if line[-1] == "kB"}

def works():
    print(json.dumps(table("status") | table("smaps_rollup")), flush=True)

own = table("status")
other = json.loads(Copied(works, errors=errors).stdout.readline())
assert other["RssFile:"] > 0.98 * own["RssFile:"], (own, other)
assert abs(other["VmRSS:"] / own["VmRSS:"] - 1) < 0.05, (own, other)
assert other["Pss_Anon:"] < 0.65 * other["RssAnon:"], other  # two processes have most of it
print("end")
"""
ENDS = """
import signal
def works():
    print(os.getpid(), flush=True)
    time.sleep(60)

print(Copied(works, errors=errors).stdout.readline(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
BY_JOBS = """
from memfit import worker
from memfit.worker import Process, run_job
seen = []
worker.JOBS.update(count=lambda job: seen.append(1) or {"seen": len(seen), "parent": os.getppid()})
begun = []
begin = worker._anew
worker._anew = lambda errors: begun.append(1) or begin(errors)
with Process(copied=True) as process:
    for number in (1, 2):
        assert run_job({"do": "count"}, process=process) == {"seen": number, "parent": os.getpid()}
    process.end()
    assert run_job({"do": "count"}, process=process) == {"seen": 1, "parent": os.getpid()}, "another copy"
    assert not begun and not seen
    process.end()
    process.begin_anew()
    kernel = run_job({"do": "kernel_nbytes", "threads": 1}, process=process)
    assert begun and kernel["nbytes"] >= 0
assert run_job({"do": "kernel_nbytes", "threads": 1})["nbytes"] >= 0 and len(begun) == 2  # unless it is asked for
try:
    with Process(copied=True) as process:
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("end")
"""

ASIDE = """
import pytest
from memfit.copies import aside
from memfit.errors import DoesNotFit
parent, seen = os.getpid(), []

def works():
    seen.append(os.getppid())
    torch.ones(1 << 22).sum()  # by as many threads as there are
    return {"seen": seen, "table": torch.arange(3)}

given = aside(works)
assert given["seen"] == [parent] and not seen and given["table"].tolist() == [0, 1, 2]
assert may_be_copied(), "its threads ended with it"

def is_too_large():
    raise DoesNotFit("what is off", smallest_nbytes=7, levers={"shorter": 3}, of_cap=True)

with pytest.raises(DoesNotFit, match="what is off") as found:
    aside(is_too_large)
assert (found.value.smallest_nbytes, found.value.levers, found.value.of_cap) == (7, {"shorter": 3}, True)

def has_a_mistake():
    return {}["nowhere"]

with pytest.raises(KeyError, match="nowhere") as found:
    aside(has_a_mistake)
assert "in has_a_mistake" in "".join(found.value.__notes__)
with pytest.raises(Exception, match="pickle"):
    aside(lambda: lambda: 1)
with pytest.raises(ChildProcessError, match="ended with -9 and no answer"):
    aside(lambda: os.kill(os.getpid(), 9))
with pytest.raises(ChildProcessError, match="no answer"):
    aside(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
with pytest.raises(ChildProcessError):
    os.waitpid(-1, os.WNOHANG)  # nobody is left to wait for
print("end")
"""
ASIDE_OF_JOBS = """
from memfit.worker import Process, run_job
with Process(copied=True) as process:
    assert process.aside(os.getppid) == os.getpid()
    assert process.aside(lambda: run_job({"do": "kernel_nbytes", "threads": 1}, process=process))["nbytes"] >= 0
    torch.ones(1 << 22).sum()
    assert not may_be_copied() and process.aside(os.getpid) == os.getpid()
assert Process().aside(os.getpid) == os.getpid()
print("end")
"""


def run(code: str) -> str:
    """What a process that began with `QUIET` prints."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], env=os.environ | QUIET, capture_output=True, text=True, check=False
    )
    assert not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code", [ANSWERS, SHARES, BY_JOBS, ASIDE, ASIDE_OF_JOBS],
    ids=["answers", "shares", "by jobs", "aside", "aside of jobs"],
)  # fmt: skip
def test_a_copy_is_as_a_process_that_was_begun(code: str) -> None:
    assert run(code) == "end"


def require_end(process: int) -> None:
    """Wait until a process has ended; one that nobody waits for is a zombie."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the job still runs")


def test_a_copy_ends_with_the_process_that_made_it() -> None:
    require_end(int(run(ENDS)))


def test_a_job_ends_with_the_process_that_asked_for_it() -> None:
    """Else the same command, run again after a kill, would meet a job that still writes."""
    code = (
        "import os, signal, subprocess, sys\n"
        "child = 'import os, sys, time; from memfit.copies import end_with; end_with(int(sys.argv[1])); "
        "print(os.getpid(), flush=True); time.sleep(60)'\n"
        "made = subprocess.Popen([sys.executable, '-c', child, str(os.getpid())], stdout=subprocess.PIPE, text=True)\n"
        "print(made.stdout.readline(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    require_end(int(done.stdout))


def test_a_process_with_another_thread_is_not_copied() -> None:
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    assert not may_be_copied()
    done.set()
    other.join()


def test_the_command_begins_again_with_what_measured_processes_have(monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(Exception):
        pass

    def execve(program: str, words: list[str], environment: dict[str, str]) -> None:
        raise Replaced(program, words, environment)

    monkeypatch.setattr(os, "execve", execve)
    for words in (["fit", "--help"], ["train"]):
        monkeypatch.setattr(sys, "argv", ["memfit", *words])
        with pytest.raises(Replaced) as replaced:
            memfit_command.main()
        program, again, environment = replaced.value.args
        assert program == sys.executable and again[1:] == ["-P", "-m", "memfit_command", *words]
        assert environment == dict(os.environ) | QUIET and not is_quiet()
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    assert is_quiet()
    monkeypatch.setattr(sys, "argv", ["memfit", "fit", "--bits"])
    with pytest.raises(SystemExit):  # the command itself: it is not begun once more
        memfit_command.main()


def test_the_command_has_its_name_when_it_has_begun_again() -> None:
    words = [sys.executable, "-m", "memfit_command", "fit", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "Usage: memfit fit " in done.stdout


def test_the_command_sets_what_the_simulated_heap_takes_as_given() -> None:
    assert QUIET["MALLOC_MMAP_THRESHOLD_"] == str(LEVELS[0])
    assert QUIET["MALLOC_TRIM_THRESHOLD_"] == str(trim_threshold(LEVELS[0]))


def test_where_the_command_begins_no_library_is_brought_in() -> None:
    code = "import sys; before = set(sys.modules); import memfit_command; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "memfit_command" in done.stdout.split() and not {"torch", "numpy", "memfit"} & set(done.stdout.split())
