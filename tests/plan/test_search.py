"""The search finds the optimum, within the budget, and more budget never gives a worse plan."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.plan.front import Point, dominated, front
from memfit.plan.search import Item, Option, Solution, merge, needed_nbytes, smallest_budget, solve, spread

MOMENTS = ("load", "prefill")

nbytes = st.integers(0, 10**6) | st.integers(0, 10)
moments = st.dictionaries(st.sampled_from(MOMENTS), nbytes, max_size=2)
options = st.builds(
    Option,
    price=st.integers(0, 10**6).map(lambda n: n / 997),
    persistent_nbytes=nbytes,
    absent=st.frozensets(st.sampled_from(MOMENTS)),
    held=moments,
    transient=moments,
)
several_options = st.lists(options, min_size=1, max_size=3)
problems = st.lists(st.tuples(st.integers(1, 3), several_options), min_size=1, max_size=3)
bases = st.fixed_dictionaries({moment: nbytes for moment in MOMENTS})


def items_of(problem: list[tuple[int, list[Option]]]) -> tuple[Item, ...]:
    return tuple(
        Item(names=tuple(f"{i}.{n}" for n in range(copies)), options=tuple(choices))
        for i, (copies, choices) in enumerate(problem)
    )


def every_choice(items: tuple[Item, ...], base: dict[str, int]) -> list[tuple[float, int]]:
    """(price, bytes of the fullest moment) of every choice there is."""
    names = [(name, item) for item in items for name in item.names]
    found = []
    for picked in itertools.product(*(range(len(item.options)) for _, item in names)):
        chosen = {name: c for (name, _), c in zip(names, picked, strict=True)}
        price = sum(item.options[chosen[name]].price for name, item in names)
        found.append((price, max(needed_nbytes(items, chosen, bases=base).values())))
    return found


def price_of(items: tuple[Item, ...], solution: Solution) -> float:
    return sum(item.options[solution.chosen[name]].price for item in items for name in item.names)


@settings(max_examples=60, deadline=None)
@given(problem=problems, base=bases, share=st.floats(0, 1.1))
def test_the_optimum_is_found(
    problem: list[tuple[int, list[Option]]], base: dict[str, int], share: float
) -> None:
    items = items_of(problem)
    everything = every_choice(items, base)
    least, most = min(n for _, n in everything), max(n for _, n in everything)
    budget = int(least + (most - least) * share)
    best = min(price for price, needed in everything if needed <= budget)
    found = solve(items, bases=base, budget_nbytes=budget)
    assert found is not None
    assert found.needed_nbytes <= budget
    assert found.needed_nbytes == max(needed_nbytes(items, found.chosen, bases=base).values())
    assert found.price == pytest.approx(price_of(items, found), rel=1e-12)
    assert found.price <= best * (1 + 1e-6) + 1e-9
    assert smallest_budget(items, bases=base).needed_nbytes == least
    assert solve(items, bases=base, budget_nbytes=least - 1) is None


@settings(max_examples=30, deadline=None)
@given(problem=problems, base=bases, shares=st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_more_budget_never_gives_a_worse_plan(
    problem: list[tuple[int, list[Option]]], base: dict[str, int], shares: list[float]
) -> None:
    items = items_of(problem)
    most = 10**7
    found = [solve(items, bases=base, budget_nbytes=int(most * share**3)) for share in sorted(shares)]
    prices = [float("inf") if solution is None else solution.price for solution in found]
    for less, more in itertools.pairwise(prices):
        assert more <= less * (1 + 1e-9) + 1e-9


def stack(layers: int) -> dict[str, tuple[Option, ...]]:
    """A decoder of 70 B parameters' shapes, every layer alike."""
    sizes = {"attention": 150_994_944, "gate_up": 469_762_048, "down": 234_881_024}
    found = {
        f"layers.{n}.{part}": tuple(
            Option(
                price=size * 4.0**-bits if bits < 16 else 0.0,
                persistent_nbytes=size * bits // 8 + size // 64,
                transient={"prefill": size // 8} if bits in (6, 5, 3, 2) else {},
            )
            for bits in (16, 8, 6, 5, 4, 3, 2)
        )
        for n in range(layers)
        for part, size in sizes.items()
    }
    whole, half = (Option(price=p, held={"prefill": n}) for p, n in ((0, 10**10), (1e6, 5 * 10**9)))
    return found | {"cache": (whole, half)}


def test_equal_layers_are_merged_and_the_ends_get_the_better_choices() -> None:
    items = merge(stack(80))
    assert sorted(len(item.names) for item in items) == [1, 80, 80, 80]
    found = solve(items, bases={"load": 0, "prefill": 10**8}, budget_nbytes=40 * 10**9)
    assert found is not None and found.needed_nbytes > 39.9 * 10**9
    for item in items:
        prices = [item.options[found.chosen[name]].price for name in item.names]
        middle = len(prices) // 2
        assert prices[:middle] == sorted(prices[:middle]) and prices[middle:] == sorted(prices[middle:])[::-1]


def test_the_same_problem_gives_the_same_plan() -> None:
    items = merge(stack(12))
    first, second = (solve(items, bases={"prefill": 0}, budget_nbytes=8 * 10**9) for _ in range(2))
    assert first == second and first is not None


def test_transients_are_the_largest_and_never_a_sum() -> None:
    option = Option(price=1, persistent_nbytes=10, transient={"run": 100})
    items = (Item(names=("a", "b", "c"), options=(option,)), Item(names=("d",), options=(option,)))
    found = solve(items, bases={"run": 5}, budget_nbytes=145)
    assert found is not None and found.needed_nbytes == 145 and found.moment == "run"
    assert solve(items, bases={"run": 5}, budget_nbytes=144) is None


def test_every_moment_must_be_within_the_budget() -> None:
    fast = Option(price=0, held={"load": 1000})
    slow = Option(price=1, held={"prefill": 900})
    items = (Item(names=("a",), options=(fast, slow)),)
    for budget, expected in ((1000, 0), (999, 1), (899, None)):
        found = solve(items, bases={"load": 0, "prefill": 0}, budget_nbytes=budget)
        assert (None if found is None else found.chosen["a"]) == expected


def test_large_numbers_are_kept_to_the_byte() -> None:
    items = tuple(
        Item(names=(f"{n}",), options=(Option(price=0, persistent_nbytes=10**10 + n), Option(price=1 + n)))
        for n in range(12)
    )
    exact = sum(10**10 + n for n in range(12))
    whole = solve(items, bases={"run": 3}, budget_nbytes=exact + 3)
    short = solve(items, bases={"run": 3}, budget_nbytes=exact + 2)
    assert whole is not None and whole.price == 0 and whole.needed_nbytes == exact + 3
    assert short is not None and short.price == 1 and short.needed_nbytes <= exact + 2


def test_spread_gives_what_comes_first_in_order_to_both_ends() -> None:
    assert spread([2, 3], [1, 0]) == (1, 1, 0, 0, 1)
    assert spread([0, 1], [0, 1]) == (1,)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        solve([Item(names=("a",), options=(Option(price=float("nan")),))], bases={"run": 0}, budget_nbytes=1)
    with pytest.raises(ValueError, match="no such moments: walk"):
        walking = Option(price=0, held={"walk": 1})
        solve([Item(names=("a",), options=(walking,))], bases={"run": 0}, budget_nbytes=1)


def test_the_front_falls_from_the_smallest_budget_to_the_largest() -> None:
    points = front(merge(stack(4)), bases={"prefill": 0}, count=5)
    assert len(points) == 5
    for less, more in itertools.pairwise(points):
        assert less.budget_nbytes < more.budget_nbytes and less.price >= more.price
    assert points[-1].price == 0


def test_a_line_is_dominated_by_one_that_is_nowhere_above_it_and_somewhere_below() -> None:
    def line(*prices: float) -> list[Point]:
        return [Point(budget_nbytes=n, needed_nbytes=n, price=price) for n, price in enumerate(prices, 1)]

    lines = {"a": line(3, 2, 1), "b": line(3, 1, 1), "c": line(4, 0.5, 1), "d": line(3, 1, 1)}
    assert dominated(lines, "a") == "b"  # as does d
    assert dominated(lines, "b") is None, "an equal line does not dominate"
    assert dominated(lines, "c") is None
    late = [Point(budget_nbytes=3, needed_nbytes=3, price=0.0)]
    assert dominated({"a": line(3, 2, 1), "late": late}, "a") is None, "it has nothing for the smaller budgets"
