"""Run a model for its answers: a prompt read at once (prefill), then token by token (decode).

The same lines run on fake tensors, to predict, and on real ones, to measure and to serve.
"""

import inspect
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memfit.account.watch import Watch
from memfit.packed.cache import KV_BITS, cache_argument, cache_tensors, keeps_keys, leaps, make_cache, skip

# Legend: B batch, T time, V vocabulary


@dataclass(frozen=True, kw_only=True)
class Infer:
    """Read prompts of `prompt` tokens, then write `new_tokens` more, for `batch` texts at once."""

    batch: int = 1
    prompt: int = 512
    new_tokens: int = 32
    kv_bits: int = 16
    """Bits of a number in the KV cache: 16, 8, 4 or 2."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt", 1), ("new_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.kv_bits not in KV_BITS:
            raise ValueError(f"kv_bits must be one of {', '.join(map(str, KV_BITS))}; got {self.kv_bits}")

    def to_json(self) -> dict[str, Any]:
        return {"task": "infer", **asdict(self)}

    def run(self, model: nn.Module, watch: Watch) -> None:
        """Run every phase once on `model`, telling `watch` where the task is.

        Encoders and models without a cache have no decode phase: their prompt is read, and that is all.
        """
        with torch.no_grad():
            runner = _runner_for(model, self)
            with watch.phase("prefill"):
                runner.token_B1 = runner.prefill()
                runner.tell(watch)
            if runner.decodes:
                self._decode(runner, watch)

    def _decode(self, runner: "_Runner", watch: Watch) -> None:
        """All steps; a dry run jumps over those, from the second on, between which the cache only grows."""
        left = self.new_tokens - 2
        if not watch.may_skip or left <= 2:
            return self._steps(runner, watch, self.new_tokens)
        self._steps(runner, watch, 2)
        at = 0
        for step in sorted({*runner.leaps(left), left - 2, left - 1}):
            # Outside of any phase: growing a cache at one blow is nothing that the model ever does.
            if step > at and not runner.jump(step - at):
                return self._steps(runner, watch, left - at)
            if step > at:
                runner.tell(watch)
            self._steps(runner, watch, 1)
            at = step + 1

    def _steps(self, runner: "_Runner", watch: Watch, steps: int) -> None:
        if not steps:
            return
        with watch.phase("decode"):
            for _ in range(steps):
                runner.token_B1 = runner.decode(runner.token_B1)
                runner.tell(watch)


def maker_of_caches(model: nn.Module, *, kv_bits: int) -> Any:
    """A function that makes an empty KV cache for `model`, or None where it has no cache."""
    config = getattr(model, "config", None)
    if config is None or _cache_argument(model) is None:
        return None
    return lambda: make_cache(config, kv_bits=kv_bits)


def takes_cache(model: nn.Module) -> bool:
    """Whether the model is a decoder whose keys and values go to a cache that it can be given."""
    return _cache_argument(model) is not None and keeps_keys(model.config)


def _cache_argument(model: nn.Module) -> str | None:
    if getattr(getattr(model, "config", None), "is_decoder", None) is False and not generates(model):
        return None
    return cache_argument(model)


def generates(model: nn.Module) -> bool:
    """Whether the model continues a text: it has a language-model head or is an encoder-decoder's."""
    can = getattr(model, "can_generate", None)
    return bool(can()) if callable(can) else False


class _Runner:
    """How one kind of model reads a prompt and the next token."""

    decodes = True
    token_B1: Tensor

    def __init__(self, model: nn.Module, task: Infer) -> None:
        self.model, self.task = model, task
        self.cache: Any = None

    def prefill(self) -> Tensor:
        raise NotImplementedError

    def decode(self, token_B1: Tensor) -> Tensor:
        raise NotImplementedError

    def jump(self, steps: int) -> bool:
        """Grow the cache as `steps` more tokens would; False where that cannot be done."""
        return self.cache is not None and skip(self.cache, steps)

    def leaps(self, steps: int) -> list[int]:
        """Which of the next `steps` steps a dry run has to take, beside the last two."""
        return [] if self.cache is None else leaps(self.cache, steps)

    def tell(self, watch: Watch) -> None:
        """Name what the cache holds."""
        if self.cache is not None:
            for name, tensor in cache_tensors(self.cache):
                watch.holds("kv_cache", name, tensor)

    def ids(self, tokens: int) -> Tensor:
        """Random token ids [B, T]."""
        generator = torch.Generator().manual_seed(0)
        size = (self.task.batch, tokens)
        return torch.randint(0, vocabulary(self.model), size, generator=generator).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter or buffer is."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.device.type != "meta":
                return tensor.device
        return torch.device("cpu")


