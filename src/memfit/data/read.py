"""From what a user names as data to rows: text, JSONL, TSV, CSV, a `datasets` data set, or Python's own lists."""

import csv
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from memfit.errors import BrokenInput, UsageError

Kind = Literal["text", "pairs", "labelled"]
TEXTS: Final = ("text", "sentence", "content", "sentence1", "question")
"""Names under which a row's text is looked for, in this order."""
_SECONDS: Final = ("sentence2", "text2", "text_pair", "answer")
_MOST_CLASSES: Final = 10_000
_LABELS: Final = ("label", "labels", "class", "target")
_SUFFIXES: Final = (".txt", ".md", ".jsonl", ".json", ".tsv", ".csv")


@dataclass(frozen=True)
class Row:
    """One example."""

    text: str
    second: str | None = None
    """A second text that is judged together with the first, or the completion of a prompt."""
    label: int | None = None


@dataclass(frozen=True, kw_only=True)
class RawData:
    """Rows, and what they are for."""

    name: str
    """Of the file or data set, for messages."""
    kind: Kind
    rows: tuple[Row, ...]
    label_names: tuple[str, ...] = ()
    """Names of the classes, by number; empty where labels are numbers already."""

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return 1 + max((row.label for row in self.rows if row.label is not None), default=-1)


def read_data(where: Any, *, text_column: str | None = None, label_column: str | None = None) -> RawData:
    """The rows of a data set.

    Args:
        where: a file (.txt: one long text; .jsonl: an object a line; .tsv, .csv: with a header or without, `text` then
            `label`), a directory of `datasets.save_to_disk`, the id of a data set; in Python also a
            `datasets.Dataset`, a list of strings or of dicts.
        text_column: the name of the text; default: the first of `text`, `sentence`, `content` that is there.
        label_column: of the label; default: `label`. Rows with `prompt` and `completion` are pairs.

    Raises:
        UsageError: it is not there, or is of no kind that is known, or has no such column.
        BrokenInput: it cannot be read, is empty, or a row has no text or no label; names the row.
    """
    if isinstance(where, str | Path):
        name, rows = _from_path(str(where), tuple(filter(None, (text_column, label_column))))
    elif isinstance(where, Sequence) or hasattr(where, "features"):
        name, rows = "the data", where
    else:
        raise UsageError(
            f"data of the type {type(where).__name__} is not known: give a file, a data set, or a list of strings or "
            "dicts."
        )
    if isinstance(rows, str):
        if not rows.strip():
            raise BrokenInput(f"{name}: is empty. Give a file with text in it.")
        return RawData(name=name, kind="text", rows=(Row(rows),))
    found = _rows(name, rows, text_column, label_column)
    features = getattr(getattr(where, "features", None), "get", lambda _: None)(label_column or "label")
    names = tuple(getattr(features, "names", None) or ())
    return replace(found, label_names=names) if names else found


def with_classes_of(held: RawData, raw: RawData) -> RawData:
    """`held` with the class numbers of `raw`: names are numbered by each data set for itself.

    Raises:
        BrokenInput: it is of another kind, or has classes that are never trained.
    """
    if held.kind != raw.kind:
        kinds = {"text": "texts", "pairs": "prompts with completions", "labelled": "texts with labels"}
        raise BrokenInput(f"{held.name} has {kinds[held.kind]}, {raw.name} has {kinds[raw.kind]}. Give two alike.")
    if raw.kind != "labelled":
        return held
    if bool(held.label_names) != bool(raw.label_names):
        numbers, names = (raw, held) if held.label_names else (held, raw)
        raise BrokenInput(f"the labels of {numbers.name} are numbers, those of {names.name} names. Give two alike.")
    number_of = {name: number for number, name in enumerate(raw.label_names)}
    for name in held.label_names:
        if name not in number_of:
            raise BrokenInput(f"{held.name} has the label {name!r}, which no row of {raw.name} has.")
    if held.classes > raw.classes and not raw.label_names:
        raise BrokenInput(f"{held.name} has the label {held.classes - 1}, and {raw.name} has 0 to {raw.classes - 1}.")
    if not held.label_names:
        return held
    rows = (
        replace(row, label=None if row.label is None else number_of[held.label_names[row.label]]) for row in held.rows
    )
    return replace(held, rows=tuple(rows), label_names=raw.label_names)


