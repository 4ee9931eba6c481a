"""policy_loss: against Algorithm 1 in plain loops, the released formulas, policy gradients, and E2, E3, E7, E10."""

import math
import re
from itertools import pairwise, product

import pytest
import torch
from slow import (
    EPS,
    KERNELS,
    MODES,
    Constant,
    Counting,
    GaussianFlow,
    Net,
    each_kernel,
    each_mode,
    etas,
    gaussian_law,
    gradient,
    kernels,
    modes,
    moved,
    normal,
    roll,
    seeds,
    slow_loss,
    slow_step,
    slow_transition,
    some_advantages,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import pave_grpo as pg

forms = st.sampled_from(["paper", "matched"])
each_form = pytest.mark.parametrize("form", ["paper", "matched"])
GRID = pg.schedule(4, 2.0)
# Networks of 8 units, states below 10, std above 0.05: a log-density is off by |z| dz < 10 * 100 roundings * 10 / 0.05,
# and all that follows is smooth: 2e5 EPS = 4.4e-11 per unit of the compared number.
ROUNDING = 2e5 * EPS


def close(a, b):
    """Equal up to the rounding of a log-density, relative to the numbers compared."""
    return (a - b).abs().max().item() <= ROUNDING * max(1.0, b.abs().max().item())


# ---- The whole of Algorithm 1 --------------------------------------------------------------------------------


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
def test_loss_is_algorithm_1_in_plain_loops(
    seed, kernel, mode, form, eta, factors, clip, reduction, size
):
    """Value and gradient of -J, one member, step and k at a time, at theta_old and after updates."""
    old, process = Net(seed % 997), pg.Process(GRID, kernel, eta)
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
    """log p(x_s|x_t) averaged over dimensions, in the variables the released trainers use (sigma, dt < 0, x0, x1)."""
    sigma, sigma_next, dt = t, s, s - t
    if kernel == "flow_sde":  # Flow-GRPO: sde_step_with_logprob
        g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, t_1, sigma))) * eta
        mean = x_t * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        std = g * torch.sqrt(-dt)
    elif (
        kernel == "cps"
    ):  # Flow-CPS: coefficients preserving sampling; with the 1/(2 c^2) its code drops
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
@each_kernel
def test_without_factors_it_is_the_coarse_method(kernel, mode):
    """S = {} is Flow-GRPO, Flow-CPS or DanceGRPO: PPO's loss on the released trainers' log-probability."""
    old, process = Net(0), pg.Process(GRID, kernel)
    rollout, theta, clip = (
        roll(mode, old, process, P=2, G=4, steps=[0, 1, 2]),
        moved(Net(0), 1, 0.1),
        0.05,
    )
    A = some_advantages(rollout)
    t, s = (GRID[j : j + 3].repeat(2).repeat_interleave(4)[:, None] for j in (0, 1))
    x_t, x_s = rollout.x_t.expand_as(rollout.x_s).flatten(0, 2), rollout.x_s.flatten(0, 2)
    c, advantages = torch.arange(2).repeat_interleave(12), A.expand(2, 3, 4).flatten()
    new, before = (
        released(kernel, 0.7, x_t, x_s, v(x_t, t[:, 0], c), t, s, GRID[1]) for v in (theta, old)
    )
    ratio = torch.exp(new - before.detach())
    loss = torch.max(
        -advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip, 1 + clip)
    ).mean()
    first = pg.policy_loss(old, rollout, A, factors=(), clip=clip)
    second = pg.policy_loss(theta, rollout, A, factors=(), clip=clip, old=first.old)
    assert 0 < second.terms[1].clip_fraction < 1
    assert close(second.loss, loss) and close(gradient(second.loss, theta), gradient(loss, theta))


@each_form
@each_mode
@each_kernel
def test_gradient_at_theta_old_is_the_policy_gradient(kernel, mode, form):
    """E9: at theta_old the gradient is -mean A d log p^(k), whatever the clip range, and ratios are 1."""
    net, process, factors = Net(0), pg.Process(GRID, kernel), (2, 3)
    rollout = roll(mode, net, process, P=2, G=3, steps=[0, 2])
    A, total = some_advantages(rollout), 0.0
    for p, (j, i), g in product(range(2), enumerate((0, 2)), range(3)):
        x_t, c = rollout.x_t[p, j, g % rollout.x_t.shape[2]][None], torch.tensor([p])
        at = {
            k: slow_transition(net, process, GRID[i].item(), GRID[i + 1].item(), k, x_t, c)
            for k in (1, 2, 3)
        }
        for k, (mu, std) in at.items():
            if form == "matched":
                mu, std = at[1][0].detach() + mu - mu.detach(), at[1][1]
            score = Normal(mu, std).log_prob(rollout.x_s[p, j, g]).mean()
            total = total + A[p, j % A.shape[1], g] * (1 if k == 1 else 1 / 2) * score
    truth = gradient(-total / (2 * 2 * 3), net)
    for clip in (None, 1e-6, 0.2):
        result = pg.policy_loss(net, rollout, A, factors=factors, form=form, clip=clip)
        assert close(gradient(result.loss, net), truth)
        assert close(result.loss, -A.mean() * 2)  # every ratio is 1, so J = mean A (1 + |S|/|S|)
        assert all(
            term.ratio_min == term.ratio_mean == term.ratio_max == 1.0
            for term in result.terms.values()
        )
        assert all(term.clip_fraction == 0.0 for term in result.terms.values())


