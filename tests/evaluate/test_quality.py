import random

import pytest

from memfit.evaluate.quality import Quality, mean_interval


@pytest.mark.parametrize("clusters", [5, 12, 40])
def test_the_interval_covers_the_mean_as_often_as_it_says(clusters: int) -> None:
    # Window means as they come: positive, a few of them far above the others.
    population = [random.Random(n).lognormvariate(-4, 0.5) for n in range(3000)]
    mean = sum(population) / len(population)
    draw = random.Random(1)
    hits = 0
    for _ in range(2000):
        low, high = mean_interval(draw.choices(population, k=clusters))
        hits += low <= mean <= high
    assert 0.90 <= hits / 2000 <= 0.97


def test_the_interval_is_students() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    assert mean_interval([2.0]) == (2.0, 2.0)


def test_quality_survives_json() -> None:
    quality = Quality(
        kl=0.1,
        kl_interval=(0.05, 0.2),
        perplexity=3.0,
        perplexity_reference=2.9,
        top1=0.9,
        tokens=10,
        windows=2,
    )
    assert Quality.from_json(quality.to_json()) == quality
    assert {"kl", "kl_interval", "perplexity", "perplexity_reference", "top1"} <= quality.to_json().keys()