def split_rows(raw: RawData, share: float = 0.05, seed: int = 0) -> tuple[RawData, RawData]:
    """(to train on, held out): rows drawn by `seed`; of one long text, its last part.

    Raises:
        UsageError: nothing would be left on one of the sides.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share to hold out must be between 0 and 1, got {share}")
    if raw.kind == "text" and len(raw.rows) == 1:
        text = raw.rows[0].text
        cut = int(len(text) * (1 - share))
        at = text.find("\n", cut) + 1 or cut
        kept, held_rows = (Row(text[:at]),), (Row(text[at:]),)
        if not (kept[0].text.strip() and held_rows[0].text.strip()):
            raise UsageError(
                f"{raw.name}: too short to hold {share:.0%} of it out. Give more text, or another to judge on (--eval)."
            )
    else:
        numbers = list(range(len(raw.rows)))
        random.Random(seed).shuffle(numbers)
        out = set(numbers[: max(1, round(len(numbers) * share))])
        if len(out) == len(numbers):
            raise UsageError(
                f"{raw.name}: {len(numbers)} rows are too few to hold {share:.0%} of them out. Give more, or others to "
                "judge on (--eval)."
            )
        rows = enumerate(raw.rows)
        return _parted(raw, tuple(row for n, row in rows if n not in out), tuple(raw.rows[n] for n in sorted(out)))
    return _parted(raw, kept, held_rows)


def _parted(raw: RawData, kept: tuple[Row, ...], held: tuple[Row, ...]) -> tuple[RawData, RawData]:
    return replace(raw, rows=kept), replace(raw, rows=held, name=f"{raw.name} (held out)")


# -- files --------------------------------------------------------------------------------------------


def _from_path(where: str, asked: tuple[str, ...]) -> tuple[str, Any]:
    path = Path(where)
    if path.is_dir():
        return where, _datasets_at(path)
    if not path.exists():
        if path.suffix in _SUFFIXES or where.startswith((".", "/", "~")):
            raise UsageError(f"{where}: there is no such file.")
        return where, _datasets_of(where)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(f"{where}: {suffix or 'no suffix'} is of no kind that is known ({', '.join(_SUFFIXES)}).")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BrokenInput(f"{where}: is not UTF-8 (byte {error.start}). Convert it first.") from error
    except OSError as error:
        raise BrokenInput(f"{where}: cannot be read ({error.strerror}).") from error
    if suffix in (".txt", ".md"):
        return where, text
    if suffix in (".jsonl", ".json"):
        return where, _json_rows(where, text)
    return where, _table(where, text, "\t" if suffix == ".tsv" else ",", asked)


def _json_rows(name: str, text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except ValueError as error:
            raise BrokenInput(f"{name}: is no JSON ({error}).") from error
        return list(whole)
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise BrokenInput(f"{name}: line {number} is no JSON ({error}).") from error
    return found


def _table(name: str, text: str, separator: str, asked: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows by column; `asked` are names of columns, which a header must then have."""
    # A tab never stands within a cell, and a quotation mark there is one.
    lines = (
        [line.split("\t") for line in text.splitlines() if line.strip()]
        if separator == "\t"
        else [row for row in csv.reader(text.splitlines(keepends=True)) if row]
    )
    if not lines:
        return []
    header = [cell.strip() for cell in lines[0]]
    known = {*TEXTS, *_SECONDS, *_LABELS, "prompt", "completion"}
    if not asked and not known & {cell.lower() for cell in header}:
        header, body, first = (["text", "label"] if len(header) == 2 else ["text", *header[1:]]), lines, 1
        if len(lines[0]) > 2:
            raise BrokenInput(
                f"{name}: {len(lines[0])} columns and no header with a name that is known. Name the columns "
                "(--text-column, --label-column), or write a header with `text` and `label`."
            )
        header = header[: len(lines[0])]
    else:
        body, first = lines[1:], 2
    for number, row in enumerate(body, first):
        if len(row) != len(header):
            raise BrokenInput(f"{name}: line {number} has {len(row)} columns, {len(header)} were expected.")
    return [dict(zip(header, row, strict=True)) for row in body]


