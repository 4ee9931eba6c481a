"""The command line of the oracle."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import pave_grpo as pave
from zoo.oracle import fields
from zoo.oracle.bench import KERNELS
from zoo.shapes import model as shapes_model
from zoo.shapes import world as shapes

DRAWN = ("E3", "E7", "E10", "TRUTH", "MARGINAL")  # claims with statistical rows
READ = {  # what each mode reads, beside its own flag; the report reads the rest
    "against": ("seed",),
    "vectors": (),
    "check_vectors": (),
    "vary_seed": ("claims", "kernels", "factors", "seed", "device"),
    "model": (
        "claims",
        "kernels",
        "factors",
        "seed",
        "device",
        "json",
        "plots",
        "prompt",
        "dtype",
        "size",
    ),
}


def parse(argv: list[str] | None, claims: dict, description: str) -> argparse.Namespace:
    """The command line. Bad usage: one line, status 2."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"verify_equivalence.py: error: {message}\n")
    add = parser.add_argument
    add(
        "--claims",
        nargs="+",
        choices=tuple(claims),
        metavar="CLAIM",
        help=f"of {' '.join(claims)} (default: all)",
    )
    add("--kernels", nargs="+", choices=KERNELS, help="kernels to test (default: all)")
    add(
        "--factors",
        nargs="+",
        type=int,
        metavar="K",
        help="up to five k to test, each >= 2 (default: 2 3 5)",
    )
    add(
        "--seed",
        type=int,
        help="seed of fixtures and samples (default: 0; with --against, a fresh one)",
    )
    add("--device", choices=("cpu", "cuda"), help="where to compute (default: cpu)")
    add("--json", metavar="FILE", help="write all rows, the comparison and the environment")
    add("--plots", metavar="DIR", help="draw weight.png, cosine.png, gap.png and attribution.png")
    add(
        "--vary-seed",
        type=int,
        metavar="N",
        help="repeat the statistical claims with N fresh seeds: the failure rate",
    )
    add(
        "--against",
        metavar="MODULE:FUNCTION",
        help="judge another implementation of a transition, a log-probability or "
        "a loss; python -m pydoc zoo.oracle.judging has the signatures",
    )
    add("--vectors", metavar="DIR", help="write golden vectors into a new folder")
    add("--check-vectors", metavar="DIR", help="recompute golden vectors and compare")
    add(
        "--model",
        metavar="CHECKPOINT",
        help="test and compare on a checkpoint of train.py ('embedded': the one shipped), or on "
        "an SD3 or FLUX pipeline, a folder or hub id",
    )
    add(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help=f"with --model: the prompts (default: {', '.join(fields.PROMPTS)})",
    )
    add(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="with --model of a pipeline: pixels (default: 512 512)",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32", "float64"),
        help="with --model: what it computes in (default: float32)",
    )
    o = parser.parse_args(argv)
    try:
        check(o, claims)
    except ValueError as problem:
        parser.error(str(problem))
    return o


def check(o: argparse.Namespace, claims: dict) -> None:
    """Everything that can be known to be wrong before any work. Raises ValueError of one line."""
    flag = lambda name: f"--{name.replace('_', '-')}"
    given = [name for name, value in vars(o).items() if value is not None]
    mode = next((name for name in READ if name in given), None)
    unread = [
        name
        for name in given
        if (name not in (mode, *READ[mode]) if mode else name in ("prompt", "dtype", "size"))
    ]
    if unread:
        raise ValueError(
            f"{flag(unread[0])}: must be left out {'with ' + flag(mode) if mode else 'without --model'}"
        )
    tested = o.claims or claims
    rules = [
        (
            o.factors is None or len(o.factors) <= 5,
            "factors",
            "at most five: the false-alarm rate is registered for that",
        ),
        (o.seed is None or o.seed >= 0, "seed", "0 or more"),
        (len(set(o.kernels or ())) == len(o.kernels or ()), "kernels", "distinct"),
        (len(set(o.claims or ())) == len(o.claims or ()), "claims", "distinct"),
        (o.vary_seed is None or o.vary_seed >= 1, "vary_seed", "1 or more"),
        (
            o.vary_seed is None or set(tested) & set(DRAWN),
            "claims",
            f"of {' '.join(DRAWN)} with --vary-seed",
        ),
        (
            not o.model or o.claims is None or all(claims[c].on_model for c in o.claims),
            "claims",
            f"of {' '.join(c for c in claims if claims[c].on_model)} with --model",
        ),
        (
            o.device != "cuda" or torch.cuda.is_available(),
            "device",
            "cpu: no CUDA device is available",
        ),
        (
            not o.json or (Path(o.json).resolve().parent.is_dir() and not Path(o.json).is_dir()),
            "json",
            "a file in a folder that exists",
        ),
        (not o.plots or not Path(o.plots).is_file(), "plots", "a folder"),
    ]
    for good, name, wanted in rules:
        if not good:
            value = getattr(o, name)
            raise ValueError(
                f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, list) else value}: must "
                f"be {wanted}"
            )
    pave.check_factors(o.factors or ())
    if o.model and is_pipeline(o.model):
        if o.dtype == "float64":
            raise ValueError("--dtype float64: must be float32 or bfloat16 with a pipeline")
        if Path(o.model).is_dir() and not (Path(o.model) / "model_index.json").is_file():
            raise ValueError(
                f"--model {o.model}: must be a checkpoint of train.py, a pipeline's folder or a hub id"
            )
        return
    if o.size:
        raise ValueError(
            "--size: must be left out for a checkpoint of train.py, whose pictures have one size"
        )
    for prompt in o.prompt or ():
        shapes.parse(prompt)
    if o.model and o.model != "embedded":
        shapes_model.load(o.model)


def is_pipeline(model: str) -> bool:
    """A folder, or a hub id OWNER/NAME; anything else is a checkpoint's file."""
    path = Path(model)
    return path.is_dir() or (
        model != "embedded" and not path.exists() and not path.suffix and len(path.parts) == 2
    )
