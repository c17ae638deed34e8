"""Plans keep their promises: within the budget, never worse for more of it, the same when read back."""

import json
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.errors import DoesNotFit, UsageError
from memfit.packed.scheme import BITS
from memfit.plan.allowed import Allowed
from memfit.plan.plan import Plan, dumps, loads
from memfit.planning import account_of, make_plan, predict, require_fit
from memfit.source.source import Source, source_from_config
from memfit.study import Study
from memfit.task.infer import Infer
from memfit.units import parse_size

DECODER = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TASK = Infer(prompt=32, new_tokens=5)
FEW = Allowed(bits=(8, 4), groups={8: (None,), 4: (64,)}, kv_bits=(16, 8))


@pytest.fixture(scope="module")
def source() -> Source:
    return source_from_config(hf.LlamaConfig(**DECODER, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def whole_nbytes(source) -> int:
    return account_of(source, TASK, dtype=torch.bfloat16).peak_nbytes


@pytest.fixture(scope="module")
def plans(source, whole_nbytes, refusal) -> list[Plan]:
    """From less to more budget."""
    least = refusal.smallest_nbytes
    budgets = [least + (whole_nbytes - least) * share // 100 for share in (5, 40, 90, 101)]
    return [make_plan(Study(source, TASK, FEW), nbytes) for nbytes in budgets]


@pytest.fixture(scope="module")
def refusal(source) -> DoesNotFit:
    with pytest.raises(DoesNotFit) as caught:
        make_plan(Study(source, TASK, FEW), 1000)
    return caught.value


def test_more_budget_never_makes_a_worse_plan(plans):
    expected = [plan.expected_kl for plan in plans]
    assert expected == sorted(expected, reverse=True)
    assert expected[0] > expected[-2] > 0 == expected[-1]
    assert not plans[-1].schemes() and plans[-1].kv_bits == 16


@pytest.fixture(scope="module")
def wide(source) -> Study:
    """All widths, group sizes and KV bits to choose from."""
    return Study(source, TASK, Allowed(groups=dict.fromkeys(BITS, (64, 32))))


@pytest.fixture(scope="module")
def least_nbytes(wide) -> int:
    with pytest.raises(DoesNotFit) as refused:
        require_fit(wide, 1000)
    return refused.value.smallest_nbytes


@settings(max_examples=15, deadline=None)
@given(shares=st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_of_any_two_budgets_the_larger_has_no_worse_plan(wide, whole_nbytes, least_nbytes, shares):
    budgets = [least_nbytes + int((whole_nbytes - least_nbytes) * share) for share in sorted(shares)]
    less, more = (make_plan(wide, nbytes) for nbytes in budgets)
    assert more.expected_kl <= less.expected_kl
    for plan in (less, more):
        assert predict(wide.source, plan, TASK).peak_nbytes <= plan.budget_nbytes


@pytest.mark.parametrize("share", [35, 45, 55])
def test_more_to_choose_from_makes_no_worse_plan(source, whole_nbytes, share):
    """Little-bit schemes that no plan takes must not spoil what is known of loading."""
    fewer, more = (Study(source, TASK, Allowed(bits=bits, kv_bits=(16,))) for bits in ((8, 6), (8, 6, 4, 2)))
    budget = whole_nbytes * share // 100
    try:
        alone = make_plan(fewer, budget).expected_kl
    except DoesNotFit:
        alone = math.inf
    assert make_plan(more, budget).expected_kl <= alone


def test_the_traced_peak_of_every_plan_is_within_its_budget_and_the_one_it_tells(source, plans):
    for plan in plans:
        traced = predict(source, plan, TASK).peak_nbytes
        assert traced == plan.predicted["peak_nbytes"] <= plan.budget_nbytes


def test_the_search_chooses_among_kinds_of_values(source, whole_nbytes):
    allowed = Allowed(bits=(4, 3), symmetric=False, values=("int", "nf4", "fp8", "codebook"), kv_bits=(16,))
    study = Study(source, TASK, allowed)
    plan = make_plan(study, whole_nbytes * 85 // 100)
    assert predict(source, plan, TASK).peak_nbytes == plan.predicted["peak_nbytes"] <= plan.budget_nbytes
    integers = {f"int{bits} g{group} asym" for bits in (4, 3) for group in (128, 64)}
    known = integers | {"nf4 g64", "fp8 row", "codebook4x2 row", "codebook3x2 row"}
    assert {scheme.name for found in study.schemes.values() for scheme in found} == known
    assert {scheme.values for scheme in plan.schemes().values()} - {"int"}
    assert loads(dumps(plan)).schemes() == plan.schemes()


def test_a_plan_read_back_is_equal_and_predicts_the_same_bytes(source, plans):
    again = loads(dumps(plans[0]))
    assert again == loads(dumps(again)) and dumps(again) == dumps(plans[0])
    assert predict(source, again, TASK).phases == predict(source, plans[0], TASK).phases


def test_the_same_question_has_the_same_plan(source, plans):
    again = make_plan(Study(source, TASK, FEW), plans[1].budget_nbytes)
    assert again.choices == plans[1].choices and again.kv_bits == plans[1].kv_bits


def test_fused_and_tied_tensors_share_a_choice(plans):
    for plan in plans:
        members = [choice.members for choice in plan.choices]
        for layer in ("model.layers.0", "model.layers.1"):
            assert tuple(f"{layer}.self_attn.{p}_proj" for p in "qkv") in members
            assert (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj") in members
        assert ("model.embed_tokens", "lm_head") in members


def test_what_does_not_fit_is_refused_with_the_smallest_budget_that_works(source, refusal):
    made = make_plan(Study(source, TASK, FEW), refusal.smallest_nbytes)
    assert made.predicted["peak_nbytes"] <= refusal.smallest_nbytes
    with pytest.raises(DoesNotFit) as caught:
        make_plan(Study(source, TASK, FEW), refusal.smallest_nbytes - 1)
    assert caught.value.smallest_nbytes == refusal.smallest_nbytes


def test_a_refusal_counts_what_is_kept_among_what_stays_in_16_bits(source):
    with pytest.raises(DoesNotFit) as caught:
        make_plan(Study(source, TASK, replace(FEW, keep=("embeddings",))), 1000)
    found = re.search(r"packed weights (\S+ \S+), .* in 16 bits (\S+ \S+), temp", str(caught.value))
    assert found is not None
    table, norms = DECODER["vocab_size"] * DECODER["hidden_size"] * 2, 5 * DECODER["hidden_size"] * 2
    assert parse_size(found[2].replace(" ", "")) == pytest.approx(table + norms, rel=0.01)
    layers = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256) * (4 + 16 / 64) / 8
    assert parse_size(found[1].replace(" ", "")) == pytest.approx(layers, rel=0.01)
    assert "Leaving --keep out frees" in str(caught.value)


def test_a_refusal_names_levers_and_what_each_would_free(refusal):
    assert any("prompt of 16" in lever for lever in refusal.levers)
    assert any("KV cache of 4 bits" in lever for lever in refusal.levers)
    assert any("weights of 2 bits" in lever for lever in refusal.levers)
    told = {lever: nbytes for lever, nbytes in refusal.levers.items() if lever in str(refusal)}
    assert told and all(nbytes > 0 for nbytes in told.values())
    assert str(refusal.smallest_nbytes) in str(refusal)


def test_what_is_allowed_has_a_type_of_its_own(source):
    with pytest.raises(UsageError, match=r"a memfit.Allowed, as memfit.Allowed.*got \('prune',\)"):
        Study(source, TASK, ("prune",))


def test_experts_are_packed_and_what_is_kept_is_kept():
    source = source_from_config(hf.MixtralConfig(**DECODER, num_local_experts=4))
    nbytes = account_of(source, TASK, dtype=torch.bfloat16).peak_nbytes * 55 // 100
    allowed = Allowed(bits=(4,), groups={4: (64,)}, kv_bits=(16,), keep=("lm_head", "layers.0.self_attn"))
    plan = make_plan(Study(source, TASK, allowed), nbytes)
    schemes = plan.schemes()
    assert {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"} <= schemes.keys()
    assert not any(part in name for name in schemes for part in allowed.keep)
    assert predict(source, plan, TASK).peak_nbytes <= nbytes


@given(
    bits=st.lists(st.sampled_from(BITS), unique=True),
    groups=st.none()
    | st.dictionaries(st.sampled_from(BITS), st.lists(st.sampled_from([None, 128, 64, 32]), max_size=3)),
    symmetric=st.booleans(),
    kv_bits=st.lists(st.sampled_from([16, 8, 4, 2]), unique=True),
    keep=st.lists(st.text(max_size=5), max_size=3),
)
def test_what_is_allowed_comes_back_from_json(bits, groups, symmetric, kv_bits, keep):
    allowed = Allowed(
        bits=tuple(bits),
        groups=None if groups is None else {key: tuple(sizes) for key, sizes in groups.items()},
        symmetric=symmetric,
        kv_bits=tuple(kv_bits),
        keep=tuple(keep),
    )
    assert Allowed.from_json(json.loads(json.dumps(asdict(allowed)))) == allowed
