"""What a KV cache in fewer bits costs: the same text read through it, beside the text read through one in 16.

A text is read in pieces, each through the cache that the ones before have filled: a piece itself is seen as it is, as
the recent tokens are when a model writes. In 16 bits it is read alike, so that only the cache makes a difference.

Legend: W windows, T time, N positions, a and b logits [N, R] of some rows of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memfit.packed.cache import cache_argument, make_cache, pieces, skip
from memfit.packed.fake import is_fake
from memfit.packed.kv_states import least_window
from memfit.source.source import Source
from memfit.task.infer import takes_cache

from .collect import LOGITS_NBYTES, arguments_of, heads_of, hidden_of
from .stream import Streamed


def cache_losses(
    source: Source, windows_WT: Tensor, bits: Sequence[int], *, dtype: torch.dtype = torch.bfloat16
) -> dict[int, float]:
    """KL divergence in nats a token of the model with a KV cache in `bits` bits from itself with one in 16, by bits.

    The model is read block by block, once a piece for each of `bits` and for 16; the vocabulary passes by once. Empty
    where nothing can be said: the model has no cache or no head, or windows are too short for anything to be packed.

    Args:
        windows_WT: token ids; few are enough, since every position is compared before which something is packed.
    """
    streamed = Streamed(source, dtype=dtype)
    parts = pieces(windows_WT.shape[1])
    packed = [part for part in parts if part.start >= least_window()]
    if not bits or not packed or streamed.head is None or not takes_cache(streamed.model):
        return {}
    with torch.no_grad():
        states = {kind: _read(streamed, windows_WT, kind, parts, packed[0].start) for kind in (16, *bits)}
        return divergences(streamed, states)


def without_floor(losses: dict[int, float]) -> dict[int, float]:
    """Losses by bits without what any change at all costs.

    A model in bf16 that is changed in the least loses about 2e-4 nats by the rounding that then falls otherwise, once,
    however much else is changed. What rounding to b bits adds goes with 4^-b: the two widest tell both apart.
    """
    if len(losses) < 2:
        return losses
    second, first = sorted(losses)[-2:]
    ratio = 4.0 ** (first - second)
    floor = max(0.0, (ratio * losses[first] - losses[second]) / (ratio - 1))
    return {bits: max(0.0, loss - floor) for bits, loss in losses.items()}


def _read(streamed: Streamed, windows_WT: Tensor, bits: int, parts: list[slice], start: int) -> Tensor:
    """Hidden states [N, D] from token `start` on, read in `parts` through a cache in `bits` bits."""
    cache = make_cache(streamed.model.config, kv_bits=bits)
    options = arguments_of(streamed.model, windows_WT) | {"use_cache": True}
    options[str(cache_argument(streamed.model))] = cache
    batch, length = windows_WT.shape
    read, states_WTD = 0, None
    if is_fake(windows_WT):
        # The cache grows from part to part, so the last takes the most; the one before may be longer.
        parts = [parts[0], *parts[max(1, len(parts) - 2) :]]
    for part in parts:
        if part.start > read:
            skip(cache, part.start - read)
        read = part.stop
        hidden = hidden_of(streamed.model(windows_WT[:, part], **options))[0]
        if part.start >= start:
            if states_WTD is None:
                states_WTD = hidden.new_empty(batch, length - start, hidden.shape[-1], dtype=streamed.dtype)
            states_WTD[:, part.start - start : part.stop - start].copy_(hidden)
        del hidden
    assert states_WTD is not None
    return states_WTD.flatten(0, 1)


def divergences(streamed: Streamed, states: dict[int, Tensor]) -> dict[int, float]:
    """KL(16 ‖ b) of hidden states [N, D] before the head, for every other key b: Σ_v p_v (a_v − b_v) − log Σ eᵃ +
    log Σ eᵇ, the sums kept as rows pass by."""
    count = states[16].shape[0]
    total_N = {kind: torch.full((count,), -torch.inf) for kind in states}
    apart_N = {kind: torch.zeros(count) for kind in states if kind != 16}
    for head in heads_of(streamed):
        for at, a in head.logits(states[16], nbytes=LOGITS_NBYTES // 8):
            part = slice(at, at + a.shape[0])
            before = total_N[16][part].clone()
            total_N[16][part] = torch.logaddexp(before, a.logsumexp(1))
            # All seen so far counts less as the total grows.
            fade = (before - total_N[16][part]).exp_()
            share = (a - total_N[16][part].unsqueeze(1)).exp_()
            for kind, apart in apart_N.items():
                b = head.logits_at(states[kind][part])
                total_N[kind][part] = torch.logaddexp(total_N[kind][part], b.logsumexp(1))
                apart[part] = apart[part] * fade + (share * (a - b)).sum(1)
    found = {kind: (apart - total_N[16] + total_N[kind]).double().mean() for kind, apart in apart_N.items()}
    return {kind: 0.0 if is_fake(loss) else max(0.0, float(loss)) for kind, loss in found.items()}
