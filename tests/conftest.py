"""Settings of the whole suite: CPU, eight host devices, float32."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
