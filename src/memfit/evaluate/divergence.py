"""KL divergence of a fitted model from its original, without both in memory: one writes its logits, the
other reads.

Legend: W windows, B windows at once, T time, P positions predicted, C positions of a chunk, V vocabulary.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from memfit.errors import MemfitError, UsageError
from memfit.evaluate.logit_file import (
    DTYPES,
    HEADER_NBYTES,
    Header,
    bytes_of,
    check_room,
    header_bytes,
    read_header,
    read_into,
    write_bytes,
)
from memfit.evaluate.outputs import (
    MakeCache,
    embeddings,
    kind_of,
    logits_in_chunks,
    positions,
    targets,
)
from memfit.evaluate.quality import Quality, mean_interval
from memfit.packed.fake import is_fake

# With one window the spread is taken over pieces of it.
_PIECES: Final = 8


def record_logits(model: nn.Module, windows: Tensor, path: str | Path, *, batch: int = 1) -> None:
    """Write the logits of `model` on `windows` [W, T] to the file `path`, for `compare_logits`.

    Raw, in the dtype of the model's logits, after a header of 4 KiB; a few positions at a time. The file
    takes W · P · V · 2 bytes for a bf16 model. It is removed if the run does not get to its end.

    Raises:
        UsageError: the windows are no [W, T] of token ids.
        MemfitError: the disk has too little room.
    """
    path = Path(path)
    _check_windows(windows)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        header: Header | None = None
        with torch.no_grad():
            for piece in _outputs(model, windows, batch, None):
                if header is None:
                    header = _header_for(model, windows, batch, piece)
                    if not is_fake(piece):
                        check_room(path, header)
                        write_bytes(handle, header_bytes(header))
                if not is_fake(piece):
                    write_bytes(handle, bytes_of(piece.contiguous()))
                del piece
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise MemfitError(f"{path}: the logits cannot be written ({error.strerror}).") from error
        raise
    finally:
        os.close(handle)


def compare_logits(
    path: str | Path, model: nn.Module, windows: Tensor, *, make_cache: MakeCache | None = None
) -> Quality:
    """The quality of `model` beside the one that wrote `path` with `record_logits`, on the same windows.

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), p the original's softmax and q this model's, in float32 with
    sums in float64, averaged over positions. `make_cache`: makes the empty KV cache that `model` runs with,
    so that a packed cache shows in the figure; None: no cache. The file stays; remove it when no more models
    are to be compared.

    Raises:
        UsageError: other windows than recorded, or a model of another vocabulary or kind.
        BrokenInput: the file is not what `record_logits` writes, or is cut short.
        MemfitError: a model's logits are not finite.
    """
    path = Path(path)
    _check_windows(windows)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UsageError(
            f"{path}: no recorded logits ({error.strerror}). Run record_logits first."
        ) from error
    try:
        header = read_header(path, handle)
        _check_same(path, header, model, windows)
        with torch.no_grad():
            if header.kind == "encoder":
                return _compare_embeddings(path, handle, header, model, windows)
            return _compare_positions(path, handle, header, model, windows, make_cache)
    finally:
        os.close(handle)


def compare_models(
    load_reference: Callable[[], nn.Module],
    load_fitted: Callable[[], nn.Module],
    windows: Tensor,
    *,
    batch: int = 1,
    make_cache: Callable[[nn.Module], MakeCache | None] | None = None,
    directory: Path | None = None,
) -> Quality:
    """The quality of one model beside another, loaded one after the other; the logits go through a temporary
    file.

    `make_cache`: from the fitted model, the maker of its caches. `directory`: where the file lies meanwhile.
    """
    with recording(directory) as path:
        record_logits(load_reference(), windows, path, batch=batch)
        fitted = load_fitted()
        return compare_logits(path, fitted, windows, make_cache=make_cache(fitted) if make_cache else None)


@contextmanager
def recording(directory: Path | None = None) -> Iterator[Path]:
    """A path for recorded logits that is removed at the end of the block, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="memfit-logits-", dir=directory) as folder:
        yield Path(folder) / "logits"


