"""The loss of a distillation: what a few lines in float64 say, whole or in chunks, of all answers or the likeliest."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.technique.chunk_loss import ChunkLoss, Head
from memfit.technique.distil import (
    Distil,
    FromHead,
    FromLogits,
    attention_loss,
    hidden_loss,
    matched_layers,
    top_of,
)
from memfit.technique.distil_loss import chunked_distil_loss, distil_loss

N, V, D, E = 300, 210, 12, 20
CHUNKS = {"one chunk": 1 << 30, "tokens": 16 * V * 256, "entries": 16 * N * 80, "the fewest entries": 1}
HEAD = Head(softcap=5.0, multiplier=0.7)


def logits_of(hidden, weight, bias, head):
    z = F.linear(hidden, weight, bias)
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return head.multiplier * z


def plain(z, z_t, labels, distil, scale):
    """The formula."""
    t, counted = distil.temperature, labels.ne(-100)
    log_p, log_q = torch.log_softmax(z_t / t, -1), torch.log_softmax(z / t, -1)
    if distil.top is not None and distil.top < z.shape[1]:
        left = torch.ones_like(log_p, dtype=torch.bool).scatter(1, log_p.topk(distil.top)[1], False)
        few = []
        for x in (log_p, log_q):
            rest = x.masked_fill(~left, -math.inf).logsumexp(-1, keepdim=True)
            few.append(torch.cat([x[~left].view(len(x), -1), rest], -1))
        log_p, log_q = few
    first, second = (log_p, log_q) if distil.kl == "forward" else (log_q, log_p)
    kl = (first.exp() * (first - second)).sum(-1)[counted].sum()
    return scale * (distil.alpha * F.cross_entropy(z, labels, reduction="sum") + (1 - distil.alpha) * t * t * kl)


def made(*, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = [draw(N, D).requires_grad_(), draw(V, D).requires_grad_()]
    student.append(draw(V).requires_grad_() if bias else None)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = -100
    return student, (draw(N, E) / 2, draw(V, E), draw(V)), labels


def off(found, right):
    return float(((found - right).norm() / right.norm()).detach())


def distils():
    for kl in ("forward", "reverse"):
        for alpha, temperature in ((0.3, 2.0), (0.0, 1.0), (0.6, 1.0)):
            for top in (None, 7, V):
                yield Distil(teacher="t", alpha=alpha, temperature=temperature, kl=kl, top=top)


def answers_of(kind, theirs, head, distil):
    z_t = logits_of(*theirs, head)
    if distil.top is not None:
        found = top_of(z_t, top=distil.top, temperature=distil.temperature)
        # Kept in fp32; here as exact as the formula, so that the difference is that of the loss alone.
        log_p = torch.log_softmax(z_t / distil.temperature, -1)
        ids = found.ids_Nk.long()
        rest = log_p.scatter(1, ids, -math.inf).logsumexp(1)
        assert off(found.log_probs_Nk.double(), log_p.gather(1, ids)) < 1e-6
        if distil.top < V:
            assert float((found.rest_N.double() - rest).abs().max()) < 1e-5
        rest = rest.clamp(min=-1e3)
        return type(found)(ids_Nk=found.ids_Nk, log_probs_Nk=log_p.gather(1, ids), rest_N=rest)
    if kind == "logits":
        return FromLogits(logits_NV=z_t)
    return FromHead(hidden_NE=theirs[0], weight_VE=theirs[1], bias_V=theirs[2], head=head)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients_are_those_of_the_formula(chunk):
    for number, distil in enumerate(distils()):
        head = HEAD if number % 2 else Head()
        student, theirs, labels = made(bias=bool(number % 3))
        of = [tensor for tensor in student if tensor is not None]
        z = logits_of(*student, head)
        right = plain(z, logits_of(*theirs, head), labels, distil, 0.01)
        gradients = torch.autograd.grad(right, of)
        answers = answers_of("logits" if number % 4 == 1 else "head", theirs, head, distil)
        found = chunked_distil_loss(
            student[0], student[1], labels, answers, distil, chunk_nbytes=CHUNKS[chunk], bias_V=student[2], scale=0.01,
            head=head,
        )  # fmt: skip
        assert off(found, right) < 1e-10, distil
        for one, gradient in zip(torch.autograd.grad(found, of), gradients, strict=True):
            assert off(one, gradient) < 1e-10, distil
        kept = []
        again = chunked_distil_loss(
            student[0], student[1], labels, answers, distil, chunk_nbytes=CHUNKS[chunk], bias_V=student[2], scale=0.01,
            head=head, keep=kept.append,
        )  # fmt: skip
        assert torch.autograd.grad(again, of[1:2], allow_unused=True) == (None,)
        rows = [kept[0].rows_of_gradient(of[1].detach(), student[2], at, min(at + 64, V)) for at in range(0, V, 64)]
        assert off(torch.cat(rows), gradients[1]) < 1e-10, distil


def test_whole_logits_give_the_same():
    for distil in distils():
        student, theirs, labels = made()
        z = logits_of(*student, HEAD)
        answers = answers_of("logits", theirs, HEAD, distil)
        right = plain(z, logits_of(*theirs, HEAD), labels, distil, 0.02)
        found = distil_loss(z, labels, answers, distil, scale=0.02, chunk_nbytes=1 << 18)
        assert off(found, right) < 1e-10
        wanted, had = torch.autograd.grad(right, student, retain_graph=True), torch.autograd.grad(found, student)
        assert all(off(one, other) < 1e-10 for one, other in zip(had, wanted, strict=True))


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_a_teacher_who_is_the_student_teaches_nothing(kl):
    student, _, labels = made(dtype=torch.bfloat16)
    own = FromHead(hidden_NE=student[0].detach(), weight_VE=student[1].detach(), bias_V=student[2].detach())
    distil = Distil(teacher="t", alpha=0.0, kl=kl)
    for chunk in CHUNKS.values():
        loss = chunked_distil_loss(student[0], student[1], labels, own, distil, chunk_nbytes=chunk, bias_V=student[2])
        assert abs(float(loss.detach())) < 1e-4
        for gradient in torch.autograd.grad(loss, student):
            assert float(gradient.abs().max()) < (1e-30 if kl == "forward" else 1e-5)


def test_cross_entropy_alone_is_that_of_plain_training():
    student, theirs, labels = made()
    answers = FromHead(hidden_NE=theirs[0], weight_VE=theirs[1])
    ours = chunked_distil_loss(*student[:2], labels, answers, Distil(teacher="t", alpha=1.0), chunk_nbytes=1 << 20)
    theirs = ChunkLoss(chunk_nbytes=1 << 20).apply(*student[:2], labels)
    assert off(ours, theirs) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), top=st.integers(1, 30), t=st.floats(0.3, 5),
    kl=st.sampled_from(["forward", "reverse"]),
)  # fmt: skip
def test_the_likeliest_alone_never_say_more_than_all(seed, top, t, kl):
    generator = torch.Generator().manual_seed(seed)
    z, z_t = (4 * torch.randn(5, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.zeros(5, dtype=torch.int64)
    distil = Distil(teacher="t", alpha=0.0, temperature=t, kl=kl, top=top)
    whole = float(distil_loss(z, labels, FromLogits(logits_NV=z_t), distil, scale=1.0))
    few = float(distil_loss(z, labels, top_of(z_t, top=top, temperature=t), distil, scale=1.0))
    assert few <= whole * (1 + 1e-4) + 1e-4
    assert few >= -1e-4
    if top == 30:
        assert few == pytest.approx(whole, rel=1e-4, abs=1e-4)


def test_a_sure_teacher_and_student_leave_numbers():
    """Where nothing is left beside the likeliest, in fp32."""
    z = torch.zeros(2, 50)
    z[:, 3] = 300.0
    for kl in ("forward", "reverse"):
        distil = Distil(teacher="t", alpha=0.5, temperature=1.0, kl=kl)
        answers = top_of(z.clone(), top=2, temperature=1.0)
        assert bool(torch.isfinite(answers.rest_N).all() and torch.isfinite(answers.log_probs_Nk).all())
        for moved in (z, z.roll(1, 1)):
            hidden, weight = torch.eye(2, requires_grad=True), moved.T.clone().requires_grad_()
            loss = chunked_distil_loss(hidden, weight, torch.tensor([3, 3]), answers, distil, chunk_nbytes=1)
            assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(loss, (hidden, weight)))
            assert math.isfinite(float(loss.detach()))


def test_layers_are_matched_evenly_to_the_last():
    assert matched_layers(4, 4) == (0, 1, 2, 3)
    assert matched_layers(3, 6) == (1, 3, 5)
    assert matched_layers(4, 6)[-1] == 5
    assert matched_layers(6, 4)[-1] == 3
    for student in range(1, 9):
        for teacher in range(1, 9):
            found = matched_layers(student, teacher)
            assert list(found) == sorted(found) and found[-1] == teacher - 1 and found[0] >= 0


def test_what_lies_between_layers_is_matched_token_by_token():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.5, 0.0]], dtype=torch.float64)
    right = sum(
        float(weights[b, t] * ((one[b, t] - other[b, t]) ** 2).sum() / (other[b, t] ** 2).sum())
        for b in range(2)
        for t in range(3)
    )
    assert float(hidden_loss([one], [other], weights)) == pytest.approx(right, rel=1e-12)
    assert float(hidden_loss([one, one], [one, other], weights)) == pytest.approx(right / 2, rel=1e-12)
    p, q = (torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
    p[:, :, 0, 1:] = 0  # what causal attention does not see
    kl = torch.where(p > 0, p * (p / q).log(), 0).sum(-1).mean(1)
    assert float(attention_loss([q], [p], weights)) == pytest.approx(float((kl * weights).sum()), rel=1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"alpha": math.nan}, "alpha must be from 0 to 1"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
        ({"temperature": math.inf}, "temperature must be above 0"),
        ({"kl": "sideways"}, "kl must be one of forward, reverse, got 'sideways'"),
        ({"match": ("logits",)}, "match must be of hidden, attention, got 'logits'"),
        ({"match_weight": -1.0}, "match_weight must be at least 0"),
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"place": "cloud"}, "place must be one of auto, memory, disk"),
        ({"match": ("hidden",), "place": "disk"}, "matching hidden needs the teacher in memory"),
        ({"teacher": ""}, "needs a teacher"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Distil(**{"teacher": "t"} | given)


def test_settings_are_read_back_from_json():
    distil = Distil(teacher="t", alpha=0.2, match=("hidden", "attention"), kl="reverse")
    assert Distil.from_json(distil.to_json()) == distil
