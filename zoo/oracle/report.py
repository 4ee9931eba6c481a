"""The oracle's report: the conclusion, a table of statements, every row, JSON, docs/VERDICTS.md."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from zoo.oracle.bench import Bench
from zoo.oracle.claims import Claims, Clause, Row, Statement, as_json, status_of
from zoo.oracle.findings import CONVERGES, FALSE_ALARM, HOLDS, INCONCLUSIVE, REFUTED, STATISTICS, Z

SCHEMA = 2
WIDTH, LABEL, CELL, ACROSS = 100, 43, 18, 3  # of the page, a statement, a kernel; kernels abreast
TOPICS = ("attribution", "density", "parameters", "what to use")  # of the conclusion
QUESTION = 'In which sense is a k-step decomposition "equivalent" to the step that was sampled?'

Cells = dict[tuple[str, str], list[Row]]  # by statement and kernel


def cells_of(rows: Sequence[Row]) -> Cells:
    """Rows by statement and kernel, in their order."""
    cells: Cells = {}
    for row in rows:
        cells.setdefault((row.statement, row.kernel), []).append(row)
    return cells


def verdict_of(rows: Sequence[Row]) -> str:
    """The verdict that all rows share; INCONCLUSIVE if they do not, or one is."""
    verdicts = {row.verdict for row in rows}
    return verdicts.pop() if len(verdicts) == 1 else INCONCLUSIVE


# ---- The front page ------------------------------------------------------------------------------


def front_page(rows: Sequence[Row], claims: Claims, bench: Bench, seconds: float) -> str:
    """The conclusion, then one line per statement with a column per kernel."""
    with_ = environment(bench)
    right = f"{with_['dtype']}, seed {bench.seed}, {bench.device.type}"
    lines = [QUESTION, conclusion(rows, claims), ""]
    lines += table(rows, claims, bench.kernels)
    lines += ["", *wrapped(f"{headline(rows)} Took {seconds:.0f} s; {right}.")]
    return "\n".join(lines)


def conclusion(rows: Sequence[Row], claims: Claims) -> str:
    """The referee's answer, said from the verdicts: a topic's clauses, and the claims they rest on.

    A clause speaks for the kernels with its verdict, and names them where they are not all.
    """
    cells, statements = cells_of(rows), claims.statements()
    tested = list(dict.fromkeys(row.kernel for row in rows))
    lines = []
    for topic in TOPICS:
        clauses, sources = [], []
        for name, statement in statements.items():
            said = list(spoken(topic, statement, name, cells, tested))
            clauses += said
            sources += [name.split(".")[0]] if said else []
        if clauses:
            right = " ".join(dict.fromkeys(sources))
            lines += hanging(f"  {topic:12} ", "; ".join(clauses), right)
    return "\n".join(lines)


def spoken(
    topic: str, statement: Statement, name: str, cells: Cells, tested: Sequence[str]
) -> Iterator[str]:
    """What a statement says on a topic: a clause for each verdict that some kernel has."""
    kernels = [kernel for kernel in tested if (name, kernel) in cells]
    for clause in statement.clauses:
        speakers: dict[str, list[str]] = {}
        for kernel in kernels if clause.topic == topic else ():
            words = words_of(clause, statement, cells[name, kernel])
            speakers.setdefault(words, []).append(kernel)
        for words, those in speakers.items():
            names = ", ".join(those)
            if "{}" in words:
                yield words.format(names)
            elif words:
                yield words if those == list(tested) else f"{words} under {names}"


def words_of(clause: Clause, statement: Statement, rows: Sequence[Row]) -> str:
    """What a clause says of one kernel; '' is nothing."""
    verdict = verdict_of(rows)
    if verdict == INCONCLUSIVE:
        return f"undecided: {statement.text}"
    words = clause.false if verdict == REFUTED else clause.true
    if all(row.as_registered for row in rows):
        return words
    return f"{words or statement.text} (NOT as registered)"


def wrapped(text: str) -> list[str]:
    """Lines of at most WIDTH columns."""
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def hanging(label: str, text: str, right: str) -> list[str]:
    """Text beside its label, wrapped, with a word flush right on its first line."""
    width = WIDTH - len(label) - len(right) - 2
    first, *rest = textwrap.wrap(text, width)
    return [f"{label}{first:{width}}  {right}", *(" " * len(label) + line for line in rest)]


def table(rows: Sequence[Row], claims: Claims, kernels: Sequence[str]) -> list[str]:
    """One line per statement, a column per kernel, at most three kernels abreast."""
    cells, lines = cells_of(rows), []
    for first in range(0, len(kernels), ACROSS):
        abreast = kernels[first : first + ACROSS]
        lines.append((" " * (LABEL + 1) + " ".join(f"{k:{CELL}}" for k in abreast)).rstrip())
        last = ""
        for name, statement in claims.statements().items():
            found = [cells.get((name, kernel), []) for kernel in abreast]
            if any(found):
                claim = name.split(".")[0]
                label = f"{claim if claim != last else '':4} {statement.text}"
                text = " ".join(f"{cell(members):{CELL}}" for members in found)
                lines.append(f"{label:{LABEL}} {text}".rstrip())
                for kernel, members in zip(abreast, found, strict=True):
                    lines += odd_lines(kernel, members)
                last = claim
    return lines


def cell(rows: Sequence[Row]) -> str:
    """A verdict in a few words: how well it holds, by how much it is refuted, how it converges."""
    if not rows:
        return ""
    verdict = verdict_of(rows)
    if verdict == REFUTED:
        return f"refuted {span([row.difference for row in rows], CELL - len('refuted '))}"
    if verdict == CONVERGES:
        slope = max(rows, key=lambda row: row.difference).measured
        return f"converges D^{slope:.2f}"
    if verdict == HOLDS:
        zs = [abs(row.z) for row in rows if row.z is not None]
        error = max(row.difference for row in rows)
        if zs:
            return f"holds (z {max(zs):.1f})"
        return f"holds to {error:.0e}" if error else "holds exactly"
    wrong = sum(row.verdict == REFUTED for row in rows)
    unclear = sum(row.verdict == INCONCLUSIVE for row in rows)
    return "inconclusive" if unclear else f"refuted {wrong} of {len(rows)}"


def span(sizes: Sequence[float], room: int) -> str:
    """The range of some numbers: to two digits, or one, or its upper end, whichever has room."""
    for digits in (2, 1):
        low, high = f"{min(sizes):.{digits}g}", f"{max(sizes):.{digits}g}"
        text = low if low == high else f"{low}-{high}"
        if len(text) <= room:
            return text
    return f"to {high}"


def odd_lines(kernel: str, rows: Sequence[Row]) -> list[str]:
    """A line for each registered verdict that some rows do not have, with the first of them."""
    lines = []
    for registered in dict.fromkeys(row.registered for row in rows):
        odd = [row for row in rows if row.registered == registered and not row.as_registered]
        if odd:
            row, size = odd[0], ""
            if row.low is not None and row.high is not None:
                size = f" by {row.low:.3g} to {row.high:.3g}"
            where = ", ".join(word for word in (row.rollouts, row.form, row.fixture) if word)
            words = f"<- {kernel}: registered {registered.lower()}{size}; {len(odd)} of {len(rows)}"
            words += f" differ, first k = {row.k}, {where}: {row.difference:.3g}"
            lines += textwrap.wrap(
                words, WIDTH - 5, initial_indent="     ", subsequent_indent=" " * 8
            )
    return lines


def headline(rows: Sequence[Row]) -> str:
    """How many statements and measurements there are, and how many are not as registered."""
    statements = {row.statement for row in rows}
    odd = {row.statement for row in rows if not row.as_registered}
    counted = f"{len(statements)} statements, {len(rows)} measurements"
    if not odd:
        return f"{counted}: all as registered."
    judged = "NOT as registered" if status_of(rows) == 1 else "inconclusive, none wrong"
    return f"{counted}: {len(odd)} {judged}, see <-."


# ---- Every row -----------------------------------------------------------------------------------


def every_row(rows: Sequence[Row], claims: Claims) -> str:
    """All measurements, under their claim's sentence and their statement's tolerance."""
    lines = []
    for name, of_claim in groupby(rows, key=lambda row: row.claim):
        claim = claims[name]
        lines += ["", *wrapped(f"{name}  {claim.sentence}")]
        members = list(of_claim)
        for key, statement in claim.statements.items():
            found = [row for row in members if row.statement == key]
            if found:
                lines += ["", f"  {key}: {statement.text}", f"  tolerance: {statement.basis}"]
                lines += map(row_line, found)
    return "\n".join(lines).strip("\n")


def row_line(row: Row) -> str:
    """Where, the verdict, what was measured and what that is held to."""
    k = "" if row.k is None else f"k {row.k}"
    rollouts = row.rollouts.removesuffix("_anchor")
    where = f"{row.kernel:9}{k:4}{rollouts:12}{row.form:9}{row.fixture:23}"
    if row.registered == REFUTED:
        low, high = f"{row.low:.3g}", f"{row.high:.3g}"
        held_to = f"at {low}" if low == high else f"in {low}..{high}"
    elif row.registered == CONVERGES:
        held_to = f"{row.predicted:.2f} +- {row.tolerance:g}"
    else:
        held_to = f"<= {row.tolerance:.1e}"
    z = "" if row.z is None or row.registered == REFUTED else f" z {row.z:+.1f}"
    size = row.measured if row.registered == CONVERGES else row.difference
    mark = "" if row.as_registered else " <-"
    return f"  {where}{row.verdict.lower():13}{size:<8.2g}{held_to}{z}{mark}"


def estimates(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """(kernel, k, form, estimate, truth, cosine, size ratio) of TRUTH's policy gradients."""
    table = []
    for row in rows:
        if row.estimate is not None and row.truth is not None:
            a, b = torch.tensor(row.estimate), torch.tensor(row.truth)
            alike = (torch.dot(a, b) / (a.norm() * b.norm())).item()
            size = (a.norm() / b.norm()).item()
            table.append((row.kernel, row.k, row.form, row.estimate, row.truth, alike, size))
    return table


