"""The token ids of the texts, which all sides work on."""

import numpy as np
from jaxtyping import Int

from sama_jax.errors import DataError
from sama_jax.programs.jobs import BenchJob
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights.model_folder import ModelFolder


def encode(job: BenchJob, folder: ModelFolder) -> list[Int[np.ndarray, " n"]]:
    """Returns the token ids of the texts, int32, without texts that have none.

    Raises:
      DataError: no text has a token.
    """
    tokenizer = TextTokenizer.from_folder(folder.path, folder.model.vocab_size)
    length = job.settings.max_length
    texts = [t.text for t in job.texts]
    if job.windows:
        joined = np.concatenate([e.ids for e in tokenizer.encode(texts, 2**31 - 1)])
        found = list(joined[: len(joined) // length * length].reshape(-1, length)[: job.limit])
    else:
        encoded = tokenizer.encode(texts[: job.limit], length)
        found = [e.ids for e in encoded if len(e.ids)]
    if not found:
        raise DataError(f"expected texts of at least one token, found {len(texts)} without any")
    return found
