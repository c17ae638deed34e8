"""Every way in which a checkpoint can be broken or lie is refused, and named."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from memfit.errors import BrokenInput, UsageError
from memfit.source import check, load, open_source
from memfit.source.safetensors import HEADER_NBYTES_MAX, open_checkpoint, read_header


def write(file: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file by hand; `length`: what it says of its header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


GOOD = {"a": entry([2, 2], 0, 16), "b": entry([3], 16, 28)}
BROKEN_HEADERS: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header longer than the file": (GOOD, bytes(28), 10**6, "header of 1000000 bytes"),
    "header over the limit": (GOOD, bytes(28), HEADER_NBYTES_MAX + 1, "header of 100000001 bytes"),
    "header of all bits": (GOOD, bytes(28), 2**64 - 1, "header of 18446744073709551615"),
    "cut short": (GOOD, bytes(20), None, "ends 8 bytes before"),
    "too long": (GOOD, bytes(30), None, "2 bytes too many"),
    "doubled key": (b'{"a":1,"a":2}', b"", None, "'a' stands there twice"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), None, "'b' overlaps"),
    "hole": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20), None, "'b' leaves a hole of 4"),
    "starts late": ({"a": entry([2], 4, 12)}, bytes(12), None, "'a' leaves a hole"),
    "out of the file": ({"a": entry([2**40], 0, 2**42)}, bytes(8), None, "before its last tensor"),
    "size that lies": ({"a": entry([4], 0, 8)}, bytes(8), None, "'a': shape .4. of F32 needs 16 bytes"),
    "shape that overflows": ({"a": entry([2**62, 4], 0, 0)}, b"", None, "'a' has no valid shape"),
    "unknown dtype": ({"a": entry([2], 0, 8, dtype="F33")}, bytes(8), None, "'a' has the dtype 'F33'"),
    "dtype no text": ({"a": entry([2], 0, 8) | {"dtype": []}}, bytes(8), None, "'a' has the dtype"),
    "no elements": ({"a": entry([0, 4], 0, 0), "b": entry([1], 0, 4)}, bytes(4), None, "'a' .* no elements"),
    "negative shape": ({"a": entry([-2], 0, 8)}, bytes(8), None, "'a' has no valid shape"),
    "fraction in a shape": ({"a": entry([2.0], 0, 8)}, bytes(8), None, "'a' has no valid shape"),
    "truth in a shape": ({"a": entry([True], 0, 4)}, bytes(4), None, "'a' has no valid shape"),
    "offsets backwards": ({"a": entry([2], 8, 0)}, bytes(8), None, "'a'"),
    "three offsets": ({"a": entry([2], 0, 8) | {"data_offsets": [0, 8, 9]}}, bytes(8), None, "data_offsets"),
    "a key too many": ({"a": entry([2], 0, 8, more=1)}, bytes(8), None, "'a' is not described"),
    "no tensor": ({"__metadata__": {}}, b"", None, "declares no tensor"),
    "no object": (b"[1, 2]", b"", None, "object was due"),
    "no JSON": (b"\xff\xfe{}", b"", None, "no valid JSON"),
    "deep nesting": (b'{"a":' * 50_000, b"", None, "no valid JSON"),
    "number without end": (b'{"a":' + b"9" * 5000 + b"}", b"", None, "no valid JSON"),
}


@pytest.mark.parametrize("what", BROKEN_HEADERS)
def test_a_broken_header_is_refused(what: str, tmp_path: Path) -> None:
    header, data, length, reason = BROKEN_HEADERS[what]
    file = write(tmp_path / "model.safetensors", header, data, length=length)
    with pytest.raises(BrokenInput, match=reason) as caught:
        open_checkpoint(tmp_path)
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("size", [0, 3, 8])
def test_an_empty_file_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(BrokenInput, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_good_header_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, **GOOD}, bytes(28))
    infos = {info.name: info for info in read_header(file)}
    assert infos["a"].shape == (2, 2) and infos["b"].nbytes == 12
    assert infos["b"].offset == file.stat().st_size - 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensor = torch.randn(300, 700).to(dtype)
    tensor[299, 5] = value
    save_file({"fine": torch.ones(3), "spoilt": tensor}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint is not None
    checkpoint.read("fine")
    with pytest.raises(BrokenInput, match=r"model\.safetensors: tensor 'spoilt' holds NaN or infinity"):
        checkpoint.read("spoilt")
    with pytest.raises(BrokenInput, match="spoilt"):
        checkpoint.read_into("spoilt", torch.empty(300, 700, dtype=torch.float32))


def test_extreme_but_finite_numbers_are_read(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn):
        limits = torch.finfo(dtype)
        tensor = torch.tensor([limits.max, limits.min, limits.tiny, 0.0, -0.0]).to(dtype)
        save_file({"a": tensor}, tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint is not None
        assert torch.equal(checkpoint.read("a").view(torch.uint8), tensor.view(torch.uint8))


def test_a_file_cut_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint is not None
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(BrokenInput, match="ends within tensor 'a'"):
        checkpoint.read("a")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "consolidated.00.pth"])
def test_a_pickle_alone_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(BrokenInput, match=f"{name}.*pickle"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path) is not None  # beside safetensors, it is left unread


def shard(directory: Path, places: Any, files: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, tensors in files.items():
        save_file(tensors, directory / name)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_read(tmp_path: Path) -> None:
    files = {"1.safetensors": {"a": torch.ones(2)}, "2.safetensors": {"b": torch.zeros(3)}}
    shard(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, files)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.read("b").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("../outside.safetensors", "may not lead out"),
        ("/etc/passwd", "may not lead out"),
        ("sub/1.safetensors", "may not lead out"),
        ("..\\1.safetensors", "may not lead out"),
        ("pytorch_model.bin", "no name of a safetensors file"),
        (7, "no name of a safetensors file"),
        ("2.safetensors", r"2\.safetensors: is missing"),
        ("1.safetensors", "has no tensor 'b'"),
    ],
)
def test_an_index_that_misleads_is_refused(place: Any, reason: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"b": torch.ones(1)}, tmp_path / "outside.safetensors")
    shard(inside, {"a": "1.safetensors", "b": place}, {"1.safetensors": {"a": torch.ones(2)}})
    with pytest.raises(BrokenInput, match=reason) as caught:
        open_checkpoint(inside)
    assert "'b'" in str(caught.value)


def test_a_shard_with_more_than_the_index_says_is_refused(tmp_path: Path) -> None:
    shard(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": {"a": torch.ones(2), "b": torch.ones(2)}})
    with pytest.raises(BrokenInput, match="'b' is not placed there"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("places", [None, {}, [], "text"])
def test_an_index_without_places_is_refused(places: Any, tmp_path: Path) -> None:
    shard(tmp_path, places, {})
    with pytest.raises(BrokenInput, match="weight_map"):
        open_checkpoint(tmp_path)


def test_a_link_out_of_the_directory_is_refused_but_in_the_hub_s_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(1)}, blobs / "hash")
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")
    assert open_checkpoint(snapshot) is not None
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.safetensors").symlink_to(blobs / "hash")
    with pytest.raises(BrokenInput, match="outside of the model's directory"):
        open_checkpoint(plain)


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(BrokenInput, match="no regular file"):
        open_checkpoint(tmp_path)


SAMPLE = json.dumps({"w": entry([2, 3], 0, 24), "v": entry([4], 24, 32, dtype="BF16")}).encode()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_refused_or_read_right(data: st.DataObject, tmp_path: Path) -> None:
    whole = bytearray(struct.pack("<Q", len(SAMPLE)) + SAMPLE + bytes(32))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    whole = whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))]
    file = tmp_path / "model.safetensors"
    file.write_bytes(whole)
    try:
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint is not None
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.read(name)
            assert tuple(tensor.shape) == info.shape
            assert tensor.numel() * tensor.dtype.itemsize == info.nbytes <= len(whole)
    except BrokenInput as error:
        assert str(file) in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_noise_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(BrokenInput):
        open_checkpoint(tmp_path)


# -- whole models ----------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    return tmp_path


def change(directory: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    how(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def configure(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


Q = "model.layers.0.self_attn.q_proj.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(Q), rf"'{Q}' of the model is missing"),
    "unexpected": (lambda t: t.update(extra=torch.ones(2)), r"'extra' \(2,\) is unexpected"),
    "mis-shaped": (lambda t: t.update({Q: torch.ones(32, 16)}), rf"'{Q}' has the shape \(32, 16\)"),
    "transposed": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].t().contiguous()}),
        r"'lm_head.weight' has the shape \(32, 96\)",
    ),
    "integers": (
        lambda t: t.update({Q: torch.ones(32, 32, dtype=torch.int8)}),
        rf"'{Q}' has the dtype torch.int8",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_weights_that_do_not_fit_the_config_are_refused_unread(what: str, saved: Path) -> None:
    how, reason = CHANGES[what]
    change(saved, how)
    for refused in (check, load):
        with pytest.raises(BrokenInput, match=reason) as caught:
            refused(open_source(saved))
        assert "model.safetensors" in str(caught.value)


def test_tensors_that_older_versions_stored_are_ignored(saved: Path) -> None:
    change(saved, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    source = open_source(saved)
    check(source)
    assert source.layout.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_a_second_copy_of_a_tied_weight_must_be_the_same(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)).save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change(tmp_path, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    model = load(open_source(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change(tmp_path, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(BrokenInput, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        load(open_source(tmp_path))


def test_the_class_is_the_one_that_the_config_names(tmp_path: Path) -> None:
    config = BertConfig(**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    BertModel(config).save_pretrained(tmp_path)
    assert isinstance(load(open_source(tmp_path)), BertModel)
    configure(tmp_path, architectures=["AutoModel", "NoSuchClass", "LlamaForCausalLM", 7])
    with pytest.raises(BrokenInput, match=r"pooler.*unexpected"):
        check(open_source(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_the_checkpoint_s_own_is_refused(file: str, saved: Path) -> None:
    if not (saved / file).exists():
        (saved / file).write_text("{}")
    raw = json.loads((saved / file).read_text())
    (saved / file).write_text(json.dumps(raw | {"auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(BrokenInput, match=f"{file}.*auto_map"):
        open_source(saved)


GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head"],
}
QUANTIZATIONS: dict[str, tuple[Any, str]] = {
    "unknown method": ({"quant_method": "magic"}, "'magic'"),
    "no method": ({}, "None"),
    "no object": ("int8", "no object"),
    "hqq": ({"quant_method": "hqq", "bits": 4}, "'hqq'"),
    "other format": (COMPRESSED | {"format": "float-quantized"}, "'float-quantized'"),
    "no groups": (COMPRESSED | {"config_groups": {}}, "no config_groups"),
    "activations": (
        COMPRESSED | {"config_groups": {"g": GROUP | {"input_activations": {}}}},
        "input_activations",
    ),
    "floats": (
        COMPRESSED | {"config_groups": {"g": GROUP | {"weights": {"num_bits": 8, "type": "float"}}}},
        "'float'",
    ),
    "no bits": (COMPRESSED | {"config_groups": {"g": GROUP | {"weights": {"type": "int"}}}}, "None bits"),
    "nine bits": (
        COMPRESSED | {"config_groups": {"g": GROUP | {"weights": GROUP["weights"] | {"num_bits": 9}}}},  # type: ignore[operator]
        "bits must be 2 to 8",
    ),
    "tensor strategy": (
        COMPRESSED | {"config_groups": {"g": GROUP | {"weights": GROUP["weights"] | {"strategy": "tensor"}}}},  # type: ignore[operator]
        "'tensor'",
    ),
    "broken target": (
        COMPRESSED | {"config_groups": {"g": GROUP | {"targets": ["re:("]}}},
        "regular expression",
    ),
    "kv cache": (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
}


@pytest.mark.parametrize("what", QUANTIZATIONS)
def test_a_quantization_that_memfit_does_not_run_is_refused(what: str, saved: Path) -> None:
    value, reason = QUANTIZATIONS[what]
    configure(saved, quantization_config=value)
    with pytest.raises(BrokenInput, match=reason) as caught:
        open_source(saved)
    assert "config.json" in str(caught.value)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"model_type": "no_such_model"}, "'no_such_model'"),
    "no type": ({"model_type": None}, "None"),
    "type no text": ({"model_type": ["llama"]}, "llama"),
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "width as text": ({"hidden_size": "wide"}, "hidden_size"),
    "heads that do not divide": ({"num_attention_heads": 5}, "attention heads"),
    "no width": ({"hidden_size": -32}, "config"),
    "huge width": ({"hidden_size": 2**62, "head_dim": 2**40}, "config"),
    "senseless rope": ({"rope_parameters": {"rope_type": "no_such", "rope_theta": 1.0}}, "config"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_without_sense_is_refused(what: str, saved: Path) -> None:
    values, reason = CONFIGS[what]
    configure(saved, **values)
    with pytest.raises(BrokenInput, match=reason):
        load(open_source(saved))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "llama", "model_type": "gpt2"}', "\x00"])
def test_a_broken_config_is_refused(text: str, saved: Path) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(BrokenInput, match=r"config\.json"):
        open_source(saved)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenInput, match=r"config\.json: is missing"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["./no/such/place", "/no/such/place", "a/b/c", "~/nothing-of-this-name"])
def test_a_path_to_nothing_is_said_to_be_nothing(name: str) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        open_source(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"no \.gguf"):
        open_source(tmp_path / "model.bin")


def test_there_is_no_tokenizer_where_there_is_none(saved: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer"):
        open_source(saved).tokenizer()
