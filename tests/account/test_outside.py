import pytest
import torch

from memfit.account.account import Account, Entry, Phase
from memfit.account.ledger import Ledger, Storage
from memfit.account.outside import Outside, _chances, kernel_count, predict_resident


def test_kernels_are_counted_by_shape() -> None:
    ledger = Ledger()
    ledger.kernels |= {(2, 8, 64, 64, False), (2, 1, 64, 64, False)}
    assert kernel_count(ledger) == 2


def test_experts_bring_at_most_one_shape_a_draw() -> None:
    ledger = Ledger()
    ledger.kernels.add(("grouped", 512, 64, 128, 8))
    for _ in range(5):
        ledger.born(Storage(512 * 128 * 2, "activation", "", "aten::_grouped_mm", torch.bfloat16))
    assert 20 < kernel_count(ledger) < 5 * 8


def test_the_resident_peak_is_the_sum_of_named_terms() -> None:
    account = Account(
        phases=(Phase(name="load", peak_nbytes=1000, end_nbytes=1000, alive={"parameter": 1000}),),
        entries=(Entry(kind="parameter", module="a", device="cpu", dtype="bfloat16", nbytes=1000),),
        heap_nbytes=7,
        kernels=3,
        runtime="transformers",
    )
    told = predict_resident(
        account, Outside(runtime_nbytes={"transformers float32": 1, "transformers bfloat16": 400}, kernel_nbytes=50)
    )
    assert told.outside_nbytes == 400 + 3 * 50 + 7
    assert told.resident_nbytes == 1000 + 557
    assert [entry.nbytes for entry in told.entries if entry.kind == "outside"] == [557]
    assert told.peak_nbytes == 1000


@pytest.mark.parametrize(("most", "mean"), [(96, 48.0), (512, 3.0), (7, 6.5), (1, 0.25)])
def test_tokens_of_an_expert_have_the_mean_and_the_bound_that_are_known(most: int, mean: float) -> None:
    chances = _chances(most, mean)
    assert len(chances) == most + 1 and sum(chances) == pytest.approx(1)
    assert sum(tokens * p for tokens, p in enumerate(chances)) == pytest.approx(mean, rel=1e-6)


def test_no_expert_gets_more_tokens_than_there_are() -> None:
    ledger = Ledger()
    ledger.experts_a_token = 2
    ledger.kernels.add(("grouped", 64, 64, 128, 4))  # 32 tokens, two experts each
    for _ in range(500):
        ledger.born(Storage(64 * 128 * 2, "activation", "", "aten::_grouped_mm", torch.bfloat16))
    assert kernel_count(ledger) == 32
