"""Activation checkpointing: a block keeps its inputs alone, and runs again when the backward pass reaches it.

A block may run in slices of the batch, forward and backward, so that only one slice's activations exist at a
time. The gradients of its parameters add up over the slices, and are whole when the last one is done: the
update can follow at once, with the whole batch's gradient. (Rows of a batch must not depend on each other, which
holds of all blocks but those with batch statistics.)

What is kept of a block is its hidden input: as it is, in 8 bits, on the host, or on the disk.
"""

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from memfit.account.structure import is_cache
from memfit.errors import UsageError
from memfit.packed.fake import blocks_to_run, is_fake, repeated
from memfit.packed.stash import STORES, Store, stash, unstash

# Legend: B batch, R rows of one slice, W values of a row's last dimension


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The technique: which blocks run twice, in how many slices, and where their inputs wait."""

    blocks: tuple[str, ...]
    """Dotted names of the blocks that are run again; the others keep all their activations."""
    slices: int = 1
    """Parts that the batch is cut into within each of these blocks; at most the batch's rows."""
    store: Store = "memory"

    def __post_init__(self) -> None:
        if self.slices < 1:
            raise ValueError(f"slices must be at least 1, got {self.slices}")
        if self.store not in STORES:
            raise ValueError(f"store must be one of {', '.join(STORES)}, got {self.store!r}")

    def why_not(self, model: nn.Module) -> str | None:
        """Why it cannot be applied to `model`; None if it can."""
        known = dict(model.named_modules())
        for name in self.blocks:
            if name not in known:
                return f"the model has no block {name!r}"
            if self.slices > 1:
                for inner, module in known[name].named_modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        return f"{name}.{inner} takes statistics of the whole batch, which slices do not have"
        return None

    @contextmanager
    def on(self, model: nn.Module, *, owner: "Owner | None" = None) -> "Iterator[list[Segment]]":
        """Inside, the blocks of `model` are checkpointed.

        Args:
            model: fake or real.
            owner: is told when the gradients of a block's parameters are whole for the batch that was run.

        Raises:
            UsageError: `why_not`.
        """
        reason = self.why_not(model)
        if reason is not None:
            raise UsageError(f"activation checkpointing: {reason}.")
        segments = [
            Segment(name, model.get_submodule(name), slices=self.slices, store=self.store, owner=owner)
            for name in self.blocks
        ]
        try:
            for segment in segments:
                segment.block.forward = segment
            yield segments
        finally:
            for segment in segments:
                vars(segment.block).pop("forward", None)


class Owner(Protocol):
    """Who uses the gradients of checkpointed blocks as soon as they are whole."""

    def ready(self, segment: "Segment") -> tuple[nn.Parameter, ...]:
        """Asked before the block's backward pass: parameters whose gradients will be whole after it."""
        ...

    def done(self, segment: "Segment", ready: tuple[nn.Parameter, ...]) -> None:
        """Told after it."""
        ...

    def kept(self, segment: "Segment") -> list[Any]:
        """All tensors that wait for the block's parameters: gradients, optimizer states."""
        ...

    def keep(self, segment: "Segment", kept: list[Any]) -> None:
        """Take back what `kept` has told of an equal block."""
        ...

    def here(self, segment: "Segment") -> AbstractContextManager[None]:
        """Inside, the block has its weights, wherever they are outside."""
        ...


class Alone:
    """No owner: gradients stay where autograd puts them."""

    def ready(self, segment: "Segment") -> tuple[nn.Parameter, ...]:
        return ()

    def done(self, segment: "Segment", ready: tuple[nn.Parameter, ...]) -> None:
        return None

    def kept(self, segment: "Segment") -> list[Any]:
        return [parameter.grad for parameter in segment.block.parameters()]

    def keep(self, segment: "Segment", kept: list[Any]) -> None:
        for parameter, gradient in zip(segment.block.parameters(), kept, strict=True):
            parameter.grad = gradient

    def here(self, segment: "Segment") -> AbstractContextManager[None]:
        return nullcontext()


