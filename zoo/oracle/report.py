"""The report of the oracle: rows as lines, and the conclusion."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from zoo.oracle.bench import Bench
from zoo.oracle.findings import BROKEN, EXACT, ORDER, UNCLEAR, Row


def is_statistical(row: Row) -> bool:
    return row.basis.startswith("z = ")


def summarise(rows: Sequence[Row], claims: dict) -> str:
    """Per claim one line for each statement, kernel, rollout mode and form: verdict, and the row nearest to failing."""
    lines, groups, last = [], {}, None
    for row in rows:
        groups.setdefault(
            (row.claim, row.what, row.kernel, row.rollouts, row.form, row.registered), []
        ).append(row)
    for (name, what, kernel, rollouts, form, registered), members in groups.items():
        if name != last:
            lines += ["", f"{name}  {claims[name].sentence}"]
            last = name
        wrong = [row for row in members if row.verdict != registered]
        off = lambda r: abs(r.measured - (r.predicted or 0)) / max(r.tolerance, 1e-300)
        row = (min if registered == BROKEN else max)(wrong or members, key=off)
        verdict = (
            f"{row.verdict}, as predicted" if not wrong and registered == BROKEN else row.verdict
        )
        condition = ", ".join(
            filter(
                None,
                [
                    {"shared_anchor": "shared anchors", "independent": "independent rollouts"}.get(
                        rollouts
                    ),
                    form,
                ],
            )
        )
        found = (
            f"error ~ D^{row.measured:.2f}, predicted {row.predicted:.2f}"
            if registered == ORDER
            else f"off by {row.measured:.2g}"
            if row.predicted == 0
            else f"{row.measured:.4g} for {row.predicted:.4g}"
        )
        lines.append(
            f"  {verdict:20} {kernel:9} {what}{f' ({condition})' if condition else ''}: {found}; tolerance "
            f"{row.tolerance:.1g} ({row.basis}); {len(members)} row{'s' * (len(members) > 1)}"
            + (
                f"   <- registered {registered}; {len(wrong)} of {len(members)} rows differ"
                if wrong
                else ""
            )
        )
    return "\n".join(lines)


def status_of(rows: Sequence[Row]) -> int:
    """0: every verdict registered; 1: one is not; 3: none is wrong but one is inconclusive."""
    if any(row.verdict not in (row.registered, UNCLEAR) for row in rows):
        return 1
    return 3 if any(row.verdict == UNCLEAR for row in rows) else 0


# What the conclusion says: for a claim, clauses with a blank for the kernels all of whose rows about `words` (and the
# fields named) have the verdict. A clause about which nothing was tested is left out.
SENTENCES = (
    ("E1", "Rollouts, rewards and advantages do not depend on S or form under {}", EXACT, "", {}),
    (
        "E2",
        "In a group that branches from one state, reward attribution keeps its direction exactly under {}",
        EXACT,
        "direction of the group's attribution",
        {"rollouts": "shared_anchor", "what": "direction of the group's attribution"},
    ),
    ("E2", "its size is the original's times (c_1/c_k)^2 under {}", EXACT, "size against", {}),
    (
        "E2",
        "with independent trajectories the direction is lost under {}",
        BROKEN,
        "direction",
        {"rollouts": "independent"},
    ),
    (
        "E3",
        "The k-term's ratio is no importance ratio: its mean is off 1 under {}",
        BROKEN,
        "mean ratio is 1",
        {},
    ),
    ("E3", "by the predicted amount under {}", EXACT, "mean ratio is exp", {}),
    (
        "E4",
        "On straight flows decomposed and original are one density for every theta under {}",
        EXACT,
        "mean, std",
        {},
    ),
    ("E4", "and two under {}", BROKEN, "mean, std", {}),
    ("E4", "ratios of an updated theta agree under {}", EXACT, "log-ratio", {}),
    (
        "E5",
        "The velocities keep the original's total weight at every step under {}",
        EXACT,
        "add up to",
        {},
    ),
    (
        "E6",
        "Parameter gradients differ from the original's, by design, under {}",
        BROKEN,
        "1 - cosine",
        {},
    ),
    ("E6", "the means meet as steps shrink under {}", ORDER, "over c_1", {}),
    ("E6", "but the bias of independent rollouts does not vanish under {}", ORDER, "not to 0", {}),
    (
        "E7",
        "The matched form keeps attribution in direction and size, in both rollout modes, under {}",
        EXACT,
        "attribution",
        {},
    ),
    ("E7", "its mean ratio (summed log-probabilities) is 1 under {}", EXACT, "mean ratio", {}),
    (
        "E8",
        "Finer steps multiply to the original step if they share one velocity under {}",
        EXACT,
        "equal shares",
        {"what": "score and ratio of the product, equal shares"},
    ),
    ("E8", "and to another, if a network is evaluated anew, under {}", BROKEN, "anew", {}),
    ("E9", "Each term is clipped by itself under {}", EXACT, "after an update", {}),
    (
        "E10",
        "Averaging log-probabilities pulls the mean ratio below 1 under {}",
        BROKEN,
        "averaged ratio is 1",
        {},
    ),
    ("E11", "Samples reach spread data as steps shrink under {}", ORDER, "to the data", {}),
    ("E11", "and miss it under {}", BROKEN, "samples is the data", {}),
    (
        "TRUTH",
        "Against the policy gradient in closed form the original estimator is unbiased under {}",
        EXACT,
        "policy gradient",
        {"k": 1},
    ),
    (
        "TRUTH",
        "k-terms are biased as printed under {}",
        BROKEN,
        "policy gradient",
        {"form": "paper"},
    ),
    ("TRUTH", "and even matched under {}", BROKEN, "policy gradient", {"form": "matched"}),
    ("MARGINAL", "Samplers have the law that theory gives them under {}", EXACT, "", {}),
    ("GRADIENT", "Reverse, forward and numerical gradients agree under {}", EXACT, "", {}),
)


def conclusion(rows: Sequence[Row]) -> str:
    """The referee's answer in at most 15 lines, said from the verdicts alone."""
    said: dict[str, list[str]] = {}
    for name, clause, verdict, words, where in SENTENCES:
        verdicts: dict[str, set[str]] = {}
        for row in rows:
            if (
                row.claim == name
                and words in row.what
                and all(getattr(row, f) == v for f, v in where.items())
            ):
                verdicts.setdefault(row.kernel, set()).add(row.verdict)
        kernels = [kernel for kernel, found in verdicts.items() if found == {verdict}]
        undecided = [kernel for kernel, found in verdicts.items() if UNCLEAR in found]
        if verdicts:
            said.setdefault(name, []).append(
                clause.format(", ".join(kernels) or "no kernel tested")
                + (f" (undecided: {', '.join(undecided)})" if undecided else "")
            )
    lines = [f"{name}: {'; '.join(clauses)}." for name, clauses in said.items()]
    wrong = sum(row.verdict != row.registered for row in rows)
    lines.append(
        {
            0: f"All {len(rows)} verdicts are the registered ones.",
            1: f"{wrong} of {len(rows)} verdicts are NOT the registered ones: see the rows marked <-.",
            3: f"{wrong} of {len(rows)} verdicts are inconclusive; none is wrong.",
        }[status_of(rows)]
    )
    return "\n".join(lines)


def environment(bench: Bench) -> dict:
    """What a report was made with."""

    def git(*words: str) -> str | None:
        done = subprocess.run(
            ["git", *words],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else None

    cuda, changed = bench.device.type == "cuda", git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(bench.model.dtype if bench.model else bench.dtype).removeprefix("torch."),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }
