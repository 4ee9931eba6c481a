"""Setups of single claims, each with what theory says of it, free of the verdicts on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import pave_grpo as pave
from zoo.oracle import fields
from zoo.oracle.bench import ETA, POINT, Bench, Scene
from zoo.oracle.findings import largest
from zoo.oracle.measures import flat_gradient, log_ratio, one_step, only, timed
from zoo.oracle.theory import Theory

SAMPLES = 100_000  # of a statistical measurement
GROUPS, MEMBERS = 20_000, 8  # of the estimator that is compared with the true policy gradient


# ---- An updated theta (E3, E7, E10) --------------------------------------------------------------


class Update(NamedTuple):
    """A theta near theta_old, seen from one anchor by n members."""

    ratio: float  # policy_loss's mean ratio
    expected: float  # what it should be
    se: float  # and its standard error
    delta: Tensor  # mu^(k) - mu^(k)_old, [d]
    old: dict[int, pave.Transition]
    new: pave.Transition
    x_s: Tensor  # [n, d]


def update(
    bench: Bench, name: str, kernel: str, k: int, size: float, form: str, reduction: str = "sum"
) -> Update:
    """Move theta so that mu^(k) moves by about `size` along its gap to mu^(1); take the mean ratio.

    With m the mean and c the std that x_s is scored under, log ratio = (delta.(x_s - m) -
    |delta|^2/2)/c^2, and x_s ~ N(mu^(1)_old, c_1^2): the ratio is lognormal, its mean and standard
    error are known. Reduction "mean" divides the log-ratio by d.
    """
    field, S = bench.fixture(name).field, only(k)["factors"]
    x_1 = widest_anchor(bench, name, kernel, k)
    z = bench.normal(1, 1, SAMPLES, fields.DIM, of=("update", name, kernel, form))
    process = pave.Process(torch.tensor(POINT, dtype=torch.float64), kernel, ETA)
    rollout = pave.rollout_shared_anchor(field, process, pave.Noise(x_1, z))
    with torch.no_grad():
        old = pave.rescore(field, rollout, S)

    def mean_of(theta: nn.Module) -> Tensor:
        return pave.rescore(theta, rollout, S)[k].mean

    gap = (old[1].mean - old[k].mean).flatten()
    moved = move(field, mean_of, gap if k > 1 else torch.ones_like(gap), size)

    options: dict[str, Any] = dict(factors=S, form=form, reduction=reduction, clip=None)
    ones = torch.ones(1, 1, SAMPLES, dtype=bench.dtype, device=bench.device)
    with torch.no_grad():
        first = pave.policy_loss(field, rollout, ones, **options).old
        terms = pave.policy_loss(moved, rollout, ones, old=first, **options).terms
        new = pave.rescore(moved, rollout, S)[k]

    delta = (new.mean - old[k].mean).flatten()
    scored = old[k] if form == "paper" else old[1]  # matched: at theta_old it is the coarse one
    off = (old[1].mean - scored.mean).flatten()
    c_1, c = old[1].std.item(), scored.std.item()
    per = fields.DIM if reduction == "mean" else 1
    mean = ((delta @ off - delta @ delta / 2) / c**2).item() / per
    var = (delta @ delta).item() * c_1**2 / c**4 / per**2
    expected = math.exp(mean + var / 2)
    se = expected * math.sqrt(math.expm1(var) / SAMPLES)
    return Update(terms[k].ratio_mean, expected, se, delta, old, new, rollout.x_s[0, 0])


@torch.no_grad()
def widest_anchor(bench: Bench, name: str, kernel: str, k: int) -> Tensor:
    """Of 32 states [1, 1, d] the one with the widest gap: a bias is shown where it is."""
    starts = bench.normal(32, 1, 1, fields.DIM, of=("start", name))
    field = bench.fixture(name).field
    gaps = []
    for x in starts:
        p = one_step(field, kernel, x[0], *POINT, only(k)["factors"])
        gaps.append((p[k].mean - p[1].mean).norm().item())
    return starts[gaps.index(max(gaps))]


def move(
    field: nn.Module, mean_of: Callable[[nn.Module], Tensor], towards: Tensor, size: float
) -> nn.Module:
    """A copy of the field whose mean lies about `size` from the field's, towards a vector [d]."""
    mean = mean_of(field)
    step = flat_gradient(mean.flatten() @ towards / towards.norm(), field)
    scale = size / (step @ step).item()
    for _ in range(4):  # the mean is not linear in theta: correct the length of the step
        new = mean_of(fields.shifted(field, scale * step))
        scale *= size / (new - mean).norm().item()
    return fields.shifted(field, scale * step)


