"""Makes the pages of the site that are not files of `docs/`, for MkDocs, which calls `on_files`.

The README and its neighbours become pages, and every folder of the package gets a page of its
API. Sources are read, nothing is imported. An undocumented public name stops the build.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "experiments/README.md": "experiments.md",
    "LICENSE": "LICENSE.txt",
    "CITATION.cff": "CITATION.cff",
}
"""Files outside `docs/` -> their addresses in the site."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages to the files of the site (a hook of MkDocs)."""
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    missing = sorted(undocumented(ROOT / "sama_jax"))
    if missing:
        raise PluginError("public names without a docstring:\n  " + "\n  ".join(missing))
    pages = {site: (ROOT / source).read_text("utf-8") for source, site in PAGES.items()}
    for address, text in {**pages, **api_pages(ROOT / "sama_jax")}.items():
        files.append(File.generated(config, address, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links at the addresses of the site (a hook of MkDocs)."""
    address = page.file.src_uri
    source = {site: path for path, site in PAGES.items()}.get(address, f"docs/{address}")
    return with_site_links(markdown, source)


def with_site_links(markdown: str, source: str) -> str:
    """Returns a page with its links between files of the repository changed to those of the site.

    Args:
        markdown: the page.
        source: its path in the repository, such as `docs/models.md`.
    """

    def address(path: str) -> str:
        return PAGES.get(path, path.removeprefix("docs/"))

    def change(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        here = posixpath.dirname(address(source)) or "."
        return f"]({posixpath.relpath(address(target), here)}{match[2]})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)((?:#[^)\s]*)?)\)", change, markdown)


def api_pages(package: Path) -> dict[str, str]:
    """Returns the pages of the API by address: the public names, then one a folder."""
    exported = "".join(f"::: sama_jax.{name}\n" for name in public_names(package))
    words = "".join(f"::: sama_jax.{path.stem}\n" for path in files_of(package))
    pages = {
        "api/index.md": f"# Python API\n\nWhat `from sama_jax import ...` offers.\n\n{exported}",
        "api/words.md": f"# The words that everybody uses\n\n{words}",
    }
    for folder in sorted(p.parent for p in package.glob("*/__init__.py")):
        name = folder.relative_to(package.parent).as_posix().replace("/", ".")
        modules = [
            ".".join(path.relative_to(package.parent).with_suffix("").parts)
            for path in sorted(folder.rglob("*.py"))
            if not path.name.startswith("__")
        ]
        about = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
        blocks = "".join(f"::: {module}\n" for module in modules)
        pages[f"api/{folder.name}.md"] = f"# {name}\n\n{about}\n\n{blocks}"
    return pages


def public_names(package: Path) -> list[str]:
    """Returns what `__all__` of the package lists."""
    for node in ast.parse((package / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{package}/__init__.py has no __all__")


def files_of(folder: Path) -> list[Path]:
    """Returns the public modules that lie directly in a folder."""
    return [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]


def undocumented(package: Path) -> Iterator[str]:
    """Yields the public modules, functions, classes and methods that have no docstring.

    A method may leave its docstring to the protocol or to the base class that describes it.
    """
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(package.rglob("*.py"))}
    classes = [n for tree in trees.values() for n in tree.body if isinstance(n, ast.ClassDef)]
    bases = {ast.unparse(base).split(".")[-1] for node in classes for base in node.bases}
    described = {"setup"}  # Flax calls and describes it
    for node in classes:
        if node.name in bases or any("Protocol" in ast.unparse(base) for base in node.bases):
            described |= {m.name for m in _methods(node) if ast.get_docstring(m)}
            fields = (n.target for n in node.body if isinstance(n, ast.AnnAssign))
            described |= {ast.unparse(field) for field in fields}
    for path, tree in trees.items():
        if not ast.get_docstring(tree):
            yield f"{path}: the module"
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                yield f"{path}:{node.lineno}: {node.name}"
            for method in _methods(node) if isinstance(node, ast.ClassDef) else ():
                if not ast.get_docstring(method) and method.name not in described:
                    yield f"{path}:{method.lineno}: {node.name}.{method.name}"


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
