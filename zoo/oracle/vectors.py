"""Golden vectors: every number of Algorithm 1 on small cases, for code in other languages.

`write` leaves vectors.safetensors (float64 tensors named CASE/NAME) and vectors.json (what they
mean: the setting of each case, the field, the inputs that must be refused, the SHA-256 of the
tensors). All randomness is explicit noise. The field is gaussian_velocity of zoo/oracle/fields.py,
one formula in x, t and the tensors m, log_q: + - * / and exp alone. `check` reads a folder back
and recomputes every tensor from the inputs among them. Shapes are in P prompts, n stochastic
steps, G members of d dimensions, A states that a group starts a step from (1 with shared anchors,
else G), N groups per prompt (n with shared anchors, else 1); K is a k, I and J count from 0.

inputs      m, log_q (theta_old), m_new, log_q_new (theta) [P, d]; noise_start [P, 1 or G, d],
            noise_steps [P, n, G, d]; rewards [P, N, G]; and the setting
sampling    call_I_x, call_I_t, call_I_v: the velocity calls in order, under theta_old, rows prompt
            by prompt, with shared anchors the anchor's row first and then its branches', oldest
            first; x_t [P, n, A, d], x_s [P, n, G, d], log_prob_sampled [P, n, G] (summed, whatever
            the reduction), x_0 [P, N, G, d]
scoring     score_old_J_x, _t, _v and score_new_J_x, _t, _v: of the decomposition under theta_old
            and theta, the J-th velocity of every chain that has one, chains of ascending k one
            after another, in each the rows [P, n, A]; the first velocity, J = 0, is shared by all
            chains and stands once. An implementation may evaluate them in any order.
            a_K, b_K, std_K [n]: the kernel's coefficients of the last sub-step; mean_K, mean_old_K
            [P, n, A, d]; log_prob_K of theta, log_prob_old_K, ratio_K [P, n, G], under what the
            form scores; advantages [P, N, G]; loss; grad_m, grad_log_q: its gradient at theta

kernels     mean = a x + b v, D = t - s. flow_sde: g^2 = eta^2 t/(1-t), with t_1, the grid's second
            point, for t in 1 - t where t = 1; a = 1 - g^2 D/(2t), b = -(1 + g^2 (1-t)/(2t)) D,
            std = g sqrt(D). dance: the same with g = eta. cps: h = eta pi/2, a = 1 - s + s cos h,
            b = -(1-s) t + s cos h (1-t), std = s sin h
k-term      d = D/k; k-1 times x <- x - d v(x, t), t <- t - d; then the kernel's step from there to
            s. Scored under N(mean_K, std_K^2), form "matched": N(mean_old_1 + mean_K - mean_old_K,
            std_1^2)
log_prob    -(x_s - mean)^2/(2 std^2) - log std - log(2 pi)/2, mean or sum over d
advantages  (r - mean r)/(std r + eps) in each group, std with ddof, then clamped; 0 where all
            rewards are equal
loss        -mean over P, n, G of sum_K w_K min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), A the
            advantages, w_1 = 1, w_K = 1/|S|, + kl times the mean over P, n, and states of
            |mean_1 - mean_ref_1|^2/(2 std_1^2), reduced as log_prob is; the reference is theta_old
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import pave_grpo as pave
from zoo.oracle import fields

Setting = dict[str, Any]
Tensors = dict[str, Tensor]

VERSION = 1
# Of the largest entry: some hundred roundings through std >= 0.05; another exp is allowed.
TOLERANCE = 1e-11
INPUTS = ("m", "log_q", "m_new", "log_q_new", "noise_start", "noise_steps", "rewards")
USUAL: Setting = {
    "kernel": "flow_sde",
    "eta": 0.7,
    "grid": [1.0, 0.75, 0.5, 0.25, 0.0],
    "sde_steps": [0, 2],
    "rollouts": "shared_anchor",
    "factors": [2, 3],
    "form": "paper",
    "reduction": "mean",
    "clip": 0.02,
    "kl": 0.0,
    "ddof": 1,
    "eps": 1e-8,
    "clamp": 5.0,
    "group": 4,
    "move": 0.1,  # how far theta is from theta_old
}
CASES: dict[str, Setting] = {  # what each has instead
    "flow_sde from t = 1": {},
    "cps from t = 1": {"kernel": "cps"},
    "dance from t = 1": {"kernel": "dance"},
    "flow_sde independent": {"rollouts": "independent"},
    "cps independent": {"kernel": "cps", "rollouts": "independent"},
    "matched, summed": {"form": "matched", "reduction": "sum", "clip": 0.2},
    "k = 1 only": {"factors": []},
    "k = 5": {"factors": [5], "kernel": "dance"},
    "flow_sde to s = 0": {"sde_steps": [3]},
    "equal rewards": {"equal": True},
    "G = 2": {"group": 2},
    "a clamp that acts": {"clamp": 0.8},
    "ddof 0, eps 1e-4": {"ddof": 0, "eps": 1e-4},
    "no clip": {"clip": None},
    "at theta_old": {"move": 0.0},
    "KL": {"kl": 0.1},
    "ratios on both sides of the clip": {"reduction": "sum", "clip": 0.05, "move": 0.2, "group": 8},
}
REFUSED: list[Setting] = [
    {
        "kernel": "cps",
        "eta": 0.7,
        "grid": [1.0, 0.5, 0.0],
        "sde_steps": [1],
        "why": "zero std at s = 0: no density",
    },
    {"kernel": "cps", "eta": 1.5, "grid": [1.0, 0.5, 0.0], "sde_steps": [0], "why": "eta above 1"},
]


def inputs_of(name: str, setting: Setting) -> Tensors:
    """The explicit inputs of a case, drawn once, when the vectors are written."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    P, d, G, n = 2, 3, setting["group"], len(setting["sde_steps"])
    independent = setting["rollouts"] == "independent"
    m = draw(P, d)
    log_q = 0.5 * draw(P, d) - 1
    rewards = draw(P, 1 if independent else n, G)
    if setting.get("equal"):
        rewards[0] = 1.0  # the groups of one prompt are silent, and stay in the mean
    return {
        "m": m,
        "log_q": log_q,
        "m_new": m + setting["move"] * draw(P, d),
        "log_q_new": log_q + setting["move"] * draw(P, d),
        "noise_start": draw(P, G if independent else 1, d),
        "noise_steps": draw(P, n, G, d),
        "rewards": rewards,
    }


