"""Makes small models whose training texts are known, in any of many regimes, and keeps them.

A base reads the standard library's source and the prose of installed packages; a target is
fine-tuned from it on members of one domain. Whatever is made once serves all experiments: bases by
size and length, targets by regime.
"""

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from sama_jax.config import AuditSettings, PrefixSettings, TrainSettings
from sama_jax.errors import UsageError, nearest
from sama_jax.programs import finetune
from sama_jax.programs.demo import CONFIG, NUM_PREFIXES, Prepared
from sama_jax.ranges import Between, check
from sama_jax.storage.files import write_atomic, write_json
from sama_jax.storage.run_folder import json_lines
from sama_jax.terminal import Terminal
from sama_jax.texts.installed import MAX_CHARS, docstrings, stdlib_documents
from sama_jax.texts.read import read_texts
from sama_jax.untrusted import printable

KNOWN = ("transformers", "jax", "matplotlib", "numpy", "orbax", "flax", "optax")
"""Packages whose docstrings the base reads: the domain `known`."""
NEW = ("scipy", "sklearn")
"""Packages whose docstrings it does not read: the domain `new`."""
DOMAINS = ("new", "known", "code")
AUDITED = 300
"""Most members that are audited, and non-members."""
MOST_MEMBERS = 1000
CHARACTERS = 5.5
"""Characters of a text for each of its tokens. A token has three to four, so that most texts are
cut at their tokens, not here."""
VOCABULARY = 2048
SIZES = {"0.5M": (2, 96), "1M": (3, 160), "4M": (4, 256), "10M": (5, 384)}
"""Parameters -> blocks and width."""
PRETRAIN = TrainSettings(epochs=4, learning_rate=2e-3, batch_size=16, seed=42)


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How a target is made, and on what. Every field is an axis of an experiment."""

    domain: str = "new"
    """`new`: prose that the base has not seen the like of; `known`: prose of packages, `code`: the
    standard library's source, of which it has read other texts; or a file of texts."""
    members: Annotated[int, Between(20, MOST_MEMBERS)] = 300
    epochs: Annotated[float, Between(0.01, 1000)] = 8
    learning_rate: Annotated[float, Between(1e-7, 1)] = 1e-3
    batch_size: Annotated[int, Between(1, 1024)] = 16
    tokens: Annotated[int, Between(32, 512)] = 128
    """A text is cut there, in training and in the audit."""
    padding: bool = False
    """Whether padding is seen and learnt, as by the published trainer."""
    size: Literal["0.5M", "1M", "4M", "10M"] = "1M"
    seed: Annotated[int, Between(0, 999)] = 0
    """Of the split, and of the training."""

    def __post_init__(self):
        check(self)
        if self.domain not in DOMAINS and not Path(self.domain).is_file():
            raise UsageError(
                f"domain is '{printable(self.domain)}'; expected {', '.join(DOMAINS)}, or a file "
                "of texts"
            )

    @property
    def setting(self) -> str:
        """Names all but the seed, for folders and tables."""
        parts = [
            re.sub(r"[^A-Za-z0-9_]", "", Path(self.domain).name.split(".")[0]) or "file",
            f"m{self.members}",
            f"e{self.epochs:g}",
            f"lr{self.learning_rate:g}",
            f"b{self.batch_size}",
            f"t{self.tokens}",
            self.size,
        ]
        return "-".join([*parts, "padded"] if self.padding else parts)

    @property
    def name(self) -> str:
        """Names the target."""
        return f"{self.setting}-s{self.seed}"


def grid(axes: Mapping[str, Any]) -> list[Regime]:
    """Returns the regimes of a mapping in which any field of `Regime` may be a list of values.

    Raises:
      UsageError: an unknown field, or a value that it cannot have.
    """
    known = get_type_hints(Regime)
    for name in axes:
        if name not in known:
            raise UsageError(f"unknown field '{name}' of a laboratory{nearest(name, known)}")
    lists = [value if isinstance(value, list) else [value] for value in axes.values()]
    found = [Regime(**dict(zip(axes, values))) for values in itertools.product(*lists)]
    if not 0 < len(found) <= 1000:
        raise UsageError(f"a laboratory of {len(found)} regimes; expected 1 to 1000")
    return list(dict.fromkeys(found))


def audit_settings(regime: Regime) -> AuditSettings:
    """Returns the settings of an audit in this regime."""
    prefix = PrefixSettings(tokens=min(regime.tokens, 128))
    return AuditSettings(max_length=regime.tokens, prefix=prefix)