@each_form
@each_kernel
def test_gradient_is_the_finite_difference(kernel, form):
    """With theta_old held, the loss's gradient at any theta is its five-point finite difference."""
    old, process = Net(0), pg.Process(GRID, kernel)
    rollout, theta, direction = roll("independent", old, process), moved(old, 3, 0.02), Net(7)
    A, options = some_advantages(rollout), dict(form=form, clip=None, kl=0.3, reference=Net(9))
    remembered = pg.policy_loss(old, rollout, A, **options).old
    value = lambda module: pg.policy_loss(module, rollout, A, **options, old=remembered).loss

    def at(h):
        module = moved(theta, 0, 0.0)
        with torch.no_grad():
            for p, v in zip(module.parameters(), direction.parameters(), strict=True):
                p += h * v
            return value(module).item()

    h = 1e-3  # truncation h^4 f^(5)/30, rounding 1e-13/h: both below 1e-9 of a gradient of order one
    numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    exact = gradient(value(theta), theta) @ torch.cat(
        [v.detach().flatten() for v in direction.parameters()]
    )
    assert abs(numeric - exact.item()) <= 1e-7 * max(1.0, abs(exact.item()))


@each_mode
@each_kernel
def test_the_estimator_is_the_true_policy_gradient(kernel, mode):
    """With A = r - mean r and S = {} the gradient's expectation is (1 - 1/G) dE[R], got without samples."""
    # E[R] = -E|x_0 - 1|^2 by propagating mean and variance; steps without a log-probability hold theta constant.
    # 40 batches of 500 prompts; z of 4 (m, q in two dimensions) x 6 cases: |z| <= 6.5 with Student's t of 39 degrees
    # has a false-alarm rate of 24 * 1.05e-7 = 2.5e-6. Standard errors are 0.3 - 1% of the
    # gradient in m, so an error of 7% there is detected, and 2 - 34% in q.
    process, P, G = pg.Process(pg.schedule(3, 2.0), kernel, 0.9), 500, 8
    m, q = (
        torch.tensor(f, dtype=torch.float64, requires_grad=True) for f in ([0.2, -0.5], [0.6, 1.5])
    )
    reward = lambda mean, var: -(var + (mean - 1) ** 2).sum(-1)
    samples, truth = [], torch.zeros(4, dtype=torch.float64)
    for batch in range(40):
        flow = GaussianFlow(m.detach()[None], q.detach())
        rollout = roll(mode, flow, process, P, G, d=2, steps=[0, 1], seed=1000 * batch)
        r = -(rollout.x_0 - 1).square().sum(-1)
        loss = pg.policy_loss(
            flow, rollout, r - r.mean(-1, keepdim=True), factors=(), reduction="sum"
        ).loss
        samples.append(
            -2 * gradient(loss, flow)
        )  # J is a mean over the two stochastic steps; the gradient their sum
        if (
            mode == "shared_anchor"
        ):  # given x_1, each branch is its own little policy with one stochastic step
            for i in (0, 1):
                start = rollout.x_t[:, 0, 0]
                # only step i is credited, so theta is constant in every other step
                law = gaussian_law(process, m, q, start, 0 * q, [i], held={0, 1, 2} - {i})
                truth = truth + torch.cat(torch.autograd.grad(reward(*law).mean(), [m, q])) / 40
    if mode == "independent":
        law = gaussian_law(process, m, q, 0 * m.detach(), 1 + 0 * q.detach(), [0, 1], held=[2])
        truth = torch.cat(torch.autograd.grad(reward(*law), [m, q]))
    samples = torch.stack(samples)
    error = samples.std(0) / math.sqrt(40)
    z = (samples.mean(0) - (1 - 1 / G) * truth) / error
    assert z.abs().max() <= 6.5, (z, samples.mean(0), truth)
    assert ((samples.mean(0) - truth / 2) / error).norm() > 20  # half the truth would be seen


# ---- Clipping and theta_old ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, A, clip, value, slope",
    [
        (1.5, 2.0, 0.2, 2.4, 0.0),
        (1.1, 2.0, 0.2, 2.2, 2.2),
        (0.5, 2.0, 0.2, 1.0, 1.0),  # A > 0: only above is cut
        (0.5, -2.0, 0.2, -1.6, 0.0),
        (0.9, -2.0, 0.2, -1.8, -1.8),
        (1.5, -2.0, 0.2, -3.0, -3.0),  # A < 0: only below
        (1.0, 2.0, 0.2, 2.0, 2.0),
        (1.0, -2.0, 1e-9, -2.0, -2.0),
        (9.0, 0.0, 0.2, 0.0, 0.0),
        (9.0, 2.0, None, 18.0, 18.0),
        (0.1, -2.0, None, -0.2, -0.2),
    ],
)
def test_clipped_surrogate_by_hand(ratio, A, clip, value, slope):
    """Min(rho A, clip(rho) A) cuts A > 0 above 1 + eps and A < 0 below 1 - eps; slope is by log rho."""
    log_ratio = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    got = pg.clipped_surrogate(log_ratio, torch.tensor(A, dtype=torch.float64), clip)
    got.value.backward()
    bound = 8 * EPS * max(1.0, abs(value))  # log, exp, a product
    assert abs(got.value.item() - value) <= bound and abs(log_ratio.grad.item() - slope) <= bound
    assert abs(got.ratio.item() - ratio) <= 8 * EPS * ratio
    assert bool(got.clipped) == (slope == 0 and A != 0)


