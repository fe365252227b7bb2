"""Wrong inputs through the real command line: one clear line, the documented exit code, no remains.

Standard error holds that line and nothing else (a list may follow it), no traceback; the output
folder is absent or complete, and a good result that was there before is untouched.
"""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from broken_folders import MODELS, edit_config, edit_weights

from sama_jax.cli import bench, entry
from sama_jax.cli.run import failed_allocation
from sama_jax.config import SamaSettings
from sama_jax.errors import UsageError
from sama_jax.storage import files

pytestmark = pytest.mark.usefixtures("figures")
ROOT = Path(__file__).parents[2]


class Box(NamedTuple):
    """A place of its own with good inputs."""

    path: Path
    target: Path
    reference: Path
    data: Path
    out: Path

    def command(self, **changes: Any) -> list[str]:
        """The good command; `max_length=16` adds or replaces a flag, None drops it."""
        flags = {
            "target": self.target,
            "reference": self.reference,
            "data": self.data,
            "out": self.out,
            **changes,
        }
        parts = ["audit", "--quiet", *tiny.SETTINGS]
        for name, value in flags.items():
            if value is not None:
                parts.append(f"--{name.replace('_', '-')}")
                parts += [] if value is True else [str(value)]
        return parts

    def lines(self, *lines: str | bytes, name: str = "bad.jsonl") -> Path:
        """A file of these lines."""
        made = self.path / name
        made.write_bytes(b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in lines))
        return made


def line(text: str = "karo mite", **fields: Any) -> str:
    return json.dumps({"text": text, **fields})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("inputs")
    tiny.folder(base / "target", seed=0)
    tiny.folder(base / "reference", seed=1)
    tiny.write_texts(base / "texts.jsonl", tiny.texts(20, (8, 28)))
    return base


@pytest.fixture
def box(originals: Path, tmp_path: Path) -> Box:
    for name in ("target", "reference"):
        shutil.copytree(originals / name, tmp_path / name)
    data = tmp_path / "texts.jsonl"
    shutil.copy(originals / "texts.jsonl", data)
    return Box(tmp_path, tmp_path / "target", tmp_path / "reference", data, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(originals: Path, figures: None) -> Path:
    """A complete run on the good inputs."""
    out = originals / "finished"
    box = Box(
        originals, originals / "target", originals / "reference", originals / "texts.jsonl", out
    )
    assert entry.main(box.command()) == 0
    return out


class Said(NamedTuple):
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], command: list[str]) -> Said:
    capsys.readouterr()
    try:
        code = entry.main(command)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    return Said(code, *capsys.readouterr())


def run_process(command: list[str], limit: int | None = None) -> Said:
    """In a process of its own, which may write no file beyond `limit` bytes."""
    code = "import sys; from sama_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1)); {code}"
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=env, capture_output=True, text=True, timeout=300
    )
    return Said(done.returncode, done.stdout, done.stderr)


def assert_one_line(said: Said, code: int, *fragments: str) -> str:
    """Exit code, one line on standard error, and what must stand in it. Returns the line."""
    assert said.code == code, said.err
    assert "Traceback" not in said.err
    first, *rest = said.err.splitlines()
    assert first.startswith("sama-jax"), said.err
    assert all(text.startswith("  ") for text in rest), said.err  # only a list may follow
    for fragment in fragments:
        assert fragment in said.err, said.err
    assert said.out == ""
    return first


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def scores(out: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (out / "scores.jsonl").read_text().splitlines()]


def assert_complete(out: Path, finished: Path) -> None:
    """The folder holds what an undisturbed run leaves, with equal scores."""
    assert scores(out) == scores(finished)
    assert contents(out).keys() == contents(finished).keys()
    assert json.loads((out / "manifest.json").read_text())["finished"] is True


def refuse(
    capsys: pytest.CaptureFixture[str], box: Box, command: list[str], code: int, *fragments: str
) -> str:
    """The command ends with one line, and without a trace in the box."""
    before = contents(box.path)
    said = assert_one_line(run(capsys, command), code, *fragments)
    assert contents(box.path) == before
    assert not box.out.exists() or any(box.out.iterdir())
    return said


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["target", "reference"])
@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, role: str, box: Box, capsys: pytest.CaptureFixture[str]):
    spoil, fragments = MODELS[case]
    spoil(getattr(box, role))
    refuse(capsys, box, box.command(), 4, str(getattr(box, role)), *fragments)


