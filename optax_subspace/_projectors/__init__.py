"""Rules that find and follow the basis of a gradient's subspace, one per file."""

from optax_subspace._projectors._base import Projector
from optax_subspace._projectors._svd import svd

__all__ = ["Projector", "svd"]
