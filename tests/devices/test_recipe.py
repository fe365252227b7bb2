"""The recipe "add a device strategy", executed as the page shows it."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.devices import placement
from sama_jax.devices.strategy import local_layout
from sama_jax.programs import audit
from sama_jax.programs.jobs import AuditJob
from sama_jax.texts.read import Text, Texts

PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "add_a_device_strategy.md"
SETTINGS = AuditSettings(
    sama=SamaSettings(steps=2, subsets=16, subset_size=3), max_length=32, seed=5
)


@pytest.fixture
def strategy(monkeypatch):
    """Runs the page's block on a copy of the strategies; returns the one that it adds."""
    monkeypatch.setattr(placement, "LOCAL", dict(placement.LOCAL))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    exec(code, {})
    return placement.LOCAL["pmap"]


def one_device():
    return local_layout(jax.devices()[:1])


def test_the_strategy_of_the_recipe_gives_the_scores_of_one_device(strategy, tmp_path):
    models = [tiny.folder(tmp_path / name, seed=seed) for seed, name in enumerate("tr")]
    texts = [Text(str(i), t, i % 2, "memory") for i, t in enumerate(tiny.texts(20))]
    found = []
    for number, local in enumerate((one_device, strategy)):
        placement.LOCAL["pmap"] = local
        job = AuditJob(
            target=models[0],
            reference=models[1],
            texts=Texts(texts, 0, []),
            out=tmp_path / str(number),
            attacks=["sama", "loss", "pia"],
            settings=SETTINGS,
            parallel="pmap",
            figures=False,
            quiet=True,
        )
        result = audit.run_audit(job)
        assert result is not None
        found.append([list(row["scores"].values()) for row in result.rows])
    assert strategy().describe().startswith("shard_map")
    assert len(strategy().devices) == 8
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert np.ptp(found[0], axis=0).min() > 0
