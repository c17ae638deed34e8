"""Block tuning: it begins at what was chosen, has the gradients of plain float64, and ends with what it computed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.packed.levels import level_table
from memfit.packed.scheme import Scheme
from memfit.technique.quantize import Quantized, dequantize, quantize
from memfit.technique.tune import Learner, Tuning, relative_error, tune


def chosen(
    rows: int, width: int, *, bits: int, symmetric: bool = True, seed: int = 0, **kind
) -> tuple[torch.Tensor, Quantized]:
    torch.manual_seed(seed)
    weight = torch.randn(rows, width)
    return weight, quantize(weight, Scheme(bits=bits, group=32, symmetric=symmetric, **kind))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 9), groups=st.integers(1, 3), bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_it_begins_where_it_was_and_ends_with_what_it_computed(rows, groups, bits, symmetric, seed) -> None:
    weight, found = chosen(rows, groups * 32, bits=bits, symmetric=symmetric, seed=seed)
    learner = Learner(found, weight)
    assert torch.equal(learner.weight(), dequantize(found))
    with torch.no_grad():  # moved far, so that some levels and zero points are held back by the outermost
        learner.offset.add_(torch.randn_like(learner.offset) * 2)
        learner.growth.add_(torch.randn_like(learner.growth) * 0.1)
        if learner.shift is not None:
            learner.shift.add_(torch.randn_like(learner.shift) * 3)
    assert torch.equal(learner.weight(), dequantize(learner.result()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_are_those_of_float64_with_rounding_passed_through(bits: int, symmetric: bool) -> None:
    weight, found = chosen(5, 64, bits=bits, symmetric=symmetric)
    learner = Learner(found, weight)
    with torch.no_grad():
        learner.offset.add_(torch.randn_like(learner.offset))
        learner.growth.add_(torch.randn_like(learner.growth) * 0.05)
    wanted = torch.randn(5, 64).bfloat16()
    learner.weight().backward(wanted)

    half = 2 ** (bits - 1)
    offset, growth = (p.detach().double().requires_grad_() for p in (learner.offset, learner.growth))
    shift = torch.zeros(found.scale.shape, dtype=torch.float64, requires_grad=True)
    through = lambda t: (t.round() - t).detach() + t  # noqa: E731
    level = (found.q + through(offset)).clamp(-half, half - 1)
    zero = (0 if found.zero is None else found.zero) + through(shift)
    step = found.scale.double() * (1 + growth)
    step = (step.float().bfloat16().double() - step).detach() + step
    dense = (level - zero.repeat_interleave(32, 1)) * step.repeat_interleave(32, 1)
    dense.backward(wanted.double())
    assert learner.offset.grad.double() == pytest.approx(offset.grad, rel=1e-5, abs=1e-6)
    assert learner.growth.grad.double() == pytest.approx(growth.grad, rel=1e-5, abs=1e-5)
    if learner.shift is not None:
        assert learner.shift.grad.double() == pytest.approx(shift.grad, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("values", "bits"), [("codebook", 2), ("codebook", 3), ("nf4", 4)])
def test_of_levels_a_step_is_worth_what_lies_between_them(values: str, bits: int) -> None:
    weight, found = chosen(6, 64, bits=bits, values=values)
    learner = Learner(found, weight)
    assert torch.equal(learner.weight(), dequantize(found))
    with torch.no_grad():
        learner.offset.add_(torch.randn_like(learner.offset))
    assert torch.equal(learner.weight(), dequantize(learner.result()))
    learner.weight().backward(torch.ones(6, 64).bfloat16())
    table = (level_table(found.scheme) if found.table is None else found.table).double()
    place = (found.q + learner.offset.detach().round() + 2 ** (bits - 1)).long()
    held = (place < 0) | (place >= 2**bits)
    place = place.clamp(0, 2**bits - 1)
    last = 2**bits - 1
    slope = [(table[min(u + 1, last)] - table[max(u - 1, 0)]) / (1 + (0 < u < last)) for u in place.view(-1)]
    right = torch.stack(slope).view(6, 64).masked_fill(held, 0.0) * found.scale.double().repeat_interleave(32, 1)
    assert learner.offset.grad.double() == pytest.approx(right, rel=1e-5, abs=1e-6)
    if values == "codebook":
        scale = found.scale.double().repeat_interleave(32, 1).view(-1)
        of_level = torch.zeros(2**bits, dtype=torch.float64).index_add_(0, place.view(-1), scale)
        assert learner.levels.grad.double() == pytest.approx(of_level, rel=1e-5)


@pytest.mark.parametrize(("bits", "vector"), [(2, 4), (3, 2)])
def test_of_vectors_levels_and_scales_learn_and_codes_stay(bits: int, vector: int) -> None:
    weight, found = chosen(6, 64, bits=bits, values="codebook", vector=vector)
    learner = Learner(found, weight)
    assert learner.offset is None and torch.equal(learner.weight(), dequantize(found))
    with torch.no_grad():
        learner.growth.add_(torch.randn_like(learner.growth) * 0.05)
        learner.levels.add_(torch.randn_like(learner.levels) * 0.1)
    wanted = torch.randn(6, 64).bfloat16()
    learner.weight().backward(wanted)
    growth, levels = (p.detach().double().requires_grad_() for p in (learner.growth, learner.levels))
    worth = (2**bits) ** torch.arange(vector)
    place = ((found.q.long() + 2 ** (bits - 1)).view(6, -1, vector) * worth).sum(-1)
    rounded = (levels.float().bfloat16().double() - levels).detach() + levels
    step = found.scale.double() * (1 + growth)
    step = (step.float().bfloat16().double() - step).detach() + step
    dense = rounded[place].view(6, 64) * step.repeat_interleave(32, 1)
    dense.backward(wanted.double())
    assert learner.growth.grad.double() == pytest.approx(growth.grad, rel=1e-5, abs=1e-5)
    assert learner.levels.grad.double() == pytest.approx(levels.grad, rel=1e-5, abs=1e-5)
    result = learner.result()
    assert torch.equal(result.q, found.q) and torch.equal(learner.weight(), dequantize(result))


def test_levels_of_vectors_learn_what_is_wanted() -> None:
    weight, found = chosen(32, 64, bits=2, values="codebook", vector=4)
    inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    learners = {"only": Learner(found, weight)}

    def loss(turn: int) -> torch.Tensor:
        x = inputs[turn : turn + 32]
        return relative_error(x @ learners["only"].weight().float().t(), x @ weight.t())

    before, after = tune(learners, loss, [0, 32], tuning=Tuning(steps=40, scale_rate=0.01))
    assert after < 0.9 * before


def test_values_whose_codes_are_in_no_order_are_refused() -> None:
    weight, found = chosen(4, 32, bits=4, values="mxfp4")
    with pytest.raises(ValueError, match="mxfp4 g32: its codes are not in the order"):
        Learner(found, weight)


def test_the_error_of_two_layers_becomes_smaller() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 32)
    learners, weights = {}, {}
    for name, rows in (("first", 32), ("second", 16)):
        weights[name], found = chosen(rows, 32, bits=2, symmetric=True, seed=len(name))
        learners[name] = Learner(found, weights[name])
    target = torch.relu(inputs @ weights["first"].t()) @ weights["second"].t()

    def loss(turn: int) -> torch.Tensor:
        x = inputs[turn : turn + 32]
        hidden = torch.relu(x @ learners["first"].weight().float().t())
        return relative_error(hidden @ learners["second"].weight().float().t(), target[turn : turn + 32])

    def mean() -> float:
        return float((loss(0) + loss(32)).detach() / 2)

    at_first = mean()
    before, after = tune(learners, loss, [0, 32], tuning=Tuning(steps=60, rate=0.02, scale_rate=0.005))
    assert before == pytest.approx(at_first, rel=1e-5) and after == pytest.approx(mean(), rel=1e-5)
    assert after < 0.8 * before


def test_the_error_of_a_token_is_relative_to_that_token() -> None:
    target = torch.tensor([[1000.0, 0.0], [0.0, 1.0]])
    out = torch.tensor([[1100.0, 0.0], [0.0, 1.1]])
    assert float(relative_error(out, target)) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"windows": 0}, {"rate": 0.0}, {"rate": 2.0}, {"scale_rate": -0.1}])
def test_settings_without_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        Tuning(**wrong)
