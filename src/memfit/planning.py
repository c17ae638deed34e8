"""From a model, a task and a budget to a plan: trace, price, search, trace again.

The search needs, for every choice of every group, the bytes it keeps and the bytes it takes while it runs.
The kept bytes are shapes. For the others the original model is traced once, which gives the bytes alive while
each module runs; then each kind of module is run alone, on fake tensors, in 16 bits and in every scheme, and
the difference is what the scheme changes. The plan that wins is traced whole, so the figure shown is no sum.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from memfit import __version__
from memfit.account.account import Account
from memfit.account.dry_run import Loaded, trace
from memfit.account.follow import Follow, Shape, settle
from memfit.account.replay import Blocks, Products
from memfit.errors import DoesNotFit
from memfit.format.config import model_config
from memfit.format.output import stored_tensors, weights_of
from memfit.format.packed import packed_specs
from memfit.models import load_model
from memfit.moments import fake_weights, kind_of, moments
from memfit.packed.bits import pack_values
from memfit.packed.kernel import runtime_nbytes
from memfit.packed.modules import pack_module_skeleton
from memfit.packed.scheme import BITS, Scheme
from memfit.plan.groups import Group, candidates, find_groups
from memfit.plan.plan import GroupChoice, Plan
from memfit.plan.price import Prices, prices_without_weights
from memfit.plan.search import Option, merge, smallest_budget, solve
from memfit.source.load import load
from memfit.source.planned import planned_checkpoint
from memfit.source.source import Source
from memfit.task.infer import Infer
from memfit.units import format_size

_WORKSPACES_NBYTES: Final = 64 << 20
"""More than any packed module takes beside its inputs and outputs."""


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What the search may choose from."""

    bits: tuple[int, ...] = BITS
    groups: Mapping[int, tuple[int | None, ...]] | None = None
    """Group sizes by bits; default: `memfit.plan.groups.GROUPS_OF_BITS`."""
    symmetric: bool = True
    kv_bits: tuple[int, ...] = (16, 8, 4)
    keep: tuple[str, ...] = ()
    """Groups that stay in 16 bits: a part of their names is enough."""

    def schemes(self, group: Group) -> tuple[Scheme, ...]:
        """Schemes for one group; none if it is kept."""
        if any(part in name for part in self.keep for name in (group.name, *group.members)):
            return ()
        options: dict[str, Any] = {} if self.groups is None else {"groups": self.groups}
        bits = tuple(b for b in self.bits if b < 16)
        return candidates(group, bits=bits, symmetric=self.symmetric, **options)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Allowed":
        """The settings that `dataclasses.asdict` gave, after JSON made lists and text of them."""
        groups = data["groups"]
        return cls(
            bits=tuple(data["bits"]),
            groups=None if groups is None else {int(bits): tuple(sizes) for bits, sizes in groups.items()},
            symmetric=data["symmetric"],
            kv_bits=tuple(data["kv_bits"]),
            keep=tuple(data["keep"]),
        )


KV_PRICES: Final = {16: 0.0, 8: 1e-4, 4: 2e-2, 2: 1.0}
"""Nats a token that a KV cache in so many bits is expected to cost, where nothing was measured."""
_TIGHTER: Final = 8
"""Times that less is asked of the search, by doubling steps, where its plan traced whole is over the budget."""


def make_plan(
    source: Source,
    *,
    budget_nbytes: int,
    task: Infer,
    allowed: Allowed | None = None,
    prices: Prices | None = None,
    kv_prices: Mapping[int, float] | None = None,
    priced_by: str = "weights",
    device: str = "cpu",
    study: "Study | None" = None,
) -> Plan:
    """The plan of least expected loss whose traced peak is within the budget.

    Args:
        source: the model; its weights are not read here.
        budget_nbytes: allowed at the peak of the task, allocated bytes.
        task: what will be run; its `kv_bits` are the plan's to choose.
        allowed: what the search may choose from.
        prices: by (group name, scheme); default: from shapes alone.
        kv_prices: by KV bits; those not given are as in `KV_PRICES`.
        priced_by: `text` or `weights`, for the record.
        study: of the same source, task, allowed and device, if there is one.

    Raises:
        DoesNotFit: nothing allowed fits; says what binds and what would help.
    """
    study = study or Study(source, task, allowed or Allowed(), device=device)
    costs = KV_PRICES | dict(kv_prices or {})
    if prices is None:
        prices = prices_without_weights(study.groups, study.schemes)
    items = study.items(prices, costs)
    tried, excess = budget_nbytes, 0
    for n in range(_TIGHTER):
        tried -= excess << max(n - 1, 0)
        solution = solve(merge(items), bases=study.bases, budget_nbytes=tried)
        if solution is None:
            break
        plan = study.plan(solution.chosen, prices, budget_nbytes, costs, priced_by)
        predicted = study.predict(plan)
        if predicted.peak_nbytes <= budget_nbytes:
            return replace(plan, predicted=predicted.to_json())
        # The rows of the search are bounds from parts; where the whole is a little over, ask for less.
        excess = predicted.peak_nbytes - budget_nbytes
    least = smallest_budget(merge(items), bases=study.bases)
    plan = study.plan(least.chosen, prices, budget_nbytes, costs, priced_by)
    predicted = study.predict(plan)
    if predicted.peak_nbytes <= budget_nbytes:
        return replace(plan, predicted=predicted.to_json())
    raise study.does_not_fit(items, budget_nbytes)


