"""Keys in pages, which lie anywhere in a pool: `api.indexer_topk`'s `pages`."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gather(
  pool: Float[Array, "pages page I"], pages: Int[Array, "*B P"]
) -> Float[Array, "*B S I"]:
  """Reads keys in order; for a page that is not in the pool, any keys."""
  k = pool.at[pages].get(mode="clip", wrap_negative_indices=False)
  return k.reshape(*pages.shape[:-1], -1, pool.shape[-1])


def gather_scale(
  pool: Float[Array, "pages page"] | None, pages: Int[Array, "*B P"]
) -> Float[Array, "*B S"] | None:
  """Reads the scales of keys in order, if they have any."""
  if pool is None:
    return None
  scale = pool.at[pages].get(mode="clip", wrap_negative_indices=False)
  return scale.reshape(*pages.shape[:-1], -1)


def num_keys(k: Float[Array, "_ _ I"], pages: Int[Array, "B P"] | None) -> int:
  """Computes S."""
  return k.shape[1] if pages is None else pages.shape[1] * k.shape[1]


def cut(
  k: Float[Array, "B S I"], page: int
) -> tuple[Float[Array, "pages page I"], Int[Array, "B P"]]:
  """Makes pages of keys that lie in order, and each row's table of them."""
  B, S, I = k.shape
  pool = jnp.pad(k, [(0, 0), (0, -S % page), (0, 0)]).reshape(-1, page, I)
  return pool, jnp.arange(len(pool), dtype=jnp.int32).reshape(B, -1)
