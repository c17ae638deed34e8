"""One training step, in order: micro-batches, loss, backward, update; as a recipe says, on fake tensors or real ones.

    for each micro-batch:  forward -> loss -> backward (blocks may be updated in it) -> gradients add up
    then:                  clip -> update what is left

`TrainStep` is what a loop calls, one's own or memfit's, and what a dry run follows.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from memfit.account.watch import Unwatched, Watch
from memfit.errors import MemfitError, UsageError
from memfit.packed.fake import is_fake, repeated
from memfit.technique.checkpoint import Checkpoint, Segment
from memfit.technique.chunk_loss import ChunkLoss, HeadCall
from memfit.technique.distil_loss import DistilCall
from memfit.technique.precision import LossScale, Precision
from memfit.technique.row_gradients import rows_on

from .away import bring_back, changed, here, place
from .distil import Teaching, distilled
from .gradients import Accumulated, clip_coefficient, trained
from .hyper import Hyper
from .micro_batch import holds_fakes, micro_batches, once
from .objective import Batch, Objective, objective_of, output_head, without_head
from .recipe import Recipe
from .update import Mover
from .uses import find_tables, in_one_block, used_outside

_THEN: Final = "nothing was updated. A lower learning rate (--lr) or a longer warm-up (--warmup) may help."


class LossNotFinite(MemfitError):
    """The loss is no number, or infinite. Nothing was updated with it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step found."""

    loss: float
    """Mean over the labels that count."""
    labels: int
    gradient_norm: float | None
    """Before clipping; None where nothing asked for it."""
    skipped: bool = False
    """Nothing was updated, as a gradient was infinite in fp16; the next step's loss scale is half."""


