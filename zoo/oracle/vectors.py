"""Golden vectors: every number of Algorithm 1 on small cases, for code in other languages.

vectors.safetensors holds float64 tensors named CASE/NAME. vectors.json holds this text, the setting
of every case, which of its tensors are inputs, their shapes, and settings that must be refused. All
randomness is explicit noise. To judge an implementation, compute from the inputs, save any of the
outputs under the same names in one .safetensors file, float32 or float64, and run

    python verify_equivalence.py --compare DIR THEIRS

Axes: P prompts, n = len(sde_steps) stochastic steps, G members of a group, *event a state ("event",
one to three axes); A states that a group starts a step from (1 with shared anchors, else G); N
groups of a prompt (n with shared anchors, else 1). K is 1 or one of "factors", the set S; I and J
count from 0. An x or v of a call is [B, *event], its t [B]: the B rows are the axes named, the last
of them fastest. Names in quotes are those of a setting.

time        1 is noise, 0 is data. Step i goes from t = grid[i] down to s = grid[i+1]; D = t - s.
            Those in "sde_steps" are stochastic, the j-th of them with noise_steps[:, j]; every
            other is an Euler step of the ODE, x <- x - D v(x, t). noise_start is the state at
            grid[0], also below 1; x_0 is the state at the last time of the grid, also above 0.
field       v(x, t) = (t - (1-t) q)/((1-t)^2 q + t^2) (x - (1-t) m) - m, q = exp(log_q), entry by
            entry, with m and log_q of the row's prompt: the exact velocity of data N(m, diag q)
kernels     a step t -> s is N(mean, std^2) in each entry, mean = a x + b v(x, t).
            flow_sde: g^2 = eta^2 t/(1-t), a = 1 - g^2 D/(2t), b = -(1 + g^2 (1-t)/(2t)) D, std =
            g sqrt(D). At t = 1, and there alone, the 1-t under g^2 is 1 - grid[1]; it stays 0 in b.
            Of the k-terms only K = 1 can start at t = 1; a grid from below 1 has no such step.
            dance: the same with g = eta at every t.
            cps: h = eta pi/2, a = 1 - s + s cos h, b = -(1-s) t + s cos h (1-t), std = s sin h

inputs      m, log_q: theta_old, which samples; m_new, log_q_new: theta, where the loss is; with
            "kl", m_ref, log_q_ref: the reference (in the case "KL" it is theta_old); all
            [P, *event]. noise_start [P, 1 or G, *event]; noise_steps [P, n, G, *event]; rewards
            [P, N, G], given, not computed from x_0; where "u" is "drawn", u [P, n, A]

sampling    under theta_old. A stochastic step: x_s = mean + std noise_steps.
            "independent": member g goes through the whole grid from noise_start[p, g], or from
            noise_start[p, 0] where a group shares its start; A = G in both. x_0 [P, 1, G].
            "shared_anchor": the anchor starts from noise_start[p, 0] and takes ODE steps alone. At
            each stochastic step G members branch from it, x_t the anchor's state, and finish by
            ODE steps: one stochastic step a member. The anchor takes an ODE step there too, and
            stops after its last stochastic step, from which only members go on. x_0 [P, n, G].
            call_I_x, call_I_t, call_I_v: the velocity calls, one for each step I of the grid.
            Rows are prompt by prompt: the G members; with shared anchors the anchor first, up to
            and with its last stochastic step, then the members of the stochastic steps before I,
            G for each step, those of the earliest first.
            x_t [P, n, A, *event], x_s [P, n, G, *event] of each stochastic step, x_0 [P, N, G,
            *event]; log_prob_sampled [P, n, G], the log_prob of x_s under N(mean, std^2), summed
            whatever "reduction" says

k-term      of every x_t -> x_s, under theta_old and under theta, at the x_t that was sampled: d =
            D/K; K-1 times x <- x - d v(x, t), t <- t - d; then the kernel's step from t = s + d to
            s: mean_K = a_K x + b_K v(x, t), std_K. It is scored under ("form")
            "paper": N(mean_K, std_K^2), for theta_old N(mean_old_K, std_K^2)
            "matched": N(mean_old_1 + mean_K - mean_old_K, std_1^2), for theta_old N(mean_old_1,
            std_1^2). For K = 1 both forms are the same.
            score_old_J_x, _t, _v and score_new_J_x, _t, _v: under theta_old and theta, the J-th
            velocity of every K that has one (K > J), ascending K one after another, each with rows
            [P, n, A]; J = 0, at x_t, is shared by all K and stands once. Any order of
            evaluation gives these numbers
midpoint    form "midpoint" has no factors, and K = 1 alone: v_t is theta_old's velocity at x_t, as
            sampled; v_u = v(x_t - u D v_t, t - u D) under theta_old or theta, u the number "u" or
            the input; mean_old_1 and mean_1 = a_1 x_t + b_1 v_u, with a_1, b_1, std_1 of the whole
            step t -> s; mean_sampled = a_1 x_t + b_1 v_t. Scored under N(mean_sampled + mean_1 -
            mean_old_1, std_1^2), for theta_old N(mean_sampled, std_1^2). score_old_0 and
            score_new_0 are the evaluations of v_u. v_t, mean_sampled [P, n, A, *event]
terms       a_K, b_K, std_K [n]; mean_K (of theta), mean_old_K [P, n, A, *event]; log_prob_K,
            log_prob_old_K of x_s under what is scored, and ratio_K = exp(log_prob_K -
            log_prob_old_K), [P, n, G], under "reduction"
log_prob    -(x_s - mean)^2/(2 std^2) - log std - log(2 pi)/2, "mean" or "sum" over *event

advantages  [P, N, G]: (r - mean r)/(std r + "eps") in each group of G, with std r =
            sqrt(sum (r - mean r)^2/(G - "ddof")); without "standardise" r - mean r; then clamped to
            [-"clamp", "clamp"], if that is not null. Exactly 0 where all rewards of the group are
            equal; such a group stays in every mean
loss        -mean over P, n, G of sum over K of w_K min(ratio A, bounded A), bounded = ratio clamped
            to [1 - "clip", 1 + "clip"] (null: bounded = ratio), w_1 = 1, w_K = 1/|S| for K in S, A
            the member's advantage (with N = 1 that of its trajectory); + "kl" times kl, the mean
            over P, n, A of |mean_1 - mean_ref_1|^2/(2 std_1^2), the square's entries reduced as
            "reduction" says; mean_ref_1 is mean_1 under the reference, in the midpoint form at the
            same place x_t - u D v_t. kl, mean_ref_1: where "kl" > 0 alone
gradient    grad_m, grad_log_q [P, *event]: of the loss, by m_new and log_q_new. It goes through
            every velocity and every state within mean_K. Constant are x_t, x_s, v_t, A, and all
            that is theta_old's or the reference's. A member is cut, and has no gradient from that
            K, where bounded A < ratio A, strictly. Inside the clip and exactly at its bound the two
            are equal, and the gradient is that of ratio A, once. No ratio of a case is within 1e-4
            of the bound that would cut it. At A = 0 there is no gradient, and nothing is cut

Not in the cases: other weights w_K than these, and ratio_norm.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import product
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

VERSION = 2
SEED = 423  # of the drawn cases: all that `drawn` can choose occurs in one of them
LEAST_STD = 0.05  # of every Gaussian of every case: what rounding is divided by
# Relative to a tensor's size: some hundred roundings through LEAST_STD; another exp is allowed.
TOLERANCE = 1e-11
TOLERANCE_FLOAT32 = 100 * 2.0**-24 / LEAST_STD  # 1.2e-4: a hundred roundings through LEAST_STD
LEAST_SIZE = 0.01  # of a tensor; a loss is a mean of numbers near 1 that cancel
INPUTS = ("m", "log_q", "m_new", "log_q_new", "noise_start", "noise_steps", "rewards")
USUAL: Setting = {
    "kernel": "flow_sde",
    "eta": 0.7,
    "grid": [1.0, 0.75, 0.5, 0.25, 0.0],
    "sde_steps": [0, 2],
    "rollouts": "shared_anchor",
    "own_start": False,  # every member its own, where rollouts are independent
    "prompts": 2,
    "group": 4,
    "event": [3],
    "factors": [2, 3],
    "form": "paper",
    "u": None,  # in the midpoint form a number, or "drawn"
    "reduction": "mean",
    "clip": 0.02,
    "kl": 0.0,
    "ddof": 1,
    "eps": 1e-8,
    "clamp": 5.0,
    "standardise": True,
    "equal": None,  # the reward of all members of the first prompt
    "move": 0.1,  # how far theta is from theta_old
    "move_ref": 0.0,  # and the reference
}
OWN_START: Setting = {"rollouts": "independent", "own_start": True}
CASES: dict[str, Setting] = {  # what each has instead
    "flow_sde from t = 1": {},
    "cps from t = 1": {"kernel": "cps"},
    "dance from t = 1": {"kernel": "dance"},
    "flow_sde independent": OWN_START,
    "cps independent": {"kernel": "cps", **OWN_START},
    "matched, summed": {"form": "matched", "reduction": "sum", "clip": 0.2},
    "k = 1 only": {"factors": []},
    "k = 5": {"factors": [5], "kernel": "dance"},
    "flow_sde to s = 0": {"sde_steps": [3]},
    "equal rewards": {"equal": 1.0},
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


def process_of(setting: Setting) -> pave.Process:
    """The process of a setting. Raises ValueError where the core refuses it."""
    grid = torch.tensor(setting["grid"], dtype=torch.float64)
    return pave.Process(grid, setting["kernel"], setting["eta"])


def last_coefficients(process: pave.Process, t: Tensor, s: Tensor, k: int) -> pave.Coefficients:
    """The kernel's (a, b, std) of the sub-step in which the k-terms of steps t -> s end."""
    begin = s + (t - s) / k if k > 1 else t
    return process.coefficients(begin, s)


