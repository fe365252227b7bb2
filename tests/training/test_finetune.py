"""Training runs: exact resume, and the folder that comes out."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from wrong_inputs import assert_one_line, run_process

from sama_jax.cli import entry
from sama_jax.config import TrainSettings
from sama_jax.errors import DataError, Interrupted, ModelError, OutputError, UsageError
from sama_jax.programs import finetune
from sama_jax.storage import files
from sama_jax.terminal import Terminal
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.training import loop, new_tokenizer, runs, sequences, step
from sama_jax.weights import loading, model_folder, saving
from sama_jax.weights.orbax import Checkpoints

VOCAB = 300
HANDLERS = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
CONFIG = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "weight_tying": False,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "layer_norm_with_affine": True,
    "attention_layer_norm_with_affine": True,
}
TEXTS = [f"the {w} runs over the {v} hill" for w in ("fox", "dog", "cow") for v in ("red", "wet")]
OTHERS = ["the hill runs over a red cat", "a wet hill"]
PRETRAIN = TrainSettings(epochs=2, batch_size=4, learning_rate=1e-3, max_length=24)
SETTINGS = TrainSettings(epochs=8, batch_size=4, learning_rate=1e-2, max_length=24, seed=3)


def write_texts(path, texts, **fields):
    path.write_text("".join(json.dumps({"text": t, **fields}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of inputs: config, texts, and a base model pre-trained on them."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "config.json").write_text(json.dumps(CONFIG))
    write_texts(root / "texts.jsonl", TEXTS)
    finetune.pretrain(
        root / "config.json", root / "texts.jsonl", root / "base", PRETRAIN, quiet=True
    )
    return root


@pytest.fixture(scope="module")
def finished(folder):
    """(output folder, result) of a run that nothing interrupted."""
    out = folder / "whole"
    result = finetune.finetune(folder / "base", folder / "texts.jsonl", out, SETTINGS, quiet=True)
    return out, result


def test_the_loss_of_a_training_is_the_last_one_of_its_log(finished):
    # Else a run that is stopped after its last step records another loss than one that is not.
    out, result = finished
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert result["loss"] == last["loss"]


def tune(folder, out, settings=SETTINGS, texts="texts.jsonl", **kwargs):
    return finetune.finetune(
        folder / "base", folder / texts, folder / out, settings, quiet=True, **kwargs
    )


@pytest.fixture
def tokenizer(folder):
    return TextTokenizer.from_folder(folder / "base", None)


def test_windows_cover_a_text_and_short_remainders_go(tokenizer):
    texts = [" ".join(TEXTS), "fox", ""]
    settings = dataclasses.replace(SETTINGS, windows=True, max_length=20)
    whole = tokenizer.encode(texts, 10**6)[0].ids
    made = sequences.token_sequences(tokenizer, texts, settings, Terminal(quiet=True))
    found = [one.ids for one in made]
    rest = len(whole) % 20
    kept = whole if rest == 0 or rest >= sequences.MIN_WINDOW else whole[: len(whole) - rest]
    np.testing.assert_array_equal(np.concatenate(found[:-1]), kept)
    assert all(len(f) == 20 for f in found[:-2])
    np.testing.assert_array_equal(found[-1], tokenizer.encode(["fox"], 20)[0].ids)
    cut = sequences.token_sequences(
        tokenizer, texts, dataclasses.replace(settings, windows=False), Terminal(quiet=True)
    )
    assert [len(c.ids) for c in cut] == [20, len(found[-1])]


# --- runs ----------------------------------------------------------------------------------------


def weights(path):
    return load_file(path / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name], err_msg=name)


def interrupt_at(monkeypatch, step):
    """SIGTERM arrives while the host prepares this step's batch."""
    original = loop.batch_rows

    def rows(seed, at, *args):
        if at == step:
            signal.raise_signal(signal.SIGTERM)
        return original(seed, at, *args)

    monkeypatch.setattr(loop, "batch_rows", rows)


def test_training_lowers_the_loss_and_reports(folder, finished):
    out, result = finished
    assert result["steps"] == 12  # 8 epochs of 6 texts in batches of 4
    assert result["nll_after"] < 0.7 * result["nll_before"]
    assert result["nll_on"] == "the first 6 training texts"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [10, 12]
    assert set(log[0]) == {"step", "loss", "lr", "seconds", "tokens"}
    assert log[-1]["tokens"] == result["tokens"]
    assert not (out / "checkpoints").exists()
    assert not list(out.glob("*.part"))


