import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Gemma3TextConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, MambaConfig, T5Config
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from memfit.errors import UsageError
from memfit.packed.cache import (
    PackedCacheLayer,
    cache_nbytes,
    cache_tensors,
    generating_with,
    leaps,
    make_cache,
    skip,
)
from memfit.packed.kv_states import least_window

LLAMA = LlamaConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
SLIDING = Gemma3TextConfig(
    num_hidden_layers=2,
    sliding_window=128,
    layer_types=["sliding_attention", "full_attention"],
    head_dim=32,
)


def draw(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 2, tokens, 32, generator=generator)
    return states.to(torch.bfloat16)


def fill(cache, tokens, layers=2, seed=0):
    return [cache.update(draw(tokens, seed), draw(tokens, seed + 1), layer) for layer in range(layers)]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_layers_give_the_sizes_of_stock_and_keep_what_they_say(bits):
    stock, packed = make_cache(SLIDING), make_cache(SLIDING, kv_bits=bits)
    for tokens in (50, 60, 1, 90, 1, 1, 70, 200):
        for layer in (0, 1):
            assert stock.get_mask_sizes(tokens, layer) == packed.get_mask_sizes(tokens, layer)
            expected = stock.update(draw(tokens), draw(tokens), layer)
            found = packed.update(draw(tokens), draw(tokens), layer)
            assert [t.shape for t in expected] == [t.shape for t in found]
            assert all(torch.equal(a[:, :, -tokens:], b[:, :, -tokens:]) for a, b in zip(expected, found, strict=True))
            assert stock.get_seq_length(layer) == packed.get_seq_length(layer)
    window = packed.layers[0].packed_keys
    assert window.seen == 127 and window.length == 473
    assert packed.layers[1].packed_keys.seen == 473


def test_a_text_read_in_pieces_is_the_stock_caches_within_the_rounding():
    stock, packed = make_cache(SLIDING), make_cache(SLIDING, kv_bits=8)
    for number, tokens in enumerate((120, 1, 80, 1)):
        for layer in (0, 1):
            states = draw(tokens, number), draw(tokens, number + 9)
            for expected, found in zip(stock.update(*states, layer), packed.update(*states, layer), strict=True):
                assert torch.allclose(expected, found, atol=0.1)
                assert number == 0 or layer == 0 or not torch.equal(expected, found)


def generated(model, **options):
    """Tokens that a model writes, and the kinds of layers that its cache has meanwhile."""
    seen = set()

    def watch(module, inputs, given):
        seen.update(type(layer) for layer in getattr(given.get("cache"), "layers", ()))

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    tokens = model.generate(torch.arange(1, 161).unsqueeze(0), max_new_tokens=4, do_sample=False, **options)
    handle.remove()
    return tokens, seen


def test_generate_keeps_the_cache_packed_unless_it_is_told_of_another():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=96,
        vocab_size=256,
    )  # fmt: skip
    stock = LlamaForCausalLM(config).eval()
    model = copy.deepcopy(generating_with(copy.deepcopy(stock), kv_bits=2))
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"
    tokens, kinds = generated(model)
    assert kinds == {PackedCacheLayer}
    own = {"cache": make_cache(config, kv_bits=2)}
    assert torch.equal(tokens, generated(stock, **own)[0])
    assert generated(model, num_beams=2)[1] == {PackedCacheLayer}
    assert generated(model, generation_config=GenerationConfig(num_beams=1))[1] == {PackedCacheLayer}
    for other in ({"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache": make_cache(config)}):
        found, kinds = generated(model, **other)
        assert PackedCacheLayer not in kinds and torch.equal(found, generated(stock)[0])


def test_bytes_are_those_of_codes_scales_and_what_is_whole():
    cache = make_cache(LLAMA, kv_bits=4)
    fill(cache, 300)
    keys, values = cache.layers[0].packed_keys, cache.layers[0].packed_values
    heads, packed, whole = 2 * 2, 256, 44
    assert cache_nbytes(cache) == 2 * heads * (2 * packed * 32 // 2 + 2 * whole * 32 * 2 + 4 * 32 * 4 + packed * 4)
    assert {tuple(keys.scales.shape), tuple(values.scales.shape)} == {(2, 2, 4, 2, 32), (2, 2, 256, 2, 1)}
    assert {name for name, _ in cache_tensors(cache)} >= {
        "layers.0.packed_keys.codes",
        "layers.1.packed_values.scales",
        "layers.1.packed_keys.whole",
    }


def test_batches_are_reordered_repeated_and_cropped():
    cache = make_cache(LLAMA, kv_bits=8)
    fill(cache, 200)
    keys = cache.layers[0].keys
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys, keys[[1, 0]])
    cache.layers[0].batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, keys[[1, 1, 0, 0]])
    cache.layers[0].batch_select_indices(torch.tensor([2]))
    assert torch.equal(cache.layers[0].keys, keys[[0]])
    cache.layers[0].crop(-2)
    assert cache.get_seq_length() == 198
    cache.layers[0].crop(-60)  # into a group
    assert torch.equal(cache.layers[0].keys, keys[[0], :, :138])
    with pytest.raises(ValueError, match="negative number of tokens to remove, got 5"):
        cache.layers[0].crop(5)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_nbytes(cache) == 0
    fill(cache, 3)
    assert cache.get_seq_length() == 3


