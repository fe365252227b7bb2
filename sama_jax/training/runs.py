"""Keeps the output folder of a training: what it was started with, and who may continue it."""

import contextlib
import dataclasses
import fnmatch
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sama_jax import __version__, untrusted
from sama_jax.arrays import Rendered
from sama_jax.config import TrainSettings
from sama_jax.errors import DataError, ModelError, UsageError
from sama_jax.storage import files
from sama_jax.terminal import Terminal
from sama_jax.texts.read import PLAIN, Fields, read_texts
from sama_jax.training.sequences import digest, training_texts
from sama_jax.weights import adapter_config, folder_files, safetensors, stored_bytes

MANIFEST, LOG, CHECKPOINTS = "train.json", "log.jsonl", "checkpoints"
SECRETS = "private"
"""Folder of what a private training must not tell anybody; no other folder gets a copy of it."""
SNAPSHOTS = "snapshots"
"""Folder of models on the way, which `sama-jax watch` audits one by one."""


class Run(NamedTuple):
    """An opened output folder and the texts that belong to it."""

    out: Path
    manifest: dict[str, Any]
    texts: list[str | Rendered]
    heldout: list[str | Rendered] | None
    terminal: Terminal

    @property
    def finished(self) -> bool:
        """Tells whether the folder holds the trained model, and says what it wrote."""
        return _is_finished(self.out, self.manifest)

    def forget_states(self) -> None:
        """Deletes what only a training that goes on needs."""
        for name in (CHECKPOINTS, SECRETS):
            shutil.rmtree(self.out / name, ignore_errors=True)

    def remember(self, **values: Any) -> None:
        """Adds to the manifest and writes it."""
        self.manifest.update(values)
        files.write_json(self.out / MANIFEST, self.manifest)


@contextlib.contextmanager
def open_run(
    out: Path,
    identity: dict[str, Any],
    settings: TrainSettings,
    data: Path,
    heldout: Path | None,
    quiet: bool,
    fields: Fields = PLAIN,
) -> Iterator[Run]:
    """Reads the texts and opens `out`, new or left by the same run.

    The held-out texts may lack the field of labels.

    Raises:
      UsageError: `out` holds something else.
      DataError: the texts.
    """
    terminal = Terminal(quiet=quiet)
    texts = training_texts(data, terminal, fields)
    held = None
    if heldout is not None:
        options = {"labels_needed": False, "form": fields.form}
        read = read_texts(heldout, fields.text, fields.label, **options)
        held = [text.content for text in read.texts]
        _say_overlap(data, heldout, texts, held, terminal)
    given = dataclasses.asdict(settings)
    for name in ("checkpoint_every", "snapshot_every"):
        del given[name]  # when states are saved changes no number
    for name, used in (("lora", settings.lora.r), ("dp", settings.dp.is_private)):
        if not used:
            del given[name]
    identity = {
        **identity,
        "version": __version__,
        "data": digest(texts),
        "heldout": None if held is None else digest(held),
        "settings": given,
    }
    _manifest(out, identity)  # before anything is made in the folder of another run
    with files.only_writer(out):
        manifest = _manifest(out, identity)  # another one may have taken the folder meanwhile
        run = Run(out, manifest or {}, texts, held, terminal)
        if manifest is None:
            run.remember(identity=identity)
        elif run.finished:
            _require_whole(run)
            run.forget_states()  # left by a run that was killed
            terminal.say(f"{out}: this training is finished already; nothing to do")
        yield run


def _say_overlap(
    data: Path,
    heldout: Path,
    texts: Sequence[str | Rendered],
    held: Sequence[str | Rendered],
    terminal: Terminal,
) -> None:
    """Says how many held-out texts are learned. Raises `DataError` if nothing is held out."""
    known = {*texts}
    both = sum(text in known for text in held)
    if both == len(held) or heldout.resolve() == data.resolve():
        raise DataError(
            f"{heldout}: these texts are learned, too ({both:,} of {len(held):,}), so their NLL "
            "says nothing of others; give --held-out texts that are not in --data, or leave it out"
        )
    if both:
        terminal.say(f"{both:,} of {len(held):,} held-out texts are among those that are learned")


