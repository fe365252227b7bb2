"""Arrays of which no score would mean anything are refused; what is traced is checked by shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sama_jax import ProbePlan, sign_statistics
from sama_jax.core.votes import batch_sign_statistics

B, T, L, N, M = 2, 3, 300, 4, 5


def arrays(**changes: Any) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    masks = np.ones((B, T, L), bool)
    drawn = [draw.choice(L, M, replace=False) for _ in range(B * T * N)]
    found = {
        "target": draw.normal(size=(B, T, L)).astype(np.float32),
        "reference": draw.normal(size=(B, T, L)).astype(np.float32),
        "masks": masks,
        "scored": masks,
        "weights": np.ones((B, T), np.float32),
        "subsets": np.stack(drawn).reshape(B, T, N, M),
    }
    return found | {name: change(found[name]) for name, change in changes.items()}


def score(given: dict[str, Any], ties: Any = "zero") -> Any:
    plan = ProbePlan(*(given[name] for name in ProbePlan._fields))
    return sign_statistics(given["target"], given["reference"], plan, ties).score


def put(value: Any, *place: Any) -> Any:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[place] = value
        return x

    return change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("target", lambda x: x[0], r"target has shape \[3, 300\]"),
        ("reference", lambda x: x[:, :1], r"reference has shape \[2, 1, 300\], expected \[2, 3"),
        ("reference", lambda x: x[:, :, :1], "reference has shape"),
        ("scored", lambda x: x[:1], "scored has shape"),
        ("masks", lambda x: x[:, :, :9], "masks has shape"),
        ("weights", lambda x: x[:, :1], "weights has shape"),
        ("subsets", lambda x: x[:, :1], "subsets has shape"),
        ("subsets", lambda x: x[..., 0], "subsets has shape"),
        ("scored", lambda x: x.astype(int), "scored holds int64, expected bool"),
        ("subsets", lambda x: x.astype(np.uint16), "subsets holds uint16, expected signed"),
        ("subsets", lambda x: x.astype(float), "subsets holds float64, expected signed"),
        ("weights", lambda x: x.tolist(), "weights holds list, expected floats"),
        ("target", put(np.nan, 0, 1, 7), "target has no finite loss"),
        ("reference", put(np.inf, 1, 0, 0), "reference has no finite loss"),
        ("scored", np.zeros_like, "no step up to theirs scores"),
        ("subsets", put(L, 0, 0, 0, 0), r"positions outside -1 \(unused\) to 299"),
        ("subsets", put(-2, 0, 0, 0, 0), "positions outside"),
        ("subsets", put(7, 0, 0, 0, slice(2)), "a position twice"),
        ("subsets", put(-1, 1, 2), "a step with a weight has no subset"),
        ("subsets", lambda x: x[:, :, :0], "a step with a weight has no subset"),
        ("weights", put(-1, 0, 0), "finite and not negative"),
        ("weights", put(np.nan, 0, 0), "finite and not negative"),
        ("weights", put(0, 1), "all weights of a text are 0"),
    ],
)
def test_what_means_nothing_is_refused(name: str, change: Any, said: str):
    with pytest.raises(ValueError, match=said):
        score(arrays(**{name: change}))


def test_ties_are_known():
    with pytest.raises(ValueError, match="ties is 'Half', expected one of zero, half"):
        score(arrays(), "Half")


def test_sound_arrays_padding_and_losses_that_nothing_reads_are_taken():
    given = arrays(target=put(np.nan, 0, slice(None), 5), scored=put(False, 0, slice(None), 5))
    given["subsets"][given["subsets"] == 5] = 6
    given["subsets"][0, 0, 0] = [1, 2, -1, -1, -1]
    given["scored"][1], given["weights"][1], given["subsets"][1] = False, 0, -1  # a padding row
    assert score(given)[1] == 0
    plan = ProbePlan(*(given[name] for name in ProbePlan._fields))
    whole = batch_sign_statistics(given["target"], given["reference"], plan)
    np.testing.assert_array_equal(score(given), whole.score)


def test_what_is_traced_is_checked_by_its_shape_alone():
    """And what is not traced by its values, too."""
    given = arrays()
    targets = jnp.stack([jnp.asarray(given["target"])] * 2)
    found = jax.jit(jax.vmap(lambda x: score(given | {"target": x})))(targets)
    np.testing.assert_array_equal(found[1], score(given))
    jax.jit(lambda x: score(given | {"target": x}))(given["target"] * np.nan)  # cannot be seen
    with pytest.raises(ValueError, match="target has shape"):
        jax.jit(lambda x: score(given | {"target": x}))(targets)
    with pytest.raises(ValueError, match="not negative"):
        jax.jit(lambda x: score(given | {"target": x, "weights": -given["weights"]}))(targets[0])
