"""Makes a text of a prompt and its response: which fields hold them, how a template writes them.

Facts about templates: `chat_template` of Qwen2.5 (ChatML) and of Llama 3 as their makers publish
them; LLaDA's as `dllm/utils/models.py` in `ZHZisZZ/dllm` (298f31f) corrects it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from sama_jax.arrays import Piece, Rendered
from sama_jax.config import settings_hash
from sama_jax.errors import DataError, UsageError, nearest
from sama_jax.texts.records import TURNS, shown_names

ROLES = ("system", "user", "assistant")
LossOn = Literal["response", "text"]
"""What is masked, scored and learned: the answers, or the whole rendered text."""
EXPECTED = (
    "expected messages (a list of role and content), prompt with response or completion, or "
    "instruction with output"
)


class Turn(NamedTuple):
    """What one side says."""

    role: str
    content: str


@runtime_checkable
class Template(Protocol):
    """Writes turns as one text."""

    @property
    def name(self) -> str:
        """Names it in results."""
        ...

    @property
    def adds(self) -> bool:
        """Whether the tokenizer's own begin and end tokens are added to what it writes."""
        ...

    @property
    def end_of_text(self) -> str | None:
        """The token that fills up the end of a text; None: it knows none."""
        ...

    @property
    def content(self) -> str:
        """All that the writing depends on, as text."""
        ...

    def write(self, turns: Sequence[Turn]) -> list[Piece]:
        """Writes the turns. Raises `DataError` with neither file nor line."""
        ...


@dataclass(frozen=True)
class NamedTemplate:
    """A template of fixed marks around every turn."""

    name: str
    begin: str = ""
    header: str = ""
    """Stands before what a role says, which replaces `{role}`."""
    end: str = ""
    """Ends a turn; of an answer it is scored."""
    between: str = ""
    """Stands behind the end of a turn, never scored."""
    end_of_text: str | None = None
    strips: bool = False
    """Whether white space around what is said is dropped."""

    @property
    def adds(self) -> bool:
        """One that spells no begin token leaves that to the tokenizer."""
        return not self.begin and not self.header

    @property
    def content(self) -> str:
        """All fields."""
        return repr(self)

    def write(self, turns: Sequence[Turn]) -> list[Piece]:
        """Writes the turns one after the other."""
        pieces = [Piece(self.begin, False, False)]
        for turn in turns:
            answer = turn.role == "assistant"
            content = turn.content.strip() if self.strips else turn.content
            pieces += [
                Piece(self.header.format(role=turn.role), False, False),
                Piece(content, answer, True),
                Piece(self.end, answer, False),
                Piece(self.between, False, False),
            ]
        return [piece for piece in pieces if piece.text]


_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"
NAMED = {
    template.name: template
    for template in (
        NamedTemplate(
            "llada",
            begin="<|startoftext|>",
            header=_HEADER,
            end="<|eot_id|>",
            end_of_text="<|endoftext|>",
            strips=True,
        ),
        NamedTemplate(
            "chatml",
            header="<|im_start|>{role}\n",
            end="<|im_end|>",
            between="\n",
            end_of_text="<|endoftext|>",
        ),
        NamedTemplate(
            "llama",
            begin="<|begin_of_text|>",
            header=_HEADER,
            end="<|eot_id|>",
            end_of_text="<|end_of_text|>",
            strips=True,
        ),
        NamedTemplate("plain"),
    )
}
"""Template by the name that `--template` takes."""
FOLDER = "folder"
"""The name of the template that stands in a model folder."""


def named_template(name: str) -> Template:
    """Returns a template by its name. Raises `UsageError`."""
    if name not in NAMED:
        known = ", ".join([*NAMED, FOLDER])
        raise UsageError(f"unknown template '{name}'{nearest(name, NAMED)}; known: {known}")
    return NAMED[name]


@dataclass(frozen=True)
class Form:
    """How records of conversations become texts."""

    template: Template
    loss_on: LossOn = "response"
    end_tokens: int = 0
    """End-of-text tokens behind the last answer, scored as a part of it."""

    def __post_init__(self):
        if self.end_tokens and self.template.end_of_text is None:
            raise UsageError(
                f"--end-tokens: template {self.template.name} names no end-of-text token; leave "
                "it out, or choose another template"
            )

    @property
    def name(self) -> str:
        """Names all that a text depends on besides its record: template, its content, flags."""
        content = settings_hash(self.template.content)
        return f"{self.template.name} {content}, {self.loss_on}, {self.end_tokens} end tokens"

    def render(self, fields: Mapping[str, Any], found: Iterable[str], where: str) -> Rendered:
        """Makes the text of one record. Raises `DataError`, which names the record."""
        turns = turns_of(fields, found, where)
        try:
            pieces = self.template.write(turns)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        ends = turns[-1].role == "assistant"
        if ends and self.template.end_of_text is not None:
            pieces += [Piece(self.template.end_of_text, True, False)] * self.end_tokens
        made = Rendered(tuple(pieces), self.template.adds, self.name)
        if self.loss_on == "text":
            return made._replace(pieces=(Piece(str(made), True, True),))
        return made


def turns_of(fields: Mapping[str, Any], found: Iterable[str], where: str) -> list[Turn]:
    """Reads the turns of a record: `messages`, else a prompt and its response, else Alpaca's.

    Args:
      fields: of the record, by their names.
      found: names for the message.
      where: file and place.

    Raises:
      DataError: it has none of them, or there is no answer among them.
    """
    given = {name: fields[name] for name in TURNS if fields.get(name) is not None}
    if "messages" in given:
        turns = _messages(given["messages"], where)
    elif "prompt" in given and {"response", "completion"} & set(given):
        if {"response", "completion"} <= set(given):
            raise DataError(f"{where}: has a response and a completion; leave one of them out")
        answer = "response" if "response" in given else "completion"
        turns = [("user", given["prompt"], "prompt"), ("assistant", given[answer], answer)]
    elif {"instruction", "output"} <= set(given):
        task = [given["instruction"], given.get("input") or ""]
        for name, part in zip(("instruction", "input"), task):
            _require_string(part, name, where)
        # A blank line between the two, as `dllm/data/alpaca.py` puts it.
        turns = [("user", "\n\n".join(filter(None, task)), "instruction")]
        turns.append(("assistant", given["output"], "output"))
    else:
        raise DataError(
            f"{where}: holds no conversation (its fields: {shown_names(found)}); {EXPECTED}; plain "
            "texts need no --template"
        )
    for _, content, name in turns:
        _require_string(content, name, where)
    if not any(role == "assistant" for role, *_ in turns):
        raise DataError(f"{where}: no message is of the role assistant, so nothing can be scored")
    return [Turn(role, content) for role, content, _ in turns]


def _messages(messages: Any, where: str) -> list[tuple[str, Any, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is no list of messages; {EXPECTED}")
    turns = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise DataError(
                f"{where}: message {number + 1} has none of the roles {', '.join(ROLES)}"
            )
        if message.get("tool_calls"):
            raise DataError(f"{where}: message {number + 1} calls tools, which is not supported")
        turns.append((role, message.get("content"), f"content of message {number + 1}"))
    return turns


def _require_string(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: {name} must be a string, found {kind}")
