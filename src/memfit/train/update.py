"""Moving parameters: tile by tile, each read in fp32, moved by its rule, and written back as its precision keeps it."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from memfit.packed.fake import blocks_to_run
from memfit.technique.adafactor import Adafactor
from memfit.technique.adamw import AdamW
from memfit.technique.low_rank_gradient import LowRankAdam
from memfit.technique.muon import Muon
from memfit.technique.rule import ElementRule, Layout, MatrixRule
from memfit.technique.sgd import SGD
from memfit.technique.weights import Weights, weights_of

from .gradients import Accumulated
from .hyper import Hyper
from .recipe import Recipe
from .states import Slot, States, states_at


class Mover:
    """Updates the parameters of a model, and holds their states."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, hyper: Hyper, *, directory: str | None = None, seed: int = 0
    ) -> None:
        self.recipe, self.hyper, self.seed = recipe, hyper, seed
        self.rate = 1.0
        """What a schedule makes of the learning rate."""
        self.states: States = states_at(recipe.states, directory)
        self.element = element_rule(recipe, hyper)
        self.matrix = matrix_rule(recipe, hyper)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self._tables = tables | ({id(head.weight)} if head is not None else set())

    def rule_of(self, parameter: nn.Parameter) -> ElementRule | MatrixRule:
        """Embeddings, heads and vectors are moved element by element where the optimizer is for hidden matrices."""
        matrix = self.matrix
        if matrix is None or not matrix.applies(parameter.shape):
            return self.element
        only_hidden = not isinstance(matrix, Adafactor)
        return self.element if only_hidden and id(parameter) in self._tables else matrix

    def slots(self, parameter: nn.Parameter) -> dict[str, Slot]:
        """The states of a parameter: name to dtype and entries."""
        found = {name: (_as(parameter, layout.dtype), layout.entries(parameter.numel()))
                 for name, layout in self._layout(parameter).items()}  # fmt: skip
        rule = self.rule_of(parameter)
        if _is_matrix(rule):
            for name, shape in rule.shapes(parameter.shape).items():
                found[name] = (_as(parameter, torch.float32), torch.Size(shape).numel())
        return found

    def make(self, name: str, parameter: nn.Parameter, *, held: dict[str, Tensor] | None = None) -> None:
        """The states of a parameter that has none yet; those `held`, where it is known what they are."""
        if name not in self.states.names() or held is not None:
            self.states.make(name, self.slots(parameter), parameter, held=held)

    def kind(self, parameter: nn.Parameter) -> Any:
        """What beside its shape decides how a parameter is moved."""
        return type(self.rule_of(parameter))

    def move(
        self, name: str, parameter: nn.Parameter, gradients: Accumulated, *, step: int, coefficient: Tensor | None
    ) -> None:
        """Update one parameter by its gradient times `coefficient`; `step` counts from 1."""
        self.make(name, parameter)
        rule = self.rule_of(parameter)
        if _is_matrix(rule):
            self._move_matrix(rule, name, parameter, gradients, step, coefficient)
            return
        weights, flat = self._weights(parameter), parameter.detach().view(-1)
        layout = self._layout(parameter)
        decay = self.hyper.decay_of(parameter)
        for start, stop in blocks_to_run(gradients.tiles(parameter)):
            gradient = gradients.tile(parameter, start, stop)
            if coefficient is not None:
                gradient.mul_(coefficient)
            spans = {state: (start // of.per, -(-stop // of.per)) for state, of in layout.items()}
            tiles = {state: self.states.read(name, state, *span) for state, span in spans.items()}
            seed = self._seed(name, step, start)
            own = flat[start:stop]
            value = weights.read(own, tiles, step=step)
            rule.update(value, gradient, tiles, lr=self.hyper.lr * self.rate, weight_decay=decay, step=step, seed=seed)
            weights.write(own, tiles, value, seed=seed)
            for state, tile in tiles.items():
                self.states.write(name, state, spans[state][0], tile)
            del gradient, tiles, value, own

    def _move_matrix(
        self,
        rule: MatrixRule,
        name: str,
        parameter: nn.Parameter,
        gradients: Accumulated,
        step: int,
        coefficient: Tensor | None,
    ) -> None:
        weights, layout = self._weights(parameter), self._layout(parameter)
        gradient = gradients.tile(parameter, 0, parameter.numel()).view(parameter.shape)
        if coefficient is not None:
            gradient.mul_(coefficient)
        kept = {state: self.states.read(name, state, 0, of.entries(parameter.numel())) for state, of in layout.items()}
        own = {
            state: self.states.read(name, state, 0, torch.Size(shape).numel()).view(shape)
            for state, shape in rule.shapes(parameter.shape).items()
        }
        flat, seed = parameter.detach().view(-1), self._seed(name, step, 0)
        value = weights.read(flat, kept, step=step)
        rule.update(
            value.view(parameter.shape), gradient, own,
            lr=self.hyper.lr * self.rate, weight_decay=self.hyper.decay_of(parameter), step=step, seed=seed,
        )  # fmt: skip
        del gradient
        weights.write(flat, kept, value, seed=seed)
        for state, tile in (kept | own).items():
            self.states.write(name, state, 0, tile.view(-1))

    def _weights(self, parameter: nn.Parameter) -> Weights:
        return weights_of(self.recipe.precision, parameter.dtype)

    def _layout(self, parameter: nn.Parameter) -> Mapping[str, Layout]:
        """Flat states whose tiles go with the weight's: those of its precision, and of an element rule."""
        rule = self.rule_of(parameter)
        own = {} if _is_matrix(rule) else rule.layout()
        return {**self._weights(parameter).layout(), **own}

    def _seed(self, name: str, step: int, start: int) -> int:
        """Of chance in one tile's update: by its place alone, so that the order of updates does not matter."""
        return zlib.crc32(f"{self.seed} {name} {step} {start}".encode())


def element_rule(recipe: Recipe, hyper: Hyper) -> ElementRule:
    """The rule of embeddings, heads and vectors, and of all else where the optimizer is one of elements."""
    if recipe.optimizer == "sgd":
        return SGD(momentum=hyper.momentum, state_bits=recipe.state_bits)
    return AdamW(betas=hyper.betas, eps=hyper.eps, state_bits=recipe.state_bits)


def matrix_rule(recipe: Recipe, hyper: Hyper) -> MatrixRule | None:
    """The rule of matrices, None where the optimizer moves elements."""
    if recipe.optimizer == "adafactor":
        return Adafactor()
    if recipe.optimizer in ("galore", "apollo"):
        return LowRankAdam(kind=recipe.optimizer, rank=hyper.rank, betas=hyper.betas, eps=hyper.eps)
    if recipe.optimizer == "muon":
        return Muon(momentum=hyper.momentum)
    return None


def _is_matrix(rule: ElementRule | MatrixRule) -> TypeIs[MatrixRule]:
    return hasattr(rule, "applies")


def _as(parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """A parameter in fp64 has its fp32 states in fp64."""
    return torch.float64 if parameter.dtype == torch.float64 and dtype == torch.float32 else dtype


