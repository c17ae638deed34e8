from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from memfit.account.cuda import CUBLAS_WORKSPACE, CUBLASLT_WORKSPACE, Segments
from memfit.account.cuda_autocast import CudaAutocast
from memfit.account.cuda_kernels import SCRATCH, kernels_of_cuda
from memfit.account.cuda_workspaces import with_workspaces
from memfit.account.ledger import Ledger, Storage
from memfit.task.infer import Infer
from memfit.train.recipe import Recipe
from memfit.train.task import Train

aten = torch.ops.aten

KIB, MIB = 1 << 10, 1 << 20


class Script:
    """Births and ends by name."""

    def __init__(self) -> None:
        self.segments = Segments()
        self.numbers: dict[str, tuple[int, int]] = {}

    def take(self, name: str, nbytes: int) -> int:
        self.numbers[name] = (len(self.numbers), nbytes)
        self.segments.step(*self.numbers[name], 1)
        return self.segments.reserved_nbytes

    def free(self, name: str) -> int:
        self.segments.step(*self.numbers[name], -1)
        return self.segments.reserved_nbytes


@pytest.mark.parametrize(
    ("asked", "given"), [(0, 0), (1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_blocks_are_rounded_up_to_512_bytes(asked: int, given: int) -> None:
    segments = Segments()
    assert segments.step(0, asked, 1) == segments.allocated_nbytes == given
    assert segments.step(0, asked, -1) == given
    assert segments.allocated_nbytes == 0


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (0, 0),
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_a_first_request_takes_a_segment_of_its_class(asked: int, segment: int) -> None:
    assert Script().take("a", asked) == segment


def test_small_blocks_share_a_segment_until_it_is_full() -> None:
    script = Script()
    assert script.take("a", MIB) == 2 * MIB
    assert script.take("b", MIB - 512) == 2 * MIB
    assert script.take("c", 512) == 2 * MIB
    assert script.take("d", 512) == 4 * MIB


def test_a_large_rest_of_a_mebibyte_or_less_is_not_split_off() -> None:
    script = Script()
    script.take("a", 12 * MIB)
    script.free("a")
    # 11 MiB leave 1 MiB, which stays with the block: the next one needs a segment of its own.
    assert script.take("b", 11 * MIB) == 12 * MIB
    assert script.segments.allocated_nbytes == 12 * MIB
    assert script.take("c", MIB + 512) == 12 * MIB + 20 * MIB


def test_a_large_rest_over_a_mebibyte_is_split_off() -> None:
    script = Script()
    script.take("a", 12 * MIB)
    script.free("a")
    assert script.take("b", 9 * MIB) == 12 * MIB
    assert script.take("c", 3 * MIB) == 12 * MIB


def test_neighbours_are_joined_when_given_back() -> None:
    script = Script()
    for name in "abcd":
        script.take(name, 5 * MIB)  # one segment of 20 MiB, full
    assert script.segments.reserved_nbytes == 20 * MIB
    script.free("b")
    script.free("d")
    assert script.take("e", 9 * MIB) == 40 * MIB  # two holes of 5 MiB do not make one of 9
    script.free("e")
    script.free("c")  # 15 MiB in one piece now
    assert script.take("f", 12 * MIB) == 40 * MIB


def test_the_best_fit_is_taken_and_the_oldest_among_equals() -> None:
    script = Script()
    script.take("big", 40 * MIB)
    script.take("small", 14 * MIB)
    script.free("big")
    script.free("small")
    assert script.take("a", 14 * MIB) == 54 * MIB
    assert script.take("b", 40 * MIB) == 54 * MIB  # fits only if `a` took the hole of 14


def test_segments_are_kept_when_all_is_given_back() -> None:
    script = Script()
    script.take("a", 100 * MIB)
    assert script.free("a") == 100 * MIB


def test_an_account_for_cuda_reserves_at_least_what_it_allocates(maker_of: Any, predicted: Any) -> None:
    task = Infer(batch=2, prompt=24, new_tokens=6)
    make = maker_of("llama", "bfloat16")
    cuda, cpu = predicted(make, task, device="cuda"), predicted(make, task)
    assert cuda.device == "cuda"
    for phase in cuda.phases:
        assert phase.reserved_nbytes is not None
        assert phase.reserved_nbytes >= phase.peak_nbytes
        assert phase.reserved_nbytes % (2 * MIB) == 0
        assert phase.peak_nbytes % 512 == 0
    assert cuda.phase("load").peak_nbytes >= cpu.phase("load").peak_nbytes
    assert cuda.phase("decode").alive["temporary"] >= CUBLAS_WORKSPACE
    assert cuda.phases == predicted(make, task, device="cuda", whole=True).phases


def test_training_for_cuda_has_a_workspace_for_each_thread_and_tiles_of_its_own(maker_of: Any, predicted: Any) -> None:
    task = Train(batch=2, sequence=24, recipe=Recipe(chunk_nbytes=None))
    make = maker_of("llama", "float32")
    cuda = predicted(make, task, device="cuda")
    assert CUBLAS_WORKSPACE <= cuda.phase("first forward").alive["temporary"] < 2 * CUBLAS_WORKSPACE
    assert cuda.phase("step").alive["temporary"] >= 2 * CUBLAS_WORKSPACE
    assert cuda.phases == predicted(make, task, device="cuda", whole=True).phases


def _ledger(*births: tuple[str, str]) -> Ledger:
    """Storages of 1000 bytes that operators make, each in a phase."""
    ledger = Ledger()
    for phase, operator in births:
        ledger.marks.append((len(ledger.events), phase))
        ledger.born(Storage(1000, "activation", "", operator, torch.float32))
        ledger.marks.append((len(ledger.events), ""))
    return ledger


def test_workspaces_are_taken_at_the_first_product_of_each_thread() -> None:
    ledger = _ledger(
        ("forward", "aten::add"), ("forward", "aten::mm"), ("backward", "aten::bmm"), ("forward", "aten::mm"),
        ("forward", "aten::addmm"),
    )  # fmt: skip
    found = with_workspaces(ledger)
    sizes = [found.storages[number].nbytes for number, _ in found.events]
    large, small = CUBLAS_WORKSPACE, CUBLASLT_WORKSPACE
    assert sizes == [1000, large, 1000, large, 1000, 1000, small, 1000]
    assert [name for _, name in found.marks] == [name for _, name in ledger.marks]
    # A workspace is taken in the phase of its product.
    assert [at for at, _ in found.marks] == [0, 1, 1, 3, 3, 5, 5, 6, 6, 8]
    assert len(ledger.storages) == 5


@pytest.mark.parametrize(
    ("operator", "arguments", "nbytes"),
    [
        # As an H200 was seen to take them (torch 2.11, cuDNN 9).
        (aten._scaled_dot_product_cudnn_attention_backward, ((4, 8, 96, 32),) * 3, 405760),
        (aten._scaled_dot_product_cudnn_attention_backward, (*((2, 8, 512, 64),) * 2, (2, 2, 512, 64)), 4227328),
        (aten._scaled_dot_product_efficient_attention_backward, ((4, 8, 96, 32),) * 3, 1061888),
        (aten._scaled_dot_product_efficient_attention_backward, ((4, 8, 100, 64),) * 3, 1062400),
        (aten.linalg_vector_norm, ((8000, 256), 2, [-2]), 16384008),
        (aten.linalg_vector_norm, ((8000, 256), 2, [-1]), 0),
        (aten._safe_softmax, ((1, 8, 512, 512), -1), 2101252),
    ],
)
def test_scratch_is_what_a_gpu_was_seen_to_take(operator: Any, arguments: tuple[Any, ...], nbytes: int) -> None:
    dtype = torch.bfloat16 if "cudnn" in operator.__name__ else torch.float32
    given = [torch.empty(a, dtype=dtype, device="meta") if isinstance(a, tuple) else a for a in arguments]
    assert SCRATCH[operator.default](given) == nbytes


def _attends(
    dtype: torch.dtype, *, keys: int = 4, queries: int = 16, mask: str = "", shared: bool = True
) -> str:
    """The kernel whose backward pass a call of attention has."""
    with FakeTensorMode(), kernels_of_cuda():
        q = torch.empty(2, 4, queries, 32, dtype=dtype, requires_grad=True)
        k, v = (torch.empty(2, keys, 16, 32, dtype=dtype, requires_grad=True) for _ in range(2))
        given = None
        if mask:
            kind = torch.bool if mask == "bool" else dtype
            given = torch.empty(2, 4, queries, 16, dtype=kind, requires_grad=mask == "learned")
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, given, enable_gqa=shared and keys != 4)
        assert out.shape == q.shape
        name: str = out.grad_fn.name()
        gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
        assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    return name


def test_attention_goes_to_the_kernel_that_cuda_chooses() -> None:
    half, single = torch.bfloat16, torch.float32
    assert "Cudnn" in _attends(half)
    assert "Cudnn" in _attends(half, keys=2, mask="bool")
    assert "Flash" in _attends(half, queries=1)
    assert "Efficient" in _attends(half, mask="learned")
    assert "Efficient" in _attends(single)
    assert "Efficient" in _attends(single, mask="bool")
    assert "View" in _attends(single, keys=2)  # plain products
    assert "Attention" not in _attends(half, keys=1, shared=False)  # as Falcon has it: one head of keys, said to none


def test_dropout_keeps_a_byte_an_entry_and_real_tensors_go_their_way() -> None:
    with FakeTensorMode(), kernels_of_cuda():
        x = torch.empty(64, 64, requires_grad=True)
        kept = torch.nn.functional.dropout(x, 0.1).grad_fn
        assert kept is not None and "NativeDropout" in kept.name()
    x = torch.randn(2, 2, 4, 8)
    plain = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    with kernels_of_cuda():
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(x, x, x), plain)
        assert torch.equal(torch.nn.functional.dropout(x, 0.5, training=False), x)


def test_cudas_autocast_keeps_powers_in_fp32() -> None:
    x = torch.randn(4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert x.pow(2).dtype == torch.bfloat16
        with CudaAutocast():
            assert x.pow(2).dtype == torch.float32
            assert (x @ x).dtype == torch.bfloat16
    with CudaAutocast():
        assert x.pow(2).dtype == torch.bfloat16
