"""Study B: what is run, what is kept, and going on where it stopped."""

import concurrent.futures
import io
import json
import threading
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import train
from zoo.study import training
from zoo.study.__main__ import main
from zoo.study.plan import PLANS, Run
from zoo.training.evaluate import main as judge

QUICK, LAPTOP = PLANS["quick"], PLANS["laptop"]


class Programs:
    """In the place of the programs of a run: what they are asked, and a result by flags."""

    def __init__(self, fail_at=None):
        self.asked, self.fail_at, self.failed = [], fail_at, threading.Event()

    def __call__(self, arguments, threads):
        words = list(arguments)
        if words[0] == "train.py":
            self.asked.append(words)
            number = len(self.asked)
            if number == self.fail_at:
                self.failed.set()
                raise training.Failed("train.py: it failed")
            if self.fail_at and number == self.fail_at - 1:
                self.failed.wait(timeout=60)  # it is under way when the next one fails
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True)
            lr = float(words[words.index("--lr") + 1])
            summary = {"seconds": 1.0, "device": "cpu", "versions": {}}
            (out / "summary.json").write_text(json.dumps(summary))
            (out / "config.json").write_text(json.dumps({"lr": lr, "out": str(out)}))
            (out / "metrics.jsonl").write_text('{"reward": 0.5}\n{"heldout_right": 0.5}\n')
            (out / "checkpoint.safetensors").write_text(str(lr))
            return ""
        assert words[:2] == ["-m", "zoo.training.evaluate"]
        steps = words[words.index("--eval-steps") + 1 :]
        shipped = words[2].endswith("shapes.safetensors")
        # The middle rate is the best, so that the search has something to find.
        score = (
            0.5
            if shipped
            else {1e-4: 0.6, 2e-4: 0.7, 4e-4: 0.65}[float(Path(words[2]).read_text())]
        )
        means = {n: {"right": score, "rule": score} for n in steps}
        return json.dumps({"heldout": means, "family": {}, "diversity": 0.2})


def lines_of(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_study_that_failed_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """What had finished, also beside the run that failed, is not run again; nothing is missing."""
    path = tmp_path / "lines.jsonl"
    broken, whole = Programs(fail_at=12), Programs()
    monkeypatch.setattr(training, "program", broken)
    with pytest.raises(training.Failed, match="it failed"):
        training.study(LAPTOP, path, workers=2, threads=1, stages=1)
    kept = lines_of(path)
    assert len(kept) == 1 + 11 and kept[0]["role"] == "before"
    monkeypatch.setattr(training, "program", whole)
    training.study(LAPTOP, path, workers=3, threads=1, stages=1)
    lines = lines_of(path)
    assert lines[: len(kept)] == kept and len(lines) == 1 + 18 + 36
    assert len(whole.asked) == len(lines) - len(kept)
    runs = [training.key(line) for line in lines[1:]]
    assert len(set(runs)) == len(runs)
    assert {run.lr for run in runs if run.role == "judged"} == {2e-4}
    assert sorted({run.seed for run in runs if run.role == "judged"}) == list(LAPTOP.seeds)
    training.study(LAPTOP, path, workers=1, threads=1, stages=1)
    assert lines_of(path) == lines


def test_a_run_that_ends_together_with_one_that_fails_is_kept(tmp_path, monkeypatch):
    """Whichever of those that are done at once is looked at first."""
    path = tmp_path / "lines.jsonl"

    def failures_first(waiting, return_when):
        done = sorted(concurrent.futures.wait(waiting).done, key=lambda run: not run.exception())
        return done, set()

    monkeypatch.setattr(training, "program", Programs(fail_at=2))
    monkeypatch.setattr(training, "wait", failures_first)
    with pytest.raises(training.Failed, match="it failed"):
        training.study(LAPTOP, path, workers=2, threads=1, stages=1)
    assert [line["role"] for line in lines_of(path)] == ["before", "search"]


def test_the_search_is_judged_with_the_first_number_of_steps_alone(tmp_path, monkeypatch):
    """And what counts with all of them; the rate of another arm needs no search."""
    monkeypatch.setattr(training, "program", Programs())
    path = tmp_path / "lines.jsonl"
    training.study(LAPTOP, path, workers=2, threads=1, stages=3)
    for line in lines_of(path):
        wanted = ["16"] if line["role"] == "search" else ["16", "8", "40"]
        assert list(line["heldout"]) == wanted
    more = [line for line in lines_of(path) if line.get("arm") == "k1 more"]
    assert {line["role"] for line in more} == {"judged"} and {z["lr"] for z in more} == {2e-4}


def test_a_file_is_of_one_plan(tmp_path, monkeypatch):
    """Lines of another plan are refused before any work."""
    monkeypatch.setattr(training, "program", lambda *_: pytest.fail("work started"))
    path = tmp_path / "lines.jsonl"
    path.write_text('{"plan": "laptop", "role": "before"}\n')
    with pytest.raises(ValueError, match="line 1: is of the plan 'laptop', must be of 'quick'"):
        training.study(QUICK, path, 1, 1, 1)
    for text in ('{"plan": "quick"', '{"iteration": 1}', "3"):
        path.write_text('{"plan": "quick", "role": "before"}\n' + text)
        with pytest.raises(ValueError, match="line 2: must be a line of a study; remove it"):
            training.study(QUICK, path, 1, 1, 1)
    run = {"plan": "quick", "role": "judged", "arm": "k1", "lr": 2e-4, "seed": 200}
    words = training.command_of(QUICK, Run("judged", "k1", 2e-4, 200), threads=7)
    for changed, said in (("--factors", "must be what the plan has"), ("--seed", "must be what")):
        command = " ".join(["python", "train.py", *words]).replace(changed, "--other")
        path.write_text(json.dumps(run | {"command": command}) + "\n")
        with pytest.raises(ValueError, match=said):
            training.study(QUICK, path, 1, 1, 1)
    path.write_text(json.dumps(run | {"command": " ".join(["python", "train.py", *words])}) + "\n")
    assert len(training.read(path, QUICK)) == 1


def test_a_run_that_diverges_counts_as_registered(monkeypatch):
    """Every outcome 0, said so; any other failure is one."""
    for said, kind in (
        ("rewards: 3 of 4 are not finite", training.Diverged),
        ("no", training.Failed),
    ):
        program = ["-c", f"import sys; sys.exit({said!r})"]
        with pytest.raises(kind) as stop:
            training.program(program, 1)
        assert type(stop.value) is kind

    def diverging(arguments, threads):
        raise training.Diverged("it is not finite")

    monkeypatch.setattr(training, "program", diverging)
    line = training.execute(QUICK, Run("judged", "k1", 2e-4, 200), 1)
    assert line["heldout"] == {"2": {"right": 0.0, "rule": 0.0}}
    assert line["diverged"] == "it is not finite" and line["seed"] == 200


def test_what_a_program_says_last_is_said():
    """A status other than 0 is a failure with the program's own words."""
    with pytest.raises(
        training.Failed, match=r"train\.py --steps 0: .*--steps 0: must be 1 or more"
    ):
        training.program(["train.py", "--steps", "0"], 1)


class Here:
    """In the place of a pool of threads: work is done when it is given, in this one."""

    def __init__(self, workers):
        assert workers >= 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, job, *given):
        future = concurrent.futures.Future()
        future.set_result(job(*given))
        return future


