"""The search: one option for each item, at the least price, the bytes of every moment within one budget.

A multiple-choice knapsack, solved to the optimum by HiGHS (SciPy). With x_ic copies of item i in option c:

    minimise    Σ price_ic x_ic          subject to   Σ_c x_ic = copies of i
    for each moment r:   base_r + Σ (persistent_ic, if there by then, + held_ric) x_ic + τ_r ≤ budget
                         τ_r ≥ transient_ric   for every option c that some copy of i takes

Items run one after the other, so a moment's transient bytes are the largest, never a sum.
"""

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

_PRICE_SCALE: Final = 1e6
"""HiGHS stops within 1e-6 of the optimum whatever it is told: the largest price is made this big."""
_TIGHTER: Final = 24
"""Times that the budget is taken down, by doubling steps, if rounding what HiGHS returns broke it."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store an item."""

    price: float
    persistent_nbytes: int = 0
    """Bytes alive at every moment."""
    absent: frozenset[str] = frozenset()
    """But those before it is loaded."""
    held: Mapping[str, int] = field(default_factory=dict)
    """Moment to further bytes alive then, as a cache's; they add over items."""
    transient: Mapping[str, int] = field(default_factory=dict)
    """Moment to bytes alive while the item itself runs then; one item at a time."""
    tied: str | None = None
    """Of the two items that have options tied by this name, both take one of these, or neither does."""

    def staying_nbytes(self, moment: str) -> int:
        """Bytes alive at a moment whether the item runs or not."""
        return (0 if moment in self.absent else self.persistent_nbytes) + self.held.get(moment, 0)


