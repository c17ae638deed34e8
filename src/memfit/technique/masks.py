"""Masks on the weights of a model that is being trained: which weights they are on, and how they are kept.

N outputs, K inputs. A unit is what is kept or pruned whole: a weight, of blocks a block. Masks are of units: [N, K], of
blocks [N/16, K/16].
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from memfit.packed.forms import BLOCK, Sparse
from memfit.packed.sparse import pack

from .made import Made


class Masks:
    """Weights of linear layers, and the mask of each. What is masked is 0 from `apply` until something moves it.

    Args:
        model: its parameters stay its own.
        form: what each row keeps in the end.
        names: of linear layers; None: all but the head.

    Raises:
        ValueError: a module is no linear layer, or the form cannot store its weight; says which.
    """

    def __init__(self, model: nn.Module, form: Sparse, names: Iterable[str] | None = None) -> None:
        self.form = form
        self.weights = weights_of(model, form, names)
        self.masks = {
            name: torch.ones(_units(weight, form), dtype=torch.bool, device=weight.device)
            for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def apply(self) -> None:
        """Set to 0 what is masked."""
        for name, weight in self.weights.items():
            by_unit(weight, self.form).mul_(_over(self.masks[name], self.form))

    def made(self, name: str) -> Made:
        """A layer's weight as it is stored, once its rows keep as many as the form says.

        Raises:
            ValueError: they do not yet.
        """
        weight, mask = self.weights[name], self.masks[name]
        shape = (weight.shape[0], weight.shape[1])
        counts = mask.sum(1)
        if bool((counts != self.form.kept(shape[1])).any()):
            most, due = int(counts.amax()), self.form.kept(shape[1])
            raise ValueError(
                f"{name}: its rows keep up to {most}, {self.form.name} is to keep {due}: go on to the schedule's end"
            )
        return Made(form=self.form, shape=shape, parts=pack(weight.detach(), mask, self.form))

    def state_dict(self) -> dict[str, Tensor]:
        """The masks, by layer."""
        return {name: mask.clone() for name, mask in self.masks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with these masks.

        Raises:
            ValueError: they are of other layers or shapes.
        """
        told = {name: tuple(mask.shape) for name, mask in state.items()}
        due = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        if told != due:
            off = sorted(name for name in told.keys() | due.keys() if told.get(name) != due.get(name))
            raise ValueError(f"masks of {off[0]} have the shape {told.get(off[0])}, its layer takes {due.get(off[0])}")
        for name, mask in state.items():
            self.masks[name].copy_(mask)


def weights_of(model: nn.Module, form: Sparse | None, names: Iterable[str] | None) -> dict[str, Tensor]:
    """The weights of the named linear layers, by layer; see `Masks`."""
    modules = dict(model.named_modules())
    if names is None:
        get = getattr(model, "get_output_embeddings", None)
        head = get() if callable(get) else None
        names = [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
    found: dict[str, Tensor] = {}
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is {'no module' if module is None else type(module).__name__}, no linear layer")
        shape = tuple(module.weight.shape)
        if form is not None and (reason := form.why_not(shape)) is not None:
            raise ValueError(f"{name} {list(shape)} cannot be {form.name}: {reason}")
        found[name] = module.weight
    if not found:
        raise ValueError("the model has no linear layers to prune")
    return found


def by_unit(weight: Tensor, form: Sparse) -> Tensor:
    """A view of a weight [N, K] with the dimensions of its mask: of blocks [N/16, 16, K/16, 16]."""
    if form.pattern != "blocks":
        return weight.detach()
    height, width = BLOCK
    return weight.detach().view(weight.shape[0] // height, height, weight.shape[1] // width, width)


def size_of(weight: Tensor, form: Sparse) -> Tensor:
    """How large each unit is: |w|, of blocks the root of the sum of squares."""
    if form.pattern != "blocks":
        return weight.detach().float().abs()
    return by_unit(weight, form).float().square().sum(dim=(1, 3)).sqrt_()


def _units(weight: Tensor, form: Sparse) -> tuple[int, int]:
    rows, inputs = weight.shape
    return (rows // BLOCK[0], inputs // BLOCK[1]) if form.pattern == "blocks" else (rows, inputs)


def _over(mask: Tensor, form: Sparse) -> Tensor:
    return mask if form.pattern != "blocks" else mask[:, None, :, None]
