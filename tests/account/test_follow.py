import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from memfit.account.dry_run import dry_run
from memfit.account.follow import Follow
from memfit.account.settle import settle
from memfit.account.watch import Watch

KIB = 1024


def block(kib: int) -> Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


class FreesInOddOrders(nn.Module):
    def forward(self) -> Tensor:
        a = block(10)  # 10
        b = block(20)  # 30
        del a  # 20
        c = block(5)  # 25
        view = b[: 3 * KIB]
        del b  # 25: the view keeps it alive
        d = block(7)  # 32, the worst moment
        del view  # 12
        e = block(1)  # 13
        del c, d  # 1
        return e


class RunsOnce:
    def run(self, model: nn.Module, watch: Watch) -> None:
        with watch.phase("only"):
            self.out = model()


def test_the_ledger_is_that_of_a_hand_count() -> None:
    account = dry_run(FreesInOddOrders, RunsOnce())
    phase = account.phase("only")
    assert phase.peak_nbytes == 32 * KIB
    assert phase.end_nbytes == 1 * KIB
    assert phase.alive == {"activation": 32 * KIB}


def test_events_come_in_the_order_they_happened() -> None:
    follow = Follow()
    with FakeTensorMode(), follow:
        FreesInOddOrders()()
    sizes = [sign * follow.ledger.storages[number].nbytes // KIB for number, sign in follow.ledger.events]
    assert sizes == [10, 20, -10, 5, 7, -20, 1, -5, -7, -1] or sizes == [
        10,
        20,
        -10,
        5,
        7,
        -20,
        1,
        -7,
        -5,
        -1,
    ]


def test_views_and_in_place_operators_are_no_births() -> None:
    follow = Follow()
    with FakeTensorMode(), follow:
        x = torch.empty(8, 8)
        y = x.t().reshape(8, 8)[2:].unsqueeze(0)
        y.zero_()
        assert [s.nbytes for s in follow.ledger.storages if s.nbytes] == [256]


def test_a_tensor_of_another_type_is_cast_into_a_copy_for_a_moment() -> None:
    follow = Follow()
    with FakeTensorMode(), follow, follow.phase("add"):
        long, short = torch.empty(100), torch.empty(100, dtype=torch.bfloat16)
        total = long + short
    # 400 + 200, the copy of the short one in 4 bytes each, the sum.
    assert settle(follow.ledger).peak_nbytes == 400 + 200 + 400 + 400
    assert total.dtype == torch.float32


def test_a_phase_entered_twice_is_one_phase() -> None:
    follow = Follow()
    with FakeTensorMode(), follow:
        with follow.phase("a"):
            block(4)
        with follow.phase("b"):
            block(1)
        with follow.phase("a"):
            block(6)
    account = settle(follow.ledger)
    assert [(p.name, p.peak_nbytes) for p in account.phases] == [("a", 6 * KIB), ("b", 1 * KIB)]


def test_births_stand_under_the_module_that_runs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 64), nn.Linear(64, 4)

        def forward(self) -> Tensor:
            return self.second(self.first(torch.empty(2, 4)))  # type: ignore[no-any-return]

    account = dry_run(Pair, RunsOnce())
    modules = {entry.module for entry in account.entries if entry.kind == "activation"}
    assert {"first", "second"} <= modules


def test_calls_are_written_down_without_tensors() -> None:
    follow = Follow()
    with FakeTensorMode(), follow:
        model = nn.LSTM(8, 8)
        state = (torch.empty(1, 2, 8), torch.empty(1, 2, 8))
        with follow.inside(model), follow.phase("once"):
            model(torch.empty(3, 2, 8), state)
        del state
        alive = [s.nbytes for s in follow.ledger.storages]
        ended = {number for number, sign in follow.ledger.events if sign < 0}
    assert [n for n, s in enumerate(alive) if s == 64 and n not in ended] == []
