"""A BERT in GGUF: written for its embeddings, read back as the same model with the same tokenizer."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers as t
from tokenizers import models, normalizers, pre_tokenizers, processors

from memfit.errors import BrokenInput
from memfit.format.gguf import write_gguf
from memfit.source import Source, check, load, open_source
from memfit.source.gguf_tokenizer import gguf_tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##re", "thing", "a", "##b"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(words[:5])
    return tokenizer


def save_bert(directory: Path) -> Source:
    """A tiny one by chance, with its tokenizer."""
    torch.manual_seed(0)
    config = t.BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=12,
        max_position_embeddings=32,
    )  # fmt: skip
    t.BertModel(config).to(torch.bfloat16).save_pretrained(directory)
    word_pieces().save(str(directory / "tokenizer.json"))
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named | {"mask_token": "[MASK]"}))
    return open_source(directory)


def read(file: Path) -> dict[str, np.ndarray]:
    """Every tensor as numbers, by gguf's own reader."""
    return {
        one.name: gguf.quants.dequantize(one.data, one.tensor_type).reshape([int(n) for n in reversed(one.shape)])
        for one in gguf.GGUFReader(file).tensors
    }


def value(file: Path, key: str) -> Any:
    return gguf.GGUFReader(file).fields[key].contents()


def test_a_bert_is_written_for_its_embeddings(tmp_path: Path) -> None:
    source = save_bert(tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    file = tmp_path / "model.gguf"
    write_gguf(source, file, mixture="Q8_0")
    tensors = read(file)
    query = source.read_parameter("encoder.layer.1.attention.self.query.weight", dtype=torch.float32).numpy()
    assert np.allclose(tensors["blk.1.attn_q.weight"], query, atol=1e-3)
    positions = source.read_parameter("embeddings.position_embeddings.weight", dtype=torch.float32).numpy()
    assert np.array_equal(tensors["position_embd.weight"], positions)
    assert not any("pooler" in name for name in tensors)
    assert value(file, "tokenizer.ggml.tokens")[:8] == [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁the", "re", "▁thing",
    ]  # fmt: skip
    assert value(file, "bert.pooling_type") == gguf.PoolingType.MEAN and value(file, "bert.attention.causal") is False
    assert value(file, "tokenizer.ggml.normalizer.lowercase") is False


def test_a_bert_read_back_gives_the_same_embeddings(tmp_path: Path) -> None:
    source = save_bert(tmp_path / "model")
    file = tmp_path / "model.gguf"
    write_gguf(source, file, mixture="F32")
    again = open_source(file)
    check(again)
    ids = torch.tensor([[2, 5, 6, 7, 9, 3]])
    with torch.no_grad():
        hidden = [load(one, dtype=torch.float32)(ids)[0] for one in (again, source)]
    assert torch.equal(*hidden)
    text = "The there thing ab [MASK] bthere, à"
    assert again.tokenizer().encode(text) == word_pieces().encode(text).ids
    assert again.tokenizer().tokenize("there thing ab") == ["the", "##re", "thing", "a", "##b"]


def test_a_file_without_any_type_of_token_is_read_as_older_converters_wrote_it(tmp_path: Path) -> None:
    """Pieces in brackets as they are, no types, no ids of special tokens: the usual ones are meant."""
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(file), "bert")
    writer.add_tokenizer_model("bert")
    writer.add_token_list(["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "▁the", "re", "▁à"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    tokenizer = gguf_tokenizer(file)
    assert tokenizer.get_vocab() == {
        "[PAD]": 0, "[unused0]": 1, "[UNK]": 2, "[CLS]": 3, "[SEP]": 4, "the": 5, "##re": 6, "à": 7,
    }  # fmt: skip
    assert tokenizer.encode("THERE á") == [3, 5, 6, 2, 4]  # without case and accents, as llama.cpp has it


@pytest.mark.parametrize(
    ("tokens", "keys", "reason"),
    [
        (["[CLS]", "[SEP]", "[UNK]", "a", "▁a", "a"], {}, "has the token '##a' twice, at 3 and 5"),
        (["[CLS]", "[SEP]", "a"], {}, "names no unk_token"),
        (["[CLS]", "[SEP]", "[UNK]"], {"seperator": 3}, "calls token 3 its seperator; it has 3 tokens"),
        (None, {}, "'tokenizer.ggml.tokens' is no list of tokens"),
        (["[CLS]", "[SEP]", "[UNK]"], {"types": [1]}, "'tokenizer.ggml.token_type' is no list of 3 types"),
    ],
)
def test_a_vocabulary_of_word_pieces_that_is_none_is_refused(
    tokens: list[str] | None, keys: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(file), "bert")
    writer.add_tokenizer_model("bert")
    if tokens is not None:
        writer.add_token_list(tokens)
    if "types" in keys:
        writer.add_token_types(keys["types"])
    if "seperator" in keys:
        writer.add_sep_token_id(keys["seperator"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(BrokenInput, match=reason):
        gguf_tokenizer(file)
