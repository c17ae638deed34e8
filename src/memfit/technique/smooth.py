"""SmoothQuant: what the channels of an activation differ by goes into the weights that read it (Xiao et al. 2023).

A norm gives y_k = a_k(x) · (w_k + c) + b_k. Divide its gain and its bias by f_k, and multiply input k of every linear
layer that reads y by f_k: the model is the same function, and the channels of y are nearer to each other, so that one
scale for a whole token rounds them less. With

    f_k = r_k^α / m_k^(1 − α)        r_k = √E[y_k²],  m_k = max_o |W_ok| over all rows that read y

the range of channels is shared between activations (α = 0) and weights (α = 1). Xiao et al. take max |y_k| for r_k.

Shapes: K channels of a norm, N rows of a layer, n of them that errors are measured on.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from memfit.account.structure import inside_blocks
from memfit.packed.scheme import Scheme
from memfit.technique.quantize import dequantize, quantize

ALPHAS: Final = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares that are tried; 0 stands for no smoothing at all."""
INTEGERS: Final = Scheme(bits=8, group=None, activations=8)
_MOST: Final = 2.0**10
"""A channel is moved by at most so much, either way: a gain has to stay a number that bf16 can tell from others."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """A norm whose output is read by linear layers and by nothing else."""

    norm: str
    layers: tuple[str, ...]
    offset: float
    """c: 0 where the norm multiplies by its weight, 1 where by one more (Gemma)."""


def find_feeds(model: nn.Module, run: Callable[[], Any]) -> tuple[Feed, ...]:
    """The norms of the model's blocks that may be smoothed, found by watching who reads what, by no names.

    Args:
        model: on tensors of any kind.
        run: calls it; its result counts as read by someone.
    """
    inside = inside_blocks(model)
    named = {name: module for name, module in model.named_modules() if name.startswith(inside)}
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    offsets: dict[Any, float | None] = {}
    norms: dict[str, float] = {}
    for name, module in named.items():
        if _looks_like_a_norm(module):
            kind = (type(module), tuple(module.weight.shape), repr(module))
            if kind not in offsets:
                offsets[kind] = gain_offset(module)
            offset = offsets[kind]
            if offset is not None and users[id(module.weight)] == 1:
                norms[name] = offset
    linears = {
        name: module
        for name, module in named.items()
        if isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and users[id(module.weight)] == 1
    }
    readers = _Readers({name: named[name] for name in norms}, linears)
    with readers.hooked(), readers:
        out = run()
        readers.leaves(tree_leaves(out))
    return tuple(
        Feed(norm=norm, layers=tuple(layers), offset=norms[norm])
        for norm in norms
        if (layers := readers.linear_readers(norm))
    )


def _looks_like_a_norm(module: nn.Module) -> bool:
    """One vector that is its weight, perhaps one that is its bias, nothing below it."""
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    return (
        weight is not None
        and weight.ndim == 1
        and not any(True for _ in (*module.children(), *module.buffers()))
        and set(own) <= {"weight", "bias"}
        and all(parameter.shape == weight.shape for parameter in own.values())
    )


def gain_offset(module: nn.Module) -> float | None:
    """c of y = a(x) · (w + c) + b; None if the module computes something else. It is tried on numbers."""
    with _disable_current_modes(), torch.no_grad():
        # The copy has parameters of its own from the start: the module's may be fake, or on meta.
        shape = module.get_parameter("weight").shape
        own = {id(p): nn.Parameter(torch.empty(shape, dtype=torch.float64)) for p in module.parameters()}
        probe = copy.deepcopy(module, dict(own)).eval()
        generator = torch.Generator().manual_seed(0)
        width = shape[0]

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x = draw(5, width)

        def call(weight: Tensor, bias: Tensor | None) -> Tensor:
            probe.weight.data.copy_(weight)  # type: ignore[operator]
            if bias is not None:
                probe.bias.data.copy_(bias)  # type: ignore[operator]
            return probe(x)  # type: ignore[no-any-return]

        zeros = torch.zeros(width, dtype=torch.float64)
        none = zeros if getattr(module, "bias", None) is not None else None
        try:
            made = call(zeros + 1, none)
            if not isinstance(made, Tensor) or made.shape != x.shape:
                return None
            for offset in (0.0, 1.0):
                a = call(zeros + 1 - offset, none)
                weight, bias = draw(width), None if none is None else draw(width)
                y = call(weight, bias)
                expected = a * (weight + offset) + (0 if bias is None else bias)
                if torch.allclose(y, expected, rtol=1e-4, atol=1e-5) and a.abs().min() > 0:
                    return offset
        except (RuntimeError, TypeError, ValueError):
            return None  # it wants more than one tensor, or another shape
    return None


class _Readers(TorchDispatchMode):
    """Who reads the storage that a norm has made: the linear layer that is running, or something else."""

    def __init__(self, norms: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.norms, self.linears = norms, linears
        self.made: dict[int, tuple[str, Tensor]] = {}
        """By storage. The tensor is kept, so that no other storage gets its number."""
        self.calls: dict[str, int] = {}
        self.read: dict[str, dict[str | None, bool]] = {name: {} for name in norms}
        """Norm to its readers, None for any but linear layers; and whether they read channel by channel."""
        self.running: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        back = {self._key(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        for key in given & self.made.keys():
            if back != {key} or func._schema.is_mutable:  # else a view
                reader = self.running[-1] if self.running else None
                self.read[self.made[key][0]].setdefault(reader, reader is not None)
        return out

    def leaves(self, leaves: Sequence[Any]) -> None:
        """What the model returns is read by whoever called it."""
        for leaf in leaves:
            if isinstance(leaf, Tensor) and self._key(leaf) in self.made:
                self.read[self.made[self._key(leaf)][0]][None] = False

    def linear_readers(self, norm: str) -> list[str]:
        """The linear layers that read all that this norm gives, as it is; none if anything else reads it, too."""
        read = self.read[norm]
        whole = all(name is not None and in_order and self.calls[name] == 1 for name, in_order in read.items())
        return [name for name in self.linears if name in read] if whole and self.calls.get(norm) == 1 else []

    def hooked(self) -> "_Hooks":
        return _Hooks(self)

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)


class _Hooks:
    """Inside, norms tell what they have made, and linear layers when they run."""

    def __init__(self, readers: _Readers) -> None:
        self.readers = readers
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        readers = self.readers
        for name, module in readers.norms.items():
            self.handles.append(module.register_forward_hook(self._made(name)))
        for name, module in readers.linears.items():
            self.handles.append(module.register_forward_pre_hook(self._enter(name)))
            self.handles.append(module.register_forward_hook(lambda *_: readers.running.pop() and None))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _made(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, out: Any) -> None:
            readers = self.readers
            readers.calls[name] = readers.calls.get(name, 0) + 1
            key = readers._key(out)
            if key in readers.made:  # not a tensor of its own
                readers.read[name][None] = False
            readers.made[key] = (name, out)

        return hook

    def _enter(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: Any) -> None:
            readers = self.readers
            readers.running.append(name)
            readers.calls[name] = readers.calls.get(name, 0) + 1
            norm, out = readers.made.get(readers._key(inputs[0]), ("", inputs[0]))
            if norm:
                # All or some of the tokens, each with its channels in their order.
                width, given = out.shape[-1], inputs[0]
                places = (*given.stride()[:-1], given.storage_offset() - out.storage_offset())
                whole = given.shape[-1] == width and given.stride(-1) == out.stride(-1) == 1
                readers.read[norm][name] = whole and all(place % width == 0 for place in places)

        return hook


# -- how much ------------------------------------------------------------------------------------------


def activation_noise(squares: Tensor) -> Tensor:
    """Mean square of the error that rounding a token to 8 bits makes in each entry, from H = E[x_k²] [K].

    (E[max_k x_k²] / 127.5²) / 12. The largest of independent normal numbers of variances H, sorted to fall, is about
    max_i H_i (1 + 2 ln i): a single large channel counts by itself, and K equal ones as the largest of K.
    """
    ranked = squares.to(torch.float32).sort(descending=True).values
    rank = torch.arange(1, ranked.shape[0] + 1, dtype=torch.float32, device=ranked.device)
    return (ranked * rank.log_().mul_(2).add_(1)).amax() / (12 * 127.5**2)


def factors(squares: Tensor, largest: Tensor, alpha: float) -> Tensor:
    """f [K], geometric mean 1, from E[y_k²] and max |W_ok|; 1 for channels that are dead or that no weight reads."""
    dead = (squares <= 0) | (largest <= 0)
    rms = torch.where(dead, 1.0, squares.to(torch.float32)).sqrt_()
    made = rms.pow_(alpha).div_(torch.where(dead, 1.0, largest.to(torch.float32)).pow_(1 - alpha))
    made = made.log_()
    made.sub_(made.mean())
    made.clamp_(-math.log(_MOST), math.log(_MOST)).exp_()
    return torch.where(dead, 1.0, made)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Of a layer that reads a norm: some of its rows, and what an error in them costs."""

    rows: Tensor
    """[n, K]"""
    costs: Tensor
    """[n]: mean square of the loss's gradient at each row's output."""


