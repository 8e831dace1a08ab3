"""Settings of the whole suite: it runs on the CPU, whatever else the machine has."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
