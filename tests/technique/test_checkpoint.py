"""Checkpointed blocks, in any number of slices, have the gradients that plain ones have."""

import pytest
import torch
import transformers as hf

from memfit.account.structure import stacked_blocks
from memfit.technique.checkpoint import Checkpoint

DECODER = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0,
    "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "llama": (hf.AutoModelForCausalLM, hf.LlamaConfig(**DECODER)),
    "gpt2": (
        hf.AutoModelForCausalLM,
        hf.GPT2Config(
            vocab_size=160, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            bos_token_id=1, eos_token_id=2,
        ),
    ),
    "t5": (
        hf.AutoModelForSeq2SeqLM,
        hf.T5Config(
            vocab_size=160, d_model=64, d_ff=96, num_layers=2, num_heads=2, d_kv=32, dropout_rate=0,
            decoder_start_token_id=0,
        ),
    ),
    "bert": (
        hf.AutoModelForSequenceClassification,
        hf.BertConfig(
            vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        ),
    ),
    "mamba": (
        hf.AutoModelForCausalLM, hf.MambaConfig(vocab_size=160, hidden_size=64, num_hidden_layers=2, state_size=8),
    ),
}  # fmt: skip
ROWS = 6


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slices", [1, 2, 4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_plain_blocks(kind, slices, masked):
    auto, config = KINDS[kind]
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float64).train()
    ids = torch.randint(1, 160, (ROWS, 10), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": ids[:, 0] % 2 if kind == "bert" else ids, "use_cache": False}
    if masked:
        mask = torch.ones_like(ids)
        mask[::2, 7:] = 0
        inputs["attention_mask"] = mask
    plain = gradients(model, **inputs)
    with Checkpoint(blocks=tuple(name for name, _ in stacked_blocks(model)), slices=slices).on(model):
        found = gradients(model, **inputs)
    for name, gradient in plain.items():
        scale = max(gradient.abs().max().item(), 1e-6)
        # Mamba adds its state up in fp32, whatever the weights are.
        most = 1e-6 if kind == "mamba" else 1e-10
        assert (found[name] - gradient).abs().max().item() <= most * scale, name
