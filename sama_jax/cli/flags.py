"""Makes flags of the fields of settings and jobs, and values of flags again.

A field says the type, the choices, the default and the help of its flag (`sama_jax.config.Flag`);
what differs for one command is given as argparse's own keywords.
"""

import argparse
import contextlib
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from sama_jax.config import AuditSettings, Flag, TrainSettings, override
from sama_jax.errors import UsageError

STANDARD = "sama,loss,loss:sum,zlib,ratio"
"""The attacks of an audit unless told otherwise: three plans' worth of passes."""
ALONE = "loss,loss:sum,zlib,mink,mink++"
"""The same of an audit without a reference: two plans' worth of passes."""

MOST = 10**7
"""Of texts, rows or rounds: no run has more."""

Flags = argparse._ActionsContainer
"""Where flags are added: a parser or a group of one."""


Made = TypeVar("Made", AuditSettings, TrainSettings)


def flags_of(parser: Flags, kind: type, *names: str, **options: Any) -> None:
    """Adds the flags of some fields of a dataclass; `options` go to argparse as they are."""
    known = {field.name: field for field in fields(kind)}
    for name in names:
        field = known[name]
        hint, flag = _hint(field)
        spelled = flag.name or f"--{name.replace('_', '-')}"
        required = field.default is MISSING
        given: dict[str, Any] = {"dest": name, "help": flag.help}
        given["default"] = None if required else field.default
        if hint is bool:
            given["action"] = "store_false" if field.default else "store_true"
            spelled = spelled.replace("--", "--no-", 1) if field.default else spelled
        else:
            choices = list(get_args(hint)) if get_origin(hint) is Literal else None
            group = isinstance(hint, type) and is_dataclass(hint)
            kind_of: Any = group_of(hint) if group else finite if hint is float else hint
            given |= {"choices": choices, "type": str if choices else kind_of}
            given |= {"metavar": flag.metavar, "required": required}
        given |= options
        if not (hint is bool or is_dataclass(hint)) and given["default"] is not None:
            given["help"] += " (default: %(default)s)"
        parser.add_argument(spelled, **given)


def group_of(kind: type) -> Callable[[str], Any]:
    """Returns what reads a group of settings from `key=value,key=value`; a key alone is true."""

    def read(text: str) -> Any:
        given = [part if "=" in part else f"{part}=true" for part in text.split(",")]
        keys = [part.partition("=")[0] for part in given]
        try:
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise UsageError(f"{twice[0]} is given twice")
            return override(kind(), given)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def finite(text: str) -> float:
    """Reads a number; neither NaN nor an infinity is one."""
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)) and "_" not in text:
            return number
    raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")


def positive(text: str) -> float:
    """Reads a number of seconds, of at most a year: threads wait no longer."""
    if 0 < (number := finite(text)) < 366 * 86400:
        return number
    raise argparse.ArgumentTypeError(f"expected seconds above 0, at most a year, found {text!r}")


def share(text: str) -> float:
    """Reads a share of texts, of which neither none nor all would mean anything."""
    if 0 < (number := finite(text)) < 1:
        return number
    raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, found {text!r}")


def _hint(field: Field[Any]) -> tuple[Any, Flag]:
    """Returns a field's type, without None, and what is said about its flag."""
    hint, flag = field.type, Flag()
    if get_origin(hint) is Annotated:
        hint, *said = get_args(hint)
        flag = next((part for part in said if isinstance(part, Flag)), flag)
    if isinstance(hint, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return hint, flag


def values_of(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Returns the fields of a dataclass that were flags."""
    return {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}


def settings_of(args: argparse.Namespace, kind: type[Made], **more: Any) -> Made:
    """Returns the settings that flags and `--set` give. Raises `UsageError`."""
    given = getattr(args, "given", set())
    usual = {field.name: field.default for field in fields(kind)}
    values = values_of(args, kind)
    values = {n: v for n, v in values.items() if n in given or v != usual[n]}
    return kind.of(overrides=args.set, **(values | more))


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises `UsageError` if a number that was given is 0 or less, or no number of anything."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MOST:
            least = "at least 1" if value < 1 else f"at most {MOST:,}"
            raise UsageError(f"--{name.replace('_', '-')} must be {least}, got {value}")


# --- flags of several commands --------------------------------------------------------------------


def names(text: str) -> list[str]:
    """Splits a list of names at its commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def add_attacks(parser: Flags, default: str) -> None:
    """Adds the choice of attacks: a list of names."""
    parser.add_argument(
        "--attacks",
        type=names,
        default=default,
        metavar="a,b|all",
        help="names, or all (default: %(default)s)",
    )


def add_budget(parser: Flags) -> None:
    """Adds SAMA's preset and the passes of all attacks."""
    flags_of(parser, AuditSettings, "preset")
    flags_of(parser, AuditSettings, "passes", default=None)


def add_compile_cache(
    parser: Flags, default: str = "a folder of yours in your cache folder"
) -> None:
    """Adds where compiled programs are kept."""
    parser.add_argument(
        "--compile-cache",
        type=Path,
        metavar="DIR",
        help=f"keep compiled programs there (default: JAX_COMPILATION_CACHE_DIR, else {default})",
    )
    parser.add_argument(
        "--no-compile-cache", action="store_true", help="compile every program anew, and keep none"
    )


def add_text_fields(parser: Flags) -> None:
    """Adds the names of the fields that hold texts and labels, in all files of texts."""
    parser.add_argument(
        "--text-field", metavar="NAME", help="field or column that holds the texts (default: text)"
    )
    parser.add_argument(
        "--label-field", metavar="NAME", help="the one that holds the labels (default: label)"
    )


def add_conversations(parser: Flags) -> None:
    """Adds how conversations become texts; `programs.forms.form_of` takes what is given."""
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="the files hold prompts and responses, written as llada, chatml, llama or plain; "
        "folder: by the model folder's own template",
    )
    parser.add_argument(
        "--loss-on",
        choices=["response", "text"],
        help="with --template: what is masked and scored (default: response)",
    )
    parser.add_argument(
        "--end-tokens",
        type=int,
        default=0,
        metavar="K",
        help="with --template: end-of-text tokens behind a response that count as a part of it",
    )


def add_quiet(parser: Flags) -> None:
    """Adds `--quiet`."""
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")


def add_set(parser: Flags) -> None:
    """Adds `--set`, which reaches every setting."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="any setting, repeatable"
    )
