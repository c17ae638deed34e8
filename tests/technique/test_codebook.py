"""A codebook's levels are means of what is nearest to them, near to the best there are, and learned in any blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memfit.packed.scheme import Scheme
from memfit.technique.codebook import best_levels, bin_of, learn, lloyd
from memfit.technique.quantize import learned, quantize, quantize_error

SCHEME = Scheme(bits=2, group=None, values="codebook")


def plain_lloyd(values: Tensor, weights: Tensor, start: Tensor, rounds: int) -> Tensor:
    """The plain way, float64: each value to the nearest level, each level to the mean of its own."""
    levels = start.clone()
    for _ in range(rounds):
        mine = (values[:, None] - levels).abs().argmin(1)
        for i in range(len(levels)):
            own = mine == i
            if bool((weights[own] > 0).any()):
                levels[i] = (weights[own] * values[own]).sum() / weights[own].sum()
    return levels


def distortion(values: Tensor, weights: Tensor, levels: Tensor) -> float:
    return float((weights * (values[:, None] - levels).abs().amin(1).square()).sum())


def least_distortion(values: Tensor, weights: Tensor, count: int) -> float:
    """Of all codebooks, by dynamic programming over the sorted values (Wu 1991); float64."""
    n = len(values)
    w, m, s = (
        torch.cat([torch.zeros(1, dtype=torch.float64), sums.cumsum(0)])
        for sums in (weights, weights * values, weights * values.square())
    )
    inside = w[None, :] - w[:, None]
    cost = (s[None, :] - s[:, None]) - (m[None, :] - m[:, None]).square() / inside.clamp(min=1e-300)
    cost = cost.clamp(min=0).masked_fill(torch.ones(n + 1, n + 1).tril().bool(), torch.inf)  # [i, j): i to j − 1
    best = cost[0]
    for _ in range(count - 1):
        best = torch.minimum(best, (best[:, None] + cost).amin(0))
    return float(best[-1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([1, 2, 3]), rounds=st.integers(1, 30))
def test_lloyd_is_the_plain_one_in_float64(seed: int, bits: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(200, generator=generator, dtype=torch.float64).sort().values
    weights = torch.rand(200, generator=generator, dtype=torch.float64)
    start = values[torch.randperm(200, generator=generator)[: 2**bits]].sort().values
    found = lloyd(weights, weights * values, start, values, rounds=rounds)
    torch.testing.assert_close(found, plain_lloyd(values, weights, start, rounds), rtol=1e-9, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4]), tail=st.sampled_from([1.0, 3.0]))
def test_levels_are_near_to_the_best_there_are(seed: int, bits: int, tail: float) -> None:
    """Of one row, the scale set apart: what is left is k-means of 512 numbers."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(512, generator=generator)
    row = (row.sign() * row.abs() ** tail).bfloat16()
    importance = torch.rand(512, generator=generator)
    levels = learn([row[None]], Scheme(bits=bits, group=None, values="codebook"), importance).double()
    a = importance.double() / importance.max()
    root = ((a * row.double().square()).sum() / a.sum()).sqrt()
    values, order = (row.double() / root).sort()
    best = least_distortion(values, a[order], 2**bits)
    assert distortion(values, a[order], levels) < 1.03 * best


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), cells=st.integers(2, 12))
def test_the_start_is_the_best_of_whole_cells(seed: int, count: int, cells: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(cells, generator=generator, dtype=torch.float64)
    values = torch.randn(cells, generator=generator, dtype=torch.float64).sort().values
    levels = best_levels(mass, mass * values, count)
    assert bool((levels.diff() >= 0).all())
    best = least_distortion(values, mass, min(count, cells))
    assert distortion(values, mass, levels) <= best * (1 + 1e-9) + 1e-12


def test_bins_are_in_order_and_exact_for_bf16() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = torch.cat([values, -values, torch.zeros(1).bfloat16()]).sort().values
    bins = bin_of(values.float())
    assert bool((bins.diff() >= 0).all())
    assert len(bins.unique()) == len(values.unique())


def test_blocks_of_rows_teach_what_the_whole_teaches() -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    importance = torch.rand(128, generator=torch.Generator().manual_seed(2))
    whole = learned(SCHEME, [weight], importance)
    assert whole is not None and whole.shape == (4,) and bool((whole.diff() > 0).all())
    torch.testing.assert_close(learned(SCHEME, weight.split(7), importance), whole, rtol=2**-7, atol=0)
    assert learned(Scheme(bits=4), [weight], importance) is None


def test_a_codebook_errs_less_than_integers_of_a_row_with_the_same_bits() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    for bits, most in ((2, 0.95), (3, 0.92), (4, 0.85)):
        found, plain = (
            quantize_error(weight, quantize(weight, Scheme(bits=bits, group=None, values=values))).sum()
            for values in ("codebook", "int")
        )
        assert found < most * plain


@pytest.mark.parametrize("distinct", [1, 2, 4])
def test_few_distinct_values_are_kept_as_they_are(distinct: int) -> None:
    values = torch.tensor([0.5, -1.25, 2.0, -0.125])[:distinct]
    weight = values[torch.arange(8 * 64) % distinct].view(8, 64)
    error = quantize_error(weight, quantize(weight, SCHEME)).sum() / weight.square().sum()
    assert error < 2e-5  # what bf16 rounds of levels and scales


def test_rows_of_other_sizes_share_the_levels() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    sizes = 10.0 ** torch.arange(-8, 8)[:, None]
    error = quantize_error(weight * sizes, quantize(weight * sizes, SCHEME)) / (weight * sizes).square().sum(1)
    assert float(error.max()) < 0.2
