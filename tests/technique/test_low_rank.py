"""Factors are the best there are, in float64 against plain formulas; every rank's error is told before it is made."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.packed.forms import LowRank, Whole
from memfit.packed.scheme import Scheme
from memfit.technique import spectrum
from memfit.technique.gptq import Factor, factor, gptq
from memfit.technique.low_rank import factorize, factors, rank_for, right_factors, rounded, streamed
from memfit.technique.made import dense
from memfit.technique.quantize import dequantize, quantize
from memfit.technique.spectrum import Metric, errors_by_rank

SHAPES = [(12, 20), (20, 12), (16, 16)]
KINDS = ["plain", "scaled", "whitened"]


def draw(seed: int, rows: int, inputs: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, H of inputs that are correlated, and G."""
    random = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    x = make(3 * inputs, inputs) @ (make(inputs, inputs) / inputs**0.5) * make(inputs).exp()
    return make(rows, inputs).to(dtype), (x.t() @ x / x.shape[0]).to(dtype), make(rows).exp().to(dtype)


def metric_of(kind: str, hessian: Tensor) -> tuple[dict[str, Tensor | Factor], Tensor]:
    """Arguments of a kind, and the H that they stand for."""
    if kind == "plain":
        return {}, torch.eye(len(hessian), dtype=hessian.dtype)
    if kind == "scaled":
        return {"importance_K": hessian.diagonal()}, hessian.diagonal().diag()
    made = factor(hessian)
    return {"factor": made}, hessian + made.damping * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)


def cost(error: Tensor, hessian: Tensor, rows: Tensor | None = None) -> Tensor:
    """Σ_o G_o (E H Eᵀ)_oo, in float64."""
    each = torch.einsum("nk,kl,nl->n", error.double(), hessian.double(), error.double())
    return (each if rows is None else each * rows).sum()


def best(weight: Tensor, hessian: Tensor, rows: Tensor, rank: int) -> Tensor:
    """The best product by H's own square root from its eigenvectors, and an SVD."""
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors @ values.sqrt().diag()
    u, s, v = torch.linalg.svd(rows.sqrt().diag() @ weight @ root, full_matrices=False)
    return (1 / rows.sqrt()).diag() @ u[:, :rank] @ s[:rank].diag() @ v[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_those_of_the_eigenvectors_of_h(shape: tuple[int, int], kind: str) -> None:
    weight, hessian, rows = draw(0, *shape)
    arguments, meant = metric_of(kind, hessian)
    for rank in (1, 5, min(shape)):
        left, right = factors(weight, rank, Metric(**arguments), rows)
        assert left.dtype == torch.float64 and left.shape == (shape[0], rank)
        torch.testing.assert_close(left @ right, best(weight, meant, rows, rank), rtol=1e-8, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), weighed=st.booleans(),
    what=st.sampled_from(["any", "dead inputs", "one direction", "constant rows", "dead outputs"]),
)  # fmt: skip
def test_every_rank_errs_by_what_is_told(
    shape: tuple[int, int], kind: str, seed: int, weighed: bool, what: str
) -> None:
    weight, hessian, rows = draw(seed, *shape)
    if what == "dead inputs":
        hessian[:4], hessian[:, :4] = 0.0, 0.0
    if what == "one direction":
        hessian = torch.outer(hessian[0], hessian[0])
    if what == "constant rows":
        weight = weight[:, :1].expand(shape).contiguous()
    if what == "dead outputs":
        rows[:3] = 0.0
    arguments, meant = metric_of(kind, hessian)
    if kind == "scaled":
        meant = spectrum.positive(hessian.diagonal()).diag()
    counted = spectrum.positive(rows) if weighed else None
    told = errors_by_rank(weight, rows_N=rows if weighed else None, **arguments)
    assert told.shape == (min(shape) + 1,) and told[-1] == 0 and bool((told.diff() <= 0).all())
    torch.testing.assert_close(told[0], cost(weight, meant, counted), rtol=1e-6, atol=0)
    for rank in range(1, min(shape) + 1):
        left, right = factors(weight, rank, Metric(**arguments), rows if weighed else None)
        measured = cost(weight - left @ right, meant, counted)
        torch.testing.assert_close(measured, told[rank], rtol=1e-6, atol=1e-9 * float(told[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], kind: str) -> None:
    weight, hessian, rows = draw(1, *shape)
    arguments, _ = metric_of(kind, hessian)
    left, right = factors(weight, min(shape), Metric(**arguments), rows)
    assert float((left @ right - weight).abs().max()) < 1e-6
    made = factorize(weight.float(), LowRank(rank=min(shape)), rows_N=rows.float())
    # Two roundings to bf16, of half a unit in the ninth bit, of which one is mostly undone.
    assert float((dense(made).double() - weight).norm() / weight.norm()) < 2**-8


@settings(max_examples=30, deadline=None)
@given(shape=st.sampled_from([(48, 64), (96, 40)]), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6),
       rank=st.integers(1, 40))  # fmt: skip
