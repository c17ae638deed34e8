"""What each budget would cost: the price of the best plan over budgets, for a picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from memfit.plan.search import Item, needed_nbytes, smallest_budget, solve


@dataclass(frozen=True, kw_only=True)
class Point:
    """The best plan within one budget."""

    budget_nbytes: int
    needed_nbytes: int
    price: float


def front(
    items: Sequence[Item], *, bases: Mapping[str, int], count: int = 12, also: Iterable[int] = ()
) -> tuple[Point, ...]:
    """The best plans for `count` budgets from the smallest that works to the least price of all; and for those that are
    named, as far as they work."""
    low = smallest_budget(items, bases=bases).needed_nbytes
    dearest = {
        name: min(range(len(item.options)), key=lambda c, item=item: (item.options[c].price, c))  # type: ignore[misc]
        for item in items
        for name in item.names
    }
    high = max(low, *needed_nbytes(items, dearest, bases=bases).values())
    evenly = [low + (high - low) * n // max(1, count - 1) for n in range(count)]
    points = []
    for budget in sorted([*evenly, *(nbytes for nbytes in also if nbytes >= low)]):
        found = solve(items, bases=bases, budget_nbytes=budget)
        assert found is not None, "no budget here is under the smallest that works"
        points.append(Point(budget_nbytes=budget, needed_nbytes=found.needed_nbytes, price=found.price))
    return tuple(points)


def dominated(lines: Mapping[str, Sequence[Point]], name: str) -> str | None:
    """The line that is nowhere above the one of this name, and somewhere below it; None if there is none.

    At a point's bytes another line's price is that of its best point of no more bytes.
    """
    mine = lines[name]
    for other, theirs in lines.items():
        if other == name:
            continue
        pairs = [(point.price, _price_within(theirs, point.needed_nbytes)) for point in mine]
        if all(price is not None and price <= own for own, price in pairs) and any(
            price is not None and price < own for own, price in pairs
        ):
            return other
    return None


def _price_within(points: Sequence[Point], nbytes: int) -> float | None:
    return min((point.price for point in points if point.needed_nbytes <= nbytes), default=None)
