"""Pretraining by its formulas: times, prompts, both optimisers, the running mean, what is kept."""

import argparse
import math

import pytest
import torch

import pave_grpo as pave
from zoo.shapes import gradient_signal, model, pretrain, rule, world


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Remembering(torch.nn.Module):
    """v = 0, and what it was asked."""

    def forward(self, x, t, tokens):
        self.x, self.t, self.tokens = x, t, tokens
        return torch.zeros_like(x)


def test_the_loss_is_of_flow_matching():
    """t = sigmoid(1.4 + 1.2 n), x_t between picture and noise, |v - (x_1 - x_0)|^2 averaged."""
    x_0, tokens, network = torch.rand(5, 3, 32, 32, generator=seeded(1)), "tokens", Remembering()
    loss = pretrain.flow_loss(network, x_0, tokens, seeded(2))
    drawn = seeded(2)
    x_1 = torch.randn(5, 3, 32, 32, generator=drawn)
    for i, n in enumerate(torch.randn(5, generator=drawn).tolist()):
        t = 1 / (1 + math.exp(-1.4 - 1.2 * n))
        assert network.t[i].item() == pytest.approx(t, rel=1e-6)
        assert torch.allclose(network.x[i], (1 - t) * x_0[i] + t * x_1[i], atol=1e-6)
    assert loss.item() == pytest.approx(((x_1 - x_0) ** 2).mean().item(), rel=1e-6)
    assert network.tokens == tokens


def test_half_of_the_times_are_above_four_fifths():
    """Where composition is decided: 4000 draws, so 5 standard errors are 0.04."""
    network = Remembering()
    pretrain.flow_loss(network, torch.zeros(4000, 1, 1, 1), None, seeded(3))
    assert abs((network.t > 0.8).float().mean().item() - 0.5) < 0.04
    assert network.t.min() > 0 and network.t.max() < 1


def test_a_batch_is_of_three_families_alike(monkeypatch):
    """Fresh pictures in [-1, 1] of their own prompts; a share of the prompts is made empty."""
    asked = []
    plain = world.draw

    def noted(prompts, generator):
        asked.extend(prompts)
        return plain(prompts, generator)

    monkeypatch.setattr(world, "draw", noted)
    x_0, tokens = pretrain.batch_of(300, 0.25, seeded(4))
    families = [world.parse(prompt).family for prompt in asked]
    for family in ("count", "conjunction", "relation"):  # 5 standard errors of 100 are 41
        assert abs(families.count(family) - 100) < 41
    assert len(set(asked)) > 150 and set(asked) & set(world.HELDOUT_PROMPTS)
    assert -1 <= x_0.min() < -0.79 and 0.9 < x_0.max() <= 1
    assert rule.right((x_0 + 1) / 2, asked).mean() > 0.98
    empty = (tokens == 0).all(1)
    assert abs(empty.sum().item() - 75) < 38
    assert torch.equal(tokens[~empty], model.tokenize(asked)[~empty])


def test_muon_is_its_formula():
    """W <- W - lr 0.2 sqrt(max(rows, columns)) O, O near U V^T of Nesterov's average; two steps."""
    w = torch.nn.Parameter(torch.zeros(4, 9))
    optimiser = pretrain.Muon([w], lr=0.1)
    mean, wanted = torch.zeros(4, 9), torch.zeros(4, 9)
    for seed in (5, 6):
        w.grad = torch.randn(4, 9, generator=seeded(seed))
        optimiser.step()
        mean = 0.95 * mean + 0.05 * w.grad
        ahead = 0.05 * w.grad + 0.95 * mean
        U, S, Vh = torch.linalg.svd(ahead / ahead.norm(), full_matrices=False)
        for _ in range(5):
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        wanted = wanted - 0.1 * 0.2 * 3 * (U * S) @ Vh
        assert torch.allclose(w, wanted, atol=1e-5)


