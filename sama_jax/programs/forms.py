"""Chooses how the records of a command become texts: the template, and what of it is scored."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from sama_jax.errors import UsageError
from sama_jax.texts.conversations import FOLDER, Form, LossOn, named_template
from sama_jax.texts.folder_template import folder_template
from sama_jax.weights import hub


def form_of(
    template: str | None,
    loss_on: str | None,
    end_tokens: int,
    folder: Path | None,
    adapters: Sequence[Path] = (),
) -> Form | None:
    """Returns how conversations become texts; None where no template is given.

    Args:
      template: its name; `folder` takes that of a model folder.
      loss_on: `response` (None, too) or `text`.
      end_tokens: end-of-text tokens that are scored behind the last answer.
      folder: the model folder, or a Hub id; None: there is none yet.
      adapters: folders of its adapters, which may bring the template.

    Raises:
      UsageError: flags that do not go together, or an unknown template.
      ModelError: the folders have no template, or two.
    """
    if template is None:
        if loss_on is not None or end_tokens:
            flag = "--end-tokens" if end_tokens else "--loss-on"
            raise UsageError(f"{flag} is about conversations: give their --template, too")
        return None
    if end_tokens < 0:
        raise UsageError(f"--end-tokens must be at least 0, got {end_tokens}")
    if template != FOLDER:
        chosen = named_template(template)
    elif folder is None:
        raise UsageError(f"--template {FOLDER} needs a model folder; choose another template")
    else:
        chosen = folder_template(*map(hub.resolve, (folder, *adapters)))
    return Form(chosen, cast(LossOn, loss_on or "response"), end_tokens)
