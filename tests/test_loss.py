"""policy_loss: against Algorithm 1 in slow loops, released formulas, true gradients and theory."""

import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slow import (
    EPS,
    FORMS,
    SAMPLERS,
    Counting,
    Observed,
    asking,
    derivative_along,
    each_form,
    each_kernel,
    each_mode,
    forms,
    generators,
    gradient,
    kernels,
    modes,
    moved,
    network,
    normal,
    observations,
    of_prompts,
    roll,
    slow_loss,
    slow_scored,
    slow_transition,
    some_advantages,
)
from torch.distributions import Normal, kl_divergence

import pave_grpo as pg
from zoo.oracle import theory
from zoo.oracle.fields import Constant, Gaussian, gaussian_law, policy_gradient

each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])
GRID = pg.schedule(4, 2.0)
POINT = [0.7, 0.55, 0.0]  # a grid whose first step is the one that theory prints figures for
# States below 10, std above 0.05: a log-density is off by |z| dz < 10 * 100 roundings * 10 / 0.05,
# and all that follows is smooth: 2e5 EPS = 4.4e-11 per unit of the compared number.
ROUNDING = 2e5 * EPS


def close(a, b):
    """Equal up to the rounding of a log-density, relative to the numbers compared."""
    return (a - b).abs().max().item() <= ROUNDING * max(1.0, b.abs().max().item())


# ---- The whole of Algorithm 1 --------------------------------------------------------------------


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    kernel=kernels,
    mode=modes,
    form=forms,
    eta=st.floats(0.3, 1.0),
    factors=st.sampled_from([(), (2,), (2, 3), (4,)]),
    clip=st.sampled_from([None, 0.02, 0.2]),
    reduction=st.sampled_from(["mean", "sum"]),
    size=st.sampled_from([0.0, 0.02, 0.1]),
)
@example(0, "flow_sde", "independent", "paper", 0.7, (2, 3), 0.05, "mean", 0.1)
@example(0, "cps", "shared_anchor", "matched", 0.7, (2, 3), 0.05, "sum", 0.1)
@example(0, "dance", "independent", "matched", 0.7, (2,), None, "mean", 0.1)
def test_loss_is_algorithm_1_in_slow_loops(
    seed, kernel, mode, form, eta, factors, clip, reduction, size
):
    """Value and gradient of -J, one member, step and k at a time, at theta_old and later."""
    old, process = network(seed), pg.Process(GRID, kernel, eta)
    rollout = roll(mode, old, process, P=2, G=3, steps=[0, 2], seed=seed)
    A, theta = some_advantages(rollout, seed), moved(old, seed, size)
    options = dict(factors=factors, form=form, clip=clip, reduction=reduction)
    first = pg.policy_loss(old, rollout, A, **options)
    ours = pg.policy_loss(theta, rollout, A, **options, old=first.old).loss
    slow = slow_loss(theta, old, rollout, A, factors, form, clip, reduction)
    assert ours.dtype == torch.float64 and ours.shape == ()
    assert close(ours, slow)
    if slow.requires_grad:  # not where every member was cut
        assert close(gradient(ours, theta), gradient(slow, theta))


def released(kernel, eta, x_t, x_s, v, t, s, t_1):
    """log p(x_s|x_t), a mean over dimensions, in the released trainers' own variables."""
    sigma, sigma_next, dt = t, s, s - t
    if kernel == "flow_sde":  # Flow-GRPO: sde_step_with_logprob
        g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, t_1, sigma))) * eta
        mean = x_t * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        std = g * torch.sqrt(-dt)
    elif kernel == "cps":  # Flow-CPS: with the 1/(2 c^2) that its code drops
        std = sigma_next * math.sin(eta * math.pi / 2)
        x0, x1 = x_t - sigma * v, x_t + (1 - sigma) * v
        mean = x0 * (1 - sigma_next) + x1 * torch.sqrt(sigma_next**2 - std**2)
    else:  # DanceGRPO: score of the predicted clean sample
        x0, std = x_t - sigma * v, eta * torch.sqrt(-dt)
        score = -(x_t - x0 * (1 - sigma)) / sigma**2
        mean = x_t + dt * v - eta**2 / 2 * score * dt
    square = -((x_s - mean) ** 2) / (2 * std**2)
    return (square - torch.log(std) - math.log(math.sqrt(2 * math.pi))).flatten(1).mean(1)


@each_mode
@pytest.mark.parametrize("kernel", ["flow_sde", "cps", "dance"])
def test_without_factors_it_is_the_coarse_method(kernel, mode):
    """S = {} is Flow-GRPO, Flow-CPS or DanceGRPO: PPO's loss on the released log-probability."""
    old, theta, clip = network(), moved(network(), 1, 0.1), 0.05
    rollout = roll(mode, old, pg.Process(GRID, kernel), P=2, G=4, steps=[0, 1, 2])
    A = some_advantages(rollout)
    t = GRID[0:3].repeat(2).repeat_interleave(4)
    s = GRID[1:4].repeat(2).repeat_interleave(4)
    x_t, x_s = rollout.x_t.expand_as(rollout.x_s).flatten(0, 2), rollout.x_s.flatten(0, 2)
    prompt = torch.arange(2).repeat_interleave(12)

    def log_prob(net):
        v = net(x_t, t, prompt)
        return released(kernel, 0.7, x_t, x_s, v, t[:, None], s[:, None], GRID[1])

    ratio = torch.exp(log_prob(theta) - log_prob(old).detach())
    advantages = A.expand(2, 3, 4).flatten()
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
    first = pg.policy_loss(old, rollout, A, factors=(), clip=clip)
    second = pg.policy_loss(theta, rollout, A, factors=(), clip=clip, old=first.old)
    assert 0 < second.terms[1].clip_fraction < 1
    assert close(second.loss, loss) and close(gradient(second.loss, theta), gradient(loss, theta))


