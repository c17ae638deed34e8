"""What cuBLAS takes at a thread's first product and keeps, put into a ledger where that product is.

Autograd's backward pass runs in a thread of its own, which has a handle, and so a workspace, of its own. What is
replayed does not know whether it holds the first product: so workspaces are put in when all is told.
"""

from typing import Final

import torch

from .cuda import CUBLAS_WORKSPACE, CUBLASLT_WORKSPACE
from .ledger import Ledger, Storage

_PRODUCTS: Final = frozenset(f"aten::{name}" for name in ("mm", "bmm", "baddbmm", "mv", "addmv", "dot", "addmm"))
"""Through cuBLAS; what has a bias, through both."""
_LT: Final = frozenset(f"aten::{name}" for name in ("addmm", "_int_mm", "_scaled_mm"))
_BACKWARD: Final = "backward"
"""How phases end whose work autograd's thread does."""


def with_workspaces(ledger: Ledger) -> Ledger:
    """The same, with each thread's workspaces before its first product: no storage gets another number."""
    made = ledger.copy()
    found: dict[tuple[str, bool], int] = {}
    names = dict(ledger.marks)
    phase = ""
    for index, (number, sign) in enumerate(ledger.events):
        phase = names.get(index, phase)
        operator = ledger.storages[number].operator.partition(".")[0]
        if sign < 0:
            continue
        for kind, products in (("cuBLAS", _PRODUCTS), ("cuBLASLt", _LT)):
            if operator in products:
                found.setdefault((kind, phase.endswith(_BACKWARD)), index)
    for (kind, _), index in sorted(found.items(), key=lambda item: -item[1]):
        nbytes = CUBLAS_WORKSPACE if kind == "cuBLAS" else CUBLASLT_WORKSPACE
        made.storages.append(Storage(nbytes, "temporary", f"{kind} workspace", "", torch.uint8))
        made.events.insert(index, (len(made.storages) - 1, 1))
        made.marks = [(at + (at > index), name) for at, name in made.marks]
    return made
