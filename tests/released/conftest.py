"""Tiny pipelines of the real classes, made once, and runs of train.py on them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train
from zoo.released import random_pipelines

SMALL = (
    "--reward zoo.rewards.example:warmth:2 --eval-reward zoo.rewards.example:contrast "
    "--prompts-per-iteration 2 --group-size 3 --steps 3 --sde-steps 0 1 --size 32 32 "
    "--iterations 1 --heldout 4 --eval-steps 2 --eval-every 0 --dtype float32 --device cpu"
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{name: folder} of an SD3, a FLUX with the guidance input ("flux") and one without.

    Tests read them and write elsewhere.
    """
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "sd3": random_pipelines.sd3(root / "sd3"),
        "flux": random_pipelines.flux(root / "dev"),
        "schnell": random_pipelines.flux(root / "schnell", guidance_embeds=False),
    }


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder with prompts to train on and to judge by."""
    folder = tmp_path_factory.mktemp("texts")
    trained = "a red dog\n\n two cats \na red dog\na house\nthree trees\na boat\n"
    (folder / "train.txt").write_text(trained)
    (folder / "heldout.txt").write_text("a bird and " + "word " * 90 + "\n")
    return folder


@pytest.fixture
def flags(folders, texts):
    """flags(name, more): the command line of a small run on that pipeline."""

    def made(name, more=""):
        files = [
            "--prompts",
            str(texts / "train.txt"),
            "--eval-prompts",
            str(texts / "heldout.txt"),
        ]
        return ["--model", str(folders[name]), *files, *SMALL.split(), *more.split()]

    return made


@pytest.fixture
def run(flags):
    """run(name, out, more): a run in the folder `out`; metrics of an iteration, and the weights."""

    def made(name, out, more=""):
        train.main([*flags(name, more), "--out", out])
        lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        (weights,) = Path(out).glob("*/*.safetensors")
        return lines[1], load_file(weights)

    return made
