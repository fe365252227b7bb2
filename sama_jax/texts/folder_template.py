"""Writes conversations by the chat template that stands in a model folder, on request only.

It is a program in Jinja that the folder's maker wrote. `transformers` runs it in its sandbox, which
gives it neither files nor Python; it may still take long, and so it is run for nobody who has not
asked for it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sama_jax.arrays import Piece
from sama_jax.errors import DataError, ModelError
from sama_jax.texts.conversations import FOLDER, NAMED, Turn
from sama_jax.untrusted import printable, read_bytes, read_json

JINJA, CONFIG = "chat_template.jinja", "tokenizer_config.json"
CHANGING = re.compile(r"strftime_now|\|\s*random\b|\blipsum\b")
"""What a template calls to read the clock, or to draw at random: its prompts then change."""
NEXT = Turn("user", "And then?")
"""Stands behind a conversation to see whether its text stays the same."""


class FolderTemplate(NamedTuple):
    """The chat template of a model folder."""

    source: str
    tokens: dict[str, str]
    """`bos_token`, `eos_token`, ...: what the tokenizer's settings call them."""
    where: str
    name: str = FOLDER
    adds: bool = False

    @property
    def end_of_text(self) -> str | None:
        """The tokenizer's `eos_token`."""
        return self.tokens.get("eos_token")

    @property
    def content(self) -> str:
        """The source and the tokens that it names, wherever they stand."""
        read = {k: v for k, v in self.tokens.items() if k in self.source or k == "eos_token"}
        return repr((self.source, sorted(read.items())))

    def write(self, turns: Sequence[Turn]) -> list[Piece]:
        """Writes the turns; an answer is what an assistant's turn adds to the text before it.

        Raises:
          DataError: the template fails, or writes the beginning of a conversation in another way
            once something follows, so that answers have no place of their own.
        """
        whole, pieces, done = self._run(turns, False), list[Piece](), 0
        changed = not self._run([*turns, NEXT], False).startswith(whole)
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before, after = self._run(turns[:number], True), self._run(turns[: number + 1], False)
            changed |= not (whole.startswith(before) and whole.startswith(after))
            changed |= not done <= len(before) <= len(after)
            if changed:
                break
            pieces.append(Piece(whole[done : len(before)], False, True))
            pieces += _answer(whole[len(before) : len(after)], turn.content)
            done = len(after)
        if changed:
            raise DataError(
                f"the chat template of {self.where} writes a conversation in another way once more "
                f"follows, so its answers have no place; choose one of {', '.join(NAMED)}"
            )
        pieces.append(Piece(whole[done:], False, False))
        return [piece for piece in pieces if piece.text]

    def _run(self, turns: Sequence[Turn], prompting: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [turn._asdict() for turn in turns]
        try:
            options: dict[str, Any] = {"add_generation_prompt": prompting, **self.tokens}
            found: Any = render_jinja_template([messages], chat_template=self.source, **options)
        except MemoryError:
            raise
        except Exception as error:  # whatever a foreign program raises
            kind = type(error).__name__  # its text may hold some of the conversation
            raise DataError(f"the chat template of {self.where} fails ({kind})") from None
        return found[0][0] if isinstance(found, tuple) else found[0]


def _answer(text: str, content: str) -> list[Piece]:
    """Splits an answer into its words, as far as they are found in it, and what is around them."""
    words = content if content in text else content.strip()
    start = text.find(words) if words else -1
    if start < 0:
        return [Piece(text, True, True)]
    parts = text[:start], words, text[start + len(words) :]
    return [Piece(part, True, part is words) for part in parts]


def folder_template(*paths: Path) -> FolderTemplate:
    """Reads the chat template of a model folder, or of one of its adapters behind it.

    Raises `ModelError` if none of them has one, two have different ones, or it reads the clock.
    """
    found = one_template(*paths)
    if found is None:
        raise ModelError(
            f"{' and '.join(map(str, paths))}: no chat template ({JINJA}, or chat_template in "
            f"{CONFIG}); choose one of {', '.join(NAMED)}"
        )
    if changing := CHANGING.search(found.source):
        raise ModelError(
            f"{found.where}: its chat template reads the clock or draws at random "
            f"({changing[0]}), so tomorrow's prompts would be others than today's; write what the "
            f"training has read into a copy of it, or choose one of {', '.join(NAMED)}"
        )
    return found


def one_template(*paths: Path) -> FolderTemplate | None:
    """Does what `folder_template` does, but returns None where no folder has a template."""
    found = [one for path in paths if (one := _template(path)) is not None]
    for other in found[1:]:
        if other.content != found[0].content:
            raise ModelError(
                f"{other.where} and {found[0].where}: have different chat templates, and nothing "
                "says which one a training has read; take the wrong one away, or choose one of "
                f"{', '.join(NAMED)}"
            )
    return found[0] if found else None


def _template(path: Path) -> FolderTemplate | None:
    config: Any = {}
    try:
        if (path / CONFIG).is_file():
            config = read_json(path / CONFIG)
        source = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(source, list):
            named = [one for one in source if isinstance(one, dict)]
            source = next((x.get("template") for x in named if x.get("name") == "default"), None)
        if (path / JINJA).is_file():
            source = read_bytes(path / JINJA).decode()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: its chat template cannot be read ({printable(str(error))})"
        ) from None
    if not isinstance(source, str):
        return None
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return FolderTemplate(source, tokens, str(path))
