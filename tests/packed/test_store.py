import itertools
import weakref

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memfit.errors import BrokenInput, UsageError
from memfit.packed import store as store_file
from memfit.packed.bits import pack_values, pack_zeros
from memfit.packed.kernel import choose_kernel, runtime_nbytes
from memfit.packed.scheme import Scheme
from memfit.packed.store import PackedWeight

SCHEMES = [
    Scheme(bits=bits, group=group, symmetric=symmetric)
    for bits, group, symmetric in itertools.product((8, 6, 5, 4, 3, 2), (None, 32), (True, False))
] + [Scheme(bits=4, group=64), Scheme(bits=4, group=128), Scheme(bits=3, group=128), Scheme(bits=7, group=64)]
SHAPES = [(192, 256), (40, 128)]
CASES = pytest.mark.parametrize(
    ("scheme", "shape"), list(itertools.product(SCHEMES, SHAPES)), ids=lambda v: getattr(v, "name", str(v))
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that every product and load takes several, and none fills its last."""
    monkeypatch.setattr(store_file, "WORKSPACE_NBYTES", 65536)
    monkeypatch.setattr(store_file, "SPREAD_NBYTES", 65536 // 4)


@pytest.fixture
def make(round_to, expand):
    def make(scheme, shape, *, kernel=None, seed=0):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        rounded = round_to(weight, scheme)
        return PackedWeight.from_quantized(*rounded, scheme, kernel=kernel), rounded, expand(rounded)

    return make


def dequantize_like_compressed_tensors(rounded, scheme):
    q, scale, zero = rounded
    args = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group is None else "group",
        group_size=scheme.group,
    )
    return dequantize(x_q=q, scale=scale, zero_point=zero, args=args)


@CASES
def test_dense_rows_are_those_of_compressed_tensors_bit_for_bit(make, scheme, shape):
    store, rounded, _ = make(scheme, shape)
    expected = dequantize_like_compressed_tensors(rounded, scheme)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(store.dense_rows(0, shape[0]), expected)
    assert torch.equal(store.dense_rows(3, 37), expected[3:37])


@CASES
def test_embedding_rows_are_the_dense_rows(make, scheme, shape):
    store, _, _ = make(scheme, shape)
    index = torch.randint(0, shape[0], (2, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(store.rows(index), store.dense_rows(0, shape[0])[index])


@CASES
def test_products_are_those_of_float64_within_what_bf16_rounds(make, scheme, shape):
    store, _, weight = make(scheme, shape)
    for rows in (1, 5, 40):
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
        expected = x.double() @ weight.T
        error = (store.matmul(x).double() - expected).norm() / expected.norm()
        # The result is rounded to bf16 (2^-9 at most, 0.0017 in the mean square), of two terms at most;
        # many rows also round each weight.
        assert error < 0.005, f"{store.kernel}: relative error {error:.4f}"


@CASES
def test_buffers_take_the_bytes_that_are_promised(make, scheme, shape):
    store, _, _ = make(scheme, shape)
    assert store.nbytes == runtime_nbytes(scheme, shape)
    if scheme.symmetric and (shape[0] % 64 == 0 or store.kernel != "nibbles"):
        assert store.nbytes == scheme.nbytes(shape)


@CASES
def test_loading_from_a_file_is_filling_from_values(make, scheme, shape):
    store, (q, scale, zero), _ = make(scheme, shape)
    tensors = {"a.weight_packed": pack_values(q, scheme.bits), "a.weight_scale": scale}
    if zero is not None:
        tensors["a.weight_zero_point"] = pack_zeros(zero, scheme.bits)

    def read_rows(name, start=None, stop=None):
        return tensors[name][start:stop]

    for read in (tensors.__getitem__, read_rows):
        loaded = PackedWeight(shape, scheme)
        assert all(buffer.is_meta for buffer in loaded.buffers())
        loaded.load_from(read, "a")
        for mine, theirs in zip(loaded.buffers(), store.buffers(), strict=True):
            assert torch.equal(mine, theirs)


@CASES
def test_fake_tensors_go_the_same_way(scheme, shape):
    with FakeTensorMode():
        store = PackedWeight(shape, scheme)
        groups = scheme.groups(shape[1])
        tensors = {
            "a.weight_packed": torch.empty(shape[0], shape[1] * scheme.bits // 32, dtype=torch.int32),
            "a.weight_scale": torch.empty(shape[0], groups, dtype=torch.bfloat16),
            "a.weight_zero_point": torch.empty(-(-shape[0] * scheme.bits // 32), groups, dtype=torch.int32),
        }
        store.load_from(tensors.__getitem__, "a")
        assert store.nbytes == runtime_nbytes(scheme, shape)
        for rows in (1, 40):
            y = store.matmul(torch.empty(2, rows, shape[1], dtype=torch.bfloat16))
            assert y.shape == (2, rows, shape[0]) and y.dtype == torch.bfloat16
        assert store.rows(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, shape[1])


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_rows_are_padded_where_that_is_next_to_nothing(make, bits):
    scheme, shape = Scheme(bits=bits, group=32), (4100, 32)
    store, rounded, weight = make(scheme, shape)
    if store.kernel != "nibbles":
        pytest.skip("this CPU's int4 layout is another")
    assert store.nbytes == runtime_nbytes(scheme, shape) == scheme.nbytes((4160, 32))
    assert torch.equal(
        store.dense_rows(4000, 4100), dequantize_like_compressed_tensors(rounded, scheme)[4000:]
    )
    for rows in (1, 40):
        x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
        expected = x.double() @ weight.T
        assert store.matmul(x).shape == expected.shape
        assert (store.matmul(x).double() - expected).norm() / expected.norm() < 0.005


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_refuse_activations_they_would_be_slow_on(make, dtype):
    x = torch.randn(1, 256, dtype=dtype)
    for scheme in (Scheme(bits=8, group=None), Scheme(bits=4, group=32)):
        store, _, _ = make(scheme, SHAPES[0])
        if store.kernel != "planes":
            with pytest.raises(TypeError, match=r"takes bfloat16 activations; got float.*bfloat16"):
                store.matmul(x)
    store, _, weight = make(Scheme(bits=4, group=32), SHAPES[0], kernel="planes")
    assert torch.allclose(store.matmul(x).double(), x.double() @ weight.T, rtol=1e-2, atol=0.3)


def test_part_of_the_rows_is_that_part_of_the_product(make):
    for scheme in SCHEMES:
        store, _, _ = make(scheme, SHAPES[0])
        for rows in (1, 40):
            x = torch.randn(rows, 256).to(torch.bfloat16)
            whole = store.matmul(x)
            assert torch.allclose(store.matmul(x, start=64, stop=192), whole[:, 64:192], rtol=0.02, atol=0.02)


def test_a_broken_file_is_refused_by_name():
    store = PackedWeight((64, 64), Scheme(bits=4, group=32))
    scale = torch.ones(64, 2, dtype=torch.bfloat16)
    broken = {
        "shape": {"w.weight_packed": torch.zeros(64, 7, dtype=torch.int32), "w.weight_scale": scale},
        "int64": {"w.weight_packed": torch.zeros(64, 8, dtype=torch.int64), "w.weight_scale": scale},
        "float32": {
            "w.weight_packed": torch.zeros(64, 8, dtype=torch.int32),
            "w.weight_scale": scale.float(),
        },
    }
    for reason, tensors in broken.items():
        with pytest.raises(BrokenInput, match=rf"w\.weight_(packed|scale).*{reason}"):
            store.load_from(tensors.__getitem__, "w")


def test_what_cannot_be_packed_is_refused_with_its_shape():
    with pytest.raises(UsageError, match=r"\[64, 96\] cannot be int4 g128.*not a multiple of the group 128"):
        PackedWeight((64, 96), Scheme(bits=4))


def test_the_layout_probe_runs_on_real_tensors_even_in_a_dry_run():
    from memfit.packed import nibbles

    known = nibbles.kernel_layout_is_known()
    nibbles.kernel_layout_is_known.cache_clear()
    with FakeTensorMode():
        assert nibbles.kernel_layout_is_known() == known


def test_an_unknown_layout_falls_back_to_planes_with_the_same_bytes(monkeypatch):
    scheme, shape = Scheme(bits=4, group=32), (128, 64)
    before = runtime_nbytes(scheme, shape)
    monkeypatch.setattr(store_file.nibbles, "kernel_layout_is_known", lambda: False)
    assert choose_kernel(scheme, shape) == "planes"
    assert PackedWeight(shape, scheme).nbytes == before


class PeakOfStorages(TorchDispatchMode):
    """Bytes of CPU storages alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.end, storage._cdata, storage.nbytes())
        return out

    def end(self, key, nbytes):
        self.known.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(
    "scheme", [Scheme(bits=8, group=None), Scheme(bits=4), Scheme(bits=3), Scheme(bits=5, group=None)]
)
def test_a_load_never_holds_more_than_the_weight_the_file_and_the_workspace(monkeypatch, scheme, by_rows):
    monkeypatch.setattr(store_file, "WORKSPACE_NBYTES", 4 * 2**20)
    shape = (8192, 2048)
    peak = PeakOfStorages()
    with FakeTensorMode(), peak:
        words = shape[1] * scheme.bits // 32

        def read(name):
            if name.endswith("_scale"):
                return torch.empty(shape[0], scheme.groups(shape[1]), dtype=torch.bfloat16)
            return torch.empty(shape[0], words, dtype=torch.int32)

        def read_rows(name, start=None, stop=None):
            if name.endswith("_scale"):
                return read(name)
            return torch.empty(stop - start, words, dtype=torch.int32)

        store = PackedWeight(shape, scheme)
        store.load_from(read_rows if by_rows else read, "a")
        allowed = store.nbytes + 4 * 2**20 + (0 if by_rows else shape[0] * words * 4)
    assert peak.now == store.nbytes
    assert peak.peak <= allowed
