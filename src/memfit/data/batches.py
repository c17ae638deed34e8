"""Batches of token ids: which rows a batch has is a function of (seed, epoch, number), and of nothing that happened.

Legend: B rows of a batch, T tokens of a row.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from memfit.errors import BrokenInput, UsageError

from .read import RawData, Row

Kind = Literal["causal", "masked", "seq2seq", "classifier"]
IGNORED: Final = -100
_MULTIPLE: Final = 8
"""Rows are padded to a multiple of this, so that there are few shapes."""
_MASKED: Final = 0.15
"""Share of tokens that a masked language model has to guess."""
_FEW_ROWS: Final = 4
"""Rows for each class; with fewer of many classes, the label may be in another column."""
_MANY_CLASSES: Final = 10
_AT_ONCE: Final = 1 << 16
"""Characters that are tokenised at a time."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What of a tokenizer matters."""

    encode: Callable[[str], Sequence[int]]
    """Without special tokens."""
    encode_row: Callable[[str, str | None], Sequence[int]]
    """With those that a row begins and ends with."""
    size: int
    """Ids that the model knows."""
    pad: int = 0
    eos: int | None = None
    mask: int | None = None


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """Of a transformers tokenizer, or of a function from text to ids."""
    if not hasattr(tokenizer, "encode"):

        def with_second(text: str, second: str | None) -> Sequence[int]:
            return [*tokenizer(text), *(tokenizer(second) if second is not None else ())]

        return Vocabulary(encode=tokenizer, encode_row=with_second, size=size)
    pad = tokenizer.pad_token_id
    return Vocabulary(
        encode=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        encode_row=lambda text, second: tokenizer(text, second, verbose=False)["input_ids"],
        size=size, pad=0 if pad is None else pad, eos=tokenizer.eos_token_id, mask=tokenizer.mask_token_id,
    )  # fmt: skip


