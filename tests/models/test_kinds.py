"""Training of next-token and masked language models: objectives, folders, resume, the demo's."""

import dataclasses
import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file
from tiny import PartialModel
from tokenizers import Tokenizer, models

from sama_jax import attacks
from sama_jax.arrays import TextKeyData
from sama_jax.config import TrainSettings
from sama_jax.errors import DataError, Interrupted, ModelError, UsageError
from sama_jax.programs import demo, experiment, experiment_file, finetune
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.training import loop, step
from sama_jax.training.sequences import pad, tokens_of
from sama_jax.weights import loading, model_folder, special_tokens

VOCAB = 300
CONFIGS = {
    "llama": {
        **demo.LLAMA,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    },
    "bert": {
        **demo.BERT,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    },
}
CLASSES = {"llama": "AutoModelForCausalLM", "bert": "AutoModelForMaskedLM"}
TEXTS = [f"the {w} runs{' and runs' * n} over the hill" for n, w in enumerate(("fox", "dog", "ox"))]
SETTINGS = TrainSettings(epochs=40, batch_size=2, learning_rate=1e-2, max_length=40, seed=3)
SHORT = dataclasses.replace(SETTINGS, epochs=9, learning_rate=3e-3)
# As in test_parity.py: float32 sums in another order; a wrong formula is off by 1e-2 or more.
LOGITS, NLL = 1e-4, 1e-5


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """Configs, texts, and a base of each family pre-trained on them: `llama/`, `bert/`."""
    root = tmp_path_factory.mktemp("kinds")
    lines = (json.dumps({"text": t}) + "\n" for t in TEXTS)
    (root / "texts.jsonl").write_text("".join(lines))
    for name, config in CONFIGS.items():
        (root / f"{name}.json").write_text(json.dumps(config))
        pretrain(root, name, root / name)
    return root


def pretrain(root, name, out, settings=SETTINGS, **kwargs):
    return finetune.pretrain(
        root / f"{name}.json", root / "texts.jsonl", out, settings, quiet=True, **kwargs
    )


def tune(root, name, out, settings=SHORT):
    return finetune.finetune(root / name, root / "texts.jsonl", root / out, settings, quiet=True)


def opened(path):
    folder = model_folder.open_folder(path)
    return folder.model, loading.load(folder, loop.device())


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, valid):
    """Logits at every position, whichever token they predict."""
    unshifted = replace(model, shift=False)
    return model.logits(params, unshifted.hidden(params, tokens, valid))


def reopened_by_transformers(root, name):
    module = getattr(transformers, CLASSES[name]).from_pretrained(root / name)
    return module.eval()


def batch(root, name):
    """(tokens, valid) of the texts, padded with the end of text."""
    found = TextTokenizer.from_folder(root / name, None).encode(TEXTS, 40)
    tokens, lengths = pad([tokens_of(e) for e in found], 40, VOCAB - 2)[:2]
    return tokens, np.arange(40)[None] < lengths[:, None]


def torch_loss(module, seen, labels, counted, valid):
    """transformers' own loss, which leaves labels of -100 out."""
    with torch.no_grad():
        return module(
            input_ids=torch.from_numpy(np.asarray(seen)).long(),
            attention_mask=torch.from_numpy(valid).long(),
            labels=torch.from_numpy(np.where(counted, labels, -100)).long(),
        )


# --- objectives, and folders that transformers reads ---------------------------------------------


