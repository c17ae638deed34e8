"""What attuning computes, beside the plain formulas in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.calibrate import collect
from memfit.calibrate.stream import Streamed
from memfit.packed.scheme import Scheme
from memfit.source.source import open_source
from memfit.technique.attune import Attuning, Grown, Moved, divergence
from memfit.technique.quantize import Quantized, dequantize, quantize


def rows_of(found: Quantized, step: int = 5):
    """Integers some rows at a time, as a file is read."""
    for start in range(0, found.q.shape[0], step):
        part = slice(start, start + step)
        zero = None if found.zero is None else found.zero[part]
        some = Quantized(scheme=found.scheme, q=found.q[part], scale=found.scale[part], zero=zero, table=found.table)
        yield start, some


@given(
    bits=st.sampled_from([2, 4, 8]), group=st.sampled_from([None, 32]), symmetric=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_a_gradient_of_growth_is_that_of_the_plain_formula(
    bits: int, group: int | None, symmetric: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    found = quantize(torch.randn(12, 64), Scheme(bits=bits, group=group, symmetric=symmetric))
    slope = torch.randn(12, 64)
    grown = Grown(lambda: rows_of(found), found.scale, 64)
    torch.testing.assert_close(grown.weight().detach(), dequantize(found), rtol=0, atol=0)
    with torch.no_grad():
        grown.parameter.uniform_(-0.2, 0.2)
    grown.weight().backward(slope.to(torch.bfloat16))
    growth = grown.parameter.detach().double().requires_grad_()
    levels = found.q.double() if found.zero is None else _less(found.q, found.zero)
    by_group = levels.view(12, found.scale.shape[1], -1)
    plain = (by_group * (found.scale.double() * (1 + growth)).unsqueeze(-1)).view(12, 64)
    plain.backward(slope.to(torch.bfloat16).double())
    assert growth.grad is not None and grown.parameter.grad is not None
    # ŵ and its scale are bf16 numbers: each is off by 2⁻⁹ at the most.
    size = (slope.double() * plain.detach()).abs().view(by_group.shape).sum(-1)
    assert ((grown.parameter.grad.double() - growth.grad).abs() <= size / 128).all()


def _less(q: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (q.double().view(*zero.shape, -1) - zero.double().unsqueeze(-1)).view(q.shape)


def test_a_scale_that_grew_is_what_is_stored() -> None:
    found = quantize(torch.randn(8, 64), Scheme(bits=4, group=32))
    grown = Grown(lambda: rows_of(found), found.scale, 64)
    with torch.no_grad():
        grown.parameter.uniform_(-0.5, 0.5)
    stored = Quantized(scheme=found.scheme, q=found.q, scale=grown.learned(), zero=found.zero, table=None)
    torch.testing.assert_close(grown.weight().detach(), dequantize(stored), rtol=0, atol=0)


def test_a_vector_moves_in_parts_of_its_size() -> None:
    first = torch.tensor([2.0, -2.0, 4.0, 0.0], dtype=torch.bfloat16)
    moved = Moved(first)
    assert torch.equal(moved.value().detach(), first)
    moved.value().sum().backward()
    torch.testing.assert_close(moved.parameter.grad, torch.full((4,), 6.0**0.5))
    with torch.no_grad():
        moved.parameter.fill_(0.1)
    assert moved.learned().dtype == torch.bfloat16 and torch.equal(moved.learned(), moved.value().detach())


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("nbytes", [1 << 20, 4 * 4096 * 3])
def test_a_divergence_is_that_of_all_logits(
    make_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cap: float | None, nbytes: int
) -> None:
    monkeypatch.setattr("memfit.calibrate.collect.LOGITS_NBYTES", nbytes)
    monkeypatch.setattr("memfit.calibrate.stream.ROWS_NBYTES", 1000 * 32 * 2)
    source = open_source(make_llama(hidden_size=32, intermediate_size=48))
    streamed = Streamed(source)
    streamed.cap = cap
    assert len(list(collect.heads_of(streamed))) > 4, "the head comes in several parts"
    torch.manual_seed(0)
    ours, theirs = (torch.randn(10, 32).mul(8).to(torch.bfloat16) for _ in range(2))
    ours.requires_grad_()
    kl = divergence(streamed, ours, theirs)
    kl.backward()
    slope = ours.grad
    head = source.read_parameter("lm_head.weight", dtype=torch.bfloat16).double()
    plain = ours.detach().double().requires_grad_()
    answers = [states @ head.t() for states in (theirs.double(), plain)]
    if cap is not None:
        answers = [cap * (logits / cap).tanh() for logits in answers]
    p, q = (logits.log_softmax(-1) for logits in answers)
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    wanted.backward()
    assert plain.grad is not None and slope is not None
    assert float(kl.detach()) == pytest.approx(float(wanted.detach()), rel=0.02)  # logits are rounded to bf16
    assert (slope.double() - plain.grad).norm() < 0.02 * plain.grad.norm()
    again = divergence(streamed, ours.detach(), theirs)
    assert not again.requires_grad and torch.equal(again, kl)


def test_rates_rise_and_fall() -> None:
    rates = [Attuning(steps=16, rate=0.01).rate_at(step) for step in range(16)]
    assert rates[0] == pytest.approx(0.005) and max(rates) == rates[1] and rates[-1] == pytest.approx(0.01 / 16)
    assert Attuning(steps=1).rate_at(0) == 0.003


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"positions": 0}, {"rate": 0.0}, {"rate": 1.5}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Attuning(**wrong)
