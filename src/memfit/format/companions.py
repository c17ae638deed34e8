"""The files that go with the weights: tokenizer, chat template, generation settings."""

import shutil
from pathlib import Path
from typing import Any, Final

COMPANIONS: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
COMPANION_FOLDERS: Final = ("additional_chat_templates", "1_Pooling", "2_Normalize")
"""Folders whose JSON and template files are copied with them."""
_LICENSES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


def copy_companions(source: Path, target: Path) -> tuple[str, ...]:
    """Copy what goes with a model from one directory to another; the names copied, relative, sorted.

    By name: code, weights and whatever else lies in the directory stay behind.
    """
    names = [name for name in COMPANIONS + _LICENSES if (source / name).is_file()]
    for folder in COMPANION_FOLDERS:
        if (source / folder).is_dir():
            files = sorted((source / folder).iterdir())
            names += [f"{folder}/{f.name}" for f in files if f.is_file() and f.suffix in (".json", ".jinja")]
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        # Contents only: a read-only source (a hub cache, a package) must not give read-only files.
        shutil.copyfile(source / name, target / name)
    return tuple(sorted(names))


def save_companions(
    target: Path, *, source: Path | None = None, tokenizer: Any = None, generation_config: Any = None
) -> tuple[str, ...]:
    """Put the companions into `target`: copied from the directory `source`, or written from live objects.

    A GGUF file has its tokenizer inside, and a live module has none on disk; then `tokenizer` (a
    `PreTrainedTokenizerBase`) and `generation_config` write themselves where `source` had nothing.
    """
    names = set(copy_companions(source, target)) if source is not None and source.is_dir() else set()
    if tokenizer is not None and not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
        tokenizer.save_pretrained(target)
    if generation_config is not None and "generation_config.json" not in names:
        generation_config.save_pretrained(target)
    return tuple(sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()))
