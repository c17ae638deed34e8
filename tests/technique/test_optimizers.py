"""Optimizers against torch's own, and against float64; states of few bits against what they lose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.technique.adafactor import Adafactor
from memfit.technique.adamw import AdamW
from memfit.technique.low_rank_gradient import LowRankAdam
from memfit.technique.muon import Muon
from memfit.technique.sgd import SGD
from memfit.technique.state_bits import Code

STEPS = 50


def element_states(rule, count, dtype=torch.float32):
    return {
        name: torch.zeros(of.entries(count), dtype=dtype if of.dtype == torch.float32 else of.dtype)
        for name, of in rule.layout().items()
    }


def run_elements(rule, weight, gradients, *, lr=1e-2, decay=0.1):
    weight = weight.clone().view(-1)
    state = element_states(rule, weight.numel(), weight.dtype)
    for step, gradient in enumerate(gradients, 1):
        rule.update(
            weight, gradient.clone().view(-1), state, lr=lr, weight_decay=decay, step=step, seed=step * 7919
        )
    return weight, state


def run_matrix(rule, weight, gradients, *, lr=1e-2, decay=0.1):
    weight = weight.clone()
    state = {name: torch.zeros(shape, dtype=weight.dtype) for name, shape in rule.shapes(weight.shape).items()}
    for step, gradient in enumerate(gradients, 1):
        rule.update(weight, gradient.clone(), state, lr=lr, weight_decay=decay, step=step, seed=step)
    return weight


def run_torch(make, weight, gradients):
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = make([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def problem(shape, dtype=torch.float64, seed=0, spread=4):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    spread = torch.logspace(-spread, 0, shape[-1], dtype=dtype)
    return weight, [torch.randn(shape, generator=generator, dtype=dtype) * spread for _ in range(STEPS)]


def test_adamw_is_torchs():
    weight, gradients = problem((24, 40))
    found, _ = run_elements(AdamW(), weight, gradients)
    expected = run_torch(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), weight, gradients)
    torch.testing.assert_close(found.view(24, 40), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs_without_decay(nesterov):
    weight, gradients = problem((24, 40))
    found, _ = run_elements(SGD(momentum=0.9, nesterov=nesterov), weight, gradients, decay=0.0)
    expected = run_torch(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=nesterov), weight, gradients)
    torch.testing.assert_close(found.view(24, 40), expected, rtol=1e-12, atol=1e-12)


def test_sgd_without_momentum_has_no_state():
    weight, gradients = problem((24, 40))
    found, state = run_elements(SGD(momentum=0.0), weight, gradients, decay=0.0)
    assert not state
    torch.testing.assert_close(found.view(24, 40), weight - 1e-2 * sum(gradients))


@pytest.mark.parametrize("shape", [(24, 40), (40,), (3, 8, 5)])
def test_adafactor_is_torchs(shape):
    weight, gradients = problem(shape)
    found = run_matrix(Adafactor(), weight, gradients)
    expected = run_torch(lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1), weight, gradients)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_is_torchs(shape):
    weight, gradients = problem(shape, torch.float32)
    found = run_matrix(Muon(momentum=0.95), weight, gradients)
    expected = run_torch(
        lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original"),
        weight,
        gradients,
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_galore_at_full_rank_is_adam_in_the_gradients_own_axes(shape):
    """A rotation by singular vectors is undone on the way back, and one step of Adam is a step of signs."""
    weight, gradients = problem(shape, spread=0)
    rule = LowRankAdam(kind="galore", rank=24, scale=1.0)
    found = run_matrix(rule, weight, gradients[:1], decay=0.0)
    step = (weight - found) / 1e-2
    turned = step if shape[0] < shape[1] else step.t()
    gradient = gradients[0] if shape[0] < shape[1] else gradients[0].t()
    basis = torch.linalg.svd(gradient, full_matrices=False).U
    torch.testing.assert_close((basis.t() @ turned).abs(), torch.ones_like(turned), atol=1e-4, rtol=0)


def test_apollo_scales_columns_of_the_gradient():
    weight, gradients = problem((24, 40))
    found = run_matrix(LowRankAdam(kind="apollo", rank=8), weight, gradients[:1], decay=0.0)
    by = ((weight - found) / gradients[0]).double()
    torch.testing.assert_close(by, by[:1].expand_as(by), rtol=1e-6, atol=1e-12)
    assert (by > 0).all()


@pytest.mark.parametrize(("bits", "spread", "gap"), [(16, 2, 0.02), (8, 2, 0.06), (4, 0, 0.3)])
def test_adamw_with_states_of_few_bits_stays_near(bits, spread, gap):
    """Relative to how far the weights went in all; gradients within a block are of so many decades."""
    weight, gradients = problem((64, 128), torch.float32, spread=spread)
    exact, _ = run_elements(AdamW(), weight, gradients, decay=0.0)
    found, _ = run_elements(AdamW(state_bits=bits), weight, gradients, decay=0.0)
    assert (found - exact).norm() <= gap * (exact - weight.view(-1)).norm()


def test_a_second_moment_in_16_bits_falls_when_gradients_stop():
    """β₂ = 0.999 takes 0.1 % a step, which rounding to the nearest bf16 number would give back."""
    count = 4096
    rule, state = AdamW(state_bits=16), element_states(AdamW(state_bits=16), count)
    weight = torch.zeros(count)
    rule.update(weight, torch.ones(count), state, lr=0.0, weight_decay=0.0, step=1, seed=0)
    begun = state["second"].float().mean()
    for step in range(2, 1002):
        rule.update(weight, torch.zeros(count), state, lr=0.0, weight_decay=0.0, step=step, seed=step * 31)
    torch.testing.assert_close(state["second"].float().mean() / begun, torch.tensor(0.999**1000), rtol=0.05, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_codes_are_near_what_they_stand_for(bits, signed, data):
    """(c / c_max)^p has steps of p (c / c_max)^(p − 1) / c_max of the block's largest."""
    count = data.draw(st.integers(1, 1500))
    count += count % 2 if bits == 4 else 0
    seed = data.draw(st.integers(0, 2**16))
    power = 4 if bits == 8 else 2
    most = {(8, True): 127, (8, False): 255, (4, True): 7, (4, False): 16}[bits, signed]
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(count, generator=generator) * torch.logspace(-6, 6, count)
    value = value if signed else value.square()
    code = Code(bits=bits, signed=signed)
    tensors = {name: torch.zeros(of.entries(count), dtype=of.dtype) for name, of in code.layout("x").items()}
    code.encode(value.clone(), tensors["x_codes"], tensors["x_scales"])
    found = code.decode(tensors["x_codes"], tensors["x_scales"], count)
    for start in range(0, count, code.block):
        own, back = value[start : start + code.block], found[start : start + code.block]
        largest = own.abs().max()
        share = (own.abs() / largest) ** (1 / power)
        step = power * torch.maximum(share + 0.5 / most, torch.tensor(1.0 / most)) ** (power - 1) / most
        assert ((back - own).abs() <= (0.51 if signed else 1.01) * step * largest + 1e-30).all()
        if signed:
            assert (back * own >= 0).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_states_that_are_zero_stay_zero_and_second_moments_never_become_it(bits):
    for signed in (True, False):
        code = Code(bits=bits, signed=signed)
        tensors = {name: torch.zeros(of.entries(512), dtype=of.dtype) for name, of in code.layout("x").items()}
        assert (code.decode(tensors["x_codes"], tensors["x_scales"], 512)[: 512 if bits == 8 else 0] == 0).all()
        code.encode(torch.zeros(512), tensors["x_codes"], tensors["x_scales"])
        assert (code.decode(tensors["x_codes"], tensors["x_scales"], 512) == 0).all()
    second = torch.full((512,), 1e-12)
    second[0] = 1.0
    code = Code(bits=bits, signed=False)
    code.encode(second.clone(), tensors["x_codes"], tensors["x_scales"])
    assert (code.decode(tensors["x_codes"], tensors["x_scales"], 512)[:128] > 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdamW(betas=(1.0, 0.9)), lambda: AdamW(state_bits=5), lambda: SGD(momentum=1.0),
        lambda: SGD(momentum=0.0, nesterov=True), lambda: LowRankAdam(rank=0), lambda: LowRankAdam(kind="x"),
        lambda: Code(bits=2, signed=True),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match=r"must be|needs"):
        make()
