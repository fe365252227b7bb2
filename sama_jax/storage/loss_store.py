"""Stores token losses in append-only shards, keyed by content.

A record belongs to (model, plan, text): identities of the weights and arithmetic, of the probe
plan, and of the token ids. Scores, resume and new statistics all derive from it. Subsets are not
stored: they are drawn again from the key.

Shard format: frames one after the other, each

    4 bytes  magic "SJL1"
    u32      bytes of the header       (little-endian)
    u64      bytes of the payload
    u32      CRC-32 of header and payload
    header   JSON {"model", "plan", "passes": t, "texts": [16 hex digits, ...]}
    payload  counts int32 [n, t], then all positions uint16, then all losses float32

A frame is one batch. A process that dies leaves at most one incomplete frame at the end, which is
cut off when the shard is opened again. A machine that dies can leave zeros or junk, there or before
later frames: what is no whole frame is skipped, and only its losses are computed anew.
"""

import json
import os
import struct
import sys
import zlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sama_jax.storage.files import AppendOnly, opened, readable
from sama_jax.storage.shapes import fits
from sama_jax.untrusted import parse_json

_MAGIC = b"SJL1"
_PREFIX = struct.Struct("<4sIQI")
_BLOCK = 2**20


class Record(NamedTuple):
    """Losses of one text under one plan: ragged, pass after pass."""

    counts: np.ndarray
    """int32 [t], scored positions of each pass."""
    positions: np.ndarray
    """uint16 [counts.sum()], ascending inside a pass."""
    losses: np.ndarray
    """float32 [counts.sum()], nats."""

    def dense(self, length: int) -> np.ndarray:
        """Returns the losses as float32 [t, length], NaN where nothing was scored."""
        out = np.full((len(self.counts), length), np.nan, np.float32)
        out[np.repeat(np.arange(len(self.counts)), self.counts), self.positions] = self.losses
        return out


def make_record(positions: np.ndarray, losses: np.ndarray) -> Record:
    """Makes a record of the scorer's slots [t, k]: positions (-1 unused) and losses."""
    used = positions >= 0
    return Record(
        used.sum(axis=1).astype(np.int32),
        positions[used].astype(np.uint16),
        losses[used].astype(np.float32),
    )


class _Frame(NamedTuple):
    """Where the payload of a frame stands."""

    shard: Path
    offset: int
    rows: int
    passes: int
    bytes: int


class _Losses(NamedTuple):
    """A frame's payload as arrays; each text's losses are one piece of it."""

    counts: np.ndarray
    """int32 [n, t]"""
    ends: np.ndarray
    """int64 [n + 1], where the pieces begin and end."""
    positions: np.ndarray
    losses: np.ndarray

    def record(self, row: int) -> Record:
        """Returns one text's."""
        piece = slice(self.ends[row], self.ends[row + 1])
        return Record(self.counts[row], self.positions[piece], self.losses[piece])


FRAME_BYTES = 2**26
"""Bytes of frames that are kept once they are read: texts are scored in the order of their batches,
which asks for the same few frames again and again."""
_ROWS = 2**20
"""More than the texts of a frame: a record's place is one number, (frame, row)."""


