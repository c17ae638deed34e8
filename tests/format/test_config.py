import re
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig

from memfit.format.config import model_config, module_patterns, quantization_config
from memfit.packed.scheme import Scheme
from memfit.source.configuration import parse_schemes

INT8, INT4 = Scheme(bits=8, group=None), Scheme(bits=4, group=128)
INT3 = Scheme(bits=3, group=32, symmetric=False)


SYMMETRIC = Scheme(bits=3, group=32)


def test_eighty_layers_give_a_pattern_that_a_person_can_read() -> None:
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(80) for p in "qkv"]
    pattern = r"re:^model\.layers\.([0-9]|[1-7][0-9])\.self_attn\.(k_proj|q_proj|v_proj)$"
    assert module_patterns(names) == [pattern]


NAMES = st.sets(
    st.tuples(st.integers(0, 130), st.sampled_from(["a.q", "a.k", "mlp.e"]), st.integers(0, 12)), max_size=120
)


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_patterns_match_the_modules_and_no_others(found: set[tuple[int, str, int]]) -> None:
    names = {f"m.{i}.{what}.{j}" for i, what, j in found} | {"head", "m.1"}
    patterns = [re.compile(p.removeprefix("re:")) for p in module_patterns(names)]
    others = {f"m.{i}.{what}.{j}" for i, _, j in found for what in ("a.q", "a.k", "mlp.e", "a.x")}
    others |= {f"{i}{name}" for i, name in enumerate(names)} | {name + "0" for name in names}
    others |= {"m", "m.1.a", "m.11"}
    for name in names | others:
        assert sum(p.match(name) is not None for p in patterns) == (name in names), name


def test_schemes_are_read_back_from_the_configuration() -> None:
    schemes = {f"model.layers.{i}.up": (INT8, INT4, SYMMETRIC)[i % 3] for i in range(14)} | {"lm_head": INT8}
    raw = {"quantization_config": quantization_config(schemes, ignore=["model.layers.3.down"])}
    modules = dict.fromkeys([*schemes, "model.layers.3.down"], "Linear")
    assert parse_schemes(raw, modules, file=Path("config.json")) == schemes


def test_compressed_tensors_understands_the_configuration() -> None:
    config = quantization_config({"a": INT8, "b": INT4, "c": INT3}, ignore=["d"])
    read = QuantizationConfig(**config)
    weights = [group.weights for group in read.config_groups.values()]
    assert [(w.num_bits, str(w.strategy), w.group_size, w.symmetric) for w in weights] == [
        (8, "channel", None, True),
        (4, "group", 128, True),
        (3, "group", 32, False),
    ]


def test_a_module_cannot_be_quantized_and_ignored() -> None:
    with pytest.raises(ValueError, match="both quantized and ignored: a"):
        quantization_config({"a": INT8}, ignore=["a"])


@pytest.mark.parametrize("config", [LlamaConfig(tie_word_embeddings=True), Gemma3TextConfig()])
def test_a_tied_embedding_stays_tied_in_the_format_that_can_be(config: Any) -> None:
    config.architectures = ["SomeForCausalLM"]
    schemes = {"model.embed_tokens": INT8, "lm_head": INT8, "model.layers.0.up": INT8}
    tied = {"lm_head": "model.embed_tokens"}
    data = model_config(
        config, schemes=schemes, version="1", tied=tied, embeddings=[*tied, *tied.values()], kv_bits=8
    )
    assert type(config).from_dict(dict(data)).tie_word_embeddings is True
    assert data["memfit"] == {"version": "1", "tied": tied, "kv_bits": 8}
    assert (data["dtype"], data["architectures"]) == ("bfloat16", ["SomeForCausalLM"])
    quantization = data["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    assert [(g["format"], len(g["targets"])) for g in quantization["config_groups"].values()] == [
        ("int-quantized", 2),
        ("pack-quantized", 1),
    ]


def test_a_model_with_nothing_packed_has_no_quantization_config() -> None:
    data = model_config(Gemma3TextConfig(), schemes={}, version="1")
    assert "quantization_config" not in data
    assert data.get("tie_word_embeddings", True) is True
