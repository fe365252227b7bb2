"""Reads texts with their ids and labels, and reports what is odd about them.

Nothing here changes a text, but for lone surrogates. An error names up to ten unusable records in
one message.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sama_jax.arrays import Rendered
from sama_jax.errors import DataError, UsageError
from sama_jax.texts.conversations import Form
from sama_jax.texts.records import Names, Row, kind_of, lacks, meant, rows_of
from sama_jax.untrusted import printable

MAX_PROBLEMS = 10
"""Problems of single lines that one message lists; the rest are counted."""
MAX_COUNTED = 10_000
"""Problems after which nobody reads on."""

_SURROGATES = re.compile("[\ud800-\udfff]")
_LABELS = {
    **dict.fromkeys(("1", "1.0", "true", "member"), 1),
    **dict.fromkeys(("0", "0.0", "false", "nonmember", "non-member"), 0),
    "": None,
}
"""Strings that are labels, in any case."""


class Text(NamedTuple):
    """One text of a file."""

    id: str
    text: str
    label: int | None
    """1 member, 0 non-member, None unknown."""
    where: str
    """File and place for messages, such as `file.jsonl:7`."""
    group: str | None = None
    """What it shares with other texts: the document, author or source it comes from."""
    control: bool = False
    """Whether it is a known member that an audit must find, and none of the texts it is about."""
    rendered: Rendered | None = None
    """The conversation that `text` spells; None: a plain text."""
    document: str | None = None
    """Id of the document that it is a window of; None: it is no window."""

    @property
    def content(self) -> "str | Rendered":
        """What a tokenizer takes."""
        return self.text if self.rendered is None else self.rendered

    @property
    def has_prompt(self) -> bool:
        """Tells whether part of it is only seen."""
        return self.rendered is not None and not all(p.scored for p in self.rendered.pieces)

    @property
    def scored(self) -> str:
        """The words that are scored: all of a plain text, the answers of a conversation."""
        if self.rendered is None:
            return self.text
        return "\n\n".join(p.text for p in self.rendered.pieces if p.scored and p.words)

    @property
    def words(self) -> str:
        """All words but the template's: the same in every conversation, they mean nothing."""
        if self.rendered is None:
            return self.text
        return "\n\n".join(piece.text for piece in self.rendered.pieces if piece.words)


class Texts(NamedTuple):
    """The texts of a run in file order, with what is odd about them."""

    texts: list[Text]
    repeated: int
    """Texts that equal an earlier one."""
    in_both: list[str]
    """First id of each text that occurs with label 1 and with label 0."""


class Fields(NamedTuple):
    """How the records of several files are read alike; see `read_texts`."""

    text: str | None = None
    label: str | None = None
    form: Form | None = None


PLAIN = Fields()


def read_texts(
    path: str | Path,
    text_field: str | None = None,
    label_field: str | None = None,
    *,
    labels_needed: bool = True,
    form: Form | None = None,
) -> Texts:
    """Reads the texts of one file.

    Formats: JSONL, JSON (a list, or columns as in `{"data": {"text": [..]}}`), CSV, each also as
    `.gz`, `.zst` or UTF-16 with its mark, and parquet. Fields: `text`, optionally `id`, `label`
    (1, 0, true, false, member, non-member or null) and `group` (a name or number; texts of one
    document, author or source share it); or MIMIR's `member` and `nonmember` columns, which give a
    text of label 1 and one of label 0. In JSON, a bare string in the place of a record is a text.
    With a `form`, records are conversations (`conversations.turns_of`).

    Args:
      path: the file.
      text_field: the field that holds the texts, `text` unless given.
      label_field: the field that holds the labels, `label` unless given.
      labels_needed: whether a file none of whose records has the given `label_field` is refused.
      form: how conversations become texts; None: the file holds texts.

    Raises:
      DataError: the file cannot be read, holds no text, or lines of it cannot be used.
      UsageError: parquet without pyarrow, zstd without zstandard, or one field is named twice.
    """
    path, names = Path(path), _names(text_field, label_field, form)
    return _finish(list(_checked(path, None, names, form, labels_needed)), str(path))