# ---- Drawn cases ---------------------------------------------------------------------------------

FORMS: dict[str, Setting] = {
    "paper": {"form": "paper"},
    "matched": {"form": "matched"},
    "midpoint": {"form": "midpoint", "factors": [], "u": 0.5},
    "midpoint at drawn places": {"form": "midpoint", "factors": [], "u": "drawn"},
}


def drawn_grid(dice: random.Random) -> list[float]:
    """4 to 9 times with uneven steps, from 1 or below, to 0 or above, of three decimals."""
    start = dice.choice((1.0, 1.0, 0.97, 0.9))
    end = dice.choice((0.0, 0.0, 0.04, 0.1))
    lengths = [dice.uniform(0.5, 1.5) for _ in range(dice.randint(3, 8))]
    grid = [start]
    for length in lengths[:-1]:
        grid.append(round(grid[-1] - (start - end) * length / sum(lengths), 3))
    return [*grid, end]


def wide_steps(setting: Setting) -> list[int]:
    """The steps all of whose Gaussians, that of each k, have a std of LEAST_STD or more."""
    process = process_of(setting)
    t, s = process.grid[:-1], process.grid[1:]
    wide = torch.ones_like(t, dtype=torch.bool)
    for k in (1, *setting["factors"]):
        wide &= last_coefficients(process, t, s, k).std >= LEAST_STD
    return torch.nonzero(wide).flatten().tolist()