def test_all_tensors_that_do_not_fit_are_listed_at_once(box: Box, capsys):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        names = {key.rsplit("blocks.", 1)[-1]: key for key in tensors}
        del tensors[names["0.q_proj.weight"]]
        tensors["model.transformer.extra.weight"] = np.zeros((2, 3), np.float32)
        tensors[names["0.ff_out.weight"]] = np.zeros((16, 31), np.float32)

    edit_weights(box.target, spoil)
    said = run(capsys, box.command())
    first = assert_one_line(said, 4, str(box.target))
    assert "3 tensors do not fit" in first
    listed = said.err.splitlines()[1:]
    assert [text.split()[0] for text in listed] == ["missing", "shape", "unexpected"]
    assert "blocks.0.q_proj.weight [16, 16]" in listed[0]
    assert listed[1].endswith("blocks.0.ff_out.weight: expected [16, 32], found [16, 31]")
    assert listed[2].endswith("extra.weight [2, 3]")
    assert not box.out.exists()


def test_tokenizers_that_give_different_ids(box: Box, capsys):
    tiny.tokenizer(vocab=270).save(str(box.reference / "tokenizer.json"))
    refuse(
        capsys, box, box.command(), 4, "tokenise alike", "'t0'", "texts.jsonl:1", "fine-tuned from"
    )


def test_another_tokenizer_file_with_equal_ids_is_fine(box: Box, capsys):
    path = box.reference / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert run(capsys, box.command(dry_run=True)).code == 0


def test_target_and_reference_with_different_mask_ids(box: Box, capsys):
    edit_config(box.reference, mask_token_id=298)
    refuse(capsys, box, box.command(), 2, "299", "298", "--mask-id")


# --- texts -------------------------------------------------------------------------------------

GOOD = [line(f"karo mite {i}", id=f"g{i}") for i in range(6)]

