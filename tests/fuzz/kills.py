"""`python -m fuzz.kills`, from `tests/`: commands that are killed at any moment, and continued.

    python -m fuzz.kills --kills 50 --seed 1

Each command runs once undisturbed. Then it is ended by SIGKILL, SIGTERM or SIGINT, one to three
times, at a random moment, mostly after it began to write; the same command runs to the end, and
its output must equal that of the undisturbed run: byte for byte, or, where a file holds times or
is not written in one order, by its content (each `compare` says what may differ).
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny

from fuzz.pool import ROOT
from sama_jax.errors import Interrupted, ValidityError
from sama_jax.storage.loss_store import LossStore
from sama_jax.weights import model_folder

TIMES = {"seconds", "session", "tokens_per_second", "cost", "seconds_by_plan"}
"""Fields of a manifest that tell how long something took, and in how many goes."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


ENDS = (0, ValidityError.exit_code)
"""Exit codes of a command that has done its work: models with random weights void an audit."""


class Case(NamedTuple):
    """A command with an output that can be killed."""

    command: Callable[[Path, Path], list[str]]
    """(inputs, out) -> the arguments behind `python -m`."""
    compare: Callable[[Path, Path], None]
    """(whole, out): raises `AssertionError` if they differ."""
    prepare: Callable[[Path, Path], Any] = lambda inputs, out: None
    """Makes what the command expects at `out`."""


class Killed(NamedTuple):
    """One kill and what it left."""

    case: str
    signal: str
    after: float
    code: int
    """Of the process that was killed."""
    problem: str


# --- inputs and commands --------------------------------------------------------------------------


def make_inputs(root: Path) -> None:
    """Models large enough that writing them takes a moment, texts, and a finished audit."""
    sizes = {"d_model": 128, "n_layers": 6, "n_heads": 4, "n_kv_heads": 4}
    for seed, name in enumerate(("base", "target")):
        tiny.folder(root / name, seed=seed, **sizes, mlp_hidden_size=384)
    for seed, name in enumerate(("small", "other")):
        tiny.folder(root / name, seed=seed)
    tiny.write_texts(root / "texts.jsonl", tiny.texts(40))


def audit(inputs: Path, out: Path) -> list[str]:
    """An audit of the small models, in batches of two texts."""
    models = ["--target", str(inputs / "other"), "--reference", str(inputs / "small")]
    given = [*models, "--data", str(inputs / "texts.jsonl"), "--out", str(out)]
    steps = ["--set", "sama.steps=4", "--set", "sama.subsets=16", "--max-length", "64"]
    return ["sama_jax", "audit", *given, *steps, "--batch-size", "2", "--quiet"]


def finetune(inputs: Path, out: Path) -> list[str]:
    """Thirty steps with a checkpoint after every third."""
    given = ["--base", str(inputs / "small"), "--data", str(inputs / "texts.jsonl")]
    steps = ["--epochs", "2", "--batch-size", "4", "--max-length", "32"]
    return ["sama_jax", "finetune", *given, "--out", str(out), *steps, "--quiet",
            "--set", "checkpoint_every=3"]  # fmt: skip


def convert(kind: str, *more: str) -> Callable[[Path, Path], list[str]]:
    """A conversion of the larger model."""
    return lambda inputs, out: [
        "checkpoints_convert", kind, str(inputs / "target"), str(out), *more, "--quiet"
    ]  # fmt: skip


def report(inputs: Path, out: Path) -> list[str]:
    """The report of an audit that has none."""
    del inputs
    return ["sama_jax", "report", str(out)]


def finished_audit(inputs: Path, out: Path) -> None:
    """Copies an audit without its report, which `report` writes."""
    made = inputs / "finished"
    if not made.is_dir():
        assert run(audit(inputs, made))[0] in ENDS
    shutil.copytree(made, out)
    shutil.rmtree(out / "figures", ignore_errors=True)
    for name in ("report.md", "report.html"):
        (out / name).unlink()


# --- what has to be equal -------------------------------------------------------------------------


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in TIMES}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def _json(path: Path) -> Any:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return _without_times([json.loads(line) for line in lines])


