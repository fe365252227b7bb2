"""Texts and tokens on the host: read files, tokenise, bucket. NumPy, no devices.

Nothing here changes a text. What cannot be read is an error that names file and line, up to ten
of them in one message; nothing is skipped silently except blank lines.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from sama_jax.arrays import Encoded
from sama_jax.errors import DataError, ModelError, UsageError

MAX_PROBLEMS = 10
"""Problems of single lines that one message lists; the rest are counted."""

_KINDS = "expected .jsonl, .jsonl.gz, .json, .csv or .parquet"
_SURROGATES = re.compile("[\ud800-\udfff]")


class Text(NamedTuple):
    """One text of a file."""

    id: str
    text: str
    label: int | None
    """1 member, 0 non-member, None unknown."""
    where: str
    """File and place for messages, such as `file.jsonl:7`."""


class Texts(NamedTuple):
    """The texts of a run in file order, with what is odd about them."""

    texts: list[Text]
    repeated: int
    """Texts that equal an earlier one."""
    in_both: list[str]
    """First id of each text that occurs with label 1 and with label 0."""


class BatchPlan(NamedTuple):
    """Which texts make up one batch."""

    length: int
    rows: Int[np.ndarray, " r"]
    """Indices into the caller's list, -1 for filling."""


# --- reading -------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A record before it is checked: the fields that matter, and where it stands."""

    fields: dict[str, Any]
    where: str


def read_texts(path: Path) -> Texts:
    """Reads the texts of one file.

    Formats: JSONL (also gzipped), JSON (a list of objects, or columns as in `{"data": {"text":
    [..]}}`), CSV, parquet. Fields: `text`, optionally `id` and `label` (1, 0, null); or MIMIR's
    `member` and `nonmember` columns, which give a text of label 1 and one of label 0.

    Raises:
      DataError: the file cannot be read, holds no text, or lines of it cannot be used.
      UsageError: parquet without pyarrow.
    """
    return _finish(list(_checked(path, None)), str(path))


def read_split(members: Path, nonmembers: Path) -> Texts:
    """Reads members (label 1) and non-members (label 0) from a file each, in turn.

    In turn, so that the first N texts are of both classes.

    Raises what `read_texts` raises; a label inside that disagrees with its file is a `DataError`.
    """
    pairs = itertools.zip_longest(_checked(members, 1), _checked(nonmembers, 0))
    found = [text for pair in pairs for text in pair if text is not None]
    return _finish(found, f"{members} and {nonmembers}")


def _checked(path: Path, label: int | None) -> Iterator[tuple[str | None, Text]]:
    """(given id, text) of every record of a file; raises once for all unusable records."""
    problems: list[str] = []
    texts: list[tuple[str | None, Text]] = []
    for row in _rows(path, problems):
        try:
            texts += _parse_row(row, label)
        except DataError as error:
            problems.append(str(error))
    if problems:
        count, shown = len(problems), problems[:MAX_PROBLEMS]
        head = shown[0] if count == 1 else f"{path.name}: {count} problems, the first is {shown[0]}"
        rest = shown[1:] + ([f"... and {count - len(shown)} more"] if count > len(shown) else [])
        raise DataError("\n  ".join([head, *rest]))
    if not texts:
        raise DataError(f"{path}: holds no texts; expected at least one record with a field 'text'")
    yield from texts


def _parse_row(row: _Row, forced: int | None) -> Iterator[tuple[str | None, Text]]:
    fields, where = row
    if "text" not in fields and "member" in fields and "nonmember" in fields:
        for column, label in (("member", 1), ("nonmember", 0)):
            if fields[column] is not None:
                text = _text(fields[column], column, where)
                yield None, Text("", text, _agree(label, forced, where), where)
        return
    if "text" not in fields:
        names = ", ".join(map(str, fields)) or "none"
        raise DataError(f"{where}: has no field 'text' (its fields: {names})")
    text = _text(fields["text"], "text", where)
    label, given = fields.get("label"), fields.get("id")
    if label is not None and (type(label) is not int or label not in (0, 1)):
        raise DataError(
            f"{where}: label is {json.dumps(label, default=str)}, expected 1 (member), "
            "0 (non-member) or null"
        )
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
        raise DataError(f"{where}: id is {json.dumps(given, default=str)}, expected a string")
    if given == "":
        raise DataError(f"{where}: id is empty; give one or leave the field out")
    yield None if given is None else str(given), Text("", text, _agree(label, forced, where), where)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: '{column}' must be a string, found {kind}")
    return value


