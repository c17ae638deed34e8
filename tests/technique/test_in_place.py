"""What is done to a symmetric matrix in its own memory is what plain operations give, and takes a few tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memfit.account.ask import ask
from memfit.technique import in_place
from memfit.technique.in_place import cholesky_in_place, permute_both, transpose, turn_around


def symmetric(size: int, seed: int = 0) -> Tensor:
    x = torch.randn(size + 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    a = x.t() @ x / size
    return (a + a.t()) / 2


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "_TILE", 8)
    monkeypatch.setattr(in_place, "_PANEL", 5)
    monkeypatch.setattr(in_place, "_ROWS_NBYTES", 600)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_permuted_transposed_and_turned_around(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, order = symmetric(size, seed), torch.randperm(size, generator=generator)
    found = a.clone()
    permute_both(found, order)
    assert torch.equal(found, a[order][:, order])
    odd = torch.randn(size, size, generator=generator)
    found = odd.clone()
    transpose(found)
    assert torch.equal(found, odd.t())
    found = odd.clone()
    turn_around(found)
    assert torch.equal(found, odd.flip(0, 1))


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_the_factor_is_lapacks_and_what_is_above_it_stays(size: int, seed: int) -> None:
    a = symmetric(size, seed)
    diagonal = a.diagonal() + 0.01
    found = a.clone()
    assert cholesky_in_place(found, diagonal)
    right = torch.linalg.cholesky(a - torch.diag(a.diagonal()) + torch.diag(diagonal))
    torch.testing.assert_close(found.tril(), right)
    assert torch.equal(found.triu(1), a.triu(1))


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 40), seed=st.integers(0, 10**6))
def test_where_there_is_no_factor_the_matrix_is_as_it_was(size: int, seed: int) -> None:
    a = symmetric(size, seed)
    at = seed % size
    bad = a.diagonal().clone()
    bad[at] = -1.0
    found = a.clone()
    assert not cholesky_in_place(found, bad)
    off = 1 - torch.eye(size, dtype=torch.float64)
    assert torch.equal(found * off, a * off)
    assert cholesky_in_place(found, a.diagonal() + 0.01)
    torch.testing.assert_close(found.tril(), torch.linalg.cholesky(a + 0.01 * torch.eye(size)))


def test_no_second_matrix_is_held() -> None:
    a = symmetric(320).float()
    order = torch.randperm(320)

    def run() -> None:
        permute_both(a, order)
        assert cholesky_in_place(a, a.diagonal() + 0.1)
        turn_around(a)

    assert ask(run) < a.nbytes / 10
