"""Codebooks of vectors: the nearest in the metric of what errors cost, learned means, and never worse than a grid."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from memfit.packed.levels import digits, places
from memfit.packed.scheme import Scheme
from memfit.technique import vectors as vectors_file
from memfit.technique.gptq import factor, gptq
from memfit.technique.quantize import dequantize, learned, quantize, quantize_error
from memfit.technique.vectors import learn_vectors, lloyd

from .test_gptq import draw, error_of, in_turn, own_weights

SCHEMES = [
    Scheme(bits=2, group=64, values="codebook", vector=4), Scheme(bits=3, group=32, values="codebook", vector=2),
    Scheme(bits=4, group=None, values="codebook", vector=2), Scheme(bits=2, group=128, values="codebook", vector=2),
]  # fmt: skip
BY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def by_vector(weight: Tensor, scheme: Scheme) -> Tensor:
    return weight.double().view(weight.shape[0], -1, scheme.vector)


def as_in_the_paper(w: Tensor, hessian: Tensor, scheme: Scheme, *, damping: float) -> Tensor:
    """ŵ by Frantar et al. 2023, algorithm 1, some columns at a time: of all levels the one with the least error in
    (H⁻¹)⁻¹ of those columns; float64."""
    found = quantize(w, scheme, importance=own_weights(hessian, damping, scheme.vector))
    assert found.table is not None
    levels, scale = found.table.double(), found.scale.double()
    rest, read = w.clone(), torch.zeros_like(w)
    group = w.shape[1] // scale.shape[1]
    for some, inverse in in_turn(hessian, damping, scheme.vector):
        own = torch.linalg.inv(inverse[some][:, some])
        tried = levels * scale[:, some[0] // group].view(-1, 1, 1)
        off = rest[:, some].unsqueeze(1) - tried
        place = torch.einsum("nlv,vw,nlw->nl", off, own, off).argmin(dim=1)
        read[:, some] = tried[torch.arange(len(w)), place].bfloat16().double()
        rest -= (rest[:, some] - read[:, some]) @ own @ inverse[some]
    return read


@BY_SCHEME
@pytest.mark.parametrize("block", [32, 128])
def test_gptq_chooses_as_the_paper_does_with_columns_that_go_together(scheme: Scheme, block: int) -> None:
    w, hessian = draw(1)
    made = gptq(w, hessian, scheme, damping=0.01, block=block)
    assert torch.equal(dequantize(made.quantized).double(), as_in_the_paper(w, hessian, scheme, damping=0.01))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    torch.testing.assert_close(made.error, error_of(w, dequantize(made.quantized), damped), rtol=1e-9, atol=0)


@settings(max_examples=20, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6))
def test_gptq_errs_less_than_what_is_nearest_and_as_little_in_fp32(scheme: Scheme, seed: int) -> None:
    w, hessian = draw(seed, rows=24)
    plain = quantize(w, scheme, importance=hessian.diagonal().float())
    wide, narrow = (gptq(w.to(dtype), hessian.to(dtype), scheme).quantized for dtype in (torch.float64, torch.float32))
    errors = [error_of(w, dequantize(found), hessian).sum() for found in (plain, wide, narrow)]
    assert errors[1] < errors[0] and errors[2] <= 1.02 * errors[1]


def test_an_order_that_tears_vectors_apart_is_refused() -> None:
    w, hessian = draw(2)
    with pytest.raises(ValueError, match="codebook2x4 g64: the columns of a vector must come one after another"):
        gptq(w, factor(hessian), SCHEMES[0])


@settings(max_examples=20, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6), search=st.booleans())
def test_each_vector_is_the_nearest_one_and_a_better_scale_is_taken(scheme: Scheme, seed: int, search: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 128, generator=generator) * torch.rand(6, 1, generator=generator).exp()
    importance = torch.rand(128, generator=generator) + 0.01
    found = quantize(weight, scheme, importance=importance, search=search)
    assert found.table is not None and found.table.shape == scheme.codebook
    spread = found.scale.double().repeat_interleave(128 // found.scale.shape[1], dim=1)
    target, a = by_vector(weight / spread, scheme), by_vector(importance[None], scheme)
    errors = (a[..., None, :] * (target[..., None, :] - found.table.double()).square()).sum(-1)
    chosen = places((found.q + 2 ** (scheme.bits - 1)).view(torch.uint8), found.table).long().unsqueeze(-1)
    best = errors.amin(-1, keepdim=True)
    assert bool((errors.gather(-1, chosen) <= best * (1 + 1e-4) + 1e-9).all())
    plain = quantize(weight, scheme, importance=importance, search=False)
    least, most = (quantize_error(weight, one, importance=importance).sum() for one in (found, plain))
    assert least <= most * (1 + 1e-4)


@BY_SCHEME
def test_levels_are_means_of_what_is_nearest_to_them(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3000, scheme.vector, generator=generator, dtype=torch.float64)
    weight = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    levels = x[: scheme.codebook[0]].clone()
    error = float("inf")
    for _ in range(3):
        apart = (weight[:, None] * (x[:, None] - levels).square()).sum(-1)
        place = apart.argmin(1)
        assert float(apart.amin(1).sum()) < error  # each round is nearer
        error = float(apart.amin(1).sum())
        right = levels.clone()
        for at in place.unique().tolist():
            right[at] = (weight * x)[place == at].sum(0) / weight[place == at].sum(0)
        levels = lloyd(x, weight, levels)
        torch.testing.assert_close(levels, right, rtol=1e-9, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6), tail=st.sampled_from([1.0, 2.0]))
def test_vectors_err_less_than_as_many_levels_of_single_weights(scheme: Scheme, seed: int, tail: float) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(seed))
    weight = weight.sign() * weight.abs() ** tail
    single = Scheme(bits=scheme.bits, group=scheme.group, values="codebook")
    found, plain = (quantize_error(weight, quantize(weight, one)).sum() for one in (scheme, single))
    assert found < (0.99 if tail == 1.0 else 0.9) * plain


@pytest.mark.parametrize("distinct", [1, 2, 4])
def test_few_distinct_values_are_kept_as_they_are(distinct: int) -> None:
    values = torch.tensor([0.5, -1.25, 2.0, -0.125])[:distinct]
    weight = values[torch.arange(8 * 64) % distinct].view(8, 64)
    for scheme in SCHEMES[:2]:
        error = quantize_error(weight, quantize(weight, scheme)).sum() / weight.square().sum()
        assert error < 2e-5  # what bf16 rounds of levels and scales


def test_blocks_of_rows_teach_about_what_the_whole_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(512, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    importance = torch.rand(128, generator=torch.Generator().manual_seed(2))
    scheme = SCHEMES[0]
    tables = [learned(scheme, rows, importance) for rows in ([weight], weight.split(70), [weight])]
    assert torch.equal(tables[0], tables[2])

    def error(table: Tensor | None) -> float:
        found = quantize(weight, scheme, importance=importance, table=table)
        return float(quantize_error(weight, found, importance=importance).sum())

    assert error(tables[1]) == pytest.approx(error(tables[0]), rel=0.02)
    # A sample of the vectors is enough, whatever blocks they come in.
    monkeypatch.setattr(vectors_file, "_SAMPLE", 4096)
    assert error(learned(scheme, weight.split(70), importance)) == pytest.approx(error(tables[0]), rel=0.12)


def test_rows_of_zeros_and_of_any_size_are_stored() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(4))
    weight *= 10.0 ** torch.arange(-8, 8)[:, None]
    weight[3], weight[5, :64] = 0.0, 0.0
    for scheme in SCHEMES:
        found = dequantize(quantize(weight, scheme)).float()
        assert found.isfinite().all() and found[3].abs().amax() < 1e-25
        alive = weight.square().sum(1) > 0
        errors = (weight - found).square().sum(1)[alive] / weight.square().sum(1)[alive]
        assert errors.amax() < 0.3
    zeros = quantize(torch.zeros(4, 128), SCHEMES[0])
    assert dequantize(zeros).abs().amax() < 1e-25
    nowhere = quantize(weight, SCHEMES[0], importance=torch.zeros(128))
    assert torch.equal(nowhere.q, quantize(weight, SCHEMES[0]).q)


def test_weights_that_are_no_numbers_are_refused() -> None:
    weight = torch.ones(4, 128)
    weight[2, 7] = torch.nan
    with pytest.raises(ValueError, match="not finite or larger than"):
        learn_vectors([weight], SCHEMES[0], None)


@pytest.mark.parametrize(("wrong", "told"), [
    ({"bits": 2, "vector": 4}, "only a codebook's levels can be vectors, not those of int"),
    ({"bits": 4, "vector": 2, "values": "nf4"}, "not those of nf4"),
    ({"bits": 2, "vector": 3, "values": "codebook"}, "vectors have 1, 2, 4 weights, got 3"),
    ({"bits": 3, "vector": 4, "values": "codebook"}, "4 weights of 3 bits are a code of 12 bits, and 8 is the most"),
])  # fmt: skip
def test_vectors_that_are_none_are_refused(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Scheme(**wrong)


@pytest.mark.parametrize(("bits", "vector"), [(2, 2), (2, 4), (3, 2), (4, 2)])
def test_codes_are_the_digits_of_a_place(bits: int, vector: int) -> None:
    table = torch.zeros(1 << bits * vector, vector).bfloat16()
    every = torch.arange(len(table)).view(-1, 4)
    u = digits(every, bits, vector)
    assert u.shape == (len(every), 4 * vector) and int(u.max()) == (1 << bits) - 1
    right = [sum(int(digit) << bits * at for at, digit in enumerate(one)) for one in u.view(-1, vector)]
    assert right == list(range(len(table)))
    assert torch.equal(places(u, table).long(), every)


def test_a_dry_run_makes_what_is_made() -> None:
    for scheme in SCHEMES:
        real = quantize(torch.randn(40, 128), scheme, importance=torch.rand(128))
        with FakeTensorMode():
            made = quantize(torch.empty(40, 128), scheme, importance=torch.empty(128))
        for mine, one in ((made.q, real.q), (made.scale, real.scale), (made.table, real.table)):
            assert mine is not None and one is not None and (mine.shape, mine.dtype) == (one.shape, one.dtype)


def test_temporaries_stay_within_the_workspace() -> None:
    weight = torch.randn(4096, 1024).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = quantize(weight, SCHEMES[0], importance=torch.ones(1024))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    results = sum(t.nbytes for t in (found.q, found.scale, found.table) if t is not None)
    assert max(alive) - results < 6 * vectors_file.WORKSPACE_NBYTES
