"""The recipe "add a model family", executed as the page shows it."""

import importlib
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from sama_jax.core.losses import token_nll
from sama_jax.errors import ModelError
from sama_jax.models import families, registry
from sama_jax.weights import loading, model_folder

PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "add_a_family.md"
ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
CONFIG = {
    "model_type": "toy",
    "architectures": ["ToyForMaskedDiffusion"],
    "rows": tiny.VOCAB,
    "dim": 16,
    "layers": 3,
    "heads": 2,
    "inner": 32,
}
NAMES = {
    "model.transformer.wte": "tokens",
    "model.transformer.ln_f": "norm",
    "model.transformer.ff_out": "output",
    "attn_norm": "norm_1",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "attn_out": "out",
    "ff_norm": "norm_2",
    "ff_proj": "gate",
    "up_proj": "up",
    "ff_out": "down",
}
"""LLaDA's name of a module -> the toy's."""


def block(kind: str) -> str:
    """Returns the page's one block in a language."""
    (code,) = re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    return code


def toy_name(name: str) -> str:
    """Returns what the toy calls one of LLaDA's tensors."""
    module = name.removesuffix(".weight")
    if found := re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)", module):
        return f"layers.{found[1]}.{NAMES[found[2]]}.weight"
    return f"{NAMES[module]}.weight"


@pytest.fixture
def in_families(tmp_path, monkeypatch):
    """Puts the page's file where a user does, as far as Python's imports see."""
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "toy.py").write_text(block("python"), "utf-8")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    yield
    sys.modules.pop(f"{families.__name__}.toy", None)


@pytest.fixture
def folders(tmp_path):
    """Writes a LLaDA folder and the toy's with the same weights."""
    llada, toy = tiny.folder(tmp_path / "llada", n_layers=3, weight_tying=False), tmp_path / "toy"
    toy.mkdir()
    tensors = load_file(llada / "model.safetensors")
    save_file({toy_name(k): v for k, v in tensors.items()}, toy / "model.safetensors")
    (toy / "config.json").write_text(json.dumps(CONFIG))
    (toy / "tokenizer.json").write_bytes((llada / "tokenizer.json").read_bytes())
    return llada, toy


def states_and_losses(path: Path) -> list[np.ndarray]:
    """Runs a folder's model on half-masked texts, one of them padded."""
    folder = model_folder.open_folder(path)
    params = loading.load(folder, ONE_DEVICE)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, tiny.MASK_ID, (3, 12)).astype(np.int32)
    masked = np.where(draw.random(tokens.shape) < 0.5, folder.model.mask_id, tokens)
    valid = np.arange(12)[None, :] < np.array([12, 12, 7])[:, None]
    hidden = folder.model.hidden(params, jnp.asarray(masked), jnp.asarray(valid))
    rows = hidden.reshape(-1, hidden.shape[-1])
    losses = token_nll(folder.model, params, rows, jnp.asarray(tokens.reshape(-1)))
    return [np.asarray(hidden), np.asarray(losses)]


def test_the_recipe_is_one_file_of_at_most_50_lines():
    assert len(block("python").strip().splitlines()) <= 50


def test_the_family_of_the_recipe_computes_what_its_twin_does(in_families, folders):
    llada, toy = folders
    assert model_folder.open_folder(toy).family.family == "toy"
    for theirs, ours in zip(states_and_losses(llada), states_and_losses(toy), strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)


def test_a_tensor_that_the_table_does_not_name_is_refused(in_families, folders):
    _, toy = folders
    tensors = load_file(toy / "model.safetensors")
    save_file(tensors | {"layers.0.gain": np.ones(16, "f")}, toy / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.0\.gain"):
        model_folder.open_folder(toy)


def test_without_its_file_the_family_is_unknown(folders):
    with pytest.raises(ModelError, match="'toy', which is not a supported family"):
        model_folder.open_folder(folders[1])


def install(site: Path, code: str) -> None:
    """Writes a package that brings the page's file by the page's entry point."""
    info = site / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "toy.py").write_text(code, "utf-8")
    entry = block("toml").replace("project.entry-points.", "").replace('"', "")
    (info / "entry_points.txt").write_text(entry)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")


def test_another_package_brings_a_family_by_an_entry_point(tmp_path, monkeypatch):
    install(tmp_path / "site", block("python"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    assert registry.read_config(CONFIG, "here").family == "toy"
    sys.modules.pop("toy")


def test_a_package_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    install(tmp_path / "site", "1 / 0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    with pytest.raises(ModelError, match="'toy' of another package cannot be loaded"):
        registry.read_config(CONFIG, "here")