def show_estimates(rows: Sequence[Row]) -> str:
    """The policy gradients side by side: scale, bias and Jacobian apart."""
    lines = ["Policy gradients of a Gaussian flow by (m_1, m_2, log q_1, log q_2)", ""]
    lines.append(f"{'kernel':9}  k  {'form':9} {'estimate':33} cosine   size")
    for kernel, members in groupby(estimates(rows), key=lambda line: line[0]):
        found = list(members)
        lines.append(f"{kernel:9} --  {'truth':9} {vector(found[0][4])}")
        for _, k, form, mean, _, alike, size in found:
            lines.append(f"{kernel:9} {k:2}  {form:9} {vector(mean)}   {alike:.4f}  {size:5.2f}")
    return "\n".join(lines)


def vector(z: Sequence[float]) -> str:
    return " ".join(f"{x:+7.3f}" for x in z)


def failure_rate(rows: Sequence[Row], times: int) -> str:
    """Of statistical rows under fresh seeds, and how large their errors are in standard errors."""
    unclear = sum(row.verdict == INCONCLUSIVE for row in rows if not row.as_registered)
    wrong = sum(not row.as_registered for row in rows) - unclear
    seeds = f"{times} seed{'s' * (times > 1)}"
    lines = [
        f"{wrong} of {len(rows)} statistical verdicts were wrong and {unclear} inconclusive, over "
        f"{seeds};",
        f"the registered rate is {FALSE_ALARM / STATISTICS:.0e} a verdict",
    ]
    errors = calibration(rows)
    if errors:
        said = "; ".join(f"{name} {size:.2f} of {n}" for name, size, n in errors)
        lines += wrapped(f"root mean square of z, 1 where standard errors are right: {said}")
    return "\n".join(lines)


