"""Readers of texts: JSONL, JSON, CSV, gzip, parquet."""

import gzip
import hashlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import tiny
import zstandard

from fuzz import mutations, seeds
from fuzz.reader import TEXTS, Reader, audit, write
from sama_jax.programs.canary import run_insert
from sama_jax.programs.split import SPLIT, require_split, run_split
from sama_jax.storage import canary_file
from sama_jax.storage.canary_file import Canary, CanaryKey
from sama_jax.storage.run_folder import json_lines
from sama_jax.texts.conversations import Form, named_template
from sama_jax.texts.folder_template import folder_template
from sama_jax.texts.read import read_texts
from sama_jax.texts.tokenizer import TextTokenizer

_CANARIES = ("karo", "mite", "sun")


def _rows() -> list[dict[str, Any]]:
    texts = tiny.texts(TEXTS, (4, 20))
    return [
        {"id": f"t{i}", "text": text, "label": i % 2, "group": f"g{i // 2}"}
        for i, text in enumerate(texts)
    ]


def _jsonl(root: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in _rows())
    pairs = [{"member": row["text"], "nonmember": f"{row['text']} ka"} for row in _rows()]
    for name, text in {
        "rows": lines,
        "plain": "".join(json.dumps({"text": row["text"]}) + "\n" for row in _rows()),
        "pairs": "".join(json.dumps(pair) + "\n" for pair in pairs),
    }.items():
        write(root / name / "texts.jsonl", text.encode())


def _json(root: Path) -> None:
    columns = {key: [row[key] for row in _rows()] for key in ("id", "text", "label", "group")}
    write(root / "rows" / "texts.json", json.dumps(_rows()).encode())
    write(root / "columns" / "texts.json", json.dumps({"data": columns}).encode())


def _csv(root: Path) -> None:
    lines = ["id,text,label,group"]
    lines += [f'{r["id"]},"{r["text"]}, ""so""",{r["label"]},{r["group"]}' for r in _rows()]
    write(root / "one" / "texts.csv", "\n".join(lines).encode())


def _gzip(root: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in _rows()).encode()
    write(root / "one" / "texts.jsonl.gz", gzip.compress(lines))


def _spoil_gzip(draw: random.Random, root: Path) -> None:
    lines = gzip.decompress((root / "texts.jsonl.gz").read_bytes())
    inside = gzip.compress(mutations.content(draw, "texts.jsonl", lines))
    bomb = draw.random() < 0.1
    (root / "texts.jsonl.gz").write_bytes(
        seeds.gzip_bomb(8) if bomb else inside * draw.choice([1, 2])
    )


def _zstd(root: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in _rows()).encode()
    write(root / "one" / "texts.jsonl.zst", zstandard.compress(lines))


def _spoil_zstd(draw: random.Random, root: Path) -> None:
    lines = zstandard.decompress((root / "texts.jsonl.zst").read_bytes())
    inside = zstandard.compress(mutations.content(draw, "texts.jsonl", lines))
    bomb = draw.random() < 0.1
    (root / "texts.jsonl.zst").write_bytes(
        seeds.zstd_bomb(8) if bomb else inside * draw.choice([1, 2])
    )


def _utf_16(root: Path) -> None:
    """Every form of a label, and bare strings, in UTF-16."""
    labels = (True, False, "1", "non-member", 1.0, "", None, 0)
    rows = [{**row, "label": label} for row, label in zip(_rows(), labels)]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, "sun", "mite"])
    write(root / "lines" / "texts.jsonl", lines.encode("utf-16"))
    write(root / "list" / "texts.json", b"\xfe\xff" + json.dumps(rows).encode("utf-16-be"))
    plain = "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in _rows())
    write(root / "columns" / "texts.csv", plain.encode("utf-16"))


