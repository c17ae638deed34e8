"""W8A8 against the same integers in float64."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.errors import BrokenInput, UsageError
from memfit.packed import integer
from memfit.packed.bits import pack_values
from memfit.packed.integer import IntegerWeight, round_tokens
from memfit.packed.kernel import choose_kernel, runtime_nbytes
from memfit.packed.modules import PackedLinear, pack_module_skeleton
from memfit.packed.qlinear import integer_kernel
from memfit.packed.scheme import Scheme

A8 = Scheme(bits=8, group=None, activations=8)
KERNELS = sorted({integer_kernel(), "int_mm"})


def reference(x, q, scale):
    """(y, s): outputs and token scales in float64, of the integers that x's dtype gives."""
    s = (x.abs().amax(-1, keepdim=True) / 127.5).double()
    s[s == 0] = torch.finfo(x.dtype).eps
    rounded = (x / s.to(x.dtype)).double().clamp(-128, 127).round()
    return (rounded @ q.double().t()) * scale.double().t() * s


def made(rows, inputs, *, kernel, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, generator=generator)
    scale = (torch.rand(rows, 1, generator=generator) * 0.01 + 1e-4).to(torch.bfloat16)
    return IntegerWeight.from_quantized(q, scale, None, A8, kernel=kernel), q, scale


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40), rows=st.integers(1, 130), words=st.integers(1, 6), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]), outlier=st.booleans(), blocks=st.booleans(),
)  # fmt: skip
def test_products_are_those_of_the_same_integers(kernel, tokens, rows, words, seed, dtype, outlier, blocks):
    store, q, scale = made(rows, 32 * words, kernel=kernel, seed=seed)
    x = torch.randn(tokens, 32 * words, generator=torch.Generator().manual_seed(seed))
    x[0] = 0
    if outlier:
        x[:, 3] *= 300
    x = x.to(dtype)
    before, integer.TOKENS_NBYTES = integer.TOKENS_NBYTES, 2048 if blocks else integer.TOKENS_NBYTES
    try:
        y = store.matmul(x)
    finally:
        integer.TOKENS_NBYTES = before
    expected = reference(x, q, scale)
    # The sums are exact; what follows rounds them twice.
    ulp = 2**-7 if dtype == torch.bfloat16 else 2**-22
    assert y.dtype == dtype and y.shape == (tokens, rows)
    assert (y.double() - expected).abs().le(expected.abs() * ulp + 1e-30).all()
    assert y[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_integers_are_those_of_compressed_tensors(dtype):
    x = torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, 5] *= 1000
    x[:, :, 6] = 0
    args = QuantizationArgs(num_bits=8, symmetric=True, dynamic=True, strategy="token")
    scale, zero = compute_dynamic_scales_and_zp(x, args, None)
    theirs = fake_quantize(x, scale, zero, args)
    u, mine = round_tokens(x[0])
    assert torch.equal(mine, scale[0])
    assert torch.equal((u.to(dtype) - 128) * mine, theirs[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_loading_from_a_file_is_filling_and_takes_the_bytes_promised(kernel, monkeypatch):
    monkeypatch.setattr(integer, "TOKENS_NBYTES", 2048)
    store, q, scale = made(100, 96, kernel=kernel)
    tensors = {"a.weight_packed": pack_values(q, 8), "a.weight_scale": scale}

    def read_rows(name, start=None, stop=None):
        return tensors[name][start:stop]

    x = torch.randn(3, 96).to(torch.bfloat16)
    for read in (tensors.__getitem__, read_rows):
        loaded = IntegerWeight((100, 96), A8, kernel=kernel)
        assert all(buffer.is_meta for buffer in loaded.buffers())
        loaded.load_from(read, "a")
        assert torch.equal(loaded.matmul(x), store.matmul(x))
        assert torch.equal(loaded.dense_rows(7, 50), q[7:50].bfloat16() * scale[7:50])
        assert loaded.nbytes == runtime_nbytes(A8, (100, 96), kernel=kernel)
    tensors["a.weight_scale"] = scale.float()
    with pytest.raises(BrokenInput, match=r"a\.weight_scale.*float32"):
        loaded.load_from(tensors.__getitem__, "a")


@pytest.mark.parametrize("kernel", KERNELS)
def test_fake_tensors_go_the_same_way(kernel):
    with FakeTensorMode():
        store = IntegerWeight((96, 64), A8, kernel=kernel)
        words = {"a.weight_packed": torch.empty(96, 16, dtype=torch.int32)}
        words["a.weight_scale"] = torch.empty(96, 1, dtype=torch.bfloat16)
        store.load_from(words.__getitem__, "a")
        assert sum(buffer.nbytes for buffer in store.buffers()) == runtime_nbytes(A8, (96, 64), kernel=kernel)
        for dtype in (torch.bfloat16, torch.float32):
            y = store.matmul(torch.empty(2, 5, 64, dtype=dtype))
            assert y.shape == (2, 5, 96) and y.dtype == dtype


def test_a_layer_adds_its_bias_after_the_token_s_scale():
    torch.manual_seed(0)
    model = nn.ModuleDict({"it": nn.Linear(64, 32)})
    bias = model["it"].bias.data.clone()
    pack_module_skeleton(model, {"it": A8})
    assert isinstance(model["it"], PackedLinear)
    _, q, scale = made(32, 64, kernel=choose_kernel(A8, (32, 64)))
    model["it"].store.fill(q, scale)
    x = torch.randn(2, 3, 64)
    expected = reference(x.view(-1, 64), q, scale) + bias.double()
    assert torch.allclose(model["it"](x).double(), expected.view(2, 3, 32), rtol=1e-5, atol=1e-5)


def test_what_has_no_product_of_integers_is_refused_with_the_reason():
    row = {"bits": 8, "group": None}
    for other in ({"bits": 4}, {"group": 128}, {"symmetric": False}):
        with pytest.raises(ValueError, match=r"go with symmetric weights of 8 bits and one scale a row, not with int"):
            Scheme(**(row | other), activations=8)
    with pytest.raises(ValueError, match="16 or 8, got 4"):
        Scheme(bits=8, group=None, activations=4)
    assert A8.name == "int8 row a8" and Scheme(**A8.to_json()) == A8
    assert "activations" not in Scheme(bits=8, group=None).to_json()
    assert "65824 products" in str(A8.why_not((8, 65824)))
    assert "fused experts" in str(A8.why_not((4, 64, 64)))
    with pytest.raises(UsageError, match=r"t \[64, 32\]: a table is looked up"):
        pack_module_skeleton(nn.ModuleDict({"t": nn.Embedding(64, 32)}), {"t": A8})
    store, _, _ = made(32, 64, kernel=integer_kernel())
    with pytest.raises(TypeError, match="bfloat16 or float32 activations; got float16"):
        store.matmul(torch.ones(2, 64, dtype=torch.float16))
    x = torch.ones(2, 64, requires_grad=True)
    with pytest.raises(UsageError, match=r"\[32, 64\] of int8 row a8 rounds its activations.*--activations 8"):
        store.matmul(x).sum().backward()
