"""What is known of devices: those that kernels are made for, and others.

A device is found by its exact `device_kind`. Products whose kinds begin alike
may differ in all else.
"""

import dataclasses
import math
import re
from typing import Final

_MOST_CHIPS: Final = 2**14  # of a topology; the largest slices have 9,216


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """Facts about a JAX device: on a tpu7x, one of the two in a chip.

  Peaks, bandwidths and links are from the data sheets. None where a fact is not
  known, or does not apply.
  """

  name: str
  kinds: tuple[str, ...]
  """Each `device_kind` that it is reported as."""
  flops: float
  """Peak dense bfloat16 FLOP/s of all cores."""
  compute_capability: str | None = None
  """Of an NVIDIA GPU: "9.0" is Hopper."""
  dense_pairs: float | None = None
  """Visible pairs that `dense_mla` computes in the time of one selected pair of
  `sparse_mla`, forward and backward."""
  memory: int | None = None
  """Bytes that a program may use, as the compiler counts them."""
  network: float | None = None
  """Bytes/s in and out through all links to its neighbours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu(Device):
  """A TPU that kernels are made for."""

  cores: int
  """TensorCores. A parallel grid dimension is split over them."""
  vmem: int
  """Bytes per core, as the compiler counts them."""
  bandwidth: float
  """HBM bytes/s of all cores."""
  clock: float
  """Cycles per second at which the systolic arrays reach the peak."""


# `dense_pairs`, with N = 128, K = 2048, by the benchmark `crossover`.
# Measured: 3.2, 3.6 and 4.1 at S = 4K, 8K and 24K on an H200, 3.9 at 16K on an
# H100; matters at 15K. Taken to hold for their other boards, none of which was
# run, but not for an H20, which has a sixth of their arithmetic.
_HOPPER_PAIRS: Final = 3.8
# Estimated, none was run: 5.5 to 5.7 at 8K, 6.1 to 6.3 at 32K, if 8
# neighbouring queries select 2 K keys; matters at 22K.
_TPU_PAIRS: Final = 5.5

V5P: Final = Tpu(
  name="v5p",
  kinds=("TPU v5", "TPU v5p"),
  flops=459e12,  # 2 cores x 4 arrays of 128 x 128
  dense_pairs=_TPU_PAIRS,
  memory=round(95.74 * 2**30),
  network=600e9,
  cores=2,
  vmem=64 << 20,
  bandwidth=2765e9,
  clock=1.75e9,
)
DEVICES: Final[tuple[Device, ...]] = (
  V5P,
  Tpu(
    name="v6e",
    kinds=("TPU v6 lite", "TPU v6e"),
    flops=918e12,  # 2 arrays of 256 x 256, twice a cycle
    dense_pairs=_TPU_PAIRS,
    memory=round(31.25 * 2**30),
    network=448e9,
    cores=1,
    vmem=128 << 20,
    bandwidth=1640e9,
    clock=1.75e9,
  ),
  Tpu(
    name="tpu7x",
    kinds=("TPU7x",),
    flops=1153e12,  # 2 arrays of 256 x 256, twice a cycle
    dense_pairs=_TPU_PAIRS,
    memory=round(94.75 * 2**30),
    network=600e9,
    cores=1,
    vmem=64 << 20,
    bandwidth=3690e9,
    clock=2.2e9,
  ),
  Device(
    name="v5e",
    kinds=("TPU v5 lite", "TPU v5e"),
    flops=197e12,
    memory=round(15.75 * 2**30),
    network=200e9,
  ),
  Device(name="v4", kinds=("TPU v4",), flops=275e12),
  Device(
    name="h100",
    kinds=(
      "NVIDIA H100 80GB HBM3",
      "NVIDIA H100",  # SXM with 94 GB
      "NVIDIA H800",  # an H100 with fewer links
    ),
    flops=989e12,
    compute_capability="9.0",
    dense_pairs=_HOPPER_PAIRS,
  ),
  Device(
    name="h100-pcie",
    kinds=("NVIDIA H100 PCIe", "NVIDIA H800 PCIe"),
    flops=756e12,
    compute_capability="9.0",
    dense_pairs=_HOPPER_PAIRS,
  ),
  Device(
    name="h100-nvl",
    kinds=("NVIDIA H100 NVL", "NVIDIA H800 NVL"),
    flops=835e12,
    compute_capability="9.0",
    dense_pairs=_HOPPER_PAIRS,
  ),
  Device(
    name="h200",
    kinds=("NVIDIA H200",),
    flops=989e12,
    compute_capability="9.0",
    dense_pairs=_HOPPER_PAIRS,
  ),
  Device(
    name="h200-nvl",
    kinds=("NVIDIA H200 NVL",),
    flops=835e12,
    compute_capability="9.0",
    dense_pairs=_HOPPER_PAIRS,
  ),
  Device(
    name="gh200",
    kinds=(
      "NVIDIA GH200 120GB",  # the CPU's; the GPU has 96, here and below
      "NVIDIA GH200 480GB",
      "NVIDIA GH200 144G HBM3e",
    ),
    flops=989e12,
    compute_capability="9.0",
    dense_pairs=_HOPPER_PAIRS,
  ),
  Device(
    name="h20",
    kinds=("NVIDIA H20", "NVIDIA H20-3e"),
    flops=148e12,
    compute_capability="9.0",
  ),
  Device(
    name="a100",
    kinds=(
      "NVIDIA A100-SXM4-40GB",
      "NVIDIA A100-SXM4-80GB",
      "NVIDIA A100-PCIE-40GB",
      "NVIDIA A100 80GB PCIe",
    ),
    flops=312e12,
    compute_capability="8.0",
  ),
  Device(
    name="b200",
    kinds=("NVIDIA B200",),
    flops=2250e12,
    compute_capability="10.0",
  ),
)
_BY_KIND: Final = {kind: x for x in DEVICES for kind in x.kinds}


def of(kind: str) -> Device | None:
  """Facts about the devices of exactly this `device_kind`; None if unknown."""
  return _BY_KIND.get(kind)


def is_topology(name: str) -> bool:
  """Whether a name has the form of a TPU slice's: v6e:16x16, v5p:2x2x1.

  To be asked before libtpu is: that dies of a side of 0, and makes as many
  devices as a name says.
  """
  if not re.fullmatch("[a-z0-9]+:[0-9]{1,4}(x[0-9]{1,4}){1,2}", name):
    return False
  sides = [int(x) for x in name.partition(":")[2].split("x")]
  return 0 < math.prod(sides) <= _MOST_CHIPS