def test_a_ratio_that_overflows_is_cut_like_any_other():
    """A member whose ratio exceeds every float is cut at (1 + eps) A, with gradient zero and never NaN."""
    log_ratio = torch.tensor([800.0, 800.0, 0.0], dtype=torch.float64, requires_grad=True)
    value = pg.clipped_surrogate(
        log_ratio, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), 0.2
    ).value
    value.sum().backward()
    assert torch.equal(value.detach(), torch.tensor([1.2, 0.0, 1.0], dtype=torch.float64))
    assert torch.equal(log_ratio.grad, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@each_form
@each_mode
@each_kernel
def test_second_update_uses_the_old_log_probs(kernel, mode, form):
    """After an update every ratio is p_theta / p_old for its own k, and the statistics are of those."""
    old, process, clip = Net(0), pg.Process(GRID, kernel), 0.03
    theta, rollout = moved(old, 1, 0.05), roll(mode, old, process, P=2, G=5, steps=[0, 2])
    A = some_advantages(rollout)
    A[0, 0, 2] = 0
    first = pg.policy_loss(old, rollout, A, form=form, clip=clip)
    second = pg.policy_loss(theta, rollout, A, form=form, clip=clip, old=first.old)
    assert second.old is first.old
    grid, J = GRID.tolist(), 0.0
    for k in (1, 2, 3):
        ratio = torch.empty(2, 2, 5, dtype=torch.float64)
        for p, (j, i), g in product(range(2), enumerate((0, 2)), range(5)):
            row = rollout.x_t[p, j, g % rollout.x_t.shape[2]][None], torch.tensor([p])
            step = lambda v, k, i=i, row=row: slow_transition(
                v, process, grid[i], grid[i + 1], k, *row
            )
            (mu, c), (mu_old, _), (mu_1, c_1) = step(theta, k), step(old, k), step(old, 1)
            if form == "matched":
                mu, mu_old, c = mu_1 + mu - mu_old, mu_1, c_1
            x_s = rollout.x_s[p, j, g]
            # log N(x; mu) - log N(x; mu_old) = (mu - mu_old) (x - (mu + mu_old)/2) / c^2, averaged
            ratio[p, j, g] = ((mu - mu_old) * (x_s - (mu + mu_old) / 2) / c**2).mean().exp()
        term, weights = second.terms[k], A.expand(2, 2, 5)
        assert (
            max(
                abs(term.ratio_mean - ratio.mean()),
                abs(term.ratio_min - ratio.min()),
                abs(term.ratio_max - ratio.max()),
            )
            <= ROUNDING * 10
        )
        assert ratio.max() - ratio.min() > 0.02
        cut = ((weights > 0) & (ratio > 1 + clip)) | ((weights < 0) & (ratio < 1 - clip))
        assert term.clip_fraction == (cut.sum() / (weights != 0).sum()).item()
        plain, clipped = ratio * weights, ratio.clamp(1 - clip, 1 + clip) * weights
        J = J + (1 if k == 1 else 1 / 2) * torch.minimum(plain, clipped).mean()
    assert close(second.loss, -J)


def test_old_is_remembered_detached():
    """E7: theta_old is a constant: what the first pass remembers carries no gradient and survives the update."""
    net, process = Net(0), pg.Process(GRID, "cps")
    rollout = roll("independent", net, process)
    first = pg.policy_loss(net, rollout, some_advantages(rollout), form="matched")
    kept = {k: (first.old.means[k].clone(), first.old.log_probs[k].clone()) for k in (1, 2, 3)}
    assert set(first.old.means) == set(first.old.log_probs) == {1, 2, 3}
    assert not any(
        f.requires_grad for pair in (first.old.means, first.old.log_probs) for f in pair.values()
    )
    with torch.no_grad():
        net.w1 += 1
    assert all(
        torch.equal(first.old.means[k], m) and torch.equal(first.old.log_probs[k], l)
        for k, (m, l) in kept.items()
    )


# ---- Exact statements: E2, E4, E7 ----------------------------------------------------------------------------


def attribution(transition, x_s, A):
    """d(mean_i A_i log p_i)/d mean per group, the credit vectors, and the sum over the group."""
    leaf = transition.mean.detach().requires_grad_()
    log_prob = pg.Transition(leaf, transition.std).log_prob(x_s, "sum")
    credit = torch.autograd.grad((A * log_prob).sum(), leaf)[0] / A.shape[-1]
    return credit.sum(2)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(0, 1), b.flatten(0, 1), dim=-1)


