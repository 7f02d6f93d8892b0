"""README.md, docs/ and Results/README.md: tables from committed rows, links that lead somewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pandas as pd
import pytest
from helpers import refused
from test_end_to_end import config as config  # a fixture
from test_end_to_end import run

from Benchmarks import report, run_page
from specsampling.config import PROJECT
from specsampling.console import exit_code
from specsampling.results import metrics
from specsampling.results.records import read_rows

PAGES = sorted(
    path
    for pattern in (*report.PAGES, "CONTRIBUTING.md", "specsampling/data/*/README.md")
    for path in PROJECT.glob(pattern)
)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def test_every_page_has_the_tables_that_the_command_writes(capsys):
    assert exit_code(report.main, ["--check"]) == 0, capsys.readouterr().out
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 150


def test_a_page_that_was_edited_by_hand_is_named(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("<!-- table: index Results/published -->\n1.84\n<!-- /table -->\n")
    (tmp_path / "Results").mkdir()
    monkeypatch.setattr(report, "PROJECT", tmp_path)
    made = report.of_text(pd.DataFrame({"made anew": []}))
    monkeypatch.setitem(report.KINDS, "index", lambda folder: made)
    assert exit_code(report.main, ["--check"]) == 1
    assert capsys.readouterr().out == "README.md differs from its rows\n"
    assert "1.84" in page.read_text()
    assert exit_code(report.main, []) == 0
    assert "| made anew |" in page.read_text() and "1.84" not in page.read_text()
    assert exit_code(report.main, ["--check"]) == 0


def test_a_table_of_no_known_kind_and_a_page_without_a_run_are_one_line(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "README.md").write_text("<!-- table: runs Results -->\n<!-- /table -->\n")
    monkeypatch.setattr(report, "PROJECT", tmp_path)
    assert refused(report.main, [], capsys)
    assert refused(report.main, ["--html", "page.html"], capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.fixture(scope="module")
def page(config, tmp_path_factory):
    """The page of a run over a tiny pair, and its rows."""
    folder = tmp_path_factory.mktemp("page")
    path = folder / "results2.jsonl"
    code, _, errors = run("--config", config, "--limit", 3, "--output", path)
    assert code == 0, errors
    assert exit_code(report.main, [str(path), "--html", str(folder / "page.html")]) == 0
    return folder / "page.html", read_rows(path)


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_a_runs_page_holds_every_text_and_needs_no_network(page, tokenizer):
    path, rows = page
    data = data_of(path.read_text())
    texts = [text for problem in data["problems"] for text in problem["texts"].values()]
    assert len(texts) == len(rows) and len(data["problems"]) == len({row.sample for row in rows})
    by_name = {(p["id"], name): text for p in data["problems"] for name, text in p["texts"].items()}
    for row in rows:
        text = by_name[row.example_id, row.method]
        assert len(text["cycles"]) == (len(row.accepted) or len(row.token_ids))
        whole = "".join(piece for cycle in text["cycles"] for _, piece in cycle)
        assert tokenizer.decode(row.token_ids).startswith(whole)
        kinds = {kind for cycle in text["cycles"] for kind, _ in cycle}
        assert kinds <= {"accepted", "correction", "bonus", "target"}
        assert text["identical"] is (True if row.method.startswith("speculative") else None)
    assert data["problems"][0]["prompt"].lstrip().startswith("from typing")
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"', path.read_text())
    assert not [link for link in links if link.startswith(("http", "//"))]


def test_a_text_that_would_end_the_script_does_not(page, monkeypatch):
    """A model may write </script>."""
    monkeypatch.setattr(run_page, "prompts_of", lambda config: {"HumanEval/0": "</script><b>"})
    data = data_of(run_page.page_of(page[0].with_name("results2.jsonl")))
    assert data["problems"][0]["prompt"] == "</script><b>"


@pytest.mark.slow  # needs Debian's chromium
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium on the PATH")
def test_a_browser_shows_it_without_errors(page, tmp_path):
    script = """<script>
    window.onerror = (message) => { document.title = "error: " + message; };
    window.addEventListener("load", () => {
      const filter = document.getElementById("filter");
      filter.value = "parted"; filter.dispatchEvent(new Event("change"));
      const parted = document.getElementById("count").textContent;
      filter.value = "all"; filter.dispatchEvent(new Event("change"));
      const box = document.querySelector("details");
      box.open = true;
      setTimeout(() => {
        const slider = box.querySelector("input[type=range]");
        slider.value = 1; slider.dispatchEvent(new Event("input"));
        const label = box.querySelector(".text span").textContent;
        if (!document.title.startsWith("error"))
          document.title = `shown ${parted} ${label.startsWith(" 1 of ")}`;
        document.body.append(document.title);
      }, 300);
    });</script></html>"""
    path = tmp_path / "page.html"
    path.write_text(page[0].read_text().replace("</html>", script))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=5000", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    num = len(data_of(page[0].read_text())["problems"])
    assert f"<title>shown 0 of {num} true</title>" in done.stdout, done.stdout[-2000:]


def test_a_table_as_numbers(page, tmp_path, capsys):
    run_path, file = page[0].with_name("results2.jsonl"), tmp_path / "run.csv"
    assert exit_code(report.main, [str(run_path), "--csv", str(file)]) == 0
    table = pd.read_csv(file).set_index("method")
    assert table.loc["autoregressive", "speedup"] == 1
    rows = [row for row in page[1] if row.method == "speculative"]
    assert table.loc["speculative", "tokens/s"] == pytest.approx(metrics.tokens_per_second(rows))
    for kind in report.KINDS.keys() - {"run", "texts", "figure1", "methods", "scale", "peers"}:
        file.unlink()
        path = report.PROJECT / {
            **dict.fromkeys(["headline", "scores"], "Results/published"),
            **{"index": "Results/published/quick-start"},
            **{"precision": "Results/published/quality.jsonl"},
            **{"identity": "Results/published/smollm2/identity"},
        }.get(kind, "Results/published/smollm2")
        command = [str(path), "--csv", str(file), "--table", kind]
        assert exit_code(report.main, command) == 0, capsys.readouterr().err
        assert len(pd.read_csv(file)) > 0
    capsys.readouterr()
    for wrong in (["--table", "runs"], ["--csv", file / "in a file"]):
        refused(report.main, [run_path, "--csv", file, *wrong], capsys)
