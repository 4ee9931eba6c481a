"""Golden vectors: written, read back, and found wrong where they are."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import verify_equivalence as oracle
from zoo.oracle import fields, vectors


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


@pytest.mark.parametrize(
    ("spoil", "lines"),
    [
        (changed, ["k = 5/mean_5: off by 1e-06"]),
        (removed, ["k = 5/mean_5: missing", "KL: inputs missing: rewards"]),
        (not_a_number, ["k = 5/x_0: off by nan"]),
    ],
)
def test_what_is_wrong_is_found(spoil, lines, folder, tensors, capsys):
    """One line for each, beside the one about the file, and status 1."""
    spoil(tensors)
    save_file(tensors, folder / "vectors.safetensors")
    assert oracle.main(["--check-vectors", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "vectors.safetensors: SHA-256 differs",
        *lines,
    ]


def test_folders_that_do_not_serve_are_status_2(folder, capsys):
    """Writing into a full folder; reading one that is missing or holds no tensors."""
    assert oracle.main(["--vectors", str(folder)]) == 2
    assert oracle.main(["--check-vectors", str(folder / "no")]) == 2
    (folder / "vectors.safetensors").write_bytes(b"no tensors")
    assert oracle.main(["--check-vectors", str(folder)]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