def transitions_of(net, rollout, factors=(2, 3, 5)):
    batch, i = rollout.x_t.shape[:3], torch.tensor(rollout.sde_steps)
    t, s = (rollout.process.grid[i + j][None, :, None].expand(batch).flatten() for j in (0, 1))
    c = torch.arange(batch[0]).repeat_interleave(batch[1] * batch[2])
    split = pg.decompose(net, rollout.process, rollout.x_t.flatten(0, 2), t, s, c, factors)
    return {k: p.unflatten(batch) for k, p in split.items()}


def theory_scale(kernel, t, s, k):
    """(c_1/c_k)^2 as E2 prints it."""
    last = s + (t - s) / k
    if kernel == "cps":
        return 1.0
    if kernel == "dance":
        return float(k)
    return (k - 1) / last if t == 1 else k * t * (1 - last) / ((1 - t) * last)


@given(seed=seeds, kernel=kernels, eta=etas, G=st.integers(2, 8))
@example(seed=0, kernel="flow_sde", eta=0.7, G=12)
def test_e2_group_attribution_keeps_its_direction(seed, kernel, eta, G):
    """E2: at a shared anchor with sum A = 0 the k-term's credit is (c_1/c_k)^2 times the coarse one, any network."""
    net, process = Net(seed % 997), pg.Process(GRID, kernel, eta)
    rollout = roll("shared_anchor", net, process, G=G, steps=[0, 1, 2], seed=seed)
    A, split = some_advantages(rollout, seed, centred=True), transitions_of(net, rollout)
    coarse = attribution(split[1], rollout.x_s, A)
    for k in (2, 3, 5):
        scale = [theory_scale(kernel, t, s, k) for t, s in pairwise(GRID[:4].tolist())]
        # Each credit sums G terms A z/c with |x|, |mu| < 30 and std >= c_k: 10 G roundings of 4 * 30 / c_k^2.
        bound = 10 * G * 120 * EPS / min(p.std.min().item() for p in split.values()) ** 2
        want = torch.tensor(scale, dtype=A.dtype)[:, None] * coarse
        assert (attribution(split[k], rollout.x_s, A) - want).abs().max() <= bound * k


@each_kernel
def test_e2_is_lost_with_a_clamp_and_with_independent_starts(kernel):
    """E2, E3: a clamp that acts, or members with their own x_t, turn the k-term's credit away from the coarse one."""
    net, process = Net(0), pg.Process([0.7, 0.55, 0.0], kernel)
    shared, alone = (
        roll(mode, net, process, P=20, G=12, steps=[0]) for mode in ("shared_anchor", "independent")
    )
    rewards = shared.x_0.pow(3).sum(-1)
    for rollout, clamp, kept in ((shared, None, True), (shared, 1.0, False), (alone, None, False)):
        A, split = pg.group_advantages(rewards, clamp=clamp), transitions_of(net, rollout)
        angle = cosine(*(attribution(split[k], rollout.x_s, A) for k in (3, 1)))
        assert (1 - angle.min()).item() <= 1e-12 if kept else (1 - angle.min()).item() >= 1e-4


@pytest.mark.parametrize(
    "kernel, figures",
    [
        ("flow_sde", (2.8, 4.67, 8.45)),
        ("dance", (2, 3, 5)),
        ("cps", (1, 1, 1)),
    ],
)
def test_e2_effective_weights_at_one_point(kernel, figures):
    """E2: the scale of the terms k = 2, 3, 5 at t = 0.70, s = 0.55; matched terms all have scale one."""
    net, process = Net(0), pg.Process([0.7, 0.55, 0.0], kernel)
    rollout = roll("shared_anchor", net, process, steps=[0])
    for form in ("paper", "matched"):
        result = pg.policy_loss(
            net, rollout, some_advantages(rollout), factors=(2, 3, 5), form=form
        )
        for k, figure in zip((1, 2, 3, 5), (1, *figures), strict=True):
            weight = result.terms[k].effective_weight
            assert weight.shape == (1,)
            if form == "matched" or k == 1:
                assert weight.item() == 1.0
            else:
                assert abs(weight.item() - figure) <= 0.005
                assert abs(weight.item() - theory_scale(kernel, 0.7, 0.55, k)) <= 40 * EPS * figure


def test_e2_effective_weights_in_the_authors_setting():
    """E2: T = 16, shift 3, steps 0, 2, 4, 6, eta 0.8: the figures 1.0, 2.61, 2.36, 2.29 and 2.0, 4.22, 3.72, 3.58."""
    process = pg.Process(pg.schedule(16, 3.0), "flow_sde", 0.8)
    rollout = roll("shared_anchor", Net(0), process, steps=[0, 2, 4, 6])
    terms = pg.policy_loss(Net(0), rollout, some_advantages(rollout)).terms
    # Printed with one decimal at t = 1 (k = 2: 1/t' of 0.978) and two elsewhere.
    for k, figures in {2: (1.0, 2.61, 2.36, 2.29), 3: (2.0, 4.22, 3.72, 3.58)}.items():
        half_digit = torch.tensor([0.05, 0.005, 0.005, 0.005])
        assert ((terms[k].effective_weight - torch.tensor(figures)).abs() <= half_digit).all(), k
    total = 1 + (terms[2].effective_weight + terms[3].effective_weight) / 2
    assert ((total - torch.tensor([2.5, 4.4, 4.0, 3.9])).abs() <= 0.05).all()


