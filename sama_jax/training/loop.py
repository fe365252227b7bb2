"""Trains from a checked start to a finished model folder.

A run is a function of settings, texts and starting weights alone. Masks derive from (seed, step)
and the order of texts from (seed, epoch), so an interrupted run that continues ends with the same
bits as one that was not (on a backend whose kernels are deterministic, as the CPU's are).
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, Int

from sama_jax import rng
from sama_jax.arrays import Model, Params, Rendered
from sama_jax.config import TrainSettings
from sama_jax.errors import DataError, ModelError, UsageError
from sama_jax.models.families.weight_table import Table
from sama_jax.storage import files
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.training import lora, privacy
from sama_jax.training.held_out import MAX_TEXTS, HeldOut, held_out, mean_nll, text_keys
from sama_jax.training.interruption import Stop
from sama_jax.training.runs import (
    CHECKPOINTS,
    LOG,
    SECRETS,
    SNAPSHOTS,
    Run,
    copy_companions,
    digests,
)
from sama_jax.training.sequences import (
    Padded,
    Tokens,
    predictable,
    token_sequences,
    training_arrays,
)
from sama_jax.training.step import (
    HELD_OUT,
    Recipe,
    TrainState,
    batch_rows,
    init_state,
    learning_rate,
    make_recipe,
    train_step,
)
from sama_jax.weights import saving
from sama_jax.weights.finite import not_finite
from sama_jax.weights.orbax import Checkpoints

LOG_EVERY = 10
"""Steps from one line of the log to the next."""
SLOW_STEP = 0.5
"""Seconds a step from which the host waits for every step."""
REMAT_PARAMS = 300_000_000
"""From this size on, blocks are recomputed in the backward pass: activations would not fit."""


class Start(NamedTuple):
    """What a run starts from."""

    model: Model
    weights: Table
    config: dict[str, Any]
    tokenizer: TextTokenizer
    params: Callable[[], Params]
    """Loads or draws the first weights."""
    where: str
    """Where they come from, for messages."""
    adapter: lora.Adapter | None = None
    """What is trained in the place of all weights."""

    @property
    def layout(self) -> lora.Layout | None:
        """Returns where the adapter stands; None if all weights are trained."""
        return None if self.adapter is None else self.adapter.layout

    def save(self, out: Path, trained: Params) -> None:
        """Writes what was trained: a model folder, or an adapter folder."""
        if self.adapter is None:
            saving.save_folder(out, trained, self.model, self.config, out, self.weights)
        else:
            lora.save(out, trained, self.adapter)


def device() -> SingleDeviceSharding:
    """Returns where training computes: on the first device."""
    return SingleDeviceSharding(jax.devices()[0])


def train(start: Start, run: Run, settings: TrainSettings, stop: Stop) -> dict[str, Any]:
    """Trains, measures the held-out loss before and after, and writes the model into `run.out`.

    Returns the result that the manifest keeps.
    """
    sequences = _learnable(start, run, run.texts, settings, "training")
    padded = training_arrays(sequences, settings, start.config, start.model.vocab_size)
    held = _held_texts(start, run, settings, sequences)
    steps = math.ceil(settings.epochs * len(sequences) / settings.batch_size)
    abstract = jax.eval_shape(start.model.init, jax.random.key(0))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    run.terminal.say(_estimate(sequences, padded.tokens.shape[1], steps, settings, num_params))

    options = {"dtype": jnp.dtype(settings.dtype), "remat": num_params > REMAT_PARAMS}
    # Models are dataclasses, which their protocol cannot say.
    model = dataclasses.replace(start.model, **options)  # pyright: ignore
    recipe = make_recipe(settings, steps)
    plan = _privacy(run, settings, len(sequences), steps)
    if plan is not None:  # texts are clipped one by one
        recipe = recipe._replace(grad_clip=np.float32(np.inf))
    evaluate = partial(HELD_OUT[model.kind], model, np.uint32(settings.seed))
    with Checkpoints(run.out / CHECKPOINTS) as checkpoints:
        base, first = _first_weights(start, settings)
        whole = partial(lora.beside, start.layout, base)
        shapes = abstract if start.adapter is None else jax.eval_shape(first)
        state = _restore(checkpoints, shapes, recipe)
        if plan is None:
            advance = _plain_steps(model, recipe, settings, padded, start.layout, base)
        else:
            is_new = state is None and not (run.out / SNAPSHOTS).exists()
            secret = privacy.secret_of(run.out / SECRETS, is_new)
            rows, keys = settings.batch_size // settings.accumulate, text_keys(sequences)
            given = plan, secret, rows, model, recipe, start.layout, base, padded, keys
            advance = privacy.Mechanism(*given, settings.seed).step
        if state is None:
            params = jax.device_put(first(), device())
            run.remember(nll_before=_first_loss(start, whole(params), evaluate, held, run))
            state = init_state(params, recipe)
        elif "nll_before" not in run.manifest:
            raise UsageError(
                f"{run.out}: has a checkpoint, but no longer says what the loss was before it; "
                "delete the folder to start over"
            )
        elif int(state.step) < steps:
            run.terminal.say(f"continuing after step {int(state.step):,} of {steps:,}")
        loop = Loop(run, settings, recipe, steps, checkpoints, stop, start)
        state = loop.train(advance, state, padded)
    after = mean_nll(evaluate, whole(state.params), held, "after", run.terminal)
    if (names := not_finite(state.params)) or not math.isfinite(after):
        what = f"after the last step the loss is {after}"
        raise _diverged(settings, what + (f", with NaN or infinity in {names}" if names else ""))
    result = _result(loop, run, held, after)
    if plan is not None:
        result["privacy"] = plan.told(steps)
    run.remember(result=result)
    start.save(run.out, state.params)
    run.remember(files=digests(run.out))
    run.forget_states()
    kind = "a model folder" if start.adapter is None else f"an adapter of {start.where}"
    run.terminal.say(
        f"{result['nll_before']:.3f} -> {after:.3f} nats a token on {held.name}; {run.out} is "
        f"{kind} now"
    )
    return result


def _first_weights(
    start: Start, settings: TrainSettings
) -> tuple[Params | None, Callable[[], Params]]:
    """Returns the base that stays, if it does, and what loads or draws the weights to train."""
    if start.adapter is None:
        return None, start.params
    key = rng.run_key(settings.seed, rng.Purpose.ADAPTER)
    return jax.device_put(start.params(), device()), partial(lora.init, start.adapter, key)


def _privacy(run: Run, settings: TrainSettings, texts: int, steps: int) -> privacy.Plan | None:
    """Plans a private training, writes down and says what it will cost; None for any other."""
    if not settings.dp.is_private:
        return None
    noise = (run.manifest.get("privacy") or {}).get("noise")
    plan = privacy.plan_of(settings.dp, texts, settings.batch_size, steps, noise)
    told = plan.told(steps)
    run.remember(privacy=told)
    run.terminal.say(
        f"private for each text: epsilon {told['epsilon']:.3f} at delta {plan.delta:g} after "
        f"{steps:,} steps, with noise {plan.noise:.4g} times the norm {plan.clip:g}; of "
        f"{texts:,} texts each is in a step with probability {plan.rate:.3g}. This holds for the "
        f"weights: keep train.json, {LOG} and {SECRETS}/ to yourself"
    )
    return plan


Advance = Callable[[TrainState, int], tuple[TrainState, Float[Array, ""], Int[np.ndarray, " b"]]]
"""State and number of a step, from 0 -> the next state, the loss, and the rows that it read."""


def _plain_steps(
    model: Model,
    recipe: Recipe,
    settings: TrainSettings,
    padded: Padded,
    layout: lora.Layout | None,
    base: Params | None,
) -> Advance:
    """Returns what makes a step of ordinary training: each epoch reads every row once."""
    key = rng.run_key(settings.seed, rng.Purpose.TRAINING_MASKS)

    def advance(state: TrainState, number: int) -> Any:
        rows = batch_rows(settings.seed, number, settings.batch_size, len(padded.lengths))
        batch = padded.tokens[rows], padded.valid(rows), key, padded.learned[rows]
        given = model, settings.accumulate, recipe, state, *batch
        return *train_step(*given, layout=layout, base=base), rows

    return advance


def _first_loss(
    start: Start, params: Params, evaluate: Callable[..., Array], held: HeldOut, run: Run
) -> float:
    """Measures the loss before training. Raises `ModelError` if weights or loss are not finite."""
    if names := not_finite(params):
        raise ModelError(f"{start.where}: the weights hold NaN or infinity, in {names}")
    found = mean_nll(evaluate, params, held, "before", run.terminal)
    if not math.isfinite(found):
        raise ModelError(
            f"{start.where}: the loss before training is {found}, though all weights are finite; "
            "the network overflows: is its config.json that of these weights?"
        )
    return found


def _diverged(settings: TrainSettings, what: str) -> UsageError:
    return UsageError(
        f"{what}; lower learning_rate (now {settings.learning_rate:g}) or weight_decay (now "
        f"{settings.weight_decay:g}), or use float32, in a new output folder"
    )


def _result(loop: "Loop", run: Run, held: HeldOut, after: float) -> dict[str, Any]:
    return {
        "steps": loop.steps,
        "tokens": loop.tokens,
        "texts": len(run.texts),
        "loss": loop.loss,
        "nll_before": run.manifest["nll_before"],
        "nll_after": after,
        "nll_on": held.name,
        "seconds": round(loop.seconds, 3),
        "tokens_per_second": round(loop.tokens / max(loop.seconds, 1e-9), 1),
    }


def _estimate(
    sequences: Sequence[Tokens], length: int, steps: int, settings: TrainSettings, num_params: int
) -> str:
    tokens = sum(len(s.ids) for s in sequences)
    total = tokens * steps * settings.batch_size // len(sequences)
    return (
        f"{len(sequences):,} sequences, {tokens:,} tokens, padded to {length}; {steps:,} steps of "
        f"{settings.batch_size}, about {total:,} tokens; {num_params / 1e6:.2f} M parameters, "
        f"activations in {settings.dtype}"
    )


def _learnable(
    start: Start, run: Run, texts: Sequence[str | Rendered], settings: TrainSettings, name: str
) -> list[Tokens]:
    """Encodes the texts; raises `DataError` if none has a token to predict."""
    found = token_sequences(start.tokenizer, texts, settings, run.terminal)
    sequences = predictable(found, start.model.kind)
    if not sequences:
        raise DataError(f"none of the {len(texts):,} {name} texts has a token to predict")
    return sequences


def _held_texts(
    start: Start, run: Run, settings: TrainSettings, sequences: Sequence[Tokens]
) -> HeldOut:
    """Prepares the held-out texts, or the first training texts if there are none."""
    kind = start.model.kind
    if run.heldout is None:
        name = f"the first {min(len(sequences), MAX_TEXTS)} training texts"
        return held_out(name, kind, sequences)
    found = _learnable(start, run, run.heldout[:MAX_TEXTS], settings, "held-out")
    return held_out(f"{min(len(found), MAX_TEXTS)} held-out texts", kind, found)


def _restore(checkpoints: Checkpoints, params: Params, recipe: Recipe) -> TrainState | None:
    """Reads the newest state of this run, if there is one; `params` are shapes."""
    abstract = jax.eval_shape(lambda p: init_state(p, recipe), params)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device()), abstract
    )
    found = checkpoints.restore(abstract)
    return None if found is None else found[1]


def _is_log_line(line: Any) -> bool:
    """Tells whether this is a line of the log as `Loop` writes it."""
    numbers = ("step", "loss", "seconds", "tokens")
    if not isinstance(line, dict) or type(line.get("left", [])) is not list:
        return False
    values = [*(line.get(k) for k in numbers), *line.get("left", [])]
    return all(type(x) in (int, float) and math.isfinite(x) for x in values)


class Loop:
    """Runs the steps. It keeps the device busy by waiting for losses only every ten steps."""

    def __init__(
        self,
        run: Run,
        settings: TrainSettings,
        recipe: Recipe,
        steps: int,
        checkpoints: Checkpoints,
        stop: Stop,
        start: Start,
    ):
        self.run, self.settings, self.recipe, self.steps = run, settings, recipe, steps
        self.checkpoints, self.stop, self.start = checkpoints, stop, start
        self.tokens, self.seconds, self.loss = 0, 0.0, float("nan")
        self._pending: list[Float[Array, ""]] = []
        self._mark = 0.0

    def train(self, advance: Advance, state: TrainState, padded: Padded) -> TrainState:
        """Runs all remaining steps.

        The state is on disk when this returns or raises `Interrupted`.
        """
        first = done = int(state.step)
        log = self._open_log(first)
        bar = self.run.terminal.bar("train", self.steps, "steps", done=first)
        with contextlib.closing(log), self.stop.deferred(), bar:
            bar.note("compiling the training step (once)" if first < self.steps else "")
            slow = True  # until the first ten steps are timed
            for done in range(first + 1, self.steps + 1):
                state, loss, rows = advance(state, done - 1)
                if done == first + 1:
                    self._mark = time.monotonic()  # compiled; its time is not training's
                    bar.note("")
                self._pending.append(loss)
                self.tokens += int(padded.lengths[rows].sum())
                save = done % self.settings.checkpoint_every == 0 or done == self.steps
                if save or done % LOG_EVERY == 0:
                    slow = self._flush(done, log) > SLOW_STEP
                    bar.note(f"loss {self.loss:.3f}, {self.tokens / self.seconds:,.0f} tokens/s")
                elif slow:
                    loss.block_until_ready()  # so that progress and Ctrl-C keep up
                bar.advance(1)
                # Not before: nearly every signal comes while the host waits for the device.
                stopped = self.stop.requested
                if stopped and self._pending:
                    self._leave(done, log)
                # Before the checkpoint: a run that goes on from it does not pass here again.
                every = self.settings.snapshot_every
                if every and done % every == 0 and done < self.steps:
                    self._snapshot(done, state)
                if save or stopped:
                    self.checkpoints.save(done, state)
                if stopped:
                    break
            self.checkpoints.wait()
        if self.stop.requested:  # `deferred` ends here: a signal to the end of it is not lost
            raise self.stop.error(f"saved after step {done:,} of {self.steps:,}")
        self._keep_lines(self.steps)  # without what a stopped run has left
        return state

    def _snapshot(self, done: int, state: TrainState) -> None:
        """Writes the model of this step into a folder of its own."""
        out = self.run.out / SNAPSHOTS / f"step-{done:06}"
        out.mkdir(parents=True, exist_ok=True)
        copy_companions(self.run.out, out)
        self.start.save(out, state.params)

    def _flush(self, done: int, log: files.AppendOnly) -> float:
        """Waits for the losses since the last line and logs their mean; returns seconds a step."""
        values, elapsed = self._losses(done)
        self._pending = []
        self._log(log, done, lr=float(f"{float(learning_rate(self.recipe, done - 1)):.6g}"))
        return elapsed / len(values)

    def _leave(self, done: int, log: files.AppendOnly) -> None:
        """Logs the losses that no line tells yet, for the run that goes on from here.

        Its lines are then those of a run that was never stopped.
        """
        values, _ = self._losses(done)
        self._log(log, done, left=values.tolist())

    def _losses(self, done: int) -> tuple[Float[np.ndarray, " n"], float]:
        """Waits for the losses since the last line; returns them and the seconds that they took."""
        values = np.asarray(jax.device_get(self._pending), np.float32)
        now = time.monotonic()
        elapsed, self._mark = now - self._mark, now
        self.seconds += elapsed
        self.loss = round(float(values.mean()), 6)  # as the log has it, for who goes on from there
        if not np.isfinite(values).all():
            raise _diverged(
                self.settings,
                f"the loss is {self.loss} within the {len(values)} steps before step {done}",
            )
        return values, elapsed

    def _log(self, log: files.AppendOnly, done: int, **more: Any) -> None:
        line = {"step": done, "loss": self.loss, **more}
        log.append_json(line | {"seconds": round(self.seconds, 3), "tokens": self.tokens})

    def _open_log(self, first: int) -> files.AppendOnly:
        """Opens the log without the lines of steps that are repeated; counters go on from it."""
        kept = self._keep_lines(first)
        if kept:
            last = kept[-1]
            self._pending = last.get("left", [])
            self.loss, self.seconds, self.tokens = (last[k] for k in ("loss", "seconds", "tokens"))
        return files.AppendOnly(self.run.out / LOG)

    def _keep_lines(self, first: int) -> list[dict[str, Any]]:
        """Rewrites the log as it was at step `first`; returns its lines."""
        path = self.run.out / LOG
        lines = [x for x in files.read_json_lines(path)[0] if _is_log_line(x)]
        kept = [x for x in lines if (x["step"] == first if "left" in x else x["step"] <= first)]
        files.write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        return kept