def test_next_token_loss_and_logits_are_those_of_transformers(box):
    (model, params), (tokens, valid) = opened(box / "llama"), batch(box, "llama")
    assert model.kind == "autoregressive"
    assert len(set(valid.sum(axis=1))) > 1  # padding is there
    module = reopened_by_transformers(box, "llama")
    assert type(module) is transformers.LlamaForCausalLM
    expected = torch_loss(module, tokens, tokens, valid, valid)
    logits = forward(model, params, tokens, valid)
    np.testing.assert_allclose(logits[valid], expected.logits.numpy()[valid], atol=LOGITS)
    loss = jax.jit(step.loss_of_kind, static_argnums=0)
    found = loss(model, params, tokens, valid, jax.random.key(0), 1e-3)
    np.testing.assert_allclose(float(found), float(expected.loss), atol=NLL)
    assert float(found) == float(loss(model, params, tokens, valid, jax.random.key(1), 1e-3))
    # The exact mean is also what training reported after its last step.
    manifest = json.loads((box / "llama" / "train.json").read_text())
    assert manifest["result"]["nll_after"] == pytest.approx(float(expected.loss), abs=NLL)


def test_masked_loss_and_logits_are_those_of_transformers(box):
    (model, params), (tokens, valid) = opened(box / "bert"), batch(box, "bert")
    assert model.kind == "masked"
    key = jax.random.key(4)
    masks = np.stack(
        [step.fixed_share_masks(k, v) for k, v in zip(jax.random.split(key, 3), jnp.asarray(valid))]
    )
    module = reopened_by_transformers(box, "bert")
    assert type(module) is transformers.BertForMaskedLM
    seen = np.where(masks, VOCAB - 1, tokens)
    expected = torch_loss(module, seen, tokens, masks, valid)
    logits = forward(model, params, seen, valid)
    np.testing.assert_allclose(logits[valid], expected.logits.numpy()[valid], atol=LOGITS)
    loss = jax.jit(step.loss_of_kind, static_argnums=0)
    found = loss(model, params, tokens, valid, key, 1e-3)
    np.testing.assert_allclose(float(found), float(expected.loss), atol=NLL)


def test_the_tokenizer_beside_a_model_names_its_tokens(box):
    for name in CONFIGS:
        written = transformers.AutoTokenizer.from_pretrained(box / name)
        assert len(written) == VOCAB  # none was added
        assert (written.mask_token_id, written.pad_token_id) == (VOCAB - 1, VOCAB - 2)
        tokens, valid = batch(box, name)
        assert written(TEXTS[0])["input_ids"] == tokens[0][valid[0]].tolist()
    assert special_tokens.tokenizer_mask(box / "bert") == VOCAB - 1
    config = json.loads((box / "llama" / "config.json").read_text())
    assert "mask_token_id" not in config
    assert {config[f"{n}_token_id"] for n in ("bos", "eos", "pad")} == {VOCAB - 2}


def test_masks_are_15_percent_at_least_one_and_spare_padding():
    lengths = np.array([0, 1, 3, 9, 10, 16, 17, 40])
    valid = np.arange(48)[None] < lengths[:, None]
    keys = jax.random.split(jax.random.key(0), 400)
    draw = jax.vmap(jax.vmap(step.fixed_share_masks, (0, None)), (None, 0))
    masks = np.asarray(jax.jit(draw)(keys, valid))
    counts = [min(n, max(1, int(0.15 * n + 0.5))) for n in lengths]
    np.testing.assert_array_equal(masks.sum(axis=2), np.tile(counts, (400, 1)).T)
    assert not (masks & ~valid[:, None]).any()
    for share, count, length in zip(masks.mean(axis=1), counts, lengths):
        # Every position alike: 400 draws deviate by at most 0.025, five of which are 0.125.
        assert not length or np.abs(share[:length] - count / length).max() < 0.125


class UniformModel(PartialModel):
    """Predicts every token alike."""

    mask_id, vocab_size, kind = 9, 10, "masked"

    def hidden(self, params, tokens, key_valid, clean=None):
        return jnp.zeros((*tokens.shape, 1)) + params

    def logits(self, params, hidden):
        return hidden * jnp.ones(10)[(None,) * (hidden.ndim - 1)]


