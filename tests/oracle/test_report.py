"""The report: its words follow the verdicts, it fits a page, docs/VERDICTS.md is not stale."""

import json
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import verify_equivalence as oracle
from zoo.oracle import report, theory
from zoo.oracle.bench import ETA, Bench, Model
from zoo.oracle.claims import Row, status_of
from zoo.oracle.findings import CONVERGES, HOLDS, INCONCLUSIVE, REFUTED

CLAIMS = oracle.CLAIMS
PAGE = Path(__file__).parents[2] / "docs" / "VERDICTS.md"


def page_of(rows, small):
    return report.front_page(rows, CLAIMS, small(), 1.0)


def test_the_front_page_fits_a_referee(rows, small):
    """The conclusion first, in four topics; then a line per statement; nothing wider than 100."""
    page = page_of(rows, small)
    lines = page.splitlines()
    assert len(lines) <= 88 and max(map(len, lines)) <= 100
    assert lines[0] == report.QUESTION and lines[1].startswith("  attribution  yes in direction")
    assert len(lines[1 : lines.index("")]) <= 8
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
    speaking = {"E2", "E3", "E4", "E5", "E6", "E7", "E12", "E13"}
    assert {name.split(".")[0] for name in spoken} == speaking
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
    assert said.splitlines()[1] == "the registered rate is 2e-09 a verdict"
    assert "0 of 1 statistical" in report.failure_rate([good], 1)


def test_the_failure_rate_says_how_large_errors_are(rows):
    """The root mean square of z, by statement, of what is registered to hold."""
    one = with_z(rows[0], 3.0, statement="E3.spread")
    some = [one, replace(one, z=-4.0), replace(one, statement="E7.ratio", z=1.0)]
    off = replace(one, registered=REFUTED, verdict=REFUTED, low=0.0, high=9.0, z=300.0)
    said = report.failure_rate([*some, off], 1).splitlines()[2:]
    wanted = "root mean square of z, 1 where standard errors are right: "
    assert " ".join(said) == f"{wanted}E3.spread 3.54 of 2; E7.ratio 1.00 of 1"
    assert len(report.failure_rate([off], 1).splitlines()) == 2


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


# ---- Character by character ----------------------------------------------------------------------

