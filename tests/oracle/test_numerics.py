"""Replays beside rollouts, gradients beside Adam's eps: against loops, plants, whole gradients."""

import json
import math

import pytest
import torch

import pave_grpo as pave
import verify_equivalence as oracle
from zoo.oracle import fields, measures, numerics, theory
from zoo.oracle.bench import ETA, Bench, Model
from zoo.released import random_pipelines

PROMPTS = ("one", "another")
FACTORS = (2, 3)


def bench_of(field, kernels=("cps",), dtype=torch.float64):
    """A bench whose model is this field of DIM numbers, told two prompts."""
    bench = Bench(kernels, FACTORS, model=Model("", PROMPTS, dtype))
    bench.fixture = lambda name: fields.Fixture("embedded", field, (fields.DIM,))
    return bench


def network(seed=1):
    return fields.Network(torch.Generator().manual_seed(seed))


class Crowded(torch.nn.Module):
    """A velocity that is off by a known amount where it is asked for one row alone."""

    def __init__(self, field, off):
        super().__init__()
        self.field, self.off = field, off

    def forward(self, x, t, prompt):
        return self.field(x, t, prompt) + (self.off if len(x) == 1 else 0.0)


@pytest.fixture
def short(monkeypatch):
    """Rollouts of three steps and four members."""
    monkeypatch.setattr(numerics, "STEPS", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SD3 with random weights."""
    return str(random_pipelines.sd3(tmp_path_factory.mktemp("tiny")))


# ---- The replay ----------------------------------------------------------------------------------


def slow_gap(scene, field, p, j, g):
    """log p of one member by its definition, of its row asked alone, less the stored, over d."""
    rollout = scene.rollout
    i = rollout.sde_steps[j]
    t, s = rollout.process.grid[i : i + 2].tolist()
    x, d = rollout.x_t[p, j], rollout.x_s[p, j, g].numel()
    v = field(x, torch.tensor([t], dtype=x.dtype), torch.tensor([p]))
    mean, std = theory.of(rollout.process.kernel, ETA).step(x, v.to(x), t, s)
    normal = torch.distributions.Normal(mean[0].double(), float(std))
    return (normal.log_prob(rollout.x_s[p, j, g].double()).sum() - rollout.log_prob[p, j, g]) / d


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kernel", list(pave.KERNELS))
def test_a_planted_difference_is_measured(kernel):
    """Every member's gap is that of a slow loop; mean, maximum and shares are of those."""
    field = Crowded(network(), 1e-3)
    bench = bench_of(field, (kernel,))
    scene = numerics.sampled(bench, kernel)
    P, n, G = scene.rollout.log_prob.shape
    wanted = torch.zeros(P, n, G, dtype=torch.float64)
    for p in range(P):
        for j in range(n):
            for g in range(G):
                wanted[p, j, g] = slow_gap(scene, field, p, j, g)
    assert wanted.abs().min() > 1e-8
    assert torch.allclose(numerics.replay_gaps(scene), wanted, rtol=1e-6, atol=1e-12)
    *steps, whole = numerics.measure(bench)
    assert [line["step"] for line in steps] == list(scene.rollout.sde_steps)
    for j, line in enumerate(steps):
        assert line["gap"] == pytest.approx(wanted[:, j].abs().mean().item())
        assert line["gap_max"] == pytest.approx(wanted[:, j].abs().max().item())
    assert whole["step"] is None and whole["gap"] == pytest.approx(wanted.abs().mean().item())
    for how, clip, share in whole["outside"]:
        ratios = (wanted * (fields.DIM if how == "sum" else 1)).exp()
        cut = (ratios < 1 - clip) | (ratios > 1 + clip)
        assert share == pytest.approx(cut.double().mean().item())
    said = numerics.said_of_gaps([*steps, whole])
    assert f"below {math.expm1(wanted.abs().max().item()):.1e} cuts by rounding alone" in said


def test_a_field_of_each_prompt_is_replayed_for_that_prompt():
    """A replay without a plant agrees to rounding: states, prompts and members are not mixed up."""
    gaps = numerics.replay_gaps(numerics.sampled(bench_of(network()), "flow_sde"))
    assert gaps.abs().max() < 1e-13
    line = {"gap_max": 0.0, "dimensions": 6}
    assert numerics.said_of_gaps([line]).startswith("Replays agree with their rollout bit for bit")


def test_a_replay_far_off_or_no_number_is_still_said():
    """A ratio that overflows, and NaN among finite gaps."""
    bad = [{"gap_max": gap, "dimensions": 3072} for gap in (0.5, math.nan)]
    assert "with summed log p below inf, where" in numerics.said_of_gaps(bad[:1])
    assert "A clip range below nan" in numerics.said_of_gaps(bad)
    gaps = torch.tensor([0.0, 1e-3, -0.5, math.nan])
    assert numerics.share_outside(gaps, "mean", 0.2, 6) == 0.5
    assert numerics.share_outside(gaps, "sum", 0.2, 600) == 0.75
    assert numerics.share_outside(torch.tensor([-0.22, -0.23, 0.18]), "mean", 0.2, 6) < 0.4


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.bfloat16, 1e-3), (torch.float32, 1e-6), (torch.float64, 1e-14)],
)
def test_the_shipped_model_is_measured_in_every_dtype(dtype, rounding):
    """Its gap is rounding of that dtype; its gradient has the same size in each."""
    bench = Bench(("cps",), (2,), model=Model("", ("a red circle",), dtype))
    whole = numerics.measure(bench)[-1]
    assert whole["gap_max"] < rounding
    assert 1e-5 < whole["rms_plain"] < 1e-3 and whole["rms_plain"] < whole["rms"] < 1e-2
    assert f"Rounding in {str(dtype)[6:]}: 1 x 4 members" in numerics.show([whole], bench)


