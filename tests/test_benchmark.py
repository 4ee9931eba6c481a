"""The benchmark: what it computes of its timings, by hand; that every section measures."""

import json
import math

import benchmark
import pytest
import torch
from benchmark import Bench, Null, Row
from slow import observations, slow_transition

import pave_grpo as pave
from zoo.training.options import Options, policy_of
from zoo.training.prompts import Prompts
from zoo.training.ranks import Ranks

CPU = torch.device("cpu")


class Pictures(Null):
    """States as pictures, for the rule."""

    def decode(self, x):
        return x.sigmoid()


@pytest.fixture
def bench():
    """Small sizes, and a network that costs nothing."""
    o = Options(**{**benchmark.AUTHORS, "reward": (benchmark.WARMTH,)})
    policy = Pictures(policy_of(Options()), CPU)
    return Bench(o, policy, Ranks(0, 1, CPU), 1, Prompts())


# ---- Arithmetic ----------------------------------------------------------------------------------


def test_jobs_take_turns(monkeypatch):
    """Once each before the clock, then in an order of each round; a job's seconds are its own."""
    clock, said = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def job(name, seconds):
        def run():
            said.append(name)
            clock[0] += seconds

        return run

    jobs = {"a": job("a", 1.0), "b": job("b", 2.0), "c": job("c", 4.0)}
    found = benchmark.timed(jobs, 4, CPU, "")
    rounds = ["".join(said[i : i + 3]) for i in range(0, len(said), 3)]
    assert len(rounds) == 5 and rounds[0] == "abc"
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds[1:])) > 1
    assert found == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [4.0] * 4}


def test_a_ratio_is_of_one_round():
    """Rounds on a busy machine are slow in both; the median of quotients does not see it."""
    row = benchmark.row_of("x", benchmark.ratios([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]))
    assert (row.value, row.low, row.high) == (2.0, 2.0, 3.0)
    shown = benchmark.shown(row._replace(unit="ms", beside="counted 2"))
    assert shown.endswith(" 2 (2 to 3) ms  counted 2")


def test_slopes():
    """Of seconds that grow as a power of the size it is the power."""
    for power in (0.5, 1.0, 2.0):
        assert math.isclose(benchmark.slope([1, 2, 4], [3 * n**power for n in (1, 2, 4)]), power)


# ---- Sections ------------------------------------------------------------------------------------


def test_every_section_measures(bench):
    """Rows with numbers, and the figures that are counts are those counted by hand."""
    rows = {name: list(section(bench)) for name, section in benchmark.SECTIONS.items()}
    for own in rows.values():
        assert own and all(isinstance(row, Row) and math.isfinite(row.value) for row in own)
    named = {row.name: row for own in rows.values() for row in own}
    assert named["waits of a rollout"].value == 0
    assert named["waits of an update in 4 passes"].value == 4 + 2  # metrics of all, and the norm
    # 16 steps, of which 0, 2, 4, 6 branch to 12: 7 + 12 (15 + 13 + 11 + 9) = 583 rows. Trained are
    # 4 states by 1, or by 1 + 1 + 2, evaluations of 3 forwards each: 595 and 631.
    assert named["iteration, S = {2, 3}"].beside == (
        f"counted {631 / 595:.3f}; checkpointed {647 / 599:.3f}, paper 1.085"
    )
    # From step 1 of 8 to the end 6 steps of 24 members, or 3; both anchors take 2.
    faster = named["rollouts faster by, stride 2, order 1"]
    assert faster.beside.startswith(f"counted {(2 + 6 * 24) / (2 + 3 * 24):.2f}; reward ")
    assert named["rollouts faster by, stride 1, order 2"].beside.startswith("counted 1.00; ")
    assert all(row.value < 1e-3 for row in rows["gradients"])


