"""The oracle's command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import verify_equivalence as oracle
from zoo.oracle import options, report

ROOT = Path(__file__).parents[2]


def test_a_report_has_the_promised_schema(tmp_path, capsys):
    """--json holds every field the readers of the report rely on; the exit status is 0."""
    file = tmp_path / "report.json"
    flags = ["--claims", "E5", "E11", "--kernels", "cps", "--factors", "4", "--json", str(file)]
    assert oracle.main(flags) == 0
    told = json.loads(file.read_text())
    assert told["schema"] == report.SCHEMA and told["status"] == 0 and told["comparison"] == []
    assert {"python", "torch", "device", "dtype", "commit", "dirty"} <= set(told["environment"])
    fields = {"claim", "statement", "kernel", "k", "rollouts", "form", "fixture", "verdict"}
    fields |= {"registered", "measured", "predicted", "tolerance", "low", "high", "as_registered"}
    assert fields | {"n", "seed", "seconds"} <= set(told["rows"][0])
    assert {row["k"] for row in told["rows"] if row["claim"] == "E5"} == {4}
    assert {row["kernel"] for row in told["rows"]} == {"cps"}
    assert told["conclusion"] in capsys.readouterr().out


def test_rows_are_shown_on_request(capsys):
    """The front page alone, then with every row."""
    flags = ["--claims", "E5", "--kernels", "cps", "--factors", "2"]
    assert oracle.main(flags) == 0
    short = capsys.readouterr().out.splitlines()
    assert oracle.main([*flags, "--rows"]) == 0
    long = capsys.readouterr().out.splitlines()
    assert len(short) < 12 and sum(line.startswith("  cps ") for line in long) == 6


@pytest.mark.usefixtures("small_network")
def test_the_comparison_is_shown_on_request(tmp_path, capsys, monkeypatch):
    """--compare prints a line per step and k, in 100 columns, and --json keeps it."""
    file = tmp_path / "report.json"
    flags = ["--claims", "E5", "--kernels", "flow_sde", "--factors", "2", "--json", str(file)]
    assert oracle.main([*flags, "--compare"]) == 0
    out = capsys.readouterr().out
    lines = out[out.index("Decomposed") :].splitlines()
    assert max(map(len, lines)) <= 100
    table = json.loads(file.read_text())["comparison"]
    assert len(table) == 8 == sum(line[9:14] in ("1.000", "0.125") for line in lines) + 6
    for line in table:
        assert sum(part for _, part in line["share"]) == pytest.approx(1)
        assert line["group"] == pytest.approx(1) and line["off"] == 0


BAD = {
    "--claims E99": "E99",
    "--kernels ddpm": "ddpm",
    "--factors 1": "factors=[1]",
    "--factors 2 2": "factors=[2, 2]",
    "--seed -1": "--seed -1",
    "--vary-seed 0": "--vary-seed 0",
    "--prompt circle": "--prompt",
    "--dtype float32": "--dtype",
    "--model embedded --prompt circle": "circle",
    "--model nowhere": "nowhere",
    "--model embedded --claims E3": "E3",
    "--vectors a --against b:c": "--vectors",
    "--vectors a --json b": "--json",
    "--vectors a --rows": "--rows",
    "--against a:b --claims E2": "--claims",
    "--against a": "--against a: must be MODULE:FUNCTION",
    "--against a:b --time-limit 0": "--time-limit 0.0: must be a positive number of seconds",
    "--time-limit 5": "--time-limit: must be left out without --against",
    "--factors 2 3 4 5 6 7": "--factors",
    "--kernels cps cps": "--kernels",
    "--claims E2 E2": "--claims",
    "--model embedded --size 32 32": "--size",
    "--json .": "--json",
    "--vary-seed 2 --claims E2": "--claims",
    "--vary-seed 2 --compare": "--compare",
    "--compare a": "--compare a: must stand alone, or followed by DIR THEIRS",
    "--compare a b c": "--compare a b c: must stand alone, or followed by DIR THEIRS",
    "--compare a b --rows": "--rows: must be left out with --compare DIR THEIRS",
    "--vectors a --compare b c": "--compare DIR THEIRS: must be left out with --vectors",
    "--vectors a --seed 1": "--seed",
    "--json no/where": "no/where",
    "--verdicts no/where": "no/where",
    "--verdicts a --seed 1": "--seed",
    "--verdicts a --kernels cps": "--kernels",
    "--plots a_file": "--plots a_file: must be a folder",
    "--json a_folder": "--json a_folder: must be a file",
    "--verdicts a_folder": "--verdicts a_folder: must be a file",
    "--model a_pipeline --dtype float64": "--dtype float64: must be float32 or bfloat16",
    "--model a_folder": "--model a_folder: must be a checkpoint of train.py",
    "--model owner/name.safetensors": "owner/name.safetensors",
    "--model embedded/": "embedded/",
    "--model owner/name --claims E1 E3": "--claims E1 E3: must be of E1 E2 E6 E7 E9 with --model",
    "--model embedded --vary-seed 2": "--model",
    "--seed 1.5": "--seed",
    "--row": "--row",
    "--factors 2 --size 8 8": "--size: must be left out without --model",
    "--kernels flow_sde dance flow_sde": "--kernels flow_sde dance flow_sde: must be distinct",
}
ALLOWED = ["--seed 0", "--vary-seed 1", "--factors 2 3 4 5 6", "--plots a_folder --json a_file"]
ALLOWED += ["--plots new", "--verdicts a_file", "--model a_pipeline --dtype bfloat16 --size 8 8"]
ALLOWED += ["--model embedded --dtype float64", "--model owner/name --prompt dog"]
ALLOWED += ["--compare --rows", "--compare a b", "--compare nowhere a_file"]
ALLOWED += ["--vary-seed 2 --claims E2 E3", "--model a_pipeline --dtype float32 --claims E9"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """To stand in: a file, a folder, and a folder with the index of a pipeline."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_pipeline").mkdir()
    (tmp_path / "a_pipeline" / "model_index.json").write_text("{}")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("flags", "named"), BAD.items())