def calibration(rows: Sequence[Row]) -> list[tuple[str, float, int]]:
    """(statement, root mean square of z, rows) of what is registered to hold."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.z is not None and row.registered == HOLDS:
            found.setdefault(row.statement, []).append(row.z)
    return [
        (name, math.sqrt(sum(z * z for z in zs) / len(zs)), len(zs)) for name, zs in found.items()
    ]


# ---- Files ---------------------------------------------------------------------------------------


def environment(bench: Bench) -> dict[str, Any]:
    """What a report was made with."""

    def git(*words: str) -> str | None:
        root = Path(__file__).parents[2]
        done = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
        "dtype": str(bench.model.dtype if bench.model else bench.dtype).removeprefix("torch."),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }


def to_json(
    rows: Sequence[Row],
    claims: Claims,
    bench: Bench,
    comparison: list[dict[str, Any]],
    numerics: Sequence[dict[str, Any]] = (),
) -> str:
    """The whole report; what is no number is null."""
    names = list(dict.fromkeys(row.claim for row in rows))
    statements = {
        key: {"text": statement.text, "tolerance": statement.basis}
        for name in names
        for key, statement in claims[name].statements.items()
    }
    report = {
        "schema": SCHEMA,
        "environment": environment(bench),
        "status": status_of(rows),
        "false_alarm": FALSE_ALARM,
        "conclusion": conclusion(rows, claims),
        "claims": {name: claims[name].sentence for name in names},
        "statements": statements,
        "rows": [as_json(row) for row in rows],
        "estimates": estimates(rows),
        "comparison": comparison,
        "numerics": list(numerics),
    }
    no_nan = json.loads(json.dumps(report), parse_constant=lambda _: None)
    return json.dumps(no_nan, indent=1) + "\n"


HEAD = """# Verdicts

