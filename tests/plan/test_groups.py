"""Every tensor is in one group or left out by name; what runs fused shares a choice."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from memfit.packed.modules import pack_module_skeleton, packed_modules
from memfit.packed.scheme import Scheme
from memfit.plan.groups import Group, candidates, find_groups, left_out

SMALL = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 512, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "intermediate_size": 512, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "intermediate_size": 512,
        "num_experts": 4,
        "moe_intermediate_size": 128,
    },
    "opt": {"model_type": "opt", "ffn_dim": 512, "word_embed_proj_dim": 256, "max_position_embeddings": 64},
    "mamba": {"model_type": "mamba"},
    "phi3": {"model_type": "phi3", "intermediate_size": 512, "pad_token_id": 0},
    "t5": {
        "model_type": "t5",
        "d_model": 256,
        "d_ff": 512,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
    },
}


def skeleton(name: str) -> nn.Module:
    settings = dict(MODELS[name])
    small = {} if name == "t5" else dict(SMALL)
    config = AutoConfig.for_model(settings.pop("model_type"), **{"vocab_size": 512} | small | settings)
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config).eval().requires_grad_(False)


def by_name(model: nn.Module) -> dict[str, Group]:
    return {group.name: group for group in find_groups(model)}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_one_group_or_left_out_with_a_reason(name: str) -> None:
    model = skeleton(name)
    groups = find_groups(model)
    members = [member for group in groups for member in group.members]
    assert len(set(members)) == len(members)
    reasons = left_out(model)
    assert all(reasons.values())
    kept = {id(model.get_parameter(p)) for group in groups if not group.blocked for p in group.parameters}
    out = {id(model.get_parameter(p)) for p in reasons}
    assert not kept & out
    assert kept | out == {id(p) for p in model.parameters()}
    assert sum(group.weights for group in groups if not group.blocked) > 0.8 * sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("name", MODELS)
def test_what_a_group_says_can_be_stored_can_be_packed(name: str) -> None:
    groups = find_groups(skeleton(name))
    for index in (0, -1):
        model = skeleton(name)
        schemes = {m: found[index] for group in groups if (found := candidates(group)) for m in group.members}
        pack_module_skeleton(model, schemes)
        assert packed_modules(model).keys() == schemes.keys()


def test_values_have_widths_and_groups_of_their_own() -> None:
    group = next(iter(find_groups(skeleton("llama"))))
    names = lambda **more: [scheme.name for scheme in candidates(group, **more)]  # noqa: E731
    assert names(bits=(8, 3), values=("nf4", "fp8", "mxfp4")) == ["nf4 g64", "fp8 row", "mxfp4 g32"]
    assert names(bits=(4, 2), values=("int", "codebook")) == [
        "int4 g128", "int4 g64", "int2 g64", "int2 g32", "codebook4x2 row", "codebook2x4 row",
    ]  # fmt: skip
    assert names(bits=(4,), values=("nf4", "codebook"), groups={4: (32,)}) == ["nf4 g32", "codebook4x2 g32"]
    assert names(bits=(8, 3), values=("codebook",), vector=1) == ["codebook8 row", "codebook3 row"]


def test_what_runs_fused_is_one_group() -> None:
    found = by_name(skeleton("llama"))
    assert list(found) == [
        "model.embed_tokens+lm_head",
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj+k_proj+v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj+up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    gate_up = found["model.layers.1.mlp.gate_proj+up_proj"]
    assert gate_up.members == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    assert gate_up.weights == 2 * 512 * 256 and gate_up.nbytes(None) == 4 * 512 * 256
    assert gate_up.nbytes(Scheme(bits=4, group=64)) == 2 * (512 * 128 + 512 * 4 * 2)


def test_tied_weights_are_one_group_and_counted_once() -> None:
    group = by_name(skeleton("llama"))["model.embed_tokens+lm_head"]
    assert group.kind == "embedding" and group.members == ("model.embed_tokens", "lm_head")
    assert group.parameters == ("model.embed_tokens.weight",) and group.shapes == ((512, 256),)
    first, *_ = find_groups(skeleton("t5"))
    assert first.members == ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    assert first.weights == 512 * 256


def test_experts_are_a_group_and_their_router_stays() -> None:
    model = skeleton("qwen3_moe")
    group = by_name(model)["model.layers.0.mlp.experts"]
    assert group.kind == "experts" and group.members == ("model.layers.0.mlp.experts",)
    assert group.shapes == ((4, 256, 256), (4, 256, 128))
    assert "model.layers.0.mlp.gate.weight" in left_out(model)


def test_experts_that_are_modules_share_a_choice_and_a_linear_router_stays() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 96)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(64, 3)
            self.experts = nn.ModuleList(Expert() for _ in range(3))

    groups = find_groups(nn.ModuleDict({"a": Block(), "b": Block()}))
    assert [len(group.members) for group in groups] == [6, 3, 6, 3]
    assert all("router" not in member and not member.endswith("gate") for g in groups for member in g.members)
    assert "chooses among experts" in left_out(Block())["gate.weight"]


def test_what_has_no_packed_form_is_named_with_its_kind() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(64, 64, 3),
            "lstm": nn.LSTM(64, 64),
            "norm": nn.LayerNorm(64),
            "odd": nn.Linear(30, 64, bias=False),
            "few": nn.Embedding(100, 64),
        }
    )
    reasons = left_out(model)
    assert reasons["conv.weight"] == "Conv1d has no packed form"
    assert reasons["lstm.weight_ih_l0"] == "LSTM [256, 64] has no packed form"
    assert "vector" in reasons["norm.weight"] and "vector" in reasons["conv.bias"]
    assert "30 inputs" in reasons["odd.weight"] and "6400 weights" in reasons["few.weight"]
    (odd,) = find_groups(model)
    assert odd.blocked is not None and candidates(odd) == ()


def test_candidates_fall_back_to_a_group_that_fits() -> None:
    (group,) = find_groups(nn.ModuleDict({"a": nn.Linear(96, 64)}))
    assert [scheme.name for scheme in candidates(group)] == [
        "int8 row", "int6 g32", "int5 g32", "int4 g32", "int3 g32", "int2 g32",
    ]  # fmt: skip
    asymmetric = candidates(group, bits=(4,), symmetric=False)
    assert asymmetric == (Scheme(bits=4, group=32, symmetric=False),)


def test_heads_of_other_inputs_are_not_fused() -> None:
    parts = {"q_proj": nn.Linear(64, 64), "k_proj": nn.Linear(128, 64), "v_proj": nn.Linear(128, 64)}
    groups = find_groups(nn.ModuleDict({"cross": nn.ModuleDict(parts)}))
    assert all({m.rpartition(".")[2] for m in g.members} != set(parts) for g in groups)
