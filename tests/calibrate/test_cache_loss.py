"""What a narrow KV cache costs, found block by block, is what the whole model says."""

import pytest
import torch
import transformers as hf

from memfit.account.watch import Unwatched
from memfit.calibrate.cache_loss import cache_losses, without_floor
from memfit.compress import calibrate
from memfit.packed.cache import cache_argument, make_cache
from memfit.plan.allowed import Allowed
from memfit.source.load import load
from memfit.source.source import source_from_config

from .test_collect import CONFIGS, windows

LENGTH = 200  # the last 72 tokens have packed ones before them


def config_of(name):
    config = CONFIGS[name]()
    config.max_position_embeddings = 256
    if name == "gemma3":
        config.sliding_window = 128
    return config


def whole_model(source, ids, bits):
    """KL in float64, of the model with a packed cache from the same with a plain one, in pieces of 64 tokens."""
    torch.manual_seed(0)
    model = load(source, dtype=torch.float32)

    def read(kind):
        cache, logits = make_cache(model.config, kv_bits=kind), []
        for piece in ids.split(64, dim=1):
            logits.append(model(piece, use_cache=True, **{str(cache_argument(model)): cache}).logits)
        return torch.cat(logits[2:], dim=1).double().log_softmax(-1)

    with torch.no_grad():
        plain, packed = read(16), read(bits)
    return float((plain.exp() * (plain - packed)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "mixtral"])
def test_a_narrow_cache_costs_what_the_whole_model_shows(name):
    source = source_from_config(config_of(name))
    ids = windows(count=2, length=LENGTH)
    torch.manual_seed(0)
    found = cache_losses(source, ids, [4, 2], dtype=torch.float32)
    for bits in (4, 2):
        expected = whole_model(source, ids, bits)
        assert found[bits] == pytest.approx(expected, rel=2e-3, abs=3e-7)
        assert expected > 0
    assert found[2] > found[4]


def test_a_width_costs_the_same_whatever_else_may_be_chosen():
    source = source_from_config(config_of("llama"))

    def price(*kv_bits: int) -> float:
        allowed = Allowed(bits=(8,), groups={8: (None,)}, kv_bits=kv_bits)
        found = calibrate(source, windows(count=2, length=LENGTH), allowed, batch=2, watch=Unwatched())
        return found.kv_prices[8]

    assert price(16, 8) == price(8) == price(16, 8, 4)


def test_nothing_is_said_of_windows_in_which_nothing_is_packed():
    source = source_from_config(config_of("llama"))
    assert cache_losses(source, windows(count=1, length=128), [8]) == {}
    assert cache_losses(source, windows(count=1, length=129), [8]).keys() == {8}


@pytest.mark.parametrize("name", ["bert", "mamba", "t5"])
def test_nothing_is_said_of_models_without_such_a_cache(name):
    assert cache_losses(source_from_config(CONFIGS[name]()), windows(count=1, length=LENGTH), [8]) == {}


def test_the_vocabulary_may_pass_by_in_blocks(monkeypatch):
    from memfit.calibrate import stream

    source = source_from_config(hf.LlamaConfig(**{**config_of("llama").to_dict(), "vocab_size": 500}))
    ids = windows(count=1, length=LENGTH).clamp_(max=499)
    whole = cache_losses(source, ids, [2], dtype=torch.float32)
    monkeypatch.setattr(stream, "ROWS_NBYTES", 128 * 4 * 33)
    pieces = cache_losses(source, ids, [2], dtype=torch.float32)
    assert pieces[2] == pytest.approx(whole[2], rel=2e-3)


def test_what_any_change_costs_is_told_from_what_fewer_bits_do() -> None:
    told = without_floor({8: 2e-4 + 1e-6, 4: 2e-4 + 256e-6, 2: 2e-4 + 0.05})
    assert told == pytest.approx({8: 1e-6, 4: 256e-6, 2: 0.05})
    assert without_floor({8: 1e-7, 4: 1e-3}) == {8: 1e-7, 4: 1e-3}  # less than that share: there is no floor
    assert without_floor({4: 1e-3}) == {4: 1e-3}
