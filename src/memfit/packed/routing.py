"""Which tokens go to which expert: by the data on real tensors, by an assumption on fake ones.

T tokens, k experts for each token, E experts.
"""

import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from memfit.packed.fake import is_fake

Routing = Literal["balanced", "worst"]

ROUTING: ContextVar[Routing] = ContextVar("memfit_routing", default="balanced")
"""What a dry run assumes: `balanced` shares tokens out evenly, `worst` sends all to the first k experts."""


def assumed_counts(tokens: int, chosen: int, experts: int, routing: Routing) -> list[int]:
    """Tokens of each expert under `routing`; they sum to `tokens · chosen`."""
    if routing == "worst":
        return [tokens] * chosen + [0] * (experts - chosen)
    share, left = math.ceil(tokens * chosen / experts), tokens * chosen
    counts = []
    for _ in range(experts):
        counts.append(min(share, left))
        left -= counts[-1]
    return counts


def tokens_by_expert(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert hit, with its places [n] in the flattened `top_k_index` [T, k]: place // k is its token.

    On fake tensors the counts are those that `ROUTING` assumes. Choices outside 0..E−1 are left out.
    """
    tokens, chosen = top_k_index.shape
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    if is_fake(flat):
        counts, skipped = assumed_counts(tokens, chosen, experts, ROUTING.get()), 0
    else:
        values = flat.tolist()
        skipped = sum(value < 0 for value in values)
        counts = [0] * experts
        for value in values:
            if 0 <= value < experts:
                counts[value] += 1
    start = skipped
    for expert, count in enumerate(counts):
        if count:
            yield expert, order[start : start + count]
        start += count
