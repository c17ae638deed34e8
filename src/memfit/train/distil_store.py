"""What a teacher answers of every row, kept on the disk: asked once, before the student learns, by a pass of its own.

    DIRECTORY/ids         int32 [P, k]    the likeliest entries of each place, the likeliest first
    DIRECTORY/log_probs   float32 [P, k]  their log-probabilities at the temperature of the loss
    DIRECTORY/rest        float32 [P]     log of the mass of all other entries
    DIRECTORY/about.json  what they depend on

Places are in the order of the data: a token of a language model, a row of a classifier. A batch asks by the numbers of
its rows, so it does not matter in which order, or in which parts, rows are learned from. While it is made the directory
is called DIRECTORY.part, and grows by whole rows: a pass that is stopped goes on after the last of them.

Legend: P places, k kept entries, B rows of a batch, T time, V vocabulary (or classes).
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from memfit.account.dry_run import hold_model
from memfit.account.watch import Watch
from memfit.data.batches import Batches, Kind
from memfit.errors import BrokenInput, Interrupted, disk_full
from memfit.packed.fake import blocks_to_run
from memfit.task.infer import vocabulary
from memfit.technique.chunk_loss import Buffers, _logits
from memfit.technique.distil import FromHead, FromLogits, Top, top_of
from memfit.units import format_size

from .distil import IDS, LOG_PROBS, REST, Teacher

_DTYPES: Final = {"ids": np.dtype("<i4"), "log_probs": np.dtype("<f4"), "rest": np.dtype("<f4")}
_ABOUT: Final = "about.json"
_CHUNK_NBYTES: Final = 32 << 20
_MULTIPLE: Final = 8
"""Rows are padded to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The token ids of every row, one after the other, and where each begins."""

    tokens: np.ndarray
    edges: np.ndarray
    kind: Kind
    packed: bool
    most: int
    pad: int

    @classmethod
    def of(cls, batches: Batches) -> "Rows":
        own = batches.rows
        return cls(
            tokens=own.tokens, edges=np.asarray(own.edges), kind=batches.kind, packed=own.packed, most=own.most,
            pad=batches.vocabulary.pad,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def places(self) -> np.ndarray:
        """Where the answers of each row begin, and where those of the last end."""
        return np.arange(len(self) + 1) if self.kind == "classifier" else self.edges

    @property
    def fingerprint(self) -> str:
        made = hashlib.sha256(repr((self.kind, self.packed, self.most, self.pad)).encode())
        for array in (self.tokens, self.edges):
            made.update(np.ascontiguousarray(array).tobytes())
        return made.hexdigest()

    def batch(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows `start` to `stop`, padded to the longest of them."""
        edges = self.edges[start : stop + 1]
        longest = int(np.diff(edges).max())
        if not self.packed:
            longest = min(-(-longest // _MULTIPLE) * _MULTIPLE, self.most)
        ids_BT = torch.full((stop - start, longest), self.pad, dtype=torch.int64)
        mask_BT = torch.zeros((stop - start, longest), dtype=torch.int64)
        for row in range(stop - start):
            own = self.tokens[edges[row] : edges[row + 1]]
            ids_BT[row, : len(own)] = torch.from_numpy(own.astype(np.int64))
            mask_BT[row, : len(own)] = 1
        return {"input_ids": ids_BT} | ({} if self.packed else {"attention_mask": mask_BT})

    def save(self, file: Path) -> None:
        about = json.dumps([self.kind, self.packed, self.most, self.pad])
        np.savez(file, tokens=self.tokens, edges=self.edges, about=about)

    @classmethod
    def load(cls, file: Path) -> "Rows":
        with np.load(file) as found:
            kind, packed, most, pad = json.loads(str(found["about"]))
            return cls(tokens=found["tokens"], edges=found["edges"], kind=kind, packed=packed, most=most, pad=pad)


# -- asking --------------------------------------------------------------------------------------------


def answers_of(teacher: Teacher, batch: dict[str, Tensor], *, top: int, temperature: float) -> Top:
    """The teacher's likeliest entries of each token of a batch, or row of a classifier; a few tokens at a time."""
    asked = teacher.ask(batch, chunks=True).answers
    if isinstance(asked, FromHead):
        tokens, entries = asked.hidden_NE.shape[0], asked.weight_VE.shape[0]
    else:
        assert isinstance(asked, FromLogits)
        tokens, entries = asked.logits_NV.shape
    device = batch["input_ids"].device
    found = Top(
        ids_Nk=torch.empty(tokens, top, dtype=torch.int32, device=device),
        log_probs_Nk=torch.empty(tokens, top, device=device), rest_N=torch.empty(tokens, device=device),
    )  # fmt: skip
    step, buffers = max(1, _CHUNK_NBYTES // (4 * entries)), Buffers()
    for start in blocks_to_run(range(0, tokens, step)):
        rows = slice(start, min(start + step, tokens))
        if isinstance(asked, FromHead):
            z, _ = _logits(asked.hidden_NE[rows], asked.weight_VE, asked.bias_V, asked.head, buffers)
        else:
            z = asked.logits_NV[rows]
        own = top_of(z, top=top, temperature=temperature)
        found.ids_Nk[rows].copy_(own.ids_Nk)
        found.log_probs_Nk[rows].copy_(own.log_probs_Nk)
        found.rest_N[rows].copy_(own.rest_N)
        del z, own
    return found


@dataclass(frozen=True, kw_only=True)
class Asking:
    """The pass as a task: what asking of `rows` rows at once takes."""

    rows: int
    sequence: int
    top: int
    temperature: float
    masked: bool = False
    """Whether rows are of different lengths."""

    def run(self, model: nn.Module, watch: Watch) -> None:
        """Ask of one batch."""
        with watch.phase("load"):
            hold_model(model, watch)
            teacher = Teacher(model)
            ids = torch.randint(0, vocabulary(model), (self.rows, self.sequence))
            batch = {"input_ids": ids}
            if self.masked:
                batch["attention_mask"] = torch.ones_like(ids)
                batch["attention_mask"][0, -1] = 0
        with watch.phase("ask"):
            answers_of(teacher, batch, top=self.top, temperature=self.temperature)


def record(
    teacher: Teacher,
    rows: Rows,
    directory: Path,
    *,
    about: dict[str, Any],
    at_once: int,
    top: int,
    temperature: float,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Ask of all rows and leave the answers in `directory`, which appears when it is whole.

    Args:
        about: what the answers depend on; a part that another has left is begun anew.
        at_once: rows that are asked of together.
        progress: is told how many rows are done.

    Raises:
        Interrupted: the disk is full; what is there is kept, and the same call goes on after it.
    """
    part, places = directory.with_name(directory.name + ".part"), rows.places
    if _known(part) != about:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
    strides = {name: dtype.itemsize * (1 if name == "rest" else top) for name, dtype in _DTYPES.items()}
    done = _cut(part, strides, places, at_once)
    needed = int(places[-1] - places[done]) * sum(strides.values())
    free = shutil.disk_usage(part).free
    if free < needed:
        raise Interrupted(
            f"{part}: {format_size(needed)} needed for the teacher's answers, {format_size(free)} free. Free some "
            "space, and the same command with --resume goes on; a smaller --teacher-top takes less."
        )
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context((part / name).open("ab")) for name in _DTYPES}
            for start in range(done, len(rows), at_once):
                stop = min(start + at_once, len(rows))
                for name, array in _asked(teacher, rows, start, stop, top, temperature):
                    files[name].write(array.tobytes())
                progress(stop)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        if disk_full(error, part) is None:
            raise
        done = _cut(part, strides, places, at_once)
        raise Interrupted(
            f"{part}: the disk is full ({error.strerror}) with the answers of {done} of {len(rows)} rows. They are "
            "kept: free some space, and the same command with --resume goes on."
        ) from error
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(part, directory)


def _asked(
    teacher: Teacher, rows: Rows, start: int, stop: int, top: int, temperature: float
) -> Iterator[tuple[str, np.ndarray]]:
    """(file, what is to be added to it) of some rows."""
    batch = rows.batch(start, stop)
    device = next(teacher.model.parameters()).device
    found = answers_of(teacher, {n: t.to(device) for n, t in batch.items()}, top=top, temperature=temperature)
    lengths = [1] * (stop - start) if rows.kind == "classifier" else np.diff(rows.edges[start : stop + 1]).tolist()
    width = 1 if rows.kind == "classifier" else batch["input_ids"].shape[1]
    for name, tensor in (("ids", found.ids_Nk), ("log_probs", found.log_probs_Nk), ("rest", found.rest_N)):
        array = tensor.cpu().numpy().astype(_DTYPES[name], copy=False)
        kept = [array[row * width : row * width + length] for row, length in enumerate(lengths)]
        yield name, np.concatenate(kept)


def _known(directory: Path) -> Any:
    try:
        return json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _cut(part: Path, strides: dict[str, int], places: np.ndarray, at_once: int) -> int:
    """Leave of the files what they all have, in whole passes; the rows of it."""
    sizes = {name: (part / name).stat().st_size if (part / name).exists() else 0 for name in strides}
    whole = min(size // strides[name] for name, size in sizes.items())
    done = int(np.searchsorted(places, whole, side="right")) - 1
    if done < len(places) - 1:
        done -= done % at_once
    for name, size in sizes.items():
        if size:
            os.truncate(part / name, int(places[done]) * strides[name])
    return done


# -- reading -------------------------------------------------------------------------------------------


class Kept:
    """The answers in a directory.

    Raises:
        BrokenInput: they are of something else than `about`, or cut short.
    """

    def __init__(self, directory: Path, rows: Rows, *, about: dict[str, Any], top: int) -> None:
        if _known(directory) != about:
            raise BrokenInput(f"{directory}: has the answers of another teacher, text or setting. Remove it.")
        self.top, self.places, self.kind = top, rows.places, rows.kind
        count, self._arrays = int(rows.places[-1]), {}
        for name, dtype in _DTYPES.items():
            shape = (count,) if name == "rest" else (count, top)
            file = directory / name
            if not file.exists() or file.stat().st_size != math.prod(shape) * dtype.itemsize:
                raise BrokenInput(f"{file}: is missing or cut short. Remove {directory}; the teacher is asked anew.")
            self._arrays[name] = np.memmap(file, dtype=dtype, mode="r", shape=shape)

    def of(self, rows: np.ndarray, width: int) -> dict[str, Tensor]:
        """What a batch of these rows, padded to `width` tokens, is given: padding has any answer, and no label."""
        shape = (len(rows),) if self.kind == "classifier" else (len(rows), width)
        ids = np.broadcast_to(np.arange(self.top, dtype=np.int32), (*shape, self.top)).copy()
        log_probs = np.full((*shape, self.top), -math.log(self.top + 1), np.float32)
        rest = np.full(shape, -math.log(self.top + 1), np.float32)
        for place, row in enumerate(rows):
            begin, end = int(self.places[row]), int(self.places[row + 1])
            at: Any = place if self.kind == "classifier" else (place, slice(0, end - begin))
            own = begin if self.kind == "classifier" else slice(begin, end)
            ids[at], log_probs[at], rest[at] = (self._arrays[name][own] for name in ("ids", "log_probs", "rest"))
        return {IDS: torch.from_numpy(ids), LOG_PROBS: torch.from_numpy(log_probs), REST: torch.from_numpy(rest)}


class Answered:
    """Batches with the teacher's answers in them."""

    def __init__(self, batches: Batches, kept: Kept) -> None:
        self.batches, self.kept, self.kind = batches, kept, batches.kind

    @property
    def fingerprint(self) -> str:
        return self.batches.fingerprint

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, epoch: int, index: int) -> dict[str, Tensor]:
        """See `Batches.batch`."""
        found = self.batches.batch(epoch, index)
        return found | self.kept.of(self.batches.rows_in(epoch, index), found["input_ids"].shape[1])
