"""What every layout promises: shapes are those of the arrays, results come back in one piece."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sama_jax.devices.mesh import make_mesh
from sama_jax.devices.runner import Runner
from sama_jax.devices.strategy import (
    OneDevice,
    OnMesh,
    Replicated,
    local_layout,
    mesh_layout,
    row_sharding,
)

LAYOUTS = {
    OneDevice: lambda: local_layout(jax.devices()[:1]),
    Replicated: local_layout,
    OnMesh: lambda: mesh_layout(make_mesh("data=4,model=2")),
}
PARTS = {OneDevice: 1, Replicated: 8, OnMesh: 4}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_abstract_says_what_split_makes(kind):
    layout = LAYOUTS[kind]()
    assert type(layout) is kind
    assert layout.row_parts == PARTS[kind]
    args = (np.zeros((8, 3), np.int32), np.zeros((2, 8, 3), bool), np.int32(1))
    axes = (0, 1, None)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), args)
    made = [(np.shape(x), x.dtype) for x in layout.split(args, axes)]
    assert made == [(x.shape, x.dtype) for x in layout.abstract(shapes, axes)]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_result_comes_back_in_one_piece(kind):
    layout = LAYOUTS[kind]()
    runner = Runner(lambda scale, x: jnp.stack([x, scale * x]), layout, (0,))
    scale = jax.device_put(np.float32(3), row_sharding(layout.mesh, None))
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    assert not runner.is_compiled(rows)
    runner.compile(scale, rows)
    np.testing.assert_array_equal(runner(scale, rows), [rows, 3 * rows])
    assert layout.held(8).all()
    assert layout.owned(8).all()


@dataclass(frozen=True)
class Scaled:
    """A function that is equal to another one of the same factor, as the engine's programs are."""

    factor: int

    def __call__(self, params: jax.Array, rows: jax.Array) -> jax.Array:
        COUNTED.append(self.factor)
        return self.factor * params * rows


COUNTED: list[int] = []


@pytest.mark.parametrize("kind", [OneDevice, Replicated])
def test_equal_functions_share_a_program_in_later_runs(kind):
    """Two audits of one process, each with a runner of its own, trace and compile once."""
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    COUNTED.clear()
    for _ in range(2):
        runner = Runner(Scaled(3), LAYOUTS[kind](), (0,), out_axis=0)
        runner.compile(jnp.float32(2), rows)
        np.testing.assert_array_equal(runner(jnp.float32(2), rows), 6 * rows)
    assert COUNTED == [3]
