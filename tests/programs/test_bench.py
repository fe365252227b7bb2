"""The benchmark and the compilation cache: what they claim is what happens."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from sama_jax.cli import entry
from sama_jax.config import AuditSettings, override, preset
from sama_jax.devices.child_process import Crashed
from sama_jax.errors import UsageError
from sama_jax.programs.bench import matmul_products
from sama_jax.programs.bench.memory import DeviceMemory
from sama_jax.programs.bench.run import require_comparable
from sama_jax.programs.bench.side import Loaded, Side
from sama_jax.programs.bench.summary import ratio
from sama_jax.programs.bench.table import print_table
from sama_jax.programs.bench.tokens import encode
from sama_jax.programs.jobs import BenchJob
from sama_jax.texts.read import read_texts
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights.model_folder import open_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("bench")
    model = tiny.folder(out / "model", n_layers=2)
    return model, tiny.write_texts(out / "texts.jsonl", tiny.texts(12))


def test_bench_against_torch_reports_what_the_contract_names(inputs, tmp_path, capsys):
    model, texts = inputs
    out = tmp_path / "bench.json"
    args = ["bench", "--model", str(model), "--data", str(texts), "--max-length", "32"]
    args += ["--against", "torch", "--rounds", "2", "--json", str(out)]
    assert entry.main([*args, "--set", "sama.steps=3"]) == 0
    found = json.loads(out.read_text())
    both = {"texts_per_second", "share_of_matmul_peak", "peak_memory_bytes", "compile_seconds"}
    assert both | {"programs", "preset"} <= set(found)
    assert both | {"ratio"} <= set(found["torch"])
    assert found["torch"]["ratio"] == pytest.approx(
        found["texts_per_second"] / found["torch"]["texts_per_second"]
    )
    assert found["preset"] == "official, changed"
    assert found["texts"] == 12
    assert found["programs"] == 1
    assert found["compile_seconds"] > 0
    assert 0 < found["share_of_matmul_peak"] < 1
    # Both computed the same under the same masks, target and reference.
    assert found["agreement"]["texts"] == 8
    assert found["agreement"]["largest_loss_difference"] < 1e-5
    assert found["agreement"]["largest_score_difference"] < 1e-6
    printed = capsys.readouterr()
    assert "texts a second" in printed.out
    # Whatever takes long is named when it has ended.
    said = [line.split(": ")[0] for line in printed.err.splitlines() if line.startswith("round")]
    names = ("jax", "torch", "products")
    assert said == [f"round {number} of 2, {name}" for number in (1, 2) for name in names]
    # A system that does not say what memory is in use.
    for side in (found, found["torch"]):
        side["peak_memory_bytes"] = None
    found["torch"]["memory_ratio"] = ratio(None, None)
    print_table(found)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in table if "peak memory" in line] == [["-", "-"]]


@pytest.mark.parametrize("found", [("gpu", "float32"), ("cpu", "bfloat16")])
def test_pytorch_is_compared_where_it_was_checked(found):
    loaded = Loaded(2, "some device", "cpu", "float32", "xla")
    require_comparable(loaded)
    with pytest.raises(UsageError, match=f"found {found[0]} and {found[1]}; set JAX_PLATFORMS=cpu"):
        require_comparable(loaded._replace(platform=found[0], dtype=found[1]))


def test_matrix_products_take_a_share_of_the_round_in_turn():
    """Of a long round more than a slice each: the best of a few noisy ones would be too high."""
    calls: list[matmul_products.Shape] = []

    def rate(shape: matmul_products.Shape) -> float:
        calls.append(shape)
        return float(len(calls) - 1)

    shapes = matmul_products.shapes("cpu", 64, 8, 24, 100)
    squares = [(n, n, n) for n in matmul_products.SQUARES["cpu"]]
    assert shapes == [*squares, (64, 8, 8), (64, 8, 24), (64, 24, 8), (64, 8, 100)]
    three_slices = 3 * matmul_products.SLICE_SECONDS / matmul_products.SHARE
    found = matmul_products.mean_rates(shapes, three_slices, rate)
    assert calls == 3 * shapes
    assert found == {"x".join(map(str, s)): 7.0 + i for i, s in enumerate(shapes)}
    calls.clear()
    matmul_products.mean_rates(shapes, 1e4, rate)  # the share is for short rounds
    assert calls == round(matmul_products.MOST_SECONDS / matmul_products.SLICE_SECONDS) * shapes


def test_a_product_whose_result_is_too_large_is_left_out():
    shapes = matmul_products.shapes("cpu", 1024, 8, 24, 2**20)
    assert (1024, 8, 24) in shapes
    assert (1024, 8, 2**20) not in shapes


def test_memory_of_an_accelerator_is_that_above_the_weights():
    class Device:
        stats = {"bytes_in_use": 100, "peak_bytes_in_use": 100}  # noqa: RUF012

        def memory_stats(self):
            return self.stats

    device = Device()
    memory = DeviceMemory(device)
    device.stats = {"bytes_in_use": 120, "peak_bytes_in_use": 170}
    assert memory.stop() == 70
    device.stats = {"bytes_in_use": 120, "peak_bytes_in_use": 900}  # of something else, later
    assert memory.stop() == 70


@pytest.mark.parametrize("name", ["official", "default"])
def test_the_pytorch_form_draws_the_masks_of_its_preset(inputs, name):
    """Its own random masks have the preset's counts, and identical models score 0."""
    torch_sama = pytest.importorskip("sama_jax.programs.bench.torch_sama")
    model, _ = inputs
    settings = override(AuditSettings(sama=preset(name)), ["sama.steps=4", "sama.subsets=4"]).sama
    config = json.loads((model / "config.json").read_text())
    sama = torch_sama.TorchSama(model, config, settings, tiny.MASK_ID, 0, 1.0, 1)
    valid = torch_sama.torch.ones(2, 40, dtype=bool)
    masked, counts = torch_sama.torch.zeros_like(valid), []
    for step in range(4):
        masked |= sama.new_positions(step, masked, valid)
        counts.append(masked.sum(dim=1).tolist())
    fractions = (np.arange(4) + 1) / 5 if name == "official" else np.arange(4) / 3
    expected = np.rint(40 * (0.05 + 0.45 * fractions)).astype(int)
    assert counts == [[n, n] for n in expected]
    texts = [np.arange(1, 30), np.arange(1, 12)]
    assert sama.run(texts).scores.tolist() == [0.0, 0.0]


