"""Training programs: fine-tune a model folder, or pre-train a small one from scratch.

Run the pure functions of `training`: batches by (seed, step), checkpoints, resume, held-out loss,
and the finished model folder.

A run is a function of settings, texts and starting weights alone. Masks derive from (seed, step)
and the order of texts from (seed, epoch), so an interrupted run that continues ends with the same
bits as one that was not (on a backend whose kernels are deterministic, as the CPU's are).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sama_jax import rng
from sama_jax.arrays import Model, Params, TextKeyData
from sama_jax.config import TrainSettings
from sama_jax.errors import DataError, Interrupted, ModelError, UsageError
from sama_jax.models.registry import FamilyConfig, build_model, read_config
from sama_jax.storage import files
from sama_jax.terminal import ProgressBar, console
from sama_jax.texts.read import Texts, read_texts
from sama_jax.texts.tokenizer import TextTokenizer, require_ids_fit
from sama_jax.training.step import (
    HELD_OUT,
    Recipe,
    TrainState,
    batch_rows,
    init_state,
    learning_rate,
    make_recipe,
    num_predicted,
    train_step,
)
from sama_jax.weights import model_folder
from sama_jax.weights.orbax import Checkpoints

LOG_EVERY = 10
SLOW_STEP = 0.5
"""Seconds a step from which the host waits for every step."""
MIN_WINDOW = 16
"""Tokens; a shorter remainder of a text cut into windows is dropped."""
EVAL_TEXTS, EVAL_ROWS = 256, 32
REMAT_PARAMS = 300_000_000
"""From this size on, blocks are recomputed in the backward pass: activations would not fit."""

MANIFEST, LOG, CHECKPOINTS = "train.json", "log.jsonl", "checkpoints"
END, MASK = "<|endoftext|>", "<|mdm_mask|>"
MASK_TOKENS = (MASK, "[MASK]", "<mask>")
"""Mask tokens that a given tokenizer may have."""


# --- held-out loss -------------------------------------------------------------------------------


class _Heldout(NamedTuple):
    """Texts for the held-out loss, as the evaluation program takes them."""

    name: str
    num_predicted: int
    """Tokens that their losses stand for."""
    tokens: np.ndarray
    valid: np.ndarray
    keys: TextKeyData


def _heldout(name: str, kind: str, sequences: list[np.ndarray]) -> _Heldout:
    chosen = sequences[:EVAL_TEXTS]
    tokens, lengths = _pad(chosen, _padded_length(chosen), 0)
    data = [rng.text_key_data(s) for s in chosen]
    keys = TextKeyData(*(jnp.array([getattr(d, f) for d in data]) for f in TextKeyData._fields))
    valid = np.arange(tokens.shape[1])[None] < lengths[:, None]
    return _Heldout(name, num_predicted(kind, lengths), tokens, valid, keys)


def _mean_nll(run: Callable[..., Array], params: Params, held: _Heldout, bar: ProgressBar) -> float:
    """Nats a token over all held-out texts."""
    total = 0.0
    for start in range(0, len(held.tokens), EVAL_ROWS):
        index = np.arange(start, start + EVAL_ROWS)
        real = index < len(held.tokens)
        index = np.where(real, index, 0)
        keys = TextKeyData(*(np.asarray(x)[index] for x in held.keys))
        nll = run(params, held.tokens[index], held.valid[index], keys)
        total += float(np.asarray(nll, np.float64)[real].sum())
        bar.note("")
        bar.advance(int(real.sum()))
    return total / held.num_predicted


# --- texts to arrays -----------------------------------------------------------------------------


def token_sequences(
    tokenizer: TextTokenizer, texts: list[str], settings: TrainSettings, quiet: bool = True
) -> list[np.ndarray]:
    """Token ids of each text cut at `max_length`, or all its windows of `max_length` tokens.

    A remainder under 16 tokens is dropped, unless it is the whole text; so are texts without a
    token.
    """
    length = settings.max_length
    with ProgressBar("tokenise", len(texts), "texts", quiet=quiet or len(texts) < 2000) as bar:
        limit = 2**31 - 1 if settings.windows else length
        encoded = tokenizer.encode(texts, limit, bar.advance)
    sequences = []
    for item in encoded:
        pieces = [item.ids[i : i + length] for i in range(0, len(item.ids), length)]
        sequences += [p for i, p in enumerate(pieces) if i == 0 or len(p) >= MIN_WINDOW]
    return sequences


def _padded_length(sequences: list[np.ndarray]) -> int:
    return -(-max(len(s) for s in sequences) // 8) * 8


def _pad(sequences: list[np.ndarray], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(sequences), length), pad_id, np.int32)
    for row, ids in zip(tokens, sequences):
        row[: len(ids)] = ids
    return tokens, np.array([len(s) for s in sequences], np.int32)


def _training_texts(path: Path, say: Callable[[str], None]) -> list[str]:
    """The texts to learn. Non-members of a labelled file are left out, or they would be members."""
    found: Texts = read_texts(path)
    texts = [t.text for t in found.texts if t.label != 0]
    left_out = len(found.texts) - len(texts)
    if not texts:
        raise DataError(
            f"{path}: every text has label 0 (non-member); expected texts to train on, with label "
            "1 or without a label"
        )
    if left_out:
        say(f"{left_out:,} texts with label 0 (non-members) are left out of training")
    return texts


def _digest(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# --- the run -------------------------------------------------------------------------------------


class _Start(NamedTuple):
    """What a run starts from."""

    model: Model
    family: str
    config: dict[str, Any]
    tokenizer: TextTokenizer
    params: Callable[[], Params]


def finetune(
    base: Path,
    data: Path,
    out: Path,
    settings: TrainSettings,
    heldout: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains all parameters of the model folder `base` on the texts of `data`, into folder `out`.

    The objective is that of the model's kind (`training.loss_of_kind`). The same call continues an
    interrupted run and returns at once from a finished one. Weights are kept and written in
    float32, whatever `base` stores.

    Returns:
      `steps`, `tokens`, `texts`, `loss` (mean of the last ten steps), `nll_before`, `nll_after`
      (nats a token, by `training.HELD_OUT`), `nll_on`, `seconds`, `tokens_per_second`.

    Raises:
      UsageError: `out` belongs to another run.
      DataError, ModelError: inputs.
      Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
    """
    with _interruptible(out) as stop:
        base = model_folder.resolve(base)
        folder = model_folder.open_folder(base, dtype="float32", longest=settings.max_length)
        _require_trainable(folder.family, settings, str(base))
        tokenizer = TextTokenizer.from_folder(base)
        require_ids_fit(tokenizer, folder.model.vocab_size, str(base))
        identity = {"command": "finetune", "base": folder.identity}
        run = _open_run(out, identity, settings, data, heldout, quiet)
        if run.finished:
            return run.manifest["result"]
        _copy_companions(base, out)
        start = _Start(
            folder.model,
            folder.family.family,
            folder.config,
            tokenizer,
            lambda: model_folder.load(folder, _device()),
        )
        return _train(start, run, settings, stop)


