"""Every flag of the oracle reaches what it names, and every way to run it returns its status.

`main` runs with stand-ins for the claims, the judge, the vectors and the pictures. A new flag
without an entry fails the first test.
"""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import verify_equivalence as oracle
from zoo.oracle import bench, options
from zoo.oracle.claims import Claims
from zoo.oracle.findings import HOLDS, INCONCLUSIVE, REFUTED
from zoo.shapes import model as shapes_model

# Flag: what is typed, and what is seen: of the bench, the names run, or what was called.
REPORT = {
    "claims": ("--claims E5 E10", ["E5", "E10"]),
    "kernels": ("--kernels dance cps", ("dance", "cps")),
    "factors": ("--factors 4 2", (2, 4)),
    "seed": ("--seed 7", 7),
    "device": ("--device cpu", "cpu"),
    "rows": ("--rows", True),
    "compare": ("--compare", ["dance", "cps"]),
    "json": ("--json told.json", True),
    "plots": ("--plots drawn", Path("drawn")),
}
ELSEWHERE = {"model", "prompt", "dtype", "size", "verdicts"}
ELSEWHERE |= {"vary_seed", "against", "time_limit", "vectors", "check_vectors", "compare_vectors"}


def test_no_flag_is_forgotten():
    """Each is in the table, or in a test below."""
    parsed = vars(options.parse([], oracle.CLAIMS, ""))
    assert REPORT.keys() | ELSEWHERE == parsed.keys()


class StandIns:
    """What `main` would call, noting how it was called."""

    def __init__(self, monkeypatch, rows=()):
        self.rows, self.calls = list(rows), []
        monkeypatch.setattr(Claims, "run", self.run)
        for module, name, answer in (
            (oracle.judging, "main", 11),
            (oracle.vectors, "main", 12),
            (oracle.vectors, "judge", 13),
            (oracle, "compare", [{"line": 1}]),
            (oracle, "show_comparison", "the comparison"),
            (oracle, "draw_figures", ["a picture"]),
            (oracle.numerics, "measure", []),
            (oracle.report, "front_page", "the front page"),
            (oracle.report, "every_row", "every row"),
            (oracle.report, "show_estimates", "estimates"),
            (oracle.report, "to_json", "told"),
            (oracle.report, "verdicts", "the page"),
            (oracle.report, "failure_rate", "the rate"),
        ):
            monkeypatch.setattr(module, name, self.noted(name, answer))

    def noted(self, name, answer):
        def stand_in(*given):
            self.calls.append((name, *given))
            return answer

        return stand_in

    def run(self, bench, names):
        self.calls.append(("run", bench, list(names)))
        return self.rows

    def given(self, name):
        """The arguments of every call."""
        return [given for called, *given in self.calls if called == name]


