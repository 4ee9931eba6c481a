"""docs/THEORY.md: a proposition for every statement of the oracle, and none besides."""

import re
from pathlib import Path

import verify_equivalence as oracle

PAGE = (Path(__file__).parents[1] / "docs" / "THEORY.md").read_text()


def test_every_statement_has_its_proposition_and_the_other_way_round():
    """Each id stands in bold once, where its proposition begins."""
    found = re.findall(r"\*\*([A-Z]+\d*\.[a-z_]+)\.?\*\*", PAGE)
    assert sorted(found) == sorted(oracle.CLAIMS.statements())


def test_mathematics_is_closed():
    """Dollars come in pairs in every paragraph."""
    for paragraph in PAGE.split("\n\n"):
        assert paragraph.count("$") % 2 == 0, paragraph
