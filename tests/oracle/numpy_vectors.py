"""The cases of the golden vectors in plain numpy, as the text in vectors.json describes them.

It shares no code with pave_grpo.py and does not import torch: what the text leaves out would be
missing here. `recompute` returns every output of
a case from its setting and its inputs, in the dtype of the inputs. The gradient is that of a
complex step: theta gets an imaginary part h in one entry, and the derivative is the loss's
imaginary part over h. Nothing is subtracted, so that it is exact to rounding; decisions (which
member is cut) are made on real parts. States are [P, rows, *event] or [P, n, A, *event].
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

H = 1e-12  # of the complex step; its square is far below a rounding, its own size far above zero


class Theta(NamedTuple):
    """Parameters of the field, each [P, *event]."""

    m: np.ndarray
    log_q: np.ndarray

    def velocity(self, x, t):
        """v(x, t) for x [P, ..., *event]; t is a number, or shaped to multiply x."""
        between = (1,) * (x.ndim - self.m.ndim)
        m = self.m.reshape(len(x), *between, *self.m.shape[1:])
        q = np.exp(self.log_q).reshape(m.shape)
        return (t - (1 - t) * q) / ((1 - t) ** 2 * q + t**2) * (x - (1 - t) * m) - m


class Step(NamedTuple):
    """A kernel's step: mean = a x + b v, std. Numbers, or arrays with a number a step."""

    a: float | np.ndarray
    b: float | np.ndarray
    std: float | np.ndarray


def kernel_step(setting, t, s):
    """The coefficients of the kernel's step from t to s, numbers."""
    D, eta = t - s, setting["eta"]
    if setting["kernel"] == "cps":
        h = eta * math.pi / 2
        a = 1 - s + s * math.cos(h)
        return Step(a, -(1 - s) * t + s * math.cos(h) * (1 - t), s * math.sin(h))
    if setting["kernel"] == "dance":
        g2 = eta**2
    else:
        g2 = eta**2 * t / (1 - (setting["grid"][1] if t == 1 else t))
    a = 1 - g2 * D / (2 * t)
    return Step(a, -(1 + g2 * (1 - t) / (2 * t)) * D, math.sqrt(g2 * D))


def reduced(entries, axes, reduction):
    """The mean or sum over the last axes, those of the event."""
    over = tuple(range(entries.ndim - axes, entries.ndim))
    return entries.sum(over) if reduction == "sum" else entries.mean(over)


def log_density(x, mean, std, axes, reduction):
    """log N(x; mean, std^2), std shaped to divide x."""
    per_entry = -((x - mean) ** 2) / (2 * std**2) - np.log(std) - math.log(2 * math.pi) / 2
    return reduced(per_entry, axes, reduction)


