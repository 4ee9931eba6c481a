"""The folder a run leaves, and how a run is interrupted. docs/RUNS.md says what the files hold."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch

from zoo import style
from zoo.rewards import spec as rewards
from zoo.training import pictures, policies
from zoo.training.compare import Line, draw_comparison
from zoo.training.draw import draw_block
from zoo.training.evaluate import judge_heldout
from zoo.training.metrics import Metrics
from zoo.training.options import Options
from zoo.training.prompts import Prompts
from zoo.training.ranks import Ranks, Stopped


class Interrupt:
    """The first Ctrl-C is noted, to end the run after its iteration; the second ends it at once."""

    def __init__(self) -> None:
        self.noted = False
        signal.signal(signal.SIGINT, self.note)

    def note(self, *_: Any) -> None:
        self.noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Run:
    """The run folder, which only the first rank writes.

    config.json, metrics.jsonl, before_after.png, curve.png, summary.json, and the weights; with
    --compare-every compare.jsonl and compare.png.
    """

    def __init__(
        self,
        o: Options,
        policy: policies.Policy,
        judges: rewards.Rewards,
        data: Prompts,
        ranks: Ranks,
    ):
        self.o, self.policy, self.judges, self.data, self.ranks = o, policy, judges, data, ranks
        self.first_judge = next(iter(judges.rewards))
        self.began = time.perf_counter()
        self.folder = Path(o.out or free_folder(policy.name))
        self.lines: list[dict[str, Any]] = []
        self.compared: list[Line] = []
        self.blocks: dict[str, pictures.Block] = {}
        self.summary: dict[str, Any] = {"heldout": {}, "heldout_family": {}, "diversity": {}}
        if ranks.leads:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.write("config.json", asdict(o))
            except OSError as problem:
                said = f"cannot be written ({problem.strerror})"
                raise Stopped(f"--out {self.folder}: {said}") from None
            print(f"writing {self.folder}/")

    def write(self, name: str, content: dict[str, Any]) -> None:
        """A file of JSON."""
        (self.folder / name).write_text(json.dumps(content, indent=1) + "\n")

    def log(self, iteration: int, metrics: Metrics) -> None:
        """Append a line to metrics.jsonl, with the seconds since the start."""
        seconds = round(time.perf_counter() - self.began, 2)
        line = {"iteration": iteration, **metrics, "seconds": seconds}
        self.lines.append(line)
        if self.ranks.leads:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def compare(self, iteration: int, lines: Sequence[Line]) -> None:
        """Append lines to compare.jsonl: each k-term beside the original."""
        self.compared += [{"iteration": iteration, **line} for line in lines]
        if self.ranks.leads:
            with open(self.folder / "compare.jsonl", "a") as file:
                for line in self.compared[len(self.compared) - len(lines) :]:
                    file.write(json.dumps(line) + "\n")

    def picture(self, title: str) -> None:
        """Draw before_after.png: what was drawn first, and what is drawn now."""
        prompts, noise = self.data.shown(self.policy.shape, self.policy.kind)
        block = draw_block(self.o, self.policy, self.judges, prompts, noise, self.ranks)
        before = dict(list(self.blocks.items())[:1])
        self.blocks = before | {title: block}
        if self.ranks.leads:
            judged = self.lines and f"heldout_{self.first_judge}" in self.lines[-1]
            headline = pictures.headline(self.lines, self.first_judge) if judged else ""
            path = self.folder / "before_after.png"
            pictures.draw_grid(self.blocks, prompts, path, headline)

    def judge(self, iteration: int, when: str = "") -> None:
        """Log the held-out means of the first number of ODE steps.

        Where `when` is said ("before", "after") those of all are judged, printed, and kept under
        that name for summary.json.
        """
        steps = self.o.eval_steps if when else self.o.eval_steps[:1]
        result = judge_heldout(self.o, self.policy, self.judges, self.data, steps, self.ranks)
        if when:
            self.summary["heldout"][when] = result["heldout"]
            self.summary["heldout_family"][when] = result["family"]
            self.summary["diversity"][when] = result["diversity"]
            if self.ranks.leads:
                print(f"{when}: {in_words(result)}")
        first = result["heldout"][str(steps[0])]
        self.log(iteration, {f"heldout_{judge}": mean for judge, mean in first.items()})

    def save(self, done: int, complete: bool = False) -> None:
        """Write the weights, curve.png and summary.json as of now, after `done` iterations.

        No rank goes on, or away, before that is done.
        """
        leads = self.ranks.leads
        self.summary["weights"] = self.policy.save(self.folder if leads else Path(), leads)
        if leads:
            path, pairs = self.folder / "curve.png", self.o.heldout
            pictures.draw_curve(self.lines, self.first_judge, path, pairs=pairs)
            if self.compared:
                figure = draw_comparison(self.compared)
                figure.savefig(self.folder / "compare.png", dpi=style.DPI)
            self.summarise(done, complete)
        self.ranks.gather(None)

    def finish(self, done: int, complete: bool) -> None:
        """Save for the last time, and say so."""
        self.save(done, complete)
        if self.ranks.leads:
            how = "finished" if complete else "interrupted"
            spent = f"after {done} iterations and {self.summary['seconds']:.0f} s"
            print(f"{how} {spent}: look at {self.folder / 'before_after.png'}")

    def summarise(self, done: int, complete: bool) -> None:
        """Write summary.json: held-out figures, and where, with what and how long."""
        packages = ["torch", "numpy"]
        if self.o.model:
            packages += ["diffusers", "transformers", "peft"]
        versions = {name: importlib.metadata.version(name) for name in packages}
        cuda = self.ranks.device.type == "cuda"
        cpu = f"cpu, {torch.get_num_threads()} threads"
        self.summary |= {
            "seconds": round(time.perf_counter() - self.began, 1),
            "iterations": done,
            "interrupted": not complete,
            "seed": self.o.seed,
            "device": torch.cuda.get_device_name() if cuda else cpu,
            "ranks": self.ranks.world,
            "versions": {"python": platform.python_version(), **versions},
            "command": shlex.join(["python", *sys.argv]),
        }
        if cuda:
            self.summary["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.write("summary.json", self.summary)


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