def test_which_weights_muon_moves():
    """Matrices of the blocks; AdamW has the rest, with betas 0.9 and 0.98 and no decay."""
    network = model.ShapesFlow(model.Config(width=24, depth=2, heads=2, stem=4, head=4))
    (muon, rate), (adamw, other) = pretrain.optimisers(network, 0.3)
    names = {p: name for name, p in network.named_parameters()}
    matrices = {names[p] for p in muon.param_groups[0]["params"]}
    kinds = ("qkv", "out", "up", "down")
    assert matrices == {f"blocks.{i}.{kind}.weight" for i in (0, 1) for kind in kinds}
    rest = {names[p] for p in adamw.param_groups[0]["params"]}
    assert matrices | rest == set(names.values()) and not matrices & rest
    group = adamw.param_groups[0]
    assert group["betas"] == (0.9, 0.98) and group["weight_decay"] == 0
    for schedule in (rate, other):
        assert schedule.get_last_lr() == [pytest.approx(0.3 / 100)]
    assert [pretrain.warm_up(step) for step in (0, 49, 99, 500)] == [0.01, 0.5, 1, 1]


def test_the_running_mean_follows():
    """mean <- decay mean + (1 - decay) model."""
    mean, fast = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        mean.weight.fill_(2.0)
        fast.weight.fill_(6.0)
    pretrain.follow(mean, fast, 0.75)
    assert mean.weight.item() == 3.0 and fast.weight.item() == 6.0


def test_validation_goes_through_the_heldout_prompts():
    """Some spread over the list, or all of it and some more."""
    pool = list(world.HELDOUT_PROMPTS)
    assert pretrain.heldout(3) == [pool[0], pool[50], pool[100]]
    assert pretrain.heldout(153) == [*pool, pool[0], pool[75]]


OPTIONS = dict(
    steps=3,
    batch=2,
    lr=1e-3,
    ema=0.5,
    drop=0.0,
    seed=4,
    validate_every=1,
    pairs=4,
    out="kept",
    dry_run=False,
)


@pytest.fixture
def watched(monkeypatch):
    """Pretraining of a small network, whose validations are 0.2, 0.5 and 0.3; what it saved."""
    scores, saved = [0.2, 0.5, 0.3], []
    small = model.Config(width=24, depth=1, heads=2, stem=4, head=4)
    monkeypatch.setattr(pretrain, "ShapesFlow", lambda: model.ShapesFlow(small))

    def judged(mean, prompts, steps, generator):
        assert not any(p.requires_grad for p in mean.parameters()), "it is the mean that is judged"
        saved.append(("judged", len(prompts), steps, generator.initial_seed()))
        return torch.tensor([scores.pop(0)])

    def save(kept, path, metadata):
        weights = {name: w.clone() for name, w in kept.state_dict().items()}
        saved.append(("saved", path, metadata, weights))

    monkeypatch.setattr(pretrain, "judged", judged)
    monkeypatch.setattr(pretrain, "save", save)
    return saved


def test_the_best_validation_is_kept(watched, capsys):
    """Judged by the running mean on one noise; saved at each best, with how it was made."""
    run = pretrain.pretrain(argparse.Namespace(**OPTIONS))
    assert run.score == 0.5 and run.scores == [
        (1, pytest.approx(0.2)),
        (2, 0.5),
        (3, pytest.approx(0.3)),
    ]
    assert len(run.losses) == 3 and all(0 < loss < 10 for loss in run.losses)
    assert [entry[0] for entry in watched] == ["judged", "saved", "judged", "saved", "judged"]
    assert {entry[1:] for entry in watched if entry[0] == "judged"} == {(4, 8, 5)}
    (_, path, first, _), (_, _, second, weights) = watched[1], watched[3]
    assert path == "kept" and (first["step"], second["step"]) == ("1", "2")
    assert (second["seed"], second["steps"]) == ("4", "3")
    assert second["validation"].startswith("0.5000 of 4 held-out prompts")
    kept = run.model.state_dict()
    assert all(torch.equal(w, kept[name]) for name, w in weights.items())


