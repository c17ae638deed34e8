"""GPTQ and AWQ checkpoints are read as the weights that they stand for, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from memfit.errors import BrokenInput
from memfit.source import check, load, open_source
from memfit.source import quantized as reading
from memfit.source.safetensors import open_checkpoint

WIDTH, INNER = 64, 96
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, dtype="float16",
)  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(numbers: list[int], bits: int) -> list[int]:
    """Fields one after the other, from the lowest bit on, cut into signed words of 32 bits."""
    stream = sum(number << bits * at for at, number in enumerate(numbers))
    words = [(stream >> 32 * at) & 0xFFFFFFFF for at in range(len(numbers) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def packed_rows(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] -> int32 [R, C · bits/32], along the rows."""
    return torch.tensor([words_of(row.tolist(), bits) for row in numbers], dtype=torch.int32)


def by_gptq(
    name: str, outputs: int, inputs: int, *, bits: int, group: int, v2: bool = False, ordered: bool = False,
    seed: int = 0, dtype: torch.dtype = torch.float16,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # fmt: skip
    """The parts of a weight by chance as AutoGPTQ keeps them, and the weight [N, K] in float64, rounded once."""
    made = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group) if group > 0 else 1
    q = torch.randint(0, 1 << bits, (inputs, outputs), generator=made)
    z = torch.randint(0, 1 << bits, (groups, outputs), generator=made)
    s = ((torch.rand(groups, outputs, generator=made) + 0.01) / (1 << bits)).to(dtype)
    of = torch.arange(inputs) // (group if group > 0 else inputs)
    if ordered:
        of = of[torch.randperm(inputs, generator=made)]
    stored = z if v2 else (z - 1) % (1 << bits)
    parts = {
        f"{name}.qweight": packed_rows(q.t(), bits).t().contiguous(),
        f"{name}.qzeros": packed_rows(stored, bits),
        f"{name}.scales": s,
        f"{name}.g_idx": of.to(torch.int32),
    }
    return parts, ((q - z[of]).double() * s[of].double()).to(dtype).t()


