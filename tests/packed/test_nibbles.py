import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.packed import nibbles
from memfit.packed.nibbles import PLANES, ROWS, TERMS

pytestmark = pytest.mark.skipif(
    not nibbles.kernel_layout_is_known(), reason="this CPU's int4 layout is another"
)


def draw_unsigned(bits: int, blocks: int, inputs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (blocks * ROWS, inputs), generator=generator, dtype=torch.uint8)


CASES = {
    "bits": st.sampled_from(sorted(PLANES)),
    "blocks": st.integers(1, 3),
    "words": st.integers(1, 5),
    "seed": st.integers(0, 9),
}


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_both_halves_unpack_to_what_was_packed(bits, blocks, words, seed):
    u = draw_unsigned(bits, blocks, words * 32, seed)
    planes = nibbles.pack_rows(u, bits)
    assert sum(plane.nbytes for plane in planes) == u.numel() * bits // 8
    halves = [nibbles.unpack_half(planes, bits, half).transpose(1, 2) for half in (0, 1)]
    q = torch.stack(halves, dim=1).reshape(u.shape)
    assert torch.equal(q.to(torch.int16) + 2 ** (bits - 1), u.to(torch.int16))


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_terms_sum_to_the_value(bits, blocks, words, seed):
    u = draw_unsigned(bits, blocks, words * 32, seed)
    planes = nibbles.pack_rows(u, bits)
    total = torch.zeros(blocks, 2, words * 32, 32)
    for term in TERMS[bits]:
        used, planes = planes[: len(term.widths)], planes[len(term.widths) :]
        pairs = nibbles.term_nibbles(used, term)
        for half, v in enumerate((pairs & 15, pairs >> 4)):
            total[:, half] += term.factor * (v.float() - 8) + term.constant
    assert torch.equal(total.transpose(2, 3).reshape(u.shape), u.float() - 2 ** (bits - 1))


@settings(max_examples=20, deadline=None)
@given(**CASES)
def test_gathered_rows_are_the_rows(bits, blocks, words, seed):
    u = draw_unsigned(bits, blocks, words * 32, seed)
    index = torch.randint(0, len(u), (7,), generator=torch.Generator().manual_seed(seed))
    q = nibbles.gather_rows(nibbles.pack_rows(u, bits), bits, index)
    assert torch.equal(q.to(torch.int16) + 2 ** (bits - 1), u[index].to(torch.int16))


def test_the_kernel_is_given_scales_that_bf16_holds_exactly():
    scale = torch.randn(3, 64).to(torch.bfloat16)
    for terms in TERMS.values():
        for term in terms:
            for factor in (term.factor, term.constant):
                assert torch.equal((scale * factor).double(), scale.double() * factor)


def test_a_pair_of_scale_and_nothing_keeps_the_sign():
    scale = torch.randn(2, 64).to(torch.bfloat16)
    pair = nibbles.scale_zero(scale, None, 4, 0)
    assert torch.equal(pair[..., 0], scale) and not pair[..., 1].any()