TEXTS: dict[str, tuple[Callable[[Box], Path], list[str]]] = {
    "malformed JSON": (
        lambda b: b.lines(*GOOD, '{"text": "karo"', *GOOD),
        ["bad.jsonl:7:", "JSON"],
    ),
    "not an object": (lambda b: b.lines(*GOOD, "[1]"), ["bad.jsonl:7:", "expected a JSON object"]),
    "no text": (lambda b: b.lines(*GOOD, '{"id": "x"}'), ["bad.jsonl:7:", "no field 'text'", "id"]),
    "text is a number": (lambda b: b.lines(*GOOD, '{"text": 3}'), ["bad.jsonl:7:", "string"]),
    "label of 2": (
        lambda b: b.lines(*GOOD, line(label=2)),
        ["bad.jsonl:7:", "label is 2", "1 (member)"],
    ),
    "label is a word": (lambda b: b.lines(line(label="member")), ["bad.jsonl:1:", '"member"']),
    "empty file": (lambda b: b.lines(), ["bad.jsonl", "no texts"]),
    "blank lines": (lambda b: b.lines("", "", ""), ["bad.jsonl", "no texts"]),
    "one id, two texts": (
        lambda b: b.lines(line("karo", id="x"), *GOOD, line("mite", id="x")),
        ["'x'", "two different texts", "bad.jsonl:1", "bad.jsonl:8"],
    ),
    "binary": (
        lambda b: b.lines(b"\x7fELF\x02\x01\x00\xff\xfe"),
        ["bad.jsonl:1:", "not UTF-8", "binary"],
    ),
    "binary without a name": (
        lambda b: b.lines(bytes(range(256)), name="data.bin"),
        ["data.bin", "not UTF-8"],
    ),
    "prose": (lambda b: b.lines("hello", name="a.txt"), ["a.txt", "unknown kind", ".jsonl"]),
    "no such file": (lambda b: b.path / "none.jsonl", ["none.jsonl", "no such file"]),
    "a folder": (lambda b: b.target, ["is a folder"]),
    "below a file": (lambda b: b.data / "x.jsonl", ["x.jsonl", "cannot be read"]),
    "truncated gzip": (
        lambda b: b.lines(gzip.compress("\n".join(GOOD).encode())[:-9], name="x.jsonl.gz"),
        ["x.jsonl.gz", "truncated"],
    ),
    "truncated parquet": (
        lambda b: b.lines(b"PAR1 rest", name="x.parquet"),
        ["not a complete parquet"],
    ),
    "csv without text": (
        lambda b: b.lines("a,b", "1,2", name="x.csv"),
        ["x.csv:1", "no column 'text'"],
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case: str, box: Box, capsys):
    make, fragments = TEXTS[case]
    refuse(capsys, box, box.command(data=make(box)), 3, *fragments)


def test_one_of_two_files_is_missing(box: Box, capsys):
    none = box.path / "none.jsonl"
    command = box.command(data=None, members=box.lines(*GOOD), nonmembers=none)
    refuse(capsys, box, command, 3, "none.jsonl", "no such file")


def test_many_bad_lines_are_listed_and_counted(box: Box, capsys):
    path = box.lines(*['{"txt": "karo"}'] * 14)
    refuse(capsys, box, box.command(data=path), 3, "14 problems", "bad.jsonl:10:", "and 4 more")


def test_an_input_that_may_not_be_read(box: Box, capsys, monkeypatch: pytest.MonkeyPatch):
    real = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path == box.data:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    said = run(capsys, box.command())
    assert_one_line(said, 3, "texts.jsonl", "Permission denied")


# --- flags and settings ------------------------------------------------------------------------

USAGE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "attack": ({"attacks": "samma"}, ["unknown attack 'samma'", "did you mean 'sama'?"]),
    "one of two attacks": ({"attacks": "sama,losss"}, ["'losss'", "'loss'"]),
    "no attack": ({"attacks": ","}, ["no attack given", "sama"]),
    "preset": ({"preset": "offical"}, ["unknown preset 'offical'", "did you mean 'official'?"]),
    "setting": (
        {"set": "sama.step=8"},
        ["unknown setting 'sama.step'", "did you mean 'sama.steps'?"],
    ),
    "unlike any": ({"set": "zzz=8"}, ["unknown setting 'zzz'", "sama.steps"]),
    "group": ({"set": "sama=8"}, ["'sama' is a group", "steps"]),
    "no group": ({"set": "seed.x=8"}, ["'seed.x'", "not a group"]),
    "no value": ({"set": "sama.steps"}, ["expected key=value", "'sama.steps'"]),
    "number is a word": ({"set": "sama.steps=x"}, ["sama.steps", "int", "'x'"]),
    "word is unknown": ({"set": "sama.nesting=nestd"}, ["nesting", "did you mean 'nested'?"]),
    "flag is a word": ({"set": "sama.exclude_special=maybe"}, ["true or false", "'maybe'"]),
    "steps 0": ({"set": "sama.steps=0"}, ["steps", "at least 1"]),
    "density": ({"set": "sama.min_density=0.9"}, ["min_density", "0.9"]),
    "density nan": ({"set": "sama.max_density=nan"}, ["max_density", "nan"]),
    "preset by --set": ({"set": "preset=paper"}, ["preset", "--preset"]),
    "limit 0": ({"limit": 0}, ["--limit must be at least 1"]),
    "limit is a word": ({"limit": "ten"}, ["--limit", "'ten'"]),
    "batch size": ({"batch_size": 0}, ["--batch-size must be at least 1"]),
    "passes": ({"passes": 0}, ["--passes must be at least 1"]),
    "seed": ({"seed": -1}, ["seed", "-1"]),
    "seed is too large": ({"seed": 2**32}, ["seed", str(2**32)]),
    "length 0": ({"max_length": 0}, ["max_length", "0"]),
    "length is too large": ({"max_length": 65536}, ["max_length", "65536"]),
    "padding": ({"pad_to": 64}, ["pad_to", "--padding visible"]),
    "pad to less": ({"pad_to": 16, "padding": "visible"}, ["pad_to (16)", "max_length (32)"]),
    "dtype": ({"dtype": "float16"}, ["--dtype", "'float16'", "bfloat16"]),
    "no texts": ({"data": None}, ["--data F", "--members F"]),
    "half a split": ({"data": None, "members": "x"}, ["--data F", "--nonmembers F"]),
    "both kinds of texts": ({"members": "x", "nonmembers": "y"}, ["either --data F"]),
    "no target": ({"target": None}, ["--target"]),
    "unknown flag": ({"tempo": 3}, ["--tempo"]),
    "plan without sama": ({"attacks": "loss", "save_plan": "p.npz"}, ["--save-plan", "sama"]),
    "losses without sama": ({"attacks": "loss", "save_losses": "p.npz"}, ["--save-losses", "sama"]),
}


