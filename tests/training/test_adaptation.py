"""A causal model that becomes a diffusion model: its weights, its tokenizer, its training."""

import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file, save_file

from sama_jax.cli import entry
from sama_jax.config import TrainSettings
from sama_jax.errors import Interrupted, UsageError
from sama_jax.programs import demo, finetune
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.training import adaptation, loop, new_tokenizer
from sama_jax.weights import loading, model_folder, special_tokens

VOCAB, GROWN = 300, 320
CONFIG = {
    **demo.LLAMA,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
TEXTS = [f"the {w} runs over the {v} hill" for w in ("fox", "dog", "cow") for v in ("red", "wet")]
SETTINGS = TrainSettings(epochs=6, batch_size=4, learning_rate=1e-2, max_length=24, seed=3)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a causal `base` that has learnt them."""
    root = tmp_path_factory.mktemp("adaptation")
    tiny.write_texts(root / "texts.jsonl", TEXTS, labels=False)
    (root / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": "x.Y"}}))
    tokenizer = json.loads(new_tokenizer.train_tokenizer(TEXTS, VOCAB + 1).to_str())
    assert tokenizer["added_tokens"].pop()["content"] == new_tokenizer.MASK
    (root / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = root / "config.json", root / "texts.jsonl", root / "base", SETTINGS
    finetune.pretrain(*given, root / "tokenizer.json", quiet=True)
    return root


def adapt(box: Path, out: Path, settings: TrainSettings = SETTINGS, base: str = "base"):
    data = box / "texts.jsonl"
    return finetune.finetune(box / base, data, out, settings, quiet=True, as_diffusion=True)


@pytest.fixture(scope="module")
def adapted(box: Path) -> tuple[Path, dict]:
    return box / "adapted", adapt(box, box / "adapted")


def test_the_folder_is_that_of_a_diffusion_model_with_a_mask_token(adapted):
    out, result = adapted
    folder = model_folder.open_folder(out)
    assert (folder.model.kind, folder.model.shift) == ("diffusion", False)
    assert folder.model.mask_id == special_tokens.tokenizer_mask(out) == VOCAB
    assert folder.model.vocab_size == GROWN
    assert folder.config["architectures"] == ["A2DLlamaLMHeadModel"]
    assert "auto_map" not in folder.config
    read = TextTokenizer.from_folder(out, GROWN)
    assert read.token_id(adaptation.MASK) == VOCAB
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.mask_token_id == VOCAB
    assert theirs(TEXTS[0] + adaptation.MASK)["input_ids"][-1] == VOCAB
    assert result["nll_after"] < result["nll_before"]


def test_what_an_ordinary_text_is_made_of_stays(box: Path, adapted):
    encoded = [
        TextTokenizer.from_folder(path, None).encode(TEXTS, 24)
        for path in (box / "base", adapted[0])
    ]
    assert [list(e.ids) for e in encoded[0]] == [list(e.ids) for e in encoded[1]]


@pytest.mark.parametrize("tied", [False, True])
def test_old_tokens_keep_their_logits_and_attention_sees_both_sides(box: Path, tied, tmp_path):
    """PyTorch's class of the causal model, its mask taken away, is the oracle."""
    base = shutil.copytree(box / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": tied}
    if not tied:
        weights = load_file(base / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
        save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    folder = model_folder.open_folder(base)
    start = loop.Start(
        folder.model,
        folder.family.weights,
        folder.config,
        TextTokenizer.from_folder(base, VOCAB),
        lambda: loading.load(folder, loop.device()),
        str(base),
    )
    start = finetune._as_diffusion(start, folder, SETTINGS)
    params, tokens = start.params(), jnp.array([[5, 9, VOCAB, 7]])
    valid = jnp.ones((1, 4), bool)
    found = np.asarray(start.model.logits(params, start.model.hidden(params, tokens, valid)))
    assert found.shape[-1] == GROWN

    module = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    embedding = module.get_input_embeddings().weight
    with torch.no_grad():
        given = torch.cat([embedding, embedding.mean(dim=0, keepdim=True)])[
            torch.tensor(np.array(tokens))
        ]
        both = torch.zeros((1, 1, 4, 4))
        expected = module(inputs_embeds=given, attention_mask=both).logits.numpy()
    np.testing.assert_allclose(found[..., :VOCAB], expected, atol=1e-4)
    rows = np.asarray(params["embed"]["embedding"])
    np.testing.assert_allclose(rows[VOCAB:], np.tile(rows[:VOCAB].mean(0), (20, 1)), atol=1e-6)


def test_a_row_that_is_free_serves_as_the_mask():
    config = {"model_type": "qwen3", "vocab_size": 400, "architectures": ["Qwen3ForCausalLM"]}
    made = adaptation.diffusion_config(config, 300, "here")
    assert (made["vocab_size"], made["mask_token_id"]) == (400, 300)
    params = {"embed": {"embedding": jnp.ones((400, 2))}}
    assert jax.tree.leaves(adaptation.with_rows(params, 400))[0] is params["embed"]["embedding"]


def interrupt(box: Path, out: Path, patch: pytest.MonkeyPatch, step: int) -> None:
    """Adapts until a step at which SIGTERM arrives."""
    original = loop.batch_rows

    def rows(seed: int, at: int, *rest: int):
        if at == step:
            signal.raise_signal(signal.SIGTERM)
        return original(seed, at, *rest)

    with patch.context() as patched:
        patched.setattr(loop, "batch_rows", rows)
        with pytest.raises(Interrupted):
            adapt(box, out)


def test_an_interrupted_adaptation_ends_with_the_same_bits(box: Path, adapted, monkeypatch):
    interrupt(box, box / "resumed", monkeypatch, 4)
    adapt(box, box / "resumed")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (box / "resumed" / name).read_bytes() == (adapted[0] / name).read_bytes(), name


def test_another_mask_token_is_another_adaptation(box: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(box / "base", tmp_path / "base")
    shutil.copy(box / "texts.jsonl", tmp_path)
    interrupt(tmp_path, tmp_path / "out", monkeypatch, 1)
    # The token for the end of a text, which is free to stand for a masked one.
    end = json.loads((tmp_path / "base" / "tokenizer.json").read_text())["added_tokens"][0]
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": end["content"]}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match=f"mask_token_id was {VOCAB}, is {end['id']}"):
        adapt(tmp_path, tmp_path / "out")


def test_only_causal_models_can_be_adapted(box: Path, adapted, tmp_path: Path, capsys):
    with pytest.raises(
        UsageError, match=r"a2d-llama'; --as diffusion makes .* llama, qwen2, qwen3"
    ):
        adapt(box, tmp_path / "twice", base="adapted")
    given = ["--base", box / "adapted", "--data", box / "texts.jsonl", "--out", tmp_path / "out"]
    assert entry.main(["finetune", *map(str, given), "--as", "diffusion", "--quiet"]) == 2
    assert "--as diffusion" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_same_folder_is_not_both(box: Path, adapted):
    with pytest.raises(UsageError, match="as was diffusion"):
        finetune.finetune(box / "base", box / "texts.jsonl", adapted[0], SETTINGS, quiet=True)