@pytest.fixture
def mostly_here(monkeypatch):
    """The first of each program is started as one; the others run here, where imports are done."""
    plain, started = training.program, set()

    def program(arguments, threads):
        words = list(arguments)
        main, given = (train.main, words[1:]) if words[0] == "train.py" else (judge, words[2:])
        if main not in started:
            started.add(main)
            return plain(arguments, threads)
        with redirect_stdout(io.StringIO()) as said:
            main(given)
        return said.getvalue()

    monkeypatch.setattr(training, "program", program)
    monkeypatch.setattr(training, "ThreadPoolExecutor", Here)  # signals are the main thread's


@pytest.mark.usefixtures("one_process", "no_pictures", "mostly_here")
def test_the_quick_study_runs(tmp_path, capsys):
    """The real programs, end to end; every line with its whole configuration; then the report."""
    path = tmp_path / "train-quick.jsonl"
    main(["train", "--plan", "quick", "--out", str(path)])
    lines = lines_of(path)
    assert [line["role"] for line in lines] == ["before", "search", *["judged"] * 4]
    for line in lines[1:]:
        config = line["config"]
        assert (config["seed"], config["lr"]) == (line["seed"], line["lr"])
        assert config["form"] == ("midpoint" if line["arm"] == "midpoint" else "paper")
        assert config["factors"] == [] and config["iterations"] == 1 and "out" not in config
        assert line["command"].startswith("python train.py")
        assert bool(line["commit"]) == (training.ROOT / ".git").exists()
        assert len(line["rewards"]) == 1 and list(line["heldout"]) == ["2"]
    main(["report", "--plan", "quick", "--results", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| midpoint | 0.0002 | 2 |" in out and "**midpoint − k = 1** (decides: p = " in out


BAD = {
    "train --workers 0": "--workers 0: must be from 1",
    "train --threads 0": "--threads 0: must be from 1",
    "train --stages 6": "--stages 6: must be from 1 to 5",
    "gradients --threads -1": "--threads -1: must be 0 or more",
    "report --results nowhere": "--results nowhere: must hold results of the plan laptop",
}


@pytest.mark.parametrize(("words", "said"), BAD.items())
def test_bad_input_is_one_line_and_status_2(words, said, capsys, monkeypatch):
    """Before any work."""
    monkeypatch.setattr(training, "program", lambda *_: pytest.fail("work started"))
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and said in err
