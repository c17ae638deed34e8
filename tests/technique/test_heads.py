"""Values and output of an attention made narrower as one: exact where nothing is lost, far better than each alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, OPTConfig, Qwen2Config, Qwen3Config

from memfit.errors import UsageError
from memfit.packed.forms import LowRank, Narrow, form_of
from memfit.packed.kernel import runtime_nbytes
from memfit.packed.modules import pack_module_skeleton
from memfit.packed.scheme import Scheme
from memfit.technique.gptq import Factor, factor
from memfit.technique.heads import narrow_errors, narrow_heads, why_not_narrow
from memfit.technique.install import install
from memfit.technique.low_rank import factorize, rank_for
from memfit.technique.made import dense
from memfit.technique.spectrum import errors_by_rank

INT4, W8A8 = Scheme(bits=4, group=32), Scheme(bits=8, group=None, activations=8)
SIZES = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES), "qwen3": Qwen3Config(**SIZES), "gemma3": Gemma3TextConfig(**SIZES, sliding_window=8),
}  # fmt: skip
IDS = torch.randint(1, 160, (2, 24), generator=torch.Generator().manual_seed(3))


def draw(seed: int, *, heads: int = 2, each: int = 2, width: int = 8) -> tuple[Tensor, Tensor, Factor, Tensor]:
    """Values, output, what comes to the output, and what its outputs count."""
    random = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    queries = heads * each * width
    y = make(4 * queries, queries) @ make(queries, queries) * make(queries).exp()
    return make(heads * width, 24), make(20, queries), factor(y.t() @ y / len(y)), make(20).exp()


def lost(value: Tensor, output: Tensor, made: tuple[Tensor, Tensor], inputs: Factor, rows: Tensor, width: int) -> float:
    """Σ_o G_o (E H Eᵀ)_oo, E what the output's inputs become: y narrow is linear in y where V has full row rank."""
    heads, each = value.shape[0] // width, output.shape[1] // value.shape[0]
    error = torch.zeros(output.shape, dtype=torch.float64)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        turned = made[0][own].double() @ torch.linalg.pinv(value[own].double())
        for query in range(head * each, (head + 1) * each):
            columns = slice(query * width, (query + 1) * width)
            error[:, columns] = output[:, columns].double() - made[1][:, columns].double() @ turned
    h = inputs.coupling.double() @ inputs.weights.double().diag() @ inputs.coupling.double().t()
    whole = torch.empty_like(h)
    whole[inputs.order[:, None], inputs.order[None]] = h
    return float((torch.einsum("nk,kl,nl->n", error, whole, error) * rows).sum())


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6), heads=st.integers(1, 2), each=st.sampled_from([1, 2, 3]), kept=st.integers(1, 8)
)  # fmt: skip
def test_the_error_is_about_what_is_told(seed: int, heads: int, each: int, kept: int) -> None:
    value, output, inputs, rows = draw(seed, heads=heads, each=each)
    told = narrow_errors(value, output, width=8, factor_Q=inputs, rows_M=rows)
    assert told.shape == (9,) and told[-1] == 0 and bool((told.diff() <= 0).all())
    made = narrow_heads(value, output, width=8, kept=kept, factor_Q=inputs, rows_M=rows)
    found = lost(value, output, (dense(made[0]), dense(made[1])), inputs, rows, 8)
    # Sure for one head that one query reads. Errors of several may add up, of each query that reads a head by itself.
    assert found <= heads * each * each * float(told[kept]) + 2e-3 * float(told[0])
    if heads == each == 1:
        assert found >= 0.99 * float(told[kept])


