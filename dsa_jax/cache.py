"""The cache of keys: one pool of pages that sequences share.

A token costs C+R+I values a layer. Pages belong to whoever calls: the pool does
not know whose they are. All layers lie in one array, layer l of N pages in its
pages from l N on, so that no part of it is ever cut out: programs take it,
write a few rows, and give it back, in place where it is donated.

Letters: L layers, B batch, T tokens, S keys, C latent rank, R rotated width, I
index width, P pages of a sequence, A pages of all layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import ranges
from dsa_jax import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
  """The pages of all layers, MTP's last.

  Devices that share a batch have pages of their own, for their own rows.
  """

  kv: Float[Array, "A page CR"]
  """Latents and rotated keys, `[c; kr]`."""
  k_index: Float[Array, "A page I"]
  """Index keys; those of a layer without an indexer of its own are unused."""
  layers: int = dataclasses.field(metadata={"static": True})

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.kv.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """A layer of the pool."""

  pool: Pool
  layer: Int[Array, ""]

  def write(
    self,
    frame: frame_lib.Frame,
    kv: Float[Array, "B T CR"],
    k_index: Float[Array, "B T I"] | None,
    rules: sharding.ShardingRules,
  ) -> "LayerCache":
    """The same with the keys of these tokens in their places."""
    put = sharding.local(
      self._put,
      in_specs=(
        *(rules("batch", None, None), rules(), rules("batch", None, None)),
        *(rules("batch", None), rules("batch", None)),
      ),
      out_specs=rules("batch", None, None),
      differentiable=False,
    )
    paging, pool = frame.paging, self.pool
    assert paging is not None  # there is a cache
    places = paging.page, paging.place
    pool = dataclasses.replace(pool, kv=put(pool.kv, self.layer, kv, *places))
    if k_index is not None:
      pool = dataclasses.replace(
        pool, k_index=put(pool.k_index, self.layer, k_index, *places)
      )
    return dataclasses.replace(self, pool=pool)

  def _put(self, stored, layer, new_BTX, page_BT, place_BT):
    first, size = first_page(stored, layer, self.pool.layers), stored.shape[1]
    rows = stored.reshape(-1, stored.shape[-1])
    at_N = ((first + page_BT) * size + place_BT).reshape(-1)
    # Beyond the last row: dropped. No two are the same.
    beyond_N = len(rows) + jnp.arange(len(at_N), dtype=jnp.int32)
    at_N = jnp.where(page_BT.reshape(-1) < 0, beyond_N, at_N)
    rows = rows.at[at_N].set(
      new_BTX.reshape(-1, rows.shape[-1]).astype(rows.dtype),
      mode="drop",
      unique_indices=True,
    )
    return rows.reshape(stored.shape)


def first_page(
  stored: Float[Array, "A page X"], layer: Int[Array, ""], layers: int
) -> Int[Array, ""]:
  """Where a layer's pages begin in a device's part of the pool."""
  return layer * (stored.shape[0] // layers)


def make_pool(cfg: config_lib.ModelConfig, pages: int, page_size: int) -> Pool:
  """An empty pool.

  Args:
    cfg: The model's config.
    pages: Pages of each device's (or group of devices') own pool.
    page_size: Tokens of a page.

  Returns:
    The pool: L pages page_size (C+R+I) values for each of the devices that
    share a batch.

  Raises:
    ValueError: An argument is not of its kind, or below 1.
  """
  ranges.require("make_pool: pages", pages, ranges.Count)
  ranges.require("make_pool: page_size", page_size, ranges.Count)
  layers = cfg.num_layers + cfg.num_mtp_layers

  def zeros(width):
    return jnp.zeros(
      (cfg.rules.shards("batch") * layers * pages, page_size, width),
      jnp.dtype(cfg.dtype),
      out_sharding=cfg.rules("batch", None, None),
    )

  return Pool(
    zeros(cfg.kv_rank + cfg.rope_head_dim), zeros(cfg.index_head_dim), layers
  )
