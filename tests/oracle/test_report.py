"""The report: its words follow the verdicts, it fits a page, docs/VERDICTS.md is not stale."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import verify_equivalence as oracle
from zoo.oracle import report, theory
from zoo.oracle.bench import ETA
from zoo.oracle.claims import status_of
from zoo.oracle.findings import HOLDS, INCONCLUSIVE, REFUTED

CLAIMS = oracle.CLAIMS
PAGE = Path(__file__).parents[2] / "docs" / "VERDICTS.md"


def page_of(rows, small):
    return report.front_page(rows, CLAIMS, small(), 1.0)


def test_the_front_page_fits_a_referee(rows, small):
    """The conclusion first, in four topics; then a line per statement; nothing wider than 100."""
    page = page_of(rows, small)
    lines = page.splitlines()
    assert len(lines) <= 66 and max(map(len, lines)) <= 100
    assert lines[0] == report.QUESTION and lines[1].startswith("  attribution  yes in direction")
    assert len(lines[1 : lines.index("")]) <= 6
    for statement in CLAIMS.statements().values():
        assert sum(statement.text in line for line in lines) == 1, statement.text
    assert lines[-1].startswith(
        f"{len(CLAIMS.statements())} statements, {len(rows)} measurements: all"
    )
    assert "<-" not in page


def test_every_row_is_shown_on_request(rows):
    """--rows: a line each, under the claim's sentence, in 100 columns."""
    text = report.every_row(rows, CLAIMS)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for kernel in ("flow_sde", "cps", "dance"):
        shown = [line for line in lines if line.startswith(f"  {kernel}")]
        assert len(shown) == sum(row.kernel == kernel for row in rows)
    assert "<-" not in text and "<-" in report.every_row(
        [replace(rows[0], verdict=REFUTED)], CLAIMS
    )


def test_a_changed_verdict_changes_the_words_and_the_status(rows, small):
    """Every clause of the conclusion follows the verdict of its statement, kernel by kernel."""
    said = report.conclusion(rows, CLAIMS)
    spoken = {name for name, s in CLAIMS.statements().items() if s.clauses}
    assert {name.split(".")[0] for name in spoken} == {"E2", "E3", "E4", "E5", "E6", "E7"}
    for name in spoken:
        hit = [row for row in rows if row.statement == name]
        for kernel in {row.kernel for row in hit}:
            of_kernel = [row for row in hit if row.kernel == kernel]
            other = HOLDS if of_kernel[0].verdict == REFUTED else REFUTED
            changed = [replace(row, verdict=other) if row in of_kernel else row for row in rows]
            assert report.conclusion(changed, CLAIMS) != said, (name, kernel)
            assert status_of(changed) == 1
            page = page_of(changed, small)
            assert f"<- {kernel}: registered" in page and "NOT as registered" in page
            assert max(map(len, page.splitlines())) <= 100
        one = [replace(r, verdict=INCONCLUSIVE) if r is hit[0] else r for r in rows]
        assert status_of(one) == 3 and "undecided" in report.conclusion(one, CLAIMS), name
        assert "1 inconclusive, none wrong, see <-" in page_of(one, small)
    # A clause about which nothing was tested is not said.
    untested = [row for row in rows if row.statement != "E6.gap"]
    assert "means" in said and "means" not in report.conclusion(untested, CLAIMS)
    assert report.conclusion([row for row in rows if row.claim == "E9"], CLAIMS) == ""


def test_a_difference_out_of_its_range_changes_the_words(rows, small):
    """Refuted as registered, but by another size than theory's: the conclusion says so."""
    hit = next(row for row in rows if row.statement == "E2.independent")
    changed = [replace(row, difference=0.01) if row is hit else row for row in rows]
    assert status_of(changed) == 1 and "NOT as registered" in report.conclusion(changed, CLAIMS)
    assert "registered refuted by" in page_of(changed, small)


