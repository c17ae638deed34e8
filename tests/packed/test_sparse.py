"""Pruned weights as they are stored: exact to the bit, products those of the dense weight, bytes those predicted."""

import gc

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.account.dry_run import dry_run, hold_model
from memfit.account.meter import Meter
from memfit.account.watch import Watch
from memfit.errors import BrokenInput, UsageError
from memfit.packed import parts as parts_file
from memfit.packed import sparse
from memfit.packed.forms import BLOCK, Sparse
from memfit.packed.sparse import SparseWeight, pack, pack_mask, unpack_mask

FORMS = [
    Sparse(), Sparse(sparsity=0.0), Sparse(sparsity=0.9), Sparse(sparsity=0.99), Sparse(pattern="2:4"),
    Sparse(pattern="blocks"), Sparse(pattern="blocks", sparsity=0.8), Sparse(pattern="blocks", sparsity=0.0),
]  # fmt: skip
CASES = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that every product and load takes several, and none fills its last."""
    monkeypatch.setattr(sparse, "WORKSPACE_NBYTES", 1 << 15)
    monkeypatch.setattr(parts_file, "LOAD_NBYTES", 1 << 12)


def drawn(form: Sparse, shape: tuple[int, int] = (144, 160), seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Parts with any mask of the form, and the dense weight that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
    units, count = shape, form.kept(shape[1])
    if form.pattern == "blocks":
        units = (shape[0] // BLOCK[0], shape[1] // BLOCK[1])
    elif form.pattern == "2:4":
        units, count = (shape[0] * shape[1] // 4, 4), 2
    chosen = torch.rand(units, generator=generator).argsort(1)[:, :count]
    mask = torch.zeros(units, dtype=torch.bool).scatter_(1, chosen, True)
    if form.pattern == "2:4":
        mask = mask.view(shape)
    whole = mask.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1) if form.pattern == "blocks" else mask
    return pack(weight, mask, form), torch.where(whole, weight, 0.0)


def filled(form: Sparse, shape: tuple[int, int] = (144, 160), seed: int = 0) -> tuple[SparseWeight, Tensor]:
    made, dense = drawn(form, shape, seed)
    store = SparseWeight(shape, form)
    store.fill(made)
    return store, dense


@CASES
def test_rows_are_dense_again_to_the_bit(form: Sparse) -> None:
    store, dense = filled(form)
    assert torch.equal(store.dense_rows(0, 144), dense)
    assert torch.equal(store.dense_rows(32, 80), dense[32:80])
    assert torch.equal(store.dense_rows(128, 144, dtype=torch.float32), dense[128:].float())
    index = torch.tensor([[0, 143, 17], [5, 17, 90]])
    assert torch.equal(store.rows(index), dense[index])


@CASES
def test_bytes_are_those_of_the_form_and_less_than_dense(form: Sparse) -> None:
    store, _ = filled(form)
    assert store.nbytes == form.nbytes((144, 160)) == sum(buffer.nbytes for buffer in store.buffers())
    if form.sparsity >= 0.5:
        assert store.nbytes < 0.6 * 2 * 144 * 160


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["any", "2:4", "blocks"]), st.integers(1, 5), st.integers(1, 6), st.integers(0, 100),
    st.integers(0, 10**6),
)  # fmt: skip
def test_any_shape_and_sparsity_round_trips(pattern: str, bands: int, across: int, percent: int, seed: int) -> None:
    form = Sparse(pattern=pattern, sparsity=0.5 if pattern == "2:4" else min(percent, 99) / 100)  # type: ignore[arg-type]
    shape = (bands * 16 if pattern == "blocks" else bands, across * (16 if pattern == "blocks" else 8))
    assume(form.kept(shape[1]))
    store, dense = filled(form, shape, seed)
    assert torch.equal(store.dense_rows(0, shape[0]), dense)
    if pattern != "blocks":
        assert torch.equal(unpack_mask(pack_mask(dense != 0), shape[1]), dense != 0)


@CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_those_of_the_dense_weight(form: Sparse, dtype: torch.dtype) -> None:
    store, dense = filled(form)
    for rows in (1, 5, 40):
        x = torch.randn(rows, 160, generator=torch.Generator().manual_seed(rows)).to(dtype)
        due = x.double() @ dense.double().t()
        most = (0.004 if dtype == torch.bfloat16 else 1e-6) * due.norm()
        assert (store.matmul(x).double() - due).norm() <= most
        assert (store.matmul(x.view(1, rows, 160)).double() - due).norm() <= most
        part = store.matmul(x, start=32, stop=112)
        assert part.dtype == dtype and (part.double() - due[:, 32:112]).norm() <= most


@CASES
def test_gradients_pass_through(form: Sparse) -> None:
    store, dense = filled(form)
    x = torch.randn(7, 160, requires_grad=True)
    store.matmul(x).square().sum().backward()
    assert x.grad is not None
    again = x.detach().double().requires_grad_()
    (again @ dense.double().t()).square().sum().backward()
    assert again.grad is not None
    torch.testing.assert_close(x.grad.double(), again.grad, rtol=1e-4, atol=1e-3)


@CASES
def test_a_file_gives_back_what_was_written(form: Sparse, tmp_path) -> None:
    made, dense = drawn(form)
    save_file({f"a.{part}": tensor for part, tensor in made.items()}, tmp_path / "w.safetensors")
    assert {part: (t.dtype, tuple(t.shape)) for part, t in made.items()} == form.parts((144, 160))
    read = load_file(tmp_path / "w.safetensors")

    def by_rows(name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        return read[name][start:stop]

    for reader in (read.__getitem__, by_rows):
        store = SparseWeight((144, 160), form)
        store.load_from(reader, "a")
        assert torch.equal(store.dense_rows(0, 144), dense)


def test_places_that_are_none_are_refused_by_name() -> None:
    made, _ = drawn(Sparse())
    made["weight_mask"][50, 3] ^= 1
    with pytest.raises(BrokenInput, match=r"a\.weight_mask: row 50 does not tell places as sparse 50% does"):
        load(made, Sparse())
    made, _ = drawn(Sparse(pattern="2:4"))
    made["weight_mask"][140, 2] = 0b0111_0001
    with pytest.raises(BrokenInput, match=r"weight_mask: row 140 .* sparse 2:4"):
        load(made, Sparse(pattern="2:4"))
    for wrong in (10, -1):
        made, _ = drawn(Sparse(pattern="blocks"))
        made["weight_index"][3, 4] = wrong
        with pytest.raises(BrokenInput, match=r"weight_index: row 3 "):
            load(made, Sparse(pattern="blocks"))
    made, _ = drawn(Sparse(pattern="blocks"))
    made["weight_index"][8] = made["weight_index"][8].flip(0)
    with pytest.raises(BrokenInput, match=r"weight_index: row 8 "):
        load(made, Sparse(pattern="blocks"))


def test_parts_of_another_kind_are_refused_by_name() -> None:
    made, _ = drawn(Sparse())
    with pytest.raises(BrokenInput, match=r"a\.weight_kept: torch.float32 .* torch.bfloat16"):
        load(made | {"weight_kept": made["weight_kept"].float()}, Sparse())
    with pytest.raises(BrokenInput, match=r"a\.weight_mask: .*\[.*, 19\] where .*, 20\] was expected"):
        load(made | {"weight_mask": made["weight_mask"][:, :19]}, Sparse())
    with pytest.raises(UsageError, match=r"\[8, 20\] cannot be sparse 50%: 20 inputs are not a multiple of 8"):
        SparseWeight((8, 20), Sparse())
    with pytest.raises(UsageError, match=r"40 x 64 is not made of blocks of 16 x 16"):
        SparseWeight((40, 64), Sparse(pattern="blocks"))


def load(made: dict[str, Tensor], form: Sparse) -> None:
    SparseWeight((144, 160), form).load_from(lambda name: made[name.removeprefix("a.")], "a")


class Holder(nn.Module):
    """A sparse weight, and what can be done with it."""

    def __init__(self, form: Sparse, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.store, self.dtype = SparseWeight(shape, form), dtype
        # The shape is all that bytes depend on; on fakes there is no more.
        self.store._make_buffers(torch.device("cpu"))
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        if not fake:
            self.store.fill(drawn(form, shape)[0])


class Products:
    """Decode, prompt, look-up and loading."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def run(self, model: nn.Module, watch: Watch) -> None:
        assert isinstance(model, Holder)
        store = model.store
        for rows in (1, 3, 64):
            with watch.phase(f"{rows}"):
                y = store.matmul(torch.zeros(rows, self.shape[1], dtype=model.dtype))
                del y
        with watch.phase("rows"):
            y = store.rows(torch.zeros(9, dtype=torch.int64))
            del y
        with watch.phase("back"), torch.enable_grad():
            x = torch.zeros(5, self.shape[1], dtype=model.dtype, requires_grad=True)
            store.matmul(x).backward(torch.zeros(5, self.shape[0], dtype=model.dtype))
            x.grad = None
            del x
        with watch.phase("again"):
            parts = {name: buffer for name, buffer in store.named_buffers()}
            other = SparseWeight(self.shape, store.scheme)
            other.load_from(lambda name: parts[name.rpartition("weight_")[2]], "w")
            del other


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (Sparse(), torch.bfloat16), (Sparse(sparsity=0.99), torch.float32), (Sparse(pattern="2:4"), torch.bfloat16),
        (Sparse(pattern="blocks"), torch.bfloat16), (Sparse(pattern="blocks", sparsity=0.8), torch.float32),
    ],
)  # fmt: skip
def test_a_dry_run_tells_the_bytes_that_are_allocated(form: Sparse, dtype: torch.dtype) -> None:
    shape = (304, 352)

    def make() -> nn.Module:
        return Holder(form, shape, dtype)

    told = dry_run(make, Products(shape))
    gc.collect()
    meter = Meter()
    model = make()
    with meter.phase("load"):
        model.store.fill(drawn(form, shape)[0])
        gc.collect()
    hold_model(model, meter)
    Products(shape).run(model, meter)
    measured = meter.account()
    held = measured.phase("load").end_nbytes
    for one in told.phases:
        if one.name == "load":
            continue
        other = measured.phase(one.name)
        assert one.peak_nbytes - form.nbytes(shape) == other.peak_nbytes - held, one.name


