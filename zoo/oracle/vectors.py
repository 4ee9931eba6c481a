"""Golden vectors: every number of Algorithm 1 on small cases, for implementations in other languages and codebases.

`write` leaves vectors.safetensors (float64 tensors named CASE/NAME) and vectors.json (what they mean: the setting
of each case, the field, the inputs that must be refused, the SHA-256 of the tensors). All randomness is explicit
noise. The field is gaussian_velocity of zoo/oracle/fields.py, one formula in x, t and the tensors m, log_q: + - * / and exp
alone. `check` reads a folder back and recomputes every tensor from the inputs among them.

    inputs     m, log_q (theta_old), m_new, log_q_new (theta), noise_start [P, 1 or G, d], noise_steps [P, n, G, d],
               rewards [P, N, G], and the setting; P prompts, n stochastic steps, G members, A = 1 state per group with
               shared anchors and G of them otherwise, N = n groups or 1
    sampling   call_I_x, call_I_t, call_I_v: the velocity calls in order, under theta_old, rows prompt by prompt, with
               shared anchors the anchor's row first and then its branches', oldest first; x_t [P, n, A, d], x_s
               [P, n, G, d], log_prob_sampled [P, n, G] (summed, whatever the reduction), x_0 [P, N, G, d]
    scoring    score_old_I_x, _t, _v and score_new_I_x, _t, _v: the velocity calls of the decomposition under theta_old
               and theta, rows in the order [P, n, A], the chains of ascending k one after another; a_K, b_K, std_K
               [n]: the kernel's coefficients of the last sub-step; mean_K, mean_old_K [P, n, A, d]; log_prob_K of
               theta, log_prob_old_K, ratio_K [P, n, G], under what the form scores; advantages [P, N, G]; loss;
               grad_m, grad_log_q: its gradient at theta

    kernels    mean = a x + b v, D = t - s. flow_sde: g^2 = eta^2 t/(1-t), with t_1, the grid's second point, for t in
               1 - t where t = 1; a = 1 - g^2 D/(2t), b = -(1 + g^2 (1-t)/(2t)) D, std = g sqrt(D). dance: g = eta.
               cps: h = eta pi/2, a = 1 - s + s cos h, b = -(1-s) t + s cos h (1-t), std = s sin h
    k-term     d = D/k; k-1 times x <- x - d v(x, t), t <- t - d; then the kernel's step from there to s. Scored under
               N(mean_K, std_K^2), form "matched": N(mean_old_1 + mean_K - mean_old_K, std_1^2)
    log_prob   -(x_s - mean)^2/(2 std^2) - log std - log(2 pi)/2, mean or sum over d
    advantages (r - mean r)/(std r + eps) in each group, std with ddof, then clamped; 0 where all rewards are equal
    loss       -mean over P, n, G of sum_K w_K min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), w_1 = 1, w_K = 1/|S|,
               + kl times the mean over P, n, A of |mean_1 - mean_ref_1|^2/(2 std_1^2), reduced as log_prob is; the
               reference is theta_old
"""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import pave_grpo as pave
from zoo.oracle import fields

