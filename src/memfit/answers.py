"""What a job of calibration answered, or a plan given, made into a plan; and what other plans would have cost."""

from dataclasses import replace
from typing import Any

from memfit.errors import DoesNotFit
from memfit.packed.forms import LowRank, Narrow, Sparse, form_of
from memfit.packed.scheme import Scheme
from memfit.plan.allowed import Allowed
from memfit.plan.front import dominated
from memfit.plan.plan import Plan
from memfit.plan.price import Prices
from memfit.planning import fronts, make_plan, predict_with
from memfit.study import KV_PRICES, Study
from memfit.task.infer import Infer


def task_of(given: Plan) -> Infer:
    """The task that a plan was made for, its cache as it was."""
    settings = {key: value for key, value in given.task.items() if key != "task"}
    return replace(Infer(**settings), kv_bits=16)


def adopted(study: Study, given: Plan) -> Plan:
    """A given plan with its bytes anew and its prediction; it has no prices yet."""
    plan = study.adopt(given, {}, KV_PRICES)
    predicted = predict_with(study, plan)
    if predicted.peak_nbytes > plan.budget_nbytes:
        raise DoesNotFit(
            f"the plan as given needs {predicted.peak_nbytes} bytes in {predicted.peak_phase}, and its budget_nbytes "
            f"is {plan.budget_nbytes}. Raise that number, or choose fewer bits.",
            smallest_nbytes=predicted.peak_nbytes,
        )
    return replace(plan, predicted=predicted.to_json())


def kv_prices_of(answer: dict[str, Any]) -> dict[int, float]:
    """Nats a token by bits of the KV cache, those that calibration has not measured as usual."""
    return KV_PRICES | dict(answer.get("kv_prices", ()))


def prices_of(answer: dict[str, Any]) -> Prices:
    """Nats a token by group and form; empty where nothing was priced."""
    return {(name, form_of(scheme)): price for name, scheme, price in answer.get("prices", ())}


def planned(study: Study, nbytes: int, answer: dict[str, Any]) -> Plan:
    """The plan by what calibration answered; without an answer, by shapes alone."""
    prices = prices_of(answer)
    made = make_plan(
        study,
        nbytes,
        prices=prices or None,
        kv_prices=kv_prices_of(answer),
        priced_by=answer.get("priced_by", "weights"),
    )
    return replace(made, smoothed=smoothed_of(answer))


def front_lines(study: Study, budget_nbytes: int, answer: dict[str, Any]) -> dict[str, Any]:
    """What other budgets are expected to cost, by technique, for the report; nothing where nothing was priced."""
    prices = prices_of(answer)
    if not prices:
        return {}
    found = fronts(study, budget_nbytes, prices=prices, kv_prices=kv_prices_of(answer))
    return {
        name: {
            "points": [{"nbytes": point.needed_nbytes, "kl": point.price} for point in points],
            "dominated_by": dominated(found, name),
        }
        for name, points in found.items()
    }


def smoothed_of(answer: dict[str, Any]) -> tuple[str, ...]:
    """The norms that calibration found better smoothed."""
    return tuple(norm for norm, alpha in answer.get("smoothed", {}).items() if alpha > 0)


def allowed_by(given: Plan | None) -> Allowed:
    """What a given plan takes for granted."""
    if given is None:
        return Allowed()
    found = dict.fromkeys(given.schemes().values())
    integers = [part for form in found for part in (form, getattr(form, "base", None)) if isinstance(part, Scheme)]
    in_integers = any(form.activations == 8 for form in found)
    pruned = tuple(form for form in found if isinstance(form, Sparse))
    factors = [form for form in found if isinstance(form, LowRank)]
    narrow = any(isinstance(form, Narrow) for form in found)
    used = {"quantize": integers, "prune": pruned, "low-rank": factors or narrow}
    allowed = Allowed(
        techniques=tuple(name for name, uses in used.items() if uses) or ("quantize",), sparse=pruned,
        ranks=tuple(form.rank for form in factors if form.base is None),
        residual_ranks=tuple(form.rank for form in factors if form.base is not None),
        values=tuple(dict.fromkeys(form.values for form in integers)) or ("int",),
        symmetric=in_integers or all(form.symmetric for form in integers),
        kv_bits=tuple(dict.fromkeys((16, given.kv_bits))),
    )  # fmt: skip
    if in_integers:
        return replace(allowed, activations=8, smooth=bool(given.smoothed))
    return allowed