class TrainStep:
    """A model, trained by a recipe: `step(batch)` is one step.

    Args:
        model: its parameters that require a gradient are trained. It is changed: cast, its blocks wrapped. `close`
            unwraps them.
        recipe: how.
        hyper: learning rate, weight decay, clipping.
        loss: `loss(model, batch)` -> mean over the batch's rows, for models whose class says nothing of it.
        watch: is told the phases.
        directory: where states go that wait on the disk; default: a temporary one.
        seed: of stochastic rounding and random projections.
        teaching: a teacher to learn from beside the labels.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        hyper: Hyper | None = None,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        watch: Watch | None = None,
        directory: str | None = None,
        seed: int = 0,
        teaching: Teaching | None = None,
    ) -> None:
        self.model, self.recipe, self.teaching = model, recipe, teaching
        self.hyper = hyper or Hyper()
        self.watch: Watch = watch or Unwatched()
        self.precision = Precision(kind=recipe.precision)
        self.precision.apply(model)
        model.train()
        self._loss, self._directory = loss, directory
        self.scaler = LossScale() if recipe.precision == "fp16" else None
        self.steps = 0
        """Steps done."""
        self.mover = Mover(model, recipe, self.hyper, directory=directory, seed=seed)
        self.most: tuple[int, int] | None = None
        """The largest batch that is taken, rows and tokens of each; None: any."""
        self._squares: Tensor | None = None
        self._coefficient: Tensor | None = None
        self._counting = self._last = False
        self._updated = 0
        self._uses: dict[int, int] = {}
        self._expected: dict[int, int] = {}
        self._stack, self._closed = ExitStack(), False
        self._set_up(recipe)

    def _set_up(self, recipe: Recipe) -> None:
        """Wrap and hook the model as the recipe says."""
        self.recipe = recipe
        chunks = None if recipe.chunk_nbytes is None else ChunkLoss(chunk_nbytes=recipe.chunk_nbytes)
        self.objective: Objective = objective_of(self.model, chunks=chunks, loss=self._loss)
        self.learned = distilled(self.objective, self.teaching, recomputed=bool(recipe.recompute))
        self._tables = find_tables(self.model, self.objective) if recipe.rows else {}
        self.gradients = Accumulated(recipe.gradients, self._tables)
        self.segments: list[Segment] = self._stack.enter_context(
            Checkpoint(blocks=recipe.recompute, slices=recipe.slices, store=recipe.store).on(self.model, owner=self)
        )
        place(self.model, self.segments, recipe, self._directory, self._stack)
        self._hook()

    def change(self, recipe: Recipe) -> None:
        """Go on by another recipe that learns the same: other parts, other blocks recomputed, the same states.

        Raises:
            ValueError: the recipe has other weights or states.
        """
        for name in ("precision", "optimizer", "state_bits", "states", "weights", "adapters"):
            if getattr(recipe, name) != getattr(self.recipe, name):
                raise ValueError(f"{name} cannot change within a run: {getattr(self.recipe, name)!r} is in use")
        self.discard()
        self._stack.close()
        self._set_up(recipe)

    # -- a step -----------------------------------------------------------------------------------------

    def __call__(self, batch: Batch) -> Outcome:
        """Train on one batch: the model, its states and `steps` move by one.

        Raises:
            LossNotFinite: the loss is NaN or infinite; nothing was updated.
            UsageError: no label of the batch counts; with `most`, the batch is larger, or no batch for the model.
        """
        if self._closed:
            raise UsageError("the step is closed: its model is an ordinary one again. Make another of the model.")
        if self.most is not None:
            self.objective.check(self.model, batch)
            self._check_size(batch, self.most)
        labels = self.objective.count(batch)
        if labels == 0:
            raise UsageError("all labels of the batch are ignored: it has nothing to learn from. Leave it out.")
        scale = (self.scaler.value if self.scaler else 1.0) / labels
        parts = self._micro_batches(batch)
        random = torch.get_rng_state() if self._two_passes and not holds_fakes(batch) else None
        self._coefficient, norm = None, None
        self._updated = 0
        if self._two_passes:
            norm = self._pass_for_norm(parts, scale, labels, random)
            if norm is not None and not math.isfinite(norm):
                return self._skip(labels, norm)
        loss = self._pass(parts, scale, labels)
        with self.watch.phase("step"), torch.no_grad():
            if not self._two_passes and (self.hyper.clip is not None or self.scaler is not None):
                norm = self._norm_of_all(labels)
                if norm is not None and not math.isfinite(norm):
                    return self._skip(labels, norm, loss)
            for name, parameter in trained(self.model):
                if self.gradients.has(parameter):
                    self._update(name, parameter)
        self.steps += 1
        self._updated = 0
        if self.scaler is not None:
            self.scaler.grow()
        return Outcome(loss=loss, labels=labels, gradient_norm=norm)

    def _check_size(self, batch: Batch, most: tuple[int, int]) -> None:
        """A batch that is larger than planned would take more than was told."""
        ids = batch.get("input_ids")
        if ids is not None and ids.dim() > 1 and (ids.shape[0] > most[0] or ids.shape[1] > most[1]):
            raise UsageError(
                f"a batch of {ids.shape[0]} x {ids.shape[1]} tokens, and the plan is for {most[0]} x {most[1]}. Plan "
                "for the largest batch there is."
            )

    @property
    def updates_begun(self) -> bool:
        """Whether the step that is running, or was left by an error, has updated anything."""
        return self._updated > 0

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int, Tensor | None]:
        """(mean loss over the labels that count, how many, scores [B, C] of a classifier); nothing is learned."""
        labels = self.objective.count(batch)
        total: Tensor | None = None
        scale = 1.0 / max(labels, 1)
        self.model.eval()
        try:
            outs = []
            for part in self._micro_batches(batch, slices=self.recipe.slices):
                loss, out = self._once("evaluation", part, scale, self._judged)
                total = loss if total is None else total + loss
                if out is not None:
                    outs.append(out)
                del out, loss
        finally:
            self.model.train()
        assert total is not None
        found = torch.cat(outs) if outs else None
        return (0.0 if is_fake(total) else float(total)), labels, found

    def _judged(self, part: Batch, scale: float) -> tuple[Tensor, Tensor | None]:
        """Of one micro-batch its part of the loss, and scores [B, C] of a classifier."""
        with self._forward_mode():
            out = self.objective.forward(self.model, part)
        with self.precision.on(part["labels"].device if "labels" in part else torch.device("cpu")):
            loss = self.objective.loss(self.model, out, part, scale=scale, keep=None)
        return loss, out if out.dim() == 2 else None

    def close(self) -> None:
        """Unwrap the model: it is an ordinary one again, with the weights it has now, all of them in memory."""
        self._closed = True
        self._stack.close()
        for parameter in self.model.parameters():
            bring_back(parameter)

    def discard(self) -> None:
        """Drop the gradients of a step that was left by an error."""
        for _, parameter in trained(self.model):
            self.gradients.clear(parameter)

    @property
    def _keeps(self) -> bool:
        """Whether the head leaves what its gradient's rows are made of."""
        head = output_head(self.model)
        return head is not None and id(head.weight) in self._tables

    # -- parts ------------------------------------------------------------------------------------------

    @property
    def _two_passes(self) -> bool:
        """An update inside the backward pass needs the norm of the whole gradient first: a pass for it alone."""
        return self.recipe.in_backward and (self.hyper.clip is not None or self.scaler is not None)

    def _pass_for_norm(self, parts: list[Batch], scale: float, labels: int, random: Tensor | None) -> float | None:
        device = next(self.model.parameters()).device
        self._squares, self._counting = torch.zeros((), dtype=torch.float64, device=device), True
        self._pass(parts, scale, labels)
        with self.watch.phase("backward"), torch.no_grad():
            for _, parameter in trained(self.model):
                if self.gradients.has(parameter):
                    self.gradients.add_squares(parameter, self._squares)
                    self.gradients.clear(parameter)
            norm = self._found_norm(self._squares)
        self._squares, self._counting = None, False
        if random is not None:
            torch.set_rng_state(random)
        return norm

    def _norm_of_all(self, labels: int) -> float | None:
        device = next(self.model.parameters()).device
        squares = torch.zeros((), dtype=torch.float64, device=device)
        for _, parameter in trained(self.model):
            if self.gradients.has(parameter):
                self.gradients.add_squares(parameter, squares)
        return self._found_norm(squares)

    def _found_norm(self, squares: Tensor) -> float | None:
        """The norm, as if nothing had been scaled, and the coefficient that undoes the scale and clips."""
        unscale = 1.0 / self.scaler.value if self.scaler else 1.0
        squares.mul_(unscale * unscale)
        coefficient = torch.full_like(squares, unscale)
        if self.hyper.clip is not None:
            coefficient.mul_(clip_coefficient(squares, self.hyper.clip))
        wide = torch.float64 if next(self.model.parameters()).dtype == torch.float64 else torch.float32
        self._coefficient = coefficient.to(wide)
        return None if is_fake(squares) else math.sqrt(float(squares))

    def _skip(self, labels: int, norm: float, loss: float = math.nan) -> Outcome:
        self.discard()
        if self.scaler is None:
            raise LossNotFinite(f"the gradient's norm is {norm} at step {self.steps + 1}; {_THEN}")
        self.scaler.shrink()
        return Outcome(loss=loss, labels=labels, gradient_norm=norm, skipped=True)

    def _pass(self, parts: list[Batch], scale: float, labels: int) -> float:
        """Forward and backward over all micro-batches; the mean loss."""
        total = 0.0
        for number, part in enumerate(parts):
            self._last = number == len(parts) - 1
            self._expected = dict(self._uses)
            total += self._once("pass", part, scale, self._through)
            if not math.isfinite(total):
                self.discard()
                raise LossNotFinite(f"the loss is {total} at step {self.steps + 1}; {_THEN}")
        return total / (scale * labels)

    def _through(self, part: Batch, scale: float) -> float:
        """Forward and backward over one micro-batch; its part of the loss. No backward pass where that is no number."""
        found = 0.0
        with self.watch.phase("forward"), self._forward_mode():
            out = self.learned.forward(self.model, part)
        with self.watch.phase("loss"), self.precision.on(out.device):
            loss = self.learned.loss(self.model, out, part, scale=scale, keep=self._keep if self._keeps else None)
            del out
            if not is_fake(loss):
                found = float(loss.detach())
        if math.isfinite(found):
            with self.watch.phase("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
        return found

    def _once(self, key: str, part: Batch, scale: float, run: Callable[[Batch, float], Any]) -> Any:
        if self._tables:
            return run(part, scale)
        return once((key, scale), part, self.model, self.recipe, self.gradients, lambda: run(part, scale), self.watch)

    def _forward_mode(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(without_head(self.model, self.objective))
        if self._tables:
            lookups = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and id(m.weight) in self._tables]
            stack.enter_context(rows_on(lookups, self._tables))
        stack.enter_context(self.precision.on(next(self.model.parameters()).device))
        return stack

    def _micro_batches(self, batch: Batch, slices: int = 1) -> list[Batch]:
        return micro_batches(batch, self.recipe, slices=slices, alike=not self._tables)

    # -- gradients and updates --------------------------------------------------------------------------

    def _hook(self) -> None:
        """Count where each parameter is used, and hook those whose gradients are moved or used at once."""
        inside: dict[int, int] = {}
        for segment in self.segments:
            for parameter in {id(p): p for p in segment.block.parameters()}.values():
                inside[id(parameter)] = inside.get(id(parameter), 0) + 1
        self._uses = inside
        outside = used_outside(self.model, tuple(segment.name for segment in self.segments)) & inside.keys()
        for key in outside:
            self._uses.pop(key, None)
        self._names = {id(parameter): name for name, parameter in trained(self.model)}
        stacked = in_one_block(self.model)
        for _, parameter in trained(self.model):
            key = id(parameter)
            alone = key in stacked and key not in self._uses and key not in outside
            if self.recipe.gradients != "weights" or (self.recipe.in_backward and alone):
                act = self._arrived_alone if self.recipe.in_backward and alone else self.gradients.arrived
                handle = parameter.register_post_accumulate_grad_hook(act)  # type: ignore[no-untyped-call]
                self._stack.callback(handle.remove)
        for segment in self.segments:
            segment.may_retry = self.recipe.in_backward and self.recipe.gradients == "weights"

    def _arrived_alone(self, parameter: Tensor) -> None:
        self.gradients.arrived(parameter)
        if self._last:
            self._complete(parameter)  # type: ignore[arg-type]

    def ready(self, segment: Segment) -> tuple[nn.Parameter, ...]:
        """Parameters of a checkpointed block whose gradients are whole for the batch when its backward pass has run."""
        if not self.recipe.in_backward:
            return ()
        found = []
        for parameter in {id(p): p for p in segment.block.parameters() if p.requires_grad}.values():
            key = id(parameter)
            if key not in self._expected:
                continue
            self._expected[key] -= 1
            if self._expected[key] == 0 and self._last:
                found.append(parameter)
        return tuple(found)

    def done(self, segment: Segment, ready: tuple[nn.Parameter, ...]) -> None:
        """The gradients of a checkpointed block are whole for this micro-batch."""
        for parameter in ready:
            self._complete(parameter)

    def kept(self, segment: Segment) -> list[Any]:
        """Gradients and states of the block's parameters, and which of two passes it is."""
        held = [self._held(self._names.get(id(p), ""), p) for p in segment.block.parameters()]
        return [self._counting, *held]

    def here(self, segment: Segment) -> AbstractContextManager[None]:
        """Inside, the block has its weights."""
        return here(segment.block.parameters())

    def keep(self, segment: Segment, kept: list[Any]) -> None:
        """Take them, of an equal block in a dry run."""
        for parameter, held in zip(segment.block.parameters(), kept[1:], strict=True):
            self._hold(self._names.get(id(parameter), ""), parameter, held)

    def _held(self, name: str, parameter: nn.Parameter) -> list[Any]:
        return [*self.gradients.held(parameter), self.mover.states.held(name)]

    def _hold(self, name: str, parameter: nn.Parameter, held: list[Any]) -> None:
        self.gradients.hold(parameter, held[:-1])
        if held[-1] is not None:
            self.mover.make(name, parameter, held=held[-1])

    @torch.no_grad()
    def _complete(self, parameter: nn.Parameter) -> None:
        """A gradient is whole for the batch: count it, or use it, and free it."""
        if not self.gradients.has(parameter):
            return
        if self._counting:
            assert self._squares is not None
            self.gradients.add_squares(parameter, self._squares)
            self.gradients.clear(parameter)
        else:
            self._update(self._names[id(parameter)], parameter)

    def _update(self, name: str, parameter: nn.Parameter) -> None:
        self._updated += 1

        def run() -> Any:
            with here((parameter,)):
                self.mover.move(name, parameter, self.gradients, step=self.steps + 1, coefficient=self._coefficient)
                changed(parameter)
            self.gradients.clear(parameter)
            return self._held(name, parameter)

        if id(parameter) in self._tables:
            run()
            return
        key = ("update", self.mover.kind(parameter), self._coefficient is None)
        given = lambda: (parameter, self._held(name, parameter))  # noqa: E731
        self._hold(name, parameter, repeated(key, None, name.rpartition(".")[0], given, run))

    def _keep(self, call: HeadCall | DistilCall) -> None:
        """What is left of a head's call goes to the gradient of its table."""
        head = output_head(self.model)
        assert head is not None
        bias = head.bias

        def make(table: Tensor, start: int, stop: int) -> Tensor:
            return call.rows_of_gradient(table, bias, start, stop)

        self._tables[id(head.weight)].add_head(call.hidden_ND.shape[0], make)
