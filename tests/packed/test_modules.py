import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig
from transformers.pytorch_utils import Conv1D

from memfit.errors import UsageError
from memfit.packed.bits import pack_values
from memfit.packed.modules import (
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    is_experts,
    pack_module_skeleton,
    packed_modules,
)
from memfit.packed.scheme import Scheme

COMMON = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "untied": LlamaConfig(**COMMON, tie_word_embeddings=False, attention_bias=True),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=32, sliding_window=8),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=32
    ),
}
IDS = torch.randint(1, 160, (2, 24), generator=torch.Generator().manual_seed(3))


def make_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).eval()


def choose_schemes(model):
    """Every width somewhere, the ends in 8 bits; the routers stay."""
    schemes, bits = {}, (6, 5, 4, 3, 8)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name == "lm_head":
            schemes[name] = Scheme(bits=8, group=None)
        elif is_experts(module) or isinstance(module, nn.Linear):
            schemes[name] = Scheme(bits=bits[len(schemes) % 5], group=32, symmetric=len(schemes) % 3 != 0)
    return schemes


@pytest.fixture(params=CONFIGS)
def pair(request, round_to):
    """A model that runs packed, and the same model with the dense weights that the packed ones stand for."""
    dense = make_model(CONFIGS[request.param])
    dense.set_experts_implementation("eager")
    packed = copy.deepcopy(dense)
    schemes = choose_schemes(packed)
    pack_module_skeleton(packed, schemes)
    for name, module in packed_modules(packed).items():
        original = dense.get_submodule(name)
        if isinstance(module, PackedExperts):
            stores = {original.gate_up_proj: module.gate_up_proj, original.down_proj: module.down_proj}
        else:
            stores = {} if module.tied else {original.weight: module.store}
        for weight, store in stores.items():
            store.fill(*round_to(weight.data.flatten(0, -2), store.scheme))
            weight.data.copy_(store.dense_rows(0, store.shape[0]).view(weight.shape))
    return packed, dense


@torch.no_grad()
def test_a_packed_model_is_its_dequantised_model(pair):
    packed, dense = pair
    for ids in (IDS, IDS[:, :4]):
        found, expected = packed(ids).logits.float(), dense(ids).logits.float()
        error = (found - expected).norm() / expected.norm()
        assert error < 0.03, f"relative error {error:.4f}"