def _agree(label: int | None, forced: int | None, where: str) -> int | None:
    if forced is None or label is None or label == forced:
        return label if forced is None else forced
    file = "members" if forced else "nonmembers"
    raise DataError(f"{where}: label is {label}, but this is the file of {file} (label {forced})")


def _finish(found: list[tuple[str | None, Text]], where: str) -> Texts:
    """Gives every text an id of its own and reports repetitions."""
    givens: dict[str, Text] = {}
    for given, text in found:
        if given is None:
            continue
        first = givens.setdefault(given, text)
        if first.text != text.text:
            raise DataError(
                f"{where}: id '{given}' stands for two different texts, at {first.where} and at "
                f"{text.where}; give each its own id"
            )
    taken: set[str] = set()
    texts: list[Text] = []
    for given, text in found:
        identity = _free(given or content_id(text.text), given is not None, taken, givens)
        taken.add(identity)
        texts.append(text._replace(id=identity))
    return collect(texts)


def collect(texts: list[Text]) -> Texts:
    """Texts with distinct ids, and which of them repeat others."""
    first_id: dict[str, str] = {}
    labels: dict[str, set[int | None]] = {}
    for text in texts:
        first_id.setdefault(text.text, text.id)
        labels.setdefault(text.text, set()).add(text.label)
    both = [first_id[text] for text, seen in labels.items() if {0, 1} <= seen]
    return Texts(texts, len(texts) - len(first_id), both)


def content_id(text: str) -> str:
    """First 16 hex digits of the SHA-256 of the UTF-8 text: the id of a text that has none."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _free(base: str, is_given: bool, taken: set[str], givens: dict[str, Text]) -> str:
    """`base`, or `base#2`, `base#3`, ...: never an id that another record was given."""
    if base not in taken and (is_given or base not in givens):
        return base
    number = 2
    while f"{base}#{number}" in taken or f"{base}#{number}" in givens:
        number += 1
    return f"{base}#{number}"


def _rows(path: Path, problems: list[str]) -> Iterator[_Row]:
    """The records of a file, whatever its format; unreadable lines go to `problems`."""
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
    """The whole file, unzipped if it is a gzip file whatever its name."""
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


def _jsonl_rows(path: Path, text: str, problems: list[str]) -> Iterator[_Row]:
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
            yield _Row(record, where)
        else:
            problems.append(f"{where}: expected a JSON object, found {_kind(record)}")


def _json_rows(path: Path, text: str, problems: list[str]) -> Iterator[_Row]:
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
            yield _Row(record, where)
        else:
            problems.append(f"{where}: expected an object, found {_kind(record)}")


def _transpose(path: Path, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Columns -> records. A single record (no list in it) is passed on as it is."""
    names = [n for n in ("text", "id", "label", "member", "nonmember") if n in columns]
    if not any(isinstance(columns[n], list) for n in names):
        return [columns]
    lengths = {n: len(columns[n]) if isinstance(columns[n], list) else -1 for n in names}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: its columns must be lists of one length, found {lengths}")
    return [dict(zip(names, record)) for record in zip(*(columns[n] for n in names))]


def _csv_rows(path: Path, text: str, problems: list[str]) -> Iterator[_Row]:
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
            yield _Row(_csv_fields(record), where)
    except csv.Error as error:
        problems.append(f"{path.name}:{start}: not valid CSV ({error})")
    finally:
        csv.field_size_limit(limit)