@each_mode
@each_kernel
def test_e2_and_e5_through_the_loss(kernel, mode):
    """E2, E5: on a constant flow the k-term's parameter gradient is scale * sum w / b_1 times the coarse."""
    field, process = Constant(normal(0, 3)), pg.Process([0.7, 0.55, 0.0], kernel)
    rollout = roll(mode, field, process, G=6, steps=[0])
    for form in ("paper", "matched"):
        if form == "paper" and mode == "independent":
            continue  # E3: no such theorem
        A = some_advantages(rollout, centred=form == "paper")
        grad = {}
        for k in (1, 2, 3):
            only = {j: float(j == k) for j in (1, 2, 3)}
            loss = pg.policy_loss(field, rollout, A, form=form, term_weights=only).loss
            grad[k] = gradient(loss, field)
        for k in (2, 3):
            last = 0.55 + 0.15 / k
            unit = lambda x, v, t: slow_step(kernel, 0.7, t, 0.55, x, v)[0]
            weights = (unit(0.0, 1.0, last) - (k - 1) * 0.15 / k * unit(1.0, 0.0, last)) / unit(
                0.0, 1.0, 0.7
            )
            scale = theory_scale(kernel, 0.7, 0.55, k) if form == "paper" else 1.0
            assert (grad[k] - scale * weights * grad[1]).abs().max() <= ROUNDING * grad[
                1
            ].abs().max()


@each_mode
@each_kernel
def test_e7_matched_is_the_sampling_density_at_theta_old(kernel, mode):
    """E7: at theta_old every matched term scores x_s bitwise as the coarse step that sampled it; paper's do not."""
    net, process = (
        Net(0, dtype=torch.float32),
        pg.Process(GRID, kernel),
    )  # float32: (a - b) + b is seldom a
    rollout = roll(mode, net, process, P=8, steps=[0, 2], dtype=torch.float32)
    A = some_advantages(rollout)
    matched, paper = (
        pg.policy_loss(net, rollout, A, factors=(2, 3, 5), form=f).old for f in ("matched", "paper")
    )
    assert all(torch.equal(matched.log_probs[k], matched.log_probs[1]) for k in (2, 3, 5))
    assert all((paper.log_probs[k] - paper.log_probs[1]).abs().max() > 1e-3 for k in (2, 3, 5))
    assert all(torch.equal(matched.means[k], paper.means[k]) for k in (1, 2, 3, 5))


@each_kernel
def test_e7_matched_is_paper_without_the_scale(kernel):
    """E7: at a shared anchor, theta_old and sum A = 0, paper's gradient is matched's times (c_1/c_k)^2."""
    net, process = Net(0), pg.Process([0.7, 0.55, 0.0], kernel)
    rollout = roll("shared_anchor", net, process, G=6, steps=[0])
    A, only = some_advantages(rollout, centred=True), {1: 0.0, 3: 1.0}
    grads = {
        form: gradient(
            pg.policy_loss(net, rollout, A, factors=(3,), form=form, term_weights=only).loss, net
        )
        for form in ("paper", "matched")
    }
    assert close(grads["paper"], theory_scale(kernel, 0.7, 0.55, 3) * grads["matched"])


# ---- Statistical statements: E3, E7, E10 ---------------------------------------------------------------------


@each_kernel
def test_e3_e7_e10_expected_ratios(kernel):
    """E3, E7, E10: after an update E[ratio] is 1 for matched and coarse sums, E3's for paper, E10's for means."""
    # The members leave one anchor, so every log-ratio is exactly Gaussian in the noise and its law is known.
    # 3 kernels x 4 settings x 3 terms = 36 z-scores; |z| <= 6 has a false-alarm rate of 36 * 2e-9 = 7e-8. N = 200,000
    # detects a mean off by 1.3% of a ratio's standard deviation.
    N, d, factors = 200_000, 3, (2, 3)
    old, process = Net(0), pg.Process([0.7, 0.55, 0.0], kernel)
    rollout = roll("shared_anchor", old, process, P=1, G=N, d=d, steps=[0])
    theta, A, x_t, c = (
        moved(old, 1, 0.08),
        some_advantages(rollout),
        rollout.x_t[0, 0],
        torch.tensor([0]),
    )
    far = 0.0
    for form, reduction in (
        ("paper", "sum"),
        ("matched", "sum"),
        ("matched", "mean"),
        ("paper", "mean"),
    ):
        options = dict(factors=factors, form=form, reduction=reduction, clip=None)
        first = pg.policy_loss(old, rollout, A, **options)
        terms = pg.policy_loss(theta, rollout, A, **options, old=first.old).terms
        mu_1, c_1 = slow_transition(old, process, 0.7, 0.55, 1, x_t, c)
        for k in (1, *factors):
            (mu, c_k), (mu_old, _) = (
                slow_transition(v, process, 0.7, 0.55, k, x_t, c) for v in (theta, old)
            )
            if form == "matched":
                mu, mu_old, c_k = mu_1 + mu - mu_old, mu_1, c_1
            delta, gap, power = mu - mu_old, mu_1 - mu_old, d if reduction == "mean" else 1
            centre = ((delta * gap).sum() - delta.square().sum() / 2) / c_k**2 / power
            spread = delta.square().sum() * c_1**2 / c_k**4 / power**2
            expected = (centre + spread / 2).exp()
            if reduction == "sum":
                e3 = (
                    (delta * gap).sum() + delta.square().sum() / 2 * (c_1**2 / c_k**2 - 1)
                ) / c_k**2
                assert close(expected, e3.exp())
                assert (form == "paper" and k > 1) or abs(expected.item() - 1) <= ROUNDING
            elif form == "matched":
                KL = delta.square().sum() / (2 * c_1**2)
                assert close(expected, (-KL / d + KL / d**2).exp())
            error = (expected * (spread.exp() - 1).sqrt() / math.sqrt(N)).item()
            assert abs(terms[k].ratio_mean - expected.item()) <= 6 * error, (form, reduction, k)
            if form == "paper" and reduction == "sum":
                far = max(far, abs(expected.item() - 1) / error)
    assert (
        far > 10
    )  # standard errors: that the paper form's expected ratio is not one is visible here


