"""A plan within transformers' Trainer: each batch that the Trainer hands to the model is trained on as planned.

The Trainer's own backward pass and optimizer find nothing left to do: the loss it gets hangs on nothing. Its data,
schedule, logging, evaluation and checkpoints of the model stay its own; the plan's states are saved beside them.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from memfit.errors import UsageError

from .save import restore_states, save_states
from .step import TrainStep
from .task import make_trainable

if TYPE_CHECKING:
    from .plan import TrainPlan

_FOLDER = "memfit"


class PlanCallback(TrainerCallback):  # type: ignore[misc]
    """What `plan.callback()` gives."""

    def __init__(self, plan: "TrainPlan") -> None:
        self.plan = plan
        self.step: TrainStep | None = None
        self._optimizer: Any = None
        self._norm: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Wrap the model; go on from the Trainer's checkpoint, if it does.

        Raises:
            UsageError: the Trainer accumulates gradients, or the plan keeps weights where the Trainer cannot save them.
        """
        if args.gradient_accumulation_steps != 1:
            raise UsageError(
                f"gradient_accumulation_steps is {args.gradient_accumulation_steps}: set it to 1, and "
                f"per_device_train_batch_size to the batch, {self.plan.task.batch}. The plan cuts it as it needs."
            )
        if self.plan.recipe.weights != "memory":
            raise UsageError(
                f"the plan keeps weights on the {self.plan.recipe.weights}, and the Trainer would save what is in "
                "their place. Train with `memfit.train` or a loop of your own, or plan with a larger budget."
            )
        if self.plan.task.distil is not None:
            raise UsageError("the plan has a teacher, of which the Trainer's batches know nothing. Use `memfit.train`.")
        model: nn.Module = given["model"]
        self._optimizer = given.get("optimizer")
        make_trainable(model, self.plan.recipe)
        self.step = TrainStep(model, self.plan.recipe, hyper=self.plan.task.hyper, seed=args.seed)
        self.step.most = (self.plan.task.batch, self.plan.task.sequence)
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FOLDER
        if state.global_step and saved.is_dir():
            restore_states(self.step, saved)
        self._wrap(model)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Put the states beside the Trainer's checkpoint."""
        if self.step is not None:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FOLDER
            directory.mkdir(parents=True, exist_ok=True)
            save_states(self.step, directory)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """Tell the gradient's norm that the plan found: the Trainer itself sees none, and would say 0."""
        for said in (logs, state.log_history[-1] if state.log_history else None):
            if said is not None and "grad_norm" in said:
                if self._norm is None:
                    del said["grad_norm"]
                else:
                    said["grad_norm"] = self._norm

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Leave an ordinary model."""
        if self.step is not None:
            vars(self.step.model).pop("forward", None)
            self.step.close()
            self.step = None

    def _wrap(self, model: nn.Module) -> None:
        plain = model.forward
        working = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal working
            if working or not model.training or "labels" not in kwargs or not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            working = True
            try:
                return {"loss": self._train(kwargs)}
            finally:
                working = False

        # A signature tells the Trainer which columns of the data the model takes.
        forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
        model.forward = forward

    def _train(self, given: dict[str, Any]) -> Tensor:
        assert self.step is not None
        batch = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.dim() > 0}
        batch.pop("num_items_in_batch", None)
        rate = self.step.hyper.lr
        if self._optimizer is not None:
            rate = float(self._optimizer.param_groups[0]["lr"])
        self.step.mover.rate = rate / self.step.hyper.lr if self.step.hyper.lr else 0.0
        outcome = self.step(batch)
        self._norm = outcome.gradient_norm
        # A loss whose backward pass ends at once; not a leaf, as the Trainer scales it in place.
        return torch.tensor(outcome.loss, device=next(self.step.model.parameters()).device, requires_grad=True) * 1.0