# ---- Straight flows (E4) -------------------------------------------------------------------------


@torch.no_grad()
def straight_mean(
    theory: Theory, field: nn.Module, x: Tensor, k: int, t: float, s: float
) -> Tensor:
    """mu^(k) [B, *event] of a straight flow: the kernel's step by definition, and the gap."""
    v = timed(field, torch.arange(len(x), device=x.device))(x, t)
    mean: Tensor = theory.step(x, v, t, s)[0]
    return mean + theory.gap(x + (1 - t) * v, k, t, s)


class StraightStep(NamedTuple):
    """One step of a straight flow: what p^(k) and p^(1) differ by, and what they should."""

    density: Tensor  # the largest difference of mean, std, and gradient of the mean
    density_predicted: Tensor
    ratio: Tensor  # difference of the log-ratios of another theta, times c_k^2: one of states
    ratio_predicted: Tensor
    gradient: Tensor  # d mu^(k) less sum w_j / b_1 times d mu^(1)
    gap: Tensor  # mu^(k) - mu^(1), less the gap predicted


def straight_step(
    bench: Bench, kernel: str, name: str, t: float, s: float
) -> dict[int, StraightStep]:
    """By k. The gradient is taken along a direction u of the means."""
    theory, field = bench.theory(kernel), bench.fixture(name).field
    x, u, x_s = (bench.normal(2, fields.DIM, of=("e4", i)) for i in range(3))
    moved = fields.nudged(field, 0.3, bench.generator("e4"))
    old = one_step(field, kernel, x, t, s, bench.factors)
    new = one_step(moved, kernel, x, t, s, bench.factors)
    gradient = {k: flat_gradient((u * p.mean).sum(), field) for k, p in old.items()}
    ratio = {k: new[k].log_prob(x_s, "sum") - old[k].log_prob(x_s, "sum") for k in old}

    # The same by theory, with no sub-step.
    c = {k: theory.std(k, t, s) for k in old}
    mean_old = {k: straight_mean(theory, field, x, k, t, s) for k in old}
    mean_new = {k: straight_mean(theory, moved, x, k, t, s) for k in old}
    wanted = {k: log_ratio(mean_new[k], mean_old[k], x_s, c[k] ** 2) for k in old}
    found = {}
    for k in bench.factors:
        weight = theory.weight_sum(k, t, s) / theory.weight_sum(1, t, s)
        gap, off = mean_old[k] - mean_old[1], old[k].mean - old[1].mean
        std_off, std_gap = old[k].std - old[1].std, torch.full_like(gap, c[k] - c[1])
        found[k] = StraightStep(
            density=largest(off, std_off, gradient[k] - gradient[1]),
            density_predicted=largest(gap, std_gap, (weight - 1) * gradient[1]),
            ratio=largest(ratio[k] - ratio[1]) * c[k] ** 2,
            ratio_predicted=largest(wanted[k] - wanted[1]) * c[k] ** 2,
            gradient=largest(gradient[k] - weight * gradient[1]),
            gap=largest(off - gap),
        )
    return found