# ---- KL, weights, reduction, means ---------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@each_mode
@each_kernel
def test_kl_is_that_of_the_coarse_steps(kernel, mode, reduction):
    """Beta KL(pi_theta || pi_ref) is torch's KL of coarse Gaussians, reduced as the log-probability is."""
    net, reference, process = Net(0), Net(9), pg.Process(GRID, kernel)
    rollout, grid, values = roll(mode, net, process, P=2, G=3, steps=[0, 2]), GRID.tolist(), []
    for p, (j, i), a in product(range(2), enumerate((0, 2)), range(rollout.x_t.shape[2])):
        row = rollout.x_t[p, j, a][None], torch.tensor([p])
        (mu, c), (mu_ref, _) = (
            slow_transition(v, process, grid[i], grid[i + 1], 1, *row) for v in (net, reference)
        )
        kl = kl_divergence(Normal(mu, c), Normal(mu_ref.detach(), c))
        values.append(kl.sum() if reduction == "sum" else kl.mean())
    truth = torch.stack(values).mean()
    A = some_advantages(rollout)
    with_kl = pg.policy_loss(net, rollout, A, kl=0.7, reference=reference, reduction=reduction)
    without = pg.policy_loss(net, rollout, A, reduction=reduction)
    assert abs(with_kl.kl - truth.item()) <= ROUNDING * truth.item() and without.kl == 0.0
    assert close(with_kl.loss - without.loss, 0.7 * truth)
    pull = gradient(0.7 * truth, net)
    assert (
        close(gradient(with_kl.loss, net) - gradient(without.loss, net), pull)
        and pull.norm() > 1e-3
    )
    assert (
        all(p.grad is None for p in reference.parameters())
        and not with_kl.old.means[1].requires_grad
    )


def test_kl_gives_no_gradient_to_the_reference():
    """Pi_ref is fixed: the loss does not depend on its parameters, and a reference equal to pi costs 0."""
    net, reference = Net(0), Net(9)
    rollout = roll("independent", net, pg.Process(GRID))
    result = pg.policy_loss(net, rollout, some_advantages(rollout), kl=1.0, reference=reference)
    assert all(
        g is None
        for g in torch.autograd.grad(result.loss, [*reference.parameters()], allow_unused=True)
    )
    assert pg.policy_loss(net, rollout, some_advantages(rollout), kl=1.0, reference=net).kl == 0.0


@each_mode
def test_weights_default_and_per_step(mode):
    """W_1 = 1 and w_k = 1/|S|; another weight is a number per k, or one per stochastic step."""
    net, process = Net(0), pg.Process(GRID)
    rollout = roll(
        mode, net, process, P=3, G=3, steps=[0, 1, 2]
    )  # P = n = G: a transposed weight would fit
    A = some_advantages(rollout)
    old = pg.policy_loss(net, rollout, A, factors=(2, 3, 4)).old
    theta = moved(net, 1, 0.05)
    loss = lambda w: (
        pg.policy_loss(theta, rollout, A, factors=(2, 3, 4), old=old, term_weights=w).loss
    )
    assert torch.equal(loss(None), loss({1: 1.0, 2: 1 / 3, 3: 1 / 3, 4: 1 / 3}))
    # One step at a time: the loss of a rollout that holds that step alone, over n = 3.
    N = A.shape[1]
    for j in range(3):
        one = {name: getattr(rollout, name)[:, j : j + 1] for name in ("x_t", "x_s", "log_prob")}
        part = rollout._replace(sde_steps=(j,), x_0=rollout.x_0[:, j % N : j % N + 1], **one)
        own = pg.policy_loss(net, part, A[:, j % N : j % N + 1], factors=(2, 3, 4)).old
        weights = {1: 0.0, 2: 0.5, 3: 2.0, 4: 0.0}
        alone = pg.policy_loss(
            theta, part, A[:, j % N : j % N + 1], factors=(2, 3, 4), old=own, term_weights=weights
        )
        at_j = {k: w * torch.eye(3, dtype=torch.float64)[j] for k, w in weights.items()}
        assert close(loss(at_j), alone.loss / 3)


