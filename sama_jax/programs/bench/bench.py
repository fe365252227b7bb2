"""The benchmark: what scoring costs on this machine, and beside plain PyTorch.

Each framework runs in a process of its own on the same token ids with the same number of threads,
round by round in turn. What is timed is a whole audit with SAMA but for reading texts, loading
weights and the report: plans, both models' passes, the loss store, votes, scores. The reference is
the target with its final norm scaled, so that votes have something to decide.
"""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from sama_jax import attacks, errors
from sama_jax.arrays import Encoded, Params
from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.devices import parallel
from sama_jax.devices.compile_cache import use_compile_cache
from sama_jax.engine import reading, scoring
from sama_jax.errors import DataError, ModelError, SamaError, UsageError
from sama_jax.programs.jobs import BenchJob
from sama_jax.storage.run_folder import RunFolder
from sama_jax.terminal import console, duration
from sama_jax.texts import data
from sama_jax.weights import model_folder

SCALE = 0.9
"""The reference's final norm: softer predictions, as a model that has not seen the texts."""
CHECKED = 8
"""Texts whose losses and scores the two frameworks compare under the same masks and subsets."""
TOLERANCE = 1e-3
"""Largest difference of their losses, nats; float32 rounding is some 1e-5."""
SQUARES = {"cpu": (512, 1024, 2048), "accelerator": (2048, 4096, 8192)}
"""Sizes of square matrix products tried for the peak rate, beside the model's own shapes."""
PEAK_SECONDS = 0.3
"""A slice of one shape of a product, then of the next one; after each round."""
PEAK_SHARE = 0.05
"""Of the round's seconds, at least one slice, for each shape: the median over rounds of the mean.
On two shared cores slices of one product ran at 96 to 141 GFLOP/s (deciles of 330). The best of six
medians of five such is 10 % too high if slices are independent; neighbours in time are less so."""
PEAK_MOST = 3.0
"""Seconds a shape at most, in a round: without it, seven shapes make one of 200 s 70 s longer."""
PRODUCTS_AT_ONCE = 16
"""On an accelerator: a GPU multiplies small matrices faster than the host can wait for each."""
CLEAR_REFS = Path("/proc/self/clear_refs")
GROWTH = {"texts": (100, 200, 400), "length": (64, 128, 256, 512), "passes": (4, 8, 16)}
GROWTH_FIXED = {"texts": 100, "length": 128, "passes": 4}


def run_bench(job: BenchJob) -> dict[str, Any]:
    """One JSON object: see docs/performance.md.

    Raises `ModelError` if the two frameworks do not compute the same.
    """
    say = console(job.quiet)
    _leave_accelerators()
    folder = model_folder.open_folder(job.model, dtype="float32", longest=job.settings.max_length)
    if job.torch and folder.config.get("model_type") != "llada":
        raise UsageError(f"{job.model}: the PyTorch form is written for dense LLaDA only")
    found = _encode(job, folder)
    with tempfile.TemporaryDirectory() as scratch:
        sides = {"jax": _Side("jax", job, found, Path(scratch))}
        try:
            loaded = sides["jax"].ask("load")
            if job.torch:
                _require_comparable(loaded)
                sides["torch"] = _Side("torch", job, found, Path(scratch))
                sides["torch"].ask("load")
            return _measure(job, folder, found, sides, loaded, say)
        finally:
            for side in sides.values():
                side.close()


