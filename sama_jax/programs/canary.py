"""Makes canaries, puts them into training data, and checks that they reach the model whole.

A canary is a text that nobody wrote. An independent fair coin decides whether it is trained on;
those that are not are its held-out twins, from the same source.
"""

import itertools
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Bool, Int

from sama_jax import __version__, rng
from sama_jax import attacks as attack_suite
from sama_jax.attacks.code import codes
from sama_jax.core.sampling import sample_texts
from sama_jax.errors import DataError, ModelError, UsageError
from sama_jax.reporting import results
from sama_jax.storage.canary_file import KEY, TEXTS, Canary, CanaryKey, read_key, write_key
from sama_jax.storage.files import only_writer, opened, require_new, write_atomic, write_pieces
from sama_jax.storage.run_folder import json_lines
from sama_jax.texts.read import read_texts, text_digest
from sama_jax.texts.records import LINE_BYTES, Names, rows_of
from sama_jax.texts.survival import kept_tokens, spelling_ids
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.untrusted import parse_json, printable
from sama_jax.weights import hub, loading, model_folder
from sama_jax.weights.model_folder import ModelFolder

KINDS = {"sampled": ("sampled",), "random": ("random",), "both": ("sampled", "random")}
BATCH = 32
"""Canaries that are drawn at once."""
TRIES = 20
"""As many are drawn for one that is kept; of byte-level tokens nearly all are."""


# --- make -----------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """What canaries are made of."""

    count: int = 200
    """Canaries, included or not."""
    length: int = 64
    """Tokens of each, about."""
    copies: tuple[int, ...] = (1, 4, 16)
    """How often an included one stands in the training data, in turn."""
    kind: str = "both"
    """Of `KINDS`, which take turns, too."""
    temperature: float = 1.2
    """Of sampling."""


def run_make(
    reference: Path,
    out: Path,
    recipe: Recipe,
    *,
    attack: str = results.MAIN_ATTACK,
    seed: int | None = None,
) -> str:
    """Writes the texts of canaries and their key into a new folder.

    Args:
      reference: the model that samples, and whose tokenizer spells.
      out: a new folder.
      recipe: what they are made of.
      attack: whose scores the bound will be computed from, fixed before they are seen.
      seed: of everything; None draws one, which is secret until the key is published.

    Returns:
      what was made, in one sentence.

    Raises:
      UsageError: the folder is not empty, or the attack is unknown or reads all texts at once.
      ModelError: the model cannot be used, or spells no texts that survive its own tokenizer.
    """
    require_new(out)
    if attack_suite.get(attack).corpus is not None:
        raise UsageError(
            f"attack '{attack}' reads all texts at once, so canaries would change each other's "
            "scores; take another one, as --attack sama"
        )
    seed = secrets.randbits(32) if seed is None else seed
    folder = model_folder.open_folder(reference, longest=recipe.length)
    tokenizer = TextTokenizer.from_folder(folder.path, folder.model.vocab_size)
    drawn = draw_texts(folder, tokenizer, recipe, seed)
    coins = flip_coins(len(drawn), seed)
    canaries = [
        Canary(text_digest(text), kind, copies, bool(coin))
        for (text, kind, copies), coin in zip(drawn, coins)
    ]
    about = {
        "version": __version__,
        "code": codes()[attack],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "reference": folder.identity,
        "tokenizer": tokenizer.fingerprint,
        "length": recipe.length,
        "temperature": float(recipe.temperature),
    }
    rows = [{"text": text, "label": int(coin)} for (text, *_), coin in zip(drawn, coins)]
    with only_writer(out):
        require_new(out)  # again: another process may have made some meanwhile
        write_atomic(out / TEXTS, json_lines(rows))
        seal = write_key(out / KEY, CanaryKey(canaries, seed, attack, about))
    return (
        f"{len(drawn)} canaries, {int(coins.sum())} of them included by their coins. Keep {out} "
        "from whoever trains until the training is over; the SHA-256 of the key, to be published "
        f"before, is {seal}"
    )


