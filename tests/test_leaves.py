"""Plans: which leaf is projected, on which axes and side, and what is said about the others."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import optax_subspace as osub
from optax_subspace import MatrixSpec


def plans(shapes, rules=None, **kwargs):
    tree = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return {p.path: p for p in osub.plan(tree, rules, **kwargs)}


@pytest.mark.parametrize(
    "shape, shorter, longer",
    [((20, 12), "right", "left"), ((12, 20), "left", "right"), ((16, 16), "right", "left")],
)
def test_sides(shape, shorter, longer):
    side = lambda s: plans({"w": shape}, rank=4, side=s)["w"]
    assert side("shorter").side == shorter and side("longer").side == longer
    assert side("left").low_shape == (4, shape[1])
    assert side("right").low_shape == (shape[0], 4)
    assert side("both").low_shape == (4, 4) and side("both").side == "both"
    assert side("both").basis_shapes == ((shape[0], 4), (shape[1], 4))


def test_square_matrices_have_a_side_of_their_own():
    rules = [("", MatrixSpec(square_side="left"))]
    side = lambda shape, s: plans({"w": shape}, rules, rank=4, side=s)["w"].side
    assert side((16, 16), "shorter") == side((16, 16), "longer") == "left"
    assert side((16, 16), "right") == "right"
    assert side((20, 12), "shorter") == "right" and side((12, 20), "shorter") == "left"


def test_leaves_left_alone_and_why():
    found = plans(
        {
            "w": (20, 12),
            "embed": (100, 16),
            "decoder/lm_head": (16, 100),
            "ahead": (16, 16),
            "bias": (12,),
            "scalar": (),
            "row": (1, 12),
            "thin": (20, 4),
            "stack": (3, 20, 12),
        },
        rank=4,
    )
    reasons = {path: p.reason for path, p in found.items() if not p.projected}
    assert reasons == {
        "embed": "embedding or output head by its name",
        "decoder/lm_head": "embedding or output head by its name",
        "bias": "not a matrix",
        "scalar": "not a matrix",
        "row": "not a matrix",
        "thin": "rank 4 >= min(20, 4)",
        "stack": "3 dimensions and no rule",
    }
    assert [p.path for p in found.values() if p.wants_rule] == ["stack"]
    assert found["ahead"].projected and found["w"].projected


def test_rules_first_match_wins_and_none_leaves_alone():
    rules = [("^a$", MatrixSpec(rank=2)), ("^(a|b)$", None), ("embed", MatrixSpec())]
    found = plans({"a": (20, 12), "b": (20, 12), "c": (20, 12), "embed": (30, 12)}, rules, rank=4)
    assert found["a"].rank == 2
    assert found["b"].reason == "left alone by rule '^(a|b)$'"
    assert found["c"].rank == 4 and found["c"].reason == "matrix"
    assert found["embed"].projected


@pytest.mark.parametrize(
    "shape, spec, matrix, batch",
    [
        ((3, 20, 12), MatrixSpec(1, 2), (20, 12), (3,)),
        ((2, 3, 20, 12), MatrixSpec(2, 3), (20, 12), (2, 3)),
        ((16, 4, 6), MatrixSpec(0, (1, 2)), (16, 24), ()),
        ((4, 6, 16), MatrixSpec((0, 1), 2), (24, 16), ()),
        ((3, 3, 8, 16), MatrixSpec((0, 1, 2), 3), (72, 16), ()),
        ((3, 20, 12), MatrixSpec(-2, -1), (20, 12), (3,)),
        ((20, 3, 12), MatrixSpec(2, 0), (12, 20), (3,)),
        ((3, 20, 12), optax.contrib.MuonDimensionNumbers(1, 2), (20, 12), (3,)),
        ((16, 4, 6), optax.contrib.GaLoreDimensionNumbers(0, (1, 2)), (16, 24), ()),
    ],
)
def test_axes(shape, spec, matrix, batch):
    p = plans({"w": shape}, [("w", spec)], rank=4)["w"]
    assert (p.matrix_shape, p.batch_shape) == (matrix, batch)
    params = {"w": jax.random.normal(jax.random.key(0), shape)}
    tx = osub.scale_by_subspace(optax.identity(), rank=min(matrix), rules=[("w", spec)])
    updates, _ = tx.update(params, tx.init(params))
    assert jnp.array_equal(updates["w"], params["w"])
    # At full rank less one, on both the reshaping and the way back: nearly the same tensor.
    tx = osub.scale_by_subspace(optax.identity(), rank=min(matrix) - 1, rules=[("w", spec)])
    updates, state = tx.update(params, tx.init(params))
    assert state.projection.leaves["w"].bases[0].shape[-1] == min(matrix) - 1
    error = jnp.linalg.norm(updates["w"] - params["w"]) / jnp.linalg.norm(params["w"])
    assert error < 0.3


def test_paths_of_nnx_states_and_lists():
    model = nnx.Linear(20, 12, rngs=nnx.Rngs(0))
    tree = nnx.state(model, nnx.Param)
    assert [p.path for p in osub.plan(tree, rank=4)] == ["bias", "kernel"]
    assert [p.path for p in osub.plan({"layers": [jnp.ones((8, 8))]}, rank=2)] == ["layers/0"]
    assert [p.path for p in osub.plan(jnp.ones((8, 8)), rank=2)] == ["(root)"]


@pytest.mark.parametrize(
    "dtype", [jnp.complex64, jnp.int32, jnp.uint8, jnp.bool_, jnp.float8_e4m3fn]
)
def test_leaves_that_are_not_real_are_refused_with_their_path(dtype):
    tree = {"block": {"kernel": jax.ShapeDtypeStruct((8, 8), dtype)}}
    with pytest.raises(TypeError, match=r"block/kernel has dtype .*optax\.masked"):
        osub.plan(tree)


def test_bad_rules():
    shapes = {"w": (20, 12)}
    with pytest.raises(ValueError, match=r"parameter w of shape \(20, 12\) has no axis 2"):
        plans(shapes, [("w", MatrixSpec(1, 2))])
    with pytest.raises(ValueError, match="share none"):
        plans(shapes, [("w", MatrixSpec(0, 0))])
    with pytest.raises(ValueError, match="no regular expression"):
        plans(shapes, [("(", None)])
    with pytest.raises(TypeError, match="MatrixSpec"):
        plans(shapes, [("w", "project")])
    with pytest.raises(TypeError, match="pair"):
        plans(shapes, ["w"])
    with pytest.raises(ValueError, match="side"):
        MatrixSpec(side="up")
    with pytest.raises(ValueError, match="square_side must be left or right, got 'both'"):
        MatrixSpec(square_side="both")
    with pytest.raises(ValueError, match="rank"):
        MatrixSpec(rank=-1)
    with pytest.raises(TypeError, match="projector must be a Projector .* got 'svd'"):
        MatrixSpec(projector="svd")
    with pytest.raises(TypeError, match=r"reduction_axis must be an axis or axes, got 0\.5"):
        MatrixSpec(reduction_axis=0.5)
    for spec in (MatrixSpec, optax.contrib.MuonDimensionNumbers):
        with pytest.raises(TypeError, match="the spec of rule 'w' is <class .*: give MatrixSpec"):
            plans(shapes, [("w", spec)])
    with pytest.raises(TypeError, match="scale must be a number or a schedule, got 'a'"):
        MatrixSpec(scale="a")
    with pytest.raises(TypeError, match="pattern must be a regular expression, got None"):
        plans(shapes, [(None, None)])
    # A rule of a rank alone takes no two of three axes for rows and columns.
    for shape in ((6, 20, 12), (3, 3, 20, 12)):
        axes = f"reduction_axis={len(shape) - 2}, output_axis={len(shape) - 1}"
        with pytest.raises(
            ValueError, match=f"w has shape .* both axes, such as {axes}, or be None"
        ):
            plans({"w": shape}, [("w", MatrixSpec(rank=2))])
    with pytest.raises(ValueError, match="must name both axes"):
        plans(shapes, [("w", MatrixSpec(reduction_axis=1))])
    assert plans({"b": (12,)}, [("", MatrixSpec(rank=2))])["b"].reason == "not a matrix"
    with pytest.raises(ValueError, match="batch_split must be at least 1"):
        MatrixSpec(batch_split=0)
    stack = {"w": (6, 20, 12)}
    for split in (4, (2, 3)):
        with pytest.raises(ValueError, match=r"w has batch axes of sizes \(6,\): batch_split="):
            plans(stack, [("w", MatrixSpec(1, 2, batch_split=split))])


def test_warnings_name_the_rule_to_add():
    tx = osub.scale_by_subspace(optax.scale_by_adam(), rank=4)
    with pytest.warns(UserWarning, match=r"stack.*MatrixSpec\(reduction_axis=1, output_axis=2\)"):
        tx.init({"stack": jnp.ones((3, 20, 12)), "w": jnp.ones((20, 12))})
    unmatched = osub.scale_by_subspace(optax.scale_by_adam(), rank=4, rules=[("layers/q", None)])
    with pytest.warns(UserWarning, match="'layers/q' matches no parameter"):
        unmatched.init({"w": jnp.ones((20, 12))})
    late = [("w", MatrixSpec()), ("w/a", MatrixSpec(rank=2))]
    shadowed = osub.scale_by_subspace(optax.scale_by_adam(), rank=4, rules=late)
    with pytest.warns(UserWarning, match="'w/a' has no effect: earlier rules match"):
        shadowed.init({"w": {"a": jnp.ones((20, 12)), "b": jnp.ones((20, 12))}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.init({"stack": jnp.ones((3, 4, 4)), "w": jnp.ones((100, 120))})  # below a tenth
        rules = [("stack", None)]
        tx = osub.scale_by_subspace(optax.scale_by_adam(), rank=4, rules=rules)
        tx.init({"stack": jnp.ones((3, 20, 12))})
        catch_all = [("w", MatrixSpec()), (".*", None)]
        tx = osub.scale_by_subspace(optax.scale_by_adam(), rank=4, rules=catch_all)
        tx.init({"w": jnp.ones((20, 12))})


def test_what_is_not_projected_at_all_or_by_a_name_further_up_is_told():
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    with pytest.warns(UserWarning, match=r"no parameter is projected: w \(64, 64\) is left alone"):
        osub.galore(0.1).init(params)
    # What is missing here is a rule, for `q` alone.
    stack = {"q": jnp.ones((4, 64, 64)), "q_bias": jnp.ones((4, 64)), "norm": jnp.ones((4, 64))}
    with pytest.warns(UserWarning) as told:
        osub.galore(0.1).init(stack)
    (said,) = [str(warning.message) for warning in told]
    assert "rules=[('q$', MatrixSpec(reduction_axis=1, output_axis=2))]" in said
    found = osub.plan(stack, [("q$", MatrixSpec(1, 2))], rank=4)
    assert [p.path for p in found if p.projected] == ["q"]
    encoder = {"text_embedder": {"layer_0": {"kernel": params["w"]}}, "out": params["w"]}
    with pytest.warns(UserWarning, match=r"text_embedder/layer_0/kernel .* a name further up"):
        osub.galore(0.1, 4).init(encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        osub.galore(0.1, 4).init({"decoder": {"lm_head": {"kernel": params["w"]}}, **params})
        osub.galore(0.1).init({"b": params["b"], "embed": params["w"]})


def test_rules_may_be_an_iterator_and_scales_traced():
    params = {"w": jnp.ones((20, 12))}
    tx = osub.galore(0.1, 4, rules=zip(["w"], [MatrixSpec(rank=2)], strict=True))
    _, state = tx.update(params, tx.init(params), params)
    assert osub.subspace_metrics(tx, state, params)
    tx = optax.inject_hyperparams(osub.galore, static_args=("rank",))(0.1, rank=4)
    (leaf,) = osub.describe(params, tx).leaves
    assert leaf.side == "right" and leaf.scale is None


def test_boxes_of_linen_have_the_names_of_their_parameters():
    dense = nn.Dense(12, kernel_init=nn.with_partitioning(nn.zeros, (None, "x")))
    params = dense.init(jax.random.key(0), jnp.ones((1, 20)))["params"]
    assert [p.path for p in osub.plan(params, rank=4)] == ["bias", "kernel"]
    tx = osub.galore(0.1, 4, rules=[("kernel$", MatrixSpec(rank=2))])
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert list(osub.subspace_metrics(tx, state, params)) == ["kernel"]


@pytest.mark.parametrize("shape, rank", [((1000, 64), 128), ((20, 300), 20), ((80, 64), 64)])
def test_auto_never_takes_more_bytes_than_optax(shape, rank):
    """A rank of the whole matrix included, where one long basis may be less than two moments."""
    params = {"w": jnp.zeros(shape)}
    ours = osub.describe(params, osub.galore(0.1, rank, side="auto"))
    peers = jax.eval_shape(optax.contrib.galore(0.1, rank=rank).init, params)
    counters = 100
    assert ours.state_bytes <= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(peers)) + (
        counters
    )
    assert ours.leaves[0].projected == (max(shape) > 2 * min(shape))


def test_describe_twice_tells_the_same():
    params, tx = {"w": jnp.ones((16, 8))}, osub.galore(0.1, 2)
    assert osub.describe(params, tx) == osub.describe(params, tx)
    assert len(osub.describe(params, tx).leaves) == 1


def test_describe_through_wrappers():
    params = {"w": jnp.ones((20, 12)), "v": jnp.ones((12, 20)), "s": jnp.ones((2, 3, 4))}
    inner = osub.galore(1e-2, rank=4)
    label = {"w": "a", "v": "b", "s": "a"}
    tx = optax.multi_transform({"a": inner, "b": osub.galore(1e-2, rank=2)}, label)
    found = osub.describe(params, tx)
    ranks = {p.path: p.rank for p in found.leaves}
    assert ranks == {"w": 4, "v": 2, "s": 0}
    text = str(found)
    assert "20 x 12" in text and "s would be projected by rules=[('s$'" in text
    state = tx.init(params)
    assert found.state_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    assert str(osub.describe({}, inner)).startswith("parameter")


def test_empty_stacks_numbers_and_schedules_of_a_rule():
    empty = {"w": jnp.zeros((0, 8, 6)), "v": jnp.ones((8, 6))}
    schedule = lambda step: 1.0 + step
    rules = [("w", MatrixSpec(1, 2)), ("v", MatrixSpec(scale=schedule))]
    tx = osub.scale_by_subspace(optax.identity(), rank=2, rules=rules, projector=osub.svd(1))
    state = tx.init(empty)
    first, state = tx.update(empty, state)
    second, _ = tx.update(empty, state)
    np.testing.assert_allclose(second["v"], 2 * first["v"], rtol=1e-5)
    tx = osub.galore(1e-2, 2)
    params = {"w": jnp.ones((8, 6)), "number": 1.0}
    updates, _ = tx.update(params, tx.init(params), params)
    assert float(updates["number"]) < 0


class Attention(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


def test_a_field_named_value_is_no_variable_of_nnx():
    kernel = jnp.ones((20, 4, 12))
    params = {"attn": Attention(kernel, kernel, kernel), "w": jnp.ones((20, 12))}
    rules = [("attn/(query|key|value)$", MatrixSpec(0, (1, 2)))]
    found = {p.path: p.projected for p in osub.plan(params, rules, rank=2)}
    assert found == dict.fromkeys(("attn/query", "attn/key", "attn/value", "w"), True)
    tx = osub.galore(0.1, 2, rules=rules, weight_decay=0.1)
    updates, state = tx.update(params, tx.init(params), params)
    assert set(osub.subspace_metrics(tx, state, params)) == set(found)
    assert jnp.all(updates["attn"].value != 0)
    model = nnx.Linear(20, 12, rngs=nnx.Rngs(0))
    assert [p.path for p in osub.plan(nnx.state(model), rank=2)] == ["bias", "kernel"]
    assert [p.path for p in osub.plan(model, rank=2)] == ["bias", "kernel"]


def test_auto_counts_the_buffer_of_micro_batches():
    count = lambda side: (
        osub.describe(
            {"w": jnp.zeros((30, 20))},
            osub.scale_by_subspace(optax.scale_by_adam(), rank=12, side=side, accumulate=4),
        ).state_bytes
    )
    assert count("auto") == min(map(count, ("left", "right", "both"))) == count("both")


@pytest.mark.parametrize(
    "rules", [lambda path: None, MatrixSpec(0, 1), "w", [None], [("w", None, 1)], [("(", None)]]
)
def test_rules_that_are_none_are_refused_at_once(rules):
    with pytest.raises((TypeError, ValueError), match="rule"):
        osub.galore(0.1, 4, rules=rules)