def drawn(kernel: str, form: Setting, dice: random.Random) -> Setting:
    """A setting at random but for its kernel and form."""
    setting: Setting = {"kernel": kernel}
    possible: list[int] = []
    while not possible:
        setting["eta"] = round(dice.uniform(0.2, 1), 2)
        setting["grid"] = drawn_grid(dice)
        setting["factors"] = sorted(dice.sample(range(2, 8), dice.randint(1, 3)))
        setting |= form
        possible = wide_steps(setting)
    count = dice.randint(1, min(3, len(possible)))
    prompts = dice.randint(1, 4)
    silent = prompts > 1 and dice.random() < 0.4
    starts = dice.choice(({}, {"rollouts": "independent"}, OWN_START))
    return setting | {
        "sde_steps": sorted(dice.sample(possible, count)),
        **starts,
        "prompts": prompts,
        "group": dice.randint(2, 6),
        "event": dice.choice(([1], [5], [2, 3], [3, 2], [2, 1, 3], [2, 2, 1])),
        "reduction": dice.choice(("mean", "sum")),
        "clip": dice.choice((None, 0.01, 0.03, 0.1)),
        "kl": dice.choice((0.0, 0.05, 0.3)),
        "ddof": dice.choice((0, 1)),
        "eps": dice.choice((1e-8, 1e-4)),
        "clamp": dice.choice((None, 0.9, 5.0)),
        "standardise": dice.random() < 0.7,
        "equal": 0.1 if silent else None,  # a mean of tenths is no tenth
        "move": dice.choice((0.05, 0.1, 0.2)),
        "move_ref": 0.15,
    }


