"""The folder a run leaves, and how a run is interrupted. docs/RUNS.md says what the files hold."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from zoo import style
from zoo.rewards import spec as rewards
from zoo.training import checkpoints, files, finite, pictures, policies, shipped
from zoo.training.compare import Line, draw_comparison
from zoo.training.draw import draw_block
from zoo.training.evaluate import judge_heldout
from zoo.training.metrics import Metrics
from zoo.training.options import Options
from zoo.training.prompts import Prompts
from zoo.training.ranks import Interrupted, Ranks, Stopped, Unwritable

BEFORE = "before.safetensors"  # what was drawn first, for a run that goes on
NOT_FINITE = "not_finite.json"


class Interrupt:
    """The first SIGINT (Ctrl-C) or SIGTERM is noted, to end the run after its iteration.

    The second ends it at once.
    """

    def __init__(self) -> None:
        self.noted = False
        signal.signal(signal.SIGINT, self.note)
        signal.signal(signal.SIGTERM, self.note)

    def note(self, *_: Any) -> None:
        self.noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Run:
    """The run folder, which only the first rank writes, and what the run has done so far.

    config.json, metrics.jsonl, before_after.png, curve.png, summary.json, checkpoints/ and a link
    to the newest weights; with --compare-every compare.jsonl and compare.png.
    """

    def __init__(
        self,
        o: Options,
        policy: policies.Policy,
        judges: rewards.Rewards,
        data: Prompts,
        ranks: Ranks,
        checkpoint: Path | None = None,
    ):
        self.o, self.policy, self.judges, self.data, self.ranks = o, policy, judges, data, ranks
        self.checkpoint = checkpoint  # to go on from
        self.done = int(checkpoint.name) if checkpoint else 0  # iterations
        self.saved = self.done
        self.first_judge = next(iter(judges.rewards))
        self.interrupt = Interrupt()
        self.began = time.perf_counter()
        self.folder = Path(o.resume or o.out or free_folder(policy.name))
        self.lines: list[dict[str, Any]] = []
        self.compared: list[Line] = []
        self.blocks: dict[str, pictures.Block] = {}
        self.summary: dict[str, Any] = {"heldout": {}, "heldout_family": {}, "diversity": {}}
        self.write(self.make)

    def write(self, job: Callable[..., None], *arguments: Any) -> None:
        """job(*arguments) on the first rank. Raises Unwritable, on all, where its disk fails."""
        files.by_first(self.ranks, self.folder, job, *arguments)

    def make(self) -> None:
        """The folder, with all options."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = {name: z for name, z in asdict(self.o).items() if name != "resume"}
        files.write_json(self.folder / "config.json", config)
        print(f"writing {self.folder}/", flush=True)

    def begin(self, optimizer: torch.optim.Optimizer, average: policies.EMA | None) -> None:
        """What training moves, as the checkpoint has it, and the run's own lines and figures."""
        self.optimizer, self.average = optimizer, average
        if self.checkpoint:
            moved = self.policy, optimizer, average
            state = self.ranks.together(checkpoints.restore, self.checkpoint, *moved, self.ranks)
            self.began -= state["seconds"]
            self.lines, self.compared = state["lines"], state["compared"]
            self.summary = state["summary"]
            self.blocks = read_block(self.folder / BEFORE)
            if self.ranks.leads and not self.blocks:
                print(f"{self.folder / BEFORE}: cannot be read; pictures begin with the next")
        if self.o.resume:
            self.write(self.rewind)

    def rewind(self) -> None:
        """The files of the run as they were at the checkpoint."""
        for name, lines in (("metrics.jsonl", self.lines), ("compare.jsonl", self.compared)):
            if lines or (self.folder / name).exists():
                files.write_lines(self.folder / name, lines)
        (self.folder / NOT_FINITE).unlink(missing_ok=True)

    def listen(self) -> None:
        """Raise Interrupted, on all ranks, where one was asked to end."""
        if not self.ranks.all(not self.interrupt.noted):
            raise Interrupted

    def log(self, iteration: int, metrics: Metrics) -> None:
        """Append a line to metrics.jsonl, with the seconds since the start."""
        seconds = round(time.perf_counter() - self.began, 2)
        line = {"iteration": iteration, **metrics, "seconds": seconds}
        self.lines.append(line)
        self.write(files.append_line, self.folder / "metrics.jsonl", line)

    def compare(self, iteration: int, lines: Sequence[Line]) -> None:
        """Append lines to compare.jsonl: each k-term beside the original."""
        for line in lines:
            self.compared.append({"iteration": iteration, **line})
            self.write(files.append_line, self.folder / "compare.jsonl", self.compared[-1])

    def look(self) -> None:
        """Judge held-out pictures and draw some, where that is due: by the averaged weights."""
        o, done = self.o, self.done
        averaged = self.average.applied if self.average else nullcontext
        with averaged():
            if done == 0:
                self.picture("before")
                self.judge(0, "before")
            elif done == o.iterations:
                self.judge(done, "after")
                self.picture(f"after {done} iterations")
            elif o.eval_every and done % o.eval_every == 0:
                self.judge(done)
                self.picture(f"after {done} iterations")
                self.report(complete=False)
            elif done in o.draw_at:
                self.picture(f"after {done} iterations")
                self.say_drawn()

    def say_drawn(self) -> None:
        """Where there is a picture to look at meanwhile; beside the progress bar."""
        if self.ranks.leads:
            spent = f"after {self.done} iterations, {time.perf_counter() - self.began:.0f} s"
            tqdm.write(f"{spent}: {self.folder / 'before_after.png'}")

    def picture(self, title: str) -> None:
        """Draw before_after.png: what was drawn first, and what is drawn now."""
        prompts, noise = self.data.shown(self.policy.shape, self.policy.kind)
        what = self.o, self.policy, self.judges, prompts, noise, self.ranks
        block = draw_block(*what, self.listen)
        before = dict(list(self.blocks.items())[:1])
        self.blocks = before | {title: block}
        self.write(self.draw_blocks, prompts)
        if title == "before":
            self.write(write_block, self.folder / BEFORE, block)

    def draw_blocks(self, prompts: Sequence[str]) -> None:
        """before_after.png, with a headline where something was judged just now."""
        judged = self.lines and f"heldout_{self.first_judge}" in self.lines[-1]
        headline = pictures.headline(self.lines, self.first_judge) if judged else ""
        with files.replacing(self.folder / "before_after.png") as path:
            pictures.draw_grid(self.blocks, prompts, path, headline)

    def judge(self, iteration: int, when: str = "") -> None:
        """Log the held-out means of the first number of ODE steps.

        Where `when` is said ("before", "after") those of all are judged, printed, and kept under
        that name for summary.json. Before training the shipped judgement may be this run's.
        """
        steps = self.o.eval_steps if when else self.o.eval_steps[:1]
        kept = None
        if when == "before":
            kept = shipped.judgement(self.o, self.data, self.blocks[when], self.ranks)
        what = self.o, self.policy, self.judges, self.data, steps, self.ranks
        result = kept or judge_heldout(*what, self.listen)
        if when:
            self.summary["heldout"][when] = result["heldout"]
            self.summary["heldout_family"][when] = result["family"]
            self.summary["diversity"][when] = result["diversity"]
            if self.ranks.leads:
                print(f"{when}: {in_words(result)}{' (shipped with the weights)' if kept else ''}")
        first = result["heldout"][str(steps[0])]
        self.log(iteration, {f"heldout_{judge}": mean for judge, mean in first.items()})

    def save_is_due(self) -> bool:
        """Every --save-every iterations, before a judgement, and at the end."""
        often = [every for every in (self.o.save_every, self.o.eval_every) if every]
        return self.done == self.o.iterations or any(self.done % every == 0 for every in often)

    def save(self) -> None:
        """A checkpoint of what there is now, unless it is there; older ones may go.

        Raises NotFinite where a weight is not finite, and Stopped where the disk fails.
        """
        if self.saved == self.done:
            return
        moved = [*self.policy.tuned, *(self.average.average if self.average else ())]
        finite.require(self.ranks, self.done, finite.weights(moved))
        state = {
            "seconds": round(time.perf_counter() - self.began, 2),
            "lines": self.lines,
            "compared": self.compared,
            "summary": self.summary,
            "options": asdict(self.o),
            "prompts": self.data.digest(),
        }
        what = self.policy, self.optimizer, self.average, state
        needed = checkpoints.bytes_of(self.o, self.policy.sizes)
        self.summary["weights"] = checkpoints.write(
            self.folder, self.done, *what, needed, self.ranks
        )
        self.saved = self.done
        self.write(checkpoints.prune, self.folder, self.done, self.best())

    def best(self) -> int | None:
        """The iteration after which the first judge's held-out mean was highest."""
        name = f"heldout_{self.first_judge}"
        judged = [(line[name], line["iteration"]) for line in self.lines if name in line]
        trained = [(mean, iteration) for mean, iteration in judged if iteration > 0]
        return max(trained)[1] if trained else None

    def stop(self, problem: Stopped) -> None:
        """Keep what there is where that can be; numbers that are not finite in a file.

        What the disk refuses of it is said, and hides nothing of the problem.
        """
        if isinstance(problem, Unwritable):
            return
        try:
            if isinstance(problem, finite.NotFinite):
                self.write(files.write_json, self.folder / NOT_FINITE, problem.report)
            if problem.keep:
                self.save()
            self.report(complete=False)
        except Stopped as second:
            if self.ranks.leads:
                print(second, flush=True)

    def finish(self, complete: bool) -> None:
        """Report for the last time, and say how the run ended."""
        self.report(complete)
        if self.ranks.leads:
            how = "finished" if complete else "interrupted"
            spent = f"after {self.done} iterations and {time.perf_counter() - self.began:.0f} s"
            then = f"look at {self.folder / 'before_after.png'}"
            on = f"to go on, add --resume {self.folder} to train.py"
            print(f"{how} {spent}: {then if complete else on}", flush=True)

    def report(self, complete: bool) -> None:
        """Draw curve.png, and compare.png, and write summary.json as of now."""
        self.write(self.draw_curves)
        self.write(self.summarise, complete)

    def draw_curves(self) -> None:
        """The run so far."""
        with files.replacing(self.folder / "curve.png") as path:
            pictures.draw_curve(self.lines, self.first_judge, path, pairs=self.o.heldout)
        if self.compared:
            with files.replacing(self.folder / "compare.png") as path:
                draw_comparison(self.compared).savefig(path, dpi=style.DPI)

    def summarise(self, complete: bool) -> None:
        """Write summary.json: held-out figures, and where, with what and how long."""
        packages = ["torch", "numpy"]
        if self.o.model:
            packages += ["diffusers", "transformers", "peft"]
        versions = {name: importlib.metadata.version(name) for name in packages}
        cuda = self.ranks.device.type == "cuda"
        cpu = f"cpu, {torch.get_num_threads()} threads"
        self.summary |= {
            "seconds": round(time.perf_counter() - self.began, 1),
            "iterations": self.done,
            "interrupted": not complete,
            "seed": self.o.seed,
            "device": torch.cuda.get_device_name() if cuda else cpu,
            "ranks": self.ranks.world,
            "versions": {"python": platform.python_version(), **versions},
            "command": shlex.join(["python", *sys.argv]),
        }
        if cuda:
            self.summary["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        files.write_json(self.folder / "summary.json", self.summary)


def write_block(path: Path, block: pictures.Block) -> None:
    """Keep what a run has drawn before it began, in 8 bits."""
    images = (255 * block.images).round().to(torch.uint8)
    with files.replacing(path) as part:
        save_file({"images": images.contiguous(), "scores": block.scores.contiguous()}, part)


def read_block(path: Path) -> dict[str, pictures.Block]:
    """The same under its title; nothing where it is gone."""
    try:
        found = load_file(path)
        return {"before": pictures.Block(found["images"].float() / 255, found["scores"])}
    except (OSError, SafetensorError, KeyError):
        return {}


def free_folder(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, ... that does not exist."""
    folders = (Path(f"runs/{name}-{i}") for i in count(1))
    return next(folder for folder in folders if not folder.exists())


def in_words(result: dict[str, Any]) -> str:
    """A judgement in one line: each judge's mean by ODE steps, families, diversity."""
    means: dict[str, list[str]] = {}
    for steps in sorted(result["heldout"], key=int):
        for judge, mean in result["heldout"][steps].items():
            means.setdefault(judge, []).append(f"{steps}: {mean:.3f}")
    said = [f"{judge} {', '.join(values)}" for judge, values in means.items()]
    said += [f"{kind} {mean:.2f}" for kind, mean in result["family"].items()]
    return f"held-out, by ODE steps: {'; '.join(said)}; diversity {result['diversity']:.3f}"
