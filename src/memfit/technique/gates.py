"""L0: gates that training closes, a penalty on those that are open (hard concrete; Louizos, Welling and Kingma 2018).

    s = σ((log u − log(1 − u) + a) / β)     u uniform, a learned     z = clamp(s (ζ − γ) + γ, 0, 1)
    P(z ≠ 0) = σ(a − β log(−γ / ζ))         the penalty is the share of the weights that stay, by this

β 2/3, γ −0.1, ζ 1.1, so that z is often 0 or 1. Where the layer is not training there is no chance: σ(a) is s.
A gate is on some inputs of a linear layer (a head's of the output projection, a channel's of the down projection) or on
each weight by itself:

    gates = Gates(model, {"model.layers.0.self_attn.o_proj": 64, "model.layers.0.mlp.down_proj": 1})
    optimizer = torch.optim.AdamW([*model.parameters(), *gates.parameters()])
    loss = model(**batch).loss + 0.1 * gates.penalty()
    ...
    open_ = gates.finish()          # what is closed is 0 in the weights, to the bit; the model is plain again
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from .masks import weights_of

BETA: Final = 2 / 3
GAMMA: Final = -0.1
ZETA: Final = 1.1
_LEAST: Final = 1e-6
"""Of u, and of 1 − u: their logarithms are finite."""


class Gates(nn.Module):
    """Gates on linear layers. They are parameters of their own, and no part of the model.

    Args:
        model: gated from now on, until `finish`.
        inputs: layer to the inputs that share a gate; 0: each weight has its own.
        open_share: the chance at which each is open in the beginning. With 0.99 all are 1 where there is no chance.

    Raises:
        ValueError: a module is no linear layer, or its inputs are not a multiple of what shares a gate.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, int], *, open_share: float = 0.99) -> None:
        super().__init__()
        if not 0.0 < open_share < 1.0:
            raise ValueError(f"open_share must be above 0 and below 1, got {open_share}")
        start = math.log(open_share / (1 - open_share)) + BETA * math.log(-GAMMA / ZETA)
        self._model, self.names = [model], tuple(inputs)  # in a list: it is no submodule
        self.inputs = dict(inputs)
        logits: list[nn.Parameter] = []
        for name, weight in weights_of(model, None, inputs).items():
            size = inputs[name]
            if size < 0 or (size and weight.shape[1] % size):
                raise ValueError(f"{name}: {weight.shape[1]} inputs are not a multiple of the {size} that share a gate")
            shape = (weight.shape[1] // size,) if size else tuple(weight.shape)
            logits.append(nn.Parameter(torch.full(shape, start, dtype=torch.float32, device=weight.device)))
        self.logits = nn.ParameterList(logits)
        self._hooks: list[RemovableHandle] = []
        for number, name in enumerate(self.names):
            layer = model.get_submodule(name)
            if inputs[name]:
                self._hooks.append(layer.register_forward_pre_hook(self._gate(number)))
            else:
                parametrize.register_parametrization(layer, "weight", _Gated(self, number))

    def penalty(self) -> Tensor:
        """The expected share of the gated weights that stay, 0 to 1: times what it shall weigh, part of the loss."""
        counts = [self._weights_behind(number) for number in range(len(self.names))]
        shift = BETA * math.log(-GAMMA / ZETA)
        open_ = [torch.sigmoid(a - shift).sum() * count for a, count in zip(self.logits, counts, strict=True)]
        whole = sum(a.numel() * count for a, count in zip(self.logits, counts, strict=True))
        share: Tensor = torch.stack(open_).sum() / whole
        return share

    @torch.no_grad()
    def open_gates(self) -> dict[str, Tensor]:
        """By layer which gates are open without chance: bool [gates], or [N, K] of weights."""
        return {name: self.value(number, learns=False) > 0 for number, name in enumerate(self.names)}

    def value(self, number: int, *, learns: bool) -> Tensor:
        """z of a layer's gates; `learns`: drawn by chance."""
        a = self.logits[number]
        if learns:
            u = torch.rand_like(a).clamp_(_LEAST, 1 - _LEAST)
            s = torch.sigmoid((u.log() - (1 - u).log() + a) / BETA)
        else:
            s = torch.sigmoid(a)
        return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """Multiply the gates into the weights, and leave the model as it was built; what `open_gates` says."""
        found = self.open_gates()
        model = self._model[0]
        for number, name in enumerate(self.names):
            layer = model.get_submodule(name)
            z = self.value(number, learns=False)
            if self.inputs[name]:
                weight = layer.get_parameter("weight")
                weight.mul_(z.repeat_interleave(self.inputs[name]).to(weight.dtype))
            else:
                training = layer.training
                layer.eval()
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
                layer.train(training)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        return found

    def _gate(self, number: int) -> Any:
        size = self.inputs[self.names[number]]

        def gate(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = self.value(number, learns=layer.training).repeat_interleave(size)
            return (given[0] * z.to(given[0].dtype), *given[1:])

        return gate

    def _weights_behind(self, number: int) -> int:
        layer = self._model[0].get_submodule(self.names[number])
        return int(layer.out_features) * self.inputs[self.names[number]] or 1  # type: ignore[arg-type]


class _Gated(nn.Module):
    """A weight times its gates."""

    def __init__(self, gates: Gates, number: int) -> None:
        super().__init__()
        self._gates, self.number = [gates], number

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self._gates[0].value(self.number, learns=self.training).to(weight.dtype)
