"""Attention to random keys, together with the loss of the indexer."""

from pallas_kernels import operands
from pallas_kernels.cases import contract
from pallas_kernels.cases import data
from pallas_kernels.cases import setting as setting_lib
from pallas_kernels.cases import tolerance
from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import counts
from pallas_kernels.ops.sparse_mla import case as attention_case
from pallas_kernels.ops.sparse_mla_with_loss import api


def make(
  setting: setting_lib.Setting, attention: contract.Case | None = None
) -> contract.Case:
  """Takes the inputs of `attention`, a case of `sparse_mla`, if given.

  Of the loss's backward pass, the attention's knows the target already.
  """
  shape = setting.shape
  attention = attention or attention_case.make(setting)

  def call(q, kv, q_index, k_index, w, indices, *, implementation):
    return api.sparse_mla_with_loss(
      *(q, kv, indices, operands.Index(q_index, k_index, w)),
      *(shape.C, shape.scale),
      measure=setting.measure,
      implementation=implementation,
    )

  indices = attention.inputs["indices"]
  num_selected = data.selected(indices, shape.S)
  target, score = shape.N * (shape.C + shape.R), shape.M * shape.I
  return contract.Case(
    op="sparse_mla_with_loss",
    call=call,
    inputs={
      "q": attention.inputs["q"],
      "kv": attention.inputs["kv"],
      **data.index(setting),
      "indices": indices,
    },
    differentiated=5,
    shared=("kv", "k_index"),
    outputs={**attention.outputs, "loss": tolerance.LOSS},
    flops=attention.flops
    + 2 * num_selected * (target + score) * setting.measure,
    flops_backward=attention.flops_backward + 2 * num_selected * 3 * score,
    bytes_per_query=attention.bytes_per_query
    + 4 * shape.K * (4 * (shape.C + shape.R) + 4 * (shape.N + shape.M)),
    kernels={**attention.kernels, **counts.KERNELS},
  )