def test_cells_say_it_in_a_few_words(rows):
    """One negation at most, and the worst figure of the members."""
    row = next(row for row in rows if row.statement == "E5.start")
    assert report.cell([]) == ""
    assert report.cell([replace(row, difference=0.0)]) == "holds exactly"
    assert report.cell([row, replace(row, difference=2e-14)]) == "holds to 2e-14"
    refuted = [replace(row, verdict=REFUTED, difference=z) for z in (0.5167, 1.21)]
    assert report.cell(refuted) == "refuted 0.52-1.2" and report.cell(refuted[:1]) == "refuted 0.52"
    assert report.cell([row, refuted[0]]) == "refuted 1 of 2"
    assert report.cell([row, replace(row, verdict=INCONCLUSIVE)]) == "inconclusive"
    converging = next(row for row in rows if row.statement == "E6.gap" and row.kernel == "cps")
    assert report.cell([converging]) == "converges D^1.00"
    assert report.coarse([replace(row, difference=2e-14)]) == "holds, below 1e-12"
    assert report.coarse([replace(row, difference=0.0, tolerance=0.0)]) == "holds exactly"
    assert report.coarse([replace(row, difference=2e-8)]) == "holds, below 1e-7"


def test_json_holds_the_whole_report(rows, small):
    """Every row with its range; what is no number is null."""
    some = [replace(rows[0], measured=float("nan")), *rows[1:]]
    told = json.loads(report.to_json(some, CLAIMS, small(), []))
    assert told["rows"][0]["measured"] is None and len(told["rows"]) == len(rows)
    assert len(told["estimates"]) == 3 * (1 + 2 * 3)
    assert told["statements"]["E2.size"]["text"] in report.table(rows, CLAIMS, ("cps",))[3]


# ---- docs/VERDICTS.md ----------------------------------------------------------------------------


def as_registered(kernel, name, statement):
    """The verdict that a cell of the page begins with."""
    return statement.registered_for(theory.of(kernel, ETA)).split()[0].lower()


def test_the_page_of_verdicts_has_every_sentence_and_registered_verdict():
    """docs/VERDICTS.md is what --verdicts writes for the claims as they stand here."""
    lines = PAGE.read_text().splitlines()
    assert "    python verify_equivalence.py --verdicts docs/VERDICTS.md" in lines
    text = " ".join(lines)
    for claim in CLAIMS.values():
        assert claim.sentence in text, claim.name
    listed = [line for line in lines if line.startswith("| ") and "." in line.split("|")[1]]
    kernels = list(theory.RECORDS)
    assert f"| | statement | {' | '.join(f'`{kernel}`' for kernel in kernels)} |" in lines
    assert len(listed) == len(CLAIMS.statements())
    for line, (name, statement) in zip(listed, CLAIMS.statements().items(), strict=True):
        _, key, said, *cells, _ = (part.strip() for part in line.split("|"))
        assert (key, said) == (name, statement.text)
        for kernel, cell in zip(kernels, cells, strict=True):
            assert not cell or cell.startswith(as_registered(kernel, name, statement)), line


@pytest.mark.parametrize("claim", ["E4", "E5", "E8", "E10", "E11", "MARGINAL"])
def test_the_page_of_verdicts_has_the_figures_measured_now(claim):
    """Of the claims that take no time."""
    bench = oracle.Bench()
    rows = CLAIMS.run(bench, [claim])
    lines = PAGE.read_text().splitlines()
    assert [
        x for x in report.verdict_lines(rows, CLAIMS, claim, bench.kernels) if x not in lines
    ] == []


def test_the_page_of_verdicts_concludes_what_is_registered(rows):
    """Its conclusion is that of the registered verdicts."""
    said = report.conclusion([replace(row, verdict=row.registered) for row in rows], CLAIMS)
    assert said in PAGE.read_text()


# ---- Figures -------------------------------------------------------------------------------------


