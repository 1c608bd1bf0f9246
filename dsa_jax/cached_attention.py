"""Attention to a cache: its keys stay where they lie in the pool of pages.

Indices and positions are logical, places in a sequence. They become rows of the
pool last of all, so that nothing depends on where pages lie.

Letters: B batch, T queries, S keys (of P pages), K chosen keys, N heads, C
latent rank, R rotated width, X row of the pool, A pages of all layers.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsa_jax import cache as cache_lib
from dsa_jax import frame as frame_lib
from dsa_jax import sharding
import pallas_kernels
from pallas_kernels import latents

# Keys that dense attention reads at a time, as many as sparse attention chooses
# of DeepSeek-V3.2's.
_BLOCK: Final = 2048


def select(
  q_index: Float[Array, "B T M I"],
  w_index: Float[Array, "B T M"],
  cache: cache_lib.LayerCache,
  frame: frame_lib.Frame,
  top_k: int,
  rules: sharding.ShardingRules,
) -> Int[Array, "B T K"]:
  """The `top_k` best of the keys that each query sees, ascending, then -1."""

  def own(q, keys, w, start, end, pages, layer):
    pages += cache_lib.first_page(keys, layer, cache.pool.layers)
    index = pallas_kernels.Index(q, keys.values, w, keys.scale)
    return pallas_kernels.indexer_topk(index, start, end, top_k, pages=pages)[0]

  run = sharding.local(
    own,
    in_specs=(
      rules("batch", None, "index_heads", None),
      rules("batch"),
      rules("batch", None, "index_heads"),
      *(rules("batch", None),) * 3,
      rules(),
    ),
    out_specs=rules("batch", None, None),
    differentiable=False,
  )
  return run(
    *(q_index, cache.pool.k_index, w_index, frame.start, frame.end),
    *(_paging(frame).pages, cache.layer),
  )


def attend(
  q: Float[Array, "B T N X"],
  cache: cache_lib.LayerCache,
  frame: frame_lib.Frame,
  selected: Int[Array, "B T K"] | None,
  latent_rank: int,
  scale: float,
  rules: sharding.ShardingRules,
) -> Float[Array, "B T N C"]:
  """Absorbed attention to the selected keys; None: to all that a query sees.

  Args:
    q: Absorbed queries `[q_nope Wuk^T; q_rope]`.
    cache: The layer's cache.
    frame: Of the queries.
    selected: Places in each query's sequence; -1 for none.
    latent_rank: C.
    scale: Multiplies the logits.
    rules: Of the model.
  """

  def own(q, stored, pages, layer, start, end, *selected):
    size = cache.pool.page_size
    pages += cache_lib.first_page(stored, layer, cache.pool.layers)
    rows = jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), stored)

    def read(indices_BTK):
      """Output and logsumexp over these keys."""
      page_BTK = jnp.take_along_axis(
        pages[:, None], indices_BTK // size, -1, mode="clip"
      )
      at_BTK = jnp.where(
        indices_BTK < 0, -1, page_BTK * size + indices_BTK % size
      )
      # One sequence of queries: they all read the same pool.
      out, lse = pallas_kernels.sparse_mla(
        q.reshape(1, -1, *q.shape[2:]),
        *(rows, at_BTK.reshape(1, -1, at_BTK.shape[-1])),
        *(latent_rank, scale),
      )
      return out.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])

    if selected:
      return read(*selected)[0]
    return _all_blocks(read, start, end, q, latent_rank)

  chosen = [] if selected is None else [selected]
  per_part = rules("batch", None, "heads", None)
  run = sharding.local(
    own,
    in_specs=(
      *(per_part, rules("batch"), rules("batch", None), rules()),
      *(rules("batch", None), rules("batch", None)),
      *(rules("batch", None, None) for _ in chosen),
    ),
    out_specs=per_part,
    differentiable=False,
  )
  with jax.named_scope("attend"):
    return run(
      *(q, cache.pool.kv, _paging(frame).pages, cache.layer),
      *(frame.start, frame.end, *chosen),
    )


def _all_blocks(read, start_BT, end_BT, q, latent_rank):
  """Merges attention to all blocks of keys that a query sees, by lse."""

  def add(i, so_far):
    out, lse = so_far
    key_11S = i * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)[None, None]
    seen = (key_11S >= start_BT[..., None]) & (key_11S < end_BT[..., None])
    of_block, lse_of_block = read(jnp.where(seen, key_11S, -1))
    both = jnp.logaddexp(lse, lse_of_block)
    finite = jnp.where(jnp.isneginf(both), 0.0, both)
    share = jnp.exp(lse - finite)[..., None]
    share_of_block = jnp.exp(lse_of_block - finite)[..., None]
    out = out * share + of_block.astype(jnp.float32) * share_of_block
    return out, both

  shape = q.shape[:-1]
  nothing = (
    jnp.zeros((*shape, latent_rank), jnp.float32),
    jnp.full(shape, -jnp.inf, jnp.float32),
  )
  blocks = -(-jnp.max(end_BT) // _BLOCK)
  return jax.lax.fori_loop(0, blocks, add, nothing)[0].astype(q.dtype)


def gather(
  cache: cache_lib.LayerCache,
  frame: frame_lib.Frame,
  dtype: DTypeLike,
  rules: sharding.ShardingRules,
) -> Float[Array, "B S X"]:
  """A copy of all rows of each sequence, in order.

  Args:
    cache: The layer's.
    frame: Of the sequences.
    dtype: Of what is in 8 bits in the cache.
    rules: Of the model.
  """

  def own(stored, pages, layer):
    pages += cache_lib.first_page(stored, layer, cache.pool.layers)

    def rows(x):
      rows_BPpX = x.at[pages].get(mode="clip")
      return rows_BPpX.reshape(len(pages), -1, x.shape[-1])

    return latents.dequantize(jax.tree.map(rows, stored), dtype)

  run = sharding.local(
    own,
    in_specs=(rules("batch"), rules("batch", None), rules()),
    out_specs=rules("keys", None, None),
    differentiable=False,
  )
  return run(cache.pool.kv, _paging(frame).pages, cache.layer)


def _paging(frame: frame_lib.Frame) -> frame_lib.Paging:
  assert frame.paging is not None  # there is a cache
  return frame.paging
