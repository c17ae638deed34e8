"""NF4, FP8, MXFP4 and codebooks on disk: stock transformers loads what it can, and never what it cannot."""

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
from safetensors.torch import load_file, save_file

from memfit.account.watch import Unwatched
from memfit.compress import compress
from memfit.errors import BrokenInput
from memfit.format.integers import Integers
from memfit.packed.modules import packed_modules
from memfit.packed.scheme import Scheme
from memfit.plan.groups import find_groups
from memfit.plan.plan import GroupChoice, Plan, dumps, loads
from memfit.planning import plan_files, predict
from memfit.source import check, load, open_source, source_from_config
from memfit.source.source import Source
from memfit.task.infer import Infer
from memfit.technique.gptq import factor as factor_of
from memfit.technique.gptq import gptq
from memfit.technique.quantize import dequantize, quantize

FP8, FP8_64 = Scheme(bits=8, group=None, values="fp8"), Scheme(bits=8, group=64, values="fp8")
MX, NF = Scheme(bits=4, group=32, values="mxfp4"), Scheme(bits=4, group=64, values="nf4")
CODEBOOK = Scheme(bits=3, group=None, values="codebook")
VECTORS = Scheme(bits=2, group=32, values="codebook", vector=4)
STOCK = textwrap.dedent("""
    import sys, torch
    from transformers import AutoModelForCausalLM
    for path in sys.argv[1:]:
        try:
            model, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto")
        except OSError as error:
            print("refused:", str(error)[:200])
            continue
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
        ids = torch.arange(64).view(2, 32) * 7 % 256
        with torch.no_grad():
            torch.save(model.eval()(input_ids=ids, use_cache=False).logits, path + "/logits.pt")
    assert "memfit" not in sys.modules
""")
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.3,
}  # fmt: skip


def write(source: Source, schemes: list[Scheme | None], directory: Path) -> Plan:
    """The model with its groups in these schemes, in turn; the last of them for the table."""
    choices = []
    for n, group in enumerate(find_groups(source.build(dtype=torch.bfloat16))):
        scheme = schemes[-1] if group.kind == "embedding" else schemes[n % len(schemes)]
        choices.append(
            GroupChoice(
                name=group.name, members=group.members, scheme=scheme, weights=group.weights,
                nbytes=group.nbytes(scheme), price=0.0,
            )
        )  # fmt: skip
    plan = Plan(model=source.name, task={}, budget_nbytes=0, choices=tuple(choices))
    directory.mkdir()
    compress(source, plan, None, directory, watch=Unwatched())
    (directory / "config.json").write_text(json.dumps(plan_files(source, plan)[1]))
    return plan


