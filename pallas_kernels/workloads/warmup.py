"""dense_mla, then dense_indexer_loss and its gradient."""

import jax
import jax.numpy as jnp

from pallas_kernels import operands
from pallas_kernels.cases import workload
from pallas_kernels.ops.dense_indexer_loss import case as dense_indexer_loss
from pallas_kernels.ops.dense_mla import case as dense_mla


def measure(runner: workload.Runner) -> None:
  dense = dense_mla.make(runner.setting)
  inputs = (*dense.inputs.values(),)
  runner.check(dense)
  attended = runner.time(dense)
  lse = jax.jit(lambda *xs: dense.forward(None)(*xs)[1])(*inputs)
  loss = dense_indexer_loss.make(
    runner.setting, operands.Attended(*inputs[:2], lse)
  )
  runner.check(loss, grad=True)
  runner.time(loss, grad=True, backward=True)

  def step(attention, index):
    start, end = attention[-2:]
    out, lse = runner.forward(dense)(*attention)
    compare = lambda *index: runner.forward(loss)(
      *index, start, end, *attention[:2], lse
    )
    per_query, pullback = jax.vjp(compare, *index)
    return out, per_query, pullback(jnp.ones_like(per_query))

  index, _ = loss.split()
  seconds = runner.time_together(
    "warm-up: attention, loss, its gradient",
    step,
    (inputs, index),
    dense.flops + loss.flops + loss.flops_backward,
  )
  runner.ratio("warm-up over dense_mla forward", seconds / attended.forward)


def estimate(estimator: workload.Estimator) -> None:
  setting = estimator.setting
  dense = estimator.estimate(lambda: dense_mla.make(setting))
  loss = estimator.estimate(lambda: dense_indexer_loss.make(setting), grad=True)
  estimator.ratio(
    "warm-up over dense_mla forward", workload.total((dense, loss)), dense
  )
