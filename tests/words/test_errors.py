"""Exit codes are written once: the classes of the errors, every `--help` and the page agree."""

import re
from pathlib import Path

import pytest

from checkpoints_convert.__main__ import build_parser as converter
from sama_jax import errors
from sama_jax.cli.entry import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def test_the_page_lists_the_codes_of_the_classes():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE.read_text("utf-8"), re.M)
    listed = {int(code): meaning.replace("`", "") for code, meaning in rows}
    assert listed.pop(1).startswith("a bug")  # what no class foresees
    assert listed.keys() == errors.EXIT_CODES.keys()
    for code, meaning in errors.EXIT_CODES.items():
        assert listed[code].startswith(meaning)


@pytest.mark.parametrize("make", [build_parser, converter])
def test_every_help_ends_with_the_codes(make):
    parser = make()
    commands = parser._subparsers._group_actions[0].choices
    for shown in (parser, *commands.values()):
        text = shown.format_help()
        for code, meaning in errors.EXIT_CODES.items():
            assert f"\n  {code:<3} {meaning}\n" in text


def test_the_nearest_name_is_offered_or_else_all():
    assert errors.nearest("offical", ["paper", "official"]) == "; did you mean 'official'?"
    assert errors.nearest("zzz", ["paper", "default"]) == "; known: default, paper"
