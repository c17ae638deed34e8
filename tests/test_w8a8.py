"""W8A8 from a model to files: smoothed, written for stock transformers, run in integers, predicted to the byte."""

import io
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from rich.console import Console
from safetensors.torch import load_file, save_file

import memfit
from memfit.account.meter import Meter
from memfit.account.watch import Unwatched
from memfit.calibrate.statistics import Moments, Statistics
from memfit.compensate import Thrift
from memfit.compress import Calibrated, calibrate, choose_integers, compress
from memfit.format.integers import Integers
from memfit.models import load_model
from memfit.packed.integer import IntegerWeight
from memfit.packed.modules import packed_modules
from memfit.packed.scheme import Scheme
from memfit.plan.groups import find_groups
from memfit.plan.plan import dumps, loads
from memfit.planning import account_of, make_plan, plan_files, uniform_plan
from memfit.report.terminal import render_plan
from memfit.source.load import load
from memfit.source.source import open_source, source_from_config
from memfit.steps import predict_choosing, predict_compressing
from memfit.study import Study
from memfit.technique.smoothing import Smoothing, find_smoothing, smoothing_of_all

A8, ROW = Scheme(bits=8, group=None, activations=8), Scheme(bits=8, group=None)
ALLOWED = memfit.Allowed(bits=(8,), kv_bits=(16,), activations=8)
NORMS = ("model.layers.0.input_layernorm", "model.layers.1.input_layernorm", "model.layers.1.mlp_norm")
TASK = memfit.Infer(prompt=40, new_tokens=3)
IDS = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
STOCK = textwrap.dedent("""
    import sys, torch
    from transformers import AutoModelForCausalLM
    path, place = sys.argv[1:]
    ids = torch.load(f"{place}/ids.pt")
    for dtype in (torch.bfloat16, torch.float32):
        model, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=dtype)
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
        scheme = model.model.layers[0].mlp.down_proj.quantization_scheme
        assert scheme.input_activations.dynamic and scheme.input_activations.num_bits == 8, scheme
        with torch.no_grad():
            torch.save(model.eval()(input_ids=ids, use_cache=False).logits, f"{place}/{dtype}.pt")
    assert "memfit" not in sys.modules
""")


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    """A Llama three channels of whose norms are far above the others."""
    path: Path = tmp_path_factory.mktemp("model") / "m"
    torch.manual_seed(0)
    made = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True, initializer_range=0.1))
    for layer in made.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[[5, 40, 77]] = torch.tensor([60.0, -45.0, 30.0])
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            layer.get_submodule(name).weight.data[:, [5, 40, 77]] *= 0.03
    made.to(torch.bfloat16).save_pretrained(path)
    return path


def found(model: Path, allowed: memfit.Allowed) -> Calibrated:
    windows = torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    return calibrate(open_source(model), windows, allowed, batch=4, watch=Unwatched())


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: Any) -> dict[bool, Path]:
    """By whether it was smoothed: the fitted model. The smoothed one's table stays as it is, so it runs in float32."""
    source, paths = open_source(model), {}
    for smooth in (True, False):
        allowed = replace(ALLOWED, smooth=smooth, keep=("embeddings",) if smooth else ())
        calibrated = found(model, allowed)
        assert bool(calibrated.smoothing.alphas) == smooth
        plan = uniform_plan(Study(source, TASK, allowed), 10**9)
        paths[smooth] = tmp_path_factory.mktemp("fitted")
        read = calibrated.smoothing.of_source(source)
        compress(read, plan, calibrated.statistics, paths[smooth], watch=Unwatched())
        (paths[smooth] / "config.json").write_text(json.dumps(plan_files(source, plan)[1]))
    return paths