@CASES
def test_fakes_go_the_same_way(form: Sparse) -> None:
    with FakeTensorMode():
        made = {part: torch.empty(size, dtype=dtype) for part, (dtype, size) in form.parts((144, 160)).items()}
        store = SparseWeight((144, 160), form)
        store.load_from(lambda name: made[name[2:]], "a")
        assert store.matmul(torch.empty(2, 5, 160, dtype=torch.bfloat16)).shape == (2, 5, 144)
        assert store.rows(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 160)
        assert store.dense_rows(16, 64).shape == (48, 160)


@pytest.mark.parametrize(
    ("form", "inputs"), [(Sparse(sparsity=0.999), 256), (Sparse(sparsity=0.9, pattern="blocks"), 64)]
)
def test_what_would_keep_nothing_is_told_beforehand(form: Sparse, inputs: int) -> None:
    assert "keeps none" in str(form.why_not((64, inputs)))
    assert form.why_not((64, 16 * inputs)) is None


@pytest.mark.parametrize("sparsity", ["half", None, -0.1, 1.0, float("nan")])
def test_a_sparsity_that_is_no_share_is_told(sparsity) -> None:
    with pytest.raises(ValueError, match="sparsity must be 0 or more and less than 1"):
        Sparse(sparsity=sparsity)