@each_form
@each_mode
@each_kernel
def test_gradient_at_theta_old_is_the_policy_gradient(kernel, mode, form):
    """E9: at theta_old the gradient is -mean A d log p^(k), whatever the clip; ratios are 1."""
    net, process = network(), pg.Process(GRID, kernel)
    rollout = roll(mode, net, process, P=2, G=3, steps=[0, 2])
    A, total = some_advantages(rollout), 0.0
    for step in observations(rollout):
        for k in (1, 2, 3):
            mu, _, std = slow_scored(net, net, process, k, form, step)
            score = Normal(mu, std).log_prob(step.x_s).mean()
            total = total + A.expand(2, 2, 3)[step.index] * (1 if k == 1 else 1 / 2) * score
    truth = gradient(-total / (2 * 2 * 3), net)
    for clip in (None, 1e-6, 0.2):
        result = pg.policy_loss(net, rollout, A, factors=(2, 3), form=form, clip=clip)
        assert close(gradient(result.loss, net), truth)
        assert close(result.loss, -A.mean() * 2)  # J = mean A (1 + |S|/|S|)
        for term in result.terms.values():
            assert term.ratio_min == term.ratio_mean == term.ratio_max == 1.0
            assert term.clip_fraction == 0.0


@each_form
@each_kernel
def test_gradient_is_the_finite_difference(kernel, form):
    """With theta_old held, the loss's gradient at any theta is its five-point difference."""
    old, process = network(), pg.Process(GRID, kernel)
    rollout, theta = roll("independent", old, process), moved(old, 3, 0.02)
    A, options = some_advantages(rollout), dict(form=form, clip=None, kl=0.3, reference=network(9))
    remembered = pg.policy_loss(old, rollout, A, **options).old

    def value(module):
        return pg.policy_loss(module, rollout, A, **options, old=remembered).loss

    analytic = gradient(value(theta), theta)
    direction = normal(7, len(analytic))
    exact = (analytic @ direction).item()
    assert abs(derivative_along(direction, value, theta) - exact) <= 1e-7 * max(1.0, abs(exact))


def branch_gradient(process, flow, rollout, i):
    """d E[-|x_0 - 1|^2]/d (m, log q) of branches at step i alone, a mean over the prompts' x_1."""
    x_1, q = rollout.x_t[:, 0, 0], flow.log_q.exp()
    mean, var = gaussian_law(process, flow.m, q, x_1, 0 * q.detach(), [i], held={0, 1, 2} - {i})
    return gradient(-(var + (mean - 1) ** 2).sum(-1).mean(), flow)


@each_mode
@each_kernel
def test_the_estimator_is_the_true_policy_gradient(kernel, mode):
    """With A = r - mean r and S = {} the gradient is (1 - 1/G) dE[R] on average.

    The truth propagates mean and variance; where no log-probability credits it, theta is held.
    """
    # 40 batches of 500 prompts; z of 4 parameters (m, log q in two dimensions) in 6 cases: for
    # Student's t of 39 degrees |z| <= 6.5 has a false-alarm rate of 24 * 1.05e-7 = 2.5e-6.
    # Standard errors are 0.3 - 1% of the gradient in m, so an error of 7% there is seen, and
    # 2 - 34% in log q.
    process, P, G, batches = pg.Process(pg.schedule(3, 2.0), kernel, 0.9), 500, 8, 40
    m, q = torch.tensor([[0.2, -0.5], [0.6, 1.5]], dtype=torch.float64)
    flow, target = Gaussian(m, q.log()), torch.ones(2, dtype=torch.float64)
    estimates, truth = [], torch.zeros(4, dtype=torch.float64)
    for batch in range(batches):
        rollout = roll(mode, flow, process, P, G, d=2, steps=[0, 1], seed=1000 * batch)
        r = -(rollout.x_0 - target).square().sum(-1)
        A = r - r.mean(-1, keepdim=True)
        loss = pg.policy_loss(flow, rollout, A, factors=(), reduction="sum").loss
        estimates.append(
            -2 * gradient(loss, flow)
        )  # J is a mean over two steps, R's gradient a sum
        if mode == "shared_anchor":  # given x_1, a branch is a policy with one stochastic step
            for i in (0, 1):
                truth += branch_gradient(process, flow, rollout, i) / batches
    if mode == "independent":
        truth = policy_gradient(process, flow.m, flow.log_q, target, [0, 1], held=[2])
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(batches)
    z = (estimates.mean(0) - (1 - 1 / G) * truth) / error
    assert z.abs().max() <= 6.5, (z, estimates.mean(0), truth)
    assert ((estimates.mean(0) - truth / 2) / error).norm() > 20  # half the truth would be seen


