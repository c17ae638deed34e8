from typing import Any

import pytest

from memfit.account.cuda import CUBLAS_WORKSPACE, Segments
from memfit.task.infer import Infer

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
    assert Segments.rounded(asked) == given


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