def test_a_memorisable_text_is_memorised(folder):
    write_texts(folder / "one.jsonl", TEXTS[:1])
    settings = dataclasses.replace(SETTINGS, epochs=960, warmup_steps=20)
    result = tune(folder, "one", settings, "one.jsonl")
    assert result["steps"] == 240
    assert result["nll_before"] > 3
    # Not 0: rotary positions are relative, so a text that is masked throughout looks the same at
    # every position, and the best prediction is its token frequencies (about 1.75 nats).
    assert result["nll_after"] < 1.0


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(folder, finished, monkeypatch):
    whole, expected = finished
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(
            Interrupted, match="saved after step 7 of 12; the same command"
        ) as caught:
            tune(folder, "resumed")
    assert caught.value.exit_code == 75
    assert not (folder / "resumed" / "config.json").exists()
    with pytest.raises(ModelError):
        model_folder.open_folder(folder / "resumed")
    result = tune(folder, "resumed")
    assert_same_weights(folder / "resumed", whole)
    for name in expected.keys() - {"seconds", "tokens_per_second"}:
        assert result[name] == expected[name], name
    logs = [(f / "log.jsonl").read_text().splitlines() for f in (whole, folder / "resumed")]
    lines = [[json.loads(line) | {"seconds": 0} for line in log] for log in logs]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("step", [10, 12])
def test_a_signal_during_the_wait_for_the_device_still_saves(step, folder, finished, monkeypatch):
    """Nearly all come there. The last step is saved anyway; its signal is not lost."""
    out, flush = f"waiting{step}", loop.Loop._flush

    def wait(self, done, log):
        seconds = flush(self, done, log)
        if done == step:
            signal.raise_signal(signal.SIGTERM)
        return seconds

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_flush", wait)
        with pytest.raises(Interrupted, match=f"saved after step {step} of 12"):
            tune(folder, out)
    with Checkpoints(folder / out / "checkpoints") as checkpoints:
        assert checkpoints.steps == [step]
    tune(folder, out)
    assert_same_weights(folder / out, finished[0])


def test_texts_under_other_names_are_the_same_training(folder, monkeypatch):
    lines = [{"document": text, "seen": 1} for text in TEXTS] + [{"document": "x y", "seen": 0}]
    named = folder / "named.jsonl"
    named.write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = write_texts(folder / "held.jsonl", OTHERS)
    (folder / "held-named.jsonl").write_text(held.read_text().replace('"text"', '"document"'))
    found = []
    monkeypatch.setattr(loop, "train", lambda start, run, *_: found.append(run) or {})
    finetune.finetune(folder / "base", folder / "texts.jsonl", folder / "a", SETTINGS, held, True)
    command = ["finetune", "--base", folder / "base", "--data", named, "--out", folder / "b"]
    command += ["--held-out", folder / "held-named.jsonl", "--text-field", "document"]
    assert entry.main([*map(str, command), "--label-field", "seen", "--quiet"]) == 0
    plain, other = found
    assert (other.texts, other.heldout) == (plain.texts, plain.heldout) == (TEXTS, OTHERS)


def test_a_signal_that_a_callback_swallows_is_not_lost(folder, finished, monkeypatch):
    """XLA calls back while memory is freed, and prints there what is raised."""
    build = loop.Start

    def start(*args):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        return build(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Start", start)
        with pytest.raises(Interrupted, match="interrupted, between two checkpoints"):
            tune(folder, "swallowed")
    tune(folder, "swallowed")
    assert_same_weights(folder / "swallowed", finished[0])


def test_a_broken_line_of_the_log_costs_that_line_alone(folder, finished, monkeypatch):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=4)
    interrupt_at(monkeypatch, 10)
    with pytest.raises(Interrupted):
        tune(folder, "broken", settings)
    monkeypatch.undo()
    log = folder / "broken" / "log.jsonl"
    first, *rest = log.read_text().splitlines()
    log.write_text(
        "\n".join([first, "{broken", "5", '{"step": NaN}', '{"step": "x"}', *rest]) + "\n"
    )
    result = tune(folder, "broken", settings)
    assert result["tokens"] == finished[1]["tokens"]
    assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == [4, 8, 10, 12]


