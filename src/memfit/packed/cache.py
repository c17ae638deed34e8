"""Key-value caches of 16, 8, 4 or 2 bits, and what a dry run needs to know of them.

B batch, H key-value heads, T tokens, D head width, b bits.
"""

import inspect
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from memfit.errors import UsageError
from memfit.packed.fake import is_fake

KV_BITS: Final = (16, 8, 4, 2)
BLOCK_NBYTES: Final = 4 * 2**20
"""Largest float32 transient of quantising."""


class PackedStates:
    """Keys or values [B, H, T, D] as uint8 [B, H, T, D·b/8]; a bf16 scale and minimum a token and head.

    x̂ = u · scale + minimum with u in 0..2^b − 1, so |x − x̂| ≤ scale/2 and what bf16 rounds.
    A byte holds, from the low bits up, the values j, j + D·b/8, j + 2·D·b/8, ... of the head.
    """

    def __init__(self, states: Tensor, bits: int) -> None:
        if states.shape[-1] % (8 // bits):
            raise UsageError(
                f"heads of {states.shape[-1]} do not fill whole bytes at {bits} bits; use more kv_bits"
            )
        self.bits, self.dtype = bits, states.dtype
        self.values, self.scales = _quantize(states, bits)

    @property
    def length(self) -> int:
        return int(self.values.shape[-2])

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.values, self.scales

    def append(self, states: Tensor) -> None:
        """Quantise `states` [B, H, t, D] and put them behind what is there."""
        values, scales = _quantize(states, self.bits)
        self.values = torch.cat([self.values, values], dim=-2)
        self.scales = torch.cat([self.scales, scales], dim=-2)

    def grow(self, tokens: int) -> None:
        """Make room as if `tokens` more had been appended; what is in it is undefined."""
        self.values, self.scales = _grown(self.values, tokens), _grown(self.scales, tokens)

    def keep_last(self, tokens: int) -> None:
        """Drop all but the last `tokens`, in memory too."""
        if tokens < self.length:
            self.values = self.values[:, :, self.length - tokens :].clone()
            self.scales = self.scales[:, :, self.scales.shape[-2] - tokens :].clone()

    def drop_last(self, tokens: int) -> None:
        """Drop the last `tokens`."""
        keep = self.length - tokens
        self.values, self.scales = self.values[:, :, :keep].clone(), self.scales[:, :, :keep].clone()

    def take(self, index: Tensor) -> None:
        """Keep the entries of the batch in `index`, in its order."""
        self.values, self.scales = self.values.index_select(0, index), self.scales.index_select(0, index)

    def repeat(self, times: int) -> None:
        self.values = self.values.repeat_interleave(times, dim=0)
        self.scales = self.scales.repeat_interleave(times, dim=0)

    def dense(self) -> Tensor:
        """[B, H, T, D] in the type that came in; one transient, of a byte for each value of a segment."""
        out = self.values.to(self.dtype) if self.bits == 8 else _unpacked(self.values, self.bits, self.dtype)
        scales = self.scales if self.scales.dtype == self.dtype else self.scales.to(self.dtype)
        return out.mul_(scales[..., :1]).add_(scales[..., 1:])


def _quantize(states: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[B, H, T, D] → uint8 [B, H, T, D·b/8] and bf16 [B, H, T, 2], a block of tokens at a time."""
    batch, heads, tokens, width = states.shape
    segments, levels = 8 // bits, 2**bits - 1
    length = width // segments
    packed = torch.empty(batch, heads, tokens, length, dtype=torch.uint8, device=states.device)
    scales = torch.empty(batch, heads, tokens, 2, dtype=torch.bfloat16, device=states.device)
    step = max(BLOCK_NBYTES // (batch * heads * width * 4), 1)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        x = states[:, :, start:stop].to(torch.float32)
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
        # The minimum and the scale are rounded to bf16, by up to 2^−8 of the minimum and 2^−9 of the scale:
        # widen the range by as much, or the largest value would be clipped.
        low = low.sub_(low.abs().mul_(2**-8)).to(torch.bfloat16).to(torch.float32)
        scale = high.sub_(low).mul_((1 + 2**-7) / levels).clamp_(min=2**-60).to(torch.bfloat16)
        scales[:, :, start:stop, :1].copy_(scale)
        scales[:, :, start:stop, 1:].copy_(low)
        x.sub_(low).div_(scale.to(torch.float32)).round_().clamp_(0, levels)
        u = x.to(torch.uint8)
        del x, low, high, scale
        block = packed[:, :, start:stop]
        block.copy_(u[..., :length])
        for i in range(1, segments):
            block.bitwise_or_(u[..., i * length : (i + 1) * length].bitwise_left_shift_(i * bits))
        del u
    return packed, scales


def _unpacked(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """uint8 [B, H, T, D·b/8] → u [B, H, T, D] in `dtype`."""
    length, segments = packed.shape[-1], 8 // bits
    out = torch.empty(*packed.shape[:-1], length * segments, dtype=dtype, device=packed.device)
    part = torch.empty(packed.shape, dtype=torch.uint8, device=packed.device)
    for i in range(segments):
        if i:
            torch.bitwise_right_shift(packed, i * bits, out=part)
            part.bitwise_and_(2**bits - 1)
        else:
            torch.bitwise_and(packed, 2**bits - 1, out=part)
        out[..., i * length : (i + 1) * length].copy_(part)
    return out


class _Packed:
    """What both packed layers share: states live packed; `keys` and `values` are dense copies, on demand."""

    kv_bits: int
    packed_keys: PackedStates | None
    packed_values: PackedStates | None
    is_initialized: bool

    @property
    def keys(self) -> Tensor | None:
        return None if self.packed_keys is None else self.packed_keys.dense()

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self.packed_keys = None if value is None else PackedStates(value, self.kv_bits)

    @property
    def values(self) -> Tensor | None:
        return None if self.packed_values is None else self.packed_values.dense()

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self.packed_values = None if value is None else PackedStates(value, self.kv_bits)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def states(self) -> list[PackedStates]:
        return [states for states in (self.packed_keys, self.packed_values) if states is not None]

    def stored_tokens(self) -> int:
        return self.packed_keys.length if self.packed_keys is not None else 0

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.packed_keys is None or self.packed_values is None:
            self.packed_keys = PackedStates(key_states, self.kv_bits)
            self.packed_values = PackedStates(value_states, self.kv_bits)
        else:
            self.packed_keys.append(key_states)
            self.packed_values.append(value_states)

    def dense(self) -> tuple[Tensor, Tensor]:
        assert self.packed_keys is not None and self.packed_values is not None
        return self.packed_keys.dense(), self.packed_values.dense()

    def reset(self) -> None:
        self.packed_keys = self.packed_values = None
        self.is_initialized = False
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for states in self.states():
            states.take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for states in self.states():
            states.repeat(repeats)


class PackedCacheLayer(_Packed, DynamicLayer):  # type: ignore[misc]
    """A full-attention layer of a cache with `kv_bits` bits; `update` returns temporaries of this layer."""

    def __init__(self, *, kv_bits: int) -> None:
        self.kv_bits = kv_bits
        super().__init__()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.append(key_states, value_states)
        return self.dense()

    def get_seq_length(self) -> int:
        return self.stored_tokens()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        for states in self.states():
            if tokens_to_remove:
                states.drop_last(-tokens_to_remove)


class PackedSlidingCacheLayer(_Packed, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer of a cache with `kv_bits` bits; it keeps the window only."""

    def __init__(self, *, kv_bits: int, sliding_window: int) -> None:
        self.kv_bits = kv_bits
        super().__init__(sliding_window=sliding_window)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[-2]
        self.append(key_states, value_states)
        dense = self.dense()
        for states in self.states():
            states.keep_last(self.sliding_window - 1)
        return dense

    def activate_past_recording(self) -> None:
        raise UsageError("a packed sliding-window cache cannot take tokens back; use 16 kv_bits")

    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length >= self.sliding_window:
            raise UsageError("a packed sliding-window cache cannot take tokens back; use 16 kv_bits")
        for states in self.states():
            if tokens_to_remove:
                states.drop_last(abs(tokens_to_remove))
        self.cumulative_length = self.stored_tokens()


_WITHOUT_KEYS: Final = (DummyLayer, LinearAttentionLayer)

# What models call their cache: transformers from 5.24, and before.
_ARGUMENTS: Final = ("cache", "past_key_values", "cache_params")


def cache_argument(model: nn.Module) -> str | None:
    """The name under which `model.forward` takes its cache; None where it takes none."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in _ARGUMENTS if name in names), None)


def keeps_keys(config: Any) -> bool:
    """Whether a decoder of `config` keeps keys and values, and not the states of a recurrence alone."""
    if getattr(config, "is_encoder_decoder", False):
        return False
    return not all(isinstance(layer, _WITHOUT_KEYS) for layer in DynamicCache(config=config).layers)


def make_cache(config: Any, *, kv_bits: int = 16) -> Cache:
    """An empty cache for a model of `config`, keys and values in `kv_bits` bits; 16: in the model's type.

    Raises:
        UsageError: `kv_bits` is none of 16, 8, 4, 2, or a layer's cache is of a kind that has no packed form.
    """
    if kv_bits not in KV_BITS:
        raise UsageError(f"kv_bits must be one of {', '.join(map(str, KV_BITS))}; got {kv_bits}")
    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderCache(_dynamic(config, kv_bits), _dynamic(config, kv_bits))
    return _dynamic(config, kv_bits)


def _dynamic(config: Any, kv_bits: int) -> DynamicCache:
    cache = DynamicCache(config=config)
    if kv_bits == 16:
        return cache
    if not cache.layers:
        raise UsageError(
            f"{type(config).__name__} does not say which layers keep keys and values; use 16 kv_bits"
        )
    cache.layers = [_packed_layer(layer, i, kv_bits) for i, layer in enumerate(cache.layers)]
    return cache


def _packed_layer(layer: Any, index: int, kv_bits: int) -> Any:
    if type(layer) is DynamicLayer:
        return PackedCacheLayer(kv_bits=kv_bits)
    if type(layer) is DynamicSlidingWindowLayer:
        return PackedSlidingCacheLayer(kv_bits=kv_bits, sliding_window=layer.sliding_window)
    if type(layer) in _WITHOUT_KEYS:
        return layer
    raise UsageError(f"layer {index}: a {type(layer).__name__} has no form with {kv_bits} kv_bits; use 16")


def cache_tensors(cache: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that `cache` keeps: `layers.3.keys`, `cross.layers.0.values`, ..."""
    if isinstance(cache, EncoderDecoderCache):
        yield from cache_tensors(cache.self_attention_cache)
        for name, tensor in cache_tensors(cache.cross_attention_cache):
            yield f"cross.{name}", tensor
        return
    for i, layer in enumerate(getattr(cache, "layers", ())):
        for key, value in vars(layer).items():
            for name, tensor in _tensors_in(key, value):
                yield f"layers.{i}.{name}", tensor


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, PackedStates):
        yield f"{name}.values", value.values
        yield f"{name}.scales", value.scales
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors_in(f"{name}.{i}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(f"{name}.{key}", item)


def cache_nbytes(cache: Any) -> int:
    """Bytes that `cache` keeps alive: each storage once and whole, as a view holds on to all of it."""
    storages = {}
    for _, tensor in cache_tensors(cache):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def skip(cache: Any, steps: int) -> bool:
    """Grow `cache` as if `steps` more tokens had been decoded one by one; on fake tensors only.

    Returns:
        False, and nothing is changed, if a layer is of a kind whose growth is not known here.
    """
    if isinstance(cache, EncoderDecoderCache):
        return skip(
            cache.self_attention_cache, steps
        )  # the other one holds the encoder's output and does not grow
    layers = getattr(cache, "layers", None)
    if layers is None or any(type(layer) not in _GROWTH for layer in layers):
        return False
    if any(not is_fake(tensor) for _, tensor in cache_tensors(cache)):
        raise ValueError("skip makes up the contents of a cache, so it is for fake tensors only")
    if steps > 0:
        for layer in layers:
            if getattr(layer, "is_initialized", False) or not isinstance(layer, DynamicLayer):
                _GROWTH[type(layer)](layer, steps)
    return True


def _grow_full(layer: Any, steps: int) -> None:
    layer.keys, layer.values = _grown(layer.keys, steps), _grown(layer.values, steps)


def _grow_sliding(layer: Any, steps: int) -> None:
    # What is kept is a view of the last step's whole result, one token more than the window once that is
    # full.
    kept = layer.sliding_window - 1
    before = min(layer.keys.shape[-2] + steps - 1, kept)
    for name in ("keys", "values"):
        states = getattr(layer, name)
        full = states.new_empty(*states.shape[:2], before + 1, states.shape[-1])
        setattr(layer, name, full[:, :, -kept:, :])
    layer.cumulative_length += steps


def _grow_packed(layer: Any, steps: int) -> None:
    for states in layer.states():
        states.grow(steps)


def _grow_packed_sliding(layer: Any, steps: int) -> None:
    for states in layer.states():
        states.grow(max(min(states.length + steps, layer.sliding_window - 1) - states.length, 0))
    layer.cumulative_length += steps


def _grow_nothing(layer: Any, steps: int) -> None:
    """States of a fixed size."""


_GROWTH: Final[dict[type, Any]] = {
    DynamicLayer: _grow_full,
    DynamicSlidingWindowLayer: _grow_sliding,
    LinearAttentionAndFullAttentionLayer: _grow_full,
    LinearAttentionAndSlidingWindowAttentionLayer: _grow_sliding,
    PackedCacheLayer: _grow_packed,
    PackedSlidingCacheLayer: _grow_packed_sliding,
    LinearAttentionLayer: _grow_nothing,
    DummyLayer: _grow_nothing,
}


def _grown(states: Tensor, tokens: int) -> Tensor:
    batch, heads, length, width = states.shape
    return states.new_empty(batch, heads, length + tokens, width)