def straight_pull(theory: Theory, scene: Scene, k: int, step: int) -> Tensor:
    """sum_i A_i (x_s - mu^(k)) of one step, [d]: d mu^(k)/d theta is a multiple of the identity."""
    rollout = scene.rollout
    t, s = rollout.process.grid[step : step + 2].tolist()
    x, x_s = rollout.x_t[:, step], rollout.x_s[:, step]
    mean = straight_mean(theory, scene.field, x.flatten(0, 1), k, t, s).view(x.shape)
    A = scene.advantages.expand(rollout.x_s.shape[:3])[:, step]
    return (A[..., None] * (x_s - mean)).sum((0, 1))


def straight_sum(theory: Theory, scene: Scene, k: int, name: str, form: str = "paper") -> Tensor:
    """Along the k-term's gradient of all steps: the pulls, each by its d mu^(k)/d theta / c_k^2.

    That is W_k times dv/d theta, which is 1 of a constant velocity and -1/t of data at a point.
    """
    grid, total = scene.rollout.process.grid.tolist(), torch.zeros(())
    for j, i in enumerate(scene.rollout.sde_steps):
        t, s = grid[i : i + 2]
        slope = theory.weight_sum(k, t, s) * (1 if name == "constant" else -1 / t)
        scored = 1 if form == "matched" else k
        pull = straight_pull(theory, scene, scored, j)
        total = total + slope / theory.std(scored, t, s) ** 2 * pull
    return total


# ---- Small steps (E6) ----------------------------------------------------------------------------


class SmallSteps(NamedTuple):
    """What is left of p^(k) against p^(1) as the steps D from t = 0.7 shrink."""

    D: list[float]
    gaps: list[float]  # |mu^(k) - mu^(1)| / c_1
    biases: list[float]  # |mu^(k) - mu^(1)| / c_k^2, over |x1_hat|/(2t)
    limit: float  # of the bias
    off_limit: list[float]  # distance of (mu^(k) - mu^(1)) / c_k^2 from its limit
    gradients: list[float]  # distance of d mu^(k) from its multiple of d mu^(1), over |d mu^(1)|


def small_steps(bench: Bench, kernel: str, name: str, k: int) -> SmallSteps:
    """D = 2^-10 .. 2^-16, four states, the gradient along a direction u of the means."""
    theory, field, t = bench.theory(kernel), bench.fixture(name).field, 0.7
    x, u = bench.normal(4, fields.DIM, of="e6 0"), bench.normal(4, fields.DIM, of="e6 1")
    with torch.no_grad():
        x1_hat = x + (1 - t) * timed(field, torch.arange(4, device=x.device))(x, t)
    scale, limit = x1_hat.norm().item() / (2 * t), theory.bias(x1_hat, k, t)
    found = SmallSteps([2.0**-i for i in (10, 12, 14, 16)], [], [], 0.0, [], [])
    for D in found.D:
        p = one_step(field, kernel, x, t, t - D, (k,))
        fine = flat_gradient((u * p[k].mean).sum(), field)
        coarse = flat_gradient((u * p[1].mean).sum(), field)
        gap = (p[k].mean - p[1].mean).detach()
        bias = gap / p[k].std[0] ** 2
        off = fine - theory.gradient_limit(k, t) * coarse
        found.gaps.append((gap.norm() / p[1].std[0]).item())
        found.biases.append(bias.norm().item() / scale)
        found.off_limit.append((bias - limit).norm().item())
        found.gradients.append((off.norm() / coarse.norm()).item())
    return found._replace(limit=limit.norm().item() / scale)


# ---- Finer steps (E8) ----------------------------------------------------------------------------


