"""Weights in 16 bits: updates too small for bf16 arrive, and a master is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.packed.rounding import round_stochastically
from memfit.technique.weights import Fp16Master, Kahan, Master, Plain, Stochastic, weights_of


def start(kind, weight):
    return {name: torch.zeros(weight.numel(), dtype=of.dtype) for name, of in kind.layout().items()}


@given(seed=st.integers(0, 2**20), exponent=st.integers(-30, 30))
@settings(max_examples=60, deadline=None)
def test_a_master_is_read_back_bit_for_bit(seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(4096, generator=generator) * 2.0**exponent
    ties = value.bfloat16().float().view(torch.int32) + 0x8000
    value[:1024] = ties[:1024].view(torch.float32)
    value[1024:1040] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 3e38, -3e38] * 2)
    kind, weight = Master(), torch.zeros(4096, dtype=torch.bfloat16)
    extra = start(kind, weight)
    kind.write(weight, extra, value.clone(), seed=0)
    assert torch.equal(kind.read(weight, extra, step=2).view(torch.int32), value.view(torch.int32))
    gap = (weight.float() - value).abs()
    nearest = (value.bfloat16().float() - value).abs()
    finite = weight.isfinite() & value.bfloat16().isfinite()
    assert (gap <= nearest)[finite].all()


def small_updates(kind, *, steps=1000):
    """Where a weight of 1 is after so many updates of 1e-4, the mean of many."""
    weight = torch.ones(4096, dtype=torch.float16 if isinstance(kind, Fp16Master) else torch.bfloat16)
    extra = start(kind, weight)
    for step in range(1, steps + 1):
        value = kind.read(weight, extra, step=step)
        kind.write(weight, extra, value.add_(1e-4), seed=step * 104729)
    return weight.double().mean().item()


@pytest.mark.parametrize("kind", [Master(), Stochastic(), Kahan(), Fp16Master()])
def test_a_thousand_small_updates_arrive(kind):
    assert small_updates(kind) == pytest.approx(1.1, abs=5e-3)


def test_and_are_lost_in_plain_bf16():
    assert small_updates(Plain()) == 1.0


def test_stochastic_rounding_is_right_in_the_mean_and_only_goes_to_neighbours():
    value = torch.linspace(1.0, 1.0078125, 4097)[:-1]
    total = torch.zeros(4096)
    for seed in range(400):
        out = torch.empty(4096, dtype=torch.bfloat16)
        round_stochastically(value.clone(), out, seed=seed)
        assert ((out.float() - value).abs() <= 0.0078125).all()
        total += out.float()
    share = (total / 400 - 1.0) / 0.0078125
    wanted = (value - 1.0) / 0.0078125
    assert (share - wanted).abs().max() < 0.13  # five standard deviations of 400 draws
    assert (share - wanted).mean().abs() < 0.002


def test_what_bf16_holds_is_not_changed_and_the_same_seed_rounds_alike():
    value = torch.randn(3000).bfloat16()
    out = torch.empty_like(value)
    round_stochastically(value.float(), out, seed=3)
    assert torch.equal(out, value)
    one, other = torch.empty_like(value), torch.empty_like(value)
    between = torch.randn(3000)
    round_stochastically(between.clone(), one, seed=9)
    round_stochastically(between.clone(), other, seed=9)
    assert torch.equal(one, other)


def test_weights_of_another_type_than_the_precisions_are_plain():
    assert isinstance(weights_of("master", torch.float32), Plain)
    assert isinstance(weights_of("master", torch.bfloat16), Master)
    assert isinstance(weights_of("fp16", torch.float16), Fp16Master)
    assert isinstance(weights_of("bf16", torch.bfloat16), Plain)
