"""Keeps training states, the last two of them, and the parameters of models, through Orbax.

A training state is written as a flat `{path: array}`, so a state that does not fit can be reported
leaf by leaf, and no class of ours or of Optax is part of the format. Parameters are written as the
nested dict that they are, for anyone's `ocp.load`.
"""

import contextlib
import gc
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sama_jax.errors import ModelError, OutputError, UsageError
from sama_jax.storage.files import writing
from sama_jax.untrusted import printable

KEPT = 2


def _orbax() -> Any:
    """Imports Orbax when it is needed: half a second, which reading safetensors does without."""
    from orbax.checkpoint import v1

    return v1


class Checkpoints:
    """Keeps the checkpoints of one run. Each appears whole or not at all."""

    def __init__(self, folder: Path):
        ocp = _orbax()
        policies = ocp.training.preservation_policies
        self.folder = folder
        self._saving: Any = None
        self._silence = contextlib.ExitStack()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            _require_regular(folder)
            self._checkpointer = ocp.training.Checkpointer(
                str(folder.absolute()),
                preservation_policy=policies.LatestN(KEPT),
                cleanup_tmp_directories=True,  # left behind by a killed run
            )
        except Exception as error:  # it reads what is there, which may be damaged in any way
            if _is_shortage(error):
                raise
            raise ModelError(
                f"{folder}: a checkpoint in it is damaged ({printable(_first_line(error), 200)}); "
                "delete that step's folder to go on from the step before"
            ) from None

    def __enter__(self) -> "Checkpoints":
        self._silence.enter_context(_without_log())  # its threads log what they raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._silence:
            self.close()

    @property
    def steps(self) -> list[int]:
        """Returns the steps that can be restored, newest first."""
        return sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)

    def save(self, step: int, state: Any) -> None:
        """Starts writing `state`, a tree of arrays that the caller may donate at once.

        Orbax holds a host copy, or on CPU the buffer itself, which JAX then does not overwrite.
        Waits for the save before it. Raises `OutputError`.
        """
        self.wait()
        if step in self.steps:
            return
        with self._written():
            self._saving = self._checkpointer.save_async(step, _flat(state), force=True)

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises `OutputError`."""
        saving, self._saving = self._saving, None
        with self._written():
            if saving is not None:
                saving.result()

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """Returns (step, state) of the newest readable checkpoint, None if there is none.

        Args:
          abstract: tree of `jax.ShapeDtypeStruct` with shardings; the result has its structure.

        Raises:
          UsageError: a checkpoint of another model or optimiser.
          ModelError: none of the checkpoints can be read.
        """
        wanted, reasons = _flat(abstract), []
        for step in self.steps:
            with _without_log():
                leaves = self._leaves(step, wanted, reasons)
                gc.collect()  # what failed says so when it is dropped
            if leaves is None:
                continue
            return step, jax.tree.unflatten(
                jax.tree.structure(abstract), [leaves[name] for name in wanted]
            )
        if reasons:
            raise ModelError(
                f"{self.folder}: none of the checkpoints can be read; delete the folder to train "
                "from the start\n  " + "\n  ".join(reasons)
            )
        return None

    def _leaves(self, step: int, wanted: dict[str, Any], reasons: list[str]) -> Any:
        """Reads one checkpoint; None if it is damaged, which `reasons` then tells."""
        try:
            _require_regular(self.folder / str(step))
            stored = self._checkpointer.metadata(step).metadata
            if stored:  # else it is damaged, and `load` says how
                self._require_fit(step, wanted, stored)
            return self._checkpointer.load(step, wanted)
        except UsageError:
            raise
        except Exception as error:  # a damaged folder can fail in any way inside Orbax
            if _is_shortage(error):
                raise
            reasons.append(f"step {step}: {printable(_first_line(error), 200)}")
            return None

    def close(self) -> None:
        """Waits for the last save and releases Orbax's threads."""
        try:
            self.wait()
        finally:
            with self._written():  # it raises what the last save has raised once more
                self._checkpointer.close()

    def _require_fit(self, step: int, wanted: dict[str, Any], stored: Any) -> None:
        def shape(tree: Any, name: str) -> str:
            leaf = tree.get(name)
            return "absent" if leaf is None else f"{leaf.dtype} {list(leaf.shape)}"

        problems = [
            f"{name}: expected {shape(wanted, name)}, found {shape(stored, name)}"
            for name in sorted({*wanted, *stored})
            if shape(wanted, name) != shape(stored, name)
        ]
        if problems:
            raise UsageError(
                f"{self.folder / str(step)}: {len(problems)} arrays do not fit this run; it is "
                "another run's checkpoint: choose another output folder or delete this one\n  "
                + "\n  ".join(problems)
            )

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Raises `OutputError` for a failed write; tensorstore reports it as `ValueError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or _os_error(error)
            if reason is None:
                raise
            raise OutputError(
                f"{self.folder}: cannot write a checkpoint ({reason}); free some space, then run "
                "the same command again: it continues"
            ) from None


# --- parameters of a model ----------------------------------------------------------------------

CHUNK_BYTES = 32 * 2**20
"""A leaf is stored in pieces of about this size, so that another mesh reads little in vain."""
CLAIMED = 64
"""Bytes of arrays for each stored one: pieces that are all zero are not stored, weights are."""


def save_params(folder: Path, params: Any) -> None:
    """Writes a parameter tree; `folder` appears when it is whole. All processes call it together.

    Raises `OutputError`.
    """
    context = _context(params)
    # Random-like bits: zstd makes bfloat16 weights a fifth smaller and writing three times slower.
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.array.saving.use_replica_parallel = False  # it compiles a slice of every shape
    try:
        with context, _without_log():
            _orbax().save(str(folder.absolute()), params)
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
        raise OutputError(
            f"{folder}: cannot write the checkpoint ({_first_line(error)}); free some space, then "
            "run the same command again"
        ) from None


def stored_params(folder: Path) -> Any:
    """Returns the shapes and dtypes of what `save_params` wrote; reads no array.

    Raises `ModelError`.
    """
    ocp = _orbax()  # outside: a broken installation is not a damaged folder
    with _damage(folder), _without_log():
        _require_regular(folder)
        stored = ocp.metadata(str(folder.absolute())).metadata
        if not stored:
            raise ValueError("it has no readable arrays")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)
        claimed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        found = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        if claimed > CLAIMED * found:
            raise ValueError(f"its arrays claim {claimed:,} bytes, its files have {found:,}")
        return shapes


def load_params(folder: Path, abstract: Any) -> Any:
    """Reads a tree of `jax.ShapeDtypeStruct` with shardings, in the dtypes that it asks for.

    A leaf `np.ndarray` is read whole to the host in its stored dtype, a leaf `None` is left out.
    Raises `ModelError`.
    """
    ocp = _orbax()
    wanted = jax.tree.map(
        lambda x: ocp.PLACEHOLDER if x is None else x, abstract, is_leaf=lambda x: x is None
    )
    with _damage(folder), _without_log(), _context(abstract):
        _require_regular(folder)
        return ocp.load(str(folder.absolute()), wanted)


def _context(tree: Any) -> Any:
    """Limits what is written or read at once to about two leaves besides the parameters."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | jax.ShapeDtypeStruct)]
    context = _orbax().Context()
    if arrays:
        largest = 1 + max(x.size * x.dtype.itemsize for x in arrays)  # limits are exclusive
        context.memory.write_concurrent_bytes = max(largest, 2 * CHUNK_BYTES)
        context.memory.read_concurrent_bytes = max(2 * largest, 2 * CHUNK_BYTES)
    return context


def _require_regular(folder: Path) -> None:
    """Raises `ValueError` for a pipe or a device, which Orbax would wait for or read for ever."""
    for path in folder.rglob("*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path.relative_to(folder)} is no regular file")


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Turns anything that Orbax stumbles over into one `ModelError`."""
    try:
        yield
    except Exception as error:  # a damaged folder can fail in any way inside Orbax
        if _is_shortage(error):
            raise
        reason = _first_line(error).split(" [tensorstore_spec")[0]
        raise ModelError(
            f"{folder}: not a complete Orbax checkpoint ({reason[:200]}); convert the model again"
        ) from None


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Silences Orbax and asyncio: they log in many lines what an exception says in one."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    hook = sys.unraisablehook

    def tell(unraisable: Any) -> None:
        """Passes over the unfinished coroutines of a failed read, and nothing else."""
        if not inspect.iscoroutine(unraisable.object):
            hook(unraisable)

    sys.unraisablehook = tell
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    except BaseException:
        gc.collect()  # asyncio logs a failed task when it is collected
        raise
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _flat(tree: Any) -> dict[str, Any]:
    """Returns `{"params.embed.embedding": leaf, ...}` in the order of the leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def _is_shortage(error: Exception) -> bool:
    """Tells whether memory was short, of the host or a device: then nothing is damaged."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _os_error(error: Exception) -> str | None:
    """Returns what the system said, of an error or of tensorstore's words about one, else None."""
    found = re.search(r"([^:\n]*) \[os_error_code=", str(error))
    if found is not None:
        return found[1].strip()
    return _first_line(error)[:200] if isinstance(error, OSError) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
