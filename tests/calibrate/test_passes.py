"""A pass that waits at layers' inputs gives what one that begins anew gives, and runs what is between them once."""

import pytest
import torch
from torch import Tensor, nn

from memfit.account.watch import Unwatched
from memfit.calibrate.passes import Pass
from memfit.calibrate.runs import Call, Run
from memfit.calibrate.spill import Spill

WINDOWS = 7


class Block(nn.Module):
    """Two layers on one input, then one more; the second call of `first` is none to wait at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.calls = 0

    def forward(self, x_WTD: Tensor) -> Tensor:
        self.calls += 1
        inner = self.first(x_WTD) * self.second(x_WTD)
        return x_WTD + self.first(self.third(inner.tanh()))


@pytest.fixture
def made() -> tuple[Block, Run]:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    x = torch.randn(WINDOWS, 5, 8)
    return block, Run(Call(block.forward, (x,), {}, WINDOWS, Spill(None, Unwatched())), 0, WINDOWS, 2)


def course(block: Block, run: Run, *, waits: bool) -> tuple[list[Tensor], Tensor]:
    """Inputs of the first and the third layer, which is another one by then, and what the block gives."""
    passed = Pass(run, waits=waits)
    heard = [x for half in range(len(passed.halves)) for x in passed.inputs(half, block.first)]
    block.second.weight.data = torch.eye(8)
    heard += [x for half in range(len(passed.halves)) for x in passed.inputs(half, block.third)]
    block.third.weight.data = torch.eye(8) * 2
    return heard, passed.whole()


def test_both_ways_give_the_same(made) -> None:
    block, run = made
    weights = {name: value.clone() for name, value in block.state_dict().items()}
    (inputs, out), calls = course(block, run, waits=False), block.calls
    block.load_state_dict(weights)
    block.calls = 0
    (waited_inputs, waited_out), waited_calls = course(block, run, waits=True), block.calls
    x = run.call.args[0]
    right = x + block.first(((block.first(x) * x).tanh()) * 2)
    torch.testing.assert_close(waited_out, right)
    assert torch.equal(out, waited_out)
    assert [x.shape for x in inputs] == [(10, 8), (5, 8), (10, 8), (10, 8)] * 2
    assert all(torch.equal(one, other) for one, other in zip(inputs, waited_inputs, strict=True))
    assert (calls, waited_calls) == (12, 4)


def test_calls_that_were_closed_begin_anew(made) -> None:
    block, run = made
    passed = Pass(run, waits=True)
    list(passed.inputs(0, block.third))
    passed.close()
    # Two windows at once of each half: a processor may add up otherwise for more rows.
    right = torch.cat([block(part_WTD) for part_WTD in run.call.args[0].split([2, 1, 2, 2])])
    assert torch.equal(passed.whole(), right)


def test_what_a_call_raises_is_raised_to_who_asked(made) -> None:
    block, run = made
    block.second.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        list(Pass(run, waits=True).inputs(0, block.third))


def test_a_layer_that_a_call_does_not_come_to_is_told(made) -> None:
    _, run = made
    with pytest.raises(RuntimeError, match="ended before it came to a layer"):
        list(Pass(run, waits=True).inputs(0, nn.Linear(8, 8)))
