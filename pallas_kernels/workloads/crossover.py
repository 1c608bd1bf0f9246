"""Attention to the keys of indexer_topk by sparse_mla, and by dense_mla with a
mask; with --grad, the figure for pallas_kernels/crossover.py."""

from typing import Final

import jax
import numpy as np

from pallas_kernels.cases import data
from pallas_kernels.cases import workload
from pallas_kernels.ops.dense_mla import case as dense_mla
from pallas_kernels.ops.indexer_topk import case as indexer_topk
from pallas_kernels.ops.sparse_mla import case as sparse_mla

_RATIO: Final = (
  "visible pairs of dense_mla in the time of a chosen one of sparse_mla"
)


def measure(runner: workload.Runner) -> None:
  setting, grad = runner.setting, runner.grad
  choice = indexer_topk.make(setting)
  indices, _ = jax.jit(runner.forward(choice))(*choice.inputs.values())
  sparse = sparse_mla.make(setting, indices)
  dense = dense_mla.make(setting, indices)
  seconds = []
  for case in (sparse, dense):
    runner.check(case, grad=grad)
    seconds.append(runner.time(case, grad=grad))
  gathered, masked = seconds
  seen = data.pairs(dense.inputs["start"], dense.inputs["end"])
  per_pair = seen / data.selected(indices, setting.shape.S)
  runner.ratio(
    f"{_RATIO}, forward", per_pair * gathered.forward / masked.forward
  )
  if grad:
    runner.ratio(
      f"{_RATIO}, forward and backward", per_pair * gathered.both / masked.both
    )


def estimate(estimator: workload.Estimator) -> None:
  setting, grad = estimator.setting, estimator.grad
  gathered = estimator.estimate(lambda: sparse_mla.make(setting), grad=grad)
  masked = estimator.estimate(
    lambda: dense_mla.make(setting, data.chosen(setting)), grad=grad
  )
  start, end = data.ranges(setting.shape, setting.visible)
  visible = np.maximum(np.asarray(end) - np.asarray(start), 0)
  per_pair = visible.sum() / np.minimum(visible, setting.shape.K).sum()
  estimator.ratio(
    _RATIO, None if gathered is None else gathered * float(per_pair), masked
  )
