"""A run of train.py written again, slowly and plainly, to compare with what the program leaves.

It shares with train.py what other tests hold to independent truth: the networks, their encoders,
the rewards' functions, and of pave_grpo.py the rollouts, `rescore` and `Transition.log_prob`.
Everything that makes training of them is written out here: which prompt and noise an index gets,
advantages, loss, KL, clipping, the optimisers, warm-up, the average, every metric, and judging.
"""

import math
from itertools import product

import torch
from slow import SAMPLERS

import pave_grpo as pave
from zoo.oracle import theory
from zoo.rewards import example
from zoo.training.options import policy_of, process_of, prompts_of
from zoo.training.prompts import generator_of


class Replay:
    """The run of some options. `lines` are those of metrics.jsonl, `policy` ends as it is saved.

    rewards  {name: (function(images, prompts), weight)}, what --reward says
    judges   {name: function}, what --eval-reward says
    """

    def __init__(self, o, rewards, judges):
        self.o, self.rewards, self.judges = o, rewards, judges
        self.data = prompts_of(o)
        self.policy, self.initial = self.loaded(), self.loaded()
        self.theta = self.policy.tuned
        self.first = [torch.zeros_like(p) for p in self.theta]  # Adam's moments
        self.second = [torch.zeros_like(p) for p in self.theta]
        self.average = [p.detach().clone() for p in self.theta]
        self.steps_taken = 0
        self.lines, self.judged = [], {}

    def loaded(self):
        policy = policy_of(self.o)
        return policy.load([*self.data.train, *self.data.heldout], torch.device("cpu"))

    def run(self):
        """Judge; then every iteration, and judge after those that --eval-every names."""
        o = self.o
        self.judge(0, "before")
        for iteration in range(1, o.iterations + 1):
            self.iterate(iteration)
            if iteration == o.iterations:
                self.use_the_average()
                self.judge(iteration, "after")
            elif o.eval_every and iteration % o.eval_every == 0:
                own = [p.detach().clone() for p in self.theta]
                self.use_the_average()
                self.judge(iteration)
                self.put(own)
        return self

    # ---- An iteration ----------------------------------------------------------------------------

    def iterate(self, iteration):
        """One rollout and its updates, all prompts at once."""
        o, policy = self.o, self.policy
        process = process_of(o, policy)
        steps = self.steps_of(iteration)
        asked, noises, places = [], [], []
        for index in range(o.prompts_per_iteration):
            generator = generator_of(o.seed, iteration, index)
            asked.append(
                self.data.train[torch.randint(len(self.data.train), (), generator=generator)]
            )
            starts = o.group_size if o.own_start else 1
            x_1 = torch.randn(starts, *policy.shape, generator=generator)
            z = torch.randn(len(steps), o.group_size, *policy.shape, generator=generator)
            noises.append((x_1, z))
            states = o.group_size if o.rollouts == "independent" else 1
            drawn = torch.rand(len(steps), states, generator=generator, dtype=torch.float64)
            places.append(drawn if o.place == "uniform" else torch.full_like(drawn, 0.5))
        self.places = torch.stack(places)
        noise = pave.Noise(*(torch.stack(part) for part in zip(*noises)))
        velocity = policy.velocity(asked)
        rollout = SAMPLERS[o.rollouts](velocity, process, noise, steps)

        scores, total = self.scored(rollout.x_0, asked)
        metrics = {"reward": total.mean().item()}
        for name, values in scores.items():
            metrics[f"reward_{name}"] = values.mean().item()
        A = total - total.mean(-1, keepdim=True)
        if o.advantages == "standardised":
            A = A / (total.std(-1, keepdim=True) + 1e-8)
        metrics["poisoned_groups"] = 0.0
        metrics["silent_groups"] = (A == 0).all(-1).float().mean().item()
        metrics["signal"] = (A != 0).float().mean().item()

        rate = o.lr * min(1.0, iteration / (o.warmup + 1))
        metrics["lr"] = rate
        old = None
        for _ in range(o.updates):
            loss, old = self.loss(velocity, rollout, A, asked, old, metrics)
            gradient = torch.autograd.grad(loss, self.theta)
            norm = sum(g.double().square().sum() for g in gradient).sqrt().item()
            metrics["grad_norm"] = norm
            metrics["grad_rms"] = norm / math.sqrt(sum(p.numel() for p in self.theta))
            scale = min(1.0, o.max_grad_norm / norm)
            self.step([scale * g for g in gradient], rate)
            for average, p in zip(self.average, self.theta):
                average.mul_(o.ema).add_((1 - o.ema) * p.detach())
        self.lines.append({"iteration": iteration, **metrics})

    def steps_of(self, iteration):
        """MixGRPO's window: the steps moved one iteration at a time, started over past the end."""
        o, steps, since = self.o, list(self.o.sde_steps), 0
        for _ in range(1, iteration):
            since += 1
            if o.window_every and since == o.window_every:
                steps, since = [i + o.window_by for i in steps], 0
                if not all(0 <= i < o.steps for i in steps):
                    steps = list(o.sde_steps)
        return tuple(steps)

    def weight(self, k, t, s, stds):
        """w_k of the step t -> s; stds: of all steps that can be stochastic."""
        o, record = self.o, theory.of(self.o.kernel, self.o.eta)
        factors = o.factors

        def own(k):
            if k == 1:
                return 1.0
            rescaled = record.scale(k, t, s) if o.term_weights == "rescaled" else 1.0
            return 1 / (len(factors) * rescaled)

        gamma = 1.0 + sum(own(k) * record.scale(k, t, s) for k in factors)
        if o.step_weights == "gamma":
            return gamma
        if o.step_weights == "level":
            return own(k) / gamma
        if o.step_weights == "noise":
            return own(k) * record.std(1, t, s) * len(stds) / sum(stds)
        return own(k)

    def weights(self, k, rollout):
        """w_k of every stochastic step, [n, 1]."""
        grid, record = rollout.process.grid.tolist(), theory.of(self.o.kernel, self.o.eta)
        ends = [(grid[i], grid[i + 1]) for i in rollout.sde_steps]
        able = [(grid[i], grid[i + 1]) for i in range(self.o.steps)]
        stds = [c for c in (record.std(1, *end) for end in able) if c > 0]
        return torch.tensor([[self.weight(k, *end, stds)] for end in ends], dtype=torch.float64)

    def scored(self, x_0, asked):
        """({name: [P, N, G]}, their weighted sum), of pictures judged one at a time."""
        scores = {name: torch.zeros(x_0.shape[:3]) for name in self.rewards}
        total = torch.zeros(x_0.shape[:3])
        for place in product(*map(range, x_0.shape[:3])):
            image = self.policy.decode(x_0[place][None])
            for name, (function, weight) in self.rewards.items():
                value = function(image, [asked[place[0]]]).item()
                scores[name][place] = value
                total[place] += weight * value
        return scores, total

    def loss(self, velocity, rollout, A, asked, old, metrics):
        """(loss, what was scored in the first update), with its metrics."""
        o = self.o
        ks = (1,) if o.step_weights == "gamma" else (1, *o.factors)
        p = self.rescored(velocity, rollout)
        means = {k: p[k].mean.detach() for k in ks}
        means_old = old[0] if old else means
        log_probs, apart, noise = {}, {}, {}
        for k in ks:
            scored = p[k]
            if k > 1 and o.form == "matched":
                mean = means_old[1] + p[k].mean - means_old[k]
                scored = pave.Transition(mean, p[1].std)
            if o.form == "midpoint":
                self.sampled = self.sampled if old else pave.rescore(velocity, rollout, ())[1]
                mean = self.sampled.mean.detach() + p[1].mean - means_old[1]
                scored = pave.Transition(mean, p[1].std)
            log_probs[k] = scored.log_prob(rollout.x_s, o.reduction)
            apart[k] = p[k].mean - means_old[k]
            centre = scored.mean.detach() - apart[k].detach()  # the mean of what was scored first
            noise[k] = (rollout.x_s - centre) / pave.per_row(scored.std, centre)
            power = 1 if o.ratio_norm else 2
            metrics[f"weight_{k}"] = ((p[1].std / scored.std) ** power).mean().item()
        if old is None:
            old = means, {k: log_prob.detach() for k, log_prob in log_probs.items()}
            sampled = rollout.log_prob
            if o.reduction == "mean":
                sampled = sampled / rollout.x_s[0, 0, 0].numel()
            metrics["sampling_gap_max"] = (sampled - old[1][1]).abs().max().item()

        J = 0.0
        for k in ks:
            log_ratio = log_probs[k] - old[1][k]
            if o.ratio_norm:  # delta . (x_s - mu_old) / c
                product = (apart[k] * noise[k]).double().flatten(3)
                log_ratio = product.mean(-1) if o.reduction == "mean" else product.sum(-1)
            ratio = log_ratio.exp()
            bounded = ratio.clamp(1 - o.clip, 1 + o.clip)
            term = torch.minimum(ratio * A, bounded * A)
            J = J + (self.weights(k, rollout) * term).mean()
            speaking = (A != 0).expand_as(ratio)
            cut = (term < ratio * A) & speaking
            metrics[f"ratio_{k}"] = ratio.mean().item()
            metrics[f"ratio_{k}_min"] = ratio.min().item()
            metrics[f"ratio_{k}_max"] = ratio.max().item()
            metrics[f"clip_fraction_{k}"] = (cut.sum() / speaking.sum()).item()
        KL = torch.zeros(())
        if o.kl:
            with torch.no_grad():
                wanted = self.rescored(self.initial.velocity(asked), rollout)[1]
            squared = (p[1].mean - wanted.mean).flatten(3).double().square()
            summed = squared.sum(-1) / (2 * p[1].std ** 2)
            KL = (summed / (squared.shape[-1] if o.reduction == "mean" else 1)).mean()
        metrics["kl"] = KL.item()
        loss = o.kl * KL - J
        metrics["loss"] = loss.item()
        return loss, old

    def rescored(self, velocity, rollout):
        """p^(k); under the midpoint form k = 1 asks inside the step, along what sampled."""
        if self.o.form != "midpoint":
            factors = () if self.o.step_weights == "gamma" else self.o.factors
            return pave.rescore(velocity, rollout, factors)
        record, grid = theory.of(self.o.kernel, self.o.eta), rollout.process.grid.tolist()
        stds = torch.empty(rollout.x_t.shape[:3], dtype=torch.float64)
        columns = []
        for j, i in enumerate(rollout.sde_steps):
            t, s = grid[i : i + 2]
            column = []
            for p in range(len(rollout.x_t)):
                x, v_old, u = rollout.x_t[p, j], rollout.v[p, j], self.places[p, j]
                wide = u.view(-1, *[1] * (x.ndim - 1)).to(x)
                x_u, t_u = x - wide * (t - s) * v_old, (t - u * (t - s)).to(x)
                v_u = velocity(x_u, t_u, torch.full((len(x),), p))
                mean, std = record.step(x, v_u, t, s)
                column.append(mean)
                stds[p, j] = std
            columns.append(torch.stack(column))
        return {1: pave.Transition(torch.stack(columns, 1), stds)}

    @torch.no_grad()
    def step(self, gradient, rate):
        """SGD; or AdamW by its formula, theta (1 - rate decay) - rate m/(sqrt(v) + 1e-8)."""
        o = self.o
        self.steps_taken += 1
        for p, g, m, v in zip(self.theta, gradient, self.first, self.second):
            if o.optimizer == "sgd":
                p -= rate * g
                continue
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g**2)
            direction = m / (1 - 0.9**self.steps_taken)
            size = (v / (1 - 0.999**self.steps_taken)).sqrt() + 1e-8
            p.copy_((1 - rate * o.weight_decay) * p - rate * direction / size)

    # ---- Judging ---------------------------------------------------------------------------------

    def use_the_average(self):
        if self.o.ema:
            self.put(self.average)

    @torch.no_grad()
    def put(self, values):
        for p, value in zip(self.theta, values):
            p.copy_(value)

    @torch.no_grad()
    def judge(self, iteration, when=""):
        """Held-out means: four pictures of each prompt in a fixed order, one picture at a time."""
        o, policy = self.o, self.policy
        order = torch.randperm(len(self.data.heldout), generator=generator_of(0)).tolist()
        means = {}
        for steps in o.eval_steps:
            scores = {name: [] for name in self.judges}
            for j in range(o.heldout // 4):
                prompt = self.data.heldout[order[j % len(order)]]
                noise = torch.randn(4, *policy.shape, generator=generator_of(0, j))
                x = pave.ode_sample(policy.velocity([prompt] * 4), policy.grid(steps), noise)
                for image in policy.decode(x).split(1):
                    for name, judge in self.judges.items():
                        scores[name].append(judge(image, [prompt]).item())
            means[steps] = {name: sum(own) / len(own) for name, own in scores.items()}
        if when:
            self.judged[when] = {str(steps): own for steps, own in means.items()}
        first = means[o.eval_steps[0]]
        line = {f"heldout_{name}": mean for name, mean in first.items()}
        self.lines.append({"iteration": iteration, **line})


def asked_warmth(images, prompts):
    """A reward that belongs to picture and prompt: warmth, weighed by the prompt's letters."""
    letters = torch.tensor([float(sum(map(ord, prompt)) % 7) for prompt in prompts])
    return (1 + letters) / 4 * example.warmth(images, prompts)


def by_turns(images, prompts):
    """0, 1, 2, 0, 1, 2 ...: the middle member of a group of three has no advantage."""
    return torch.arange(len(images)) % 3 / 1.0


def alike(images, prompts):
    """The same for all: every group is silent."""
    return torch.full((len(images),), 0.3)


ROUNDING = {"sampling_gap_max": 1e-4, "loss": 1e-5}  # sums that cancel; of the rest 1e-7


def same_lines(found, wanted):
    """Every line of metrics.jsonl but its clock has the replay's metrics, neither more nor fewer.

    To 1e-3 of a metric's distance from what it is when nothing moves, and rounding.
    """
    assert [line["iteration"] for line in found] == [line["iteration"] for line in wanted]
    for line, other in zip(found, wanted):
        assert set(line) - {"seconds"} == set(other)
        for name, value in other.items():
            still = 1.0 if name.startswith("ratio") else 0.0
            allowed = 1e-3 * abs(value - still) + ROUNDING.get(name, 1e-7)
            assert abs(line[name] - value) <= allowed, (name, line[name], value)