def test_what_is_made_of_known_seconds(bench, monkeypatch):
    """An update of S = {} in 2 s, 1.5 s an added evaluation; shares of an iteration of 8 s."""
    seconds = {"{}": 2.0, "{2}": 3.5, "{2, 3}": 6.5, "{2, 3, 4}": 11.0, "{2, 3, 4, 5}": 17.0}
    seconds |= {"midpoint": 1.0, "at once": 3.25}
    monkeypatch.setattr(bench, "timed", lambda jobs, said: {name: [seconds[name]] for name in jobs})
    values = [row.value for row in benchmark.update(bench)]
    assert values == [1.75, 0.75, 3.25, 0.75, 5.5, 0.75, 8.5, 0.75, 0.5, 0.5]
    seconds |= {"{2, 3}": 8.0, "free": 1.0, "decode and reward": 2.0, "optimiser": 0.5}
    values = [row.value for row in benchmark.iteration(bench)]
    assert values == [2.0, 1.75, 4.0, 5.5, 8.5, 0.5, 0.125, 0.25, 0.0625]


@pytest.mark.parametrize("factor", [1.01, -1.0])
def test_nothing_is_timed_on_a_wrong_gradient(factor, bench, monkeypatch, capsys):
    """A loss that is off by a hundredth, or climbs down, ends the benchmark."""
    plain = pave.policy_loss

    def wrong(*args, **options):
        result = plain(*args, **options)
        return result._replace(loss=factor * result.loss)

    monkeypatch.setattr(pave, "policy_loss", wrong)
    with pytest.raises(SystemExit) as stop:
        list(benchmark.gradients(bench))
    assert stop.value.code == 2 and "gradients differ by" in capsys.readouterr().err


def test_the_slow_loop_asks_on_the_device_of_its_states():
    """Times and prompts lie beside x: what a released network is told is not moved."""
    devices = set()

    def velocity(x, t, prompt):
        devices.update((x.device.type, t.device.type, prompt.device.type))
        return x

    far = torch.zeros(1, 1, 2, 3, device="meta")
    process = pave.Process([0.8, 0.4])
    rollout = pave.Rollout(process, (0,), far[:, :, :1], far, far[..., 0], far)
    for step in observations(rollout):
        slow_transition(velocity, process, 3, step)
    assert devices == {"meta"}


def test_the_reward_of_a_shorter_way():
    """How far it is from the whole grid's, and whether members stand in the same order."""
    whole = torch.tensor([[[0.0, 1.0, 2.0]]])
    assert benchmark.compared(whole + 0.5, whole) == "reward 1.500, apart 0.500, cosine 1.00"
    assert benchmark.compared(2 - whole, whole) == "reward 1.000, apart 1.333, cosine -1.00"


# ---- The program ---------------------------------------------------------------------------------


def test_text_and_json_say_the_same(tmp_path, capsys):
    """Of the embedded model: every row is in both, and the machine."""
    file = tmp_path / "costs.json"
    words = f"--sections waits network --rounds 1 --threads 1 --device cpu --json {file}"
    benchmark.main(words.split())
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    assert list(written["rows"]) == ["gradients", "waits", "network"]
    for own in written["rows"].values():
        for row in own:
            assert benchmark.shown(Row(**row)) in printed
    about = written["about"]
    assert about["torch"] == torch.__version__ and about["threads"] == 1
    assert about["parameters"] > about["trained"] > 0 and "load at the end" in about
    assert about["options"]["steps"] == 16 and about["options"]["compile"] is False
    shares = [row["value"] for row in written["rows"]["network"] if "share" in row["name"]]
    assert len(shares) == 4 and all(share > 0 for share in shares)


@pytest.mark.parametrize(
    "words, named",
    [
        ("--rounds 0", "--rounds 0: must be 1 or more"),
        ("--sections speed", "speed"),
        ("--compile", "must be left out without --model"),
        ("--size 32 32", "--size"),
        ("--tune lora", "--tune lora: must be transformer or full without --model"),
        ("--json no/such/folder.json", "--json no/such/folder.json: must be a file in a folder"),
        ("--iterations 3", "--iterations"),
    ],
)
def test_bad_options_give_one_line(words, named, capsys):
    """And status 2."""
    with pytest.raises(SystemExit) as stop:
        benchmark.main(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and named in err
