"""Where gradients are between the backward pass and the update, and how large they are in all."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from memfit.packed.fake import blocks_to_run, device_meant, repeated
from memfit.technique.gradient_bits import QuantizedGradient
from memfit.technique.row_gradients import RowGradients

from .recipe import Gradients
from .tiles import row_tiles, tiles


class Accumulated:
    """The gradients of all trained parameters: in `.grad`, in an accumulator, or to be made from rows."""

    def __init__(self, kind: Gradients, rows: dict[int, RowGradients]) -> None:
        self.kind, self.rows = kind, rows
        self._wide: dict[int, Tensor] = {}
        self._codes: dict[int, QuantizedGradient] = {}

    def arrived(self, parameter: Tensor) -> None:
        """A backward pass has added to the parameter's `.grad`: move that into its accumulator."""
        gradient = parameter.grad
        if self.kind == "weights" or gradient is None:
            return
        parameter.grad = None
        if self.kind == "int8":
            codes = self._codes.get(id(parameter))
            if codes is None:
                codes = self._codes[id(parameter)] = QuantizedGradient.zeros(gradient.numel(), gradient.device)
            codes.add(gradient)
            return
        wide = self._wide.get(id(parameter))
        if wide is None:
            self._wide[id(parameter)] = gradient.to(_wide(gradient.dtype))
        else:
            for start, stop in blocks_to_run(list(tiles(gradient.numel(), device_meant(gradient)))):
                wide.view(-1)[start:stop].add_(gradient.reshape(-1)[start:stop].to(wide.dtype))

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter has got any gradient."""
        key = id(parameter)
        return parameter.grad is not None or key in self._wide or key in self._codes or key in self.rows

    def held(self, parameter: nn.Parameter) -> list[Tensor | None]:
        """The parameter's gradient as autograd left it, and as it adds up."""
        return [parameter.grad, self._wide.get(id(parameter))]

    def hold(self, parameter: nn.Parameter, held: list[Tensor | None]) -> None:
        """Take what `held` has told of a parameter like this one."""
        parameter.grad, wide = held
        if wide is None:
            self._wide.pop(id(parameter), None)
        else:
            self._wide[id(parameter)] = wide

    def tiles(self, parameter: nn.Parameter) -> list[tuple[int, int]]:
        """Parts [start, stop) of the flat parameter in which its gradient is read."""
        rows = self.rows.get(id(parameter))
        if rows is not None:
            return row_tiles(parameter, rows.most_tokens)
        return tiles(parameter.numel(), device_meant(parameter))

    def tile(self, parameter: nn.Parameter, start: int, stop: int) -> Tensor:
        """The gradient there, 1-dim, in fp32 (fp64 for fp64), a tensor of its own."""
        key = id(parameter)
        rows = self.rows.get(key)
        if rows is not None:
            width = parameter.shape[1]
            return rows.rows(start // width, stop // width).view(-1)
        if key in self._codes:
            return self._codes[key].tile(start, stop)
        held = self._wide.get(key, parameter.grad)
        assert held is not None
        return held.reshape(-1)[start:stop].to(_wide(held.dtype), copy=True)

    def clear(self, parameter: nn.Parameter) -> None:
        """Free the parameter's gradient."""
        key = id(parameter)
        parameter.grad = None
        self._wide.pop(key, None)
        if key in self._codes:
            self._codes[key].clear()
        if key in self.rows:
            self.rows[key].clear()

    def add_squares(self, parameter: nn.Parameter, total: Tensor) -> None:
        """total += Σ g² over the parameter; `total` is a number in fp64."""

        def run() -> None:
            for start, stop in blocks_to_run(self.tiles(parameter)):
                gradient = self.tile(parameter, start, stop)
                total.add_(gradient.square_().sum().double())

        if id(parameter) in self.rows or id(parameter) in self._codes:
            run()
        else:
            repeated("squares", None, "", lambda: (parameter, total, self.held(parameter)), run, any_recipe=True)


def clip_coefficient(squares: Tensor, most: float) -> Tensor:
    """min(1, most / ‖g‖), as torch.nn.utils.clip_grad_norm_ has it: a number in fp64."""
    return squares.sqrt().add_(1e-6).reciprocal_().mul_(most).clamp_(max=1.0)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of each parameter that is trained, once."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
