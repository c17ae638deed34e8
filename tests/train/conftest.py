"""A tiny language model whose embedding and head are tied, and batches with ignored labels."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = tuple(f"model.layers.{n}" for n in range(3))
VOCABULARY = 300


@pytest.fixture
def make_model():
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip

    def make(dtype=torch.float32):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(True)

    return make


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)

    def one():
        ids = torch.randint(0, VOCABULARY, (6, 24), generator=generator)
        ignored = torch.rand(6, 24, generator=generator) < torch.linspace(0, 0.6, 6).unsqueeze(1)
        return {"input_ids": ids, "labels": torch.where(ignored, -100, ids)}

    return [one() for _ in range(8)]
