"""Golden vectors: written, read back, and found wrong where they are."""

import json
import math

import pytest
import slow
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Normal

import pave_grpo as pave
import verify_equivalence as oracle
from zoo.oracle import fields, theory, vectors


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of vectors, to be read."""
    folder = tmp_path_factory.mktemp("written") / "vectors"
    assert oracle.main(["--vectors", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it, to be spoilt."""
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def tensors(written):
    """All tensors, by CASE/NAME."""
    return load_file(written / "vectors.safetensors")


def test_every_case_recomputes(written, capsys):
    """What was written is accepted, whole."""
    assert oracle.main(["--check-vectors", str(written)]) == 0
    assert "every tensor as recomputed" in capsys.readouterr().out
    described = json.loads((written / "vectors.json").read_text())
    assert described["version"] == vectors.VERSION
    assert set(described["cases"]) == set(vectors.CASES)


def test_the_cases_show_what_they_are_named_for(tensors):
    """Members are cut on either side of the clip, a group is silent, a clamp acts."""
    ratios = tensors["ratios on both sides of the clip/ratio_2"]
    advantages = tensors["ratios on both sides of the clip/advantages"]
    assert (ratios[advantages > 0] > 1.05).any() and (ratios[advantages < 0] < 0.95).any()
    silent, speaking = tensors["equal rewards/advantages"]
    assert not silent.any() and speaking.any()
    assert tensors["a clamp that acts/advantages"].abs().max() == 0.8


@pytest.mark.parametrize(("name", "ks"), [("cps independent", (2, 3)), ("k = 5", (5,))])
def test_the_velocities_of_all_chains_stand_by_depth(name, ks, tensors):
    """score_old_J holds the J-th velocity of each k > J, ascending, rows in the order [P, n, A]."""
    case = {key.removeprefix(f"{name}/"): z for key, z in tensors.items() if key.startswith(name)}
    x_t = case["x_t"]
    P, n, A, d = x_t.shape
    t = torch.tensor([1.0, 0.5], dtype=torch.float64)[None, :, None].expand(P, n, A).flatten()
    prompt = torch.arange(P).repeat_interleave(n * A)
    m, q = case["m"][prompt], case["log_q"].exp()[prompt]
    states = dict.fromkeys(ks, x_t.reshape(-1, d))
    assert torch.equal(case["score_old_0_x"], states[ks[0]])
    for j in range(max(ks)):
        chains = [k for k in ks if k > j] if j else [ks[0]]
        times = torch.cat([t - j * 0.25 / k for k in chains])
        x = torch.cat([states[k] for k in chains])
        many = len(chains)
        v = fields.gaussian_velocity(x, times[:, None], m.repeat(many, 1), q.repeat(many, 1))
        for what, wanted in (("x", x), ("t", times), ("v", v)):
            torch.testing.assert_close(case[f"score_old_{j}_{what}"], wanted, rtol=0, atol=1e-12)
        velocities = dict(zip(chains, v.chunk(many), strict=True)) if j else dict.fromkeys(ks, v)
        for k, velocity in velocities.items():
            states[k] = states[k] - 0.25 / k * velocity
    assert f"score_old_{max(ks)}_x" not in case


def changed(tensors):
    """A number is off."""
    tensors["k = 5/mean_5"][0, 0, 0, 0] += 1e-6


def removed(tensors):
    """A tensor and an input are gone."""
    del tensors["k = 5/mean_5"], tensors["KL/rewards"]


def not_a_number(tensors):
    """A tensor is NaN."""
    tensors["k = 5/x_0"] *= math.nan


def barely_changed(tensors):
    """A number is off by more than rounding, and less than anyone would print."""
    tensors["k = 5/mean_5"][0, 0, 0, 0] += 3e-11


def halved(tensors):
    """A tensor is stored in float32."""
    tensors["k = 5/x_0"] = tensors["k = 5/x_0"].float()


@pytest.mark.parametrize(
    ("spoil", "lines"),
    [
        (changed, ["k = 5/mean_5: off by 1e-06"]),
        (barely_changed, ["k = 5/mean_5: off by 3e-11"]),
        (halved, ["k = 5/x_0: [2, 2, 4, 3] torch.float32, not [2, 2, 4, 3]"]),
        (removed, ["k = 5/mean_5: missing", "KL: inputs missing: rewards"]),
        (not_a_number, ["k = 5/x_0: off by nan"]),
    ],
)
def test_what_is_wrong_is_found(spoil, lines, folder, tensors, capsys):
    """One line for each, beside the one about the file, and status 1."""
    spoil(tensors)
    save_file(tensors, folder / "vectors.safetensors")
    try:
        status = oracle.main(["--check-vectors", str(folder)])
    except KeyError as missing:
        pytest.fail(f"{missing} is missing, and no line says so")
    assert status == 1
    assert capsys.readouterr().out.splitlines() == [
        "vectors.safetensors: SHA-256 differs",
        *lines,
    ]


def described_as(folder, change):
    """The folder with a change of what vectors.json says."""
    described = json.loads((folder / "vectors.json").read_text())
    change(described)
    (folder / "vectors.json").write_text(json.dumps(described))
    return oracle.main(["--check-vectors", str(folder)])