# ---- The gradient --------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kernel", ["flow_sde", "cps"])
def test_the_root_mean_square_is_that_of_the_whole_gradient(kernel):
    """Of the loss in one pass, for S = {} and S = the factors, in each step and in all."""
    bench = bench_of(network(), (kernel,))
    scene = numerics.sampled(bench, kernel)
    steps, lines = range(len(scene.rollout.sde_steps)), numerics.measure(bench)
    for factors, name in (((), "rms_plain"), (FACTORS, "rms")):
        weights = [torch.eye(len(steps), dtype=torch.float64)[j] * len(steps) for j in steps]
        for w, line in zip([*weights, torch.ones(len(steps))], lines, strict=True):
            each = {k: w / (1 if k == 1 else len(factors)) for k in (1, *factors)}
            how = {"factors": factors, "term_weights": each}
            loss = pave.policy_loss(scene.field, scene.rollout, scene.advantages, **how).loss
            gradient = measures.flat_gradient(loss, scene.field)
            wanted = gradient.square().mean().sqrt().item()
            assert line[name] == pytest.approx(wanted, rel=1e-9), (name, line["step"])
    assert all(p.grad is None for p in scene.field.parameters())


def test_what_adam_would_drown_is_said():
    """By kernel and S, where the gradient of all steps is below eps; also where it is no number."""

    def line(kernel, plain, rms, step=None):
        return {"kernel": kernel, "step": step, "rms_plain": plain, "rms": rms, "dimensions": 10}

    bench = bench_of(network())
    fine = [line("cps", 2e-8, 3e-8), line("cps", 1e-9, 1e-9, step=0)]
    wanted = "Gradients are above Adam's eps: the least is 2 times it."
    assert numerics.said_of_gradients(fine, bench) == wanted
    said = numerics.said_of_gradients([*fine, line("dance", 5e-9, 2e-8)], bench)
    assert said.startswith("Adam's eps drowns the gradient: 0.5 of it under dance, S = {}. A step")
    said = numerics.said_of_gradients([line("dance", 2e-8, math.nan)], bench)
    assert "nan of it under dance, S = {2, 3}." in said


# ---- Models too large for whole gradients --------------------------------------------------------


def test_projections_are_those_of_the_whole_gradient():
    """Inner products with two directions of signs; linear; as long as the gradient on average."""
    field = network()
    loss = (field.w1.square().sum() + field.w2.sin().sum()).log()
    grads = list(torch.autograd.grad(loss, [field.w1, field.w2]))
    ones = [torch.ones_like(g) for g in grads]
    found = measures.projections(grads)
    for n in range(2):
        wanted = 0.0
        for i, g in enumerate(grads):
            coins = torch.Generator().manual_seed(2 * i + n)
            heads = torch.randint(0, 2, g.shape, generator=coins, dtype=torch.int8)
            wanted += g[heads == 1].sum().item() - g[heads == 0].sum().item()
        assert found[n].item() == pytest.approx(wanted)
    assert found[0] != found[1]
    both = measures.projections([3 * g + one for g, one in zip(grads, ones)])
    assert torch.allclose(both, 3 * found + measures.projections(ones))
    assert torch.equal(measures.projections([None, grads[1]])[0], found[0] - part(grads[0], 0))
    alone = [measures.projections([None] * i + [torch.ones(4)]) for i in range(300)]
    assert torch.stack(alone).square().mean() == pytest.approx(4, abs=6 * (28 / 600) ** 0.5)


