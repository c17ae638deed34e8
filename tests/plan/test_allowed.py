"""What the search may choose from is checked once, where it is written down."""

from typing import Any

import pytest

from memfit.errors import UsageError
from memfit.plan.allowed import Allowed


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"bits": 4}, r"bits of Allowed is a tuple, as \(8,\); got 4"),
        ({"bits": (7,)}, "bits of Allowed: 7 is none of 8, 6, 5, 4, 3, 2, 16"),
        ({"kv_bits": (3,)}, "kv_bits of Allowed: 3 is none of 16, 8, 4, 2"),
        ({"values": "nf4"}, "values of Allowed is a tuple"),
        ({"values": ("nf5",)}, "'nf5' is no kind of values; known: int, nf4"),
        ({"keep": "embeddings"}, "keep of Allowed is a tuple"),
        ({"techniques": "prune"}, "techniques of Allowed is a tuple"),
        ({"groups": (128,)}, r"groups are told by bits, as \{4: \(128,\), 8: \(None,\)\}; got \(128,\)"),
        ({"groups": {4: 128}}, r"groups\[4\] of Allowed is a tuple"),
        ({"groups": {4: (100,)}}, r"groups\[4\]: a group has a multiple of 32 inputs.*got 100"),
        ({"groups": {4: (-32,)}}, r"groups\[4\]: a group has a multiple of 32 inputs.*got -32"),
    ],
)
def test_what_cannot_be_allowed_is_told_with_what_can(setting: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Allowed(**setting)
