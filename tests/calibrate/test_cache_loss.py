"""What a narrow KV cache costs, found block by block, is what the whole model says."""

import pytest
import torch
import transformers as hf

from memfit.calibrate.cache_loss import cache_losses
from memfit.packed.cache import cache_argument, make_cache
from memfit.source.load import load
from memfit.source.source import source_from_config

from .test_collect import CONFIGS, windows


def whole_model(source, ids, bits):
    """KL in float64, of the plain model and the same model with a packed cache."""
    torch.manual_seed(0)
    model = load(source, dtype=torch.float32)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits.double().log_softmax(-1)
        cache = make_cache(model.config, kv_bits=bits)
        packed = model(ids, use_cache=True, **{str(cache_argument(model)): cache}).logits.double().log_softmax(-1)
    return float((plain.exp() * (plain - packed)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "mixtral"])
def test_a_narrow_cache_costs_what_the_whole_model_shows(name):
    source = source_from_config(CONFIGS[name]())
    ids = windows(count=2)
    torch.manual_seed(0)
    found = cache_losses(source, ids, [4, 2], dtype=torch.float32)
    for bits in (4, 2):
        expected = whole_model(source, ids, bits)
        assert found[bits] == pytest.approx(expected, rel=2e-3, abs=3e-7)
        assert expected > 0
    assert found[2] > found[4]


@pytest.mark.parametrize("name", ["bert", "mamba", "t5"])
def test_nothing_is_said_of_models_without_such_a_cache(name):
    assert cache_losses(source_from_config(CONFIGS[name]()), windows(count=1), [8]) == {}


def test_the_vocabulary_may_pass_by_in_blocks(monkeypatch):
    from memfit.calibrate import stream

    source = source_from_config(hf.LlamaConfig(**{**CONFIGS["llama"]().to_dict(), "vocab_size": 500}))
    whole = cache_losses(source, windows(count=1), [2], dtype=torch.float32)
    monkeypatch.setattr(stream, "ROWS_NBYTES", 128 * 4 * 33)
    pieces = cache_losses(source, windows(count=1), [2], dtype=torch.float32)
    assert pieces[2] == pytest.approx(whole[2], rel=1e-4)
