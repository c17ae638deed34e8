"""Run a model whose weights are never all in memory: each block is read when it runs, and let go after.

Blocks run under a custom autograd function: the forward pass keeps only a block's inputs, the backward pass
reads its weights again and recomputes it (gradient checkpointing; Chen et al. 2016). Embeddings look their
rows up, and heads multiply, in blocks of rows read from the file, so that no table is ever whole.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from memfit.account.structure import stacked_blocks
from memfit.packed.experts import WEIGHTS as EXPERTS_WEIGHTS
from memfit.packed.experts import run_experts
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.modules import is_experts
from memfit.source.source import Source

_TOGETHER: Final = 64
"""Rows that forms may lay out together: a block of rows ends on a multiple."""
ROWS_NBYTES: Final = 8 << 20
"""Bytes of a table's rows read at a time."""

Listener = Callable[[str, Tensor, Tensor], None]
"""Called with a module's name, its input [..., K] and its output [..., N], where gradients are wanted. Of fused
experts, with the weight's name, `#` and the expert's number."""

Visit = Callable[[str, nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called with a block's name, the block, its forward pass and that pass's arguments."""


Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""From shape and dtype to a tensor of any values."""


class Streamed:
    """`model` with its weights on the disk. Blocks, tables and the rest are read as they are used.

    Args:
        source: what is run; its weights must be there.
        dtype: the parameters are cast to this.
    """

    def __init__(self, source: Source, *, dtype: torch.dtype = torch.bfloat16) -> None:
        self.source, self.dtype = source, dtype
        self.model = source.build(dtype=dtype)
        self.listener: Listener | None = None
        self.watched: frozenset[str] = frozenset()
        self.visit: Visit = lambda name, block, forward, args, kwargs: forward(*args, **kwargs)
        """Runs a block while its weights are there."""
        self.beside: Callable[[str, Tensor], None] = lambda name, x: None
        """Called before a module outside of blocks that has weights of its own: with its name, and its input."""
        self.rounded: Callable[[str, Tensor], Tensor] | None = None
        """Of a table's name and rows [N, D] that were looked up: what a rounded table would have given."""
        self.apart: frozenset[str] = frozenset()
        """Parameters of blocks that are not read with their block: the visitor brings them."""
        self.given: Mapping[str, Callable[[], Tensor]] = {}
        """Parameters outside of tables that are not read from the source: they come from here, each time anew, perhaps
        with a gradient."""
        self.empty: Empty = lambda shape, dtype: torch.empty(shape, dtype=dtype)
        """Room for rows that were looked up."""
        self.head = head_name(self.model)
        config: Any = self.model.config  # the model's own copy
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        """Logits are cap · tanh(logits / cap) (Gemma 2): left to whoever makes them."""
        if self.cap is not None:
            config.final_logit_softcapping = None
        self._replace_tables()
        blocks = dict(stacked_blocks(self.model))
        self.blocks = tuple(blocks)
        for name, block in blocks.items():
            block.forward = self._block(name, block, block.forward)
        for name, module in list(self.model.named_modules()):
            own = [leaf for leaf, p in module.named_parameters(recurse=False) if p.device.type == "meta"]
            if own and not any(name == block or name.startswith(block + ".") for block in blocks):
                module.forward = self._leaf(name, module, own, module.forward)

    def rows(self, parameter: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows [R, K]) of a 2-dim parameter, from the first to the last, read one block at a time."""
        yield from rows_of(self.source, parameter, dtype=self.dtype)

    def weight_of(self, layer: str) -> Tensor:
        """A layer's weight, read anew."""
        here = self.model.get_submodule(layer)._parameters["weight"]
        assert here is not None
        return self.source.read_parameter(f"{layer}.weight", dtype=here.dtype)

    # -- tables ------------------------------------------------------------------------------------

    def _replace_tables(self) -> None:
        for name, module in list(self.model.named_modules()):
            if _is_looked_up(module) and module.weight.device.type == "meta":
                _put(self.model, name, _Table(self, name, module))
        if self.head is not None:
            _put(self.model, self.head, _Through(self.model.get_submodule(self.head)))

    # -- blocks and what is outside of them ----------------------------------------------------------

    def _block(self, name: str, block: nn.Module, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            tensors = [leaves[i] for i in places]
            rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            shape: list[Any] = []

            def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                filled = list(rest)
                for place, tensor in zip(places, inputs, strict=True):
                    filled[place] = tensor
                again, named = tree_unflatten(filled, spec)
                with self._read(name, block), self._listening(name, block):
                    out = self.visit(name, block, forward, again, named)
                flat, out_spec = tree_flatten(out)
                shape[:] = [out_spec, flat]
                return tuple(leaf for leaf in flat if isinstance(leaf, Tensor))

            # Without gradients it is a plain call, in which a visitor may begin and end an allocator's recordings.
            learns = torch.is_grad_enabled()
            made = _Recomputed.apply(run, *tensors) if learns else run(tuple(tensors))  # type: ignore[no-untyped-call]
            out_spec, flat = shape
            values = iter(made if isinstance(made, tuple) else (made,))
            whole = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in flat]
            shape.clear()
            return tree_unflatten(whole, out_spec)

        return call

    def _leaf(self, name: str, module: nn.Module, own: list[str], forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], Tensor):
                self.beside(name, args[0])
            with self._read(name, module, own):
                out = forward(*args, **kwargs)
            listener = self.listener
            wanted = listener is not None and torch.is_grad_enabled() and name in self.watched
            if wanted and args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                assert listener is not None
                listener(name, args[0], out)
            return out

        return call

    @contextmanager
    def _read(self, name: str, module: nn.Module, own: list[str] | None = None) -> Iterator[None]:
        """The module's parameters are real inside, and on meta again after."""
        put_back: list[tuple[nn.Module, str, nn.Parameter]] = []
        for full, parameter in (
            list(module.named_parameters())
            if own is None
            else [(leaf, getattr(module, leaf)) for leaf in own]
        ):
            if own is None and f"{name}.{full}" in self.apart:
                continue
            owner_name, _, leaf = full.rpartition(".")
            owner, whole_name = module.get_submodule(owner_name), f"{name}.{full}" if name else full
            if whole_name in self.given:
                owner._parameters[leaf] = self.given[whole_name]()  # type: ignore[assignment]
            else:
                value = self.source.read_parameter(whole_name, dtype=parameter.dtype)
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
                del value
            put_back.append((owner, leaf, parameter))
        try:
            yield
        finally:
            for owner, leaf, parameter in put_back:
                owner._parameters[leaf] = parameter

    @contextmanager
    def _listening(self, name: str, block: nn.Module) -> Iterator[None]:
        listener = self.listener
        if listener is None or not torch.is_grad_enabled():
            yield
            return

        def hear(full: str) -> Any:
            def hook(_: nn.Module, inputs: Any, out: Any) -> None:
                if inputs and isinstance(inputs[0], Tensor) and isinstance(out, Tensor):
                    listener(full, inputs[0], out)

            return hook

        watched = [(f"{name}.{below}", module) for below, module in block.named_modules()]
        watched = [(full, module) for full, module in watched if full in self.watched]
        experts = [module for _, module in watched if is_experts(module)]
        hooks = []
        for full, module in watched:
            if is_experts(module):
                module.forward = _heard_experts(full, module, listener)
            else:
                hooks.append(module.register_forward_hook(hear(full)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in experts:
                del module.forward


def _heard_experts(name: str, module: Any, listener: Listener) -> Any:
    """The forward pass of fused experts, each product told as `name.gate_up_proj#3`: weight and expert."""

    def product(leaf: str) -> Any:
        def times(expert: int, x: Tensor) -> Tensor:
            out = nn.functional.linear(x, module.get_parameter(leaf)[expert])
            listener(f"{name}.{leaf}#{expert}", x, out)
            return out

        return times

    def forward(hidden_TD: Tensor, index_Tk: Tensor, share_Tk: Tensor) -> Tensor:
        gate_up, down = (product(leaf) for leaf in EXPERTS_WEIGHTS)
        routed = (index_Tk, share_Tk)
        return run_experts(
            hidden_TD, *routed, experts=module.num_experts, gate_up=gate_up, act=module.act_fn, down=down
        )

    return forward


class _Recomputed(torch.autograd.Function):
    """Runs a function without remembering how; remembers its inputs, and runs it again to go backward."""

    @staticmethod
    def forward(ctx: Any, run: Any, *tensors: Tensor) -> Any:
        ctx.run, ctx.inputs = run, tensors
        ctx.wanted = [tensor.requires_grad for tensor in tensors]
        out = run(tensors)
        return out if len(out) != 1 else out[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs = tuple(
            tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(ctx.inputs, ctx.wanted, strict=True)
        )
        with torch.enable_grad():
            out = ctx.run(inputs)
        pairs = [
            (made, gradient)
            for made, gradient in zip(out, gradients, strict=True)
            if made.requires_grad and gradient is not None
        ]
        torch.autograd.backward([made for made, _ in pairs], [gradient for _, gradient in pairs])
        return None, *(tensor.grad for tensor in inputs)


class _Through(nn.Module):
    """Stands for the head: hands the hidden states through, so that logits can be made block by block."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head = [head]  # in a list: it is no submodule

    @property
    def weight(self) -> Tensor:
        """The head's weight, on meta: Mamba asks for its dtype."""
        return self._head[0].get_parameter("weight")

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _Table(nn.Module):
    """An embedding whose rows are looked up in blocks read from the file, [B, T] -> [B, T, D]."""

    def __init__(self, streamed: Streamed, name: str, table: nn.Embedding) -> None:
        super().__init__()
        self._streamed = [streamed]  # in a list: it is no submodule
        self.name, self.width = name, table.embedding_dim
        self.scale = getattr(table, "embed_scale", None)
        """A tensor (Gemma 3), a number (BART), or none."""
        self.padding_idx = table.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        streamed = self._streamed[0]
        out = streamed.empty((*ids.shape, self.width), streamed.dtype)
        look_up(streamed.rows(f"{self.name}.weight"), ids, out)
        if streamed.rounded is not None:
            out = streamed.rounded(self.name, out.view(-1, self.width)).view(out.shape)
        if torch.is_grad_enabled():
            # Gradients begin here, before it is scaled: an error of the table's is scaled too.
            out.requires_grad_()
            if streamed.listener is not None and self.name in streamed.watched:
                streamed.listener(self.name, ids, out)
        if self.scale is not None:
            out = out * (self.scale.to(out.dtype) if isinstance(self.scale, Tensor) else self.scale)
        return out


def look_up(rows: Iterator[tuple[int, Tensor]], ids: Tensor, out: Tensor) -> None:
    """Fill `out` [..., D] with rows `ids` [...] of a table that comes in blocks."""
    flat, found = ids.reshape(-1), out.view(-1, out.shape[-1])
    step = max(1, ROWS_NBYTES // (found.shape[1] * found.element_size()))
    for start, block in rows:
        here = _those_within(flat, start, block.shape[0])
        for first in blocks_to_run(range(0, here.shape[0], step)):
            some = here[first : first + step]
            found.index_copy_(0, some, block.index_select(0, flat[some].sub_(start)))
        del block


def _those_within(ids: Tensor, start: int, count: int) -> Tensor:
    """Where ids [T] are of a block of rows; nobody can say of fake ones, and all may be."""
    if is_fake(ids):
        return torch.arange(ids.shape[0], device=ids.device)
    return ((ids >= start) & (ids < start + count)).nonzero().squeeze(1)


def rows_of(
    source: Source, parameter: str, *, dtype: torch.dtype, nbytes: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [R, K] in `dtype`) of a parameter [N, K], all dimensions but the last taken as one; as many rows
    as `nbytes` hold, by default `ROWS_NBYTES`, but one at least."""
    total, width = row_shape(source, parameter)
    step = max(1, (nbytes or ROWS_NBYTES) // (width * dtype.itemsize))
    step -= step % _TOGETHER if step > _TOGETHER else 0
    whole = (
        None
        if _stored_whole(source, parameter)
        else source.read_parameter(parameter, dtype=dtype).view(total, width)
    )
    for start in blocks_to_run(range(0, total, step)):
        stop = min(total, start + step)
        if whole is not None:
            yield start, whole[start:stop]
            continue
        assert source.checkpoint is not None
        piece = source.layout.pieces[canonical(source, parameter)][0]
        yield start, source.checkpoint.read_rows(piece.tensor, start, stop).to(dtype)


def row_shape(source: Source, parameter: str) -> tuple[int, int]:
    """Rows and width of a parameter, all dimensions but the last taken as rows."""
    shape = source.parameters[parameter][0]
    width = shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, width


def canonical(source: Source, parameter: str) -> str:
    """The name under which a tied parameter is stored."""
    return source.parameters[parameter][2]


def _stored_whole(source: Source, parameter: str) -> bool:
    """Whether one stored tensor holds the parameter as it is."""
    pieces = source.layout.pieces.get(canonical(source, parameter), ())
    return len(pieces) == 1 and pieces[0].index is None and pieces[0].start is None


def head_name(model: nn.Module) -> str | None:
    """The name of the linear layer that makes the logits; None where there is none."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Linear):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def _is_looked_up(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether a table does no more than look rows up and scale them; positions with an offset do more (OPT)."""
    if not isinstance(module, nn.Embedding):
        return False
    kind = type(module)
    return kind.forward is nn.Embedding.forward or kind.__name__.endswith("ScaledWordEmbedding")


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
