"""The report: paired by seed, at the right rate and steps, decided only when all is there."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from matplotlib import pyplot

from zoo.study import gradients, report
from zoo.study.gradients import identity
from zoo.study.inference import holm, interval
from zoo.study.plan import LAPTOP, Arm, less
from zoo.study.training import read

ARMS = (Arm("a", "arm A", (), 3), Arm("b", "arm B", (), 3), Arm("c", "arm C", (), 2))
PLAN = replace(
    LAPTOP,
    stages=(ARMS,),
    contrasts=(
        less("b − a", "b", "a", primary=True),
        less("c − a", "c", "a", primary=True),
        less("c − b", "c", "b", added=True),
    ),
    seeds=(200, 201, 202),
    common_arms=("a", "b"),
    eval_steps=(16, 8),
)
RIGHT = {"a": [0.5, 0.6, 0.7], "b": [0.55, 0.66, 0.71], "c": [0.4, 0.5]}
RATES = {"a": 2e-4, "b": 4e-4, "c": 2e-4}


def line(role, arm, lr, seed, right):
    means = {"16": {"right": right, "rule": right / 2}, "8": {"right": 0.8 * right, "rule": 0.3}}
    return {
        "role": role, "arm": arm, "lr": lr, "seed": seed, "heldout": means, "diversity": 1 - right
    }  # fmt: skip


def lines_of(right):
    """Shuffled, with a search that must not count, and arm b at the common rate as well."""
    lines = [
        {"role": "before", **{k: line("", "", 0, 0, 0.3)[k] for k in ("heldout", "diversity")}}
    ]
    for arm, values in right.items():
        lines += [line("judged", arm, RATES[arm], 200 + i, x) for i, x in enumerate(values)]
        lines += [line("search", arm, RATES[arm], 100, 0.99)]
    lines += [line("common", "b", 2e-4, 200 + i, x) for i, x in enumerate([0.8, 0.8, 0.9])]
    return lines[::-1]


def found(right=RIGHT):
    return {
        (one.contrast.name, one.rates, one.steps): one
        for one in report.differences(PLAN, lines_of(right))
    }


def test_differences_are_paired_by_seed():
    """0.05, 0.06, 0.01 for b − a at its own rate; 0.3, 0.2, 0.2 at the common one."""
    seen = found()
    own = seen["b − a", (4e-4, 2e-4), 16]
    assert own.right == pytest.approx(interval([0.05, 0.06, 0.01])) and own.complete
    assert own.rule == pytest.approx(interval([0.025, 0.03, 0.005]))
    assert own.diversity == pytest.approx(interval([-0.05, -0.06, -0.01]))
    fewer = seen["b − a", (4e-4, 2e-4), 8]
    assert fewer.diversity is None
    assert fewer.right == pytest.approx(interval([0.04, 0.048, 0.008]))
    assert seen["b − a", (2e-4, 2e-4), 16].right == pytest.approx(interval([0.3, 0.2, 0.2]))
    # c has no common rate of the plan, and as many seeds as it should.
    assert seen["c − a", (2e-4, 2e-4), 16].right == pytest.approx(interval([-0.1, -0.1]))
    assert seen["c − a", (2e-4, 2e-4), 16].complete and len(seen) == 8


def test_nothing_is_decided_before_all_is_there():
    """Holm's p of both primary differences, or of none."""
    p = report.corrected(PLAN, lines_of(RIGHT))
    own = [interval([0.05, 0.06, 0.01]).p, interval([-0.1, -0.1]).p]
    assert list(p) == ["b − a", "c − a"] and list(p.values()) == pytest.approx(holm(own), abs=1e-12)
    assert report.corrected(PLAN, lines_of(RIGHT | {"b": [0.5, 0.6]})) == {}
    text = "\n".join(report.differences_table(PLAN, lines_of(RIGHT | {"b": [0.5, 0.6]})))
    assert "decides" not in text and "2 so far" in text


