"""Study B: every arm of a plan trained and judged, each run a program of its own.

A run is `python train.py`, judged by `python -m zoo.training.evaluate`. What has finished is a line
of a file of JSON lines; a study that is started again does what is missing. Lines of one plan only.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zoo.shapes.model import CHECKPOINT
from zoo.study.plan import Arm, Plan, Run, chosen

ROOT = Path(__file__).parents[2]
Line = dict[str, Any]

# glibc keeps its heap instead of giving pages back and asking for them again: the same numbers, a
# quarter sooner.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824"}


class Failed(Exception):
    """A run that ended otherwise than it should; its last line says why."""


class Diverged(Failed):
    """One whose rewards were no longer finite."""


def command_of(plan: Plan, run: Run, threads: int) -> list[str]:
    """The flags of train.py for a run. Its own judging is cut down: evaluate judges instead."""
    own = ["--seed", str(run.seed), "--lr", str(run.lr), "--threads", str(threads)]
    unused = ["--heldout", "4", "--eval-steps", str(min(plan.eval_steps))]
    return [*plan.flags, *plan.arm(run.arm).flags, *own, *unused]


def program(arguments: Sequence[str], threads: int) -> str:
    """What a program of this repository prints. Raises Failed for a status other than 0.

    Diverged, where what it says last is that numbers are not finite.
    """
    environment = {**os.environ, **HEAP, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        kind = Diverged if "not finite" in "".join(said) else Failed
        raise kind(f"{shlex.join(arguments)}: {''.join(said)}")
    return done.stdout


def judged(plan: Plan, checkpoint: Path, steps: Sequence[int], threads: int) -> Line:
    """What zoo.training.evaluate says of a checkpoint."""
    flags = ["--heldout", str(plan.heldout), "--threads", str(threads)]
    if "cuda" in plan.flags:
        flags += ["--device", "cuda"]
    steps_flag = ["--eval-steps", *map(str, steps)]
    module = ["-m", "zoo.training.evaluate", str(checkpoint)]
    found: Line = json.loads(program([*module, *flags, *steps_flag], threads))
    return found


def execute(plan: Plan, run: Run, threads: int) -> Line:
    """Train and judge; the line of a run. One that diverges has every outcome 0, as registered."""
    steps = plan.eval_steps[:1] if run.role == "search" else plan.eval_steps
    command = command_of(plan, run, threads)
    told = shlex.join(["python", "train.py", *command])
    line = {"plan": plan.name, **vars(run), "commit": commit(), "command": told}
    try:
        return line | trained(plan, command, steps, threads)
    except Diverged as problem:
        nothing = {str(n): {"right": 0.0, "rule": 0.0} for n in steps}
        return line | {"diverged": str(problem), "heldout": nothing, "family": {}, "diversity": 0.0}


def trained(plan: Plan, command: Sequence[str], steps: Sequence[int], threads: int) -> Line:
    """What a run left, and how it was judged."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        program(["train.py", *command, "--out", str(out)], threads)
        summary = json.loads((out / "summary.json").read_text())
        config = json.loads((out / "config.json").read_text())
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found = judged(plan, out / "checkpoint.safetensors", steps, threads)
    rewards = [line["reward"] for line in metrics if "reward" in line]
    return {
        **found,
        "rewards": rewards,
        "seconds": summary["seconds"],
        "device": summary["device"],
        "versions": summary["versions"],
        "config": {name: value for name, value in config.items() if name != "out"},
    }


