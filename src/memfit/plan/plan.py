"""The plan: which tensors are stored how, for which model, task and budget. A value; its JSON is promised."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args

from memfit.errors import BrokenInput
from memfit.packed.cache import KV_BITS
from memfit.packed.forms import Form, Shared, Whole, form_of, like_of, of_member
from memfit.packed.scheme import BITS, Scheme, Values

VERSION: Final = 1
PricedBy = Literal["text", "weights"]


@dataclass(frozen=True, kw_only=True)
class GroupChoice:
    """What was chosen for the tensors of one group."""

    name: str
    members: tuple[str, ...]
    """Names of the modules that share the choice."""
    scheme: Form | None
    """None: as it is, in 16 bits."""
    weights: int
    """Values in the group; tied ones once."""
    nbytes: int
    """Stored bytes, scales and zero points included."""
    price: float
    """Expected KL divergence, nats a token."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "members": list(self.members),
            "scheme": None if self.scheme is None else self.scheme.to_json(),
            "weights": self.weights,
            "nbytes": self.nbytes,
            "price": self.price,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The choices, what they were made for, and what is expected of them."""

    model: str
    task: dict[str, Any]
    budget_nbytes: int
    """Bytes allowed at the peak of the task."""
    choices: tuple[GroupChoice, ...]
    kv_bits: int = 16
    device: str = "cpu"
    priced_by: PricedBy = "weights"
    expected_kl: float | None = None
    """Nats a token; the sum of the prices, cache included."""
    predicted: dict[str, Any] | None = None
    """The account of the fitted model running the task, as JSON."""
    predicted_fit: dict[str, Any] | None = None
    """The account of making it, as JSON."""
    smoothed: tuple[str, ...] = ()
    """Norms in which the channels of activations are evened out. Carried out, it is done anew for its text, if any are
    named here."""
    narrowed: dict[str, Any] | None = None
    """How much of the model stays (`technique.narrow.Narrow`, the blocks that go by number); None: all. The choices are
    of the narrower model. Carried out, which heads, channels and experts stay is found anew for its text."""
    version: int = VERSION

    @property
    def is_priced(self) -> bool:
        """Whether it was chosen by what choices cost; in one setting nothing was chosen."""
        return self.expected_kl is not None and any(choice.price for choice in self.choices)

    @property
    def average_bits(self) -> float:
        """Stored bits for each weight of the groups, scales and zero points included."""
        return average_bits(self.choices)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all groups."""
        return sum(choice.nbytes for choice in self.choices)

    def schemes(self) -> dict[str, Form]:
        """Module name to scheme, of all that does not stay as it is.

        A choice that shares with another is told member by member; what stays in 16 bits and has its weight shared is
        `Whole`.
        """
        members = {choice.members[0]: choice.members for choice in self.choices}
        owners = {like for choice in self.choices if (like := like_of(choice.scheme)) is not None}
        found: dict[str, Form] = {}
        for choice in self.choices:
            scheme = choice.scheme
            if scheme is None and choice.members[0] in owners:
                scheme = Whole()
            if scheme is None:
                continue
            theirs = members.get(scheme.owner, ()) if isinstance(scheme, Shared) else ()
            for n, member in enumerate(choice.members):
                form = of_member(scheme, member, n, theirs)
                if form is not None:  # beside narrower values queries and keys may stay as they are
                    found[member] = form
        return found

    def to_json(self) -> dict[str, Any]:
        """One object; `average_bits` is there for readers and follows from the choices."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["choices"] = [choice.to_json() for choice in self.choices]
        smoothed = list(data.pop("smoothed"))
        data |= {"smoothed": smoothed} if smoothed else {}
        if self.narrowed is None:
            del data["narrowed"]
        return data | {"average_bits": self.average_bits}

    @classmethod
    def from_json(cls, data: Any, *, file: str | Path = "plan.json") -> "Plan":
        """The plan of `to_json`'s object; BrokenInput names `file` and the field that is off."""
        check = _Check(str(file))
        if isinstance(data, Mapping):  # plans that smooth nothing do not say so, nor those that leave nothing out
            data = {"smoothed": [], "narrowed": None} | dict(data)
        check.keys(data, {field.name for field in fields(cls)} | {"average_bits"}, "the plan")
        version = check.integer(data, "version")
        if version != VERSION:
            raise check.broken("version", f"is {version}; this memfit reads version {VERSION}")
        if not isinstance(data["choices"], list):
            raise check.broken("choices", "must be a list")
        priced_by = data["priced_by"]
        if priced_by not in get_args(PricedBy):
            raise check.broken("priced_by", f"is {priced_by!r}; known: {', '.join(get_args(PricedBy))}")
        if data["kv_bits"] not in KV_BITS:
            raise check.broken("kv_bits", f"is {data['kv_bits']!r}; known: {', '.join(map(str, KV_BITS))}")
        if not isinstance(data["smoothed"], list) or not all(isinstance(name, str) for name in data["smoothed"]):
            raise check.broken("smoothed", "must be a list of module names")
        plan = cls(
            version=version,
            smoothed=tuple(data["smoothed"]),
            narrowed=None if data["narrowed"] is None else check.mapping(data, "narrowed"),
            model=check.text(data, "model"),
            task=check.mapping(data, "task"),
            budget_nbytes=check.integer(data, "budget_nbytes"),
            choices=tuple(_choice(check, n, choice) for n, choice in enumerate(data["choices"])),
            kv_bits=check.integer(data, "kv_bits"),
            device=check.text(data, "device"),
            priced_by=priced_by,
            expected_kl=None if data["expected_kl"] is None else check.number(data, "expected_kl"),
            predicted=None if data["predicted"] is None else check.mapping(data, "predicted"),
            predicted_fit=None if data["predicted_fit"] is None else check.mapping(data, "predicted_fit"),
        )
        members = [member for choice in plan.choices for member in choice.members]
        if len(set(members)) != len(members):
            twice = next(member for member in members if members.count(member) > 1)
            raise check.broken("choices", f"{twice!r} is a member of two groups")
        check.number(data, "average_bits")  # follows from the choices, whatever an edited plan says
        return plan