def test_tables_say_what_was_found():
    """Means of an arm over its judged seeds alone; a seed count where an interval holds 0."""
    arms = report.arms_table(PLAN, lines_of(RIGHT))
    assert arms[2] == "| before | | | 0.240 | 0.300 | 0.150 | 0.700 |"
    assert "| arm B | 0.0004 | 3 | 0.512 | 0.640 | 0.320 | 0.360 |" in arms
    rows = report.differences_table(PLAN, lines_of(RIGHT))
    (decided,) = [row for row in rows if row.startswith("| **b − a**") and "| 16 |" in row]
    assert "p = " in decided and "| +0.040 (−0.026 to +0.106) |" in decided
    assert decided.endswith("| 6 |")
    (clear,) = [row for row in rows if "| 0.0002 | 16 | 3 |" in row and "b − a" in row]
    assert clear.endswith("| |") and "decides" not in clear


def test_the_figure_has_every_difference_once():
    """At arms' own rates, filled where the interval excludes 0; the deciding ones bold."""
    figure = report.draw_differences(PLAN, lines_of(RIGHT))
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b − a", "c − a", "c − b"]
    assert [label.get_fontweight() for label in ax.get_yticklabels()] == ["bold", "bold", "normal"]
    marks = [z for z in ax.lines if z.get_marker() == "o" and len(z.get_xdata())]
    assert len(marks) == 6 and len({float(mark.get_ydata()[0]) for mark in marks}) == 6
    wanted = {round(one.right.mean, 9): one.right.excludes_0 for key, one in found().items()
              if key[1] != (2e-4, 2e-4) or "b − a" not in key[0]}  # fmt: skip
    for mark in marks:
        filled = mark.get_markerfacecolor() != "white"
        assert filled == wanted[round(float(mark.get_xdata()[0]), 9)]
    pyplot.close("all")


def test_a_run_that_diverged_is_named(tmp_path, monkeypatch):
    """With its arm and seed, below the tables."""
    lines = [*lines_of(RIGHT), line("judged", "c", 2e-4, 205, 0.0) | {"diverged": "not finite"}]
    monkeypatch.setattr(report, "read", lambda *_: lines)
    assert "diverged, with every outcome 0: c, seed 205\n" in report.report(PLAN, tmp_path)
    monkeypatch.setattr(report, "read", lambda *_: lines[:-1])
    assert "diverged" not in report.report(PLAN, tmp_path)


def test_what_is_missing_is_left_out(tmp_path):
    """No file, no table."""
    assert report.report(PLAN, tmp_path) == ""


def test_the_page_has_the_tables_of_the_results():
    """Every row that is complete, as it is printed; and no other."""
    root = Path(__file__).parents[2]
    page = (root / "docs/EVIDENCE.md").read_text()
    section = page.split("\n## Study B")[1].split("\n## ")[0]
    told = [row for row in section.splitlines() if row.startswith("|")]
    lines = read(root / "zoo/study/results/train-laptop.jsonl", LAPTOP)
    done = {arm.name for arm in LAPTOP.arms
            if len(report.by_seed(LAPTOP, lines, arm.name, "own")) == arm.seeds}  # fmt: skip
    whole = [line for line in lines if line["role"] == "before" or line["arm"] in done]
    rows = report.arms_table(LAPTOP, whole) + report.differences_table(LAPTOP, whole)
    assert {"k1", "S23", "midpoint"} <= done and not any("so far" in row for row in rows)
    assert told == rows


def test_the_page_has_the_tables_of_study_a():
    """Of gradients, and of every step that was made along them, in this order."""
    root = Path(__file__).parents[2]
    page = (root / "docs/EVIDENCE.md").read_text()
    section = page.split("\n## Study A")[1].split("\n## ")[0]
    told = [row for row in section.splitlines() if row.startswith("|")]
    results = root / "zoo/study/results"
    found = json.loads((results / "gradients.json").read_text())
    gained = gradients.read_gains(results / "gains.jsonl")
    norms = report.complete_norms(gained)
    assert {line["study"] for line in gained} == {found["study"]} == {identity(gradients.FULL)}
    assert norms == list(gradients.FULL.norms)
    rows = report.gradients_table(found["arms"])
    for norm, how in product(norms, ("plain", "adam")):
        rows += report.gains_table(gained, norm, how)
    assert told == rows