def choose(squares: Tensor, largest: Tensor, readers: Sequence[Reader]) -> tuple[Tensor, Tensor]:
    """(f [K], α): of all shares the one whose rounding costs least, none among them.

    Σ_layers Σ_o G_o Σ_k [ (H_k / f_k²) (ŵ − f w)²_ok + (f w)²_ok e ], e of `activation_noise`.
    """
    best = torch.ones_like(squares, dtype=torch.float32)
    least = torch.full((), torch.inf)
    share = torch.zeros(())
    for alpha in ALPHAS:
        made = factors(squares, largest, alpha) if alpha else torch.ones_like(best)
        error = expected_error(squares, made, readers)
        better = error < least
        best = torch.where(better, made, best)
        least = torch.where(better, error, least)
        share = torch.where(better, torch.full((), alpha), share)
    return best, share


def expected_error(squares: Tensor, made: Tensor, readers: Sequence[Reader]) -> Tensor:
    """What rounding weights and activations to 8 bits costs with factors f [K]; see `choose`."""
    inputs = squares.to(torch.float32) / made.square()
    noise = activation_noise(inputs)
    total = torch.zeros(())
    for reader in readers:
        weight = reader.rows.to(torch.float32) * made
        off = dequantize(quantize(weight.to(torch.bfloat16), INTEGERS, search=False)).to(torch.float32).sub_(weight)
        of_row = (off.square_() @ inputs).add_(weight.square_().sum(1).mul_(noise))
        total = total + (of_row * reader.costs).sum()
        del weight, off, of_row
    return total


