"""SAMA in straightforward PyTorch: the other side of `sama-jax bench --against torch`.

Written from the published attack's behaviour (`attack/attacks/sama.py` in `Stry233/SAMA`, commit
5ac7aa4; docs/differences.md): batches in file order, padded to their longest text; a Python loop
over steps; logits and cross-entropy of every position; one draw a subset and votes in NumPy. It
differs where a score would depend on batch mates: padding is hidden from attention, and a step that
adds nothing is skipped for the text, not for the batch.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sama_jax.config import SamaSettings
from sama_jax.errors import UsageError
from sama_jax.programs.bench.torch_reference import F, Wanted, llada_logits, llada_weights, torch

BATCH = 8
"""Texts in a batch, as the published attack's section of its configuration says."""


class Probes(NamedTuple):
    """Masks and subsets that are given instead of drawn."""

    masks: Bool[np.ndarray, "n t l"]
    subsets: Int[np.ndarray, "n t subsets m"]
    """Positions that vote together, -1 unused."""


class Result(NamedTuple):
    """What a list of texts gave."""

    scores: Float[np.ndarray, " n"]
    losses: dict[str, Float[np.ndarray, "n t l"]]
    """Losses of target and reference, NaN where nothing was read; empty without given probes."""
    vote_seconds: float


class TorchSama:
    """The attack with both models loaded: the reference is the target, its final norm scaled."""

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        settings: SamaSettings,
        mask_id: int,
        seed: int,
        scale: float,
        threads: int,
    ):
        if settings.nesting != "nested" or settings.repeats != 1:
            raise UsageError("the PyTorch form has nested masks and no repeats: preset official")
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.config, self.settings, self.mask_id = config, settings, mask_id
        wanted = Wanted(path, config, config["n_layers"], None, "float32")
        # load_file maps the file; a copy is in memory before anything is measured.
        self.target = {name: t.clone() for name, t in llada_weights(wanted).items()}
        self.reference = self.target | {"ln_f.weight": self.target["ln_f.weight"] * scale}

    def run(self, texts: Sequence[np.ndarray], probes: Probes | None = None) -> Result:
        """Scores texts that are given as token ids."""
        scores, votes, length = [], 0.0, max(len(t) for t in texts)
        shape = (len(texts), self.settings.steps, length)
        losses = {n: np.full(shape, np.nan, np.float32) for n in ("target", "reference")}
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            part = slice(start, start + len(batch))
            given = None if probes is None else Probes(probes.masks[part], probes.subsets[part])
            found, seconds = self._batch(batch, given, {k: v[part] for k, v in losses.items()})
            scores += found
            votes += seconds
        return Result(np.array(scores), losses if probes is not None else {}, votes)

    def _batch(
        self, texts: Sequence[np.ndarray], probes: Probes | None, losses: dict[str, np.ndarray]
    ) -> tuple[list[float], float]:
        s, lengths = self.settings, [len(t) for t in texts]
        tokens = torch.zeros(len(texts), max(lengths), dtype=torch.long)
        valid = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, text in enumerate(texts):
            tokens[i, : len(text)] = torch.from_numpy(text)
            valid[i, : len(text)] = True
        seen = None if bool(valid.all()) else valid
        masked = torch.zeros_like(valid)
        buffers = {name: torch.zeros(tokens.shape) for name in losses}
        votes: list[list[float]] = [[] for _ in texts]
        spent = 0.0
        for step in range(s.steps):
            if probes is None:
                new = self.new_positions(step, masked, valid)
            else:
                width = tokens.shape[1]
                new = torch.from_numpy(probes.masks[:, step, :width].copy()) & ~masked
            if s.loss_source == "stored_first" and not bool(new.any()):
                continue
            masked |= new
            scored = new if s.loss_source == "stored_first" else masked
            for name, weights in (("target", self.target), ("reference", self.reference)):
                ids = torch.where(masked, self.mask_id, tokens)
                logits = llada_logits(self.config, weights, ids, seen)
                loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
                loss = loss.view(tokens.shape).float()
                buffers[name][scored] = loss[scored]
                if probes is not None:
                    read = np.where(scored.numpy(), loss.numpy(), np.nan)
                    losses[name][:, step, : read.shape[1]] = read
            start = time.perf_counter()
            for i in range(len(texts)):
                if s.skip == "keep" or bool(new[i].any()):
                    subsets = None if probes is None else probes.subsets[i, step]
                    vote = self._vote(
                        masked[i], buffers["target"][i], buffers["reference"][i], subsets
                    )
                    votes[i].append(vote)
            spent += time.perf_counter() - start
        return [self._score(v) for v in votes], spent

    def new_positions(self, step: int, masked: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Draws random positions that bring each text to the step's density."""
        s, new = self.settings, torch.zeros_like(masked)
        span = s.max_density - s.min_density
        if s.schedule == "code_linear":
            density = s.min_density + span * (step + 1) / (s.steps + 1)
        elif s.schedule == "paper":
            density = s.min_density + span * step / max(s.steps - 1, 1)
        else:
            raise UsageError("the PyTorch form has no geometric schedule")
        for i in range(len(masked)):
            wanted = max(1, round(density * int(valid[i].sum())))
            free = torch.where(valid[i] & ~masked[i])[0]
            count = min(max(0, wanted - int(masked[i].sum())), len(free))
            new[i, free[torch.randperm(len(free))[:count]]] = True
        return new

    def _vote(
        self,
        masked: torch.Tensor,
        target: torch.Tensor,
        reference: torch.Tensor,
        subsets: np.ndarray | None,
    ) -> float:
        """Returns the share of subsets whose loss the target lowers."""
        s, places = self.settings, torch.where(masked)[0].numpy()
        t, r = target.numpy()[places], reference.numpy()[places]
        size = min(s.subset_size, len(places))
        if subsets is None:
            index = np.stack(
                [self.rng.choice(len(places), size, replace=False) for _ in range(s.subsets)]
            )
        else:
            index = np.searchsorted(places, subsets[:, :size])
        return float((r[index].sum(axis=1) > t[index].sum(axis=1)).mean())

    def _score(self, votes: list[float]) -> float:
        """Averages the votes, the k-th recorded step weighted by 1/k; 0 without any."""
        weights = 1.0 / (np.arange(len(votes)) + 1)
        return float(np.average(votes, weights=weights)) if votes else 0.0