class Batches:
    """All batches of a data set, made when they are asked for.

    Windows of `sequence` tokens where the data is text; a last batch that is not full is left out, unless it is all
    there is or the order is fixed (`shuffle` off, to evaluate). Rows are cut at `sequence` and padded, and the last
    batch may have fewer.
    """

    def __init__(
        self,
        rows: "_Rows",
        *,
        name: str,
        kind: Kind,
        batch: int,
        seed: int,
        shuffle: bool,
        vocabulary: Vocabulary,
        notes: Sequence[str] = (),
    ) -> None:
        self.rows, self.name, self.kind, self.size, self.seed = rows, name, kind, batch, seed
        self.shuffle, self.vocabulary = shuffle, vocabulary
        whole, left = divmod(len(rows), batch)
        drop = left and shuffle and rows.packed  # of fewer rows than a batch nothing is made: see `batches_of`
        self.count = whole + (1 if left and not drop else 0)
        told = list(notes)
        if drop:
            told.append(f"{left} of {len(rows)} windows of each epoch are left out, as they fill no batch of {batch}")
        self.notes = tuple(told)
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def fingerprint(self) -> str:
        """Of all tokens, labels and settings that decide what a batch is."""
        made = hashlib.sha256(repr((self.kind, self.size, self.seed, self.shuffle)).encode())
        for array in self.rows.arrays():
            made.update(np.ascontiguousarray(array).tobytes())
        return made.hexdigest()

    def batch(self, epoch: int, index: int) -> dict[str, Tensor]:
        """Batch `index` of `epoch`: `input_ids`, `labels`, and `attention_mask` where rows are padded.

        Raises:
            BrokenInput: all tokens of the batch are ignored by the loss; names its rows.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"batch {index} of {self.count}")
        order = self.rows_in(epoch, index)
        ids = [self.rows.ids(number) for number in order]
        longest = max(map(len, ids))
        if not self.rows.packed:
            longest = min(-(-longest // _MULTIPLE) * _MULTIPLE, self.rows.most)
        ids_BT = torch.full((len(ids), longest), self.vocabulary.pad, dtype=torch.int64)
        mask_BT = torch.zeros((len(ids), longest), dtype=torch.int64)
        for row, own in enumerate(ids):
            ids_BT[row, : len(own)] = torch.from_numpy(own.astype(np.int64))
            mask_BT[row, : len(own)] = 1
        made = self._with_labels(ids_BT, mask_BT, order, epoch, index)
        if not bool(made["labels"].ne(IGNORED).any()):
            rows = ", ".join(str(int(number) + 1) for number in order[:8])
            raise BrokenInput(
                f"{self.name}: all tokens of a batch are ignored (rows {rows}): they have no completion within the "
                "sequence. Take the rows out, or allow longer sequences."
            )
        return made

    def rows_in(self, epoch: int, index: int) -> np.ndarray:
        """The numbers of the rows of batch `index` of `epoch`."""
        return self._ordered(epoch)[index * self.size : (index + 1) * self.size]

    def _ordered(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self.rows))
            if self.shuffle:
                np.random.Generator(np.random.PCG64([self.seed, epoch])).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def _with_labels(
        self, ids_BT: Tensor, mask_BT: Tensor, order: np.ndarray, epoch: int, index: int
    ) -> dict[str, Tensor]:
        made = {"input_ids": ids_BT}
        if not self.rows.packed:
            made["attention_mask"] = mask_BT
        if self.kind == "classifier":
            return made | {"labels": torch.tensor([self.rows.label(number) for number in order])}
        if self.kind == "masked":
            chance = np.random.Generator(np.random.PCG64([self.seed, epoch, index])).random(tuple(ids_BT.shape))
            hidden = torch.from_numpy(chance < _MASKED) & mask_BT.bool()
            hidden[0, 0] |= not bool(hidden.any())
            mask = self.vocabulary.mask
            assert mask is not None
            labels = ids_BT.masked_fill(~hidden, IGNORED)
            return made | {"input_ids": ids_BT.masked_fill(hidden, mask), "labels": labels}
        starts = torch.tensor([self.rows.start(number) for number in order])[:, None]
        place = torch.arange(ids_BT.shape[1])
        ignored = (place < starts) | ~mask_BT.bool()
        if self.kind == "causal":
            return made | {"labels": ids_BT.masked_fill(ignored, IGNORED)}
        # An encoder reads what stands before the start, a decoder writes the rest.
        longest = int((mask_BT.sum(1, keepdim=True) - starts).max())
        labels = torch.full((ids_BT.shape[0], max(longest, 1)), IGNORED)
        for row, start in enumerate(starts[:, 0].tolist()):
            own = ids_BT[row, start : int(mask_BT[row].sum())]
            labels[row, : len(own)] = own
        first = int(starts.max())
        read = place[:first] < starts
        return {
            "input_ids": ids_BT[:, :first].masked_fill(~read, self.vocabulary.pad),
            "attention_mask": read.to(torch.int64), "labels": labels,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """All tokens, one after the other, and where each row begins."""

    tokens: np.ndarray
    edges: np.ndarray
    starts: np.ndarray
    """Tokens of each row that are only read."""
    labels: np.ndarray
    packed: bool
    most: int

    def __len__(self) -> int:
        return len(self.edges) - 1

    def ids(self, number: int) -> np.ndarray:
        return self.tokens[self.edges[number] : self.edges[number + 1]]

    def start(self, number: int) -> int:
        return int(self.starts[number])

    def label(self, number: int) -> int:
        return int(self.labels[number])

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.tokens, self.edges, self.starts, self.labels


def batches_of(
    raw: RawData,
    tokenizer: Any,
    *,
    kind: Kind,
    sequence: int,
    batch: int,
    vocabulary: int,
    seed: int = 0,
    context: int | None = None,
    num_labels: int | None = None,
    shuffle: bool = True,
) -> Batches:
    """The batches of a data set for one kind of model.

    Args:
        tokenizer: of transformers, or a function from text to ids.
        sequence: most tokens of a row.
        vocabulary: ids that the model knows. context: most positions; num_labels: classes.
        shuffle: another order each epoch; off: the rows' own order, to evaluate.

    Raises:
        UsageError: the sequence is longer than the context; the tokenizer does not match the model; rows have no
            labels, or none that the model has, for a classifier; fewer rows than a batch, to train.
        BrokenInput: the text is too short for a single window.
    """
    if context is not None and sequence > context:
        raise UsageError(
            f"sequences of {sequence} tokens, and the model's context has {context}. Choose a shorter --sequence."
        )
    known = vocabulary_of(tokenizer, vocabulary)
    if kind == "masked" and known.mask is None:
        raise UsageError(f"{raw.name}: the tokenizer has no mask token, which a masked language model needs.")
    notes: list[str] = []
    if kind == "classifier":
        rows = _labelled(raw, known, sequence, num_labels, notes)
    elif raw.kind == "pairs":
        rows = _pairs(raw, known, sequence, kind, notes)
    else:
        rows = _windows(raw, known, sequence, kind)
    if shuffle and len(rows) < batch:
        what = f"windows of {sequence} tokens" if rows.packed else "rows"
        raise UsageError(
            f"{raw.name}: has {len(rows)} {what} to train on, and a batch has {batch}. Give more, or a smaller --batch"
            f"{' or --sequence' if rows.packed else ''}."
        )
    largest = max(int(rows.tokens.max(initial=0)), known.pad, known.mask or 0)
    if largest >= vocabulary:
        raise UsageError(
            f"{raw.name}: the tokenizer gives the id {largest}, and the model knows {vocabulary} ids: they do not "
            "belong together. Give the model's own tokenizer."
        )
    return Batches(
        rows, name=raw.name, kind=kind, batch=batch, seed=seed, shuffle=shuffle, vocabulary=known, notes=notes
    )


def _windows(raw: RawData, known: Vocabulary, sequence: int, kind: Kind) -> _Rows:
    """Text, one document after the other, in windows of `sequence` tokens."""
    parts: list[np.ndarray] = []
    for row in raw.rows:
        for piece in _pieces(row.text):
            parts.append(np.asarray(known.encode(piece), dtype=np.int32))
        if known.eos is not None and len(raw.rows) > 1:
            parts.append(np.asarray([known.eos], dtype=np.int32))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    count = len(tokens) // sequence
    if count == 0:
        raise BrokenInput(
            f"{raw.name}: {len(tokens)} tokens, and a sequence has {sequence}. Give more text, or shorter sequences."
        )
    return _Rows(
        tokens=tokens[: count * sequence], edges=np.arange(count + 1) * sequence, labels=np.zeros(count, np.int64),
        starts=np.full(count, sequence // 2 if kind == "seq2seq" else 0), packed=True, most=sequence,
    )  # fmt: skip


def _pieces(text: str) -> list[str]:
    """A long text in parts that end with a line: tokenizers take more than linear time and memory for one string."""
    found, start = [], 0
    while start < len(text):
        stop = text.find("\n", start + _AT_ONCE) + 1 or len(text)
        found.append(text[start:stop])
        start = stop
    return found


def _pairs(raw: RawData, known: Vocabulary, sequence: int, kind: Kind, notes: list[str]) -> _Rows:
    """A prompt, which is read, and its completion, which is learned."""
    ids, starts = [], []
    cut = 0
    for row in raw.rows:
        prompt = list(known.encode(row.text))
        written = list(known.encode(row.second or "")) + ([] if known.eos is None else [known.eos])
        cut += len(prompt) + len(written) > sequence
        own = (prompt + written)[:sequence]
        ids.append(own)
        starts.append(min(len(prompt), len(own)))
    if cut:
        notes.append(f"{cut} of {len(ids)} rows are longer than {sequence} tokens and are cut")
    return _of_lists(ids, starts, [0] * len(ids), sequence)


def _labelled(
    raw: RawData, known: Vocabulary, sequence: int, num_labels: int | None, notes: list[str]
) -> _Rows:
    """A text and its class."""
    ids, labels = [], []
    cut = 0
    for number, row in enumerate(raw.rows, 1):
        label = _label(raw, number, row, num_labels)
        own = list(known.encode_row(row.text, row.second))
        if not own:
            raise BrokenInput(f"{raw.name}: row {number} has no tokens.")
        if len(own) > sequence:
            cut += 1
            # The last token is the one that ends a row.
            own = [*own[: sequence - 1], own[-1]]
        ids.append(own)
        labels.append(label)
    if cut:
        notes.append(f"{cut} of {len(ids)} rows are longer than {sequence} tokens and are cut")
    notes += _doubts(labels, max(raw.classes, num_labels or 0))
    return _of_lists(ids, [0] * len(ids), labels, sequence)


def _doubts(labels: list[int], classes: int) -> list[str]:
    """What makes one doubt that these are the labels that were meant."""
    found = []
    missing = sorted(set(range(classes)) - set(labels))
    if missing:
        some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        found.append(f"no row has the class {some} of 0 to {classes - 1}")
    if classes > _MANY_CLASSES and len(labels) < _FEW_ROWS * classes:
        found.append(f"{classes} classes in {len(labels)} rows: is that the label's column? --label-column names it")
    return found


def _label(raw: RawData, number: int, row: Row, num_labels: int | None) -> int:
    if row.label is None:
        raise UsageError(
            f"{raw.name}: row {number} has no label, and a classifier is to be trained. Name the column "
            "(--label-column)."
        )
    if num_labels is not None and row.label >= num_labels:
        raise UsageError(
            f"{raw.name}: row {number} has the label {row.label}, and the model has {num_labels} classes, "
            f"0 to {num_labels - 1}."
        )
    return row.label


def _of_lists(ids: list[list[int]], starts: list[int], labels: list[int], sequence: int) -> _Rows:
    flat = np.concatenate([np.asarray(own, np.int32) for own in ids])
    edges = np.concatenate([[0], np.cumsum([len(own) for own in ids])])
    return _Rows(
        tokens=flat, edges=edges, starts=np.asarray(starts), labels=np.asarray(labels), packed=False, most=sequence
    )
