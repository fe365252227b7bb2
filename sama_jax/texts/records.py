"""Reads the records of a file in any of the formats that texts come in; nothing is checked yet.

What cannot be read is an error that names file and line; nothing is skipped silently except blank
lines. Files are read as streams: memory holds a line, or some rows of a parquet file, at a time.
"""

import csv
import io
import itertools
import os
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sama_jax.errors import DataError, UsageError
from sama_jax.texts import streams
from sama_jax.untrusted import RepeatedKey, parse_json, printable

FIELDS = ("text", "id", "label", "group", "member", "nonmember")
TURNS = ("messages", "prompt", "response", "completion", "instruction", "input", "output")
"""Fields of conversations, which are read where a template is given and no text is."""
LABEL_SYNONYMS = ("labels", "is_member", "ismember", "membership", "member")
"""Names of fields that hold labels; `member` does not beside `nonmember`, which are texts."""

LINE_BYTES = 2**25
"""Most bytes of a line. The longest documents of public corpora have some 10 MB."""
JSON_BYTES = 2**29
"""Most bytes of a file that is read whole: JSON that is not in lines."""
JSON_VALUES = 15_000_000
"""Most values of one JSON document: an empty object of two bytes takes 72 in memory."""
BLANK_LINES = 1_000_000
"""Most blank lines in a row."""
BATCH_ROWS = 256
"""Rows of a parquet file that are in memory at once."""

_KINDS = "expected .jsonl, .json, .csv, .tsv (also as .gz or .zst) or .parquet"
_KIND_OF = {",": "CSV", "\t": "TSV"}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


class Row(NamedTuple):
    """A record before it is checked: the fields that matter, and where it stands."""

    fields: dict[str, Any]
    where: str
    found: Iterable[str] = ()
    """Names of all fields that it has in its file."""


