"""Keeps a worker process running, gives it inputs, and notices when one ends or hangs it."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 5.0
"""What one input may take of the processor."""


class Worker:
    """A process that reads spoilt inputs; a new one takes the place of one that ended."""

    def __init__(self, scratch: Path, seconds: float = SECONDS):
        self.scratch, self.seconds = scratch, seconds
        self._process: subprocess.Popen | None = None
        self._served = 0
        scratch.mkdir(parents=True, exist_ok=True)

    def ask(
        self, reader: str, number: int, *, keep: bool = False, seconds: float | None = None
    ) -> dict[str, Any]:
        """Returns what came of one input: `kind` is `fine`, or what the finding is."""
        seconds = seconds or self.seconds
        if self._process is None or self._served >= 1500:
            self.close()
            self._start()
        assert self._process is not None
        self._served += 1
        job = json.dumps({"reader": reader, "number": number, "keep": keep, "seconds": seconds})
        started = time.monotonic()
        self._process.stdin.write(job + "\n")  # pyright: ignore
        self._process.stdin.flush()  # pyright: ignore
        # Making the good input may take longer than an input; the worker bounds the latter itself.
        ready, _, _ = select.select([self._process.stdout], [], [], 300 + 40 * seconds)
        line = self._process.stdout.readline() if ready else ""  # pyright: ignore
        if line:
            return json.loads(line)
        return self._ended(time.monotonic() - started, seconds)

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        env = {k: v for k, v in os.environ.items() if not k.startswith("SAMA_JAX")}
        path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        # Every arena of the allocator claims 64 MB of addresses, which is what the limit counts.
        env |= {"PYTHONPATH": os.pathsep.join(path), "MALLOC_ARENA_MAX": "2"}
        env |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # What a spoilt folder makes run again was compiled for the good one.
        env |= {"JAX_COMPILATION_CACHE_DIR": str(self.scratch / "cache")}
        env |= {
            f"JAX_PERSISTENT_CACHE_MIN_{n}": "0" for n in ("COMPILE_TIME_SECS", "ENTRY_SIZE_BYTES")
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.worker", str(self.scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )
        self._served = 0

    def _ended(self, took: float, seconds: float) -> dict[str, Any]:
        """Says what ended the worker."""
        process = self._process
        assert process is not None
        process.kill()
        code = process.wait()
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")
        timed = "Timeout (" in log or took > 300
        frames = [x.strip() for x in log.splitlines() if x.strip().startswith("File ")]
        own = [x for x in frames if "sama_jax/" in x or "checkpoints_convert/" in x]
        self.close()
        return {
            "kind": "hang" if timed else "died",
            "detail": f"over {seconds:g} s" if timed else f"exit {code}: {log[-600:]!r}",
            "where": (own or frames or [""])[0],  # the most recent call stands first
            "trace": log[-4000:],
            "seconds": took,
            "bytes": 0,
        }

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout, self._log):
                pipe.close()  # pyright: ignore
            self._process = None
