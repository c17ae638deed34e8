"""A GGUF is read as what it holds, and not believed where it lies."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memfit.errors import BrokenInput
from memfit.source import check, load, open_source
from memfit.source.gguf_header import read_header

WIDTH, INNER, HEADS, KV_HEADS, LAYERS, VOCABULARY, HEAD = 64, 96, 4, 2, 2, 80, 16


def write_model(
    file: Path, architecture: str, *, kind: str = "Q8_0", tied: bool = False, **keys: Any
) -> dict[str, np.ndarray]:
    """A tiny model of `architecture` by gguf's own writer; the numbers that its blocks stand for."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list([f"<{n}>" for n in range(VOCABULARY)])
    if architecture == "gemma3":
        writer.add_sliding_window(16)
    for key, value in keys.items():
        writer.add_uint32(key.replace("__", "."), value)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    if not tied:
        shapes["output"] = (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        shapes |= {
            f"{block}.attn_norm": (WIDTH,),
            f"{block}.attn_q": (HEADS * HEAD, WIDTH),
            f"{block}.attn_k": (KV_HEADS * HEAD, WIDTH),
            f"{block}.attn_v": (KV_HEADS * HEAD, WIDTH),
            f"{block}.attn_output": (WIDTH, HEADS * HEAD),
            f"{block}.ffn_norm": (WIDTH,),
            f"{block}.ffn_gate": (INNER, WIDTH),
            f"{block}.ffn_up": (INNER, WIDTH),
            f"{block}.ffn_down": (WIDTH, INNER),
        }
        if architecture in ("gemma3", "qwen3"):
            shapes |= {f"{block}.attn_q_norm": (HEAD,), f"{block}.attn_k_norm": (HEAD,)}
        if architecture == "gemma3":
            shapes |= {f"{block}.post_attention_norm": (WIDTH,), f"{block}.post_ffw_norm": (WIDTH,)}
    quantized = gguf.GGMLQuantizationType[kind]
    written: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        numbers = rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            packed = gguf.quants.quantize(numbers, quantized)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=quantized)
            written[name] = gguf.quants.dequantize(packed, quantized)
        else:
            writer.add_tensor(f"{name}.weight", numbers)
            written[name] = numbers
        if architecture == "qwen2" and name.rpartition(".")[2] in ("attn_q", "attn_k", "attn_v"):
            bias = rng.standard_normal(shape[0]).astype(np.float32)
            writer.add_tensor(f"{name}.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `permute` (convert_hf_to_gguf.py): from the model's order of rows to the file's."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "F32"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_weight_is_where_the_model_has_it(architecture: str, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    written = write_model(file, architecture, kind=kind)
    source = open_source(file)
    check(source)
    model = load(source, dtype=torch.float32)
    block = model.model.layers[1]
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(written["token_embd"]))
    assert torch.equal(model.lm_head.weight, torch.from_numpy(written["output"]))
    assert torch.equal(block.mlp.down_proj.weight, torch.from_numpy(written["blk.1.ffn_down"]))
    shift = 1.0 if architecture == "gemma3" else 0.0
    assert torch.equal(block.input_layernorm.weight, torch.from_numpy(written["blk.1.attn_norm"]) - shift)
    for part, heads in (("q", HEADS), ("k", KV_HEADS)):
        ours = getattr(block.self_attn, f"{part}_proj").weight.numpy()
        stored = written[f"blk.1.attn_{part}"]
        assert np.array_equal(permuted(ours, heads) if architecture == "llama" else ours, stored)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_bf16_is_rounded_from_the_unpacked_number(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    written = write_model(file, "qwen3")
    source = open_source(file)
    assert source.dtype == torch.bfloat16
    weight = source.read_parameter("model.embed_tokens.weight")
    assert torch.equal(weight, torch.from_numpy(written["token_embd"]).bfloat16())


def test_a_file_without_output_is_tied(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", "gemma3", tied=True)
    model = load(open_source(tmp_path / "model.gguf"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16


def test_it_loads_fake(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", "llama")
    source = open_source(tmp_path / "model.gguf")
    with FakeTensorMode():
        model = load(source)
    assert all(isinstance(one, FakeTensor) for one in model.parameters())


def test_blocks_larger_than_one_step_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfit.source.gguf.BLOCK_NUMBERS", 3 * WIDTH)
    test_every_weight_is_where_the_model_has_it("llama", "Q8_0", tmp_path)


def test_an_infinite_scale_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, "llama")
    stored = next(one for one in read_header(file).tensors if one.name == "blk.0.ffn_up.weight")
    with file.open("r+b") as data:
        data.seek(stored.offset)
        data.write(struct.pack("<e", float("inf")))
    with pytest.raises(BrokenInput, match=r"'blk.0.ffn_up.weight' holds NaN or infinity"):
        load(open_source(file))


def head(tensors: int, keys: int, *, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: list[int], kind: int, offset: int, *, rank: int | None = None) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    rank = len(shape) if rank is None else rank
    return text(name) + struct.pack("<I", rank) + dims + struct.pack("<IQ", kind, offset)


HUGE = 2**60
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "no gguf": (head(0, 0, magic=b"GGML") + bytes(8), "does not begin with GGUF"),
    "version": (head(0, 0, version=9) + bytes(8), "version 9"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "keys without end": (head(0, HUGE) + bytes(64), "cannot hold"),
    "tensors without end": (head(HUGE, 0) + bytes(64), "cannot hold"),
    "all bits": (head(2**64 - 1, 2**64 - 1) + bytes(64), "cannot hold"),
    "long name": (head(0, 1) + struct.pack("<Q", HUGE) + bytes(16), "declares a string"),
    "long array": (head(0, 1) + key(b"a", 9, struct.pack("<IQ", 4, HUGE)), "declares 1152921504606846976"),
    "long strings": (head(0, 1) + key(b"a", 9, struct.pack("<IQ", 8, HUGE)), "strings"),
    "nested array": (head(0, 1) + key(b"a", 9, struct.pack("<IQ", 9, 1)) + bytes(16), "array of the type 9"),
    "unknown type": (head(0, 1) + key(b"a", 99, bytes(8)), "'a' has the type 99"),
    "doubled key": (head(0, 2) + key(b"a", 0, b"\0") * 2 + bytes(16), "'a' twice"),
    "no rank": (head(1, 0) + tensor(b"t", [], 0, 0) + bytes(64), "0 dimensions"),
    "rank without end": (head(1, 0) + tensor(b"t", [4], 0, 0, rank=2**31) + bytes(64), "dimensions"),
    "no elements": (head(1, 0) + tensor(b"t", [0], 0, 0) + bytes(64), "no elements"),
    "outside": (head(1, 0) + tensor(b"t", [4], 0, 2**40) + bytes(64), "'t' has 16 bytes"),
    "too large": (head(1, 0) + tensor(b"t", [2**40, 2**40], 0, 0) + bytes(64), "'t' has"),
    "unknown blocks": (head(1, 0) + tensor(b"t", [32], 77, 0) + bytes(64), "type 77"),
    "half a block": (head(1, 0) + tensor(b"t", [33], 8, 0) + bytes(64), "no multiple"),
    "doubled tensor": (head(2, 0) + tensor(b"t", [4], 0, 0) * 2 + bytes(99), "'t' twice"),
    "overlap": (head(2, 0) + tensor(b"s", [16], 0, 0) + tensor(b"t", [4], 0, 32) + bytes(99), "overlaps"),
    "alignment": (head(0, 1) + key(b"general.alignment", 4, struct.pack("<I", 0)), "alignment of 0"),
    "architecture": (head(0, 1) + key(b"general.architecture", 8, text(b"vapour")), "'vapour'"),
    "no architecture": (head(0, 0) + bytes(8), "None"),
    "no embedding": (head(0, 1) + key(b"general.architecture", 8, text(b"llama")), "token_embd"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_gguf_that_lies_is_refused_at_once(what: str, tmp_path: Path) -> None:
    raw, reason = BROKEN[what]
    file = tmp_path / "model.gguf"
    file.write_bytes(raw)
    with pytest.raises(BrokenInput, match=reason) as caught:
        open_source(file)
    assert str(file) in str(caught.value)


def test_keys_of_another_type_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, "llama", llama__vocab_size=80)
    raw = file.read_bytes()
    name = b"llama.block_count"
    at = raw.index(name) + len(name)
    for kind, value, reason in ((6, 2, "block_count"), (4, 2**31, "block_count"), (4, 3, "is missing")):
        file.write_bytes(raw[:at] + struct.pack("<II", kind, value) + raw[at + 8 :])
        with pytest.raises(BrokenInput, match=reason):
            load(open_source(file))


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, "llama")
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"))
    with pytest.raises(BrokenInput, match=r"'blk.1.ffn_xp.weight'"):
        check(open_source(file))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_in_the_header_is_refused_or_read_right(data: st.DataObject, tmp_path: Path) -> None:
    raw = bytearray(
        head(2, 3)
        + key(b"general.architecture", 8, text(b"llama"))
        + key(b"a", 9, struct.pack("<IQ", 8, 2) + text(b"x") + text(b"yz"))
        + key(b"b", 9, struct.pack("<IQ", 4, 3) + bytes(12))
        + tensor(b"s", [4, 2], 0, 0)
        + tensor(b"t", [32], 8, 32)
        + bytes(128)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "model.gguf"
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    try:
        header = read_header(file)
        assert all(one.offset + one.nbytes <= len(raw) for one in header.tensors)
    except BrokenInput as error:
        assert str(file) in str(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_model(file, "llama", kind="Q4_0")
    return file.read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_ends_in_a_model_or_in_a_refusal(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    """No hang, no error of another kind, and no more memory than the file could be asked for."""
    raw = bytearray(whole)
    header = raw.index(b"output.weight") + 64  # the tensor's data are blocks, whose every byte means something
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255) | st.sampled_from([0, 1, 127, 255]))
    file = tmp_path / "model.gguf"
    file.write_bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
    tracemalloc.start()
    try:
        source = open_source(file)
        check(source)
        for name in source.layout.pieces:
            source.read_parameter(name)
    except BrokenInput as error:
        assert str(file) in str(error) or "model.gguf" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 << 20


def test_more_blocks_than_tensors_are_refused_at_once(whole: bytes, tmp_path: Path) -> None:
    name = b"llama.block_count"
    at = whole.index(name) + len(name) + 4
    (tmp_path / "model.gguf").write_bytes(whole[:at] + struct.pack("<I", 4000) + whole[at + 4 :])
    with pytest.raises(BrokenInput, match="declares 4000 blocks and has 21 tensors"):
        open_source(tmp_path / "model.gguf")
