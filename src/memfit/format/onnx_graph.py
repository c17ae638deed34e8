"""A model's ONNX graph, traced on fake tensors: its weights are named and shaped, and nowhere.

Inputs and outputs are named as optimum and onnxruntime-genai name them. A decoder takes `input_ids`,
`attention_mask` (of past and new tokens), `position_ids` where its model does, and `past_key_values.N.key/value`
[batch, heads, past, width], and gives `logits` and `present.N.key/value`. An encoder takes what its tokenizer gives and
gives `last_hidden_state` or `logits`.
"""

import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from memfit.errors import UsageError
from memfit.format.onnx_modules import Part, put_onnx_modules
from memfit.packed.cache import cache_argument
from memfit.source.source import Source
from memfit.task.infer import takes_cache

OPSET: Final = 21
_BATCH, _PAST, _NEW = 2, 3, 5
"""Sizes to trace with: different, and none of 0 and 1, which a trace takes for constants."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A graph without weights."""

    model: Any
    """onnx_ir's; its large initializers have no values."""
    parts: Mapping[str, Part]
    """Initializer to what it is read from, in the order of the graph."""


def require_onnx() -> None:
    """Raise UsageError unless the libraries that ONNX files need are there."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format onnx needs {' and '.join(missing)}, not installed here. Run: pip install 'memfit[onnx]'"
        )


def trace_graph(source: Source, *, accuracy_level: int = 0) -> Traced:
    """The graph of a fitted model; no weight is read.

    Args:
        source: of the fitted directory, or as planned.
        accuracy_level: see `put_onnx_modules`.

    Raises:
        UsageError: the model is of a kind that has no form in ONNX, or cannot be traced; names it.
    """
    require_onnx()
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    model = source.build(dtype=torch.float32)
    require_kind(model)
    with mode, torch.no_grad():
        parts = put_onnx_modules(model, source, accuracy_level=accuracy_level)
        wrapped = _Decoder(model) if takes_cache(model) else _Encoder(model)
        inputs, axes = wrapped.inputs()
    arguments, shapes = tuple(inputs.values()), tuple(_dims(axes))
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(wrapped, arguments, dynamic_shapes=(shapes,), strict=False)
            made: Any = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    except Exception as error:  # a model's code raises whatever a tracer makes it raise
        raise UsageError(
            f"{source.name}: a {type(model).__name__} cannot be traced into an ONNX graph "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}). Choose another format."
        ) from error
    return _named(made.model, parts, tuple(inputs), axes, wrapped.outputs())


def require_kind(model: nn.Module) -> None:
    """Raise UsageError where a model keeps anything but keys and values from token to token, or is of two halves."""
    config: Any = model.config
    kind = f"{type(model).__name__} ({config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{kind}: an encoder-decoder is not written as ONNX, only decoders and encoders. Choose another format."
        )
    if cache_argument(model) is None:
        return
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UsageError(
                f"{kind}: layer {index} keeps a {type(layer).__name__}, and an ONNX file of memfit's holds keys and "
                "values alone. Choose another format."
            )


class _Wrapped(nn.Module):
    """A model whose inputs and outputs are flat."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.taken = inspect.signature(model.forward).parameters
        self.eval()

    def ids(self, tokens: int) -> Tensor:
        return torch.ones(_BATCH, tokens, dtype=torch.int64)


