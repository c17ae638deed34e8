"""Integers of GGUF blocks that make up for each other: those of the plain way, and outputs nearer than alone."""

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.errors import UsageError
from memfit.technique import gguf_gptq
from memfit.technique.gguf_blocks import KINDS, encode, searched
from memfit.technique.gguf_gptq import encode_compensated
from memfit.technique.gguf_layout import Fields, Kind
from memfit.technique.gptq import DAMPING, Factor, factor

from .test_gptq import own_weights


def decoded(packed: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind]).copy())


def drawn(seed: int, *, rows: int = 5, columns: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and E[x xᵀ] of inputs that go together, float64."""
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns // 8, generator=made, dtype=torch.float64)
    scale = torch.randn(columns, 1, generator=made, dtype=torch.float64).exp()
    inputs = (mix + 0.1 * torch.randn(mix.shape, generator=made, dtype=torch.float64)) * scale
    return torch.randn(rows, columns, generator=made) * 0.05, inputs @ inputs.t() / columns


def lost(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    off = weight.double() - values.double()
    return float((off @ hessian * off).sum())


def importance_of(hessian: torch.Tensor) -> torch.Tensor:
    """What scales are searched with."""
    return (own_weights(hessian, DAMPING) * hessian.diagonal()).sqrt().float()


def plainly(weight: torch.Tensor, kind: str, made: Factor, importance: torch.Tensor) -> torch.Tensor:
    """Column by column in float64, from the definition."""
    one = KINDS[kind]
    found = searched(weight, one, importance)
    step, shift = (part.view(weight.shape[0], -1).double() for part in found.grid())
    off, values = torch.zeros(weight.shape, dtype=torch.float64), torch.zeros(weight.shape, dtype=torch.float64)
    for at, column in enumerate(made.order.tolist()):
        before = made.order[:at]
        target = weight[:, column].double() + off[:, before] @ made.coupling[:at, at]
        d, m = step[:, column // one.width], shift[:, column // one.width]
        q = torch.where(d == 0, 0.0, (target + m) / d).round().clamp(one.low, one.high)
        values[:, column] = d * q - m
        off[:, column] = weight[:, column].double() - values[:, column]
    return values


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_integers_are_those_of_the_plain_way(kind: str) -> None:
    weight, hessian = drawn(3, rows=3)
    made = factor(hessian)
    meant = torch.empty_like(weight)
    packed = encode_compensated(weight, kind, made, meant=meant)
    assert packed.shape == (3, KINDS[kind].row_nbytes(512))
    assert torch.equal(decoded(packed, kind), meant)
    # Where a target lies midway between two integers the last bit decides; there is none of these here.
    assert torch.allclose(meant.double(), plainly(weight, kind, made, importance_of(hessian)), atol=1e-6)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_0"])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**30))
def test_outputs_are_nearer_than_with_each_weight_by_itself(kind: str, seed: int) -> None:
    weight, hessian = drawn(seed)
    made = factor(hessian.float())
    alone = decoded(encode(weight, kind, importance=made.importance), kind)
    together = decoded(encode_compensated(weight, kind, made), kind)
    assert lost(weight, together, hessian) < 0.7 * lost(weight, alone, hessian)


def test_inputs_that_have_nothing_to_do_with_each_other_change_nothing() -> None:
    weight, _ = drawn(5)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.1
    alone = searched(weight, KINDS["Q4_K"], importance_of(torch.diag(importance).double()))
    packed = encode_compensated(weight, "Q4_K", factor(torch.diag(importance)))
    step, shift = (part.view(5, -1).repeat_interleave(32, dim=1) for part in alone.grid())
    nearest = ((weight + shift) / step).round().clamp(0, 15) * step - shift
    assert torch.allclose(decoded(packed, "Q4_K"), nearest, atol=1e-6)


def test_rows_in_pieces_give_the_same_bytes_for_the_same_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = drawn(7, rows=9)
    made = factor(hessian)
    scales = searched(weight, KINDS["Q3_K"], importance_of(hessian))
    blocks = 512 // 256  # of a row
    counts: list[int] = []

    def cut(rows: torch.Tensor, kind: Kind, _: torch.Tensor) -> Fields:
        first = sum(counts)
        counts.append(rows.shape[0])
        part = slice(first * blocks, (first + rows.shape[0]) * blocks)
        names = ("q", "k", "m", "d", "dmin")
        return Fields(kind=kind, **{n: t[part].clone() for n, t in zip(names, scales.parts(), strict=True)})

    monkeypatch.setattr(gguf_gptq, "searched", cut)
    whole = encode_compensated(weight, "Q3_K", made)
    counts.clear()
    monkeypatch.setattr(gguf_gptq, "_ROWS", (2, 2))
    assert torch.equal(encode_compensated(weight, "Q3_K", made), whole)
    assert counts == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("seed", range(7, 11))
def test_rows_in_pieces_give_the_same_bytes_but_where_scales_tie(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of a search round otherwise in pieces of another size, so that one of two scales as good is another."""
    weight, hessian = drawn(seed, rows=9)
    made = factor(hessian)
    whole = encode_compensated(weight, "Q3_K", made)
    monkeypatch.setattr(gguf_gptq, "_ROWS", (2, 2))
    pieces = encode_compensated(weight, "Q3_K", made)
    assert int((pieces == whole).all(dim=1).sum()) >= 8
    losses = [lost(weight, decoded(packed, "Q3_K"), hessian) for packed in (whole, pieces)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_inputs_that_are_always_0_and_weights_that_are_0_are_0() -> None:
    weight, hessian = drawn(9)
    hessian[:32], hessian[:, :32] = 0, 0
    read = decoded(encode_compensated(weight, "Q4_0", factor(hessian)), "Q4_0")
    assert not read[:, :32].any()
    assert not decoded(encode_compensated(torch.zeros(5, 512), "Q2_K", factor(hessian)), "Q2_K").any()


def test_it_runs_on_fake_tensors_and_refuses_what_does_not_fit() -> None:
    with FakeTensorMode():
        made = factor(torch.empty(512, 512))
        packed = encode_compensated(torch.empty(200, 512), "Q8_0", made, meant=torch.empty(200, 512))
        assert packed.shape == (200, 544)
    weight, hessian = drawn(1, columns=256)
    with pytest.raises(UsageError, match="of 256 inputs, the weight has 512"):
        encode_compensated(torch.zeros(2, 512), "Q4_K", factor(hessian))
    with pytest.raises(UsageError, match="not finite"):
        encode_compensated(weight * float("nan"), "Q4_K", factor(hessian))
