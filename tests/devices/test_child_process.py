"""Child processes: answers, errors and crashes arrive where they were asked for."""

import os
from pathlib import Path

import pytest

from sama_jax.devices import child_process
from sama_jax.devices.child_process import Child, Crashed
from sama_jax.errors import DataError, OutOfMemory

BODY = """
import os, signal, sys, time
from sama_jax.devices.child_process import serve
from sama_jax.errors import DataError

def answer(question):
    print("noise on standard output")
    os.write(1, b"noise of a library\\n")
    if question == "fail":
        raise DataError("line 3: expected a text")
    if question == "bug":
        raise KeyError("a private text")
    if question == "memory":
        raise MemoryError("too much")
    if question == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if question == "crash":
        sys.stderr.write("the reason\\n")
        os._exit(3)
    if question == "slow":
        time.sleep(0.3)
    return {"asked": question, "env": os.environ.get("SAID")}

serve(answer)
"""


@pytest.fixture
def body(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "a_child.py").write_text(BODY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    return "a_child"


def test_answers_and_errors_arrive_and_the_child_goes_on_after_an_error(body):
    with Child("test", body, show_errors=False) as one:
        assert one.ask([1, None]) == {"asked": [1, None], "env": None}
        with pytest.raises(DataError, match="line 3: expected a text"):
            one.ask("fail")
        assert one.ask("again")["asked"] == "again"


def test_the_environment_is_the_childs_and_ticks_are_told(body, monkeypatch):
    monkeypatch.setattr(child_process, "TICK_SECONDS", 0.05)
    ticks: list[float] = []
    env = {"PYTHONPATH": os.environ["PYTHONPATH"], "SAID": "yes"}
    with Child("test", body, env=env, show_errors=False) as one:
        assert one.ask("slow", ticks.append)["env"] == "yes"
    assert ticks == sorted(ticks)
    assert len(ticks) >= 2


def test_a_killed_child_is_a_lack_of_memory(body):
    with (
        Child("test", body, advice="give less", show_errors=False) as one,
        pytest.raises(OutOfMemory, match=r"the test process was killed .* memory; give less"),
    ):
        one.ask("kill")


def test_an_error_that_nobody_foresaw_is_one_line_and_the_child_goes_on(body, capfd):
    with Child("test", body, advice="give less") as one:
        with pytest.raises(
            Crashed, match=r"the test process has met a fault .* KeyError in"
        ) as bug:
            one.ask("bug")
        with pytest.raises(OutOfMemory, match=r"out of memory \(too much\); give less"):
            one.ask("memory")
        assert one.ask("again")["asked"] == "again"
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "private" not in said + str(bug.value)


def test_a_crash_says_the_code_and_the_last_line(body):
    with (
        Child("test", body, show_errors=False) as one,
        pytest.raises(Crashed, match=r"the test process ended with exit code 3 \(the reason\)"),
    ):
        one.ask("crash")
    assert Crashed.exit_code == 1
