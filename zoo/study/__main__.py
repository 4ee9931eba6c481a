"""The evidence of docs/EVIDENCE.md, made anew.

python -m zoo.study gradients             Study A: what each arm's gradient is, and is worth; hours
python -m zoo.study gradients --quick     the same in seconds, which shows nothing
python -m zoo.study train                 Study B: hours; goes on where it stopped
python -m zoo.study train --plan quick    the same in half a minute, which shows nothing
python -m zoo.study train --plan gpu      16 steps and more seeds, on a GPU
python -m zoo.study report                the tables of what there is
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from zoo import style
from zoo.study import gradients, report, training
from zoo.study.plan import PLANS

RESULTS = Path(__file__).with_name("results")


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line asks for. Bad input, or a run that fails: one line, status 2."""
    parser = argparse.ArgumentParser(
        "python -m zoo.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    command_gradients(commands.add_parser("gradients", help="Study A"))
    command_train(commands.add_parser("train", help="Study B"))
    command_report(commands.add_parser("report", help="tables and a figure"))
    options = parser.parse_args(argv)
    try:
        options.do(options)
    except (ValueError, OSError, training.Failed) as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)


def command_gradients(parser: argparse.ArgumentParser) -> None:
    """The options of Study A."""
    add = parser.add_argument
    add("--quick", action="store_true", help="a small version, which shows nothing")
    add("--out", type=Path, help="folder of results; default: zoo/study/results, quick: --work")
    add("--work", type=Path, help="folder of blocks; default: runs/study, quick: runs/study-quick")
    add("--threads", type=int, default=0, help="CPU threads; default: torch's own choice")
    parser.set_defaults(do=do_gradients)


def do_gradients(options: argparse.Namespace) -> None:
    """Run what is missing of Study A."""
    if options.threads < 0:
        raise ValueError(f"--threads {options.threads}: must be 0 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    size = gradients.QUICK if options.quick else gradients.FULL
    work = options.work or Path("runs/study-quick" if options.quick else "runs/study")
    gradients.study(size, options.out or (work if options.quick else RESULTS), work)


def command_train(parser: argparse.ArgumentParser) -> None:
    """The options of Study B."""
    add = parser.add_argument
    add("--plan", choices=tuple(PLANS), default="laptop", help="default: %(default)s")
    add("--out", type=Path, help="file of JSON lines; default: train-PLAN.jsonl in its results")
    add("--workers", type=int, default=2, help="runs at a time (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads of each (default: %(default)s)")
    add("--stages", type=int, help="the first so many stages of the plan (default: all)")
    parser.set_defaults(do=do_train)


def do_train(options: argparse.Namespace) -> None:
    """Run what is missing of Study B."""
    plan = PLANS[options.plan]
    stages = len(plan.stages) if options.stages is None else options.stages
    for name, value, most in (
        ("--workers", options.workers, 1024),
        ("--threads", options.threads, 1024),
        ("--stages", stages, len(plan.stages)),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} {value}: must be from 1 to {most}")
    path = options.out or RESULTS / f"train-{plan.name}.jsonl"
    training.study(plan, path, options.workers, options.threads, stages)


def command_report(parser: argparse.ArgumentParser) -> None:
    """The options of the report."""
    add = parser.add_argument
    add("--plan", choices=tuple(PLANS), default="laptop", help="of Study B (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="their folder; default: zoo/study/results")
    add("--figures", type=Path, help="folder for evidence.png (B) and gradients.png (A)")
    parser.set_defaults(do=do_report)


def do_report(options: argparse.Namespace) -> None:
    """Print the tables; draw figures if a folder is given."""
    plan = PLANS[options.plan]
    told = report.report(plan, options.results)
    if not told:
        raise ValueError(f"--results {options.results}: must hold results of the plan {plan.name}")
    print(told)
    if options.figures:
        for name, figure in report.figures(plan, options.results):
            figure.savefig(options.figures / name, dpi=style.DPI)


if __name__ == "__main__":
    main()
