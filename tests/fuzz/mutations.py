"""Spoils files: at random, but by a seed, and inside their structure where they have one."""

import io
import json
import math
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

DEEP, HUGE, TWICE = "@deep@", "@huge@", "@twice@"
"""Stand in a tree for text that `json.dumps` cannot write."""

NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**63, -(2**63), 10**9, 10**15),
    *(0.0, -0.0, 0.5, 1.0, -3.5, 1e-320, 1e300, math.nan, math.inf, -math.inf, DEEP, HUGE, TWICE),
    *("", " ", "no", "true", "0", "1e9", "x" * 3000, "\x1b[31mred\x07", "a\0b", "\ud800", "a\nb"),
    *("../x", "/proc/version", "/dev/zero", "é" * 50, "([a-z]+)+$", "nan", "auto", "²", "\ufeff"),
    *([], {}, [[]], [None], [1, 2], {"a": 1}, {"": {}}, [{}], [math.nan], ["x"] * 300, {"\x1b": 0}),
]
"""Values that somebody may put where another one is expected."""


def spoil(draw: random.Random, root: Path, names: list[str], *, pipes: bool = True) -> None:
    """Spoils one file of a folder, now and then two; `names` are those to choose from."""
    for _ in range(1 if draw.random() < 0.8 else 2):
        path = root / draw.choice(names)
        if not path.is_file() or draw.random() < 0.04:
            _replace(draw, path, pipes)
        else:
            path.write_bytes(content(draw, path.name, path.read_bytes()))


def content(draw: random.Random, name: str, old: bytes) -> bytes:
    """Returns a file's content spoilt: in its structure most of the time, else as bytes."""
    inside = KINDS.get(Path(name).suffix)
    if inside is None or draw.random() < 0.3:
        return spoil_bytes(draw, old)
    try:
        return inside(draw, old)
    except Exception:
        return spoil_bytes(draw, old)  # it was spoilt before


def _replace(draw: random.Random, path: Path, pipes: bool) -> None:
    """Puts something else in the place of a file."""
    kind = draw.choice(["gone", "empty", "folder", "pipe", "zero", "loop", "dangling"])
    if path.is_dir() and not path.is_symlink():
        return
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        if pipes:
            os.mkfifo(path)
    elif kind != "gone":
        targets = {"zero": "/dev/zero", "loop": path.name, "dangling": "nowhere"}
        path.symlink_to(targets[kind])


# --- bytes ----------------------------------------------------------------------------------------


def spoil_bytes(draw: random.Random, old: bytes) -> bytes:
    """Returns bytes with one to three changes that know nothing of a format."""
    new = bytearray(old)
    for _ in range(draw.choice([1, 1, 2, 3])):
        at = draw.randrange(len(new) + 1)
        end = min(len(new), at + draw.choice([1, 1, 2, 4, 8, 64, 4096]))
        kind = draw.choice(["flip", "cut", "zeros", "ones", "insert", "remove", "twice", "tail"])
        if kind == "flip" and new:
            new[at % len(new)] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del new[at:]
        elif kind in ("zeros", "ones"):
            new[at:end] = (b"\0" if kind == "zeros" else b"\xff") * (end - at)
        elif kind == "insert":
            some = [b"\0", b"\x1b[2J", b"\xed\xa0\x80", b"\xff\xfe", b"\n", b'"', b"{", b"[" * 9999]
            new[at:at] = draw.choice([*some, draw.randbytes(draw.choice([1, 4, 30]))])
        elif kind == "remove":
            del new[at:end]
        elif kind == "twice":
            new[at:at] = new[at:end]
        elif kind == "tail":
            new += draw.choice([b"\0" * 4096, b"\n\n", draw.randbytes(20), bytes(new[:100])])
    return bytes(new)


# --- trees ----------------------------------------------------------------------------------------


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Lists (container, key) of everything in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        found.append((tree, key))
        if isinstance(value, dict | list):
            _places(value, found)
    return found


def spoil_tree(draw: random.Random, tree: Any) -> Any:
    """Changes a tree of dicts and lists in one to three places."""
    if not isinstance(tree, dict | list) or not tree or draw.random() < 0.02:
        return draw.choice(NASTY)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = _places(tree, [])
        if not places:
            break
        # One level in two: a vocabulary has more places than all that stands around it.
        level = [p for p in places if p[0] is tree] if draw.random() < 0.4 else places
        inside, key = draw.choice(level or places)
        value = inside[key]
        kind = draw.choice(["set", "set", "set", "number", "remove", "rename", "wrap", "swap"])
        if kind == "number" and type(value) in (int, float):
            scale = draw.choice([-1, 0, 2, 1000, 1e9, 0.5, 1 / 3])
            inside[key] = value * scale if draw.random() < 0.7 else str(value)
        elif kind == "remove":
            del inside[key]
        elif kind == "rename" and isinstance(inside, dict):
            inside[draw.choice([key + "x", key.upper(), "", "\x1b[1m", key * 300])] = inside.pop(
                key
            )
        elif kind == "wrap":
            inside[key] = draw.choice([[value], {"value": value}, [value, value], str(value)])
        elif kind == "swap":
            other, there = draw.choice(places)
            if there in (other if isinstance(other, dict) else range(len(other))):
                inside[key] = json.loads(json.dumps(other[there]))
        else:
            inside[key] = draw.choice(NASTY)
    return tree


def write_json(draw: random.Random, tree: Any) -> bytes:
    """Writes a tree as JSON, with what JSON can spell and Python's writer does not."""
    text = json.dumps(tree, ensure_ascii=draw.random() < 0.5)
    deep = draw.choice([50, 2000, 100_000])
    brackets = draw.choice([("[", "]"), ('{"a":', "}")])
    text = text.replace(f'"{DEEP}"', brackets[0] * deep + "0" + brackets[1] * deep)
    text = text.replace(f'"{HUGE}"', "1" + "0" * draw.choice([30, 400, 5000]))
    text = text.replace(f'"{TWICE}"', '{"id": 1, "id": 2}')
    return text.encode("utf-8", "surrogatepass")


def _json(draw: random.Random, old: bytes) -> bytes:
    try:
        tree = json.loads(old)
    except RecursionError:  # spoilt once before
        return old
    return write_json(draw, spoil_tree(draw, tree))


def _lines(draw: random.Random, old: bytes) -> bytes:
    lines = old.split(b"\n")
    at = draw.randrange(len(lines))
    kind = draw.choice(["tree", "tree", "tree", "twice", "remove", "shuffle", "blank", "ends"])
    if kind == "tree" and lines[at].strip():
        lines[at] = _json(draw, lines[at])
    elif kind == "twice":
        lines.insert(draw.randrange(len(lines)), lines[at])
    elif kind == "remove":
        del lines[at]
    elif kind == "shuffle":
        draw.shuffle(lines)
    elif kind == "blank":
        lines.insert(
            at, draw.choice([b"", b"   ", b"null", b"[]", b"\0", b"1" * 3000, b"x" * 10**7])
        )
    else:
        return draw.choice([b"\r\n", b"\r", b"\x1e", b"\n\n", "\u2028".encode()]).join(lines)
    return b"\n".join(lines)


def _csv(draw: random.Random, old: bytes) -> bytes:
    lines = old.decode().split("\n")
    at = draw.choice([0, draw.randrange(len(lines))])
    odd = [
        '"',
        '""',
        ",",
        ",,,",
        '"\n',
        "\0",
        "\x1b[31m",
        "\ud800",
        "x" * 200_000,
        "é",
        ";",
        "\t",
        "'",
    ]
    kind = draw.choice(["insert", "insert", "remove", "twice", "header", "case"])
    if kind == "insert":
        place = draw.randrange(len(lines[at]) + 1)
        lines[at] = lines[at][:place] + draw.choice(odd) + lines[at][place:]
    elif kind == "remove":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "header":
        names = ["text", "id", "label", "member", "nonmember", "Text", " text", "", "\ufefftext"]
        lines[0] = ",".join(draw.choices(names, k=draw.randrange(1, 6)))
    else:
        lines[0] = draw.choice([lines[0].upper(), lines[0].replace(",", ", "), lines[0].title()])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _yaml(draw: random.Random, old: bytes) -> bytes:
    tags = ["!!bool x", "!!timestamp x", "!!python/object/apply:os.system [true]", "!!int ''", "*a"]
    tags += [
        "&a [*a]",
        "!!binary x",
        "!!float x",
        "<<: 1",
        "[" * 5000,
        "!!set {a, b}",
        "2001-01-01",
    ]
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
    )
    if b"&a0" in old:  # it is the bomb already: whoever expands it does not end
        return spoil_bytes(draw, old)
    if draw.random() < 0.08:
        return bomb.encode() + b"models: *a29\n" + old
    text = yaml.safe_dump(spoil_tree(draw, yaml.safe_load(old)), allow_unicode=draw.random() < 0.5)
    for mark in (DEEP, HUGE, TWICE):
        text = text.replace(f"'{mark}'", draw.choice(tags))
    return text.encode("utf-8", "surrogatepass")


# --- binary formats -------------------------------------------------------------------------------


def _safetensors(draw: random.Random, old: bytes) -> bytes:
    size = int.from_bytes(old[:8], "little")
    header, rest = json.loads(old[8 : 8 + size]), old[8 + size :]
    kind = draw.choice(["tree", "tree", "tree", "length", "dtype", "values", "extra"])
    names = [n for n in header if n != "__metadata__"]
    entry = header[draw.choice(names)]
    if kind == "dtype":
        codes = ["F8_E4M3", "F4", "I8", "BOOL", "U64", "F64", "BF16", "C64", "", "f32", 7]
        entry["dtype"] = draw.choice(codes)
    elif kind == "values":
        bad = draw.choice([b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f"])
        at = 4 * draw.randrange(max(len(rest) // 4, 1))
        rest = rest[:at] + bad * draw.choice([1, 100]) + rest[at + 4 :]
    elif kind == "extra":
        header[draw.choice(["\x1b[31m", "x" * 3000, "model.norm.weight", ""])] = entry
    elif kind == "tree":
        header = spoil_tree(draw, header)
    text = write_json(draw, header)
    told = len(text) if kind != "length" else draw.choice([0, 1, 2**32, 2**63, 10**8 + 1, len(old)])
    return told.to_bytes(8, "little") + text + rest


def _arrays(draw: random.Random, old: bytes) -> bytes:
    """An npz: one of its arrays changed, or what its header claims."""
    with np.load(io.BytesIO(old)) as file:
        arrays = {name: file[name] for name in file.files}
    name = draw.choice(list(arrays))
    array, kind = (
        arrays[name],
        draw.choice(["values", "values", "dtype", "shape", "gone", "header"]),
    )
    claimed: tuple[str, bytes] | None = None
    if kind == "values" and array.size:
        flat = array.reshape(-1).copy()
        odd = {"U": ["", "a", flat[0]], "b": [True, False], "f": [np.nan, np.inf, -1.0, 0.0, 1e30]}
        at = draw.randrange(flat.size) if draw.random() < 0.5 else slice(None)
        flat[at] = draw.choice(odd.get(array.dtype.kind, [-1, -5, 0, 7, 30000]))
        arrays[name] = flat.reshape(array.shape)
    elif kind == "dtype":
        kinds = ["f8", "i8", "u1", "?", "U3", "S3", "c16", "M8[s]", ">f4", "V4", "f2"]
        arrays[name] = np.zeros(array.shape, draw.choice(kinds))
    elif kind == "shape":
        shapes = [array[..., :0], array[:0], array[None], array.reshape(-1), np.array(0)]
        shapes += [array[:-1], np.concatenate([array, array])] if array.ndim else []
        arrays[name] = draw.choice(shapes)
    elif kind == "gone":
        del arrays[name]
    else:
        shape = draw.choice(
            ["(1000000000, 1000)", "(-1,)", "(9223372036854775807,)", "()", "(0, 9)"]
        )
        descr = draw.choice(["'<f4'", "'|O'", "'<U1000000000'", "'|b1'", "['x']", "'\x1b'"])
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode(
            "latin1"
        )
        claimed = name, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    buffer = io.BytesIO()
    packing = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(buffer, "w", packing) as made:
        for each, values in arrays.items():
            one = io.BytesIO()
            np.lib.format.write_array(one, values, allow_pickle=False)
            data = one.getvalue()
            if claimed and each == claimed[0]:
                data = claimed[1] + data[128:]
            made.writestr(f"{each}.npy", data)
    return buffer.getvalue()


def _frames(draw: random.Random, old: bytes) -> bytes:
    """A shard of losses: a frame's header or payload changed under a checksum that is right."""
    frames, at = [], 0
    while at < len(old):
        _, head, payload, _ = struct.unpack_from("<4sIQI", old, at)
        start = at + struct.calcsize("<4sIQI")
        frames.append([old[start : start + head], old[start + head : start + head + payload]])
        at = start + head + payload
    frame = draw.choice(frames)
    kind = draw.choice(["tree", "tree", "payload", "twice", "remove"])
    if kind == "tree":
        frame[0] = _json(draw, frame[0])
    elif kind == "payload":
        frame[1] = spoil_bytes(draw, frame[1])
    elif kind == "twice":
        frames.append(frame)
    else:
        frames.remove(frame)
    made = b""
    for head, payload in frames:
        crc = zlib.crc32(payload, zlib.crc32(head))
        made += struct.pack("<4sIQI", b"SJL1", len(head), len(payload), crc) + head + payload
    return made


KINDS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".csv": _csv,
    ".yaml": _yaml,
    ".safetensors": _safetensors,
    ".npz": _arrays,
    ".bin": _frames,
}
"""Suffix -> how a file of that kind is spoilt inside its structure."""