class LossStore:
    """All shards of a folder, and one of them open for appending."""

    def __init__(self, folder: Path, shard: str = "losses-00000.bin", *, writes: bool = True):
        """Indexes every shard; cuts an incomplete last frame off the one this process owns.

        Args:
          folder: of the shards.
          shard: the name of the one that this process appends to.
          writes: False: nothing is appended, and no file is made or changed.
        """
        self._places: dict[tuple[str, str], dict[str, int]] = {}
        self._frames: list[_Frame] = []
        self._read: dict[int, _Losses] = {}
        self._held = 0  # bytes of them
        self._ends: dict[Path, int] = {}
        self._elsewhere: set[tuple[str, str, str]] = set()
        self.num_records = 0
        """Records in all shards, repeated ones counted: equals the number of distinct keys if no
        batch was ever computed twice."""
        self.damaged_bytes = 0
        """Bytes of all shards that belong to no whole frame, although whole ones follow."""
        self._folder, self._own = folder, folder / shard
        for path in sorted(folder.glob("losses-*.bin")):
            self._ends[path] = self._index(path, 0)
        self._shard = AppendOnly(self._own, self._ends.get(self._own, 0)) if writes else None

    def refresh(self) -> None:
        """Reads what other processes have appended to their shards."""
        for path in sorted(self._folder.glob("losses-*.bin")):
            if path != self._own:
                self._ends[path] = self._index(path, self._ends.get(path, 0))

    def _index(self, path: Path, start: int) -> int:
        """Reads the frames' headers from a byte on; returns where the last whole one ends.

        What stands between two whole frames is damaged, and skipped: its losses are missing, so
        they are computed anew.
        """
        end = start
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            at = start
            while at < size:
                frame = _read_frame(file, at, size)
                if frame is None:
                    at = _next_magic(file, at + 1, size)
                    continue
                header, head_bytes, payload_bytes = frame
                self.damaged_bytes += at - end
                self._add(header, path, at + _PREFIX.size + head_bytes, payload_bytes)
                at = end = at + _PREFIX.size + head_bytes + payload_bytes
        return end

    def _add(self, header: dict, shard: Path, offset: int, size: int) -> None:
        texts, number = header["texts"], len(self._frames)
        self._frames.append(_Frame(shard, offset, len(texts), header["passes"], size))
        places = self._places.setdefault((header["model"], header["plan"]), {})
        for row, text in enumerate(texts):
            places[sys.intern(text)] = number * _ROWS + row
        self.num_records += len(texts)

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def keys(self) -> list[tuple[str, str, str]]:
        """Returns (model, plan, text) of every record."""
        return [(*of, text) for of, places in self._places.items() for text in places]

    def has(self, model: str, plan: str, text: str) -> bool:
        """Tells whether the losses of (model, plan, text) can be read here."""
        return text in self._places.get((model, plan), ())

    def texts(self, model: str, plan: str) -> Collection[str]:
        """Returns the texts whose losses under a plan can be read here."""
        return self._places.get((model, plan), {}).keys()

    def exists(self, model: str, plan: str, text: str) -> bool:
        """Tells whether the losses are stored, here or by another process."""
        return self.has(model, plan, text) or (model, plan, text) in self._elsewhere

    def note_elsewhere(self, keys: Iterable[tuple[str, str, str]]) -> None:
        """Notes records that another process of the run holds where this one cannot read them."""
        self._elsewhere.update(keys)

    def append(self, model: str, plan: str, texts: Sequence[str], records: list[Record]) -> None:
        """Stores a batch in one write."""
        if not texts:
            return
        passes = len(records[0].counts)
        header = {"model": model, "plan": plan, "passes": passes, "texts": list(texts)}
        head = json.dumps(header).encode()
        payload = b"".join(
            np.concatenate([np.asarray(getattr(r, field)) for r in records]).astype(kind).tobytes()
            for field, kind in (("counts", "<i4"), ("positions", "<u2"), ("losses", "<f4"))
        )
        crc = zlib.crc32(payload, zlib.crc32(head))
        frame = _PREFIX.pack(_MAGIC, len(head), len(payload), crc) + head + payload
        assert self._shard is not None, "opened for reading alone"
        start = self._shard.append(frame)
        self._add(header, self._shard.path, start + _PREFIX.size + len(head), len(payload))

    def read(self, model: str, plan: str, text: str) -> Record:
        """Reads the stored losses of one text. Raises `KeyError` if there are none."""
        number, row = divmod(self._places[model, plan][text], _ROWS)
        return self._losses(number).record(row)

    def _losses(self, number: int) -> _Losses:
        """Reads a frame, or finds it among those that were read last."""
        found = self._read.pop(number, None)
        if found is None:
            frame = self._frames[number]
            found = _decoded(frame, self._payload(frame))
            self._held += frame.bytes
        self._read[number] = found  # the last one
        while self._held > FRAME_BYTES and len(self._read) > 1:
            oldest = next(iter(self._read))
            self._held -= self._frames[oldest].bytes
            del self._read[oldest]
        return found

    def _payload(self, frame: _Frame) -> bytes:
        with readable(frame.shard), frame.shard.open("rb", buffering=0) as file:
            file.seek(frame.offset)
            payload = file.read(frame.bytes)
            if len(payload) < frame.bytes:
                raise ValueError("it has become shorter")
        return payload

    def close(self) -> None:
        """Closes the shard that is written."""
        if self._shard is not None:
            self._shard.close()


def _decoded(frame: _Frame, payload: bytes) -> _Losses:
    size = frame.rows * frame.passes
    counts = np.frombuffer(payload, "<i4", size).reshape(frame.rows, frame.passes)
    ends = np.concatenate([[0], np.cumsum(counts.sum(axis=1, dtype=np.int64))])
    return _Losses(
        counts,
        ends,
        np.frombuffer(payload, "<u2", ends[-1], 4 * size),
        np.frombuffer(payload, "<f4", ends[-1], 4 * size + 2 * int(ends[-1])),
    )


def _read_frame(file: BinaryIO, at: int, size: int) -> tuple[dict[str, Any], int, int] | None:
    """Reads a frame: header, its bytes, bytes of the payload; None if it is not whole."""
    file.seek(at)
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        return None
    magic, head_bytes, payload_bytes, crc = _PREFIX.unpack(prefix)
    if magic != _MAGIC or at + _PREFIX.size + head_bytes + payload_bytes > size:
        return None
    head, payload = file.read(head_bytes), file.read(payload_bytes)
    if zlib.crc32(payload, zlib.crc32(head)) != crc:
        return None
    header = _checked_header(head, payload)
    return None if header is None else (header, head_bytes, payload_bytes)


def _checked_header(head: bytes, payload: bytes) -> dict[str, Any] | None:
    """Parses a frame's header; None if it is none, or not that of this payload."""
    try:
        header = parse_json(head)
    except ValueError:
        return None
    if not fits(header, {"model": str, "plan": str, "passes": int, "texts": [str]}):
        return None
    counts = len(header["texts"]) * header["passes"]
    if header["passes"] < 1 or len(payload) < 4 * counts:
        return None
    found = np.frombuffer(payload, "<i4", counts)
    whole = bool((found >= 0).all()) and len(payload) == 4 * counts + 6 * int(found.sum(dtype=int))
    return header if whole else None


def _next_magic(file: BinaryIO, at: int, size: int) -> int:
    """Returns where the next frame may begin, `size` if nowhere."""
    while at < size:
        file.seek(at)
        block = file.read(_BLOCK + len(_MAGIC) - 1)
        found = block.find(_MAGIC)
        if found >= 0:
            return at + found
        at += _BLOCK
    return size
