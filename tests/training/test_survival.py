"""Runs that go on: bit for bit, whatever interrupted them; numbers that are not finite."""

import json
import math
import os
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from zoo.rewards import spec
from zoo.shapes import model as shapes_model
from zoo.shapes.model import CHECKPOINT
from zoo.training import checkpoints, command_line

pytestmark = pytest.mark.usefixtures("one_process", "no_pictures", "small_network")
SHORT = shlex.split(
    "--prompts-per-iteration 2 --group-size 3 --steps 3 --sde-steps 0 1 --device cpu "
    "--reward zoo.rewards.example:warmth --heldout 4 --eval-steps 1 --save-every 1"
)


def run(*flags):
    train.main([*SHORT, *flags])


def lines_of(out):
    """Of metrics.jsonl, without the clock."""
    lines = [json.loads(text) for text in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def tensors_of(out, done):
    """All of a checkpoint but torch's generators, which a run does not use."""
    folder = checkpoints.place_of(Path(out), done)
    paths = [path for path in folder.rglob("*.safetensors") if path.name != "random.safetensors"]
    return {(path.name, k): z for path in paths for k, z in load_file(path).items()}


def assert_same_run(a, b, done):
    assert lines_of(a) == lines_of(b)
    ours, theirs = tensors_of(a, done), tensors_of(b, done)
    assert ours.keys() == theirs.keys() and len(ours) > 80
    assert all(torch.equal(z, theirs[k]) for k, z in ours.items())


MANY = "--optimizer adamw --ema 0.9 --updates 2 --kl 0.1 --warmup 3 --compare-every 2"
OTHERS = "--optimizer sgd --lr 10 --tune full --eval-every 1 --step-weights noise --window-every 1"


@pytest.mark.parametrize("flags", [MANY, OTHERS])
def test_two_and_two_are_four(flags):
    """Weights, moments, average and metrics of two iterations and two more, bit for bit."""
    run(*flags.split(), "--iterations", "4", "--out", "whole")
    run(*flags.split(), "--iterations", "2", "--out", "parts")
    train.main(["--resume", "parts", "--iterations", "4"])
    assert_same_run("whole", "parts", 4)
    compared = Path("whole/compare.jsonl")
    if compared.exists():
        assert compared.read_text() == Path("parts/compare.jsonl").read_text()
    whole, parts = (json.loads(Path(out, "summary.json").read_text()) for out in ("whole", "parts"))
    for name in ("heldout", "diversity", "iterations", "interrupted"):
        assert whole[name] == parts[name]
    assert Path("parts/before_after.png").exists() and parts["seconds"] > 0


def test_what_was_done_after_the_last_checkpoint_is_done_again(monkeypatch):
    """A run that dies in its third iteration; lines that are in no checkpoint are dropped."""
    run("--iterations", "4", "--save-every", "2", "--out", "whole")
    plain = train.iterate

    def dying(o, iteration, *more):
        if iteration == 4:
            raise MemoryError
        return plain(o, iteration, *more)

    monkeypatch.setattr(train, "iterate", dying)
    with pytest.raises(MemoryError):
        run("--iterations", "4", "--save-every", "2", "--out", "dead")
    assert len(lines_of("dead")) == 1 + 3 and checkpoints.saved(Path("dead")) == [2]
    monkeypatch.setattr(train, "iterate", plain)
    train.main(["--resume", "dead"])
    assert_same_run("whole", "dead", 4)


def test_a_run_without_a_checkpoint_starts_again(capsys):
    """It had been interrupted before its first."""
    run("--iterations", "1", "--out", "whole")
    Path("begun").mkdir()
    Path("begun/config.json").write_text(Path("whole/config.json").read_text())
    Path("begun/metrics.jsonl").write_text('{"iteration": 0, "seconds": 1}\n')
    train.main(["--resume", "begun"])
    assert (
        "going on from the beginning, since there is no checkpoint yet" in capsys.readouterr().out
    )
    assert_same_run("whole", "begun", 1)


def test_a_judgement_can_be_interrupted(monkeypatch):
    """What is judged is saved before; the run goes on with the judgement."""
    flags = ["--iterations", "2", "--eval-every", "1", "--ema", "0.5"]
    run(*flags, "--out", "whole")
    plain, judged = train.Run.judge, []

    def interrupting(self, iteration, when=""):
        judged.append(iteration)
        if iteration == 1 and judged.count(1) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, iteration, when)

    monkeypatch.setattr(train.Run, "judge", interrupting)
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--out", "parts")
    assert stop.value.code == 3 and [line["iteration"] for line in lines_of("parts")] == [0, 1]
    train.main(["--resume", "parts"])
    assert judged == [0, 1, 1, 2]
    assert_same_run("whole", "parts", 2)


