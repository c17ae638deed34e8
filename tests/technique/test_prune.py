"""What stays is what sorting says, as many in each row, to the bit; what cannot be pruned is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.packed.forms import BLOCK, Sparse
from memfit.technique import prune as room
from memfit.technique.made import dense
from memfit.technique.prune import Prune, prune, pruned_rows

FORMS = [
    Sparse(), Sparse(sparsity=0.0), Sparse(sparsity=0.8), Sparse(pattern="2:4"), Sparse(pattern="blocks"),
    Sparse(pattern="blocks", sparsity=0.3),
]  # fmt: skip
CASES = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that every weight takes several."""
    monkeypatch.setattr(room, "WORKSPACE_NBYTES", 20 * 128 * 20)


def drawn(seed: int, rows: int = 48, inputs: int = 128) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator).to(torch.bfloat16)
    return weight, torch.randn(inputs, generator=generator).exp()


def plainly(weight: Tensor, form: Sparse, importance: Tensor | None) -> Tensor:
    """The same by sorting in float64, one row (or band) after the other."""
    root = torch.ones(weight.shape[1]) if importance is None else importance
    score = weight.double().abs() * root.double().sqrt()
    if form.pattern == "blocks":
        score = score.square().view(-1, 16, weight.shape[1] // 16, 16).sum((1, 3))
    mask = torch.zeros(score.shape, dtype=torch.bool)
    width = 4 if form.pattern == "2:4" else score.shape[1]
    count = 2 if form.pattern == "2:4" else form.kept(weight.shape[1])
    for row in range(score.shape[0]):
        for start in range(0, score.shape[1], width):
            some = score[row, start : start + width]
            mask[row, start + some.argsort(descending=True, stable=True)[:count]] = True
    if form.pattern == "blocks":
        mask = mask.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return torch.where(mask, weight, 0.0)


@CASES
@pytest.mark.parametrize("weighted", [False, True])
def test_what_stays_is_what_sorting_says(form: Sparse, weighted: bool) -> None:
    weight, importance = drawn(1)
    found = prune(weight.float(), form, importance=importance if weighted else None)
    assert torch.equal(dense(found), plainly(weight, form, importance if weighted else None))
    assert torch.equal(dense(Prune(form=form).apply(weight)), plainly(weight, form, None))


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from(FORMS), seed=st.integers(0, 10**6), power=st.sampled_from([-100, -30, 0, 60, 120]))
def test_every_row_keeps_as_many_to_the_bit(form: Sparse, seed: int, power: int) -> None:
    weight, importance = drawn(seed)
    weight = (weight.float() * 2.0**power).to(torch.bfloat16)
    left = dense(prune(weight, form, importance=importance))
    assert ((left == weight) | (left == 0)).all()
    count = form.kept(128) * (BLOCK[1] if form.pattern == "blocks" else 1)
    assert (left != 0).sum(1).tolist() == [count] * 48
    if form.pattern == "2:4":
        assert ((left != 0).view(48, 32, 4).sum(2) == 2).all()
    if form.pattern == "blocks":
        inside = (left != 0).view(3, 16, 8, 16).sum((1, 3))
        assert set(inside.unique().tolist()) <= {0, 256}


@CASES
def test_of_equal_ones_the_first_stay(form: Sparse) -> None:
    left = dense(prune(torch.full((32, 64), -2.0), form, importance=torch.zeros(64)))
    assert torch.equal(left, plainly(torch.full((32, 64), -2.0).to(torch.bfloat16), form, None))
    assert torch.equal(dense(prune(torch.zeros(32, 64), form)), torch.zeros(32, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("pattern", ["any", "blocks"])
def test_a_sparsity_of_0_changes_nothing(pattern: str) -> None:
    weight, importance = drawn(2)
    weight[3, 5:9] = torch.tensor([-0.0, 0.0, 1e-38, -3e38], dtype=torch.bfloat16)
    left = dense(prune(weight, Sparse(pattern=pattern, sparsity=0.0), importance=importance))  # type: ignore[arg-type]
    assert torch.equal(left.view(torch.int16), weight.view(torch.int16))


@CASES
def test_rows_that_come_in_parts_are_rows_at_once(form: Sparse) -> None:
    weight, importance = drawn(3)
    whole = prune(weight, form, importance=importance)
    step = [(0, 7), (7, 30), (30, 31), (31, 48)]
    found = list(pruned_rows(((a, weight[a:b]) for a, b in step), form, importance=importance))
    assert [start for start, _ in found] == ([0, 16] if form.pattern == "blocks" else [0, 7, 30, 31]) or (
        form.pattern == "blocks" and [start for start, _ in found] == [0, 16, 32]
    )
    for part, tensor in whole.parts.items():
        assert torch.equal(torch.cat([made.parts[part] for _, made in found]), tensor)
    assert torch.equal(torch.cat([dense(made) for _, made in found]), dense(whole))
    if form.pattern == "blocks":
        with pytest.raises(ValueError, match="the last 8 rows are no whole band of 16"):
            list(pruned_rows([(0, weight[:40])], form))


@CASES
def test_fakes_go_the_same_way(form: Sparse) -> None:
    with FakeTensorMode():
        made = prune(torch.empty(48, 128, dtype=torch.bfloat16), form, importance=torch.empty(128))
        assert {part: (t.dtype, tuple(t.shape)) for part, t in made.parts.items()} == form.parts((48, 128))
        assert dense(made).shape == (48, 128)


def test_what_cannot_be_pruned_is_refused() -> None:
    weight, importance = drawn(4)
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = weight.clone()
        broken[30, 2] = bad
        for form in FORMS:
            with pytest.raises(ValueError, match="the weight has entries that are not finite"):
                prune(broken, form)
    for bad in (torch.nan, -1.0, torch.inf):
        with pytest.raises(ValueError, match="importance must be finite and not negative"):
            prune(weight, FORMS[0], importance=torch.full((128,), bad))
    with pytest.raises(ValueError, match=r"importance has shape \(64,\); the weight has 128 inputs"):
        prune(weight, FORMS[0], importance=importance[:64])
    with pytest.raises(ValueError, match=r"takes a weight \[N, K\], got shape \(2, 24, 128\)"):
        prune(weight.view(2, 24, 128), FORMS[0])
    with pytest.raises(ValueError, match=r"sparse 50% cannot store \(48, 12\): 12 inputs are not a multiple of 8"):
        prune(weight[:, :12], FORMS[0])
    assert Prune(form=Sparse(pattern="blocks")).why_not((40, 64)) is not None