ROW = Row(
    claim="E2",
    statement="E2.size",
    kernel="dance",
    k=3,
    rollouts="shared_anchor",
    form="paper",
    fixture="rapid",
    verdict=HOLDS,
    registered=HOLDS,
    measured=-0.75,
    predicted=0.5,
    tolerance=1.5,
    difference=1.25,
    low=None,
    high=None,
    z=None,
    n=7,
    seed=9,
    seconds=0.25,
    estimate=None,
    truth=None,
)
PLACE = "  dance    k 3 shared      paper    rapid                  "
REFUTED_ROW = replace(ROW, verdict=REFUTED, registered=REFUTED, low=1.0, high=1.5, z=-8.0)
LINES = {  # what a row is printed as, from its verdict on
    "holds": (ROW, "holds        1.2     <= 1.5e+00"),
    "below": (replace(ROW, z=-1.25), "holds        1.2     <= 1.5e+00 z -1.2"),
    "above": (replace(ROW, z=2.5), "holds        1.2     <= 1.5e+00 z +2.5"),
    "refuted": (REFUTED_ROW, "refuted      1.2     in 1..1.5"),
    "refuted at": (replace(REFUTED_ROW, low=1.25, high=1.25), "refuted      1.2     at 1.25"),
    "out of range": (replace(REFUTED_ROW, high=1.125), "refuted      1.2     in 1..1.12 <-"),
    "wrong": (replace(ROW, verdict=REFUTED), "refuted      1.2     <= 1.5e+00 <-"),
    "wrong holds": (replace(REFUTED_ROW, verdict=HOLDS), "holds        1.2     in 1..1.5 <-"),
    "converges": (
        replace(ROW, verdict=CONVERGES, registered=CONVERGES, measured=2.5),
        "converges    2.5     0.50 +- 1.5",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_a_row_is_printed_with_all_that_it_holds(case):
    """Where, the verdict, its size, what that is held to, z with its sign, and whether it fits."""
    row, said = LINES[case]
    assert report.row_line(row) == PLACE + said


def test_rows_stand_under_their_claim_and_statement(rows):
    """The sentence, the statement with its tolerance's reason, then its rows and no others."""
    picked = [row for row in rows if row.claim in ("E5", "E8")]
    text = report.every_row(picked, CLAIMS)
    wanted = []
    for name in ("E5", "E8"):
        wanted.append(" ".join(f"{name}  {CLAIMS[name].sentence}".split()))
        for key, statement in CLAIMS[name].statements.items():
            wanted += [f"  {key}: {statement.text}", f"  tolerance: {statement.basis}"]
            wanted += [report.row_line(row) for row in picked if row.statement == key]
    paragraphs = " ".join(text.split())
    assert paragraphs == " ".join(" ".join(wanted).split())


def test_what_differs_is_counted_and_the_first_is_located():
    """By registered verdict: how many of the statement's rows, where, and by how much."""
    off = replace(ROW, verdict=REFUTED, k=2, rollouts="", fixture="point", difference=0.5)
    shown = " ".join(" ".join(report.odd_lines("cps", [ROW, off, ROW, replace(off, k=5)])).split())
    assert shown == "<- cps: registered holds; 2 of 4 differ, first k = 2, paper, point: 0.5"
    small = replace(REFUTED_ROW, difference=0.25)
    shown = " ".join(" ".join(report.odd_lines("cps", [small, REFUTED_ROW])).split())
    wanted = "<- cps: registered refuted by 1 to 1.5; 1 of 2 differ, first k = 3, shared_anchor, "
    assert shown == wanted + "paper, rapid: 0.25"
    assert report.odd_lines("cps", [ROW, REFUTED_ROW]) == []


def test_policy_gradients_are_shown_beside_their_own_truth():
    """One truth a kernel, one line an estimate."""
    first = replace(ROW, kernel="cps", k=1, form="original", estimate=[3.0, 4.0], truth=[4.0, 3.0])
    second = replace(first, k=2, form="paper", estimate=[8.0, 6.0])
    other = replace(first, kernel="dance", estimate=[-1.0, -1.0], truth=[0.0, 1.0])
    lines = report.show_estimates([first, second, replace(ROW, estimate=None), other]).splitlines()
    assert lines[3:] == [
        "cps       --  truth      +4.000  +3.000",
        "cps        1  original   +3.000  +4.000   0.9600   1.00",
        "cps        2  paper      +8.000  +6.000   1.0000   2.00",
        "dance     --  truth      +0.000  +1.000",
        "dance      1  original   -1.000  -1.000   -0.7071   1.41",
    ]


@pytest.fixture
def own():
    """A bench that differs from the default in all that a page says of it."""
    return Bench(["dance", "cps"], (2,), 7, "meta", Model("", ("a red circle",), torch.bfloat16))


def test_pages_say_what_they_were_made_with(own, small, rows):
    """Seed, precision and device; the front page its seconds too."""
    page = report.front_page(rows, CLAIMS, own, 12.4)
    assert page.endswith("all as registered. Took 12 s; bfloat16, seed 7, meta.")
    page = report.front_page(rows, CLAIMS, small(seed=3), 1.6)
    assert page.endswith("all as registered. Took 2 s; float64, seed 3, cpu.")
    page = report.verdicts(rows, CLAIMS, small(seed=3))
    python, made = platform.python_version(), torch.__version__
    assert f"With Python {python}, torch {made}, cpu, float64, seed 3." in page
    assert "to 6.0\nstandard errors" in page and report.headline(rows) in page
    found = report.environment(small())
    kept = {key: found[key] for key in ("python", "torch", "threads", "device", "dtype")}
    threads = torch.get_num_threads()
    of_now = {"python": python, "torch": made, "threads": threads, "device": "cpu"}
    assert kept == of_now | {"dtype": "float64"}


def test_a_gpu_is_named(monkeypatch):
    """By the name of the device that was used."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    bench = SimpleNamespace(device=torch.device("cuda"), model=None, dtype=torch.float64)
    assert report.environment(bench)["device"] == "a GPU"


def test_json_says_what_the_page_says(rows, small):
    """The conclusion, every claim's sentence, the statements of those claims and no others."""
    picked = [row for row in rows if row.claim in ("E5", "E8")]
    told = json.loads(report.to_json(picked, CLAIMS, small(), []))
    assert told["conclusion"] == report.conclusion(picked, CLAIMS) != ""
    assert told["claims"] == {name: CLAIMS[name].sentence for name in ("E5", "E8")}
    statements = {**CLAIMS["E5"].statements, **CLAIMS["E8"].statements}
    assert told["statements"] == {
        key: {"text": s.text, "tolerance": s.basis} for key, s in statements.items()
    }
    assert told["schema"] == 2 and told["false_alarm"] == 1e-6 and told["status"] == 0
    assert told["environment"].keys() == report.environment(small()).keys()
    assert [row["statement"] for row in told["rows"]] == [row.statement for row in picked]


def test_every_kernel_has_a_column(rows):
    """Three abreast, those that are left below; each under its own name."""
    kernels = ["one", "two", "three", "four", "five"]
    five = [replace(ROW, kernel=kernel, difference=10.0**-i) for i, kernel in enumerate(kernels)]
    lines = report.table(five, CLAIMS, kernels)
    heads = [line.split() for line in lines[::2]]
    assert heads == [kernels[:3], kernels[3:]] and len(lines) == 4
    cells = [line.split("holds to ")[1:] for line in lines[1::2]]
    assert [float(cell) for cell in cells[0]] == [1.0, 0.1, 0.01]
    assert [float(cell) for cell in cells[1]] == [0.001, 0.0001]
    for head, line in zip(lines[::2], lines[1::2]):
        assert [head.index(word) for word in head.split()] == [
            i for i in range(len(line)) if line.startswith("holds to", i)
        ]
