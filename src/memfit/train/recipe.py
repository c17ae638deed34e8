"""How a step is trained: every lever's setting, as one value that a plan holds and a step obeys."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from memfit.packed.stash import STORES, Store
from memfit.technique.adapters import Adapters
from memfit.technique.precision import Precision as PrecisionOf

Precision = Literal["fp32", "autocast", "master", "stochastic", "kahan", "bf16", "fp16"]
Gradients = Literal["weights", "fp32", "int8"]
Place = Literal["memory", "host", "disk"]
OPTIMIZERS = ("adamw", "sgd", "adafactor", "galore", "apollo", "muon")
STATE_BITS = (32, 16, 8, 4)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train a batch within memory. What it computes is the same for all settings marked *exact*."""

    precision: Precision = "fp32"
    """Of weights and of what is computed:
    `fp32`; `autocast`: fp32 weights, bf16 products; `master`: bf16 weights that have an exact fp32 master in two
    more bytes; `stochastic`: bf16 weights, rounded at random so that small updates arrive; `kahan`: bf16 weights
    with a bf16 remainder; `bf16`: rounded to the nearest, where small updates are lost; `fp16`: fp16 weights, an
    fp32 master and dynamic loss scaling."""
    optimizer: str = "adamw"
    state_bits: int = 32
    """Bits of each optimizer state: 32, 16, 8, 4."""
    micro_batch: int | None = None
    """Rows of the batch that go through the model at once (exact); None: all."""
    recompute: tuple[str, ...] = ()
    """Blocks that keep their inputs alone and run again in the backward pass (exact)."""
    slices: int = 1
    """Parts of the micro-batch that a recomputed block is run in (exact)."""
    store: Store = "memory"
    """Where the inputs of recomputed blocks wait: `memory`, `host` and `disk` are exact, `int8` is not."""
    chunk_nbytes: int | None = 32 << 20
    """Logits that exist at once (exact); None: all of a micro-batch's."""
    rows: bool = False
    """Make the gradients of embeddings and head some rows at a time, when they are updated (exact)."""
    in_backward: bool = False
    """Update each block as soon as its gradient is whole, and free it (exact)."""
    gradients: Gradients = "weights"
    """What gradients add up in: the weights' dtype, `fp32`, or `int8` with error feedback."""
    states: Place = "memory"
    """Where optimizer states wait between updates (exact)."""
    weights: Place = "memory"
    """Where the weights of recomputed blocks wait while no block of theirs runs (exact)."""
    adapters: Adapters | None = None
    """Train low-rank adapters alone, the model frozen, perhaps packed; None: train the whole model."""

    def __post_init__(self) -> None:
        for name, known in (
            ("precision", get_args(Precision)), ("optimizer", OPTIMIZERS), ("state_bits", STATE_BITS),
            ("store", STORES), ("gradients", get_args(Gradients)), ("states", get_args(Place)),
            ("weights", get_args(Place)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        for name in ("micro_batch", "slices", "chunk_nbytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.state_bits != 32 and self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"{self.optimizer} has states of 32 bits alone, got state_bits={self.state_bits}")
        if self.rows and (self.chunk_nbytes is None or self.optimizer not in ("adamw", "sgd")):
            raise ValueError("rows needs the loss in chunks, and an optimizer that moves each weight by itself")
        if self.weights != "memory":
            if not self.recompute:
                raise ValueError(f"weights wait on the {self.weights} for blocks that are recomputed, and none is")
            if self.adapters is not None and self.adapters.kind != "lora":
                raise ValueError(f"{self.adapters.kind} reads the weights when it is made; they cannot be away")

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are loaded in."""
        return PrecisionOf(kind=self.precision).dtype

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"recompute": list(self.recompute)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Recipe":
        adapters = data.get("adapters")
        if adapters is not None:
            targets = adapters["targets"]
            adapters = Adapters(**(adapters | {"targets": None if targets is None else tuple(targets)}))
        return cls(**(data | {"recompute": tuple(data["recompute"]), "adapters": adapters}))


def describe(recipe: Recipe, blocks: int) -> str:
    """A recipe in words."""
    parts = [
        {
            "fp32": "fp32 weights", "autocast": "fp32 weights and bf16 products",
            "master": "bf16 weights with an fp32 master", "stochastic": "bf16 weights rounded stochastically",
            "kahan": "bf16 weights with a remainder", "bf16": "bf16 weights", "fp16": "fp16 weights, an fp32 master",
        }[recipe.precision],
        f"{recipe.optimizer} with states of {recipe.state_bits} bits",
    ]  # fmt: skip
    if recipe.adapters is not None:
        base = f" over {recipe.adapters.base_bits}-bit weights" if recipe.adapters.base_bits < 16 else ""
        parts.append(f"{recipe.adapters.kind} adapters of rank {recipe.adapters.rank}{base}")
    if recipe.micro_batch is not None:
        parts.append(f"micro-batches of {recipe.micro_batch}")
    if recipe.recompute:
        parts.append(f"{len(recipe.recompute)} of {blocks} blocks recomputed")
    if recipe.slices > 1:
        parts.append(f"in {recipe.slices} slices")
    if recipe.in_backward:
        parts.append("updates within the backward pass")
    if recipe.rows:
        parts.append("embedding and head updated by rows")
    places = (
        (recipe.states, "optimizer states"), (recipe.weights, "weights of blocks"), (recipe.store, "inputs of blocks")
    )  # fmt: skip
    for place, what in places:
        if place != "memory":
            parts.append(f"{what} in {place}" if place == "int8" else f"{what} on the {place}")
    return ", ".join(parts)
