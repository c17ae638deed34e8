from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from memfit.errors import UsageError
from memfit.evaluate.text import first_tokens, read_text, windows


class Letters:
    """A token for each letter; with special tokens, 1 before and 2 after, if there are any."""

    def __init__(self, before: list[int], after: list[int]) -> None:
        self.before, self.after = before, after

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": self.before + ids + self.after if add_special_tokens else ids}


def test_windows_follow_each_other_and_each_has_the_special_tokens() -> None:
    text = "abcdefghijk"
    assert windows(Letters([], []), text, length=4).tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]
    assert windows(Letters([1], []), text, length=4, skip=1, count=2).tolist() == [
        [1, 100, 101, 102],
        [1, 103, 104, 105],
    ]
    assert windows(Letters([1], [2]), text, length=4, count=1).tolist() == [[1, 97, 98, 2]]
    assert windows(Letters([], []), text, length=4).dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a", {}, "there are 1 tokens, and 512 are needed for a window of 512"),
        ("abcdefgh", {"length": 4, "count": 3}, "there are 8 tokens, and 12 are needed for 3 windows of 4"),
        ("abcdefgh", {"length": 4, "skip": 2}, r"12 are needed for 3 windows of 4 \(2 of them skipped\)"),
        ("abcdefgh", {"length": 1}, "nothing to predict"),
        ("abcdefgh", {"length": 4, "count": 0}, "count 0"),
    ],
)
def test_a_text_that_is_too_short_is_refused_with_the_numbers(
    text: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        windows(Letters([], []), text, **options)


def test_the_demo_tokenizer_cuts_windows() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(files("memfit") / "demo" / "model"))
    text = (files("memfit") / "demo" / "heldout.txt").read_text(encoding="utf-8")
    found = windows(tokenizer, text, length=64, count=3)
    assert found.shape == (3, 64)


def test_of_a_long_text_no_more_is_read_than_is_asked_for_and_the_tokens_are_those_of_all_of_it() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(files("memfit") / "demo" / "model"))
    text = (files("memfit") / "demo" / "heldout.txt").read_text(encoding="utf-8") * 8
    seen: list[int] = []

    def watched(text: str, **options: Any) -> Any:
        seen.append(len(text))
        return tokenizer(text, **options)

    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for most in (1, 100, 4096, len(whole), 2 * len(whole)):
        assert first_tokens(watched, text, most) == whole[:most]
    assert first_tokens(watched, text) == whole
    assert seen[0] < len(text) // 8 and seen[-1] == len(text)
    assert torch.equal(windows(watched, text, length=64, most=3), windows(tokenizer, text, length=64)[:3])
    assert windows(watched, "a b " * 100, length=64, most=300).shape[0] < 300


def test_where_tokens_have_many_letters_more_is_read_until_there_are_enough() -> None:
    def by_hundreds(text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": list(range(len(text) // 100))}

    assert first_tokens(by_hundreds, "x" * 1_000_000, 500) == list(range(500))
    assert first_tokens(by_hundreds, "x" * 10_000, 500) == list(range(100))


def test_a_file_that_is_no_utf8_is_refused_with_the_offset(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes("grün".encode())
    assert read_text(file) == "grün"
    file.write_bytes("grün".encode("latin-1"))
    with pytest.raises(UsageError, match="byte 0xfc at offset 2"):
        read_text(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(tmp_path / "none")
