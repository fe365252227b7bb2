"""Reads the records of a file in any of the formats that texts come in; nothing is checked yet.

What cannot be read is an error that names file and line; nothing is skipped silently except blank
lines. Files are read as streams: memory holds a line, or some rows of a parquet file, at a time.
"""

import csv
import gzip
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sama_jax.errors import DataError, UsageError
from sama_jax.untrusted import parse_json, printable

FIELDS = ("text", "id", "label", "group", "member", "nonmember")
LABEL_SYNONYMS = ("labels", "is_member", "ismember", "membership", "member")
"""Names of fields that hold labels; `member` does not beside `nonmember`, which are texts."""

LINE_BYTES = 2**25
"""Most bytes of a line. The longest documents of public corpora have some 10 MB."""
JSON_BYTES = 2**29
"""Most bytes of a file that is read whole: JSON that is not in lines."""
JSON_VALUES = 15_000_000
"""Most values of one JSON document: an empty object of two bytes takes 72 in memory."""
UNPACKED_BYTES, UNPACKED_RATIO = 2**28, 50
"""A compressed file may hold the first, or as many times its size as the second says. Texts shrink
to a third or a tenth, a gigabyte of zeros to a thousandth."""
BLANK_LINES = 1_000_000
"""Most blank lines in a row."""
BATCH_ROWS = 256
"""Rows of a parquet file that are in memory at once."""

_KINDS = "expected .jsonl, .jsonl.gz, .json, .csv or .parquet"


class Row(NamedTuple):
    """A record before it is checked: the fields that matter, and where it stands."""

    fields: dict[str, Any]
    where: str


def rows_of(path: Path) -> Iterator[Row | str]:
    """Yields the records of a file, whatever its format; for a record that is none, what is wrong.

    Raises:
      DataError: the file cannot be read, or holds more than a file of texts can.
      UsageError: parquet without pyarrow.
    """
    if os.path.isdir(path):
        raise DataError(f"{path}: is a folder; expected a file of texts ({_KINDS[9:]})")
    packed = False
    try:
        with path.open("rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            yield from _records(path, _unpacked(path, file) if packed else file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a file of texts ({_KINDS[9:]})") from None
    except (EOFError, OSError, zlib.error) as error:
        if packed:
            raise DataError(
                f"{path}: the gzip file is truncated or damaged ({error}); copy it again"
            ) from None
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from None


def _records(path: Path, stream: io.BufferedReader) -> Iterator[Row | str]:
    """Yields the records of an open file."""
    head = stream.peek(2**16)
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if head[:4] == b"PAR1" or suffix == ".parquet":
        yield from _parquet_rows(path, stream)
    elif suffix == ".csv":
        yield from _csv_rows(path, stream)
    elif suffix == ".json" or first == b"[":
        yield from _json_rows(path, stream)
    elif suffix == ".jsonl" or first == b"{":
        yield from _jsonl_rows(path, stream)
    else:
        begin = [line for _, line in itertools.islice(_lines(path, stream), 1000)]
        if any(map(str.strip, begin)):
            raise DataError(f"{path}: unknown kind of file; {_KINDS}")


class _Unpacked(io.RawIOBase):
    """Reads what a gzip file holds, up to a limit."""

    def __init__(self, path: Path, file: io.BufferedReader):
        super().__init__()
        packed = os.fstat(file.fileno()).st_size
        self._path, self._file = path, gzip.GzipFile(fileobj=file)
        self._limit = max(UNPACKED_BYTES, UNPACKED_RATIO * packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        if self._file.tell() > self._limit:
            raise DataError(
                f"{self._path}: unpacks to more than {self._limit:,} bytes, more than "
                f"{UNPACKED_RATIO} times its size; no file of texts does; unpack it to read it"
            )
        return count


def _unpacked(path: Path, file: io.BufferedReader) -> io.BufferedReader:
    return io.BufferedReader(_Unpacked(path, file), 2**20)


def _lines(path: Path, stream: io.BufferedReader | io.BytesIO) -> Iterator[tuple[int, str]]:
    """Yields the lines with their numbers; only `\\n` ends a line, since JSON may hold others."""
    number = blank = 0
    while line := stream.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise DataError(
                f"{path.name}:{number}: the line has more than {LINE_BYTES:,} bytes; split its text"
            )
        blank = 0 if len(line) > 2 or line.strip() else blank + 1
        if blank > BLANK_LINES:
            raise DataError(f"{path.name}:{number}: more than {BLANK_LINES:,} blank lines in a row")
        yield number, _decode(path, line, number)


def _decode(path: Path, content: bytes, line: int = 1) -> str:
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        number = line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{path.name}:{number}: not UTF-8 text (byte 0x{error.object[error.start]:02x}); "
            f"is it a binary file? {_KINDS}"
        ) from None


