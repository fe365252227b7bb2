"""Where compiled programs are kept, and who may write there."""

import argparse
import os
from pathlib import Path

import pytest

from sama_jax.cli import running
from sama_jax.devices import compile_cache
from sama_jax.errors import UsageError


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Collects what would be configured, in a home of its own."""
    found: dict[str, object] = {}
    monkeypatch.setattr(compile_cache, "_configure", found.update)
    monkeypatch.setattr(compile_cache.sys, "platform", "linux")
    for name in (compile_cache.FOLDER, compile_cache.ENABLED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return found


def test_the_default_folder_is_the_users_alone(made, tmp_path):
    assert compile_cache.use_default_cache() is None
    folder = Path(made[compile_cache.FOLDER])
    assert folder.parent == tmp_path / "sama-jax"
    for part in (folder, folder.parent):
        assert part.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("part", [0, 1])
def test_a_folder_that_others_can_write_is_not_used(made, part):
    folder = compile_cache.default_folder()
    folder.mkdir(parents=True, mode=0o700)
    wrong = [folder, folder.parent][part]
    wrong.chmod(0o770)
    told = compile_cache.use_default_cache()
    assert told is not None
    assert str(wrong) in told
    assert not made


def test_a_link_in_the_place_of_the_folder_is_not_used(made, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder = compile_cache.default_folder()
    folder.parent.mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert "is no folder" in str(compile_cache.use_default_cache())
    assert not made


def test_a_folder_of_another_user_is_not_used(made, monkeypatch):
    compile_cache.use_default_cache()
    made.clear()
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert "belongs to another user" in str(compile_cache.use_default_cache())
    assert not made


def test_where_no_folder_can_be_made_nothing_is_kept(made, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_cache.use_default_cache() is None
    assert not made


@pytest.mark.parametrize(
    ("name", "value"), [(compile_cache.FOLDER, "/x"), (compile_cache.ENABLED, "false")]
)
def test_what_jax_was_told_holds(made, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert compile_cache.use_default_cache() is None
    assert not made


def test_machines_of_other_instructions_or_cores_have_folders_of_their_own(monkeypatch):
    here = compile_cache.default_folder()
    monkeypatch.setattr(compile_cache, "_cores", lambda: set(range(999)))
    assert compile_cache.default_folder() != here
    monkeypatch.undo()
    monkeypatch.setattr(compile_cache.platform, "machine", lambda: "another")
    assert compile_cache.default_folder() != here


@pytest.mark.parametrize(
    ("flags", "owns", "kept"),
    [
        ({"compile_cache": None, "no_compile_cache": False}, True, True),
        ({"compile_cache": None, "no_compile_cache": False}, False, False),
        ({"compile_cache": None, "no_compile_cache": True}, True, False),
        ({"compile_cache": None, "measures_compiling": True}, True, False),
        ({}, True, True),
    ],
)
def test_a_process_of_ours_keeps_programs_unless_it_measures_compiling(made, flags, owns, kept):
    running._keep_programs(argparse.Namespace(**flags), owns=owns)
    assert (compile_cache.FOLDER in made) == kept
    assert (made.get(compile_cache.ENABLED) is False) == flags.get("no_compile_cache", False)


def test_a_folder_and_no_folder_exclude_each_other(made, tmp_path):
    given = argparse.Namespace(compile_cache=tmp_path, no_compile_cache=True)
    with pytest.raises(UsageError, match="exclude each other"):
        running._keep_programs(given, owns=True)
