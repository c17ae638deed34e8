"""What tables give of the rows that are looked up, as they will be stored; no table is ever whole.

Legend of shapes: N rows that were looked up, D width.
"""

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

from memfit.calibrate.stream import Streamed
from memfit.packed.fake import blocks_to_run
from memfit.packed.forms import Form
from memfit.plan.price import Weighting
from memfit.technique.making import make, shared_by_rows, weight_of

_TOKENS: Final = 2048
"""Rows that are made at once."""


class LookedUp:
    """The tables of a model that is read from the disk.

    Args:
        schemes: module name to form.
        weighting: what errors of a table count, as it will be made with.
    """

    def __init__(
        self, streamed: Streamed, schemes: Mapping[str, Form], weighting: Callable[[str], Weighting | None]
    ) -> None:
        self._streamed, self._schemes, self._weighting = streamed, schemes, weighting
        self._shared: dict[str, Tensor | None] = {}

    def round(self, name: str, rows_ND: Tensor) -> Tensor:
        """Let rows of a table be, in place, as they are stored; those of one that stays in 16 bits are already."""
        if name not in self._schemes:
            return rows_ND
        scheme, counts = self._schemes[name], self._weighting(name)
        wanted = None if counts is None else counts.importance()
        if name not in self._shared:
            # A codebook is the whole table's, whatever the text looks up of it.
            everything = (rows for _, rows in self._streamed.rows(f"{name}.weight"))
            in_common = None if counts is None else counts.rows_in_common()
            self._shared[name] = shared_by_rows(scheme, everything, wanted, in_common)
        shared = self._shared[name]
        for start in blocks_to_run(range(0, rows_ND.shape[0], _TOKENS)):
            part = rows_ND[start : start + _TOKENS]
            part.copy_(weight_of(make(part, scheme, importance_K=wanted, shared=shared)))
        return rows_ND


__all__ = ["LookedUp"]