class Chain(NamedTuple):
    """States x^(0), ..., x^(k), each [B, d], from t to s, and the process of that step."""

    states: list[Tensor]
    t: float
    s: float
    process: pave.Process

    def whole(self, field: nn.Module, x: Tensor, time: float) -> pave.Transition:
        """The step t -> s from x^(0), its velocity evaluated at x and time."""
        t = torch.full((len(x),), self.t, dtype=x.dtype, device=x.device)
        s = torch.full((len(x),), self.s, dtype=x.dtype, device=x.device)
        v = timed(field, torch.arange(len(x), device=x.device))(x, time)
        return self.process.transition(self.states[0], v, t, s)

    def sub_steps(
        self, field: nn.Module, of_mean: Tensor, of_variance: Tensor, anew: bool
    ) -> list[pave.Transition]:
        """k steps along it with these shares [k] of the whole step's mean shift and variance.

        One velocity serves all, or (anew) the network is evaluated where each begins.
        """
        x, k = self.states[0], len(self.states) - 1
        steps = []
        for j, start in enumerate(self.states[:-1]):
            time = self.t - j * (self.t - self.s) / k
            whole = self.whole(field, start, time) if anew else self.whole(field, x, self.t)
            mean = start + of_mean[j] * (whole.mean - x)
            steps.append(pave.Transition(mean, whole.std * of_variance[j].sqrt()))
        return steps


def log_probs(steps: Sequence[pave.Transition], ends: Sequence[Tensor]) -> Tensor:
    """Summed log-densities [k, B] of the states where the steps end."""
    return torch.stack([p.log_prob(x, "sum") for p, x in zip(steps, ends, strict=True)])


def log_ratios(
    new: Sequence[pave.Transition], old: Sequence[pave.Transition], ends: Sequence[Tensor]
) -> Tensor:
    """The log-ratios [k, B] of two thetas, multiplied out."""
    pairs = zip(new, old, ends, strict=True)
    return torch.stack([log_ratio(q.mean, p.mean, x, p.std**2) for q, p, x in pairs])


def score(steps: Sequence[pave.Transition], ends: Sequence[Tensor], field: nn.Module) -> Tensor:
    """d/d theta of the summed log-densities, as sum_j (x_j - mu_j)/c_j^2 d mu_j / d theta."""
    total = torch.zeros_like(ends[0].sum())
    for p, x in zip(steps, ends, strict=True):
        credit = (x - p.mean) / pave.per_row(p.std, x) ** 2
        total = total + (credit.detach() * p.mean).sum()
    return flat_gradient(total, field)


class Product(NamedTuple):
    """Sub-steps against the step: errors of log-densities, and the same errors multiplied out."""

    error: Tensor  # the larger of score (relative) and log-ratio of the product
    predicted: Tensor
    clipped: Tensor  # product of clipped sub-ratios less the clipped ratio
    clipped_predicted: Tensor


def product(
    chain: Chain, field: nn.Module, other: nn.Module, shares: tuple[Tensor, Tensor], anew: bool
) -> Product:
    """For two thetas, field and other, and the shares of mean and variance."""
    x, ends, last = chain.states[0], chain.states[1:], chain.states[-1:]
    whole = {f: [chain.whole(f, x, chain.t)] for f in (field, other)}
    fine = {f: chain.sub_steps(f, *shares, anew) for f in (field, other)}

    def compare(ratio: Tensor, ratios: Tensor, score_1: Tensor, score_k: Tensor) -> list[Tensor]:
        clipped = ratios.exp().clamp(0.9, 1.1).prod(0) - ratio.exp().clamp(0.9, 1.1)
        off = largest((score_k - score_1) / score_1.norm(), ratios.sum(0) - ratio)
        return [off, largest(clipped)]

    log_p = {f: log_probs(whole[f], last)[0] for f in whole}
    log_q = {f: log_probs(fine[f], ends) for f in fine}
    error, clipped = compare(
        log_p[other] - log_p[field],
        log_q[other] - log_q[field],
        flat_gradient(log_p[field].sum(), field),
        flat_gradient(log_q[field].sum(), field),
    )
    predicted, clipped_predicted = compare(
        log_ratios(whole[other], whole[field], last)[0],
        log_ratios(fine[other], fine[field], ends),
        score(whole[field], last, field),
        score(fine[field], ends, field),
    )
    return Product(error, predicted, clipped, clipped_predicted)


