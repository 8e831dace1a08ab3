"""Subspace optimizers for JAX: GaLore and its kin as composable optax transformations."""

from optax_subspace._alias import galore, online_subspace_descent
from optax_subspace._alias8bit import adamw8bit, galore_adamw8bit, online_subspace_adamw8bit
from optax_subspace._alias_scaling import apollo, apollo_mini, fira
from optax_subspace._blocks import Layout, Quantized, dequantize, quantize
from optax_subspace._chaining import (
    InSubspaceState,
    in_subspace,
    scale_by_adam,
    scale_by_lion,
    subspace_project,
)
from optax_subspace._describe import Description, describe
from optax_subspace._energy import Hamiltonian, hamiltonian
from optax_subspace._gradient_scaling import GradientScalingState, scale_by_subspace_norms
from optax_subspace._hamiltonian import HamiltonianState, scale_by_hamiltonian_descent
from optax_subspace._kinetic import (
    Kinetic,
    adam_kinetic,
    heavy_ball,
    lion_k,
    lion_kinetic,
    nesterov,
)
from optax_subspace._layerwise import (
    FusedMetrics,
    FusedState,
    FusedStep,
    LossScale,
    fused_backward,
)
from optax_subspace._leaves import LeafPlan
from optax_subspace._lomo import adalomo, in_float32, lomo
from optax_subspace._metrics import SubspaceMetrics, subspace_metrics
from optax_subspace._plan import plan
from optax_subspace._projected import Projected, SourceBasis
from optax_subspace._projection_state import LeafBasis, ProjectionState
from optax_subspace._projectors import (
    Projector,
    adaptive_period,
    fixed,
    history_pca,
    oja,
    online_pca,
    random_projection,
    subspace_iteration,
    svd,
    tied_rate,
)
from optax_subspace._quantize import QuantizedState, quantize_state
from optax_subspace._rounding import QuantizedWeight, apply_updates, quantize_weights
from optax_subspace._rules import MatrixSpec
from optax_subspace._sharding import state_shardings
from optax_subspace._source import steps_to_refresh, subspace_value_and_grad
from optax_subspace._source_kernel import source_dot_general, source_promote_dtype
from optax_subspace._subspace import SubspaceState, scale_by_subspace

__version__ = "0.1.0"

__all__ = [
    "Description",
    "FusedMetrics",
    "FusedState",
    "FusedStep",
    "GradientScalingState",
    "Hamiltonian",
    "HamiltonianState",
    "InSubspaceState",
    "Kinetic",
    "Layout",
    "LeafBasis",
    "LeafPlan",
    "LossScale",
    "MatrixSpec",
    "Projected",
    "ProjectionState",
    "Projector",
    "Quantized",
    "QuantizedState",
    "QuantizedWeight",
    "SourceBasis",
    "SubspaceMetrics",
    "SubspaceState",
    "adalomo",
    "adam_kinetic",
    "adamw8bit",
    "adaptive_period",
    "apollo",
    "apollo_mini",
    "apply_updates",
    "dequantize",
    "describe",
    "fira",
    "fixed",
    "fused_backward",
    "galore",
    "galore_adamw8bit",
    "hamiltonian",
    "heavy_ball",
    "history_pca",
    "in_float32",
    "in_subspace",
    "lion_k",
    "lion_kinetic",
    "lomo",
    "nesterov",
    "oja",
    "online_pca",
    "online_subspace_adamw8bit",
    "online_subspace_descent",
    "plan",
    "quantize",
    "quantize_state",
    "quantize_weights",
    "random_projection",
    "scale_by_adam",
    "scale_by_hamiltonian_descent",
    "scale_by_lion",
    "scale_by_subspace",
    "scale_by_subspace_norms",
    "source_dot_general",
    "source_promote_dtype",
    "state_shardings",
    "steps_to_refresh",
    "subspace_iteration",
    "subspace_metrics",
    "subspace_project",
    "subspace_value_and_grad",
    "svd",
    "tied_rate",
]