VERSION = 1
TOLERANCE = 1e-11  # of the largest entry: some hundred roundings through std >= 0.05; another exp is allowed
INPUTS = ("m", "log_q", "m_new", "log_q_new", "noise_start", "noise_steps", "rewards")
USUAL = dict(
    kernel="flow_sde",
    eta=0.7,
    grid=[1.0, 0.75, 0.5, 0.25, 0.0],
    sde_steps=[0, 2],
    rollouts="shared_anchor",
    factors=[2, 3],
    form="paper",
    reduction="mean",
    clip=0.02,
    kl=0.0,
    ddof=1,
    eps=1e-8,
    clamp=5.0,
    group=4,
    move=0.1,
)
CASES = {
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
REFUSED = [
    {
        "kernel": "cps",
        "eta": 0.7,
        "grid": [1.0, 0.5, 0.0],
        "sde_steps": [1],
        "why": "zero std at s = 0: no density",
    },
    {"kernel": "cps", "eta": 1.5, "grid": [1.0, 0.5, 0.0], "sde_steps": [0], "why": "eta above 1"},
]


def inputs_of(name: str, setting: dict) -> dict[str, Tensor]:
    """The explicit inputs of a case, drawn once, when the vectors are written."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    P, d, G, n = 2, 3, setting["group"], len(setting["sde_steps"])
    own = setting["rollouts"] == "independent"
    m, log_q = draw(P, d), 0.5 * draw(P, d) - 1
    groups = 1 if own else n
    rewards = draw(P, groups, G)
    if setting.get("equal"):
        rewards[0] = 1.0  # the groups of one prompt are silent, and stay in the mean
    return {
        "m": m,
        "log_q": log_q,
        "m_new": m + setting["move"] * draw(P, d),
        "log_q_new": log_q + setting["move"] * draw(P, d),
        "noise_start": draw(P, G if own else 1, d),
        "noise_steps": draw(P, n, G, d),
        "rewards": rewards,
    }


def compute(setting: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every intermediate of Algorithm 1, from the inputs of a case."""
    out: dict[str, Tensor] = {}
    old, new = (
        fields.Gaussian(given["m"], given["log_q"]),
        fields.Gaussian(given["m_new"], given["log_q_new"]),
    )
    process = pave.Process(setting["grid"], setting["kernel"], setting["eta"])

    def recorded(field, name):
        """The field, its calls written into `out`."""
        calls = count()

        def velocity(x, t, c):
            v, i = field(x, t, c), next(calls)
            out.update({f"{name}_{i}_x": x, f"{name}_{i}_t": t, f"{name}_{i}_v": v})
            return v

        return velocity

    sample = (
        pave.rollout_shared_anchor
        if setting["rollouts"] == "shared_anchor"
        else pave.rollout_independent
    )
    rollout = sample(
        recorded(old, "call"),
        process,
        pave.Noise(given["noise_start"], given["noise_steps"]),
        setting["sde_steps"],
    )
    out |= {
        "x_t": rollout.x_t,
        "x_s": rollout.x_s,
        "log_prob_sampled": rollout.log_prob,
        "x_0": rollout.x_0,
    }
    out["advantages"] = pave.group_advantages(
        given["rewards"], setting["ddof"], setting["eps"], setting["clamp"]
    )
    options = {name: setting[name] for name in ("factors", "form", "clip", "reduction")}
    if setting["kl"]:
        options |= {"kl": setting["kl"], "reference": old}
    first = pave.policy_loss(recorded(old, "score_old"), rollout, out["advantages"], **options).old
    result = pave.policy_loss(
        recorded(new, "score_new"), rollout, out["advantages"], old=first, **options
    )
    t, s = (process.grid[[i + j for i in setting["sde_steps"]]] for j in (0, 1))
    for k, p in pave.rescore(new, rollout, setting["factors"]).items():
        a, b, std = process.coefficients(s + (t - s) / k if k > 1 else t, s)
        scored = (
            pave.Transition(
                first.means[1] + p.mean - first.means[k], pave.rescore(new, rollout, ())[1].std
            )
            if setting["form"] == "matched"
            else p
        )
        log_prob = scored.log_prob(rollout.x_s, setting["reduction"])
        out |= {
            f"a_{k}": a,
            f"b_{k}": b,
            f"std_{k}": std,
            f"mean_{k}": p.mean,
            f"mean_old_{k}": first.means[k],
            f"log_prob_{k}": log_prob,
            f"log_prob_old_{k}": first.log_probs[k],
            f"ratio_{k}": (log_prob - first.log_probs[k]).exp(),
        }
    out["loss"] = result.loss
    out["grad_m"], out["grad_log_q"] = torch.autograd.grad(result.loss, [new.m, new.log_q])
    return {name: value.detach().clone().contiguous() for name, value in out.items()}


def write(folder: str | Path) -> None:
    """Write the vectors. Raises ValueError where the folder has files already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--vectors {folder}: must be a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, cases = {}, {}
    for name, own in CASES.items():
        setting = USUAL | own
        given = inputs_of(name, setting)
        values = given | compute(setting, given)
        tensors |= {f"{name}/{key}": value for key, value in values.items()}
        cases[name] = {
            **setting,
            "tensors": {key: list(value.shape) for key, value in values.items()},
        }
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
    """Read a folder back and recompute everything: one line per difference. ValueError if it holds no vectors."""
    folder = Path(folder)
    try:
        described = json.loads((folder / "vectors.json").read_text())
        raw = (folder / "vectors.safetensors").read_bytes()
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--check-vectors {folder}: holds no vectors ({error})") from None
    if described.get("version") != VERSION:
        raise ValueError(
            f"--check-vectors {folder}: version {described.get('version')}; must be {VERSION}"
        )
    wrong = (
        []
        if hashlib.sha256(raw).hexdigest() == described["sha256"]
        else ["vectors.safetensors: SHA-256 differs"]
    )
    try:
        tensors = load_file(folder / "vectors.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"--check-vectors {folder}: vectors.safetensors cannot be read ({error})"
        ) from None
    for name, setting in described["cases"].items():
        stored = {
            key: tensors[f"{name}/{key}"]
            for key in setting["tensors"]
            if f"{name}/{key}" in tensors
        }
        if missing := set(INPUTS) - set(stored):
            wrong.append(f"{name}: inputs missing: {', '.join(sorted(missing))}")
            continue
        again = compute(setting, {key: stored[key] for key in INPUTS})
        for key in sorted(set(stored) - set(INPUTS) | set(again)):
            if key not in stored or key not in again:
                wrong.append(f"{name}/{key}: {'missing' if key in again else 'unknown'}")
            elif stored[key].shape != again[key].shape or stored[key].dtype != again[key].dtype:
                wrong.append(
                    f"{name}/{key}: {list(stored[key].shape)} {stored[key].dtype}, not "
                    f"{list(again[key].shape)}"
                )
            else:
                error = (stored[key] - again[key]).abs().max().item()
                if not error <= TOLERANCE * max(
                    1.0, again[key].abs().max().item()
                ):  # NaN is wrong too
                    wrong.append(f"{name}/{key}: off by {error:.3g}")
    for case in described["refused"]:
        try:
            pave.Process(case["grid"], case["kernel"], case["eta"]).stochastic_steps(
                case["sde_steps"]
            )
            wrong.append(f"accepted what must be refused: {case}")
        except ValueError:
            continue
    return wrong


def main(into: str | None, of: str | None) -> int:
    """Write or check; print what was done. 0 done and right, 1 wrong, 2 bad usage."""
    try:
        if into:
            write(into)
            print(f"wrote {len(CASES)} cases to {into}")
            return 0
        wrong = check(of)
    except ValueError as problem:
        print(f"verify_equivalence.py: error: {problem}", file=sys.stderr)
        return 2
    print("\n".join(wrong) or f"{of}: every tensor as recomputed")
    return 1 if wrong else 0
