"""Programs to check and time: each op, and a whole layer's attention."""

from collections.abc import Callable
import dataclasses
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels import shapes
from pallas_kernels.bench import cases
from pallas_kernels.bench import check
from pallas_kernels.bench import measure
from pallas_kernels.bench import report as report_lib

# Of a whole sequence, where a reference's row is as long.
_MOST_CHECKED: Final = 64


class _Seconds(NamedTuple):
  forward: float
  both: float
  """Forward and backward together; 0 unless requested."""


class _DSA(NamedTuple):
  attention: _Seconds
  sparse: _Seconds
  """`sparse_mla` alone."""
  with_loss: _Seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
  """Runs programs into a report; its fields are the command line's options."""

  report: report_lib.Report
  shape: shapes.Shape
  seed: int
  grad: bool
  implementation: str | None
  baseline: str | None
  order: cases.Order
  visible: cases.Visible
  checked: int
  measure: bool
  score_dtype: cases.ScoreDType | None

  def indexer_topk(self) -> None:
    self._op(self._choice())

  def sparse_mla(self) -> None:
    self._op(self._sparse(self._random_indices()))

  def dense_mla(self) -> None:
    self._op(self._dense())

  def sparse_indexer_loss(self) -> None:
    self._op(self._sparse_loss(self._sparse(self._random_indices())))

  def sparse_mla_with_loss(self) -> None:
    self._op(self._with_loss(self._sparse(self._random_indices())))

  def dense_indexer_loss(self) -> None:
    self._op(self._dense_loss(self._dense()))

  def attention(self) -> None:
    """DSA of a whole sequence, beside dense attention of the same model."""
    dsa = self._dsa()
    dense = self._dense()
    self._check(dense, _MOST_CHECKED)
    whole = self._time(dense, grad=self.grad, backward=False)
    print()
    ratio = self.report.ratio
    ratio("dense over DSA, forward", whole.forward / dsa.attention.forward)
    ratio(
      "dense_mla over sparse_mla, forward", whole.forward / dsa.sparse.forward
    )
    if self.grad:
      ratio(
        "dense over DSA, forward and backward",
        whole.both / dsa.attention.both,
      )
      ratio(
        "dense_mla over sparse_mla, forward and backward",
        whole.both / dsa.sparse.both,
      )
      ratio(
        "what the loss adds over sparse_mla, forward and backward",
        dsa.with_loss.both / dsa.sparse.both - 1,
      )

  def _dsa(self) -> _DSA:
    """Selection and sparse attention; with --grad also the loss."""
    choice = self._choice()
    self._check(choice, _MOST_CHECKED)
    self._time(choice)
    scored = (*choice.inputs.values(),)
    indices, _ = measure.run(self._forward(choice), *scored)
    sparse = self._sparse(indices)
    self._check(sparse, _MOST_CHECKED, grad=self.grad)
    alone = self._time(sparse, grad=self.grad, backward=False)

    def forward(scored, read):
      indices, _ = self._forward(choice)(*scored)
      return self._forward(sparse)(*read, indices)

    def both(scored, read, cotangents):
      out, pullback = jax.vjp(lambda *read: forward(scored, read), *read)
      return out, pullback(cotangents)

    read, _ = sparse.split()
    flops = choice.flops + sparse.flops
    eight = _flops_8_bits(choice)
    seconds = self.report.time(
      *("DSA forward", forward, (scored, read), flops), flops_8_bits=eight
    )
    if not self.grad:
      return _DSA(_Seconds(seconds, 0.0), alone, _Seconds(0.0, 0.0))
    whole = self.report.time(
      "DSA forward and backward",
      both,
      (scored, read, self._cotangents(sparse)),
      flops + sparse.flops_backward,
      flops_8_bits=eight,
    )
    with_loss = self._with_loss(sparse)
    self._check(with_loss, _MOST_CHECKED, grad=True)
    compared = self._time(with_loss, grad=True, backward=False)
    return _DSA(_Seconds(seconds, whole), alone, compared)

  def crossover(self) -> None:
    """Attention to the indexer's keys: gathered, and dense with a mask."""
    choice = self._choice()
    chosen = measure.run(self._forward(choice), *choice.inputs.values())
    sparse = self._sparse(chosen[0])
    dense = self._dense(chosen[0])
    seconds = []
    for case in (sparse, dense):
      self._check(case, _MOST_CHECKED, grad=self.grad)
      seconds.append(self._time(case, grad=self.grad, backward=False))
    read = cases.selected(chosen[0], self.shape.S)
    seen = cases.pairs(dense.inputs["start"], dense.inputs["end"])
    print()
    name = (
      "visible pairs of dense_mla in the time of a chosen one of sparse_mla"
    )
    gathered, masked = seconds
    per_pair = seen / read
    self.report.ratio(
      f"{name}, forward", per_pair * gathered.forward / masked.forward
    )
    if self.grad:
      self.report.ratio(
        f"{name}, forward and backward", per_pair * gathered.both / masked.both
      )

  def warmup(self) -> None:
    """Dense attention, and the indexer's loss on it."""
    dense = self._dense()
    self._check(dense, _MOST_CHECKED)
    attended = self._time(dense)
    loss = self._dense_loss(dense)
    self._check(loss, _MOST_CHECKED, grad=True)
    self._time(loss, grad=True)

    def step(attention, index):
      start, end = attention[-2:]
      out, lse = self._forward(dense)(*attention)
      compare = lambda *index: self._forward(loss)(
        *index, start, end, *attention[:2], lse
      )
      per_query, pullback = jax.vjp(compare, *index)
      return out, per_query, pullback(jnp.ones_like(per_query))

    index, _ = loss.split()
    seconds = self.report.time(
      "warm-up: attention, loss, its gradient",
      step,
      ((*dense.inputs.values(),), index),
      dense.flops + loss.flops + loss.flops_backward,
    )
    print()
    self.report.ratio(
      "warm-up over dense_mla forward", seconds / attended.forward
    )

  def _key(self, number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(self.seed), number)

  def _random_indices(self) -> Int[Array, "1 T K"]:
    return cases.chosen(self._key(0), self.shape, self.order)

  def _choice(self) -> cases.Case:
    index = cases.index_inputs(self._key(1), self.shape)
    return cases.indexer_topk(index, self.shape, self.visible, self.score_dtype)

  def _sparse(self, indices: Int[Array, "1 T K"]) -> cases.Case:
    return cases.sparse_mla(self._key(2), self.shape, indices)

  def _dense(self, indices: Int[Array, "1 T K"] | None = None) -> cases.Case:
    return cases.dense_mla(self._key(2), self.shape, self.visible, indices)

  def _sparse_loss(self, attention: cases.Case) -> cases.Case:
    index = cases.index_inputs(self._key(1), self.shape)
    return cases.sparse_indexer_loss(
      index, attention, self._lse(attention), self.shape, self.measure
    )

  def _with_loss(self, attention: cases.Case) -> cases.Case:
    index = cases.index_inputs(self._key(1), self.shape)
    return cases.sparse_mla_with_loss(
      index, attention, self.shape, self.measure
    )

  def _dense_loss(self, attention: cases.Case) -> cases.Case:
    index = cases.index_inputs(self._key(1), self.shape)
    return cases.dense_indexer_loss(
      index, attention, self._lse(attention), self.shape, self.measure
    )

  def _lse(self, attention: cases.Case) -> Float[Array, "1 T N"]:
    forward = attention.forward(None)
    return measure.run(lambda *xs: forward(*xs)[1], *attention.inputs.values())

  def _cotangents(self, case: cases.Case) -> Any:
    return cases.cotangents(case, self._key(3))

  def _forward(self, case: cases.Case) -> Callable[..., Any]:
    return case.forward(self.implementation)

  def _op(self, case: cases.Case) -> None:
    self._check(case, self.checked, grad=self.grad)
    with dispatch.record() as chosen:
      jax.eval_shape(self._forward(case), *case.inputs.values())
    self._time(case, grad=self.grad)
    if self.baseline not in (None, *chosen[case.op]):
      beside = dataclasses.replace(self, implementation=self.baseline)
      beside._time(case, grad=self.grad)

  def _check(self, case: cases.Case, count: int, *, grad: bool = False) -> None:
    rows = check.sample(self.shape.T, min(count, self.checked), self.seed)
    cotangents = self._cotangents(case) if grad else None
    findings = check.check(case, self.implementation, rows, cotangents)
    self.report.check(case.op, findings)

  def _time(
    self, case: cases.Case, *, grad: bool = False, backward: bool = True
  ) -> _Seconds:
    """Times the forward pass; with `grad` also both, and `backward` alone."""
    inputs, time = (*case.inputs.values(),), self.report.time
    forward = time(
      *(f"{case.op} forward", self._forward(case), inputs, case.flops),
      flops_8_bits=_flops_8_bits(case),
    )
    if not grad:
      return _Seconds(forward, 0.0)
    cotangents = self._cotangents(case)
    if backward:
      self._time_backward(case, inputs, cotangents)
    both = time(
      f"{case.op} forward and backward",
      case.forward_backward(self.implementation),
      (inputs, cotangents),
      case.flops + case.flops_backward,
    )
    return _Seconds(forward, both)

  def _time_backward(
    self, case: cases.Case, inputs: tuple[Array, ...], cotangents: Any
  ) -> None:
    with dispatch.record() as chosen:
      keeping = case.forward_keeping(self.implementation)
      _, pullback = measure.run(keeping, *inputs)
    self.report.time(
      f"{case.op} backward",
      lambda pullback, cotangents: pullback(cotangents),
      (pullback, cotangents),
      case.flops_backward,
      chosen=chosen,
    )


def _flops_8_bits(case: cases.Case) -> int:
  return 0 if case.score_dtype is None else case.flops