def digests(out: Path) -> dict[str, str]:
    """Returns name -> SHA-256 of all that makes the model: config, weights, tokenizer and others.

    Raises `ModelError` if the weights are not there.
    """
    if (out / adapter_config.CONFIG).is_file():
        made = [out / adapter_config.CONFIG, out / adapter_config.WEIGHTS]
    else:
        made = [out / folder_files.CONFIG, *safetensors.weight_files(out)]
    beside = [f for f in folder_files.companions(out) if f.name not in (MANIFEST, LOG)]
    return {f.name: stored_bytes.digest([(f.name, f)]) for f in made + beside}


def _is_finished(out: Path, manifest: dict[str, Any]) -> bool:
    # The digests are written last: before them, nobody knows whether the model is whole.
    return _has_model(out) and isinstance(manifest.get("files"), dict)


def _has_model(out: Path) -> bool:
    """Tells whether a model or an adapter was written, whose config comes last."""
    return any((out / name).is_file() for name in (folder_files.CONFIG, adapter_config.CONFIG))


def _require_whole(run: Run) -> None:
    """Raises `UsageError` if a file of the model is not as the training wrote it."""
    try:
        found = digests(run.out)
    except ModelError:
        found = {}
    written = run.manifest["files"]
    changed = sorted(name for name in written if written[name] != found.get(name))
    if changed:
        raise UsageError(
            f"{run.out}: this training is finished, but {untrusted.printable(changed[0])} is no "
            "longer what it wrote; delete the folder to train again, or choose another one"
        )


def _manifest(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Reads what the same run left in `out`; None if `out` is free. Raises `UsageError`."""
    path = out / MANIFEST
    if path.is_file():
        try:
            manifest = _checked(untrusted.read_json(path), _has_model(out))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path}: not readable ({error}); choose another output folder"
            ) from None
        _require_same_run(out, manifest["identity"], identity)
        return manifest
    if _has_model(out):
        raise UsageError(
            f"{out}: holds a model that was not trained here; choose another output folder"
        )
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(
            f"{out}: not empty, and has no {MANIFEST} of a training to go on with; choose a "
            "new folder"
        )
    return None


def _checked(manifest: Any, trained: bool) -> dict[str, Any]:
    """Returns a manifest that has what a run goes on with. Raises `ValueError`."""
    match manifest:
        case {"identity": {"settings": {}}, "result": {}} if trained:
            return manifest
        case {"identity": {"settings": {}}} if not trained:
            loss = manifest.get("nll_before", 0.0)
            if type(loss) in (int, float) and math.isfinite(loss):
                return manifest
    raise ValueError("expected what a training has written about itself")


def _require_same_run(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    def flat(identity: dict[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in identity.items() if k != "settings"}
        return {**rest, **identity.get("settings", {})}

    old, new = flat(before), flat(now)
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    if changed:
        shown = "; ".join(
            f"{untrusted.printable(k)} was {_short(old.get(k))}, is {_short(new.get(k))}"
            for k in changed[:10]
        )
        raise UsageError(
            f"{out}: belongs to another training run ({shown}); choose another output folder, or "
            "delete this one to start over"
        )


def _short(value: Any) -> str:
    return untrusted.printable(value if isinstance(value, str) else repr(value), 16)


def tokenizer_files(base: Path) -> str:
    """Returns the SHA-256 of the tokenizer's JSON files that `copy_companions` copies.

    They may name another mask token, or say other things of the same ids.
    """
    names = fnmatch.filter((f.name for f in folder_files.companions(base)), "*token*.json")
    return stored_bytes.digest([(name, base / name) for name in names])


def copy_companions(base: Path, out: Path) -> None:
    """Copies the tokenizer and other files that lie with the weights, but not those of a run."""
    folder_files.copy_companions(base, out, leave_out=(MANIFEST, LOG, "README.md"))
