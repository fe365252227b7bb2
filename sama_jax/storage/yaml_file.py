"""Reads and writes small YAML files: experiments, and the settings of an audit."""

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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for mappings of bounded size."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_FIELDS:
            raise ValueError(f"a mapping has more than {MAX_FIELDS} fields")


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
