"""Reads and writes small YAML files: experiments, and the settings of an audit."""

import re
from pathlib import Path
from typing import Any

import yaml

from sama_jax.errors import DataError
from sama_jax.storage.files import write_atomic
from sama_jax.untrusted import printable, read_bytes

MAX_BYTES = 2**18
"""Most bytes of a file: an experiment of 1,000 runs."""
MAX_FIELDS = 100
"""Most fields of a mapping. Merges (`<<`) of merges would double them each time."""
REPEATS = "sama-jax {} --config THIS_FILE --out DIR repeats the run, from the files that it names"
"""First line of a file with the flags of a command."""


_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?", re.ASCII)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for mappings of bounded size, each key once, and decimal numbers."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in known:
                raise ValueError(f"'{key.value}' stands there twice, {_at(key)}; keep one of them")
            known.add(key.value)
        return node

    def construct_decimal(self, node: yaml.ScalarNode) -> int | float:
        """Reads a number; 010, 1:04, 1_2 and 0x10, which YAML reads otherwise, are refused."""
        if not _DECIMAL.fullmatch(node.value):
            raise ValueError(
                f"'{node.value}' is no plain decimal number, {_at(node)}; write it as one, or in "
                "quotes if it is a word"
            )
        return int(node.value) if node.tag.endswith(":int") else float(node.value)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_FIELDS:
            raise ValueError(f"a mapping has more than {MAX_FIELDS} fields")


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_decimal)


def _at(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def read_yaml(path: Path) -> Any:
    """Reads a YAML file of plain values. Raises `DataError`."""
    try:
        return yaml.load(read_bytes(path, MAX_BYTES).decode(), _Loader)
    except MemoryError:
        raise
    except Exception as error:  # PyYAML raises what Python does for a value that is not as tagged
        reason = " ".join(str(error).split()) or type(error).__name__  # its own has several lines
        raise DataError(f"{path}: not readable as YAML ({printable(reason, 300)})") from None


def write_yaml(path: Path, first: str, content: dict[str, Any]) -> None:
    """Writes a mapping in its order, below a comment of one line."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=2**16)
    write_atomic(path, f"# {first}\n{text}")


def first_comment(path: Path) -> str | None:
    """Returns the comment of `write_yaml`; None if the file has none, or cannot be read."""
    try:
        line = read_bytes(path, MAX_BYTES).partition(b"\n")[0].decode()
    except (OSError, ValueError):
        return None
    return line[2:] if line.startswith("# ") else None