@pytest.mark.parametrize("case", USAGE)
def test_flags_and_settings(case: str, box: Box, capsys):
    changes, fragments = USAGE[case]
    refuse(capsys, box, box.command(**changes), 2, *fragments)


TRAINING: dict[str, tuple[list[str], list[str]]] = {
    "epochs nan": (["--epochs", "nan"], ["epochs", "finite", "nan"]),
    "epochs 0": (["--epochs", "0"], ["epochs must be positive"]),
    "rate": (["--lr", "inf"], ["learning_rate", "finite"]),
    "batch size": (["--batch-size", "0"], ["batch_size must be positive"]),
    "seed": (["--seed", "-1"], ["seed", "-1"]),
    "never a checkpoint": (["--set", "checkpoint_every=0"], ["checkpoint_every", "0"]),
    "clip": (["--set", "grad_clip=-1"], ["grad_clip must be positive"]),
    "decay": (["--set", "weight_decay=-0.1"], ["weight_decay >= 0", "-0.1"]),
    "eps": (["--set", "eps=1"], ["eps must lie between 0 and 1"]),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_settings(case: str, box: Box, capsys):
    flags, fragments = TRAINING[case]
    command = ["finetune", "--base", str(box.target), "--data", str(box.data), "--quiet"]
    refuse(capsys, box, [*command, "--out", str(box.out), *flags], 2, *fragments)


def test_the_demo_s_seed(box: Box, capsys):
    refuse(capsys, box, ["demo", "--seed", "-1", "--out", str(box.out)], 2, "seed", "-1")


def test_settings_that_limit_each_other_come_in_any_order(box: Box, capsys):
    """Each alone contradicts a default: 0.6 the highest density, 64 hidden padding."""
    pairs = ["sama.min_density=0.6", "sama.max_density=0.9", "pad_to=64", "padding=visible"]
    command = [*box.command(dry_run=True), *(x for pair in pairs for x in ("--set", pair))]
    assert run(capsys, command).code == 0


@pytest.mark.parametrize("change", [{"steps": 2.5}, {"steps": True}, {"exclude_special": "no"}])
def test_settings_of_another_type(change: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(change))):
        SamaSettings(**change)


def test_unknown_command(box: Box, capsys):
    refuse(capsys, box, ["audti"], 2, "audti", "audit", "--help")
    refuse(capsys, box, [], 2, "COMMAND")


@pytest.mark.parametrize("mask_id", [-1, 300])
def test_mask_id_outside_the_embedding(mask_id: int, box: Box, capsys):
    refuse(capsys, box, box.command(mask_id=mask_id), 4, str(mask_id), "300 rows")


def test_a_dry_run_writes_nothing(box: Box, capsys):
    before = contents(box.path)
    command = [part for part in box.command(dry_run=True) if part != "--quiet"]
    said = run(capsys, command)
    assert said.code == 0
    assert "20 texts, 160 forward passes" in said.err
    assert contents(box.path) == before
    assert not box.out.exists()


# --- output folders ----------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused_with_the_difference(box: Box, finished: Path, capsys):
    shutil.copytree(finished, box.out)
    (box.path / "other.jsonl").write_text("\n".join(GOOD))
    tiny.folder(box.path / "other", seed=2)
    for changes, fragments in [
        ({"preset": "paper"}, ["preset was 'default', is 'paper'", "sama.repeats was 1, is 4"]),
        ({"seed": 7}, ["seed was 42, is 7"]),
        ({"limit": 5}, ["texts was 20, is 5"]),
        ({"max_length": 16}, ["max_length was 32, is 16"]),
        ({"data": box.path / "other.jsonl"}, ["data was ", "texts was 20, is 6"]),
        ({"target": box.path / "other"}, ["target was "]),
        ({"reference": box.path / "other"}, ["reference was "]),
        ({"mask_id": 298}, ["mask_id was 299, is 298"]),
    ]:
        said = refuse(capsys, box, box.command(**changes), 2, str(box.out), *fragments)
        assert "belongs to another run; give --out a new folder" in said
    assert_complete(box.out, finished)


