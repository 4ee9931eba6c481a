"""The documents say what is so: commands run, links lead somewhere, quoted lines and flags exist.

A command is a line of a ```bash block, or code in a line of text that starts with a program's name.
Each is run in a short form. One that cannot run everywhere says so on its line ("needs a GPU",
"needs 8 GPUs and the hub"), and only then may its model or its ranks be replaced.
"""

import doctest
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.run
import yaml
from oracle import implementations

import pave_grpo
from zoo.oracle import bugs, judging, vectors
from zoo.released import random_pipelines
from zoo.shapes import model as shapes_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
README = TEXTS["README.md"]
CORE = (ROOT / "pave_grpo.py").read_text()
PROGRAMS = ("python", "torchrun", "pip", "echo")
SHORT_TRAINING = {
    "--iterations": "1",
    "--heldout": "4",
    "--prompts-per-iteration": "2",
    "--group-size": "2",
    "--threads": "1",
    "--eval-steps": "1",
}
SHORT_JUDGING = {"--heldout": "4", "--threads": "1", "--eval-steps": "1"}


class Command(NamedTuple):
    """A command of a document."""

    text: str
    is_marked: bool  # its line says what it needs


def commands_of(text: str) -> list[Command]:
    """The commands of a page, in order."""
    found = []
    language = None  # of the fenced block a line is in
    for line in text.splitlines():
        if line.startswith("```"):
            language = line.removeprefix("```") if language is None else None
            continue
        if language == "bash":
            codes = [line.split(" #")[0]]
        elif language is None:
            codes = re.findall(r"`([^`]+)`", line)
        else:
            codes = []
        is_marked = re.search(r"needs (a GPU|the hub|\d+ GPUs|\d+ GB)", line) is not None
        for code in codes:
            for part in code.split("&&"):
                if part.split()[:1] and part.split()[0] in PROGRAMS:
                    found.append(Command(part.strip(), is_marked))
    return found


COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands_of(text)))


# ---- Short forms ---------------------------------------------------------------------------------


def set_flags(words: list[str], values: dict[str, str]) -> list[str]:
    """The same command line with these flags at these values, each of one word."""
    words = list(words)
    for flag, value in values.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


def replace_flag(words: list[str], flag: str, values: list[str]) -> list[str]:
    """The same command line with other values of a flag, where it has the flag."""
    if flag not in words:
        return words
    start = words.index(flag) + 1
    stop = start
    while stop < len(words) and not words[stop].startswith("--"):
        stop += 1
    return [*words[:start], *values, *words[stop:]]


def without_hub(words: list[str]) -> list[str]:
    """The same command for a tiny pipeline of the family, with rewards at hand."""
    family = "flux" if "flux" in words[words.index("--model") + 1].lower() else "sd3"
    words = replace_flag(words, "--model", [f"tiny/{family}"])
    words = replace_flag(words, "--reward", ["zoo.rewards.example:warmth"])
    words = replace_flag(words, "--eval-reward", ["zoo.rewards.example:contrast"])
    return [*words, "--size", "32", "32"]


def training(words: list[str], is_marked: bool) -> list[str]:
    """A command line of train.py with little to do; on two CPU ranks where torchrun starts it."""
    launcher = []
    costs_only = bool({"--dry-run", "--help"} & set(words))
    if words[0] == "torchrun":
        assert is_marked, "a command with torchrun says how many GPUs it needs"
        torch.distributed.run.get_args_parser().parse_args(words[1:])  # its own flags exist
        if not any(word.startswith("--nnodes") for word in words):
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        costs_only = not launcher
    words = words[words.index("train.py") :]
    if is_marked and "--model" in words:
        launcher, words = [], without_hub(words)
        words = [word for word in words if word != "--gather-rollouts"]  # one rank refuses it
        costs_only = True
    if is_marked and "--device" in words and not torch.cuda.is_available():
        words = replace_flag(words, "--device", ["cpu"])
        costs_only = True
    if not costs_only:
        words = set_flags(words, SHORT_TRAINING)
        if "--window-every" in words:  # it moves within a run
            words = set_flags(words, {"--iterations": "2", "--window-every": "1"})
    elif not {"--dry-run", "--help"} & set(words):
        words.append("--dry-run")
    return [*launcher, str(ROOT / "train.py"), *words[1:]]


