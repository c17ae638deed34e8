import copy
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

from memfit.account.fakes import make_fake
from memfit.account.follow import Follow
from memfit.packed.fake import copies_of_fakes


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_what_is_made_at_once_can_be_copied_deeply_as_other_fakes_can() -> None:
    with FakeTensorMode() as mode, Follow() as follow, copies_of_fakes():
        made = nn.Linear(3, 2, dtype=torch.bfloat16)
        copied = copy.deepcopy(made)
    assert isinstance(copied.weight, FakeTensor)
    assert copied.weight.fake_mode is mode
    assert copied.weight.shape == (2, 3)
    nbytes = sum(storage.nbytes for storage in follow.ledger.storages)
    assert nbytes == 2 * 2 * (2 * 3 + 2)


@pytest.mark.parametrize("allowed", [True, False])
def test_an_address_is_told_or_refused_as_of_other_fakes(allowed: bool) -> None:
    with FakeTensorMode() as mode:
        mode._allow_unsafe_data_ptr_access = allowed
        others = torch.empty(2), make_fake(mode, (2,), (1,), torch.float32)
    for tensor in others:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if allowed:
                assert tensor.data_ptr() == 0
            else:
                with pytest.raises(RuntimeError, match="data pointer"):
                    tensor.data_ptr()
