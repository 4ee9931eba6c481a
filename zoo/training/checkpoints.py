"""Checkpoints: whole or not there, verified before they are used.

RUN/checkpoints/000040/ is the run after iteration 40:

    checkpoint.safetensors | lora/ | transformer/   the weights as others load them; with --ema the
                                                    average
    state/00000.safetensors ...   theta.NAME, what the optimiser keeps of it (exp_avg.NAME, ...) and
                                  average.NAME, whole, in the dtype of training
    random.safetensors            torch's generators of every rank
    state.json                    iteration, options, what run.py keeps
    manifest.json                 size and SHA-256 of every other file

It is written beside its place, flushed to the disk, and then renamed. Only after that are older
ones removed. The state does not depend on how many ranks there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from zoo.training import files
from zoo.training.options import Options
from zoo.training.policies import EMA, Policy, Sizes
from zoo.training.ranks import Ranks, Unwritable, fail

T = TypeVar("T")

FOLDER = "checkpoints"
PIECE = 4 << 30  # bytes of a file of state, about
KEPT = 2  # of the last; the best stays too


def place_of(run: Path, iteration: int) -> Path:
    """Where a run has its checkpoint after an iteration."""
    return run / FOLDER / f"{iteration:06d}"


# ---- What there is -------------------------------------------------------------------------------


def saved(run: Path) -> list[int]:
    """Iterations of the checkpoints of a run, in order, whole or not."""
    folder = run / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def problem_of(folder: Path) -> str:
    """What is wrong with a checkpoint, in one line; "" if it is what was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return "manifest.json cannot be read"
    if "state.json" not in listed:
        return "manifest.json does not list state.json"
    for name, (size, digest) in tqdm(
        listed.items(), f"verifying {folder.name}", leave=False, delay=1
    ):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, must have {size}"
        if digest_of(path) != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return ""


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is whole, and a line for every newer one that is not.

    None where there is none yet. Raises ValueError where there are some and none is whole.
    """
    skipped: list[str] = []
    for iteration in reversed(saved(run)):
        folder = place_of(run, iteration)
        problem = problem_of(folder)
        if not problem:
            return folder, skipped
        skipped.append(f"{folder}: skipped, since {problem}")
    if skipped:
        raise ValueError(f"--resume {run}: no checkpoint is whole; {skipped[0]}")
    return None, skipped


def found(o: Options, ranks: Ranks) -> Path | None:
    """What --resume goes on from, as `newest` has it; the first rank verifies, and says so.

    What a run cannot go on from is one line, and status 2.
    """
    place: Path | None = None
    problem = ""
    if ranks.leads and o.resume:
        try:
            place, skipped = newest(Path(o.resume))
            done = int(place.name) if place else 0
            if done > o.iterations:
                problem = f"--iterations {o.iterations}: must be {done} or more, which are done"
            where = place or "the beginning, since there is no checkpoint yet"
            print("\n".join([*skipped, f"going on from {where}"]), flush=True)
        except ValueError as error:
            problem = str(error)
    place, problem = ranks.gather((place, problem))[0]
    if problem:
        fail(problem)
    return place


# ---- Writing -------------------------------------------------------------------------------------


def bytes_of(o: Options, sizes: Sizes) -> int:
    """What a checkpoint takes, to a few per cent."""
    copies = 1 + (2 if o.optimizer == "adamw" else 0) + (1 if o.ema else 0)
    exported = 4 * sizes.tuned if o.tune == "lora" else exported_bytes(o) * sizes.weights
    return 4 * copies * sizes.tuned + exported


def exported_bytes(o: Options) -> int:
    """Of a weight, as others load it."""
    return 2 if o.dtype == "bfloat16" else 4


def check_room(folder: Path, needed: int) -> None:
    """Raises ValueError, of one line, where a folder's disk has less room than a checkpoint takes.

    The folder need not be there yet.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        had = f"has {free / 2**30:.2f} GiB free, must have {needed / 2**30:.2f} for a checkpoint"
        raise ValueError(f"--out {folder}: its disk {had}")