@torch.no_grad()
def test_nothing_dense_is_left_behind(pair):
    packed, _ = pair
    for name, module in packed_modules(packed).items():
        assert not any(p.numel() > 1000 for p in module.parameters()), name
    names = [name for name, _ in packed.named_buffers()]
    assert any(name.endswith("q_proj.store.plane0") for name in names)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_model_runs_on_fake_tensors(name):
    with FakeTensorMode(), torch.no_grad():
        model = make_model(CONFIGS[name])
        pack_module_skeleton(model, choose_schemes(model))

        def read(_name):
            shape, dtype = wanted[_name]
            return torch.empty(shape, dtype=dtype)

        wanted = {}
        for key, module in packed_modules(model).items():
            parts = {"": module.store} if not isinstance(module, PackedExperts) else {
                ".gate_up_proj": module.gate_up_proj, ".down_proj": module.down_proj
            }  # fmt: skip
            for part, store in parts.items():
                (rows, inputs), bits = store.shape, store.scheme.bits
                wanted[f"{key}{part}.weight_packed"] = ((rows, inputs * bits // 32), torch.int32)
                wanted[f"{key}{part}.weight_scale"] = ((rows, store.groups), torch.bfloat16)
                wanted[f"{key}{part}.weight_zero_point"] = (
                    (-(-rows * bits // 32), store.groups),
                    torch.int32,
                )
            module.load_from(read, key)
        assert model(torch.zeros(2, 24, dtype=torch.long)).logits.shape == (2, 24, 160)


def test_tied_ends_share_one_store():
    model = make_model(CONFIGS["llama"])
    ends = {"model.embed_tokens": Scheme(bits=4, group=32), "lm_head": Scheme(bits=4, group=32)}
    pack_module_skeleton(model, ends)
    assert isinstance(model.model.embed_tokens, PackedEmbedding) and isinstance(model.lm_head, PackedLinear)
    assert model.lm_head.store is model.model.embed_tokens.store
    read = {
        "e.weight_packed": pack_values(torch.ones(160, 64, dtype=torch.int8), 4),
        "e.weight_scale": torch.ones(160, 2, dtype=torch.bfloat16),
    }
    model.model.embed_tokens.load_from(read.__getitem__, "e")
    model.lm_head.load_from({}.__getitem__, "lm_head")  # has nothing of its own to read
    ids = torch.tensor([[1, 159]])
    assert torch.equal(model.model.embed_tokens(ids), torch.ones(1, 2, 64, dtype=torch.bfloat16))
    assert float(model.lm_head(torch.ones(1, 64, dtype=torch.bfloat16))[0, -1]) == 64


def test_a_scaled_embedding_keeps_its_scale():
    model = make_model(CONFIGS["gemma3"])
    embedding = model.model.embed_tokens
    pack_module_skeleton(model, {"model.embed_tokens": Scheme(bits=8, group=None)}, tied={})
    packed = model.model.embed_tokens
    packed.store.fill(torch.ones(160, 64, dtype=torch.int8), torch.full((160, 1), 0.5).to(torch.bfloat16))
    embedding.weight.data.fill_(0.5)
    assert torch.equal(packed(IDS), embedding(IDS))


def test_biases_stay_ordinary_parameters():
    model = make_model(CONFIGS["untied"])
    bias = model.model.layers[0].self_attn.q_proj.bias
    pack_module_skeleton(model, {"model.layers.0.self_attn.q_proj": Scheme(bits=4, group=32)})
    assert model.model.layers[0].self_attn.q_proj.bias is bias


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Conv1D(64, 64), r"part: Conv1D \(weight \[64, 64\], bias \[64\]\) has no packed form"),
        (nn.LSTM(32, 32), r"part: LSTM \(.*\) has no packed form"),
        (nn.Linear(40, 64), r"part \[64, 40\]: 40 inputs are not a multiple of 32.*int4 g128"),
        (nn.Linear(64, 64), r"part \[64, 64\]: 64 inputs are not a multiple of the group 128"),
        (nn.Embedding(8, 128, max_norm=1.0), r"part \[8, 128\]: Embedding computes something else"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name_and_shape(module, message):
    model = nn.ModuleDict({"part": module, "fine": nn.Linear(128, 64)})
    with pytest.raises(UsageError, match=message):
        pack_module_skeleton(model, {"fine": Scheme(bits=4), "part": Scheme(bits=4)})
    assert isinstance(model["fine"], nn.Linear)  # all or nothing


def test_names_and_ties_that_do_not_hold_are_refused():
    model = make_model(CONFIGS["llama"])
    with pytest.raises(UsageError, match=r"no module 'model.nowhere'"):
        pack_module_skeleton(model, {"model.nowhere": Scheme(bits=4)})
    with pytest.raises(
        UsageError, match=r"lm_head is tied to model\.embed_tokens, for which there is no scheme"
    ):
        pack_module_skeleton(model, {"lm_head": Scheme(bits=8, group=None)})
    with pytest.raises(UsageError, match="cannot have another scheme"):
        pack_module_skeleton(
            model, {"lm_head": Scheme(bits=8, group=None), "model.embed_tokens": Scheme(bits=4, group=32)}
        )
    experts = make_model(CONFIGS["mixtral"])
    with pytest.raises(UsageError, match="both need a scheme"):
        pack_module_skeleton(experts, {"model.layers.0.mlp.experts.down_proj": Scheme(bits=4, group=32)})


def test_models_still_learn_the_type_of_a_packed_weight():
    linear = PackedLinear(64, 128, scheme=Scheme(bits=4, group=32))
    assert (
        linear.weight.dtype == torch.bfloat16 and linear.weight.shape == (128, 64) and linear.weight.is_meta
    )
