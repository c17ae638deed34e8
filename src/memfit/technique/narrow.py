"""Structured pruning: a model with fewer blocks, heads, channels or experts, that any program loads as its own kind.

What goes is what is missed least. Of channel k of an MLP, which the layer that reads it multiplies by w_k, to second
order in the loss: ½ H_k Σ_o G_o w_ok², with H = E[x²] of its inputs and G = E[g²] of the gradients at its outputs; of
a head, summed over its channels; of an expert, over those of its down projection, H over the tokens that it saw and G
over all, so that what is seldom asked costs little (OBD, LeCun et al. 1990, on groups; with the Fisher information as
in Molchanov et al. 2019). Of a block: the divergence of the model without it, measured.

The layer that reads then makes up for what is gone: W′ for the inputs x̂ that stay is to give what W gave for all of x.

    W′ = W_K + E[(W x − W_K x̂) x̂ᵀ] (E[x̂ x̂ᵀ] + λ)⁻¹,      W_K the columns that stay

Legend of shapes: N outputs, K inputs, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from torch import Tensor
from transformers import PretrainedConfig

from memfit.errors import UsageError
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.source.cuts import Counts, counts_of, narrower_config
from memfit.source.narrowed import Kept
from memfit.units import share_of

_EVEN: Final = (128, 64, 32, 16)
"""A share of the channels is brought to a multiple of the first of these, as groups and kernels ask for, of which the
whole has `_STEPS` or more: a share is then met within 3 %."""
_STEPS: Final = 16
_CANDIDATES: Final = 4
"""Blocks of least influence that are measured before one of them is dropped."""
_SIZES: Final = ("blocks", "heads", "channels", "experts")

Size = int | str | None
"""How many stay: a number, a share as `70%`, or None for all."""


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """The technique: how much of a model stays."""

    blocks: Size = None
    heads: Size = None
    """Query heads in a block. They go with their heads of keys and values, where whole groups can go; else as many in
    each group."""
    channels: Size = None
    """Channels of a block's MLP (the intermediate size)."""
    experts: Size = None
    """Experts in a block."""
    dropped: tuple[int, ...] = ()
    """In place of `blocks`: the numbers of the blocks that go."""
    correct: bool = True
    """Whether the layers that read what is gone make up for it."""

    def __post_init__(self) -> None:
        for what, size in self.sizes.items():
            if _share_of(size) is None and (not isinstance(size, int) or size < 1):
                raise UsageError(f"{what} that stay are a number from 1 or a share as 70%, got {size!r}.")
        if self.dropped and self.blocks is not None:
            raise UsageError("say how many blocks stay or which are dropped, not both.")
        if not self.changes:
            raise UsageError("nothing is to be dropped: give --blocks, --heads, --channels or --experts that stay.")

    @property
    def sizes(self) -> dict[str, int | str]:
        """How much is to stay, of what it was said of."""
        return {what: size for what in _SIZES if (size := getattr(self, what)) is not None}

    @property
    def changes(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.dropped) or bool(self.sizes)

    def counts(self, config: PretrainedConfig) -> Counts:
        """How many stay of a model of this config; shares are brought to the nearest number that works.

        Raises:
            UsageError: more is asked for than there is, a number that the groups or transformers do not take, or of
                something that the model has not.
        """
        whole = counts_of(config)
        blocks = whole.blocks - len(self.dropped)
        if self.dropped and not (set(self.dropped) <= set(range(whole.blocks)) and blocks > 0):
            raise UsageError(f"blocks {', '.join(map(str, self.dropped))} are to go, of {whole.blocks} from 0 on.")
        if self.blocks is not None:
            blocks = _chosen("blocks", self.blocks, range(1, whole.blocks + 1), whole.blocks)
        heads, kv_heads = whole.heads, whole.kv_heads
        if self.heads is not None:
            heads = _chosen("heads", self.heads, _heads_that_work(config, whole), whole.heads)
            kv_heads = kv_heads_with(heads, whole)
        channels, experts = whole.channels, whole.experts
        if self.channels is not None:
            sizes: Sequence[int] = range(1, (channels or 0) + 1)
            if _share_of(self.channels) is not None:
                sizes = _even(channels or 0)
            channels = _chosen("channels", self.channels, sizes, channels)
        if self.experts is not None:
            least = int(getattr(config.get_text_config(), "num_experts_per_tok", 1) or 1)
            experts = _chosen("experts", self.experts, range(least, (experts or 0) + 1), experts)
        return Counts(blocks=blocks, heads=heads, kv_heads=kv_heads, channels=channels, experts=experts)

    def to_json(self) -> dict[str, Any]:
        """As an object."""
        return asdict(self) | {"dropped": list(self.dropped)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Narrow":
        """The settings that `to_json` gave.

        Raises:
            UsageError: they are none.
        """
        known = {field.name for field in fields(cls)}
        if not set(data) <= known or not isinstance(data.get("dropped", []), list):
            raise UsageError(f"what stays is told by {', '.join(sorted(known))}, got {', '.join(map(str, data))}.")
        return cls(**data | {"dropped": tuple(data.get("dropped", ()))})

    def found(self, kept: Kept, config: PretrainedConfig) -> "Narrow":
        """The same as it was carried out on a model of this config: numbers for shares, and the blocks that went."""
        whole, counts = counts_of(config), self.counts(config)
        gone = () if kept.blocks is None else tuple(n for n in range(whole.blocks) if n not in kept.blocks)
        sizes = {what: getattr(counts, what) for what in self.sizes}
        return replace(self, **sizes | {"blocks": None if gone else sizes.get("blocks"), "dropped": gone})


def kv_heads_with(heads: int, whole: Counts) -> int:
    """Heads of keys and values that stay with so many query heads: fewer groups, or all of them, each smaller."""
    assert whole.heads is not None and whole.kv_heads is not None
    each = whole.heads // whole.kv_heads
    return heads // each if heads % each == 0 else whole.kv_heads


def channel_scores(weight: Tensor, inputs: Tensor, gradients: Tensor | None) -> Tensor:
    """½ H_k Σ_o G_o w_ok² of each input k, [K], in the dtype of `inputs`: the loss without it, to second order.

    Args:
        weight: [N, K], of the layer that reads.
        inputs: H [K].
        gradients: G [N]; None: 1, the error of the output itself.
    """
    squares = weight.to(inputs.dtype).square()
    summed = squares.sum(0) if gradients is None else gradients.to(inputs.dtype) @ squares
    return summed.mul_(inputs).div_(2)


def head_scores(channels: Tensor, heads: int) -> Tensor:
    """Of each head [heads], from those of its channels [heads · d]."""
    return channels.view(heads, -1).sum(1)


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    """The numbers of the `count` highest, rising; of equal ones the first. Of fakes, the first of all."""
    if is_fake(scores):
        return tuple(range(count))
    order = scores.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))


