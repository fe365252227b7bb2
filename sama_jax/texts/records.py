"""Reads the records of a file in any of the formats that texts come in; nothing is checked yet.

What cannot be read is an error that names file and line; nothing is skipped silently except blank
lines.
"""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sama_jax.errors import DataError, UsageError

_KINDS = "expected .jsonl, .jsonl.gz, .json, .csv or .parquet"


class Row(NamedTuple):
    """A record before it is checked: the fields that matter, and where it stands."""

    fields: dict[str, Any]
    where: str


def rows_of(path: Path, problems: list[str]) -> Iterator[Row]:
    """Yields the records of a file, whatever its format; unreadable lines go to `problems`."""
    content = _read_bytes(path)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if content[:4] == b"PAR1" or suffix == ".parquet":
        yield from _parquet_rows(path, content)
        return
    text = _decode(path, content)
    if suffix == ".csv":
        yield from _csv_rows(path, text, problems)
    elif suffix == ".json" or text.lstrip()[:1] == "[":
        yield from _json_rows(path, text, problems)
    elif suffix == ".jsonl" or text.lstrip()[:1] == "{":
        yield from _jsonl_rows(path, text, problems)
    elif text.strip():
        raise DataError(f"{path}: unknown kind of file; {_KINDS}")


def _read_bytes(path: Path) -> bytes:
    """Reads the whole file, unzipped if it is a gzip file whatever its name."""
    if os.path.isdir(path):
        raise DataError(f"{path}: is a folder; expected a file of texts ({_KINDS[9:]})")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a file of texts ({_KINDS[9:]})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip file is truncated or damaged ({error}); copy it again"
        ) from None


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path.name}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x}); "
            f"is it a binary file? {_KINDS}"
        ) from None


def _jsonl_rows(path: Path, text: str, problems: list[str]) -> Iterator[Row]:
    # Only "\n" ends a line: other line separators may stand inside JSON strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: not valid JSON ({error})")
            continue
        if isinstance(record, dict):
            yield Row(record, where)
        else:
            problems.append(f"{where}: expected a JSON object, found {_kind(record)}")


def _json_rows(path: Path, text: str, problems: list[str]) -> Iterator[Row]:
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if len([line for line in text.split("\n") if line.strip()[:1] == "{"]) > 1:
            yield from _jsonl_rows(path, text, problems)  # JSONL under another name
            return
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path.name}:{line}: not valid JSON ({error})") from None
    if isinstance(content, dict) and isinstance(content.get("data"), (dict, list)):
        content = content["data"]
    if isinstance(content, dict):
        content = _transpose(path, content)
    if not isinstance(content, list):
        raise DataError(
            f'{path}: expected [{{"text": ..}}, ..] or {{"data": {{"text": [..]}}}}, '
            f"found {_kind(content)}"
        )
    for index, record in enumerate(content):
        where = f"{path.name}[{index}]"
        if isinstance(record, dict):
            yield Row(record, where)
        else:
            problems.append(f"{where}: expected an object, found {_kind(record)}")


def _transpose(path: Path, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Turns columns into records. A single record (no list in it) is passed on as it is."""
    names = [n for n in ("text", "id", "label", "member", "nonmember") if n in columns]
    if not any(isinstance(columns[n], list) for n in names):
        return [columns]
    lengths = {n: len(columns[n]) if isinstance(columns[n], list) else -1 for n in names}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: its columns must be lists of one length, found {lengths}")
    return [dict(zip(names, record)) for record in zip(*(columns[n] for n in names))]


def _csv_rows(path: Path, text: str, problems: list[str]) -> Iterator[Row]:
    # The module's limit of 128 KiB a field is shorter than some texts, and it is global.
    limit, start = csv.field_size_limit(max(len(text), 1)), 1
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names = reader.fieldnames or []
        if names and "text" not in names and not {"member", "nonmember"} <= set(names):
            found = ", ".join(names)
            raise DataError(f"{path.name}:1: has no column 'text'; its columns: {found}")
        start = reader.line_num + 1
        for record in reader:
            where, start = f"{path.name}:{start}", reader.line_num + 1
            if None in record:
                problems.append(f"{where}: more fields than the header has; quote the text")
                continue
            yield Row(_csv_fields(record), where)
    except csv.Error as error:
        problems.append(f"{path.name}:{start}: not valid CSV ({error})")
    finally:
        csv.field_size_limit(limit)


def _csv_fields(record: dict[str, Any]) -> dict[str, Any]:
    """Types the fields, as CSV knows strings only: an empty id or label is absent."""
    fields = dict(record)
    fields["id"] = record.get("id") or None
    label = (record.get("label") or "").strip()
    fields["label"] = {"": None, "1": 1, "0": 0}.get(label, label)
    return fields


def _parquet_rows(path: Path, content: bytes) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{path}: reading parquet needs pyarrow; pip install 'sama-jax[parquet]'"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = file.schema_arrow.names
        wanted = [n for n in ("text", "id", "label", "member", "nonmember") if n in names]
        if "text" not in wanted and not {"member", "nonmember"} <= set(wanted):
            raise DataError(f"{path}: has no column 'text'; its columns: {', '.join(names)}")
        records = file.read(columns=wanted).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        first = str(error).split("\n")[0]
        raise DataError(f"{path}: not a complete parquet file ({first}); copy it again") from None
    for index, record in enumerate(records):
        yield Row(record, f"{path.name}:row {index + 1}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), type(value).__name__)
