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
import zlib
from collections.abc import Iterable, Sequence
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


class _Place(NamedTuple):
    shard: Path
    offset: int  # of the payload
    row: int
    rows: int
    passes: int


class LossStore:
    """All shards of a folder, and one of them open for appending."""

    def __init__(self, folder: Path, shard: str = "losses-00000.bin", *, writes: bool = True):
        """Indexes every shard; cuts an incomplete last frame off the one this process owns.

        Args:
          folder: of the shards.
          shard: the name of the one that this process appends to.
          writes: False: nothing is appended, and no file is made or changed.
        """
        self._places: dict[tuple[str, str, str], _Place] = {}
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
                self._add(header, path, at + _PREFIX.size + head_bytes)
                at = end = at + _PREFIX.size + head_bytes + payload_bytes
        return end

    def _add(self, header: dict, shard: Path, offset: int) -> None:
        texts = header["texts"]
        for row, text in enumerate(texts):
            key = (header["model"], header["plan"], text)
            self._places[key] = _Place(shard, offset, row, len(texts), header["passes"])
        self.num_records += len(texts)

    def __len__(self) -> int:
        return len(self._places)

    def keys(self) -> list[tuple[str, str, str]]:
        """Returns (model, plan, text) of every record."""
        return list(self._places)

    def has(self, model: str, plan: str, text: str) -> bool:
        """Tells whether the losses of (model, plan, text) can be read here."""
        return (model, plan, text) in self._places

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
        self._add(header, self._shard.path, start + _PREFIX.size + len(head))

    def read(self, model: str, plan: str, text: str) -> Record:
        """Reads the stored losses of one text. Raises `KeyError` if there are none."""
        place = self._places[(model, plan, text)]
        with readable(place.shard), place.shard.open("rb") as file:

            def array(offset: int, kind: str, count: int) -> np.ndarray:
                file.seek(offset)
                return np.frombuffer(file.read(count * np.dtype(kind).itemsize), kind)

            counts = array(place.offset, "<i4", place.rows * place.passes)
            counts = counts.reshape(place.rows, place.passes)
            before = int(counts[: place.row].sum())
            here = int(counts[place.row].sum())
            positions = place.offset + counts.nbytes
            losses = positions + 2 * int(counts.sum())
            return Record(
                counts[place.row],
                array(positions + 2 * before, "<u2", here),
                array(losses + 4 * before, "<f4", here),
            )

    def close(self) -> None:
        """Closes the shard that this process appends to."""
        if self._shard is not None:
            self._shard.close()


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
