"""What factoring, sharing and narrowing take while they are made is told by a dry run of the same lines."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memfit.account.watch import Watch
from memfit.packed.fake import is_fake
from memfit.packed.forms import LowRank
from memfit.packed.scheme import Scheme
from memfit.technique import spectrum
from memfit.technique.gptq import factor
from memfit.technique.heads import narrow_errors, narrow_heads
from memfit.technique.low_rank import errors_by_rank, factorize
from memfit.technique.share import Member, share, shared_errors


def weight(rows: int, inputs: int) -> Tensor:
    made = torch.empty(rows, inputs)
    return made if is_fake(made) else made.normal_(generator=torch.Generator().manual_seed(0))


def moments(inputs: int) -> Tensor:
    return torch.eye(inputs).add_(0.01)


def members() -> dict[str, Member]:
    return {name: Member.of(weight(200, 300), importance_K=torch.ones(300)) for name in "ab"}


CASES: dict[str, Callable[[], Any]] = {
    "ranks": lambda: errors_by_rank(weight(200, 300), rows_N=torch.ones(200)),
    "ranks of a tall weight": lambda: errors_by_rank(weight(900, 200), factor=factor(moments(200))),
    "factors": lambda: factorize(weight(200, 300), LowRank(rank=40), factor=factor(moments(300))),
    "factors of a tall weight": lambda: factorize(weight(2000, 200), LowRank(rank=40), importance_K=torch.ones(200)),
    "factors by chance": lambda: factorize(weight(400, 500), LowRank(rank=20)),
    "factors beside integers": lambda: factorize(
        weight(96, 128), LowRank(rank=16, base=Scheme(bits=4, group=64)), factor=factor(moments(128))
    ),
    "a basis": lambda: (shared_errors(members(), "right"), share(members(), "left", 32)),
    "a weight": lambda: (shared_errors(members(), "weight"), share(members(), "weight", 16)),
    "heads": lambda: (
        narrow_errors(weight(128, 200), weight(200, 256), width=32, factor_Q=factor(moments(256))),
        narrow_heads(weight(128, 200), weight(200, 256), width=32, kept=24, factor_Q=factor(moments(256))),
    ),
}  # fmt: skip


class Made:
    """A task that makes one of the cases."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def run(self, model: nn.Module, watch: Watch) -> None:
        with watch.phase("make"):
            self.make()

    def to_json(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("kind", CASES)
def test_what_it_takes_is_told(
    kind: str, predicted: Callable[..., Any], measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectrum, "_RANDOMISED_FROM", 350)
    make = lambda: nn.Linear(8, 8)  # noqa: E731
    told, found = (ask(make, Made(CASES[kind])).phases[1].peak_nbytes for ask in (predicted, measured))
    # Of turns, which one is best and kept beside the next is not known before: told is that it is the first.
    assert -0.01 * found <= told - found <= (0.1 if kind == "a weight" else 0.01) * found