# ---- The evaluations of the velocity -------------------------------------------------------------


class Evaluation(NamedTuple):
    """One call of a velocity: x [B, d], t [B], v [B, d]."""

    x: Tensor
    t: Tensor
    v: Tensor


class Recorded:
    """A field that keeps its calls."""

    def __init__(self, field: fields.Gaussian):
        self.field = field
        self.calls: list[Evaluation] = []

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        v = self.field(x, t, prompt)
        self.calls.append(Evaluation(x, t, v))
        return v


def named(name: str, calls: Sequence[Evaluation]) -> Tensors:
    """The calls as NAME_I_x, NAME_I_t, NAME_I_v."""
    out: Tensors = {}
    for i, call in enumerate(calls):
        out |= {f"{name}_{i}_x": call.x, f"{name}_{i}_t": call.t, f"{name}_{i}_v": call.v}
    return out


def by_depth(calls: Sequence[Evaluation], factors: Sequence[int]) -> list[Evaluation]:
    """The calls of pave_grpo.decompose, chain after chain, as one call for each depth J.

    The first is shared. Then the chain of k has k-1 calls, for its depths 1 to k-1.
    """
    rest = iter(calls[1:])
    chains = {k: [next(rest) for _ in range(1, k)] for k in sorted(factors)}
    depths = [calls[0]]
    for j in range(1, max(factors, default=1)):
        abreast = [chain[j - 1] for k, chain in chains.items() if k > j]
        columns = zip(*abreast, strict=True)
        depths.append(Evaluation(*(torch.cat(column) for column in columns)))
    return depths


