"""Key-value caches of 16, 8, 4 or 2 bits, and what a dry run needs to know of them."""

import inspect
from collections.abc import Iterator
from typing import Any, Final

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
from memfit.packed.kv_states import GROUP, Axis, PackedStates, least_window

KV_BITS: Final = (16, 8, 4, 2)


class _Packed:
    """What both packed layers share: states live packed; `keys` and `values` are dense copies, on demand.

    Attention reads the tokens of its own call as they are, and earlier ones as the cache has them: a prompt that is
    read at once loses nothing, and no dense copy of it is made.
    """

    kv_bits: int
    window: int = 0
    """Tokens that later ones look back at; 0: all."""
    packed_keys: PackedStates | None
    packed_values: PackedStates | None
    is_initialized: bool

    @property
    def keys(self) -> Tensor | None:
        return None if self.packed_keys is None else self.packed_keys.dense()

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self.packed_keys = None if value is None else self._pack(value, "channel")

    @property
    def values(self) -> Tensor | None:
        return None if self.packed_values is None else self.packed_values.dense()

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self.packed_values = None if value is None else self._pack(value, "token")

    def _pack(self, states: Tensor, axis: Axis) -> PackedStates:
        return PackedStates(states, self.kv_bits, axis=axis, window=self.window)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def states(self) -> list[PackedStates]:
        return [states for states in (self.packed_keys, self.packed_values) if states is not None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.packed_keys is None or self.packed_values is None:
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        return self.packed_keys.extended(key_states), self.packed_values.extended(value_states)

    def get_seq_length(self) -> int:
        return self.packed_keys.length if self.packed_keys is not None else 0

    def reset(self) -> None:
        self.packed_keys = self.packed_values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for states in self.states():
            states.change(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for states in self.states():
            states.change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))


class PackedCacheLayer(_Packed, DynamicLayer):  # type: ignore[misc]
    """A full-attention layer of a cache with `kv_bits` bits; `update` returns temporaries of this layer."""

    def __init__(self, *, kv_bits: int) -> None:
        self.kv_bits = kv_bits
        super().__init__()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        for states in self.states():
            if tokens_to_remove:
                states.drop_last(-tokens_to_remove)


class PackedSlidingCacheLayer(_Packed, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer of a cache with `kv_bits` bits; it keeps the window, and what is left of a group."""

    def __init__(self, *, kv_bits: int, sliding_window: int) -> None:
        self.kv_bits, self.window = kv_bits, sliding_window - 1
        super().__init__(sliding_window=sliding_window)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0

    def activate_past_recording(self) -> None:
        raise UsageError("a packed sliding-window cache cannot take tokens back; use 16 kv_bits")

    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length >= self.sliding_window:
            raise UsageError("a packed sliding-window cache cannot take tokens back; use 16 kv_bits")
        for states in self.states():
            if tokens_to_remove:
                states.drop_last(abs(tokens_to_remove))
        self.cumulative_length = self.get_seq_length()


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


def generating_with(model: nn.Module, *, kv_bits: int) -> nn.Module:
    """The same model, whose `generate` keeps keys and values in `kv_bits` bits unless it is told of another cache.

    Its class becomes one below its own, of the same name: a function set on the model itself would hold on to it, and
    copies of the model to the first one.

    Raises:
        UsageError: as `make_cache`.
    """
    make_cache(model.config, kv_bits=kv_bits)
    kind: Any = type(model)
    argument = cache_argument(model)

    def generate(self: Any, *inputs: Any, **options: Any) -> Any:
        settings = options.get("generation_config") or self.generation_config
        said = [options.get(name, getattr(settings, name, None)) for name in ("use_cache", "cache_implementation")]
        if argument is not None and argument not in options and said[0] is not False and said[1] is None:
            options[argument] = make_cache(self.config, kv_bits=kv_bits)
        return kind.generate(self, *inputs, **options)

    model.__class__ = type(kind.__name__, (kind,), {"generate": generate, "__module__": kind.__module__})
    return model


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
        if layer.sliding_window - 1 <= least_window():
            return layer  # it would hold nothing but recent tokens, which are whole
        return PackedSlidingCacheLayer(kv_bits=kv_bits, sliding_window=layer.sliding_window)
    if type(layer) in _WITHOUT_KEYS:
        return layer
    raise UsageError(f"layer {index}: a {type(layer).__name__} has no form with {kv_bits} kv_bits; use 16")


def pieces(tokens: int) -> list[slice]:
    """A text of `tokens` tokens in pieces, as it has to be read for a packed cache to show: in a piece nothing is
    lost."""
    return [slice(start, min(start + GROUP, tokens)) for start in range(0, tokens, GROUP)]


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
        for part, tensor in value.tensors():
            yield f"{name}.{part}", tensor
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


def leaps(cache: Any, steps: int) -> list[int]:
    """Which of the next `steps` decode steps must be run for the worst moment of all to be among those run.

    A packed cache grows by leaps: as a group is quantised, its tokens are let go in 16 bits. Between two leaps all that
    is there only grows, and what a step takes after one leap it takes at least after the next of the same kind. So it
    is the last leaps that count, and the steps just before.
    """
    if isinstance(cache, EncoderDecoderCache):
        return leaps(cache.self_attention_cache, steps)
    found: set[int] = set()
    lengths = {
        (states.window, states.length): states
        for layer in getattr(cache, "layers", ())
        if isinstance(layer, _Packed)
        for states in layer.states()
    }
    for (_, length), states in lengths.items():
        for step in range(max(0, steps - GROUP - 1), steps):
            if states.layout(length + step) != states.layout(length + step + 1):
                found |= {max(step - 1, 0), step}
    return sorted(found)


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
    # What is kept depends on how many tokens there were, and not on how they came.
    for states in layer.states():
        batch, heads, _, width = states.whole.shape
        states.append(states.whole.new_empty(batch, heads, steps, width))
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length += steps


def _grow_nothing(layer: Any, steps: int) -> None:
    """States of a fixed size."""


_GROWTH: Final[dict[type, Any]] = {
    DynamicLayer: _grow_full,
    DynamicSlidingWindowLayer: _grow_sliding,
    LinearAttentionAndFullAttentionLayer: _grow_full,
    LinearAttentionAndSlidingWindowAttentionLayer: _grow_sliding,
    PackedCacheLayer: _grow_packed,
    PackedSlidingCacheLayer: _grow_packed,
    LinearAttentionLayer: _grow_nothing,
    DummyLayer: _grow_nothing,
}


def _grown(states: Tensor, tokens: int) -> Tensor:
    batch, heads, length, width = states.shape
    return states.new_empty(batch, heads, length + tokens, width)