def oracle(words: list[str]) -> list[str]:
    """A command line of verify_equivalence.py with one claim to test, if it tests any."""
    words = [str(ROOT / "verify_equivalence.py"), *words[2:]]
    if {"--against", "--vectors", "--check-vectors", "--help"} & set(words):
        return words
    if words[1:2] == ["--compare"] and len(words) == 4:  # golden vectors, not the table
        return words
    if "--verdicts" in words:  # of every claim; tests/oracle has whether the page is stale
        return ["-c", PARSE_ALONE, *words[1:]]
    if "--claims" not in words:
        words += ["--claims", "E2" if "--model" in words else "E5"]
    elif "--vary-seed" not in words:
        words = replace_flag(words, "--claims", ["E5", "E11"])  # in a second
    if "--factors" not in words:
        words += ["--factors", "2"]
    if {"--model", "--plots"} & set(words) and "--kernels" not in words:
        words += ["--kernels", "cps"]
    return words


PARSE_ALONE = """
import sys, verify_equivalence
from zoo.oracle import options
options.parse(sys.argv[1:], verify_equivalence.CLAIMS, "")
"""


def shortened_study(words: list[str]) -> list[str]:
    """Tables and figures are made; of a study that takes hours its options, tests/study has it.

    The report without figures is the first half of the one with them.
    """
    return words if "--figures" in words else [*words, "--help"]


def shortened_benchmark(words: list[str]) -> list[str]:
    """One section; of a released model a tiny one, on this device. Its tests have the others."""
    if "--model" in words:
        words = replace_flag(words, "--model", ["tiny/sd3", "--size", "32", "32"])
        words = replace_flag(replace_flag(words, "--device", ["cpu"]), "--dtype", ["float32"])
        words = [word for word in words if word != "--compile"]  # it takes minutes
    return set_flags(words, {"--sections": "waits", "--rounds": "1", "--threads": "1"})


MODULES = {  # how the modules that are programs are shortened
    "zoo.released.random_pipelines": lambda words: [word for word in words if word != "--real"],
    "zoo.released.footprint": lambda words: [*words, "--help"],  # tests/released has its tables
    "tests.benchmark": shortened_benchmark,
    "zoo.shapes.pretrain": lambda words: [*words, "--dry-run", "--batch", "2", "--pairs", "8"],
    "zoo.shapes.gradient_signal": lambda words: [*words, "--batches", "2", "--sde-steps", "1"],
    "zoo.training.evaluate": lambda words: set_flags(words, SHORT_JUDGING),
    "zoo.training.draw": lambda words: set_flags(words, {"--threads": "1"}),
    "zoo.training.pictures": lambda words: words,
    "zoo.training.shipped": lambda words: [*words, "--help"],  # tests/training has it in small
    "zoo.oracle.draw_decomposition": lambda words: words,
    "zoo.oracle.draw_attribution": lambda words: words,
    "zoo.study": shortened_study,
    "pydoc": lambda words: words,
}


def short_form(command: Command) -> list[str]:
    """The words after this Python of a command that starts the same program with less to do."""
    words = shlex.split(command.text)
    if "train.py" in words:
        return training(words, command.is_marked)
    if words[1] == "verify_equivalence.py":
        return oracle(words)
    if words[1] == "tests/kill.py":
        return [str(ROOT / words[1]), "--help"]
    if words[1] == "tests/planted_bugs.py":
        return [str(ROOT / words[1]), "--help" if words[2:] else "no half"]
    assert words[1] == "-m", command
    assert command.is_marked or "--real" not in words, "tens of gigabytes are marked"
    return MODULES[words[2]](words[1:])


# ---- Commands run --------------------------------------------------------------------------------


def test_the_two_commands_that_must_work_as_they_stand_are_there():
    """Install and train, install and test."""
    assert "\npip install -r requirements.txt && python train.py\n" in README
    assert "\npip install -r requirements.txt && python -m pytest\n" in README


def test_a_command_is_marked_wherever_it_stands():
    """What needs a GPU or the hub in one place needs it everywhere."""
    texts = [command.text for command in COMMANDS]
    assert len(texts) > 20
    assert len(set(texts)) == len(texts), sorted(text for text in texts if texts.count(text) > 1)


def run(words: list[str], folder: Path) -> str:
    """What a command line after this Python prints; it must exit with status 0."""
    status, said = start(words, folder)
    assert status == 0, f"{words}\n{said[-2000:]}"
    return said


