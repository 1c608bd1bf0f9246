"""indexer_topk, then sparse_mla, beside dense causal attention of the same
model; with --grad also backward, and with the indexer's loss."""

from typing import NamedTuple

import jax

from pallas_kernels.cases import contract
from pallas_kernels.cases import workload
from pallas_kernels.ops.dense_mla import case as dense_mla
from pallas_kernels.ops.indexer_topk import case as indexer_topk
from pallas_kernels.ops.sparse_mla import case as sparse_mla
from pallas_kernels.ops.sparse_mla_with_loss import case as sparse_mla_with_loss


class _DSA(NamedTuple):
  attention: workload.Seconds
  sparse: workload.Seconds
  """`sparse_mla` alone."""
  with_loss: workload.Seconds


def measure(runner: workload.Runner) -> None:
  dsa = _measure_dsa(runner)
  dense = dense_mla.make(runner.setting)
  runner.check(dense)
  whole = runner.time(dense, grad=runner.grad)
  ratio = runner.ratio
  ratio("dense over DSA, forward", whole.forward / dsa.attention.forward)
  ratio(
    "dense_mla over sparse_mla, forward", whole.forward / dsa.sparse.forward
  )
  if runner.grad:
    ratio(
      "dense over DSA, forward and backward", whole.both / dsa.attention.both
    )
    ratio(
      "dense_mla over sparse_mla, forward and backward",
      whole.both / dsa.sparse.both,
    )
    ratio(
      "what the loss adds over sparse_mla, forward and backward",
      dsa.with_loss.both / dsa.sparse.both - 1,
    )


def _measure_dsa(runner: workload.Runner) -> _DSA:
  """Selection and sparse attention; with --grad also the loss."""
  setting, grad = runner.setting, runner.grad
  choice = indexer_topk.make(setting)
  runner.check(choice)
  runner.time(choice)
  indices, _ = jax.jit(runner.forward(choice))(*choice.inputs.values())
  sparse = sparse_mla.make(setting, indices)
  runner.check(sparse, grad=grad)
  alone = runner.time(sparse, grad=grad)
  attention = _time_both(runner, choice, sparse)
  if not grad:
    return _DSA(attention, alone, workload.Seconds(0.0, 0.0))
  with_loss = sparse_mla_with_loss.make(setting, sparse)
  runner.check(with_loss, grad=True)
  return _DSA(attention, alone, runner.time(with_loss, grad=True))


def _time_both(
  runner: workload.Runner, choice: contract.Case, sparse: contract.Case
) -> workload.Seconds:
  """Times `choice` and `sparse` as one program."""

  def forward(scored, read):
    indices, _ = runner.forward(choice)(*scored)
    return runner.forward(sparse)(*read, indices)

  def both(scored, read, cotangents):
    out, pullback = jax.vjp(lambda *read: forward(scored, read), *read)
    return out, pullback(cotangents)

  scored, (read, _) = (*choice.inputs.values(),), sparse.split()
  flops, eight = choice.flops + sparse.flops, choice.flops_8_bits
  seconds = runner.time_together(
    *("DSA forward", forward, (scored, read), flops), flops_8_bits=eight
  )
  if not runner.grad:
    return workload.Seconds(seconds, 0.0)
  whole = runner.time_together(
    "DSA forward and backward",
    both,
    (scored, read, runner.cotangents(sparse)),
    flops + sparse.flops_backward,
    flops_8_bits=eight,
  )
  return workload.Seconds(seconds, whole)


def estimate(estimator: workload.Estimator) -> None:
  setting, grad = estimator.setting, estimator.grad
  choice = estimator.estimate(lambda: indexer_topk.make(setting))
  sparse = estimator.estimate(lambda: sparse_mla.make(setting), grad=grad)
  whole = estimator.estimate(lambda: dense_mla.make(setting), grad=grad)
  passes = "forward and backward" if grad else "forward"
  estimator.ratio(
    f"DSA over dense, {passes}", workload.total((choice, sparse)), whole
  )
