"""The tokenizer that a GGUF file's keys describe."""

from pathlib import Path
from typing import Any, Final

import gguf

from memfit.source.gguf_header import Header, read_header, refuse

_MODEL: Final = "tokenizer.ggml.model"
_TOKENS: Final = "tokenizer.ggml.tokens"
_TYPES: Final = "tokenizer.ggml.token_type"
_SPACE: Final = "▁"
_SPECIAL: Final = {
    "cls_token": ("bos", "[CLS]"), "sep_token": ("seperator", "[SEP]"), "unk_token": ("unknown", "[UNK]"),
    "pad_token": ("padding", "[PAD]"), "mask_token": ("mask", "[MASK]"),
}  # fmt: skip
"""transformers' names to GGUF's keys (the spelling is theirs), and the usual token where a file has no such key."""
_LONGEST_WORD: Final = 100


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file: built by transformers, WordPiece by memfit, which transformers does not read.

    Raises:
        BrokenInput: the header is broken, or the vocabulary is none.
    """
    from transformers import PreTrainedTokenizerFast

    header = read_header(file, arrays=frozenset((_TOKENS, _TYPES)))  # transformers' own reader believes every count
    if header.keys.get(_MODEL) == "bert":
        return _word_pieces(header)
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, parts, settings = get_gguf_tokenizer(str(file))
    backend, more = convert_gguf_tokenizer(architecture, parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **more)


def _word_pieces(header: Header) -> Any:
    """BERT's tokenizer. Pieces that begin a word carry the mark of a space there, and others nothing."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens, types = header.keys.get(_TOKENS), header.keys.get(_TYPES)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise refuse(header.file, f"key {_TOKENS!r} is no list of tokens")
    if types is not None and (not isinstance(types, list) or len(types) != len(tokens)):
        raise refuse(header.file, f"key {_TYPES!r} is no list of {len(tokens)} types")
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        piece = _piece(token, None if types is None else types[number])
        if vocabulary.setdefault(piece, number) != number:
            raise refuse(header.file, f"has the token {piece!r} twice, at {vocabulary[piece]} and {number}")
    special = {name: _special(header, tokens, key, usual) for name, (key, usual) in _SPECIAL.items()}
    found = {name: token for name, token in special.items() if token is not None}
    missing = [name for name in ("cls_token", "sep_token", "unk_token") if name not in found]
    if missing:
        raise refuse(header.file, f"names no {missing[0]}, which every text of BERT needs")
    lower = bool(header.keys.get("tokenizer.ggml.normalizer.lowercase", True))
    strip = bool(header.keys.get("tokenizer.ggml.normalizer.strip_accents", True))
    made = Tokenizer(models.WordPiece(vocabulary, unk_token=found["unk_token"], max_input_chars_per_word=_LONGEST_WORD))
    made.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=strip)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    ends = [(found[name], vocabulary[found[name]]) for name in ("sep_token", "cls_token")]
    made.post_processor = processors.BertProcessing(*ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, **found)


def _piece(token: str, kind: Any) -> str:
    """A token as WordPiece's vocabulary has it: `▁the` -> `the`, `ing` -> `##ing`, `[CLS]` as it is."""
    if token.startswith(_SPACE):
        return token[len(_SPACE) :]
    whole = kind in (int(gguf.TokenType.CONTROL), int(gguf.TokenType.UNUSED), int(gguf.TokenType.UNKNOWN))
    # llama.cpp's converter once left all in brackets as it is, `[unused7]` too, and called it normal.
    whole = whole or (token.startswith("[") and token.endswith("]"))
    return token if whole else f"##{token}"


def _special(header: Header, tokens: list[str], key: str, usual: str) -> str | None:
    number = header.keys.get(f"tokenizer.ggml.{key}_token_id")
    if key == "bos":
        number = header.keys.get("tokenizer.ggml.cls_token_id", number)
    if number is None:
        return usual if usual in tokens else None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise refuse(header.file, f"calls token {number!r} its {key}; it has {len(tokens)} tokens")
    return _piece(tokens[number], int(gguf.TokenType.CONTROL))


__all__ = ["gguf_tokenizer"]