@each_mode
def test_reductions_agree_in_direction(mode):
    """E10: at theta_old the averaged gradient is 1/d of the summed one, for policy and KL alike, and ratios are 1."""
    net, process = Net(0), pg.Process(GRID)
    rollout, reference = roll(mode, net, process), Net(9)
    A = some_advantages(rollout)
    for kl in ({}, dict(kl=0.5, reference=reference)):
        mean, total = (pg.policy_loss(net, rollout, A, reduction=r, **kl) for r in ("mean", "sum"))
        assert close(3 * gradient(mean.loss, net), gradient(total.loss, net))
        assert abs(3 * mean.kl - total.kl) <= ROUNDING * total.kl
        assert all(close(3 * mean.old.log_probs[k], total.old.log_probs[k]) for k in (1, 2, 3))


@each_mode
@pytest.mark.parametrize("form", ["paper", "matched"])
def test_the_loss_is_a_mean_over_prompts(mode, form):
    """The loss of several prompts is the mean of their losses, so prompts may be split over devices."""
    net, process, P = Net(0), pg.Process(GRID, "cps"), 3
    rollout, reference, theta = roll(mode, net, process, P=P), Net(9), moved(net, 1, 0.05)
    A, options = some_advantages(rollout), dict(form=form, kl=0.2, clip=0.05)
    old = pg.policy_loss(net, rollout, A, reference=reference, **options).old
    together = pg.policy_loss(theta, rollout, A, reference=reference, old=old, **options).loss
    losses = []
    for p in range(P):
        one = [f[p : p + 1] for f in (rollout.x_t, rollout.x_s, rollout.log_prob, rollout.x_0)]
        part = rollout._replace(**dict(zip(("x_t", "x_s", "log_prob", "x_0"), one, strict=True)))
        fields = [lambda x, t, c, v=v, p=p: v(x, t, c + p) for v in (net, theta, reference)]
        own = pg.policy_loss(fields[0], part, A[p : p + 1], reference=fields[2], **options).old
        losses.append(
            pg.policy_loss(
                fields[1], part, A[p : p + 1], reference=fields[2], old=own, **options
            ).loss
        )
    assert close(together, torch.stack(losses).mean())
    assert close(gradient(together, theta), gradient(torch.stack(losses).mean(), theta))


@each_mode
def test_cost_of_an_update(mode):
    """1 + sum (k-1) evaluations per (prompt, step) at a shared anchor, G times that with own states."""
    velocity, process, (P, G) = Counting(Net(0)), pg.Process(GRID), (2, 4)
    rollout, reference = roll(mode, velocity, process, P, G, steps=[0, 2]), Counting(Net(9))
    velocity = Counting(Net(0))
    result = pg.policy_loss(
        velocity, rollout, some_advantages(rollout), factors=(2, 3), kl=1.0, reference=reference
    )
    states = P * 2 * (1 if mode == "shared_anchor" else G)
    assert velocity.rows == states * (1 + 1 + 2) and len(velocity.t) == 3
    assert reference.rows == states and len(reference.t) == 1
    assert result.old.means[3].shape == (P, 2, states // (2 * P), 3)
    assert torch.equal(reference.c[0], torch.arange(P).repeat_interleave(states // P))


@each_mode
def test_groups_without_signal_are_counted_and_kept(mode):
    """A group of equal rewards adds nothing, is counted, and stays in the mean over prompts."""
    net, process = Net(0), pg.Process(GRID)
    rollout = roll(mode, net, process, P=3, steps=[0, 2])
    rewards = rollout.x_0.sum(-1)
    rewards[1] = 0.1
    A = pg.group_advantages(rewards)
    A[0, 0, 1] = 0.0  # one member without signal is not a group without signal
    result = pg.policy_loss(net, rollout, A)
    assert result.groups_without_signal == A.shape[1] and result.loss.isfinite()
    kept = [0, 2]
    part = rollout._replace(
        **{name: getattr(rollout, name)[kept] for name in ("x_t", "x_s", "log_prob", "x_0")}
    )
    fields = lambda x, t, c: net(x, t, torch.tensor(kept)[c])
    assert close(
        gradient(result.loss, net),
        gradient(pg.policy_loss(fields, part, A[kept]).loss, net) * 2 / 3,
    )
    silent = pg.policy_loss(net, rollout, torch.zeros_like(A))
    assert silent.groups_without_signal == 3 * A.shape[1] and not gradient(silent.loss, net).any()
    assert all(term.clip_fraction == 0 for term in silent.terms.values())


OLD = pg.Old({}, dict.fromkeys((1, 2, 3), torch.zeros(2, 1, 4)), "paper", "mean", None, 0.0)
BAD = [
    (dict(advantages=torch.zeros(2, 4)), "advantages of shape (2, 4): must be (2, 1, 4)"),
    (dict(advantages=torch.zeros(2, 2, 4)), "advantages of shape (2, 2, 4): must be (2, 1, 4)"),
    (dict(form="hybrid"), "form='hybrid'"),
    (dict(clip=0.0), "clip=0.0"),
    (dict(clip=-0.1), "clip=-0.1"),
    (dict(clip=math.nan), "clip=nan"),
    (dict(kl=-1.0), "kl=-1.0"),
    (dict(kl=0.1), "kl=0.1"),
    (dict(kl=0.0, reference=Net(9)), "kl=0.0"),
    (dict(kl=math.nan), "kl=nan"),
    (dict(term_weights={1: 1.0, 2: 1.0}), "term_weights for k = [1, 2]"),
    (dict(term_weights={}), "term_weights for k = []"),
    (dict(reduction="avg"), "reduction='avg'"),
    (dict(factors=(1, 2)), "factors=[1, 2]"),
    (
        dict(old=OLD._replace(log_probs={1: torch.zeros(2, 1, 4), 2: 0})),
        "old is of k = [1, 2], 'paper', 'mean'",
    ),
    (dict(old=OLD._replace(form="matched")), "old is of k = [1, 2, 3], 'matched', 'mean'"),
    (dict(old=OLD._replace(reduction="sum")), "old is of k = [1, 2, 3], 'paper', 'sum'"),
    (dict(old=OLD), "old is of k = [1, 2, 3], 'paper', 'mean': must be of the same rollout"),
    (dict(term_weights={k: [1.0] * 3 for k in (1, 2, 3)}), "term_weights[1] of shape (3,)"),
    (dict(term_weights=dict.fromkeys((1, 2, 3), torch.ones(3))), "term_weights"),
]


@pytest.mark.parametrize(
    "arguments, message", BAD, ids=[f"{i}: {message}" for i, (_, message) in enumerate(BAD)]
)
def test_bad_arguments_are_one_line(arguments, message):
    """Arguments that do not fit together are refused in one line that names the value and the rule."""
    rollout = roll(
        "independent", Net(0), pg.Process(GRID), steps=[1]
    )  # one step: weights of three would broadcast
    arguments = {"advantages": some_advantages(rollout), **arguments}
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        pg.policy_loss(Net(0), rollout, arguments.pop("advantages"), **arguments)
    assert "\n" not in str(error.value)


# ---- Devices -------------------------------------------------------------------------------------------------

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_cuda)])