class Segment:
    """One checkpointed block: stands for its `forward` while the technique is on."""

    def __init__(
        self,
        name: str,
        block: nn.Module,
        *,
        slices: int = 1,
        store: Store = "memory",
        owner: Owner | None = None,
    ) -> None:
        self.name, self.block, self.slices, self.store = name, block, slices, store
        self.owner: Owner = owner or Alone()
        self.plain = block.forward
        self.may_retry = False
        """Whether running out of memory is answered by running again in more slices. Only where no gradient
        was there before, or it would count twice."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            with self.owner.here(self):
                return self.plain(*args, **kwargs)
        # A cache is for generating: this pass would fill it, and the one that recomputes the block once more.
        args = tuple(None if is_cache(value) else value for value in args)
        kwargs = {name: None if is_cache(value) else value for name, value in kwargs.items()}
        leaves, spec = tree_flatten((args, kwargs))
        # A Function whose inputs need no gradient gets no backward, though the block's parameters need one.
        anchor = torch.empty(0, requires_grad=True)
        call = _Call(self, leaves, spec)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        del leaves, args, kwargs
        out = _Recomputed.apply(call, anchor, *tensors)  # type: ignore[no-untyped-call]
        return call.out_tree(out)

    @property
    def draws(self) -> bool:
        """Whether the block draws random numbers while it trains."""
        return self.block.training and any(
            (getattr(module, "p", 0) and isinstance(module, nn.modules.dropout._DropoutNd))
            or getattr(module, "attention_dropout", 0)
            for module in self.block.modules()
        )


class _Call:
    """One call of a block: what is constant, and what its outputs look like."""

    def __init__(self, segment: Segment, leaves: list[Any], spec: TreeSpec) -> None:
        self.segment, self.spec = segment, spec
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        hidden = next((t for t in tensors if t.is_floating_point() and t.dim() > 1), None)
        self.rows = 1 if hidden is None else hidden.shape[0]
        self.out_spec: TreeSpec | None = None
        self.out_leaves: list[Any] = []
        self._autocast: tuple[str, torch.dtype] | None = None

    def run(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The block on these tensors; its outputs' leaves."""
        left = iter(tensors)
        known = zip(self.leaves, self.is_tensor, strict=True)
        leaves = [next(left) if is_tensor else leaf for leaf, is_tensor in known]
        args, kwargs = tree_unflatten(leaves, self.spec)
        del leaves
        out, self.out_spec = tree_flatten(self.segment.plain(*args, **kwargs))
        return out

    def note_autocast(self, tensors: Sequence[Tensor]) -> None:
        """Remember whether products are cast, so that they are when the block runs again."""
        device = tensors[0].device.type if tensors else "cpu"
        if torch.is_autocast_enabled(device):
            self._autocast = (device, torch.get_autocast_dtype(device))

    def autocast(self) -> AbstractContextManager[Any]:
        """As it was in the forward pass; without a cache, which would keep casts made outside of this graph."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._autocast[0], dtype=self._autocast[1], cache_enabled=False)

    def parts(self, tensors: Sequence[Tensor]) -> list[slice]:
        """The slices of the batch; of fake tensors the first two and the last, as those between are alike."""
        count = min(self.segment.slices, self.rows)
        edges = [self.rows * n // count for n in range(count + 1)]
        found = [slice(a, b) for a, b in itertools.pairwise(edges)]
        return blocks_to_run(found) if any(is_fake(t) for t in tensors) else found

    def repeated(self, key: Any, needs: Any, given: Callable[[], Any], run: Callable[[], Any]) -> Any:
        """Of equal blocks in a dry run, the first is run."""
        segment = self.segment
        constants = (str(self.spec), segment.slices, segment.store, tuple(needs), self._autocast)
        leaves = [leaf for leaf in self.leaves if leaf is not None]
        return repeated((key, constants), segment.block, segment.name, lambda: (leaves, given()), run)

    def cut(self, tensors: Sequence[Tensor], part: slice) -> list[Tensor]:
        """Of every tensor with a row for each of the batch, those of the slice."""
        return [t[part] if self.is_sliced(t) else t for t in tensors]

    def is_sliced(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.rows and self.rows > 1

    def out_tree(self, tensors: Any) -> Any:
        """What the block would have returned."""
        left = iter(tensors if isinstance(tensors, tuple) else (tensors,))
        assert self.out_spec is not None
        return tree_unflatten([next(left) if leaf is _TENSOR else leaf for leaf in self.out_leaves], self.out_spec)


_TENSOR = object()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *tensors: Tensor) -> Any:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.needs = ctx.needs_input_grad[2:]
        ctx.random = _random_state(tensors) if call.segment.draws else None
        call.note_autocast(tensors)
        needs = ctx.needs

        def run() -> Any:
            with call.segment.owner.here(call.segment):
                return _forward(call, tensors, needs)

        tree, ctx.stash = call.repeated("forward", needs, lambda: tensors, run)
        out, call.out_spec = tree_flatten(tree)
        call.out_leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in out]
        found = tuple(leaf for leaf in out if isinstance(leaf, Tensor))
        ctx.mark_non_differentiable(*(t for t in found if not t.is_floating_point()))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        call, waiting = ctx.call, ctx.stash
        if waiting is None:
            raise RuntimeError(f"{call.segment.name}: its backward pass has run already, and its inputs are gone.")
        ctx.stash = None
        tensors = [unstash(kept) for kept in waiting]
        del waiting
        segment, owner = call.segment, call.segment.owner
        ready = owner.ready(segment)

        def run() -> Any:
            with owner.here(segment):
                found = _backward_or_smaller(call, tensors, ctx.needs, gradients, ctx.random)
                owner.done(segment, ready)
            return found, owner.kept(segment)

        numbers = {id(parameter): number for number, parameter in enumerate(segment.block.parameters())}
        found, kept = call.repeated(
            ("backward", tuple(numbers[id(parameter)] for parameter in ready)), ctx.needs,
            lambda: (*tensors, *gradients, owner.kept(segment)), run,
        )  # fmt: skip
        owner.keep(segment, kept)
        return None, None, *found


def _forward(call: _Call, tensors: Sequence[Tensor], needs: Sequence[bool]) -> Any:
    """What the block returns, and what is kept of its inputs."""
    parts = call.parts(tensors)
    out = call.run(tensors) if len(parts) == 1 else _joined(call, tensors, parts)
    kept = [
        stash(tensor, call.segment.store if need and tensor.dim() > 1 else "memory")
        for tensor, need in zip(tensors, needs, strict=True)
    ]
    assert call.out_spec is not None
    return tree_unflatten(out, call.out_spec), kept


def _backward_or_smaller(
    call: _Call, tensors: Sequence[Tensor], needs: Sequence[bool], gradients: Any, random: list[Tensor] | None
) -> list[Tensor | None]:
    """The block's backward pass; in more slices, if memory runs out."""
    segment = call.segment
    while True:
        try:
            with _random_state_of(random):
                return _backward(call, tensors, needs, gradients)
        except RuntimeError as error:
            if not (is_out_of_memory(error) and _may_retry(segment, call)):
                raise
        # Outside of the `except` block: the error's traceback holds the frames, and their tensors, alive.
        gc.collect()
        segment.slices = min(2 * segment.slices, call.rows)
        for parameter in segment.block.parameters():
            parameter.grad = None


