"""The README's commands run, in short forms, and its table of places points at what it says."""

import doctest
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pave_grpo
from zoo.oracle import vectors
from zoo.released import random_pipelines
from zoo.shapes import model as shapes_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()
]
SHORT = {
    "--iterations": "1",
    "--heldout": "4",
    "--prompts-per-iteration": "2",
    "--group-size": "2",
    "--threads": "1",
    "--eval-steps": "1",
}


def tiny(words: list[str], folder: Path) -> list[str]:
    """The same command line on a tiny pipeline of the model's family and rewards that need no hub."""
    family = "flux" if "flux" in words[words.index("--model") + 1].lower() else "sd3"
    shown = {
        "--model": [str(folder / family)],
        "--reward": ["zoo.rewards.example:warmth"],
        "--eval-reward": ["zoo.rewards.example:contrast"],
        "--size": ["32", "32"],
    }
    for flag, values in shown.items():
        if flag in words:
            start = words.index(flag) + 1
            stop = next(
                (i for i in range(start, len(words)) if words[i].startswith("--")), len(words)
            )
            words[start:stop] = values
    return (
        words if "--size" in words else [*words, "--size", "32", "32", "--dry-run"]
    )  # tests/test_released.py runs


def shortened(command: str, pipelines: Path) -> list[str]:
    """A command of the README with the same program and flags, but little to do, and this Python."""
    words = shlex.split(command)
    if words[0] == "echo":
        return ["bash", "-c", command]
    if "--model" in words and words[0] == "torchrun":
        words = ["python", *words[2:]]
    words = [str(shapes_model.CHECKPOINT) if w.startswith("runs/") else w for w in words]
    if words[0] == "torchrun":
        words = [
            "python",
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            *words[2:],
        ]
    assert words[0] == "python", command
    if words[1:3] == ["-m", "zoo.released.random_pipelines"]:
        return [sys.executable, *(w for w in words[1:] if w != "--real")]
    if words[1:3] == ["-m", "pytest"]:
        return [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            str(ROOT),
        ]
    if words[1:3] == ["-m", "zoo.shapes.pretrain"]:
        return [sys.executable, *words[1:], "--dry-run"]
    if words[1:3] == ["-m", "zoo.shapes.gradient_signal"]:
        return [sys.executable, *words[1:], "--batches", "2", "--sde-steps", "1"]
    script = next(i for i, w in enumerate(words) if w.endswith(".py"))
    words[script] = str(ROOT / words[script])
    if words[script].endswith("planted_bugs.py"):
        return [sys.executable, *words[1:2], "no half"]
    if words[script].endswith("verify_equivalence.py"):
        alone = {"--against", "--vectors", "--check-vectors"} & set(words)
        claims = ["E2"] if "--model" in words else ["E5"]
        return [
            sys.executable,
            *words[1:],
            *([] if alone or "--claims" in words else ["--claims", *claims, "--factors", "2"]),
        ]
    if "--model" in words:
        words = tiny(words, pipelines)
    given = {w for w in words if w.startswith("--")}
    if given & {"--dry-run", "--sample"}:
        return [sys.executable, *words[1:]]
    for flag, value in SHORT.items():
        if "--evaluate" in given and flag not in ("--heldout", "--threads", "--eval-steps"):
            continue  # refused: not read
        if flag in given:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return [sys.executable, *words[1:]]


def test_the_readme_has_its_commands():
    """The two commands that must work verbatim are there."""
    text = "\n".join(BLOCKS)
    assert "pip install -r requirements.txt && python train.py\n" in text
    assert "pip install -r requirements.txt && python -m pytest\n" in text


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A folder with a tiny sd3/ and flux/."""
    folder = tmp_path_factory.mktemp("pipelines")
    for make in (random_pipelines.sd3, random_pipelines.flux):
        made = make(tmp_path_factory.mktemp("made"))
        made.rename(folder / made.name)
    return folder


PARTS = sorted({part.strip() for command in COMMANDS for part in command.split("&&")} - {""})


@pytest.mark.parametrize("command", PARTS)
def test_the_commands_of_the_readme_run(command, tmp_path, pipelines):
    """Every command line of the README exits with status 0, in a short form."""
    if command.startswith("pip "):
        assert command == "pip install -r requirements.txt"
        lines = (ROOT / "requirements.txt").read_text().splitlines()
        assert all(re.fullmatch(r"[a-z_-]+==[0-9.]+", line) for line in lines), (
            "requirements are pinned"
        )
        return
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.S):
        (tmp_path / name).write_text(text)
    if "--check-vectors" in command:
        vectors.write(tmp_path / "vectors")
    if "--model" in command:
        (tmp_path / "train.txt").write_text("a red dog\n")
        (tmp_path / "heldout.txt").write_text("a blue bird\n")
    if "cuda" in command and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    result = subprocess.run(
        shortened(command, pipelines),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_tour_points_at_what_it_names():
    """Each `name` of the tour, linked to pave_grpo.py#Lx, is defined or written on line x."""
    lines = (ROOT / "pave_grpo.py").read_text().splitlines()
    places = re.findall(r"\[`([^`]+)`\]\(pave_grpo\.py#L(\d+)\)", README)
    assert len(places) >= 15
    for name, number in places:
        assert name in lines[int(number) - 1], (
            f"{name} is not on line {number}: {lines[int(number) - 1]!r}"
        )


def test_the_example_of_the_module_runs():
    """The ten lines in pave_grpo.py's docstring do what they show."""
    assert doctest.testmod(pave_grpo).failed == 0


def test_pictures_of_the_readme_exist():
    """Every picture the README shows is in the repository."""
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