def logits(path: Path, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    with torch.no_grad():
        return load_model(open_source(path), dtype=dtype)(input_ids=IDS, use_cache=False).logits.double()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_files_run_on_integers_and_smoothing_brings_them_nearer(model: Path, written: dict[bool, Path]) -> None:
    stores = {name: module.store for name, module in packed_modules(memfit.load(written[False])).items()}
    linear = {name for name, store in stores.items() if isinstance(store, IntegerWeight)}
    assert linear == {name for name in stores if ".layers." in name} and len(linear) == 14
    assert stores["lm_head"] is stores["model.embed_tokens"] and stores["lm_head"].scheme == ROW
    original = logits(model)
    plain, smooth = distance(logits(written[False]), original), distance(logits(written[True]), original)
    assert smooth < 0.1 and smooth < 0.3 * plain


def test_stock_transformers_gives_the_same_logits(written: dict[bool, Path], tmp_path: Path) -> None:
    config = json.loads((written[True] / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["format"] == "int-quantized" and group["weights"]["strategy"] == "channel"
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    assert activations.items() <= group["input_activations"].items()
    torch.save(IDS, tmp_path / "ids.pt")
    words = [sys.executable, "-c", STOCK, str(written[True]), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stock = {dtype: torch.load(tmp_path / f"{dtype}.pt").double() for dtype in (torch.bfloat16, torch.float32)}
    # The same function: without rounding to bf16 between layers all integers are the same, until a last bit that falls
    # otherwise moves what is near a half to another one; attention brings that to all tokens after.
    mine = logits(written[True], torch.float32)
    apart = (mine - stock[torch.float32]).norm(dim=-1) / stock[torch.float32].norm(dim=-1)
    assert apart.min() < 1e-5 and distance(mine, stock[torch.float32]) < 2e-2
    # In bf16 there are many such bits: about as far from each other as each of the two is from float32.
    rounded = stock[torch.bfloat16]
    assert distance(logits(written[True]), rounded) < 1.5 * distance(rounded, stock[torch.float32]) < 0.1


def test_the_account_of_the_files_is_exact(model: Path, written: dict[bool, Path]) -> None:
    predicted = memfit.account(written[False], TASK)
    meter = Meter()
    with meter.phase("load"):
        loaded = memfit.load(written[False])
    TASK.run(loaded, meter)
    measured = {phase.name: phase.peak_nbytes for phase in meter.account().phases}
    assert {phase.name: phase.peak_nbytes for phase in predicted.phases} == measured
    planned = uniform_plan(Study(open_source(model), TASK, ALLOWED), 10**9).predicted
    assert planned is not None and planned["peak_nbytes"] == predicted.peak_nbytes


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_smoothed_source_is_the_same_model(kind: str) -> None:
    config = hf.LlamaConfig(**SIZES) if kind == "llama" else hf.Gemma3TextConfig(**SIZES, head_dim=32)
    source = source_from_config(config, seed=3)
    before = load(source, dtype=torch.float32)
    names = [name for name, module in before.named_modules() if isinstance(module, torch.nn.Linear)]
    statistics = Statistics(tokens=1)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        rows, width = before.get_submodule(name).weight.shape
        squares = torch.rand(width, generator=generator).square() * torch.where(torch.arange(width) % 50 == 7, 900, 1)
        statistics.moments[name] = Moments(inputs=squares, gradients=torch.rand(rows, generator=generator))
    smoothing = find_smoothing(source, statistics, frozenset(names), watch=Unwatched())
    assert len(smoothing.alphas) == 4 and all(alpha > 0 for alpha in smoothing.told().values())
    after = load(smoothing.of_source(source), dtype=torch.float32)
    changed = [name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert len(changed) == 2 * (2 + 5)
    with torch.no_grad():
        one, other = (made(input_ids=IDS, use_cache=False).logits for made in (after, before))
    assert distance(one, other) < 1e-5
    layer = next(iter(smoothing.columns))
    smaller = smoothing.of_statistics(statistics).moments[layer]
    made = smoothing.columns[layer]
    assert torch.allclose(smaller.inputs * made.square(), statistics.moments[layer].inputs)
    assert find_smoothing(source, statistics, frozenset({"lm_head"}), watch=Unwatched()) == Smoothing()


def test_what_smoothed_weights_take_is_predicted_before_they_are_found(model: Path, tmp_path: Path) -> None:
    source, windows = open_source(model), torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    plan, members = uniform_plan(Study(source, TASK, ALLOWED), 10**9), ALLOWED.smoothed(find_groups(source.build()))
    before, later = smoothing_of_all(source, members), found(model, ALLOWED).smoothing
    assert before.columns.keys() == later.columns.keys() and len(members) == 14
    meter, integers = Meter(), Integers(tmp_path / "integers")
    read, expected = later.of_source(source), before.of_source(source)
    choose_integers(read, plan, None, windows, integers, watch=meter, thrift=Thrift(batch=2))
    told = predict_choosing(expected, plan, windows.shape, Thrift(batch=2))
    assert told.peak_nbytes == pytest.approx(meter.account().peak_nbytes, rel=0.01)
    meter = Meter()
    (tmp_path / "out").mkdir()
    compress(read, plan, None, tmp_path / "out", watch=meter)
    told = predict_compressing(expected, plan, {"work": str(tmp_path)}, algorithm="search")
    assert told.peak_nbytes == pytest.approx(meter.account().peak_nbytes, rel=0.01)


def test_smoothing_is_read_as_it_was_written(model: Path, tmp_path: Path) -> None:
    made = found(model, ALLOWED).smoothing
    made.save(tmp_path / "s.safetensors")
    again = Smoothing.read(tmp_path / "s.safetensors")
    assert again.told() == made.told() and again.columns.keys() == made.columns.keys()
    assert all(torch.equal(again.vectors[name], vector) for name, vector in made.vectors.items())


def test_a_plan_says_what_is_in_8_bits_and_old_plans_are_read(model: Path) -> None:
    plan = replace(uniform_plan(Study(open_source(model), TASK, ALLOWED), 10**9), smoothed=("model.layers.0.norm",))
    schemes = plan.schemes()
    assert schemes["model.layers.0.mlp.up_proj"] == A8 and schemes["model.embed_tokens"] == ROW
    assert loads(dumps(plan)) == plan
    old = json.loads(dumps(replace(plan, smoothed=())))
    assert "smoothed" not in old
    for choice in old["choices"]:
        choice["scheme"].pop("activations", None)
    assert set(loads(json.dumps(old)).schemes().values()) == {ROW}
    old["smoothed"] = "all"
    with pytest.raises(memfit.BrokenInput, match="smoothed must be a list"):
        loads(json.dumps(old))


def test_the_search_takes_it_where_it_is_allowed(model: Path) -> None:
    allowed = memfit.Allowed(bits=(8, 4), groups={8: (None,), 4: (64,)}, kv_bits=(16,), activations=8)
    source = open_source(model)
    made = make_plan(Study(source, TASK, allowed), account_of(source, TASK).peak_nbytes * 7 // 10)
    schemes = set(made.schemes().values())
    assert A8 in schemes and not any(s.bits == 8 and ".layers." in n and s != A8 for n, s in made.schemes().items())
    assert made.predicted is not None and made.predicted["peak_nbytes"] <= made.budget_nbytes
    words = io.StringIO()
    Console(file=words, width=200).print(render_plan(replace(made, smoothed=NORMS).to_json()))
    assert "int8 row a8" in words.getvalue() and "Smoothed: input_layernorm (0-1), mlp_norm (1)" in words.getvalue()


def test_a_price_knows_the_activations(model: Path) -> None:
    """Rounding activations costs more, and less of it where they are smoothed."""
    rounded, smooth = (found(model, replace(ALLOWED, smooth=on)).prices for on in (False, True))
    plain = found(model, replace(ALLOWED, activations=16)).prices
    layer, last = "model.layers.0.mlp.gate_proj+up_proj", "model.layers.0.mlp.down_proj"
    assert smooth[layer, A8] < 0.3 * rounded[layer, A8]
    assert plain[layer, ROW] < rounded[layer, A8]
    assert plain[last, ROW] < smooth[last, A8]


def test_what_cannot_be_is_refused_with_the_next_move(written: dict[bool, Path], tmp_path: Path) -> None:
    with pytest.raises(memfit.UsageError, match=r"8 bits.*allowed is 4, 3 bits\. Allow 8 bits \(--bits 8\)"):
        memfit.Allowed(bits=(4, 3), activations=8)
    with pytest.raises(memfit.UsageError, match=r"groups of 128\. Leave --group out"):
        memfit.Allowed(bits=(8,), groups={8: (128,)}, activations=8)
    with pytest.raises(memfit.UsageError, match="16 or 8 bits, got 4"):
        memfit.Allowed(activations=4)
    config = json.loads((written[False] / "config.json").read_text())
    told = config["quantization_config"]["config_groups"]["group_1"]["input_activations"]
    save_file(load_file(next(written[False].glob("*.safetensors"))), tmp_path / "model.safetensors")
    for key, value in (("dynamic", False), ("num_bits", 4), ("strategy", "tensor"), ("symmetric", False)):
        old, told[key] = told[key], value
        (tmp_path / "config.json").write_text(json.dumps(config))
        told[key] = old
        with pytest.raises(memfit.BrokenInput, match=r"group_1.*input_activations.*memfit runs none, or"):
            open_source(tmp_path)