def average_bits(choices: tuple[GroupChoice, ...]) -> float:
    """8 · Σ bytes / Σ weights; 0 of nothing."""
    weights = sum(choice.weights for choice in choices)
    return 8 * sum(choice.nbytes for choice in choices) / weights if weights else 0.0


def dumps(plan: Plan) -> str:
    """The plan's file: sorted keys, indented by 2, a newline at the end; equal plans give equal bytes."""
    return json.dumps(plan.to_json(), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def loads(text: str, *, file: str | Path = "plan.json") -> Plan:
    """The plan in `text`. BrokenInput names `file` and what is off."""
    try:
        data = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BrokenInput(f"{file}: no JSON that a plan may have: {error}") from error
    return Plan.from_json(data, file=file)


def read_plan(file: str | Path) -> Plan:
    """The plan in `file`."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenInput(f"{file}: cannot be read: {error}") from error
    return loads(text, file=file)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands there twice")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _choice(check: "_Check", n: int, data: Any) -> GroupChoice:
    where = f"choices[{n}]"
    check.keys(data, {field.name for field in fields(GroupChoice)}, where)
    members = data["members"]
    if not isinstance(members, list) or not members or not all(isinstance(name, str) for name in members):
        raise check.broken(f"{where}.members", "must be a list of module names, at least one")
    return GroupChoice(
        name=check.text(data, "name", where),
        members=tuple(members),
        scheme=None if data["scheme"] is None else _scheme(check, f"{where}.scheme", data["scheme"]),
        weights=check.integer(data, "weights", where),
        nbytes=check.integer(data, "nbytes", where),
        price=check.number(data, "price", where),
    )


def _scheme(check: "_Check", where: str, data: Any) -> Form:
    if isinstance(data, Mapping) and "form" in data:
        try:
            return form_of(data)
        except (ValueError, TypeError) as error:
            raise check.broken(where, str(error)) from error
    if isinstance(data, Mapping):  # plans of earlier versions do not say what may be left out
        data = {"activations": 16, "values": "int", "vector": 1} | dict(data)
    check.keys(data, {field.name for field in fields(Scheme)}, where)
    if data["values"] not in get_args(Values):
        raise check.broken(f"{where}.values", f"is {data['values']!r}; known: {', '.join(get_args(Values))}")
    group = None if data["group"] is None else check.integer(data, "group", where)
    if not isinstance(data["symmetric"], bool):
        raise check.broken(f"{where}.symmetric", f"is {data['symmetric']!r}, not true or false")
    bits = check.integer(data, "bits", where)
    if bits not in BITS:
        raise check.broken(f"{where}.bits", f"is {bits}; {', '.join(map(str, BITS))} are known, null keeps 16")
    try:
        return Scheme(
            bits=bits, group=group, symmetric=data["symmetric"], values=data["values"],
            activations=check.integer(data, "activations", where), vector=check.integer(data, "vector", where),
        )  # fmt: skip
    except ValueError as error:
        raise check.broken(where, str(error)) from error


@dataclass(frozen=True)
class _Check:
    """Reads fields and says which one of which file is off."""

    file: str

    def broken(self, field: str, reason: str) -> BrokenInput:
        return BrokenInput(f"{self.file}: {field} {reason}")

    def keys(self, data: Any, known: set[str], where: str) -> None:
        if not isinstance(data, Mapping):
            raise self.broken(where, f"must be an object, not {type(data).__name__}")
        if "rungs" in data and "rungs" not in known:
            raise self.broken(where, "is one to train: give it to `memfit train --plan`, or `memfit.train(given=)`")
        if missing := sorted(known - data.keys()):
            raise self.broken(where, f"lacks {', '.join(missing)}")
        if unknown := sorted(map(str, data.keys() - known)):
            raise self.broken(where, f"has unknown fields {', '.join(unknown)}")

    def integer(self, data: Mapping[str, Any], key: str, where: str = "") -> int:
        value = data[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.broken(_path(where, key), f"is {value!r}, not a whole number from 0")
        return value

    def number(self, data: Mapping[str, Any], key: str, where: str = "") -> float:
        value = data[key]
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.broken(_path(where, key), f"is {value!r}, not a number")
        return float(value)

    def text(self, data: Mapping[str, Any], key: str, where: str = "") -> str:
        value = data[key]
        if not isinstance(value, str):
            raise self.broken(_path(where, key), f"is {value!r}, not a text")
        return value

    def mapping(self, data: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = data[key]
        if not isinstance(value, dict):
            raise self.broken(key, f"must be an object, not {type(value).__name__}")
        return value


def _path(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
