"""A narrower model computes what the whole one does with zeros in the place of what is gone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from memfit.errors import UsageError
from memfit.format.config import model_config
from memfit.source.check import check
from memfit.source.checkpoint import TensorInfo
from memfit.source.cuts import counts_of
from memfit.source.layout import Layout, Piece
from memfit.source.load import load
from memfit.source.narrowed import Kept, LiveCheckpoint, NarrowedCheckpoint, live_source, narrowed, stored_rows
from memfit.source.source import Source, open_source, source_from_config

DECODER: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GEMMA = DECODER | {
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**DECODER),
    "mistral": lambda: hf.MistralConfig(**DECODER),
    "qwen2": lambda: hf.Qwen2Config(**DECODER),
    "qwen3": lambda: hf.Qwen3Config(**DECODER, head_dim=16),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA),
    "mixtral": lambda: hf.MixtralConfig(**DECODER, num_local_experts=5),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **DECODER, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True
    ),
    "bert": lambda: hf.BertConfig(
        vocab_size=128, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, architectures=["BertModel"],
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=128, n_embd=48, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}  # fmt: skip
HEADS = {"llama": (6, 3), "mistral": (6, 3), "qwen2": (6, 3), "qwen3": (6, 3), "gemma3": (4, 1), "mixtral": (6, 3)}
READS_CHANNELS = {"bert": "output.dense", "gpt2": "mlp.c_proj"}


def source_of(family: str) -> Source:
    """A model by chance, in float64."""
    return live_source(load(source_from_config(FAMILIES[family]()), dtype=torch.float64))


def answers(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        out: Any = model(ids)
    found = out.logits if hasattr(out, "logits") else out.last_hidden_state
    assert isinstance(found, Tensor)
    return found


def loaded(source: Source) -> nn.Module:
    model: Any = load(source, dtype=torch.float64)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model


def blocks_of(model: Any) -> nn.ModuleList:
    found = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 4)
    assert isinstance(found, nn.ModuleList)
    return found


def zero_inputs(layer: Any, stay: list[int]) -> None:
    """What a layer multiplies the inputs with that do not stay becomes 0."""
    weight = layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.t()
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[stay] = False
    weight[:, gone] = 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "bert", "gpt2"])
def test_without_channels_it_is_the_whole_model_with_zeros_for_them(family):
    source = source_of(family)
    total = counts_of(source.config).channels
    kept = {block: tuple(range(block, total, 2))[: total // 2 - 2] for block in range(4)}
    view = narrowed(source, Kept(channels=kept))
    check(view)
    whole = loaded(source)
    for number, block in enumerate(blocks_of(whole)):
        zero_inputs(block.get_submodule(READS_CHANNELS.get(family, "mlp.down_proj")), list(kept[number]))
    torch.testing.assert_close(answers(loaded(view)), answers(whole), rtol=1e-12, atol=1e-12)
    assert counts_of(view.config).channels == total // 2 - 2


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral"])
def test_without_heads_it_is_the_whole_model_with_zeros_for_them(family):
    heads, groups = HEADS[family]
    source = source_of(family)
    if family == "gemma3":  # some of the heads that share one head of keys and values
        mine = {block: ((0, 2, 3) if block else (0, 1, 3)) for block in range(4)}
        kept = Kept(heads=mine, kv_heads=dict.fromkeys(range(4), (0,)))
    else:
        both = {block: (0, 2) if block % 2 else (1, 2) for block in range(4)}
        mine = {block: tuple(2 * group + n for group in both[block] for n in range(2)) for block in both}
        kept = Kept(heads=mine, kv_heads=both)
    view = narrowed(source, kept)
    check(view)
    whole = loaded(source)
    for number, block in enumerate(blocks_of(whole)):
        layer = block.get_submodule("self_attn.o_proj")
        each = layer.in_features // heads
        zero_inputs(layer, [head * each + n for head in mine[number] for n in range(each)])
    torch.testing.assert_close(answers(loaded(view)), answers(whole), rtol=1e-12, atol=1e-12)
    assert groups >= counts_of(view.config).kv_heads and view.config.head_dim == each


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "qwen3_moe", "bert", "gpt2"])
def test_without_blocks_it_is_the_whole_model_that_skips_them(family):
    source = source_of(family)
    view = narrowed(source, Kept(blocks=(0, 2, 3)))
    check(view)
    whole = loaded(source)
    blocks_of(whole)[1].forward = lambda hidden, *_, **__: hidden
    assert torch.equal(answers(loaded(view)), answers(whole))
    if family == "gemma3":
        assert view.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_without_experts_it_is_the_whole_model_whose_router_never_takes_them(family):
    source = source_of(family)
    kept = {block: (0, 2, 4) if block % 2 else (1, 2, 3) for block in range(4)}
    view = narrowed(source, Kept(experts=kept))
    check(view)
    whole = loaded(source)
    for number, block in enumerate(blocks_of(whole)):
        router = block.get_submodule("mlp.gate")

        def masked(hidden: Tensor, router: Any = router, stay: Any = kept[number]) -> Any:
            logits = nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
            gone = torch.full_like(logits, -torch.inf)
            gone[:, list(stay)] = logits[:, list(stay)]
            top, index = gone.float().softmax(-1).topk(router.top_k, dim=-1)
            return gone, (top / top.sum(-1, keepdim=True)).to(logits.dtype), index

        router.forward = masked
    torch.testing.assert_close(answers(loaded(view)), answers(whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "qwen3_moe", "bert", "gpt2"])
def test_the_config_that_is_written_builds_the_narrower_model_in_stock_transformers(family, tmp_path):
    source = source_of(family)
    kept: dict[str, Any] = {"blocks": (1, 3)}
    if family == "qwen3_moe":
        kept["experts"] = {1: (0, 2, 3), 3: (1, 2, 4)}
    else:
        kept["channels"] = {1: tuple(range(20)), 3: tuple(range(20))}
    view = narrowed(source, Kept(**kept))
    told = model_config(view.config, schemes={}, version="0") | {"architectures": view.config.architectures}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with torch.device("meta"):
        stock: Any = getattr(hf, told["architectures"][0])(hf.AutoConfig.from_pretrained(tmp_path))
    shapes = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    assert shapes == {name: view.parameters[name][0] for name in shapes}
    if family in ("qwen2", "gemma3"):
        assert len(stock.config.layer_types) == 2


def test_experts_that_are_stored_one_by_one_are_read_by_rows(tmp_path):
    model = load(source_from_config(FAMILIES["mixtral"]()), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)  # as w1, w2 and w3 of each expert
    stored = open_source(tmp_path)
    assert any(".experts.0." in name for name in stored.tensors)
    kept = Kept(experts=dict.fromkeys(range(4), (1, 4)))
    one, other = narrowed(stored, kept), narrowed(live_source(model), kept)
    for name in one.parameters:
        assert torch.equal(one.read_parameter(name), other.read_parameter(name, dtype=torch.bfloat16)), name
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = stored.read_parameter(name).flatten(0, 1)
    assert torch.equal(stored_rows(stored, name, 70, 130), whole[70:130])


def test_nothing_dropped_is_the_source_itself():
    source = source_of("llama")
    assert narrowed(source, Kept(blocks=(0, 1, 2, 3), channels={0: tuple(range(40))})) is source


NUMBERS = st.lists(st.integers(0, 39), min_size=1, unique=True).map(lambda found: np.asarray(sorted(found)))


@settings(deadline=None, max_examples=50)
@given(rows=NUMBERS, columns=NUMBERS, which=st.sampled_from(["rows", "columns", "both"]), data=st.data())
def test_any_rows_of_a_narrower_weight_are_those_of_all_of_it(weights, rows, columns, which, data):
    whole = weights.read_parameter("w")
    kept = (None if which == "columns" else rows, None if which == "rows" else columns)
    wanted = whole if kept[0] is None else whole[rows]
    wanted = wanted if kept[1] is None else wanted[:, columns]
    info = TensorInfo(name="w", dtype=whole.dtype, shape=tuple(wanted.shape), nbytes=wanted.nbytes, file=Path("w"))
    view = NarrowedCheckpoint(base=weights, tensors={"w": info}, parts={"w": ("w", kept)})
    start = data.draw(st.integers(0, wanted.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, wanted.shape[0]))
    assert torch.equal(view.read_rows("w", start, stop), wanted[start:stop])
    assert torch.equal(view.read("w"), wanted)


@pytest.fixture(scope="module")
def weights() -> Source:
    """A source of one weight [40, 40]."""
    source = live_source(load(source_from_config(FAMILIES["bert"]()), dtype=torch.float32))
    weight = torch.arange(1600.0).view(40, 40)
    made = dataclasses.replace(source, checkpoint=LiveCheckpoint(state={"w": weight}))
    layout = Layout(pieces={"w": (Piece(tensor="w"),)})
    made._cache.update(layout=layout, parameters={"w": ((40, 40), torch.float32, "w")}, buffers=frozenset(), prefix="")
    return made


def test_rows_beyond_one_block_of_reading_are_the_same(monkeypatch):
    monkeypatch.setattr("memfit.source.narrowed.BLOCK_NBYTES", 48 * 4 * 3)
    source = source_of("llama")
    stay = (0, 1, 5, 11, 12, 13, 30, 39)
    view = narrowed(source, Kept(channels=dict.fromkeys(range(4), stay)))
    name = "model.layers.3.mlp.gate_proj.weight"
    assert torch.equal(view.read_parameter(name), source.read_parameter(name)[list(stay)])


def test_it_is_loaded_alike_on_fake_tensors():
    view = narrowed(source_of("gemma3"), Kept(blocks=(1, 3), channels={1: tuple(range(8)), 3: tuple(range(8))}))
    real = load(view, dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = load(view, dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in real.named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in fake.named_parameters()} == shapes


def test_a_packed_checkpoint_is_refused():
    source = dataclasses.replace(source_of("llama"), raw={"quantization_config": {}})
    with pytest.raises(UsageError, match=r"packed\. Narrow the model that they were made from"):
        narrowed(source, Kept(blocks=(0,)))


@pytest.mark.parametrize(
    ("family", "kept", "told"),
    [
        ("bert", Kept(heads=dict.fromkeys(range(4), (0, 1))), "heads cannot be dropped from a 'bert' model"),
        ("gpt2", Kept(heads=dict.fromkeys(range(4), (0, 1))), "heads cannot be dropped from a 'gpt2' model"),
        ("mixtral", Kept(channels=dict.fromkeys(range(4), (0, 1))), "mlp.experts has them in experts"),
        ("llama", Kept(experts={0: (0,)}), "config counts none"),
        ("llama", Kept(channels={0: (0, 1), 1: (0,)}), "1 stay in one block and 2 in another"),
        ("llama", Kept(channels={0: (0, 1)}), "Not every block that has such a part"),
        ("llama", Kept(channels={0: (3, 1)}), "give rising numbers from 0 to 39"),
        ("llama", Kept(blocks=(0, 4)), "of the 4 blocks of the model, 0, 4 are to stay"),
        ("llama", Kept(blocks=()), "none are to stay"),
    ],
)
def test_what_cannot_be_dropped_is_refused_by_name(family, kept, told):
    with pytest.raises(UsageError, match=told):
        narrowed(source_of(family), kept)


def test_heads_that_transformers_does_not_take_are_refused():
    kept = Kept(heads=dict.fromkeys(range(4), (0, 1, 2, 3, 4)), kv_heads=dict.fromkeys(range(4), (0, 1, 2, 3, 4)))
    source = source_from_config(hf.LlamaConfig(**DECODER | {"num_key_value_heads": 6}))
    with pytest.raises(UsageError, match="not a multiple of the number of attention heads"):
        narrowed(source, kept)


def test_blocks_whose_number_is_part_of_what_they_compute_stay():
    config = FAMILIES["gpt2"]()
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UsageError, match="scale_attn_by_inverse_layer_idx, what they compute depends on their number"):
        narrowed(source_from_config(config), Kept(blocks=(0, 1)))


def test_two_stacks_are_refused():
    config = hf.T5Config(vocab_size=128, d_model=48, d_ff=40, num_layers=3, num_heads=4, d_kv=8)
    config.architectures = ["T5ForConditionalGeneration"]
    with pytest.raises(UsageError, match="one stack of 3 blocks; this 't5' model has"):
        narrowed(source_from_config(config), Kept(blocks=(0, 1)))


def test_what_stays_survives_json():
    kept = Kept(blocks=(0, 2), channels={0: (1, 2), 2: (0, 3)}, heads={0: (0,)}, kv_heads={0: (0,)})
    assert Kept.from_json(kept.to_json()) == kept
