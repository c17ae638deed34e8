"""A fitted directory opens with packed modules in their places, tied again where memfit wrote two copies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from memfit.errors import BrokenInput
from memfit.packed.bits import pack_values
from memfit.packed.modules import PackedEmbedding, PackedExperts, PackedLinear
from memfit.packed.scheme import Scheme
from memfit.source import check, load, open_source, source_from_config
from memfit.source.configuration import parse_schemes

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group is None else "group",
            "group_size": scheme.group,
        },
    }


def pack(weight: torch.Tensor, scheme: Scheme) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Parts in the file of a weight rounded to `scheme`, and the numbers they stand for."""
    groups = weight.float().view(weight.shape[0], scheme.groups(weight.shape[1]), -1)
    scale = (groups.abs().amax(-1, keepdim=True) / (2 ** (scheme.bits - 1) - 1)).bfloat16()
    top = 2 ** (scheme.bits - 1)
    q = (groups / scale.float()).round().clamp(-top, top - 1)
    parts = {
        "weight_packed": pack_values(q.to(torch.int8).view(weight.shape), scheme.bits),
        "weight_scale": scale.squeeze(-1),
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, (q * scale.float()).view(weight.shape)


def write_fitted(directory: Path, schemes: dict[str, Scheme], *, tied: bool) -> LlamaForCausalLM:
    """A fitted Llama in `directory`; the model that it stands for, in bf16."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(torch.bfloat16).eval()
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for module, scheme in schemes.items():
        parts, numbers = pack(tensors.pop(f"{module}.weight"), scheme)
        model.get_submodule(module).weight.data.copy_(numbers)
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    groups = {
        f"group_{n}": group([f"re:^{module}$".replace(".", r"\.")], s)
        for n, (module, s) in enumerate(schemes.items())
    }
    config = json.loads((directory / "config.json").read_text()) | {
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": groups,
            "ignore": [],
        },
        "memfit": {"tied": {"lm_head": "model.embed_tokens"} if tied else {}, "kv_bits": 8},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return model


SCHEMES = {
    "model.embed_tokens": Scheme(bits=6, group=None),
    "lm_head": Scheme(bits=6, group=None),
    "model.layers.0.mlp.up_proj": Scheme(bits=4, group=32),
    "model.layers.1.self_attn.q_proj": Scheme(bits=8, group=64),
}


@pytest.mark.parametrize("tied", [True, False])
def test_a_fitted_directory_runs_from_its_packed_weights(tied: bool, tmp_path: Path) -> None:
    reference = write_fitted(tmp_path, SCHEMES, tied=tied)
    source = open_source(tmp_path)
    check(source)
    assert source.schemes == SCHEMES
    assert source.kv_bits == 8
    model = load(source)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert (model.lm_head.store is model.model.embed_tokens.store) == tied
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, reference(ids).logits, atol=2e-2)
    assert all(one.device.type == "cpu" for one in (*model.parameters(), *model.buffers()))


def test_a_fitted_directory_loads_fake(tmp_path: Path) -> None:
    write_fitted(tmp_path, SCHEMES, tied=True)
    source = open_source(tmp_path)
    real = load(source)
    with FakeTensorMode():
        fake = load(source)
    left = {n: (t.shape, t.dtype) for n, t in (*fake.named_parameters(), *fake.named_buffers())}
    assert left == {n: (t.shape, t.dtype) for n, t in (*real.named_parameters(), *real.named_buffers())}


def test_two_copies_of_a_tied_weight_that_differ_are_refused(tmp_path: Path) -> None:
    write_fitted(tmp_path, SCHEMES, tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight_packed"] = tensors["lm_head.weight_packed"] ^ 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenInput, match=r"'lm_head.weight_packed' differs"):
        check(open_source(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("lm_head.weight_packed", None, r"'lm_head.weight_packed' .* missing"),
        ("lm_head.weight_scale", torch.ones(96, 2, dtype=torch.bfloat16), "has the shape"),
        ("lm_head.weight_packed", torch.ones(96, 12), "has the dtype"),
        ("model.norm.weight_packed", torch.ones(4, 4, dtype=torch.int32), "unexpected"),
        ("model.layers.1.mlp.up_proj.weight", None, "missing"),
    ],
)
def test_packed_parts_that_do_not_fit_are_refused(
    name: str, value: torch.Tensor | None, reason: str, tmp_path: Path
) -> None:
    write_fitted(tmp_path, SCHEMES, tied=False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for refused in (check, load):
        with pytest.raises(BrokenInput, match=reason):
            refused(open_source(tmp_path))


def test_experts_are_built_packed(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    model = source_from_config(config, weights=False).build()
    model.config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    scheme = Scheme(bits=4, group=32)
    for targets in (
        [r"re:.*mlp\.experts$"],
        [r"re:.*experts\.gate_up_proj", r"re:.*experts\.down_proj"],
        ["re:.*experts"],
    ):
        quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        raw["quantization_config"] = quantization | {"config_groups": {"g": group(targets, scheme)}}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        built = open_source(tmp_path).build()
        assert isinstance(built.model.layers[1].mlp.experts, PackedExperts)


def test_the_closest_target_decides() -> None:
    four, eight, three = (Scheme(bits=bits, group=32) for bits in (4, 8, 3))
    raw = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "a": group(["Linear"], four),
                "b": group([r"re:.*up_proj"], eight),
                "c": group(["x.up_proj"], three),
            },
            "ignore": ["lm_head", "re:.*gate"],
        }
    }
    modules = dict.fromkeys(("x.up_proj", "y.up_proj", "x.down", "x.gate", "lm_head"), "Linear") | {
        "e": "Embedding"
    }
    assert parse_schemes(raw, modules) == {"x.up_proj": three, "y.up_proj": eight, "x.down": four}
    assert parse_schemes({}, modules) == {}
