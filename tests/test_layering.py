"""Who may import whom: every file only from rows above its own, read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Top to bottom; files of one row do not import each other (packages may inside themselves).
ROWS = [
    {"sama_jax.errors", "sama_jax.arrays"},
    {"sama_jax.config", "sama_jax.rng"},
    {
        "sama_jax.core.masking",
        "sama_jax.core.losses",
        "sama_jax.core.votes",
        "sama_jax.core.metrics",
    },
    {"sama_jax.attacks"},
    {"sama_jax.storage.files", "sama_jax.devices.processes"},
    {
        "sama_jax.models",
        "sama_jax.texts.data",
        "sama_jax.devices.parallel",
        "sama_jax.weights.orbax",
        "sama_jax.storage.loss_store",
        "checkpoints_convert",
    },
    {"sama_jax.devices.memory", "sama_jax.devices.compile_ahead"},
    {"sama_jax.weights.orbax_source"},
    {
        "sama_jax.engine.output_position",
        "sama_jax.devices.compile_cache",
        "sama_jax.weights.model_folder",
        "sama_jax.terminal",
        "sama_jax.storage.replay",
        "sama_jax.storage.run_folder",
    },
    {"checkpoints_convert.verify"},
    {"sama_jax.engine.reading"},
    {"sama_jax.reporting.report", "sama_jax.training.step", "sama_jax.engine.scoring"},
    {"checkpoints_convert.convert", "checkpoints_convert.describe"},
    {
        "sama_jax.programs.audit",
        "sama_jax.programs.bench.bench",
        "sama_jax.training.finetune",
        "sama_jax.programs.nll",
        "sama_jax.programs.catalogue",
        "sama_jax.programs.capacity",
    },
    {"sama_jax.programs.demo", "sama_jax.programs.rescore"},
    {"sama_jax.programs.experiment", "sama_jax.programs.merge"},
    {"sama_jax.cli.main"},
    {"sama_jax.__main__", "checkpoints_convert.__main__"},
]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
# Heavy or special libraries and the only places that may import them.
ONLY_IN = {
    "flax": {"sama_jax.models"},
    # pickled: .bin weights, on request only, through torch's weights-only loading.
    "torch": {"checkpoints_convert.verify", "sama_jax.weights.pickled"},
    "optax": {"sama_jax.training.step"},
    "orbax": {"sama_jax.weights.orbax"},
    # verify's PyTorch side reads weights by itself, not through what it checks.
    "safetensors": {"checkpoints_convert", "checkpoints_convert.verify"},
    "matplotlib": {"sama_jax.reporting.report"},
    "pickle": set(),
}
NO_JAX = {
    "sama_jax.devices.processes",
    "sama_jax.config",
    "sama_jax.errors",
    "sama_jax.storage.files",
    "sama_jax.storage.loss_store",
}


def modules() -> dict[str, Path]:
    """Every shipped module by its dotted name; the package's own __init__ is the public API."""
    found = {}
    for package in ("sama_jax", "checkpoints_convert"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if name != "sama_jax":
                found[name] = path
    return found


def unit(name: str) -> str | None:
    """The row entry that a module belongs to: itself, or its package."""
    parts = name.split(".")
    while parts:
        if ".".join(parts) in LEVEL:
            return ".".join(parts)
        parts.pop()
    return None


def imports(path: Path) -> set[str]:
    """Everything a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", modules())
def test_imports_point_upwards(name):
    own = unit(name)
    assert own is not None, f"{name} has no row; add it to ROWS and to docs/design.md"
    for imported in imports(modules()[name]):
        if not imported.startswith(("sama_jax", "checkpoints_convert")):
            continue
        other = unit(imported)
        if other is None:
            assert imported == "sama_jax.__version__", f"{name} imports {imported}"
        elif other != own:
            assert LEVEL[other] < LEVEL[own], f"{name} imports {imported}, which is not above it"


@pytest.mark.parametrize("library", ONLY_IN)
def test_special_libraries_stay_in_their_places(library):
    for name, path in modules().items():
        roots = {imported.split(".")[0] for imported in imports(path)}
        if library in roots:
            allowed = ONLY_IN[library]
            assert name in allowed or unit(name) in allowed, f"{name} imports {library}"


@pytest.mark.parametrize("name", sorted(NO_JAX))
def test_plain_modules_do_not_import_jax(name):
    assert not {i for i in imports(modules()[name]) if i.split(".")[0] in ("jax", "jaxlib")}


def test_importing_everything_starts_no_backend_and_no_nnx():
    # The PyTorch side of verify imports torch on top; it is imported itself only when it runs.
    lazy = ("__main__", "verify.torch_reference", "verify.torch_sama")
    names = [n for n in modules() if not n.endswith(lazy)]
    code = (
        "import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a backend was started'\n"
        "assert 'flax.nnx' not in sys.modules, 'flax.nnx was imported'\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)


def test_import_is_quick_and_free_of_warnings():
    code = (
        "import time; start = time.perf_counter()\n"
        "import sama_jax\n"
        "assert time.perf_counter() - start < 2\n"
        "import sys; assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=60)
    public = "import sama_jax; [getattr(sama_jax, name) for name in sama_jax.__all__]"
    subprocess.run([sys.executable, "-c", public], check=True, cwd=ROOT, timeout=300)
