"""Kill runs of train.py, and look at what they leave.

python tests/kill.py                       at every change of a file, and at 100 random moments
python tests/kill.py --every 9 --moments 3             fewer of both
python tests/kill.py --sharded                         two ranks of a sharded full fine-tuning

A short run is forked, and killed with SIGKILL: before its n-th change of a file or folder, or at a
moment drawn from --seed. Then: every file reads, no checkpoint that was whole is lost, and the run
goes on to the weights and metrics of one that nobody killed, bit for bit. Status 1 where not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import small_network  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from zoo.released import random_pipelines  # noqa: E402
from zoo.shapes import model as shapes_model  # noqa: E402
from zoo.training import checkpoints, pictures  # noqa: E402

torch.set_num_threads(1)

SHORT = (
    "--prompts-per-iteration 2 --group-size 2 --steps 2 --sde-steps 0 --iterations 3 --heldout 4 "
    "--eval-steps 1 --save-every 1 --eval-every 2 --device cpu --threads 1 --ema 0.5 "
    "--reward zoo.rewards.example:warmth"
)
RELEASED = (
    "--size 32 32 --eval-reward zoo.rewards.example:contrast "
    "--tune full --dtype float32 --lr 0.001 --no-checkpointing"
)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod"}
DONE = 3


class Counter:
    """Counts changes of files as Python announces them, and kills before the n-th (0: never)."""

    def __init__(self, n: int, told: Path):
        self.n, self.count, self.told = n, 0, told
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        written = event == "open" and isinstance(arguments[1], str) and arguments[1] != "r"
        where = str(arguments[0]) if arguments else ""
        if "run" in where and (written or event in CHANGES):
            self.count += 1
            if self.count == self.n:
                os.kill(os.getpid(), signal.SIGKILL)

    def tell(self) -> None:
        """How many there were, to whoever forked."""
        self.n = 0
        self.told.write_text(str(self.count))


def fork(job: Callable[[], None]) -> int:
    """job in a process of its own, which says nothing."""
    process = os.fork()
    if process:
        return process
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    status = 9
    try:
        job()
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 8
    finally:
        os._exit(status)


def start(flags: list[str], world: int, kill_at: int = 0) -> list[int]:
    """train.py on these flags, a process a rank; the first is killed before its n-th change."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def rank_of(rank: int) -> Callable[[], None]:
        def job() -> None:
            names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ["MASTER_ADDR"] = "localhost"
            counter = Counter(kill_at if rank == 0 else 0, Path("changes"))
            train.main(flags)
            if rank == 0:
                counter.tell()

        return job

    return [fork(rank_of(rank)) for rank in range(world)]


def wait(processes: list[int], limit: float = 120.0) -> list[int]:
    """Statuses; where one was killed the others are, as torchrun does it."""
    left, statuses, end = set(processes), {}, time.monotonic() + limit
    while left:
        for process in list(left):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                left.discard(process)
                statuses[process] = os.waitstatus_to_exitcode(status)
        if any(status < 0 for status in statuses.values()) or time.monotonic() > end:
            for process in left:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[process] for process in processes]


def whole(run: Path) -> set[int]:
    """Iterations of checkpoints that verify."""
    return {
        n
        for n in checkpoints.saved(run)
        if not checkpoints.problem_of(checkpoints.place_of(run, n))
    }


def tensors_of(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    """The last checkpoint, but torch's own generators."""
    folder = checkpoints.place_of(run, DONE)
    paths = [path for path in folder.rglob("*.safetensors") if path.name != "random.safetensors"]
    return {(path.name, k): z for path in paths for k, z in load_file(path).items()}


def lines_of(run: Path) -> list[dict[str, object]]:
    """Metrics without the clock."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: z for k, z in line.items() if k != "seconds"} for line in lines]


def problem_in(run: Path) -> str:
    """What a killed run has left that cannot be read; "" for nothing."""
    if set(checkpoints.saved(run)) != whole(run):
        return "a checkpoint is not whole"
    for path in run.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(run).parts):
            continue  # being written, and no file of the run's
        try:
            if path.is_symlink() and not path.exists():
                return f"{path} leads nowhere"
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                [json.loads(text) for text in path.read_text().splitlines()]
            elif path.suffix == ".safetensors":
                load_file(path)
        except Exception as error:
            return f"{path}: {type(error).__name__}: {error}"
    return ""


def went_on(run: Path, sound: Path, world: int, flags: list[str]) -> str:
    """What is wrong with the run after --resume; "" where it is the one nobody killed."""
    again = (
        ["--resume", str(run)] if (run / "config.json").exists() else [*flags, "--out", str(run)]
    )
    statuses = wait(start(again, world))
    if any(statuses):
        return f"it does not go on: statuses {statuses}"
    ours, theirs = tensors_of(run), tensors_of(sound)
    if ours.keys() != theirs.keys() or not all(torch.equal(z, theirs[k]) for k, z in ours.items()):
        return "its weights are others than without the kill"
    return "" if lines_of(run) == lines_of(sound) else "its metrics are others than without"


def kill_once(world: int, flags: list[str], kill_at: int, moment: float) -> str:
    """One killed run, and what is wrong with it; "" for nothing."""
    run = Path("run")
    shutil.rmtree(run, ignore_errors=True)
    processes = start([*flags, "--out", "run"], world, kill_at)
    seen: set[int] = set()
    if not kill_at:
        time.sleep(moment)
        os.kill(processes[0], signal.SIGSTOP)
        seen = set(checkpoints.saved(run))  # they had been completed when it stopped
        os.kill(processes[0], signal.SIGKILL)
    wait(processes)
    if not run.exists():
        return ""
    problem = problem_in(run)
    if not problem and seen and max(seen) not in whole(run):
        problem = "a completed checkpoint is lost"
    return problem or went_on(run, Path("sound-run"), world, flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="kill at every so many-th change")
    parser.add_argument("--moments", type=int, default=100, help="and at so many random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--sharded", action="store_true", help="full fine-tuning on two ranks")
    o = parser.parse_args()
    pictures.draw_grid = pictures.draw_curve = draw_nothing  # a second each, and no state
    world, flags = 1 + o.sharded, SHORT.split()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if not o.sharded:  # as many files, in less time
            shapes_model.CHECKPOINT = small_network.write(Path("small.safetensors").resolve())
        else:
            Path("train.txt").write_text("a dog\na cat\n")
            Path("heldout.txt").write_text("a bird\n")
            texts = "--prompts train.txt --eval-prompts heldout.txt"
            pipeline = str(random_pipelines.sd3(Path("pipeline")))
            flags += [*RELEASED.split(), *texts.split(), "--model", pipeline]
        began = time.monotonic()
        assert not any(wait(start([*flags, "--out", "sound-run"], world))), "the run itself fails"
        spent, changes = time.monotonic() - began, int(Path("changes").read_text())
        kills = [(n, 0.0) for n in range(1, changes + 1, o.every)]
        draw = random.Random(o.seed)
        kills += [(0, draw.uniform(0, spent)) for _ in range(o.moments)]
        lost = 0
        for kill_at, moment in tqdm(kills, "kills"):
            problem = kill_once(world, flags, kill_at, moment)
            if problem:
                lost += 1
                print(
                    f"killed at {f'change {kill_at}' if kill_at else f'{moment:.3f} s'}: {problem}"
                )
    print(f"{len(kills)} kills ({changes} changes of files in a run), {lost} losses")
    sys.exit(1 if lost else 0)


def draw_nothing(content: object, about: object, path: Path, *more: object, **how: object) -> None:
    path.touch()


if __name__ == "__main__":
    main()
