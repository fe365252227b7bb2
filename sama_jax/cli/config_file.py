"""Takes flags of a command from a YAML file, and writes those that a command was given there.

The names are those of the flags, without their dashes; a switch is true, a flag that may be given
several times is a list. What stands on the command line replaces what the file says.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sama_jax.errors import DataError, UsageError, nearest
from sama_jax.untrusted import printable

_NOT_SAVED = {"help", "config", "save_config", "out", "quiet", "dry_run"}
_NOT_SAVED |= {"coordinator", "num_processes", "process_id", "distributed", "secret_file"}
"""Flags that belong to one call, and not to what it computes."""


def add_config(parser: argparse._ActionsContainer) -> None:
    """Adds `--config` and `--save-config`."""
    parser.add_argument("--config", type=Path, metavar="F", help="flags, from a YAML file")
    parser.add_argument("--save-config", type=Path, metavar="F", help="write the flags there")


def with_config(parser: argparse.ArgumentParser, given: Sequence[str]) -> list[str]:
    """Returns a command line with the flags of the file that its `--config` names.

    Raises:
      DataError: the file is none, or names something that is no flag of the command.
    """
    only = argparse.ArgumentParser(add_help=False)  # --conf is --config, as for the parser
    only.add_argument("--config", type=Path)
    found, rest = only.parse_known_args(list(given))
    if found.config is None:
        return list(given)
    from sama_jax.storage.yaml_file import read_yaml

    content = read_yaml(found.config)
    if not isinstance(content, dict):
        raise DataError(f"{found.config}: expected a mapping of flags, such as `target: DIR`")
    said = _said(parser, rest)
    more = list[str]()
    for name, value in content.items():
        action = _action(parser, name, str(found.config))
        if action not in said:
            more += _words(action, value, str(found.config))
    return [*more, *given]


def _said(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[argparse.Action]:
    """Returns the flags of a command line. One that is written out is no abbreviation of others."""
    options, found = _options(parser), set[argparse.Action]()
    for one in (word.partition("=")[0] for word in words if word.startswith("--")):
        meant = [one] if one in options else [o for o in options if o.startswith(one)]
        found.update(options[option] for option in meant)
    return found


def _action(parser: argparse.ArgumentParser, name: Any, where: str) -> argparse.Action:
    """Returns what a name of the file stands for. Raises `DataError`."""
    known = {option.lstrip("-"): action for option, action in _options(parser).items()}
    spelled = str(name)[:60].replace("_", "-")
    if spelled not in known or known[spelled].dest in ("help", "config"):
        raise DataError(
            f"{where}: '{printable(spelled)}' is no flag of {parser.prog}{nearest(spelled, known)}"
        )
    return known[spelled]


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {o: action for action in parser._actions for o in action.option_strings}


def _words(action: argparse.Action, value: Any, where: str) -> list[str]:
    """Spells a flag as a command line does. Raises `DataError`."""
    option, several = action.option_strings[-1], isinstance(action, argparse._AppendAction)
    values = value if isinstance(value, list) else [value]
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise DataError(f"{where}: {option[2:]} is a switch; expected true or false")
        return [option] * value
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in values):
        raise DataError(f"{where}: {option[2:]}: expected a word or a number, or a list of them")
    if several:
        return [f"{option}={one}" for one in values]
    return [f"{option}={','.join(map(str, values))}"]


def given_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags of a command that differ from their defaults, with absolute paths."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        value, default = getattr(args, action.dest, None), action.default
        if isinstance(default, str) and callable(action.type):
            default = action.type(default)
        if action.option_strings and action.dest not in _NOT_SAVED and value != default:
            found[action.option_strings[-1].removeprefix("--")] = (
                True if action.nargs == 0 else _plain(value)
            )
    return found


def _plain(value: Any) -> Any:
    """Returns what YAML can hold; a path that is there is one from everywhere."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value.resolve() if os.path.exists(value) else value)
    return value


def save_config(path: Path | None, command: str, flags: dict[str, Any]) -> None:
    """Writes flags to the file of `--save-config`.

    Raises:
      UsageError: something stands there that no such command has written.
    """
    if path is None:
        return
    from sama_jax.storage.yaml_file import REPEATS, first_comment, write_yaml

    if path.exists() and first_comment(path) != REPEATS.format(command):
        raise UsageError(f"{path}: exists and was not written by --save-config; give a new name")
    write_yaml(path, REPEATS.format(command), flags)