def test_another_tokenizer_is_another_run(folder):
    base = shutil.copytree(folder / "base", folder / "changed")
    settings = dataclasses.replace(SETTINGS, epochs=1)

    def again():
        finetune.finetune(base, folder / "texts.jsonl", folder / "same", settings, quiet=True)

    again()
    tokenizer = base / "tokenizer.json"
    changed = json.loads(tokenizer.read_text())
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(changed))
    with pytest.raises(UsageError, match=r"belongs to another training run .*tokenizer was"):
        again()


def test_other_random_bits_are_refused(folder):
    with (
        jax.threefry_partitionable(False),
        pytest.raises(UsageError, match="expected JAX's own random bits"),
    ):
        tune(folder, "other_bits")
    assert not (folder / "other_bits").exists()


def test_weights_that_are_not_finite_are_the_bases(folder):
    base = shutil.copytree(folder / "base", folder / "nan")
    tensors = load_file(base / "model.safetensors")
    next(x for n, x in tensors.items() if n.endswith("wte.weight"))[200] = np.nan
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"nan: .*NaN"):
        finetune.finetune(base, folder / "texts.jsonl", folder / "never2", SETTINGS, quiet=True)


@pytest.mark.parametrize("spoil", ["loss", "weights"])
def test_a_last_step_that_diverges_stops_before_the_model_is_written(spoil, folder, monkeypatch):
    """Its loss was that of the step before."""
    if spoil == "loss":
        monkeypatch.setattr(loop, "mean_nll", lambda *x: float("nan" if x[3] == "after" else 1))
    else:
        found = iter(["", "embed.embedding"])
        monkeypatch.setattr(loop, "not_finite", lambda _: next(found))
    settings = dataclasses.replace(SETTINGS, epochs=1)
    with pytest.raises(UsageError, match=r"after the last step the loss is .* lower learning_rate"):
        tune(folder, f"last_{spoil}", settings)
    assert not (folder / f"last_{spoil}" / "config.json").exists()


@pytest.mark.parametrize(
    "content", ["[" * 10**5, "5", "{}", '{"identity": 5}', '{"identity": {"settings": {}}}']
)
def test_a_damaged_record_of_a_run_is_refused(content, folder, finished):
    out = folder / "damaged"
    shutil.copytree(finished[0], out, dirs_exist_ok=True)
    (out / "train.json").write_text(content)
    with pytest.raises(UsageError, match=r"train\.json: not readable"):
        tune(folder, "damaged")


def test_a_full_disk_is_said_in_one_line(folder):
    """Orbax reports it in its own ways, which is no lack of memory."""
    command = ["finetune", "--base", folder / "base", "--data", folder / "texts.jsonl"]
    command += ["--out", folder / "full", "--max-length", 24, "--quiet"]
    said = run_process([str(x) for x in command], limit=20_000)
    assert_one_line(said, 74, "cannot write")


def test_a_snapshot_is_the_model_of_its_step(folder, finished, monkeypatch):
    """Also behind a stop; and the run's own numbers stay."""
    settings = dataclasses.replace(SETTINGS, snapshot_every=5, checkpoint_every=5)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(Interrupted):
            tune(folder, "snapped", settings)
    with Checkpoints(folder / "snapped" / "checkpoints") as checkpoints:
        assert 5 in checkpoints.steps
    tune(folder, "snapped", settings)
    assert_same_weights(folder / "snapped", finished[0])
    found = sorted((folder / "snapped" / "snapshots").iterdir())
    assert [path.name for path in found] == ["step-000005", "step-000010"]
    for path in found:
        model_folder.open_folder(path)
        assert not {"train.json", "log.jsonl"} & {file.name for file in path.iterdir()}
    first, second, last = (weights(path) for path in (*found, finished[0]))
    gaps = [max(abs(one[k] - last[k]).max() for k in last) for one in (first, second)]
    assert gaps[0] > gaps[1] > 0  # nearer to the end of the training


def test_a_crash_resumes_from_the_last_checkpoint_bit_for_bit(folder, finished, monkeypatch):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=4)
    original = loop.batch_rows
    steps = []

    def rows(seed, step, *args):
        steps.append(step)
        if step == 10 and len(steps) < 12:
            raise RuntimeError("power cut")
        return original(seed, step, *args)

    monkeypatch.setattr(loop, "batch_rows", rows)
    with pytest.raises(RuntimeError, match="power cut"):
        tune(folder, "crashed", settings)
    before = len(steps)
    tune(folder, "crashed", settings)
    assert steps[before:] == [8, 9, 10, 11]
    assert_same_weights(folder / "crashed", finished[0])


