"""Modules that run from packed weights, and the swap that puts them into a model.

N outputs or vocabulary entries, K inputs or width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from memfit.errors import UsageError
from memfit.packed.blocks import Read
from memfit.packed.experts import WEIGHTS as EXPERTS_WEIGHTS
from memfit.packed.experts import PackedExperts
from memfit.packed.forms import Form, LowRank, Narrow, Shared, Sparse, Whole
from memfit.packed.integer import IntegerWeight
from memfit.packed.low_rank import LowRankWeight, Owner, SharedWeight, WholeWeight
from memfit.packed.narrow import NarrowWeight
from memfit.packed.scheme import Scheme
from memfit.packed.sparse import SparseWeight
from memfit.packed.store import PackedWeight

Store = PackedWeight | IntegerWeight | SparseWeight | LowRankWeight | SharedWeight | WholeWeight | NarrowWeight
"""What holds a weight."""
Table = PackedWeight | SparseWeight | LowRankWeight | SharedWeight | WholeWeight | NarrowWeight
"""What holds a table, which is looked up by rows."""
_READ_DIRECTLY = ("dt_proj",)
"""Linear layers whose model reads `.weight` itself instead of calling them (Mamba's)."""


class PackedLinear(nn.Module):
    """x · ŵᵀ + bias from a packed weight; `store` may be another module's, as a tied head's is."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scheme: Form,
        bias: bool = False,
        store: Store | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.tied = store is not None
        self.store: Store = store or store_of((out_features, in_features), scheme)
        if self.store.shape != (out_features, in_features):
            raise UsageError(
                f"a head of {out_features} x {in_features} cannot share a weight of {self.store.shape}"
            )
        self.bias = (
            nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        )

    @property
    def weight(self) -> Tensor:
        """Shape and type of the weight that this stands for, without bytes: models ask for the type."""
        return torch.empty(self.store.shape, dtype=torch.bfloat16, device="meta")

    def load_from(self, read: Read, prefix: str) -> None:
        """Fill from compressed-tensors names; nothing to do if the weight is another module's."""
        if not self.tied:
            self.store.load_from(read, prefix)

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is None:
            return self.store.matmul(input)
        # In place: y is fresh, and a second copy of it would be the peak of a wide head. And before it is viewed,
        # as the backward pass copies the gradient of a view that was changed.
        y = self.store.matmul(input.reshape(-1, self.in_features)).add_(self.bias)
        return y if input.dim() == 2 else y.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class PackedEmbedding(nn.Module):
    """Rows of a packed table, times `embed_scale` where the model has one (Gemma, BART)."""

    embed_scale: Tensor | float | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        scheme: Form,
        padding_idx: int | None = None,
        embed_scale: Tensor | float | None = None,
        store: Table | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.tied = store is not None
        made = store if store is not None else store_of((num_embeddings, embedding_dim), scheme)
        assert not isinstance(made, IntegerWeight), "a table cannot have a scheme with activations"
        self.store: Table = made
        if isinstance(embed_scale, Tensor):
            self.register_buffer("embed_scale", embed_scale, persistent=False)
        else:
            self.embed_scale = embed_scale

    @property
    def weight(self) -> Tensor:
        """Shape and type of the table that this stands for, without bytes: models ask for the type."""
        return torch.empty(self.store.shape, dtype=torch.bfloat16, device="meta")

    def load_from(self, read: Read, prefix: str) -> None:
        """Fill from compressed-tensors names; nothing to do if the table is another module's."""
        if not self.tied:
            self.store.load_from(read, prefix)

    def forward(self, input: Tensor) -> Tensor:
        rows = self.store.rows(input)
        if self.embed_scale is None:
            return rows
        if isinstance(self.embed_scale, Tensor):
            return rows.mul_(self.embed_scale.to(rows.dtype))
        return rows.mul_(self.embed_scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"


def store_of(shape: tuple[int, int], scheme: Form) -> Store:
    """What holds a weight in `scheme`, without storage yet; of `Shared` there is none without its owner's."""
    assert not isinstance(scheme, Shared), "what shares is made with its owner's store"
    if isinstance(scheme, Whole):
        return WholeWeight(shape, scheme)
    if isinstance(scheme, Narrow):
        return NarrowWeight(shape, scheme)
    if isinstance(scheme, Sparse):
        return SparseWeight(shape, scheme)
    if isinstance(scheme, LowRank):
        return LowRankWeight(shape, scheme)
    return IntegerWeight(shape, scheme) if scheme.activations == 8 else PackedWeight(shape, scheme)


def device_of(store: Store) -> torch.device:
    """Where a weight's buffers are."""
    return next(store.buffers()).device


def why_not_packed(module: nn.Module, name: str, scheme: Form) -> str | None:
    """Why `module` cannot run from weights packed as `scheme`; None if it can. It names name and shape."""
    kind = type(module)
    if isinstance(module, nn.Linear | nn.Embedding):
        shape = tuple(module.weight.shape)
        if name.rpartition(".")[2] in _READ_DIRECTLY:
            reason: str | None = "the model reads this weight itself instead of calling the layer"
        elif kind.__name__ == "NonDynamicallyQuantizableLinear" or not _forward_is_known(module):
            reason = f"{kind.__name__} computes something else with its weight"
        else:
            reason = scheme.why_not(shape)
        if reason is None and isinstance(module, nn.Embedding) and scheme.activations != 16:
            reason = "a table is looked up, and has no activations to round"
        return None if reason is None else f"{name} {list(shape)}: {reason}"
    if is_experts(module):
        for weight in EXPERTS_WEIGHTS:
            shape = tuple(module.get_parameter(weight).shape)
            if (reason := scheme.why_not(shape)) is not None:
                return f"{name}.{weight} {list(shape)}: {reason}"
        return None
    shapes = (
        ", ".join(f"{n} {list(p.shape)}" for n, p in module.named_parameters(recurse=False)) or "no weight"
    )
    return f"{name}: {kind.__name__} ({shapes}) has no packed form"


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is a fused experts module that computes what `PackedExperts` does."""
    weights = dict(module.named_parameters(recurse=False))
    return (
        set(weights) == set(EXPERTS_WEIGHTS)
        and all(weight.ndim == 3 for weight in weights.values())
        and hasattr(module, "act_fn")
        and getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not getattr(module, "has_bias", False)
        and not getattr(module, "is_transposed", False)
        and not getattr(module, "has_post_expert_norm", False)
        and getattr(type(module), "_apply_gate", None) is _default_gate()
    )


def pack_module_skeleton(
    model: nn.Module, schemes: Mapping[str, Form], *, tied: Mapping[str, str] | None = None
) -> None:
    """Swap modules of `model`, in place, for packed ones without storage; `load_from` fills them.

    Args:
        model: its weights may be on `meta`; biases and all other parameters stay as they are.
        schemes: module name to scheme. Fused experts take one under their own name, or one under each of
            `<name>.gate_up_proj` and `<name>.down_proj`.
        tied: name of a module to the name of the one whose packed weight it shares, as the head to the
            embedding. By default, modules that share one Parameter now will share one store.

    Raises:
        UsageError: a module cannot be packed so, or does not exist; the message names it and its shape.
            Nothing was swapped then.
    """
    wanted = _by_module(model, schemes)
    ties = dict(tied) if tied is not None else _find_ties(model, wanted)
    for head, owner in ties.items():
        if owner not in wanted:
            raise UsageError(f"{head} is tied to {owner}, for which there is no scheme")
    problems = []
    for name, (scheme, down) in wanted.items():
        if name in ties and (scheme != wanted[ties[name]][0]):
            problems.append(f"{name} is tied to {ties[name]} and cannot have another scheme")
        for one in {scheme, down}:
            if (reason := why_not_packed(model.get_submodule(name), name, one)) is not None:
                problems.append(f"{reason} ({one.name})")
        if isinstance(scheme, Shared) and (reason := _why_not_shared(model, name, scheme, wanted)) is not None:
            problems.append(f"{name}: {reason} ({scheme.name})")
    if problems:
        raise UsageError("cannot be packed: " + "; ".join(sorted(set(problems))))
    # Owners before those that have a part in them.
    for name, (scheme, down) in sorted(wanted.items(), key=lambda item: isinstance(item[1][0], Shared)):
        if name in ties:
            continue
        module = model.get_submodule(name)
        packed = _packed(module, scheme, down, _sharing(model, module, scheme, ties))
        if isinstance(scheme, Shared):
            assert isinstance(packed, PackedLinear | PackedEmbedding)
            packed.tied = False  # it has parts of its own to load
        _replace(model, name, packed)
    for name, owner in ties.items():
        store = model.get_submodule(owner).store
        assert isinstance(store, Store)
        _replace(model, name, _packed(model.get_submodule(name), store.scheme, store.scheme, store))


def _why_not_shared(model: nn.Module, name: str, scheme: Shared, wanted: Mapping[str, tuple[Form, Form]]) -> str | None:
    """Why a module cannot have what it is to have of its owner; None if it can."""
    found = wanted.get(scheme.owner)
    owner = model.get_submodule(scheme.owner) if found is not None else None
    if found is None or not isinstance(owner, nn.Linear | nn.Embedding):
        return scheme.why_not_with((), None, ())
    shape = tuple(model.get_submodule(name).get_parameter("weight").shape)
    return scheme.why_not_with(shape, found[0], tuple(owner.weight.shape))


def _sharing(model: nn.Module, module: nn.Module, scheme: Form, ties: Mapping[str, str]) -> "SharedWeight | None":
    """The store of a module that has a part of its owner's, which stands in its place already; None of any other."""
    if not isinstance(scheme, Shared):
        return None
    owner = model.get_submodule(ties.get(scheme.owner, scheme.owner)).store
    assert isinstance(owner, Owner), "what can be shared was checked"
    rows, inputs = module.get_parameter("weight").shape
    return SharedWeight((rows, inputs), scheme, owner)


def packed_modules(model: nn.Module) -> dict[str, PackedLinear | PackedEmbedding | PackedExperts]:
    """Every packed module of `model`, by name."""
    kinds = (PackedLinear, PackedEmbedding, PackedExperts)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _by_module(model: nn.Module, schemes: Mapping[str, Form]) -> dict[str, tuple[Form, Form]]:
    """Module name to its scheme and, for experts, that of `down_proj`."""
    modules = dict(model.named_modules())
    wanted: dict[str, tuple[Form, Form]] = {}
    halves: dict[str, dict[str, Form]] = {}
    for name, scheme in schemes.items():
        parent, _, last = name.rpartition(".")
        if name in modules:
            wanted[name] = (scheme, scheme)
        elif last in EXPERTS_WEIGHTS and parent in modules:
            halves.setdefault(parent, {})[last] = scheme
        else:
            raise UsageError(f"the model has no module {name!r}")
    for parent, pair in halves.items():
        if set(pair) != set(EXPERTS_WEIGHTS):
            raise UsageError(
                f"{parent}: experts are packed whole, so {' and '.join(EXPERTS_WEIGHTS)} both need a scheme"
            )
        wanted[parent] = (pair[EXPERTS_WEIGHTS[0]], pair[EXPERTS_WEIGHTS[1]])
    return wanted


def _find_ties(model: nn.Module, wanted: Mapping[str, object]) -> dict[str, str]:
    """Modules whose weight is the very Parameter of another's, to that other; embeddings own."""
    owners: dict[int, str] = {}
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | nn.Embedding) and isinstance(weight, nn.Parameter):
            users.setdefault(id(weight), []).append(name)
            if isinstance(module, nn.Embedding):
                owners.setdefault(id(weight), name)
    ties = {}
    for key, names in users.items():
        if len(names) > 1 and any(name in wanted for name in names):
            owner = owners.get(key, names[0])
            ties.update({name: owner for name in names if name != owner})
    return ties


def _packed(module: nn.Module, scheme: Form, down: Form, store: Store | None) -> nn.Module:
    if isinstance(module, nn.Linear):
        linear = PackedLinear(module.in_features, module.out_features, scheme=scheme, store=store)
        linear.bias = module.bias
        return linear.train(module.training)
    if isinstance(module, nn.Embedding):
        assert not isinstance(store, IntegerWeight), "a table cannot have a scheme with activations"
        return PackedEmbedding(
            module.num_embeddings,
            module.embedding_dim,
            scheme=scheme,
            padding_idx=module.padding_idx,
            embed_scale=getattr(module, "embed_scale", None),
            store=store,
        ).train(module.training)
    assert isinstance(scheme, Scheme) and isinstance(down, Scheme), "fused experts have no other form"
    return PackedExperts(module, gate_up=scheme, down=down).train(module.training)


def _forward_is_known(module: nn.Linear | nn.Embedding) -> bool:
    """Whether calling `module` is what the packed module computes."""
    kind = type(module)
    if isinstance(module, nn.Linear):
        # Falcon's own class is a plain linear layer that rounds before it adds the bias, as packed ones do.
        return kind.forward is nn.Linear.forward or kind.__name__ == "FalconLinear"
    plain = kind.forward is nn.Embedding.forward and module.max_norm is None
    return plain or (kind.__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale"))


def _default_gate() -> object:
    from transformers.integrations import moe

    return moe._default_apply_gate


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
