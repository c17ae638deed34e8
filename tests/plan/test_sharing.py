"""What may be shared is found, its bytes and prices are those of what is made."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig

from memfit.packed.forms import Narrow, Shared
from memfit.packed.scheme import Scheme
from memfit.plan.groups import find_groups
from memfit.plan.sharing import Sharing, metrics_of, narrowings, sharings
from memfit.technique.gptq import factor
from memfit.technique.share import Member, share, shared_error

SIZES = {
    "vocab_size": 1100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=False))


def test_all_that_may_be_shared_is_found(model: nn.Module) -> None:
    found = sharings(find_groups(model))
    layer = "model.layers.{}.{}"
    assert sum(one.common == "right" and len(one.members) == 3 for one in found) == 5
    for common in ("right", "left", "weight"):
        for leaf in ("mlp.down_proj", "self_attn.q_proj"):
            pairs = [one.members for one in found if one.common == common and one.members[0].endswith(leaf)]
            pairs = [members for members in pairs if members[1].endswith(leaf)]
            assert pairs == [(layer.format(n, leaf), layer.format(n + 1, leaf)) for n in (0, 2)]
    ties = [one for one in found if one.keeps]
    assert [one.members for one in ties] == [("model.embed_tokens", "lm_head")]
    assert len(sharings(find_groups(model), run=5)) == 5 * 2 + 7 * 3 + 1
    with pytest.raises(ValueError, match="at least 2 blocks share, got a run of 1"):
        sharings(find_groups(model), run=1)


def test_bytes_are_those_of_the_forms_and_the_rank_that_fits_takes_no_more(model: nn.Module) -> None:
    base = Scheme(bits=4, group=32)
    for one in sharings(find_groups(model)):
        shapes = dict(zip(one.members, one.shapes, strict=True))
        for given in (None, base) if one.common == "weight" and not one.keeps else (None,):
            for rank in (one.ranks.start, one.ranks.stop - 1):
                forms = one.forms(rank, base=given)
                assert sum(form.nbytes(shapes[name]) for name, form in forms.items()) == one.nbytes(rank, base=given)
                assert one.keeps == (one.members[0] not in forms)
            for nbytes in (one.nbytes(7, base=given), one.nbytes(7, base=given) + 1, 10**9, 10):
                rank = one.rank_for(nbytes, base=given)
                if rank is None:
                    assert one.nbytes(one.ranks.start, base=given) > nbytes
                    continue
                assert one.nbytes(rank, base=given) <= nbytes
                assert rank == one.ranks.stop - 1 or one.nbytes(rank + 1, base=given) > nbytes


def test_prices_are_what_sharing_errs_by(model: nn.Module) -> None:
    groups = find_groups(model)
    random = torch.Generator().manual_seed(0)
    pairs = {
        member: (torch.rand(shape[1], generator=random), torch.rand(shape[0], generator=random))
        for group in groups if group.kind == "linear"
        for member, shape in zip(group.members, group.shapes, strict=True)
    }  # fmt: skip
    first = next(iter(groups[1].members))
    pairs |= {member: (pairs[first][0], pairs[member][1]) for member in groups[1].members}
    metric_of, rows_of = metrics_of(pairs, groups)

    def read(name: str) -> Tensor:
        return model.get_submodule(name).get_parameter("weight").detach()

    found = sharings(groups)
    chosen = [next(one for one in found if len(one.members) == 3)]
    chosen += [one for one in found if one.common == "weight"][:1]
    for one in chosen:
        prices = one.prices(read, metric_of, rows_of)
        members = {name: Member(weight=read(name), metric=metric_of(name), rows=rows_of(name)) for name in one.members}
        for rank in (1, 20):
            error = 0.5 * shared_error(members, share(members, one.common, rank))
            assert error <= 1.01 * float(prices[rank]) + 1e-4 * float(prices[0])
            assert one.common == "weight" or error > 0.99 * float(prices[rank])
    tie = next(one for one in found if one.keeps)
    prices = tie.prices(read, metric_of, rows_of)
    assert prices.shape == (65,) and prices[-1] == 0
    assert tie.forms(0) == {"lm_head": Shared(owner="model.embed_tokens", common="weight", rank=0)}
    assert tie.nbytes(0) == 0


def test_attentions_that_may_be_narrower_are_found(model: nn.Module) -> None:
    found = narrowings(model)
    assert [one.value for one in found] == [f"model.layers.{n}.self_attn.v_proj" for n in range(5)]
    one = found[0]
    assert one.forms(12) == {
        one.value: Narrow(heads=2, kept=12, side="out"), one.output: Narrow(heads=4, kept=12, side="in"),
    }  # fmt: skip
    assert one.nbytes(16) == 2 * (32 * 64 + 64 * 64) and one.nbytes(8) * 2 == one.nbytes(16)
    made = factor(torch.eye(64))
    read = lambda name: model.get_submodule(name).get_parameter("weight").detach()  # noqa: E731
    prices = one.prices(read, lambda _: made, lambda _: torch.ones(64))
    assert prices.shape == (17,) and bool((prices.diff() <= 0).all())
    with torch.device("meta"):
        bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    assert narrowings(bert) == ()
    assert all(isinstance(one, Sharing) for one in sharings(find_groups(bert)))
