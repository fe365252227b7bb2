"""The harness reads good input, and notices what no reader may do."""

import pytest

from fuzz.__main__ import NAMES
from fuzz.pool import Worker

PATIENCE = 60.0
"""Seconds an input may take here, where others use the machine: what hangs does so for good."""
CULPRITS = ["traceback", "message", "code", "memory", "hang", "died", "wrong"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory):
    made = Worker(tmp_path_factory.mktemp("fuzz"), PATIENCE)
    yield made
    made.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_good_input_is_read(worker: Worker, name: str):
    assert worker.ask(name, -1)["kind"] == "fine"


@pytest.mark.parametrize("kind", CULPRITS)
def test_what_no_reader_may_do_is_noticed(worker: Worker, kind: str):
    limit = 1.0 if kind == "hang" else None
    assert worker.ask(f"culprit-{kind}", -1, seconds=limit)["kind"] == kind
