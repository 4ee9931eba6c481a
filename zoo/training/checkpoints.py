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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from zoo.training import files
from zoo.training.options import FREE, Options
from zoo.training.policies import EMA, Policy, Sizes
from zoo.training.prompts import Prompts
from zoo.training.ranks import Ranks, Unwritable, fail

FOLDER = "checkpoints"
PIECE = 4 << 30  # bytes of a file of state, about
KEPT = 2  # of the last; the best stays too
KEPT_OF_RUN = ("seconds", "lines", "compared", "summary")  # what run.py has in state.json


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
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "manifest.json cannot be read"
    if "state.json" not in listed:
        return "manifest.json does not list state.json"
    try:
        return difference(folder, listed)
    except (OSError, ValueError) as problem:
        return f"it cannot be read ({problem})"


def difference(folder: Path, listed: Mapping[str, tuple[int, str]]) -> str:
    """The first difference between the files of a checkpoint and those that are listed."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    there = {name for name, path in paths.items() if path.is_file()} - {"manifest.json"}
    for name in sorted(there - listed.keys()):
        return f"{name} is not in manifest.json"
    for name, (size, digest) in tqdm(
        listed.items(), f"verifying {folder.name}", leave=False, delay=1
    ):
        if name not in there:
            return f"{name} is missing"
        if paths[name].stat().st_size != size:
            return f"{name} has {paths[name].stat().st_size} bytes, must have {size}"
        if digest_of(paths[name]) != digest:
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
        raise ValueError(f"no checkpoint is whole; {skipped[0]}")
    return None, skipped


def found(o: Options, data: Prompts, ranks: Ranks) -> Path | None:
    """What --resume goes on from, as `newest` has it; the first rank verifies, and says so.

    What a run cannot go on from is one line, and status 2.
    """
    place: Path | None = None
    problem = ""
    if ranks.leads and o.resume:
        run = Path(o.resume)
        try:
            clear(run)
            place, skipped = newest(run)
            if place:
                check_state(o, data, place)
            else:
                check_bare(run)
            where = place or "the beginning, since there is no checkpoint yet"
            print("\n".join([*skipped, f"going on from {where}"]), flush=True)
        except (OSError, ValueError) as error:
            problem = f"--resume {run}: {error}"
    place, problem = ranks.gather((place, problem))[0]
    if problem:
        fail(problem)
    return place


def check_state(o: Options, data: Prompts, place: Path) -> None:
    """A checkpoint is of these options and prompts. Raises ValueError where it is not."""
    state = json.loads((place / "state.json").read_text())
    if not {"iteration", "options", "prompts", *KEPT_OF_RUN} <= state.keys():
        raise ValueError(f"{place} is of another version of train.py")
    if state["iteration"] > o.iterations:
        raise ValueError(f"must have --iterations {state['iteration']} or more, which are done")
    for name, value in files.strict(asdict(o)).items():
        was = state["options"].get(name, value)
        if name not in (*FREE, "out") and value != was:
            raise ValueError(f"{name} in config.json is {value!r}, must be {was!r} as in {place}")
    if state["prompts"] != data.digest():
        raise ValueError("its prompt files must be what they were when it began")


def check_bare(run: Path) -> None:
    """A run without checkpoints has no weights either. Raises ValueError where it has."""
    for name in ("checkpoint.safetensors", "lora", "transformer"):
        if (run / name).exists() and not (run / name).is_symlink():
            raise ValueError(f"has {name} and no {FOLDER}/: must be a run of this version")


# ---- Writing -------------------------------------------------------------------------------------


def bytes_of(o: Options, sizes: Sizes) -> int:
    """What a checkpoint takes, to a few per cent."""
    copies = 1 + (2 if o.optimizer == "adamw" else 0) + (1 if o.ema else 0)
    each = 2 if o.dtype == "bfloat16" else 4  # bytes of a weight as others load it
    exported = 4 * sizes.tuned if o.tune == "lora" else each * sizes.weights
    return 4 * copies * sizes.tuned + exported


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

    try:
        files.by_first(ranks, run, begin, part, needed)
        pieces = Pieces(part / "state")
        for name, tensor in state_of(tuned_of(policy), optimizer, average):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if leads:
                pieces.add(name, whole)
        files.by_first(ranks, run, pieces.close)
        with averaged():
            to = part if leads else Path()
            weights: str = ranks.together(files.on_disk, run, policy.save, to, leads)
        generators = ranks.gather(generators_of(ranks))
        content = {"iteration": iteration, "weights": weights, **state}
        files.by_first(ranks, run, finish, part, content, generators)
        files.by_first(ranks, run, files.link, run / weights, f"{FOLDER}/{part.stem[1:]}/{weights}")
    except BaseException:
        if leads:
            shutil.rmtree(part, ignore_errors=True)
        raise
    return weights


def begin(part: Path, needed: int) -> None:
    """An empty folder to write to, and none that an interruption has left."""
    run = part.parent.parent
    clear(run)
    try:
        check_room(run, needed)
    except ValueError as problem:
        raise Unwritable(str(problem)) from None
    part.parent.mkdir(exist_ok=True)
    part.mkdir()


def clear(run: Path) -> None:
    """Remove what interruptions have left of checkpoints."""
    for pattern in (".*.part", ".*.gone"):
        for left in (run / FOLDER).glob(pattern):
            shutil.rmtree(left)


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


def prune(run: Path, done: int, best: int | None) -> None:
    """Remove checkpoints but the last ones up to iteration `done`, and the best.

    Later ones are not whole, or the run would have gone on from there.
    """
    earlier = [n for n in saved(run) if n <= done]
    for iteration in earlier[:-KEPT]:
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
        own = {kind: file.get_tensor(f"{kind}.{name}") for kind, file in kinds[name].items()}
        if own["theta"].shape != p.shape:
            raise ValueError(f"{folder}: {name} is {tuple(own['theta'].shape)}, must be {p.shape}")
        p.copy_(like(p, own.pop("theta")))
        if average:
            average.average[i].copy_(like(p, own.pop("average")))
        for kind, value in own.items():  # of the optimiser, which counts steps on the CPU
            optimizer.state[p][kind] = value if kind == "step" else like(p, value)
    restore_generators(load_file(folder / "random.safetensors"), ranks)
    content: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return content


def like(p: Tensor, value: Tensor) -> Tensor:
    """A value where p is, and cut up as p is."""
    value = value.to(p.device)
    if isinstance(p, DTensor):
        # Every rank has read it: nothing is sent, and nobody waits for a rank that failed.
        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
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