def run_growth(job: BenchJob) -> list[dict[str, Any]]:
    """Time, memory and FLOPs as texts, their length and the passes grow, one at a time.

    One dict a point: `axis`, the three values, `seconds`, `flops`, `peak_memory_bytes`.
    """
    say, points = console(job.quiet), []
    _leave_accelerators()
    folder = model_folder.open_folder(job.model, dtype="float32")
    for axis, values in GROWTH.items():
        for value in values:
            at = GROWTH_FIXED | {axis: value}
            sama = {**asdict(job.settings.sama), "steps": at["passes"]}
            settings = AuditSettings(
                preset=job.settings.preset,
                sama=SamaSettings(**sama),
                max_length=at["length"],
                seed=job.settings.seed,
                dtype=job.settings.dtype,
            )
            one = BenchJob(
                model=job.model,
                texts=job.texts,
                settings=settings,
                windows=True,
                limit=at["texts"],
                batch_size=job.batch_size,
                rounds=job.rounds,
            )
            found = _encode(one, folder)
            if len(found) < at["texts"]:
                raise DataError(
                    f"the texts make {len(found)} windows of {at['length']} tokens, expected "
                    f"{at['texts']}: give --data more of them"
                )
            with tempfile.TemporaryDirectory() as scratch:
                side = _Side("jax", one, found, Path(scratch))
                try:
                    side.ask("load")
                    side.ask("round")
                    rounds = [side.ask("round")["seconds"] for _ in range(job.rounds)]
                    end = side.ask("end")
                finally:
                    side.close()
            point = {"axis": axis, **at, "seconds": statistics.median(rounds)}
            point |= {k: end[k] for k in ("flops", "peak_memory_bytes")}
            points.append(point)
            say.print(
                f"{at['texts']} texts of {at['length']} tokens, {at['passes']} passes: "
                f"{point['seconds']:.2f} s, {point['flops'] / point['seconds'] / 1e9:.0f} GFLOP/s, "
                f"{point['peak_memory_bytes'] / 2**20:.0f} MiB"
            )
    return points


def _require_comparable(loaded: dict[str, Any]) -> None:
    """PyTorch's side has been checked and measured on CPUs in float32 only."""
    found = (loaded["platform"], loaded["dtype"])
    if found != ("cpu", "float32"):
        raise UsageError(
            f"--against torch: expected a CPU and float32, found {found[0]} and {found[1]}; "
            "set JAX_PLATFORMS=cpu and give --dtype float32"
        )


def _leave_accelerators() -> None:
    """To the processes that measure: JAX takes three quarters of a GPU's memory when it starts.

    Has no effect where the calling process uses one already.
    """
    jax.config.update("jax_platforms", "cpu")


