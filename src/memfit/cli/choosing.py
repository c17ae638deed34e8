"""From options to what the search may choose from."""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import typer

from memfit.errors import UsageError
from memfit.steps import ALGORITHMS
from memfit.units import share_of

from .app import Technique, said


def bits_of(values: str, bits: str) -> str:
    """The width of values that have but one; else as it was given."""
    from memfit.packed.scheme import BITS_OF

    due = BITS_OF.get(values)
    if due is not None and bits not in ("", str(due)):
        raise UsageError(f"--bits {bits}: {values} has {due} bits. Leave --bits out, or take --values int or codebook.")
    return bits if due is None else str(due)


def narrow_by(blocks: str | None, heads: str | None, channels: str | None, experts: str | None) -> Any:
    """How much of the model is to stay; None: all of it."""
    import memfit

    sizes = {"blocks": blocks, "heads": heads, "channels": channels, "experts": experts}
    given: Any = {what: int(size) if size.isdecimal() else size for what, size in sizes.items() if size is not None}
    return memfit.Narrow(**given) if given else None


def narrows_alone(context: typer.Context, technique: Technique | None, narrow: Any) -> bool:
    """Whether the model is to be narrower and no more: with a budget, a plan is searched for what stays."""
    if technique is not Technique.narrow:
        return False
    if narrow is None:
        raise UsageError("--technique narrow: say how much stays, with --blocks, --heads, --channels or --experts.")
    if said(context, "budget"):
        return False
    for name in ("bits", "groups", "values", "vector", "asymmetric", "activations"):
        if said(context, name):
            raise UsageError(
                f"--{name} beside --technique narrow: what stays is kept in 16 bits. Leave one out, or give a --budget."
            )
    return True


def require_one_setting(bits: str, groups: str | None, kv_bits: str, values: str) -> None:
    """A technique for everything has one width, one group size, one cache and one kind of values."""
    for option, given in (
        ("--bits", bits), ("--group", groups or "one"), ("--kv-bits", kv_bits), ("--values", values)
    ):  # fmt: skip
        if not given or "," in given:
            raise UsageError(f"--technique quantize has one setting: give one {option}, got {given or 'none'}.")
    if bits == "16":
        raise UsageError("--bits 16 beside --technique quantize: nothing would change. Take 8 to 2 bits.")


def techniques_in(allow: str) -> tuple[str, ...]:
    """What `--allow` names.

    Raises:
        UsageError: one of them is no technique.
    """
    from memfit.plan.allowed import require_techniques

    names = tuple(name.strip() for name in allow.split(","))
    require_techniques(names)
    return names


def require_algorithm(name: str | None, techniques: Iterable[str]) -> None:
    """Refuse an algorithm that none of the techniques has."""
    techniques = tuple(techniques)
    known = [word for technique in techniques for word in ALGORITHMS[technique]]
    if name is not None and name not in known:
        raise UsageError(f"--algorithm {name}: {' and '.join(techniques)} has {', '.join(known)}. Take one of these.")


def setting_of(technique: str, sparsity: str | None, pattern: str | None, rank: str | None) -> dict[str, Any]:
    """What `Allowed` is told of a technique that is no quantization, in one setting."""
    from memfit.packed.forms import Sparse

    if technique == "prune":
        if sparsity is None and pattern is None:
            raise UsageError(
                "--technique prune has one setting: give --sparsity, as 0.5, or --pattern, 2:4 or blocks (half goes)."
            )
        try:
            form = Sparse(pattern=pattern or "any", sparsity=0.5 if sparsity is None else _share(sparsity))  # type: ignore[arg-type]
        except ValueError as error:
            raise UsageError(f"--technique prune: {error}.") from error
        if form.sparsity <= form.places:
            raise UsageError(
                f"--sparsity {sparsity}: saying where what is left lies takes {form.places:.2%} of the bytes, so a "
                "smaller share that goes makes the model no smaller. Let more go, as 0.5."
            )
        return {"sparse": (form,)}
    if rank is None:
        how = "give --rank, a number, or a share of the bytes as 80%"
        raise UsageError(f"--technique {technique} has one setting: {how}.")
    return {"ranks": (_rank(rank),), "residual_ranks": ()}


def _share(text: str) -> float:
    try:
        return float(text) if (share := share_of(text)) is None else share
    except ValueError as error:
        raise ValueError(f"--sparsity {text!r}: write the share that goes, as 0.5 or 50%") from error


def _rank(text: str) -> int | float:
    how = f"--rank {text!r}: write a number from 1, as 64, or a share of the bytes between 0% and 100%, as 80% or 0.8."
    try:
        found = int(text) if text.isdecimal() else float(text) if (share := share_of(text)) is None else share
    except ValueError as error:
        raise UsageError(how) from error
    if not (0 < found < 1 if isinstance(found, float) else found >= 1):
        raise UsageError(how)
    return found


def allowed_by(
    context: typer.Context, bits: str, groups: str | None, kv_bits: str, keep: list[str] | None, asymmetric: bool,
    values: str, vector: int, activations: int, smooth: bool, *, allow: str = "quantize", uniform: bool = False,
    setting: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """What the options let the search choose from."""

    import memfit
    from memfit.packed.scheme import BITS_OF, MX_GROUP, Values

    if said(context, "smooth") and activations == 16:
        raise UsageError("--smooth and --no-smooth say something of activations of 8 bits: add --activations 8.")

    if said(context, "bits"):
        bits = bits_of(values, bits)
    widths = _numbers(bits, "--bits", (16, 8, 6, 5, 4, 3, 2))
    kinds: Any = tuple(values.split(","))
    if unknown := [kind for kind in kinds if kind not in get_args(Values)]:
        raise UsageError(f"--values: {unknown[0]!r} is none of {', '.join(get_args(Values))}.")
    if asymmetric and kinds != ("int",):
        raise UsageError(f"--asymmetric beside --values {values}: only integers have zero points. Leave one out.")
    if said(context, "vector") and "codebook" not in kinds:
        raise UsageError(
            f"--vector {vector} says something of codebooks, and this is --values {values}. Add --values codebook, or "
            "leave --vector out."
        )
    sizes = None
    if groups is not None:
        chosen = _numbers(groups, "--groups" if "," in groups else "--group", (128, 64, 32))
        if "mxfp4" in kinds and chosen != (MX_GROUP,):
            raise UsageError(f"--group {groups}: mxfp4 has groups of {MX_GROUP}. Leave --group out, or take nf4.")
        every = {*widths, *(BITS_OF[kind] for kind in kinds if kind in BITS_OF)}
        sizes = {width: (None,) if width == 8 and not uniform else chosen for width in every if width != 16}
    return memfit.Allowed(
        techniques=techniques_in(allow),
        **dict(setting or {}),
        bits=tuple(width for width in widths if width != 16),
        groups=sizes,
        symmetric=not asymmetric,
        values=kinds,
        vector=vector,
        kv_bits=_numbers(kv_bits, "--kv-bits", (16, 8, 4, 2)),
        activations=activations,
        smooth=smooth,
        keep=tuple(keep or ()),
    )


def _numbers(text: str, option: str, known: tuple[int, ...]) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: write numbers with commas between, as 8,4.") from error
    if unknown := [number for number in found if number not in known]:
        raise UsageError(f"{option}: {unknown[0]} is none of {', '.join(map(str, known))}.")
    return found