def start(words: list[str], folder: Path) -> tuple[Any, str]:
    """(exit status, what is printed) of a script, -m module or -c text, in a folder.

    It runs in this process, which has imported already what would take each command seconds; only
    ranks are started as others.
    """
    if words[1] == "torch.distributed.run":
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        how = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, *words], check=False, timeout=280, **how)
        return done.returncode, done.stdout + done.stderr
    loaded, threads = set(sys.modules), torch.get_num_threads()
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    said = io.StringIO()
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", words[1:] if words[0].startswith("-") else words)
        patch.setattr(sys, "path", [str(folder), *sys.path])
        try:
            with redirect_stdout(said), redirect_stderr(said):
                if words[0] == "-m":
                    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
                elif words[0] == "-c":
                    exec(words[1], {"__name__": "__main__"})
                else:
                    runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
    torch.set_num_threads(threads)
    for which, handler in handlers.items():
        signal.signal(which, handler)
    for name in set(sys.modules) - loaded:  # a page's theirs.py is another in another test
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    return status, said.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, small_checkpoint):
    """A folder with tiny/sd3, tiny/flux, and short runs: "run", and "small" of a small network."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "tiny").mkdir()
    for make in (random_pipelines.sd3, random_pipelines.flux):
        made = make(tmp_path_factory.mktemp("made"))
        made.rename(folder / "tiny" / made.name)
    run(set_flags([str(ROOT / "train.py"), "--out", "run"], SHORT_TRAINING), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes_model, "CHECKPOINT", small_checkpoint)
        run(set_flags([str(ROOT / "train.py"), "--out", "small"], SHORT_TRAINING), folder)
    return folder


@pytest.fixture
def desk(tmp_path, prepared):
    """A folder with what a reader has who came so far: files of the pages, pipelines, two runs."""
    for name, text in re.findall(
        r"```python\n# (\w+\.py)\n(.*?)```", "".join(TEXTS.values()), re.S
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / "train.txt").write_text("a red dog\n")
    (tmp_path / "heldout.txt").write_text("a blue bird\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "runs").mkdir()
    for name in ("shapes-1", "pave", "plain"):
        (tmp_path / "runs" / name).symlink_to(prepared / "small")
    (tmp_path / "tiny").symlink_to(prepared / "tiny")
    return tmp_path


ON_PYTHON = [c for c in COMMANDS if c.text.startswith(("python", "torchrun"))]


# By `prepared`, by whoever runs this, by test_judgements_are_shown_as_they_are_printed.
ELSEWHERE = (
    "python train.py",
    "python -m pytest",
    "python -m pytest --shuffle 1",
    "python verify_equivalence.py --against theirs:log_prob",
)


@pytest.mark.usefixtures("small_network", "no_pictures", "short_texts")
@pytest.mark.parametrize("command", ON_PYTHON, ids=lambda command: command.text)
def test_commands_run(command, desk):
    """Every command of the documents exits with status 0, in a short form.

    Of the embedded model that is another network, and runs draw nothing: `prepared` has both. Of
    pipelines texts are short.
    """
    if command.text in ELSEWHERE:
        return
    if "random_pipelines" in command.text:
        (desk / "tiny").unlink()
    made = re.search(r"train\.py.* --out (\S+)", command.text)
    if made:
        (desk / made[1]).unlink(missing_ok=True)
    if "--check-vectors" in command.text or "--compare vectors" in command.text:
        vectors.write(desk / "vectors")
        shutil.copy(desk / "vectors/vectors.safetensors", desk / "theirs.safetensors")
    run(short_form(command), desk)


def test_prompt_files_are_made_as_shown(desk):
    """The echo commands write the files that the next command reads."""
    before = {name: (desk / name).read_text() for name in ("train.txt", "heldout.txt")}
    for name in before:
        (desk / name).unlink()
    for command in COMMANDS:
        if command.text.startswith("echo"):
            subprocess.run(["bash", "-c", command.text], cwd=desk, check=True)
    assert {name: (desk / name).read_text() for name in before} == before


def test_requirements_are_pinned():
    """`pip install -r requirements.txt` installs what was tested."""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert re.fullmatch(r"[a-z_-]+==[0-9.]+", line), line


def test_pip_installs_the_core_alone(tmp_path):
    """`pip install .` gives pave_grpo, asks for torch alone, and brings no other module."""
    assert {c.text for c in COMMANDS if c.text.startswith("pip")} == {
        "pip install .",
        "pip install -r requirements.txt",
    }
    source, target = tmp_path / "source", tmp_path / "target"
    tracked = ["LICENSE", "README.md", "pyproject.toml", "pave_grpo.py", "train.py"]
    source.mkdir()
    for name in tracked:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "zoo" / "rewards", source / "zoo" / "rewards")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--no-compile"]
    install = [sys.executable, "-m", "pip", "install", ".", *offline, "--target", str(target)]
    subprocess.run(install, cwd=source, check=True)
    (metadata,) = target.glob("pave_grpo-*.dist-info/METADATA")
    assert [path.name for path in target.glob("*.py")] == ["pave_grpo.py"]
    assert not (target / "zoo").exists()
    assert re.findall(r"Requires-Dist: (\w+)", metadata.read_text()) == ["torch"]


def test_the_example_of_the_module_runs():
    """The ten lines in pave_grpo.py's docstring do what they show."""
    assert doctest.testmod(pave_grpo).failed == 0


