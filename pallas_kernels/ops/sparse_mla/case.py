"""Attention to random keys, of latents that all heads share."""

from jaxtyping import Array, Int

from pallas_kernels.cases import contract
from pallas_kernels.cases import data
from pallas_kernels.cases import setting as setting_lib
from pallas_kernels.cases import tolerance
from pallas_kernels.ops.sparse_mla import api
from pallas_kernels.ops.sparse_mla.mosaic_tpu import counts


def make(
  setting: setting_lib.Setting, indices: Int[Array, "1 T K"] | None = None
) -> contract.Case:
  shape = setting.shape
  C, CR, N = shape.C, shape.C + shape.R, shape.N
  q, kv = data.latents(setting)
  if indices is None:
    indices = data.chosen(setting)

  def call(q, kv, indices, *, implementation):
    return api.sparse_mla(
      q, kv, indices, C, shape.scale, implementation=implementation
    )

  num_selected = data.selected(indices, shape.S)
  return contract.Case(
    op="sparse_mla",
    call=call,
    inputs={"q": q, "kv": kv, "indices": indices},
    differentiated=2,
    shared=("kv",),
    outputs={"out": tolerance.OUT, "lse": tolerance.LSE},
    flops=2 * num_selected * N * (CR + C),
    flops_backward=2 * num_selected * N * (3 * CR + 2 * C),
    bytes_per_query=4 * shape.K * (4 * CR + 6 * N),
    kernels=counts.KERNELS,
  )
