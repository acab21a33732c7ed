"""Every Python block of the documentation runs, page by page in one namespace; `make docs` builds the site strictly."""

import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="an unpacked sdist holds no docs")
PAGES = sorted(p.name for p in DOCS.glob("*.md") if "```python" in p.read_text()) if DOCS.is_dir() else []


@pytest.mark.cases(1)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "__page__"}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), scope)


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert {p.name for p in DOCS.glob("*.md")} == set(re.findall(r": (\S+\.md)$", menu, re.MULTILINE))


def test_links_lead_somewhere_in_the_repository_and_on_the_site():
    """Pages of the site link to pages of the site: those of docs/, and the results that docs_hooks.py adds."""
    for page in [*DOCS.glob("*.md"), *(ROOT / "examples" / "results").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" in link:
                continue
            target = (page.parent / link).resolve()
            assert target.is_file(), f"{page.name} links to {link}"
            assert target.is_relative_to(DOCS) or target.is_relative_to(ROOT / "examples" / "results"), (
                f"{page.name} links to {link}, which the built site does not have"
            )


@pytest.mark.skipif(
    any(util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason='the docs extra is not installed: pip install "ddpn-fx[docs]"',
)
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "index.html").exists()
    site = tmp_path / "site"
    for page in (site / "paper.html", site / "examples" / "results" / "paper" / "policies.html"):
        links = re.findall(r'(?:href|src)="(?!https?:)([^"#?]+)', page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == []
    assert "examples/results/paper/table3.html" in (site / "paper.html").read_text()
    shutil.rmtree(tmp_path / "site")