def test_judgements_are_shown_as_they_are_printed(desk):
    """The example of another implementation is judged as the page says, right and with its bug."""
    page = TEXTS["docs/JUDGING.md"]
    right, wrong = re.findall(r"```\n(level.*?|verdict.*?)```", page, re.S)
    command = [str(ROOT / "verify_equivalence.py"), "--against", "theirs:log_prob"]
    assert f"python verify_equivalence.py {' '.join(command[1:])}" in ELSEWHERE

    def printed(wanted: int) -> list[str]:
        status, said = start(command, desk)
        assert status == wanted, said
        return said.splitlines()

    lines = printed(judging.STATUS["agrees"])
    for line in right.splitlines():
        assert line.strip() == "…" or line in lines, line

    file = desk / "theirs.py"
    file.write_text(file.read_text().replace(".mean(1)", ".mean(1) / (2 * std)"))
    shutil.rmtree(desk / "__pycache__", ignore_errors=True)
    lines = printed(judging.STATUS["disagrees"])
    for line in wrong.splitlines():
        assert line in lines, line


class Yours:
    """The functions that the adapters of docs/JUDGING.md are written for."""

    class Scheduler:
        """Its sigmas and timesteps are set by whoever uses it."""

    class SDEScheduler:
        """Knows of the grid its second point."""

        def __init__(self, second_sigma):
            self.second = second_sigma

        def step(self, v, t, x, x_s, timestep_next, noise_level, dynamics_type):
            kernel = {"Flow-SDE": "flow_sde", "CPS": "cps", "Dance-SDE": "dance"}[dynamics_type]
            t, s = t / 1000, timestep_next / 1000
            x_s, log_prob, mean, std = implementations.Plain().step(
                v, x, t, s, noise_level, kernel, x_s
            )
            out = {"next_latents": x_s, "log_prob": log_prob}
            return SimpleNamespace(**out, next_latents_mean=mean, std_dev_t=std)

    @staticmethod
    def sde_step_with_logprob(scheduler, v, times, x, noise_level, prev_sample):
        assert torch.equal(times, scheduler.timesteps.expand(len(x)))
        t, s = scheduler.sigmas.tolist()
        return implementations.Plain().step(v, x, t, s, noise_level, "flow_sde", prev_sample)

    @staticmethod
    def flux_step(v, x, eta, sigmas, index, prev_sample, grpo, sde_solver):
        t, s = sigmas[index].item(), sigmas[index + 1].item()
        step = implementations.Plain().step(v, x, t, s, eta, "dance", prev_sample)
        return step[0], None, step[1]


def denoising(kernel):
    """A class whose instances take two noise levels as tensors."""

    class Solver:
        def denoise(self, v, x, sigma, sigma_next, eta, prev_sample, sigma_max):
            step = implementations.Plain().step(
                v, x, sigma.item(), sigma_next.item(), eta, kernel, prev_sample
            )
            return step[:3]

    return Solver


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("with_scheduler", "kernel flow_sde only"),
        ("with_sigmas", "all but kernel dance (KeyError: 'dance')"),
        ("with_index", "kernel dance only (NotImplementedError: flow_sde)"),
        ("with_output", ""),
    ],
)
def test_adapters_fit_the_signatures_they_are_for(name, scope, monkeypatch):
    """Each of the page, in front of right code of its family, agrees; none is above 15 lines."""
    monkeypatch.setattr(Yours, "FlowSDE", denoising("flow_sde"), raising=False)
    monkeypatch.setattr(Yours, "CPS", denoising("cps"), raising=False)
    monkeypatch.setitem(sys.modules, "yours", Yours)
    text = re.search(rf"```python\n# {name}\.py\n(.*?)```", TEXTS["docs/JUDGING.md"], re.S)[1]
    assert len([line for line in text.splitlines() if line]) <= 15
    names = {}
    exec(text, names)
    found = judging.judge(names["step"], seed=3)
    assert found.verdict == "agrees", found
    assert found.scope == ((scope,) if scope else ())


