"""Python files of the folder where a command is given never run, however it is started."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny

from sama_jax import isolation
from sama_jax.devices import processes
from sama_jax.devices.child_process import start
from sama_jax.devices.rank import Place

ROOT = Path(__file__).parents[2]
HOSTILE = (
    *("typing_extensions", "numpy", "jax", "tokenizers", "rich", "transformers", "torch", "yaml"),
    *("flax", "safetensors", "scipy", "jaxtyping", "orbax", "sklearn", "matplotlib"),
    *("typing", "dataclasses", "argparse", "json", "pathlib", "socket", "subprocess", "hashlib"),
)
"""Names that some command imports, of packages and of the standard library. `python -m` itself
imports more before it comes to any module, such as `contextlib`: from a file of that name only the
console scripts are safe."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder that works, with files that leave a mark when they run."""
    root = tmp_path_factory.mktemp("hostile")
    model = tiny.folder(root / "model")
    tiny.folder(root / "base", seed=1)
    tiny.write_texts(root / "t.jsonl", tiny.texts(2))
    trap = f"open({str(root / 'MARK')!r}, 'a').write(__name__ + ' ')\nraise ImportError('trap')\n"
    for name in HOSTILE:
        (model / f"{name}.py").write_text(trap)
    return root


SCRIPT = "import sys; sys.path[0] = {home!r}; from {module} import main; sys.exit(main())"
"""What a console script does: Python puts the script's folder first, not the current one."""
AUDIT = ["--target", ".", "--reference", "../base", "--data", "../t.jsonl", "--max-length", "16"]
COMMANDS = {
    "audit": ["audit", *AUDIT, "--attacks", "loss", "--out", "../run", "--no-figures", "--quiet"],
    "plan": ["plan", "--model", ".", "--topology", "cpu:1", "--max-length", "16", "--quiet"],
    "attacks": ["attacks"],
    "inspect": ["inspect", "."],
    "to-hf": ["to-hf", ".", "../out", "--quiet"],
}


def environment(**changes: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return env | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | changes


def run(place: Path, command: list[str], **changes: str) -> str:
    done = subprocess.run(
        command,
        cwd=place / "model",
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not (place / "MARK").exists(), (place / "MARK").read_text()
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_given_inside_a_hostile_folder(place: Path, name: str):
    package = "checkpoints_convert" if name in ("inspect", "to-hf") else "sama_jax"
    command = COMMANDS[name]
    if name in ("attacks", "inspect"):
        if package == "checkpoints_convert":  # Python itself would run one of that name
            shutil.copy(place / "model" / "numpy.py", place / "model" / "sama_jax.py")
        run(place, [sys.executable, "-m", package, *command], PYTHONPATH=str(ROOT))
    else:
        # An empty entry is the current folder, for whoever adds to an unset variable.
        script = SCRIPT.format(home=str(ROOT), module=f"{package}.__main__")
        run(place, [sys.executable, "-c", script, *command], PYTHONPATH=f":{ROOT}:")


def test_children_find_this_package_and_nothing_of_the_current_folder(place, monkeypatch, capfd):
    """Those of supervisors, and what they start in turn."""
    monkeypatch.chdir(place / "model")
    monkeypatch.setenv("PYTHONPATH", f":.:{ROOT / 'nowhere'}")
    code = "import sama_jax, numpy, subprocess, sys; print(sama_jax.__file__, numpy.__file__)"
    grandchild = f"{code}; sys.exit(subprocess.call([sys.executable, '-c', {code!r}]))"
    assert start(["-c", grandchild]).wait() == 0
    assert processes.supervise(["-c", grandchild], Place("127.0.0.1:0", 1, 0), *ONE) == 0
    printed = capfd.readouterr().out.splitlines()
    assert len(printed) == 4
    assert {line.split()[0] for line in printed} == {str(ROOT / "sama_jax" / "__init__.py")}
    assert not (place / "MARK").exists(), (place / "MARK").read_text()


ONE = (processes.Bounds(), "kept", b"0123456789abcdef")


def test_a_source_tree_is_found_from_inside_and_a_path_of_ones_own_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), "/usr/lib/x"])
    monkeypatch.setenv("PYTHONPATH", ".")
    isolation.isolate()
    assert sys.path == [str(ROOT), "/usr/lib/x"]
    assert os.environ["PYTHONPATH"] == str(ROOT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/usr/lib/x", str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    isolation.isolate()  # an editable installation of the folder itself stays
    assert sys.path == ["/usr/lib/x", str(tmp_path)]


def test_the_console_scripts_start_where_they_are_isolated():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {
        "sama-jax": "sama_jax.__main__:main",
        "checkpoints-convert": "checkpoints_convert.__main__:main",
    }


def test_ctrl_c_during_imports_ends_without_a_traceback():
    code = """
import builtins, signal
before = builtins.__import__
def start(name, *args):
    if name == "sama_jax.cli.entry":
        signal.raise_signal(signal.SIGINT)
    return before(name, *args)
builtins.__import__ = start
import sama_jax.__main__
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_both_start_files_import_nothing_before_they_are_isolated():
    """What `python -m` has loaded by itself may stand before; see `isolation`."""
    loaded = {"os", "sys", "sama_jax.isolation"}
    for package in ("sama_jax", "checkpoints_convert"):
        tree = ast.parse((ROOT / package / "__main__.py").read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= loaded
            elif isinstance(node, ast.ImportFrom):
                assert node.module in loaded
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                break  # isolate()
        else:
            raise AssertionError(package)
    first = ast.parse((ROOT / "sama_jax" / "__init__.py").read_text()).body
    assert [n.module for n in first if isinstance(n, ast.ImportFrom)] == ["importlib"]
    assert not any(isinstance(n, ast.Import) for n in first)
