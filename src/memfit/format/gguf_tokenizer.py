"""A tokenizer as GGUF's keys: the vocabulary, how it is put together, and how text is cut before.

llama.cpp knows the ways of cutting (`tokenizer.ggml.pre`) by name, so they are told from tokenizer.json; a
tokenizer whose way has no name there is refused, since text would be cut otherwise and nobody would notice.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import gguf

from memfit.errors import BrokenInput, UsageError
from memfit.source import Source
from memfit.source.safetensors import read_json

_NBYTES_MAX: Final = 256 << 20
_SPACE: Final = "▁"
_NEVER_MERGED: Final = -1e6
"""Score of tokens that no merge makes."""

_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def add_tokenizer(writer: Any, source: Source, *, rows: int) -> None:
    """Add the source's tokenizer to the keys of a `gguf.GGUFWriter`.

    Args:
        writer: no file open yet.
        source: has a directory.
        rows: of the embedding; tokens up to there that the tokenizer lacks are named `[PADn]`.

    Raises:
        UsageError: a tokenizer of a kind that llama.cpp does not have.
        BrokenInput: a tokenizer.json that is not as it should be.
    """
    file, raw = _read(source)
    try:
        kind = _kind(raw, file)
        tokens, types = _tokens(raw, rows, file)
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre(_pre(raw, file) if kind == "gpt2" else "default")
        if kind == "bert":
            tokens = [_phantom(token, one) for token, one in zip(tokens, types, strict=True)]
            writer.add_token_type_count(int(getattr(source.config, "type_vocab_size", 1)))
            _add_normalizer(writer, raw)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        if kind == "llama":
            writer.add_token_scores(_scores(raw, tokens))
            writer.add_add_space_prefix(_adds_prefix(raw))
        special = gguf.SpecialVocab(source.directory, load_merges=kind == "gpt2", n_vocab=rows)
        special.add_to_gguf(writer, quiet=True)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BrokenInput(f"{file}: is no tokenizer as it should be ({error!r:.120}). Fetch it again.") from error


def _read(source: Source) -> tuple[Path, dict[str, Any]]:
    """tokenizer.json, or what transformers would write as such."""
    assert source.directory is not None
    file = source.directory / "tokenizer.json"
    if file.is_file():
        raw = read_json(file, limit=_NBYTES_MAX)
    else:
        backend = getattr(source.tokenizer(), "backend_tokenizer", None)
        if backend is None:
            raise UsageError(f"{file}: is missing, and llama.cpp needs what it says. Save the tokenizer in that form.")
        raw = json.loads(backend.to_str())
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise BrokenInput(f"{file}: describes no tokenizer. Fetch it again.")
    return file, raw


def _steps(raw: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    """A normalizer's or pre-tokenizer's steps, sequences taken apart."""
    one = raw.get(key)
    if one is None:
        return
    if one["type"] == "Sequence":
        for step in one.get("normalizers", one.get("pretokenizers", ())):
            yield from _steps({key: step}, key)
    else:
        yield one


def _kind(raw: Mapping[str, Any], file: Path) -> str:
    """llama.cpp's name of the kind: gpt2 (pairs of bytes), llama (SentencePiece), bert (WordPiece)."""
    model = raw["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind == "WordPiece":
        return "bert"
    before = [step["type"] for step in _steps(raw, "pre_tokenizer")]
    if kind == "BPE" and "ByteLevel" in before:
        return "gpt2"
    marks = any(step["type"] in ("Replace", "Prepend") for step in _steps(raw, "normalizer"))
    if kind == "BPE" and model.get("byte_fallback") and (marks or "Metaspace" in before):
        return "llama"
    raise UsageError(f"{file}: a tokenizer of the kind {kind} cut by {before} has no counterpart in llama.cpp.")


def _pre(raw: Mapping[str, Any], file: Path) -> str:
    """llama.cpp's name of the way that text is cut before pairs of bytes are merged."""
    normal = [step["type"] for step in _steps(raw, "normalizer")]
    steps = list(_steps(raw, "pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    if not set(normal) <= {"NFC"} or any(step.get("add_prefix_space") for step in steps):
        kinds = ["changed text"]
    whole = bool(steps and steps[-1].get("use_regex", True))
    if kinds == ["ByteLevel"] and whole:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and whole and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not whole and steps[0].get("behavior") == "Isolated":
        pattern = steps[0]["pattern"].get("Regex")
        # Of the names with Llama 3's pattern, llama-bpe takes whole words from the vocabulary first; dbrx does not.
        names = {_LLAMA3: "llama-bpe" if raw["model"].get("ignore_merges") else "dbrx", _QWEN2: "qwen2"}
        names[_TEKKEN] = "tekken"
        if pattern in names:
            return names[pattern]
    raise UsageError(
        f"{file}: cuts text ({', '.join((*normal, *kinds))}) in a way that memfit knows no name of in llama.cpp. "
        "Convert the model with llama.cpp's own convert_hf_to_gguf.py, or use memfit's own output."
    )


def _tokens(raw: Mapping[str, Any], rows: int, file: Path) -> tuple[list[str], list[int]]:
    """Tokens by id, and their types."""
    kinds, model = gguf.TokenType, raw["model"]
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(kinds.UNUSED)] * rows
    added = {one["id"]: one for one in raw.get("added_tokens", ())}
    words = {number: text for text, number in model["vocab"].items()}
    for number, text in (words | {number: one["content"] for number, one in added.items()}).items():
        if not 0 <= number < rows:
            raise BrokenInput(f"{file}: token {text!r} has the id {number}; the embedding has {rows} rows.")
        if number in added:
            kind = kinds.CONTROL if added[number].get("special") else kinds.USER_DEFINED
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            kind = kinds.BYTE
        else:
            kind = kinds.NORMAL
        if model.get("unk_token") == text and model.get("byte_fallback"):
            kind = kinds.UNKNOWN
        tokens[number] = text.replace(_SPACE, " ") if kind == kinds.USER_DEFINED else text
        types[number] = int(kind)
    return tokens, types


def _scores(raw: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Scores that make llama.cpp, which merges what gives the token of the highest score, follow the merges' order."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(raw["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else _NEVER_MERGED for token in tokens]


def _adds_prefix(raw: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    if any(step["type"] == "Prepend" for step in _steps(raw, "normalizer")):
        return True
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(raw, "pre_tokenizer")
    )


def _phantom(token: str, kind: int) -> str:
    """A word's first piece with the mark of a space, and others without `##`."""
    if kind in (int(gguf.TokenType.CONTROL), int(gguf.TokenType.UNUSED)):
        return token
    return token[2:] if token.startswith("##") else _SPACE + token


def _add_normalizer(writer: Any, raw: Mapping[str, Any]) -> None:
    """Whether letters lose case and accents; llama.cpp takes both off if nothing is said."""
    for step in _steps(raw, "normalizer"):
        if step["type"] == "BertNormalizer":
            lower = bool(step.get("lowercase", True))
            strip = step.get("strip_accents")
            writer.add_bool("tokenizer.ggml.normalizer.lowercase", lower)
            writer.add_bool("tokenizer.ggml.normalizer.strip_accents", lower if strip is None else bool(strip))