def finer_steps(bench: Bench, kernel: str, k: int) -> dict[str, Product]:
    """Along states out of the air: equal and unequal shares, and a network evaluated anew."""
    field, x = bench.fixture("network").field, bench.normal(3, fields.DIM, of="e8")
    other = fields.nudged(field, 0.3, bench.generator("e8"))
    process = pave.Process(torch.tensor(POINT, dtype=torch.float64), kernel, ETA)
    states = [x, *(x + bench.normal(3, fields.DIM, of=("e8", k, j)) / 2 for j in range(k))]
    chain = Chain(states, *POINT, process)
    random = torch.rand(k, generator=bench.generator("e8 shares", k), dtype=torch.float64)
    even, uneven = random.to(x) + 0.1, torch.linspace(1, 2, k, dtype=x.dtype).to(x)
    even, uneven = even / even.sum(), uneven / uneven.sum()
    return {
        "equal": product(chain, field, other, (even, even), anew=False),
        "unequal": product(chain, field, other, (uneven, even), anew=False),
        "anew": product(chain, field, other, (even, even), anew=True),
    }


# ---- Clipping (E9) -------------------------------------------------------------------------------


def clipped_terms(bench: Bench, scene: Scene) -> Tensor:
    """policy_loss after an update less PPO's rule written for each term; loss and gradient.

    NaN if the clip does not act in every term.
    """
    clip, A, S = 0.01, scene.advantages, bench.factors
    other = fields.nudged(scene.field, 0.05, bench.generator("e9"))
    old = pave.policy_loss(scene.field, scene.rollout, A, factors=S).old
    result = pave.policy_loss(other, scene.rollout, A, factors=S, clip=clip, old=old)
    wanted = torch.zeros_like(result.loss)
    for k, p in pave.rescore(other, scene.rollout, S).items():
        ratio = (p.log_prob(scene.rollout.x_s) - old.log_probs[k]).exp()
        term = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A).mean()
        wanted = wanted - term * (1 if k == 1 else 1 / len(S))
    a, b = flat_gradient(result.loss, other), flat_gradient(wanted, other)
    error = largest((a - b) / b.norm(), result.loss - wanted)
    acts = min(term.clip_fraction for term in result.terms.values()) > 0
    return error if acts else error * math.nan


# ---- Variances, policy gradients, derivatives (E11, TRUTH, GRADIENT) -----------------------------


def variance(kernel: str, grid: Any, q: float, var: float) -> float:
    """Variance after the grid's steps, from `var` before them, by the exact velocity of N(0, q)."""
    process = pave.Process(torch.as_tensor(grid, dtype=torch.float64), kernel, ETA)
    t = process.grid[:-1]
    a, b, std = process.coefficients(t, process.grid[1:])
    gain = a + b * (t - (1 - t) * q) / ((1 - t) ** 2 * q + t**2)  # v is this slope times x
    for gain_2, std_2 in zip(gain.square().tolist(), std.square().tolist(), strict=True):
        var = gain_2 * var + std_2
    return var


