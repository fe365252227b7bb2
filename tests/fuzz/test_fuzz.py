"""Some spoilt inputs for every reader, the same in every run; `python -m fuzz` tries more."""

import pytest

from fuzz.__main__ import NAMES, SLOW
from fuzz.pool import Worker

COUNTS = dict.fromkeys(NAMES, 25) | dict.fromkeys(SLOW, 6)
"""Inputs of each reader."""
PATIENCE = 10.0
"""Seconds of the processor that an input may take here."""
CULPRITS = ["traceback", "message", "code", "memory", "hang", "died", "wrong"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory):
    made = Worker(tmp_path_factory.mktemp("fuzz"), PATIENCE)
    yield made
    made.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_good_input_is_read(worker: Worker, name: str):
    assert worker.ask(name, -1)["kind"] == "fine"


@pytest.mark.parametrize("name", NAMES)
def test_a_spoilt_input_is_read_or_refused_in_one_line(worker: Worker, name: str):
    found = {number: worker.ask(name, number) for number in range(COUNTS[name])}
    bad = {number: answer for number, answer in found.items() if answer["kind"] != "fine"}
    assert not bad, f"python -m fuzz --reader {name} --count 1 --seed {min(bad)}: {bad[min(bad)]}"


@pytest.mark.parametrize("kind", CULPRITS)
def test_what_no_reader_may_do_is_noticed(worker: Worker, kind: str):
    limit = 1.0 if kind == "hang" else None
    assert worker.ask(f"culprit-{kind}", -1, seconds=limit)["kind"] == kind