def test_rounded_factors_cost_little_more_than_is_told(
    shape: tuple[int, int], kind: str, seed: int, rank: int
) -> None:
    weight, hessian, rows = draw(seed, *shape, dtype=torch.float32)
    arguments, meant = metric_of(kind, hessian)
    left, right = rounded(weight, rank, Metric(**arguments), rows)
    assert left.dtype == right.dtype == torch.bfloat16 and left.is_contiguous() and right.is_contiguous()
    told = errors_by_rank(weight, rows_N=rows, **arguments)
    measured = cost(weight.double() - left.double() @ right.double(), meant, rows)
    # What rounding w itself to bf16 would cost.
    noise = cost(weight - weight.bfloat16().float(), meant.diagonal().diag(), rows)
    assert float(told[rank]) * (1 - 1e-4) <= float(measured) <= float(told[rank] * 1.01 + 8 * noise)


def test_balanced_factors_are_of_one_size() -> None:
    weight, _, rows = draw(2, 24, 40, dtype=torch.float32)
    left, right = rounded(weight * 1e-4, 8, None, rows * 1e6)
    ratio = left.float().norm(dim=0) / right.float().norm(dim=1)
    assert bool(((ratio > 0.5) & (ratio < 2)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tall_weight_is_factored_as_its_rows_come(kind: str) -> None:
    weight, hessian, rows = draw(3, 90, 16, dtype=torch.float32)
    arguments, _ = metric_of(kind, hessian)
    form = LowRank(rank=6)
    blocks = lambda: iter(weight.bfloat16().split(25))  # noqa: E731
    right, lefts = streamed(blocks, (90, 16), form, rows_N=rows, **arguments)
    left = torch.cat([part for part, base in lefts if base is None])
    whole = factorize(weight.bfloat16(), form, rows_N=rows, **arguments)
    torch.testing.assert_close((left.float() @ right.float()).bfloat16(), dense(whole), rtol=0.02, atol=0.02)
    again = right_factors(blocks(), [form], rows_N=rows, **arguments)[form]
    parts = [factorize(block, form, right=again, **arguments).parts["weight_left"] for block in blocks()]
    assert torch.equal(again, right) and torch.equal(torch.cat(parts), left)
    told = errors_by_rank(blocks, shape=(90, 16), rows_N=rows, **arguments)
    torch.testing.assert_close(told, errors_by_rank(weight.bfloat16(), rows_N=rows, **arguments), rtol=1e-4, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(
    scheme=st.sampled_from([Scheme(bits=2, group=32), Scheme(bits=3, group=64, symmetric=False)]),
    kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), rank=st.integers(1, 12),
    shape=st.sampled_from([(40, 64), (80, 64)]),
)  # fmt: skip
def test_factors_beside_integers_err_less_than_the_integers_alone(
    scheme: Scheme, kind: str, seed: int, rank: int, shape: tuple[int, int]
) -> None:
    weight, hessian, _ = draw(seed, *shape, dtype=torch.float32)
    arguments, meant = metric_of(kind, hessian)
    alone = quantize(weight, scheme, importance=arguments.get("importance_K"))  # type: ignore[arg-type]
    if kind == "whitened":
        alone = gptq(weight, arguments["factor"], scheme).quantized  # type: ignore[arg-type]
    before = cost(weight - dequantize(alone).float(), meant)
    errors = []
    for rounds in (1, 3):
        made = factorize(weight, LowRank(rank=rank, base=scheme), rounds=rounds, **arguments)
        assert made.base is not None
        product = made.parts["weight_left"].double() @ made.parts["weight_right"].double()
        errors.append(float(cost(weight - dequantize(made.base).double() - product, meant)))
    assert errors[1] <= errors[0] * (1 + 1e-6) and errors[0] < before


def test_integers_and_factors_of_a_tall_weight_are_made_row_by_row() -> None:
    weight, hessian, _ = draw(5, 96, 64, dtype=torch.float32)
    form = LowRank(rank=8, base=Scheme(bits=2, group=32))
    right, lefts = streamed(lambda: weight.split(40), (96, 64), form, importance_K=hessian.diagonal())
    found = torch.cat([dequantize(base).float() + left.float() @ right.float() for left, base in lefts if base])
    again = right_factors(weight.split(40), [form], importance_K=hessian.diagonal())[form]
    some = [factorize(block, form, right=again, importance_K=hessian.diagonal()) for block in weight.split(40)]
    assert torch.equal(torch.cat([dense(one) for one in some]), found.bfloat16())
    once = factorize(weight, form, importance_K=hessian.diagonal(), rounds=1)
    torch.testing.assert_close(found.bfloat16(), dense(once), rtol=0.05, atol=0.05)


def test_few_vectors_of_a_wide_weight_are_found_by_chance_about_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 256, generator=random) * torch.linspace(1, 0.05, 256)
    told = errors_by_rank(weight)
    monkeypatch.setattr(spectrum, "_RANDOMISED_FROM", 128)
    left, right = factors(weight, 24)
    again, _ = factors(weight, 24)
    assert torch.equal(left, again), "the same bytes each time"
    error = float((weight - left @ right).double().square().sum())
    assert float(told[24]) * (1 - 1e-5) <= error <= 1.02 * float(told[24])


def test_a_dry_run_takes_the_same_shapes() -> None:
    with FakeTensorMode():
        weight = torch.empty(64, 128, dtype=torch.bfloat16)
        made = factor(torch.empty(128, 128))
        for form in (LowRank(rank=8), LowRank(rank=8, base=Scheme(bits=4, group=32))):
            found = factorize(weight, form, factor=made, rows_N=torch.empty(64))
            assert {part: (t.dtype, tuple(t.shape)) for part, t in found.parts.items()} == form.parts((64, 128))
        blocks, importance = [torch.empty(64, 32)] * 3, torch.empty(32)
        right, lefts = streamed(lambda: blocks, (192, 32), LowRank(rank=4), importance_K=importance)
        assert right.shape == (4, 32) and [tuple(left.shape) for left, _ in lefts] == [(64, 4)] * 3


def test_the_rank_that_fits_takes_no_more_bytes() -> None:
    for nbytes in (100, 5000, 20000, 10**6):
        rank = rank_for((40, 64), nbytes)
        assert 0 <= rank <= 40
        if rank:
            assert LowRank(rank=rank).nbytes((40, 64)) <= nbytes
        if rank < 40:
            assert LowRank(rank=rank + 1).nbytes((40, 64)) > nbytes


def test_what_cannot_be_is_told() -> None:
    weight = torch.ones(8, 16)
    with pytest.raises(ValueError, match="has no rank 9"):
        factorize(weight, LowRank(rank=9))
    with pytest.raises(ValueError, match="told of 4, and the weight has 16"):
        factorize(weight, LowRank(rank=2), importance_K=torch.ones(4))
    with pytest.raises(ValueError, match="finite and not negative"):
        factorize(weight, LowRank(rank=2), importance_K=-torch.ones(16))
    with pytest.raises(ValueError, match="not finite or too large"):
        factorize(weight * float("nan"), LowRank(rank=2))
    with pytest.raises(ValueError, match="that others share"):
        factorize(weight, LowRank(rank=2, base=Whole()))
    with pytest.raises(ValueError, match="tall weights alone"):
        errors_by_rank(lambda: [weight], shape=(8, 16))
