"""What memfit loads is what transformers loads, for every family, real and fake."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.source import fake_copy, load, open_source, source_from_config

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
GQA = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def configs() -> dict[str, t.PretrainedConfig]:
    """A tiny config for each family; built anew at each call, since models keep theirs."""
    return {
        "llama": t.LlamaConfig(**GQA, architectures=["LlamaForCausalLM"]),
        "llama_tied": t.LlamaConfig(**GQA, tie_word_embeddings=True),
        "qwen2": t.Qwen2Config(**GQA, tie_word_embeddings=True),
        "qwen3": t.Qwen3Config(**GQA, head_dim=8),
        "qwen3_moe": t.Qwen3MoeConfig(**GQA, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32),
        "mistral": t.MistralConfig(**GQA, sliding_window=8),
        "mixtral": t.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
        "gemma3": t.Gemma3TextConfig(
            **GQA, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
        "phi3": t.Phi3Config(**GQA, **ENDS),
        "gpt2": t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=96, **ENDS),
        "gpt_neox": t.GPTNeoXConfig(**SMALL, max_position_embeddings=64, **ENDS),
        "opt": t.OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
            word_embed_proj_dim=32, max_position_embeddings=64, **ENDS,
        ),
        "falcon": t.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        **ENDS),
        "mamba": t.MambaConfig(
            hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=96, time_step_rank=4, **ENDS
        ),
        "bert": t.BertConfig(**SMALL, max_position_embeddings=64, architectures=["BertModel"]),
        "t5": t.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0,
            architectures=["T5ForConditionalGeneration"],
        ),
    }  # fmt: skip


FAMILIES = list(configs())


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    more = {"decoder_input_ids": ids} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        out = model(input_ids=ids, **more)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def prompt() -> torch.Tensor:
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def assert_equal_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        left, right = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert left.keys() == right.keys()  # the same ties, too: a tied one appears once
        for name, tensor in left.items():
            assert tensor.dtype == right[name].dtype, name
            assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_by_chance_run_as_in_transformers(family: str) -> None:
    ours = load(source_from_config(configs()[family]))
    theirs = type(ours)(configs()[family]).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(logits(ours, prompt()), logits(theirs, prompt()))
    assert_equal_tensors(ours, theirs)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    cls = type(source_from_config(configs()[family]).build())
    torch.manual_seed(0)
    cls(configs()[family]).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    for dtype in (None, torch.bfloat16):
        theirs = cls.from_pretrained(tmp_path, **({} if dtype is None else {"dtype": dtype})).eval()
        ours = load(source, dtype=dtype)
        assert_equal_tensors(ours, theirs)
        assert torch.equal(logits(ours, prompt()), logits(theirs, prompt()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_code_loads_fake_tensors(family: str) -> None:
    source = source_from_config(configs()[family])
    real = load(source, dtype=torch.bfloat16)
    with FakeTensorMode():
        fake = load(source, dtype=torch.bfloat16)
    for left, right in (
        (fake.named_parameters(), real.named_parameters()),
        (fake.named_buffers(), real.named_buffers()),
    ):
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in right}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in left} == shapes
    assert all(isinstance(one, FakeTensor) for one in (*fake.parameters(), *fake.buffers()))
    assert all(one.device.type == "cpu" for one in (*fake.parameters(), *fake.buffers()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "t5"])
def test_build_holds_no_weights(family: str) -> None:
    model = source_from_config(configs()[family], weights=False).build()
    assert all(p.device.type == "meta" for p in model.parameters())
    assert all(b.device.type == "cpu" for b in model.buffers())


class Largest(TorchDispatchMode):
    """The most bytes that one operator's output has."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "empty" in str(func):
            self.nbytes.append(out.numel() * out.dtype.itemsize)
        return out


def test_a_cast_goes_through_a_small_block(tmp_path: Path) -> None:
    whole = {"weight": torch.randn(3000, 1000)}
    save_file(whole, tmp_path / "model.safetensors")
    from memfit.source.safetensors import open_checkpoint

    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint is not None
    out = torch.empty(3000, 1000, dtype=torch.bfloat16)
    with Largest() as seen:
        checkpoint.read_into("weight", out)
    assert torch.equal(out, whole["weight"].bfloat16())
    assert seen.nbytes == [4 << 20]
    with FakeTensorMode() as mode, Largest() as predicted:
        checkpoint.read_into("weight", mode.from_tensor(out))
    assert predicted.nbytes[-1:] == seen.nbytes


def test_a_row_of_experts_is_read_where_it_belongs(tmp_path: Path) -> None:
    config = configs()["qwen3_moe"]
    config.num_experts = 12  # so that expert 10 sorts before expert 2 as text
    model = type(source_from_config(config).build())(config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    fused = source.read_parameter("model.layers.1.mlp.experts.gate_up_proj")
    for expert in range(12):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        both = torch.cat([stored[f"{prefix}.gate_proj.weight"], stored[f"{prefix}.up_proj.weight"]])
        assert torch.equal(fused[expert], both)


def test_the_base_model_s_prefix_may_be_missing(tmp_path: Path) -> None:
    cls = type(source_from_config(configs()["gpt2"]).build())
    model = cls(configs()["gpt2"])
    model.transformer.save_pretrained(tmp_path)
    config = model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}
    type(model.config).from_dict(config).save_pretrained(tmp_path)
    ours = load(open_source(tmp_path))
    assert_equal_tensors(ours, cls.from_pretrained(tmp_path))


def test_a_config_alone_can_be_built_and_loaded_fake(tmp_path: Path) -> None:
    configs()["llama"].save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert source.checkpoint is None and source.tensors == {}
    assert source.parameter_shapes()["model.layers.0.mlp.up_proj.weight"] == (64, 32)
    with FakeTensorMode():
        model = load(source, dtype=torch.bfloat16)
    assert model.lm_head.weight.shape == (96, 32)


def test_a_module_s_place_is_asked_by_name() -> None:
    asked: list[str] = []

    def place(name: str) -> str:
        asked.append(name)
        return "meta" if "layers.1" in name else "cpu"

    model = load(source_from_config(configs()["llama"]), place=place)
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "cpu"
    assert "model.embed_tokens.weight" in asked


def test_a_fake_copy_keeps_ties_and_leaves_the_original_alone() -> None:
    module = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    module[3].weight = module[0].weight
    module.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with FakeTensorMode():
        copy = fake_copy(module)
    assert copy[3].weight is copy[0].weight
    assert all(isinstance(one, FakeTensor) for one in (*copy.parameters(), *copy.buffers()))
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(isinstance(one, FakeTensor) for one in (*module.parameters(), *module.buffers()))


def test_a_fake_copy_shares_storages_that_are_shared() -> None:
    module = nn.LSTM(8, 8, num_layers=2)
    views = nn.Module()
    whole = torch.randn(4, 6)
    views.register_buffer("whole", whole)
    views.register_buffer("part", whole[1:3].t())
    with FakeTensorMode():
        assert fake_copy(module)(torch.empty(3, 2, 8))[0].shape == (3, 2, 8)
        copy = fake_copy(views)
    assert copy.part.untyped_storage()._cdata == copy.whole.untyped_storage()._cdata
    assert copy.part.stride() == views.part.stride() and copy.part.storage_offset() == 6


def test_a_fake_copy_needs_a_fake_mode() -> None:
    with pytest.raises(RuntimeError, match="FakeTensorMode"):
        fake_copy(nn.Linear(2, 2))