def predict(
    source: Source, plan: Plan, task: Infer, *, device: str = "cpu", products: Products | None = None
) -> Account:
    """The account of the fitted model loading from its files and running the task. Nothing is read."""
    planned = planned_source(source, plan)
    ran = replace(task, kv_bits=plan.kv_bits)
    ledger = trace(lambda: load(planned, dtype=torch.bfloat16), ran, device=device, products=products)
    return settle(ledger, device=device)


def account_of(
    source: Source, task: Infer, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> Account:
    """The account of the model as it is."""
    return settle(trace(lambda: load_model(source, dtype=dtype), task, device=device), device=device)


def planned_source(source: Source, plan: Plan) -> Source:
    """The source that the plan's output directory will be, its tensors announced and not there."""
    tensors, raw = plan_files(source, plan)
    return Source(
        name=f"{source.name} as planned",
        directory=None,
        config=source.config,
        checkpoint=planned_checkpoint((spec.name, spec.dtype, spec.shape) for spec in tensors),
        raw=raw,
    )


def plan_files(source: Source, plan: Plan) -> tuple[list[Any], dict[str, Any]]:
    """What the output will hold: its tensors (name, dtype, shape), in file order, and its config.json."""
    model = source.build(dtype=torch.bfloat16)
    schemes = plan.schemes()
    layout = stored_tensors(model, schemes)
    raw = model_config(
        source.config,
        schemes=schemes,
        version=__version__,
        ignore=layout.ignore,
        embeddings=layout.embeddings,
        tied=layout.tied,
        kv_bits=plan.kv_bits,
    )
    raw["architectures"] = [type(model).__name__]
    return list(layout.specs), raw


class Study:
    """What the search needs to know of one model under one task."""

    def __init__(self, source: Source, task: Infer, allowed: Allowed, *, device: str = "cpu") -> None:
        self.source, self.task, self.allowed, self.device = source, task, allowed, device
        self.products: Products = {}
        self.skeleton = source.build(dtype=torch.bfloat16)
        self.groups = find_groups(self.skeleton)
        self.schemes = {group.name: allowed.schemes(group) for group in self.groups}
        self.loaded = Loaded(
            lambda: load_model(source, dtype=torch.bfloat16), device=device, products=self.products
        )
        self.ledger = self.loaded.run(replace(task, kv_bits=16))
        owner = {member: group.name for group in self.groups for member in group.members}
        self.fixed, self.rest, self.running, self.kv_nbytes = moments(self.ledger, owner)
        self.bases = {phase: self.fixed + self.rest[phase] for phase in self.rest}
        self._calls = {
            (phase, kind_of(module)): arguments for (phase, module), arguments in self.ledger.calls.items()
        }
        self._alone: dict[Any, int] = {}
        self._builds: dict[str, Any] = {}
        self._caches: dict[int, Option] = {}
        self._later = self._loaded_later()
        full = {phase: rest + self.kv_nbytes.get(phase, 0) for phase, rest in self.rest.items()}
        for (phase, _), nbytes in self.running.items():
            full[phase] = max(full[phase], nbytes + self.kv_nbytes.get(phase, 0))
        # Where a phase is so far below another that no workspace makes up for it, what runs in it matters not.
        self._binding = [phase for phase in full if full[phase] + _WORKSPACES_NBYTES >= max(full.values())]

    def _loaded_later(self) -> dict[str, int]:
        """Group to the fewest bytes of those that are loaded after it: the largest are loaded first."""
        later: dict[str, int] = {}
        total = 0
        for group in sorted(self.groups, key=lambda group: max(map(math.prod, group.shapes))):
            later[group.name] = total
            least = min((group.nbytes(scheme) for scheme in self.schemes[group.name]), default=2 * group.weights)
            total += least
        return later

    # -- options ---------------------------------------------------------------------------------

    def items(self, prices: Prices, kv_prices: Mapping[int, float]) -> dict[str, list[Option]]:
        """Options by group name, 16 bits first; the KV cache, where there is one, is the item `kv_cache`."""
        items = {group.name: self._options(group, prices) for group in self.groups}
        if self.kv_nbytes:
            items["kv_cache"] = [self._kv_option(bits, kv_prices[bits]) for bits in self.kv_choices()]
        return items

    def items_for_nothing(self) -> dict[str, list[Option]]:
        """The same options where only their bytes are of interest."""
        return self.items(
            {(name, scheme): 0.0 for name, schemes in self.schemes.items() for scheme in schemes},
            dict.fromkeys(KV_PRICES, 0.0),
        )

    def require_fit(self, budget_nbytes: int) -> None:
        """Nothing, if some plan fits: to be known before hours go into finding a good one.

        Raises:
            DoesNotFit: as `make_plan` would.
        """
        items = self.items_for_nothing()
        least = smallest_budget(merge(items), bases=self.bases)
        if least.needed_nbytes > budget_nbytes:
            error = self.does_not_fit(items, budget_nbytes)
            if error.smallest_nbytes > budget_nbytes:
                raise error

    def kv_choices(self) -> tuple[int, ...]:
        """KV bits that may be chosen, 16 always among them and first."""
        return (16, *sorted((bits for bits in self.allowed.kv_bits if bits != 16), reverse=True))

    def _options(self, group: Group, prices: Prices) -> list[Option]:
        plain = Option(price=0.0, persistent_nbytes=2 * group.weights, transient=self._transient(group, None))
        return [plain] + [
            Option(
                price=prices[group.name, scheme],
                persistent_nbytes=sum(runtime_nbytes(scheme, shape) for shape in group.shapes),
                transient=self._transient(group, scheme),
            )
            for scheme in self.schemes[group.name]
        ]

    def _transient(self, group: Group, scheme: Scheme | None) -> dict[str, int]:
        """Bytes over the phase's base that are alive while the group's modules run."""
        over = {}
        for phase, rest in self.rest.items():
            if phase not in self._binding:
                over[phase] = 0
                continue
            if phase == "load":
                over[phase] = max(0, self._loading(group, scheme) - rest - self._later[group.name])
                continue
            most = 0
            for member in group.members:
                traced = self.running.get((phase, member))
                if traced is None:
                    continue
                if scheme is not None:
                    traced += self.alone(member, phase, scheme) - self.alone(member, phase, None)
                most = max(most, traced)
            over[phase] = max(0, most - rest)
        return over

    def _loading(self, group: Group, scheme: Scheme | None) -> int:
        """Bytes alive while the group's weights are read, beyond those that stay."""
        if scheme is None:
            return 0
        found = 0
        for member in group.members:
            key = ("load", self._build_of(member), scheme)
            if key not in self._alone:
                self._alone[key] = self._load_alone(member, scheme, table=group.kind == "embedding")
            found = max(found, self._alone[key])
        return found

    def _load_alone(self, member: str, scheme: Scheme, *, table: bool) -> int:
        holder = nn.ModuleDict({"it": copy.deepcopy(self.skeleton.get_submodule(member))})
        pack_module_skeleton(holder, {"it": scheme}, tied={})
        specs = {
            spec.name: spec
            for name, weight in weights_of(self.skeleton, member).items()
            for spec in packed_specs(
                name, (weight.shape.numel() // weight.shape[-1], weight.shape[-1]), scheme
            )
        }

        def read(name: str, start: int | None = None, stop: int | None = None) -> Tensor:
            spec = specs[name]
            rows = spec.shape[0] if start is None or stop is None else stop - start
            if table and name.endswith("weight_packed"):
                values = spec.shape[-1] * 32 // scheme.bits
                return pack_values(torch.empty((rows, values), dtype=torch.int8), scheme.bits)
            return torch.empty((rows, *spec.shape[1:]), dtype=spec.dtype)

        follow = Follow()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad(), follow, follow.phase("load"):
            holder["it"].load_from(read, member)  # type: ignore[operator]
        account = settle(follow.ledger)
        return account.peak_nbytes - account.phases[0].end_nbytes

    def alone(self, member: str, phase: str, scheme: Scheme | None) -> int:
        """Peak bytes of one module run alone on the inputs it has in `phase`, weights and inputs left out."""
        arguments = self._calls.get((phase, kind_of(member)))
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

    def _run_alone(self, member: str, arguments: tuple[Any, ...], scheme: Scheme | None) -> int:
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
            return Option(price=price, held=dict(self.kv_nbytes))
        if bits not in self._caches:
            ledger = self.loaded.run(replace(self.task, kv_bits=bits))
            owner = {member: group.name for group in self.groups for member in group.members}
            _, rest, _, kv_nbytes = moments(ledger, owner)
            over = {phase: max(0, rest[phase] - self.rest[phase]) for phase in rest}
            self._caches[bits] = Option(price=0.0, held=kv_nbytes, transient=over)
        return replace(self._caches[bits], price=price)

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
            index = chosen[group.name]
            scheme = None if index == 0 else self.schemes[group.name][index - 1]
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
        expected = sum(choice.price for choice in choices) + (kv_prices[kv_bits] if self.kv_nbytes else 0.0)
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

    def predict(self, plan: Plan) -> Account:
        """The plan, traced whole."""
        return predict(self.source, plan, self.task, device=self.device, products=self.products)

    def does_not_fit(self, items: Mapping[str, Sequence[Option]], budget_nbytes: int) -> DoesNotFit:
        """The error: what binds, the smallest budget that works, and what each lever would free."""
        least = smallest_budget(merge(dict(items)), bases=self.bases)
        smallest = self._traced_smallest(least.chosen)
        weights = sum(items[group.name][least.chosen[group.name]].persistent_nbytes for group in self.groups)
        kv = (
            items["kv_cache"][least.chosen["kv_cache"]].held.get(least.moment, 0)
            if "kv_cache" in items
            else 0
        )
        rest = smallest - weights - kv - self.fixed
        levers = self._levers(items, least.needed_nbytes)
        helps = "".join(f" {what} frees {format_size(n)}." for what, n in levers.items() if n > 0)
        return DoesNotFit(
            f"{format_size(budget_nbytes)} allowed, {format_size(smallest)} needed at the least, in "
            f"{least.moment} (packed weights {format_size(weights)}, KV cache {format_size(kv)}, "
            f"parts that stay in 16 bits {format_size(self.fixed)}, temporary {format_size(max(rest, 0))}). "
            f"The smallest budget that works is {smallest} bytes.{helps}",
            smallest_nbytes=smallest,
            levers=levers,
        )

    def _traced_smallest(self, chosen: Mapping[str, int]) -> int:
        free: Prices = {(name, scheme): 0.0 for name, found in self.schemes.items() for scheme in found}
        return self.predict(self.plan(chosen, free, 0, dict.fromkeys(KV_PRICES, 0.0), "weights")).peak_nbytes

    def _levers(self, items: Mapping[str, Sequence[Option]], needed: int) -> dict[str, int]:
        """Lever to the bytes that it frees from the smallest budget."""
        task, found = self.task, {}
        shorter = {}
        if task.prompt > 1:
            half = max(1, task.prompt // 2)
            shorter[f"A prompt of {half} instead of {task.prompt} tokens"] = replace(task, prompt=half)
        if task.batch > 1:
            half = task.batch // 2
            shorter[f"A batch of {half} instead of {task.batch}"] = replace(task, batch=half)
        for what, changed in shorter.items():
            found[what] = needed - _least(self.source, changed, self.allowed, self.device)
        for bits in (4, 2):
            if self.kv_nbytes and bits < min(self.kv_choices()):
                more = replace(self.allowed, kv_bits=(*self.allowed.kv_bits, bits))
                found[f"A KV cache of {bits} bits"] = needed - _least(self.source, task, more, self.device)
        if 2 not in self.allowed.bits:
            more = replace(self.allowed, bits=BITS)
            found["Weights of 2 bits"] = needed - _least(self.source, task, more, self.device)
        biggest = max((group.nbytes(None) for group in self.groups), default=0)
        held = sum(min(option.persistent_nbytes for option in items[group.name]) for group in self.groups)
        if held > biggest:
            found["Reading blocks from disk as they run (`memfit.calibrate.stream`, slow)"] = held - biggest
        return found


def _least(source: Source, task: Infer, allowed: Allowed, device: str) -> int:
    """The smallest budget, as the search sees it."""
    study = Study(source, task, allowed, device=device)
    return smallest_budget(merge(study.items_for_nothing()), bases=study.bases).needed_nbytes
