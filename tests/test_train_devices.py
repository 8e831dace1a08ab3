"""The warning about an accelerator that lies idle."""

import pytest

from train import devices


@pytest.mark.parametrize(
    "file, kind",
    [("dev/nvidia0", "cuda"), ("proc/driver/nvidia/version", "cuda"), ("dev/accel0", "tpu")],
)
def test_an_idle_accelerator_is_named_with_the_command(tmp_path, monkeypatch, file, kind):
    for name in ("JAX_PLATFORMS", "TPU_NAME", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)
    assert devices.idle_accelerator(tmp_path) is None
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert devices.idle_accelerator(tmp_path) == kind
    assert f"DEVICE={kind}" in devices.warning(kind)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert devices.idle_accelerator(tmp_path) is None


def test_a_tpu_virtual_machine_is_known_by_its_variables(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    assert devices.idle_accelerator(tmp_path) == "tpu"
