"""Fused experts that run from packed weights, one expert at a time.

T tokens, k experts for each, E experts, D width, I inner width.
"""

from typing import Any

from torch import Tensor, nn

from memfit.packed.routing import tokens_by_expert
from memfit.packed.scheme import Scheme
from memfit.packed.store import PackedWeight, Read

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
        chosen, width, inner = top_k_index.shape[-1], self.hidden_dim, self.intermediate_dim
        result = hidden_states.new_zeros(hidden_states.shape)
        share = top_k_weights.reshape(-1)
        for expert, places in tokens_by_expert(top_k_index, self.num_experts):
            token = places // chosen
            x = hidden_states[token]
            start = expert * 2 * inner
            gate, up = self.gate_up_proj.matmul(x, start=start, stop=start + 2 * inner).chunk(2, dim=-1)
            x = self.act_fn(gate) * up
            del gate, up
            x = self.down_proj.matmul(x, start=expert * width, stop=(expert + 1) * width)
            x = x * share[places, None]
            result.index_add_(0, token, x.to(result.dtype))
            del x
        return result
