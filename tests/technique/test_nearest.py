"""Rounding to the nearest, held against the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.packed.scheme import Scheme
from memfit.technique import nearest
from memfit.technique.nearest import round_to_nearest

SCHEMES = [Scheme(bits=bits, group=group, symmetric=symmetric) for bits in (2, 3, 4, 6, 8) for group in (32, None)
           for symmetric in (True, False)]  # fmt: skip


def draw(seed: int, rows: int, inputs: int) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    magnitude=st.sampled_from([0.0, 1e-38, 1e-30, 0.02, 1.0, 1e30]),
    shift=st.sampled_from([0.0, 0.5, -3.0]),
)
def test_every_weight_is_at_the_level_nearest_to_it(
    scheme: Scheme, seed: int, rows: int, magnitude: float, shift: float
) -> None:
    weight = (draw(seed, rows, 96) + shift) * magnitude
    q, scale, zero = round_to_nearest(weight, scheme)
    w = weight.double().view(rows, scheme.groups(96), -1)
    half, span = 2 ** (scheme.bits - 1), 2**scheme.bits - 1
    low, high = (found.unsqueeze(-1) for found in torch.aminmax(w, dim=-1))
    peak = torch.maximum(-low, high)
    width = 2 * peak if scheme.symmetric else high.clamp(min=0) - low.clamp(max=0)
    step = torch.where(peak > 2.0**-100, width, 2.0 if scheme.symmetric else 1.0) / span
    assert torch.equal(scale.unsqueeze(-1), step.float().bfloat16())
    w, step = w / scale.double().unsqueeze(-1), step.float().bfloat16().double()
    if zero is not None:
        down = (low.clamp(max=0) / step).clamp(-span, 0)
        found = -half - zero.double().unsqueeze(-1)
        assert ((found - down).abs() <= 0.5 + 1e-4).all()
        w = w - found - half
    due = w.clamp(-half, half - 1)
    assert ((q.view_as(w).double() - due).abs() <= 0.5 + 1e-4).all()
    assert q.dtype == torch.int8 and (zero is None) == scheme.symmetric


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_blocks_do_not_change_the_result(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(5, 10, 128)
    whole = round_to_nearest(weight, scheme)
    monkeypatch.setattr(nearest, "_BLOCK_NBYTES", 3 * 4 * 128)
    for one, other in zip(whole, round_to_nearest(weight, scheme), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_the_weight_is_left_as_it_is() -> None:
    weight = draw(7, 4, 64)
    before = weight.clone()
    round_to_nearest(weight, SCHEMES[0])
    assert torch.equal(weight, before)


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf"), 2.0**121])
def test_what_no_scale_holds_is_refused(entry: float) -> None:
    weight = draw(7, 4, 64)
    weight[2, 5] = entry
    for scheme in SCHEMES:
        with pytest.raises(ValueError, match="not finite or larger"):
            round_to_nearest(weight, scheme)
