"""Packed weights on CUDA: how they lie and what is predicted without a GPU, and what a GPU's kernels make of them."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from memfit.packed.fake import aimed_at, aiming_at
from memfit.packed.kernel import choose_kernel, runtime_nbytes
from memfit.packed.modules import store_of
from memfit.packed.scheme import Scheme
from memfit.packed.store import PackedWeight
from memfit.technique.quantize import quantize

SCHEMES = (
    Scheme(bits=8, group=None), Scheme(bits=7, group=None, symmetric=False), Scheme(bits=6, group=64),
    Scheme(bits=5, group=32, symmetric=False), Scheme(bits=4, symmetric=False), Scheme(bits=3),
    Scheme(bits=2, group=64), Scheme(bits=4, group=64, values="nf4"), Scheme(bits=4, group=32, values="mxfp4"),
    Scheme(bits=8, group=None, values="fp8"),
)  # fmt: skip
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_what_is_aimed_at_cuda_lies_in_planes(scheme: Scheme) -> None:
    shape = (192, 256)
    with aiming_at("cuda"):
        assert choose_kernel(scheme, shape) == "planes"
        store = store_of(shape, scheme)
        assert isinstance(store, PackedWeight)
        assert store.nbytes == runtime_nbytes(scheme, shape)
    assert aimed_at() == "cpu"


def test_integers_for_both_go_to_torchs_product() -> None:
    scheme = Scheme(bits=8, group=None, activations=8)
    with aiming_at("cuda"):
        assert choose_kernel(scheme, (64, 64)) == "int_mm"


@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 17, 300])
def test_fakes_that_stand_for_cuda_take_its_blocks(tokens: int) -> None:
    scheme = Scheme(bits=4, symmetric=False)
    with aiming_at("cuda"), FakeTensorMode():
        store = PackedWeight((4096, 1024), scheme, device="cpu")
        x = torch.empty(tokens, 1024, dtype=torch.bfloat16)
        assert store.matmul(x).shape == (tokens, 4096)
        assert store.rows(torch.zeros(3, dtype=torch.int64)).shape == (3, 1024)
        assert store.product_back(torch.empty(tokens, 4096, dtype=torch.bfloat16), 0, 4096).shape == (tokens, 1024)


@GPU
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("shape", [(192, 256), (72, 1024), (33, 320)])
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_gpu_kernels_give_the_product_with_the_weight(scheme: Scheme, shape: tuple[int, int], tokens: int) -> None:
    if scheme.why_not(shape) is not None:
        return
    made = quantize(torch.randn(shape).to(torch.bfloat16), scheme)
    with aiming_at("cuda"):
        store = store_of(shape, scheme)
    assert isinstance(store, PackedWeight)
    store.fill(made.q, made.scale, made.zero, made.table)
    exact = store.dense_rows(0, shape[0], dtype=torch.float32).double()
    plain = store.dense_rows(0, shape[0])
    store.to("cuda")
    assert torch.equal(store.dense_rows(0, shape[0]).cpu(), plain)
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16)
    y = store.matmul(x.cuda()).double().cpu()
    wanted = x.double() @ exact.t()
    assert float((y - wanted).norm() / wanted.norm()) < 4e-3
    g = torch.randn(tokens, shape[0], dtype=torch.bfloat16)
    back = store.product_back(g.cuda(), 0, shape[0]).double().cpu()
    wanted = g.double() @ exact
    assert float((back - wanted).norm() / wanted.norm()) < 4e-3
