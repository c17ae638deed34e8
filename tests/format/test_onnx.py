"""ONNX files: the fitted model's own integers, and ONNX Runtime's answers beside memfit's, kind by kind."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as hf

from memfit.account.meter import Meter
from memfit.account.watch import Unwatched
from memfit.compress import compress
from memfit.errors import UsageError
from memfit.evaluate.onnx_model import OnnxModel
from memfit.evaluate.onnx_proof import compare_with_file, float32_answers
from memfit.format.onnx import DATA, GRAPH, onnx_parts, read_part, write_onnx
from memfit.format.onnx_graph import require_kind, require_onnx
from memfit.format.onnx_modules import block_of, require_onnx_scheme
from memfit.models import load_model
from memfit.packed.bits import unpack_values, unpack_zeros
from memfit.packed.scheme import Scheme
from memfit.packed.wide import widen
from memfit.plan.groups import find_groups
from memfit.plan.plan import GroupChoice, Plan
from memfit.planning import plan_files
from memfit.source.source import Source, open_source, source_from_config
from memfit.steps import predict_onnx

SIZE: dict[str, Any] = {
    "vocab_size": 640, "hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
DECODER = SIZE | ENDS | {"num_key_value_heads": 2, "head_dim": 32}
BITS = (8, 4, 2, None)


def bert(layers: int = 1, **settings: Any) -> Any:
    return hf.BertConfig(num_hidden_layers=layers, **SIZE | {"architectures": ["BertModel"]} | settings)


def llama(layers: int = 1) -> Any:
    return hf.LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **DECODER)


def fitted(config: Any, directory: Path, *, symmetric: bool = True) -> Source:
    """A fitted directory of random weights: every width somewhere, and something left in 16 bits."""
    source, choices = source_from_config(config), []
    for number, group in enumerate(find_groups(source.build(dtype=torch.bfloat16))):
        bits = BITS[number % len(BITS)]
        scheme = None if bits is None else Scheme(bits=bits, group=None if bits == 8 else 64, symmetric=symmetric)
        if scheme is not None and group.why_not(scheme) is not None:
            scheme = None
        choices.append(
            GroupChoice(
                name=group.name, members=group.members, scheme=scheme, weights=group.weights,
                nbytes=group.nbytes(scheme), price=0.0,
            )
        )  # fmt: skip
    plan = Plan(model=source.name, task={}, budget_nbytes=0, choices=tuple(choices))
    compress(source, plan, None, directory, watch=Unwatched(), search=False)
    (directory / "config.json").write_text(json.dumps(plan_files(source, plan)[1]))
    return open_source(directory)


def difference(source: Source, directory: Path) -> float:
    """Of ONNX Runtime's answers from memfit's, the file written to `directory`."""
    write_onnx(source, directory, watch=Unwatched())
    return _compared(source, directory)


def _compared(source: Source, directory: Path) -> float:
    model = load_model(source, dtype=torch.float32)
    widen(model)
    return compare_with_file(directory / GRAPH, *float32_answers(model, None), threads=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return fitted(llama(), tmp_path_factory.mktemp("llama"))


def test_an_encoder_with_zero_points_gives_what_memfit_gives_and_is_written_as_predicted(tmp_path: Path) -> None:
    (tmp_path / "fitted").mkdir()
    made, meter = fitted(bert(), tmp_path / "fitted", symmetric=False), Meter()
    predicted = predict_onnx(made)
    written = write_onnx(made, tmp_path, watch=meter)
    measured = meter.account()
    assert predicted.phase("onnx").peak_nbytes == pytest.approx(measured.phase("onnx").peak_nbytes, rel=0.03)
    assert written.nbytes == sum((tmp_path / name).stat().st_size for name in (GRAPH, DATA))
    assert {f"MatMulNBits {bits} bits" for bits in (8, 4, 2)} <= set(written.operators)
    assert _compared(made, tmp_path) < 1e-4
    graph = onnx.load(tmp_path / GRAPH, load_external_data=False).graph
    assert [item.name for item in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [item.name for item in graph.output] == ["last_hidden_state"]
    assert not any(node.doc_string or node.metadata_props for node in graph.node)
    # Padding is not seen, whatever stands there.
    model, mask = OnnxModel(tmp_path / GRAPH), np.array([[1, 1, 1, 0, 0]])
    one, other = (model.run(np.array([[5, 6, 7, 0, end]]), mask_BPT=mask)[0][:, :3] for end in (0, 9))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_integers_scales_and_zero_points_are_the_fitted_ones(tmp_path: Path, symmetric: bool) -> None:
    made, seen = fitted(llama(), tmp_path, symmetric=symmetric), set()
    for part in onnx_parts(made).values():
        content = torch.cat([block.contiguous().view(-1).view(torch.uint8) for block in read_part(made, part)])
        assert content.numel() == part.nbytes
        if part.scheme is None:
            continue
        scheme, name, rows = part.scheme, part.owner, part.shape[0]
        bits, inputs = scheme.bits, made.parameters[f"{part.owner}.weight"][0][-1]
        blocks, groups = inputs // block_of(scheme, inputs), scheme.groups(inputs)
        seen.add((part.kind, bits))
        if part.kind == "scales":
            told = made.read_packed(f"{name}.weight_scale").float().repeat_interleave(blocks // groups, dim=1)
            assert torch.equal(content.view(torch.float32).view(rows, blocks), told)
            continue
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        u = ((content.view(rows, -1, 1) >> shifts) & ((1 << bits) - 1)).view(rows, -1).int() - (1 << (bits - 1))
        if part.kind == "values":
            q = unpack_values(made.read_packed(f"{name}.weight_packed"), bits, inputs)
            assert torch.equal(u, q.int())
        else:
            zeros = unpack_zeros(made.read_packed(f"{name}.weight_zero_point"), bits, rows).int()
            assert torch.equal(u[:, :blocks], zeros.repeat_interleave(blocks // groups, dim=1))
    kinds = ("values", "scales") if symmetric else ("values", "scales", "zeros")
    assert seen == {(kind, bits) for kind in kinds for bits in (8, 4, 2)}


def test_a_tied_head_shares_the_bytes_of_its_table(source: Source) -> None:
    parts = onnx_parts(source)
    for part in ("qweight", "scales"):
        assert parts[f"lm_head.{part}"].key == parts[f"model.embed_tokens.{part}"].key


@pytest.mark.parametrize(
    ("group", "inputs", "block"), [(None, 640, 128), (None, 96, 32), (128, 640, 128), (96, 192, 32)]
)
def test_blocks_are_the_largest_that_runs_of_equal_scales_are_cut_into(group: Any, inputs: int, block: int) -> None:
    assert block_of(Scheme(bits=4, group=group), inputs) == block


def test_a_width_that_the_runtime_lacks_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"lm_head: int3 g64 cannot be in an ONNX file: .* of 8, 4, 2 bits"):
        require_onnx_scheme(Scheme(bits=3, group=64), "lm_head")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4), "encoder-decoder"),
        (hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4), "layer 0 keeps a"),
    ],
)
def test_a_kind_that_has_no_form_is_refused_by_name(config: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        require_kind(source_from_config(config).build())


def test_fused_experts_are_refused_by_name() -> None:
    config = hf.MixtralConfig(num_hidden_layers=1, num_local_experts=2, **DECODER)
    with pytest.raises(UsageError, match=r"mlp\.experts: fused experts cannot be in an ONNX file"):
        onnx_parts(source_from_config(config))


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UsageError, match=r"needs onnxscript, .* pip install 'memfit\[onnx\]'"):
        require_onnx()


KINDS: dict[str, Any] = {
    "llama": lambda: llama(2),
    "mistral": lambda: hf.MistralConfig(num_hidden_layers=2, sliding_window=8, **DECODER),
    "qwen2": lambda: hf.Qwen2Config(num_hidden_layers=2, **DECODER),
    "qwen3": lambda: hf.Qwen3Config(num_hidden_layers=2, **DECODER),
    "gemma3": lambda: hf.Gemma3TextConfig(
        num_hidden_layers=2, sliding_window=8, layer_types=["sliding_attention", "full_attention"], **DECODER
    ),
    "gpt2": lambda: hf.GPT2Config(vocab_size=640, n_embd=128, n_layer=2, n_head=4, n_positions=64, **ENDS),
    "opt": lambda: hf.OPTConfig(
        vocab_size=640, hidden_size=128, num_hidden_layers=2, ffn_dim=256, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=128,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(num_hidden_layers=2, **SIZE),
    "classifier": lambda: bert(2, architectures=["BertForSequenceClassification"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_what_memfit_gives_at_once_and_step_by_step(kind: str, tmp_path: Path) -> None:
    (tmp_path / "fitted").mkdir()
    assert difference(fitted(KINDS[kind](), tmp_path / "fitted"), tmp_path) < 1e-4