def divergence(reference_NV: Tensor, fitted_NV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL(reference ‖ fitted) [N] in nats, both log-normalisers [N], float64, and whether the tops agree [N].

    Of logits [N, V]. With a = x − max x: KL = Σ eᵃ(a − b) / Σ eᵃ − log Σ eᵃ + log Σ eᵇ. Equal logits give
    exactly 0.
    """
    # Copies, also of float32: they are worked on in place. max of float32 takes a quarter of that of bf16.
    a, b = reference_NV.to(torch.float32, copy=True), fitted_NV.to(torch.float32, copy=True)
    top_a, first_a = a.max(-1, keepdim=True)
    top_b, first_b = b.max(-1, keepdim=True)
    a -= top_a
    b -= top_b
    e = b.exp()
    norm_b = _sum(e)
    torch.exp(a, out=e)
    norm_a = _sum(e)
    a -= b
    del b
    a *= e
    del e
    kl = _sum(a) / norm_a - norm_a.log() + norm_b.log()
    norm_a, norm_b = norm_a.log() + top_a[:, 0].double(), norm_b.log() + top_b[:, 0].double()
    return kl, norm_a, norm_b, (first_a == first_b)[:, 0]


def _sum(x_NV: Tensor) -> Tensor:
    """Σ over V, float64 [N]: blocks of 256 in float32 first; a float64 copy of all is twice the logits."""
    whole = x_NV.shape[-1] // 256 * 256
    blocks = torch.unflatten(x_NV[:, :whole], -1, (-1, 256)).sum(-1)
    rest = x_NV[:, whole:].sum(-1, dtype=torch.float64)
    return rest + blocks.sum(-1, dtype=torch.float64)


def _compare_positions(
    path: Path, handle: int, header: Header, model: nn.Module, windows: Tensor, make_cache: MakeCache | None
) -> Quality:
    kl_WP = torch.zeros(header.windows, header.positions, dtype=torch.float64)
    losses = torch.zeros(2, dtype=torch.float64)
    same = torch.zeros((), dtype=torch.int64)
    buffer = torch.empty(0, dtype=DTYPES[header.dtype])
    offset, row, start = HEADER_NBYTES, 0, 0
    for fitted_BCV in _outputs(model, windows, header.batch, make_cache):
        b, c, v = fitted_BCV.shape
        if v != header.width:
            raise UsageError(f"{path}: recorded with {header.width} logits a token, this model gives {v}.")
        if buffer.numel() < b * c * v:
            buffer = torch.empty(b * c * v, dtype=DTYPES[header.dtype])
        reference_NV = buffer[: b * c * v].view(b * c, v)
        offset = read_into(path, handle, offset, reference_NV)
        fitted_NV = fitted_BCV.reshape(b * c, v)
        del fitted_BCV
        kl_N, norm_a_N, norm_b_N, same_N = divergence(reference_NV, fitted_NV)
        kl_WP[row : row + b, start : start + c] = kl_N.view(b, c)
        same += same_N.sum()
        next_BP = targets(header.kind, windows[row : row + b])
        if next_BP is not None:
            next_N1 = next_BP[:, start : start + c].reshape(-1, 1)
            losses[0] += (norm_a_N - reference_NV.gather(-1, next_N1)[:, 0].double()).sum()
            losses[1] += (norm_b_N - fitted_NV.gather(-1, next_N1)[:, 0].double()).sum()
        start += c
        if start == header.positions:
            row, start = row + b, 0
    return _quality(header, kl_WP, losses, same)


def _quality(header: Header, kl_WP: Tensor, losses: Tensor, same: Tensor) -> Quality:
    tokens = header.windows * header.positions
    if is_fake(kl_WP) or is_fake(losses):
        return Quality(
            kl=math.nan,
            kl_interval=None,
            perplexity=None,
            perplexity_reference=None,
            top1=None,
            tokens=tokens,
        )
    if not bool(torch.isfinite(kl_WP).all()):
        bad = int((~torch.isfinite(kl_WP)).any(1).nonzero()[0])
        raise MemfitError(
            f"the logits of window {bad} are not finite in one of the models; no quality can be given."
        )
    predicts = header.kind in ("causal", "seq2seq")
    means = [math.exp(min(float(loss) / tokens, 700.0)) for loss in losses]
    clusters = (
        kl_WP if header.windows > 1 else kl_WP[0, : header.positions // _PIECES * _PIECES].view(_PIECES, -1)
    )
    if clusters.numel() == 0:
        clusters = kl_WP
    low, high = mean_interval(clusters.mean(1).tolist())
    return Quality(
        kl=float(kl_WP.mean()),
        # KL is never negative, so neither is what it may be.
        kl_interval=(max(low, 0.0), max(high, 0.0)),
        perplexity=means[1] if predicts else None,
        perplexity_reference=means[0] if predicts else None,
        top1=float(same) / tokens,
        tokens=tokens,
        windows=header.windows,
        interval="Student t over windows, 95 %"
        if header.windows > 1
        else "Student t over pieces of one window, 95 %",
    )


def _compare_embeddings(
    path: Path, handle: int, header: Header, model: nn.Module, windows: Tensor
) -> Quality:
    reference_WD = torch.empty(header.windows, header.width, dtype=DTYPES[header.dtype])
    read_into(path, handle, HEADER_NBYTES, reference_WD)
    fitted_WD = torch.cat(list(_outputs(model, windows, header.batch, None)))
    if fitted_WD.shape != reference_WD.shape:
        raise UsageError(
            f"{path}: recorded with width {header.width}, this model gives {fitted_WD.shape[-1]}."
        )
    cosines = torch.nn.functional.cosine_similarity(reference_WD.double(), fitted_WD.double(), dim=-1).clamp(
        -1, 1
    )
    if is_fake(cosines):
        cosine, interval = math.nan, None
    else:
        low, high = mean_interval(cosines.tolist())
        cosine, interval = float(cosines.mean()), (max(low, -1.0), min(high, 1.0))
    return Quality(
        kl=None,
        kl_interval=None,
        perplexity=None,
        perplexity_reference=None,
        top1=None,
        tokens=header.windows * header.length,
        windows=header.windows,
        cosine=cosine,
        cosine_interval=interval,
    )


def _outputs(model: nn.Module, windows: Tensor, batch: int, make_cache: MakeCache | None) -> Iterator[Tensor]:
    """Logits [B, C, V], or embeddings [B, D], of all windows in order."""
    encoder = kind_of(model) == "encoder"
    for start in range(0, windows.shape[0], batch):
        ids_BT = windows[start : start + batch]
        if encoder:
            yield embeddings(model, ids_BT).cpu()
        else:
            for piece in logits_in_chunks(model, ids_BT, make_cache=make_cache):
                yield piece.cpu()


def _check_windows(windows: Tensor) -> None:
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(
            f"windows must be token ids int64 [W, T], T at least 2; got {windows.dtype} {list(windows.shape)}"
        )


def _tokens_sha256(windows: Tensor) -> str:
    return "" if is_fake(windows) else hashlib.sha256(bytes_of(windows.contiguous())).hexdigest()


def _header_for(model: nn.Module, windows: Tensor, batch: int, piece: Tensor) -> Header:
    kind, length = kind_of(model), windows.shape[1]
    return Header(
        kind=kind,
        dtype=str(piece.dtype),
        windows=windows.shape[0],
        length=length,
        positions=positions(kind, length),
        width=piece.shape[-1],
        batch=batch,
        tokens_sha256=_tokens_sha256(windows),
    )


def _check_same(path: Path, header: Header, model: nn.Module, windows: Tensor) -> None:
    shape = (header.windows, header.length)
    if shape != tuple(windows.shape) or (
        not is_fake(windows) and header.tokens_sha256 != _tokens_sha256(windows)
    ):
        raise UsageError(
            f"{path}: recorded on other windows than these. Give the same text and the same cut."
        )
    if (kind := kind_of(model)) != header.kind:
        raise UsageError(f"{path}: recorded from a {header.kind} model, this one is {kind}.")