def _names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def same_bytes(whole: Path, out: Path, *but: str) -> None:
    """Every file, those below the names `but` left out."""
    kept = {n for n in _names(whole) if n.split("/")[0] not in but}
    assert kept == {n for n in _names(out) if n.split("/")[0] not in but}, "other files"
    for name in kept:
        assert (whole / name).read_bytes() == (out / name).read_bytes(), f"{name} differs"


def _manifest(folder: Path, timed: Sequence[str]) -> dict[str, Any]:
    """The manifest without times, the command, and the digests of files that hold times."""
    made = _without_times(json.loads((folder / "manifest.json").read_text()))
    digests = {n: d for n, d in made["files"].items() if n.split("/")[0] not in timed}
    return {k: v for k, v in made.items() if k not in ("command", "seal")} | {"files": digests}


def same_audit(whole: Path, out: Path) -> None:
    """Bytes, but for times in the manifest, the log, and the order of what was appended."""
    timed = ("manifest.json", "log.jsonl", "parts", "losses", "report.md", "report.html")
    same_bytes(whole, out, *timed)
    left, right = (_manifest(folder, timed) for folder in (whole, out))
    assert left == right, "manifest.json differs"
    stores = []
    for folder in (whole, out):
        copy = folder.with_name(f"{folder.name}-losses")
        shutil.copytree(folder / "losses", copy)
        store = LossStore(copy)
        stores.append({key: store.read(*key) for key in store.keys()})  # noqa: SIM118
        assert store.num_records == len(store), "something was computed twice"
        store.close()
        shutil.rmtree(copy)
    assert stores[0].keys() == stores[1].keys(), "other losses"
    for key, record in stores[0].items():
        for a, b in zip(record, stores[1][key]):
            assert a.tobytes() == b.tobytes(), f"losses of {key} differ"


def same_training(whole: Path, out: Path) -> None:
    """Bytes, but for times in the manifest and the log."""
    same_bytes(whole, out, "train.json", "log.jsonl")
    for name in ("train.json", "log.jsonl"):
        assert _json(whole / name) == _json(out / name), f"{name} differs"


def same_parameters(whole: Path, out: Path) -> None:
    """Bytes, but for what Orbax writes: names and order of its files differ, no parameter does."""
    same_bytes(whole, out, "orbax", "conversion.json")
    a, b = (model_folder.open_folder(f, dtype="float32").source for f in (whole, out))
    assert a.tensors.keys() == b.tensors.keys(), "other tensors"
    for name, tensor in a.tensors.items():
        index = (slice(None),) * len(tensor.shape)
        assert np.array_equal(a.window(name, index), b.window(name, index)), f"{name} differs"
    left, right = (json.loads((f / "conversion.json").read_text()) for f in (whole, out))
    assert {k: v for k, v in left.items() if k in ("source", "architecture", "dtype")} == {
        k: v for k, v in right.items() if k in ("source", "architecture", "dtype")
    }, "conversion.json differs"


CASES = {
    "audit": Case(audit, same_audit),
    "finetune": Case(finetune, same_training),
    "to-hf": Case(convert("to-hf", "--max-shard", "1MB"), same_bytes),
    "to-orbax": Case(convert("to-orbax"), same_parameters),
    "report": Case(
        lambda inputs, out: ["sama_jax", "report", str(out)], same_bytes, finished_audit
    ),
}


# --- killing --------------------------------------------------------------------------------------