def choose_heads(scores: Tensor, counts: Counts, whole: Counts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The query heads and the heads of keys and values that stay of a block with these scores [heads]."""
    assert whole.heads is not None and whole.kv_heads is not None
    assert counts.heads is not None and counts.kv_heads is not None
    each = whole.heads // whole.kv_heads
    if counts.kv_heads < whole.kv_heads:
        groups = best(scores.view(-1, each).sum(1), counts.kv_heads)
        return tuple(group * each + n for group in groups for n in range(each)), groups
    stay = counts.heads // whole.kv_heads
    groups = tuple(range(whole.kv_heads))
    mine = [best(scores.view(-1, each)[group], stay) for group in groups]
    return tuple(group * each + n for group, numbers in zip(groups, mine, strict=True) for n in numbers), groups


def choose_blocks(
    influences: Sequence[float], drop: int, loss_of: Callable[[tuple[int, ...]], float], *,
    candidates: int = _CANDIDATES,
) -> tuple[int, ...]:
    """The blocks that stay: one after the other goes, of those of least influence the one that is missed least.

    Args:
        influences: of each block, how much it changes what comes in.
        drop: how many go.
        loss_of: the loss of the model in which these blocks stay.
    """
    left = tuple(range(len(influences)))
    for _ in blocks_to_run(range(drop)):
        tried = sorted(left, key=lambda number: influences[number])[:candidates]
        losses = {number: loss_of(tuple(other for other in left if other != number)) for number in blocks_to_run(tried)}
        gone = min(losses, key=lambda number: losses[number])
        left = tuple(other for other in left if other != gone)
    return left[: len(influences) - drop]  # a dry run takes fewer turns


def _share_of(size: Size) -> float | None:
    """The share that a text as `70%` means; None if it means none above 0 and up to 1."""
    share = share_of(size)
    return share if share is not None and 0 < share <= 1 else None


def _chosen(what: str, size: int | str, works: Sequence[int], whole: int | None) -> int:
    """The number that is asked for, or the one nearest to a share of the `whole`."""
    if whole is None:
        raise UsageError(f"--{what} {size}: the model's config counts no {what}. Leave --{what} out.")
    share = _share_of(size)
    if share is not None:
        return min(works, key=lambda count: (abs(count - share * whole), -count))
    if size not in works:
        shown = f"{works[0]} to {works[-1]}" if isinstance(works, range) else ", ".join(map(str, works))
        raise UsageError(f"--{what} {size}: of {whole} {what}, {shown} can stay.")
    return int(size)


def _heads_that_work(config: PretrainedConfig, whole: Counts) -> Sequence[int]:
    """Numbers of query heads whose groups and whose config work."""
    if whole.heads is None or whole.kv_heads is None:
        return (0,)
    each, found = whole.heads // whole.kv_heads, []
    for heads in range(1, whole.heads + 1):
        if heads % each and heads % whole.kv_heads:
            continue
        counts = Counts(**asdict(whole) | {"heads": heads, "kv_heads": kv_heads_with(heads, whole)})
        try:
            narrower_config(config, counts, tuple(range(whole.blocks)))
        except UsageError:
            continue
        found.append(heads)
    return tuple(found)


def _even(channels: int) -> Sequence[int]:
    """Numbers of channels that a share may come to."""
    for step in _EVEN:
        if channels % step == 0 and channels // step >= _STEPS:
            return range(step, channels + 1, step)
    return range(1, channels + 1)
