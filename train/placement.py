"""Where each array of the state is: parameters by the model's table, their moments beside them."""

import warnings
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_subspace import FusedState, dequantize, state_shardings
from train.mesh import Mesh, with_shardings
from train.optimizer import Optimizer
from train.step import State, are_in_int8, kernels_in_int8


def place(shapes: State, optimizer: Optimizer, mesh: Mesh) -> State:
    """The shapes of a state, from `init_state`, with the shardings that it has on the mesh."""
    arrays = jax.eval_shape(dequantize, shapes.params)
    arrays = with_shardings(arrays, mesh.of_params(arrays))
    params = jax.tree.map(lambda x: x.sharding, arrays)
    if are_in_int8(shapes.params):
        # Codes and scales of int8 weights belong to a parameter as its moments do.
        store: Any = optax.GradientTransformation(lambda p: kernels_in_int8(p, mesh.fsdp), None)
        params = state_shardings(store, arrays)
    if isinstance(shapes.opt_state, FusedState):
        opt_state = _of_fused(optimizer.tx, arrays, mesh)
    else:
        opt_state = state_shardings(optimizer.tx, arrays)
    step: Any = mesh.everywhere
    return with_shardings(shapes, State(step, params, opt_state))


def _of_fused(tx: optax.GradientTransformation, arrays: Any, mesh: Mesh) -> FusedState:
    def of_part(part: Any) -> Any:
        with warnings.catch_warnings():
            # Rules for other parts match nothing here.
            warnings.filterwarnings("ignore", "the rule .* matches no parameter", UserWarning)
            return state_shardings(tx, part)

    one = jax.tree.map(_of_layer, arrays["layers"])
    # All arrays have the layers' axis in front, along which nothing is split.
    stacked = lambda s: NamedSharding(s.mesh, PartitionSpec(None, *s.spec))
    number: Any = mesh.everywhere
    return FusedState(
        step=number,
        layers=jax.tree.map(stacked, of_part({"layers": one})),
        rest={key: of_part({key: part}) for key, part in arrays.items() if key != "layers"},
        scale=number,
        good=number,
        skipped=number,
    )


def _of_layer(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding: Any = x.sharding
    own = NamedSharding(sharding.mesh, PartitionSpec(*tuple(sharding.spec)[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=own)