def test_a_folder_that_is_no_run_is_refused(box: Box, capsys):
    box.out.mkdir()
    (box.out / "thesis.tex").write_text("years of work")
    refuse(capsys, box, box.command(), 2, str(box.out), "not empty", "manifest.json", "new folder")


def test_a_folder_that_another_process_is_writing_to(box: Box, finished: Path, capsys):
    shutil.copytree(finished, box.out)
    other = files.AppendOnly(box.out / "losses" / "losses-00000.bin")
    refuse(capsys, box, box.command(), 2, "losses-00000.bin", "another process is writing to it")
    other.close()
    assert run(capsys, box.command()).code == 0
    assert_complete(box.out, finished)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_folder_with_a_damaged_demo(content: str, box: Box, capsys):
    box.out.mkdir()
    (box.out / "demo.json").write_text(content)
    refuse(capsys, box, ["demo", "--out", str(box.out)], 2, str(box.out), "no demo's folder")


def test_a_path_that_looks_like_markup_is_printed_as_it_is(box: Box, capsys):
    odd = box.path / "x[" / "y] :smile:"  # "[/y]" would close a style that is not open
    odd.parent.mkdir()
    box.target.rename(odd)
    said = run(capsys, [part for part in box.command(target=odd) if part != "--quiet"])
    assert said.code == 0
    assert f"target: {odd}, " in said.err


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b""])
def test_a_damaged_manifest_is_refused(content: bytes, box: Box, capsys):
    box.out.mkdir()
    (box.out / "manifest.json").write_bytes(content)
    refuse(capsys, box, box.command(), 2, "manifest.json", "not readable", "new folder")


def test_damaged_parts_are_refused(box: Box, finished: Path, capsys):
    shutil.copytree(finished, box.out)
    (box.out / "parts" / "scores-00000.jsonl").write_text('{"a": 1}\n')
    refuse(capsys, box, box.command(), 3, "scores-00000.jsonl", "no score", "move the file away")
    shutil.copytree(finished, box.out, dirs_exist_ok=True)
    (box.out / "losses" / "losses-00001.bin").mkdir()
    said = run(capsys, box.command())
    assert_one_line(said, 3, "losses-00001.bin", "cannot be read")


def test_an_output_below_a_file(box: Box, capsys):
    refuse(capsys, box, box.command(out=box.data / "x"), 74, str(box.data / "x"), "cannot write")
    refuse(capsys, box, box.command(out=box.data), 74, str(box.data), "cannot write")
    store = box.data / "store"
    assert_one_line(run(capsys, box.command(store=store)), 74, str(store), "cannot write")


@pytest.mark.parametrize("flag", ["save_plan", "save_losses"])
def test_a_replay_file_that_cannot_be_written(flag: str, box: Box, finished: Path, capsys):
    said = run(capsys, box.command(**{flag: box.data / "x.npz"}))
    assert_one_line(said, 74, "x.npz", "cannot write")
    assert run(capsys, box.command()).code == 0
    assert_complete(box.out, finished)


def test_report_of_a_folder_that_is_no_run(box: Box, finished: Path, capsys):
    refuse(capsys, box, ["report", str(box.path / "none")], 2, "none", "not a finished run")
    refuse(capsys, box, ["report", str(box.target)], 2, str(box.target), "not a finished run")
    refuse(capsys, box, ["report", str(box.data)], 2, str(box.data), "not a finished run")
    shutil.copytree(finished, box.out)
    (box.out / "scores.jsonl").unlink()
    refuse(capsys, box, ["report", str(box.out)], 2, "scores.jsonl", "same command")
    (box.out / "scores.jsonl").write_bytes(b"\xff\xfe")
    refuse(capsys, box, ["report", str(box.out)], 2, "scores.jsonl")
    (box.out / "scores.jsonl").unlink()
    (box.out / "scores.jsonl").mkdir()
    refuse(capsys, box, ["report", str(box.out)], 2, "scores.jsonl")