def test_every_step_begins_without_gradients(watched, monkeypatch):
    """After it they are gone; the mean forgets the start first, then follows at --ema."""
    decays = []

    def noted(mean, network, decay):
        assert all(p.grad is None for p in network.parameters())
        decays.append(decay)

    monkeypatch.setattr(pretrain, "follow", noted)
    pretrain.pretrain(argparse.Namespace(**(OPTIONS | {"ema": 0.2})))
    assert decays == pytest.approx([1 / 11, 2 / 12, 0.2])


def test_a_dry_run_is_one_step_and_writes_nothing(watched):
    """However many steps are asked."""
    run = pretrain.pretrain(argparse.Namespace(**(OPTIONS | {"dry_run": True})))
    assert len(run.losses) == 1 and [entry[0] for entry in watched] == ["judged"]


def test_the_weights_are_of_the_seed(watched, monkeypatch):
    """The network's own, the pictures' and the noise's, whatever the global generator is at."""
    losses = []
    for seed, stir in ((4, 1), (4, 2), (5, 1)):
        torch.manual_seed(stir)
        monkeypatch.setattr(pretrain, "judged", lambda *_: torch.tensor([1.0]))
        options = argparse.Namespace(**(OPTIONS | {"seed": seed, "dry_run": True}))
        losses.append(pretrain.pretrain(options).losses)
    assert losses[0] == losses[1] != losses[2]


# ---- The gradient's signal -----------------------------------------------------------------------


def test_the_share_of_signal_by_hand():
    """Products off the diagonal over squares on it: 1 for equal gradients, -1 for opposite ones."""
    g = torch.tensor([3.0, 4.0])
    assert gradient_signal.signal(torch.stack([g, g])) == (1, 5)
    assert gradient_signal.signal(torch.stack([g, -g])) == (-1, 5)
    gradients = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
    # |g|^2 = 1, 5, 9; products 2, 0, 3.
    share, norm = gradient_signal.signal(gradients)
    assert share == pytest.approx((2 + 0 + 3) / 3 / 5) and norm == pytest.approx(5**0.5)


def test_the_signals_program_does_as_it_is_told(monkeypatch, capsys):
    """Kernel, steps, seed and batches arrive; a line for each step, * at pixel resolution."""
    seen = []

    def noted(network, process, step, generator):
        seen.append((process.kernel, step, generator.initial_seed()))
        assert len(process.grid) == 9 and process.eta == 0.7
        return {"stem": torch.ones(2), "blocks": torch.ones(2)}

    monkeypatch.setattr(gradient_signal, "batch_gradient", noted)
    flags = ["--kernel", "cps", "--batches", "2", "--sde-steps", "1", "3", "--seed", "6"]
    monkeypatch.setattr("sys.argv", ["signal", *flags])
    gradient_signal.main()
    assert seen == [("cps", 1, 6)] * 2 + [("cps", 3, 6)] * 2
    printed = capsys.readouterr().out.splitlines()[1:]
    assert printed[0] == "step 1, t = 0.875 -> 0.75:  stem* 1.000 (1.4e+00)  blocks 1.000 (1.4e+00)"
    assert printed[1].startswith("step 3, t = 0.625 -> 0.5")


def test_a_batchs_gradient_is_of_its_step_alone(monkeypatch):
    """Asked twice it is the same: none is left from before; other parts of time, another one."""
    monkeypatch.setattr(gradient_signal, "PROMPTS", 1)
    monkeypatch.setattr(gradient_signal, "MEMBERS", 3)
    process, network = pave.Process(pave.schedule(8), "flow_sde", 0.7), model.load()
    found = [
        gradient_signal.batch_gradient(network, process, step, seeded(2)) for step in (1, 1, 5)
    ]
    assert found[0].keys() == {"order", *(name for name, _ in network.named_children())}
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]) and gradient.norm() > 0
        assert not torch.equal(gradient, found[2][name])
