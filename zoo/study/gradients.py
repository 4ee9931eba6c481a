"""Study A: what each arm's expected gradient is, and what a step along it is worth. No training.

At the shipped model, batches of P prompts are rolled out once, with steps 0 to 3 of 8 stochastic
and G members from each anchor; every term's gradient is taken from the same rollouts. With ascent
directions g_k of the k-terms alone, lambda_k = (c_1/c_k)^2, W_k = sum_j w_j and tau_k as in E12 and
E13, an arm's gradient at a step is

    k = 1                g_1
    k = 1, weight Gamma  Gamma g_1,  Gamma = 1 + (lambda_2 + lambda_3)/2
    S = {2, 3}           g_1 + (g_2 + g_3)/2
    matched              g_1 + (g_2/lambda_2 + g_3/lambda_3)/2, which E7 says it is
    k = 2, k = 3         g_k
    midpoint, uniform u  the midpoint form's, half a step in, or uniformly drawn
    second order         (1 - p) g_1 + p (W_1/W_2) g_2/lambda_2,  p = D/(2 tau_2)

and the arm's gradient is the mean over the four steps. Blocks of batches are kept in a folder, so
that a study that stopped goes on; docs/EVIDENCE.md says what came of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import pave_grpo as pave
from zoo.oracle import theory
from zoo.shapes import rule
from zoo.shapes.model import CHECKPOINT
from zoo.study.inference import Interval, interval, jackknife
from zoo.training.compare import step_of
from zoo.training.policies import Embedded
from zoo.training.prompts import IMAGES_PER_PROMPT, Prompts

KERNEL, ETA, T = "flow_sde", 0.7, 8
STEPS = (0, 1, 2, 3)
TERMS = ("1", "2", "3", "midpoint", "uniform")
SEED = 500  # of the batches; no training run has it
Line = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is drawn."""

    blocks: int  # of batches; jackknifed
    batches: int  # of a block
    prompts: int  # of a batch
    members: int
    pairs: int  # held-out ones
    norms: tuple[float, ...]  # of a step in parameter space
    eval_steps: tuple[int, ...]


FULL = Size(16, 8, 8, 12, 256, (0.05, 0.2), (8, 16, 40, 80))
# For the tests: over in seconds, and shows nothing.
QUICK = Size(3, 1, 1, 3, 8, (0.05,), (1, 2))


def identity(size: Size) -> str:
    """A name for everything that a block or a line depends on but the code."""
    told = json.dumps([asdict(size), KERNEL, ETA, T, STEPS, TERMS, SEED]).encode()
    return hashlib.sha256(told + CHECKPOINT.read_bytes()).hexdigest()[:12]


# ---- Arms, as combinations of terms at each step -------------------------------------------------


ARMS = (
    "k = 1",
    "k = 1, weight Γ",
    "S = {2, 3}",
    "matched",
    "k = 2",
    "k = 3",
    "midpoint",
    "uniform u",
    "second order",
)


def coefficients(grid: Sequence[float]) -> dict[str, Tensor]:
    """{arm: [steps, terms]}: what each term's gradient at each step counts in the arm's."""
    record = theory.of(KERNEL, ETA)
    arms: dict[str, list[list[float]]] = {}
    for i in STEPS:
        t, s = grid[i], grid[i + 1]
        lam = {k: record.scale(k, t, s) for k in (2, 3)}
        W = {k: record.weight_sum(k, t, s) for k in (1, 2)}
        p = (t - s) / (2 * record.centre(2, t, s))
        gamma = 1 + (lam[2] + lam[3]) / 2
        rows = (
            [1.0, 0.0, 0.0, 0.0, 0.0],
            [gamma, 0.0, 0.0, 0.0, 0.0],
            [1.0, 0.5, 0.5, 0.0, 0.0],
            [1.0, 0.5 / lam[2], 0.5 / lam[3], 0.0, 0.0],
            [0.0, 1.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 1.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 1.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 1.0],
            [1 - p, p * W[1] / W[2] / lam[2], 0.0, 0.0, 0.0],
        )
        for arm, row in zip(ARMS, rows, strict=True):
            arms.setdefault(arm, []).append(row)
    return {arm: torch.tensor(rows, dtype=torch.float64) for arm, rows in arms.items()}


# ---- Gradients -----------------------------------------------------------------------------------