# ---- Algorithm 1 ---------------------------------------------------------------------------------


def process_of(setting: Setting) -> pave.Process:
    """The process of a setting. Raises ValueError where the core refuses it."""
    grid = torch.tensor(setting["grid"], dtype=torch.float64)
    return pave.Process(grid, setting["kernel"], setting["eta"])


def compute(setting: Setting, given: Tensors) -> Tensors:
    """Every intermediate of Algorithm 1, from the inputs of a case."""
    old = fields.Gaussian(given["m"], given["log_q"])
    new = fields.Gaussian(given["m_new"], given["log_q_new"])
    process = process_of(setting)
    advantages = pave.group_advantages(
        given["rewards"], setting["ddof"], setting["eps"], setting["clamp"]
    )
    rollout, sampled = sample(setting, given, process, old)

    options = {name: setting[name] for name in ("factors", "form", "clip", "reduction")}
    if setting["kl"]:
        options |= {"kl": setting["kl"], "reference": old}
    scored_old, scored_new = Recorded(old), Recorded(new)
    at_old = pave.policy_loss(scored_old, rollout, advantages, **options).old
    loss = pave.policy_loss(scored_new, rollout, advantages, old=at_old, **options).loss
    grad_m, grad_log_q = torch.autograd.grad(loss, [new.m, new.log_q])

    out = {
        **sampled,
        **named("score_old", by_depth(scored_old.calls, setting["factors"])),
        **named("score_new", by_depth(scored_new.calls, setting["factors"])),
        **terms(setting, process, new, rollout, at_old),
        "advantages": advantages,
        "loss": loss,
        "grad_m": grad_m,
        "grad_log_q": grad_log_q,
    }
    return {name: value.detach().clone().contiguous() for name, value in out.items()}


def sample(
    setting: Setting, given: Tensors, process: pave.Process, old: fields.Gaussian
) -> tuple[pave.Rollout, Tensors]:
    """The rollout under theta_old, and what the vectors say of it."""
    rollouts = {
        "shared_anchor": pave.rollout_shared_anchor,
        "independent": pave.rollout_independent,
    }
    noise = pave.Noise(given["noise_start"], given["noise_steps"])
    velocity = Recorded(old)
    rollout = rollouts[setting["rollouts"]](velocity, process, noise, setting["sde_steps"])
    return rollout, {
        **named("call", velocity.calls),
        "x_t": rollout.x_t,
        "x_s": rollout.x_s,
        "log_prob_sampled": rollout.log_prob,
        "x_0": rollout.x_0,
    }


def terms(
    setting: Setting,
    process: pave.Process,
    new: fields.Gaussian,
    rollout: pave.Rollout,
    old: pave.OldPolicy,
) -> Tensors:
    """The coefficients, means, log-probabilities and ratios of every k."""
    first = torch.tensor(setting["sde_steps"])
    t, s = process.grid[first], process.grid[first + 1]
    transitions = pave.rescore(new, rollout, setting["factors"])
    out: Tensors = {}
    for k, p in transitions.items():
        begin = s + (t - s) / k if k > 1 else t  # of the last sub-step
        a, b, std = process.coefficients(begin, s)
        scored = p
        if setting["form"] == "matched":
            mean = old.means[1] + p.mean - old.means[k]
            scored = pave.Transition(mean, transitions[1].std)
        log_prob = scored.log_prob(rollout.x_s, setting["reduction"])
        out |= {
            f"a_{k}": a,
            f"b_{k}": b,
            f"std_{k}": std,
            f"mean_{k}": p.mean,
            f"mean_old_{k}": old.means[k],
            f"log_prob_{k}": log_prob,
            f"log_prob_old_{k}": old.log_probs[k],
            f"ratio_{k}": (log_prob - old.log_probs[k]).exp(),
        }
    return out


# ---- Files ---------------------------------------------------------------------------------------


