import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.packed.bits import (
    PLANES,
    join_planes,
    pack_values,
    pack_zeros,
    split_planes,
    unpack_values,
    unpack_zeros,
)

BITS = st.integers(2, 8)


def draw_values(bits: int, rows: int, inputs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, inputs), generator=generator, dtype=torch.int8)


@settings(max_examples=80, deadline=None)
@given(bits=BITS, rows=st.integers(1, 70), inputs=st.integers(1, 200), seed=st.integers(0, 9))
def test_packed_words_are_those_of_compressed_tensors_and_unpack_to_the_same(bits, rows, inputs, seed):
    q = draw_values(bits, rows, inputs, seed)
    words = pack_values(q, bits)
    assert torch.equal(words, pack_to_int32(q, bits))
    assert torch.equal(unpack_values(words, bits, inputs), q)
    assert torch.equal(unpack_from_int32(words, bits, q.shape), q)


@settings(max_examples=40, deadline=None)
@given(bits=BITS, rows=st.integers(1, 100), groups=st.integers(1, 9), seed=st.integers(0, 9))
def test_zero_points_are_packed_along_the_rows(bits, rows, groups, seed):
    zero = draw_values(bits, rows, groups, seed)
    words = pack_zeros(zero, bits)
    assert torch.equal(words, pack_to_int32(zero, bits, packed_dim=0))
    assert torch.equal(unpack_zeros(words, bits, rows), zero)


@settings(max_examples=80, deadline=None)
@given(bits=BITS, rows=st.integers(1, 20), words=st.integers(1, 9), seed=st.integers(0, 9))
def test_planes_hold_exactly_the_bits_and_join_to_the_same(bits, rows, words, seed):
    u = (draw_values(bits, rows, words * 32, seed).to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    planes = split_planes(u, PLANES[bits])
    assert sum(plane.nbytes for plane in planes) == u.numel() * bits // 8
    assert torch.equal(join_planes(planes, PLANES[bits]), u)


def test_experts_pack_like_each_expert_alone():
    q = draw_values(3, 6, 64, 0).view(2, 3, 64)
    assert torch.equal(pack_values(q, 3), torch.stack([pack_values(q[0], 3), pack_values(q[1], 3)]))


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="2 words hold fewer than 32 values of 4 bits"):
        unpack_values(torch.zeros(1, 2, dtype=torch.int32), 4, 32)
