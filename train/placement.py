"""Where each array of the state is, parameters by the model's table and their moments beside them,
and in which order of axes."""

import warnings
from typing import Any

import jax
import optax
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from optax_subspace import FusedState, dequantize, state_shardings
from train.mesh import Mesh, with_shardings
from train.optimizer import Optimizer
from train.step import State, are_in_int8, kernels_in_int8


def place(shapes: State, optimizer: Optimizer, mesh: Mesh) -> State:
    """The shapes of a state, from `init_state`, with the formats that it has on the mesh."""
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
    return in_whole_layers(with_shardings(shapes, State(step, params, opt_state)))


def in_whole_layers(shapes: Any) -> Any:
    """Shapes on devices, of which stacks of layers are laid out layer by layer.

    A TPU's own layout is the one with the least padding. Of a stack of odd width, such as the 5461
    of 1b's MLP, that is one whose tiles hold parts of all layers, and each loop over layers copies
    the whole stack first: 12.2 GiB for a fused AdamW step in place of 8.4. The other axes keep the
    order that they have there.
    """
    return jax.tree.map(_in_whole_layers, shapes, taken_alone(shapes).input_formats[0][0])


def taken_alone(tree: Any) -> Compiled:
    """A program that only takes the tree: its arguments are as the devices lay them out."""
    return jax.jit(lambda tree: None, keep_unused=True).lower(tree).compile()


def _in_whole_layers(x: jax.ShapeDtypeStruct, own: Format) -> jax.ShapeDtypeStruct:
    layout: Any = own.layout
    order = layout.major_to_minor
    if len(x.shape) < 3 or order[0] == 0:
        return x
    layers_first = Layout((0, *(axis for axis in order if axis)))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=Format(layers_first, x.sharding))


def formats(shapes: Any) -> Any:
    """Where and how the arrays of these shapes are laid out, for `jax.jit` and `jax.device_put`."""
    return jax.tree.map(lambda x: x.format, shapes)


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