def vocabulary(model: nn.Module) -> int:
    """How many token ids the model knows: its config's, else those of its first embedding."""
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None) or getattr(getattr(config, "text_config", None), "vocab_size", None)
    if size is None:
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        if not tables:
            raise ValueError(f"{type(model).__name__} has no embedding and no config: its inputs cannot be made up")
        size = tables[0].num_embeddings
    return int(size)


def _likeliest(logits_BTV: Tensor) -> Tensor:
    """The likeliest next token of each text, [B, 1]."""
    return logits_BTV[:, -1:].argmax(-1)


class _Decoder(_Runner):
    def __init__(self, model: nn.Module, task: Infer) -> None:
        super().__init__(model, task)
        self.argument = _cache_argument(model)
        names = inspect.signature(model.forward).parameters
        # Only the last position's logits are needed; a model that cannot say so makes them all.
        self.options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in names:
            self.options["logits_to_keep"] = 1

    def prefill(self) -> Tensor:
        self.cache = make_cache(self.model.config, kv_bits=self.task.kv_bits)
        return self._next(self.ids(self.task.prompt))

    def decode(self, token_B1: Tensor) -> Tensor:
        return self._next(token_B1)

    def _next(self, ids_BT: Tensor) -> Tensor:
        assert self.argument is not None
        out = self.model(input_ids=ids_BT, **{self.argument: self.cache}, **self.options)
        return _likeliest(out.logits)


class _EncoderDecoder(_Runner):
    def prefill(self) -> Tensor:
        self.cache = make_cache(self.model.config, kv_bits=self.task.kv_bits)
        self.encoded = self.model.get_encoder()(input_ids=self.ids(self.task.prompt))  # type: ignore[operator]
        start = getattr(self.model.config, "decoder_start_token_id", None) or 0
        return self.decode(torch.full((self.task.batch, 1), start, dtype=torch.int64, device=self.device))

    def decode(self, token_B1: Tensor) -> Tensor:
        given = {str(cache_argument(self.model)): self.cache}
        out = self.model(encoder_outputs=self.encoded, decoder_input_ids=token_B1, use_cache=True, **given)
        return _likeliest(out.logits)


class _Encoder(_Runner):
    decodes = False

    def prefill(self) -> Tensor:
        out = self.model(self.ids(self.task.prompt))
        return out if isinstance(out, Tensor) else out[0]


class _Recurrent(_Runner):
    """A plain module that returns (logits, state) and takes the state back."""

    def prefill(self) -> Tensor:
        return self._next(self.ids(self.task.prompt))

    def decode(self, token_B1: Tensor) -> Tensor:
        return self._next(token_B1, self.state)

    def jump(self, steps: int) -> bool:
        return True  # The state has one size, whatever the time.

    def _next(self, *inputs: Any) -> Tensor:
        logits_BTV, self.state = self.model(*inputs)
        return _likeliest(logits_BTV)


def _runner_for(model: nn.Module, task: Infer) -> _Runner:
    config = getattr(model, "config", None)
    if config is None:
        takes_state = "state" in inspect.signature(model.forward).parameters
        return _Recurrent(model, task) if takes_state else _Encoder(model, task)
    if getattr(config, "is_encoder_decoder", False):
        return _EncoderDecoder(model, task)
    if _cache_argument(model) is None or not generates(model):
        return _Encoder(model, task)
    return _Decoder(model, task)
