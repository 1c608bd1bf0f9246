"""Attention to all visible keys, with keys and values of each head."""

from jaxtyping import Array, Int

from pallas_kernels.cases import contract
from pallas_kernels.cases import data
from pallas_kernels.cases import setting as setting_lib
from pallas_kernels.cases import tolerance
from pallas_kernels.ops.dense_mla import api
from pallas_kernels.ops.dense_mla.mosaic_tpu import counts


def make(
  setting: setting_lib.Setting, indices: Int[Array, "1 T K"] | None = None
) -> contract.Case:
  """Counts the FLOPs of all visible keys, also where few are selected."""
  shape = setting.shape
  HR, U, N = shape.H + shape.R, shape.U, shape.N
  q, k = data.heads(setting)
  start, end = data.ranges(shape, setting.visible)

  def call(q, k, v, start, end, *indices, implementation):
    return api.dense_mla(
      *(q, k, v, start, end, shape.scale, *indices),
      implementation=implementation,
    )

  num_pairs = data.pairs(start, end)
  return contract.Case(
    op="dense_mla",
    call=call,
    inputs={"q": q, "k": k, "v": data.values(setting)}
    | {"start": start, "end": end}
    | ({} if indices is None else {"indices": indices}),
    differentiated=3,
    shared=("k", "v"),
    outputs={"out": tolerance.OUT, "lse": tolerance.LSE},
    flops=2 * num_pairs * N * (HR + U),
    flops_backward=2 * num_pairs * N * (3 * HR + 2 * U),
    bytes_per_query=4 * shape.S * 6 * N,
    kernels=counts.KERNELS,
  )
