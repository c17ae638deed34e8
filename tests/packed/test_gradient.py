import copy
import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from memfit.account.dry_run import dry_run, hold_model
from memfit.account.meter import Meter
from memfit.packed import store as store_module
from memfit.packed.modules import PackedEmbedding, PackedExperts, PackedLinear, pack_module_skeleton, packed_modules
from memfit.packed.scheme import Scheme
from memfit.packed.store import WORKSPACE_NBYTES, PackedWeight

BITS = (8, 7, 6, 5, 4, 3, 2)


def make_store(shape, scheme, round_to):
    generator = torch.Generator().manual_seed(shape[0])
    return PackedWeight.from_quantized(*round_to(torch.randn(shape, generator=generator) * 0.1, scheme), scheme)


def dense(store):
    return store.dense_rows(0, store.shape[0]).double()


def assert_rounded(found, g, weight, *, ulp):
    """`found` is g · W as if summed exactly and rounded once."""
    g = g.double()
    expected, size = g @ weight, g.abs() @ weight.abs()
    assert ((found.double() - expected).abs() <= ulp * expected.abs() + 1e-5 * size).all()


@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from([None, 32, 64, 96, 128]),
    symmetric=st.booleans(),
    rows=st.sampled_from([1, 64, 100, 192]),
    inputs=st.sampled_from([32, 96, 384, 32 * 43]),
    tokens=st.sampled_from([1, 7, 40]),
    workspace=st.sampled_from([WORKSPACE_NBYTES, 1 << 14]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_gradient_is_that_of_the_unpacked_weight(
    monkeypatch, round_to, bits, group, symmetric, rows, inputs, tokens, workspace
):
    scheme = Scheme(bits=bits, group=group, symmetric=symmetric)
    if scheme.why_not((rows, inputs)) is not None:
        return
    monkeypatch.setattr(store_module, "WORKSPACE_NBYTES", workspace)
    store = make_store((rows, inputs), scheme, round_to)
    generator = torch.Generator().manual_seed(tokens)
    dtypes = [torch.bfloat16, torch.float32] if store.kernel == "planes" else [torch.bfloat16]
    for dtype in dtypes:
        x = torch.randn(tokens, inputs, generator=generator).to(dtype).requires_grad_()
        g = torch.randn(tokens, rows, generator=generator).to(dtype)
        store.matmul(x).backward(g)
        weight = torch.cat([store.dense_rows(a, min(a + 64, rows), dtype=dtype) for a in range(0, rows, 64)])
        assert_rounded(x.grad, g, weight.double(), ulp=2**-8 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_of_some_rows_is_that_of_these_rows(bits, round_to):
    store = make_store((256, 128), Scheme(bits=bits, group=32), round_to)
    x = torch.randn(5, 128).bfloat16().requires_grad_()
    g = torch.randn(5, 128).bfloat16()
    store.matmul(x, start=64, stop=192).backward(g)
    assert_rounded(x.grad, g, dense(store)[64:192], ulp=2**-8)


@pytest.mark.parametrize("bits", BITS)
def test_a_gradient_changes_no_bit_of_the_product_and_keeps_no_tensor(bits, round_to):
    store = make_store((128, 64), Scheme(bits=bits, group=32), round_to)
    for tokens in (3, 40):
        x = torch.randn(2, tokens, 64).bfloat16()
        with torch.no_grad():
            expected = store.matmul(x)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
            found = store.matmul(x.requires_grad_())
        assert torch.equal(found, expected) and kept == []


def test_a_layer_passes_gradients_and_trains_its_bias_alone(round_to):
    linear = PackedLinear(64, 128, scheme=Scheme(bits=4, group=32), bias=True)
    linear.store.fill(*round_to(torch.randn(128, 64), linear.store.scheme))
    linear.bias = nn.Parameter(torch.randn(128).bfloat16())
    x = torch.randn(2, 3, 64).bfloat16().requires_grad_()
    g = torch.randn(2, 3, 128).bfloat16()
    y = linear(x)
    y.backward(g)
    assert y.shape == (2, 3, 128) and [name for name, _ in linear.named_parameters()] == ["bias"]
    assert_rounded(x.grad, g, dense(linear.store), ulp=2**-8)
    assert torch.equal(linear.bias.grad, g.flatten(0, 1).sum(0))
    embedding = PackedEmbedding(128, 64, scheme=Scheme(bits=4, group=32), store=linear.store, embed_scale=2.0)
    assert not embedding(torch.tensor([[1, 2]])).requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_has_the_same_gradient(reentrant, round_to):
    linear = PackedLinear(64, 128, scheme=Scheme(bits=3, group=32))
    linear.store.fill(*round_to(torch.randn(128, 64), linear.store.scheme))
    grads = []
    for call in (linear, lambda x: checkpoint(linear, x, use_reentrant=reentrant)):
        x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        call(x).float().square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


class Backward:
    """A forward and a backward pass, told to a watch."""

    def __init__(self, tokens, inputs):
        self.tokens, self.inputs = tokens, inputs

    def run(self, model, watch):
        with watch.phase("load"):
            hold_model(model, watch)
            x = torch.zeros(self.tokens, self.inputs, dtype=torch.bfloat16, requires_grad=True)
        with watch.phase("forward"):
            y = model(x)
        with watch.phase("backward"):
            y.backward(torch.ones_like(y))


@pytest.mark.parametrize(
    ("bits", "group", "rows", "inputs"),
    [(4, 128, 4096, 2048), (5, 128, 2048, 2816), (8, None, 4096, 2048), (3, 32, 4000, 2048), (4, 128, 65536, 128)],
)
def test_the_peak_of_a_backward_pass_is_bounded_and_predicted_to_the_byte(bits, group, rows, inputs):
    def make():
        linear = PackedLinear(inputs, rows, scheme=Scheme(bits=bits, group=group))
        linear.store._make_buffers(torch.device("cpu"))
        for buffer in linear.buffers():
            buffer.zero_()
        return nn.Sequential(linear)

    gc.collect()  # what earlier tests left would be freed in the middle
    tokens, meter = 64, Meter()
    task = Backward(tokens, inputs)
    with meter.phase("load"):
        model = make()
    task.run(model, meter)
    measured, predicted = meter.account(), dry_run(make, task)
    peaks = [{phase.name: phase.peak_nbytes for phase in account.phases} for account in (measured, predicted)]
    assert peaks[0]["backward"] == peaks[1]["backward"] and peaks[0]["forward"] == peaks[1]["forward"]
    activations = 2 * tokens * (2 * inputs + 2 * rows)  # x and its gradient, y and its own
    extra = peaks[0]["backward"] - sum(buffer.nbytes for buffer in model.buffers()) - activations
    # Unpacked values in 16 bits and as integers, and what is packed of them, once.
    assert extra < 3 * WORKSPACE_NBYTES


COMMON = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("config", [LlamaConfig(**COMMON), MixtralConfig(**COMMON, num_local_experts=4)])
def test_a_packed_model_passes_the_gradient_of_its_dequantised_model(config, round_to):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).requires_grad_(False)
    plain.set_experts_implementation("eager")
    packed = copy.deepcopy(plain)
    names = [
        name
        for name, module in packed.named_modules()
        if name.startswith("model.layers.") and (isinstance(module, nn.Linear) or name.endswith("experts"))
    ]
    pack_module_skeleton(packed, {name: Scheme(bits=4 + i % 5, group=32) for i, name in enumerate(names)})
    for name, module in packed_modules(packed).items():
        original = plain.get_submodule(name)
        parts = ("gate_up_proj", "down_proj") if isinstance(module, PackedExperts) else ("weight",)
        for part in parts:
            store, weight = getattr(module, part if len(parts) > 1 else "store"), getattr(original, part)
            store.fill(*round_to(weight.data.flatten(0, -2), store.scheme))
            weight.data.copy_(store.dense_rows(0, store.shape[0]).view(weight.shape))
    grads = []
    for model in (packed, plain):
        x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
        model(inputs_embeds=x).logits.float().square().mean().backward()
        grads.append(x.grad.float())
    assert (grads[0] - grads[1]).norm() < 0.03 * grads[1].norm()
