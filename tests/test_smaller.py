"""Pruned, factored and shared weights, from a model to files and back: what is planned is built, and runs."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memfit
from memfit.account.meter import Meter
from memfit.account.settle import settle
from memfit.account.watch import Unwatched
from memfit.compensate import Thrift, compensate
from memfit.compress import calibrate, choose_integers, compress
from memfit.errors import BrokenInput, UsageError
from memfit.format.integers import Integers
from memfit.models import load_model
from memfit.packed.forms import LowRank, Narrow, Shared, Sparse, Whole, form_of
from memfit.packed.modules import packed_modules
from memfit.packed.scheme import Scheme
from memfit.plan.allowed import Allowed
from memfit.plan.groups import find_groups
from memfit.plan.plan import Plan, dumps, loads
from memfit.plan.price import prices
from memfit.planning import fronts, make_plan, plan_files, predict_with, uniform_plan
from memfit.source.load import load
from memfit.source.source import Source, open_source
from memfit.steps import fake_ids, on_fakes, predict_choosing, predict_compressing
from memfit.study import KV_PRICES, Study

TASK = memfit.Infer(prompt=40, new_tokens=3)
EVERYTHING = ("quantize", "prune", "low-rank", "share")
FACTORED = {"residual_ranks": (), "kv_bits": (16,)}
SETTINGS = {
    "half": Allowed(techniques=("prune",), sparse=(Sparse(sparsity=0.5),), kv_bits=(16,)),
    "2:4": Allowed(techniques=("prune",), sparse=(Sparse(pattern="2:4"),), kv_bits=(16,)),
    "blocks": Allowed(techniques=("prune",), sparse=(Sparse(pattern="blocks"),), kv_bits=(16,)),
    "rank": Allowed(techniques=("low-rank",), ranks=(0.6,), **FACTORED),
    "basis": Allowed(techniques=("share",), ranks=(0.6,), **FACTORED),
    "beside": Allowed(
        techniques=("quantize", "low-rank"), bits=(3,), groups={3: (64,)}, ranks=(), residual_ranks=(8,), kv_bits=(16,)
    ),
    "heads": Allowed(techniques=("low-rank",), ranks=(), **FACTORED),
    "heads in integers": Allowed(
        techniques=("quantize", "low-rank"), bits=(8, 4), groups={8: (32,), 4: (32,)}, **FACTORED
    ),
}
RUN_ALWAYS = ("2:4", "basis", "heads in integers")
"""Measured in a process of their own in every run of the tests; the others where slow ones are asked for."""
IDS = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("model") / "m"
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    made = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=0.1))
    made.to(torch.bfloat16).save_pretrained(path)
    return open_source(path)


def narrow_plan(source: Source, study: Study, base: Scheme | None) -> Plan:
    """Heads of three quarters in each attention, values and output in two kinds of integers."""
    prices = {(name, form): 0.0 for name, forms in study.schemes.items() for form in forms}
    prices |= {(name, form): 0.0 for one in study.narrow_heads for name, forms in one.forms.items() for form in forms}
    chosen = dict.fromkeys(study.schemes, 0) | {"kv_cache": 0}
    for one in study.narrow_heads:
        for group, wanted in ((one.values, base), (one.output, base and replace(base, bits=4))):
            forms = study.forms(group.name, prices)
            chosen[group.name] = next(
                n for n, form in enumerate(forms) if isinstance(form, Narrow) and (form.kept, form.base) == (24, wanted)
            )
    return study.plan(chosen, prices, 1 << 40, KV_PRICES, "weights")


def plan_of(source: Source, what: str) -> Plan:
    """Everything in one setting; factors beside integers are the last choice of each group."""
    study = Study(source, TASK, SETTINGS[what])
    if what in ("heads", "heads in integers"):
        return narrow_plan(source, study, None if what == "heads" else Scheme(bits=8, group=32))
    if what != "beside":
        return uniform_plan(study, 1 << 40)
    nothing = {(name, form): 0.0 for name, forms in study.schemes.items() for form in forms}
    last = {name: len(forms) for name, forms in study.schemes.items()}
    return study.plan(last | {"kv_cache": 0}, nothing, 0, KV_PRICES, "weights")


def write(source: Source, plan: Plan, out: Path, **options: object) -> Source:
    compress(source, plan, None, out, watch=options.pop("watch", Unwatched()), **options)  # type: ignore[arg-type]
    (out / "config.json").write_text(json.dumps(plan_files(source, plan)[1]))
    return open_source(out)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("what", SETTINGS)
def test_what_is_planned_is_built_and_runs_as_its_dense_weights_do(source: Source, what: str, tmp_path: Path) -> None:
    plan = plan_of(source, what)
    assert loads(dumps(plan)) == plan
    meter = Meter()
    fitted = write(source, plan, tmp_path, watch=meter)
    told = predict_compressing(source, plan, {"work": str(tmp_path)}, algorithm="search")
    assert told.peak_nbytes == pytest.approx(meter.account().peak_nbytes, rel=0.05)
    stored = [info.nbytes for name, info in fitted.tensors.items() if "norm" not in name and "weight_shape" not in name]
    assert sum(stored) == sum(choice.nbytes for choice in plan.choices)
    model, dense = load(fitted, dtype=torch.bfloat16), load_model(source, dtype=torch.bfloat16)
    packed = packed_modules(model)
    assert packed.keys() == plan.schemes().keys()
    for name, module in packed.items():
        dense.get_submodule(name).weight.copy_(module.store.dense_rows(0, module.store.shape[0]))
    close = (logits(model) - logits(dense)).norm() / logits(dense).norm()
    assert close < 0.02


@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=() if name in RUN_ALWAYS else pytest.mark.slow) for name in SETTINGS]
)
def test_running_it_takes_what_is_predicted(source: Source, what: str, tmp_path: Path) -> None:
    plan = plan_of(source, what)
    fitted = write(source, plan, tmp_path)
    account = memfit.measure(tmp_path, TASK)
    assert Plan.from_json(plan.to_json()).predicted is not None or what in ("beside", "heads", "heads in integers")
    predicted = predict_with(Study(source, TASK, SETTINGS[what]), plan)
    assert predicted.peak_nbytes == pytest.approx(account.peak_nbytes, rel=0.005)
    assert fitted.schemes.keys() == plan.schemes().keys()


@pytest.mark.parametrize("what", SETTINGS)
def test_made_for_a_text_blocks_stay_nearer_and_that_is_predicted(source: Source, what: str, tmp_path: Path) -> None:
    """Each layer makes up for those before it; nothing of that is another algorithm than the one asked for."""
    plan = plan_of(source, what)
    meter, integers = Meter(), Integers(tmp_path / "integers")
    choose_integers(source, plan, None, IDS, integers, watch=meter)
    told = predict_choosing(source, plan, IDS.shape, Thrift())
    assert told.peak_nbytes == pytest.approx(meter.account().peak_nbytes, rel=0.03)
    original = logits(load_model(source, dtype=torch.bfloat16))
    off = []
    for name, kept in (("plain", None), ("made", integers)):
        out = tmp_path / name
        out.mkdir()
        fitted = write(source, plan, out, integers=kept, search=False)
        off.append(float((logits(load(fitted, dtype=torch.bfloat16)) - original).norm()))
    assert off[1] < off[0]
    again = Integers(tmp_path / "integers")
    choose_integers(source, plan, None, IDS, again, watch=Unwatched())  # a run that goes on: all blocks are there
    schemes = plan.schemes()
    linear = [name for name in schemes if "layers" in name]
    for name in linear:
        shape = tuple(source.parameters[f"{name}.weight"][0])
        assert torch.equal(again.weight(name, schemes, shape), integers.weight(name, schemes, shape))


def test_a_layer_like_that_of_the_block_before_is_stored_as_its_difference(source: Source, tmp_path: Path) -> None:
    allowed = Allowed(techniques=EVERYTHING, bits=(4,), kv_bits=(16,))
    study = Study(source, TASK, allowed)
    like = {
        name: n
        for name, forms in study.schemes.items()
        for n, form in enumerate(forms, 1)
        if isinstance(form, Shared) and form.common == "weight"
    }
    assert like.keys() == {"model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"}
    nothing = {(name, form): 0.0 for name, forms in study.schemes.items() for form in forms}
    chosen = dict.fromkeys(study.schemes, 0) | like | {"kv_cache": 0}  # the last of them has no difference at all
    chosen["model.layers.0.self_attn.o_proj"] = 1
    plan = study.plan(chosen, nothing, 0, KV_PRICES, "weights")
    schemes = plan.schemes()
    assert schemes["model.layers.0.mlp.down_proj"] == Whole()
    assert schemes["model.layers.0.self_attn.o_proj"] == Scheme(bits=4, group=128)
    model = load(write(source, plan, tmp_path), dtype=torch.bfloat16)
    for layer in ("self_attn.o_proj", "mlp.down_proj"):
        ours, theirs = (model.get_submodule(f"model.layers.{n}.{layer}").store for n in (1, 0))
        assert torch.equal(ours.dense_rows(0, 128), theirs.dense_rows(0, 128))
    integers = Integers(tmp_path / "integers")
    choose_integers(source, plan, None, IDS, integers, watch=Unwatched())
    for layer in ("self_attn.o_proj", "mlp.down_proj"):
        shape = tuple(source.parameters[f"model.layers.1.{layer}.weight"][0])
        ours, theirs = (integers.weight(f"model.layers.{n}.{layer}", schemes, shape) for n in (1, 0))
        assert torch.equal(ours, theirs)


def test_a_dry_run_knows_a_layer_that_a_later_one_is_like_though_its_block_equals_others(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(make_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=6, vocab_size=512))
    four, last = Scheme(bits=4, group=32), "model.layers.{}.mlp.down_proj".format
    plain = {f"model.layers.{n}.{layer}": four for n in range(6) for layer in ("self_attn.o_proj", "mlp.down_proj")}
    schemes = plain | {last(n): Shared(owner=last(n - 1), common="weight", rank=4) for n in (3, 5)}
    meter = Meter()
    compensate(source, IDS % 100, schemes, Integers(tmp_path / "integers"), watch=meter)
    with on_fakes() as follow:
        compensate(source, fake_ids(IDS), schemes, Integers(None), watch=follow)
    assert settle(follow.ledger).peak_nbytes == pytest.approx(meter.account().peak_nbytes, rel=0.03)


def test_all_that_is_allowed_is_priced_and_searched_and_each_alone_is_a_front(source: Source) -> None:
    allowed = Allowed(techniques=EVERYTHING, bits=(8, 4), kv_bits=(16,))
    found = calibrate(source, IDS, allowed, batch=2, watch=Unwatched())
    study = Study(source, TASK, allowed)
    kinds = {type(form) for forms in study.schemes.values() for form in forms}
    assert kinds == {Scheme, Sparse, LowRank, Shared}
    assert found.prices.keys() == {(name, form) for name, forms in study.schemes.items() for form in forms}
    assert all(price >= 0 for price in found.prices.values())
    for name, forms in study.schemes.items():
        by_rank = [found.prices[name, form] for form in forms if isinstance(form, LowRank) and form.base is None]
        assert by_rank == sorted(by_rank), "the lower the rank, the more is lost"
    lines = fronts(study, 1 << 40, prices=found.prices, kv_prices={})
    assert list(lines) == [*EVERYTHING, "all together"]
    for name in EVERYTHING:
        for point in lines[name]:
            best = min((p.price for p in lines["all together"] if p.needed_nbytes <= point.needed_nbytes), default=None)
            solo = make_plan(study, point.budget_nbytes + (1 << 16), prices=found.prices)
            assert solo.expected_kl is not None and solo.expected_kl <= point.price + 1e-9, (name, best)


def test_a_price_is_what_making_it_errs_by(source: Source) -> None:
    """To second order, with the statistics that it was asked with."""
    groups = [group for group in find_groups(source.build()) if group.kind == "linear"]
    allowed = Allowed(techniques=("prune", "low-rank", "share"), kv_bits=(16,))
    schemes = allowed.schemes_of(groups)
    statistics = {
        member: (torch.ones(shape[-1]), torch.ones(shape[0]))
        for group in groups
        for member, shape in zip(group.members, group.shapes, strict=True)
    }
    read = lambda name: source.read_parameter(name, dtype=torch.float32)  # noqa: E731
    found = prices(groups, schemes, read, statistics)
    group = groups[0]
    weights = [read(name).double() for name in group.parameters]
    for form in schemes[group.name]:
        if isinstance(form, Sparse) and form.pattern == "any":
            kept = form.kept(weights[0].shape[1])
            least = sum(w.square().sort(dim=1).values[:, : w.shape[1] - kept].sum() for w in weights)
        elif isinstance(form, LowRank) and form.base is None:
            least = sum(torch.linalg.svdvals(w)[form.rank :].square().sum() for w in weights)
        elif isinstance(form, Shared):
            least = torch.linalg.svdvals(torch.cat(weights))[form.rank :].square().sum()
        else:
            continue
        assert found[group.name, form] == pytest.approx(0.5 * float(least), rel=0.01)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([Sparse(), Sparse(pattern="2:4"), LowRank(rank=3), LowRank(rank=1, base=Scheme(bits=3)), Whole()])
    | st.builds(Sparse, pattern=st.sampled_from(["any", "blocks"]), sparsity=st.floats(0, 0.99))
    | st.builds(
        Shared, owner=st.just("a.b"), common=st.sampled_from(["right", "left", "weight"]), rank=st.integers(1, 9)
    )
)
def test_every_form_is_what_its_json_says(form: Sparse | LowRank | Shared | Whole) -> None:
    assert form_of(json.loads(json.dumps(form.to_json()))) == form


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"form": "round"}, "form is 'round'"),
        ({"form": "sparse", "pattern": "any"}, "sparse has the fields pattern, sparsity"),
        ({"form": "sparse", "pattern": "3:4", "sparsity": 0.5}, "pattern must be one of"),
        ({"form": "sparse", "pattern": "any", "sparsity": 1.0}, "less than 1"),
        ({"form": "low-rank", "rank": 0, "base": None}, "at least 1"),
        ({"form": "low-rank", "rank": "many", "base": None}, "whole number"),
    ],
)
def test_a_form_that_is_none_is_refused_by_its_field(data: dict[str, object], reason: str, source: Source) -> None:
    with pytest.raises(ValueError, match=reason):
        form_of(data)
    plan = json.loads(dumps(plan_of(source, "half")))
    plan["choices"][1]["scheme"] = data
    with pytest.raises(BrokenInput, match=r"choices\[1\].scheme"):
        Plan.from_json(plan)


def test_files_that_do_not_fit_their_config_are_refused(source: Source, tmp_path: Path) -> None:
    write(source, plan_of(source, "half"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["weights"]["sparsity"] = 0.25
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BrokenInput, match=r"weight_kept.*sparse 25%"):
        load(open_source(tmp_path))


def test_what_is_not_allowed_says_what_is() -> None:
    with pytest.raises(UsageError, match="'melt' is no technique"):
        Allowed(techniques=("melt",))
    with pytest.raises(UsageError, match="nothing is allowed"):
        Allowed(techniques=())
    with pytest.raises(UsageError, match="a rank is a whole number"):
        Allowed(techniques=("low-rank",), ranks=(1.5,))
    everything = Allowed(techniques=EVERYTHING)
    assert Allowed.from_json(json.loads(json.dumps(asdict(everything)))) == everything


def test_heads_are_narrower_on_both_sides_or_on_none(source: Source) -> None:
    allowed = Allowed(techniques=("quantize", "low-rank"), bits=(4,), groups={4: (32,)}, ranks=(), kv_bits=(16,))
    found = calibrate(source, IDS, allowed, batch=2, watch=Unwatched(), by_text=True)
    study = Study(source, TASK, allowed)
    assert len(study.narrow_heads) == 2
    for one in study.narrow_heads:
        for group in (one.values, one.output):
            assert set(one.forms[group.name]) <= {form for name, form in found.prices if name == group.name}
        alone = [found.prices[one.output.name, form] for form in one.forms[one.output.name] if form.base is None]
        assert alone == sorted(alone), "the fewer dimensions, the more is lost"
    cheap = {key: price / 100 if isinstance(key[1], Narrow) else price for key, price in found.prices.items()}
    plan = make_plan(study, round(predict_with(study, plan_of(source, "heads")).peak_nbytes * 0.95), prices=cheap)
    kept = [form for form in plan.schemes().values() if isinstance(form, Narrow)]
    assert kept and {form.side for form in kept} == {"in", "out"}
    for n in range(2):
        sides = [plan.schemes().get(f"model.layers.{n}.self_attn.{leaf}_proj") for leaf in "vo"]
        assert len({form.kept if isinstance(form, Narrow) else None for form in sides}) == 1
    lines = fronts(study, 1 << 40, prices=found.prices, kv_prices={})
    assert list(lines) == ["quantize", "low-rank", "all together"]
    # Without a text nothing of it is priced, and none of it chosen.
    assert not any(isinstance(form, Narrow) for form in uniform_plan(study, 1 << 40).schemes().values())


def test_a_plan_with_half_of_an_attention_narrower_is_refused(source: Source) -> None:
    study, plan = Study(source, TASK, SETTINGS["heads"]), plan_of(source, "heads")
    output = "model.layers.0.self_attn.o_proj"
    choices = tuple(replace(choice, scheme=None) if choice.name == output else choice for choice in plan.choices)
    with pytest.raises(BrokenInput, match=r"heads of 24 and of all dimensions.*same `kept`"):
        study.adopt(replace(plan, choices=choices), {}, KV_PRICES)
    assert study.adopt(plan, {}, KV_PRICES).nbytes == plan.nbytes


def test_heads_that_keep_all_their_dimensions_lose_nothing(source: Source, tmp_path: Path) -> None:
    study, plan = Study(source, TASK, SETTINGS["heads"]), plan_of(source, "heads")
    choices = tuple(
        replace(choice, scheme=replace(choice.scheme, kept=32)) if isinstance(choice.scheme, Narrow) else choice
        for choice in plan.choices
    )
    plan = study.adopt(replace(plan, choices=choices), {}, KV_PRICES)
    integers = Integers(tmp_path / "integers")
    choose_integers(source, plan, None, IDS, integers, watch=Unwatched())
    out = tmp_path / "out"
    out.mkdir()
    fitted = logits(load(write(source, plan, out, integers=integers), dtype=torch.bfloat16))
    original = logits(load_model(source, dtype=torch.bfloat16))
    assert (fitted - original).norm() < 0.02 * original.norm()
