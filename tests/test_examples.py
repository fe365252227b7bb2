"""The notebooks run from top to bottom, on tiny models in the place of the demo's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from sama_jax.attacks import registry
from sama_jax.errors import UsageError
from sama_jax.programs.read_losses import read_losses

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and texts where the notebooks look for those of the demo."""
    place = tmp_path_factory.mktemp("notebooks")
    demo = place / "runs" / "demo"
    tiny.folder(demo / "target", seed=0)
    tiny.folder(demo / "base", seed=1)
    (demo / "corpus").mkdir()
    for seed, name in enumerate(("members", "nonmembers")):
        found = tiny.texts(14, (20, 40), seed=seed)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in found)
        (demo / "corpus" / f"{name}.jsonl").write_text(lines)
    return place


def run_notebook(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the cells of a notebook one after the other; returns what they have defined."""
    monkeypatch.chdir(place)
    cells = json.loads((EXAMPLES / name).read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "a notebook is committed without outputs"
    known: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}:{cell['id']}", "exec"), known)
    return known


def test_both_notebooks_run(workplace: Path, monkeypatch, capsys):
    known = run_notebook("audit_your_model.ipynb", workplace, monkeypatch)
    html = known["result"]._repr_html_()
    assert html.startswith("<p>")
    assert html.count("<tr>") == 1 + 4  # a header and four attacks
    assert abs(known["again"] - known["columns"]["sama"]).max() < 1e-6
    assert "underlined: no pass read it" in capsys.readouterr().out.replace("\n", " ")
    before = dict(registry._ATTACKS)
    try:
        found = run_notebook("write_an_attack.ipynb", workplace, monkeypatch)
        assert found["result"].columns()["topquarter"].count(None) == 0
    finally:
        registry._ATTACKS.clear()
        registry._ATTACKS.update(before)


def test_losses_are_those_that_the_scores_were_made_of(workplace: Path, monkeypatch):
    if not (workplace / "runs" / "notebook").is_dir():
        run_notebook("audit_your_model.ipynb", workplace, monkeypatch)
    out = workplace / "runs" / "notebook"
    for attack in ("sama", "ratio"):
        found = read_losses(out, attack)
        lines = (out / "scores.jsonl").read_text().splitlines()
        assert found.ids == [json.loads(line)["id"] for line in lines]
        scored = np.asarray(found.plan.scored)
        for values in (found.target, found.reference):
            np.testing.assert_array_equal(np.isfinite(values), scored)
    with pytest.raises(UsageError, match="has no attack 'wbc'"):
        read_losses(out, "wbc")
