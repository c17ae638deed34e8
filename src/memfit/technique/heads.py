"""Values and the output of an attention made of fewer dimensions a head: the product that they are, factored as one.

    Σ_heads O_q softmax(..) V_h x,   ŷ_q = E D y_q,  y_q = V_h x̄ [d]    →    V′_h = D V_h,  O′_q = O_q E

Attention weighs tokens, not dimensions: what it does between the two is the same in any basis of a head's d dimensions.
So D [k, d] takes the k of them that the output reads most, by what their errors cost there, and E is what gives the
output back best. With A_h = Σ_q O_qᵀ G O_q of the query heads that read head h, and H_h the mean second moment of what
they read, that is the low rank of A_h^½ for inputs of H_h. O′ is then fitted for all heads together: O H Dᵀ (D H Dᵀ)⁻¹.

Both become k/d of what they were, where factors of each alone would take as many bytes at a far lower rank. Nothing may
stand between values and output, nor a bias be added to the values.

Legend of shapes: N outputs of the values (heads h · d), K inputs, M outputs of the output, Q its inputs (query heads ·
d), D those that are kept.
"""

import torch
from torch import Tensor, nn

from memfit.packed.fake import blocks_to_run
from memfit.packed.forms import Narrow
from memfit.packed.scheme import Scheme

from .gptq import DAMPING, Factor, agreement, corrected, factor, gptq
from .low_rank import fitted_left
from .made import Made
from .quantize import Quantized, quantize
from .spectrum import Metric, leading, root_of, row_slices, tails, weighed, wide_of

_CHILDREN = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb", "attn_dropout"})
"""What an attention may be made of, for its values to go to the output as they are."""


def why_not_narrow(attention: nn.Module) -> str | None:
    """Why values and output of an attention cannot be made narrower; None if they can."""
    children = dict(attention.named_children())
    value, output, query = (children.get(name) for name in ("v_proj", "o_proj", "q_proj"))
    if not (isinstance(value, nn.Linear) and isinstance(output, nn.Linear) and isinstance(query, nn.Linear)):
        return f"{type(attention).__name__} has no linear layers q_proj, v_proj and o_proj"
    if unknown := sorted(children.keys() - _CHILDREN):
        return f"{type(attention).__name__} has {', '.join(unknown)}, which may change values on their way"
    width = getattr(attention, "head_dim", None)
    if not isinstance(width, int) or value.out_features % width or output.in_features % value.out_features:
        return f"{type(attention).__name__} does not say how wide its heads are"
    if query.out_features != output.in_features:
        return f"{type(attention).__name__} makes {query.out_features} of queries for {output.in_features}: a gate"
    if value.bias is not None:
        return "a bias is added to the values"
    return None


