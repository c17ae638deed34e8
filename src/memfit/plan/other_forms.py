"""What else a group may become than integers: what pruning leaves, and factors."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Final

from memfit.packed.forms import LowRank, Shared, Sparse
from memfit.packed.scheme import Scheme

from .groups import Group

SPARSE: Final = (
    Sparse(sparsity=0.2), Sparse(sparsity=0.3), Sparse(sparsity=0.5), Sparse(sparsity=0.7), Sparse(pattern="2:4"),
)  # fmt: skip
"""What pruning may leave."""
RANKS: Final = (0.8, 0.65, 0.5, 0.35)
"""Ranks of factors worth asking about, as shares of the bytes in 16 bits."""
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")
HEADS: Final = (0.75, 0.5)
"""Shares of a head's dimensions that values and output of an attention may keep."""
RESIDUAL_RANKS: Final = (8, 32)
"""Ranks of factors beside integers."""
RESIDUAL_BITS: Final = 4
"""Up to this width what rounding loses is worth factors."""


def sparse_candidates(group: Group, allowed: Iterable[Sparse]) -> tuple[Sparse, ...]:
    """What the group may be pruned to; none if it is blocked."""
    return tuple(form for form in allowed if group.why_not(form) is None)


def rank_candidates(group: Group, ranks: Iterable[int | float]) -> tuple[LowRank, ...]:
    """Factors that the group may become, the largest first; none if it is blocked.

    ranks: whole numbers, or shares of the bytes that the group has in 16 bits. One rank is for all of its tensors.
    """
    wanted = sorted({_rank(group, rank) for rank in ranks}, reverse=True)
    forms = (LowRank(rank=rank) for rank in wanted if rank > 0)
    return tuple(form for form in forms if group.why_not(form) is None)


def residual_candidates(group: Group, schemes: Iterable[Scheme], ranks: Iterable[int]) -> tuple[LowRank, ...]:
    """Factors beside each of the schemes whose rounding is worth them."""
    bases = [s for s in schemes if s.values == "int" and s.activations == 16 and s.bits <= RESIDUAL_BITS]
    forms = (LowRank(rank=rank, base=base) for base in bases for rank in ranks)
    return tuple(form for form in forms if group.why_not(form) is None)


def basis_candidates(group: Group, shares: Iterable[int | float]) -> tuple[Shared, ...]:
    """One right factor for all tensors of a group that read the same input, the largest rank first."""
    if group.kind != "linear" or len(group.members) < 2 or len({shape[-1] for shape in group.shapes}) > 1:
        return ()
    width, rows = group.shapes[0][-1], sum(shape[0] for shape in group.shapes)
    # A rank above what the narrowest of them has would be stored for nothing.
    most = min(*(shape[0] for shape in group.shapes), width)
    ranks = {s if isinstance(s, int) else min(math.floor(s * rows * width / (rows + width)), most) for s in shares}
    forms = (Shared(owner=group.members[0], common="right", rank=r) for r in sorted(ranks, reverse=True) if r > 0)
    return tuple(form for form in forms if group.why_not(form) is None)


def like_candidates(groups: Sequence[Group], shares: Iterable[float]) -> dict[str, tuple[Shared, ...]]:
    """By name of a group of a single layer: the weight of the same layer in the block before, and what it differs by.

    Every other block has the choice, so that no owner is like another itself.
    """
    single = {group.members[0]: group for group in groups if group.kind == "linear" and len(group.members) == 1}
    found = {}
    for name, group in single.items():
        number = _NUMBER.search(name)
        if number is None or int(number[0]) % 2 == 0:
            continue
        owner = f"{name[: number.start()]}{int(number[0]) - 1}{name[number.end() :]}"
        if owner not in single or single[owner].shapes != group.shapes:
            continue
        ranks = [math.floor(s * group.weights / sum(group.shapes[0])) for s in shares if isinstance(s, float)]
        forms = [Shared(owner=owner, common="weight", rank=rank) for rank in (*ranks, 0)]
        found[group.name] = tuple(form for form in forms if group.why_not(form) is None)
    return found


def _rank(group: Group, rank: int | float) -> int:
    if isinstance(rank, int):
        return rank
    if any(len(shape) != 2 for shape in group.shapes):
        return 0
    return math.floor(rank * group.weights / sum(rows + inputs for rows, inputs in group.shapes))
