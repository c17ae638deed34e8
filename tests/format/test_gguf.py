"""A GGUF file that memfit writes holds the model: memfit's own reader and gguf's find it there."""

import fcntl
import itertools
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.errors import BrokenInput, UsageError
from memfit.format import gguf as gguf_out
from memfit.format.gguf import gguf_tensors, write_gguf
from memfit.format.gguf_mixture import Stack, type_of
from memfit.source import Source, load, open_source

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 6}
CONFIGS: dict[str, t.PretrainedConfig] = {
    "llama": t.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False),
    "llama, tied, stretched": t.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "mistral": t.MistralConfig(**SIZES, head_dim=32),
    "qwen2": t.Qwen2Config(**SIZES),
    "qwen3": t.Qwen3Config(**SIZES, head_dim=32),
    "gemma3": t.Gemma3TextConfig(**(SIZES | GEMMA)),
}
CAUSAL = {
    "llama": t.LlamaForCausalLM, "mistral": t.MistralForCausalLM, "qwen2": t.Qwen2ForCausalLM,
    "qwen3": t.Qwen3ForCausalLM, "gemma3_text": t.Gemma3ForCausalLM,
}  # fmt: skip
TEXT = "the other thing, then 1234 of it\n  and more: café 🦙 'twas"
IDS = torch.tensor([[1, 5, 9, 200, 31, 7, 7, 64]])
SPECIAL = ["<pad>", "<s>", "</s>"]


def byte_pairs(pattern: str | None = None) -> tokenizers.Tokenizer:
    """Pairs of bytes, as GPT-2 has them; `pattern`: as Qwen 2 cuts text before."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("o", "r")]
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *letters, *("".join(pair) for pair in merges)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = whole
    if pattern is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return finished(tokenizer)


def sentence_pieces() -> tokenizers.Tokenizer:
    """Pieces with a mark for the space, as Llama 2 has them; what is unknown is spelled in bytes."""
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("o", "t"), ("ot", "he"), ("the", "r"), ("t", "he")]
    words = ["<unk>", *SPECIAL[1:], *(f"<0x{n:02X}>" for n in range(256)), "▁", *"thenir,omd1234af"]
    words += [word for word in ("".join(pair) for pair in merges) if word not in words]
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys(words))}
    merges = [pair for pair in merges if pair[0] in vocabulary and pair[1] in vocabulary]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    return finished(tokenizer)


def finished(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def save(directory: Path, config: t.PretrainedConfig, tokenizer: tokenizers.Tokenizer | None = None) -> Source:
    """A model with weights by chance, as transformers saves it, and a tokenizer."""
    torch.manual_seed(0)
    model = CAUSAL[config.model_type](config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05 + (0.5 if name.endswith("norm.weight") else 0.0))
    model.save_pretrained(directory)
    (tokenizer or byte_pairs()).save(str(directory / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return open_source(directory)


def logits(source: Source) -> torch.Tensor:
    with torch.no_grad():
        return load(source, dtype=torch.float32)(IDS).logits


def read(file: Path) -> dict[str, np.ndarray]:
    """Every tensor as numbers, by gguf's own reader."""
    return {
        one.name: gguf.quants.dequantize(one.data, one.tensor_type).reshape([int(n) for n in reversed(one.shape)])
        for one in gguf.GGUFReader(file).tensors
    }


