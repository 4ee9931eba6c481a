"""The folder a run leaves."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from zoo.rewards import spec as zoo_rewards
from zoo.training import pictures
from zoo.training.draw import draw_block
from zoo.training.evaluate import judge_heldout
from zoo.training.options import Options, Parser
from zoo.training.prompts import Prompts
from zoo.training.ranks import Ranks


class Run:
    """The run folder, which only rank 0 writes: config.json, metrics.jsonl, pictures, weights, summary.json."""

    def __init__(
        self, o: Options, policy, judges: zoo_rewards.Rewards, data: Prompts, ranks: Ranks
    ):
        self.o, self.policy, self.judges, self.data, self.ranks = o, policy, judges, data, ranks
        self.lines, self.columns, self.began, self.complete = [], {}, time.perf_counter(), False
        self.summary: dict = {"heldout": {}, "heldout_family": {}, "diversity": {}}
        if ranks.rank == 0:
            self.folder = (
                Path(o.out)
                if o.out
                else next(
                    folder
                    for folder in (Path(f"runs/{policy.name}-{i}") for i in range(1, 10**6))
                    if not folder.exists()
                )
            )
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "config.json").write_text(json.dumps(asdict(o), indent=1) + "\n")
            except OSError as problem:
                Parser().error(f"--out {self.folder}: cannot be written ({problem.strerror})")
            print(f"writing {self.folder}/")

    def log(self, line: dict) -> None:
        """Append a line to metrics.jsonl, with the seconds since the start."""
        line["seconds"] = round(time.perf_counter() - self.began, 2)
        self.lines.append(line)
        if self.ranks.rank == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def picture(self, title: str) -> None:
        """Draw before_after.png: what was drawn first, and now."""
        prompts, noise = self.data.shown(self.policy.shape, self.policy.kind)
        block = draw_block(self.o, self.policy, self.judges, prompts, noise, self.ranks)
        self.columns = dict([*list(self.columns.items())[:1], (title, block)])
        if self.ranks.rank == 0:
            pictures.draw_grid(self.columns, prompts, self.folder / "before_after.png")

    def judge(self, when: str = "") -> dict:
        """Held-out figures as a log line: of the first number of steps or, kept as summary["heldout"][when], of all."""
        steps = self.o.eval_steps if when else self.o.eval_steps[:1]
        result = judge_heldout(self.o, self.policy, self.judges, self.data, steps, self.ranks)
        first = result["heldout"][str(steps[0])]
        if when:
            for key, name in (
                ("heldout", "heldout"),
                ("heldout_family", "family"),
                ("diversity", "diversity"),
            ):
                self.summary[key][when] = result[name]
            if self.ranks.rank == 0:
                print(
                    f"{when}: held-out, by ODE steps: "
                    + "; ".join(
                        f"{name} "
                        + ", ".join(
                            f"{T}: {result['heldout'][str(T)][name]:.3f}" for T in sorted(steps)
                        )
                        for name in first
                    )
                    + "".join(f"; {name} {value:.2f}" for name, value in result["family"].items())
                    + f"; diversity {result['diversity']:.3f}"
                )
        return {f"heldout_{name}": value for name, value in first.items()}

    def save(self, iterations: int) -> None:
        """Write the weights, curve.png and summary.json as of now; no rank goes on, or away, before that is done."""
        main = self.ranks.rank == 0
        self.summary["weights"] = self.policy.save(self.folder if main else Path(), main)
        if main:
            pictures.draw_curve(
                self.lines, next(iter(self.judges.rewards)), self.folder / "curve.png"
            )
            self.summarise(iterations)
        self.ranks.gather(None)

    def summarise(self, iterations: int) -> None:
        """Write summary.json: held-out figures, and where, with what and how long."""
        o, device = self.o, self.ranks.device
        packages = (
            ("torch", "numpy", "diffusers", "transformers", "peft")
            if o.model
            else ("torch", "numpy")
        )
        versions = {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in packages},
        }
        where = (
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads"
        )
        self.summary |= {
            "seconds": round(time.perf_counter() - self.began, 1),
            "iterations": iterations,
            "interrupted": not self.complete,
            "seed": o.seed,
            "device": where,
            "ranks": self.ranks.world,
            "versions": versions,
            "command": shlex.join(["python", *sys.argv]),
        }
        if device.type == "cuda":
            self.summary["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        (self.folder / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n")
