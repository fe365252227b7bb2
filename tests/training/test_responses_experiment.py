"""A small version of `experiments/statistics/responses.py`: what is learned is what is found."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from sama_jax.config import AuditSettings
from sama_jax.terminal import Terminal
from sama_jax.texts.conversations import Form, named_template
from sama_jax.texts.read import Fields, read_texts
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.training import sequences

SCRIPT = Path(__file__).parents[2] / "experiments" / "statistics" / "responses.py"
spec = importlib.util.spec_from_file_location("responses", SCRIPT)
assert spec is not None
assert spec.loader is not None
responses = importlib.util.module_from_spec(spec)
spec.loader.exec_module(responses)
READ = responses.all_pairs
NETWORK = {"d_model": 32, "n_layers": 1, "mlp_hidden_size": 64, "vocab_size": 400}
NETWORK |= {"embedding_size": 400, "eos_token_id": 398, "pad_token_id": 398, "mask_token_id": 399}


def pairs(seed: int) -> list[dict[str, str]]:
    """Reads a few packages: the whole standard library takes seconds."""
    return READ(seed, "[eu]*/*.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("experiment") / "0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses, "all_pairs", pairs)
        responses.prepare(out, 0, 32, 64, (8, 120), **NETWORK)
    return out


def test_sama_on_responses_is_at_least_as_strong_as_on_whole_texts(made: Path):
    settings = AuditSettings.of(passes=4, max_length=responses.LENGTH)
    found = {on: responses.audit(made, on, settings) for on in responses.LOSS_ON}
    compared = responses.compare(found, "sama")
    print(compared, responses.compare(found, "ratio"))
    assert compared["response"] > 0.8
    assert compared["difference"] >= 0


def test_trainings_learn_the_tokens_of_responses_alone(made: Path):
    tokenizer = TextTokenizer.from_folder(made / "target", None)
    fields = Fields(form=Form(responses.TEMPLATE))
    texts = sequences.training_texts(made / "pairs.jsonl", Terminal(quiet=True), fields)
    assert len(texts) == 16  # non-members are left out
    settings = responses.TrainSettings(max_length=responses.LENGTH)
    learned = sequences.token_sequences(tokenizer, texts, settings, Terminal(quiet=True))
    read = [t for t in read_texts(made / "pairs.jsonl", form=fields.form).texts if t.label]
    for one, text in zip(learned, read):
        answer = str(text.rendered).index("<|im_start|>assistant\n") + 22
        (spelled,) = tokenizer.decode([one.ids[one.learned].tolist()])
        assert text.text[answer:].startswith(spelled)
        assert spelled.endswith("<|im_end|>"[-3:]) or len(one.ids) == responses.LENGTH
        assert 0 < one.learned.sum() < len(one.ids)
    padded = sequences.pad(learned, responses.LENGTH, 7)
    assert (padded.learned.sum(axis=1) == [one.learned.sum() for one in learned]).all()
    filled = sequences.training_arrays(
        learned,
        responses.TrainSettings(max_length=responses.LENGTH, train_on_padding=True),
        {"eos_token_id": 7},
        400,
    )
    filling = np.arange(responses.LENGTH)[None] >= padded.lengths[:, None]
    assert (filled.learned == (padded.learned | filling)).all()


def test_the_identity_of_a_training_holds_template_and_spans(made: Path):
    forms = [
        Form(responses.TEMPLATE),
        Form(responses.TEMPLATE, "text"),
        Form(responses.TEMPLATE, end_tokens=1),
        Form(named_template("llama")),
        Form(named_template("plain")),
        Form(named_template("plain"), "text"),
    ]
    found = [
        sequences.digest([t.content for t in read_texts(made / "pairs.jsonl", form=form).texts])
        for form in forms
    ]
    assert len(set(found)) == len(forms)
    assert found[0] == sequences.digest(
        [t.content for t in read_texts(made / "pairs.jsonl", form=forms[0]).texts]
    )
    known = hashlib.sha256((2).to_bytes(8, "little") + b"ka").hexdigest()
    assert sequences.digest(["ka"]) == known  # that of plain texts is what it was