def term_gradients(
    policy: Embedded, prompts: Sequence[str], rollout: pave.Rollout, A: Tensor, u: Tensor
) -> Tensor:
    """The ascent direction of every term at every step, float32 [steps, terms, parameters].

    d/d theta of the mean of A log p(x_s | x_t), the mean over dimensions: what J ascends at
    theta_old, where every ratio is 1 (Algorithm 1). u [P, steps, 1] are the uniform places.
    """
    velocity = policy.velocity(prompts)
    found = []
    for j in range(len(rollout.sde_steps)):
        one, own = step_of(rollout, A, j)
        one = one._replace(v=None if rollout.v is None else rollout.v[:, j : j + 1])
        p = pave.rescore(velocity, one, (2, 3))
        terms = {
            "1": p[1],
            "2": p[2],
            "3": p[3],
            "midpoint": pave.midpoint(velocity, one),
            "uniform": pave.midpoint(velocity, one, u[:, j : j + 1]),
        }
        sampled = pave.sampled(one)
        for name in TERMS:
            term = terms[name]
            if name in ("midpoint", "uniform"):
                term = pave.matched(sampled, term, term.mean.detach())
            J = (own * term.log_prob(one.x_s)).mean()
            grads = torch.autograd.grad(J, policy.tuned, retain_graph=True)
            found.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(found).unflatten(0, (-1, len(TERMS)))


def batch_gradients(policy: Embedded, data: Prompts, size: Size, number: int) -> Tensor:
    """`term_gradients` of a batch of its own, which its number seeds."""
    process = pave.Process(policy.grid(T), KERNEL, ETA)
    prompts, generators = data.draw(SEED, number, range(size.prompts))
    noise = pave.draw_noise(generators, size.members, policy.shape, len(STEPS))
    rollout = pave.rollout_shared_anchor(policy.velocity(prompts), process, noise, STEPS)
    u = pave.draw_places(generators, len(STEPS))
    asked = [prompt for prompt in prompts for _ in range(len(STEPS) * size.members)]
    rewards = rule.reward(policy.decode(rollout.x_0.flatten(0, 2)), asked)
    A = pave.group_advantages(rewards.unflatten(0, rollout.x_0.shape[:3]))
    return term_gradients(policy, prompts, rollout, A, u)


def block(
    policy: Embedded, data: Prompts, size: Size, number: int, advance: Callable[[], object]
) -> dict[str, Tensor]:
    """Sums over the batches of a block.

    total   [steps, terms, parameters], float32
    square  [arms, parameters]: of the arms' gradients squared, elementwise
    inner   [batches, steps terms, steps terms], float64: inner products of a batch's gradients
    """
    arms = torch.stack(list(coefficients(policy.grid(T).tolist()).values()))
    inner = []
    total = square = torch.zeros(())
    for i in range(size.batches):
        g = batch_gradients(policy, data, size, number * size.batches + i)
        flat = g.flatten(0, 1)
        total = total + g
        square = square + (arms.flatten(1).float() @ flat / len(STEPS)).square()
        inner.append(gram(flat, flat))
        advance()
    return {"total": total, "square": square, "inner": torch.stack(inner)}


def gram(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, added up in float64 a few million numbers at a time."""
    parts = zip(a.split(1 << 16, dim=1), b.split(1 << 16, dim=1), strict=True)
    return torch.stack([x.double() @ y.double().T for x, y in parts]).sum(0)


def blocks(policy: Embedded, size: Size, folder: Path) -> list[dict[str, Tensor]]:
    """All of them: what the folder has, and the others, which it then has.

    Raises ValueError for a file that is no block of such a study.
    """
    data = Prompts()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"block-{i}.safetensors" for i in range(size.blocks)]
    have = {path: read_block(path, size) for path in paths if path.exists()}
    bar = tqdm(total=size.blocks * size.batches, initial=len(have) * size.batches, desc="batches")
    for number, path in enumerate(paths):
        if path not in have:
            have[path] = block(policy, data, size, number, bar.update)
            part = path.with_suffix(".part")
            save_file(have[path], part, {"study": identity(size)})
            part.rename(path)
    bar.close()
    return [have[path] for path in paths]


def read_block(path: Path, size: Size) -> dict[str, Tensor]:
    """A block's tensors. Raises ValueError for a file of another study, or of none."""
    try:
        with safe_open(path, "pt") as file:
            study = (file.metadata() or {}).get("study")
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as problem:
        raise ValueError(f"{path}: cannot be read ({problem}); remove it to go on") from None
    if study != identity(size):
        raise ValueError(f"{path}: is of another study; give another --work")
    return found


# ---- What the gradients are ----------------------------------------------------------------------


def products(found: Sequence[dict[str, Tensor]]) -> Tensor:
    """Inner products of block sums, [blocks, blocks, steps terms, steps terms], float64."""
    rows = torch.stack([part["total"].flatten(0, 1) for part in found])  # [B, 20, parameters]
    n, m = rows.shape[:2]
    return gram(rows.flatten(0, 1), rows.flatten(0, 1)).reshape(n, m, n, m).transpose(1, 2)


def between(inner: Tensor, a: Tensor, b: Tensor) -> float:
    """E <g_a, g_b'> of independent blocks: the mean over pairs of different ones, unbiased.

    inner as `products` has it; a, b [steps terms] are arms.
    """
    pairs = torch.einsum("ijuv,u,v->ij", inner, a, b)
    n = len(pairs)
    return ((pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1))).item()


