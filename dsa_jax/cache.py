"""The cache of keys: one pool of pages that sequences share.

A token costs C+R+I values a layer, in the activations' dtype or in 8 bits: then
it is rounded once, as it is written, and by itself, so that what is stored of a
token depends on no other. Pages belong to whoever calls: the pool does not know
whose they are. All layers lie in one array, layer l of N pages in its pages
from l N on, so that no part of it is ever cut out: programs take it, write a
few rows, and give it back, in place where it is donated. (Not in 8 bits on a
CPU: there XLA goes through a copy in 16 bits in each layer.)

Letters: L layers, B batch, T tokens, S keys, C latent rank, R rotated width, I
index width, P pages of a sequence, A pages of all layers.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import ranges
from dsa_jax import sharding
import pallas_kernels
from pallas_kernels import latents
from pallas_kernels.ops.indexer_topk import fp8

# What the pool holds in place of the activations' dtype.
type StoredDType = Literal["float8_e4m3fn"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexKeys:
  """Index keys, in the activations' dtype or in 8 bits."""

  values: Float[Array, "*S I"]
  scale: Float[Array, "*S"] | None = None
  """Of keys in 8 bits, see `pallas_kernels.Index`; None for others."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
  """The pages of all layers, MTP's last.

  Devices that share a batch have pages of their own, for their own rows.
  """

  kv: Float[Array, "A page CR"] | pallas_kernels.QuantizedLatents
  """Latents and rotated keys, `[c; kr]`."""
  k_index: IndexKeys
  """Those of a layer without an indexer of its own are unused."""
  layers: int = dataclasses.field(metadata={"static": True})

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.k_index.values.shape[1]


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
        *(rules("batch"), rules(), rules("batch", None, None)),
        *(rules("batch", None), rules("batch", None)),
      ),
      out_specs=rules("batch"),
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
    first = first_page(stored, layer, self.pool.layers)
    at_N = ((first + page_BT) * self.pool.page_size + place_BT).reshape(-1)

    def write(stored, new):
      rows = stored.reshape(-1, *stored.shape[2:])
      # Beyond the last row: dropped. No two are the same.
      beyond_N = len(rows) + jnp.arange(len(at_N), dtype=jnp.int32)
      rows = rows.at[jnp.where(page_BT.reshape(-1) < 0, beyond_N, at_N)].set(
        new.reshape(-1, *rows.shape[1:]), mode="drop", unique_indices=True
      )
      return rows.reshape(stored.shape)

    return jax.tree.map(write, stored, as_stored(stored, new_BTX))


def as_stored(stored: Any, new: Float[Array, "*N X"]) -> Any:
  """Rows or index keys, rounded to what those stored are kept in."""
  match stored:
    case pallas_kernels.QuantizedLatents(values=c):
      rounded = latents.quantize(new, c.shape[-1])
    case IndexKeys(scale=None):
      rounded = IndexKeys(new)
    case IndexKeys():
      rounded = IndexKeys(*fp8.quantize(new))
    case _:
      rounded = new
  return jax.tree.map(lambda x, y: y.astype(x.dtype), stored, rounded)


def first_page(
  stored: Any, layer: Int[Array, ""], layers: int
) -> Int[Array, ""]:
  """Where a layer's pages begin in a device's part of what a pool holds."""
  return layer * (len(jax.tree.leaves(stored)[0]) // layers)


def check_dtypes(
  cfg: config_lib.ModelConfig,
  index_key_dtype: StoredDType | None,
  latent_dtype: StoredDType | None,
) -> None:
  """Raises a ValueError for what cannot be kept in 8 bits."""
  if index_key_dtype and (I := cfg.index_head_dim) & (I - 1):
    raise ValueError(
      f"{index_key_dtype=}: index keys are rotated in a power of 2 of "
      f"dimensions, but the model has index_head_dim={I}; leave it out."
    )
  if latent_dtype and cfg.kv_rank % latents.GROUP:
    raise ValueError(
      f"{latent_dtype=}: each {latents.GROUP} numbers of a latent have a "
      f"scale, but the model has kv_rank={cfg.kv_rank}, no multiple; leave it "
      "out."
    )


def make_pool(
  cfg: config_lib.ModelConfig,
  pages: int,
  page_size: int,
  index_key_dtype: StoredDType | None = None,
  latent_dtype: StoredDType | None = None,
) -> Pool:
  """An empty pool.

  Args:
    cfg: The model's config.
    pages: Pages of each device's (or group of devices') own pool.
    page_size: Tokens of a page.
    index_key_dtype: "float8_e4m3fn" keeps index keys in I + 4 bytes, None in
      the activations' dtype.
    latent_dtype: Likewise latents, with their rotated keys in bfloat16, in
      C + C / 32 + 2 R bytes.

  Returns:
    The pool: L pages page_size (C+R+I) values, by default, for each of the
    devices that share a batch.

  Raises:
    ValueError: An argument is not of its kind, or below 1; or the model's
      widths cannot be kept in 8 bits.
  """
  ranges.require("make_pool: pages", pages, ranges.Count)
  ranges.require("make_pool: page_size", page_size, ranges.Count)
  check_dtypes(cfg, index_key_dtype, latent_dtype)
  layers = cfg.num_layers + cfg.num_mtp_layers
  C, R, I = cfg.kv_rank, cfg.rope_head_dim, cfg.index_head_dim

  def zeros(dtype, *width):
    return jnp.zeros(
      (cfg.rules.shards("batch") * layers * pages, page_size, *width),
      jnp.dtype(dtype),
      out_sharding=cfg.rules("batch"),
    )

  if latent_dtype is None:
    kv = zeros(cfg.dtype, C + R)
  else:
    kv = pallas_kernels.QuantizedLatents(
      values=zeros(latent_dtype, C),
      scale=zeros("float32", C // latents.GROUP),
      rope=zeros("bfloat16", R),
    )
  keys = IndexKeys(zeros(index_key_dtype or cfg.dtype, I))
  if index_key_dtype is not None:
    keys = dataclasses.replace(keys, scale=zeros("float32"))
  return Pool(kv, keys, layers)
