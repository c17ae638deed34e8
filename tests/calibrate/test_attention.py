"""Attention by products against the definition in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memfit.calibrate import attention
from memfit.calibrate.attention import attend, attention_by_products


@settings(deadline=None, max_examples=40)
@given(
    windows=st.integers(1, 3), shared=st.integers(1, 3), group=st.integers(1, 3), time=st.integers(1, 300),
    width=st.sampled_from([8, 24]), mask=st.sampled_from(["none", "causal", "bool", "added", "by head"]),
    seed=st.integers(0, 1000), nbytes=st.sampled_from([1, 4 << 20]),
)  # fmt: skip
def test_it_is_attention(windows, shared, group, time, width, mask, seed, nbytes):
    random = torch.Generator().manual_seed(seed)
    heads = shared * group

    def some(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    query = some(windows, time, heads, width).transpose(1, 2)
    key, value = some(windows, shared, time, width), some(windows, shared, time, width + 4)
    given = {
        "none": None, "causal": None, "added": some(windows, 1, time, time), "by head": some(1, heads, time, time),
        "bool": (torch.rand(windows, 1, time, time, generator=random) < 0.5) | torch.eye(time, dtype=torch.bool),
    }[mask]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_SCORES_NBYTES", nbytes)
        found = attend(query, key, value, given, scale=0.3, causal=mask == "causal")
    wide = [x.repeat_interleave(group, 1) for x in (key, value)]
    right = F.scaled_dot_product_attention(query, *wide, given, scale=0.3, is_causal=mask == "causal")
    assert found.shape == (windows, time, heads, width + 4)
    torch.testing.assert_close(found, right.transpose(1, 2), rtol=1e-10, atol=1e-12)


def test_a_model_runs_on_it_inside_alone(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, attn_implementation="sdpa",
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).bfloat16().eval(), torch.arange(40).view(2, 20)
    asked = []
    monkeypatch.setattr(attention, "attend", lambda *given, **how: asked.append(how) or attend(*given, **how))
    with attention_by_products():
        with torch.no_grad():
            found = model(ids).logits
        assert [how["causal"] for how in asked] == [True, True]
        model(ids)  # with gradients
    with torch.no_grad():
        right = model(ids).logits
    assert len(asked) == 2 and ALL_ATTENTION_FUNCTIONS["sdpa"] is not attention._attention
    assert (found - right).norm() <= 0.02 * right.norm()


@pytest.mark.parametrize("given", ["causal", "sliding", "padded", "added"])
def test_a_mask_that_is_causal_is_taken_as_such_and_no_other(given, monkeypatch):
    random = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 40, 8, generator=random).bfloat16().unbind()
    mask = torch.ones(40, 40, dtype=torch.bool).tril_().repeat(2, 1, 1, 1)
    if given == "sliding":
        mask.triu_(-20)
    if given == "padded":
        mask[1, :, :, :3] = False
        mask[1, :, :3, 0] = True
    if given == "added":
        mask = mask.float().sub_(1).mul_(100).bfloat16()
    asked = []
    monkeypatch.setattr(attention, "attend", lambda *given, **how: asked.append(how) or attend(*given, **how))
    with torch.no_grad():
        found, _ = attention._attention(SimpleNamespace(is_causal=False), query, key, value, mask, scaling=0.3)
    right = F.scaled_dot_product_attention(
        *(x.double() for x in (query, key, value)), mask if given != "added" else mask.double(), scale=0.3
    )
    assert [how["causal"] for how in asked] == [given == "causal"]
    torch.testing.assert_close(found.double(), right.transpose(1, 2), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("change", ["fp32", "dropout", "longer keys", "bias", "one row of a mask", "one row of keys"])
def test_what_it_cannot_do_goes_the_usual_way(change, monkeypatch):
    monkeypatch.setattr(attention, "attend", lambda *_, **__: pytest.fail("asked"))
    dtype = torch.float32 if change == "fp32" else torch.bfloat16
    query, key, value = torch.randn(3, 1, 2, 6, 8).to(dtype).unbind()
    if change == "longer keys":
        query = query[:, :, :3]
    bias = {"position_bias": torch.zeros(1, 2, 6, 6, dtype=dtype)} if change == "bias" else {}
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool) if change == "one row of a mask" else None
    if change == "one row of keys":
        query = query.expand(2, -1, -1, -1)
    module = SimpleNamespace(is_causal=True)
    with torch.no_grad():
        made, _ = attention._attention(
            module, query, key, value, mask, dropout=0.5 if change == "dropout" else 0.0, scaling=0.3, **bias
        )
    assert made.shape == (query.shape[0], query.shape[2], 2, 8) and bool(made.isfinite().all())
