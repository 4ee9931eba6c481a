"""The command line of the oracle: what may be asked, and the bench it asks for."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NoReturn

import torch

import pave_grpo as pave
from zoo.oracle import fields, theory
from zoo.oracle.bench import ETA, Bench, Model
from zoo.oracle.claims import Claims
from zoo.shapes import model as shapes_model
from zoo.shapes import world

SHOWN = ("rows", "compare", "json", "plots")
# What each mode reads beside its own flag; the report reads all but --prompt, --size and --dtype.
READ: dict[str, tuple[str, ...]] = {
    "against": ("seed", "time_limit", "json"),
    "vectors": (),
    "check_vectors": (),
    "compare_vectors": (),
    "vary_seed": ("claims", "kernels", "factors", "seed", "device"),
    "verdicts": SHOWN,
    "model": ("claims", "kernels", "factors", "seed", "device", "prompt", "size", "dtype", *SHOWN),
}


class Parser(argparse.ArgumentParser):
    """Bad usage is one line and status 2."""

    def error(self, message: str) -> NoReturn:
        said = " ".join(message.splitlines())  # it may quote what was typed
        self.exit(2, f"verify_equivalence.py: error: {said}\n")


def parse(argv: list[str] | None, claims: Claims, description: str | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is tested").add_argument
    names = " ".join(claims)
    what("--claims", nargs="+", choices=tuple(claims), metavar="CLAIM", help=f"of {names}")
    what("--kernels", nargs="+", choices=tuple(pave.KERNELS), help="default: all")
    what("--factors", nargs="+", type=int, metavar="K", help="up to five, each >= 2 (2 3 5)")
    what("--seed", type=int, help="of fixtures and samples (0; with --against, a fresh one)")
    what("--device", choices=("cpu", "cuda"), help="default: cpu")

    shown = parser.add_argument_group("what is shown").add_argument
    shown("--rows", action="store_true", default=None, help="every measurement")
    shown(
        "--compare",
        nargs="*",
        metavar=("DIR", "THEIRS"),
        help="each k-term beside the original; or judge the golden vectors that THEIRS computed",
    )
    shown("--json", metavar="FILE", help="write all of it, or a judgement, for a machine to read")
    shown("--plots", metavar="DIR", help="draw weight, cosine, gap and attribution.png")
    shown("--verdicts", metavar="FILE", help="write the page docs/VERDICTS.md")

    model = parser.add_argument_group("on a model of your own").add_argument
    model(
        "--model",
        metavar="CHECKPOINT",
        help="of train.py ('embedded': the one shipped), or a pipeline's folder or hub id",
    )
    model("--prompt", nargs="+", metavar="TEXT", help=f"default: {', '.join(fields.PROMPTS)}")
    model(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="of a pipeline's pictures (512 512)"
    )
    model("--dtype", choices=("bfloat16", "float32", "float64"), help="default: float32")

    other = parser.add_argument_group("other work").add_argument
    other("--vary-seed", type=int, metavar="N", help="the failure rate over N fresh seeds")
    other(
        "--against",
        metavar="MODULE:FUNCTION",
        help="judge another implementation; python -m pydoc zoo.oracle.judging has the signatures",
    )
    other("--time-limit", type=float, metavar="S", help="seconds that it may take in all (120)")
    other("--vectors", metavar="DIR", help="write golden vectors into a new folder")
    other("--check-vectors", metavar="DIR", help="recompute golden vectors and compare")
    o = parser.parse_args(argv)
    try:
        split_compare(o)
        check(o, claims)
    except ValueError as problem:
        parser.error(str(problem))
    return o


def split_compare(o: argparse.Namespace) -> None:
    """--compare alone shows a table; --compare DIR THEIRS is other work, o.compare_vectors."""
    given = o.compare
    if given and len(given) != 2:
        wanted = "alone, or followed by DIR THEIRS"
        raise ValueError(f"--compare {' '.join(given)}: must stand {wanted}")
    o.compare = True if given == [] else None
    o.compare_vectors = given or None


def flag(name: str) -> str:
    if name == "compare_vectors":
        return "--compare DIR THEIRS"
    return f"--{name.replace('_', '-')}"


def check(o: argparse.Namespace, claims: Claims) -> None:
    """Everything that can be known to be wrong before any work. Raises ValueError of one line."""
    check_mode(o)
    check_values(o, claims)
    pave.check_factors(o.factors or ())
    for kernel in o.kernels or pave.KERNELS:
        theory.of(kernel, ETA)
    check_model(o)


def check_mode(o: argparse.Namespace) -> None:
    """No flag is given that the mode would not read."""
    given = [name for name, value in vars(o).items() if value is not None]
    mode = next((name for name in READ if name in given), None)
    for name in given:
        if mode and name not in (mode, *READ[mode]):
            raise ValueError(f"{flag(name)}: must be left out with {flag(mode)}")
        if not mode and name in ("prompt", "dtype", "size"):
            raise ValueError(f"{flag(name)}: must be left out without --model")
        if not mode and name == "time_limit":
            raise ValueError(f"{flag(name)}: must be left out without --against")


def check_values(o: argparse.Namespace, claims: Claims) -> None:
    """Each value by itself."""
    statistical = [name for name in claims if claims[name].statistical]
    on_model = [name for name in claims if claims[name].on_model]

    def need(good: bool, name: str, wanted: str) -> None:
        if not good:
            value = getattr(o, name)
            given = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ValueError(f"{flag(name)} {given}: must be {wanted}")

    if o.factors:
        need(len(o.factors) <= 5, "factors", "at most five: the false-alarm rate assumes it")
    if o.seed is not None:
        need(o.seed >= 0, "seed", "0 or more")
    if o.against is not None:
        module, _, function = o.against.partition(":")
        need(bool(module and function), "against", "MODULE:FUNCTION")
    if o.time_limit is not None:
        need(0 < o.time_limit < math.inf, "time_limit", "a positive number of seconds")
    for name in ("kernels", "claims"):
        value = getattr(o, name) or ()
        need(len(set(value)) == len(value), name, "distinct")
    if o.vary_seed is not None:
        need(o.vary_seed >= 1, "vary_seed", "1 or more")
        some = not o.claims or not set(statistical).isdisjoint(o.claims)
        need(some, "claims", f"of {' '.join(statistical)} with --vary-seed")
    if o.model and o.claims:
        need(set(o.claims) <= set(on_model), "claims", f"of {' '.join(on_model)} with --model")
    if o.device == "cuda":
        need(torch.cuda.is_available(), "device", "cpu: no CUDA device is available")
    for name in ("json", "verdicts"):
        if getattr(o, name):
            path = Path(getattr(o, name)).resolve()
            need(path.parent.is_dir() and not path.is_dir(), name, "a file in a folder that exists")
    if o.plots:
        need(not Path(o.plots).is_file(), "plots", "a folder")


def check_model(o: argparse.Namespace) -> None:
    """The model can be what --model says, with these prompts, size and dtype."""
    if o.model and is_pipeline(o.model):
        if o.dtype == "float64":
            raise ValueError("--dtype float64: must be float32 or bfloat16 with a pipeline")
        if Path(o.model).is_dir() and not (Path(o.model) / "model_index.json").is_file():
            wanted = "a checkpoint of train.py, a pipeline's folder or a hub id"
            raise ValueError(f"--model {o.model}: must be {wanted}")
        return
    if o.size:
        raise ValueError("--size: must be left out for a checkpoint, whose pictures have one size")
    for prompt in o.prompt or ():
        world.parse(prompt)
    if o.model and o.model != "embedded":
        shapes_model.load(o.model)


def is_pipeline(model: str) -> bool:
    """A folder, or a hub id OWNER/NAME; anything else is a checkpoint's file."""
    path = Path(model)
    on_hub = not path.exists() and not path.suffix and len(path.parts) == 2
    return path.is_dir() or (model != "embedded" and on_hub)


def bench_of(o: argparse.Namespace) -> Bench:
    """What the claims are tested with. Raises ValueError if the model cannot be loaded so."""
    model = None
    if o.model:
        model = Model(
            path="" if o.model == "embedded" else o.model,
            prompts=tuple(o.prompt or fields.PROMPTS),
            dtype=getattr(torch, o.dtype or "float32"),
            size=tuple(o.size or (512, 512)) if is_pipeline(o.model) else None,
        )
    bench = Bench(o.kernels, sorted(o.factors or (2, 3, 5)), o.seed or 0, o.device or "cpu", model)
    bench.fixture("embedded" if model else "network")
    if (o.compare or o.plots) and bench.is_large:
        wanted = f"up to {fields.WHOLE:,} parameters, whose gradients are held whole"
        raise ValueError(f"--compare and --plots need a model of {wanted}")
    return bench