def test_what_is_described_is_checked_too(folder, tensors, capsys):
    """A tensor that is no quantity, a setting that must be refused and is not, a version."""

    def with_another(described):
        described["cases"]["k = 5"]["tensors"]["mean_6"] = [2, 2, 1, 3]
        described["refused"].append(vectors.REFUSED[1] | {"eta": 0.5})

    tensors["k = 5/mean_6"] = tensors["k = 5/mean_5"].clone()
    save_file(tensors, folder / "vectors.safetensors")
    assert described_as(folder, with_another) == 1
    said = capsys.readouterr().out
    assert "k = 5/mean_6: unknown" in said and said.count("accepted what must be refused") == 1
    for case in vectors.REFUSED:
        assert not vectors.is_accepted(case)

    def of_another_version(described):
        described["version"] = 2

    assert described_as(folder, of_another_version) == 2
    assert "version 2; must be 1" in capsys.readouterr().err


def test_inputs_of_every_case_are_its_own(tensors):
    """Drawn by the case's name: none repeats another's, and theta is not theta_old."""
    starts = {tuple(tensors[f"{name}/m"].flatten().tolist()) for name in vectors.CASES}
    assert len(starts) == len(vectors.CASES) == 17
    for name in vectors.CASES:
        moved = (tensors[f"{name}/m_new"] - tensors[f"{name}/m"]).abs().max()
        assert (moved > 0) == (name != "at theta_old")


def field_of(m, log_q):
    """The typed velocity of data N(m, diag q), each prompt its own."""
    q = log_q.exp()

    def velocity(x, t, prompt):
        w = t[:, None]
        slope = (w - (1 - w) * q[prompt]) / ((1 - w) ** 2 * q[prompt] + w**2)
        return slope * (x - (1 - w) * m[prompt]) - m[prompt]

    return velocity


@pytest.mark.parametrize("name", vectors.CASES)
def test_vectors_are_those_of_slow_loops(name, tensors):
    """Advantages, means, log-probabilities, ratios and the loss of every case, one by one."""
    setting = vectors.USUAL | vectors.CASES[name]
    case = {key.removeprefix(f"{name}/"): z for key, z in tensors.items()}
    theta = case["m_new"].clone().requires_grad_(), case["log_q_new"].clone().requires_grad_()
    old, new = field_of(case["m"], case["log_q"]), field_of(*theta)
    rewards = case["rewards"]
    spread = rewards.std(-1, correction=setting["ddof"], keepdim=True) + setting["eps"]
    A = (rewards - rewards.mean(-1, keepdim=True)) / spread
    A = A.clamp(-setting["clamp"], setting["clamp"])
    torch.testing.assert_close(case["advantages"], A, rtol=0, atol=1e-12)

    process = vectors.process_of(setting)
    kept = [case[key] for key in ("x_t", "x_s", "log_prob_sampled", "x_0")]
    rollout = pave.Rollout(process, tuple(setting["sde_steps"]), *kept)
    how = [setting[key] for key in ("form", "clip", "reduction")]
    loss = slow.slow_loss(new, old, rollout, A, setting["factors"], *how)
    wanted = loss.item()
    if not setting["kl"]:
        for key, grad in zip(("grad_m", "grad_log_q"), torch.autograd.grad(loss, theta)):
            torch.testing.assert_close(case[key], grad, rtol=0, atol=1e-12)
    else:
        apart = (case["mean_1"] - case["mean_old_1"]).square().mean(-1)
        std = case["std_1"].view(1, -1, 1)
        wanted += setting["kl"] * (apart / (2 * std**2)).mean().item()
    assert case["loss"].item() == pytest.approx(wanted, abs=1e-12)

    for step in slow.observations(rollout):
        p, j, g = step.index
        std = case["std_1"][j]
        sampled = case["mean_old_1"][p, j, g % rollout.x_t.shape[2]]
        drawn = sampled + std * case["noise_steps"][p, j, g]
        torch.testing.assert_close(step.x_s[0], drawn, rtol=0, atol=1e-12)
        record = theory.of(setting["kernel"], setting["eta"])
        for k in (1, *setting["factors"]):
            last = theory.last_start(k, step.t, step.s)
            (a, c), (b, _) = (
                record.step(1.0, 0.0, last, step.s),
                record.step(0.0, 1.0, last, step.s),
            )
            found = [case[f"{key}_{k}"][j].item() for key in ("a", "b", "std")]
            assert found == pytest.approx([a, b, c], abs=1e-12)
            for which, field in (("", new), ("_old", old)):
                mean, _ = slow.slow_transition(field, process, k, step)
                found = case[f"mean{which}_{k}"][p, j, g % rollout.x_t.shape[2]]
                torch.testing.assert_close(found, mean[0], rtol=0, atol=1e-12)
            scored = slow.slow_scored(new, old, process, k, setting["form"], step)
            log_p = [Normal(mu, scored.std).log_prob(step.x_s) for mu in scored[:2]]
            reduced = [z.sum() if setting["reduction"] == "sum" else z.mean() for z in log_p]
            for key, value in zip(("log_prob", "log_prob_old"), reduced):
                assert abs(case[f"{key}_{k}"][step.index] - value) <= 1e-11
            ratio = (reduced[0] - reduced[1]).exp()
            assert abs(case[f"ratio_{k}"][step.index] - ratio) <= 1e-11


def test_folders_that_do_not_serve_are_status_2(folder, capsys):
    """Writing into a full folder; reading one that is missing or holds no tensors."""
    assert oracle.main(["--vectors", str(folder)]) == 2
    assert oracle.main(["--check-vectors", str(folder / "no")]) == 2
    (folder / "vectors.safetensors").write_bytes(b"no tensors")
    assert oracle.main(["--check-vectors", str(folder)]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