class Names(NamedTuple):
    """How a file names the fields that hold texts and labels."""

    text: str = "text"
    label: str = "label"
    turns: bool = False
    """Whether its records are conversations, in the fields `TURNS` and not in `text`."""

    @property
    def both(self) -> tuple[str, str]:
        """The two names."""
        return self.text, self.label

    def among(self, names: Iterable[str]) -> list[str]:
        """Returns those of a file's names that are read: these two, and what may be meant."""
        replaced = {"text", "label"} - {*self.both}
        return [
            name
            for name in names
            if name in self.both
            or (meant(name) is not None and name not in replaced)
            or (self.turns and name in TURNS)
        ]

    def standard(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of a record with these two as `text` and `label`."""
        if self.both == STANDARD.both:
            return fields
        renamed = {"text": self.text, "label": self.label}
        rest = {n: v for n, v in fields.items() if n not in self.both and n not in renamed}
        return rest | {ours: fields[name] for ours, name in renamed.items() if name in fields}


STANDARD = Names()


def rows_of(path: Path, names: Names = STANDARD) -> Iterator[Row | str]:
    """Yields the records of a file, whatever its format; for a record that is none, what is wrong.

    Raises:
      DataError: the file cannot be read, or holds more than a file of texts can.
      UsageError: parquet without pyarrow, zstd without zstandard.
    """
    if os.path.isdir(path):
        raise DataError(f"{path}: is a folder; expected a file of texts ({_KINDS[9:]})")
    try:
        with path.open("rb") as file:
            for row in _records(path, streams.unpacked(path, file), names):
                if isinstance(row, Row):
                    found = row.found or row.fields
                    row = Row(names.standard(row.fields), row.where, found)
                yield row
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a file of texts ({_KINDS[9:]})") from None
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from None


def _records(path: Path, stream: io.BufferedReader, names: Names) -> Iterator[Row | str]:
    """Yields the records of an open file."""
    head = stream.peek(2**16)
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    suffix = Path(re.sub(r"\.(gz|zst)$", "", path.name.lower())).suffix
    if head[:4] == b"PAR1" or suffix == ".parquet":
        yield from _parquet_rows(path, stream, names)
    elif suffix in _SEPARATORS:
        yield from _csv_rows(path, stream, names, _SEPARATORS[suffix])
    elif suffix == ".json" or first == b"[":
        yield from _json_rows(path, stream, names)
    elif suffix == ".jsonl" or first == b"{":
        yield from _jsonl_rows(path, stream, names)
    else:
        begin = [line for _, line in itertools.islice(_lines(path, stream), 1000)]
        if any(map(str.strip, begin)):
            raise DataError(f"{path}: unknown kind of file; {_KINDS}")


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


def _jsonl_rows(
    path: Path, stream: io.BufferedReader | io.BytesIO, names: Names
) -> Iterator[Row | str]:
    for number, line in _lines(path, stream):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            record = _parsed(line)
        except ValueError as error:
            yield f"{where}: not valid JSON ({error})"
            continue
        yield _row(record, where, names)


def _row(record: Any, where: str, names: Names) -> Row | str:
    """Returns the row of a JSON value. A bare string is a text, unless a field should hold them."""
    if isinstance(record, dict):
        return Row(record, where)
    if isinstance(record, str) and names.text == "text" and not names.turns:
        return Row({"text": record}, where)
    return f"{where}: expected a JSON object, found {kind_of(record)}"


def _json_rows(path: Path, stream: io.BufferedReader, names: Names) -> Iterator[Row | str]:
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
        repeated = isinstance(error, RepeatedKey)  # a fault, wherever records end
        if not repeated and len(re.findall(r'^[^\S\n]*\{|^".*"\s*$', text, re.M)) > 1:
            yield from _jsonl_rows(path, io.BytesIO(data), names)  # JSONL under another name
            return
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path.name}:{line}: not valid JSON ({error})") from None
    if isinstance(content, dict):
        _require_one_part(path, content, names)
    if isinstance(content, dict) and isinstance(content.get("data"), (dict, list)):
        content = _data_of(path, content, names)
    if isinstance(content, dict):
        content = _transpose(path, content, names)
    if not isinstance(content, list):
        raise DataError(
            f'{path}: expected [{{"text": ..}}, ..] or {{"data": {{"text": [..]}}}}, '
            f"found {kind_of(content)}"
        )
    for index, record in enumerate(content):
        yield _row(record, f"{path.name}[{index}]", names)


def _data_of(path: Path, content: dict[str, Any], names: Names) -> Any:
    """Returns what a top level holds under `data`; itself if its own fields are the texts.

    Raises `DataError` if both hold texts, or if labels, ids or groups stand beside `data`: read
    without them, members and non-members would be taken for the same.
    """
    data, beside = content["data"], [n for n in names.among(content) if n != "data"]
    if _has_texts(content, names):
        records = data if isinstance(data, list) else [data]
        inside = any(isinstance(one, dict) and _has_texts(one, names) for one in records)
        if names.text == "data" or not inside:
            return content
        raise DataError(
            f"{path}: holds texts at its top level ({shown_names(beside)}) and under 'data'; keep "
            "one of them"
        )
    lost = [
        n for n in beside if isinstance(content[n], (dict, list)) or meant(n) in (None, "label")
    ]
    if lost:
        raise DataError(
            f"{path}: has {shown_names(lost)} beside 'data', where the texts are; move it to them"
        )
    return data


def _require_one_part(path: Path, content: dict[str, Any], names: Names) -> None:
    """Raises `DataError` if texts stand in several parts of a file: but one would be read.

    A part is an object or list with records, such as `data` and `train`; or beside bare strings
    another list of them.
    """
    strings = _has_strings(content.get("data")) and not _has_texts(content, names)
    found = [
        name
        for name, value in content.items()
        if (isinstance(value, dict) and _has_texts(value, names))
        or _has_records(value, names)
        or (strings and _has_strings(value))
    ]
    if len(found) > 1 or (found and found != ["data"] and "data" in content):
        raise DataError(
            f"{path}: holds texts in several parts ({shown_names(found)}); keep one of them, as "
            "'data'"
        )


def _has_strings(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, str) for one in value)


def _has_records(value: Any, names: Names) -> bool:
    """Tells whether a list holds records with texts."""
    records = value if isinstance(value, list) else []
    return any(isinstance(one, dict) and _has_texts(one, names) for one in records)


def _has_texts(fields: Container[str], names: Names) -> bool:
    """Tells whether fields or columns of these names hold texts."""
    if names.turns:
        return any(name in fields for name in TURNS)
    pair = names.text == "text" and "member" in fields and "nonmember" in fields
    return names.text in fields or pair


def _transpose(path: Path, columns: dict[str, Any], names: Names) -> Iterable[dict[str, Any]]:
    """Turns columns into records. A single record (no list in it) is passed on as it is."""
    read = names.among(columns)
    if not any(isinstance(columns[n], list) for n in read):
        return [columns]
    lengths = {n: len(columns[n]) if isinstance(columns[n], list) else -1 for n in read}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: its columns must be lists of one length, found {lengths}")
    return [dict(zip(read, record)) for record in zip(*(columns[n] for n in read))]


def _csv_rows(
    path: Path, stream: io.BufferedReader, names: Names, separator: str
) -> Iterator[Row | str]:
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
        reader = csv.DictReader(lines, delimiter=separator, strict=True)
        header = list(reader.fieldnames or [])
        if header:
            _require_text(f"{path.name}:1", header, names)
        start = reader.line_num + 1
        for record in reader:
            where, start = f"{path.name}:{start}", reader.line_num + 1
            if None in record or None in record.values():
                more = "more" if None in record else "fewer"
                yield f"{where}: {more} fields than the header has; quote the text"
                continue
            # CSV knows strings only: an empty id or group is absent.
            yield Row(record | {n: record.get(n) or None for n in ("id", "group")}, where, header)
    except csv.Error as error:
        yield f"{path.name}:{start}: not valid {_KIND_OF[separator]} ({error})"
    finally:
        csv.field_size_limit(limit)


def _require_text(where: str, found: list[str], names: Names) -> None:
    """Raises `DataError` unless columns of these names can be used."""
    if not names.turns and not _has_texts(found, names):
        raise DataError(f"{where}: {lacks(names.text, 'column', found)}")
    read = (*FIELDS, *names.both, *(TURNS if names.turns else ()))
    twice = sorted({name for name in read if found.count(name) > 1})
    if twice:
        raise DataError(f"{where}: has several columns '{printable(twice[0])}'; keep one of them")


def lacks(name: str, what: str, found: Iterable[Any]) -> str:
    """Says that a file has no such field or column, which ones it has, and how to name another."""
    found = list(found)
    hint = "; rename the one that holds texts, or name it: --text-field NAME"
    if {"messages", "prompt", "instruction"} & set(found):
        hint += "; conversations are read by audits, nll and trainings with --template NAME"
    fields = f"(its {what}s: {shown_names(found)})"
    return f"has no {what} '{printable(name)}' {fields}{hint if name == 'text' else ''}"


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


def _parquet_rows(path: Path, stream: io.BufferedReader, names: Names) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{path}: reading parquet needs pyarrow; pip install 'sama-jax[parquet]'"
        ) from None
    number = total = 0
    most = streams.most_bytes(os.path.getsize(path))
    try:
        source = stream if stream.seekable() else pyarrow.BufferReader(stream.read())
        file = pyarrow.parquet.ParquetFile(source, pre_buffer=False)
        wanted = _parquet_columns(path, file, names)
        # Texts that repeat one stay one: a dictionary of a page may stand for a million rows.
        strings = [n for n in wanted if pyarrow.types.is_string(file.schema_arrow.field(n).type)]
        file = pyarrow.parquet.ParquetFile(source, pre_buffer=False, read_dictionary=strings)
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
            for record in zip(*(_values(batch.column(name)) for name in wanted)):
                number += 1
                total += sum(map(_characters, record))
                if total > most:
                    raise DataError(
                        f"{path}: holds texts of more than {streams.UNPACKED_RATIO} times its "
                        "size, most of them repeated; keep each once"
                    )
                fields = dict(zip(wanted, record))
                yield Row(fields, f"{path.name}:row {number}", file.schema_arrow.names)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make pyarrow raise nearly anything
        first = printable(str(error).split("\n")[0], 200)
        raise DataError(f"{path}: not a complete parquet file ({first}); copy it again") from None


def _parquet_columns(path: Path, file: Any, names: Names) -> list[str]:
    """Returns the columns to read. Raises `DataError` if they are none of texts."""
    from pyarrow import types

    schema, metadata = file.schema_arrow, file.metadata
    _require_text(str(path), schema.names, names)
    wanted = names.among(schema.names)
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_boolean)
    plain += (types.is_floating, types.is_null)
    for name in wanted:
        kind = schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if name in (*FIELDS, *names.both) and not any(allowed(kind) for allowed in plain):
            raise DataError(
                f"{path}: its column '{printable(name)}' holds {kind}, expected strings or whole "
                "numbers"
            )
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    packed = sum(column.total_compressed_size for column in columns)
    if sum(column.total_uncompressed_size for column in columns) > streams.most_bytes(packed):
        raise DataError(
            f"{path}: unpacks to more than {streams.UNPACKED_RATIO} times its size; no file of "
            "texts does"
        )
    return wanted


def _characters(value: Any) -> int:
    """Counts the characters of a value, and of what is inside it."""
    if isinstance(value, list):
        return sum(map(_characters, value))
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return len(value) if isinstance(value, str) else 0


def _values(column: Any) -> list[Any]:
    """Returns a column as Python values; equal entries of a dictionary are one object."""
    if not hasattr(column, "dictionary"):
        return column.to_pylist()
    indices = column.indices.to_pylist()
    used = sorted({i for i in indices if i is not None})
    found = {i: column.dictionary[i].as_py() for i in used}
    return [None if i is None else found[i] for i in indices]


def kind_of(value: Any) -> str:
    """Names the kind of a value for a message, and nothing of what it holds."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), type(value).__name__)
