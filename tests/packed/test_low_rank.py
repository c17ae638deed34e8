"""Factors, and what is shared, run as the dense weights that they stand for; no product of theirs is ever whole."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from memfit.errors import BrokenInput, UsageError
from memfit.packed.forms import Common, Form, LowRank, Shared, Sparse, Whole, form_of
from memfit.packed.kernel import runtime_nbytes
from memfit.packed.low_rank import LowRankWeight
from memfit.packed.modules import PackedLinear, Store, pack_module_skeleton
from memfit.packed.scheme import Scheme
from memfit.technique.install import install
from memfit.technique.low_rank import factorize
from memfit.technique.made import Made, dense
from memfit.technique.quantize import Quantized, dequantize
from memfit.technique.share import Member, share

SHAPE = (96, 128)
BASES = [None, Scheme(bits=4, group=32), Scheme(bits=3, group=64, symmetric=False), Scheme(bits=8, group=None)]
IDS = torch.randint(1, 160, (2, 24), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip


def weight(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).bfloat16()


def holder(made: dict[str, Made | Quantized]) -> nn.Module:
    """Linear layers of these names that run from what was made."""
    model = nn.Module()
    for name in made:
        model.add_module(name, nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16))
    install(model, made)
    return model


def kinds() -> dict[str, tuple[Store, Tensor]]:
    """Stores of every kind, and the dense weight that each stands for, bf16."""
    found: dict[str, tuple[Store, Tensor]] = {}
    for base in BASES:
        form = LowRank(rank=16, base=base)
        made = factorize(weight(), form, rounds=1)
        found[form.name] = (holder({"a": made}).a.store, dense(made))
    members = {name: Member.of(weight(n)) for n, name in enumerate("ab")}
    shared: list[tuple[Common, int, Scheme | None]] = [
        ("right", 16, None), ("left", 16, None), ("weight", 0, None), ("weight", 16, None), ("weight", 0, BASES[1]),
        ("weight", 16, BASES[1]),
    ]  # fmt: skip
    for common, rank, base in shared:
        both = share(members, common, rank, base=base)
        model = holder(both)
        for name, one in both.items():
            told = dequantize(one) if isinstance(one, Quantized) else dense(one, both["a"])
            found[f"{common} {rank} {base and base.name} {name}"] = (getattr(model, name).store, told)
    return found


KINDS = kinds()
EVERY = pytest.mark.parametrize("kind", KINDS)


@EVERY
def test_a_store_runs_as_the_dense_weight_that_it_stands_for(kind: str) -> None:
    store, told = KINDS[kind]
    assert torch.equal(store.dense_rows(0, 96), told) and torch.equal(store.dense_rows(5, 70), told[5:70])
    index = torch.tensor([[3, 95, 3], [0, 64, 17]])
    torch.testing.assert_close(store.rows(index), told[index], rtol=0.02, atol=0.02)
    for rows in (1, 40):
        x = torch.randn(rows, 2, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        exact = x.double() @ told.double().t()
        error = (store.matmul(x).double() - exact).norm() / exact.norm()
        # Three products are rounded to bf16 where there were one, and ŵ itself was rounded.
        assert store.matmul(x).shape == (rows, 2, 96) and error < 0.008


@EVERY
def test_the_gradient_of_what_comes_in_is_that_of_the_dense_weight(kind: str) -> None:
    store, told = KINDS[kind]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    g = torch.randn(5, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    store.matmul(x).backward(g)
    exact = g.double() @ told.double()
    assert x.grad is not None and (x.grad.double() - exact).norm() / exact.norm() < 0.01


@EVERY
def test_buffers_take_the_bytes_that_the_form_tells(kind: str) -> None:
    store, _ = KINDS[kind]
    assert store.nbytes == runtime_nbytes(store.scheme, SHAPE)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made inside."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][0].scheme in (LowRank(rank=16),)] + [
    kind for kind in KINDS if kind.startswith(("right", "left"))])  # fmt: skip
def test_the_product_of_factors_is_never_formed(kind: str) -> None:
    store, _ = KINDS[kind]
    views = {id(buffer): buffer.numel() for buffer in store.buffers()}
    with Largest() as seen:
        store.matmul(torch.ones(3, 128, dtype=torch.bfloat16))
    assert seen.most <= max(views.values()) < SHAPE[0] * SHAPE[1]


def test_every_form_comes_back_from_json() -> None:
    forms: list[Form] = [
        Whole(), LowRank(rank=3), LowRank(rank=3, base=Whole()), LowRank(rank=3, base=Scheme(bits=4, group=32)),
        Shared(owner="a.b", common="weight", rank=0), Shared(owner="a.b", common="right", rank=7), Sparse(),
    ]  # fmt: skip
    for form in forms:
        assert form_of(form.to_json()) == form
    assert len({form.name for form in forms}) == len(forms)


@pytest.mark.parametrize(("data", "reason"), [
    ({"form": "low-rank", "rank": 0, "base": None}, "at least 1"),
    ({"form": "low-rank", "rank": True, "base": None}, "not a whole number"),
    ({"form": "low-rank", "rank": 3}, "has the fields base, rank, got rank"),
    ({"form": "low-rank", "rank": 3, "base": Sparse().to_json()}, "cannot go beside"),
    ({"form": "shared", "owner": "a", "common": "both", "rank": 3}, "one of right, left, weight"),
    ({"form": "shared", "owner": "a", "common": "left", "rank": 0}, "at least 1 where the left is common"),
    ({"form": "shared", "owner": "a", "common": "weight", "rank": -1}, "at least 0"),
    ({"form": "shared", "owner": 3, "common": "weight", "rank": 1}, "not a module's name"),
    ({"form": "shared", "owner": "", "common": "weight", "rank": 1}, "must be the name"),
    ({"form": "whole", "rank": 3}, "has no fields, got rank"),
    ({"form": "half"}, "known: sparse, low-rank, shared, whole"),
])  # fmt: skip
def test_forms_that_are_none_are_refused(data: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        form_of(data)


CONFIGS = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True), "bias": LlamaConfig(**SIZES, attention_bias=True),
    "gemma": Gemma3TextConfig(**SIZES, head_dim=32, sliding_window=8),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_runs_from_factors_and_from_what_its_layers_share(kind: str) -> None:
    config = CONFIGS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).eval()
    packed = copy.deepcopy(model)
    take = lambda *names: {name: Member.of(model.get_submodule(name).weight.detach()) for name in names}  # noqa: E731
    first, second = "model.layers.0", "model.layers.1"
    made: dict[str, Made | Quantized] = {}
    for common, rank, names in (
        ("right", 24, [f"{first}.mlp.gate_proj", f"{first}.mlp.up_proj"]),
        ("left", 24, [f"{first}.mlp.down_proj", f"{first}.self_attn.o_proj"]),
        ("weight", 8, [f"{first}.self_attn.q_proj", f"{second}.self_attn.q_proj"]),
        ("weight", 0, [f"{second}.mlp.gate_proj", f"{second}.mlp.up_proj"]),
    ):
        made |= share(take(*names), common, rank)  # type: ignore[arg-type]
    table = model.get_input_embeddings().weight.detach()
    made["model.embed_tokens"] = factorize(table, LowRank(rank=48, base=Scheme(bits=4, group=32)))
    if config.tie_word_embeddings:
        made["lm_head"] = made["model.embed_tokens"]
    else:
        parts = factorize((model.lm_head.weight.float() - table.float()).detach(), LowRank(rank=20)).parts
        made["lm_head"] = Made(
            form=Shared(owner="model.embed_tokens", common="weight", rank=20), shape=(160, 64), parts=parts
        )
    for name, one in made.items():
        owner = made[one.form.owner] if isinstance(one, Made) and isinstance(one.form, Shared) else None
        assert isinstance(one, Made)
        model.get_submodule(name).weight.data = dense(one, owner)
    install(packed, made)
    with torch.no_grad():
        wanted, found = (one(IDS).logits.double() for one in (model, packed))
    assert (wanted - found).norm() / wanted.norm() < 0.05
    stores = [module for module in packed.modules() if isinstance(module, Store)]
    held = {id(buffer): buffer.nbytes for store in stores for buffer in store.buffers()}
    forms = {name: one.form for name, one in made.items() if isinstance(one, Made)}
    due = {name: runtime_nbytes(form, tuple(model.get_submodule(name).weight.shape)) for name, form in forms.items()}
    if config.tie_word_embeddings:
        del due["lm_head"]
    assert sum(held.values()) == sum(due.values()), "what is shared is held once"


@pytest.mark.parametrize(("forms", "reason"), [
    ({"b": Shared(owner="a", common="right", rank=4)}, "a is stored in no form"),
    ({"b": Shared(owner="z", common="right", rank=4)}, "z is stored in no form"),
    ({"a": LowRank(rank=5), "b": Shared(owner="a", common="right", rank=4)}, "has no factors of rank 4"),
    ({"a": Whole(), "b": Shared(owner="a", common="left", rank=4)}, "is bf16, shared, and has no factors"),
    ({"a": Whole(), "c": Shared(owner="a", common="weight", rank=4)}, r"a is \[8, 32\], not \[16, 32\]"),
    ({"a": LowRank(rank=4), "c": Shared(owner="a", common="left", rank=4)}, "its left factor does not fit"),
    ({"a": LowRank(rank=4), "d": Shared(owner="a", common="right", rank=4)}, "its right factor does not fit"),
    ({"a": Whole(), "b": Shared(owner="a", common="weight", rank=0), "e": Shared(owner="b", common="weight", rank=0)},
     "b has a part of a itself"),
    ({"b": Shared(owner="b", common="weight", rank=0)}, "b has a part of b itself"),
    ({"a": Scheme(bits=8, group=None, activations=8), "b": Shared(owner="a", common="weight", rank=0)}, "in integers"),
    ({"a": LowRank(rank=9)}, "has no rank 9"),
])  # fmt: skip
def test_what_cannot_be_shared_is_told_before_anything_is_swapped(forms: dict[str, Form], reason: str) -> None:
    model = nn.Module()
    for name, shape in {"a": (8, 32), "b": (8, 32), "c": (16, 32), "d": (8, 64), "e": (8, 32)}.items():
        model.add_module(name, nn.Linear(shape[1], shape[0], bias=False))
    with pytest.raises(UsageError, match=reason):
        pack_module_skeleton(model, forms)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_what_does_not_fit_is_refused_as_it_is_installed_and_read() -> None:
    made = factorize(weight(), LowRank(rank=4))
    with pytest.raises(UsageError, match=r"a is \[8, 128\], and what was made for it \[96, 128\]"):
        model = nn.Module()
        model.add_module("a", nn.Linear(128, 8, bias=False))
        install(model, {"a": made})
    store = LowRankWeight(SHAPE, LowRank(rank=5))
    with pytest.raises(BrokenInput, match=r"weight_left: torch.bfloat16 \[96, 4\] where"):
        store.fill(dict(made.parts))
