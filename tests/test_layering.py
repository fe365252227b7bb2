"""Holds every file to the folders that its own folder may import, read from the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = {"arrays", "config", "errors", "gguf_header", "isolation", "ranges", "rng", "terminal"}
WORDS |= {"untrusted"}
"""The files that everybody uses; they import each other only."""

LAYERS = {
    folder: set(row.split())
    for folder, row in {
        "core": "",
        "attacks": "core",
        "models": "",
        "texts": "",
        "storage": "",
        "validity": "core texts",
        "weights": "models texts storage",
        "devices": "core models storage",
        "engine": "core attacks models texts storage weights devices",
        "training": "core models texts storage weights",
        "reporting": "core storage validity",
        "programs": "core attacks models texts storage validity weights devices engine training "
        "reporting",
        "cli": "attacks texts storage devices reporting programs",
    }.items()
}
"""Folder -> the folders that it may import, besides the words. Lower layers stand first."""

ONLY_IN = {
    "flax": ("sama_jax.models",),
    # pickled: .bin weights, on request only, through torch's weights-only loading.
    "torch": ("sama_jax.programs.bench", "sama_jax.weights.pickled", "checkpoints_convert.verify"),
    "gguf": ("sama_jax.weights.gguf_source",),
    "jax_privacy": ("sama_jax.core.epsilon", "sama_jax.training.privacy"),
    "optax": ("sama_jax.training",),
    "orbax": ("sama_jax.weights",),
    # The PyTorch side reads weights by itself, not through what it checks.
    "safetensors": ("sama_jax.weights", "sama_jax.programs.bench"),
    "matplotlib": tuple(f"sama_jax.reporting.{name}" for name in ("figures", "plots", "svg")),
    "jinja2": ("sama_jax.reporting.html",),
    "tokenizers": ("sama_jax.texts", "sama_jax.training"),
    "yaml": ("sama_jax.storage.yaml_file",),
    "sklearn": ("sama_jax.core.metrics", "sama_jax.attacks.corpus", "sama_jax.validity.blind"),
    "pickle": (),
    # Every process is started in one place, which keeps the current folder off its module path.
    "subprocess": ("sama_jax.devices.child_process",),
    "multiprocessing": (),
}
"""Heavy or special libraries -> the only places that may import them."""

NO_JAX = (
    "sama_jax.config",
    "sama_jax.errors",
    "sama_jax.ranges",
    "sama_jax.terminal",
    "sama_jax.isolation",
    "sama_jax.gguf_header",
    "sama_jax.untrusted",
    "sama_jax.cli",
    "sama_jax.storage.files",
    "sama_jax.storage.loss_store",
    "sama_jax.storage.run_folder",
    "sama_jax.devices.child_process",
    "sama_jax.devices.processes",
    "sama_jax.programs.jobs",
)


def modules() -> dict[str, Path]:
    """Returns every shipped module by its dotted name, but for the public API in `sama_jax`."""
    found = {}
    for package in ("sama_jax", "checkpoints_convert"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if name != "sama_jax":
                found[name] = path
    return found


MODULES = modules()


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Returns everything that a file imports; without `lazy`, only what it imports at its top."""
    names = set()
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else node.module)
    return names


def folder(name: str) -> str:
    """Returns the part of a module's name that the layers speak of."""
    return name.split(".")[1] if "." in name else name


def test_every_folder_has_a_row_and_the_rows_are_in_order():
    folders = {p.name for p in (ROOT / "sama_jax").iterdir() if (p / "__init__.py").is_file()}
    assert folders == set(LAYERS)
    below: set[str] = set()
    for name, allowed in LAYERS.items():
        assert allowed <= below, f"{name} may import {sorted(allowed - below)}, which stand above"
        below.add(name)


@pytest.mark.parametrize("name", LAYERS)
def test_a_folder_says_itself_what_it_may_import(name):
    source = (ROOT / "sama_jax" / name / "__init__.py").read_text("utf-8")
    sentence = re.search(r"May import ([^.;]*)", ast.get_docstring(ast.parse(source)) or "")
    assert sentence, f"{name}/__init__.py has no sentence that begins with 'May import'"
    assert set(re.findall(r"`(\w+)`", sentence[1])) & set(LAYERS) == LAYERS[name]


def test_the_map_of_the_contributors_guide_says_the_same():
    guide = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*)\|$", guide, re.M)
    assert [(name, set(re.findall(r"\w+", row))) for name, row in rows] == list(LAYERS.items())


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("sama_jax")])
def test_imports_point_downwards(name):
    own = folder(name)
    if own == "__main__":
        return
    allowed = WORDS | ({own} | LAYERS[own] if own in LAYERS else set())
    for imported in imports(MODULES[name]):
        package, _, rest = imported.partition(".")
        assert package != "checkpoints_convert", f"{name} imports {imported}"
        if package == "sama_jax" and rest:
            assert folder(imported) in allowed, f"{name} imports {imported}"


def test_no_file_imports_itself_through_others():
    graph = {name: imports(path) & set(MODULES) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join((*trail, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_command_line_imports_what_needs_jax_only_when_it_runs_a_command():
    light = {"config", "errors", "terminal", "untrusted", "cli", "programs.jobs"}
    light |= {f"devices.{name}" for name in ("child_process", "rank", "processes", "secret")}
    light.add("devices.compile_cache")
    for name, path in MODULES.items():
        if name.startswith("sama_jax.cli"):
            early = {i.split(".", 1)[1] for i in imports(path, lazy=False) if "sama_jax." in i}
            early = {i for i in early if not i.startswith("cli.")}
            assert early <= light, f"{name} imports {early - light}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_special_libraries_stay_in_their_places(library):
    for name, path in MODULES.items():
        if library in {imported.split(".")[0] for imported in imports(path)}:
            assert name.startswith(ONLY_IN[library] or "-"), f"{name} imports {library}"


def test_what_is_printed_passes_one_place():
    """Consoles of another make would let control characters of foreign names through."""
    for name, path in MODULES.items():
        if name != "sama_jax.terminal":
            assert not re.search(
                r"\bConsole\(|\bstd(out|err)\.buffer\b", path.read_text("utf-8")
            ), name


@pytest.mark.parametrize("prefix", NO_JAX)
def test_plain_modules_do_not_import_jax(prefix):
    found = [name for name in MODULES if name.startswith(prefix)]
    assert found
    for name in found:
        early = {i.split(".")[0] for i in imports(MODULES[name], lazy=False)}
        assert not early & {"jax", "jaxlib"}, name


def test_importing_everything_starts_no_backend_and_no_nnx():
    # The PyTorch side imports torch on top; it is imported itself only when it runs.
    torch_side = ("adapter", "double", "reference", "sama", "side")
    lazy = ("__main__", *(f"torch_{name}" for name in torch_side))
    names = [n for n in MODULES if not n.endswith(lazy)]
    code = (
        "import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a backend was started'\n"
        "assert 'flax.nnx' not in sys.modules, 'flax.nnx was imported'\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)


def test_import_is_light_and_free_of_warnings():
    code = "import sys, sama_jax; assert not {'jax', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=60)
    public = "import sama_jax; [getattr(sama_jax, name) for name in sama_jax.__all__]"
    subprocess.run([sys.executable, "-c", public], check=True, cwd=ROOT, timeout=300)