def draw_texts(
    folder: ModelFolder, tokenizer: TextTokenizer, recipe: Recipe, seed: int
) -> list[tuple[str, str, int]]:
    """Draws the text of each canary: `(text, kind, copies)`. Raises `ModelError`."""
    turns = [(kind, copies) for kind in KINDS[recipe.kind] for copies in recipe.copies]
    cells = [turns[i % len(turns)] for i in range(recipe.count)]
    allowed = spelling_ids(tokenizer, folder.model.vocab_size)
    allowed[folder.model.mask_id] = False
    draws = {
        "sampled": sampled_ids(folder, allowed, recipe.length, recipe.temperature, seed),
        "random": random_ids(allowed, recipe.length, seed),
    }
    counts = Counter(kind for kind, _ in cells)
    texts = {
        kind: iter(distinct_texts(draws[kind], tokenizer, count, recipe.length, str(folder.path)))
        for kind, count in counts.items()
    }
    return [(next(texts[kind]), kind, copies) for kind, copies in cells]


def flip_coins(count: int, seed: int) -> Bool[np.ndarray, " {count}"]:
    """Flips an independent fair coin for each canary."""
    return np.random.default_rng([seed, 0]).integers(0, 2, count).astype(bool)


def random_ids(
    allowed: Bool[np.ndarray, " v"], length: int, seed: int
) -> Iterator[Int[np.ndarray, "b l"]]:
    """Yields batches of texts whose tokens are drawn uniformly of those that are allowed."""
    draw = np.random.default_rng([seed, 1])
    while True:
        yield draw.choice(np.flatnonzero(allowed), (BATCH, length))


def sampled_ids(
    folder: ModelFolder,
    allowed: Bool[np.ndarray, " v"],
    length: int,
    temperature: float,
    seed: int,
) -> Iterator[Int[np.ndarray, "b l"]]:
    """Yields batches of texts that a model samples, on the first device."""
    params = loading.load(folder, SingleDeviceSharding(jax.devices()[0]))
    sample = jax.jit(partial(sample_texts, folder.model, length=length))
    root = rng.run_key(seed, rng.Purpose.CANARIES)
    for number in itertools.count():
        keys = rng.step_keys(jax.random.fold_in(root, number), BATCH)
        yield np.asarray(sample(params, keys, allowed, np.float32(temperature)))


