"""The code that products leave behind: measured in a copy of the process, it does not stay in the process itself."""

import json
import subprocess
import sys

import pytest

from memfit.account.code import Code, code_of_products

IN_A_COPY = """
import json
from dataclasses import asdict
import torch
from memfit.account.code import code_in_a_copy
from memfit.account.meter import resident_nbytes
before = resident_nbytes()["now"]
code = code_in_a_copy(lambda: torch.set_num_threads(2), rows=256)
after = resident_nbytes()["now"]
torch.ones(512, 512).matmul(torch.ones(512, 512))  # threads start here as ever
print(json.dumps({"code": asdict(code), "stayed": after - before}))
"""
FAILS = """
from memfit.account.code import code_in_a_copy
def begin():
    raise ValueError("why it ended")
code_in_a_copy(begin, rows=256)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def test_what_products_leave_is_measured_and_does_not_stay() -> None:
    found = json.loads(run(IN_A_COPY).stdout)
    code, here = Code(**found["code"]), code_of_products(rows=256, gradients=True)
    assert code.resident_nbytes == pytest.approx(here.resident_nbytes, rel=0.25, abs=64 << 10)
    assert code.counted_nbytes == pytest.approx(here.counted_nbytes, rel=0.25, abs=64 << 10)
    # 56 shapes of some 0.5 to 1 MiB each, where oneDNN makes code for them at all.
    assert found["stayed"] < max(4 << 20, 10 * code.resident_nbytes)


def test_a_copy_that_fails_says_why() -> None:
    done = run(FAILS)
    assert done.returncode == 1
    assert "why it ended" in done.stderr and "exit code 1" in done.stderr