def stock(*paths: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_stock_transformers_loads_fp8_and_mxfp4_and_fails_on_memfits_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied = source_from_config(hf.Gemma3TextConfig(**SIZES), seed=1)
    untied = source_from_config(hf.LlamaConfig(**SIZES, tie_word_embeddings=False), seed=2)
    int4 = Scheme(bits=4, group=32)
    made = {
        "tied": (tied, [FP8_64, MX, int4, MX]), "untied": (untied, [MX, FP8, FP8_64]),
        "own": (untied, [NF, int4, CODEBOOK, VECTORS]),
    }  # fmt: skip
    for name, (source, schemes) in made.items():
        write(source, schemes, tmp_path / name)
    paths = [tmp_path / name for name in made]
    told = stock(*paths)
    assert told.count("refused:") == 1 and str(tmp_path / "own") in told
    assert not (tmp_path / "own" / "model.safetensors").exists()
    ids = torch.arange(64).view(2, 32) * 7 % 256
    for path in paths[:-1]:
        with torch.no_grad():
            mine = load(open_source(path))(input_ids=ids, use_cache=False).logits.float()
        theirs = torch.load(path / "logits.pt").float()
        assert mine.std() > 0.1
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-2


@pytest.mark.parametrize("table", [MX, CODEBOOK, VECTORS], ids=lambda scheme: scheme.name)
def test_what_is_written_is_read_back_and_predicted(table: Scheme, tmp_path: Path) -> None:
    source = source_from_config(hf.LlamaConfig(**SIZES, tie_word_embeddings=True), seed=3)
    plan = write(source, [NF, FP8_64, MX, CODEBOOK, VECTORS, table], tmp_path / "out")
    opened = open_source(tmp_path / "out")
    check(opened)
    assert dict(opened.schemes) == plan.schemes()
    model = load(opened)
    assert model.lm_head.store is model.model.embed_tokens.store
    for name, module in packed_modules(model).items():
        weight = source.read_parameter(f"{name}.weight", dtype=torch.bfloat16)
        due = dequantize(quantize(weight, plan.schemes()[name]))
        assert torch.equal(module.store.dense_rows(0, weight.shape[0]), due), name
    task = Infer(batch=1, prompt=8, new_tokens=1)
    load_phase = predict(source, plan, task).phases[0]
    held = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    assert load_phase.end_nbytes == held


def test_stored_bytes_are_those_of_the_plan(tmp_path: Path) -> None:
    source = source_from_config(hf.LlamaConfig(**SIZES, tie_word_embeddings=False), seed=3)
    plan = write(source, [NF, FP8_64, VECTORS, CODEBOOK], tmp_path / "out")
    stored = open_source(tmp_path / "out").tensors
    for choice in plan.choices:
        if choice.name.startswith("model.layers"):
            parts = [info for name, info in stored.items() if name.rpartition(".")[0] in choice.members]
            assert sum(info.nbytes for info in parts) == choice.nbytes


def test_a_plan_keeps_its_values_and_one_of_integers_reads_as_ever() -> None:
    schemes = [NF, FP8, MX, CODEBOOK, VECTORS, Scheme(bits=4)]
    choices = tuple(
        GroupChoice(name=str(n), members=(str(n),), scheme=scheme, weights=1, nbytes=1, price=0.0)
        for n, scheme in enumerate(schemes)
    )
    plan = Plan(model="m", task={}, budget_nbytes=1, choices=choices)
    assert loads(dumps(plan)) == plan
    assert Scheme(bits=4).to_json() == {"bits": 4, "group": 128, "symmetric": True}
    with pytest.raises(BrokenInput, match=r"choices\[0\].scheme.values is 'nf5'"):
        loads(dumps(plan).replace('"nf4"', '"nf5"'))
    with pytest.raises(BrokenInput, match=r"choices\[4\].scheme.*only a codebook's levels can be vectors"):
        loads(dumps(replace(plan, choices=choices[:5])).replace('"codebook"', '"int"'))


@pytest.mark.parametrize(("part", "value", "reason"), [
    ("mlp.down_proj.weight_codebook", torch.ones(4).bfloat16(), "has the shape"),
    ("mlp.down_proj.weight_codebook", None, "missing"),
    ("mlp.down_proj.weight_codebook", torch.full((8,), torch.inf).bfloat16(), "NaN or infinity"),
    ("mlp.gate_proj.weight_scale", torch.full((128, 2), 255, dtype=torch.uint8), "E8M0's NaN"),
    ("mlp.gate_proj.weight_packed", torch.ones(128, 32, dtype=torch.int8), "has the dtype"),
    ("self_attn.o_proj.weight", torch.full((64, 64), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn), "NaN"),
    ("self_attn.o_proj.weight", torch.ones(64, 64).bfloat16(), "has the dtype"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(
    part: str, value: torch.Tensor | None, reason: str, tmp_path: Path
) -> None:
    source = source_from_config(hf.LlamaConfig(**SIZES, tie_word_embeddings=False), seed=3)
    write(source, [NF, FP8_64, MX, CODEBOOK], tmp_path / "out")
    file = tmp_path / "out" / "memfit.safetensors"
    tensors = load_file(file)
    assert tensors.pop(f"model.layers.0.{part}") is not None
    if value is not None:
        tensors[f"model.layers.0.{part}"] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BrokenInput, match=reason):
        load(open_source(tmp_path / "out"))


def test_chosen_values_are_kept_with_their_codebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, all with the levels that the whole weight was given."""
    monkeypatch.setattr("memfit.format.integers._ROWS_NBYTES", 64 * 20)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    factor, integers = torch.cov(weight.t()) + torch.eye(64), Integers(tmp_path)
    every = (NF, FP8, MX, CODEBOOK, VECTORS)
    found = {scheme.name: gptq(weight, factor, scheme, rows=7).quantized for scheme in every}
    for name, made in found.items():
        integers.add("block", name, made)
    integers.finish("block", dict.fromkeys(found, 0.01))
    kept = Integers(tmp_path)
    alone = factor_of(factor).own_weights()
    assert torch.equal(found[CODEBOOK.name].table, quantize(weight, CODEBOOK, importance=alone).table)
    for name, made in found.items():
        right = dequantize(made)
        assert torch.equal(right, dequantize(gptq(weight, factor, made.scheme).quantized))
        assert torch.equal(dequantize(kept.read(name, made.scheme)), right)
        assert torch.equal(kept.weight(name, made.scheme), right)
        parts = list(kept.rows(name, made.scheme))
        assert [start for start, _ in parts] == [0, 20, 40]
        assert torch.equal(torch.cat([dequantize(part) for _, part in parts]), right)


@pytest.mark.parametrize(("change", "told"), [
    ({"format": "nvfp4-pack-quantized"}, "memfit runs 'pack-quantized', 'mxfp4-pack-quantized'"),
    ({"format": "memfit"}, "has the format 'memfit'"),
    ({"format": "mxfp4-pack-quantized"}, "mxfp4 has 4 bits, got 8"),
    ({"format": "pack-quantized"}, "type 'float'; in the format 'pack-quantized' memfit runs int"),
])  # fmt: skip
def test_formats_that_do_not_hold_what_they_say_are_refused(change: dict, told: str, tmp_path: Path) -> None:
    source = source_from_config(hf.LlamaConfig(**SIZES, tie_word_embeddings=False), seed=3)
    write(source, [FP8], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BrokenInput, match=told):
        check(open_source(tmp_path / "out"))