class Pieces:
    """Tensors into numbered safetensors files of about PIECE bytes.

    A failure to write is kept for `close`: other ranks are not to wait for this one meanwhile.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.bytes = self.number = 0
        self.failure: Exception | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """One more."""
        if self.failure is None:
            self.tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
            self.bytes += tensor.nbytes
            if self.bytes >= PIECE:
                self.write()

    def write(self) -> None:
        """A file of what there is."""
        try:
            self.folder.mkdir(exist_ok=True)
            save_file(self.tensors, self.folder / f"{self.number:05d}.safetensors")
        except (OSError, SafetensorError) as problem:
            self.failure = problem
        self.tensors = {}
        self.bytes = 0
        self.number += 1

    def close(self) -> None:
        """Write the rest. Raises what has failed."""
        if self.tensors and self.failure is None:
            self.write()
        if self.failure is not None:
            raise self.failure


def write(
    run: Path,
    iteration: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    average: EMA | None,
    state: dict[str, Any],
    needed: int,
    ranks: Ranks,
) -> str:
    """A checkpoint of all ranks, by the first of them; returns the name of its weights.

    Raises Unwritable on all ranks where that cannot be done; what was there stays whole.
    """
    part = run / FOLDER / f".{iteration:06d}.part"
    averaged = average.applied if average else nullcontext
    leads = ranks.leads

    def trying(job: Callable[..., T], *arguments: Any) -> T:
        return ranks.together(in_words, run, job, *arguments)

    try:
        trying(begin if leads else nothing, part, needed)
        pieces = Pieces(part / "state")
        for name, tensor in state_of(tuned_of(policy), optimizer, average):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if leads:
                pieces.add(name, whole)
        trying(pieces.close)
        with averaged():
            weights = trying(policy.save, part if leads else Path(), leads)
        generators = ranks.gather(generators_of(ranks))
        content = {"iteration": iteration, "weights": weights, **state}
        trying(finish if leads else nothing, part, content, generators)
        newest_weights = f"{FOLDER}/{iteration:06d}/{weights}"
        trying(files.link if leads else nothing, run / weights, newest_weights)
    except BaseException:
        if leads:
            shutil.rmtree(part, ignore_errors=True)
        raise
    return weights


def nothing(*_: Any) -> None:
    """What the other ranks write."""


def in_words(run: Path, job: Callable[..., T], *arguments: Any) -> T:
    """job(*arguments); what the disk does not do is said of the run."""
    try:
        return job(*arguments)
    except (OSError, SafetensorError) as problem:
        said = problem.strerror if isinstance(problem, OSError) and problem.strerror else problem
        raise Unwritable(f"{run}: cannot be written ({said}); older checkpoints stay") from None
    except ValueError as problem:
        raise Unwritable(str(problem)) from None


def begin(part: Path, needed: int) -> None:
    """An empty folder to write to, and none that an interruption has left."""
    check_room(part.parent.parent, needed)
    part.parent.mkdir(exist_ok=True)
    for left in part.parent.glob(".*"):
        shutil.rmtree(left)
    part.mkdir()


def finish(part: Path, content: dict[str, Any], generators: Sequence[dict[str, Tensor]]) -> None:
    """The rest of the files, all on the disk, and then the folder in its place."""
    save_file(dict(ChainMap(*generators)), part / "random.safetensors")
    (part / "state.json").write_text(files.to_json(content, indent=1) + "\n")
    paths = sorted(path for path in part.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(part).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": digest_of(path),
        }
        for path in paths
    }
    (part / "manifest.json").write_text(files.to_json(manifest, indent=1) + "\n")
    for path in (*part.rglob("*"), part):
        if path.is_file():
            files.usual_mode(path)
        files.flush(path)
    place = part.parent / part.name.removeprefix(".").removesuffix(".part")
    remove(place)  # one that was not whole, or it would not be made again
    os.rename(part, place)
    files.flush(place.parent)


def remove(place: Path) -> None:
    """A checkpoint, which at once is none any more."""
    if place.exists():
        gone = place.with_name(f".{place.name}.gone")
        os.rename(place, gone)
        shutil.rmtree(gone)


def prune(run: Path, best: int | None) -> None:
    """Remove all but the last ones and the best."""
    for iteration in saved(run)[:-KEPT]:
        if iteration != best:
            remove(place_of(run, iteration))


# ---- State ---------------------------------------------------------------------------------------


def tuned_of(policy: Policy) -> dict[str, nn.Parameter]:
    """What is trained, by name, in the order of policy.tuned."""
    names = {id(p): name for name, p in policy.network.named_parameters()}
    return {names[id(p)]: p for p in policy.tuned}


def state_of(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, average: EMA | None
) -> Iterator[tuple[str, Tensor]]:
    """(KIND.NAME, tensor) of everything that training moves."""
    for i, (name, p) in enumerate(named.items()):
        yield f"theta.{name}", p
        for kind, value in optimizer.state[p].items():
            yield f"{kind}.{name}", torch.as_tensor(value)
        if average:
            yield f"average.{name}", average.average[i]


@torch.no_grad()
def restore(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    average: EMA | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Weights, optimiser, average and generators as a whole checkpoint has them; its state.json.

    Raises ValueError for one of another model.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "state").glob("*.safetensors")):
        file = safe_open(path, "pt")
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition(".")
            kinds.setdefault(name, {})[kind] = file
    named = tuned_of(policy)
    if kinds.keys() != named.keys():
        raise ValueError(f"{folder}: holds other weights than this model trains")
    for i, (name, p) in enumerate(tqdm(named.items(), "restoring", leave=False, delay=1)):
        found = {kind: file.get_tensor(f"{kind}.{name}") for kind, file in kinds[name].items()}
        p.copy_(like(p, found.pop("theta")))
        if average:
            average.average[i].copy_(like(p, found.pop("average")))
        for kind, value in found.items():  # of the optimiser, which counts steps on the CPU
            optimizer.state[p][kind] = value if kind == "step" else like(p, value)
    restore_generators(load_file(folder / "random.safetensors"), ranks)
    content: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return content


def like(p: Tensor, value: Tensor) -> Tensor:
    """A value where p is, and cut up as p is."""
    value = value.to(p.device)
    if isinstance(p, DTensor):
        return distribute_tensor(value, p.device_mesh, p.placements)
    return value


def generators_of(ranks: Ranks) -> dict[str, Tensor]:
    """States of torch's own generators on this rank. Only rewards may draw from them."""
    states = {f"cpu.{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states[f"cuda.{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return states


def restore_generators(states: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Where there were as many ranks of the same kind."""
    if f"cpu.{ranks.rank}" in states:
        torch.set_rng_state(states[f"cpu.{ranks.rank}"])
    if f"cuda.{ranks.rank}" in states and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda.{ranks.rank}"], ranks.device)
