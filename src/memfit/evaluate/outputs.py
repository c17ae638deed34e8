"""What a model says of windows of tokens, a few positions at a time, whatever its kind.

Legend: B windows at once, T time, P positions predicted, C positions of a chunk, V vocabulary, D width.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from memfit.errors import UsageError
from memfit.packed.cache import cache_argument, pieces

Kind = Literal["causal", "masked", "seq2seq", "classifier", "encoder"]
MakeCache = Callable[[], Any]

CHUNK_NBYTES: Final = 64 * 2**20
# Bytes for each logit of a chunk at the worst moment of a comparison: both sides as the models give them
# (at most 4 each), and three in float32, or two and what `float()` makes on the way.
LOGIT_NBYTES: Final = 2 * 4 + 3 * 4


def kind_of(model: nn.Module) -> Kind:
    """What the model predicts: the next token, masked tokens, a second text, a class, or embeddings only."""
    config = getattr(model, "config", None)
    if config is None:
        # A plain module that returns logits, or logits and a state, is a model of the next token.
        return "causal"
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "classifier"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    can_generate = getattr(model, "can_generate", lambda: False)()
    if head is None and not can_generate:
        return "encoder"
    masked = any(part in type(model).__name__ for part in ("MaskedLM", "PreTraining"))
    return "masked" if masked or not can_generate else "causal"


def positions(kind: Kind, length: int) -> int:
    """P: how many positions of a window of `length` tokens are compared.

    Causal: all whose next token is in the window. Masked: all. Seq2seq: the second half, which the decoder
    writes after the encoder has read the first. A classifier says one thing of a window.
    """
    return {
        "causal": length - 1,
        "masked": length,
        "seq2seq": length - length // 2,
        "classifier": 1,
        "encoder": 0,
    }[kind]


def targets(kind: Kind, ids_BT: Tensor) -> Tensor | None:
    """The tokens [B, P] that the text has at the positions; None where none is predicted."""
    if kind == "causal":
        return ids_BT[:, 1:]
    if kind == "seq2seq":
        return ids_BT[:, ids_BT.shape[1] // 2 :]
    return None


def chunk_of(batch: int, vocabulary: int) -> int:
    """C: positions at a time, so that a comparison of B · C · V logits stays below `CHUNK_NBYTES`."""
    return max(1, CHUNK_NBYTES // (batch * vocabulary * LOGIT_NBYTES))


def logits_in_chunks(
    model: nn.Module, ids_BT: Tensor, *, make_cache: MakeCache | None = None
) -> Iterator[Tensor]:
    """Logits [B, C, V] of the positions of `ids_BT`, in order; the chunks depend on B and V only.

    The body of the model runs once; its head is then asked for a few positions at a time, by the model's own
    code (`logits_to_keep`), so that scaling and capping of logits are the model's. A model whose body cannot
    be told from its head gives all logits at once.
    """
    kind = kind_of(model)
    ids_BT = ids_BT.to(device_of(model))
    body = _body(model) if kind == "causal" else None
    heard = _hear(model, body, ids_BT, make_cache) if body is not None else None
    last = positions(kind, ids_BT.shape[1])
    if body is None or heard is None:
        logits_BTV = _whole(model, kind, ids_BT, make_cache)
        chunk = chunk_of(ids_BT.shape[0], logits_BTV.shape[-1])
        for start in range(0, last, chunk):
            yield logits_BTV[:, start : min(start + chunk, last)]
        return
    output, vocabulary = heard
    chunk = chunk_of(ids_BT.shape[0], vocabulary)
    for start in range(0, last, chunk):
        with _replayed(body, output):
            keep = torch.arange(start, min(start + chunk, last))
            logits_BCV = model(input_ids=ids_BT, use_cache=False, logits_to_keep=keep).logits
        yield logits_BCV


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: the device of its first parameter, or of its first buffer where all is packed."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def embeddings(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Mean over time of the last hidden states [B, D], float32."""
    output = model(input_ids=ids_BT.to(device_of(model)))
    hidden_BTD = output[0] if not isinstance(output, Tensor) else output
    return hidden_BTD.float().mean(1)


