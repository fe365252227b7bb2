"""PyTorch's side of the benchmark, on the same texts (`python -m`, asked by a `Side`)."""

import time

import numpy as np

from sama_jax.errors import ModelError
from sama_jax.programs.bench.memory import HostMemory
from sama_jax.programs.bench.side import (
    PLAN,
    SCALE,
    Agreement,
    End,
    Loaded,
    Round,
    Task,
    cores,
    run_side,
)
from sama_jax.programs.bench.torch_sama import Probes, TorchSama
from sama_jax.weights import model_folder


class TorchSide:
    """Runs the PyTorch form of the attack, once a round."""

    def __init__(self, task: Task):
        folder = model_folder.open_folder(task.model, dtype="float32")
        self.ids, self.scratch = task.tokens(), task.scratch
        sama, seed, mask_id = task.settings.sama, task.settings.seed, folder.model.mask_id
        self.sama = TorchSama(task.model, folder.config, sama, mask_id, seed, SCALE, cores())

    def load(self) -> Loaded:
        """Starts to measure memory; the models are loaded."""
        self.memory = HostMemory()
        return Loaded(cores(), "cpu", "cpu", "float32", "torch")

    def round(self) -> Round:
        """Runs the attack on all texts."""
        start, cpu = time.perf_counter(), time.process_time()
        result = self.sama.run(self.ids)
        seconds = time.perf_counter() - start
        return Round(seconds, time.process_time() - cpu, result.vote_seconds)

    def check(self) -> Agreement:
        """Compares losses and scores under the same masks and subsets.

        Raises:
          ModelError: the two frameworks read losses at different positions.
        """
        with np.load(self.scratch / PLAN) as plan:
            ours = dict(plan)
        probes = Probes(ours["masks"], ours["subsets"])
        result = self.sama.run(self.ids[: len(probes.masks)], probes)
        differences = []
        for name, losses in result.losses.items():
            read = ours[name][..., : losses.shape[-1]]
            if not np.array_equal(np.isnan(read), np.isnan(losses)):
                raise ModelError("JAX and PyTorch read losses at different positions")
            differences.append(np.nanmax(np.abs(read - losses)))
        scores = np.abs(result.scores - ours["scores"])
        return Agreement(len(probes.masks), float(max(differences)), float(scores.max()))

    def end(self) -> End:
        """Returns the memory."""
        return End(self.memory.stop())


if __name__ == "__main__":
    run_side(TorchSide)