# -- doing it ------------------------------------------------------------------------------------------


def folded(gain: Tensor, made: Tensor, *, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weight of the norm [K] in `dtype`, factors of the layers' inputs [K] in gain's dtype), from its weight now.

    The norm's new gain is rounded to `dtype` first; the factors are what was divided by that, so that the rounding is
    made up for and the product is the gain as it was.
    """
    was = gain.to(torch.promote_types(gain.dtype, torch.float32)) + offset
    new = (was / made.to(was.dtype)).sub_(offset).to(dtype)
    now = new.to(was.dtype) + offset
    lost = (now == 0) | (was == 0)
    new = torch.where(lost, gain.to(dtype), new)
    return new, torch.where(lost, 1.0, was / torch.where(lost, 1.0, now))


@torch.no_grad()
def smooth_(model: nn.Module, feed: Feed, made: Tensor) -> Tensor:
    """Divide the norm by f [K] and multiply the layers' inputs by it, in place; returns f as it came out."""
    norm = model.get_submodule(feed.norm)
    gain = norm.get_parameter("weight")
    weight, used = folded(gain, made, offset=feed.offset, dtype=gain.dtype)
    gain.copy_(weight)
    if getattr(norm, "bias", None) is not None:
        norm.get_parameter("bias").div_(used)
    for name in feed.layers:
        model.get_submodule(name).get_parameter("weight").mul_(used)
    return used