class Case:
    """One case: its setting and inputs, and what follows from both."""

    def __init__(self, setting, given):
        self.setting, self.given = setting, given
        self.axes = len(setting["event"])
        self.dtype = given["m"].dtype
        self.ks = (1, *setting["factors"])
        self.old = Theta(given["m"], given["log_q"])
        self.new = Theta(given["m_new"], given["log_q_new"])
        self.t = self.per_step([setting["grid"][i] for i in setting["sde_steps"]])
        self.s = self.per_step([setting["grid"][i + 1] for i in setting["sde_steps"]])
        self.x_t, self.v_t, self.x_s, self.x_0, self.calls = self.roll()

    def per_step(self, numbers):
        """A number a stochastic step, shaped to multiply [P, n, A, *event]."""
        return np.array(numbers, self.dtype).reshape(1, -1, 1, *[1] * self.axes)

    def coefficients(self, k):
        """Of the last sub-step of a k-term, each shaped to multiply [P, n, A, *event]."""
        steps = []
        for i in self.setting["sde_steps"]:
            t, s = self.setting["grid"][i : i + 2]
            steps.append(kernel_step(self.setting, s + (t - s) / k if k > 1 else t, s))
        return Step(*(self.per_step(numbers) for numbers in zip(*steps)))

    def rows(self, z):
        """z [..., *event] as [B, *event]."""
        return z.reshape(-1, *self.setting["event"])

    def row_times(self, t):
        """t [..., *event], the same for a whole event, as [B]."""
        return self.rows(t).reshape(-1, math.prod(self.setting["event"]))[:, 0]

    # ---- Sampling, under theta_old

    def roll(self):
        """x_t, v_t, x_s [P, n, A or G, *event], x_0 [P, N, G, *event], and what calls were made.

        `lead` is what stochastic steps start from: the anchor, or all members if independent.
        `branched` are the members that left an anchor.
        """
        grid, stochastic = self.setting["grid"], self.setting["sde_steps"]
        shared = self.setting["rollouts"] == "shared_anchor"
        z = self.given["noise_steps"]
        P, n, G, *event = z.shape
        lead = self.given["noise_start"]
        if not shared:
            lead = np.broadcast_to(lead, (P, G, *event))
        branched = np.zeros((P, 0, *event), self.dtype)
        seen, calls = [], {}
        for i, (t, s) in enumerate(pairwise(grid)):
            x = np.concatenate([lead, branched], axis=1)
            v = self.old.velocity(x, t)
            times = np.full(x.shape[:2], t, self.dtype).ravel()
            calls |= {f"call_{i}_x": self.rows(x), f"call_{i}_t": times}
            calls[f"call_{i}_v"] = self.rows(v)
            moved = x - (t - s) * v
            x_t, v_t = lead, v[:, : lead.shape[1]]
            lead, branched = moved[:, : lead.shape[1]], moved[:, lead.shape[1] :]
            if i in stochastic:
                a, b, std = kernel_step(self.setting, t, s)
                x_s = a * x_t + b * v_t + std * z[:, len(seen)]
                seen.append((x_t, v_t, x_s))
                if shared:
                    branched = np.concatenate([branched, x_s], axis=1)
                else:
                    lead = x_s
            if shared and i == stochastic[-1]:
                lead = lead[:, :0]
        x_t, v_t, x_s = (np.stack(states, axis=1) for states in zip(*seen))
        x_0 = branched.reshape(P, n, G, *event) if shared else lead[:, None]
        return x_t, v_t, x_s, x_0, calls

    def sampled(self):
        """The mean that x_s was drawn around, [P, n, A, *event]."""
        a, b, _ = self.coefficients(1)
        return a * self.x_t + b * self.v_t

    # ---- Scoring

    def chain(self, theta, k):
        """The evaluations (x, t, v) of a k-term, or of the midpoint, one after another."""
        x, t = self.x_t, self.t
        d = (self.t - self.s) / k
        if self.setting["form"] == "midpoint":
            u = self.given["u"] if self.setting["u"] == "drawn" else self.setting["u"]
            D_u = np.reshape(u, (*np.shape(u), *[1] * self.axes)) * d
            x, t = x - D_u * self.v_t, t - D_u
        evaluations = [(x, t, theta.velocity(x, t))]
        while len(evaluations) < k:
            x, t = x - d * evaluations[-1][2], t - d
            evaluations.append((x, t, theta.velocity(x, t)))
        return evaluations

    def means(self, theta):
        """{K: mean_K} under a theta."""
        means = {}
        for k in self.ks:
            x, _, v = self.chain(theta, k)[-1]
            a, b, _ = self.coefficients(k)
            means[k] = a * (self.x_t if self.setting["form"] == "midpoint" else x) + b * v
        return means

    def by_depth(self, theta, name):
        """NAME_J_x, _t, _v: the J-th evaluations of all chains that have one; J = 0 once."""
        out = {}
        chains = [self.chain(theta, k) for k in self.ks]
        for J in range(max(self.ks)):
            abreast = [chain[J] for chain in chains if len(chain) > J]
            x, t, v = zip(*(abreast if J else abreast[:1]))
            times = [np.broadcast_to(one, self.x_t.shape) for one in t]
            out[f"{name}_{J}_x"] = np.concatenate([self.rows(one) for one in x])
            out[f"{name}_{J}_t"] = np.concatenate([self.row_times(one) for one in times])
            out[f"{name}_{J}_v"] = np.concatenate([self.rows(one) for one in v])
        return out

    def log_prob(self, k, means, means_old):
        """log_prob_K of x_s under what the form scores, [P, n, G]."""
        mean, std = means[k], self.coefficients(k).std
        if self.setting["form"] == "midpoint":
            mean = self.sampled() + means[k] - means_old[k]
        if self.setting["form"] == "matched":
            mean, std = means_old[1] + means[k] - means_old[k], self.coefficients(1).std
        return log_density(self.x_s, mean, std, self.axes, self.setting["reduction"])

    # ---- The loss

    def advantages(self):
        """[P, N, G]."""
        r, setting = self.given["rewards"], self.setting
        A = r - r.mean(-1, keepdims=True)
        if setting["standardise"]:
            variance = (A**2).sum(-1, keepdims=True) / (r.shape[-1] - setting["ddof"])
            A = A / (np.sqrt(variance) + setting["eps"])
        A = np.where(r.max(-1, keepdims=True) == r.min(-1, keepdims=True), 0, A)
        return A if setting["clamp"] is None else A.clip(-setting["clamp"], setting["clamp"])

    def surrogate(self, ratio, A):
        """min(ratio A, bounded A); a cut member is a constant."""
        clip = self.setting["clip"]
        if clip is None:
            return ratio * A
        bounded = ratio.real.clip(1 - clip, 1 + clip)
        is_cut = bounded * A < ratio.real * A
        return np.where(is_cut, bounded * A, ratio * A)

    def divergence(self, means, means_ref):
        """kl: the mean over P, n, A of |mean_1 - mean_ref_1|^2 / (2 std_1^2)."""
        std = self.coefficients(1).std
        apart = (means[1] - means_ref[1]) ** 2 / (2 * std**2)
        return reduced(apart, self.axes, self.setting["reduction"]).mean()

    def loss(self, theta, means_old, means_ref, A):
        """The loss at a theta, which may be complex."""
        means = self.means(theta)
        J = 0
        for k in self.ks:
            log_ratio = self.log_prob(k, means, means_old) - self.log_prob(k, means_old, means_old)
            w = 1 if k == 1 else 1 / len(self.setting["factors"])
            J = J + w * self.surrogate(np.exp(log_ratio), A).mean()
        if means_ref is None:
            return -J
        return self.setting["kl"] * self.divergence(means, means_ref) - J

    def gradient(self, name, *constants):
        """Of the loss, by the parameter of theta with that name."""
        parameter = getattr(self.new, name)
        grad = np.zeros_like(parameter)
        for index in np.ndindex(parameter.shape):
            stepped = parameter + np.zeros_like(parameter) * 1j
            stepped[index] += H * 1j
            grad[index] = self.loss(self.new._replace(**{name: stepped}), *constants).imag / H
        return grad

    # ---- All of it

    def terms(self, means, means_old):
        """The coefficients, means, log-probabilities and ratios of every K."""
        out = {}
        for k in self.ks:
            a, b, std = (number.ravel() for number in self.coefficients(k))
            log_prob = self.log_prob(k, means, means_old)
            log_prob_old = self.log_prob(k, means_old, means_old)
            out |= {f"a_{k}": a, f"b_{k}": b, f"std_{k}": std}
            out |= {f"mean_{k}": means[k], f"mean_old_{k}": means_old[k]}
            out |= {f"log_prob_{k}": log_prob, f"log_prob_old_{k}": log_prob_old}
            out[f"ratio_{k}"] = np.exp(log_prob - log_prob_old)
        return out

    def outputs(self):
        """{NAME: array} of every output."""
        out = {"x_t": self.x_t, "x_s": self.x_s, "x_0": self.x_0, **self.calls}
        drawn_from = self.sampled(), self.coefficients(1).std
        out["log_prob_sampled"] = log_density(self.x_s, *drawn_from, self.axes, "sum")
        if self.setting["form"] == "midpoint":
            out |= {"v_t": self.v_t, "mean_sampled": self.sampled()}
        out |= self.by_depth(self.old, "score_old") | self.by_depth(self.new, "score_new")
        means_old, means = self.means(self.old), self.means(self.new)
        out |= self.terms(means, means_old)
        out["advantages"] = A = self.advantages()
        means_ref = None
        if self.setting["kl"]:
            means_ref = self.means(Theta(self.given["m_ref"], self.given["log_q_ref"]))
            out |= {"mean_ref_1": means_ref[1], "kl": self.divergence(means, means_ref)}
        out["loss"] = self.loss(self.new, means_old, means_ref, A)
        out["grad_m"] = self.gradient("m", means_old, means_ref, A)
        out["grad_log_q"] = self.gradient("log_q", means_old, means_ref, A)
        return {name: np.array(z, self.dtype, order="C") for name, z in out.items()}


def recompute(folder, dtype=np.float64):
    """{CASE/NAME: array} of every output of every case, from the inputs in a folder of vectors."""
    described = json.loads((Path(folder) / "vectors.json").read_text())
    tensors = load_file(Path(folder) / "vectors.safetensors")
    out = {}
    for case, setting in described["cases"].items():
        given = {name: tensors[f"{case}/{name}"].astype(dtype) for name in setting["inputs"]}
        for name, array in Case(setting, given).outputs().items():
            out[f"{case}/{name}"] = array
    return out


def save(arrays, file):
    """Write arrays {CASE/NAME: array} into a .safetensors file."""
    save_file(arrays, file)
