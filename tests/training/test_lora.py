"""Adapters that are trained here: PEFT computes the same with them, and so does an audit."""

import contextlib
import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import peft
import pytest
import tiny
import torch
from safetensors.numpy import load_file

from sama_jax.cli import entry
from sama_jax.config import LoraSettings, TrainSettings
from sama_jax.errors import Interrupted, ModelError, UsageError
from sama_jax.programs import finetune
from sama_jax.training import loop, lora
from sama_jax.weights import loading, model_folder, saving
from sama_jax.weights.orbax import Checkpoints

TEXTS = tiny.texts(12, (8, 14))
LORA = LoraSettings(r=3, alpha=12)
SETTINGS = TrainSettings(epochs=4, batch_size=4, learning_rate=3e-2, max_length=32, lora=LORA)
LLADA = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48, "vocab_size": 300}


def _llada(path: Path) -> Any:
    module = oracle.random_folder(path, oracle.config(**LLADA), seed=0)
    return module, lambda tokens, valid: module(tokens, valid)[0]


BASES = {
    "llada": (_llada, {}),
    "llada, some targets": (_llada, {"targets": "q_proj+v_proj", "rslora": True}),
    "llada, head and blocks": (_llada, {"targets": "ff_out"}),
}


def with_tokenizer(base: Path) -> None:
    """Adds a tokenizer."""
    made = tiny.tokenizer()
    made.save(str(base / "tokenizer.json"))


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def logits(folder: model_folder.ModelFolder, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    raw = dataclasses.replace(folder.model, shift=False)  # pyright: ignore  as PyTorch's are
    given = jnp.asarray(tokens), jnp.asarray(valid)
    params = loading.load(folder, loop.device())

    @jax.jit
    def forward(params: Any) -> Any:
        return raw.logits(params, raw.hidden(params, *given))

    return np.asarray(forward(params))


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
@pytest.mark.parametrize("name", BASES)
def test_peft_computes_the_same_with_an_adapter_that_is_trained_here(tmp_path, name):
    make, options = BASES[name]
    module, forward = make(tmp_path / "base")
    with_tokenizer(tmp_path / "base")
    data, out = write(tmp_path / "texts.jsonl", TEXTS), tmp_path / "out"
    settings = dataclasses.replace(SETTINGS, lora=dataclasses.replace(LORA, **options))
    result = finetune.finetune(tmp_path / "base", data, out, settings, quiet=True)
    assert result["nll_after"] < result["nll_before"] - 0.02
    assert {file.name for file in out.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "train.json", "log.jsonl")
    }
    tokens = np.random.default_rng(0).integers(1, 290, (2, 16)).astype(np.int32)
    valid = np.arange(16)[None] < np.array([[16], [11]])
    given = torch.from_numpy(tokens).long(), torch.from_numpy(valid)
    with torch.no_grad():
        before = forward(*given).numpy()
        loaded = peft.PeftModel.from_pretrained(module, out).eval()  # it changes `module`
        theirs = forward(*given).numpy()
    assert len([n for n in loaded.state_dict() if ".lora_A." in n]) == len(
        [n for n in load_file(out / "adapter_model.safetensors") if ".lora_A." in n]
    )
    assert np.abs(theirs - before)[valid].max() > 0.05
    for merge in (False, True):
        folder = model_folder.open_folder(tmp_path / "base", adapter=out, merge=merge)
        ours = logits(folder, tokens, valid)
        np.testing.assert_allclose(ours[valid], theirs[valid], rtol=0, atol=1e-5)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A base, texts, and an adapter that nothing interrupted."""
    root = tmp_path_factory.mktemp("lora")
    tiny.folder(root / "base", n_layers=2)
    write(root / "texts.jsonl", TEXTS)
    tune(root, "whole")
    return root


def tune(root: Path, out: str, settings: TrainSettings = SETTINGS, **more: Any) -> dict[str, Any]:
    given = root / "base", root / "texts.jsonl", root / out, settings
    return finetune.finetune(*given, quiet=True, **more)


def test_an_interrupted_adapter_continues_bit_for_bit(inputs, monkeypatch):
    original = loop.batch_rows

    def rows(seed, at, *args):
        if at == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(seed, at, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batch_rows", rows)
        with pytest.raises(Interrupted):
            tune(inputs, "resumed")
    with Checkpoints(inputs / "resumed" / "checkpoints") as checkpoints:
        assert checkpoints.steps == [7]
    size = sum(f.stat().st_size for f in (inputs / "resumed/checkpoints").rglob("*"))
    assert not (inputs / "resumed/adapter_config.json").exists()
    tune(inputs, "resumed")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (inputs / "resumed" / name).read_bytes() == (inputs / "whole" / name).read_bytes()
    assert size > 0
    assert tune(inputs, "whole")["steps"] == 12  # finished: at once


def test_the_state_holds_nothing_of_the_base():
    """The adapter and its two moments are all that is trained, kept and saved."""
    family, model = _family()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    adapter = lora.plan(LORA, shapes, family.weights, model.num_layers, "base")
    drawn = jax.eval_shape(lambda: lora.init(adapter, jax.random.key(0)))
    trained = sum(leaf.size for leaf in jax.tree.leaves(drawn))
    recipe = loop.make_recipe(SETTINGS, 10)
    state = jax.eval_shape(lambda: loop.init_state(lora.init(adapter, jax.random.key(0)), recipe))
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    counters = 3
    assert held == 3 * trained + counters
    # q, k, v and o of 16 -> 16, and gate, up and down of 16 and 32, in two layers.
    assert trained == 2 * 3 * (4 * (16 + 16) + 3 * (16 + 32))


def _family() -> Any:
    from sama_jax.models.registry import build_model, read_config

    family = read_config(tiny.config(n_layers=2), "config.json")
    return family, build_model(family, tiny.MASK_ID, np.dtype("float32"))


def test_base_and_adapter_score_as_the_merged_folder(inputs, tmp_path):
    base, out = inputs / "base", inputs / "whole"
    folder = model_folder.open_folder(base, adapter=out, merge=True)
    params = loading.load(folder, loop.device())
    weights = folder.family.weights
    saving.save_folder(tmp_path / "merged", params, folder.model, folder.config, base, weights)
    texts = tiny.write_texts(tmp_path / "audited.jsonl", TEXTS[:6] + tiny.texts(6, seed=9))
    command = ["audit", "--reference", base, "--data", texts, *tiny.SETTINGS, "--quiet"]
    command += ["--attacks", "sama,loss"]
    for name, target in {
        "beside": ["--target", base, "--adapter", out],
        "merged": ["--target", tmp_path / "merged"],
    }.items():
        given = [*command, *target, "--out", tmp_path / f"run-{name}"]
        # The base has learnt nothing, so the run may be void; its scores are written all the same.
        assert entry.main([str(x) for x in given]) in (0, 5)
    beside, merged = (
        [json.loads(line)["scores"] for line in scored.read_text().splitlines()]
        for scored in (tmp_path / f"run-{n}" / "scores.jsonl" for n in ("beside", "merged"))
    )
    for attack in ("sama", "loss"):
        a, b = (np.array([one[attack] for one in rows]) for rows in (beside, merged))
        np.testing.assert_allclose(a, b, rtol=0, atol=0.2 if attack == "sama" else 1e-5)
        assert np.ptp(a) > 0


def test_another_rank_is_another_run_and_no_adapter_is_a_run_of_before(inputs):
    other = dataclasses.replace(SETTINGS, lora=dataclasses.replace(LORA, r=2))
    with pytest.raises(UsageError, match="belongs to another training run"):
        tune(inputs, "whole", other)
    plain = dataclasses.replace(SETTINGS, lora=LoraSettings(), epochs=0.3)
    tune(inputs, "plain", plain)
    told = json.loads((inputs / "plain/train.json").read_text())
    assert "lora" not in told["identity"]["settings"]


def test_flags_say_the_adapter(inputs):
    command = ["finetune", "--base", inputs / "base", "--data", inputs / "texts.jsonl", "--quiet"]
    command += ["--out", inputs / "flags", "--epochs", 0.3, "--max-length", 32]
    more = ["--lora", "r=2,alpha=6,targets=q_proj+ff_out,rslora", "--held-out"]
    held = write(inputs / "held.jsonl", tiny.texts(3, seed=5))
    assert entry.main([str(x) for x in [*command, *more, held]]) == 0
    told = json.loads((inputs / "flags/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(inputs / "base")
    assert (told["r"], told["lora_alpha"], told["use_rslora"]) == (2, 6, True)
    layers = [f"transformer.blocks.{i}.ff_out" for i in range(2)]
    # The short name would choose the head, too, if this model had one of its own.
    assert told["target_modules"] in (["ff_out", "q_proj"], [*layers, "q_proj"])


WRONG = {
    "targets=nothing": "names 'nothing', which is no layer of this model",
    "targets=wte": "chooses transformer.wte, an embedding",
    "targets=blocks.0.q_proj": None,
    "targets=": "expected 'all', or names",
}


@pytest.mark.parametrize("given", WRONG)
def test_targets_that_cannot_be_are_one_line(given, inputs, tmp_path, capsys):
    base = tiny.folder(tmp_path / "base", n_layers=3)
    command = ["finetune", "--base", base, "--data", inputs / "texts.jsonl", "--quiet"]
    command += ["--out", tmp_path / "out", "--max-length", 32, "--lora", f"r=2,{given}"]
    early = given == "targets="  # no model is looked at
    with pytest.raises(SystemExit) if early else contextlib.nullcontext():
        assert entry.main([str(x) for x in command]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert (WRONG[given] or "not all layers of its stack") in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", [["r=2", "--set", "lora.alpha=3"], ["r=2,r=3"], ["r"], ["r=2,rank=3"], ["r=x"]]
)
def test_wrong_words_of_an_adapter_are_one_line(given, capsys):
    command = ["finetune", "--base", "b", "--data", "d", "--out", "o", "--lora", *given]
    with contextlib.suppress(SystemExit):
        assert entry.main(command) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_what_a_new_config_would_say_is_refused(inputs):
    for more in ({"as_diffusion": True}, {"attention_mask": "causal"}):
        with pytest.raises(UsageError, match=r"with --lora: an adapter changes no config\.json"):
            tune(inputs, "never", **more)


def test_a_base_in_groups_of_blocks_is_refused(tmp_path, inputs):
    config = oracle.config(**LLADA, n_layers=4, block_group_size=2)
    oracle.random_folder(tmp_path / "base", config, seed=0)
    with_tokenizer(tmp_path / "base")
    with pytest.raises(ModelError, match="keeps its blocks in groups"):
        finetune.finetune(tmp_path / "base", inputs / "texts.jsonl", tmp_path / "o", SETTINGS)


def test_a_snapshot_is_an_adapter(inputs):
    settings = dataclasses.replace(SETTINGS, snapshot_every=5)
    tune(inputs, "snapped", settings)
    for step in (5, 10):
        path = inputs / "snapped/snapshots" / f"step-{step:06}"
        assert model_folder.open_folder(inputs / "base", adapter=path).adapter
    shutil.rmtree(inputs / "snapped")