def run_on(device, dtype, kernel, mode):
    """One rollout and one loss on a device, from the same CPU noise everywhere: (x_0, advantages' loss, gradient)."""
    net, process = Net(0, dtype=dtype).to(device), pg.Process(GRID, kernel)
    noise = pg.draw_noise(
        [torch.Generator().manual_seed(p) for p in (0, 1)],
        4,
        (3,),
        2,
        mode == "independent",
        dtype,
        device,
    )
    sampler = pg.rollout_independent if mode == "independent" else pg.rollout_shared_anchor
    rollout = sampler(net, process, noise, [0, 2])
    A = pg.group_advantages(rollout.x_0.sum(-1))
    result = pg.policy_loss(net, rollout, A, kl=0.1, reference=Net(9, dtype=dtype).to(device))
    assert rollout.x_0.device.type == rollout.x_s.device.type == result.loss.device.type == device
    assert (
        rollout.x_0.dtype == dtype and result.loss.dtype == torch.float64 and result.loss.isfinite()
    )
    assert pg.ode_sample(net, process.grid, noise.start[:, 0]).device.type == device
    again = pg.policy_loss(
        net, rollout, A, form="matched", term_weights={1: 1.0, 2: torch.ones(2), 3: torch.ones(2)}
    )
    assert pg.policy_loss(net, rollout, A, form="matched", old=again.old).loss.isfinite()
    return rollout.x_0.cpu(), result.loss.detach().cpu(), gradient(result.loss, net).cpu()


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_mode
@each_kernel
def test_core_runs_on(device, dtype, mode, kernel):
    """Rollout, advantages and loss run where the noise and the network are, in the dtype of the noise."""
    x_0, _, grad = run_on(device, dtype, kernel, mode)
    assert x_0.isfinite().all() and grad.isfinite().all() and grad.norm() > 0


@no_cuda
@each_mode
@each_kernel
def test_cpu_and_cuda_agree(mode, kernel):
    """The same CPU generators give the same rollout on either device up to float32 rounding, TF32 off."""
    torch.backends.cuda.matmul.allow_tf32 = False
    here, there = (run_on(device, torch.float32, kernel, mode) for device in ("cpu", "cuda"))
    # Four steps of about 100 float32 roundings (2^-24) of numbers below 10, amplified at most 3^4; the loss then
    # divides by std >= 0.1 twice.
    rounding = 4 * 100 * 10 * 3**4 * 2.0**-24
    assert (here[0] - there[0]).abs().max() <= rounding
    assert (here[1] - there[1]).abs() <= 100 * rounding and (
        here[2] - there[2]
    ).norm() <= 100 * rounding


def test_every_kernel_and_mode_is_covered():
    """The tests draw from every kernel that pave_grpo has: a new entry in KERNELS must be added to slow.KERNELS."""
    assert set(KERNELS) == set(pg.KERNELS) and MODES == ("independent", "shared_anchor")
