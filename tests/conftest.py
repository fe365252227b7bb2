"""Checked shapes, eight CPU devices, strict broadcasting, full-precision products in every test.

At the end, the largest differences from PyTorch that the parity tests recorded, a line a family.
"""

import os
from pathlib import Path

# Compiling is most of the work here, and the programs run for milliseconds: with LLVM's expensive
# passes the suite takes half as long again, and with fusions made through MLIR a compilation takes
# a third longer. Processes that tests start inherit both.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the programs that users run.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()

from typing import runtime_checkable

import jax
import pytest
from flax.linen.linear import PromoteDtypeFn
from jaxtyping import install_import_hook

# Before the checker: settings check themselves, with messages for users.
import sama_jax.config  # noqa: F401

# Every call that a test makes in this process checks the shapes and types of its annotations. Not
# by jaxtyping's own pytest option, which takes no settings for more than one package. An int may
# stand for a float, as type checkers have it.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(["sama_jax", "checkpoints_convert"], CHECKER)
# The type of a field that `nn.Embed` hands down; Flax does not let it be checked.
runtime_checkable(PromoteDtypeFn)

from sama_jax.reporting import figures as pictures  # noqa: E402
from sama_jax.reporting import html  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
assert jax.device_count() == 8

# Processes that tests start share their compiled programs, and leave the user's cache alone. This
# process has imported JAX already, and compiles what it tests. A size makes JAX lock the folder.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "programs"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))


_WRITE_FIGURES, _SHOWN_FIGURES = pictures.write_figures, html.shown_figures


LONGEST = ("processes", "resume", "invariance", "outputs", "suite", "parallel", "bench",
           "partition", "views", "votes", "finetune", "kinds")  # fmt: skip
"""Files of over half a minute. They come first, so that both processes end at about one time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _no_figures():
    """Leaves the figures of audits out, which take a second each, unless a test uses `figures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "write_figures", lambda *_, **__: [])
        patch.setattr(html, "shown_figures", lambda *_, **__: [])
        yield


@pytest.fixture(scope="module")
def figures():
    """Lets audits draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "write_figures", _WRITE_FIGURES)
        patch.setattr(html, "shown_figures", _SHOWN_FIGURES)
        yield


@pytest.fixture
def record_parity(record_property):
    """`record_parity(family, logits, losses)`: largest absolute differences of one comparison."""

    def record(family: str, logits: float, losses: float) -> None:
        record_property("parity", [family, float(logits), float(losses)])

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With several processes, too: properties travel with the reports."""
    worst: dict[str, tuple[float, float]] = {}
    for group in terminalreporter.stats.values():
        for outcome in group:
            if getattr(outcome, "when", None) != "call":
                continue
            for name, value in outcome.user_properties:
                if name == "parity":
                    family, *found = value
                    worst[family] = tuple(map(max, worst.get(family, (0.0, 0.0)), found))
    if worst:
        terminalreporter.section("largest differences from PyTorch in float32")
        for family, (logits, losses) in sorted(worst.items()):
            terminalreporter.line(f"{family:<14} logits {logits:.1e}  losses {losses:.1e} nats")
