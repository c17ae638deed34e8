"""What compressing writes is what was planned, the same every time, and what memfit loads from it."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch._subclasses import FakeTensorMode

from memfit.account.follow import Follow
from memfit.account.meter import Meter
from memfit.account.settle import settle
from memfit.account.watch import Unwatched
from memfit.compress import calibrate, compress, priced_by
from memfit.format.safetensors import DTYPES
from memfit.packed.scheme import Scheme
from memfit.plan.allowed import Allowed
from memfit.plan.groups import find_groups
from memfit.plan.plan import GroupChoice, Plan
from memfit.planning import plan_files
from memfit.source.load import load
from memfit.source.source import Source, open_source, source_from_config
from memfit.technique.quantize import dequantize, quantize

DECODER = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BITS = (8, 6, 4, 3, 5, 2, None)


def windows() -> torch.Tensor:
    return torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(0))


def plan_of(source: Source) -> Plan:
    """Every width somewhere, and something left in 16 bits."""
    choices = []
    for number, group in enumerate(find_groups(source.build(dtype=torch.bfloat16))):
        bits = BITS[number % len(BITS)]
        scheme = None if bits is None else Scheme(bits=bits, group=None if bits == 8 else 64)
        choices.append(
            GroupChoice(
                name=group.name, members=group.members, scheme=scheme, weights=group.weights,
                nbytes=group.nbytes(scheme), price=0.0,
            )
        )  # fmt: skip
    return Plan(model=source.name, task={}, budget_nbytes=0, choices=tuple(choices))


def write(source: Source, plan: Plan, directory: Path) -> dict[str, str]:
    files = compress(source, plan, None, directory, watch=Unwatched())
    (directory / "config.json").write_text(json.dumps(plan_files(source, plan)[1]))
    return files


@pytest.fixture(scope="module")
def source() -> Source:
    return source_from_config(hf.LlamaConfig(**DECODER, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> tuple[Path, dict[str, str], Plan]:
    directory, plan = tmp_path_factory.mktemp("out"), plan_of(source)
    return directory, write(source, plan, directory), plan


def header_of(file: Path) -> dict[str, dict[str, object]]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def test_the_file_holds_the_planned_tensors_in_order_and_size(source, written):
    directory, _, plan = written
    header = header_of(directory / "model.safetensors")
    header.pop("__metadata__", None)
    specs, _ = plan_files(source, plan)
    assert [(s.name, DTYPES[s.dtype], list(s.shape)) for s in specs] == [
        (name, about["dtype"], about["shape"]) for name, about in header.items()
    ]
    sizes = [about["data_offsets"][1] - about["data_offsets"][0] for about in header.values()]
    assert sizes == [spec.nbytes for spec in specs]


def test_the_hash_told_is_the_files_and_a_second_run_gives_the_same_bytes(source, written, tmp_path):
    directory, files, plan = written
    assert files == {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in ("model.safetensors",)
    }
    assert write(source, plan, tmp_path) == files


def test_loaded_weights_are_the_quantized_ones(source, written):
    directory, _, plan = written
    model = load(open_source(directory), dtype=torch.bfloat16)
    schemes = plan.schemes()
    for name, scheme in schemes.items():
        weight = source.read_parameter(f"{name}.weight", dtype=torch.bfloat16)
        expected = dequantize(quantize(weight, scheme)).float()
        module = model.get_submodule(name)
        if name == "model.embed_tokens":
            got = module(torch.arange(len(weight))).float()
        else:
            got = module(torch.eye(weight.shape[1], dtype=torch.bfloat16)).float().T
        assert (got - expected).norm() <= 5e-3 * expected.norm(), name
    left = set(source.parameters) - {f"{name}.weight" for name in schemes}
    state = model.state_dict()
    assert left and all(
        torch.equal(state[name], source.read_parameter(name, dtype=torch.bfloat16)) for name in left
    )


def test_fused_experts_are_written_and_loaded(tmp_path):
    source = source_from_config(hf.MixtralConfig(**DECODER, num_local_experts=4))
    plan = plan_of(source)
    assert any(name.endswith("experts") for name in plan.schemes())
    write(source, plan, tmp_path)
    model = load(open_source(tmp_path), dtype=torch.bfloat16)
    whole = load(source, dtype=torch.bfloat16)
    for choice in plan.choices:
        for member in choice.members if choice.scheme else ():
            module = whole.get_submodule(member)
            for parameter in module.parameters(recurse=False):
                rounded = quantize(parameter.data.reshape(-1, parameter.shape[-1]), choice.scheme)
                parameter.data = dequantize(rounded).view(parameter.shape).bfloat16()
    ids = windows()[:1, :8]
    with torch.no_grad():
        got, expected = model(ids).logits.float(), whole(ids).logits.float()
    assert (got - expected).norm() <= 2e-2 * expected.norm()


def test_statistics_shape_what_is_written(source, written, tmp_path):
    statistics = calibrate(source, windows(), Allowed(bits=(4,)), batch=2, watch=Unwatched()).statistics
    files = compress(source, written[2], statistics, tmp_path, watch=Unwatched())
    assert files.keys() == written[1].keys() and files != written[1]


def test_statistics_that_only_weigh_tables_are_of_a_part_of_the_text():
    source = source_from_config(hf.LlamaConfig(**DECODER))
    ids = torch.randint(3, 512, (50, 100), generator=torch.Generator().manual_seed(0))
    found, whole = (
        calibrate(source, ids, None, batch=25, watch=Unwatched(), weighing=weighing).statistics
        for weighing in (True, False)
    )
    assert found is not None and whole is not None
    assert (found.tokens, whole.tokens) == (4100, 5000), "as many windows as hold 4096 tokens"
    for name, (counts_V, gradients_D) in found.pairs().items():
        if name == "model.embed_tokens":
            torch.testing.assert_close(gradients_D, whole.pairs()[name][1], rtol=0.2, atol=0)
            assert counts_V.sum().item() == pytest.approx(1, rel=1e-5), "shares of the tokens that were seen"


def test_prices_come_from_the_text_where_it_says_something_of_every_group():
    llama = source_from_config(hf.LlamaConfig(**DECODER))
    mixtral = source_from_config(hf.MixtralConfig(**DECODER, num_local_experts=4))
    for source in (llama, mixtral):
        found = calibrate(source, windows(), Allowed(bits=(8, 4)), batch=2, watch=Unwatched())
        statistics, prices = found.statistics, found.prices
        assert priced_by(source, statistics) == "text"
        assert all(price >= 0 for price in prices.values())
        for group in find_groups(source.build()):
            eight, four = ([p for (n, s), p in prices.items() if n == group.name and s.bits == b] for b in (8, 4))
            assert max(eight) < min(four)
    assert priced_by(llama, None) == "weights"
    assert statistics is not None
    few = replace(statistics, moments=dict(list(statistics.moments.items())[1:]))
    assert priced_by(mixtral, few) == "weights"


@pytest.mark.parametrize("with_text", [True, False])
def test_the_dry_run_of_fitting_tells_what_it_takes(source, tmp_path, with_text):
    plan, allowed = plan_of(source), Allowed(bits=(4,), groups={4: (64,)})
    few = (Scheme(bits=4, group=64), None) if with_text else (Scheme(bits=8, group=None), None)
    changed = [replace(choice, scheme=few[number % 2]) for number, choice in enumerate(plan.choices)]
    plan = replace(plan, choices=tuple(changed))
    follow = Follow()
    with FakeTensorMode(allow_non_fake_inputs=True), follow:
        ids = torch.zeros_like(torch.empty((4, 32), dtype=torch.int64)) if with_text else None
        statistics = calibrate(source, ids, allowed, batch=2, watch=follow).statistics
        compress(source, plan, statistics, tmp_path, watch=follow, dry=True)
    predicted = settle(follow.ledger)
    assert not any(tmp_path.iterdir())
    meter = Meter()
    real = calibrate(source, windows() if with_text else None, allowed, batch=2, watch=meter)
    compress(source, plan, real.statistics, tmp_path, watch=meter)
    measured = meter.account()
    for phase in measured.phases:
        told = predicted.phase(phase.name).peak_nbytes
        assert told == pytest.approx(phase.peak_nbytes, rel=0.03), phase.name