{question}
Every statement was registered with its verdict, and what is refuted with the size of the
difference, before it was measured. This page is generated:

    python verify_equivalence.py --verdicts docs/VERDICTS.md

{headline} With {environment}.

```
{conclusion}
```

*Holds*: to rounding, below the power of ten that is printed, or, where it says z, to {z:.1f}
standard errors. *Converges*: with the power of the step D that is printed. *Refuted*: by the range
of the difference that is printed; theory gives its size.
"""


def verdicts(rows: Sequence[Row], claims: Claims, bench: Bench) -> str:
    """docs/VERDICTS.md: figures so coarse that they are the same on every machine."""
    with_ = environment(bench)
    versions = f"Python {with_['python']}, torch {with_['torch']}"
    lines = HEAD.format(
        question=QUESTION,
        headline=headline(rows),
        environment=f"{versions}, {with_['device']}, {with_['dtype']}, seed {bench.seed}",
        conclusion=conclusion(rows, claims),
        z=Z,
    ).splitlines()
    for name, claim in claims.items():
        lines += ["", f"## {name}", "", *wrapped(claim.sentence), ""]
        lines += [f"| | statement | {' | '.join(f'`{kernel}`' for kernel in bench.kernels)} |"]
        lines += [f"|---|---|{'---|' * len(bench.kernels)}"]
        lines += verdict_lines(rows, claims, name, bench.kernels)
    return "\n".join(lines) + "\n"


def verdict_lines(
    rows: Sequence[Row], claims: Claims, name: str, kernels: Sequence[str]
) -> list[str]:
    """One claim's lines of docs/VERDICTS.md."""
    cells, lines = cells_of(rows), []
    for key, statement in claims[name].statements.items():
        found = [coarse(cells.get((key, kernel), [])) for kernel in kernels]
        lines.append(f"| {key} | {statement.text} | {' | '.join(found)} |")
    return lines


def coarse(rows: Sequence[Row]) -> str:
    """As `cell`, two digits of what is refuted, and rounding errors as powers of ten."""
    if rows and verdict_of(rows) == REFUTED:
        return f"refuted {span([row.difference for row in rows], WIDTH)}"
    if not rows or verdict_of(rows) != HOLDS:
        return cell(rows)
    if rows[0].z is not None:
        return "holds (z)"
    if not any(row.tolerance for row in rows):
        return "holds exactly"
    error = max(1e-12, *(row.difference for row in rows))
    return f"holds, below 1e{math.ceil(math.log10(error))}"
