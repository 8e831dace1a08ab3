"""Rules that find and follow the basis of a gradient's subspace."""

from optax_subspace._projectors._adaptive import adaptive_period
from optax_subspace._projectors._base import Projector
from optax_subspace._projectors._fixed import fixed
from optax_subspace._projectors._history_pca import history_pca
from optax_subspace._projectors._oja import oja
from optax_subspace._projectors._online_pca import online_pca, tied_rate
from optax_subspace._projectors._random import random_projection
from optax_subspace._projectors._subspace_iteration import subspace_iteration
from optax_subspace._projectors._svd import svd

__all__ = [
    "Projector",
    "adaptive_period",
    "fixed",
    "history_pca",
    "oja",
    "online_pca",
    "random_projection",
    "subspace_iteration",
    "svd",
    "tied_rate",
]
