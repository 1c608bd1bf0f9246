"""How much of the dense attention the chosen keys hold, on a few queries.

A head's weights on the chosen keys, of all it gives the visible ones, sum to
exp(lse over the chosen - lse over the visible). It is the number that says
whether an indexer is good: 1 if sparse attention misses nothing.

Letters: B batch, T queries, Q sampled queries, S keys, K chosen keys, N heads.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsa_jax import sharding
import pallas_kernels

_QUERIES = 64  # of a sequence, about


def sample(x: Shaped[Array, "B T *X"]) -> Shaped[Array, "B Q *X"]:
  """Every n-th query: some hundred of them, or all if there are fewer.

  On every mesh the same ones, if n divides the chunks of `zigzag.scatter`.
  """
  stride = max(x.shape[1] // _QUERIES, 1)
  spec = jax.typeof(x).sharding.spec
  shards = sharding.size(spec[1])
  if shards > 1:
    stride = math.gcd(stride, x.shape[1] // (2 * shards))
  take = sharding.local(lambda x: x[:, stride // 2 :: stride], (spec,), spec)
  return take(x)


def chooses(
  start: Int[Array, "B T"], end: Int[Array, "B T"], top_k: int
) -> Bool[Array, "B T"]:
  """Queries that see more than K keys: others miss none, which says nothing."""
  return end - start > top_k


def recall(
  q: Float[Array, "B Q N CR"],
  kv: Float[Array, "B S CR"],
  indices: Int[Array, "B Q K"],
  start: Int[Array, "B Q"],
  end: Int[Array, "B Q"],
  latent_rank: int,
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
) -> Float[Array, "B Q"]:
  """Mean over heads of the mass on the chosen keys, 0..1.

  Memory as of `sparse_mla` and `dense_mla`, for Q queries.

  Args:
    q: Absorbed queries, as given to `sparse_mla`.
    kv: Latents and rotated keys, likewise.
    indices: The chosen keys.
    start: The first key that a query sees.
    end: One past the last; 0 is returned where there is none.
    latent_rank: C.
    scale: Multiplies the logits.
    heads_axis: The mesh axes that shard N, inside a shard_map.
  """
  B, Q, N, X = q.shape
  _, chosen_BQN = pallas_kernels.sparse_mla(q, kv, indices, latent_rank, scale)
  # All heads share the keys: they are as many queries of one head. Values are
  # not needed; of width 1, they cost least.
  _, visible_BQN = pallas_kernels.dense_mla(
    q.reshape(B, Q * N, 1, X),
    kv[:, :, None],
    kv[:, :, None, :1],
    jnp.repeat(start, N, 1),
    jnp.repeat(end, N, 1),
    scale,
    implementation="chunked_xla",  # no kernel is made for such widths
  )
  gap_BQN = chosen_BQN - visible_BQN.reshape(B, Q, N)
  seen_BQ1 = (start < end)[..., None]
  recall_BQ = jnp.where(seen_BQ1, jnp.exp(gap_BQN), 0.0).mean(-1)
  if heads_axis is not None:
    recall_BQ = jax.lax.pmean(recall_BQ, heads_axis)
  return recall_BQ