@torch.no_grad()
def narrow_heads(
    value_NK: Tensor, output_MQ: Tensor, *, width: int, kept: int, factor_Q: Factor | None = None,
    rows_M: Tensor | None = None, base: Scheme | None = None, value_base: Scheme | None = None,
    factor_K: Factor | None = None,
) -> tuple[Made, Made]:  # fmt: skip
    """Values [N, K] and output [M, Q] with `kept` dimensions of each head's `width`.

    Args:
        factor_Q: of E[y yᵀ] of what comes to the output; None: all alike.
        rows_M: G, what errors of the output's outputs count.
        base, value_base: integers of the output and of the values; None: bf16.
        factor_K: of what comes to the values, for their integers.

    Raises:
        ValueError: shapes that are not of heads of this width, or more kept than there are.
    """
    metric = Metric(factor=factor_Q)
    heads, queries = _heads(value_NK, output_MQ, width, kept, metric)
    bases = [
        _basis(gram, root, kept) for gram, root in _grams(output_MQ, width, heads, queries // heads, metric, rows_M)
    ]
    narrow_value = torch.cat([
        basis @ value_NK[head * width : (head + 1) * width].to(basis.dtype) for head, basis in enumerate(bases)
    ])  # fmt: skip
    across_DQ = _beside_each_other(bases, queries // heads)
    fit = fitted_left(across_DQ, metric, bases[0].dtype)
    narrow_output = torch.cat([output_MQ[part].to(bases[0].dtype) @ fit.across for part in row_slices(output_MQ)])
    inner = None if factor_Q is None or base is None else factor(_turned(across_DQ, metric))
    return (
        _made(value_NK, narrow_value, Narrow(heads=heads, kept=kept, side="out", base=value_base), factor_K),
        _made(output_MQ, narrow_output, Narrow(heads=queries, kept=kept, side="in", base=base), inner),
    )


@torch.no_grad()
def fitted_output(
    output_MQ: Tensor, narrow_MD: Tensor, moved_MQ: Tensor, halves: tuple[Tensor, Tensor] | None, hessian_QQ: Tensor,
    form: Narrow, *, damping: float = DAMPING,
) -> tuple[Made, float]:  # fmt: skip
    """The narrow output for what narrow values, and all before them, now make of its inputs: y ŷ as `gptq.corrected`
    has it, but from O′ on, as O is of another basis.

    Args:
        narrow_MD: O′ as `narrow_heads` found it.
        moved_MQ: O E[(y − ŷ) ŷᵀ], ŷ 0 where nothing is read.
        halves: of it by two halves of the text, as `gptq.agreement` takes them; None: there are none.
        hessian_QQ: E[ŷ ŷᵀ].

    Returns: what is stored, and the damping that H took.
    """
    columns = form.columns(output_MQ.shape[1])
    made = factor(hessian_QQ.index_select(0, columns).index_select(1, columns), damping=damping, overwrite=True)
    metric, ridge = Metric(factor=made), made.damping * made.importance.mean()
    moved = moved_MQ.index_select(1, columns).to(made.coupling.dtype)
    off = output_MQ.index_select(1, columns).to(moved.dtype).sub_(narrow_MD)
    # (O − O′) H, H as it is before it is damped.
    moved.add_(metric.times_turned(metric.times(off))).sub_(off.mul_(ridge))
    del off
    if halves is not None:
        first, second = (half.index_select(1, columns) for half in halves)
        moved.mul_(agreement(first, second, made))
        del first, second
    return _made(output_MQ, corrected(narrow_MD, moved, made), form, made), made.damping


@torch.no_grad()
def narrow_errors(
    value_NK: Tensor, output_MQ: Tensor, *, width: int, factor_Q: Factor | None = None, rows_M: Tensor | None = None
) -> Tensor:
    """Σ_o G_o (E H Eᵀ)_oo of the output for every number of dimensions kept: float64 [d + 1]; half of it is nats.

    Errors of different heads are taken as independent, and those of all queries that read one as alike.
    """
    metric = Metric(factor=factor_Q)
    heads, queries = _heads(value_NK, output_MQ, width, 1, metric)
    grams = _grams(output_MQ, width, heads, queries // heads, metric, rows_M)
    return torch.stack([tails(gram) for gram, _ in grams]).sum(dim=0)


def _heads(value: Tensor, output: Tensor, width: int, kept: int, metric: Metric) -> tuple[int, int]:
    """Heads of the values, and of the queries."""
    rows, inputs = value.shape[0], output.shape[1]
    if rows % width or inputs % rows:
        raise ValueError(f"values of {rows} and an output that reads {inputs} are not of heads of {width}")
    if not 1 <= kept <= width:
        raise ValueError(f"of heads of {width}, 1 to {width} dimensions are kept, got {kept}")
    metric.check(inputs)
    return rows // width, inputs // width


def _grams(
    output_MQ: Tensor, width: int, heads: int, each: int, metric: Metric, rows_M: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Of each head A^½ H A^½ᵀ [d, d], and A^½."""
    wide = wide_of(output_MQ, metric)
    root_M = root_of(rows_M, wide)
    found = []
    for head in blocks_to_run(range(heads)):
        reads = torch.zeros(width, width, dtype=wide)
        moment = torch.zeros(width, width, dtype=wide)
        for query in range(head * each, (head + 1) * each):
            columns = slice(query * width, (query + 1) * width)
            block = weighed(output_MQ[:, columns].to(wide), root_M)
            reads.addmm_(block.t(), block)
            picked = torch.zeros(width, output_MQ.shape[1], dtype=wide)
            picked[:, columns].fill_diagonal_(1.0)
            root = metric.times(picked)
            moment.addmm_(root, root.t())
            del block, picked, root
        values, vectors = torch.linalg.eigh(reads)
        half = vectors.mul_(values.clamp_(min=0).sqrt_()).t()
        found.append((half @ (moment / each) @ half.t(), half))
    return found if len(found) == heads else [*found, *[found[-1]] * (heads - len(found))]


def _basis(gram: Tensor, half: Tensor, kept: int) -> Tensor:
    """D [k, d]: the leading directions of the Gram matrix as a head's dimensions, their rows orthonormal."""
    read = leading(gram, kept).t() @ half
    # Directions that nothing reads have rows of 0; QR gives them some that are orthogonal to all others.
    found: Tensor = torch.linalg.qr(read.t())[0]
    return found.t()


def _beside_each_other(bases: list[Tensor], each: int) -> Tensor:
    """D of all query heads, block by block [Q kept, Q]."""
    kept, width = bases[0].shape
    whole = bases[0].new_zeros(len(bases) * each * kept, len(bases) * each * width)
    for query in range(len(bases) * each):
        whole[query * kept : (query + 1) * kept, query * width : (query + 1) * width] = bases[query // each]
    return whole


def _turned(across_DQ: Tensor, metric: Metric) -> Tensor:
    """Second moments of what comes to the narrow output, D H Dᵀ."""
    root = metric.times(across_DQ)
    return root @ root.t()


def _made(whole: Tensor, narrow: Tensor, form: Narrow, inputs: Factor | None) -> Made:
    shape = (whole.shape[0], whole.shape[1])
    if (reason := form.why_not(shape)) is not None:
        raise ValueError(f"{form.name} cannot store {shape}: {reason}")
    if form.base is None:
        return Made(form=form, shape=shape, parts={"weight_narrow": narrow.to(torch.bfloat16).contiguous()})
    return Made(form=form, shape=shape, parts={}, base=_integers(narrow, form.base, inputs))


def _integers(weight: Tensor, scheme: Scheme, inputs: Factor | None) -> Quantized:
    return quantize(weight, scheme) if inputs is None else gptq(weight, inputs, scheme).quantized