def before(plan: Plan, threads: int) -> Line:
    """The line of the shipped model, which is where every run starts."""
    return {
        "plan": plan.name,
        "role": "before",
        **judged(plan, CHECKPOINT, plan.eval_steps, threads),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the working tree, with -dirty if more than results differ; "" without git."""
    tree = ["--", ".", ":!zoo/study/results"]
    head, changes = (
        subprocess.run(["git", *told], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for told in (["rev-parse", "--short=12", "HEAD"], ["diff", "HEAD", "--stat", *tree])
    )
    return head + ("-dirty" if changes else "")


def read(path: Path, plan: Plan) -> list[Line]:
    """The lines of a file; none where there is no file.

    Raises ValueError, in one line, for what is no line of the plan as it is now.
    """
    lines = []
    texts = path.read_text().splitlines() if path.exists() else []
    for number, text in enumerate(texts, 1):
        place = f"{path}, line {number}"
        try:
            line = json.loads(text)
            name, role = line["plan"], line["role"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{place}: must be a line of a study; remove it to go on") from None
        if name != plan.name:
            raise ValueError(f"{place}: is of the plan {name!r}, must be of {plan.name!r}")
        if role != "before":
            check_command(plan, line, place)
        lines.append(line)
    return lines


def check_command(plan: Plan, line: Line, place: str) -> None:
    """A run was started as the plan would start it now; on how many threads may differ."""
    found = shlex.split(line["command"])[2:]
    threads = int(found[found.index("--threads") + 1])
    if line["arm"] not in [arm.name for arm in plan.arms]:
        raise ValueError(f"{place}: is of the arm {line['arm']!r}, which the plan lacks")
    if found != command_of(plan, key(line), threads):
        raise ValueError(f"{place}: {line['command']!r} must be what the plan has for {key(line)}")


def key(line: Line) -> Run:
    """The run a line is of."""
    return Run(line["role"], line["arm"], line["lr"], line["seed"])


def rate(plan: Plan, arm: Arm, lines: Sequence[Line]) -> float:
    """The arm's rate by the search. Raises ValueError where that is not complete."""
    owner = plan.arm(arm.rate_of) if arm.rate_of else arm
    steps = str(plan.eval_steps[0])
    scores = [
        (line["lr"], line["heldout"][steps][plan.outcome])
        for line in lines
        if (line["role"], line.get("arm")) == ("search", owner.name)
    ]
    return chosen(plan, owner, scores)


def study(plan: Plan, path: Path, workers: int, threads: int, stages: int) -> None:
    """Do what is missing of the first `stages` stages, and add a line for each run to the file.

    Raises Failed for a run that failed, after those beside it; ValueError for another plan's file.
    """
    lines = read(path, plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not any(line["role"] == "before" for line in lines):
        add(path, lines, before(plan, threads))
    for number, stage in enumerate(plan.stages[:stages], 1):
        title = f"stage {number} of {stages}"
        perform(plan, plan.search(stage), path, lines, workers, threads, f"{title}, rates")
        rates = {arm.name: rate(plan, arm, lines) for arm in stage}
        perform(plan, plan.judged(stage, rates), path, lines, workers, threads, title)


def perform(
    plan: Plan,
    runs: Sequence[Run],
    path: Path,
    lines: list[Line],
    workers: int,
    threads: int,
    title: str,
) -> None:
    """Those of the runs that have no line yet, `workers` at a time, with progress.

    Where one fails, no other starts; those under way are kept, and the first failure is raised.
    """
    have = {key(line) for line in lines if line["role"] != "before"}
    missing = [run for run in runs if run not in have]
    bar = tqdm(total=len(runs), initial=len(runs) - len(missing), desc=title, smoothing=0)
    failure: BaseException | None = None
    with ThreadPoolExecutor(workers) as pool, bar:
        waiting: set[Future[Line]] = set()
        while waiting or (missing and failure is None):
            while missing and failure is None and len(waiting) < workers:
                waiting.add(pool.submit(execute, plan, missing.pop(0), threads))
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                problem = future.exception()
                if problem is None:
                    add(path, lines, future.result())
                    bar.update()
                else:
                    failure = failure or problem
    if failure is not None:
        raise failure


def add(path: Path, lines: list[Line], line: Line) -> None:
    """One more line, in the file and in memory."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    lines.append(line)
