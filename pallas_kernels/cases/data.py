"""Random data for cases, and the number of pairs in it.

The batch is 1. Where there are enough queries, one sees no key and one only a
few, which costs no time and shows in the check.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from pallas_kernels import shapes
from pallas_kernels.cases import setting as setting_lib

# Queries whose keys are drawn at once: 64 x S random numbers.
_DRAWN: Final = 64
_DEAD, _SPARE, _FEWEST = 1, 2, 8
# Keys and values, and one over it the queries: logits have a deviation of
# about 1.7, and the results are of a size where the tolerances tell.
_KEYS: Final = 0.25


def ranges(
  shape: shapes.Shape, visible: setting_lib.Visible
) -> tuple[Int[Array, "1 T"], Int[Array, "1 T"]]:
  """Ranges of the last T queries of a causal sequence of S, or all keys."""
  T, S = shape.T, shape.S
  start_T = np.zeros(T, np.int32)
  end_T = np.arange(S - T, S, dtype=np.int32) + 1
  if visible == "all":
    end_T[:] = S
  if T >= _FEWEST:
    start_T[_DEAD] = end_T[_DEAD] = S // 2
    start_T[_SPARE] = end_T[_SPARE] - min(shape.K // 2 + 1, end_T[_SPARE])
  with jax.ensure_compile_time_eval():  # numbers, where the rest is traced
    return jnp.asarray(start_T[None]), jnp.asarray(end_T[None])


def chosen(setting: setting_lib.Setting) -> Int[Array, "1 T K"]:
  """Draws K keys for each query, uniformly from S."""
  T, S, K = setting.shape.T, setting.shape.S, setting.shape.K

  @jax.jit
  def draw(keys):
    def query(key):
      _, indices_K = jax.lax.top_k(jax.random.uniform(key, (S,)), min(K, S))
      ascending = setting.order == "ascending"
      return jnp.sort(indices_K) if ascending else indices_K

    return jax.lax.map(query, keys, batch_size=_DRAWN)

  key = setting.key(setting_lib.Draw.CHOSEN)
  indices_TK = draw(jax.random.split(key, T))
  indices_TK = jnp.pad(
    indices_TK, [(0, 0), (0, K - indices_TK.shape[1])], constant_values=-1
  )
  if T >= _FEWEST:
    place_K = jnp.arange(K)
    indices_TK = indices_TK.at[_DEAD].set(jnp.where(place_K % 2, -1, S))
    spare_K = jnp.where(place_K % 3 == 1, -1, indices_TK[_SPARE])
    indices_TK = indices_TK.at[_SPARE].set(spare_K)
  return indices_TK[None]


def index(setting: setting_lib.Setting) -> dict[str, Array]:
  """Draws the factors of index scores."""
  shape = setting.shape
  q, k, w = jax.random.split(setting.key(setting_lib.Draw.INDEX), 3)
  w_TM = jax.random.normal(w, (1, shape.T, shape.M))
  return {
    "q_index": _normal(q, 1, shape.T, shape.M, shape.I),
    "k_index": _normal(k, 1, shape.S, shape.I),
    "w": w_TM * (shape.M * shape.I) ** -0.5,
  }


def latents(
  setting: setting_lib.Setting,
) -> tuple[Float[Array, "1 T N CR"], Float[Array, "1 S CR"]]:
  """Draws queries, and keys that all heads share."""
  shape = setting.shape
  CR = shape.C + shape.R
  q, kv = jax.random.split(setting.key(setting_lib.Draw.ATTENTION))
  return (
    _normal(q, 1, shape.T, shape.N, CR, scale=1 / _KEYS),
    _normal(kv, 1, shape.S, CR, scale=_KEYS),
  )


def heads(
  setting: setting_lib.Setting,
) -> tuple[Float[Array, "1 T N HR"], Float[Array, "1 S N HR"]]:
  """Draws queries, and keys of each head."""
  shape = setting.shape
  HR = shape.H + shape.R
  q, k, _ = jax.random.split(setting.key(setting_lib.Draw.ATTENTION), 3)
  return (
    _normal(q, 1, shape.T, shape.N, HR, scale=1 / _KEYS),
    _normal(k, 1, shape.S, shape.N, HR, scale=_KEYS),
  )


def values(setting: setting_lib.Setting) -> Float[Array, "1 S N U"]:
  """Draws values of each head, independent of `heads`."""
  shape = setting.shape
  _, _, v = jax.random.split(setting.key(setting_lib.Draw.ATTENTION), 3)
  return _normal(v, 1, shape.S, shape.N, shape.U, scale=_KEYS)


def pairs(start: Int[Array, "1 T"], end: Int[Array, "1 T"]) -> int:
  """Counts pairs of a query and a key that it sees."""
  return int(np.maximum(np.asarray(end) - np.asarray(start, np.int64), 0).sum())


def selected(indices: Int[Array, "1 T K"], S: int) -> int:
  """Counts pairs of a query and a key selected for it."""
  if isinstance(indices, jax.core.Tracer):
    return indices.size  # none is known; nearly all are keys
  return int(jnp.sum((indices >= 0) & (indices < S)))


def _normal(
  key: jax.Array, *shape: int, scale: float = 1.0
) -> Float[Array, "..."]:
  """Draws normal numbers in bf16, without a copy in fp32."""
  return jax.jit(
    lambda key: scale * jax.random.normal(key, shape, jnp.bfloat16)
  )(key)