def distinct_texts(
    draws: Iterator[Int[np.ndarray, "b l"]],
    tokenizer: TextTokenizer,
    count: int,
    length: int,
    where: str,
) -> list[str]:
    """Spells drawn tokens, and keeps distinct texts that the tokenizer reads back as they are.

    Raises `ModelError` if too few do.
    """
    found: dict[str, None] = {}
    for batch in itertools.islice(draws, TRIES * -(-count // BATCH)):
        texts = [text.strip() for text in tokenizer.decode(batch.tolist())]
        tokens = kept_tokens(tokenizer, texts)
        # Tokens that join into longer ones make a text shorter, and one of few is no secret.
        found |= dict.fromkeys(text for text, n in zip(texts, tokens) if 2 * n >= length)
        if len(found) >= count:
            return list(found)[:count]
    raise ModelError(
        f"{where}: only {len(found)} of {count} canaries are distinct and come back from the "
        "tokenizer as they were; raise --temperature, or change --length or --kind"
    )


def read_canaries(folder: Path) -> tuple[CanaryKey, list[str]]:
    """Reads a folder of canaries: its key, and the text of each.

    Raises `DataError` if the two do not belong together.
    """
    key = read_key(folder)
    texts = [text.text for text in read_texts(folder / TEXTS).texts]
    if [text_digest(text) for text in texts] != [one.sha256 for one in key.canaries]:
        raise DataError(f"{folder}: {TEXTS} and {KEY} are of different canaries; copy both again")
    return key, texts


# --- insert ---------------------------------------------------------------------------------------


def run_insert(data: Path, folder: Path, out: Path, field: str = "text") -> str:
    """Writes training data anew, with copies of the included canaries at random places.

    All other lines stay as they are, byte for byte; one is in memory at a time.

    Args:
      data: JSON Lines, a record a line.
      folder: of `run_make`.
      out: a new file.
      field: of a record, holds its text.

    Returns:
      what was made, in one sentence.

    Raises:
      UsageError: `out` exists.
      DataError: a line is no record, or is a canary already.
    """
    if os.path.lexists(out):
        raise UsageError(f"{out}: exists; give --out a new file")
    key, texts = read_canaries(folder)
    records = _count_records(data, field, frozenset(texts))
    copies = [
        text for one, text in zip(key.canaries, texts) if one.included for _ in range(one.copies)
    ]
    draw = np.random.default_rng([key.seed, 2])
    # Behind a record each: the first bytes of a file may be a mark of its encoding.
    places = draw.integers(1, records + 1, len(copies))
    lines: dict[int, list[bytes]] = {}
    for place, text in zip(places.tolist(), draw.permutation(np.array(copies, object))):
        record = json.dumps({field: text}, ensure_ascii=False) + "\n"
        lines.setdefault(place, []).append(record.encode())
    write_pieces(out, _joined(data, lines))
    included = sum(one.included for one in key.canaries)
    return (
        f"{out}: {records:,} records, and {len(copies):,} copies of {included} canaries; train on "
        f"it, and never on {folder / TEXTS}"
    )


def _lines(path: Path) -> Iterator[bytes]:
    with opened(path) as file:
        while line := file.readline(LINE_BYTES + 1):
            yield line


def _count_records(path: Path, field: str, canaries: frozenset[str]) -> int:
    """Counts the records of a file. Raises `DataError` if a line is none, or is a canary."""
    records = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError:
            record = None
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(
                f"{path}:{number}: expected JSON Lines, an object a line with a string "
                f"'{printable(field)}'; give the name of that field as --field, or convert the file"
            )
        if text in canaries:
            raise DataError(f"{path}:{number}: is a canary already; give the data without them")
        records += 1
    if not records:
        raise DataError(f"{path}: holds no record to stand beside")
    return records


def _joined(path: Path, canaries: dict[int, list[bytes]]) -> Iterator[bytes]:
    """Yields the lines of a file, and behind its n-th record the canaries of place n."""
    record = 0
    for line in _lines(path):
        yield line
        record += bool(line.strip())
        here = canaries.pop(record, [])
        if here and not line.endswith(b"\n"):
            yield b"\n"
        yield from here
    if canaries:
        raise DataError(f"{path}: was changed while it was read; run the same command again")


# --- check ----------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """What became of canaries."""

    lines: list[str]
    """One for each kind of check."""
    failed: list[str]
    """Names of the checks that not every canary passes."""


def run_check(
    folder: Path, model: Path, max_length: int, data: Path | None = None, field: str = "text"
) -> Checked:
    """Checks that canaries reach the model whole.

    Args:
      folder: of `run_make`.
      model: the one that is trained, or any with its tokenizer.
      max_length: tokens that texts are cut at.
      data: what is trained on, in any format that texts come in; None: not looked at.
      field: of its records, holds the text.

    Raises `DataError` and `ModelError` for files that cannot be read.
    """
    key, texts = read_canaries(folder)
    model = hub.resolve(model)
    tokenizer = TextTokenizer.from_folder(model, None)
    whole = kept_tokens(tokenizer, texts) > 0
    encoded = tokenizer.encode(texts, max_length)
    times = Counter(e.ids.tobytes() for e in encoded)
    limit = f"{max_length} tokens"
    checks = {
        "tokenisation": (whole, "keep their ids when they are spelled and tokenised again"),
        "truncation": ([not e.truncated for e in encoded], f"are not cut at {limit}"),
        "difference": ([times[e.ids.tobytes()] == 1 for e in encoded], f"are distinct in {limit}"),
    }
    if data is not None:
        found = _times_in(data, field, frozenset(texts))
        right = [found[t] == one.copies * one.included for one, t in zip(key.canaries, texts)]
        checks["training data"] = (right, f"stand in {data} as often as their coins say")
    lines = [
        f"{name}: {int(np.sum(passed))} of {len(texts)} canaries {what}"
        for name, (passed, what) in checks.items()
    ]
    return Checked(lines, [name for name, (passed, _) in checks.items() if not np.all(passed)])


def _times_in(path: Path, field: str, canaries: frozenset[str]) -> Counter[str]:
    """Counts how often each canary is a record of a file."""
    found: Counter[str] = Counter()
    for row in rows_of(path, Names(text=field)):
        if isinstance(row, str):
            raise DataError(row)
        text = row.fields.get("text")
        if isinstance(text, str) and text in canaries:
            found[text] += 1
    return found
