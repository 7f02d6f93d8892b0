"""README.md, docs/ and Results/README.md: tables from committed rows, links that lead somewhere."""

from __future__ import annotations

import re

import pytest

from Benchmarks import report
from specsampling.console import exit_code
from specsampling.provenance import PROJECT

PAGES = sorted(
    path
    for pattern in (*report.PAGES, "CONTRIBUTING.md", "specsampling/data/*/README.md")
    for path in PROJECT.glob(pattern)
)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def test_every_page_has_the_tables_that_the_command_writes(capsys):
    assert exit_code(report.main, ["--check"]) == 0, capsys.readouterr().out


def test_a_page_that_was_edited_by_hand_is_named(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("<!-- table: index Results/published -->\n1.84\n<!-- /table -->\n")
    (tmp_path / "Results").mkdir()
    monkeypatch.setattr(report, "PROJECT", tmp_path)
    monkeypatch.setattr(report, "index_of_runs", lambda folder: "| made anew |")
    monkeypatch.setitem(report.KINDS, "index", lambda folder: "| made anew |")
    assert exit_code(report.main, ["--check"]) == 1
    assert capsys.readouterr().out == "README.md differs from its rows\n"
    assert "1.84" in page.read_text()
    assert exit_code(report.main, []) == 0
    assert "| made anew |" in page.read_text() and "1.84" not in page.read_text()
    assert exit_code(report.main, ["--check"]) == 0


def test_a_table_of_no_known_kind_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("<!-- table: runs Results -->\n<!-- /table -->\n")
    monkeypatch.setattr(report, "PROJECT", tmp_path)
    assert exit_code(report.main, []) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_readme_is_short():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link).exists(), link