def cosine_of(inner: Tensor, a: Tensor, b: Tensor) -> float:
    """Of two arms' expected gradients; nan where an estimate of a squared norm is not positive."""
    sizes = between(inner, a, a), between(inner, b, b)
    return between(inner, a, b) / math.sqrt(sizes[0] * sizes[1]) if min(sizes) > 0 else math.nan


def cosines(inner: Tensor, grid: Sequence[float]) -> dict[str, dict[str, float | None]]:
    """Of every two arms, all steps together; None where it cannot be told."""
    arms = {name: arm.flatten() for name, arm in coefficients(grid).items()}
    found: dict[str, dict[str, float | None]] = {name: {} for name in arms}
    for (name, a), (other, b) in product(arms.items(), repeat=2):
        cosine = cosine_of(inner, a, b)
        found[name][other] = None if math.isnan(cosine) else cosine
    return found


def described(
    found: Sequence[dict[str, Tensor]], inner: Tensor, grid: Sequence[float]
) -> list[Line]:
    """Share of signal of one batch, and cosine with k = 1 of expected gradients, of every arm.

    A line for all steps together and for each step, with jackknife intervals over blocks.
    """
    batches = len(found[0]["inner"])
    own = torch.stack([part["inner"].mean(0) for part in found])  # of a batch with itself
    arms = coefficients(grid)
    places = {"all": torch.ones(len(STEPS), 1, dtype=torch.float64)}
    places |= {
        str(i): torch.eye(len(STEPS), dtype=torch.float64)[j][:, None] for j, i in enumerate(STEPS)
    }
    lines = []
    for (name, arm), (place, mask) in product(arms.items(), places.items()):
        a, one = (arm * mask).flatten(), (arms["k = 1"] * mask).flatten()

        def signal(kept: Tensor, a: Tensor = a) -> float:
            some = inner[kept][:, kept]
            alone = torch.einsum("iuv,u,v->i", own[kept], a, a).mean().item()
            return between(some, a, a) / batches**2 / alone if alone else math.nan

        def cosine(kept: Tensor, a: Tensor = a, one: Tensor = one) -> float:
            some = inner[kept][:, kept]
            return cosine_of(some, a, one)

        line = {"arm": name, "steps": place, "signal": listed(jackknife(len(found), signal))}
        if name != "k = 1":
            line["cosine"] = listed(jackknife(len(found), cosine))
        lines.append(line)
    return lines


def listed(found: Interval | None) -> Line | None:
    """As JSON has it."""
    return found._asdict() if found else None


def directions(
    found: Sequence[dict[str, Tensor]], grid: Sequence[float]
) -> Iterator[tuple[str, str, Tensor]]:
    """(arm, "plain" or "adam", unit vector) of every arm's mean gradient m over all batches.

    Adam's is m / (sqrt(mean g^2) + 1e-8), g of single batches: its preconditioner in a steady
    state. At one norm the two are steps of different kinds, not to be compared with each other.
    """
    n = sum(len(part["inner"]) for part in found)
    total = torch.stack([part["total"] for part in found]).sum(0).flatten(0, 1) / n
    square = torch.stack([part["square"] for part in found]).sum(0) / n
    for i, (name, arm) in enumerate(coefficients(grid).items()):
        m = (arm.flatten().float() @ total) / len(STEPS)
        for how, d in (("plain", m), ("adam", m / (square[i].sqrt() + 1e-8))):
            yield name, how, d / d.norm()