def drawn_cases(seed: int) -> dict[str, Setting]:
    """One case for each kernel and form."""
    dice = random.Random(seed)
    return {
        f"drawn: {kernel}, {name}": drawn(kernel, form, dice)
        for kernel, (name, form) in product(pave.KERNELS, FORMS.items())
    }


def input_names(setting: Setting) -> tuple[str, ...]:
    """The tensors that a case starts from."""
    reference = ("m_ref", "log_q_ref") if setting["kl"] else ()
    places = ("u",) if setting["u"] == "drawn" else ()
    return (*INPUTS, *reference, *places)


def inputs_of(name: str, setting: Setting) -> Tensors:
    """The explicit inputs of a case, drawn once, when the vectors are written."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    P, G, n, event = (
        setting["prompts"],
        setting["group"],
        len(setting["sde_steps"]),
        setting["event"],
    )
    independent = setting["rollouts"] == "independent"
    m = draw(P, *event)
    log_q = 0.5 * draw(P, *event) - 1
    rewards = draw(P, 1 if independent else n, G)
    if setting["equal"] is not None:
        rewards[0] = setting["equal"]  # the groups of one prompt are silent, and stay in the mean
    given = {
        "m": m,
        "log_q": log_q,
        "m_new": m + setting["move"] * draw(P, *event),
        "log_q_new": log_q + setting["move"] * draw(P, *event),
        "noise_start": draw(P, G if setting["own_start"] else 1, *event),
        "noise_steps": draw(P, n, G, *event),
        "rewards": rewards,
        "m_ref": m + setting["move_ref"] * draw(P, *event),
        "log_q_ref": log_q + setting["move_ref"] * draw(P, *event),
        "u": draw(P, n, G if independent else 1).sigmoid(),
    }
    return {key: given[key] for key in input_names(setting)}


CASES |= drawn_cases(SEED)


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


def by_time(calls: Sequence[Evaluation], prompts: int) -> list[Evaluation]:
    """The calls of a rollout as one call for each time, the rows of a prompt together.

    The core calls for the anchors and for the members of each step by themselves. Here a prompt's
    anchor comes first, then its members of one step after another.
    """
    times: dict[float, list[Evaluation]] = {}
    for call in calls:
        times.setdefault(call.t[0].item(), []).append(call)
    merged = []
    for t in sorted(times, reverse=True):
        abreast = sorted(times[t], key=rows_of)  # anchors are fewest; steps keep their order
        columns = zip(*abreast, strict=True)
        merged.append(Evaluation(*(side_by_side(column, prompts) for column in columns)))
    return merged


def rows_of(call: Evaluation) -> int:
    """B of a call."""
    return len(call.t)


def side_by_side(parts: Sequence[Tensor], prompts: int) -> Tensor:
    """Parts [prompts R, ...], each with its own R, as one whose rows go prompt by prompt."""
    by_prompt = [part.unflatten(0, (prompts, -1)) for part in parts]
    return torch.cat(by_prompt, dim=1).flatten(0, 1)


# ---- Algorithm 1 ---------------------------------------------------------------------------------


def place_of(setting: Setting, given: Tensors) -> float | Tensor:
    """u of the midpoint form; what policy_loss takes it to be in the others."""
    return given["u"] if setting["u"] == "drawn" else setting["u"] or 0.5


def compute(setting: Setting, given: Tensors) -> Tensors:
    """Every intermediate of Algorithm 1 in its order, from the inputs of a case."""
    old = fields.Gaussian(given["m"], given["log_q"])
    new = fields.Gaussian(given["m_new"], given["log_q_new"])
    process = process_of(setting)
    standardised = (setting[name] for name in ("ddof", "eps", "clamp", "standardise"))
    advantages = pave.group_advantages(given["rewards"], *standardised)
    rollout, sampled = sample(setting, given, process, old)

    options = {name: setting[name] for name in ("factors", "form", "clip", "reduction", "kl")}
    options["u"] = place_of(setting, given)
    if setting["kl"]:
        options["reference"] = fields.Gaussian(given["m_ref"], given["log_q_ref"])
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
        **divergence(options, rollout, new),
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
    out = {
        **named("call", by_time(velocity.calls, len(noise.z))),
        "x_t": rollout.x_t,
        "x_s": rollout.x_s,
        "log_prob_sampled": rollout.log_prob,
        "x_0": rollout.x_0,
    }
    if setting["form"] == "midpoint" and rollout.v is not None:
        out |= {"v_t": rollout.v, "mean_sampled": pave.sampled(rollout).mean}
    return rollout, out


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
    form, reduction = setting["form"], setting["reduction"]
    transitions = pave.transitions_of(new, rollout, setting["factors"], form, old.u)
    out: Tensors = {}
    for k, p in transitions.items():
        a, b, std = last_coefficients(process, t, s, k)
        scored = pave.scored(form, k, transitions, old.means, rollout)
        log_prob = scored.log_prob(rollout.x_s, reduction)
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


def divergence(options: Setting, rollout: pave.Rollout, new: fields.Gaussian) -> Tensors:
    """The reference's mean and the KL to it, where the loss has one."""
    if not options["kl"]:
        return {}
    how = rollout, (), options["form"], options["u"]
    p, p_ref = (pave.transitions_of(field, *how)[1] for field in (new, options["reference"]))
    log_p, log_p_ref = (q.log_prob(p.mean, options["reduction"]) for q in (p, p_ref))
    return {"mean_ref_1": p_ref.mean, "kl": (log_p - log_p_ref).mean()}


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
        cases[name] = {**setting, "inputs": list(given), "tensors": shapes}
    save_file(tensors, folder / "vectors.safetensors")
    described = {
        "version": VERSION,
        "documentation": __doc__,
        "made_with": {"torch": torch.__version__},
        "tolerance": {
            "float64": TOLERANCE,
            "float32": TOLERANCE_FLOAT32,
            "relative_to": f"the largest entry of the tensor, or {LEAST_SIZE}",
        },
        "sha256": hashlib.sha256((folder / "vectors.safetensors").read_bytes()).hexdigest(),
        "cases": cases,
        "refused": REFUSED,
    }
    (folder / "vectors.json").write_text(json.dumps(described, indent=1) + "\n")