def test_held_out_losses_of_uniform_predictions_are_exact():
    lengths = np.array([12, 7, 1, 3])
    valid = np.arange(12)[None] < lengths[:, None]
    tokens = np.arange(48).reshape(4, 12) % 9
    keys = TextKeyData(jnp.arange(4, dtype=jnp.uint32), jnp.arange(4, dtype=jnp.uint32))
    for kind, counted in (("masked", lengths), ("autoregressive", lengths - 1)):
        nll = step.HELD_OUT[kind](UniformModel(), 1, jnp.float32(0), tokens, valid, keys)
        np.testing.assert_allclose(nll, counted * np.log(10), rtol=1e-5)
        assert step.num_predicted(kind, valid) == counted.sum()


# --- runs ----------------------------------------------------------------------------------------


def test_training_lowers_the_loss_of_both(box):
    for name in CONFIGS:
        result = json.loads((box / name / "train.json").read_text())["result"]
        assert result["steps"] == 60
        assert 5 < result["nll_before"] < 7  # about log 300
        assert result["nll_after"] < 0.5 * result["nll_before"]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_fine_tuned_folder_resumes_bit_for_bit(box, name, monkeypatch):
    expected = tune(box, name, f"{name}-whole")
    before = json.loads((box / name / "train.json").read_text())["result"]
    assert expected["nll_before"] == pytest.approx(before["nll_after"], abs=1e-6)
    original = loop.batch_rows

    def rows(seed, at, *args):
        if at == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(seed, at, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batch_rows", rows)
        with pytest.raises(Interrupted, match="saved after step 7 of 14"):
            tune(box, name, f"{name}-resumed")
    assert tune(box, name, f"{name}-resumed")["nll_after"] == expected["nll_after"]
    a, b = (load_file(box / f"{name}-{x}" / "model.safetensors") for x in ("whole", "resumed"))
    base = load_file(box / name / "model.safetensors")
    assert a.keys() == b.keys() == base.keys()
    for tensor in a:
        assert (a[tensor] != base[tensor]).any(), tensor
        np.testing.assert_array_equal(a[tensor], b[tensor], err_msg=tensor)


def test_what_these_kinds_cannot_do_is_refused_before_anything_is_written(box):
    padding = dataclasses.replace(SETTINGS, train_on_padding=True)
    for name, kind in (("llama", "autoregressive"), ("bert", "masked")):
        message = f"train_on_padding is defined for diffusion models, this one is {kind}; leave it"
        with pytest.raises(UsageError, match=message):
            pretrain(box, name, box / "no", padding)
        with pytest.raises(UsageError, match=message):
            tune(box, name, "no", padding)
    long = dataclasses.replace(SETTINGS, max_length=72)
    with pytest.raises(ModelError, match="for 64 tokens, but max_length is 72; lower it"):
        pretrain(box, "bert", box / "no", long)
    assert not (box / "no").exists()


def test_a_given_tokenizer_must_have_a_mask_only_where_masks_are_learned(box, monkeypatch):
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    words.save(str(box / "words.json"))
    words.add_special_tokens(["[MASK]"])
    words.save(str(box / "masking.json"))
    with pytest.raises(ModelError, match=r"none of the tokens <\|mdm_mask\|>, \[MASK\], <mask>"):
        pretrain(box, "bert", box / "bare", tokenizer=box / "words.json")
    assert not (box / "bare").exists()
    with pytest.raises(DataError, match="none of the 3 training texts has a token to predict"):
        # One unknown word each, and nothing before it: only the next token is missing.
        pretrain(box, "llama", box / "given-llama", tokenizer=box / "words.json")
    started = []
    monkeypatch.setattr(loop, "train", lambda start, *_: started.append(start) or {})
    pretrain(box, "bert", box / "given-bert", tokenizer=box / "masking.json")
    assert started[0].model.mask_id == started[0].config["mask_token_id"] == 2
    written = json.loads((box / "given-bert" / "tokenizer_config.json").read_text())
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "[MASK]"}


# --- the demo's models, and experiments ----------------------------------------------------------