def read_split(
    members: str | Path,
    nonmembers: str | Path,
    text_field: str | None = None,
    label_field: str | None = None,
    *,
    form: Form | None = None,
) -> Texts:
    """Reads members (label 1) and non-members (label 0) from a file each, in turn.

    In turn, so that the first N texts are of both classes.

    Raises what `read_texts` raises; a label inside that disagrees with its file is a `DataError`.
    """
    names = _names(text_field, label_field, form)
    files = (Path(members), 1), (Path(nonmembers), 0)
    of_class = [_checked(path, label, names, form) for path, label in files]
    pairs = itertools.zip_longest(*of_class)
    found = [text for pair in pairs for text in pair if text is not None]
    return _finish(found, f"{members} and {nonmembers}")


def _names(text_field: str | None, label_field: str | None, form: Form | None) -> Names:
    if form is not None and text_field is not None:
        raise UsageError(
            "--text-field names plain texts and --template is for conversations: leave one of them "
            "out"
        )
    given = {"text": text_field, "label": label_field}
    given = {field: name for field, name in given.items() if name is not None}
    names = Names(**given, turns=form is not None)
    if names.text == names.label:
        raise UsageError(f"one field ('{printable(names.text)}') cannot hold both texts and labels")
    return names


def _checked(
    path: Path,
    label: int | None,
    names: Names,
    form: Form | None = None,
    labels_needed: bool = True,
) -> Iterator[tuple[str | None, Text]]:
    """Yields (given id, text) of every record; raises once for all unusable records."""
    problems: list[str] = []
    texts: list[tuple[str | None, Text]] = []
    known: set[str] = set()
    first: Row | None = None
    labelled = not labels_needed or names.label == "label"
    for row in rows_of(path, names):
        try:
            if isinstance(row, str):
                raise DataError(row)
            first, labelled = first or row, labelled or "label" in row.fields
            if not known.issuperset(row.fields):
                _check_names(row, known, names)
            texts += _parse_row(row, label, names, form)
        except DataError as error:
            problems.append(str(error))
            if len(problems) > MAX_COUNTED:
                break
    if first is not None and not labelled:
        problems.insert(0, f"{path}: {lacks(names.label, 'field', first.found)}")
    if problems:
        count, shown = len(problems), problems[:MAX_PROBLEMS]
        head = shown[0] if count == 1 else f"{path.name}: {count} problems, the first is {shown[0]}"
        rest = shown[1:] + ([f"... and {count - len(shown)} more"] if count > len(shown) else [])
        raise DataError("\n  ".join([head, *rest]))
    if not texts:
        raise DataError(f"{path}: holds no texts; expected at least one record with a field 'text'")
    yield from texts


def _check_names(row: Row, known: set[str], names: Names) -> None:
    """Raises `DataError` for a field that stands for another name; puts the others into `known`."""
    own = {field for field in ("text", "label") if getattr(names, field) != field}
    for name, value in row.fields.items():
        field = meant(name)
        if name == "member" and "nonmember" not in row.fields:
            field = "label"
        if names.turns and field == "text":  # many files of conversations have one of that name
            continue
        near = field is not None and name != field and _is_absent(row.fields.get(field))
        near = near and not (field in own and field in row.fields)
        # Labels may be spelled in any way (1.0, "no"): read as texts without one, members and
        # non-members would be taken for the same.
        if near and value is not None and (field == "label" or name.strip().lower() == field):
            flag = f", or name it: --{field}-field NAME" if field in ("text", "label") else ""
            raise DataError(
                f"{row.where}: has a field '{printable(name)}'; write it '{field}' if it is "
                f"meant, else leave it out{flag}"
            )
        # What `member` is, a text or a label, depends on the record's other fields.
        if (field is None or name == field) and name != "member" and len(known) < MAX_COUNTED:
            known.add(name)


