"""The folder of a run: who may have it, whose scores are read, and what is left as it is."""

import json

import pytest

from sama_jax.errors import UsageError
from sama_jax.storage import run_folder
from sama_jax.storage.run_folder import RunFolder
from sama_jax.storage.shapes import fits, misfit


def scores(value: float) -> list[dict]:
    return [{"id": "a", "scores": {"sama": value}, "passes": {"sama": 4}}]


def test_of_two_runs_that_find_a_folder_free_at_once_one_gets_it(tmp_path, monkeypatch):
    """The second looks while the folder is free, and writes after the first has taken it."""
    first: list[RunFolder] = []
    claim = run_folder.manifest_of

    def slow(path, run):
        found = claim(path, run)
        if not first and run == {"seed": 2}:
            first.append(RunFolder(path, {"seed": 1}, {}, None))
        return found

    monkeypatch.setattr(run_folder, "manifest_of", slow)
    with pytest.raises(UsageError, match="another process is writing"):
        RunFolder(tmp_path, {"seed": 2}, {}, None)
    assert json.loads((tmp_path / "manifest.json").read_text())["run"] == {"seed": 1}
    first[0].append_scores(scores(0.5))
    first[0].close()
    with pytest.raises(UsageError, match="belongs to another run"):
        RunFolder(tmp_path, {"seed": 2}, {}, None)
    folder = RunFolder(tmp_path, {"seed": 1}, {}, None)
    assert folder.has_scores("a", ["sama"], [0.5])
    folder.close()


def test_scores_of_another_run_are_never_read(tmp_path):
    folder = RunFolder(tmp_path, {"seed": 1}, {}, None)
    folder.append_scores(scores(0.5))
    folder.close()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"run": {"seed": 2}}))
    folder = RunFolder(tmp_path, {"seed": 2}, {}, None)
    assert not folder.has_scores("a", ["sama"])
    folder.close()


def test_a_folder_that_is_opened_for_its_scores_leaves_the_store_as_it_is(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "losses-00000.bin").write_bytes(b"not ours")
    folder = RunFolder(tmp_path / "run", {"seed": 1}, {}, store, computes=False)
    folder.close()
    assert (store / "losses-00000.bin").read_bytes() == b"not ours"
    assert [file.name for file in store.iterdir()] == ["losses-00000.bin"]


def test_a_run_that_died_before_its_manifest_is_begun_again(tmp_path):
    (tmp_path / "log.jsonl").touch()
    RunFolder(tmp_path, {"seed": 1}, {}, None).close()
    assert (tmp_path / "manifest.json").is_file()


def test_a_manifest_may_name_several_adapters(tmp_path):
    RunFolder(tmp_path, {"seed": 1}, {"adapter": ["a", "b"]}, None).close()
    assert (run_folder.read_manifest(tmp_path) or {})["adapter"] == ["a", "b"]


def test_a_log_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        RunFolder(tmp_path, {"seed": 1}, {}, None)
    assert (tmp_path / "log.jsonl").read_text() == "mine"


@pytest.mark.parametrize("name", ["a\ud800", "\x1b[31m", "a\nb", "x" * 10_000, ""])
def test_any_id_comes_back_as_it_was(tmp_path, name):
    folder = RunFolder(tmp_path, {"seed": 1, "path": name}, {"command": name}, None)
    folder.append_scores([scores(0.5)[0] | {"id": name}])
    folder.join([{"id": name, "text": name}], ["sama"])
    folder.close()
    folder = RunFolder(tmp_path, {"seed": 1, "path": name}, {}, None)
    assert folder.has_scores(name, ["sama"])
    folder.close()
    row = json.loads((tmp_path / "scores.jsonl").read_bytes())
    assert (row["id"], row["text"]) == (name, name)


@pytest.mark.parametrize(
    ("value", "shape", "right"),
    [
        (1, int, True),
        (True, int, False),
        (True, bool, True),
        (1, float, True),
        ("1", (float, None), False),
        (None, (float, None), True),
        ([1, 2], [int], True),
        ([1, "2"], [int], False),
        ({"a": 1}, {str: int}, True),
        ({"a": None}, {str: int}, False),
        ({"a": 1, "c": object}, {"a": int, "b?": str}, True),
        ({"a": 1, "b": 2}, {"a": int, "b?": str}, False),
        ({}, {"a": int}, False),
        ([], {"a": int}, False),
    ],
)
def test_shapes(value, shape, right):
    assert fits(value, shape) is right


def test_a_misfit_is_named():
    assert misfit({"a": 1, "b": [None]}, {"a": int, "b": [str]}) == "b"
    assert misfit({"b": []}, {"a": int}) == "a"
    assert misfit([], {"a": int}) == "the whole"
    assert misfit({"a": 1}, {"a": int}) is None


def test_a_manifest_names_the_code_of_scores_and_mixes_none(tmp_path):
    def go(codes: dict[str, str], text_id: str, attacks: list[str]) -> dict:
        folder = RunFolder(tmp_path, {"seed": 1}, {}, None, codes=codes)
        scored = dict.fromkeys(attacks, 0.5)
        folder.append_scores([{"id": text_id, "scores": scored, "passes": scored}])
        rows = folder.join([{"id": "a"}, {"id": "b"}], ["sama"])
        folder.write_manifest()
        folder.close()
        assert set(rows[0]["scores"]) == {*folder.manifest["codes"], "sama"}
        return json.loads((tmp_path / "manifest.json").read_text())["codes"]

    codes = {"sama": "s1", "mine": "m1"}
    assert go(codes, "a", ["sama", "mine"]) == {"sama": "s1"}
    assert go(codes, "b", ["sama", "mine"]) == codes
    assert go({"sama": "s1"}, "b", ["sama"]) == codes  # a process that does not know `mine`
    assert go({"sama": "s2"}, "a", ["sama"]) == {"sama": "s2", "mine": "m1"}
    folder = RunFolder(tmp_path / "mixed", {"seed": 1}, {}, None, codes={"mine": "m1"})
    folder.append_scores([{"id": "a", "scores": {"mine": 0.5}, "passes": {}}])
    folder._codes = {"mine": "m2"}
    folder.append_scores([{"id": "b", "scores": {"mine": 0.5}, "passes": {}}])
    assert folder.join([{"id": "a"}, {"id": "b"}], [])[0]["scores"] == {}
    folder.close()
