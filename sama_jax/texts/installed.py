"""Lists documents that every installation has: the standard library's source, packages' prose.

Files are parsed, never imported. The same versions give the same documents in the same order.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from sama_jax.errors import UsageError

MIN_CHARS, MAX_CHARS = 250, 700
"""Shorter documents are left out, longer ones cut: 100 tokens are about 300 characters."""

# Parts of the library that are tests, generated tables or not always installed.
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "ensurepip",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "tkinter",
    "dist-packages",
}


def stdlib_documents(folder: Path | None = None, max_chars: int = MAX_CHARS) -> list[str]:
    """Lists top-level functions and classes of the standard library, none inside another.

    Each has at least `MIN_CHARS` characters, and is cut at `max_chars`. They come in a fixed
    order, without documents of which half the lines or more stand in earlier ones.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    documents = (document for path in _sources(root) for document in _top_level(path))
    return _distinct(documents, max_chars)


def docstrings(packages: Sequence[str], max_chars: int = MAX_CHARS) -> list[str]:
    """Lists the docstrings of installed packages, chosen and ordered as `stdlib_documents` are.

    Raises `UsageError` for a package that is not installed in source form.
    """
    documents = (
        document
        for name in packages
        for path in _sources(package_folder(name))
        for document in _docstrings(path)
    )
    return _distinct(documents, max_chars)


def package_folder(name: str) -> Path:
    """Returns where a top-level package is installed, without importing it. Raises `UsageError`."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the package {name} is not installed here: pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def _distinct(documents: Iterable[str], max_chars: int) -> list[str]:
    """Keeps what is long enough and says something new, cut."""
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        lines = {_line_key(s) for s in document.splitlines() if len(s.strip()) >= 12}
        if len(document) >= MIN_CHARS and lines and 2 * len(lines & seen) < len(lines):
            kept.append(document[:max_chars])
            seen |= lines
    return kept


def _sources(root: Path) -> Iterator[Path]:
    """Yields the source files below a folder, in order."""
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(root).parts):
            yield path


def _parsed(path: Path) -> tuple[str, ast.Module] | None:
    """Reads and parses a file; None if it cannot be."""
    try:
        source = path.read_text("utf-8")
        return source, ast.parse(source)
    except (ValueError, SyntaxError, OSError):
        return None


def _top_level(path: Path) -> Iterator[str]:
    """Yields the source of each function and class of a file."""
    if (found := _parsed(path)) is None:
        return
    lines = found[0].splitlines(keepends=True)
    for node in found[1].body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield "".join(lines[node.lineno - 1 : node.end_lineno])


def _docstrings(path: Path) -> Iterator[str]:
    """Yields the docstrings of a file, its classes and its functions."""
    found = _parsed(path)
    for node in ast.walk(found[1]) if found else ():
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and (text := ast.get_docstring(node)):
            yield text


def _line_key(line: str) -> bytes:
    return hashlib.blake2b(re.sub(r"\s+", " ", line.strip()).encode(), digest_size=8).digest()
