"""Planning: the closed form against XLA's own memory analysis, the parser, the command's errors.

The scorer is compiled here for the eight CPU devices of the tests, from shapes alone.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType

from sama_jax.cli import entry
from sama_jax.devices import child_process, collectives, compile_ahead, memory, topology
from sama_jax.devices.compile_ahead import Compiled
from sama_jax.devices.mesh import AXES
from sama_jax.devices.sharding import parameter_shardings
from sama_jax.models.registry import build_model, read_config
from sama_jax.programs import capacity


def config(vocab: int, **changes: Any) -> dict[str, Any]:
    return tiny.config(
        **{"n_layers": 3, "n_heads": 8, "n_kv_heads": 8, "weight_tying": False, **changes},
        vocab_size=vocab,
        embedding_size=vocab,
    )


LLADA_8B = Path(__file__).parents[2] / "docs" / "examples" / "llada-8b.json"
SIZES = {
    # name: config, rows, length, slots; each is large in another phase of a pass
    "attention": (config(1024, d_model=64, mlp_hidden_size=64), 4, 512, 16),
    "mlp": (config(1024, d_model=64, mlp_hidden_size=2048), 16, 32, 8),
    "head": (config(16384, d_model=64, mlp_hidden_size=128), 16, 64, 32),
}


def model_of(values: dict[str, Any], dtype: str = "float32") -> Any:
    return build_model(read_config(values, "config.json"), 0, jnp.dtype(dtype))


def closed_form(values: dict[str, Any], shape: memory.BatchShape, data: int) -> memory.Footprint:
    model = model_of(values)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    axis_types = (AxisType.Auto,) * 2
    mesh = AbstractMesh((data, shape.parts), AXES, axis_types=axis_types)
    shardings = parameter_shardings(mesh, shapes, model.arch)
    parameters = memory.parameter_bytes(shapes, model.dtype, shardings)
    return memory.footprint(model.arch, model.dtype, shape, parameters)


# --- the closed form -----------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(2, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_closed_form_agrees_with_the_compiled_program(name, mesh):
    values, rows, length, slots = SIZES[name]
    request = compile_ahead.Request(
        values, "config.json", "float32", "cpu", "cpu:8", {}, mesh, rows, length, (slots,)
    )
    compiled = compile_ahead.compile_scorer(request)
    found = closed_form(values, memory.BatchShape(rows, length, slots, parts=mesh[1]), mesh[0])

    assert found.parameters + found.inputs == pytest.approx(compiled.arguments_bytes, rel=0.01)
    allotted = compiled.temporaries_bytes + compiled.output_bytes
    assert found.temporaries.peak == pytest.approx(allotted, rel=0.15)
    phases = found.temporaries._asdict()
    assert max(("attention", "mlp", "head"), key=lambda phase: phases[phase]) == name
    # Two sums over `model` a block, of the stream each.
    reduced = compiled.collectives["all-reduce"]
    assert reduced.bytes > 2 * 2 * found.temporaries.stream
    assert reduced.count >= 2 * values["n_layers"]


def test_parameters_of_llada_8b_are_those_of_the_checkpoint():
    # 16,031,162,368 bytes of bfloat16, by the index of the published safetensors.
    model = model_of(json.loads(LLADA_8B.read_text("utf-8")), "bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert memory.parameter_bytes(shapes, "bfloat16") == 16_031_162_368


@pytest.mark.parametrize(
    ("parts", "rows", "scored", "gibibytes"),
    [
        (4, 16, 256, 0.900),
        (4, 32, 256, 1.300),
        (4, 16, 512, 1.082),
        (4, 32, 512, 1.505),
        (1, 32, 256, 4.13),
        (1, 32, 512, 4.75),
    ],
)
def test_closed_form_of_a_tpu_program(parts, rows, scored, gibibytes):
    # What libtpu 0.0.42 (jax 0.10.2) allots: v5e:4x4 (4 parts), v5p:2x2x2; texts of 512 tokens.
    values = json.loads(LLADA_8B.read_text("utf-8"))
    shape = memory.BatchShape(rows, 512, scored, parts=parts, platform="tpu")
    found = memory.temporaries(model_of(values).arch, "bfloat16", shape)
    assert found.peak == pytest.approx(gibibytes * 2**30, rel=0.13)


@pytest.mark.parametrize(
    ("attention", "rows", "mebibytes"),
    [
        ("xla", 8, 864),
        ("xla", 16, 1376),
        ("xla", 32, 2304),
        ("xla", 64, 4256),
        ("xla", 128, 8352),
        ("cudnn", 8, 582),
        ("cudnn", 32, 1472),
    ],
)
def test_closed_form_of_a_gpu_program(attention, rows, mebibytes):
    # What XLA (jaxlib 0.11.2) allots on an H200: texts of 512 tokens, 16 of them scored, 4 passes.
    values = json.loads(LLADA_8B.read_text("utf-8"))
    arch = dataclasses.replace(model_of(values).arch, attention=attention)
    shape = memory.BatchShape(rows, 512, 16, passes=4, platform="gpu")
    found = memory.temporaries(arch, "bfloat16", shape)
    assert found.peak == pytest.approx(mebibytes * 2**20, rel=0.1)


def test_largest_rows_are_the_last_that_fit():
    values, _, length, slots = SIZES["attention"]
    model = model_of(values)
    parameters, shape = 10**6, memory.BatchShape(0, length, slots)

    def total(rows: int) -> memory.Footprint:
        return memory.footprint(model.arch, model.dtype, shape._replace(rows=rows), parameters)

    capacity = 50 * 10**6
    rows = memory.largest_rows(model.arch, model.dtype, shape, parameters, capacity)
    assert 0 < rows < 100
    assert memory.fits(total(rows), capacity)
    assert not memory.fits(total(rows + 1), capacity)
    assert memory.largest_rows(model.arch, model.dtype, shape, parameters, parameters) == 0


def test_full_logits_of_eight_texts_take_two_gibibytes():
    assert memory.full_logits_bytes(126464, 8, 512) == 2_071_986_176
    assert memory.full_logits_bytes(126464, 8, 512, parts=4) == 2_071_986_176 // 4
    assert memory.logit_bytes(126464, 8 * 512) <= 64 * 2**20


# --- collectives ---------------------------------------------------------------------------------

HLO = """\
HloModule jit_score, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%block (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = f32[4,8]{1,0:T(8,128)} all-reduce(%x), channel_id=1, to_apply=%add
  %all-gather-start.1 = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%y), channel_id=2
  %all-gather-done.1 = bf16[16,8]{1,0} all-gather-done(%all-gather-start.1)
}