def test_signal_handlers_are_restored(folder, finished):
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == HANDLERS


def test_a_finished_run_returns_at_once(folder, finished, monkeypatch):
    monkeypatch.setattr(loop, "train", None)  # would fail if it were called
    assert tune(folder, "whole") == finished[1]


def test_the_finished_folder_reopens_with_the_same_logits(folder, monkeypatch):
    kept = {}
    original = saving.save_folder

    def save(out, params, *args):
        kept["params"] = params
        original(out, params, *args)

    monkeypatch.setattr(saving, "save_folder", save)
    settings = dataclasses.replace(SETTINGS, epochs=1)
    tune(folder, "reopened", settings)
    opened = model_folder.open_folder(folder / "reopened")
    assert opened.model.mask_id == VOCAB - 1
    params = loading.load(opened, loop.device())
    tokens, valid = jnp.arange(24).reshape(2, 12), jnp.ones((2, 12), bool)

    @jax.jit
    def logits(p):
        return opened.model.logits(p, opened.model.hidden(p, tokens, valid))

    np.testing.assert_array_equal(logits(params), logits(kept["params"]))
    ours = TextTokenizer.from_folder(folder / "reopened", None)
    assert ours.fingerprint == TextTokenizer.from_folder(folder / "base", None).fingerprint


def test_only_companions_of_the_weights_are_copied(folder, tmp_path):
    runs.copy_companions(folder / "base", tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_training_on_padding_learns_it(folder):
    # Texts of at most 7 tokens are padded to 8 either way, so both runs share a program.
    settings = dataclasses.replace(SETTINGS, epochs=2, max_length=8)
    tune(folder, "hidden", settings)
    tune(folder, "visible", dataclasses.replace(settings, train_on_padding=True))
    a, b = weights(folder / "hidden"), weights(folder / "visible")
    pad = VOCAB - 2
    name = next(n for n in a if n.endswith("wte.weight"))
    before = weights(folder / "base")[name][pad]
    moved = [np.abs(x[name][pad] - before).max() for x in (a, b)]
    assert moved[1] > 5 * moved[0]  # hidden: weight decay only


def test_another_run_in_the_same_folder_is_refused(folder, finished):
    write_texts(folder / "other.jsonl", TEXTS[::-1])
    with pytest.raises(UsageError, match=r"belongs to another training run \(data was") as caught:
        tune(folder, "whole", texts="other.jsonl")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match=r"learning_rate was 0\.01, is 0\.02"):
        tune(folder, "whole", dataclasses.replace(SETTINGS, learning_rate=0.02))
    with pytest.raises(UsageError, match="command was pretrain, is finetune"):
        tune(folder, "base")
    with pytest.raises(UsageError, match="heldout was None"):
        tune(folder, "whole", heldout=write_texts(folder / "others.jsonl", OTHERS))
    tune(folder, "whole", dataclasses.replace(SETTINGS, checkpoint_every=5))  # changes no number


def test_a_folder_that_another_process_trains_in_is_left_alone(folder, tmp_path):
    out = tmp_path / "out"
    with files.only_writer(out):
        (out / "checkpoints").mkdir()
        with pytest.raises(UsageError, match=r"not empty|another process is writing"):
            tune(folder, out)
        shutil.rmtree(out / "checkpoints")
        with pytest.raises(UsageError, match="another process is writing"):
            tune(folder, out)
        assert not list(out.iterdir())
    with files.only_writer(out):
        pass


def test_weights_that_changed_after_the_training_are_no_finished_run(folder, finished, tmp_path):
    copy = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.safetensors is no longer what it wrote"):
        tune(folder, copy)


def test_a_finished_folder_without_its_tokenizer_or_with_another_config_is_none(
    folder, finished, tmp_path
):
    copy = Path(shutil.copytree(finished[0], tmp_path / "config"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}))
    with pytest.raises(UsageError, match=r"config\.json is no longer what it wrote"):
        tune(folder, copy)
    copy = Path(shutil.copytree(finished[0], tmp_path / "tokenizer"))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.json is no longer what it wrote"):
        tune(folder, copy)