def start(arguments: list[str], errors: Any = None) -> subprocess.Popen:
    """Starts a command as a user would."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors)


def run(arguments: list[str]) -> tuple[int, str]:
    """Runs a command to its end: exit code and standard error."""
    with tempfile.TemporaryFile() as errors:
        code = start(arguments, errors).wait(600)
        errors.seek(0)
        return code, errors.read().decode(errors="replace")


def _seen(out: Path) -> set[tuple[str, int]]:
    found = set()
    for folder, _, names in os.walk(out):
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):  # a file that was being written
                found.add((path, os.stat(path, follow_symlinks=False).st_mtime_ns))
    return found


def timed(arguments: list[str], out: Path) -> tuple[float, float, int]:
    """Runs a command undisturbed: seconds until it first writes, until its end; its exit code."""
    before, began, first = _seen(out), time.monotonic(), 0.0
    process = start(arguments)
    while process.poll() is None:
        if not first and _seen(out) != before:
            first = time.monotonic() - began
        time.sleep(0.01)
    assert process.returncode in ENDS, f"{arguments}: exit code {process.returncode}"
    return first or time.monotonic() - began, time.monotonic() - began, process.returncode


def kill(arguments: list[str], out: Path, number: signal.Signals, wait: float, writes: bool):
    """Starts a command and sends a signal `wait` seconds after its start, or its first write.

    Returns its exit code, None if it ended before, and its standard error.
    """
    with tempfile.TemporaryFile() as errors:
        before = _seen(out)
        process = start(arguments, errors)
        while writes and process.poll() is None and _seen(out) == before:
            time.sleep(0.002)
        until = time.monotonic() + wait
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        alive = process.poll() is None
        process.send_signal(number)
        code = process.wait(120)
        errors.seek(0)
        return (code if alive else None), errors.read().decode(errors="replace")


def judge(number: signal.Signals, code: int | None, said: str, end: int) -> str:
    """Says what is wrong with the end of a process that got a signal; nothing if all is right.

    `end` is the exit code of one that gets none.
    """
    if "Traceback" in said:
        return f"traceback: {said[-300:]!r}"
    right = {
        None,
        end,
        Interrupted.exit_code,
        -number,
    }  # a signal before handlers are there ends it
    if number == signal.SIGKILL:
        right = {None, -number}
    return "" if code in right else f"exit code {code}: {said[-300:]!r}"


def kill_and_continue(
    name: str, inputs: Path, scratch: Path, draw: random.Random, kills: int
) -> list[Killed]:
    """Kills one command `kills` times over several outputs; every output is compared."""
    case, found = CASES[name], []
    whole = scratch / f"{name}-whole"
    case.prepare(inputs, whole)
    first, total, end = timed(case.command(inputs, whole), whole)
    while len(found) < kills:
        out, here = scratch / f"{name}-out", []
        shutil.rmtree(out, ignore_errors=True)
        case.prepare(inputs, out)
        for _ in range(min(draw.choice([1, 1, 2, 3]), kills - len(found))):
            number, writes = draw.choice(SIGNALS), draw.random() < 0.75
            wait = draw.uniform(0, (total - first if writes else total) * 1.02)
            code, said = kill(case.command(inputs, out), out, number, wait, writes)
            if code is None:  # it was quicker than before
                continue
            here.append(Killed(name, number.name, wait, code, judge(number, code, said, end)))
        code, said = run(case.command(inputs, out))
        problem = "" if code == end else f"the same command again: exit code {code}: {said[-300:]}"
        try:
            if not problem:
                case.compare(whole, out)
        except (AssertionError, OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        found += [k._replace(problem=k.problem or problem) for k in here]
    return found


def main() -> int:
    """Prints a line a kill; ends with 1 if something came out otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m fuzz.kills", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=50, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", action="append", choices=CASES, help="all unless given")
    parser.add_argument("--keep", type=Path, help="leave inputs and outputs in this folder")
    given = parser.parse_args()
    scratch = (given.keep or Path(tempfile.mkdtemp(prefix="kills-"))).absolute()
    names, draw, bad = given.case or list(CASES), random.Random(given.seed), 0
    inputs = scratch / "inputs"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(scratch / "cache")  # compiling is most of it
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    make_inputs(inputs)
    for i, name in enumerate(names):
        share = given.kills // len(names) + (i < given.kills % len(names))
        for k in kill_and_continue(name, inputs, scratch, draw, share):
            bad += bool(k.problem)
            result = k.problem or "equal"
            print(
                f"{k.case:<9}{k.signal:<8}{k.after:>6.2f} s  exit {k.code:>4}  {result}", flush=True
            )
    if given.keep is None:
        shutil.rmtree(scratch, ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