def test_bad_usage_is_one_line_and_status_2(flags, named, capsys, monkeypatch):
    """Before any work."""
    monkeypatch.setattr(type(oracle.CLAIMS), "run", lambda *given: pytest.fail("work began"))
    with pytest.raises(BaseException) as stop:
        oracle.main(flags.split())
    assert isinstance(stop.value, SystemExit), repr(stop.value)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and named in err, err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("flags", ALLOWED)
def test_what_is_at_the_edge_is_taken(flags):
    """Nothing that can be done is refused, and nothing is read as another mode."""
    try:
        options.parse(flags.split(), oracle.CLAIMS, "")
    except SystemExit:
        pytest.fail(f"refused: {flags}")


@pytest.mark.parametrize("there", [True, False])
def test_cuda_is_asked_for_where_it_is(there, monkeypatch, capsys):
    """Without a GPU it is refused in one line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    if there:
        assert options.parse(["--device", "cuda"], oracle.CLAIMS, "").device == "cuda"
        return
    with pytest.raises(SystemExit) as stop:
        options.parse(["--device", "cuda"], oracle.CLAIMS, "")
    assert stop.value.code == 2
    wanted = "error: --device cuda: must be cpu: no CUDA device is available\n"
    assert capsys.readouterr().err.endswith(wanted)


def test_what_is_a_pipeline(folder):
    """A folder, or an id of two words without a suffix that is no file; not the shipped model."""
    (folder / "owner").mkdir()
    (folder / "owner" / "kept").write_text("")
    for model in ("a_pipeline", "a_folder", "owner/name", "./a_folder"):
        assert options.is_pipeline(model), model
    for model in ("embedded", "a_file", "owner/kept", "owner/name.pt", "a/b/c", "nowhere"):
        assert not options.is_pipeline(model), model


@pytest.mark.usefixtures("small_network")
def test_a_model_in_bfloat16_keeps_what_does_not_depend_on_the_network(capsys):
    """Attribution (E2) and the matched form (E7) survive, to float32 rounding."""
    flags = "--model embedded --dtype bfloat16 --claims E2 E7 --kernels cps --factors 2 --prompt"
    assert oracle.main([*flags.split(), "two red circles"]) == 0, capsys.readouterr().out


def test_vary_seed_reports_its_failure_rate(capsys):
    """Fresh seeds, statistical rows only."""
    flags = "--vary-seed 2 --claims E10 --kernels cps --factors 2"
    assert oracle.main(flags.split()) == 0
    said = "0 of 8 statistical verdicts were wrong and 0 inconclusive"
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_claims_hold_on_cuda(capsys):
    """The same verdicts on the GPU."""
    assert oracle.main(["--device", "cuda", "--factors", "2", "3"]) == 0, capsys.readouterr().out


def test_it_runs_from_any_folder(tmp_path):
    """As a script, from elsewhere."""
    script = [sys.executable, str(ROOT / "verify_equivalence.py"), "--claims", "E5"]
    done = subprocess.run(
        [*script, "--factors", "2"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "all as registered" in done.stdout, done.stderr