def test_a_training_that_died_before_it_said_what_it_wrote_is_not_finished(
    folder, finished, tmp_path, monkeypatch
):
    """Else spoilt weights would pass, and checkpoints stay for ever."""

    def die(out):
        raise KeyError("killed here")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "digests", die)
        with pytest.raises(KeyError):
            tune(folder, out)
    assert (out / "config.json").is_file()
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    tune(folder, out)
    assert weights.read_bytes() == whole
    assert not (out / "checkpoints").exists()
    (out / "checkpoints").mkdir()
    tune(folder, out)  # a run that was killed while it removed them
    assert not (out / "checkpoints").exists()


def test_a_model_from_elsewhere_is_not_overwritten(folder, finished):
    shutil.copytree(finished[0], folder / "foreign")
    (folder / "foreign" / "train.json").unlink()
    with pytest.raises(UsageError, match="holds a model that was not trained here"):
        tune(folder, "foreign")


def test_a_folder_of_other_files_is_left_alone(folder):
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis: not empty, and has no train\.json"):
        tune(folder, "thesis")
    assert [f.name for f in (folder / "thesis").iterdir()] == ["thesis.tex"]


def test_nonmembers_of_a_labelled_file_are_not_trained_on(folder, finished):
    lines = [{"text": t, "label": 1} for t in TEXTS]
    lines += [{"text": "something else entirely", "label": 0}]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert tune(folder, "whole", texts="labelled.jsonl") == finished[1]  # the same texts
    write_texts(folder / "nonmembers.jsonl", TEXTS, label=0)
    with pytest.raises(DataError, match="every text has label 0"):
        tune(folder, "never", texts="nonmembers.jsonl")


def test_a_diverging_loss_stops_without_a_checkpoint(folder, monkeypatch):
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *x, **y: (step(*x, **y)[0], jnp.float32(np.nan)))
    with pytest.raises(UsageError, match=r"the loss is nan .* lower learning_rate \(now 0\.01\)"):
        tune(folder, "diverged")
    with Checkpoints(folder / "diverged" / "checkpoints") as checkpoints:
        assert checkpoints.steps == []


def test_heldout_texts_are_named_and_progress_is_printed(folder, capsys):
    write_texts(folder / "held.jsonl", [TEXTS[0], *OTHERS])
    settings = dataclasses.replace(SETTINGS, epochs=1, max_length=5)
    result = finetune.finetune(
        folder / "base", folder / "texts.jsonl", folder / "held", settings, folder / "held.jsonl"
    )
    assert result["nll_on"] == "3 held-out texts"
    text = capsys.readouterr().err
    assert "6 sequences, " in text
    assert "2 steps of 4" in text
    assert "compiling the training step" in text
    assert "nats a token on 3 held-out texts" in text
    assert "1 of 3 held-out texts are among those that are learned" in text
    assert "6 of 6 texts are cut at 5 tokens" in text


@pytest.mark.parametrize("held", [[TEXTS[1], TEXTS[0]], TEXTS, None])
def test_texts_that_are_learned_are_not_held_out(held, folder, tmp_path):
    path = folder / "texts.jsonl"
    if held is not None:
        path = write_texts(tmp_path / "held.jsonl", held)
    with pytest.raises(DataError, match="these texts are learned, too"):
        tune(folder, tmp_path / "new", heldout=path)
    assert not (tmp_path / "new").exists()


# --- pre-training --------------------------------------------------------------------------------


def test_the_trained_tokenizer_has_exactly_the_ids_of_the_config(folder):
    tokenizer = TextTokenizer.from_folder(folder / "base", None)
    assert tokenizer.max_id == tokenizer.token_id("<|mdm_mask|>") == VOCAB - 1
    assert tokenizer.token_id("<|endoftext|>") == VOCAB - 2
    config = json.loads((folder / "base" / "config.json").read_text())
    assert config["mask_token_id"] == VOCAB - 1
    assert config["eos_token_id"] == config["pad_token_id"] == VOCAB - 2
    raw = new_tokenizer.train_tokenizer(["ab"], 400)  # far fewer merges than ids
    assert raw.get_vocab_size() == 400
    assert raw.decode(raw.encode("Grüße, 世界").ids) == "Grüße, 世界"