def _datasets(why: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{why} needs the library `datasets`: pip install datasets.") from error
    return datasets


def _datasets_at(path: Path) -> Any:
    library = _datasets(f"{path}: is a directory, and a saved data set")
    try:
        return _only_split(str(path), library.load_from_disk(str(path)))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise BrokenInput(f"{path}: no data set of `save_to_disk` can be read here ({error}).") from error


def _datasets_of(name: str) -> Any:
    library = _datasets(f"{name}: there is no such file, and looking for a data set of that name")
    identity, _, split = name.partition(":")
    try:
        return _only_split(name, library.load_dataset(identity, split=split or None))
    except Exception as error:  # the library raises errors of many kinds, its own and the network's
        raise UsageError(
            f"{name}: there is no such file, and no data set of that name could be had ({error})."
        ) from error


def _only_split(name: str, found: Any) -> Any:
    """A data set's `train` part, where it has several."""
    if hasattr(found, "keys") and not hasattr(found, "features"):
        found = dict(found)
    if isinstance(found, Mapping):
        if "train" not in found:
            raise UsageError(f"{name}: has the parts {', '.join(found)} and no `train`. Name one, as {name}:PART.")
        return found["train"]
    return found


# -- rows ---------------------------------------------------------------------------------------------


def _rows(name: str, rows: Iterable[Any], text_column: str | None, label_column: str | None) -> RawData:
    listed = [{"text": row} if isinstance(row, str) else row for row in rows]
    if not listed:
        raise BrokenInput(f"{name}: is empty. Give at least one row.")
    first = listed[0]
    if not isinstance(first, Mapping):
        raise BrokenInput(f"{name}: row 1 is a {type(first).__name__}; objects with a `text` were expected.")
    # Of all rows: a label that only some have is missing from the others, not from the data.
    columns = list(dict.fromkeys(str(key) for row in listed if isinstance(row, Mapping) for key in row))
    if text_column is None and {"prompt", "completion"} <= set(columns):
        prompts, completions = (
            [_text(name, n, row, column) for n, row in enumerate(listed, 1)] for column in ("prompt", "completion")
        )
        return RawData(name=name, kind="pairs", rows=tuple(map(Row, prompts, completions)))
    text = _column(name, columns, text_column, TEXTS, "text")
    if text is None:
        raise BrokenInput(
            f"{name}: row 1 has no text; its columns are {', '.join(columns)}. Name the one that is (--text-column)."
        )
    second = next((column for column in _SECONDS if column in columns), None) if text_column is None else None
    label = _column(name, columns, label_column, _LABELS, "label")
    texts = [_text(name, n, row, text) for n, row in enumerate(listed, 1)]
    seconds = [None if second is None else _text(name, n, row, second) for n, row in enumerate(listed, 1)]
    if label is None:
        return RawData(name=name, kind="text", rows=tuple(map(Row, texts, seconds)))
    labels, names = _labels(name, [_value(name, n, row, label) for n, row in enumerate(listed, 1)])
    return RawData(name=name, kind="labelled", rows=tuple(map(Row, texts, seconds, labels)), label_names=names)


def _column(
    name: str, columns: Sequence[str], asked: str | None, usual: Sequence[str], what: str
) -> str | None:
    if asked is not None:
        if asked not in columns:
            raise UsageError(f"{name}: has no column {asked!r} for the {what}; it has {', '.join(columns)}.")
        return asked
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[one] for one in usual if one in lower), None)


def _value(name: str, number: int, row: Any, column: str) -> Any:
    value = row.get(column) if isinstance(row, Mapping) else None
    if value is None or value == "":
        raise BrokenInput(f"{name}: row {number} has no {column}.")
    return value


def _text(name: str, number: int, row: Any, column: str) -> str:
    value = _value(name, number, row, column)
    if not isinstance(value, str):
        raise BrokenInput(f"{name}: row {number} has a {type(value).__name__} as its {column}; text was expected.")
    return value


def _labels(name: str, values: Sequence[Any]) -> tuple[list[int], tuple[str, ...]]:
    """Numbers as they are; anything else is numbered in sorted order, the names kept."""
    for row, value in enumerate(values, 1):
        if isinstance(value, float) and not value.is_integer():
            raise BrokenInput(f"{name}: row {row} has the label {value}; labels are whole numbers from 0 on, or names.")
    try:
        numbers = [int(value) for value in values]
        if all(str(number) == str(value).strip() for number, value in zip(numbers, values, strict=True)):
            for row, number in enumerate(numbers, 1):
                if number < 0:
                    raise BrokenInput(f"{name}: row {row} has the label {number}; labels count from 0.")
                if number >= _MOST_CLASSES:
                    raise BrokenInput(
                        f"{name}: row {row} has the label {number}, so that there would be {number + 1} classes; at "
                        f"most {_MOST_CLASSES} are taken. Number the classes from 0 on, or give their names."
                    )
            return numbers, ()
    except (TypeError, ValueError):
        pass
    first, *others = (str(value).strip() for value in values)
    if others and not first.isdecimal() and all(map(str.isdecimal, others)):
        raise BrokenInput(
            f"{name}: row 1 has the label {first!r}, and all others are whole numbers. If that is a column's name, say "
            "so (--label-column), and name the text's (--text-column)."
        )
    names = tuple(sorted({str(value) for value in values}))
    order = {value: number for number, value in enumerate(names)}
    return [order[str(value)] for value in values], names