def _may_retry(segment: Segment, call: _Call) -> bool:
    return segment.may_retry and segment.slices < call.rows and not segment.draws


def _joined(call: _Call, tensors: Sequence[Tensor], parts: list[slice]) -> list[Any]:
    """The outputs of all slices, each written into one tensor for the whole batch.

    What has no row for each of the batch's (T5's position bias) is the same of every slice: the first one's is taken.
    """
    whole: list[Any] = []
    for part in parts:
        out = call.run(call.cut(tensors, part))
        if not whole:
            rows = part.stop - part.start
            whole = [
                leaf.new_empty((call.rows, *leaf.shape[1:]))
                if isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,)
                else leaf
                for leaf in out
            ]
        for target, leaf in zip(whole, out, strict=True):
            if isinstance(leaf, Tensor) and call.is_sliced(target):
                target[part].copy_(leaf)
        del out, leaf, target
    return whole


def _backward(
    call: _Call, tensors: Sequence[Tensor], needs: Sequence[bool], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Run the block again, slice by slice, and its backward pass: the gradients of its inputs."""
    parts = call.parts(tensors)
    found: list[Tensor | None] = [None] * len(tensors)
    for number, part in enumerate(parts):
        own = tensors if len(parts) == 1 else call.cut(tensors, part)
        leaves = [t.detach().requires_grad_(need) for t, need in zip(own, needs, strict=True)]
        with torch.enable_grad(), call.autocast():
            out = [leaf for leaf in call.run(leaves) if isinstance(leaf, Tensor)]
        roots, given = [], []
        for tensor, gradient in zip(out, gradients, strict=True):
            if gradient is None or not tensor.requires_grad:
                continue
            if len(parts) > 1 and call.is_sliced(gradient):
                # Where slices are not of one size, one may have had a row for all.
                gradient = gradient[part].sum_to_size(tensor.shape)
            elif number:
                continue  # it was the first slice's
            roots.append(tensor)
            given.append(gradient)
        del out, own
        torch.autograd.backward(roots, given)
        del roots, given
        for index, leaf in enumerate(leaves):
            if leaf.grad is None:
                continue
            if len(parts) == 1:
                found[index] = leaf.grad
            elif not call.is_sliced(tensors[index]):
                found[index] = leaf.grad if found[index] is None else found[index].add_(leaf.grad)  # type: ignore[union-attr]
            else:
                if found[index] is None:
                    found[index] = torch.empty_like(tensors[index])
                found[index][part].copy_(leaf.grad)  # type: ignore[index]
            leaf.grad = None
        del leaves
    return found


# -- randomness and errors ----------------------------------------------------------------------------


def _random_state(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The states of the random generators, the CPU's and the device's."""
    if any(is_fake(tensor) for tensor in tensors):
        return [torch.empty(5056, dtype=torch.uint8)]
    states = [torch.get_rng_state()]
    device = next((t.device for t in tensors if t.device.type == "cuda"), None)
    if device is not None:
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def _random_state_of(states: list[Tensor] | None) -> Iterator[None]:
    """Inside, random numbers are drawn from `states` on; outside, they go on as if nothing had been."""
    if states is None:
        yield
        return
    if is_fake(states[0]):
        before = [torch.empty_like(states[0])]
        yield
        return
    before = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if len(states) > 1 else [])
    _set_random_state(states)
    try:
        yield
    finally:
        _set_random_state(before)


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said no."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    # oneDNN says no more than that it could not make what it needs memory for.
    known = ("can't allocate memory", "out of memory", "bad_alloc", "could not create a")
    return any(part in text for part in known)
