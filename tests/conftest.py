"""Settings of the whole suite: it runs on the CPU, whatever else the machine has."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# As in the trainer: LAPACK's threads would spin beside those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of the time goes to compiling small programs once each.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Lets go of what a file has compiled: thousands of programs slow down what comes after."""
    yield
    jax.clear_caches()
    gc.collect()
