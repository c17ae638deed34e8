"""A model whose products are of integers, loaded from its files: predicted to the byte."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from memfit.account.ask import ask_integer_product
from memfit.format.config import model_config
from memfit.format.output import stored_tensors
from memfit.format.safetensors import Writer
from memfit.models import load_model
from memfit.packed.scheme import Scheme
from memfit.source.source import open_source, source_from_config
from memfit.task.infer import Infer

A8 = Scheme(bits=8, group=None, activations=8)
CONFIG = {
    "vocab_size": 256, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: Any) -> Path:
    """Files of a Llama with all of its linear layers in W8A8 and the table in W8A16."""
    path: Path = tmp_path_factory.mktemp("w8a8")
    config = LlamaConfig(**CONFIG, tie_word_embeddings=False)
    model = source_from_config(config).build(dtype=torch.bfloat16)
    schemes = {name: A8 for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    schemes["model.embed_tokens"] = Scheme(bits=8, group=None)
    stored = stored_tensors(model, schemes)
    with Writer(path, stored.specs) as writer:
        for spec in stored.specs:
            ones = torch.ones(spec.shape, dtype=spec.dtype)
            writer.write(spec.name, ones if not spec.name.endswith("scale") else ones * 0.01)
    raw = model_config(
        config, schemes=schemes, version="0", ignore=stored.ignore, embeddings=stored.embeddings, tied=stored.tied
    )
    (path / "config.json").write_text(json.dumps(raw | {"architectures": ["LlamaForCausalLM"]}))
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prompt", [24, 700])
def test_prediction_equals_measurement_to_the_byte(
    fitted: Path, dtype: torch.dtype, prompt: int, predicted: Callable[..., Any], measured: Callable[..., Any],
    monkeypatch: Any,
) -> None:  # fmt: skip
    from memfit.packed import integer

    # So few that 700 tokens are rounded in many blocks.
    monkeypatch.setattr(integer, "TOKENS_NBYTES", 32768)
    source = open_source(fitted)
    assert set(source.schemes.values()) == {A8, Scheme(bits=8, group=None)}

    def make() -> nn.Module:
        return load_model(source, dtype=dtype)

    task = Infer(batch=1, prompt=prompt, new_tokens=3)
    told, found = predicted(make, task), measured(make, task)
    for one, other in zip(told.phases, found.phases, strict=True):
        assert (one.name, one.peak_nbytes, one.end_nbytes) == (other.name, other.peak_nbytes, other.end_nbytes)
        # At the peak of loading the prediction knows what is there by then, the measurement what was there at its end.
        assert one.name == "load" or one.alive["parameter"] == other.alive["parameter"]
    whole = predicted(make, task, whole=True)
    assert whole.phases == told.phases and whole.entries == told.entries


def test_scratch_of_large_products_is_told_by_smaller_ones(monkeypatch: Any) -> None:
    from memfit.account import ask

    left, out = torch.empty(3000, 256, dtype=torch.uint8), torch.empty(3000, 2500, dtype=torch.bfloat16)
    monkeypatch.setattr(ask, "_remainder_kept", lambda size, period: size)
    exact = ask_integer_product(left, out)
    monkeypatch.undo()
    # With AMX it is 11 to 13 KiB, as the tiles of the last columns fall; without, the same.
    slack = 1024 if torch.cpu._is_amx_tile_supported() else 0
    assert abs(ask_integer_product(left, out) - exact) <= slack and exact > 0