def _whole(model: nn.Module, kind: Kind, ids_BT: Tensor, make_cache: MakeCache | None) -> Tensor:
    """All logits at once, [B, P or T, V]."""
    logits: Tensor
    if kind == "seq2seq":
        half = ids_BT.shape[1] // 2
        config: Any = model.config
        start = config.decoder_start_token_id or 0
        shifted_BP = torch.cat([torch.full_like(ids_BT[:, :1], start), ids_BT[:, half:-1]], dim=1)
        given: dict[str, Any] = {"input_ids": ids_BT[:, :half]}
        cache, parts = _cache_options(model, make_cache), []
        for piece in _pieces(shifted_BP, make_cache):
            output = model(**given, decoder_input_ids=piece, **cache)
            parts.append(output.logits)
            given = {"encoder_outputs": (output.encoder_last_hidden_state,)}
        return _joined(parts)
    if getattr(model, "config", None) is None:
        plain = model(ids_BT)
        logits = plain if isinstance(plain, Tensor) else plain[0]
    elif kind == "causal":
        cache = _cache_options(model, make_cache)
        logits = _joined([model(input_ids=piece, **cache).logits for piece in _pieces(ids_BT, make_cache)])
    else:
        output = model(input_ids=ids_BT)
        logits = output.prediction_logits if "prediction_logits" in output else output.logits
    return logits[:, None] if kind == "classifier" else logits


def _pieces(ids_BT: Tensor, make_cache: MakeCache | None) -> list[Tensor]:
    """The text whole; with a cache, in pieces that are read one after the other, so that the cache is used."""
    return [ids_BT] if make_cache is None else [ids_BT[:, part] for part in pieces(ids_BT.shape[1])]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _cache_options(model: nn.Module, make_cache: MakeCache | None) -> dict[str, Any]:
    if make_cache is None:
        return {"use_cache": False}
    argument = cache_argument(model)
    if argument is not None:
        return {argument: make_cache(), "use_cache": True}
    raise UsageError(f"{type(model).__name__} takes no cache, so its quality cannot be measured with one.")


def _body(model: nn.Module) -> nn.Module | None:
    """The module that turns ids into hidden states, where the head can be asked for a few positions."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    body = getattr(model, "base_model", None)
    inner = getattr(body, "decoder", None)
    # OPT and its kin call `model.model.decoder`, past the body's own forward.
    if isinstance(inner, nn.Module) and getattr(model, "get_decoder", lambda: None)() is inner:
        body = inner
    return body if isinstance(body, nn.Module) and body is not model else None


def _hear(
    model: nn.Module, body: nn.Module, ids_BT: Tensor, make_cache: MakeCache | None
) -> tuple[Any, int] | None:
    """Read the text once: the body's output, and V. None if the body was not called (no replay)."""
    caught: list[Any] = []
    states: list[Tensor] = []

    def catch(module: nn.Module, inputs: Any, output: Any) -> None:
        caught[:] = [output]
        states.append(output.last_hidden_state)

    hook = body.register_forward_hook(catch)
    options = _cache_options(model, make_cache)
    try:
        for piece in _pieces(ids_BT, make_cache):
            # One position only: the rest of the head's work is done chunk by chunk.
            logits_B1V = model(input_ids=piece, logits_to_keep=1, **options).logits
    finally:
        hook.remove()
    if not caught:
        return None
    caught[0].last_hidden_state = _joined(states)
    return caught[0], logits_B1V.shape[-1]


@contextmanager
def _replayed(body: nn.Module, output: Any) -> Iterator[None]:
    """Inside, `body` gives `output` whatever it is asked."""
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del body.forward