def test_windows_join_the_texts_and_have_one_length(inputs):
    model, texts = inputs
    folder = open_folder(model)
    job = BenchJob(
        model=model,
        texts=read_texts(texts).texts,
        settings=AuditSettings(max_length=50),
        windows=True,
        limit=3,
    )
    found = encode(job, folder)
    assert [len(ids) for ids in found] == [50, 50, 50]
    tokenizer = TextTokenizer.from_folder(model, None)
    first = [i for t in job.texts for i in tokenizer.encode([t.text], 10**6)[0].ids]
    assert np.concatenate(found).tolist() == first[:150]


BENCH = """
import sys
from pathlib import Path
from jax._src import xla_bridge
from sama_jax.config import AuditSettings
from sama_jax.programs.bench import run
from sama_jax.programs.jobs import BenchJob
from sama_jax.programs.bench.side import End, Loaded, Round
from sama_jax.texts.read import read_texts

class Side:
    def __init__(self, name, *_):
        self.name = name
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def load(self):
        return Loaded(2, "H200", "gpu", "bfloat16", "cudnn")
    def round(self):
        return Round(2.0, 1.0)
    def products(self):
        return {"2x2x2": 100.0}
    def end(self):
        return End(None, 160.0)

run.Side = Side
texts = read_texts(Path(sys.argv[2])).texts
job = BenchJob(model=Path(sys.argv[1]), texts=texts, settings=AuditSettings(), rounds=1)
assert run.run_bench(job)["share_of_matmul_peak"] == 0.8
assert not xla_bridge.backends_are_initialized()
"""


def test_the_calling_process_leaves_accelerators_to_those_that_measure(inputs):
    """JAX takes three quarters of a GPU's memory when it starts."""
    command = [sys.executable, "-c", BENCH, *map(str, inputs)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)


COUNT = """
import sys, jax
from collections import Counter
seen = Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name]))
from sama_jax.cli import entry
assert entry.main(sys.argv[1:]) == 0
print(seen["/jax/compilation_cache/cache_misses"], seen["/jax/compilation_cache/cache_hits"])
"""


def test_a_second_process_compiles_nothing_with_the_cache(inputs, tmp_path):
    model, texts = inputs
    other = tiny.folder(tmp_path / "other", n_layers=2, seed=1)
    counts = []
    for run in ("first", "second"):
        command = ["audit", "--target", str(model), "--reference", str(other), "--data", str(texts)]
        command += ["--out", str(tmp_path / run), "--compile-cache", str(tmp_path / "cache")]
        command += ["--attacks", "sama,loss", "--no-figures", "--quiet", *tiny.SETTINGS]
        done = subprocess.run(
            [sys.executable, "-c", COUNT, *command],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
        counts.append([int(n) for n in done.stdout.split()[-2:]])
        assert (tmp_path / run / "report.md").is_file()
        assert not (tmp_path / run / "figures").exists()
    (compiled, _), (again, found) = counts
    assert compiled > 0
    assert again == 0
    assert found >= compiled


def test_a_side_that_cannot_start_leaves_nothing_open(tmp_path):
    """Its pipes are closed, or the warning about them would fail this test."""
    ids = [np.array([1, 2], np.int32)]
    job = BenchJob(model=tmp_path, texts=[], settings=AuditSettings())
    with pytest.raises(Crashed, match="ended with exit code 1"):  # noqa: SIM117
        with Side("jax", "sama_jax.no_such_module", job, ids, tmp_path):
            pass
    gc.collect()