def group_estimates(
    bench: Bench, process: pave.Process, m: Tensor, log_q: Tensor, target: Tensor
) -> Iterator[tuple[int, str, Tensor]]:
    """k, form and the policy gradients [GROUPS, 2 d] that GROUPS groups estimate, one each."""
    P, G, steps, kernel = GROUPS, MEMBERS, process.stochastic_steps(), process.kernel
    field = fields.Gaussian(m.repeat(P, 1), log_q.repeat(P, 1))
    x_1 = bench.normal(P, G, len(m), of=("truth", kernel))
    z = bench.normal(P, len(steps), G, len(m), of=("truth steps", kernel))
    rollout = pave.rollout_independent(field, process, pave.Noise(x_1, z), steps)
    r = -(rollout.x_0 - target).square().sum(-1)
    scene = Scene(field, rollout, r - r.mean(-1, keepdim=True))
    grid = process.grid.tolist()
    for k in (1, *bench.factors):
        scales = [bench.theory(kernel).scale(k, grid[i], grid[i + 1]) for i in steps]
        rescaling = 1 / torch.tensor(scales, dtype=torch.float64).to(m)
        for form in ("original", "standardised") if k == 1 else ("paper", "rescaled", "matched"):
            A = pave.group_advantages(r) if form == "standardised" else scene.advantages
            loss = pave.policy_loss(
                field,
                rollout,
                A,
                form="matched" if form == "matched" else "paper",
                clip=None,
                reduction="sum",
                **only(k, rescaling if form == "rescaled" else 1.0),
            ).loss
            both_parameters = torch.autograd.grad(loss, [field.m, field.log_q])
            # Back from the mean over groups and steps; centring by its own group costs 1 - 1/G.
            draws = -torch.cat(both_parameters, 1) * P * len(steps) / (1 - 1 / G)
            yield k, form, draws


def marginal_samples(bench: Bench, kernel: str, mode: str) -> tuple[Tensor, float, float]:
    """Samples [n] of a Gaussian flow, and the mean and variance that propagation predicts."""
    n, own = SAMPLES // 2, mode == "independent"
    m = torch.tensor([0.7], dtype=torch.float64, device=bench.device)
    q = torch.tensor([0.4], dtype=torch.float64, device=bench.device)
    process = pave.Process(pave.schedule(6, 1.5), kernel, ETA)
    steps = process.stochastic_steps() if own else (2,)
    x_1 = bench.normal(n, 1, 1, of=("marginal", kernel, mode))
    z = bench.normal(n, len(steps), 1, 1, of=("marginal steps", kernel, mode))
    sample = pave.rollout_independent if own else pave.rollout_shared_anchor
    rollout = sample(fields.Gaussian(m, q.log()), process, pave.Noise(x_1, z), steps)
    mean, var = fields.gaussian_law(process, m, q, 0 * m, 1 + 0 * m, steps)
    return rollout.x_0.flatten(), mean.item(), var.item()


def derivatives(bench: Bench, scene: Scene, form: str) -> tuple[Tensor, Tensor, float]:
    """d loss / d h at theta + h tangent: by reverse mode, forward mode and central differences."""
    names = [name for name, _ in scene.field.named_parameters()]
    theta_old = list(scene.field.parameters())
    options: dict[str, Any] = {
        "factors": bench.factors,
        "form": form,
        "clip": None,
        "reduction": "sum",
    }
    old = pave.policy_loss(scene.field, scene.rollout, scene.advantages, **options).old
    tangent = [bench.normal(*p.shape, of=("tangent", i)) for i, p in enumerate(theta_old)]
    theta = [(p + 0.01 * v.flip(0)).detach() for p, v in zip(theta_old, tangent, strict=True)]

    def loss(values: list[Tensor]) -> Tensor:
        parameters = dict(zip(names, values, strict=True))

        def velocity(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            return functional_call(scene.field, parameters, (x, t, prompt))

        return pave.policy_loss(
            velocity,
            scene.rollout,
            scene.advantages,
            old=old,
            kl=0.1,
            reference=scene.field,
            **options,
        ).loss

    def along(h: float) -> float:
        return loss([p + h * v for p, v in zip(theta, tangent, strict=True)]).item()

    leaves = [p.clone().requires_grad_() for p in theta]
    grads = torch.autograd.grad(loss(leaves), leaves)
    reverse = torch.stack([(g * v).sum() for g, v in zip(grads, tangent, strict=True)]).sum()
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(p, v) for p, v in zip(theta, tangent, strict=True)]
        forward = forward_ad.unpack_dual(loss(dual)).tangent
    h = 2e-5
    central = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    return reverse, forward, central