def pretrain(
    config: Path,
    data: Path,
    out: Path,
    settings: TrainSettings,
    tokenizer: Path | None = None,
    heldout: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains a model from random weights, into folder `out`.

    Args:
      config: the `config.json` of a supported family; with no tokenizer given, its two last ids
        below `vocab_size` are the end of text and the mask token, and may be left out.
      tokenizer: `tokenizer.json`, or None to train a byte-level BPE on the texts.

    Returns and raises what `finetune` does.
    """
    with _interruptible(out) as stop:
        partial_config = _read_pretrain_config(config)
        vocab_size = partial_config["vocab_size"]
        kind = read_config(partial_config, str(config)).kind
        if tokenizer is None:
            name, ids = "trained here", _trained_ids(kind, vocab_size)
        else:
            loaded = TextTokenizer.from_file(tokenizer)
            name, ids = loaded.fingerprint, _given_ids(kind, loaded)
        full = _with_token_ids(partial_config, ids, str(config))
        family = read_config(full, str(config))
        _require_trainable(family, settings, str(config))
        if kind != "autoregressive" and full.get("mask_token_id") is None:
            raise ModelError(
                f"{config}: has no mask_token_id, and the tokenizer has none of the tokens "
                f"{', '.join(MASK_TOKENS)}; add one of them"
            )
        identity = {
            "command": "pretrain",
            "base": hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest(),
            "tokenizer": name,
        }
        run = _open_run(out, identity, settings, data, heldout, quiet)
        if run.finished:
            return run.manifest["result"]
        placed = _place_tokenizer(tokenizer, run, vocab_size)
        model = build_model(family, family.mask_id or 0, jnp.dtype("float32"))
        require_ids_fit(placed, model.vocab_size, str(config))
        key = rng.run_key(settings.seed, rng.Purpose.INITIAL_WEIGHTS)
        # Outside jit, initialisers run one by one: 20 s instead of 2.
        init = jax.jit(model.init)
        start = _Start(model, family.family, full, placed, lambda: init(key))
        return _train(start, run, settings, stop)


def _require_trainable(family: FamilyConfig, settings: TrainSettings, where: str) -> None:
    """Raises where settings ask for what this kind of model cannot do."""
    if settings.train_on_padding and family.kind != "diffusion":
        raise UsageError(
            f"{where}: train_on_padding is defined for diffusion models, this one is "
            f"{family.kind}; leave it out"
        )
    limit = family.arch.max_length
    if limit is not None and settings.max_length > limit:
        raise ModelError(
            f"{where}: has position embeddings for {limit} tokens, but max_length is "
            f"{settings.max_length}; lower it"
        )


class _Run(NamedTuple):
    """An opened output folder and the texts that belong to it."""

    out: Path
    manifest: dict[str, Any]
    texts: list[str]
    heldout: list[str] | None
    quiet: bool
    say: Callable[[str], None]

    @property
    def finished(self) -> bool:
        return (self.out / model_folder.CONFIG).is_file()

    def remember(self, **values: Any) -> None:
        """Adds to the manifest on disk."""
        self.manifest.update(values)
        files.write_json(self.out / MANIFEST, self.manifest)


def _open_run(
    out: Path,
    identity: dict[str, Any],
    settings: TrainSettings,
    data: Path,
    heldout: Path | None,
    quiet: bool,
) -> _Run:
    """Reads the texts and compares the run with what `out` holds. Raises `UsageError`."""
    say = console(quiet).print
    texts = _training_texts(data, say)
    held = None if heldout is None else [t.text for t in read_texts(heldout).texts]
    identity = {
        **identity,
        "data": _digest(texts),
        "heldout": None if held is None else _digest(held),
        # When states are saved changes no number.
        "settings": {
            k: v for k, v in dataclasses.asdict(settings).items() if k != "checkpoint_every"
        },
    }
    path = out / MANIFEST
    if not path.is_file():
        if (out / model_folder.CONFIG).is_file():
            raise UsageError(
                f"{out}: holds a model that was not trained here; choose another output folder"
            )
        if out.is_dir() and any(out.iterdir()):
            raise UsageError(
                f"{out}: not empty, and has no {MANIFEST} of a training to go on with; choose a "
                "new folder"
            )
        run = _Run(out, {}, texts, held, quiet, say)
        run.remember(identity=identity)
        return run
    try:
        manifest = json.loads(path.read_text("utf-8"))
        before = manifest["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not readable ({error}); choose another output folder") from None
    _require_same_run(out, before, identity)
    run = _Run(out, manifest, texts, held, quiet, say)
    if run.finished:
        say(f"{out}: this training is finished already; nothing to do")
    return run


def _require_same_run(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    def flat(identity: dict[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in identity.items() if k != "settings"}
        return {**rest, **identity.get("settings", {})}

    old, new = flat(before), flat(now)
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    if changed:
        shown = "; ".join(f"{k} was {_short(old.get(k))}, is {_short(new.get(k))}" for k in changed)
        raise UsageError(
            f"{out}: belongs to another training run ({shown}); choose another output folder, or "
            "delete this one to start over"
        )


def _short(value: Any) -> Any:
    return value[:16] if isinstance(value, str) else value


def _train(start: _Start, run: _Run, settings: TrainSettings, stop: "_Stop") -> dict[str, Any]:
    """From a checked start to a finished model folder."""
    sequences = _learnable(start, run.texts, settings, run.quiet, "training")
    tokens, lengths = _training_arrays(sequences, settings, start)
    held = _held_texts(start, run, settings, sequences)
    steps = math.ceil(settings.epochs * len(sequences) / settings.batch_size)
    abstract = jax.eval_shape(start.model.init, jax.random.key(0))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    run.say(_estimate(sequences, tokens.shape[1], steps, settings, num_params))

    options = {"dtype": jnp.dtype(settings.dtype), "remat": num_params > REMAT_PARAMS}
    model = dataclasses.replace(start.model, **options)  # pyright: ignore
    recipe = make_recipe(settings, steps)
    evaluate = partial(HELD_OUT[model.kind], model, np.uint32(settings.seed))
    with Checkpoints(run.out / CHECKPOINTS) as checkpoints:
        state = _restore(checkpoints, abstract, recipe)
        if state is None:
            params = jax.device_put(start.params(), _device())
            run.remember(nll_before=_evaluate(evaluate, params, held, run, "before"))
            state = init_state(params, recipe)
        elif int(state.step) < steps:
            run.say(f"continuing after step {int(state.step):,} of {steps:,}")
        loop = _Loop(run, settings, recipe, steps, checkpoints, stop)
        state = loop.train(model, state, tokens, lengths)
    after = _evaluate(evaluate, state.params, held, run, "after")
    before = run.manifest["nll_before"]
    result = {
        "steps": steps,
        "tokens": loop.tokens,
        "texts": len(run.texts),
        "loss": loop.loss,
        "nll_before": before,
        "nll_after": after,
        "nll_on": held.name,
        "seconds": round(loop.seconds, 3),
        "tokens_per_second": round(loop.tokens / max(loop.seconds, 1e-9), 1),
    }
    run.remember(result=result)
    model_folder.save_folder(
        run.out, state.params, start.model, start.config, run.out, start.family
    )
    shutil.rmtree(run.out / CHECKPOINTS, ignore_errors=True)
    run.say(
        f"{before:.3f} -> {after:.3f} nats a token on {held.name}; {run.out} is a model folder now"
    )
    return result


def _estimate(
    sequences: list[np.ndarray], length: int, steps: int, settings: TrainSettings, num_params: int
) -> str:
    tokens = sum(map(len, sequences))
    total = tokens * steps * settings.batch_size // len(sequences)
    return (
        f"{len(sequences):,} sequences, {tokens:,} tokens, padded to {length}; {steps:,} steps of "
        f"{settings.batch_size}, about {total:,} tokens; {num_params / 1e6:.2f} M parameters, "
        f"activations in {settings.dtype}"
    )


def _learnable(
    start: _Start, texts: list[str], settings: TrainSettings, quiet: bool, name: str
) -> list[np.ndarray]:
    """The token sequences that have something to predict."""
    sequences = token_sequences(start.tokenizer, texts, settings, quiet)
    if start.model.kind == "autoregressive":  # nothing predicts a first token
        sequences = [s for s in sequences if len(s) > 1]
    if not sequences:
        raise DataError(f"none of the {len(texts):,} {name} texts has a token to predict")
    return sequences


def _training_arrays(
    sequences: list[np.ndarray], settings: TrainSettings, start: _Start
) -> tuple[np.ndarray, np.ndarray]:
    if not settings.train_on_padding:
        return _pad(sequences, _padded_length(sequences), 0)
    pad_id = start.config.get("pad_token_id", start.config.get("eos_token_id"))
    if not isinstance(pad_id, int):
        raise ModelError(
            "train_on_padding needs a pad_token_id or eos_token_id in the model's config.json, "
            f"found {pad_id!r}"
        )
    tokens, lengths = _pad(sequences, settings.max_length, pad_id)
    return tokens, np.full_like(lengths, settings.max_length)


def _held_texts(
    start: _Start, run: _Run, settings: TrainSettings, sequences: list[np.ndarray]
) -> _Heldout:
    kind = start.model.kind
    if run.heldout is None:
        name = f"the first {min(len(sequences), EVAL_TEXTS)} training texts"
        return _heldout(name, kind, sequences)
    found = _learnable(start, run.heldout[:EVAL_TEXTS], settings, run.quiet, "held-out")
    return _heldout(f"{min(len(found), EVAL_TEXTS)} held-out texts", kind, found)


def _evaluate(
    evaluate: Callable[..., Array], params: Params, held: _Heldout, run: _Run, when: str
) -> float:
    name = f"loss {when} training"
    with ProgressBar(name, len(held.tokens), "texts", quiet=run.quiet) as bar:
        bar.note("compiling" if when == "before" else "")
        return _mean_nll(evaluate, params, held, bar)


def _restore(checkpoints: Checkpoints, params: Params, recipe: Recipe) -> TrainState | None:
    """The newest state that a run like this one left behind; `params` are shapes."""
    abstract = jax.eval_shape(lambda p: init_state(p, recipe), params)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_device()), abstract
    )
    found = checkpoints.restore(abstract)
    return None if found is None else found[1]


class _Loop:
    """The host side of training. Keeps the device busy: it waits for a loss every ten steps."""

    def __init__(
        self,
        run: _Run,
        settings: TrainSettings,
        recipe: Recipe,
        steps: int,
        checkpoints: Checkpoints,
        stop: "_Stop",
    ):
        self.run, self.settings, self.recipe, self.steps = run, settings, recipe, steps
        self.checkpoints, self.stop = checkpoints, stop
        self.tokens, self.seconds, self.loss = 0, 0.0, float("nan")
        self._pending: list[Array] = []
        self._mark = 0.0

    def train(
        self, model: Model, state: TrainState, tokens: np.ndarray, lengths: np.ndarray
    ) -> TrainState:
        """All remaining steps; the state is on disk when this returns or raises `Interrupted`."""
        first = int(state.step)
        log = self._open_log(first)
        key = rng.run_key(self.settings.seed, rng.Purpose.TRAINING_MASKS)
        columns = np.arange(tokens.shape[1])[None, :]
        bar = ProgressBar("train", self.steps, "steps", quiet=self.run.quiet, done=first)
        with self.stop.deferred(), contextlib.closing(log), bar:
            bar.note("compiling the training step (once)" if first < self.steps else "")
            slow = True  # until the first ten steps are timed
            for done in range(first + 1, self.steps + 1):
                rows = batch_rows(
                    self.settings.seed, done - 1, self.settings.batch_size, len(lengths)
                )
                valid = columns < lengths[rows][:, None]
                state, loss = train_step(model, self.recipe, state, tokens[rows], valid, key)
                if done == first + 1:
                    self._mark = time.monotonic()  # compiled; its time is not training's
                    bar.note("")
                self._pending.append(loss)
                self.tokens += int(lengths[rows].sum())
                save = done % self.settings.checkpoint_every == 0 or done == self.steps
                save |= self.stop.requested
                if save or done % LOG_EVERY == 0:
                    slow = self._flush(done, log) > SLOW_STEP
                    bar.note(f"loss {self.loss:.3f}, {self.tokens / self.seconds:,.0f} tokens/s")
                elif slow:
                    loss.block_until_ready()  # so that progress and Ctrl-C keep up
                bar.advance(1)
                if save:
                    self.checkpoints.save(done, state)
                if self.stop.requested:
                    self.checkpoints.wait()
                    raise self.stop.error(f"saved after step {done:,} of {self.steps:,}")
        self.checkpoints.wait()
        return state

    def _flush(self, done: int, log: files.AppendOnly) -> float:
        """Waits for the losses since the last call and logs their mean; seconds a step."""
        values = np.asarray(jax.device_get(self._pending))
        now = time.monotonic()
        elapsed, self._mark = now - self._mark, now
        self.seconds += elapsed
        self.loss, self._pending = float(values.mean()), []
        if not np.isfinite(values).all():
            raise UsageError(
                f"the loss is {self.loss} within the {len(values)} steps before step {done}; lower "
                f"learning_rate (now {self.settings.learning_rate:g}) or use float32"
            )
        log.append_json(
            {
                "step": done,
                "loss": round(self.loss, 6),
                "lr": float(f"{float(learning_rate(self.recipe, done - 1)):.6g}"),
                "seconds": round(self.seconds, 3),
                "tokens": self.tokens,
            }
        )
        return elapsed / len(values)

    def _open_log(self, first: int) -> files.AppendOnly:
        """The log without the lines of steps that will be repeated; counters go on from it."""
        path = self.run.out / LOG
        kept = [line for line in files.read_json_lines(path)[0] if line["step"] <= first]
        files.write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        if kept:
            self.loss, self.seconds, self.tokens = (
                kept[-1][k] for k in ("loss", "seconds", "tokens")
            )
        return files.AppendOnly(path)


# --- interruption --------------------------------------------------------------------------------


class _Stop:
    """A wish to stop. Inside `deferred` it waits for the loop; a second one does not."""

    def __init__(self, out: Path):
        self.out, self.requested, self._defer = out, False, False

    def __call__(self, *_: object) -> None:
        if not self._defer or self.requested:
            raise KeyboardInterrupt
        self.requested = True

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._defer = True
        try:
            yield
        finally:
            self._defer = False

    def error(self, detail: str) -> Interrupted:
        return Interrupted(f"{self.out}: interrupted, {detail}; the same command continues")


@contextlib.contextmanager
def _interruptible(out: Path) -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM become `Interrupted`; only the main thread can catch signals."""
    stop, before = _Stop(out), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    try:
        yield stop
    except KeyboardInterrupt:
        raise stop.error("work since the last checkpoint is lost") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- what a new model needs ----------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` ids; the last two are end of text and mask.

    Where the texts give fewer merges, reserved tokens that no text contains fill the rest.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    clean = (t.encode("utf-8", "replace").decode() for t in texts)
    tokenizer.train_from_iterator(clean, trainer, length=len(texts))
    missing = vocab_size - 2 - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(missing)])
    tokenizer.add_special_tokens([END, MASK])
    assert tokenizer.token_to_id(MASK) == vocab_size - 1
    return tokenizer


def _read_pretrain_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected a model's config.json") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise ModelError(f"{path}: expected a JSON object with an integer vocab_size")
    if config["vocab_size"] < 258:
        raise ModelError(
            f"{path}: vocab_size is {config['vocab_size']}; expected at least 258: 256 bytes, end "
            "of text and mask"
        )
    return config


def _trained_ids(kind: str, vocab_size: int) -> dict[str, int | None]:
    """Where `train_tokenizer` puts the tokens that a config of this kind names."""
    ids: dict[str, int | None] = dict.fromkeys(("eos_token_id", "pad_token_id"), vocab_size - 2)
    if kind == "autoregressive":  # transformers' classes would assume id 1
        return {**ids, "bos_token_id": vocab_size - 2}
    return {"mask_token_id": vocab_size - 1, **ids}


def _given_ids(kind: str, tokenizer: TextTokenizer) -> dict[str, int | None]:
    """The ids that only a given tokenizer can tell."""
    if kind == "autoregressive":
        return {}
    return {"mask_token_id": tokenizer.token_id(_mask_token(tokenizer) or MASK)}


def _mask_token(tokenizer: TextTokenizer) -> str | None:
    return next((name for name in MASK_TOKENS if tokenizer.token_id(name) is not None), None)


def _place_tokenizer(given: Path | None, run: _Run, vocab_size: int) -> TextTokenizer:
    """The tokenizer in the output folder: copied, or trained once and then kept."""
    path = run.out / "tokenizer.json"
    placed = run.manifest.get("tokenizer_sha256")
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != placed:
        if given is None:
            run.say(f"training a tokenizer of {vocab_size:,} ids on {len(run.texts):,} texts")
            content = train_tokenizer(run.texts, vocab_size).to_str(pretty=True).encode()
        else:
            content = given.read_bytes()
        files.write_atomic(path, content)
        written = TextTokenizer.from_file(path)
        end = END if written.token_id(END) is not None else None
        special = {"eos_token": end, "pad_token": end, "mask_token": _mask_token(written)}
        # transformers would add a token that the tokenizer lacks, above the model's last row.
        fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
        fast |= {k: name for k, name in special.items() if name is not None}
        files.write_json(run.out / "tokenizer_config.json", fast)
        run.remember(tokenizer_sha256=hashlib.sha256(content).hexdigest())
    return TextTokenizer.from_file(path)


def _with_token_ids(
    config: dict[str, Any], ids: dict[str, int | None], where: str
) -> dict[str, Any]:
    """The config with the ids of `{field: id}` filled in. Raises `ModelError` where they differ."""
    wrong = [
        f"{field} is {config[field]}, but the tokenizer gives it {number}"
        for field, number in ids.items()
        if number is not None and config.get(field) not in (None, number)
    ]
    if wrong:
        raise ModelError(f"{where}: {'; '.join(wrong)}; correct the field or leave it out")
    return {**config, **{f: n for f, n in ids.items() if n is not None}}


def _copy_companions(base: Path, out: Path) -> None:
    """Tokenizer and other files beside the weights; not what this program writes itself."""
    with files.writing(out):
        for file in model_folder.companions(base):
            if file.name not in (MANIFEST, LOG, "README.md"):
                shutil.copyfile(file, out / file.name)


def _device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])