def _encode(job: BenchJob, folder: model_folder.ModelFolder) -> list[np.ndarray]:
    """Token ids of the texts, int32 [n] each; without those that have none."""
    tokenizer = data.TextTokenizer.from_folder(folder.path)
    data.require_ids_fit(tokenizer, folder.model.vocab_size, str(folder.path))
    length = job.settings.max_length
    texts = [t.text for t in job.texts]
    if not job.windows:
        encoded = tokenizer.encode(texts[: job.limit], length)
        found = [e.ids for e in encoded if len(e.ids)]
    else:
        joined = np.concatenate([e.ids for e in tokenizer.encode(texts, 2**31 - 1)])
        found = list(joined[: len(joined) // length * length].reshape(-1, length)[: job.limit])
    if not found:
        raise DataError(f"expected texts of at least one token, found {len(texts)} without any")
    return found


# --- the measuring side --------------------------------------------------------------------------


class _Side:
    """A process that runs one framework and answers one JSON line to each question."""

    def __init__(self, name: str, job: BenchJob, ids: list[np.ndarray], scratch: Path):
        self.name = name
        tokens = np.full((len(ids), max(map(len, ids))), -1, np.int32)
        for row, text in zip(tokens, ids):
            row[: len(text)] = text
        np.save(scratch / "tokens.npy", tokens)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from sama_jax.bench import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Else three quarters of a GPU's memory would be in use from the start.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        )
        self._send(
            {
                "side": name,
                "model": str(job.model),
                "scratch": str(scratch),
                "settings": asdict(job.settings),
                "batch_size": job.batch_size,
                "compile_cache": job.compile_cache and str(job.compile_cache),
            }
        )

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def ask(self, what: str) -> dict[str, Any]:
        """The answer; what went wrong there is raised here."""
        assert self._process.stdout is not None
        self._send(what)
        line = self._process.stdout.readline()
        if not line:
            raise ModelError(
                f"the {self.name} process ended with code {self._process.wait()}; a negative one "
                "is a signal, -9 most often a lack of memory: give --limit or --batch-size less"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _measure(
    job: BenchJob,
    folder: model_folder.ModelFolder,
    ids: list[np.ndarray],
    sides: dict[str, _Side],
    loaded: dict[str, Any],
    say: Any,
) -> dict[str, Any]:
    start = time.monotonic()
    cold = sides["jax"].ask("round")
    say.print(f"first round, with compiling: {cold['seconds']:.1f} s")
    result: dict[str, Any] = {}
    if job.torch:
        sides["jax"].ask("plan")
        result["agreement"] = _agreement(sides["torch"].ask("check"))
        say.print(
            "PyTorch computes the same: largest difference of a loss "
            f"{result['agreement']['largest_loss_difference']:.1e} nats"
        )
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    products: list[dict[str, float]] = []
    begin = time.monotonic()
    for number in range(job.rounds):
        for name, side in sides.items():
            rounds[name].append(side.ask("round"))
            say.print(f"round {number + 1} of {job.rounds}, {name}: "
                      f"{rounds[name][-1]['seconds']:.1f} s")  # fmt: skip
        begun = time.monotonic()
        products.append(sides["jax"].ask("products"))
        say.print(f"round {number + 1} of {job.rounds}, products: "
                  f"{time.monotonic() - begun:.1f} s")  # fmt: skip
        if number == 0:
            left = (time.monotonic() - begin) * (job.rounds - 1)
            say.print(f"about {duration(left)} left")
    ends = {name: side.ask("end") for name, side in sides.items()}
    ours, lengths = ends["jax"], [len(t) for t in ids]
    matmuls = {shape: _median(products, shape) for shape in products[0]}
    peak = max(matmuls.values())
    full = sum(folder.model.flops_per_text(n, float(n)) for n in lengths)
    head = 2.0 * folder.model.arch.width * folder.model.vocab_size
    result |= {
        "preset": job.settings.preset_label,
        "model": {
            "layers": folder.model.num_layers,
            "width": folder.model.arch.width,
            "vocabulary": folder.model.vocab_size,
            "parameters": folder.num_params,
            "dtype": loaded["dtype"],
            "attention": loaded["attention"],
            "head_share_of_full_pass": head * sum(lengths) / full,
        },
        "texts": len(ids),
        "tokens_a_text": statistics.mean(lengths),
        "max_length": job.settings.max_length,
        "passes": job.settings.sama.passes,
        "machine": _machine() | {"device": loaded["device"]},
        "threads": loaded["threads"],
        "rounds": job.rounds,
    }
    times = {name: [r["seconds"] for r in found] for name, found in rounds.items()}
    result |= _rates(times["jax"], len(ids), ours, peak, cold["compile_seconds"])
    result |= {"matmul_peak": matmuls} | {k: ours[k] for k in ("flops", "programs")}
    result["cpu_seconds"] = _median(rounds["jax"], "cpu_seconds")
    result["shares"] = {
        "padding": cold["padding"],
        "head": ours["head_flops"] / ours["flops"],
        "votes": ours["vote_seconds"] / statistics.median(times["jax"]),
        "host": _median(rounds["jax"], "host_seconds") / statistics.median(times["jax"]),
    }
    if job.torch:
        theirs = _rates(times["torch"], len(ids), ends["torch"] | {"flops": ours["flops"]}, peak, 0)
        votes = _median(rounds["torch"], "vote_seconds")
        theirs["shares"] = {"votes": votes / statistics.median(times["torch"])}
        theirs["ratio"] = result["texts_per_second"] / theirs["texts_per_second"]
        inside = result["texts_per_second_with_compiling"]
        theirs["ratio_with_compiling"] = inside / theirs["texts_per_second"]
        without = statistics.median(times["torch"]) - votes
        theirs["ratio_without_its_votes"] = without / statistics.median(times["jax"])
        theirs["memory_ratio"] = _share(result["peak_memory_bytes"], theirs["peak_memory_bytes"])
        # Less disturbed by whatever else the machine does.
        theirs["cpu_seconds"] = _median(rounds["torch"], "cpu_seconds")
        theirs["cpu_ratio"] = theirs["cpu_seconds"] / result["cpu_seconds"]
        theirs["version"] = importlib.metadata.version("torch")
        result["torch"] = theirs
    result["bench_seconds"] = time.monotonic() - start
    return result


def _share(part: int | None, whole: int | None) -> float | None:
    """None where the system does not say what memory is in use."""
    return None if part is None or whole is None else part / whole


def _median(rounds: list[dict[str, Any]], name: str) -> float:
    return statistics.median(r[name] for r in rounds)


def _rates(
    seconds: list[float], texts: int, end: dict[str, Any], peak: float, compile_seconds: float
) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "seconds": [round(s, 3) for s in seconds],
        "texts_per_second": texts / median,
        "texts_per_second_with_compiling": texts / (median + compile_seconds),
        "compile_seconds": compile_seconds,
        "flops_per_second": end["flops"] / median,
        "share_of_matmul_peak": end["flops"] / median / peak,
        "peak_memory_bytes": end["peak_memory_bytes"],
    }


def _agreement(found: dict[str, Any]) -> dict[str, Any]:
    if not found["largest_loss_difference"] <= TOLERANCE:
        raise ModelError(
            "JAX and PyTorch do not compute the same: largest difference of a loss "
            f"{found['largest_loss_difference']:.2e} nats, expected at most {TOLERANCE}"
        )
    return found


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    found = {"cpu": model, "python": platform.python_version()}
    return found | {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax")}


def _where(machine: dict[str, Any]) -> str:
    return machine["cpu"] if machine["device"] == "cpu" else machine["device"]


def print_table(found: dict[str, Any]) -> None:
    """The result of `run_bench` on standard output."""
    model, other = found["model"], found.get("torch")
    print(
        f"{model['layers']} layers, width {model['width']}, vocabulary {model['vocabulary']} "
        f"({100 * model['head_share_of_full_pass']:.0f} % of a full pass), {model['dtype']}; "
        f"{found['texts']} texts of {found['tokens_a_text']:.0f} tokens, preset {found['preset']}; "
        f"{found['threads']} threads, {_where(found['machine'])}; "
        f"median of {found['rounds']} rounds"
    )
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("", "sama_jax", *(["PyTorch", "ratio"] if other else [])):
        table.add_column(column, justify="right" if column else "left")

    def row(title: str, name: str, scale: float, form: str, ratio: str | None = None) -> None:
        values = [side.get(name) for side in (found, *([other] if other else []))]
        cells = ["-" if v is None else format(v / scale, form) for v in values]
        if other:
            known = ratio is not None and other[ratio] is not None
            cells.append(format(other[ratio], ".2f") if known else "")
        table.add_row(title, *cells)

    row("texts a second", "texts_per_second", 1, ".3f", "ratio")
    row("the same, compiling included", "texts_per_second_with_compiling", 1, ".3f",
        "ratio_with_compiling")  # fmt: skip
    row("CPU seconds a round", "cpu_seconds", 1, ".1f", "cpu_ratio")
    row("GFLOP/s (of what is needed)", "flops_per_second", 1e9, ".1f")
    row("% of the matmul peak", "share_of_matmul_peak", 0.01, ".0f")
    row("peak memory above the weights, MiB", "peak_memory_bytes", 2**20, ".0f", "memory_ratio")
    row("programs", "programs", 1, ".0f")
    row("compiling, s", "compile_seconds", 1, ".1f")
    Console().print(table)
    shape, peak = max(found["matmul_peak"].items(), key=lambda item: item[1])
    print(f"matmul peak: {peak / 1e9:.0f} GFLOP/s at {shape}; "
          + ", ".join(f"{k} {v / 1e9:.0f}" for k, v in found["matmul_peak"].items()))  # fmt: skip
    print("shares: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in found["shares"].items()))
    if other:
        print(
            f"PyTorch: votes {100 * other['shares']['votes']:.1f} %, ratio without them "
            f"{other['ratio_without_its_votes']:.2f}; largest difference of a loss "
            f"{found['agreement']['largest_loss_difference']:.1e} nats, of a score "
            f"{found['agreement']['largest_score_difference']:.1e}"
        )


def print_growth(points: list[dict[str, Any]]) -> None:
    """The result of `run_growth` on standard output: each axis against its first point."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("", "seconds", "GFLOP", "MiB", "time x", "FLOP x", "time / FLOP"):
        table.add_column(column, justify="right" if column else "left")
    for axis in GROWTH:
        found = [p for p in points if p["axis"] == axis]
        for point in found:
            time_x = point["seconds"] / found[0]["seconds"]
            flops_x = point["flops"] / found[0]["flops"]
            table.add_row(
                f"{point[axis]} {axis}",
                f"{point['seconds']:.2f}",
                f"{point['flops'] / 1e9:.0f}",
                f"{(point['peak_memory_bytes'] or 0) / 2**20:.0f}",
                f"{time_x:.2f}",
                f"{flops_x:.2f}",
                f"{time_x / flops_x:.2f}",
            )
    Console().print(table)


# --- the measured side ---------------------------------------------------------------------------


def serve() -> None:
    """Answers the questions of `_Side` on standard input, in the process that it started."""
    job = json.loads(sys.stdin.readline())
    side: Any = None
    for line in sys.stdin:
        what = json.loads(line)
        try:
            if side is None:
                side = _Ours(job) if job["side"] == "jax" else _Theirs(job)
            answer = getattr(side, what)()
        except SamaError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        print(json.dumps(answer), flush=True)


def _resident(name: str) -> int | None:
    """Bytes by the kernel's count: VmRSS now, VmHWM at most so far; None elsewhere than Linux."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    return None if found is None else 1024 * int(found[1])


class _Memory:
    """What a process needs above what it has when this is made, up to the first `stop`."""

    def __init__(self):
        self._start()
        self.most: int | None = None

    def _start(self) -> None:
        """Resident memory, by the kernel's count."""
        if CLEAR_REFS.exists():
            CLEAR_REFS.write_text("5")  # the high-water mark starts anew
        self.before = _resident("VmRSS")

    def _peak(self) -> int | None:
        now = _resident("VmHWM")
        return None if now is None or self.before is None else now - self.before

    def stop(self) -> int | None:
        """Bytes; None where the system does not say. What comes later is not looked at."""
        if self.most is None:
            self.most = self._peak()
        return self.most


class _DeviceMemory(_Memory):
    """Of an accelerator, by JAX's own count."""

    def __init__(self, device: Any):
        self.device = device
        super().__init__()

    def _start(self) -> None:
        self.before = self._read("bytes_in_use")

    def _peak(self) -> int | None:
        assert self.before is not None
        return self._read("peak_bytes_in_use") - self.before

    def _read(self, name: str) -> int:
        return (self.device.memory_stats() or {}).get(name, 0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings(job: dict[str, Any]) -> AuditSettings:
    given = job["settings"]
    plain = {k: v for k, v in given.items() if not isinstance(v, dict)}
    return AuditSettings(**plain, sama=SamaSettings(**given["sama"]))


def _tokens(job: dict[str, Any]) -> list[np.ndarray]:
    return [row[row >= 0] for row in np.load(Path(job["scratch"]) / "tokens.npy")]


class _Ours:
    """The audit's own code on the texts."""

    def __init__(self, job: dict[str, Any]):
        self.job, self.settings, self.ids = job, _settings(job), _tokens(job)
        self.compile_seconds, self.round_number = 0.0, 0
        use_compile_cache(Path(job["compile_cache"]) if job["compile_cache"] else None)
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        # Tracing, lowering and compiling of everything, votes and plans included.
        if event.startswith("/jax/core/compile/"):
            self.compile_seconds += duration_secs

    def load(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "dtype": self.settings.dtype,
            "attention": self.settings.attention,
        }
        folder = model_folder.open_folder(Path(self.job["model"]), **options)
        self.layout = parallel.local_layout()
        target = model_folder.load(folder, self.layout.shardings)
        jax.block_until_ready(target)
        key = scoring.model_key(folder, self.settings)
        roles = [scoring.Role("target", folder, key), scoring.Role("reference", folder, key + "r")]
        self.roles, self.model = roles, folder.model
        self.params = {roles[0].store_key: target, roles[1].store_key: _reference(target)}
        encoded = [Encoded(t, np.zeros(len(t), bool), False, 1, 1) for t in self.ids]
        items = [reading.text_item(e, self.settings, folder.model.shift) for e in encoded]
        keys = {r.name: r.store_key for r in roles}
        chosen = attacks.select(["sama"])
        self.reader = reading.Reader(chosen, self.settings, {"text": [*items]}, keys, None)
        device = self.layout.devices[0]
        self.on_cpu = device.platform == "cpu"
        self.memory = _Memory() if self.on_cpu else _DeviceMemory(device)
        return {
            "threads": _cores(),
            "device": str(device.device_kind),
            "platform": device.platform,
            "dtype": jnp.dtype(folder.model.dtype).name,
            "attention": scoring.attention_of(folder),
        }

    def round(self) -> dict[str, Any]:
        self.round_number += 1
        self.compile_seconds = 0.0
        self.work = scoring.Work(
            self.reader,
            self.roles,
            self.settings,
            batch_size=self.job["batch_size"],
            layout=self.layout,
            quiet=True,
        )
        out = Path(self.job["scratch"]) / f"round-{self.round_number}"
        ids = [str(i) for i in range(len(self.ids))]
        start, cpu = time.perf_counter(), time.process_time()
        folder = RunFolder(out, {}, {}, None)
        try:
            self.work.run(folder, ids, console(quiet=True), self.params)
        finally:
            folder.close()
        self.seconds = seconds = time.perf_counter() - start
        if self.round_number == 1:
            self.programs = self.work.programs
        return {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - cpu,
            "compile_seconds": self.compile_seconds,
            "host_seconds": seconds - sum(self.work.seconds.values()),
            "padding": 1 - sum(map(len, self.ids)) / self._padded(),
        }

    def _padded(self) -> int:
        rows = self.work.pending(everything=True)
        return sum(b.rows.size * b.length for b in self.work.batches(rows))

    def plan(self) -> dict[str, Any]:
        """Writes masks, subsets, losses and scores of the first texts, for the other side."""
        rows = list(range(min(CHECKED, len(self.ids))))
        task = self.reader.task("sama")
        plan, n = task.draw(rows), len(rows)
        losses = {r: self.reader.values(task, rows, r, "nll")[:n] for r in reading.ROLES}
        scores = self.reader.statistics(self.reader.attacks, rows)["sama"]
        np.savez(
            Path(self.job["scratch"]) / "plan.npz",
            masks=plan.masks[:n],
            subsets=plan.subsets[:n],
            scores=scores,
            **losses,  # pyright: ignore
        )
        return {}

    def end(self) -> dict[str, Any]:
        peak_memory = self.memory.stop()
        flops = head = votes = 0.0
        task = self.reader.task("sama")
        for start in range(0, len(self.ids), reading.PLAN_ROWS):
            rows = list(range(start, min(start + reading.PLAN_ROWS, len(self.ids))))
            begin = time.perf_counter()  # in a round it happens while devices work
            self.reader.statistics(self.reader.attacks, rows)
            votes += time.perf_counter() - begin
            scored = np.asarray(task.draw(rows).scored).sum(axis=-1)
            for row, counts in zip(rows, scored):
                n = len(self.ids[row])
                flops += 2 * sum(self.model.flops_per_text(n, float(c)) for c in counts)
                head += 4.0 * self.model.arch.width * self.model.vocab_size * counts.sum()
        return {
            "flops": flops,
            "head_flops": head,
            "vote_seconds": votes,
            "peak_memory_bytes": peak_memory,
            "programs": self.programs,
        }

    def products(self) -> dict[str, float]:
        """Floating-point operations a second by shape of the product."""
        self.memory.stop()  # theirs is not the audit's
        arch, first = self.model.arch, self.work.batches(self.work.pending(everything=True))[0]
        rows = first.rows.size * first.length
        d, f, v = arch.width, arch.mlp_width, self.model.vocab_size
        own = [s for s in ((rows, d, d), (rows, d, f), (rows, f, d), (rows, d, v))
               if 4 * s[0] * s[2] <= (2**28 if self.on_cpu else 2**30)]  # fmt: skip
        squares = [(n, n, n) for n in SQUARES["cpu" if self.on_cpu else "accelerator"]]
        at_once, dtype = 1 if self.on_cpu else PRODUCTS_AT_ONCE, self.model.dtype
        shapes = dict.fromkeys((*squares, *own))
        turns = max(1, round(min(PEAK_SHARE * self.seconds, PEAK_MOST) / PEAK_SECONDS))
        found = [[_rate(*s, dtype, at_once) for s in shapes] for _ in range(turns)]
        means = map(statistics.mean, zip(*found))
        return {"x".join(map(str, s)): mean for s, mean in zip(shapes, means)}


def _rate(m: int, k: int, n: int, dtype: Any, at_once: int) -> float:
    """Of products handed over `at_once`. Sustained, as the rounds are that it is compared with: the
    fastest of many products of 1 ms was up to 1.3 times as fast on a shared machine."""
    # Random: a GPU multiplies ones faster, since fewer bits change.
    a, b = (jax.random.normal(jax.random.key(0), shape, dtype) for shape in ((m, k), (k, n)))
    product = jax.jit(jnp.dot)
    product(a, b).block_until_ready()
    count, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < PEAK_SECONDS:
        for _ in range(at_once - 1):
            product(a, b)
        product(a, b).block_until_ready()
        count += at_once
    return 2.0 * m * k * n * count / seconds


def _reference(params: Params) -> Params:
    """Another model of the same size that shares most of the weights."""
    part = "final_norm" if "final_norm" in params else "last_block"
    return {**params, part: jax.tree.map(lambda x: x * np.asarray(SCALE, x.dtype), params[part])}


class _Theirs:
    """The PyTorch form on the same texts."""

    def __init__(self, job: dict[str, Any]):
        from sama_jax.programs.bench import torch_sama

        settings, path = _settings(job), Path(job["model"])
        config = model_folder.open_folder(path, dtype="float32")
        self.ids, self.scratch, self.module = _tokens(job), Path(job["scratch"]), torch_sama
        self.sama = torch_sama.TorchSama(
            path, config.config, settings.sama, config.model.mask_id, settings.seed, SCALE, _cores()
        )

    def load(self) -> dict[str, Any]:
        self.memory = _Memory()
        return {}

    def round(self) -> dict[str, Any]:
        start, cpu = time.perf_counter(), time.process_time()
        result = self.sama.run(self.ids)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "vote_seconds": result.vote_seconds,
        }

    def check(self) -> dict[str, Any]:
        """Losses and scores under the same masks and subsets as ours."""
        with np.load(self.scratch / "plan.npz") as plan:
            ours = dict(plan)
        probes = self.module.Probes(ours["masks"], ours["subsets"])
        result = self.sama.run(self.ids[: len(probes.masks)], probes)
        differences = []
        for name, losses in result.losses.items():
            read = ours[name][..., : losses.shape[-1]]
            if not np.array_equal(np.isnan(read), np.isnan(losses)):
                raise ModelError("JAX and PyTorch read losses at different positions")
            differences.append(np.nanmax(np.abs(read - losses)))
        return {
            "texts": len(probes.masks),
            "largest_loss_difference": float(max(differences)),
            "largest_score_difference": float(np.abs(result.scores - ours["scores"]).max()),
        }

    def end(self) -> dict[str, Any]:
        return {"peak_memory_bytes": self.memory.stop()}
