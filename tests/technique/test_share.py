"""What is shared is the best there is where that is known, exact where it can be, and costs what is told."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.packed.forms import Common, LowRank, Shared, Whole
from memfit.packed.scheme import Scheme
from memfit.technique.gptq import factor
from memfit.technique.low_rank import factorize
from memfit.technique.made import Made, dense
from memfit.technique.quantize import Quantized
from memfit.technique.share import Member, forms, nbytes_of, share, shared_error, shared_errors, tied
from memfit.technique.spectrum import Metric

COMMON: tuple[Common, ...] = ("right", "left", "weight")


def draw(seed: int, *shapes: tuple[int, int], kind: str = "scaled", one: bool = False) -> dict[str, Member]:
    """Members with what their errors count; `one`: they read the same inputs."""
    random = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    found = {}
    metric = None
    for n, shape in enumerate(shapes):
        x = make(2 * shape[1], shape[1]) @ make(shape[1], shape[1]) * make(shape[1]).exp() / shape[1] ** 0.5
        hessian = x.t() @ x / x.shape[0]
        fresh = Metric(importance_K=hessian.diagonal()) if kind == "scaled" else Metric(factor=factor(hessian))
        metric = fresh if metric is None or not one else metric
        found[f"blocks.{n}.up"] = Member(weight=make(*shape).bfloat16(), metric=metric, rows=make(shape[0]).exp())
    return found


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("base", [None, Scheme(bits=4, group=32)], ids=["bf16", "int4"])
def test_what_is_made_is_what_its_forms_tell(common: Common, rank: int, base: Scheme | None) -> None:
    if common != "weight" and (rank == 0 or base is not None):
        with pytest.raises(ValueError, match=r"rank must be at least 1|integers go with"):
            forms(["a", "b"], common, rank, base=base)
        return
    members = draw(0, (24, 32), (24, 32), (24, 32))
    made = share(members, common, rank, base=base)
    wanted = forms(list(members), common, rank, base=base)
    assert list(made) == list(members)
    total = 0
    for name, one in made.items():
        form = wanted[name]
        if isinstance(one, Quantized):
            assert form == base == one.scheme
            total += base.nbytes((24, 32))
            continue
        assert one.form == form
        due = form.parts((24, 32)) | (Whole().parts((24, 32)) if getattr(form, "base", None) == Whole() else {})
        assert {part: (t.dtype, tuple(t.shape)) for part, t in one.parts.items()} == due
        assert all(t.is_contiguous() for t in one.parts.values())
        total += sum(t.nbytes for t in one.parts.values())
        total += one.base.scheme.nbytes((24, 32)) if one.base is not None else 0
    assert total == nbytes_of(dict.fromkeys(members, (24, 32)), common, rank, base=base)


def test_a_basis_of_layers_that_read_the_same_is_that_of_all_their_rows() -> None:
    members = draw(1, (24, 32), (12, 32), kind="whitened", one=True)
    made = share(members, "right", 6)
    first = next(iter(members.values()))
    together = torch.cat([member.weight for member in members.values()])
    rows = torch.cat([member.rows for member in members.values()])  # type: ignore[misc]
    whole = factorize(together, LowRank(rank=6), factor=first.metric.factor, rows_N=rows)
    owner = next(iter(made.values()))
    found = torch.cat([dense(one, owner) for one in made.values() if isinstance(one, Made)])
    torch.testing.assert_close(found, dense(whole), rtol=0.03, atol=0.03)
    told = shared_errors(members, "right")
    assert told.shape == (33,)
    assert shared_error(members, made) == pytest.approx(float(told[6]), rel=1e-3)


def test_a_basis_of_layers_that_write_to_one_place_is_that_of_all_their_columns() -> None:
    members = draw(2, (24, 32), (24, 48), kind="whitened")
    rows = torch.ones(24)
    members = {name: Member(weight=m.weight, metric=m.metric, rows=rows) for name, m in members.items()}
    told = shared_errors(members, "left")
    y = torch.cat([m.metric.times(m.weight.float()) for m in members.values()], dim=1)
    left_over = torch.linalg.svdvals(y.double()).square().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(told[:-1], left_over, rtol=1e-4, atol=1e-3)
    assert shared_error(members, share(members, "left", 7)) == pytest.approx(float(told[7]), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(common=st.sampled_from(COMMON), seed=st.integers(0, 10**6), rank=st.integers(1, 15), one=st.booleans(),
       kind=st.sampled_from(["scaled", "whitened"]))  # fmt: skip
def test_sharing_errs_by_no_more_than_is_told(common: Common, seed: int, rank: int, one: bool, kind: str) -> None:
    members = draw(seed, (16, 32), (16, 32), kind=kind, one=one)
    told = shared_errors(members, common)
    found = shared_error(members, share(members, common, rank))
    if common == "right" and not one:
        return  # the mean of what inputs count is another measure
    rows = [member.rows for member in members.values()]
    if common == "left":  # of which the mean counts
        mean = torch.stack(rows).mean(dim=0)  # type: ignore[arg-type]
        members = {n: Member(weight=m.weight, metric=m.metric, rows=mean) for n, m in members.items()}
        found = shared_error(members, share(members, common, rank))
    assert found <= float(told[rank]) * 1.002 + 2e-4 * float(told[0])


@settings(max_examples=20, deadline=None)
@given(common=st.sampled_from(COMMON), seed=st.integers(0, 10**6), kind=st.sampled_from(["scaled", "whitened"]))
def test_full_rank_gives_every_member_back(common: Common, seed: int, kind: str) -> None:
    members = draw(seed, (16, 32), (16, 32), kind=kind)
    full = 32 if common == "right" else 16
    told = shared_errors(members, common)
    assert float(told[-1]) == 0.0
    if common == "right":  # a basis of all inputs has more rows than a member has outputs
        members = draw(seed, (40, 32), (33, 32), kind=kind)
    made = share(members, common, full)
    owner = next(iter(made.values()))
    for name, one in made.items():
        assert isinstance(one, Made)
        off = dense(one, owner).double() - members[name].weight.double()
        # Factors are rounded to bf16, at most two of them, and so is the sum.
        assert float(off.norm() / members[name].weight.double().norm()) < 2**-7


def test_differences_of_full_rank_are_exact() -> None:
    """To the bit, where bf16 holds the mean and the factors of the differences."""
    weight = torch.randint(-8, 9, (6, 6), generator=torch.Generator().manual_seed(0)).float()
    other = weight + torch.diag(2.0 ** torch.arange(1, 7))
    members = {name: Member.of(one.bfloat16()) for name, one in (("a", weight), ("b", other))}
    made = share(members, "weight", 6)
    for name, one in made.items():
        assert isinstance(one, Made) and torch.equal(dense(one, made["a"]), members[name].weight)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 4), rank=st.integers(0, 3))
def test_equal_blocks_share_one_weight_to_the_bit(seed: int, count: int, rank: int) -> None:
    one = next(iter(draw(seed, (16, 32)).values()))
    members = {f"{n}": one for n in range(count)}
    assert float(shared_errors(members, "weight")[0]) == 0.0
    made = share(members, "weight", rank)
    for stored in made.values():
        assert isinstance(stored, Made) and torch.equal(dense(stored, made["0"]), one.weight)


def test_a_common_weight_of_integers_is_made_up_for_by_the_differences() -> None:
    members = draw(3, (32, 64), (32, 64))
    base = Scheme(bits=3, group=32)
    errors = [shared_error(members, share(members, "weight", rank, base=base)) for rank in (0, 8, 32)]
    assert errors[0] > 1.5 * errors[1] > 50 * errors[2]


def test_turns_make_differences_smaller_than_those_from_the_mean() -> None:
    members = draw(4, (24, 32), (24, 32), (24, 32))
    told = shared_errors(members, "weight")
    assert shared_error(members, share(members, "weight", 4)) < 0.97 * float(told[4])


@pytest.mark.parametrize("rank", [0, 4, 16])
def test_a_head_is_tied_to_a_table_block_by_block(rank: int) -> None:
    random = torch.Generator().manual_seed(0)
    table = torch.randn(96, 16, generator=random).bfloat16()
    head = (table.float() + 0.1 * torch.randn(96, 16, generator=random)).bfloat16()
    form, right, lefts = tied(lambda: table.split(40), lambda: head.split(40), (96, 16), "embed", rank)
    assert form == Shared(owner="embed", common="weight", rank=rank)
    if rank == 0:
        assert right is None and list(lefts) == []
        return
    assert right is not None
    parts = {"weight_left": torch.cat(list(lefts)), "weight_right": right}
    owner = Made(form=Whole(), shape=(96, 16), parts={"weight_whole": table})
    found = dense(Made(form=form, shape=(96, 16), parts=parts), owner)
    off, was = (head - found).float().norm(), (head - table).float().norm()
    assert off < 0.02 * was if rank == 16 else 0.5 * was < off < 0.95 * was


def test_a_dry_run_takes_the_same_shapes() -> None:
    with FakeTensorMode():
        weight, importance, rows = torch.empty(32, 64, dtype=torch.bfloat16), torch.empty(64), torch.empty(32)
        members = {name: Member.of(weight, importance_K=importance, rows_N=rows) for name in "ab"}
        for common, rank in itertools.product(COMMON, (0, 8)):
            if common != "weight" and not rank:
                continue
            made = share(members, common, rank)
            assert all(isinstance(one, Made) and one.shape == (32, 64) for one in made.values())


def test_what_cannot_be_shared_is_told() -> None:
    def members(*shapes: tuple[int, ...]) -> dict[str, Member]:
        return {f"m{n}": Member.of(torch.ones(shape)) for n, shape in enumerate(shapes)}

    with pytest.raises(ValueError, match="two weights or more, got m0"):
        share(members((4, 8)), "right", 1)
    for common, shape in (("right", (4, 6)), ("left", (6, 8)), ("weight", (6, 8))):
        told = rf"m1 is \[{shape[0]}, {shape[1]}\] and m0 \[4, 8\].* no {common} in common"
        with pytest.raises(ValueError, match=told):
            share(members((4, 8), shape), common, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"m1 is \[2, 4, 8\]"):
        share(members((4, 8), (2, 4, 8)), "weight", 1)
    made = share(members((4, 8), (4, 8)), "right", 2)
    with pytest.raises(ValueError, match="it was not given"):
        dense(made["m1"])  # type: ignore[arg-type]