def by_awq(name: str, outputs: int, inputs: int, *, group: int, seed: int = 0):
    """As AutoAWQ's gemm keeps them."""
    made = torch.Generator().manual_seed(seed)
    size = group if group > 0 else inputs
    q = torch.randint(0, 16, (inputs, outputs), generator=made)
    z = torch.randint(0, 16, (inputs // size, outputs), generator=made)
    s = (torch.rand(inputs // size, outputs, generator=made) * 0.1 + 1e-3).half()
    shuffled = [8 * (at // 8) + AWQ_ORDER[at % 8] for at in range(outputs)]
    parts = {
        f"{name}.qweight": packed_rows(q[:, shuffled], 4),
        f"{name}.qzeros": packed_rows(z[:, shuffled], 4),
        f"{name}.scales": s,
    }
    of = torch.arange(inputs) // size
    return parts, ((q - z[of]).double() * s[of].double()).half().t()


def save(
    directory: Path, quantization: dict[str, Any], make: Callable[..., Any], **settings: Any
) -> dict[str, torch.Tensor]:
    """A tiny Llama whose linear layers of blocks are `make`'s; all its weights as they are meant."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).half()
    tensors: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "_proj" in name:
            parts, meant[name] = make(name.removesuffix(".weight"), *parameter.shape, seed=seed, **settings)
            tensors |= parts
        else:
            tensors[name] = meant[name] = parameter.detach().clone()
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    raw = CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(raw))
    return meant


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    save(tmp_path, GPTQ, by_gptq, bits=4, group=32)
    return tmp_path


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    save(tmp_path, AWQ, by_awq, group=32)
    return tmp_path


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None] | None = None, **config: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    if edit is not None:
        edit(tensors)
    save_file(tensors, directory / "model.safetensors")
    raw = json.loads((directory / "config.json").read_text())
    raw["quantization_config"] |= config
    (directory / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_gptq_model_is_the_dense_model_that_it_stands_for(bits: int, ordered: bool, tmp_path: Path) -> None:
    told = GPTQ | {"bits": bits, "desc_act": ordered, "checkpoint_format": "gptq_v2" if ordered else "gptq"}
    meant = save(tmp_path, told, by_gptq, bits=bits, group=32, ordered=ordered, v2=ordered)
    source = open_source(tmp_path)
    check(source)
    assert source.dtype == torch.float16 and not source.quantized
    model = load(source)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, meant[name]), name
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_an_awq_model_is_the_dense_model_that_it_stands_for(tmp_path: Path) -> None:
    meant = save(tmp_path, AWQ, by_awq, group=32)
    source = open_source(tmp_path)
    check(source)
    for name, parameter in load(source).named_parameters():
        assert torch.equal(parameter, meant[name]), name
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.read_parameter(name, dtype=torch.bfloat16), meant[name].bfloat16())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_of_any_layout_are_exact(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    awq, bits = data.draw(st.booleans()), data.draw(st.sampled_from([2, 3, 4, 8]))
    outputs, inputs = 32 * data.draw(st.integers(1, 5)), 32 * data.draw(st.integers(1, 4))
    group = data.draw(st.sampled_from([-1, 16, 32]))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    seed = data.draw(st.integers(0, 99))
    told: dict[str, Any]
    if awq:
        told = AWQ | {"group_size": group}
        parts, meant = by_awq("a", outputs, inputs, group=group, seed=seed)
    else:
        v2, ordered = data.draw(st.booleans()), data.draw(st.booleans())
        told = GPTQ | {"group_size": group, "bits": bits, "format": "gptq_v2" if v2 else "gptq"}
        parts, meant = by_gptq(
            "a", outputs, inputs, bits=bits, group=group, v2=v2, ordered=ordered, seed=seed, dtype=dtype
        )
    # Tiles smaller than the matrix, both ways.
    monkeypatch.setattr(reading, "_TILE_OUTPUTS", 64)
    monkeypatch.setattr(reading, "_TILE_NUMBERS", 64 * data.draw(st.sampled_from([32, 64, 4096])))
    directory = tmp_path_factory.mktemp("one")
    save_file(parts, directory / "model.safetensors")
    stored = open_checkpoint(directory)
    assert stored is not None
    checkpoint = reading.unpack(told, stored, file=directory / "config.json")
    start = data.draw(st.integers(0, outputs - 1))
    stop = data.draw(st.integers(start + 1, outputs))
    assert torch.equal(checkpoint.read_rows("a.weight", start, stop), meant[start:stop])
    assert torch.equal(checkpoint.read("a.weight"), meant)
    assert b"".join(checkpoint.blocks("a.weight")) == meant.contiguous().view(torch.uint8).numpy().tobytes()


def test_it_loads_fake(gptq: Path) -> None:
    source = open_source(gptq)
    with FakeTensorMode():
        model = load(source)
    assert all(isinstance(one, FakeTensor) for one in model.parameters())


def test_settings_may_lie_beside_the_config_as_old_tools_left_them(tmp_path: Path) -> None:
    meant = save(tmp_path, {}, by_gptq, bits=4, group=32)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BrokenInput, match=r"unexpected"):
        check(open_source(tmp_path))
    told = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "model_file_base_name": "model"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(told))
    source = open_source(tmp_path)
    check(source)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(source.read_parameter(name), meant[name])


def test_a_bias_of_zeros_that_the_model_lacks_is_nothing(gptq: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    change(gptq, lambda tensors: tensors.update({name: torch.zeros(WIDTH).half()}))
    check(open_source(gptq))
    change(gptq, lambda tensors: tensors.update({name: torch.full([WIDTH], 0.5).half()}))
    with pytest.raises(BrokenInput, match=rf"'{name}'.*unexpected"):
        check(open_source(gptq))


def test_modules_that_are_only_left_out_are_read(gptq: Path) -> None:
    change(gptq, dynamic={"-:.*lm_head": {}}, meta={"quantizer": ["some:1.0"]}, damp_percent=0.1)
    check(open_source(gptq))


Q = "model.layers.0.self_attn.q_proj"


def without(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(f"{Q}.{part}")


def as_other(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{Q}.{part}": make(tensors[f"{Q}.{part}"]).contiguous()})


BROKEN_GPTQ: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no zeros": (without("qzeros"), {}, rf"model.safetensors: tensor '{Q}.qzeros' is missing"),
    "no scales": (without("scales"), {}, rf"tensor '{Q}.scales' is missing"),
    "no values": (without("qweight"), {}, rf"'{Q}.(qzeros|scales|g_idx)'.* unexpected"),
    "no order": (without("g_idx"), {"desc_act": True}, rf"'{Q}.g_idx' is missing, and desc_act"),
    "a row too few": (as_other("qweight", lambda t: t[:-1]), {}, rf"'{Q}.(scales|qzeros|g_idx)' has the shape"),
    "a column too few": (as_other("qweight", lambda t: t[:, :-8]), {}, rf"'{Q}.(scales|qzeros)' has the shape"),
    "groups too few": (as_other("scales", lambda t: t[:1]), {}, rf"'{Q}.scales' has the shape \(1, 64\).*\(2, 64\)"),
    "short zeros": (as_other("qzeros", lambda t: t[:, :-1]), {}, rf"'{Q}.qzeros' has the shape"),
    "short order": (as_other("g_idx", lambda t: t[:-1]), {}, rf"'{Q}.g_idx' has the shape"),
    "floats as integers": (as_other("qweight", lambda t: t.float()), {}, rf"'{Q}.qweight' is torch.float32"),
    "integers as scales": (as_other("scales", lambda t: t.int()), {}, rf"'{Q}.scales' is torch.int32"),
    "a flat matrix": (as_other("qweight", lambda t: t.flatten()), {}, rf"'{Q}.qweight'.* of 2 dimensions"),
    "a group that is not there": (as_other("g_idx", lambda t: t + 1), {}, rf"'{Q}.g_idx' puts input 32 into group 2"),
    "a group below 0": (as_other("g_idx", lambda t: t - 1), {}, rf"'{Q}.g_idx' puts input 0 into group -1"),
    "NaN": (as_other("scales", lambda t: t * float("nan")), {}, rf"'{Q}.scales' makes weights that are NaN"),
    "overflow": (as_other("scales", lambda t: t * 0 + 65504.0), {}, rf"'{Q}.scales' makes weights that are NaN or inf"),
    "twice": (lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64)}), {}, rf"has both '{Q}.weight' and"),
    "other bits": (None, {"bits": 8}, r"has the shape"),
    "unread bits": (None, {"bits": 5}, r"config.json: declares gptq of 5 bits; 2, 3, 4, 8 are read"),
    "bits of text": (None, {"bits": "4"}, r"gptq of '4' bits"),
    "no group": (None, {"group_size": 0}, r"a group_size of 0"),
    "other group": (None, {"group_size": 64}, r"in groups of 64 takes \(2, 8\)"),
    "marlin": (None, {"checkpoint_format": "marlin"}, r"GPTQ in the layout 'marlin'"),
    "marlin too": (None, {"is_marlin_format": True}, r"is_marlin_format = True"),
    "other words": (None, {"pack_dtype": "int16"}, r"packed into 'int16'"),
    "overrides": (None, {"dynamic": {"+:.*down.*": {"bits": 8}}}, r"other settings for the modules '\+:\.\*down"),
    "adapter": (None, {"adapter": {"rank": 8}}, r"adapter = "),
    "an unknown option": (None, {"rotation": "hadamard"}, r"quantization_config.rotation = 'hadamard'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN_GPTQ)
def test_a_gptq_checkpoint_that_is_not_as_it_says_is_refused(what: str, gptq: Path) -> None:
    edit, config, reason = BROKEN_GPTQ[what]
    change(gptq, edit, **config)
    with pytest.raises(BrokenInput, match=reason) as caught:
        load(open_source(gptq))
    assert str(gptq) in str(caught.value)


BROKEN_AWQ: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gemv": (None, {"version": "GEMV"}, r"AWQ in the layout 'gemv'; gemm is read"),
    "llm-awq": (None, {"backend": "llm-awq"}, r"AWQ in the layout 'llm-awq'"),
    "no zero points": (None, {"zero_point": False}, r"AWQ without zero points"),
    "other bits": (None, {"bits": 3}, r"awq of 3 bits; 4 are read"),
    "no zeros": (without("qzeros"), {}, rf"tensor '{Q}.qzeros' is missing"),
    "groups too many": (None, {"group_size": 16}, r"in groups of 16 takes \(6, 8\)"),
    "an order": (lambda t: t.update({f"{Q}.g_idx": torch.zeros(64).int()}), {}, r"g_idx' is there, and AWQ has no"),
    "a row too few": (as_other("qweight", lambda t: t[:32]), {}, rf"'{Q}.(qzeros|scales)' has the shape"),
}


@pytest.mark.parametrize("what", BROKEN_AWQ)
def test_an_awq_checkpoint_that_is_not_as_it_says_is_refused(what: str, awq: Path) -> None:
    edit, config, reason = BROKEN_AWQ[what]
    change(awq, edit, **config)
    with pytest.raises(BrokenInput, match=reason) as caught:
        load(open_source(awq))
    assert str(awq) in str(caught.value)


def test_a_declaration_without_such_tensors_is_refused(gptq: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            del tensors[name]

    change(gptq, strip)
    with pytest.raises(BrokenInput, match=r"quantized by gptq, and no tensor ends in .qweight"):
        open_source(gptq)


def test_a_file_cut_after_it_was_opened_is_refused(gptq: Path) -> None:
    source = open_source(gptq)
    raw = (gptq / "model.safetensors").read_bytes()
    (gptq / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BrokenInput, match=r"ends within"):
        load(source)