def with_z(row, z, **more):
    return replace(row, verdict=HOLDS, registered=HOLDS, low=None, high=None, z=z, **more)


def test_a_cell_says_the_worst_of_its_rows(rows):
    """The largest z, of either sign; the largest error; the slope furthest off."""
    row = rows[0]
    assert report.cell([with_z(row, 1.0), with_z(row, -3.2), with_z(row, 2.0)]) == "holds (z 3.2)"
    errors = [replace(row, z=None, verdict=HOLDS, difference=d) for d in (1e-15, 3e-13, 0.0)]
    assert report.cell(errors) == "holds to 3e-13" and report.cell(errors[2:]) == "holds exactly"
    slopes = [
        replace(row, verdict="CONVERGES", measured=1 + off, difference=abs(off))
        for off in (0.01, -0.06, 0.02)
    ]
    assert report.cell(slopes) == "converges D^0.94"
    sizes = [replace(row, verdict=REFUTED, difference=d) for d in (0.25, 0.5)]
    assert report.cell(sizes) == "refuted 0.25-0.5"
    assert report.cell([errors[0], sizes[0]]) == "refuted 1 of 2" and report.cell([]) == ""
    assert report.cell([errors[0], replace(row, verdict=INCONCLUSIVE)]) == "inconclusive"


def test_the_failure_rate_counts_what_failed(rows):
    """Wrong and inconclusive apart, of all, over so many seeds."""
    good, wrong = with_z(rows[0], 0.0), replace(with_z(rows[0], 9.0), verdict=REFUTED)
    unclear = replace(with_z(rows[0], 0.0), verdict=INCONCLUSIVE)
    said = report.failure_rate([good, wrong, wrong, unclear, good], 2)
    assert said.startswith(
        "2 of 5 statistical verdicts were wrong and 1 inconclusive, over 2 seeds"
    )
    assert said.endswith("the registered rate is 2e-09 a verdict")
    assert "0 of 1 statistical" in report.failure_rate([good], 1)


def test_estimates_are_set_beside_the_truth(rows):
    """Cosine, and the size of the estimate over the truth's."""
    row = replace(rows[0], estimate=[2.0, 0.0, 2.0, 0.0], truth=[1.0, 0.0, 0.0, 0.0])
    ((*_, cosine, size),) = report.estimates([row, replace(row, estimate=None)])
    assert cosine == pytest.approx(0.5**0.5) and size == pytest.approx(8**0.5)


def test_the_json_of_a_failing_report_says_so(rows, small):
    """Status, the row that is off, NaN as null, and whether the tree was changed."""
    wrong = replace(rows[0], verdict=REFUTED, measured=float("nan"))
    told = json.loads(report.to_json([wrong, rows[1]], CLAIMS, small(), [{"a": 1}]))
    assert told["status"] == 1 and told["comparison"] == [{"a": 1}]
    assert [row["as_registered"] for row in told["rows"]] == [False, True]
    assert told["rows"][0]["measured"] is None and told["rows"][0]["verdict"] == REFUTED
    size = next(row for row in rows if row.statement == "E2.independent")
    off = replace(size, difference=2 * size.high)  # the verdict alone would be right
    assert (
        json.loads(report.to_json([off], CLAIMS, small(), []))["rows"][0]["as_registered"] is False
    )


@pytest.mark.parametrize(("changes", "dirty"), [("", False), (" M file", True), (None, None)])
def test_a_report_says_whether_the_tree_was_changed(changes, dirty, small, monkeypatch):
    """By git's word; outside a repository nothing is known."""

    def git(command, **how):
        said = changes if command[1] == "status" else "abc123"
        return SimpleNamespace(stdout=said or "", returncode=1 if changes is None else 0)

    monkeypatch.setattr(report.subprocess, "run", git)
    found = report.environment(small())
    assert found["dirty"] is dirty and found["commit"] == (None if dirty is None else "abc123")