def _is_absent(value: Any) -> bool:
    """Tells whether a field holds nothing; CSV has no other way to say so than an empty one."""
    return value is None or value == ""


def _require_no_other_label(fields: dict[str, Any], names: Names, where: str) -> None:
    """Raises `DataError` if a record without a label has a field `nonmember`.

    Beside a text it says who is a member, in numbers of its own; or it is another text.
    """
    other = fields.get("nonmember")
    if _is_absent(other) or not _is_absent(fields.get("label")):
        return
    number = not isinstance(other, str) or other.strip().lower() in _LABELS
    if number or (names.text == "text" and not names.turns):
        raise DataError(
            f"{where}: has a field 'nonmember' besides the text and no 'label'; give a field "
            "'label' (1 member, 0 non-member), or leave 'nonmember' out"
        )


def _parse_row(
    row: Row, forced: int | None, names: Names, form: Form | None
) -> Iterator[tuple[str | None, Text]]:
    fields, where, found = row
    group = _name(fields.get("group"), "group", where)
    if form is not None:
        _require_no_other_label(fields, names, where)
        rendered = without_surrogates_in(form.render(fields, found, where))
        label = _agree(_label(fields.get("label"), where), forced, where)
        given = _name(fields.get("id"), "id", where)
        yield given, Text("", str(rendered), label, where, group, rendered=rendered)
        return
    pair = "member" in fields and "nonmember" in fields and names.text == "text"
    if "text" not in fields and pair:
        if not _is_absent(fields.get("label")):
            raise DataError(
                f"{where}: has 'member' and 'nonmember', which say each text's label, and a field "
                "'label'; leave it out"
            )
        for column, label in (("member", 1), ("nonmember", 0)):
            if fields[column] is not None:
                text = _text(fields[column], column, where)
                yield None, Text("", text, _agree(label, forced, where), where, group)
        return
    if "text" not in fields:
        raise DataError(f"{where}: {lacks(names.text, 'field', found)}")
    _require_no_other_label(fields, names, where)
    text = _text(fields["text"], names.text, where)
    label = _label(fields.get("label"), where)
    given = _name(fields.get("id"), "id", where)
    yield given, Text("", text, _agree(label, forced, where), where, group)


def _label(value: Any, where: str) -> int | None:
    """Returns a label as 1, 0 or None; the same one for every way to write it."""
    if value is None:
        return None
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return int(value)
    if isinstance(value, str) and (plain := value.strip().lower()) in _LABELS:
        return _LABELS[plain]
    kind = "another number" if isinstance(value, (int, float)) else kind_of(value)
    kind = f"another string ({len(value):,} characters)" if isinstance(value, str) else kind
    raise DataError(
        f"{where}: label is {kind}; expected 1 (member), 0 (non-member), true, false, "
        "'member', 'nonmember' or null"
    )


def _name(given: Any, field: str, where: str) -> str | None:
    """Returns an id or a group as a string, None if there is none."""
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise DataError(f"{where}: {field} is {_shown(given)}, expected a string")
    if given == "":
        raise DataError(f"{where}: {field} is empty; give one or leave the field out")
    name = str(given)
    if "\0" in name or _SURROGATES.search(name):
        raise DataError(f"{where}: {field} {_shown(given)} holds a NUL or half a character")
    return name


def _shown(value: Any) -> str:
    """Returns a value of a file for a message."""
    try:
        return printable(json.dumps(value, default=str))
    except RecursionError:
        return "nested deep"


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: '{printable(column)}' must be a string, found {kind}")
    return without_surrogates(value)


