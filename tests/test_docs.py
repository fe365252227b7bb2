"""Holds the documentation to the repository: its links, its paths, the names that it imports."""

import ast
import importlib
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from sama_jax.config import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "experiments/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
OLD = {"CHANGELOG.md"}
"""Pages that speak of earlier versions: what they name may be gone."""

SITE = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "build_site.py")))
"""The module with which MkDocs builds the site."""

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.-])((?:sama_jax|checkpoints_convert|tests|docs|experiments)/[\w./-]*)")
NAME = re.compile(r"(?<![\w/.-])((?:sama_jax|checkpoints_convert)(?:\.\w+)+)")


def anchors(page: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page), re.M)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "", h)).strip() for h in headings)
    return {re.sub(r"\s", "-", heading.lower()) for heading in plain}


def broken_links(path: Path) -> list[str]:
    """Returns the relative links of a page whose file or heading does not exist."""
    broken = []
    for link in LINK.findall(FENCE.sub("", path.read_text("utf-8"))):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    return broken


def unknown_paths(text: str) -> list[str]:
    """Returns the paths into the repository that a page names and that do not exist."""
    found = {path.rstrip(".") for path in PATH.findall(text)}
    return sorted(path for path in found if not (ROOT / path).exists())


def unknown_names(text: str) -> list[str]:
    """Returns the dotted names of the packages that a page uses and that do not import."""
    names = set(NAME.findall(text))
    for language, code in FENCE.findall(text):
        for node in ast.walk(ast.parse(code)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in names if name.startswith(("sama_jax.", "checkpoints_convert."))}
    return sorted(name for name in ours if not resolves(name))


def resolves(name: str) -> bool:
    """Tells whether a dotted name is a module, or something that a module holds."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def blocks(page: str) -> list[str]:
    """Returns the Python blocks of a page."""
    found = FENCE.findall((ROOT / page).read_text("utf-8"))
    return [code for language, code in found if language == "python"]


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(path):
    assert broken_links(path) == []


@pytest.mark.parametrize("path", [p for p in PAGES if p.name not in OLD], ids=page_id)
def test_paths_and_names_exist(path):
    text = path.read_text("utf-8")
    assert unknown_paths(text) == []
    assert unknown_names(text) == []


def test_a_broken_link_a_lost_path_and_a_lost_name_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n[here](#a-page) [there](gone.md) [below](#gone)\n", "utf-8")
    assert broken_links(page) == ["gone.md", "#gone"]
    assert unknown_paths("`sama_jax/votes.py`, `sama_jax/core/votes.py`.") == ["sama_jax/votes.py"]
    text = "`sama_jax.votes`, `sama_jax.core.votes.gone`, `sama_jax.core.votes.sign_statistics`"
    assert unknown_names(text) == ["sama_jax.core.votes.gone", "sama_jax.votes"]
    code = "```python\nfrom sama_jax import gone, run_audit\n```\n"
    assert unknown_names(code) == ["sama_jax.gone"]


def test_public_names_have_docstrings():
    assert list(SITE.undocumented(ROOT / "sama_jax")) == []


UNTOLD = '''
"""A module."""

class Base:
    """A base."""

    def run(self):
        """Runs."""

class Own(Base):
    """Its own."""

    def run(self): ...

    def walk(self): ...

def untold(): ...
'''


def test_an_undocumented_public_name_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(UNTOLD, "utf-8")
    assert list(SITE.undocumented(tmp_path)) == [f"{path}:15: Own.walk", f"{path}:17: untold"]


def test_links_between_files_become_links_between_pages():
    change = SITE.with_site_links
    assert change("[a](docs/models.md#llada)", "README.md") == "[a](models.md#llada)"
    assert change("[a](../README.md)", "docs/models.md") == "[a](index.md)"
    assert change("[a](../../CONTRIBUTING.md#test)", "docs/recipes/x.md") == (
        "[a](../contributing.md#test)"
    )
    assert change("[a](https://arxiv.org/)", "README.md") == "[a](https://arxiv.org/)"


def test_every_page_and_every_folder_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"([\w./-]+\.md)$", navigation, re.M)
    written = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    added = {page for page in SITE.PAGES.values() if page.endswith(".md")}
    assert sorted(listed) == sorted(written | added | set(SITE.api_pages(ROOT / "sama_jax")))


def test_the_python_page_prints_what_it_says(capsys):
    code = next(c for c in blocks("docs/python.md") if "sign_statistics" in c)
    exec(compile(code, "docs/python.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"print\(.*\)  # (.*)$", code, re.M)[1]


def test_the_readme_starts_an_audit_from_python(tmp_path, monkeypatch, capsys):
    (code,) = blocks("README.md")
    asked = []

    def run_audit(job):
        asked.append(job)
        return SimpleNamespace(metrics={"attacks": {"sama": {"auc": 0.5}}})

    monkeypatch.setattr("sama_jax.programs.audit.run_audit", run_audit)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "label": 1}\n', "utf-8")
    exec(compile(code, "README.md", "exec"), {})
    assert asked[0].settings.sama == PRESETS["official"]
    assert capsys.readouterr().out == "0.5\n"
