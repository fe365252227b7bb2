"""The benchmark and the compilation cache: what they claim is what happens."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from sama_jax.cli import entry
from sama_jax.config import AuditSettings, override, preset
from sama_jax.errors import UsageError
from sama_jax.programs.bench import bench
from sama_jax.texts import data

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
    found["torch"]["memory_ratio"] = bench._share(None, None)
    bench.print_table(found)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in table if "peak memory" in line] == [["-", "-"]]


@pytest.mark.parametrize("found", [("gpu", "float32"), ("cpu", "bfloat16")])
def test_pytorch_is_compared_where_it_was_checked(found):
    bench._require_comparable({"platform": "cpu", "dtype": "float32"})
    with pytest.raises(UsageError, match=f"found {found[0]} and {found[1]}; set JAX_PLATFORMS=cpu"):
        bench._require_comparable(dict(zip(("platform", "dtype"), found)))


def test_matrix_products_take_a_share_of_the_round_in_turn(monkeypatch):
    """Of a long round more than a slice each: the best of a few noisy ones would be too high."""
    calls, rates = [], iter(range(100))

    def rate(*args):
        calls.append(args[:3])
        return float(next(rates))

    monkeypatch.setattr(bench, "_rate", rate)
    batch = data.BatchPlan(16, np.arange(4))
    arch = SimpleNamespace(width=8, mlp_width=24)
    side = SimpleNamespace(
        memory=SimpleNamespace(stop=lambda: None),
        model=SimpleNamespace(arch=arch, vocab_size=100, dtype="float32"),
        work=SimpleNamespace(batches=lambda _: [batch], pending=lambda **_: []),
        on_cpu=True,
        seconds=3 * bench.PEAK_SECONDS / bench.PEAK_SHARE,
    )
    found = bench._Ours.products(side)  # pyright: ignore
    own = [(64, 8, 8), (64, 8, 24), (64, 24, 8), (64, 8, 100)]
    shapes = [(n, n, n) for n in bench.SQUARES["cpu"]] + own
    assert calls == 3 * shapes
    assert found == {"x".join(map(str, s)): 7.0 + i for i, s in enumerate(shapes)}  # means
    side.seconds, rates = 1e4, iter(range(1000))  # the share is for short rounds
    calls.clear()
    bench._Ours.products(side)  # pyright: ignore
    assert calls == round(bench.PEAK_MOST / bench.PEAK_SECONDS) * shapes


def test_memory_of_an_accelerator_is_that_above_the_weights():
    class Device:
        stats = {"bytes_in_use": 100, "peak_bytes_in_use": 100}  # noqa: RUF012

        def memory_stats(self):
            return self.stats

    device = Device()
    memory = bench._DeviceMemory(device)
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
        masked |= sama._new_positions(step, masked, valid)
        counts.append(masked.sum(dim=1).tolist())
    fractions = (np.arange(4) + 1) / 5 if name == "official" else np.arange(4) / 3
    expected = np.rint(40 * (0.05 + 0.45 * fractions)).astype(int)
    assert counts == [[n, n] for n in expected]
    texts = [np.arange(1, 30), np.arange(1, 12)]
    assert sama.run(texts).scores.tolist() == [0.0, 0.0]


def test_windows_join_the_texts_and_have_one_length(inputs):
    model, texts = inputs
    folder = bench.model_folder.open_folder(model)
    job = bench.BenchJob(
        model=model,
        texts=data.read_texts(texts).texts,
        settings=AuditSettings(max_length=50),
        windows=True,
        limit=3,
    )
    found = bench._encode(job, folder)
    assert [len(ids) for ids in found] == [50, 50, 50]
    tokenizer = data.TextTokenizer.from_folder(model)
    first = [i for t in job.texts for i in tokenizer.encode([t.text], 10**6)[0].ids]
    assert np.concatenate(found).tolist() == first[:150]


COUNT = """
import sys, jax
from collections import Counter
seen = Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name]))
from sama_jax.cli import entry
assert main(sys.argv[1:]) == 0
print(seen["/jax/compilation_cache/cache_misses"], seen["/jax/compilation_cache/cache_hits"])
"""


def test_a_second_process_compiles_nothing_with_the_cache(inputs, tmp_path):
    model, texts = inputs
    counts = []
    for run in ("first", "second"):
        command = ["audit", "--target", str(model), "--reference", str(model), "--data", str(texts)]
        command += ["--out", str(tmp_path / run), "--compile-cache", str(tmp_path / "cache")]
        command += ["--attacks", "sama,loss", "--no-figures", "--quiet", *tiny.SETTINGS]
        done = subprocess.run(
            [sys.executable, "-c", COUNT, *command],
            cwd=ROOT, check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        counts.append([int(n) for n in done.stdout.split()[-2:]])
        assert (tmp_path / run / "report.md").is_file()
        assert not (tmp_path / run / "figures").exists()
    (compiled, _), (again, found) = counts
    assert compiled > 0
    assert again == 0
    assert found >= compiled
