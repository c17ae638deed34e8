"""A plan read back is the same plan in the same bytes, and nothing else is read as one."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.errors import BrokenInput
from memfit.packed.scheme import BITS, Scheme
from memfit.plan.plan import GroupChoice, Plan, dumps, loads, read_plan

PLAN = Plan(
    model="tiny",
    task={"kind": "infer", "batch": 1, "prompt": 8},
    budget_nbytes=10**6,
    kv_bits=8,
    priced_by="text",
    expected_kl=0.0123,
    predicted={"peak_nbytes": 5},
    choices=(
        GroupChoice(
            name="a.q+k",
            members=("a.q", "a.k"),
            scheme=Scheme(bits=4, group=64),
            weights=2048,
            nbytes=1088,
            price=0.1,
        ),
        GroupChoice(name="head", members=("head",), scheme=None, weights=1024, nbytes=2048, price=0.0),
        GroupChoice(
            name="e",
            members=("e",),
            scheme=Scheme(bits=8, group=None, symmetric=False),
            weights=1024,
            nbytes=1030,
            price=1e-17,
        ),
    ),
)

groups = st.builds(
    GroupChoice,
    name=st.text(max_size=5),
    members=st.lists(st.uuids().map(str), min_size=1, max_size=3).map(tuple),
    scheme=st.none()
    | st.builds(
        Scheme, bits=st.sampled_from(BITS), group=st.sampled_from([None, 32, 64, 128]), symmetric=st.booleans()
    ),
    weights=st.integers(1, 10**12),
    nbytes=st.integers(0, 10**12),
    price=st.floats(0, 1e6, allow_nan=False),
)
plans = st.builds(
    Plan,
    model=st.text(max_size=8),
    task=st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=3), max_size=3),
    budget_nbytes=st.integers(0, 2**50),
    choices=st.lists(groups, max_size=4).map(tuple),
    kv_bits=st.sampled_from([16, 8, 4, 2]),
    priced_by=st.sampled_from(["text", "weights"]),
    expected_kl=st.none() | st.floats(0, 10),
    predicted=st.none() | st.dictionaries(st.text(max_size=4), st.floats(-1e300, 1e300)),
)


@settings(max_examples=60, deadline=None)
@given(plan=plans)
def test_a_plan_read_back_gives_the_same_bytes(plan: Plan) -> None:
    text = dumps(plan)
    assert loads(text) == plan
    assert dumps(loads(text)) == text


def test_the_file_is_sorted_indented_and_ends_in_a_newline(tmp_path: Path) -> None:
    text = dumps(PLAN)
    assert text.endswith("}\n") and text.index('"average_bits"') < text.index('"budget_nbytes"')
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    assert read_plan(tmp_path / "plan.json") == PLAN


def test_the_schemes_are_those_of_the_members() -> None:
    four, eight = Scheme(bits=4, group=64), Scheme(bits=8, group=None, symmetric=False)
    assert PLAN.schemes() == {"a.q": four, "a.k": four, "e": eight}


def test_average_bits_count_scales_and_what_stays() -> None:
    assert PLAN.average_bits == 8 * (1088 + 2048 + 1030) / 4096
    assert json.loads(dumps(PLAN))["average_bits"] == PLAN.average_bits


def change(path: str, value: Any) -> str:
    data = json.loads(dumps(PLAN))
    at: Any = data
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        at = at[part]
    at[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("version", 2, "version"),
        ("version", True, "version"),
        ("surprise", 1, "surprise"),
        ("budget_nbytes", -1, "budget_nbytes"),
        ("budget_nbytes", "1GiB", "budget_nbytes"),
        ("kv_bits", 7, "kv_bits"),
        ("priced_by", "magic", "priced_by"),
        ("expected_kl", "low", "expected_kl"),
        ("model", None, "model"),
        ("task", [], "task"),
        ("average_bits", "3", "average_bits"),
        ("choices", {}, "choices"),
        ("choices.0", [], r"choices\[0\]"),
        ("choices.0.members", [], r"choices\[0\].members"),
        ("choices.0.members", ["e"], "'e' is a member of two"),
        ("choices.1.nbytes", 1.5, r"choices\[1\].nbytes"),
        ("choices.1.extra", 1, "extra"),
        ("choices.0.scheme.bits", 9, r"choices\[0\].scheme.bits is 9; 8, 6, 5, 4, 3, 2 are known"),
        ("choices.0.scheme.bits", 7, r"choices\[0\].scheme.bits is 7"),
        ("choices.0.scheme.group", 33, "group must be"),
        ("choices.0.scheme.symmetric", 1, "symmetric"),
        ("choices.0.scheme", {"bits": 4}, "lacks group, symmetric"),
    ],
)
def test_a_plan_that_is_off_is_refused_by_file_and_field(path: str, value: Any, named: str) -> None:
    with pytest.raises(BrokenInput, match=r"out/plan\.json: .*" + named):
        loads(change(path, value), file="out/plan.json")


@pytest.mark.parametrize("field", sorted(json.loads(dumps(PLAN))))
def test_every_field_must_be_there(field: str) -> None:
    data = json.loads(dumps(PLAN))
    del data[field]
    with pytest.raises(BrokenInput, match=f"lacks {field}"):
        Plan.from_json(data)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"version": 1, "version": 1}', '{"version": NaN}', "[" * 100_000]
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(BrokenInput, match=r"plan\.json"):
        loads(text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenInput, match="cannot be read"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(BrokenInput, match="cannot be read"):
        read_plan(tmp_path / "plan.json")