def test_the_tables_of_the_judge_are_as_long_as_the_page_says():
    """Faults, variants, unseen faults, known bugs."""
    page = TEXTS["docs/JUDGING.md"]
    faults, variants = len(implementations.FAULTS), len(implementations.VARIANTS)
    assert f"has {faults} faults and {variants} correct variants" in " ".join(page.split())
    assert len(implementations.UNSEEN) == 11 and "Eleven more" in page
    assert f"{len(bugs.BUGS)} bugs and {len(bugs.VARIANTS)} correct variants" in page


# ---- What is said is so --------------------------------------------------------------------------


def test_the_readme_fits_two_screens():
    """At most 150 lines and 1500 words."""
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1500


@pytest.mark.parametrize(
    "term", ["transition", "shared anchor", "attribution", "matched", "straight flow"]
)
def test_terms_are_defined_before_they_are_used(term):
    """The first time the README uses a term, it is in bold, where it is defined."""
    first = re.search(term, README, re.I)
    assert README[first.start() - 2 : first.end() + 2].lower() == f"**{term}**"


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    """Relative links point at files; a link named `f` at a Python file points at where f is."""
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", TEXTS[name]):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert heading in anchors, f"{name}: {target}"
        assert path.is_file(), f"{name}: {target}"
        code = re.fullmatch(r"`([\w.]+)`", text)
        if path.suffix == ".py" and code and not target.endswith(code[1]):
            for part in code[1].split("."):
                defined = rf"^\s*(def|class) {part}\b|^{part}\b.*="
                assert re.search(defined, path.read_text(), re.M), f"{name}: {text} in {target}"


def test_the_tour_quotes_the_core():
    """Every line the tour quotes beside an equation is in pave_grpo.py."""
    rows = [line for line in TEXTS["docs/TOUR.md"].splitlines() if line.endswith("` |")]
    quotes = [re.findall(r"`([^`]+)` \|$", row)[0] for row in rows]
    assert len(quotes) >= 15
    for quote in quotes:
        assert quote in CORE, quote


def test_flags_exist(tmp_path):
    """Every flag a page names is one of the programs'."""
    known = {"--shutdown-timeout"}  # torchrun's
    programs = ("train.py", "verify_equivalence.py", "tests/planted_bugs.py", "tests/benchmark.py")
    for program in programs:
        known |= set(re.findall(r"--[a-z][a-z-]*", run([str(ROOT / program), "--help"], tmp_path)))
    for name, text in TEXTS.items():
        for code in re.findall(r"`(--[^`]+)`", text):
            flag = re.match(r"--[a-z-]+", code)[0]
            assert flag in known, f"{name}: {flag}"


def test_what_a_run_leaves_is_explained(prepared):
    """Each file of a run and each key of its metrics.jsonl is in a table of docs/RUNS.md."""
    explained = set(re.findall(r"`([\w.]+)`", "\n".join(first_cells("docs/RUNS.md"))))
    names = {path.name for path in (prepared / "run").iterdir()}
    for line in (prepared / "run" / "metrics.jsonl").read_text().splitlines():
        names |= {re.sub(r"_[123]\b|_[123](?=_)", "_k", key) for key in json.loads(line)}
    named = {re.sub(r"^(reward|heldout)_\w+", r"\1_NAME", name) for name in names}
    assert named <= explained, named - explained


def first_cells(page: str) -> list[str]:
    """First cells of the page's tables."""
    return [line.split("|")[1] for line in TEXTS[page].splitlines() if line.startswith("|")]


def test_the_checks_a_contributor_runs_are_those_of_ci():
    """Each line of CONTRIBUTING's block of checks is a line of .ci/run."""
    (block,) = re.findall(r"```bash\n(ruff.*?)```", TEXTS["CONTRIBUTING.md"], re.S)
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for line in block.splitlines():
        assert any(done.startswith(line.split(" #")[0].rstrip()) for done in ci), line


def test_the_citation_is_of_this_version_and_this_paper():
    """CITATION.cff parses, and agrees with pyproject.toml and the README."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (paper,) = citation["references"]
    assert citation["cff-version"] == "1.2.0" and citation["authors"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert paper["title"] in README and paper["journal"] in README
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in README
