"""Batches: their order is a function of seed, epoch and number; every token is there once; bad rows are told."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.data.batches import IGNORED, batches_of
from memfit.data.read import read_data, split_rows, with_classes_of
from memfit.errors import BrokenInput, UsageError

SIZES = {"sequence": 8, "batch": 3, "vocabulary": 300}


def by_bytes(text):
    return list(text.encode())


def cut(raw, kind="causal", **options):
    return batches_of(raw, by_bytes, kind=kind, **(SIZES | options))


@given(st.integers(60, 400), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_an_epoch_has_every_window_once_in_an_order_of_its_own(length, batch, seed, epoch):
    text = "".join(chr(33 + n % 90) for n in range(length))
    made, again = (cut(read_data([text]), batch=batch, seed=seed) for _ in range(2))
    rows = torch.cat([made.batch(epoch, n)["input_ids"] for n in range(len(made))])
    assert torch.equal(rows, torch.cat([again.batch(epoch, n)["input_ids"] for n in reversed(range(len(made)))][::-1]))
    windows = {tuple(by_bytes(text)[n * 8 : n * 8 + 8]) for n in range(length // 8)}
    seen = [tuple(row) for row in rows.tolist()]
    assert len(seen) == len(made) * min(batch, length // 8)
    assert set(seen) <= windows
    assert len(windows) - len(set(seen)) < batch


def test_epochs_differ_and_a_fixed_order_does_not():
    raw = read_data(["".join(chr(33 + n % 90) for n in range(300))])
    made = cut(raw)
    assert not torch.equal(made.batch(0, 0)["input_ids"], made.batch(1, 0)["input_ids"])
    fixed = cut(raw, shuffle=False)
    assert torch.equal(fixed.batch(0, 0)["input_ids"], fixed.batch(1, 0)["input_ids"])
    assert made.fingerprint != fixed.fingerprint
    assert made.fingerprint == cut(raw).fingerprint != cut(raw, seed=1).fingerprint


def test_rows_are_padded_and_what_is_only_read_is_ignored(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "abcd", "completion": "efgh"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    batch = cut(read_data(file), shuffle=False).batch(0, 0)
    assert batch["input_ids"].tolist() == [[97, 98, 99, 0, 0, 0, 0, 0], list(range(97, 105))]
    assert batch["attention_mask"].sum(1).tolist() == [3, 8]
    assert batch["labels"][0].tolist() == [IGNORED, IGNORED, 99] + [IGNORED] * 5
    assert batch["labels"][1].tolist() == [IGNORED] * 4 + list(range(101, 105))


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_completion():
    raw = read_data([{"prompt": "ab", "completion": "xyz"}, {"prompt": "abc", "completion": "x"}])
    batch = cut(raw, kind="seq2seq", shuffle=False).batch(0, 0)
    assert batch["input_ids"].tolist() == [[97, 98, 0], [97, 98, 99]]
    assert batch["labels"].tolist() == [[120, 121, 122], [120, IGNORED, IGNORED]]


def test_of_masked_tokens_the_label_is_what_stood_there():
    class Tokenizer:
        pad_token_id, eos_token_id, mask_token_id = 0, None, 299

        def encode(self, text):
            return by_bytes(text)

        def __call__(self, text, second=None, **_):
            return {"input_ids": by_bytes(text)}

    raw = read_data(["".join(chr(33 + n % 90) for n in range(800))])
    masked = batches_of(raw, Tokenizer(), kind="masked", **(SIZES | {"batch": 50}))
    plain = batches_of(raw, Tokenizer(), kind="causal", **(SIZES | {"batch": 50}))
    ids, labels = masked.batch(0, 1)["input_ids"], masked.batch(0, 1)["labels"]
    hidden = labels.ne(IGNORED)
    assert torch.equal(ids.where(~hidden, labels), plain.batch(0, 1)["input_ids"])
    assert (ids[hidden] == 299).all()
    assert 0.05 < hidden.float().mean() < 0.3


def test_labels_stay_with_their_texts():
    rows = [{"sentence": chr(97 + n) * (n + 1), "label": n % 3} for n in range(7)]
    made = cut(read_data(rows), kind="classifier", num_labels=3)
    seen = {}
    for n in range(len(made)):
        batch = made.batch(0, n)
        for ids, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            seen[chr(ids[0])] = label
    assert seen == {chr(97 + n): n % 3 for n in range(7)}
    assert len(made) == 3


def test_names_of_classes_are_numbered_in_their_order():
    raw = read_data([{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}])
    assert raw.label_names == ("neg", "pos")
    assert [row.label for row in raw.rows] == [1, 0]


def test_data_to_evaluate_on_is_numbered_as_what_is_trained_on():
    raw = read_data([{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}, {"text": "c", "label": "all right"}])
    held = with_classes_of(read_data([{"text": "d", "label": "pos"}]), raw)
    assert held.label_names == raw.label_names
    assert [raw.label_names[row.label] for row in held.rows] == ["pos"]
    for rows, message in (
        ([{"text": "d", "label": "bad"}], "has the label 'bad', which no row of"),
        ([{"text": "d", "label": 1}], "are numbers, those of .* names"),
        ([{"text": "d"}], "has texts, .* has texts with labels"),
    ):
        with pytest.raises(BrokenInput, match=message):
            with_classes_of(read_data(rows), raw)
    numbers = read_data([{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    with pytest.raises(BrokenInput, match="has the label 2, and the data has 0 to 1"):
        with_classes_of(read_data([{"text": "d", "label": 2}]), numbers)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"  \n", "is empty"),
        ("a.txt", b"\xff\xfe", r"is not UTF-8 \(byte 0"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is no JSON"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"a": 1}', "row 1 has no text; its columns are a"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}', "row 2 has no label"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "label": 1}', "row 1 has no label"),
        ("a.jsonl", b'{"text": 3}', "row 1 has a int as its text"),
        ("a.jsonl", b'{"text": "a", "label": -1}', "row 1 has the label -1"),
        ("a.jsonl", b'{"text": "a", "label": 1000000}', "row 1 has the label 1000000"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": 0.5}', "row 2 has the label 0.5"),
        ("a.tsv", b"a\t1\nb", "line 2 has 1 columns, 2 were expected"),
        ("a.tsv", b"a\tb\tc", "3 columns and no header"),
        ("a.tsv", b"review\tscore\ngood\t1\nbad\t0", "row 1 has the label 'score', and all others are whole numbers"),
    ],
)
def test_a_file_that_is_broken_is_told_by_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BrokenInput, match=message):
        read_data(tmp_path / name)


def test_columns_of_a_table_have_the_names_that_are_asked_for(tmp_path):
    for name, content in (("a.csv", "id,review,stars\n1,good,5\n2,bad,1"), ("a.tsv", "review\tstars\ngood\t5\nbad\t1")):
        (tmp_path / name).write_text(content)
        raw = read_data(tmp_path / name, text_column="review", label_column="stars")
        assert [(row.text, row.label) for row in raw.rows] == [("good", 5), ("bad", 1)]
        with pytest.raises(UsageError, match="no column 'reviews' for the text; it has"):
            read_data(tmp_path / name, text_column="reviews")


def test_what_is_not_there_or_unknown_is_told(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_data(tmp_path / "none.jsonl")
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="no kind that is known"):
        read_data(tmp_path / "a.bin")
    with pytest.raises(UsageError, match="of the type int"):
        read_data(3)
    with pytest.raises(UsageError, match="no column 'x' for the text"):
        read_data([{"text": "a"}], text_column="x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UsageError, match=r"mistyped: there is no such file, and .* pip install datasets"):
            read_data("mistyped")


def test_what_does_not_match_the_model_is_told():
    text = read_data(["abc" * 30])
    with pytest.raises(UsageError, match="sequences of 8 tokens, and the model's context has 4"):
        cut(text, context=4)
    with pytest.raises(UsageError, match="gives the id 99, and the model knows 50"):
        cut(text, vocabulary=50)
    with pytest.raises(BrokenInput, match="90 tokens, and a sequence has 100"):
        cut(text, sequence=100)
    with pytest.raises(UsageError, match="row 1 has no label"):
        cut(text, kind="classifier")
    with pytest.raises(UsageError, match="row 2 has the label 2, and the model has 2 classes"):
        cut(read_data([{"text": "a", "label": 1}, {"text": "b", "label": 2}]), kind="classifier", num_labels=2)
    with pytest.raises(UsageError, match="no mask token"):
        cut(text, kind="masked")
    with pytest.raises(UsageError, match="has 11 windows of 8 tokens to train on, and a batch has 12"):
        cut(text, batch=12)
    with pytest.raises(UsageError, match=r"has 2 rows to train on, and a batch has 3. Give more, or a smaller --batch"):
        cut(read_data([{"text": "a", "label": 1}, {"text": "b", "label": 0}]), kind="classifier", num_labels=2)
    assert len(cut(text, batch=12, shuffle=False)) == 1, "to evaluate, any number will do"


def test_labels_that_look_wrong_are_told():
    rows = [{"text": "some", "label": n % 2} for n in range(20)]
    assert cut(read_data(rows), kind="classifier", num_labels=2).notes == ()
    typo = cut(read_data([*rows, {"text": "some", "label": 4}]), kind="classifier", num_labels=5)
    assert typo.notes == ("no row has the class 2, 3 of 0 to 4",)
    swapped = read_data([{"label": "good" if n % 2 else "bad", "text": f"text {n}"} for n in range(20)],
                        text_column="label", label_column="text")  # fmt: skip
    (note,) = cut(swapped, kind="classifier", num_labels=20).notes
    assert note.startswith("20 classes in 20 rows: is that the label's column?")


def test_a_batch_whose_tokens_are_all_ignored_is_told_by_its_rows():
    raw = read_data([{"prompt": "a" * 20, "completion": "b"}] * 3)
    made = cut(raw)
    assert "3 of 3 rows are longer than 8 tokens" in made.notes[0]
    with pytest.raises(BrokenInput, match=r"all tokens of a batch are ignored \(rows"):
        made.batch(0, 0)


def test_what_is_held_out_is_not_trained_on():
    raw = read_data([{"text": str(n), "label": 0} for n in range(40)])
    kept, held = split_rows(raw, 0.25, seed=3)
    assert len(held.rows) == 10
    assert {r.text for r in kept.rows} | {r.text for r in held.rows} == {str(n) for n in range(40)}
    assert split_rows(raw, 0.25, seed=3)[1] == held != split_rows(raw, 0.25, seed=4)[1]
    text, last = split_rows(read_data(["\n".join(map(str, range(100)))]), 0.1)
    assert text.rows[0].text + last.rows[0].text == "\n".join(map(str, range(100)))
    with pytest.raises(UsageError, match="too few"):
        split_rows(read_data([{"text": "a", "label": 0}]))
    with pytest.raises(UsageError, match="too short"):
        split_rows(read_data(["a"]))


def test_a_data_set_of_the_library_is_read():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    raw = read_data(datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features))
    assert raw.label_names == ("no", "yes")
    assert [row.label for row in raw.rows] == [1, 0]
