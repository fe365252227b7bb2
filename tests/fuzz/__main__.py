"""`python -m fuzz`, from `tests/`: spoilt inputs to every reader, for a time or a number of them.

    python -m fuzz --seconds 3600 --seed 1
    python -m fuzz --reader csv --seed 17 --count 1 --keep /tmp/csv   # one input again

Every input has a number, from `--seed` on, which alone decides what it is. Ends with 1 if there
is a finding: a traceback, an exit code that is not documented, a message that no terminal should
be shown, more than 5 s or 1 GiB, a process that died, or a result that is wrong.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz.pool import SECONDS, Worker

QUICK = (
    *(
        "jsonl",
        "json",
        "csv",
        "gzip",
        "zstd",
        "utf-16",
        "parquet",
        "conversations",
        "split",
        "canaries",
        "config",
        "safetensors",
        "quantised",
        "gguf",
        "adapter",
    ),
    *("orbax", "pickle", "tokenizer", "replay", "store", "experiment", "training", "checkpoint"),
    "calibration",
)
SLOW = ("score", "report", "merge", "continue", "calibrate", "port")
"""Readers that take some half a second an input: they get one where the others get five."""
NAMES = (*QUICK, *SLOW)
"""All readers; they are defined in `readers.READERS`, which imports JAX."""
ROUND = (*QUICK * 4, *NAMES)


def main() -> int:
    """Runs the inputs, prints a line a reader and what was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--reader", action="append", choices=NAMES, help="all unless given")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--count", type=int, help="inputs in all (default: 200, or no limit)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    parser.add_argument(
        "--limit", type=float, default=SECONDS, help="seconds of the processor an input may take"
    )
    parser.add_argument("--keep", type=Path, help="leave good and spoilt inputs in this folder")
    parser.add_argument("--findings", type=Path, help="write every finding there, a JSON line each")
    given = parser.parse_args()
    names = given.reader or list(NAMES)
    count = given.count or (200 if given.seconds is None else sys.maxsize)
    scratch = given.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    worker = Worker(scratch.absolute(), given.limit)
    done, findings, worst = Counter(), [], {n: [0.0, 0] for n in names}
    until = time.monotonic() + (given.seconds or 1e9)
    try:
        for name in names:
            answer = worker.ask(name, -1)
            assert answer["kind"] == "fine", f"the good input of {name}: {answer}"
        turns = itertools.cycle([name for name in ROUND if name in names])
        for name in itertools.islice(turns, count):
            if time.monotonic() > until:
                break
            number = given.seed + done[name]
            answer = worker.ask(name, number, keep=given.keep is not None)
            done[name] += 1
            worst[name] = [
                max(worst[name][0], answer["seconds"]), max(worst[name][1], answer["bytes"])
            ]  # fmt: skip
            if answer["kind"] != "fine":
                findings.append({"reader": name, "number": number, **answer})
                if given.findings:
                    with given.findings.open("a") as file:
                        file.write(json.dumps(findings[-1]) + "\n")
    except KeyboardInterrupt:
        pass
    finally:
        worker.close()
        if given.keep is None:
            shutil.rmtree(scratch, ignore_errors=True)
    for name in names:
        seconds, size = worst[name]
        bad = sum(f["reader"] == name for f in findings)
        print(f"{name:<12}{done[name]:>6} inputs, {bad:>4} findings, at most {seconds:.1f} s and "
              f"{size / 2**20:.0f} MiB")  # fmt: skip
    show(findings)
    return 1 if findings else 0


def show(findings: list[dict[str, Any]]) -> None:
    """Prints one finding of each kind and place, and how to make it again."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for found in findings:
        about = found["detail"].split(":")[0][:40]
        kinds.setdefault((found["kind"], found["where"], about), []).append(found)
    for (kind, where, _), same in sorted(kinds.items(), key=lambda item: -len(item[1])):
        first = same[0]
        print(f"\n{kind} ({len(same)} times) {where}\n  {first['detail'][:300]}")
        print(f"  python -m fuzz --reader {first['reader']} --seed {first['number']} --count 1")


if __name__ == "__main__":
    sys.exit(main())
