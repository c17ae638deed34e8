"""Attentions that may have narrower heads are found, and what both of their groups may then be stored in."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig

from memfit.packed.forms import Narrow
from memfit.packed.scheme import Scheme
from memfit.plan.groups import find_groups
from memfit.plan.heads import narrow_heads, narrowings

SIZES = {
    "vocab_size": 1100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=False))


def test_attentions_that_may_be_narrower_are_found(model: nn.Module) -> None:
    found = narrowings(model)
    assert [one.value for one in found] == [f"model.layers.{n}.self_attn.v_proj" for n in range(2)]
    one = found[0]
    assert one.form(one.value, 12) == Narrow(heads=2, kept=12, side="out")
    assert one.form(one.output, 12) == Narrow(heads=4, kept=12, side="in")
    with torch.device("meta"):
        bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    assert narrowings(bert) == ()


def test_both_groups_have_the_same_widths_and_integers_that_they_may_have_anyway(model: nn.Module) -> None:
    groups = find_groups(model)
    base = Scheme(bits=4, group=32)
    schemes = {group.name: (base,) for group in groups}
    found = narrow_heads(narrowings(model), groups, schemes, (0.75, 0.5))
    assert len(found) == 2
    for one in found:
        for group in (one.values, one.output):
            forms = one.forms[group.name]
            assert {form.kept for form in forms} == {12, 8}
            assert all(group.why_not(form) is None for form in forms)
            assert all(group.nbytes(form) < group.nbytes(form.base) for form in forms)
    assert narrow_heads(narrowings(model), [], schemes, (0.75,)) == ()