def read_description(folder: Path, given: str) -> Setting:
    """vectors.json. Raises ValueError, naming the option that was given, for another version."""
    try:
        described = json.loads((folder / "vectors.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{given}: holds no vectors ({error})") from None
    version = described.get("version") if isinstance(described, dict) else None
    if version != VERSION:
        raise ValueError(f"{given}: version {version}; must be {VERSION}")
    return described


def read_tensors(file: Path, given: str) -> Tensors:
    """All tensors of a file. Raises ValueError, naming the option that was given, if unreadable."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{given}: {file.name} cannot be read ({error})") from None


def check(folder: str | Path) -> list[str]:
    """Read a folder back and recompute everything: one line per difference.

    Raises ValueError if it holds no vectors, or those of another version.
    """
    folder = Path(folder)
    given = f"--check-vectors {folder}"
    described = read_description(folder, given)
    tensors = read_tensors(folder / "vectors.safetensors", given)
    raw = (folder / "vectors.safetensors").read_bytes()

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
    inputs = input_names(setting)
    missing = sorted(set(inputs) - set(stored))
    if missing:
        yield f": inputs missing: {', '.join(missing)}"
        return
    again = compute(setting, {key: stored[key] for key in inputs})
    for key in sorted(set(stored) - set(inputs) | set(again)):
        if key not in stored:
            yield f"/{key}: missing"
        elif key not in again:
            yield f"/{key}: unknown"
        elif stored[key].shape != again[key].shape or stored[key].dtype != again[key].dtype:
            found = f"{list(stored[key].shape)} {stored[key].dtype}"
            yield f"/{key}: {found}, not {list(again[key].shape)}"
        else:
            error = (stored[key] - again[key]).abs().max().item()
            scale = scale_of(again[key])
            if not error <= TOLERANCE * scale:  # a NaN is wrong too
                yield f"/{key}: off by {error:.3g}"


def scale_of(due: Tensor) -> float:
    """What a difference from a tensor is relative to: its largest entry, or LEAST_SIZE."""
    return max(LEAST_SIZE, due.abs().max().item())


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


# ---- Vectors that somebody else computed ---------------------------------------------------------


class Beside(NamedTuple):
    """One tensor of theirs beside the one that is due."""

    name: str  # CASE/NAME
    theirs: Tensor
    due: Tensor

    @property
    def comparable(self) -> bool:
        """A shape and a dtype in which numbers can agree."""
        floats = (torch.float32, torch.float64)
        return self.theirs.shape == self.due.shape and self.theirs.dtype in floats

    @property
    def off(self) -> Tensor:
        """How far each entry is off, relative to what the tensor's size is."""
        return (self.theirs.double() - self.due).abs() / scale_of(self.due)

    def agrees(self, tolerance: float) -> bool:
        """Every entry does; a NaN does not."""
        return self.comparable and bool((self.off <= tolerance).all())

    def difference(self, tolerance: float) -> str:
        """The first entry beyond the tolerance, or what cannot be compared, in words."""
        if not self.comparable:
            floats = "float32 or float64"
            found = f"{list(self.theirs.shape)} {self.theirs.dtype}".replace("torch.", "")
            return f"{self.name}: theirs is {found}, due is {list(self.due.shape)}, {floats}"
        index = torch.nonzero(~(self.off <= tolerance))[0].tolist()
        place = f"{self.name}{index or ''}"
        theirs, due = (z[tuple(index)].item() for z in (self.theirs, self.due))
        return f"{place}: theirs is {theirs!r}, due is {due!r}"


class Comparison(NamedTuple):
    """What is there on both sides, in the order of the cases and of the algorithm, and what not."""

    beside: list[Beside]
    missing: list[str]  # outputs that theirs lacks
    unknown: list[str]  # names of theirs that are no tensor of a case


def compare(folder: str | Path, theirs: str | Path) -> Comparison:
    """Their tensors beside those of the vectors in a folder. No hash is looked at.

    Theirs is a .safetensors file, or a folder with vectors.safetensors; it may repeat inputs.
    Raises ValueError where either cannot be read, or no output is there to be compared.
    """
    given = f"--compare {folder}"
    described = read_description(Path(folder), given)
    golden = read_tensors(Path(folder) / "vectors.safetensors", given)
    file = Path(theirs)
    their_tensors = read_tensors(
        file / "vectors.safetensors" if file.is_dir() else file, f"--compare {theirs}"
    )

    beside: list[Beside] = []
    missing: list[str] = []
    outputs = 0
    names = set()
    for case, setting in described["cases"].items():
        for key in setting["tensors"]:
            name = f"{case}/{key}"
            names.add(name)
            if name not in golden:
                raise ValueError(f"{given}: lacks {name}, which its vectors.json describes")
            is_output = key not in setting["inputs"]
            if name in their_tensors:
                beside.append(Beside(name, their_tensors[name], golden[name]))
                outputs += is_output
            elif is_output:
                missing.append(name)
    if not outputs:
        wanted = "must hold one output or more, named CASE/NAME"
        raise ValueError(f"--compare {theirs}: {wanted}; of its {len(their_tensors)} none is one")
    return Comparison(beside, missing, sorted(set(their_tensors) - names))


def cases_of(pairs: list[Beside]) -> list[str]:
    """The cases that these tensors are of, in order."""
    return list(dict.fromkeys(pair.name.rpartition("/")[0] for pair in pairs))


def some(names: Sequence[str]) -> str:
    """How many they are, and the first few."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} ({shown})" if names else "none"


def verdict(theirs: str, comparison: Comparison) -> str:
    """A line on whether they agree, the first difference if not, and how many tensors do."""
    beside = comparison.beside
    inexact = [pair for pair in beside if not pair.agrees(TOLERANCE)]
    wrong = [pair for pair in inexact if not pair.agrees(TOLERANCE_FLOAT32)]
    lines = []
    if wrong:
        cases, seen = cases_of(wrong), cases_of(beside)
        lines += [f"{theirs}: differs", f"  first   {wrong[0].difference(TOLERANCE_FLOAT32)}"]
        lines += [f"  cases   {len(cases)} of {len(seen)} differ: {'; '.join(cases)}"]
    else:
        verdict = "names what no case has, and otherwise agrees" if comparison.unknown else "agrees"
        counted = f"{len(beside)} of {len(beside) + len(comparison.missing)} tensors"
        lines += [f"{theirs}: {verdict} to {'float32' if inexact else 'float64'}, in {counted}"]
        worst = max(beside, key=lambda pair: pair.off.max().item())
        size = f"{worst.off.max().item():.2g} of its largest entry"
        lines += [f"  worst   {worst.name}: off by {size}"]
    rounded = [pair for pair in inexact if pair.theirs.dtype == torch.float64]
    if rounded and not wrong:
        lines += [f"  first beyond float64   {rounded[0].difference(TOLERANCE)}"]
    agree = f"{len(beside) - len(inexact)} agree to float64 (within {TOLERANCE:.0e})"
    agree += f", {len(inexact) - len(wrong)} to float32 ({TOLERANCE_FLOAT32:.1e})"
    lines += [f"  tensors {agree}, {len(wrong)} differ"]
    lines += [f"  missing {some(comparison.missing)}", f"  unknown {some(comparison.unknown)}"]
    return "\n".join(lines)


def judge(folder: str, theirs: str) -> int:
    """Print the verdict on their tensors.

    Returns 0 agrees, 1 differs or has names that no case has, 2 nothing to compare.
    """
    try:
        comparison = compare(folder, theirs)
    except ValueError as problem:
        print(f"verify_equivalence.py: error: {problem}", file=sys.stderr)
        return 2
    print(verdict(theirs, comparison))
    differs = any(not pair.agrees(TOLERANCE_FLOAT32) for pair in comparison.beside)
    return int(differs or bool(comparison.unknown))
