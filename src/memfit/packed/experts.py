"""Fused experts that run from packed weights, one expert at a time.

T tokens, k experts for each, E experts, D width, I inner width.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from memfit.packed.blocks import Read
from memfit.packed.routing import tokens_by_expert
from memfit.packed.scheme import Scheme
from memfit.packed.store import PackedWeight

WEIGHTS = ("gate_up_proj", "down_proj")
"""The parameters of the experts modules of transformers: [E, 2I, D] and [E, D, I]."""


class PackedExperts(nn.Module):
    """Takes the place of a fused experts module: act(gate(x)) · up(x), then down, weighted and summed.

    The same arithmetic as the eager forward of transformers' `MixtralExperts`, whose weights it holds packed
    as [E·2I, D] and [E·D, I].
    """

    def __init__(self, experts: nn.Module, *, gate_up: Scheme, down: Scheme) -> None:
        super().__init__()
        self.num_experts: int
        self.num_experts, inner2, width = (int(size) for size in experts.get_parameter("gate_up_proj").shape)
        self.hidden_dim, self.intermediate_dim = width, inner2 // 2
        self.act_fn: Any = (
            experts.get_submodule("act_fn") if isinstance(experts.act_fn, nn.Module) else experts.act_fn
        )
        self.gate_up_proj = PackedWeight((self.num_experts * inner2, width), gate_up, aligned=inner2)
        self.down_proj = PackedWeight((self.num_experts * width, inner2 // 2), down, aligned=width)

    def load_from(self, read: Read, prefix: str) -> None:
        """Fill from `prefix.gate_up_proj.weight_packed|weight_scale` [E, 2I, ...], and of `down_proj`."""
        self.gate_up_proj.load_from(read, f"{prefix}.gate_up_proj")
        self.down_proj.load_from(read, f"{prefix}.down_proj")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, D], the chosen experts and their weights [T, k] → [T, D]."""
        width, inner2 = self.hidden_dim, 2 * self.intermediate_dim

        def gate_up(expert: int, x: Tensor) -> Tensor:
            return self.gate_up_proj.matmul(x, start=expert * inner2, stop=(expert + 1) * inner2)

        def down(expert: int, x: Tensor) -> Tensor:
            return self.down_proj.matmul(x, start=expert * width, stop=(expert + 1) * width)

        routed = (top_k_index, top_k_weights)
        return run_experts(
            hidden_states, *routed, experts=self.num_experts, gate_up=gate_up, act=self.act_fn, down=down
        )


def run_experts(
    hidden_TD: Tensor,
    index_Tk: Tensor,
    share_Tk: Tensor,
    *,
    experts: int,
    gate_up: Callable[[int, Tensor], Tensor],
    act: Any,
    down: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """One expert after the other: act(gate(x)) · up(x), then down, times its share, summed; [T, D].

    `gate_up` and `down` multiply rows [n, ·] with an expert's weight.
    """
    chosen = index_Tk.shape[-1]
    result = hidden_TD.new_zeros(hidden_TD.shape)
    share = share_Tk.reshape(-1)
    for expert, places in tokens_by_expert(index_Tk, experts):
        token = places // chosen
        x = hidden_TD[token]
        gate, up = gate_up(expert, x).chunk(2, dim=-1)
        x = act(gate) * up
        del gate, up
        x = down(expert, x)
        x = x * share[places, None]
        result.index_add_(0, token, x.to(result.dtype))
        del x
    return result
