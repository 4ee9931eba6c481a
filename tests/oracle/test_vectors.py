"""Golden vectors: written, read back, and found wrong where they are."""

import json
import math

import numpy as np
import pytest
import slow
import torch
from oracle import numpy_vectors
from safetensors.torch import load_file, save_file
from torch.distributions import Normal

import pave_grpo as pave
import verify_equivalence as oracle
from zoo.oracle import fields, theory, vectors

DRAWN = [name for name in vectors.CASES if name.startswith("drawn")]
CHOSEN = [name for name in vectors.CASES if name not in DRAWN]


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
        described["version"] = 1

    assert described_as(folder, of_another_version) == 2
    assert "version 1; must be 2" in capsys.readouterr().err


def test_inputs_of_every_case_are_its_own(tensors):
    """Drawn by the case's name: none repeats another's, and theta is not theta_old."""
    starts = {tuple(tensors[f"{name}/m"].flatten().tolist()) for name in vectors.CASES}
    assert len(starts) == len(vectors.CASES) == 29
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


@pytest.mark.parametrize("name", CHOSEN)
def test_vectors_are_those_of_slow_loops(name, tensors):
    """Advantages, means, log-probabilities, ratios and the loss of chosen cases, one by one."""
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


# ---- Drawn cases ---------------------------------------------------------------------------------

SETTINGS = {name: vectors.USUAL | own for name, own in vectors.CASES.items()}
OCCURS = {  # among the drawn cases
    "t = 1 of flow_sde": lambda o: (
        (o["kernel"], o["grid"][0], o["sde_steps"][0]) == ("flow_sde", 1.0, 0)
    ),
    "from below 1": lambda o: o["grid"][0] < 1,
    "an end above 0": lambda o: o["grid"][-1] > 0,
    "cps to the end": lambda o: o["kernel"] == "cps" and o["sde_steps"][-1] == len(o["grid"]) - 2,
    "4 points": lambda o: len(o["grid"]) == 4,
    "9 points": lambda o: len(o["grid"]) == 9,
    "a low eta": lambda o: o["eta"] < 0.4,
    "a high eta": lambda o: o["eta"] > 0.85,
    "one axis": lambda o: len(o["event"]) == 1,
    "two axes": lambda o: len(o["event"]) == 2,
    "three axes": lambda o: len(o["event"]) == 3,
    "k = 7": lambda o: 7 in o["factors"],
    "three factors": lambda o: len(o["factors"]) == 3,
    "own starts": lambda o: o["own_start"],
    "one start": lambda o: o["rollouts"] == "independent" and not o["own_start"],
    "an anchor that stops early": lambda o: (
        o["rollouts"] == "shared_anchor" and o["sde_steps"][-1] < len(o["grid"]) - 3
    ),
    "several branches": lambda o: o["rollouts"] == "shared_anchor" and len(o["sde_steps"]) > 1,
    "a silent prompt": lambda o: o["equal"] is not None and o["prompts"] > 1,
    "mean": lambda o: o["reduction"] == "mean",
    "sum": lambda o: o["reduction"] == "sum",
    "no clip": lambda o: o["clip"] is None,
    "no clamp": lambda o: o["clamp"] is None,
    "a clamp": lambda o: o["clamp"] == 0.9,
    "centred": lambda o: not o["standardise"],
    "ddof 0": lambda o: o["ddof"] == 0 and o["standardise"],
    "eps 1e-4": lambda o: o["eps"] == 1e-4 and o["standardise"],
}
OCCURS |= {f"{P} prompts": lambda o, P=P: o["prompts"] == P for P in (1, 2, 3, 4)}
OCCURS |= {
    f"KL, {form}": lambda o, form=form: o["kl"] > 0 and o["form"] == form
    for form in ("paper", "matched", "midpoint")
}


@pytest.mark.parametrize("what", OCCURS)
def test_the_drawn_cases_have_everything(what):
    """What an implementation may get wrong occurs in one of them."""
    assert any(OCCURS[what](SETTINGS[name]) for name in DRAWN)


def test_drawn_cases_are_drawn_once():
    """The same seed, the same settings; there is one for every kernel and form."""
    assert vectors.drawn_cases(vectors.SEED) == {name: vectors.CASES[name] for name in DRAWN}
    assert vectors.drawn_cases(vectors.SEED + 1) != vectors.drawn_cases(vectors.SEED)
    seen = {(SETTINGS[name]["kernel"], SETTINGS[name]["form"]) for name in DRAWN}
    assert len(seen) == 9 and len(DRAWN) == 12