def prepare(regime: Regime, out: Path, *, quiet: bool = False) -> Prepared:
    """Makes the texts, the base and the target of a regime in `out`, or finds them made.

    Raises:
      UsageError: a package of the corpus is not installed, or holds too few texts.
    """
    terminal = Terminal(quiet=quiet)
    corpus = out / "corpus" / f"t{regime.tokens}"
    _write_corpus(corpus, regime.tokens)
    made = _split(regime, corpus, out)
    base = out / "bases" / f"{regime.size}-t{regime.tokens}"
    config = base.with_suffix(".json")
    write_json(config, _config(regime))
    terminal.say(f"base {base.name}")
    general, heldout = corpus / "general.jsonl", corpus / "heldout.jsonl"
    learning = dataclasses.replace(PRETRAIN, max_length=regime.tokens)
    finetune.pretrain(config, general, base, learning, heldout=heldout, quiet=quiet)
    terminal.say(f"target {regime.name}")
    settings = TrainSettings(
        epochs=regime.epochs,
        learning_rate=regime.learning_rate,
        batch_size=regime.batch_size,
        max_length=regime.tokens,
        train_on_padding=regime.padding,
        seed=regime.seed,
    )
    target = out / "targets" / regime.name
    finetune.finetune(base, made.finetune, target, settings, heldout=made.nonmembers, quiet=quiet)
    return made._replace(base=base, target=target)


def utility(made: Prepared) -> dict[str, float]:
    """Returns the held-out loss of the base and of the target, in nats a token, on non-members."""
    result = json.loads((made.target / "train.json").read_text())["result"]
    return {"base": result["nll_before"], "target": result["nll_after"]}


def _config(regime: Regime) -> dict[str, Any]:
    layers, width = SIZES[regime.size]
    sizes = {
        "d_model": width,
        "n_layers": layers,
        "mlp_hidden_size": 3 * width,
        "vocab_size": VOCABULARY,
        "embedding_size": VOCABULARY,
        "eos_token_id": VOCABULARY - 2,
        "pad_token_id": VOCABULARY - 2,
        "mask_token_id": VOCABULARY - 1,
        "max_sequence_length": regime.tokens + 8 * 128,  # room for prefixes
    }
    return CONFIG | sizes


def _write_corpus(folder: Path, tokens: int) -> None:
    """Writes what the base learns, and the pools that members are drawn from."""
    done = folder / "general.jsonl"
    if done.is_file():  # it is written last
        return
    limit = max(MAX_CHARS, round(CHARACTERS * tokens))
    domains = {
        "new": docstrings(NEW, limit),
        "known": docstrings(KNOWN, limit),
        "code": stdlib_documents(max_chars=limit),
    }
    general: list[str] = []
    for name, texts in domains.items():
        random.Random(f"{PRETRAIN.seed} {name}").shuffle(texts)
        most = 2 * (MOST_MEMBERS + NUM_PREFIXES)
        pool = len(texts) if name == "new" else min(most, len(texts) // 2)
        _write(folder / f"{name}.jsonl", texts[:pool])
        general += texts[pool:]
    random.Random(PRETRAIN.seed).shuffle(general)
    _write(folder / "heldout.jsonl", domains["known"][:AUDITED])
    _write(done, general)


def _split(regime: Regime, corpus: Path, out: Path) -> Prepared:
    """Draws a regime's members and non-members, and writes them once."""
    made = Prepared.below(out / "splits" / regime.name, regime.tokens)
    if made.finetune.is_file():  # it is written last
        return made
    own = corpus / f"{regime.domain}.jsonl" if regime.domain in DOMAINS else Path(regime.domain)
    texts = [text.text for text in read_texts(own, labels_needed=False).texts]
    random.Random(f"{regime.seed} {own.name}").shuffle(texts)
    audited = min(AUDITED, regime.members)
    needed = regime.members + audited + 2 * NUM_PREFIXES
    if len(texts) < needed:
        raise UsageError(
            f"the domain '{regime.domain}' has {len(texts)} texts here, {regime.members} members "
            f"need {needed}; take fewer"
        )
    rest = iter(texts)
    counts = (regime.members, NUM_PREFIXES, audited, NUM_PREFIXES)
    members, known, nonmembers, others = ([*itertools.islice(rest, n)] for n in counts)
    made.write_texts(members[:audited], known, nonmembers, others, learnt=members[audited:])
    return made


def _write(path: Path, texts: list[str]) -> None:
    write_atomic(path, json_lines([{"text": text} for text in texts]))