def test_a_config_whose_ids_disagree_is_refused(folder):
    def pretrain(**fields):
        (folder / "bad.json").write_text(json.dumps({**CONFIG, **fields}))
        finetune.pretrain(folder / "bad.json", folder / "texts.jsonl", folder / "no", PRETRAIN)

    with pytest.raises(ModelError, match="mask_token_id is 5, but the tokenizer gives it 299"):
        pretrain(mask_token_id=5)
    with pytest.raises(ModelError, match="vocab_size is 100; expected at least 258"):
        pretrain(vocab_size=100)
    with pytest.raises(ModelError, match=r"nowhere\.json: no such file"):
        finetune.pretrain(folder / "nowhere.json", folder / "texts.jsonl", folder / "no", PRETRAIN)
    assert not (folder / "no").exists()


def test_a_given_tokenizer_is_used(folder):
    given = folder / "base" / "tokenizer.json"
    finetune.pretrain(
        folder / "config.json",
        folder / "texts.jsonl",
        folder / "given",
        dataclasses.replace(PRETRAIN, epochs=1),
        tokenizer=given,
        quiet=True,
    )
    assert (folder / "given" / "tokenizer.json").read_bytes() == given.read_bytes()


# --- checkpoints ---------------------------------------------------------------------------------


def abstract_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=loop.device()), state
    )


def state_of(value):
    return step.TrainState({"a": {"kernel": jnp.full((2, 3), value)}}, (), jnp.int32(value))


def test_checkpoints_keep_two_and_give_the_newest_whole_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract_of(state_of(0.0))) is None
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(float(step)))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [3, 2]
        step, state = checkpoints.restore(abstract_of(state_of(0.0)))
        assert step == 3
        jax.tree.map(np.testing.assert_array_equal, state, state_of(3.0))
        shutil.rmtree(tmp_path / "3" / "state" / "d", ignore_errors=True)
        for file in (tmp_path / "3" / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
        assert checkpoints.restore(abstract_of(state_of(0.0)))[0] == 2
        for file in (tmp_path / "2" / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
        with pytest.raises(ModelError, match="none of the checkpoints can be read"):
            checkpoints.restore(abstract_of(state_of(0.0)))


@pytest.mark.parametrize("kind", ["pipe", "device", "date"])
def test_checkpoints_that_orbax_does_not_survive_are_refused(kind, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1.0))
    path = tmp_path / "1" / "_CHECKPOINT_METADATA"
    stored = json.loads(path.read_text())
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text(json.dumps({**stored, "commit_timestamp_nsecs": 10**26}))
    with pytest.raises(ModelError, match="a checkpoint in it is damaged"):
        Checkpoints(tmp_path)


def test_only_what_the_disk_says_is_a_full_disk(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c") as checkpoints:

        def fail(*_, **__):
            raise ValueError(message)

        monkeypatch.setattr(checkpoints._checkpointer, "save_async", fail)
        message = "Error writing: No space left on device [os_error_code='ENOSPC']"
        with pytest.raises(OutputError, match="No space left on device"):
            checkpoints.save(1, state_of(1.0))
        message = "a shape that does not fit"
        with pytest.raises(ValueError, match="a shape that does not fit"):
            checkpoints.save(1, state_of(1.0))


def test_a_lack_of_memory_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state_of(1.0))
        checkpoints.wait()

        def fail(*_, **__):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

        monkeypatch.setattr(checkpoints._checkpointer, "load", fail)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            checkpoints.restore(abstract_of(state_of(1.0)))


def test_faults_of_others_are_told_while_checkpoints_are_kept(tmp_path, monkeypatch):
    class Faulty:
        def __del__(self):
            raise RuntimeError("not Orbax's")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(str(found.exc_value)))
    with Checkpoints(tmp_path / "c"):
        faulty = Faulty()
        del faulty
    assert told == ["not Orbax's"]


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    state = state_of(1.0)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        overwrite(state)
        checkpoints.wait()
        restored = checkpoints.restore(abstract_of(state_of(0.0)))[1]
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(1.0))


def test_a_state_that_does_not_fit_is_reported_leaf_by_leaf(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones((2, 3)), "b": jnp.ones(1)})
        checkpoints.wait()
        with pytest.raises(UsageError, match="3 arrays do not fit") as caught:
            checkpoints.restore(abstract_of({"a": jnp.ones((2, 4)), "c": jnp.ones(1)}))
    lines = str(caught.value).split("\n")
    assert lines[1].strip() == "a: expected float32 [2, 4], found float32 [2, 3]"
    assert lines[2].strip() == "b: expected absent, found float32 [1]"
    assert lines[3].strip() == "c: expected float32 [1], found absent"
