"""Any command line is a run, or one line and status 2: never a traceback, never a file.

1,000 of each program with `FUZZ=1000 python -m pytest tests/training/test_fuzz.py`.
"""

import contextlib
import io
import os
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
import verify_equivalence
from zoo.oracle import options as oracle_options
from zoo.training import command_line, options

EXAMPLES = int(os.environ.get("FUZZ", 60))
LONG = "x" * 300
WORDS = ["", " ", "x", LONG, f"a/{LONG}", "\0", "²", "nan", "inf", "-inf", "1e300", "1e-300", "--"]
NUMBERS = [0, 1, 2, 3, -1, 7, 40, 10**6, 10**11, 10**23, 2**63, -(10**23), 0.5, 1e-7, 1e300, -0.0]
PATHS = ["prompts.txt", "file", "file/below", "folder", "missing", "/proc/1/none", "odd", LONG]
REWARDS = ["rule", "right", "clip", "rule:2", "rule:nan", "a:b", "os:nan", "clip=odd@x", ":", "=:"]

values = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(NUMBERS).map(str),
    st.sampled_from(PATHS),
    st.sampled_from(REWARDS),
    st.integers(-9, 99).map(str),
    st.text(max_size=8),
)


def of_option(name):
    """The flag of an option with values that it may take, or others."""
    about, default = options.ABOUT[name], getattr(options.Options, name)
    own = [str(z) for z in about.argument.get("choices", ())]
    own += [str(z) for z in (default if isinstance(default, tuple) else [default])]
    some = st.lists(st.one_of(st.sampled_from(own or ["0"]), values), max_size=3)
    return some.map(lambda words: [command_line.flag(name), *words])


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a file, prompts, an odd folder and no run."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "file").write_text("")
    (folder / "prompts.txt").write_text("a red circle\n")
    (folder / "folder").mkdir()
    (folder / "odd").mkdir()
    (folder / "odd/model_index.json").write_text("null")
    (folder / "odd/config.json").write_text('{"seed": [1]}')
    return folder


@pytest.fixture
def alone(desk, monkeypatch, one_process):
    """In that folder, with no hub to ask."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def outcome(program, words):
    """(status, standard error) of a command line."""
    err = io.StringIO()
    status = 0
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            program(words)
        except SystemExit as left:
            status = left.code or 0
    return status, err.getvalue()


def is_fine(program, words):
    """A run, or one line and status 2; nothing is left behind."""
    before = sorted(Path().rglob("*"))
    status, err = outcome(program, words)
    assert status == 0 or (status == 2 and err.count("\n") == 1 and "error: " in err), (status, err)
    assert sorted(Path().rglob("*")) == before


FUZZED = settings(
    max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = sorted(set(options.ABOUT) - {"dry_run"})


@FUZZED
@given(st.lists(st.sampled_from(NAMES).flatmap(of_option), max_size=4))
def test_any_command_line_of_train_is_a_run_or_one_line(alone, parts):
    """Counted and not run: --dry-run refuses what a run would."""
    is_fine(train.main, [*(word for part in parts for word in part), "--dry-run"])


@FUZZED
@given(st.lists(values, max_size=4))
def test_any_words_are_a_run_or_one_line(alone, words):
    """Whatever they are."""
    is_fine(train.main, [*words, "--dry-run"])


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@FUZZED
@given(st.dictionaries(st.sampled_from(VARIABLES), values.filter(lambda z: "\0" not in z)))
def test_any_place_among_ranks_is_one_or_one_line(alone, variables):
    """What torchrun would set, set by somebody else."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            try:
                patch.setenv(name, value)
            except ValueError:  # no environment can hold it
                return

        def parse(words):
            command_line.parse(words)

        status, err = outcome(parse, [])
        said = variables.get("RANK", "0") == "0" or "RANK=" in err or "WORLD_SIZE=" in err
        assert status in (0, 2) and (status == 0 or not said or err.count("\n") == 1), err


ORACLE = [
    *("--claims", "--kernels", "--factors", "--seed", "--device", "--rows", "--compare", "--json"),
    *("--plots", "--verdicts", "--model", "--prompt", "--size", "--dtype", "--vary-seed"),
    *("--against", "--time-limit", "--vectors", "--check-vectors"),
]


@FUZZED
@given(st.lists(st.one_of(st.sampled_from(ORACLE), values), max_size=6))
def test_any_command_line_of_the_oracle_is_one_or_one_line(alone, words):
    """Its options are checked, and nothing is done."""

    def parse(given):
        oracle_options.parse(given, verify_equivalence.CLAIMS, "")

    is_fine(parse, words)