@pytest.fixture
def main(monkeypatch, tmp_path):
    """main(flags, rows): (status, the stand-ins), run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def ran(flags, rows=()):
        stand_ins = StandIns(monkeypatch, rows)
        return oracle.main(flags.split()), stand_ins

    return ran


@pytest.fixture
def whole(main, capsys):
    """{flag: what is seen of it} in one report with all the flags of the table REPORT."""
    status, seen = main(" ".join(typed for typed, _ in REPORT.values()))
    assert status == 0
    ((used, names),), said = seen.given("run"), capsys.readouterr().out
    (told,), (drawn,) = seen.given("to_json"), seen.given("draw_figures")
    table = [{"line": 1}, {"line": 1}]  # one line of each kernel
    assert told == [[], oracle.CLAIMS, used, table, []] and drawn[:2] == [used, table]
    assert "the front page" in said and "look at a picture" in said and "estimates" not in said
    assert ("the comparison" in said) and seen.given("show_comparison") == [[table, used]]
    return {
        "claims": names,
        "kernels": used.kernels,
        "factors": used.factors,
        "seed": used.seed,
        "device": used.device.type,
        "rows": "every row" in said,
        "compare": [kernel for of, kernel in seen.given("compare") if of is used],
        "json": Path("told.json").read_text() == "told",
        "plots": drawn[2],
    }


@pytest.mark.parametrize("flag", REPORT)
def test_a_flag_of_the_report_arrives(flag, whole):
    """What is seen is what was typed."""
    assert whole[flag] == REPORT[flag][1]


def test_a_report_without_flags_is_of_everything_and_shows_no_more(main, capsys):
    """Every claim on the default bench; the front page, of those rows, and nothing else."""
    status, seen = main("")
    ((used, names),) = seen.given("run")
    assert status == 0 and names == list(oracle.CLAIMS) and used.factors == (2, 3, 5)
    assert capsys.readouterr().out == "the front page\n"
    (page,) = seen.given("front_page")
    assert page[:3] == [[], oracle.CLAIMS, used] and 0 <= page[3] < 60
    assert {name for name, *_ in seen.calls} == {"run", "front_page"}


@pytest.mark.parametrize(
    ("flags", "compares", "estimates"),
    [("--rows", 0, True), ("--compare", 3, True), ("--json f", 3, False), ("--plots d", 3, False)],
)
def test_what_a_whole_report_shows(flags, compares, estimates, main, capsys):
    """TRUTH's gradients beside the rows or the comparison; --json keeps the comparison too."""
    _, seen = main(flags)
    assert len(seen.given("compare")) == compares
    assert ("estimates" in capsys.readouterr().out) == estimates
    if flags == "--json f":
        _, seen = main("--json f --claims E5")
        assert not seen.given("compare") and seen.given("to_json")[0][3] == []


def test_the_page_of_verdicts_is_of_all_claims(main):
    """Written where it was asked for."""
    _, seen = main("--verdicts page.md")
    assert Path("page.md").read_text() == "the page"
    ((rows, claims, _),) = seen.given("verdicts")
    assert rows == [] and claims is oracle.CLAIMS


def test_a_checkpoint_is_tested_as_asked(main):
    """On its weights, with its prompts, in its dtype, by the claims that can be."""
    network = shapes_model.load()
    with torch.no_grad():
        network.words.weight.mul_(2)
    shapes_model.save(network, "own.safetensors")
    words = ["--model", "own.safetensors", "--dtype", "bfloat16", "--prompt"]
    _, seen = main("--model own.safetensors --dtype bfloat16")
    ((used, names),) = seen.given("run")
    assert (used.model.path, used.model.dtype) == ("own.safetensors", torch.bfloat16)
    assert names == ["E1", "E2", "E6", "E7", "E9"] and used.model.size is None
    assert oracle.main([*words, "a red circle", "two blue squares"]) == 0
    used = seen.given("run")[-1][0]
    assert used.model.prompts == ("a red circle", "two blue squares")
    moved = used.fixture("embedded").field.model.words.weight.float()
    assert torch.allclose(moved, 2 * shapes_model.load().words.weight, rtol=1e-2)
    _, seen = main("--model embedded")
    used = seen.given("run")[0][0]
    assert used.model.path == "" and used.model.dtype == torch.float32
    assert used.model.prompts == tuple(options.fields.PROMPTS)


def test_a_device_reaches_the_bench():
    """And what is made on it; the tests' own machine may have no other."""
    o = options.parse(["--kernels", "cps"], oracle.CLAIMS, "")
    o.device = "meta"
    used = options.bench_of(o)
    assert used.device.type == "meta" and used.normal(2, of="x").device.type == "meta"
    assert next(used.fixture("network").field.parameters()).device.type == "meta"


def test_a_pipeline_is_tested_at_its_size(main, monkeypatch, tmp_path):
    """A folder or a hub id is one; 512 x 512 where no size is asked."""
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    asked = []
    monkeypatch.setattr(bench.Bench, "_fixture", lambda self, name: asked.append(self.model))
    main("--model pipe --size 32 64 --prompt dog")
    main("--model owner/name")
    assert len(asked) == 2
    first, second = asked
    assert (first.path, first.size, first.prompts) == ("pipe", (32, 64), ("dog",))
    assert (second.path, second.size) == ("owner/name", (512, 512))


# ---- Other work, and the status of each ----------------------------------------------------------


