"""What the judge asks other code: every kernel, k, S and kind of state, and every convention."""

import math
from collections import Counter
from itertools import product

import pytest
import torch

from zoo.oracle import questions as asked
from zoo.oracle.fields import DIM

KERNELS = ("flow_sde", "cps", "dance")


@pytest.fixture(params=[0, 1])
def generator(request):
    return torch.Generator().manual_seed(request.param)


def all_differ(tensors):
    """No two of the tensors are equal, nor two rows of one of them."""
    rows = torch.cat([z.flatten(1) for z in tensors])
    return len(rows.unique(dim=0)) == len(rows)


def test_transitions_are_asked_of_every_kernel_and_k(generator):
    """In the middle, later, and from t = 1, where flow_sde has a convention."""
    questions = asked.transition_questions(generator)
    counted = Counter((q.kernel, q.k) for q in questions)
    assert counted == {(kernel, k): 3 for kernel in KERNELS for k in (1, 2, 3, 5)}
    for i, q in enumerate(questions):
        low, high = ((0.5, 0.9), (0.2, 0.5), (1.0, 1.0))[i % 3]
        assert low <= q.t <= high and 0.6 * q.t <= q.s <= 0.9 * q.t
        assert q.x.shape == (3, DIM) and q.x.dtype == torch.float64
    assert all_differ([q.x for q in questions])
    assert len({q.t for q in questions}) == 25 and len({q.s for q in questions}) == 36


def test_log_probabilities_are_asked_of_vectors_and_of_pictures(generator):
    """With a std of its own in every row."""
    questions = asked.log_prob_questions(generator)
    assert [q.x_s.shape for q in questions] == [(4, 5), (3, 2, 4, 4)]
    for q in questions:
        assert q.mean.shape == q.x_s.shape and all_differ([q.x_s, q.mean])
        assert q.std.shape == q.x_s.shape[:1] and len(q.std.unique()) == len(q.std)
        assert q.std.min() >= 0.2 and q.std.max() <= 1.2


def test_losses_are_asked_of_every_kernel_with_and_without_k_terms(generator):
    """From one state and from states of their own; the clamp and both sides of the clip act."""
    questions = asked.loss_questions(generator)
    found = Counter(
        (q.kernel, q.factors, "shared" if len(q.x_t.unique(dim=0)) == 1 else "own")
        for q in questions
    )
    assert found == dict.fromkeys(product(KERNELS, ((), (2, 3)), ("own", "shared")), 1)
    for q in questions:
        assert q.x_t.shape == q.x_s.shape == (40, DIM) and all_differ([q.x_s])
        A = (q.rewards - q.rewards.mean()) / q.rewards.std()
        assert (A > 5).sum() == 1
        assert 0.5 <= q.t <= 0.9 and math.isclose(q.s, 0.75 * q.t)
        said = str(q)
        own = len(q.x_t.unique(dim=0)) > 1
        assert q.kernel in said and ("own states" in said) == own
        assert ("S = {}" in said) == (q.factors == ())
        assert clips_both_ways(q)


def clips_both_ways(q):
    """Some ratio of the single step is above the clip range, and some below."""
    process = asked.process_of(asked.pave, q.t, q.s, q.kernel, q.eta)
    t, s, prompt = (torch.full((40,), z) for z in (q.t, q.s, 0))
    means = [process.transition(q.x_t, f(q.x_t, t.double(), prompt), t.double(), s.double())
             for f in (q.velocity, q.velocity_old)]  # fmt: skip
    log_p, log_old = (
        torch.distributions.Normal(p.mean, p.std[:, None]).log_prob(q.x_s).mean(1) for p in means
    )
    ratio = (log_p - log_old).exp()
    return bool((ratio > 1 + q.clip).any()) and bool((ratio < 1 - q.clip).any())


def test_conventions_are_those_of_the_field():
    """In every combination; the usual ones are among them."""
    constants = ("kept", "log std kept, log(2 pi)/2 dropped", "dropped")
    assert set(asked.LOG_PROB_CONVENTIONS) == set(product(("mean", "sum"), constants))
    eps = (1e-8, 0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
    clamps, forms, clips = (5.0, None, 3.0, 1.0), ("paper", "matched"), ("as given", "none")
    every = set(product(("mean", "sum"), (1, 0), eps, clamps, forms, clips))
    assert set(asked.LOSS_CONVENTIONS) == every
    assert len(asked.LOSS_CONVENTIONS) == len(every) == 448
    usual = product(("mean", "sum"), (1, 0), (1e-8, 1e-4), (5.0, None), ("paper",), ("as given",))
    assert set(asked.USUAL_LOSS_CONVENTIONS) == set(usual)
    assert asked.LOSS_CONVENTIONS[0] == ("mean", 1, 1e-8, 5.0, "paper", "as given")


def test_a_function_is_given_copies_and_its_velocity(generator):
    """Under the names of its parameters; a velocity takes one time, or one a row, in x's dtype."""
    q = asked.loss_questions(generator)[0]
    given = q.arguments()
    assert tuple(given) == q.parameters()
    assert torch.equal(given["x_t"], q.x_t) and given["x_t"].data_ptr() != q.x_t.data_ptr()
    x, prompt = q.x_t[:2], torch.zeros(2, dtype=torch.long)
    for name in ("velocity", "velocity_old"):
        field = getattr(q, name)
        wanted = field(x, torch.full((2,), 0.3, dtype=torch.float64), prompt)
        assert torch.equal(given[name](x, 0.3), wanted)
        assert torch.equal(given[name](x, torch.tensor([0.3, 0.3], dtype=torch.float64)), wanted)
        single = given[name](x.float(), 0.3)
        assert single.dtype == torch.float32 and torch.allclose(single.double(), wanted, atol=1e-6)