# ---- Clipping and theta_old ----------------------------------------------------------------------

# ratio, A, clip, value, slope
SURROGATES = [
    # A > 0: only above is cut.
    (1.5, 2.0, 0.2, 2.4, 0.0),
    (1.1, 2.0, 0.2, 2.2, 2.2),
    (0.5, 2.0, 0.2, 1.0, 1.0),
    # A < 0: only below.
    (0.5, -2.0, 0.2, -1.6, 0.0),
    (0.9, -2.0, 0.2, -1.8, -1.8),
    (1.5, -2.0, 0.2, -3.0, -3.0),
    # A ratio of one is never cut, and a silent member neither; without a clip nothing is.
    (1.0, 2.0, 0.2, 2.0, 2.0),
    (1.0, -2.0, 1e-9, -2.0, -2.0),
    (9.0, 0.0, 0.2, 0.0, 0.0),
    (9.0, 2.0, None, 18.0, 18.0),
    (0.1, -2.0, None, -0.2, -0.2),
]


@pytest.mark.parametrize("ratio, A, clip, value, slope", SURROGATES)
def test_clipped_surrogate_by_hand(ratio, A, clip, value, slope):
    """min(ratio A, clip(ratio) A) cuts A > 0 above 1 + clip and A < 0 below 1 - clip.

    The slope is that by the log-ratio.
    """
    log_ratio = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    got = pg.clipped_surrogate(log_ratio, torch.tensor(A, dtype=torch.float64), clip)
    got.value.backward()
    bound = 8 * EPS * max(1.0, abs(value))  # log, exp, a product
    assert abs(got.value.item() - value) <= bound and abs(log_ratio.grad.item() - slope) <= bound
    assert abs(got.ratio.item() - ratio) <= 8 * EPS * ratio
    assert bool(got.is_cut) == (slope == 0 and A != 0)