def test_the_last_two_and_the_best_checkpoint_stay(monkeypatch):
    """The best by the first judge's held-out mean."""
    means = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6])

    def judge_heldout(o, policy, judges, data, steps, ranks, listen):
        own = {"right": next(means), "rule": 0.0}
        return {"heldout": {str(n): own for n in steps}, "family": {}, "diversity": 0.0}

    monkeypatch.setattr("zoo.training.run.judge_heldout", judge_heldout)
    run("--iterations", "6", "--eval-every", "1", "--out", "run")
    assert checkpoints.saved(Path("run")) == [2, 5, 6]
    assert os.readlink("run/checkpoint.safetensors") == "checkpoints/000006/checkpoint.safetensors"


def test_a_spoiled_checkpoint_is_named_and_the_one_before_is_used(capsys):
    """A flipped byte; where none is whole the run is refused."""
    run("--iterations", "3", "--out", "whole")
    run("--iterations", "3", "--out", "run")
    newest, before = (checkpoints.place_of(Path("run"), n) for n in (3, 2))
    flip(newest / "state/00000.safetensors")
    train.main(["--resume", "run"])
    said = capsys.readouterr().out
    assert "run/checkpoints/000003: skipped, since state/00000.safetensors is not what" in said
    assert "going on from run/checkpoints/000002" in said
    assert_same_run("whole", "run", 3)
    flip(newest / "state.json")
    (before / "manifest.json").write_text("")
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "run"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "no checkpoint is whole; run/checkpoints/000003" in err


def flip(path):
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


REFUSED = {  # what is given beside --resume run, and what the line says
    "--seed 1": "--seed 1: must be 0, as in run/config.json, or left out",
    "--factors": "--factors: must be 2 3, as in run/config.json, or left out",
    "--lr 0.1": "--lr 0.1: must be 0.0002",
    "--out there": "--out there: must be left out",
    "--save-every -1": "--save-every -1: must be 0 or more",
    "--iterations 1": "must have --iterations 2 or more, which are done",
}


def test_what_may_change_and_what_may_not(capsys):
    """What changes a number is refused by name with both values; the rest is taken."""
    run("--iterations", "2", "--max-grad-norm", "inf", "--out", "run")
    capsys.readouterr()
    for flags, said in REFUSED.items():
        with pytest.raises(SystemExit) as stop:
            train.main(["--resume", "run", *flags.split()])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and err.count("\n") == 1, err
    free = "--seed 0 --max-grad-norm inf --threads 1 --update-batch 1 --rollout-batch 2"
    o = command_line.parse(["--resume", "run", *free.split(), "--iterations", "9"])
    assert (o.update_batch, o.iterations, o.save_every, o.max_grad_norm) == (1, 9, 1, math.inf)
    for given in ("nowhere", "run/checkpoints", "run/config.json"):
        with pytest.raises(SystemExit):
            command_line.parse(["--resume", given])
        assert f"--resume {given}: must be the folder of a run" in capsys.readouterr().err