def test_the_demo_makes_another_network_of_the_same_texts(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "stdlib_documents", lambda: [f"text {i}" for i in range(600)])
    monkeypatch.setattr(finetune, "pretrain", lambda *a, **k: calls.append(a))
    monkeypatch.setattr(finetune, "finetune", lambda *a, **k: calls.append(a))
    made = [demo.prepare(tmp_path / "d", network=n, quiet=True) for n in ("llada", "bert")]
    assert made[0][2:] == made[1][2:]  # texts and length
    assert calls[0][1] == calls[2][1]
    assert [c[3] for c in calls[:2]] == [c[3] for c in calls[2:]]  # settings
    assert json.loads(Path(calls[2][0]).read_text()) == demo.BERT
    assert json.loads(Path(calls[0][0]).read_text()) == demo.CONFIG
    assert made[1].base == tmp_path / "d" / "bert" / "base" == calls[2][2] == calls[3][0]
    assert made[1].target == tmp_path / "d" / "bert" / "target" == calls[3][2]
    assert made[0].base == tmp_path / "d" / "base"


def test_the_demo_networks_have_one_size():
    from sama_jax.models.registry import build_model, read_config

    sizes = {}
    for name, config in demo.NETWORKS.items():
        model = build_model(read_config(config, name), 1023, jnp.dtype("float32"))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert model.num_layers == 2
    assert max(sizes.values()) < 1.2 * min(sizes.values()), sizes


def test_each_run_of_an_experiment_has_its_models(box, tmp_path, monkeypatch):
    """`models` of a run go before those of the file."""
    asked = []

    def prepare(out, *, network, quiet):
        asked.append(network)
        base = box / network
        texts = box / "members.jsonl", box / "nonmembers.jsonl"
        same = tiny.same_weights(base, tmp_path / f"{network}-{len(asked)}")
        return demo.Prepared(base, same, *texts, base, box / "prefixes.jsonl", 40)

    for file, words in (("members", "abcd"), ("nonmembers", "efgh"), ("prefixes", "xy")):
        lines = (json.dumps({"text": f"{w} {TEXTS[0]}"}) + "\n" for w in words)
        (box / f"{file}.jsonl").write_text("".join(lines))
    monkeypatch.setattr(demo, "prepare", prepare)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "models: demo:bert\nruns:\n"
        "- {name: a, max_length: 40, passes: 2, attacks: [loss, ratio], set: ['sama.subsets=8']}\n"
        "- {name: b, max_length: 40, models: 'demo:llama', passes: 2, attacks: [loss]}\n"
        "compare: [[loss, ratio]]\n"
    )
    with pytest.raises(UsageError, match=r"'loss' cannot be computed here: .*autoregressive"):
        experiment.run_experiment(str(file), tmp_path / "out", quiet=True)
    assert asked == ["bert", "llama"]
    for wrong, message in (
        ("models: demo:gpt\nruns: [{name: a, attacks: [loss]}]", "expected demo, demo:llama, demo"),
        ("runs: [{name: a, attacks: [loss], models: {target: x}}]", "models needs reference"),
        ("runs: [{name: a, attacks: [loss]}]\ncompare: [[loss, sama]]", "no run has both attacks"),
    ):
        file.write_text(wrong)
        with pytest.raises(DataError, match=message):
            experiment_file.read(file)


def test_the_shipped_experiment_asks_each_model_what_it_can_answer():
    plan = experiment_file.read(experiment_file.find("sama_beyond_dlms"))
    kinds = {"demo": "diffusion", "demo:llama": "autoregressive", "demo:bert": "masked"}
    runs = {run.get("models", plan["models"]): run["attacks"] for run in plan["runs"]}
    assert runs.keys() == kinds.keys()
    for models_, names in runs.items():
        assert all(kinds[models_] in attack.kinds for attack in attacks.select(names))
    assert "sama" in runs["demo"]
    assert "sama:ar" in runs["demo:llama"]
    assert {"sama", "sama:mlm"} <= set(runs["demo:bert"])