def _parsed(text: str) -> Any:
    """Parses JSON, unless it takes many times its size in memory. Raises `ValueError`."""
    if len(text) > JSON_VALUES and sum(map(text.count, ",[{")) > JSON_VALUES:
        raise ValueError(f"it holds more than {JSON_VALUES:,} values; write a record a line")
    return parse_json(text)


def _jsonl_rows(path: Path, stream: io.BufferedReader | io.BytesIO) -> Iterator[Row | str]:
    for number, line in _lines(path, stream):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            record = _parsed(line)
        except ValueError as error:
            yield f"{where}: not valid JSON ({error})"
            continue
        if isinstance(record, dict):
            yield Row(record, where)
        else:
            yield f"{where}: expected a JSON object, found {_kind(record)}"


def _json_rows(path: Path, stream: io.BufferedReader) -> Iterator[Row | str]:
    data = stream.read(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        raise DataError(
            f"{path}: JSON of more than {JSON_BYTES:,} bytes; write a record a line, as .jsonl"
        )
    text = _decode(path, data)
    if not text.strip():
        return
    try:
        content = _parsed(text)
    except ValueError as error:
        if len(re.findall(r"^[^\S\n]*\{", text, re.M)) > 1:
            yield from _jsonl_rows(path, io.BytesIO(data))  # JSONL under another name
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
            yield f"{where}: expected an object, found {_kind(record)}"


def _transpose(path: Path, columns: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Turns columns into records. A single record (no list in it) is passed on as it is."""
    names = [n for n in columns if meant(n) is not None]
    if not any(isinstance(columns[n], list) for n in names):
        return [columns]
    lengths = {n: len(columns[n]) if isinstance(columns[n], list) else -1 for n in names}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: its columns must be lists of one length, found {lengths}")
    return [dict(zip(names, record)) for record in zip(*(columns[n] for n in names))]


def _csv_rows(path: Path, stream: io.BufferedReader) -> Iterator[Row | str]:
    # "\r" alone ends a line, too, but other separators may stand inside fields.
    lines = (
        part
        for _, line in _lines(path, stream)
        for part in re.split(r"(?<=\r)(?!\n)", line)
        if part
    )
    # The module's limit of 128 KiB a field is shorter than some texts, and it is global.
    limit, start = csv.field_size_limit(LINE_BYTES), 1
    try:
        reader = csv.DictReader(lines, strict=True)
        names = list(reader.fieldnames or [])
        if names:
            _require_text(f"{path.name}:1", names)
        start = reader.line_num + 1
        for record in reader:
            where, start = f"{path.name}:{start}", reader.line_num + 1
            if None in record or None in record.values():
                more = "more" if None in record else "fewer"
                yield f"{where}: {more} fields than the header has; quote the text"
                continue
            yield Row(_csv_fields(record), where)
    except csv.Error as error:
        yield f"{path.name}:{start}: not valid CSV ({error})"
    finally:
        csv.field_size_limit(limit)


def _require_text(where: str, names: list[str]) -> None:
    """Raises `DataError` unless columns of these names can be used."""
    if "text" not in names and not {"member", "nonmember"} <= set(names):
        raise DataError(f"{where}: has no column 'text'; its columns: {shown_names(names)}")
    twice = sorted({name for name in FIELDS if names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: has several columns '{twice[0]}'; keep one of them")


def shown_names(names: Iterable[Any]) -> str:
    """Lists names of fields for a message. What may be a text instead is told by its length."""
    names = list(map(str, names))
    shown = [
        n if re.fullmatch(r"[\w.-]{1,30}", n) else f"({len(n):,} characters)" for n in names[:10]
    ]
    more = [f"and {len(names) - 10:,} more"] if len(names) > 10 else []
    return ", ".join([*shown, *more]) or "none"


def meant(name: str) -> str | None:
    """Returns which field a name stands for, also if it is spelled in another way; None: none."""
    plain = name.strip(" \t\r\n\ufeff\xa0\"'").lower()
    if plain in FIELDS:
        return plain
    return "label" if plain in LABEL_SYNONYMS else None


def _csv_fields(record: dict[str, Any]) -> dict[str, Any]:
    """Types the fields, as CSV knows strings only: an empty id, group or label is absent."""
    fields = dict(record)
    fields |= {name: record.get(name) or None for name in ("id", "group")}
    if "label" in record:
        label = (record["label"] or "").strip()
        fields["label"] = {"": None, "1": 1, "0": 0}.get(label, label)
    return fields


def _parquet_rows(path: Path, stream: io.BufferedReader) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{path}: reading parquet needs pyarrow; pip install 'sama-jax[parquet]'"
        ) from None
    number = total = 0
    try:
        source = stream if stream.seekable() else pyarrow.BufferReader(stream.read())
        file = pyarrow.parquet.ParquetFile(source, pre_buffer=False)
        wanted = _parquet_columns(path, file)
        # Texts that repeat one stay one: a dictionary of a page may stand for a million rows.
        strings = [n for n in wanted if pyarrow.types.is_string(file.schema_arrow.field(n).type)]
        file = pyarrow.parquet.ParquetFile(source, pre_buffer=False, read_dictionary=strings)
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
            for record in zip(*(_values(batch.column(name)) for name in wanted)):
                number += 1
                total += sum(len(value) for value in record if isinstance(value, str))
                if total > max(UNPACKED_BYTES, UNPACKED_RATIO * os.path.getsize(path)):
                    raise DataError(
                        f"{path}: holds texts of more than {UNPACKED_RATIO} times its size, most "
                        "of them repeated; keep each once"
                    )
                yield Row(dict(zip(wanted, record)), f"{path.name}:row {number}")
    except (DataError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make pyarrow raise nearly anything
        first = printable(str(error).split("\n")[0], 200)
        raise DataError(f"{path}: not a complete parquet file ({first}); copy it again") from None


def _parquet_columns(path: Path, file: Any) -> list[str]:
    """Returns the columns to read. Raises `DataError` if they are none of texts."""
    from pyarrow import types

    schema, metadata = file.schema_arrow, file.metadata
    _require_text(str(path), schema.names)
    wanted = [name for name in schema.names if meant(name) is not None]
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_boolean)
    plain += (types.is_floating, types.is_null)
    for name in wanted:
        kind = schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if name in FIELDS and not any(allowed(kind) for allowed in plain):
            raise DataError(
                f"{path}: its column '{name}' holds {kind}, expected strings or whole numbers"
            )
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    packed = sum(column.total_compressed_size for column in columns)
    if sum(column.total_uncompressed_size for column in columns) > max(
        UNPACKED_BYTES, UNPACKED_RATIO * packed
    ):
        raise DataError(
            f"{path}: unpacks to more than {UNPACKED_RATIO} times its size; no file of texts does"
        )
    return wanted


def _values(column: Any) -> list[Any]:
    """Returns a column as Python values; equal entries of a dictionary are one object."""
    if not hasattr(column, "dictionary"):
        return column.to_pylist()
    indices = column.indices.to_pylist()
    used = sorted({i for i in indices if i is not None})
    found = {i: column.dictionary[i].as_py() for i in used}
    return [None if i is None else found[i] for i in indices]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), type(value).__name__)
