"""Rows of a table that comes in blocks, beside the whole table's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.calibrate import stream


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40), block=st.integers(1, 40), shape=st.sampled_from([(1,), (7,), (3, 5), (2, 33)]),
    step=st.sampled_from([1, 3, 1000]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_rows_looked_up_in_blocks_are_the_tables(rows, block, shape, step, seed):
    random = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, 6, generator=random).bfloat16()
    ids = torch.randint(0, rows, shape, generator=random)
    out = torch.full((*shape, 6), torch.nan, dtype=torch.bfloat16)
    blocks = ((start, table[start : start + block]) for start in range(0, rows, block))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "ROWS_NBYTES", step * 12)
        stream.look_up(blocks, ids, out)
    assert torch.equal(out, table[ids])