@pytest.mark.parametrize("name", vectors.CASES)
def test_rounding_decides_nothing(name, tensors):
    """No std is small, and no ratio so near to the bound that float32 could cut it."""
    setting = SETTINGS[name]
    for k in (1, *setting["factors"]):
        assert tensors[f"{name}/std_{k}"].min() >= vectors.LEAST_STD
        ratio, A = tensors[f"{name}/ratio_{k}"], tensors[f"{name}/advantages"]
        A = A.expand_as(ratio)
        bound = 1 + A.sign() * (setting["clip"] or 9.0)
        assert (A == 0).logical_or((ratio - bound).abs() > 1e-4).all()


# ---- Plain numpy, from the description alone -----------------------------------------------------


@pytest.fixture(scope="module")
def by_numpy(written):
    """Every output, computed from the inputs by numpy_vectors.py."""
    return numpy_vectors.recompute(written)


@pytest.mark.parametrize("name", vectors.CASES)
def test_numpy_reproduces_every_output(name, by_numpy, tensors):
    """To rounding: 5,000 of them, where 40 are usual."""
    inputs = vectors.input_names(SETTINGS[name])
    outputs = {key for key in tensors if key.rpartition("/")[0] == name}
    outputs -= {f"{name}/{key}" for key in inputs}
    assert {key for key in by_numpy if key.rpartition("/")[0] == name} == outputs
    for key in outputs:
        due = tensors[key].numpy()
        assert by_numpy[key].shape == due.shape, key
        error = np.abs(by_numpy[key] - due).max()
        assert error <= 1e-12 * max(vectors.LEAST_SIZE, np.abs(due).max()), key


# ---- Vectors that somebody else computed ---------------------------------------------------------


@pytest.fixture
def judged(written, tmp_path, capsys):
    """judged(arrays): status and lines of --compare for a file of them."""

    def judge(arrays, folder=written):
        file = tmp_path / "theirs.safetensors"
        numpy_vectors.save(arrays, file)
        status = oracle.main(["--compare", str(folder), str(file)])
        first, *lines = capsys.readouterr().out.splitlines()
        return status, [first.removeprefix(f"{file}: "), *lines]

    return judge


def test_what_numpy_computed_agrees(written, by_numpy, judged):
    """To float64; computed in float32, or cast to it, to float32."""
    status, (verdict, _, counted, missing, unknown) = judged(by_numpy)
    assert (status, verdict) == (0, "agrees to float64, in 1777 of 1777 tensors")
    assert counted.startswith(f"  tensors {len(by_numpy)} agree to float64 (within 1e-11), 0 to")
    assert counted.endswith(", 0 differ")
    assert (missing, unknown) == ("  missing none", "  unknown none")
    for arrays in (
        numpy_vectors.recompute(written, np.float32),
        {name: z.astype(np.float32) for name, z in by_numpy.items()},
    ):
        status, (verdict, worst, *_) = judged(arrays)
        assert (status, verdict) == (0, "agrees to float32, in 1777 of 1777 tensors")
        assert float(worst.split("off by ")[1].split()[0]) < 0.5 * vectors.TOLERANCE_FLOAT32


def test_float64_that_is_not_exact_is_said(by_numpy, judged):
    """Saved in float64 with an error beyond it: agrees to float32, and where it begins."""
    by_numpy = by_numpy | {"k = 5/x_s": by_numpy["k = 5/x_s"] + 1e-7}
    status, (verdict, _, beyond, counted, *_) = judged(by_numpy)
    assert (status, verdict) == (0, "agrees to float32, in 1777 of 1777 tensors")
    assert beyond.startswith("  first beyond float64   k = 5/x_s[0, 0, 0, 0]: theirs is ")
    assert ", 1 to float32 (1.2e-04), 0 differ" in counted


def planted(by_numpy, name, change):
    """Their arrays with one changed."""
    spoilt = by_numpy[name].copy()
    change(spoilt)
    return by_numpy | {name: spoilt}


def test_the_first_difference_is_named(by_numpy, tensors, judged):
    """In the order of the algorithm, which is not that of the names; its index and both numbers."""

    def late(z):
        z[1, 0] += 0.5

    def early(z):
        z[1, 1, 2, 0] = 7.5

    arrays = planted(by_numpy, "k = 5/grad_log_q", late)
    due = tensors["k = 5/grad_log_q"][1, 0].item()
    status, (verdict, first, cases, counted, *_) = judged(arrays)
    assert (status, verdict) == (1, "differs")
    theirs = arrays["k = 5/grad_log_q"][1, 0].item()
    assert first == f"  first   k = 5/grad_log_q[1, 0]: theirs is {theirs!r}, due is {due!r}"
    assert cases == "  cases   1 of 29 differ: k = 5" and counted.endswith(", 1 differ")

    arrays = planted(planted(arrays, "k = 5/x_s", early), "KL/loss", lambda z: z.fill(np.nan))
    _, (_, first, cases, counted, *_) = judged(arrays)
    due = tensors["k = 5/x_s"][1, 1, 2, 0].item()
    assert first == f"  first   k = 5/x_s[1, 1, 2, 0]: theirs is 7.5, due is {due!r}"
    assert cases == "  cases   2 of 29 differ: k = 5; KL" and counted.endswith(", 3 differ")
    due = tensors["KL/loss"].item()
    _, (_, first, *_) = judged({"KL/loss": arrays["KL/loss"]})
    assert first == f"  first   KL/loss: theirs is nan, due is {due!r}"