def _parquet(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for packing in ("snappy", "zstd", "gzip", "none"):
        (root / packing).mkdir(parents=True)
        table = pa.Table.from_pylist(_rows())
        pq.write_table(table, root / packing / "texts.parquet", compression=packing)


def _spoil_parquet(draw: random.Random, root: Path) -> None:
    """Columns of other types, or one text of a megabyte in every row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = root / "texts.parquet"
    if draw.random() < 0.1:
        seeds.parquet_bomb(path, 8000)
        return
    columns: dict[str, Any] = {
        key: [row[key] for row in _rows()] for key in ("id", "text", "label", "group")
    }
    odd = [
        pa.array([2**45] * TEXTS, pa.timestamp("s")),
        pa.array([1] * TEXTS, pa.timestamp("ns", "Europe/Berlin")),
        pa.array([10**6] * TEXTS, pa.date32()),
        pa.array([b"\xff\xfe"] * TEXTS, pa.binary()),
        pa.array([[1, 2]] * TEXTS),
        pa.array([{"a": 1}] * TEXTS),
        pa.array([None] * TEXTS, pa.string()),
        pa.array([math.nan] * TEXTS),
        pa.array([True, False] * (TEXTS // 2)),
        pa.array([1.0] * TEXTS),
        pa.array([2**63] * TEXTS, pa.uint64()),
        pa.array(["x\x1b[31m\0y"] * TEXTS),
        pa.array(["same"] * TEXTS),
        pa.array([2**60] * TEXTS, pa.duration("s")),
        pa.array([b"1" * 16] * TEXTS, pa.binary(16)),
    ]
    columns[draw.choice([*columns, "\x1b[1mother" + "x" * 500])] = draw.choice(odd)
    if draw.random() < 0.2:
        del columns["text"]
    pq.write_table(pa.table(columns), path)


def _texts_file(root: Path) -> Path:
    return next(root.glob("texts.*"), root / "texts.jsonl")


def _read_texts(root: Path) -> None:
    """Whatever is read are texts with distinct ids; no text is cut."""
    found = read_texts(_texts_file(root)).texts
    assert found
    assert all(isinstance(t.text, str) and isinstance(t.id, str) and t.id for t in found)
    assert all(t.label is None or (type(t.label) is int and t.label in (0, 1)) for t in found)
    assert all(t.group is None or (isinstance(t.group, str) and t.group) for t in found)
    assert len({t.id for t in found}) == len(found)


def _audit_texts(root: Path, good: Path) -> list[str]:
    return audit(root, good, _texts_file(root), "--dry-run")


def _split(root: Path) -> None:
    """The record of a split, and the texts that it divided."""
    lines = "".join(json.dumps({"text": row["text"]}) + "\n" for row in _rows())
    write(root / "one" / "texts.jsonl", lines.encode())
    run_split(root / "one" / "texts.jsonl", root / "one" / "made")
    shutil.move(root / "one" / "made" / SPLIT, root / "one" / SPLIT)


def _read_split(root: Path) -> None:
    """What is taken for the split of these texts is the one that was written."""
    members = read_texts(root / "made" / "members.jsonl").texts
    require_split(root / SPLIT, [text._replace(label=1) for text in members])


def _canaries(root: Path) -> None:
    """Canaries, and the data that they are to be put into."""
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in _CANARIES]
    made = [Canary(digest, "random", n + 1, n < 2) for n, digest in enumerate(digests)]
    write(root / "one" / canary_file.TEXTS, json_lines([{"text": t} for t in _CANARIES]).encode())
    canary_file.write_key(root / "one" / canary_file.KEY, CanaryKey(made, 1, "sama", {}))
    write(root / "one" / "data.jsonl", json_lines(_rows()).encode())


def _insert_canaries(root: Path) -> None:
    """What is written holds all lines of the data, and the canaries that are included."""
    run_insert(root / "data.jsonl", root, root / "made.jsonl")
    rest = (root / "made.jsonl").read_bytes().splitlines()
    for line in (root / "data.jsonl").read_bytes().splitlines():
        rest.remove(line)
    assert sorted(json.loads(line)["text"] for line in rest) == ["karo", "mite", "mite"]


_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _conversations(root: Path) -> None:
    """Conversations in their three forms, beside a folder's template."""
    turns = [{"role": role, "content": "karo"} for role in ("system", "user", "assistant")]
    rows = [
        {"messages": turns * 2, "label": 1},
        {"prompt": "ka", "response": "ro", "label": 0},
        {"instruction": "mi", "input": "te", "output": "sun", "id": "a"},
    ]
    write(root / "one" / "texts.jsonl", json_lines(rows).encode())
    config = {"chat_template": _TEMPLATE, "eos_token": {"content": "</s>"}}
    write(root / "one" / "tokenizer_config.json", json.dumps(config).encode())


def _read_conversations(root: Path) -> None:
    """Whatever is read is tokens of a conversation, by either template."""
    made = tiny.tokenizer()
    for template in (named_template("llada"), folder_template(root)):
        for text in read_texts(root / "texts.jsonl", form=Form(template)).texts:
            assert text.rendered is not None
            assert str(text.rendered) == text.text
            (found,) = TextTokenizer(made, "here").encode([text.rendered], 12)
            assert len(found.ids) <= 12


READERS = {
    "canaries": Reader(_canaries, ("*",), _insert_canaries, pipes=False),
    "split": Reader(_split, (SPLIT,), _read_split),
    "jsonl": Reader(_jsonl, ("*",), _read_texts, _audit_texts, pipes=False),
    "json": Reader(_json, ("*",), _read_texts, _audit_texts, pipes=False),
    "csv": Reader(_csv, ("*",), _read_texts, _audit_texts, pipes=False),
    "gzip": Reader(_gzip, ("*",), _read_texts, _audit_texts, pipes=False, extra=_spoil_gzip),
    "zstd": Reader(_zstd, ("*",), _read_texts, _audit_texts, pipes=False, extra=_spoil_zstd),
    "utf-16": Reader(_utf_16, ("*",), _read_texts, _audit_texts, pipes=False),
    "conversations": Reader(_conversations, ("*",), _read_conversations, pipes=False),
    "parquet": Reader(
        _parquet, ("*",), _read_texts, _audit_texts, pipes=False, extra=_spoil_parquet
    ),
}
