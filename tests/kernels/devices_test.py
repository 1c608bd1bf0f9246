"""What is known of devices, and of which."""

from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
import pytest

from pallas_kernels import devices
from tests.kernels import tpu_topologies

NAMES = [x.name for x in devices.DEVICES]


def test_names_and_kinds_are_unique():
  kinds = [kind for x in devices.DEVICES for kind in x.kinds]
  assert len(set(kinds)) == len(kinds)
  assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(
  "name, topology",
  [
    *tpu_topologies.TOPOLOGIES.items(),
    ("v5e", "v5e:2x2"),
    ("v4", "v4:2x2x1"),
    (None, "v3:2x2"),  # deprecated by libtpu, as is v2
    (None, "v2:2x2"),
  ],
)
def test_every_tpu_of_libtpu_is_found_by_its_kind(name, topology):
  described = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  )
  found = devices.of(described.devices[0].device_kind)
  assert (found and found.name) == name


@pytest.mark.parametrize(
  "name, version, cores",
  [
    ("v5p", pltpu.ChipVersion.TPU_V5P, 2),
    ("v6e", pltpu.ChipVersion.TPU_V6E, 1),
    ("tpu7x", pltpu.ChipVersion.TPU_7X, 1),
  ],
)
def test_pallas_says_the_same_of_tpus(name, version, cores):
  device = devices.DEVICES[NAMES.index(name)]
  info = pltpu.get_tpu_info_for_chip(version, cores)
  assert isinstance(device, devices.Tpu)
  assert device.cores == cores
  assert device.vmem == info.vmem_capacity_bytes
  assert device.flops == pytest.approx(cores * info.bf16_ops_per_second, 5e-3)


@pytest.mark.parametrize(
  "kind, name, tflops",
  [
    ("TPU v5", "v5p", 459),
    ("TPU v5 lite", "v5e", 197),
    ("NVIDIA H100 80GB HBM3", "h100", 989),
    ("NVIDIA H100 PCIe", "h100-pcie", 756),
    ("NVIDIA H100 NVL", "h100-nvl", 835),
    ("NVIDIA H200", "h200", 989),
    ("NVIDIA H20", "h20", 148),
  ],
)
def test_kinds_that_begin_alike_differ(kind, name, tflops):
  found = devices.of(kind)
  assert found is not None
  assert (found.name, found.flops) == (name, tflops * 1e12)


@pytest.mark.parametrize(
  "kind", ["cpu", "", "TPU v", "TPU v5 lite2", "NVIDIA H200 SXM", "H200"]
)
def test_a_kind_is_known_to_the_letter_or_not_at_all(kind):
  assert devices.of(kind) is None