def write(folder: str | Path) -> None:
    """Write the vectors. Raises ValueError where the folder has files already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--vectors {folder}: must be a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: Tensors = {}
    cases: dict[str, Setting] = {}
    for name, own in CASES.items():
        setting = USUAL | own
        given = inputs_of(name, setting)
        values = given | compute(setting, given)
        tensors |= {f"{name}/{key}": value for key, value in values.items()}
        shapes = {key: list(value.shape) for key, value in values.items()}
        cases[name] = {**setting, "tensors": shapes}
    save_file(tensors, folder / "vectors.safetensors")
    described = {
        "version": VERSION,
        "documentation": __doc__,
        "field": fields.gaussian_velocity.__doc__,
        "made_with": {"torch": torch.__version__},
        "tolerance": TOLERANCE,
        "sha256": hashlib.sha256((folder / "vectors.safetensors").read_bytes()).hexdigest(),
        "cases": cases,
        "refused": REFUSED,
    }
    (folder / "vectors.json").write_text(json.dumps(described, indent=1) + "\n")


def check(folder: str | Path) -> list[str]:
    """Read a folder back and recompute everything: one line per difference.

    Raises ValueError if it holds no vectors, or those of another version.
    """
    folder = Path(folder)
    try:
        described = json.loads((folder / "vectors.json").read_text())
        raw = (folder / "vectors.safetensors").read_bytes()
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--check-vectors {folder}: holds no vectors ({error})") from None
    version = described.get("version")
    if version != VERSION:
        raise ValueError(f"--check-vectors {folder}: version {version}; must be {VERSION}")
    try:
        tensors = load_file(folder / "vectors.safetensors")
    except SafetensorError as error:
        what = f"vectors.safetensors cannot be read ({error})"
        raise ValueError(f"--check-vectors {folder}: {what}") from None

    wrong = []
    if hashlib.sha256(raw).hexdigest() != described["sha256"]:
        wrong.append("vectors.safetensors: SHA-256 differs")
    for name, setting in described["cases"].items():
        full_names = {key: f"{name}/{key}" for key in setting["tensors"]}
        stored = {key: tensors[full] for key, full in full_names.items() if full in tensors}
        wrong += [f"{name}{what}" for what in differences(setting, stored)]
    for case in described["refused"]:
        if is_accepted(case):
            wrong.append(f"accepted what must be refused: {case}")
    return wrong


def differences(setting: Setting, stored: Tensors) -> Iterator[str]:
    """What is wrong with the stored tensors of a case, each completing the case's name."""
    missing = sorted(set(INPUTS) - set(stored))
    if missing:
        yield f": inputs missing: {', '.join(missing)}"
        return
    again = compute(setting, {key: stored[key] for key in INPUTS})
    for key in sorted(set(stored) - set(INPUTS) | set(again)):
        if key not in stored:
            yield f"/{key}: missing"
        elif key not in again:
            yield f"/{key}: unknown"
        elif stored[key].shape != again[key].shape or stored[key].dtype != again[key].dtype:
            found = f"{list(stored[key].shape)} {stored[key].dtype}"
            yield f"/{key}: {found}, not {list(again[key].shape)}"
        else:
            error = (stored[key] - again[key]).abs().max().item()
            scale = max(1.0, again[key].abs().max().item())
            if not error <= TOLERANCE * scale:  # a NaN is wrong too
                yield f"/{key}: off by {error:.3g}"


def is_accepted(case: Setting) -> bool:
    """Does the core take a setting that must be refused?"""
    try:
        process_of(case).stochastic_steps(case["sde_steps"])
    except ValueError:
        return False
    return True


def main(into: str | None, of: str | None) -> int:
    """Write into a folder, or check the vectors of one, and print what was done.

    Returns 0 for done and right, 1 for wrong, 2 for bad usage.
    """
    wrong: list[str] = []
    try:
        if into:
            write(into)
            print(f"wrote {len(CASES)} cases to {into}")
        if of:
            wrong = check(of)
            print("\n".join(wrong) or f"{of}: every tensor as recomputed")
    except ValueError as problem:
        print(f"verify_equivalence.py: error: {problem}", file=sys.stderr)
        return 2
    return 1 if wrong else 0