def value(file: Path, key: str) -> Any:
    return gguf.GGUFReader(file).fields[key].contents()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_model_read_back_is_the_model(family: str, tmp_path: Path) -> None:
    source = save(tmp_path / "model", CONFIGS[family])
    file = tmp_path / "model.gguf"
    write_gguf(source, file, mixture="F32")
    assert torch.allclose(logits(open_source(file)), logits(source), atol=1e-5)
    write_gguf(source, file, mixture="Q8_0", overwrite=True)
    original = logits(source)
    apart = (logits(open_source(file)) - original).norm() / original.norm()
    assert apart < (0.05 if family == "gemma3" else 0.02)  # by chance, and six layers there
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_is_what_was_announced(family: str, tmp_path: Path) -> None:
    source = save(tmp_path / "model", CONFIGS[family])
    file = tmp_path / "model.gguf"
    written = write_gguf(source, file, mixture="Q8_0")
    assert written == gguf_tensors(source, mixture="Q8_0")
    found = {one.name: one for one in gguf.GGUFReader(file).tensors}
    assert list(found) == [one.name for one in written]
    stored = [(one.tensor_type.name, one.n_bytes) for one in found.values()]
    assert stored == [(one.kind, one.nbytes) for one in written]
    assert all(one.kind == ("F32" if len(one.place.shape) < 2 else "Q8_0") for one in written)
    # Padded to 32 bytes each, nothing after them.
    data = min(int(one.data_offset) for one in found.values())
    assert file.stat().st_size == data + sum(-(-one.nbytes // 32) * 32 for one in written)


def test_rows_in_pieces_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "model", CONFIGS["llama"])
    write_gguf(source, tmp_path / "whole.gguf", mixture="BF16")
    monkeypatch.setattr(gguf_out, "ROWS_NUMBERS", 5 * 64)
    write_gguf(source, tmp_path / "pieces.gguf", mixture="BF16")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_a_dry_run_makes_the_same_tensors_and_no_file(tmp_path: Path) -> None:
    source = save(tmp_path / "model", CONFIGS["llama, tied, stretched"])
    written = write_gguf(source, tmp_path / "model.gguf", mixture="Q4_0")
    with FakeTensorMode():
        assert write_gguf(source, tmp_path / "none.gguf", mixture="Q4_0", dry=True) == written
    assert not (tmp_path / "none.gguf").exists()


def test_types_may_be_given_one_by_one(tmp_path: Path) -> None:
    source = save(tmp_path / "model", CONFIGS["qwen3"])
    types = {"blk.1.ffn_up.weight": "Q5_1", "token_embd.weight": "F16", "blk.0.attn_q.weight": "Q4_1"}
    written = write_gguf(source, tmp_path / "m.gguf", mixture="Q8_0", types=types)
    assert {one.name: one.kind for one in written if one.name in types} == types
    for name, kind, reason in (
        ("blk.9.ffn_up.weight", "Q8_0", "no such tensor"), ("blk.1.ffn_up.weight", "Q9", "no type"),
        ("blk.1.ffn_up.weight", "Q4_K", "Take Q5_0"), ("output_norm.weight", "F16", "vectors"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=reason):
            gguf_tensors(source, types={name: kind})
    with pytest.raises(UsageError, match="'Q4_K_X' is no mixture"):
        gguf_tensors(source, mixture="Q4_K_X")


def test_what_is_important_errs_less(tmp_path: Path) -> None:
    source = save(tmp_path / "model", CONFIGS["llama, tied, stretched"])
    heavy = torch.full((64,), 0.01)
    heavy[::8] = 1.0
    importance = {"model.layers.0.mlp.up_proj": heavy, "lm_head": heavy, "model.embed_tokens": torch.ones(320)}
    write_gguf(source, tmp_path / "even.gguf", mixture="Q4_0")
    write_gguf(source, tmp_path / "weighed.gguf", mixture="Q4_0", importance=importance)
    even, weighed = read(tmp_path / "even.gguf"), read(tmp_path / "weighed.gguf")
    for name, parameter in (
        ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ):
        original = source.read_parameter(parameter, dtype=torch.float32).numpy()
        errors = [(((found[name] - original) ** 2) * heavy.numpy()).sum() for found in (even, weighed)]
        # The embedding, as the head, has Q8_0: what is unimportant changes little there.
        assert errors[1] < errors[0] * (0.9 if name.startswith("blk") else 1.0)
    assert np.array_equal(even["blk.1.ffn_up.weight"], weighed["blk.1.ffn_up.weight"])


def test_layers_may_be_encoded_for_a_text(tmp_path: Path) -> None:
    source = save(tmp_path / "model", CONFIGS["llama"])
    ids = torch.randint(0, 320, (6, 32), generator=torch.Generator().manual_seed(0))
    files = {name: tmp_path / f"{name}.gguf" for name in ("alone", "text")}
    write_gguf(source, files["alone"], mixture="Q4_0")
    written = write_gguf(source, files["text"], mixture="Q4_0", windows_WT=ids)
    assert written == gguf_tensors(source, mixture="Q4_0")
    assert files["alone"].stat().st_size == files["text"].stat().st_size
    with torch.no_grad():
        was = load(source, dtype=torch.float32)(ids).logits
        found = {name: load(open_source(file), dtype=torch.float32)(ids).logits for name, file in files.items()}
    apart = {name: float((one - was).norm()) for name, one in found.items()}
    assert apart["text"] < 0.8 * apart["alone"]
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        full = f"model.layers.1.{name}.weight"  # each where it belongs, heads' rows in their order
        one, other = (open_source(place).read_parameter(full, dtype=torch.float32) for place in files.values())
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.98
    plain = read(files["alone"])
    assert all(np.array_equal(plain[n], w) for n, w in read(files["text"]).items() if not n.startswith("blk"))


def test_a_text_that_tells_a_layer_nothing_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "model", CONFIGS["qwen3"])
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.embed_tokens.weight": torch.zeros_like(tensors["model.embed_tokens.weight"])}, file)
    source = open_source(tmp_path / "model")
    with pytest.raises(UsageError, match=r"layers.0.self_attn.q_proj: the Hessian is 0"):
        write_gguf(source, tmp_path / "model.gguf", mixture="Q8_0", windows_WT=IDS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Tensors of Llama 2 7B, 32 layers, by llama.cpp's rules.
LLAMA_2_7B = {
    "Q8_0": {"F32": 65, "Q8_0": 226},
    "Q6_K": {"F32": 65, "Q6_K": 226},
    "Q5_K_M": {"F32": 65, "Q5_K": 193, "Q6_K": 33},
    "Q4_K_M": {"F32": 65, "Q4_K": 193, "Q6_K": 33},
    "Q3_K_M": {"F32": 65, "Q3_K": 129, "Q4_K": 92, "Q5_K": 4, "Q6_K": 1},
    "Q2_K": {"F32": 65, "Q2_K": 129, "Q3_K": 96, "Q6_K": 1},
    "Q4_0": {"F32": 65, "Q4_0": 225, "Q6_K": 1},
}


@pytest.mark.parametrize("mixture", LLAMA_2_7B)
def test_mixtures_are_llama_cpp_s(mixture: str) -> None:
    names = ["token_embd", "output", "output_norm"]
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm")
    names += [f"blk.{layer}.{part}" for layer in range(32) for part in parts]
    stack = Stack(layers=32, heads_a_key=1, tied=False, important=False)
    counts: dict[str, int] = {}
    for name in names:
        kind = type_of(f"{name}.weight", (4096,) if name.endswith("norm") else (4096, 4096), mixture, stack)
        counts[kind] = counts.get(kind, 0) + 1
    assert counts == LLAMA_2_7B[mixture]


def test_rows_that_are_no_whole_blocks_get_smaller_ones() -> None:
    stack = Stack(layers=8, heads_a_key=4, tied=True, important=True)
    kinds = {
        mixture: [type_of(name, (10, 640), mixture, stack) for name in ("token_embd.weight", "blk.3.ffn_up.weight")]
        for mixture in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
    }
    assert kinds == {
        "Q8_0": ["Q8_0", "Q8_0"], "Q6_K": ["Q8_0", "Q8_0"], "Q5_K_M": ["Q8_0", "Q5_1"], "Q4_K_M": ["Q8_0", "Q5_0"],
        "Q3_K_M": ["Q8_0", "Q4_0"], "Q2_K": ["Q8_0", "Q4_0"],
    }  # fmt: skip
    assert type_of("blk.0.ffn_up.weight", (10, 100), "Q4_K_M", stack) == "F16"
    assert type_of("blk.0.ffn_down.weight", (10, 256), "Q4_0", stack) == "Q4_1"
    assert type_of("blk.0.attn_v.weight", (10, 256), "Q2_K", stack) == "Q4_K"


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("tokenizer", "kind", "pre"),
    [(byte_pairs(), "gpt2", "gpt-2"), (byte_pairs(QWEN2), "gpt2", "qwen2"), (sentence_pieces(), "llama", "default")],
    ids=["bytes", "bytes, cut as by Qwen 2", "pieces"],
)
def test_the_tokenizer_goes_along(tokenizer: Any, kind: str, pre: str, tmp_path: Path) -> None:
    source = save(tmp_path / "model", CONFIGS["qwen2"], tokenizer)
    file = tmp_path / "model.gguf"
    write_gguf(source, file, mixture="Q8_0")
    assert (value(file, "tokenizer.ggml.model"), value(file, "tokenizer.ggml.pre")) == (kind, pre)
    tokens = value(file, "tokenizer.ggml.tokens")
    vocabulary = tokenizer.get_vocab()
    assert all(tokens[number] == token for token, number in vocabulary.items())
    assert tokens[len(vocabulary) :] == [f"[PAD{n}]" for n in range(len(vocabulary), 320)]
    assert value(file, "tokenizer.ggml.bos_token_id") == 1 and value(file, "tokenizer.ggml.add_bos_token") is True
    if kind == "gpt2":
        again = open_source(file).tokenizer()
        assert again.encode(TEXT, add_special_tokens=False) == tokenizer.encode(TEXT, add_special_tokens=False).ids


def test_scores_put_pieces_together_in_the_order_of_the_merges(tmp_path: Path) -> None:
    tokenizer = sentence_pieces()
    file = tmp_path / "model.gguf"
    write_gguf(save(tmp_path / "model", CONFIGS["mistral"], tokenizer), file, mixture="Q8_0")
    tokens, scores = value(file, "tokenizer.ggml.tokens"), value(file, "tokenizer.ggml.scores")
    score = dict(zip(tokens, scores, strict=True))
    for text in ("the other thing", "then there, of the", "hethe tthe"):
        pieces = list("▁" + text.replace(" ", "▁"))
        while True:  # llama.cpp's way: the neighbours that make the token of the highest score, from the left
            made = ["".join(pair) for pair in itertools.pairwise(pieces)]
            pairs = [(score[one], -n) for n, one in enumerate(made) if one in score]
            if not pairs:
                break
            at = -max(pairs)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        expected = tokenizer.encode(text, add_special_tokens=False).tokens
        assert [piece for piece in pieces if piece in score] == [one for one in expected if not one.startswith("<0x")]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "model", CONFIGS["qwen3"])
    file = tmp_path / "model.gguf"

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_out, "encode", fail)
        with pytest.raises(KeyboardInterrupt):
            write_gguf(source, file, mixture="Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / ".model.gguf.memfit-partial").write_bytes(b"left by a run that was killed")
    write_gguf(source, file, mixture="Q8_0")
    before = file.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        write_gguf(source, file, mixture="F16")
    write_gguf(source, file, mixture="Q8_0", overwrite=True)
    assert file.read_bytes() == before
    with (tmp_path / ".model.gguf.memfit-partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another run"):
            write_gguf(source, file, mixture="Q8_0", overwrite=True)
    (tmp_path / ".model.gguf.memfit-partial").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_what_llama_cpp_would_run_otherwise_is_refused(tmp_path: Path) -> None:
    gemma = t.Gemma3TextConfig(**(SIZES | GEMMA | {"num_hidden_layers": 2}), layer_types=["full_attention"] * 2)
    stretched = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    for number, (config, reason) in enumerate(
        (
            (gemma, "every sixth layer"),
            (t.Gemma3TextConfig(**(SIZES | GEMMA | {"query_pre_attn_scalar": 64})), "query_pre_attn_scalar"),
            (t.LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act"),
            (t.Qwen3Config(**SIZES, attention_bias=True), "attention_bias"),
            (t.LlamaConfig(**SIZES, rope_parameters=stretched), "dynamic"),
        )
    ):
        source = save(tmp_path / str(number), config)
        with pytest.raises(UsageError, match=reason):
            write_gguf(source, tmp_path / "model.gguf", mixture="F32")
    source = save(tmp_path / "model", CONFIGS["qwen3"])
    write_gguf(source, tmp_path / "model.gguf", mixture="F32")
    with pytest.raises(UsageError, match="original weights"):
        write_gguf(open_source(tmp_path / "model.gguf"), tmp_path / "again.gguf")


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path: Path) -> None:
    for number, tokenizer in enumerate((byte_pairs("[a-z]+"), tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")))):
        source = save(tmp_path / str(number), CONFIGS["qwen3"], tokenizer)
        with pytest.raises(UsageError, match=r"llama\.cpp"):
            write_gguf(source, tmp_path / "model.gguf")
    source = save(tmp_path / "large", CONFIGS["qwen3"])
    file = tmp_path / "large" / "tokenizer.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"model": raw["model"] | {"vocab": raw["model"]["vocab"] | {"zz": 900}}}))
    with pytest.raises(BrokenInput, match="has the id 900"):
        write_gguf(source, tmp_path / "model.gguf")
    file.write_text(json.dumps(raw | {"model": raw["model"] | {"vocab": 7}}))
    with pytest.raises(BrokenInput, match="no tokenizer as it should be"):
        write_gguf(source, tmp_path / "model.gguf")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "model", CONFIGS["qwen3"])
    info = source.tensors["model.layers.0.mlp.up_proj.weight"]
    with info.file.open("r+b") as data:
        data.seek(info.offset)
        data.write(struct.pack("<H", 0x7F80))
    with pytest.raises(BrokenInput, match="NaN or infinity"):
        write_gguf(source, tmp_path / "model.gguf", mixture="Q8_0")
    assert not (tmp_path / "model.gguf").exists()