def without_surrogates(text: str) -> str:
    """Replaces lone surrogates, which no UTF-8 text holds but JSON can spell, by U+FFFD."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def without_surrogates_in(rendered: Rendered) -> Rendered:
    """Does the same to every piece of a conversation."""
    pieces = [piece._replace(text=without_surrogates(piece.text)) for piece in rendered.pieces]
    return rendered._replace(pieces=tuple(pieces))


def _agree(label: int | None, forced: int | None, where: str) -> int | None:
    if forced is None or label is None or label == forced:
        return label if forced is None else forced
    file = "members" if forced else "nonmembers"
    raise DataError(f"{where}: label is {label}, but this is the file of {file} (label {forced})")


def _finish(found: list[tuple[str | None, Text]], where: str) -> Texts:
    """Gives every text an id of its own and reports repetitions.

    The id is the given one, or that of the text, with `#2`, `#3`, ... where another record has it.
    """
    givens: dict[str, Text] = {}
    for given, text in found:
        if given is None:
            continue
        first = givens.setdefault(given, text)
        if first.content != text.content:
            raise DataError(
                f"{where}: id '{printable(given)}' stands for two different texts, at "
                f"{first.where} and at {text.where}; give each its own id"
            )
    of_text = {text: content_id(text) for text in {t.text for given, t in found if given is None}}
    taken: set[str] = set()
    last: dict[str, int] = {}
    texts: list[Text] = []
    for given, text in found:
        base = of_text[text.text] if given is None else given
        identity = base
        if base in taken or (given is None and base in givens):
            # Counted on from the last one: of a text that stands there 100,000 times, trying
            # every number anew would take hours.
            number = last.get(base, 1) + 1
            while (identity := f"{base}#{number}") in taken or identity in givens:
                number += 1
            last[base] = number
        taken.add(identity)
        texts.append(text._replace(id=identity))
    return collect(texts)


def collect(texts: list[Text]) -> Texts:
    """Gathers texts, and says which of them repeat others.

    Raises `DataError` for two texts of one id, and for labels other than 1, 0 and None.
    """
    ids = set[str]()
    for text in texts:
        if text.id in ids:
            raise DataError(f"{text.where}: id '{printable(text.id)}' is another text's, too")
        if text.label not in (0, 1, None):
            raise DataError(
                f"{text.where}: the label of text '{printable(text.id)}' is {text.label}; expected "
                "1 (member), 0 (non-member) or None"
            )
        ids.add(text.id)
    first_id: dict[str, str] = {}
    labels: dict[str, set[int | None]] = {}
    for text in texts:
        first_id.setdefault(text.text, text.id)
        labels.setdefault(text.text, set()).add(text.label)
    both = [first_id[text] for text, seen in labels.items() if {0, 1} <= seen]
    return Texts(texts, len(texts) - len(first_id), both)


def with_control(texts: Texts, control: Texts | None) -> Texts:
    """Puts known members behind the texts of an audit, without a label.

    Raises `DataError` if one of them is a non-member, or one of those texts.
    """
    if control is None:
        return texts
    ids, contents = ({getattr(t, name) for t in texts.texts} for name in ("id", "text"))
    for text in control.texts:
        if text.label == 0:
            raise DataError(f"{text.where}: label is 0, but a positive control is of known members")
        if text.id in ids or text.text in contents:
            raise DataError(
                f"{text.where}: this text of the positive control stands among the texts of the "
                "audit, too (or its id does); take it out of one of them"
            )
    known = [text._replace(label=None, control=True) for text in control.texts]
    return collect([*texts.texts, *known])


def group_numbers(texts: list[Text]) -> list[int | None]:
    """Numbers the groups of texts in order of their first appearance; None: a text without one."""
    numbers: dict[str, int] = {}
    return [
        None if text.group is None else numbers.setdefault(text.group, len(numbers))
        for text in texts
    ]


def content_id(text: str) -> str:
    """Returns the id of a text that has none: the first 16 digits of its `text_digest`."""
    return text_digest(text)[:16]


def text_digest(text: str) -> str:
    """Returns the SHA-256 of a text's UTF-8: 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