def _csv_fields(record: dict[str, Any]) -> dict[str, Any]:
    """CSV knows strings only: an empty id or label is absent, "1" and "0" are labels."""
    fields = dict(record)
    fields["id"] = record.get("id") or None
    label = (record.get("label") or "").strip()
    fields["label"] = {"": None, "1": 1, "0": 0}.get(label, label)
    return fields


def _parquet_rows(path: Path, content: bytes) -> Iterator[_Row]:
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
        yield _Row(record, f"{path.name}:row {index + 1}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), type(value).__name__)


# --- tokenising ----------------------------------------------------------------------------------


class TextTokenizer:
    """A model folder's tokenizer: text in, ids out, without padding or a truncation of its own.

    Cutting keeps the tokens that the tokenizer adds at both ends, as `transformers` does.
    """

    def __init__(self, tokenizer: Tokenizer, where: str):
        # Settings stored in tokenizer.json would cut or pad texts behind our back.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.where = where

    @classmethod
    def from_folder(cls, path: Path) -> "TextTokenizer":
        """From `tokenizer.json`, else from what `transformers` makes of the folder's files.

        Raises `ModelError`. Code in the folder is never run.
        """
        if (path / "tokenizer.json").is_file():
            return cls.from_file(path / "tokenizer.json")
        hint = "expected tokenizer.json or files that transformers reads without remote code"
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging as hf_logging

            level = hf_logging.get_verbosity()
            hf_logging.set_verbosity(50)  # it comments on model types it does not know
            try:
                slow = AutoTokenizer.from_pretrained(
                    str(path), trust_remote_code=False, local_files_only=True
                )
            finally:
                hf_logging.set_verbosity(level)
            backend = slow.backend_tokenizer
        except Exception as error:  # whatever a folder's files can provoke in there
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ModelError(f"{path}: no usable tokenizer; {hint} ({reason})") from None
        return cls(Tokenizer.from_str(backend.to_str()), str(path))

    @classmethod
    def from_file(cls, path: Path) -> "TextTokenizer":
        """From one `tokenizer.json`. Raises `ModelError`."""
        try:
            return cls(Tokenizer.from_file(str(path)), str(path))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ModelError(f"{path}: not a usable tokenizer file ({error})") from None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's settings; equal ones give equal ids."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    @property
    def max_id(self) -> int:
        """The largest id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def token_id(self, name: str) -> int | None:
        """The id of a token by its exact name, None if there is none."""
        return self._tokenizer.token_to_id(name)

    def encode(
        self,
        texts: Sequence[str],
        max_length: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Encoded]:
        """Tokens of each text, special tokens included, at most `max_length` of them.

        Lone surrogates, which no UTF-8 text holds but JSON can spell, become U+FFFD. `progress` is
        told the number of texts done, now and then.
        """
        encoded: list[Encoded] = []
        for start in range(0, len(texts), 256):
            clean = [_SURROGATES.sub("\ufffd", t) for t in texts[start : start + 256]]
            raws = self._tokenizer.encode_batch(clean, add_special_tokens=True)
            encoded += [_cut(text, raw, max_length) for text, raw in zip(clean, raws)]
            if progress:
                progress(len(clean))
        return encoded


def _cut(text: str, raw: Any, max_length: int) -> Encoded:
    ids = np.asarray(raw.ids, np.int32)
    special = np.asarray(raw.special_tokens_mask, bool)
    truncated = len(ids) > max_length
    covered = text
    if truncated:
        added = min(_added_end(special), max_length)
        kept = np.r_[: max_length - added, len(ids) - added : len(ids)]
        ids, special = ids[kept], special[kept]
        offsets = raw.offsets  # a new list at every access
        covered = text[: max((offsets[i][1] for i in kept), default=0)]
    zlib_bytes = len(zlib.compress(covered.encode("utf-8")))
    return Encoded(ids, special, truncated, zlib_bytes, len(covered))


def _added_end(special: Bool[np.ndarray, " n"]) -> int:
    """Number of added tokens at the end of a text."""
    return len(special) if special.all() else int(np.argmin(special[::-1]))


def require_same_ids(
    target: TextTokenizer, reference: TextTokenizer, texts: Iterable[Text]
) -> None:
    """Raises `ModelError` unless both tokenizers give the same ids for every text.

    Two files may differ in bytes and still be the same tokenizer, so the ids decide.
    """
    if target.fingerprint == reference.fingerprint:
        return
    texts, whole = list(texts), 2**31 - 1
    ours = target.encode([t.text for t in texts], whole)
    theirs = reference.encode([t.text for t in texts], whole)
    for text, a, b in zip(texts, ours, theirs):
        if np.array_equal(a.ids, b.ids):
            continue
        at = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y), len(a.ids))
        begin = max(min(at, len(a.ids), len(b.ids)) - 2, 0)
        raise ModelError(
            "target and reference must tokenise alike, but they differ at token "
            f"{at} of text '{text.id}' ({text.where}): from token {begin} on "
            f"{a.ids[begin : begin + 6].tolist()} by {target.where}, "
            f"{b.ids[begin : begin + 6].tolist()} by {reference.where}; "
            "use the model that the target was fine-tuned from"
        )


def require_ids_fit(tokenizer: TextTokenizer, vocab_rows: int, where: str) -> None:
    """Raises `ModelError` if the tokenizer can give an id that has no embedding row."""
    if tokenizer.max_id >= vocab_rows:
        raise ModelError(
            f"{where}: the tokenizer's largest id is {tokenizer.max_id}, but the embedding has "
            f"{vocab_rows} rows; is {tokenizer.where} another model's tokenizer?"
        )


# --- batching ------------------------------------------------------------------------------------


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """Padded lengths that may be used: four an octave, at least 32 apart, and `max_length`.

    >>> bucket_lengths(400)
    (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 400)
    """
    lengths, length = [], 32
    while length < max_length:
        lengths.append(length)
        length += max(32, 2 ** (length.bit_length() - 3))
    return (*lengths, max_length)


def plan_batches(
    lengths: Int[np.ndarray, " n"],
    buckets: Sequence[int],
    rows_of: Callable[[int], int],
    pays: Callable[[int, int, int], bool] = lambda count, length, larger: True,
) -> list[BatchPlan]:
    """Assigns every text of length > 0 to a batch of its bucket.

    Longest bucket first, so that running out of memory shows at once; the given order inside a
    bucket; `rows_of(length)` rows in every batch of a bucket, the last one filled with -1. A
    bucket with fewer texts than half its rows, or that does not pay, joins the next larger one in
    use, which costs some padding and saves a compilation.

    Args:
      lengths: int [n], tokens of each text, none above the largest bucket.
      buckets: padded lengths, ascending.
      rows_of: rows of a batch of a padded length, at least 1.
      pays: whether `count` texts padded to `length` and not to `larger` are worth a program.
    """
    lengths = np.asarray(lengths)
    if lengths.size and lengths.max() > buckets[-1]:
        raise ValueError(f"a text of {lengths.max()} tokens exceeds the bucket of {buckets[-1]}")
    bucket_of = np.searchsorted(np.asarray(buckets), lengths)
    bucket_of[lengths == 0] = -1
    for i, bucket in enumerate(buckets):
        count, larger = int((bucket_of == i).sum()), bucket_of[bucket_of > i]
        if count and larger.size:
            next_one = larger.min()
            if 2 * count < rows_of(bucket) or not pays(count, bucket, buckets[next_one]):
                bucket_of[bucket_of == i] = next_one
    plans = []
    for i in range(len(buckets) - 1, -1, -1):
        members, rows = np.flatnonzero(bucket_of == i).astype(np.int32), rows_of(buckets[i])
        for start in range(0, len(members), rows):
            chunk = members[start : start + rows]
            filled = np.pad(chunk, (0, rows - len(chunk)), constant_values=-1)
            plans.append(BatchPlan(buckets[i], filled))
    return plans