def test_a_ratio_that_overflows_is_cut_like_any_other():
    """A ratio above every float is cut at (1 + clip) A, with gradient zero and never NaN."""
    log_ratio = torch.tensor([800.0, 800.0, 0.0], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    value = pg.clipped_surrogate(log_ratio, A, 0.2).value
    value.sum().backward()
    assert torch.equal(value.detach(), torch.tensor([1.2, 0.0, 1.0], dtype=torch.float64))
    assert torch.equal(log_ratio.grad, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@each_form
@each_mode
@each_kernel
def test_statistics_of_a_second_update(kernel, mode, form):
    """After an update every ratio is p_theta / p_old of its own k; the statistics are of those."""
    old, process, clip = network(), pg.Process(GRID, kernel), 0.03
    theta, rollout = moved(old, 1, 0.05), roll(mode, old, process, P=2, G=5, steps=[0, 2])
    A = some_advantages(rollout)
    A[0, 0, 2] = 0
    first = pg.policy_loss(old, rollout, A, form=form, clip=clip)
    second = pg.policy_loss(theta, rollout, A, form=form, clip=clip, old=first.old)
    assert second.old is first.old
    A = A.expand(2, 2, 5)
    for k in (1, 2, 3):
        ratio = torch.empty(2, 2, 5, dtype=torch.float64)
        for step in observations(rollout):
            with torch.no_grad():
                mu, mu_old, std = slow_scored(theta, old, process, k, form, step)
            # log N(x; mu) - log N(x; mu_old) = (mu - mu_old) (x - (mu + mu_old)/2) / c^2, averaged
            log_ratio = (mu - mu_old) * (step.x_s - (mu + mu_old) / 2) / std**2
            ratio[step.index] = log_ratio.mean().exp()
        assert ratio.max() - ratio.min() > 0.02
        term = second.terms[k]
        assert abs(term.ratio_mean - ratio.mean()) <= ROUNDING * 10
        assert abs(term.ratio_min - ratio.min()) <= ROUNDING * 10
        assert abs(term.ratio_max - ratio.max()) <= ROUNDING * 10
        cut = ((A > 0) & (ratio > 1 + clip)) | ((A < 0) & (ratio < 1 - clip))
        assert term.clip_fraction == (cut.sum() / (A != 0).sum()).item()


def test_old_is_remembered_detached():
    """E7: theta_old is a constant: what is remembered of it has no gradient and outlives theta."""
    net, process = network(), pg.Process(GRID, "cps")
    rollout = roll("independent", net, process)
    old = pg.policy_loss(net, rollout, some_advantages(rollout), form="matched").old
    assert set(old.means) == set(old.log_probs) == {1, 2, 3}
    remembered = [*old.means.values(), *old.log_probs.values()]
    kept = [value.clone() for value in remembered]
    with torch.no_grad():
        net.w1 += 1
    for value, before in zip(remembered, kept, strict=True):
        assert not value.requires_grad and torch.equal(value, before)


# ---- Exact statements: E2, E3, E5, E7 ------------------------------------------------------------


def attribution(transition, x_s, A):
    """d(mean_i A_i log p_i)/d mean of each group, summed over the members: [P, n, *event]."""
    leaf = transition.mean.detach().requires_grad_()
    log_prob = pg.Transition(leaf, transition.std).log_prob(x_s, "sum")
    credit = torch.autograd.grad((A * log_prob).sum(), leaf)[0] / A.shape[-1]
    return credit.sum(2)


@each_kernel
def test_e2_is_lost_with_a_clamp_and_with_independent_starts(kernel):
    """E2, E3: a group's credit turns where a clamp acts or members have their own x_t."""
    net, process = network(4), pg.Process(POINT, kernel)
    shared = roll("shared_anchor", net, process, P=20, G=12, steps=[0])
    alone = roll("independent", net, process, P=20, G=12, steps=[0])
    rewards = shared.x_0.pow(3).sum(-1)
    for rollout, clamp, is_kept in (
        (shared, None, True),
        (shared, 1.0, False),
        (alone, None, False),
    ):
        A, split = pg.group_advantages(rewards, clamp=clamp), pg.rescore(net, rollout, (3,))
        fine = attribution(split[3], rollout.x_s, A).flatten(0, 1)
        coarse = attribution(split[1], rollout.x_s, A).flatten(0, 1)
        turn = 1 - torch.nn.functional.cosine_similarity(fine, coarse, dim=-1).min().item()
        assert turn <= 1e-12 if is_kept else turn >= 1e-4


# (c_1/c_k)^2 at t = 0.70, s = 0.55, by hand: k t (1 - t') / ((1 - t) t') with t' = s + (t - s)/k.
SCALES = {
    "flow_sde": {1: 1, 2: 14 / 5, 3: 14 / 3, 5: 245 / 29},
    "dance": {1: 1, 2: 2, 3: 3, 5: 5},
    "cps": {1: 1, 2: 1, 3: 1, 5: 1},
}


@pytest.mark.parametrize("kernel", SCALES)
def test_e2_effective_weights_at_one_point(kernel):
    """E2: the scale of paper's terms is (c_1/c_k)^2; that of matched terms is one."""
    net, rollout = network(), roll("shared_anchor", network(), pg.Process(POINT, kernel), steps=[0])
    A, factors = some_advantages(rollout), (2, 3, 5)
    paper = pg.policy_loss(net, rollout, A, factors=factors).terms
    matched = pg.policy_loss(net, rollout, A, factors=factors, form="matched").terms
    for k, scale in SCALES[kernel].items():
        assert paper[k].effective_weight.shape == matched[k].effective_weight.shape == (1,)
        assert abs(paper[k].effective_weight.item() - scale) <= 40 * EPS * scale
        assert matched[k].effective_weight.item() == 1.0
        assert abs(theory.of(kernel, 0.7).scale(k, 0.7, 0.55) - scale) <= 40 * EPS * scale


def test_e2_effective_weights_in_the_authors_setting():
    """E2: the figures that theory prints for T = 16, shift 3, steps 0, 2, 4, 6, eta 0.8."""
    process = pg.Process(pg.schedule(16, 3.0), "flow_sde", 0.8)
    rollout = roll("shared_anchor", network(), process, steps=[0, 2, 4, 6])
    terms = pg.policy_loss(network(), rollout, some_advantages(rollout)).terms
    # Printed with one decimal at t = 1 (k = 2: 1/t' of 0.978) and two elsewhere.
    half_digit = torch.tensor([0.05, 0.005, 0.005, 0.005])
    for k, figures in {2: (1.0, 2.61, 2.36, 2.29), 3: (2.0, 4.22, 3.72, 3.58)}.items():
        assert ((terms[k].effective_weight - torch.tensor(figures)).abs() <= half_digit).all(), k
    total = 1 + (terms[2].effective_weight + terms[3].effective_weight) / 2
    assert ((total - torch.tensor([2.5, 4.4, 4.0, 3.9])).abs() <= 0.05).all()


@pytest.mark.parametrize(
    "mode, form",
    [("shared_anchor", "paper"), ("shared_anchor", "matched"), ("independent", "matched")],
)
@each_kernel
def test_e2_and_e5_through_the_loss(kernel, mode, form):
    """E2, E5: on a constant flow a k-term's gradient is scale * sum w / b_1 times the coarse one.

    The scale is (c_1/c_k)^2 for paper's form, which needs sum A = 0, and one for the matched form.
    """
    field, record = Constant(normal(0, 3)), theory.of(kernel, 0.7)
    rollout = roll(mode, field, pg.Process(POINT, kernel), G=6, steps=[0])
    A, grads = some_advantages(rollout, centred=form == "paper"), {}
    for k in (1, 2, 3):
        only = {j: float(j == k) for j in (1, 2, 3)}
        loss = pg.policy_loss(field, rollout, A, form=form, term_weights=only).loss
        grads[k] = gradient(loss, field)
    for k in (2, 3):
        weights = record.weight_sum(k, 0.7, 0.55) / record.weight_sum(1, 0.7, 0.55)
        scale = record.scale(k, 0.7, 0.55) if form == "paper" else 1.0
        error = (grads[k] - scale * weights * grads[1]).abs().max()
        assert error <= ROUNDING * grads[1].abs().max()


@each_mode
@each_kernel
def test_e7_matched_is_the_sampling_density_at_theta_old(kernel, mode):
    """E7: at theta_old a matched term scores x_s bitwise as the step that sampled it; paper's not.

    In float32, where (a - b) + b is seldom a.
    """
    net, process = network(dtype=torch.float32), pg.Process(GRID, kernel)
    rollout = roll(mode, net, process, P=8, steps=[0, 2], dtype=torch.float32)
    A, factors = some_advantages(rollout), (2, 3, 5)
    matched = pg.policy_loss(net, rollout, A, factors=factors, form="matched").old
    paper = pg.policy_loss(net, rollout, A, factors=factors, form="paper").old
    for k in factors:
        assert torch.equal(matched.log_probs[k], matched.log_probs[1])
        assert (paper.log_probs[k] - paper.log_probs[1]).abs().max() > 1e-3
        assert torch.equal(matched.means[k], paper.means[k])


@each_kernel
def test_e7_matched_is_paper_without_the_scale(kernel):
    """E7: at a shared anchor and theta_old, paper's gradient is matched's times (c_1/c_k)^2."""
    net, rollout = network(), roll("shared_anchor", network(), pg.Process(POINT, kernel), steps=[0])
    A, only, grads = some_advantages(rollout, centred=True), {1: 0.0, 3: 1.0}, {}
    for form in FORMS:
        loss = pg.policy_loss(net, rollout, A, factors=(3,), form=form, term_weights=only).loss
        grads[form] = gradient(loss, net)
    scale = theory.of(kernel, 0.7).scale(3, 0.7, 0.55)
    assert close(grads["paper"], scale * grads["matched"])


# ---- Statistical statements: E3, E7, E10 ---------------------------------------------------------


class LogRatio:
    """The law of a k-term's log-ratio over members that left one anchor: N(centre, spread).

    It is Gaussian since log p - log p_old is linear in x_s = mu_1 + c_1 z. Of delta = mu - mu_old,
        centre = (delta (mu_1 - mu_old) - delta^2/2) / c^2 and spread = delta^2 c_1^2 / c^4,
    summed over dimensions; a mean divides them by d and by d^2.
    """

    def __init__(self, scored, mu_1, c_1, reduction):
        mu, mu_old, std = scored
        delta, power = mu - mu_old, mu.numel() if reduction == "mean" else 1
        centre = (delta * (mu_1 - mu_old)).sum() - delta.square().sum() / 2
        self.centre = (centre / std**2 / power).item()
        self.spread = (delta.square().sum() * c_1**2 / std**4 / power**2).item()
        self.expected_ratio = math.exp(self.centre + self.spread / 2)
        self.std_of_ratio = self.expected_ratio * math.sqrt(math.expm1(self.spread))


@each_reduction
@each_form
@each_kernel
def test_e3_e7_e10_expected_ratios(kernel, form, reduction):
    """E3, E7, E10: after an update E[ratio] is 1 for the sums of matched and coarse terms only.

    For paper's sums it is exp((delta (mu_1 - mu_old) + delta^2 (c_1^2/c_k^2 - 1)/2) / c_k^2), for
    means of the others exp(-KL/d + KL/d^2) with KL = delta^2/(2 c_1^2).
    """
    # 3 kernels x 4 settings x 3 terms = 36 z-scores; |z| <= 6 has a false-alarm rate of
    # 36 * 2e-9 = 7e-8. N = 200,000 detects a mean off by 1.3% of a ratio's standard deviation.
    N, d, factors = 200_000, 3, (2, 3)
    old, process = network(3), pg.Process(POINT, kernel)
    rollout = roll("shared_anchor", old, process, P=1, G=N, d=d, steps=[0])
    step = Observed((0, 0, 0), 0.7, 0.55, torch.tensor([0]), rollout.x_t[0, 0], rollout.x_s[0, 0])
    theta, A, far = moved(old, 1, 0.05), some_advantages(rollout), 0.0
    options = dict(factors=factors, form=form, reduction=reduction, clip=None)
    first = pg.policy_loss(old, rollout, A, **options)
    terms = pg.policy_loss(theta, rollout, A, **options, old=first.old).terms
    mu_1, c_1 = slow_transition(old, process, 1, step)
    for k in (1, *factors):
        scored = slow_scored(theta, old, process, k, form, step)
        mu, mu_old, c_k = scored
        law = LogRatio(scored, mu_1, c_1, reduction)
        error = law.std_of_ratio / math.sqrt(N)
        assert abs(terms[k].ratio_mean - law.expected_ratio) <= 6 * error, k
        far = max(far, abs(law.expected_ratio - 1) / error)
        delta, KL = mu - mu_old, (mu - mu_old).square().sum() / (2 * c_1**2)
        if reduction == "sum":
            shift, widen = (delta * (mu_1 - mu_old)).sum(), c_1**2 / c_k**2 - 1
            wanted = (shift + delta.square().sum() * widen / 2) / c_k**2
            assert abs(law.expected_ratio - wanted.exp().item()) <= ROUNDING
            assert (form == "paper" and k > 1) or abs(wanted) <= ROUNDING
        elif form == "matched" or k == 1:
            assert abs(law.expected_ratio - (-KL / d + KL / d**2).exp().item()) <= ROUNDING
    if form == "paper":
        assert far > 10  # standard errors: that an expected ratio is not one is visible here


# ---- KL, weights, reduction, means ---------------------------------------------------------------


@each_reduction
@each_form
@each_kernel
def test_normalised_ratios_are_delta_z(kernel, form, reduction):
    """GRPO-Guard: exp(delta . (x_s - mu_old) / c) for every k, one member at a time."""
    process = pg.Process(GRID, kernel, 0.7)
    net = network(1)
    other = moved(net, 2, 0.1)
    rollout = roll("independent", net, process, steps=(0, 2))
    A = some_advantages(rollout)
    how = dict(factors=(2, 3), form=form, clip=None, reduction=reduction)
    old = pg.policy_loss(net, rollout, A, **how).old
    result = pg.policy_loss(other, rollout, A, ratio_norm=True, old=old, **how)
    ratios, total = {k: [] for k in (1, 2, 3)}, 0.0
    wide = A.expand(rollout.x_s.shape[:3])
    for step in observations(rollout):
        for k in (1, 2, 3):
            mu, mu_old, std = slow_scored(other, net, process, k, form, step)
            product = (mu - mu_old) * (step.x_s - mu_old) / std
            ratio = (product.mean() if reduction == "mean" else product.sum()).exp()
            ratios[k].append(ratio.item())
            total = total - (1 if k == 1 else 1 / 2) * ratio * wide[step.index] / wide.numel()
    assert close(result.loss.detach(), total.detach())
    for k, own in ratios.items():
        assert abs(result.terms[k].ratio_max - max(own)) <= ROUNDING * max(own)
        assert abs(result.terms[k].ratio_mean - sum(own) / len(own)) <= ROUNDING * max(own)
    assert close(gradient(result.loss, other), gradient(total, other))


@each_reduction
@each_mode
@each_kernel
def test_kl_is_that_of_the_coarse_steps(kernel, mode, reduction):
    """kl KL(pi_theta || pi_ref) is torch's KL of coarse Gaussians, reduced as log p is."""
    net, reference, process = network(), network(9), pg.Process(GRID, kernel)
    rollout, values = roll(mode, net, process, P=2, G=3, steps=[0, 2]), []
    for step in observations(rollout):
        mu, c = slow_transition(net, process, 1, step)
        mu_ref, _ = slow_transition(reference, process, 1, step)
        kl = kl_divergence(Normal(mu, c), Normal(mu_ref.detach(), c))
        values.append(kl.sum() if reduction == "sum" else kl.mean())
    truth = torch.stack(values).mean()
    A = some_advantages(rollout)
    with_kl = pg.policy_loss(net, rollout, A, kl=0.7, reference=reference, reduction=reduction)
    without = pg.policy_loss(net, rollout, A, reduction=reduction)
    assert abs(with_kl.kl - truth.item()) <= ROUNDING * truth.item() and without.kl == 0.0
    assert close(with_kl.loss - without.loss, 0.7 * truth)
    pull = gradient(0.7 * truth, net)
    assert pull.norm() > 1e-3
    assert close(gradient(with_kl.loss, net) - gradient(without.loss, net), pull)


def test_kl_gives_no_gradient_to_the_reference():
    """pi_ref is fixed: the loss does not depend on its parameters, and pi itself costs 0."""
    net, reference = network(), network(9)
    rollout = roll("independent", net, pg.Process(GRID))
    A = some_advantages(rollout)
    loss = pg.policy_loss(net, rollout, A, kl=1.0, reference=reference).loss
    assert torch.autograd.grad(loss, [*reference.parameters()], allow_unused=True) == (None, None)
    assert pg.policy_loss(net, rollout, A, kl=1.0, reference=net).kl == 0.0


@each_mode
def test_weights_default_and_per_step(mode):
    """w_1 = 1 and w_k = 1/|S|; another weight is a number per k, or one per stochastic step."""
    net, factors = network(), (2, 3, 4)
    theta = moved(net, 1, 0.05)
    # P = n = G: a transposed weight would fit.
    rollout = roll(mode, net, pg.Process(GRID), P=3, G=3, steps=[0, 1, 2])
    A = some_advantages(rollout)

    def loss_of(rollout, A, weights):
        old = pg.policy_loss(net, rollout, A, factors=factors).old
        options = dict(factors=factors, old=old, term_weights=weights)
        return pg.policy_loss(theta, rollout, A, **options).loss

    default = {1: 1.0, 2: 1 / 3, 3: 1 / 3, 4: 1 / 3}
    assert torch.equal(loss_of(rollout, A, None), loss_of(rollout, A, default))
    # One step at a time: the loss of a rollout that holds that step alone, over n = 3.
    weights = {1: 0.0, 2: 0.5, 3: 2.0, 4: 0.0}
    for j in range(3):
        here = slice(j, j + 1)
        group = here if mode == "shared_anchor" else slice(0, 1)  # of axis N
        part = rollout._replace(
            sde_steps=(j,),
            x_t=rollout.x_t[:, here],
            x_s=rollout.x_s[:, here],
            log_prob=rollout.log_prob[:, here],
            x_0=rollout.x_0[:, group],
        )
        at_j = {k: w * torch.eye(3, dtype=torch.float64)[j] for k, w in weights.items()}
        assert close(loss_of(rollout, A, at_j), loss_of(part, A[:, group], weights) / 3)


@pytest.mark.parametrize("kl", [{}, dict(kl=0.5, reference=network(9))])
@each_mode
def test_reductions_agree_in_direction(mode, kl):
    """E10: at theta_old the averaged gradient is 1/d of the summed one, and so is the KL."""
    net = network()
    rollout = roll(mode, net, pg.Process(GRID), d=3)
    A = some_advantages(rollout)
    mean = pg.policy_loss(net, rollout, A, reduction="mean", **kl)
    total = pg.policy_loss(net, rollout, A, reduction="sum", **kl)
    assert close(3 * gradient(mean.loss, net), gradient(total.loss, net))
    assert abs(3 * mean.kl - total.kl) <= ROUNDING * total.kl
    for k in (1, 2, 3):
        assert close(3 * mean.old.log_probs[k], total.old.log_probs[k])


@each_mode
@each_form
def test_the_loss_is_a_mean_over_prompts(mode, form):
    """The loss of several prompts is the mean of theirs: prompts may be split over devices."""
    net, reference, theta, P = network(), network(9), moved(network(), 1, 0.05), 3
    rollout = roll(mode, net, pg.Process(GRID, "cps"), P=P)
    A = some_advantages(rollout)

    def loss_of(kept):
        part, advantages = of_prompts(rollout, kept), A[kept]
        options = dict(form=form, kl=0.2, clip=0.05, reference=asking(reference, kept))
        old = pg.policy_loss(asking(net, kept), part, advantages, **options).old
        return pg.policy_loss(asking(theta, kept), part, advantages, old=old, **options).loss

    together = loss_of([0, 1, 2])
    split = torch.stack([loss_of([p]) for p in range(P)]).mean()
    assert close(together, split)
    assert close(gradient(together, theta), gradient(split, theta))


@each_mode
def test_cost_of_an_update(mode):
    """1 + sum (k-1) evaluations per (prompt, step) at a shared anchor, G times that otherwise."""
    process, P, G = pg.Process(GRID), 2, 4
    rollout = roll(mode, network(), process, P, G, steps=[0, 2])
    A, velocity, reference = some_advantages(rollout), Counting(network()), Counting(network(9))
    result = pg.policy_loss(velocity, rollout, A, factors=(2, 3), kl=1.0, reference=reference)
    starts = 1 if mode == "shared_anchor" else G
    states = P * 2 * starts
    assert velocity.rows == states * (1 + 1 + 2) and len(velocity.t) == 4
    assert reference.rows == states and len(reference.t) == 1
    assert result.old.means[3].shape == (P, 2, starts, 3)
    assert torch.equal(reference.prompt[0], torch.arange(P).repeat_interleave(2 * starts))


@each_mode
def test_a_silent_group_stays_in_the_mean(mode):
    """A group of equal rewards adds nothing and is counted: one of three leaves 2/3 of the rest."""
    net = network()
    rollout = roll(mode, net, pg.Process(GRID), P=3, steps=[0, 2])
    rewards = rollout.x_0.sum(-1)
    rewards[1] = 0.1
    A, kept = pg.group_advantages(rewards), [0, 2]
    whole = gradient(pg.policy_loss(net, rollout, A).loss, net)
    part = pg.policy_loss(asking(net, kept), of_prompts(rollout, kept), A[kept]).loss
    assert close(whole, gradient(part, net) * 2 / 3)
    silent = pg.policy_loss(net, rollout, torch.zeros_like(A))
    assert not gradient(silent.loss, net).any()
    for term in silent.terms.values():
        assert term.clip_fraction == 0


LOG_PROBS = dict.fromkeys((1, 2, 3), torch.zeros(2, 1, 4))
OLD = pg.OldPolicy({}, LOG_PROBS, "paper", 0.5, "mean", None, 0.0)
BAD = [
    (dict(advantages=torch.zeros(2, 4)), "advantages of shape (2, 4): must be (2, 1, 4)"),
    (dict(advantages=torch.zeros(2, 2, 4)), "advantages of shape (2, 2, 4): must be (2, 1, 4)"),
    (dict(form="hybrid"), "form='hybrid'"),
    (dict(clip=0.0), "clip=0.0"),
    (dict(clip=-0.1), "clip=-0.1"),
    (dict(clip=math.nan), "clip=nan"),
    (dict(kl=-1.0), "kl=-1.0"),
    (dict(kl=0.1), "kl=0.1"),
    (dict(kl=0.0, reference=network(9)), "kl=0.0"),
    (dict(kl=math.nan), "kl=nan"),
    (dict(term_weights={1: 1.0, 2: 1.0}), "term_weights for k = [1, 2]"),
    (dict(term_weights={}), "term_weights for k = []"),
    (dict(term_weights=dict.fromkeys((1, 2, 3, 4), 1.0)), "term_weights for k = [1, 2, 3, 4]"),
    (dict(term_weights=dict.fromkeys((1, 2, 3), [1.0] * 3)), "term_weights[1] of shape (3,)"),
    (dict(term_weights=dict.fromkeys((1, 2, 3), torch.ones(3))), "term_weights[1] of shape (3,)"),
    (dict(reduction="avg"), "reduction='avg'"),
    (dict(factors=(1, 2)), "factors=[1, 2]"),
    (dict(old=OLD, factors=(2,)), "old is of k = [1, 2, 3], 'paper', 'mean'"),
    (dict(old=OLD._replace(form="matched")), "old is of k = [1, 2, 3], 'matched', 'mean'"),
    (dict(old=OLD._replace(reduction="sum")), "old is of k = [1, 2, 3], 'paper', 'sum'"),
    (dict(old=OLD), "old is of k = [1, 2, 3], 'paper', 'mean': must be of the same rollout"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_arguments_are_one_line(arguments, message):
    """Arguments that do not fit together are refused in one line: the value and the rule."""
    # One stochastic step: weights of three would broadcast.
    rollout = roll("independent", network(), pg.Process(GRID), steps=[1])
    arguments = {"advantages": some_advantages(rollout), **arguments}
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        pg.policy_loss(network(), rollout, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("asked", [dict(factors=(2,)), dict(form="matched"), dict(reduction="sum")])
def test_a_memory_serves_the_loss_it_is_of_alone(asked):
    """.old of the same rollout, but of other factors, another form or reduction, is refused."""
    rollout = roll("independent", network(), pg.Process(GRID), steps=[1])
    A = some_advantages(rollout)
    old = pg.policy_loss(network(), rollout, A).old
    with pytest.raises(ValueError, match=r"^old is of k = \[1, 2, 3\], 'paper', 'mean': must be"):
        pg.policy_loss(network(), rollout, A, **asked, old=old)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sampling_gap_is_of_the_reduction(reduction):
    """The largest |log p while sampling - log p in the first pass|: 0, or what was put in.

    Of averaged log-probabilities it is averaged over the dimensions too.
    """
    rollout = roll("independent", network(), pg.Process(GRID), steps=[1])
    A, d = some_advantages(rollout), rollout.x_s[0, 0, 0].numel()
    for gap in (0.0, 0.5):
        off = rollout._replace(log_prob=rollout.log_prob + gap * A.sign())
        found = pg.policy_loss(network(), off, A, reduction=reduction).old.sampling_gap
        assert found == pytest.approx(gap / (d if reduction == "mean" else 1), abs=1e-12)


# ---- Devices -------------------------------------------------------------------------------------

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_cuda)])


def run_on(device, dtype, kernel, mode):
    """x_0, loss and gradient on a device, from the same CPU noise everywhere."""
    net, process = network(dtype=dtype).to(device), pg.Process(GRID, kernel)
    reference, own_start = network(9, dtype=dtype).to(device), mode == "independent"
    noise = pg.draw_noise(generators(0, 2), 4, (3,), 2, own_start, dtype, device)
    rollout = SAMPLERS[mode](net, process, noise, [0, 2])
    A = pg.group_advantages(rollout.x_0.sum(-1))
    result = pg.policy_loss(net, rollout, A, kl=0.1, reference=reference)
    assert rollout.x_0.device.type == rollout.x_s.device.type == result.loss.device.type == device
    assert rollout.x_0.dtype == dtype and result.loss.dtype == torch.float64
    assert pg.ode_sample(net, process.grid, noise.x_1[:, 0]).device.type == device
    weights = {1: 1.0, 2: torch.ones(2), 3: torch.ones(2)}
    matched = pg.policy_loss(net, rollout, A, form="matched", term_weights=weights)
    again = pg.policy_loss(net, rollout, A, form="matched", old=matched.old)
    assert result.loss.isfinite() and again.loss.isfinite()
    return rollout.x_0.cpu(), result.loss.detach().cpu(), gradient(result.loss, net).cpu()


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_mode
@each_kernel
def test_core_runs_on(device, dtype, mode, kernel):
    """Rollout, advantages and loss run where the noise and the network are, in their dtype."""
    x_0, _, grad = run_on(device, dtype, kernel, mode)
    assert x_0.isfinite().all() and grad.isfinite().all() and grad.norm() > 0


@no_cuda
@each_mode
@each_kernel
def test_cpu_and_cuda_agree(mode, kernel):
    """The same CPU generators give the same rollout on either device, TF32 off."""
    torch.backends.cuda.matmul.allow_tf32 = False
    x_0, loss, grad = run_on("cpu", torch.float32, kernel, mode)
    x_0_there, loss_there, grad_there = run_on("cuda", torch.float32, kernel, mode)
    # Four steps of about 100 float32 roundings (2^-24) of numbers below 10, amplified at most 3^4;
    # the loss then divides by std >= 0.1 twice.
    rounding = 4 * 100 * 10 * 3**4 * 2.0**-24
    assert (x_0 - x_0_there).abs().max() <= rounding
    assert (loss - loss_there).abs() <= 100 * rounding
    assert (grad - grad_there).norm() <= 100 * rounding
