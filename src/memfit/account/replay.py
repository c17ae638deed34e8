"""Trace each kind of block once: a stack of equal blocks is told from its first.

When a block of a `ModuleList` is called, its call is described: the block's structure, its inputs'
shapes and which of them share a storage, and its layer of the cache. The first call of a description is
traced. Later ones are replayed: the same births and ends are written in the same order, under the later
block's own name, and outputs and cache are set to fake tensors of the recorded shapes. What cannot be
described so (an unknown object among the inputs, a storage that outlives the call unseen) is traced.

So the account of a whole model is exact at every moment, and costs one block of each kind.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from memfit.packed.fake import repeating
from memfit.packed.integer import IntegerWeight
from memfit.packed.store import PackedWeight

from .fakes import make_fake, view_fake
from .follow import Follow
from .ledger import Storage
from .structure import (
    PLAIN,
    Itself,
    cache_layers,
    is_cache,
    is_record,
    layer_number,
    packed_holders,
    shape_of,
    stacked_blocks,
    structure_of,
    take_apart,
)


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as a recipe: which storage (an input's role, or the k-th born), and the view on it."""

    known: bool
    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(slots=True)
class _Recording:
    """What one call of a block did."""

    births: list[tuple[Storage, str | None]]
    """Each storage, and its module's name below the block's; None: it is of no module of the block."""
    events: list[tuple[bool, int, int]]
    """(born in the call?, index among births or roles, +1 or −1)."""
    spec: TreeSpec
    outputs: list[Any]
    states: list[dict[str, Any]]
    """Attributes of each cache layer after the call."""
    marks: list[tuple[int, str]]
    """Where phases begin or end: before which event, and the name without its prefix; empty where one ends."""
    kernels: set[tuple[Any, ...]]
    """Shapes of its 16-bit products: another ledger has not seen them."""