def test_one_head_alone_is_the_low_rank_of_the_output() -> None:
    value, output, inputs, rows = draw(0, heads=1, each=1)
    told = narrow_errors(value, output, width=8, factor_Q=inputs, rows_M=rows)
    torch.testing.assert_close(told, errors_by_rank(output, factor=inputs, rows_N=rows), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_with_all_dimensions_gives_what_it_gave_and_with_fewer_runs_narrower(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])).to(torch.bfloat16).eval()
    with torch.no_grad():
        wanted = model(IDS).logits.double()
    for kept, base in ((16, None), (16, Scheme(bits=8, group=None)), (12, None), (8, INT4)):
        narrow, plain, made = copy.deepcopy(model), copy.deepcopy(model), {}
        for name, attention in model.named_modules():
            if name.endswith("self_attn"):
                assert why_not_narrow(attention) is None
                value, output = attention.v_proj.weight.detach(), attention.o_proj.weight.detach()
                both = narrow_heads(value, output, width=16, kept=kept, base=base, value_base=base)
                made |= {f"{name}.v_proj": both[0], f"{name}.o_proj": both[1]}
        for name, one in made.items():
            plain.get_submodule(name).weight.data = dense(one)
        install(narrow, made)
        with torch.no_grad():
            found, same = narrow(IDS).logits.double(), plain(IDS).logits.double()
        assert (found - same).norm() / same.norm() < 0.02, "it runs as the dense weights that it stands for"
        assert kept < 16 or (found - wanted).norm() / wanted.norm() < 0.03, "nothing is lost"
        for name, one in made.items():
            store = narrow.get_submodule(name).store
            shape = tuple(model.get_submodule(name).weight.shape)
            assert store.nbytes == runtime_nbytes(one.form, shape)
            assert base is not None or one.form.nbytes(shape) * 16 == 2 * shape[0] * shape[1] * kept
            index = torch.tensor([[0, 5], [7, 31]])
            assert torch.equal(store.rows(index), dense(one)[index])
            assert torch.equal(store.dense_rows(3, 20), dense(one)[3:20])


def test_it_loses_far_less_than_factors_of_each_alone() -> None:
    value, output, inputs, rows = draw(5, heads=2, each=2, width=16)
    made = narrow_heads(value, output, width=16, kept=12, factor_Q=inputs, rows_M=rows)
    joint = lost(value, output, (dense(made[0]), dense(made[1])), inputs, rows, 16)
    bytes_ = [one.form.nbytes(one.shape) for one in made]
    alone = [
        dense(factorize(weight, LowRank(rank=rank_for(tuple(weight.shape), nbytes)), factor=given))
        for weight, nbytes, given in ((value, bytes_[0], None), (output, bytes_[1], inputs))
    ]
    assert joint < 0.2 * lost(value, output, (alone[0], alone[1]), inputs, rows, 16)


def test_forms_and_dry_runs() -> None:
    for form in (Narrow(heads=4, kept=3, side="out"), Narrow(heads=4, kept=16, side="in", base=INT4)):
        assert form_of(form.to_json()) == form
    with FakeTensorMode():
        made = factor(torch.empty(64, 64))
        both = narrow_heads(
            torch.empty(32, 48), torch.empty(40, 64), width=16, kept=8, factor_Q=made, rows_M=torch.empty(40), base=INT4
        )
        assert both[0].parts["weight_narrow"].shape == (16, 48) and both[1].base is not None
        assert both[1].base.q.shape == (40, 32)


@pytest.mark.parametrize(("data", "reason"), [
    ({"heads": 0, "kept": 3, "side": "out", "base": None}, "at least 1"),
    ({"heads": 2, "kept": 3, "side": "up", "base": None}, "one of out, in"),
    ({"heads": 2, "kept": 3.5, "side": "in", "base": None}, "kept is 3.5"),
    ({"heads": 2, "kept": 3, "side": "in", "base": {"form": "whole"}}, "a narrow weight cannot be"),
    ({"heads": 2, "kept": 3, "side": "in", "base": vars(W8A8)}, "stay as they are"),
])  # fmt: skip
def test_narrow_forms_that_are_none_are_refused(data: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        form_of({"form": "narrow", **data})


def test_what_cannot_be_narrower_is_told() -> None:
    value, output = torch.ones(16, 8), torch.ones(8, 32)
    with pytest.raises(ValueError, match="not of heads of 7"):
        narrow_heads(value, output, width=7, kept=3)
    with pytest.raises(ValueError, match="1 to 8 dimensions are kept, got 9"):
        narrow_heads(value, output, width=8, kept=9)
    with pytest.raises(ValueError, match="cannot store"):
        narrow_heads(value, output, width=8, kept=3, base=INT4)
    layer = nn.ModuleDict({"v": nn.Linear(8, 16)})
    with pytest.raises(UsageError, match="16 are not 3 heads of 4"):
        pack_module_skeleton(layer, {"v": Narrow(heads=3, kept=4, side="out")})
    for kind, reason in ((Qwen2Config, "a bias is added"), (OPTConfig, "no linear layers q_proj, v_proj and o_proj")):
        config = kind(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        attention = next(module for name, module in model.named_modules() if name.endswith("self_attn"))
        assert reason in str(why_not_narrow(attention))