def test_a_packed_window_that_is_full_takes_nothing_back():
    layer = make_cache(SLIDING, kv_bits=8).layers[0]
    layer.update(draw(120), draw(120))
    layer.crop(-30)
    assert layer.get_seq_length() == layer.cumulative_length == 90
    layer.update(draw(60), draw(60))
    for take in (lambda: layer.crop(-1), layer.activate_past_recording):
        with pytest.raises(UsageError, match="cannot take tokens back; use 16 kv_bits"):
            take()
    layer.reset()
    assert layer.get_seq_length() == 0


def test_a_window_of_recent_tokens_alone_stays_in_16_bits():
    config = Gemma3TextConfig(**{**SLIDING.to_dict(), "sliding_window": least_window() + 1})
    layers = make_cache(config, kv_bits=4).layers
    assert [type(layer).__name__ for layer in layers] == ["DynamicSlidingWindowLayer", "PackedCacheLayer"]


def test_an_encoder_decoder_has_both_caches():
    config = T5Config(num_layers=2, num_decoder_layers=2, d_model=32, num_heads=2, d_kv=16)
    cache = make_cache(config, kv_bits=4)
    assert isinstance(cache, EncoderDecoderCache)
    cache.self_attention_cache.update(draw(3), draw(3), 0)
    cache.cross_attention_cache.update(draw(150), draw(150), 0)
    names = [name for name, _ in cache_tensors(cache)]
    assert "layers.0.packed_keys.whole" in names and "cross.layers.0.packed_keys.codes" in names
    assert cache.cross_attention_cache.layers[0].keys.shape == (2, 2, 150, 32)


def test_states_of_fixed_size_are_left_alone():
    cache = make_cache(MambaConfig(num_hidden_layers=2, hidden_size=32), kv_bits=4)
    assert not any(isinstance(layer, DynamicLayer) for layer in cache.layers)


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("config", [LLAMA, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("prompt", [3, 95, 133])
def test_skipping_steps_keeps_what_taking_them_would(config, bits, prompt):
    def fill(cache, tokens):
        for layer in range(2):
            states = torch.zeros(2, 2, tokens, 32, dtype=torch.bfloat16)
            cache.update(states, states, layer)

    with FakeTensorMode():
        taken, skipped = make_cache(config, kv_bits=bits), make_cache(config, kv_bits=bits)
        for cache in (taken, skipped):
            fill(cache, prompt)
        for _ in range(9):
            fill(taken, 1)
        assert skip(skipped, 9)
        for cache in (taken, skipped):  # and both are ready for the next step
            fill(cache, 1)
        assert cache_nbytes(taken) == cache_nbytes(skipped)
        assert taken.get_seq_length() == skipped.get_seq_length()
        shapes = [[(name, t.shape) for name, t in cache_tensors(cache)] for cache in (taken, skipped)]
        assert shapes[0] == shapes[1]


@settings(max_examples=12, deadline=None)
@given(prompt=st.integers(1, 400), steps=st.integers(1, 220))
def test_the_steps_at_leaps_are_the_largest(prompt, steps):
    """Of what is kept before a step, after it, and with what attention reads, the most is in a step that a dry run
    takes: the first two, the last two, and those at leaps."""
    cache = make_cache(SLIDING, kv_bits=4)
    states = torch.zeros(1, 1, prompt, 8, dtype=torch.bfloat16)
    for layer in (0, 1):
        cache.update(states, states, layer)
    chosen = {0, min(1, steps - 1), max(steps - 2, 0), steps - 1, *leaps(cache, steps)}
    assert chosen <= set(range(steps)) and len(chosen) < 16
    seen = []
    for _ in range(steps):
        before = cache_nbytes(cache)
        dense = [cache.update(states[:, :, :1], states[:, :, :1], layer) for layer in (0, 1)]
        read = sum(t.untyped_storage().nbytes() for pair in dense for t in pair)
        after = cache_nbytes(cache)
        seen.append((before, after, before + read, before + read + after))
    for moment in range(4):
        assert max(at[moment] for at in seen) == max(seen[step][moment] for step in chosen)


def test_skipping_is_refused_on_real_tensors_and_unknown_layers():
    cache = make_cache(LLAMA)
    cache.update(draw(2), draw(2), 0)
    with pytest.raises(ValueError, match="fake tensors only"):
        skip(cache, 1)
    cache.layers.append(object())
    assert skip(cache, 1) is False


def test_bits_and_layers_without_a_form_are_refused():
    with pytest.raises(UsageError, match="kv_bits must be one of 16, 8, 4, 2; got 3"):
        make_cache(LLAMA, kv_bits=3)