def test_a_difference_of_float32_size_is_none_and_a_larger_one_is(by_numpy, judged):
    """The tolerance is relative to the tensor's largest entry."""
    largest = np.abs(by_numpy["KL/grad_m"]).max()
    for part, status in ((0.9, 0), (1.1, 1)):
        off = part * vectors.TOLERANCE_FLOAT32 * largest
        assert judged({"KL/grad_m": by_numpy["KL/grad_m"] + off})[0] == status


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda z: z[:1], "[1, 1, 4] float64"),
        (lambda z: z.astype(np.float16), "[2, 1, 4] float16"),
        (lambda z: z.astype(np.int64), "[2, 1, 4] int64"),
    ],
)
def test_what_cannot_be_compared_differs(spoil, found, by_numpy, judged):
    """Another shape, or numbers of another kind."""
    name = "cps independent/advantages"
    status, (_, first, *_) = judged({name: spoil(by_numpy[name])})
    assert status == 1
    assert first == f"  first   {name}: theirs is {found}, due is [2, 1, 4], float32 or float64"


def test_missing_names_are_said_and_unknown_ones_fail(by_numpy, judged):
    """One output is enough, and inputs need not be there; a misspelt name is wrong."""
    one = {"KL/loss": by_numpy["KL/loss"], "KL/lost": by_numpy["KL/loss"]}
    status, (verdict, _, counted, missing, unknown) = judged(one)
    said = "names what no case has, and otherwise agrees to float64, in 1 of 1777 tensors"
    assert (status, verdict) == (1, said)
    assert counted.startswith("  tensors 1 agree to float64")
    assert missing.startswith(f"  missing {len(by_numpy) - 1} (flow_sde from t = 1/call_0_x, ")
    assert missing.endswith(", ...)") and unknown == "  unknown 1 (KL/lost)"


def test_no_hash_stands_in_the_way(folder, by_numpy, judged, capsys):
    """Neither that of the golden file nor another's."""

    def of_another(described):
        described["sha256"] = "0"

    assert described_as(folder, of_another) == 1  # --check-vectors does look at it
    capsys.readouterr()
    assert judged(by_numpy, folder)[0] == 0


def test_a_folder_of_theirs_serves_and_an_input_of_another_is_a_difference(written, folder, capsys):
    """vectors.safetensors in it; inputs that are repeated are compared, before all else."""
    assert oracle.main(["--compare", str(written), str(folder)]) == 0
    theirs = load_file(folder / "vectors.safetensors")
    theirs["KL/m"][0, 0] += 1
    save_file(theirs, folder / "vectors.safetensors")
    capsys.readouterr()
    assert oracle.main(["--compare", str(written), str(folder)]) == 1
    assert "  first   KL/m[0, 0]: theirs is " in capsys.readouterr().out


def test_nothing_to_compare_is_one_line_and_status_2(written, folder, tmp_path, tensors, capsys):
    """What is missing, unreadable, incomplete or of another version, on either side."""
    only_inputs, others, half = (tmp_path / name for name in ("inputs", "others", "half"))
    save_file({"KL/m": tensors["KL/m"]}, only_inputs)
    save_file({"mine": tensors["KL/m"]}, others)
    half.mkdir()
    (half / "vectors.json").write_bytes((written / "vectors.json").read_bytes())
    save_file({"KL/loss": tensors["KL/loss"]}, half / "vectors.safetensors")
    (tmp_path / "list").mkdir()
    (tmp_path / "list/vectors.json").write_text("[]")
    missing = tmp_path / "missing"
    for golden, theirs, said in (
        (written, missing, f"--compare {missing}: missing cannot be read"),
        (written, tmp_path / "list", f"--compare {tmp_path}/list: vectors.safetensors cannot be"),
        (written, written / "vectors.json", "vectors.json cannot be read"),
        (written, only_inputs, "must hold one output or more, named CASE/NAME; of its 1 none is"),
        (written, others, "must hold one output or more"),
        (missing, written, f"--compare {missing}: holds no vectors"),
        (tmp_path / "list", written, "version None; must be 2"),
        (half, written, f"--compare {half}: lacks flow_sde from t = 1/m, which its vectors.json"),
    ):
        assert oracle.main(["--compare", str(golden), str(theirs)]) == 2
        said_of_it = capsys.readouterr()
        assert said_of_it.out == "" and said_of_it.err.count("\n") == 1
        assert said in said_of_it.err
