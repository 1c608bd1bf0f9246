"""What an op's case says: inputs, calls, required work, and what is right."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, Final

import jax
from jaxtyping import Array
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.cases import counts
from pallas_kernels.cases import setting as setting_lib
from pallas_kernels.cases import tolerance

# Limit of the reference's memory.
_BYTES: Final = 2 << 30

type Make = Callable[[setting_lib.Setting], "Case"]
type Judge = Callable[["Case", np.ndarray, Any, Any], Iterable["Finding"]]


@dataclasses.dataclass(frozen=True)
class Finding:
  """Largest error of one result against the reference."""

  name: str
  rows: int
  error: float
  limit: float
  what: str
  """Name of the error measure."""

  @property
  def right(self) -> bool:
    return self.error <= self.limit  # NaN is not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """An op on one set of inputs.

  The second axis of each result, and of each input that is not shared, is the
  queries'.
  """

  op: str
  call: Callable[..., Any]
  """Function called as call(*inputs, implementation=...)."""
  inputs: dict[str, Array]
  """Inputs by name, in the order of `call`."""
  differentiated: int = 0
  """Number of inputs, from the first, that have a gradient."""
  shared: tuple[str, ...]
  """Inputs that all queries read; the others have a row for each query."""
  outputs: Mapping[str, tolerance.Tolerance | None]
  """Tolerances of the results by name, in order; None: only judged."""
  judge: Judge | None = None
  """Function called as judge(case, rows, results, expected): finds errors that
  are no difference of numbers in the results of the queries `rows`."""
  flops: int
  """FLOPs of the forward pass: two for a multiplication with an addition."""
  flops_backward: int = 0
  flops_8_bits: int = 0
  """FLOPs of the forward pass in 8 bits, at twice the peak. If any are, the op
  rounds the inputs that it gets."""
  bytes_per_query: int
  """Bytes per query of the reference's largest temporary."""
  kernels: Mapping[str, counts.Count]
  """Counts of its kernels on TPUs, by their names without tiles."""

  def split(self) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Splits off the inputs that have a gradient from the others."""
    inputs = (*self.inputs.values(),)
    return inputs[: self.differentiated], inputs[self.differentiated :]

  def rows(self, rows: np.ndarray) -> dict[str, Array]:
    """Inputs of some queries."""
    return {
      name: x if name in self.shared else x[:, rows]
      for name, x in self.inputs.items()
    }

  def tiles(self, rows: np.ndarray) -> Iterator[slice]:
    """Cuts the queries `rows` into slices that the memory is enough for."""
    bT = max(_BYTES // self.bytes_per_query, 1)
    for first in range(0, len(rows), bT):
      yield slice(first, min(first + bT, len(rows)))

  def forward(self, implementation: str | None) -> Callable[..., Any]:
    return functools.partial(self.call, implementation=implementation)

  def forward_keeping(self, implementation: str | None) -> Callable[..., Any]:
    """Returns a function: inputs -> outputs and their pullback."""
    call, n = self.forward(implementation), self.differentiated

    def keeping(*inputs):
      return jax.vjp(lambda *xs: call(*xs, *inputs[n:]), *inputs[:n])

    return keeping

  def forward_backward(self, implementation: str | None) -> Callable[..., Any]:
    """Returns a function: inputs, cotangents -> outputs, gradients."""
    keeping = self.forward_keeping(implementation)

    def both(inputs, cotangents):
      out, pullback = keeping(*inputs)
      return out, pullback(cotangents)

    return both

  def cotangents(self, key: jax.Array) -> Any:
    """Draws cotangents in the shapes of the results."""
    call = self.forward(dispatch.PORTABLE)
    out = jax.eval_shape(call, *self.inputs.values())
    leaves, tree = jax.tree.flatten(out)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
      jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)
    )