class _Decoder(_Wrapped):
    """Logits and the grown cache. The cache keeps every token; windows are the mask's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.names = ["input_ids", "attention_mask"] + (["position_ids"] if "position_ids" in self.taken else [])
        self.argument = str(cache_argument(model))
        cache = DynamicCache()
        model(input_ids=self.ids(2), use_cache=True, **{self.argument: cache})
        self.kept = [(layer.keys.shape, layer.values.shape) for layer in cache.layers]

    def inputs(self) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
        """Fake inputs by name, and the names of their sizes that may change."""
        given = {
            "input_ids": self.ids(_NEW),
            "attention_mask": self.ids(_PAST + _NEW),
            "position_ids": self.ids(_NEW),
        }
        axes = {
            "input_ids": {0: "batch_size", 1: "sequence_length"},
            "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
            "position_ids": {0: "batch_size", 1: "sequence_length"},
        }
        found = {name: given[name] for name in self.names}
        sizes = {name: axes[name] for name in self.names}
        for index, shapes in enumerate(self.kept):
            for part, (_, heads, _, width) in zip(("key", "value"), shapes, strict=True):
                found[f"past_key_values.{index}.{part}"] = torch.empty(_BATCH, heads, _PAST, width)
                sizes[f"past_key_values.{index}.{part}"] = {0: "batch_size", 2: "past_sequence_length"}
        return found, sizes

    def outputs(self) -> dict[str, dict[int, str]]:
        sizes = {"logits": {0: "batch_size", 1: "sequence_length"}}
        for index in range(len(self.kept)):
            for part in ("key", "value"):
                sizes[f"present.{index}.{part}"] = {0: "batch_size", 2: "total_sequence_length"}
        return sizes

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(self.names)
        given, past = dict(zip(self.names, inputs[:count], strict=True)), inputs[count:]
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        out = self.model(**given, use_cache=True, **{self.argument: cache})
        return out.logits, *(state for layer in cache.layers for state in (layer.keys, layer.values))


class _Encoder(_Wrapped):
    """The last hidden states, or the logits of a head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        typed = "token_type_ids" in self.taken and getattr(model.config, "type_vocab_size", 0) > 1
        self.names = ["input_ids", "attention_mask"] + (["token_type_ids"] if typed else [])
        self.rest = {"use_cache": False} if "use_cache" in self.taken else {}
        out = self._answer(model(input_ids=self.ids(2), **self.rest))
        self.answer, self.ranks = out[0], out[1].dim()

    def inputs(self) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
        sizes = {0: "batch_size", 1: "sequence_length"}
        return {name: self.ids(_NEW) for name in self.names}, {name: sizes for name in self.names}

    def outputs(self) -> dict[str, dict[int, str]]:
        return {self.answer: {0: "batch_size"} | ({1: "sequence_length"} if self.ranks > 2 else {})}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self._answer(self.model(**dict(zip(self.names, inputs, strict=True)), **self.rest))[1],)

    def _answer(self, out: Any) -> tuple[str, Tensor]:
        for name in ("logits", "last_hidden_state"):
            if (found := getattr(out, name, None)) is not None:
                return name, found
        raise UsageError(
            f"{type(self.model).__name__} gives neither logits nor last_hidden_state: it is not written as ONNX."
        )


def _named(
    model: Any, parts: Mapping[str, Part], inputs: tuple[str, ...], axes: Mapping[str, Any], outputs: Mapping[str, Any]
) -> Traced:
    """The graph with its own names, made simpler; its weights have no values from here on."""
    import onnxscript

    prefix, graph = "model.", model.graph
    for name in [name for name in graph.initializers if name.removeprefix(prefix) in parts]:
        graph.initializers[name].const_value = None
    with _quiet():
        model = onnxscript.optimizer.optimize(model)
    graph = model.graph
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
        value.shape = _with_axes(value.shape, axes[name])
    for value, (name, sizes) in zip(graph.outputs, outputs.items(), strict=True):
        value.name = name
        value.shape = _with_axes(value.shape, sizes)
    found = {}
    for name in list(graph.initializers):
        own = name.removeprefix(prefix)
        if own in parts:
            value = graph.initializers.pop(name)
            value.name = own
            graph.initializers[own] = value
            found[own] = parts[own]
    return Traced(model=model, parts=found)


def _dims(axes: Mapping[str, Mapping[int, str]]) -> Iterator[dict[int, Any]]:
    """The sizes that may change, of each input. Batch and past are of one size everywhere, which spares the tracer
    work; of tokens, a model's tables may set a bound, that a name would refuse."""
    from torch.export import Dim

    known: dict[str, Any] = {name: Dim(name) for name in ("batch_size", "past_sequence_length")}
    for sizes in axes.values():
        yield {place: known.get(name, Dim.DYNAMIC) for place, name in sizes.items()}


def _with_axes(shape: Any, axes: Mapping[int, str]) -> Any:
    import onnx_ir

    return onnx_ir.Shape([axes.get(place, size) for place, size in enumerate(shape)])


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporter does not say what it thinks of its own future, or of weights that are not there."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
