import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Gemma3TextConfig, LlamaConfig, MambaConfig, T5Config
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from memfit.errors import UsageError
from memfit.packed import cache as cache_file
from memfit.packed.cache import PackedStates, cache_nbytes, cache_tensors, make_cache, skip

LLAMA = LlamaConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
SLIDING = Gemma3TextConfig(
    num_hidden_layers=2,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
    head_dim=32,
)


def draw(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 2, tokens, 32, generator=generator) * 3 + torch.randn(1, generator=generator)
    return states.to(torch.bfloat16)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_states_come_back_within_half_a_step(bits, monkeypatch):
    monkeypatch.setattr(cache_file, "BLOCK_NBYTES", 4096)
    x = draw(37)
    packed = PackedStates(x, bits)
    packed.append(draw(3, seed=1))
    dense = packed.dense()[:, :, :37].double()
    scale, low = (packed.scales[:, :, :37, i : i + 1].double() for i in (0, 1))
    # Dequantising rounds the product and the sum to bf16, each by up to 2^-9 of what it is.
    rounding = 2**-8 * (low.abs() + (2**bits - 1) * scale)
    assert bool(((dense - x.double()).abs() <= scale / 2 + rounding).all())
    assert packed.values.nbytes == 2 * 2 * 40 * 32 * bits // 8


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_constant_states_come_back(bits):
    x = torch.full((1, 1, 2, 32), -2.5, dtype=torch.bfloat16)
    assert torch.allclose(PackedStates(x, bits).dense(), x, rtol=2**-6)
    assert not PackedStates(torch.zeros_like(x), bits).dense().any()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_sliding_layer_keeps_its_window_and_the_sizes_of_stock(bits):
    stock, packed = make_cache(SLIDING), make_cache(SLIDING, kv_bits=bits)
    for tokens in (5, 6, 1, 1):
        for layer in (0, 1):
            assert stock.get_mask_sizes(tokens, layer) == packed.get_mask_sizes(tokens, layer)
            expected = stock.update(draw(tokens), draw(tokens), layer)
            found = packed.update(draw(tokens), draw(tokens), layer)
            assert [t.shape for t in expected] == [t.shape for t in found]
            assert stock.get_seq_length(layer) == packed.get_seq_length(layer)
    assert packed.layers[0].stored_tokens() == 7
    assert packed.layers[1].stored_tokens() == 13


def test_bytes_are_those_of_the_planes_and_the_scales():
    cache = make_cache(LLAMA, kv_bits=4)
    for layer in range(2):
        cache.update(draw(10), draw(10), layer)
    tokens = 2 * 2 * 2 * 10 * 2  # layers, keys and values, batch, tokens, heads
    assert cache_nbytes(cache) == tokens * (32 // 2 + 4)
    assert {name for name, _ in cache_tensors(cache)} >= {
        "layers.0.packed_keys.values",
        "layers.1.packed_values.scales",
    }


def test_batches_are_reordered_repeated_and_cropped():
    cache = make_cache(LLAMA, kv_bits=8)
    keys, _ = cache.update(draw(6), draw(6), 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys, keys[[1, 0]])
    cache.layers[0].batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, keys[[1, 1, 0, 0]])
    cache.layers[0].crop(-2)
    assert cache.get_seq_length() == 4
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_nbytes(cache) == 0


def test_an_encoder_decoder_has_both_caches():
    config = T5Config(num_layers=2, num_decoder_layers=2, d_model=32, num_heads=2, d_kv=16)
    cache = make_cache(config, kv_bits=4)
    assert isinstance(cache, EncoderDecoderCache)
    cache.self_attention_cache.update(draw(3), draw(3), 0)
    cache.cross_attention_cache.update(draw(5), draw(5), 0)
    names = [name for name, _ in cache_tensors(cache)]
    assert "layers.0.packed_keys.values" in names and "cross.layers.0.packed_keys.values" in names
    assert cache.cross_attention_cache.layers[0].keys.shape == (2, 2, 5, 32)


def test_states_of_fixed_size_are_left_alone():
    cache = make_cache(MambaConfig(num_hidden_layers=2, hidden_size=32), kv_bits=4)
    assert not any(isinstance(layer, DynamicLayer) for layer in cache.layers)


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("config", [LLAMA, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("prompt", [3, 20])
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
    with pytest.raises(UsageError, match="heads of 5 do not fill whole bytes at 4 bits"):
        PackedStates(torch.zeros(1, 1, 1, 5), 4)
