"""One layer's attention at decode: its parts checked, then timed.

Letters: B slots, T tokens of each, P pages of a slot, and those of config.py.
"""

import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax import cache as cache_lib
from dsa_jax import cached_attention
from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import mla
from dsa_jax.engine.bench import floors
from dsa_jax.engine.bench import kernel_times
from dsa_jax.engine.bench import models
from dsa_jax.engine.bench import pools
from dsa_jax.engine.bench import rows
from pallas_kernels import dispatch
from pallas_kernels.bench import peak
from pallas_kernels.bench import timing

# Keys of one call are out of the cache when they are read again: twice as much
# as the largest GPU's has lies between. On a CPU that does not matter.
_SPREAD: Final = {"gpu": 128 << 20}
_MOST_TABLES: Final = 16
# Of a query's keys, those that plain XLA chooses, too; sums of scores differ by
# rounding, and with them the last few.
SAME_KEYS: Final = 0.99
FAR: Final = 0.02  # rms of a query's difference, over the rms of its result


class Layer:
  """Attention of one layer to random rows, by random queries.

  Pages of a table are data, and several tables with nothing in common lie in
  the pool, so that calls in a row need not find their keys in a cache.
  """

  def __init__(
    self, cfg: config_lib.ModelConfig, B: int, longest: int, T: int, args
  ):
    self.cfg, self.B, self.T = cfg, B, T
    self._per_slot = pools.pages_of(cfg, longest)
    self.stored = floors.stored(cfg, **pools.dtypes(args))
    page_bytes = pools.PAGE * (self.stored.latent + self.stored.key)
    spread = _SPREAD.get(jax.default_backend(), 0)
    self._count = max(B * self._per_slot, -(-spread // page_bytes))
    one = dataclasses.replace(
      cfg, num_layers=1, num_dense_layers=1, indexer_types=()
    )
    self.pool = pools.make_pool(one, self._count, args)
    self.q, self.q_index, self.w = queries(cfg, B, T, jax.random.key(2))

  def tables(self, length: int) -> list[jax.Array]:
    """Tables [B, P] of pages for sequences of this length, all apart."""
    used = self.B * -(-length // pools.PAGE)
    pages = pools.scattered(1, self._count)[0]
    found = []
    for i in range(min(self._count // used, _MOST_TABLES)):
      table = np.zeros((self.B, self._per_slot), np.int32)
      own = pages[i * used : (i + 1) * used].reshape(self.B, -1)
      table[:, : own.shape[1]] = own
      found.append(jnp.asarray(table))
    return found

  def programs(self) -> tuple[Any, Any]:
    """Compiled anew: selection, and attention, by what is allowed then."""
    return (
      jax.jit(functools.partial(_select, self.cfg)),
      jax.jit(functools.partial(_attend, self.cfg)),
    )


def queries(
  cfg: config_lib.ModelConfig, B: int, T: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Random ones [B, T, N, X]; the indexer's [B, T, M, I] and its weights."""
  keys = jax.random.split(key, 3)
  N, X = cfg.num_heads, cfg.kv_rank + cfg.rope_head_dim
  M, I = cfg.index_heads, cfg.index_head_dim
  return (
    jax.random.normal(keys[0], (B, T, N, X), cfg.dtype),
    jax.random.normal(keys[1], (B, T, M, I), cfg.dtype),
    jax.random.normal(keys[2], (B, T, M)) * (M * I) ** -0.5,
  )


def _select(cfg, pool, pages, offset, q_index, w):
  frame, cache = frame_of(cfg, pool, pages, offset, w.shape[1])
  return cached_attention.select(q_index, w, cache, frame, cfg.top_k, cfg.rules)


def _attend(cfg, pool, pages, offset, q, selected):
  frame, cache = frame_of(cfg, pool, pages, offset, q.shape[1])
  scale = mla.softmax_scale(cfg)
  return cached_attention.attend(
    q, cache, frame, selected, cfg.kv_rank, scale, cfg.rules
  )


def frame_of(cfg, pool, pages, offset, T, layer=0):
  """The frame of T tokens after `offset` ones, and their layer's cache."""
  frame = frame_lib.make_cached_frame(
    *(cfg, pages, pools.PAGE, offset, jnp.full_like(offset, T), T)
  )
  return frame, cache_lib.LayerCache(pool, jnp.int32(layer))


def attention(args) -> None:
  """Checks and times the parts of attention for all slots and lengths."""
  T = 2 if args.speculate else 1
  pools.check_lengths(args, T)
  peaks = peak.measure()
  rows.say(peaks=[str(x) for x in peaks])
  for B in args.slots:
    layer = Layer(models.config_of(args), B, max(args.lengths), T, args)
    compiled = layer.programs()
    for length in args.lengths:
      check(layer, length, compiled)
      _time(layer, length, compiled, peaks)
    del layer  # and its pool, before the next one is made


def check(layer: Layer, length: int, compiled: tuple[Any, Any]) -> None:
  """Compares a few slots with plain XLA on these slots alone.

  Raises:
    Wrong: A query's keys, or its result, are not the same.
  """
  few = np.unique([0, layer.B // 2, layer.B - 1])
  pages, offset = layer.tables(length)[0], _offset(layer, length)
  select, attend = compiled
  keys = select(layer.pool, pages, offset, layer.q_index, layer.w)
  out = [attend(layer.pool, pages, offset, layer.q, x) for x in (keys, None)]
  with dispatch.kernels(False):
    select, attend = layer.programs()
    where = layer.pool, pages[few], offset[few]
    plain_keys = select(*where, layer.q_index[few], layer.w[few])
    plain = [attend(*where, layer.q[few], x) for x in (keys[few], None)]
  what = f"{layer.B} slots of {length} tokens"
  same = shares(keys[few], plain_keys)
  far = [distances(x[few], y) for x, y in zip(out, plain)]
  rows.say(
    mode="attention",
    slots=layer.B,
    length=length,
    same_keys=float(same.min()),
    sparse_rms=float(far[0].max()),
    dense_rms=float(far[1].max()),
  )
  # Neither comparison holds for NaN.
  if not same.min() >= SAME_KEYS:
    raise rows.Wrong(
      f"{what}: indexer_topk finds {same.min():.1%} of a query's keys that "
      f"plain XLA finds, less than {SAME_KEYS:.0%}."
    )
  for name, x in zip(("sparse", "dense"), far):
    if not x.max() <= FAR:
      raise rows.Wrong(
        f"{what}: {name} attention of a query is {x.max():.2g} of its size "
        f"from plain XLA's, more than {FAR}."
      )


def shares(found, expected) -> np.ndarray:
  """For each query [.., K], what part of the expected keys is found."""
  found, expected = np.asarray(found), np.asarray(expected)
  pairs = zip(
    found.reshape(-1, found.shape[-1]), expected.reshape(-1, found.shape[-1])
  )
  return np.array(
    [np.isin(y[y >= 0], x[x >= 0]).mean() for x, y in pairs]
  ).reshape(found.shape[:-1])


def distances(x, y) -> np.ndarray:
  """For each query [B, T, N, C], rms of the difference over y's own."""
  x, y = (np.asarray(a, np.float32) for a in (x, y))
  rms = lambda a: np.sqrt(np.square(a).mean((-2, -1)))
  return rms(x - y) / rms(y)


def _time(layer: Layer, length: int, compiled, peaks) -> None:
  select, attend = compiled
  offset, pool = _offset(layer, length), layer.pool
  tables = layer.tables(length)
  keys = [select(pool, x, offset, layer.q_index, layer.w) for x in tables]
  todo = {
    "indexer_topk": (
      select,
      [(pool, x, offset, layer.q_index, layer.w) for x in tables],
    ),
    "sparse_mla": (
      attend,
      [(pool, x, offset, layer.q, y) for x, y in zip(tables, keys)],
    ),
    "dense": (attend, [(pool, x, offset, layer.q, None) for x in tables]),
  }
  where = layer.cfg, layer.stored, layer.B, layer.T, length - layer.T
  floor = {
    "indexer_topk": floors.select(*where),
    "sparse_mla": floors.absorbed("sparse", *where),
    "dense": floors.absorbed("dense", *where),
  }
  times = {}
  for op, (program, arguments) in todo.items():
    times[op] = timing.measure(program, arguments).seconds
    rows.say(
      mode="attention",
      op=op,
      slots=layer.B,
      length=length,
      queries=layer.T,
      us=round(times[op] * 1e6, 2),
      floor_us=round(floor[op].seconds(peaks) * 1e6, 2),
      bound=floor[op].bound(peaks),
      share=round(floor[op].seconds(peaks) / times[op], 3),
      kernels=kernel_times.kernel_times(program, arguments),
    )
  sparse = times["indexer_topk"] + times["sparse_mla"]
  rows.say(
    mode="attention",
    slots=layer.B,
    length=length,
    dense_over_dsa=round(times["dense"] / sparse, 2),
  )


def _offset(layer: Layer, length: int) -> jax.Array:
  """Tokens cached before the queries, whose own keys lie there, too."""
  return jnp.full(layer.B, length - layer.T, jnp.int32)