class Blocks:
    """Replays calls of equal blocks while it is `on` a model.

    Args:
        products: recordings of products with packed weights; given to several, each is traced once for all.
        repeats: of what training does over and over, by the recipe at hand; given to several that have one recipe.
    """

    def __init__(
        self, follow: Follow, *, products: "Products | None" = None, repeats: "Products | None" = None
    ) -> None:
        self.follow = follow
        self._known: Products = {}
        self._products: Products = {} if products is None else products
        self._repeats: Products = {} if repeats is None else repeats
        self._structures: dict[int, Any] = {}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Wrap the blocks of every stack in `model`; unwrapped again at the end."""
        wrapped: list[nn.Module] = []
        for name, block in (*stacked_blocks(model), *packed_holders(model)):
            structure = structure_of(block)
            if structure is not None:
                block.forward = self._wrap(name, block, structure, block.forward)
                wrapped.append(block)
        try:
            with self.on_products():
                yield
        finally:
            for block in wrapped:
                del block.forward

    @contextmanager
    def on_training(self) -> Iterator[None]:
        """What training does over and over, block by block and weight by weight (`packed.fake.repeated`)."""
        with repeating(self._repeat), self.on_products():
            yield

    def _repeat(
        self,
        key: Any,
        block: nn.Module | None,
        name: str,
        given: Callable[[], Sequence[Any]],
        call: Callable[[], Any],
        any_recipe: bool,
        prefix: str | None,
    ) -> Any:
        structure = None
        if block is not None:
            structure = self._structures.setdefault(id(block), None) or structure_of(block)
            self._structures[id(block)] = structure
        modes = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        described = self._describe((key, structure, modes), None, given(), {})
        known = self._products if any_recipe else self._repeats
        if described is not None and any(isinstance(part, Itself) for part in described[0][2]):
            known = self._known  # another trace has other objects, and may give them the same number
        return self._once(known, described, name, call, prefix)

    @contextmanager
    def on_products(self) -> Iterator[None]:
        """A product with a block of a packed weight takes what an equal one took: experts, and every chunk."""
        plain = {name: getattr(PackedWeight, name) for name in ("_times_block", "_times_nibbles")}

        def replayed(name: str) -> Any:
            def times(store: PackedWeight, x: Tensor, start: int, stop: int) -> Any:
                weight = (name, store.scheme, store.kernel, store.shape[1], stop - start, store.offset(start))
                described = self._describe((weight, self.follow.device), None, (x,), {})
                call = partial(plain[name], store, x, start, stop)
                return self._once(self._products, described, self.follow.path[-1], call)

            return times

        times_tokens = IntegerWeight._times_tokens

        def integers(store: IntegerWeight, x: Tensor) -> Any:
            weight = ("integers", store.scheme, store.kernel, store.shape)
            described = self._describe((weight, self.follow.device), None, (x,), {})
            return self._once(self._products, described, self.follow.path[-1], partial(times_tokens, store, x))

        for name in plain:
            setattr(PackedWeight, name, replayed(name))
        IntegerWeight._times_tokens = integers  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for name, method in plain.items():
                setattr(PackedWeight, name, method)
            IntegerWeight._times_tokens = times_tokens  # type: ignore[method-assign]

    @contextmanager
    def on_loading(self) -> Iterator[None]:
        """Packed weights of one scheme and shape are loaded, or packed, alike: the first is traced, the others
        replayed."""
        kinds = (PackedWeight, IntegerWeight)
        plain: dict[type, Any] = {kind: kind.load_from for kind in kinds}

        def load_from(store: PackedWeight | IntegerWeight, read: Any, prefix: str, **options: Any) -> None:
            key = ("load", store.scheme, store.shape, store.kernel, prefix.rpartition(".")[2])

            def call() -> dict[str, Any]:
                plain[type(store)](store, read, prefix, **options)
                return dict(store._buffers)

            store._buffers.update(self._once(self._known, (key, {}, []), prefix, call))

        for kind in kinds:
            kind.load_from = load_from  # type: ignore[method-assign, assignment]
        try:
            with repeating(self._repeat):
                yield
        finally:
            for kind in kinds:
                kind.load_from = plain[kind]  # type: ignore[method-assign]

    def _wrap(self, name: str, block: nn.Module, structure: Any, forward: Any) -> Any:
        own_layer = layer_number(block)

        def call(*args: Any, **kwargs: Any) -> Any:
            described = self._describe(structure, own_layer, args, kwargs)
            return self._once(self._known, described, name, lambda: forward(*args, **kwargs))

        return call

    def _once(self, known: "Products", described: Any, name: str, call: Any, prefix: str | None = None) -> Any:
        """What `call` does: traced if nothing of that description was, else replayed."""
        if described is None:
            return call()
        key, roles, layers = described
        recording = known.get(key, _UNSEEN)
        if isinstance(recording, _Recording):
            return self._replay(recording, name, roles, layers, prefix or "")
        if recording is None:
            roles.clear()
            return call()
        numbers = list(roles)
        roles.clear()  # holding an input would keep it alive through the block
        return self._record(known, key, name, numbers, layers, call, prefix)

    # -- describing ---------------------------------------------------------------------------------

    def _describe(
        self, structure: Any, own_layer: int | None, args: Any, kwargs: Any
    ) -> tuple[Any, dict[int, Tensor], list[Any]] | None:
        """(key of the call, its input storages and a tensor on each, its cache layers), None if unknown."""
        leaves, spec = tree_flatten((args, kwargs), is_leaf=is_cache)
        layers: list[Any] = []
        parts: list[Any] = []
        tensors: list[Tensor] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
                parts.append("tensor")
            elif isinstance(leaf, PLAIN):
                parts.append(leaf)
            elif is_cache(leaf):
                found = cache_layers(leaf, own_layer)
                if found is None:
                    return None
                layers += found[0]
                parts.append(found[1])
            else:
                parts.append(Itself(type(leaf), id(leaf)))
        for layer in layers:
            for attribute, value in sorted(vars(layer).items()):
                parts.append(attribute)
                take_apart(value, parts, tensors)
        roles: dict[int, Tensor] = {}
        order: dict[int, int] = {}
        for tensor in tensors:
            number = self.follow.number_of(tensor)
            roles.setdefault(number, tensor)
            parts.append((order.setdefault(number, len(order)), shape_of(tensor)))
        key = (structure, repr(spec), tuple(parts))
        try:
            hash(key)
        except TypeError:
            return None
        return key, roles, layers

    # -- recording ----------------------------------------------------------------------------------

    def _record(
        self,
        known: "Products",
        key: Any,
        name: str,
        roles: Iterable[int],
        layers: list[Any],
        call: Any,
        prefix: str | None,
    ) -> Any:
        ledger = self.follow.ledger
        first_event, first_birth, first_mark = len(ledger.events), len(ledger.storages), len(ledger.marks)
        others, ledger.kernels = ledger.kernels, set()
        try:
            out = call()
        finally:
            kernels, ledger.kernels = ledger.kernels, ledger.kernels | others
        role_of = {number: role for role, number in enumerate(roles)}
        known[key] = None
        marks = [(at - first_event, phase) for at, phase in ledger.marks[first_mark:]]
        if marks and prefix is None:
            return out
        events = []
        alive: set[int] = set()
        for number, sign in ledger.events[first_event:]:
            if number >= first_birth:
                events.append((True, number - first_birth, sign))
                (alive.add if sign > 0 else alive.discard)(number)
            elif number in role_of:
                events.append((False, role_of[number], sign))
            else:
                return out
        seen: set[int] = set()

        def recipe(value: Any) -> Any:
            if not isinstance(value, Tensor):
                if not isinstance(value, PLAIN):
                    raise _Unknown
                return value
            number = self.follow.number_of(value)
            seen.add(number)
            given = number in role_of
            if not given and number < first_birth:
                raise _Unknown
            index = role_of[number] if given else number - first_birth
            return _View(
                given, index, tuple(value.shape), tuple(value.stride()), int(value.storage_offset()), value.dtype
            )

        try:
            leaves, spec = tree_flatten(out)
            outputs = [recipe(leaf) for leaf in leaves]
            states = [{name: _map(value, recipe) for name, value in vars(layer).items()} for layer in layers]
        except _Unknown:
            return out
        if alive - seen:
            return out
        births = []
        for storage in ledger.storages[first_birth:]:
            own = storage.module.startswith(name)
            births.append((storage, storage.module.removeprefix(name) if own else None))
        marks = [(at, phase.removeprefix(prefix or "")) for at, phase in marks]
        known[key] = _Recording(births, events, spec, outputs, states, marks, kernels)
        return out

    # -- replaying ----------------------------------------------------------------------------------

    def _replay(
        self, recording: _Recording, name: str, roles: dict[int, Tensor], layers: list[Any], prefix: str
    ) -> Any:
        ledger = self.follow.ledger
        first = len(ledger.events)
        ledger.kernels |= recording.kernels
        ledger.marks += [(first + at, phase and prefix + phase) for at, phase in recording.marks]
        inputs = list(roles)
        numbers: dict[int, int] = {}
        for born, index, sign in recording.events:
            if not born:
                ledger.ended(inputs[index])
            elif sign > 0:
                storage, below = recording.births[index]
                module = storage.module if below is None else name + below
                numbers[index] = ledger.born(
                    Storage(
                        storage.nbytes, storage.kind, module, storage.operator, storage.dtype, storage.unwritten
                    )
                )
            else:
                ledger.ended(numbers[index])
        bases: dict[tuple[bool, int], Tensor] = {}

        def build(value: Any) -> Any:
            if not isinstance(value, _View):
                return value
            where = (value.known, value.index)
            base = bases.get(where)
            if base is None:
                base = bases[where] = (
                    roles[inputs[value.index]] if value.known else self._base(value, recording, numbers)
                )
            return view_fake(base, value.shape, value.stride, value.offset, value.dtype)

        with self.follow.paused():
            outputs = [build(value) for value in recording.outputs]
            for layer, state in zip(layers, recording.states, strict=True):
                for attribute, value in state.items():
                    setattr(layer, attribute, _map(value, build))
        return tree_unflatten(outputs, recording.spec)

    def _base(self, view: _View, recording: _Recording, numbers: dict[int, int]) -> Tensor:
        """A fake 1-dim tensor over the whole of the storage born in the call that `view` looks at."""
        storage = recording.births[view.index][0]
        assert self.follow.mode is not None
        base = make_fake(self.follow.mode, (storage.nbytes // view.dtype.itemsize,), (1,), view.dtype)
        self.follow.adopt(base.untyped_storage(), numbers[view.index])
        return base


Products = dict[Any, _Recording | None]
"""Recordings by description; None where what happened cannot be told."""


class _Unknown(Exception):
    """A value that no recipe describes."""


_UNSEEN = object()


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, (Tensor, _View)):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if not isinstance(value, PLAIN) and is_record(value, _View):
        made = object.__new__(type(value))
        vars(made).update({key: _map(item, change) for key, item in vars(value).items()})
        return made
    return value
