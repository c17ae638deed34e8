import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.packed.routing import ROUTING, assumed_counts, tokens_by_expert


def test_assumed_counts_sum_to_all_choices():
    for tokens in (1, 5, 64):
        for routing in ("balanced", "worst"):
            counts = assumed_counts(tokens, 2, 8, routing)
            assert len(counts) == 8 and sum(counts) == tokens * 2
    assert assumed_counts(64, 2, 8, "balanced") == [16] * 8
    assert assumed_counts(64, 2, 8, "worst") == [64, 64, 0, 0, 0, 0, 0, 0]


def test_every_token_reaches_each_expert_it_chose():
    index = torch.tensor([[0, 3], [3, 1], [0, 1], [4, 3]])  # 4 is no expert here
    found = {expert: (places // 2).tolist() for expert, places in tokens_by_expert(index, 4)}
    assert found == {0: [0, 2], 1: [1, 2], 3: [0, 1, 3]}


def test_fake_tokens_are_routed_as_assumed():
    with FakeTensorMode():
        index = torch.zeros(6, 2, dtype=torch.long)
        assert [(e, len(p)) for e, p in tokens_by_expert(index, 4)] == [(0, 3), (1, 3), (2, 3), (3, 3)]
        token = ROUTING.set("worst")
        try:
            assert [(e, len(p)) for e, p in tokens_by_expert(index, 4)] == [(0, 6), (1, 6)]
        finally:
            ROUTING.reset(token)
