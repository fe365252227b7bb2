"""The recipe "add a device strategy", executed as the page shows it."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.devices import placement
from sama_jax.devices.layout import local_layout
from sama_jax.programs import audit
from sama_jax.programs.jobs import AuditJob
from sama_jax.texts import data

PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "add_a_device_strategy.md"
SETTINGS = AuditSettings(
    sama=SamaSettings(steps=2, subsets=16, subset_size=3), max_length=32, seed=5
)


@pytest.fixture
def strategies(monkeypatch):
    """Runs the page's block, and adds a strategy on one device to compare with."""
    added = {**placement.LOCAL, "one": lambda: local_layout(jax.devices()[:1])}
    monkeypatch.setattr(placement, "LOCAL", added)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    exec(code, {})
    return added


def test_the_strategy_of_the_recipe_gives_the_scores_of_one_device(strategies, tmp_path):
    models = [tiny.folder(tmp_path / name, seed=seed) for seed, name in enumerate("tr")]
    texts = [data.Text(str(i), t, i % 2, "memory") for i, t in enumerate(tiny.texts(20))]
    scores = {}
    for name in ("one", "shard_map"):
        job = AuditJob(
            target=models[0],
            reference=models[1],
            texts=data.Texts(texts, 0, []),
            out=tmp_path / name,
            attacks=["sama", "loss", "pia"],
            settings=SETTINGS,
            parallel=name,
            figures=False,
            quiet=True,
        )
        result = audit.run_audit(job)
        assert result is not None
        scores[name] = [list(row["scores"].values()) for row in result.rows]
    assert strategies["shard_map"]().describe().startswith("shard_map")
    assert len(strategies["shard_map"]().devices) == 8
    np.testing.assert_allclose(scores["shard_map"], scores["one"], rtol=1e-5)
    assert np.ptp(scores["one"], axis=0).min() > 0
