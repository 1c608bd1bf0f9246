"""Which TPU the kernels are compiled for."""

import jax
import pytest

from pallas_kernels import devices
from pallas_kernels import dispatch
from pallas_kernels.tpu import chip as tpu
from tests.kernels import tpu_topologies


@pytest.mark.parametrize("name", tpu_topologies.TOPOLOGIES)
def test_the_chip_is_that_of_the_mesh_in_context(name):
  mesh = tpu_topologies.mesh(name)
  with jax.set_mesh(mesh):
    assert tpu.chip().name == name
    assert tpu.interpret() is False


def test_without_a_tpu_kernels_are_interpreted():
  assert tpu.chip() is devices.V5P
  assert tpu.interpret()


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v9"])
def test_other_tpus_are_refused(monkeypatch, kind):
  monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
  monkeypatch.setattr(dispatch, "device_kind", lambda: kind)
  with pytest.raises(NotImplementedError, match=kind):
    tpu.chip()