@pytest.mark.skipif(sys.platform != "linux", reason="names have at most 255 bytes there")
@pytest.mark.parametrize(("flag", "code"), [("target", 4), ("data", 3), ("plan", 3), ("out", 74)])
def test_a_name_that_is_too_long(flag: str, code: int, box: Box, capsys):
    refuse(capsys, box, box.command(**{flag: box.path / ("x" * 300)}), code, "x" * 300)


# --- a full disk -------------------------------------------------------------------------------


class FullDisk:
    """Lets this many bytes be written by way of `sama_jax.storage.files`, then the disk is full."""

    def __init__(self, room: float, monkeypatch: pytest.MonkeyPatch):
        self.room, self.used = room, 0
        disk, write_bytes = self, Path.write_bytes

        class Watched:
            def __init__(self, *args: Any, **kwargs: Any):
                self._file = open(*args, **kwargs)  # noqa: SIM115

            def write(self, data: bytes) -> int | None:
                return self._file.write(disk.take(data) or disk.full())

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

        def write_whole(path: Path, data: bytes) -> int:
            part = disk.take(data)
            written = write_bytes(path, part)
            return written if len(part) == len(data) else disk.full()

        monkeypatch.setattr(files, "open", Watched, raising=False)
        monkeypatch.setattr(Path, "write_bytes", write_whole)

    def take(self, data: bytes) -> bytes:
        """As much of `data` as there is room for; a disk fills up in the middle of a write."""
        part = data[: int(min(len(data), self.room - self.used))]
        self.used += len(part)
        return part

    def full(self) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_at_any_moment(box: Box, finished: Path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(float("inf"), patch)
        assert run(capsys, box.command(out=box.path / "roomy")).code == 0
        total = disk.used
    assert total > 10_000
    moments = [0, 100, *(total * i // 5 for i in range(1, 5)), total - 1]
    for room in moments:
        out = box.path / f"out-{room}"
        with pytest.MonkeyPatch.context() as patch:
            FullDisk(room, patch)
            said = run(capsys, box.command(out=out))
        line = assert_one_line(said, 74, str(out), "No space left on device", "free some space")
        assert line.endswith("it continues")
        assert not list(out.rglob("*.part"))
        for made in out.glob("*.json"):
            json.loads(made.read_text())
        assert run(capsys, box.command(out=out)).code == 0
        assert_complete(out, finished)


def test_a_disk_that_fills_up_leaves_a_good_result_alone(box: Box, finished: Path, capsys):
    shutil.copytree(finished, box.out)
    before = contents(box.out)
    for room in (0, 100, 3000):
        with pytest.MonkeyPatch.context() as patch:
            FullDisk(room, patch)
            assert_one_line(run(capsys, box.command()), 74, "No space left on device")
        after = contents(box.out)
        for name in ("scores.jsonl", "metrics.json", "report.md", "losses/losses-00000.bin"):
            assert after[name] == before[name]
        assert after.keys() == before.keys()
    assert run(capsys, box.command()).code == 0
    assert_complete(box.out, finished)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE with EFBIG")
@pytest.mark.parametrize(("limit", "named"), [(500, "manifest.json"), (6000, "losses-00000.bin")])
def test_a_limit_on_file_sizes(limit: int, named: str, box: Box, finished: Path, capsys):
    """What the operating system itself refuses, at the start and in the store."""
    said = run_process(box.command(), limit)
    assert_one_line(said, 74, named, "File too large", "cannot write")
    assert not list(box.out.rglob("*.part"))
    assert run(capsys, box.command()).code == 0
    assert contents(box.out).keys() == contents(finished).keys()
    for row, other in zip(scores(box.out), scores(finished), strict=True):
        assert row["id"] == other["id"]
        # One device there, eight here: equal up to rounding.
        assert row["scores"]["loss"] == pytest.approx(other["scores"]["loss"], abs=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE with EFBIG")
def test_a_limit_on_file_sizes_that_only_figures_exceed(box: Box, finished: Path, capsys):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        said = run(capsys, box.command())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line(said, 74, "figures", "File too large", "cannot write")
    assert not list(box.out.rglob("*.part"))
    assert scores(box.out) == scores(finished)
    assert run(capsys, box.command()).code == 0
    assert_complete(box.out, finished)


# --- the same text on both sides ---------------------------------------------------------------


def both_sides(box: Box) -> dict[str, Path | None]:
    members = box.lines(*GOOD[:4], line("dalfer novi"), name="members.jsonl")
    nonmembers = box.lines(line("dalfer novi"), line("sundal"), name="nonmembers.jsonl")
    return {"data": None, "members": members, "nonmembers": nonmembers}


def test_a_text_in_both_files_is_reported(box: Box, capsys):
    command = [part for part in box.command(**both_sides(box)) if part != "--quiet"]
    said = run(capsys, command)
    assert said.code == 0
    assert "note: texts that occur as member and as non-member: 1 (" in said.err
    assert "Traceback" not in said.err
    notes = json.loads((box.out / "manifest.json").read_text())["notes"]
    assert any(
        note.startswith("texts that occur as member and as non-member: 1 (") for note in notes
    )
    rows = scores(box.out)
    assert len(rows) == 7
    assert sorted(row["label"] for row in rows) == [0, 0, 1, 1, 1, 1, 1]


def test_a_text_in_both_files_under_strict(box: Box, capsys):
    said = run(capsys, box.command(**both_sides(box), strict=True))
    assert_one_line(
        said, 5, str(box.out), "--strict", "texts that occur as member and as non-member: 1 ("
    )
    assert len(scores(box.out)) == 7
    assert (box.out / "report.md").exists()
    assert json.loads((box.out / "manifest.json").read_text())["finished"] is True


def test_strict_is_silent_about_good_texts(box: Box, finished: Path, capsys):
    said = run(capsys, box.command(strict=True))
    assert (said.code, said.err) == (0, "")
    assert_complete(box.out, finished)


# --- replay ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(originals: Path) -> Path:
    box = Box(*(originals / n for n in ("", "target", "reference", "texts.jsonl", "planned")))
    path = originals / "plan.npz"
    assert entry.main(box.command(attacks="sama", save_plan=path)) == 0
    return path


def edit_plan(plan: Path, path: Path, **changes: Any) -> Path:
    with np.load(plan, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        else:
            arrays[name] = change(arrays[name].copy())
    np.savez(path, allow_pickle=False, **arrays)
    return path


def test_a_plan_of_another_max_length(plan: Path, box: Box, capsys):
    command = box.command(plan=plan, max_length=16)
    refuse(capsys, box, command, 2, "plan.npz", "--max-length 32", "16")


def test_a_plan_with_other_tokens(plan: Path, box: Box, capsys):
    def spoil(tokens: np.ndarray) -> np.ndarray:
        tokens[3, 0] += 1
        return tokens

    path = edit_plan(plan, box.path / "p.npz", tokens=spoil)
    refuse(capsys, box, box.command(plan=path), 3, "'t3'", "other tokens", "same tokenizer")


def test_a_plan_of_other_texts(plan: Path, box: Box, capsys):
    path = edit_plan(plan, box.path / "p.npz", ids=lambda ids: np.char.replace(ids, "t7", "u7"))
    refuse(capsys, box, box.command(plan=path), 3, "'t7'", "not in the plan")


@pytest.mark.parametrize("attacks", ["loss"])
def test_a_plan_without_sama(plan: Path, box: Box, capsys, attacks: str):
    refuse(capsys, box, box.command(plan=plan, attacks=attacks), 2, "--plan", "sama")


PLANS: dict[str, tuple[Callable[[Path, Box], Path], list[str]]] = {
    "missing": (lambda p, b: b.path / "none.npz", ["none.npz", "No such file"]),
    "a folder": (lambda p, b: b.target, ["not a plan file"]),
    "texts": (lambda p, b: b.data, ["texts.jsonl", "not a plan file"]),
    "truncated": (lambda p, b: b.lines(p.read_bytes()[:-50], name="p.npz"), ["not a plan file"]),
    "damaged": (
        lambda p, b: b.lines(
            p.read_bytes()[:900] + b"\xff" * 50 + p.read_bytes()[950:], name="p.npz"
        ),
        ["not a plan file"],
    ),
    "empty": (lambda p, b: b.lines(name="p.npz"), ["not a plan file"]),
    "an array": (
        lambda p, b: np.save(b.path / "p.npy", np.zeros(3)) or b.path / "p.npy",
        ["plan file"],
    ),
    "without masks": (lambda p, b: edit_plan(p, b.path / "p.npz", masks=None), ["masks"]),
    "other shapes": (
        lambda p, b: edit_plan(p, b.path / "p.npz", masks=lambda a: a[:, :1]),
        ["do not fit together", "scored"],
    ),
    "positions beyond the end": (
        lambda p, b: edit_plan(p, b.path / "p.npz", subsets=lambda a: np.full_like(a, 32)),
        ["positions beyond 31"],
    ),
    "words for tokens": (
        lambda p, b: edit_plan(p, b.path / "p.npz", tokens=lambda a: a.astype("U4")),
        ["tokens"],
    ),
    "bytes for ids": (
        lambda p, b: edit_plan(p, b.path / "p.npz", ids=lambda a: a.astype("S9")),
        ["ids"],
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plan_files(case: str, plan: Path, box: Box, capsys):
    make, fragments = PLANS[case]
    refuse(capsys, box, box.command(plan=make(plan, box)), 3, *fragments)


# --- processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "fragments"),
    [
        ({"attacks": "samma"}, 2, ["did you mean 'sama'?"]),
        ({"data": "none.jsonl"}, 3, ["none.jsonl: no such file"]),
        ({"reference": "none"}, 4, ["none: no such folder"]),
    ],
)
def test_the_exit_code_of_a_process(changes, code: int, fragments: list[str], box: Box):
    assert_one_line(run_process(box.command(**changes)), code, *fragments)
    assert not box.out.exists()


def test_usage_errors_do_not_import_jax(box: Box):
    code = (
        "import sys; from sama_jax.cli import main; code = main(sys.argv[1:]); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *box.command(preset="offical")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.parametrize(
    ("command", "after"),
    [
        (["bench", "--model", "m", "--data", "d"], "{} starts over"),
        (["plan", "--model", "m", "--topology", "cpu:2"], "{} starts over"),
        (["score", "--store", "s"], "what is finished is kept: {} continues"),
        (
            ["nll", "--model", "m", "--data", "d", "--out", "o"],
            "what is finished is kept: {} continues",
        ),
    ],
)
def test_an_interrupted_command_says_what_it_does_next(monkeypatch, capsys, command, after):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(f"sama_jax.cli.{command[0]}"), "run", stopped)
    assert entry.main(command) == 75
    said = capsys.readouterr().err
    given = f"sama-jax {' '.join(command)}"
    assert said == f"sama-jax: interrupted; {after.format(given)}\n"


@pytest.mark.parametrize("on_device", [False, True])
def test_memory_that_runs_out(monkeypatch, capsys, on_device: bool):
    """Of a device, as JAX reports it, and of the host: one line that says what needs less."""

    def too_much(_):
        (jnp if on_device else np).zeros(2**55, np.float32).block_until_ready()  # pyright: ignore

    monkeypatch.setattr(bench, "run", too_much)
    assert entry.main(["bench", "--model", "m", "--data", "d"]) == 71
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("sama-jax: out of memory (")
    assert ("RESOURCE_EXHAUSTED" in said) == on_device
    assert "a smaller --batch-size" in said
    assert "--models" not in said


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def wrong(_):
        raise RuntimeError("NOT_FOUND: something else")

    monkeypatch.setattr(bench, "run", wrong)
    with pytest.raises(RuntimeError, match="something else"):
        entry.main(["bench", "--model", "m", "--data", "d"])


def test_the_line_about_memory_is_found_among_others():
    """A GPU's error when no kernel of a product could be tried out; seen on an H200."""
    error = RuntimeError(
        "NOT_FOUND: All configs failed during profiling.\n"
        "EXECUTION FAILED: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 62.52GiB\n"
        "=== Source Location Trace: ===\nconfig_selector.cc:71\n"
    )
    expected = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 62.52GiB"
    assert failed_allocation(error) == expected