def test_other_work_returns_its_own_status(main):
    """The judge's, with the seed or without; the vectors', written, checked or compared."""
    status, seen = main("--against mine:f --seed 5")
    assert status == 11 and seen.calls == [("main", "mine:f", 5, None, None)]
    status, seen = main("--against mine:f --time-limit 9 --json a.json")
    assert status == 11 and seen.calls == [("main", "mine:f", None, 9.0, "a.json")]
    status, seen = main("--vectors new")
    assert status == 12 and seen.calls == [("main", "new", None)]
    status, seen = main("--check-vectors old")
    assert status == 12 and seen.calls == [("main", None, "old")]
    status, seen = main("--compare old theirs")
    assert status == 13 and seen.calls == [("judge", "old", "theirs")]


def row_of(verdict, as_registered, z=0.0):
    return SimpleNamespace(verdict=verdict, as_registered=as_registered, z=z)


ENDS = [
    ([row_of(HOLDS, True)], 0),
    ([row_of(REFUTED, False)], 1),
    ([row_of(INCONCLUSIVE, False)], 3),
    ([row_of(INCONCLUSIVE, False), row_of(HOLDS, False)], 1),
]


@pytest.mark.parametrize(("rows", "status"), ENDS)
@pytest.mark.parametrize("flags", ["", "--rows", "--json f", "--vary-seed 2", "--verdicts f"])
def test_every_report_ends_with_the_status_of_its_rows(flags, rows, status, main):
    """Whatever it shows or writes."""
    assert main(flags, rows)[0] == status


def test_fresh_seeds_are_fresh_and_statistical(main, capsys):
    """Seeds after the one that is asked, each once, with its kernels, factors and device."""
    rows = [row_of(HOLDS, True), row_of(HOLDS, True, None)]
    flags = "--vary-seed 3 --seed 40 --kernels cps --factors 4 --device cpu"
    status, seen = main(flags, rows)
    benches = [used for used, _ in seen.given("run")]
    assert [used.seed for used in benches] == [41, 42, 43]
    assert all((used.kernels, used.factors) == (("cps",), (4,)) for used in benches)
    statistical = ["E3", "E7", "E10", "E14", "TRUTH", "MARGINAL"]
    assert all(names == statistical for _, names in seen.given("run"))
    (((counted, times)),) = seen.given("failure_rate")
    assert counted == rows[:1] * 3 and times == 3 and status == 0  # those with a z
    assert capsys.readouterr().out == "the rate\n"
    _, seen = main("--vary-seed 1 --claims E5 E10")
    assert [names for _, names in seen.given("run")] == [["E10"]]


def test_seeds_change_what_is_drawn():
    """Of fixtures and of noise; the same seed draws the same."""
    one, again, other = (oracle.Bench(["cps"], (2,), seed) for seed in (1, 1, 2))
    assert torch.equal(one.normal(3, of="x"), again.normal(3, of="x"))
    assert not torch.equal(one.normal(3, of="x"), other.normal(3, of="x"))
    assert not torch.equal(one.normal(3, of="x"), one.normal(3, of="y"))
    weights = [next(b.fixture("network").field.parameters()) for b in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_model_that_cannot_be_loaded_is_one_line_and_status_2(main, monkeypatch, capsys):
    """Found when the bench is made, after the command line was read."""

    def refuse(o):
        raise ValueError("model 'x': cannot be read")

    monkeypatch.setattr(oracle.options, "bench_of", refuse)
    status, seen = main("")
    assert status == 2 and not seen.calls
    assert capsys.readouterr().err == "verify_equivalence.py: error: model 'x': cannot be read\n"


def test_a_report_says_as_json_what_its_rows_say(tmp_path, capsys):
    """Field by field, NaN as null; the status is that of the rows."""
    file = tmp_path / "told.json"
    oracle.main(["--claims", "E5", "--kernels", "cps", "--factors", "2", "--json", str(file)])
    told = json.loads(file.read_text())
    rows = oracle.CLAIMS.run(oracle.Bench(["cps"], (2,)), ["E5"])
    assert len(told["rows"]) == len(rows) == 6
    for line, row in zip(told["rows"], rows):
        for name in inspect.signature(type(row)).parameters:
            if name != "seconds":
                value = getattr(row, name)
                assert line[name] == value, name