@dataclass(frozen=True, kw_only=True)
class Item:
    """Things with the same options: `names` in the order of the model."""

    names: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The optimum."""

    chosen: dict[str, int]
    """Name to the index of its option."""
    price: float
    needed_nbytes: int
    """Bytes of the fullest moment."""
    moment: str
    """That moment."""


def merge(options: Mapping[str, Sequence[Option]]) -> tuple[Item, ...]:
    """Items of all names, equal options as copies of one item: 80 equal layers are no harder than one."""
    names: dict[Any, list[str]] = {}
    for name, choices in options.items():
        key = tuple(
            (
                o.price, o.persistent_nbytes, o.absent, tuple(sorted(o.held.items())),
                tuple(sorted(o.transient.items())), o.tied,
            )
            for o in choices
        )
        names.setdefault(key, []).append(name)
    return tuple(Item(names=tuple(same), options=tuple(options[same[0]])) for same in names.values())


def solve(items: Sequence[Item], *, bases: Mapping[str, int], budget_nbytes: int) -> Solution | None:
    """The cheapest choice whose every moment is within the budget; None if none is (see `smallest_budget`).

    Args:
        items: each copy of each gets one option. Of copies, the first and the last get the better ones.
        bases: moment to the bytes alive then that no item is answerable for.
        budget_nbytes: allowed at every moment.
    """
    problem = _Problem(items, bases)
    allowed = budget_nbytes
    for n in range(_TIGHTER):
        counts = problem.minimise_price(allowed)
        if counts is None:
            break
        if problem.needed(counts)[0] <= budget_nbytes:
            return problem.solution(counts)
        # HiGHS accepts 1e-6 of a variable as whole and of a row as kept; on large numbers that is some bytes.
        allowed = budget_nbytes - (problem.needed(counts)[0] - budget_nbytes) * 2**n
    # What is left may fit so tightly that HiGHS's tolerance hides it.
    counts = problem.minimise_bytes()
    return problem.solution(counts) if problem.needed(counts)[0] <= budget_nbytes else None


def smallest_budget(items: Sequence[Item], *, bases: Mapping[str, int]) -> Solution:
    """The choice of fewest bytes, whatever its price: its `needed_nbytes` is the smallest budget."""
    problem = _Problem(items, bases)
    return problem.solution(problem.minimise_bytes())


def needed_nbytes(
    items: Sequence[Item], chosen: Mapping[str, int], *, bases: Mapping[str, int]
) -> dict[str, int]:
    """Bytes of each moment if every name takes its option of `chosen`, in whole numbers."""
    needed = {}
    for moment, base in bases.items():
        total, largest = base, 0
        for item in items:
            for name in item.names:
                option = item.options[chosen[name]]
                total += option.staying_nbytes(moment)
                largest = max(largest, option.transient.get(moment, 0))
        needed[moment] = total + largest
    return needed


def spread(counts: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Options for copies in the order of the model: those first in `order` go to both ends.

    The first and the last layers of a model suffer most from rounding, which is why llama.cpp's mixes, too,
    give more bits to the first and the last eighth (`use_more_bits`).
    """
    total = sum(counts)
    places = [n // 2 if n % 2 == 0 else total - 1 - n // 2 for n in range(total)]
    result = [0] * total
    options = (option for option in order for _ in range(counts[option]))
    for place, option in zip(places, options, strict=True):
        result[place] = option
    return tuple(result)


class _Problem:
    """The matrices. Variables: x (copies of item i in option c), flags (whether any), τ, the budget."""

    def __init__(self, items: Sequence[Item], bases: Mapping[str, int]) -> None:
        if not bases:
            raise ValueError("there must be at least one moment")
        self.items, self.bases = tuple(items), dict(bases)
        for item in self.items:
            if not item.names or not item.options:
                raise ValueError(f"an item needs names and options: {item}")
            for option in item.options:
                if not math.isfinite(option.price):
                    raise ValueError(f"{item.names[0]}: the price {option.price} is not finite")
                if unknown := (option.held.keys() | option.transient.keys()) - self.bases.keys():
                    raise ValueError(f"{item.names[0]}: no such moments: {', '.join(sorted(unknown))}")
        self.useful = [_undominated(item) for item in self.items]
        self.pairs = [(i, c) for i, useful in enumerate(self.useful) for c in useful]

    def minimise_price(self, budget_nbytes: int) -> list[list[int]] | None:
        """Counts of each item's options, or None if HiGHS finds no way."""
        return self._run(budget_nbytes)

    def minimise_bytes(self) -> list[list[int]]:
        counts = self._run(None)
        assert counts is not None, "some choice always exists where the budget is free"
        return counts

    def needed(self, counts: Sequence[Sequence[int]]) -> tuple[int, str]:
        """Bytes of the fullest moment, and which it is, in whole numbers."""
        fullest = (-1, "")
        for moment, base in self.bases.items():
            total, largest = base, 0
            for item, row in zip(self.items, counts, strict=True):
                for option, count in zip(item.options, row, strict=True):
                    if count:
                        total += count * option.staying_nbytes(moment)
                        largest = max(largest, option.transient.get(moment, 0))
            fullest = max(fullest, (total + largest, moment), key=lambda pair: pair[0])
        return fullest

    def solution(self, counts: Sequence[Sequence[int]]) -> Solution:
        chosen: dict[str, int] = {}
        price = 0.0
        for item, row in zip(self.items, counts, strict=True):
            order = sorted(range(len(item.options)), key=lambda c: (item.options[c].price, c))
            chosen |= dict(zip(item.names, spread(row, order), strict=True))
            price += math.fsum(option.price * n for option, n in zip(item.options, row, strict=True))
        needed, moment = self.needed(counts)
        return Solution(chosen=chosen, price=price, needed_nbytes=needed, moment=moment)

    def _run(self, budget_nbytes: int | None) -> list[list[int]] | None:
        """Minimise the price within the budget, or the budget itself (then a last variable) if None."""
        width = len(self.pairs)
        moments = list(self.bases)
        flags = [k for k, (i, c) in enumerate(self.pairs) if self._flagged(i, c)]
        flag_of = {k: width + n for n, k in enumerate(flags)}
        tau_of = {moment: width + len(flags) + n for n, moment in enumerate(moments)}
        free = width + len(flags) + len(moments)
        rows = _Rows()
        for i, item in enumerate(self.items):  # each copy takes one option
            own = [(k, 1.0) for k, (j, _) in enumerate(self.pairs) if j == i]
            rows.add(own, len(item.names), len(item.names))
        for terms in self._ties():
            rows.add(terms, 0.0, 0.0)
        unit = float(self._unit())
        for moment, base in self.bases.items():  # what is alive at each moment
            terms = [(tau_of[moment], 1.0), (free, -1.0)]
            for k, (i, c) in enumerate(self.pairs):
                option = self.items[i].options[c]
                terms.append((k, option.staying_nbytes(moment) / unit))
            rows.add(terms, -np.inf, -base / unit)
        for k, flag in flag_of.items():  # x > 0 raises the flag
            rows.add([(k, 1.0), (flag, -float(len(self.items[self.pairs[k][0]].names)))], -np.inf, 0.0)
        for terms in self._transients(flag_of, tau_of, unit):
            rows.add(terms, -np.inf, 0.0)
        upper = np.full(free + 1, np.inf)
        upper[:width] = [len(self.items[i].names) for i, _ in self.pairs]
        upper[width : width + len(flags)] = 1
        lower = np.zeros(free + 1)
        cost = np.zeros(free + 1)
        if budget_nbytes is None:
            cost[free] = 1.0
        else:
            lower[free] = upper[free] = budget_nbytes / unit
            prices = np.array([self.items[i].options[c].price for i, c in self.pairs], dtype=float)
            cost[:width] = prices * (_PRICE_SCALE / max(float(np.abs(prices).max(initial=0)), 1e-300))
        whole = np.zeros(free + 1)
        whole[: width + len(flags)] = 1
        if upper[free] < 0:
            return None
        with _silent():
            found = milp(
                cost, integrality=whole, bounds=Bounds(lower, upper), constraints=rows.constraint(free + 1),
                options={"mip_rel_gap": 0.0},
            )  # fmt: skip
        if found.x is None:
            return None
        counts = [[0] * len(item.options) for item in self.items]
        for k, (i, c) in enumerate(self.pairs):
            counts[i][c] = round(float(found.x[k]))
        return counts

    def _flagged(self, i: int, c: int) -> bool:
        """Of copies, x may be any whole number: an option's transients then need a flag of their own."""
        item = self.items[i]
        return len(item.names) > 1 and any(item.options[c].transient.values())

    def _transients(
        self, flag_of: Mapping[int, int], tau_of: Mapping[str, int], unit: float
    ) -> Iterator[list[tuple[int, float]]]:
        """Rows Σ_c transient x − τ ≤ 0: for single things one row, for copies one for each flagged option."""
        single: dict[tuple[int, str], list[tuple[int, float]]] = {}
        for k, (i, c) in enumerate(self.pairs):
            for moment, nbytes in self.items[i].options[c].transient.items():
                if k in flag_of:
                    yield [(flag_of[k], nbytes / unit), (tau_of[moment], -1.0)]
                else:
                    single.setdefault((i, moment), []).append((k, nbytes / unit))
        for (_, moment), terms in single.items():
            yield [*terms, (tau_of[moment], -1.0)]

    def _ties(self) -> Iterator[list[tuple[int, float]]]:
        """Rows Σ x of one item − Σ x of the other, of options tied by one name."""
        tied: dict[str, dict[int, list[int]]] = {}
        for k, (i, c) in enumerate(self.pairs):
            if (name := self.items[i].options[c].tied) is not None:
                tied.setdefault(name, {}).setdefault(i, []).append(k)
        for by_item in tied.values():
            first = next(iter(by_item))
            yield [(k, 1.0 if i == first else -1.0) for i, own in by_item.items() for k in own]

    def _unit(self) -> int:
        """Bytes are counted in this unit, so that numbers near 1e6 meet HiGHS's tolerance of 1e-6."""
        largest = max(
            (
                len(item.names) * (option.persistent_nbytes + max(option.held.values(), default=0))
                for item in self.items
                for option in item.options
            ),
            default=0,
        )
        return max(1, max(largest, *self.bases.values()) // 10**6)


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS prints lines of its own debugging to stdout, whatever it is told; stdout is for data."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


class _Rows:
    """Constraint rows, gathered as triplets."""

    def __init__(self) -> None:
        self.at: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        self.at += [(len(self.low), column, value) for column, value in terms]
        self.low.append(low)
        self.high.append(high)

    def constraint(self, width: int) -> Any:
        rows, columns, values = zip(*self.at, strict=True) if self.at else ((), (), ())
        matrix = coo_matrix((values, (rows, columns)), shape=(len(self.low), width)).tocsr()
        return LinearConstraint(matrix, np.array(self.low), np.array(self.high))


def _undominated(item: Item) -> list[int]:
    """Options that no other one of the item matches or beats in the price and in every byte."""

    def beats(left: Option, right: Option) -> bool:
        return (
            left.tied == right.tied
            and left.price <= right.price
            and left.persistent_nbytes <= right.persistent_nbytes
            and left.absent >= right.absent
            and all(left.held[m] <= right.held.get(m, 0) for m in left.held)
            and all(left.transient[m] <= right.transient.get(m, 0) for m in left.transient)
        )

    kept = []
    for c, option in enumerate(item.options):
        others = ((d, other) for d, other in enumerate(item.options) if d != c and beats(other, option))
        if all(beats(option, other) and c < d for d, other in others):
            kept.append(c)
    return kept
