"""Heads of the attention on several devices, for both index losses."""

from collections.abc import Callable

import jax
from jax import P

from pallas_kernels import operands


def sharded(op: Callable, axes: str | tuple[str, ...]) -> Callable:
  """`op`, an index loss, each device with its heads of the attention."""
  heads, whole = P(None, None, axes), P()

  def over_devices(index, attended, *read, measure):
    *read, scale = read

    def on_device(q_index, k_index, w, q, kv, lse, *read):
      index = operands.Index(q_index, k_index, w)
      attended = operands.Attended(q, kv, lse)
      return op(index, attended, *read, scale, axes, measure)

    keys = heads if attended.kv.ndim == 4 else whole
    return jax.shard_map(
      on_device,
      in_specs=(*[whole] * 3, heads, keys, heads, *(whole for _ in read)),
      out_specs=whole,
      check_vma=False,
    )(*jax.tree.leaves((index, attended)), *read)

  return over_devices