def part(g, n):
    """The first parameter's share of the n-th projection."""
    return measures.projections([g])[n]


@pytest.mark.usefixtures("short")
def test_the_terms_of_a_large_model_are_projected(monkeypatch):
    """Each k-term's derivatives are the projections of its whole gradient; no angle is claimed."""
    field, whole = network(), {}
    bench = bench_of(field, ("dance",))
    scene = numerics.sampled(bench, "dance")
    small = numerics.measure(bench)
    for k in (1, *FACTORS):
        gradient = measures.term_gradient(scene, k)
        parts = gradient.split([p.numel() for p in field.parameters()])
        shaped = [g.view(p.shape) for g, p in zip(parts, field.parameters())]
        whole[k] = measures.projections(shaped)
    monkeypatch.setattr(fields, "WHOLE", 10)
    *_, line = large = numerics.measure(bench)
    assert [k for k, *_ in line["along"]] == [1, *FACTORS]
    for k, *found in line["along"]:
        assert torch.allclose(torch.tensor(found, dtype=torch.float64), whole[k], rtol=1e-9)
        taken = measures.term_gradient(scene, k)
        assert taken.shape == (2,) and torch.allclose(taken, whole[k])
    assert [a | {"along": []} for a in large] == small
    text = numerics.show(large, bench)
    assert "224 parameters, more than 10: no gradient is held whole" in " ".join(text.split())
    assert sum(" k = 3: " in row for row in text.splitlines()) == len(large)
    assert max(map(len, text.splitlines())) <= 100
    assert "k = 3" not in numerics.show(
        small, bench_of(fields.Constant(torch.zeros(6)), ("dance",))
    )


def test_a_large_pipeline_is_judged_without_whole_gradients(folder, monkeypatch, tmp_path, capsys):
    """Claims hold of it, angles are left out, blocks are computed again, --json has the table."""
    monkeypatch.setattr(fields, "WHOLE", 1000)
    monkeypatch.setattr(numerics, "STEPS", 2)
    taken = []

    def noted(value, field):
        taken.append(measures.flat_gradient(value, field))
        return taken[-1]

    monkeypatch.setattr(oracle, "flat_gradient", noted)
    file = tmp_path / "told.json"
    typed = f"--model {folder} --size 16 16 --kernels cps --factors 2 --prompt dog --json {file}"
    assert oracle.main(typed.split()) == 0
    out, told = capsys.readouterr().out, json.loads(file.read_text())
    assert {len(gradient) for gradient in taken} == {2} and all(g.any() for g in taken)
    assert "all as registered" in out and "E9" in out and "\nE6 " not in out
    assert told["comparison"] == [] and told["status"] == 0
    assert [line["step"] for line in told["numerics"]] == [0, None]
    assert [k for k, *_ in told["numerics"][0]["along"]] == [1, 2]
    model = Model(folder, ("dog",), torch.float32, (16, 16))
    assert model.fixture().field.network.is_gradient_checkpointing
    assert oracle.main([*typed.split(), "--compare"]) == 2
    assert "--compare and --plots need a model of up to 1,000 parameters" in capsys.readouterr().err


# ---- The program ---------------------------------------------------------------------------------


def test_the_table_follows_the_front_page_and_changes_no_status(folder, tmp_path, capsys):
    """In bfloat16, on a pipeline: a row for each step, and in --json; status 0 whatever it says."""
    file = tmp_path / "told.json"
    flags = "--size 16 16 --dtype bfloat16 --kernels flow_sde --factors 2 --claims E2 --prompt dog"
    assert oracle.main(["--model", folder, *flags.split(), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    page, _, table = out.partition("\nRounding in bfloat16: 1 x 4 members")
    assert "all as registered" in page and table
    rows = [line for line in table.splitlines() if line.startswith("flow_sde ")]
    assert [row.split()[1] for row in rows][::8] == ["1.000", "all"] and len(rows) == 9
    assert max(map(len, out.splitlines())) <= 100
    told = json.loads(file.read_text())["numerics"]
    assert len(told) == 9 and told[0]["t"] == 1 and told[-1]["gap_max"] < 1e-3


def test_without_a_model_nothing_of_it_is_measured(tmp_path, capsys):
    """The default report is as it was."""
    file = tmp_path / "told.json"
    oracle.main(["--claims", "E5", "--kernels", "cps", "--factors", "2", "--json", str(file)])
    assert "Rounding" not in capsys.readouterr().out
    assert json.loads(file.read_text())["numerics"] == []