%small (p.2: f32[8]) -> f32[8] {
  %all-reduce.2 = f32[] all-reduce(%z), channel_id=3, to_apply=%add
}

%large (p.3: f32[8]) -> f32[8] {
  %all-reduce.3 = (f32[2]{0}, pred[4]{0}) all-reduce(%z, %w), channel_id=4, to_apply=%add
}

%chunks (p.6: s32[]) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[]{:T(512)} compare(%counter, %constant.1), direction=LT
}

%until (p.7: s32[]) -> pred[] {
  ROOT %lt.2 = pred[]{:T(512)} compare(%counter, %passes), direction=LT
}

%pass (p.4: (s32[], f32[8])) -> (s32[], f32[8]) {
  %while.1 = (s32[], f32[8]) while(%t), condition=%c, body=%block, \
backend_config={"known_trip_count":{"n":"31"}}
  %while.3 = (s32[], f32[8]) while(%t), condition=%chunks, body=%small
  %conditional.1 = f32[8]{0} conditional(%i, %a, %b), branch_computations={%small, %large}
}

ENTRY %main (p.5: f32[8]) -> f32[8] {
  %while.2 = (s32[], f32[8]) while(%t), condition=%until, body=%pass
}
"""


def test_collectives_are_counted_by_loops_and_branches():
    assert collectives.collectives(HLO) == {
        "all-reduce": collectives.Traffic(31 + 5 + 1, 31 * 4 * 8 * 4 + 5 * 4 + 2 * 4 + 4),
        "all-gather": collectives.Traffic(31, 31 * 16 * 8 * 2),
    }


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.config(n_heads=4, n_kv_heads=4)))
    return path


def run(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str, str]:
    code = entry.main(["plan", *map(str, flags)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_compiles_in_a_process_of_its_own(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(child_process, "TICK_SECONDS", 0.5)
    result = tmp_path / "plan.json"
    code, out, err = run(
        capsys,
        "--model",
        model,
        "--topology",
        "cpu:2",
        "--mesh",
        "data=1,model=2",
        "--rows",
        3,
        "--max-length",
        32,
        "--attacks",
        "sama",
        "--set",
        "sama.steps=1",
        "--dtype",
        "float32",
        "--json",
        result,
    )
    assert code == 0, err
    assert "fits" in out
    assert "compiling: 1 s" in err
    found = json.loads(result.read_text())
    assert found["chips"] == 2
    assert found["rows"] == 3
    assert found["fits"] is True
    assert 0 < found["temporaries_bytes"] < found["total_bytes"] < found["chip_bytes"]
    assert found["full_logits_bytes"] == 3 * 32 * tiny.VOCAB // 2 * 4
    assert found["compile_seconds"] > 0
    # Both models: their parameters, which the mesh splits, and one input.
    values = json.loads(model.read_text())
    both = closed_form(values, memory.BatchShape(3, 32, found["slots"][-1], parts=2), 1)
    expected = 2 * both.parameters + both.inputs
    assert found["arguments_bytes"] == pytest.approx(expected, rel=0.02)
    assert found["passes"] == 2 * 1000


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--topology", "v5f:4x4"], "known: v4, v5e, v5p, v6e, cpu"),
        (["--topology", "v5e:4x4x4"], "expected 2 sizes after the colon, as in v5e:4x4"),
        (["--topology", "v5p:4x4"], "as in v5p:4x4x4"),
        (["--topology", "cpu:lots"], "expected cpu:N"),
        (["--topology", "cpu:8", "--mesh", "data=3,model=2"], "uses 6 chips, the topology has 8"),
        (["--topology", "cpu:8", "--mesh", "rows=8"], "expected data=N,model=M"),
        (["--topology", "cpu:8", "--mesh", "data=1,model=8"], "num_heads 4 is not divisible"),
        (["--topology", "cpu:8", "--rows", "0"], "--rows must be at least 1"),
        (["--topology", "cpu:8", "--utilisation", "40"], "between 0 and 1"),
        (["--topology", "v5e:4x4"], "pip install 'sama-jax[tpu]'"),
    ],
)
def test_wrong_flags_are_one_line(model, capsys, monkeypatch, flags, part):
    monkeypatch.setattr(capacity, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    code, out, err = run(capsys, "--model", model, *flags)
    assert code == 2
    assert not out
    assert part in err
    assert err.startswith("sama-jax: ")


def test_a_model_that_is_too_large_says_by_how_much(model, capsys, monkeypatch):
    monkeypatch.setitem(topology.CHIPS, "v5e", topology.CHIPS["v5e"]._replace(memory=20_000))
    code, _, err = run(capsys, "--model", model, "--topology", "v5e:2x2")
    assert code == 2
    assert "do not fit v5e:2x2" in err
    assert "--models in-turn" in err


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"model_type": "mamba"}', "model_type is 'mamba', which is not a supported family"),
        ("[1]", "expected a JSON object"),
        (None, "no such file"),
    ],
)
def test_a_config_that_cannot_be_planned_is_a_model_error(tmp_path, capsys, content, part):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    code, _, err = run(capsys, "--model", path, "--topology", "cpu:2")
    assert code == 4
    assert part in err
    assert str(path) in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "models", "mesh"),
    [
        ("v5e:4x4", 2, (4, 4)),  # 29.9 GiB of parameters, 16 GiB a chip
        ("v5e:4x4", 1, (8, 2)),
        ("v5e:2x2", 2, (1, 4)),
        ("v4:2x2x2", 2, (4, 2)),
        ("v5p:2x2x2", 2, (8, 1)),
    ],
)
def test_the_proposed_mesh_has_the_fewest_parts_that_fit_llada_8b(name, models, mesh):
    job = capacity.PlanJob(model=LLADA_8B, topology=name, models=models)
    case = capacity.propose_case(job, topology.read_topology(name), capacity.read_subject(job))
    assert case.mesh == mesh
    assert case.largest_rows() >= 32  # 16,384 tokens


def test_a_compiler_that_dies_is_one_line(model, capsys, monkeypatch):
    monkeypatch.setattr(child_process.sys, "executable", "/bin/false")
    code, _, err = run(capsys, "--model", model, "--topology", "cpu:1", "--quiet")
    assert code == 1
    assert "the compiler for cpu:1 process ended with exit code 1 (it said nothing)" in err
    assert len(err.strip().splitlines()) == 1


def test_rows_are_halved_until_they_fit(model, capsys, monkeypatch, tmp_path):
    asked = []

    def answer(request: compile_ahead.Request, tick: Any) -> Compiled:
        asked.append(request.rows)
        return Compiled(1.0, False) if request.rows > 20 else Compiled(1.0, True, 10, 10, 1)

    monkeypatch.setattr(compile_ahead, "run", answer)
    flags = ["--model", model, "--topology", "cpu:1", "--json", tmp_path / "o.json", "--quiet"]
    assert run(capsys, *flags, "--max-length", 256)[0] == 0
    assert asked == [64, 32, 16]
    assert json.loads((tmp_path / "o.json").read_text())["rows"] == 16
    # Rows that were asked for are not changed; the result says so.
    code, out, _ = run(capsys, *flags, "--rows", 30)
    assert (code, asked[3:]) == (0, [30])
    found = json.loads((tmp_path / "o.json").read_text())
    assert (found["fits"], found["temporaries_bytes"]) == (False, None)
    assert "does not fit" in out


def test_rows_are_those_of_an_audit(model, capsys, monkeypatch):
    asked = []

    def answer(request: compile_ahead.Request, tick: Any) -> Compiled:
        asked.append(request.rows)
        return Compiled(1.0, True, 10, 10, 1)

    monkeypatch.setattr(compile_ahead, "run", answer)
    flags = ["--model", model, "--topology", "cpu:1", "--quiet", "--max-length", 300]
    assert run(capsys, *flags)[0] == 0
    assert asked == [48]  # 54 texts have 16,384 tokens; plans are drawn for 8 texts at once


def test_two_models_in_turn_take_the_memory_of_one(model, capsys, tmp_path, monkeypatch):
    answer = Compiled(1.0, True, 1000, 10, 1)
    monkeypatch.setattr(compile_ahead, "run", lambda request, tick: answer)
    found = {}
    for models in ("together", "in-turn"):
        result = tmp_path / f"{models}.json"
        flags = ["--model", model, "--topology", "cpu:1", "--models", models, "--json", result]
        assert run(capsys, *flags)[0] == 0
        found[models] = json.loads(result.read_text())["arguments_bytes"]
    one = memory.parameter_bytes(
        jax.eval_shape(model_of(json.loads(model.read_text())).init, jax.random.key(0)), "bfloat16"
    )
    assert found["in-turn"] == 1000
    assert found["together"] == 1000 + one