def test_a_run_is_not_gone_on_with_as_another(capsys):
    """Another option in its file, other prompts, weights of a version without checkpoints."""
    run("--iterations", "1", "--out", "run")
    config = Path("run/config.json")
    plain = config.read_text()

    def refused(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main(["--resume", "run", *flags])
        assert stop.value.code == 2
        return capsys.readouterr().err

    config.write_text(plain.replace('"seed": 0', '"seed": 1'))
    assert "seed in config.json is 1, must be 0 as in run/checkpoints/000001" in refused()
    config.write_text(plain)
    state = checkpoints.place_of(Path("run"), 1)
    shutil.rmtree(state.parent)
    shutil.copyfile(CHECKPOINT, "here.safetensors")
    Path("run/checkpoint.safetensors").unlink()
    shutil.copyfile("here.safetensors", "run/checkpoint.safetensors")
    assert "has checkpoint.safetensors and no checkpoints/: must be a run of this" in refused()
    assert len(lines_of("run")) == 3  # nothing was touched


def test_other_prompts_are_another_run(capsys):
    """The files may lie elsewhere; their prompts may not differ."""
    Path("train.txt").write_text("a red circle\n")
    Path("heldout.txt").write_text("two blue squares\n")
    files = ["--prompts", "train.txt", "--eval-prompts", "heldout.txt"]
    run(*files, "--iterations", "1", "--out", "run")
    Path("train.txt").write_text("a red square\n")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main(["--resume", "run"])
    assert "its prompt files must be what they were" in capsys.readouterr().err


def test_room_is_looked_for_before_anything_is_loaded(monkeypatch, capsys):
    """On the disk of the run's folder; in a dry run too."""
    monkeypatch.setattr(shapes_model, "CHECKPOINT", CHECKPOINT)  # the small one needs too little
    usage = SimpleNamespace(free=10**6)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(train, "loaded", lambda *_: pytest.fail("it was loaded"))
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as stop:
            run("--out", "run", *more)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1
        assert "--out run: its disk has 0.00 GiB free, must have 0.01 for a checkpoint" in err


HOSTILE = ["", "[]", "null", '{"seed": "1"}', '{"seed": true}', '{"seed": NaN}', '{"sede": 1}']
HOSTILE += ['{"factors": 2}', '{"factors": [2.5]}', '{"lr": "1e-4"}', '{"lr": [1.0]}', "\0"]


@pytest.mark.parametrize("content", HOSTILE)
def test_a_file_of_options_that_is_none_is_one_line(content, capsys):
    """Whatever it holds."""
    Path("run").mkdir()
    Path("run/config.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        command_line.parse(["--resume", "run"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "run/config.json: " in err and err.count("\n") == 1


# ---- Numbers that are not finite -----------------------------------------------------------------


def strict(path):
    """What strict JSON a file holds."""

    def refuse(name):
        raise AssertionError(name)

    return [json.loads(text, parse_constant=refuse) for text in Path(path).read_text().splitlines()]


@pytest.fixture
def poison(monkeypatch):
    """poison(third): --reward here:poison, whose third scores `third` makes of good ones."""
    plain = spec.load

    def made(third, prompts=None):
        calls = []

        def reward(images, asked):
            calls.append(asked)
            scores = torch.arange(len(asked)) % 2 + 1.0
            if len(calls) == 1 + 3:  # the first was a trial
                own = [prompts is None or prompt in prompts for prompt in asked]
                scores = torch.where(torch.tensor(own), third(scores), scores)
            return scores

        monkeypatch.setattr(
            spec, "load", lambda s, on: reward if s.name == "here:poison" else plain(s, on)
        )
        return calls

    return made


REWARDED = ["--reward", "here:poison", "--iterations", "4"]


def nan(scores):
    return scores * math.nan


def infinite(scores):
    return torch.where(scores > 1, -math.inf, scores)


def huge(scores):
    """Of these no mean can be taken in float32."""
    return 3e38 * (3 - 2 * scores)


@pytest.mark.parametrize(
    ("third", "said"),
    [(nan, "reward 'here:poison'"), (infinite, "reward 'here:poison'"), (huge, "an advantage")],
)
def test_a_poisoned_reward_stops_the_run_by_name(third, said, poison, capsys):
    """Before the weights move; what was there is kept, and the values are in a file."""
    poison(third)
    with pytest.raises(SystemExit) as stop:
        run(*REWARDED, "--out", "run")
    err = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and f"iteration 3: {said}" in err and "not finite" in err
    report = json.loads(Path("run/not_finite.json").read_text())
    assert report["iteration"] == 3 and report["prompt"] in err and report["values"]
    assert checkpoints.saved(Path("run")) == [1, 2]
    assert all(z.isfinite().all() for z in tensors_of("run", 2).values())
    assert len(strict("run/metrics.jsonl")) == 3
    assert json.loads(Path("run/summary.json").read_text())["interrupted"]


@pytest.mark.parametrize("third", [infinite, huge])
def test_a_poisoned_group_can_be_skipped(third, poison, capsys):
    """It is counted, and is worth as much as one whose rewards are all equal; the rest learns."""
    skipping = [*REWARDED, "--poisoned", "skip"]
    first = poison(third, prompts=())
    run(*skipping, "--out", "sound")
    one = first[3][0]  # a prompt of the third iteration
    poison(third, prompts=(one,))
    run(*skipping, "--out", "skipped")
    said = capsys.readouterr().err
    poison(torch.ones_like, prompts=(one,))
    run(*skipping, "--out", "equal")
    lines = {out: strict(f"{out}/metrics.jsonl") for out in ("sound", "skipped", "equal")}
    shares = {out: [z.get("poisoned_groups") for z in own] for out, own in lines.items()}
    assert shares["sound"] == shares["equal"] == [None, 0, 0, 0, 0, None]
    assert shares["skipped"] == [None, 0, 0, 0.5, 0, None] and "groups skipped=" in said
    assert lines["skipped"][3]["reward"] == 1.5  # of the other group, 1 and 2 in turn
    assert lines["equal"][3]["grad_norm"] == lines["skipped"][3]["grad_norm"] > 0
    ours, theirs = tensors_of("skipped", 4), tensors_of("equal", 4)
    assert all(torch.equal(z, theirs[k]) for k, z in ours.items())


def test_a_run_in_which_every_group_is_poisoned_stops(poison, capsys):
    """There is nothing left to learn from, whatever was asked for."""
    poison(nan)
    with pytest.raises(SystemExit) as stop:
        run(*REWARDED, "--poisoned", "skip", "--out", "run")
    assert stop.value.code == 1 and "iteration 3: reward" in capsys.readouterr().err


def test_a_run_that_diverges_stops_before_it_saves(capsys):
    """At a rate of a million; nothing that is not finite is ever in a checkpoint."""
    with pytest.raises(SystemExit) as stop:
        run("--iterations", "9", "--lr", "1e6", "--warmup", "0", "--out", "run")
    err = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "not finite" in err and "iteration " in err
    report = json.loads(Path("run/not_finite.json").read_text())
    assert report["quantity"] in err
    for done in checkpoints.saved(Path("run")):
        assert done < report["iteration"]
        assert all(z.isfinite().all() for z in tensors_of("run", done).values())
    strict("run/metrics.jsonl")


@pytest.mark.parametrize(("what", "keeps"), [("a sample", 1), ("the loss", 1), ("gradient", 1)])
def test_no_update_is_made_of_what_is_not_finite(what, keeps, monkeypatch, capsys):
    """A sample, a loss or a gradient: the weights of the iteration before are the last saved."""
    plain = {name: getattr(train, name) for name in ("score", "gradient")}
    rollout = train.ROLLOUTS["shared_anchor"]
    calls = []

    def spoiled_rollout(*given):
        found = rollout(*given)
        calls.append(1)
        return found._replace(x_0=found.x_0 * math.nan) if len(calls) == 2 else found

    def spoiled_loss(*given):
        found = plain["score"](*given)
        calls.append(1)
        return found | {"loss": math.inf} if len(calls) == 2 else found

    def spoiled_gradient(o, policy, ranks):
        calls.append(1)
        if len(calls) == 2:
            policy.tuned[3].grad[0] = math.nan
        return plain["gradient"](o, policy, ranks)

    if what == "a sample":
        monkeypatch.setitem(train.ROLLOUTS, "shared_anchor", spoiled_rollout)
    elif what == "the loss":
        monkeypatch.setattr(train, "score", spoiled_loss)
    else:
        monkeypatch.setattr(train, "gradient", spoiled_gradient)
    with pytest.raises(SystemExit) as stop:
        run("--iterations", "3", "--out", "run")
    err = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "iteration 2: " in err and what in err
    assert checkpoints.saved(Path("run")) == [keeps]
    assert all(z.isfinite().all() for z in tensors_of("run", keeps).values())