# ---- What a step along them is worth -------------------------------------------------------------


@torch.no_grad()
def rewards(policy: Embedded, size: Size) -> dict[str, list[float]]:
    """{ODE steps: mean rule score of every held-out prompt}, on the noise of the held-out pairs."""
    prompts, noise = Prompts().pairs(policy.shape, size.pairs)
    found: dict[str, list[float]] = {}
    for steps in size.eval_steps:
        scores = []
        for start in range(0, size.pairs, 128):
            own = prompts[start : start + 128]
            x = noise[start : start + 128]
            x_0 = pave.ode_sample(policy.velocity(own), policy.grid(steps), x)
            scores.append(rule.reward(policy.decode(x_0), own))
        found[str(steps)] = torch.cat(scores).view(-1, IMAGES_PER_PROMPT).double().mean(1).tolist()
    return found


@torch.no_grad()
def moved(policy: Embedded, size: Size, d: Tensor, norm: float) -> dict[str, list[float]]:
    """`rewards` after a step of this norm along d; the parameters are put back."""
    start = [p.clone() for p in policy.tuned]
    for p, part in zip(policy.tuned, d.split([p.numel() for p in policy.tuned]), strict=True):
        p.add_(norm * part.view_as(p))
    found = rewards(policy, size)
    for p, value in zip(policy.tuned, start, strict=True):
        p.copy_(value)
    return found


def gains(policy: Embedded, size: Size, found: Sequence[dict[str, Tensor]], path: Path) -> None:
    """A line for every arm, direction and norm that the file lacks: {ODE steps: rewards}.

    Raises ValueError for a line of another study.
    """
    own = identity(size)
    lines = read_gains(path)
    if any(line["study"] != own for line in lines):
        raise ValueError(f"{path}: has lines of another study; give another --out")
    have = {(line["arm"], line["how"], line["norm"]) for line in lines}
    arms = list(directions(found, policy.grid(T).tolist()))
    todo: list[tuple[str, str, Tensor, float]] = [("start", "", arms[0][2], 0.0)]
    todo += [(*arm, norm) for norm in size.norms for arm in arms]
    missing = [one for one in todo if (one[0], one[1], one[3]) not in have]
    bar = tqdm(missing, "steps along", initial=len(todo) - len(missing), total=len(todo))
    with path.open("a") as file:
        for name, how, d, norm in bar:
            line = {"study": own, "arm": name, "how": how, "norm": norm}
            line["rewards"] = moved(policy, size, d, norm)
            file.write(json.dumps(line) + "\n")
            file.flush()


def read_gains(path: Path) -> list[Line]:
    """Lines of `gains`; none where there is no file. Raises ValueError for what is no such line."""
    texts = path.read_text().splitlines() if path.exists() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            lines.append({name: line[name] for name in ("study", "arm", "how", "norm", "rewards")})
        except (ValueError, KeyError, TypeError):
            wanted = "must be a line of a study; remove it to go on"
            raise ValueError(f"{path}, line {number}: {wanted}") from None
    return lines


def paired(
    lines: Sequence[Line], arm: str, beside: str, how: str, norm: float, steps: int
) -> Interval:
    """Held-out reward after a step along one arm, less that along another, over prompts.

    Given the directions: that they are estimated, from finitely many batches, is not in the
    interval, and at one norm a direction with more noise gains less for that alone.
    """
    rows = {(line["arm"], line["how"], line["norm"]): line["rewards"][str(steps)] for line in lines}
    one = rows[arm, how, norm]
    other = rows["start", "", 0.0] if beside == "start" else rows[beside, how, norm]
    return interval([a - b for a, b in zip(one, other, strict=True)])


def study(size: Size, out: Path, folder: Path) -> None:
    """All of Study A: gradients.json and gains.jsonl in `out`; what is under way in `folder`."""
    policy = Embedded()
    out.mkdir(parents=True, exist_ok=True)
    found = blocks(policy, size, folder)
    grid = policy.grid(T).tolist()
    inner = products(found)
    arms = {
        "study": identity(size),
        "arms": described(found, inner, grid),
        "cosines": cosines(inner, grid),
    }
    (out / "gradients.json").write_text(json.dumps(arms, indent=1) + "\n")
    gains(policy, size, found, out / "gains.jsonl")
