"""What the search needs to know of a model under a task: for every choice, the bytes it keeps and takes.

The kept bytes are shapes. For the others the original model is traced once, which gives the bytes alive while
each module runs; then each kind of module is run alone, on fake tensors, in 16 bits and in every scheme, and
the difference is what the scheme changes.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from memfit.account.dry_run import Loaded
from memfit.account.follow import Follow
from memfit.account.ledger import Shape
from memfit.account.replay import Blocks, Products
from memfit.account.settle import settle
from memfit.errors import BrokenInput, UsageError
from memfit.format.output import weights_of
from memfit.format.packed import packed_specs
from memfit.models import load_model
from memfit.moments import fake_weights, kind_of, moments
from memfit.packed.forms import Form, LowRank, Narrow, Shared, Whole, is_value, of_member, output_of
from memfit.packed.kernel import runtime_nbytes
from memfit.packed.levels import part_of
from memfit.packed.modules import pack_module_skeleton
from memfit.plan.allowed import Allowed
from memfit.plan.groups import Group, find_groups
from memfit.plan.plan import GroupChoice, Plan
from memfit.plan.price import Prices
from memfit.plan.search import Option
from memfit.source.source import Source
from memfit.task.infer import Infer

KV_PRICES: Final = {16: 0.0, 8: 1e-4, 4: 4e-3, 2: 0.1}
"""Nats a token that a KV cache in so many bits is expected to cost, where nothing was measured."""
_WORKSPACES_NBYTES: Final = 64 << 20
"""More than any packed module takes beside its inputs and outputs."""


class Traced:
    """What a trace of the original under a task says."""

    def __init__(
        self, source: Source, task: Infer, groups: tuple[Group, ...], *, device: str, products: Products
    ) -> None:
        self._owner = {member: group.name for group in groups for member in group.members}
        self._loaded = Loaded(lambda: load_model(source, dtype=torch.bfloat16), device=device, products=products)
        self._task = task
        ledger = self._loaded.run(replace(task, kv_bits=16))
        self.fixed, self.rest, self.running, self.kv_nbytes = moments(ledger, self._owner)
        self.bases = {phase: self.fixed + self.rest[phase] for phase in self.rest}
        self.calls = {(phase, kind_of(module)): arguments for (phase, module), arguments in ledger.calls.items()}
        # Weights of a tensor to the moment when packed ones of so many are loaded. The largest come first, and what
        # stays in 16 bits last: of what comes later nothing is there yet.
        sizes = sorted({_largest(group) for group in groups}, reverse=True)
        self.loads = {size: f"load of tensors of {size:,} weights" for size in sizes}
        full = {phase: rest + self.kv_nbytes.get(phase, 0) for phase, rest in self.rest.items()}
        for (phase, _), nbytes in self.running.items():
            full[phase] = max(full[phase], nbytes + self.kv_nbytes.get(phase, 0))
        # Where a phase is so far below another that no workspace makes up for it, what runs in it matters not.
        self.binding = [phase for phase in full if full[phase] + _WORKSPACES_NBYTES >= max(full.values())]
        if "load" in self.binding:
            self.bases |= dict.fromkeys(self.loads.values(), 0)

    def cache(self, bits: int) -> Option:
        """A KV cache of so many bits, its price left out."""
        _, rest, _, kv_nbytes = moments(self._loaded.run(replace(self._task, kv_bits=bits)), self._owner)
        over = {phase: max(0, rest[phase] - self.rest[phase]) for phase in rest}
        return Option(price=0.0, held=kv_nbytes, transient=over)


class Study:
    """What the search needs to know of one model under one task."""

    def __init__(self, source: Source, task: Infer, allowed: Allowed, *, device: str = "cpu") -> None:
        if not isinstance(allowed, Allowed):
            raise UsageError(f"allowed is a memfit.Allowed, as memfit.Allowed(techniques=('prune',)); got {allowed!r}.")
        self.source, self.task, self.allowed, self.device = source, task, allowed, device
        self.products: Products = {}
        self.skeleton = source.build(dtype=torch.bfloat16)
        self.groups = find_groups(self.skeleton)
        self.schemes = allowed.schemes_of(self.groups)
        self.narrow_heads = allowed.narrowed(self.skeleton, self.groups)
        self._narrow = {name: forms for one in self.narrow_heads for name, forms in one.forms.items()}
        self._ties = {
            group.name: one.narrowing.output for one in self.narrow_heads for group in (one.values, one.output)
        }
        for part in allowed.keep:
            if not any(allowed.keeps(part, group) for group in self.groups):
                sample = self.groups[0].name if self.groups else "none at all"
                raise UsageError(
                    f"--keep {part}: no tensor has this in its name. There is {sample}; `embeddings` means all tables."
                )
        self._alone: dict[Any, int] = {}
        self._builds: dict[str, Any] = {}
        self._caches: dict[int, Option] = {}
        self._transients: dict[tuple[str, Form | None], dict[str, int]] = {}

    @cached_property
    def traced(self) -> "Traced":
        """The original under the task: traced when that is first asked for, as who only carries a plan out need not."""
        return Traced(self.source, self.task, self.groups, device=self.device, products=self.products)

    # -- options ---------------------------------------------------------------------------------

    def items(self, prices: Prices, kv_prices: Mapping[int, float]) -> dict[str, list[Option]]:
        """Options by group name, 16 bits first; the KV cache, where there is one, is the item `kv_cache`."""
        items = {group.name: self._options(group, prices) for group in self.groups}
        if self.traced.kv_nbytes:
            items["kv_cache"] = [self._kv_option(bits, kv_prices[bits]) for bits in self.kv_choices()]
        return items

    def items_for_nothing(self) -> dict[str, list[Option]]:
        """The same options where only their bytes are of interest."""
        return self.items(
            {(name, scheme): 0.0 for name, schemes in self.schemes.items() for scheme in schemes},
            dict.fromkeys(KV_PRICES, 0.0),
        )

    def forms(self, name: str, prices: Prices) -> tuple[Form | None, ...]:
        """What each of a group's options means, in their order: narrower heads only where they are priced."""
        narrow = self._narrow.get(name, ())
        return (None, *self.schemes[name], *(form for form in narrow if (name, form) in prices))

    def kv_choices(self) -> tuple[int, ...]:
        """KV bits that may be chosen, 16 always among them and first."""
        return (16, *sorted((bits for bits in self.allowed.kv_bits if bits != 16), reverse=True))

    def _options(self, group: Group, prices: Prices) -> list[Option]:
        return [self._option(group, form, prices) for form in self.forms(group.name, prices)]

    def _option(self, group: Group, form: Form | None, prices: Prices) -> Option:
        transient = self._transient(group, form)
        if form is None:
            absent = frozenset(self.traced.loads.values()).intersection(self.traced.bases)
            return Option(price=0.0, absent=absent, persistent_nbytes=2 * group.weights, transient=transient)
        parts = zip(group.forms(form), group.shapes, strict=True)
        before = {moment for size, moment in self.traced.loads.items() if size > _largest(group)}
        return Option(
            price=prices[group.name, form],
            absent=frozenset(before).intersection(self.traced.bases),
            persistent_nbytes=sum(2 * math.prod(s) if own is None else runtime_nbytes(own, s) for own, s in parts),
            transient=transient,
            tied=f"{self._ties[group.name]} {form.kept}" if isinstance(form, Narrow) else None,
        )

    def _transient(self, group: Group, scheme: Form | None) -> dict[str, int]:
        """Bytes over the phase's base that are alive while the group's modules run."""
        key = (group.name, scheme)
        if key not in self._transients:
            self._transients[key] = self._over_base(group, scheme)
        return self._transients[key]

    def _over_base(self, group: Group, scheme: Form | None) -> dict[str, int]:
        over = {}
        for phase, rest in self.traced.rest.items():
            if phase not in self.traced.binding:
                over[phase] = 0
                continue
            if phase == "load":
                over[phase] = 0
                over[self.traced.loads[_largest(group)]] = self._loading(group, scheme)
                continue
            most = 0
            for member in group.members:
                traced = self.traced.running.get((phase, member))
                if traced is None:
                    continue
                if (own := _own(scheme, member)) is not None:
                    traced += self.alone(member, phase, own) - self.alone(member, phase, None)
                most = max(most, traced)
            over[phase] = max(0, most - rest)
        return over

    def _loading(self, group: Group, scheme: Form | None) -> int:
        """Bytes alive while the group's weights are read, beyond those that stay."""
        found = 0
        for member in group.members:
            own = _own(_standing_alone(scheme), member)
            if own is None:
                continue
            key = ("load", self._build_of(member), own)
            if key not in self._alone:
                self._alone[key] = self._load_alone(member, own, table=group.kind == "embedding")
            found = max(found, self._alone[key])
        return found

    def _load_alone(self, member: str, scheme: Form, *, table: bool) -> int:
        holder = nn.ModuleDict({"it": copy.deepcopy(self.skeleton.get_submodule(member))})
        pack_module_skeleton(holder, {"it": scheme}, tied={})
        specs = {
            spec.name: spec
            for name, weight in weights_of(self.skeleton, member).items()
            for spec in packed_specs(
                name, (weight.shape.numel() // weight.shape[-1], weight.shape[-1]), scheme, embedding=table
            )
        }

        def read(name: str, start: int | None = None, stop: int | None = None) -> Tensor:
            spec = specs.get(name) or specs[name.removesuffix("_packed")]
            rows = spec.shape[0] if start is None or stop is None else stop - start
            stored = torch.empty((rows, *spec.shape[1:]), dtype=spec.dtype)
            return part_of(name.rpartition(".")[2], stored, scheme)

        follow = Follow()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad(), follow, follow.phase("load"):
            holder["it"].load_from(read, member)  # type: ignore[operator]
        account = settle(follow.ledger, heap=False)
        return account.peak_nbytes - account.phases[0].end_nbytes

    def alone(self, member: str, phase: str, scheme: Form | None) -> int:
        """Peak bytes of one module run alone on the inputs it has in `phase`, weights and inputs left out."""
        scheme = _standing_alone(scheme)
        arguments = self.traced.calls.get((phase, kind_of(member)))
        if arguments is None:
            return 0
        key = (self._build_of(member), arguments, scheme)
        if key not in self._alone:
            self._alone[key] = self._run_alone(member, arguments, scheme)
        return self._alone[key]

    def _build_of(self, member: str) -> Any:
        """A module's class and shapes: equal for modules that take the same bytes on the same inputs."""
        if member not in self._builds:
            module = self.skeleton.get_submodule(member)
            shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
            self._builds[member] = (type(module), shapes)
        return self._builds[member]

    def _run_alone(self, member: str, arguments: tuple[Any, ...], scheme: Form | None) -> int:
        holder = nn.ModuleDict({"it": copy.deepcopy(self.skeleton.get_submodule(member))})
        if scheme is not None:
            pack_module_skeleton(holder, {"it": scheme}, tied={})
        follow = Follow()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), follow:
            with follow.paused():
                inputs = [a.empty() if isinstance(a, Shape) else a for a in arguments]
                module = holder["it"]
                fake_weights(module)
                known = [
                    t for t in (*inputs, *module.parameters(), *module.buffers()) if isinstance(t, Tensor)
                ]
                for tensor in known:
                    follow.number_of(tensor)
            start = len(follow.ledger.events)
            with follow.phase("alone"), Blocks(follow, products=self.products).on_products():
                module(*inputs)
        total = peak = 0
        for number, sign in follow.ledger.events[start:]:
            total += sign * follow.ledger.storages[number].nbytes
            peak = max(peak, total)
        return peak

    def _kv_option(self, bits: int, price: float) -> Option:
        if bits == 16:
            return Option(price=price, held=dict(self.traced.kv_nbytes))
        if bits not in self._caches:
            self._caches[bits] = self.traced.cache(bits)
        return replace(self._caches[bits], price=price)

    def adopt(self, given: Plan, prices: Prices, kv_prices: Mapping[int, float]) -> Plan:
        """A plan made elsewhere, or edited, for this model: bytes and prices anew, from its schemes alone.

        Where a scheme has no price, the plan has no expected loss.

        Raises:
            BrokenInput: it is no plan for this model.
        """
        groups = {group.members: group for group in self.groups}
        choices, known = [], True
        for n, choice in enumerate(given.choices):
            group, scheme = groups.pop(choice.members, None), choice.scheme
            if group is None:
                raise BrokenInput(
                    f"the plan's choices[{n}].members, {', '.join(choice.members)}, are no tensors of "
                    f"{self.source.name} that share a choice. Take `members` as `memfit plan` writes them."
                )
            if scheme is not None and (reason := group.why_not(scheme)) is not None:
                raise BrokenInput(f"the plan's choices[{n}].scheme, {scheme.name}: {reason}")
            price = 0.0 if scheme is None else prices.get((group.name, scheme))
            known = known and price is not None
            choices.append(
                replace(
                    choice, name=group.name, weights=group.weights, nbytes=group.nbytes(scheme), price=price or 0.0
                )
            )
        kept = {choice.members[0]: choice.scheme for choice in choices}
        for one in self.narrow_pairs():
            values, output = (kept.get(group.members[0]) for group in one)
            sides = [form.kept if isinstance(form, Narrow) else None for form in (values, output)]
            if sides[0] != sides[1]:
                raise BrokenInput(
                    f"the plan's {one[0].name} and {one[1].name} are heads of {sides[0] or 'all'} and of "
                    f"{sides[1] or 'all'} dimensions: what values make the output reads. Give both the same `kept`."
                )
        if groups:
            names = ", ".join(group.name for group in groups.values())
            raise BrokenInput(f"the plan has no choice for {names} of {self.source.name}.")
        expected = math.fsum(choice.price for choice in choices) + kv_prices[given.kv_bits]
        return replace(
            given,
            choices=tuple(choices),
            expected_kl=expected if known and prices else None,
            predicted=None,
            predicted_fit=None,
        )

    def narrow_pairs(self) -> list[tuple[Group, Group]]:
        """The groups of values and of the output of each attention."""
        group_of = {member: group for group in self.groups for member in group.members}
        found = [(value, output_of(value)) for value in group_of if is_value(value)]
        return [(group_of[value], group_of[output]) for value, output in found if output in group_of]

    # -- results ---------------------------------------------------------------------------------

    def plan(
        self,
        chosen: Mapping[str, int],
        prices: Prices,
        budget_nbytes: int,
        kv_prices: Mapping[int, float],
        priced_by: str,
    ) -> Plan:
        """The plan that a solution of the search means."""
        choices = []
        for group in self.groups:
            scheme = self.forms(group.name, prices)[chosen[group.name]]
            choices.append(
                GroupChoice(
                    name=group.name,
                    members=group.members,
                    scheme=scheme,
                    weights=group.weights,
                    nbytes=group.nbytes(scheme),
                    price=0.0 if scheme is None else prices[group.name, scheme],
                )
            )
        kv_bits = self.kv_choices()[chosen["kv_cache"]] if "kv_cache" in chosen else 16
        expected = sum(choice.price for choice in choices) + (kv_prices[kv_bits] if self.traced.kv_nbytes else 0.0)
        return Plan(
            model=self.source.name,
            task=replace(self.task, kv_bits=kv_bits).to_json(),
            budget_nbytes=budget_nbytes,
            choices=tuple(choices),
            kv_bits=kv_bits,
            device=self.device,
            priced_by=priced_by,  # type: ignore[arg-type]
            expected_kl=expected,
        )


def _largest(group: Group) -> int:
    """Weights of the group's largest tensor."""
    return max(map(math.prod, group.shapes))


def _own(scheme: Form | None, member: str) -> Form | None:
    """A member's own form where only its values are narrower."""
    return of_member(scheme, member, 0, ()) if isinstance(scheme, Narrow) else scheme


def _standing_alone(scheme: Form | None) -> Form | None:
    """A form that a module can have without others: what is shared runs as what its owner has beside factors."""
    if not isinstance(scheme, Shared):
        return scheme
    base = Whole() if scheme.common == "weight" else None
    return LowRank(rank=scheme.rank, base=base) if scheme.rank else Whole()
