"""Checks of the engine on the device that it runs on.

Letters: B slots, T tokens of each, P pages of a slot, and those of config.py.
"""

import functools
from typing import Final, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import dsa_jax
from dsa_jax import cache as cache_lib
from dsa_jax import cached_attention
from dsa_jax import config as config_lib
from dsa_jax import mla
from dsa_jax.engine import weights
from dsa_jax.engine.bench import attention
from dsa_jax.engine.bench import models
from dsa_jax.engine.bench import pools
from dsa_jax.engine.bench import rows

_REQUESTS: Final = 8
_SLOTS: Final = 4  # of the engine that has them
_TEMPERATURES: Final = (0.0, 0.3, 0.7, 1.0)


def check(args) -> None:
  """Compares samples in company with those alone, and a large pool with small
  ones.

  Raises:
    Wrong: One of them differs.
  """
  cfg = models.config_of(args)
  if min(args.slots) < 2:
    raise ValueError("--slots 1: a check compares with another slot; give 2.")
  if (least := min(args.lengths)) < 2 * cfg.top_k:
    raise ValueError(
      f"--lengths {least}: of so few tokens, the {cfg.top_k} that are chosen "
      f"tell no slot from another; give {2 * cfg.top_k} or more."
    )
  company(models.make_model(cfg), args)
  for slots in args.slots:
    for length in args.lengths:
      large_pool(cfg, slots, length, args)


def company(model: dsa_jax.Transformer, args) -> None:
  """Samples in company are those of each request alone, bit for bit.

  Prompts of 5 tokens up to `args.prompt` and temperatures from 0 to 1 share
  fewer slots than they are; alone, each finds an empty cache.
  """
  rng = np.random.default_rng(0)
  prompts = [
    rng.integers(0, model.config.vocab_size, int(length))
    for length in np.geomspace(5, max(args.prompt, 5), _REQUESTS)
  ]
  params = [
    dsa_jax.SamplingParams(
      max_tokens=args.tokens,
      temperature=_TEMPERATURES[i % len(_TEMPERATURES)],
      seed=i,
    )
    for i in range(_REQUESTS)
  ]
  longest = args.prompt + args.tokens + 2 * pools.PAGE
  engine = dsa_jax.Engine(
    model,
    slots=_SLOTS,
    # More than all of them take: a slot that is lost would be another case.
    pool_tokens=_REQUESTS * max(longest, model.config.top_k),
    max_length=longest,
    chunk=args.chunk,
    steps=args.steps,
    speculate=args.speculate,
    **pools.dtypes(args),
  )
  together = [x for (x,) in engine.generate(prompts, params)]
  state, different = nnx.split(model)[1], []
  for i, of_company in enumerate(together):
    engine.swap_weights(state, i + 1)  # empties the cache
    ((alone,),) = engine.generate(prompts[i : i + 1], params[i : i + 1])
    same = all(
      np.array_equal(getattr(of_company, name), getattr(alone, name))
      for name in ("tokens", "log_probs", "untruncated")
    )
    # Found in the cache, or computed again: another case, with less promised.
    others = sum(x.cached_tokens + x.preemptions for x in (of_company, alone))
    rows.say(
      mode="check",
      what="company",
      prompt=len(prompts[i]),
      temperature=params[i].temperature,
      tokens=len(alone.tokens),
      same=same,
      cached_or_lost=others,
    )
    if not same or others:
      different.append(i)
  if different:
    raise rows.Wrong(
      f"requests {different} of {_REQUESTS} give other tokens or log-probs in "
      "company than alone, or were not computed whole and once."
    )


class _Tokens(NamedTuple):
  """What a layer is given of them, random."""

  queries: tuple[jax.Array, jax.Array, jax.Array]
  """The same in all slots: results differ by what they read alone."""
  kv: jax.Array
  k_index: jax.Array


def _tokens(cfg: config_lib.ModelConfig, B: int, T: int, layer: int) -> _Tokens:
  keys = jax.random.split(jax.random.key(layer), 3)
  row = cfg.kv_rank + cfg.rope_head_dim
  return _Tokens(
    attention.queries(cfg, 1, T, keys[0]),
    jax.random.normal(keys[1], (B, T, row), cfg.dtype),
    jax.random.normal(keys[2], (B, T, cfg.index_head_dim), cfg.dtype),
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _layer(cfg, pool, layer, pages, offset, tokens, selected=None):
  """Caches tokens in a layer; the pool, selected keys, and what they give.

  Attention is to the keys that are given, or else to those selected.
  """
  B, T, _ = tokens.kv.shape
  frame, cache = attention.frame_of(cfg, pool, pages, offset, T, layer)
  q, q_index, w = (
    jnp.broadcast_to(x, (B, *x.shape[1:])) for x in tokens.queries
  )
  cache = cache.write(frame, tokens.kv, tokens.k_index, cfg.rules)
  own = cached_attention.select(q_index, w, cache, frame, cfg.top_k, cfg.rules)
  out = cached_attention.attend(
    *(q, cache, frame, own if selected is None else selected),
    *(cfg.kv_rank, mla.softmax_scale(cfg), cfg.rules),
  )
  return cache.pool, own, out


@jax.jit
def _one_slot(pool: cache_lib.Pool, pages) -> cache_lib.Pool:
  """A pool of this slot's pages alone, in order."""
  L = pool.layers
  first = jnp.arange(L, dtype=jnp.int32)[:, None] * (
    len(pool.k_index.values) // L
  )
  at = (first + pages[None]).reshape(-1)
  return jax.tree.map(lambda x: x[at], pool)


def large_pool(cfg: config_lib.ModelConfig, B: int, length: int, args) -> None:
  """Attention in a large pool is what it is in a pool of one sequence.

  Each layer caches random rows, selects keys for random queries, and attends to
  them. Slots in the middle and at both ends are compared: with the same
  sequence, and with that of the next slot, which must be another one. In the
  end all rows of theirs are the same, bit for bit. Layers are compared one by
  one, since in a whole model one expert or key that is as good as another
  changes all that follows.

  Raises:
    Wrong: A layer, or a slot's rows, differ.
  """
  cfg = weights.config_for_decoding(cfg)
  T = 2 if args.speculate else 1
  per_slot = pools.pages_of(cfg, length)
  pages = pools.scattered(B, per_slot)
  pool = pools.make_pool(cfg, B * per_slot, args)
  few = sorted({0, B // 2, B - 1})
  alone = {i: _one_slot(pool, pages[i]) for i in few}
  in_order = np.arange(per_slot, dtype=np.int32)[None]
  offset = np.full(B, length - T, np.int32)
  elements = jax.tree.leaves(pool.kv)[0].size
  wrong = []
  for l in range(pool.layers):
    tokens = _tokens(cfg, B, T, l)
    pool, *given = _layer(cfg, pool, l, pages, offset, tokens)
    compared = []
    for i in few:
      own = tokens._replace(
        kv=tokens.kv[i, None], k_index=tokens.k_index[i, None]
      )
      alone[i], *of_one = _layer(
        *(cfg, alone[i], l, in_order, offset[i, None]),
        *(own, given[0][i, None]),
      )
      to_next = _compare(given, (i + 1) % B, of_one)
      compared.append((*_compare(given, i, of_one), *to_next))
    same, far, same_next, far_next = zip(*compared)
    right = (
      # Neither comparison holds for NaN.
      np.max(far) <= attention.FAR < np.min(far_next)
      and np.min(same) >= attention.SAME_KEYS > np.max(same_next)
    )
    rows.say(
      mode="check",
      what="large pool",
      slots=B,
      length=length,
      latents=elements,
      beyond_int32=elements > 2**31,
      compared=few,
      layer=l,
      rms=float(np.max(far)),
      rms_of_next_slot=float(np.min(far_next)),
      same_keys=float(np.min(same)),
      same_keys_of_next_slot=float(np.max(same_next)),
      right=bool(right),
    )
    if not right:
      wrong.append(f"layer {l}")
  for i in few:
    stored = jax.tree.leaves(_one_slot(pool, pages[i]))
    pairs = zip(stored, jax.tree.leaves(alone[i]))
    same_rows = all(bool((x == y).all()) for x, y in pairs)
    rows.say(mode="check", what="rows", slot=i, same=same_rows)
    if not same_rows:
      wrong.append(f"the rows of slot {i}")
  if wrong:
    raise rows.Wrong(
      f"a pool of {B} slots of {length} tokens: {', '.join(wrong)}: not what a "
      "pool of one sequence gives."
    )


def _compare(given, slot: int, of_one) -> tuple[np.ndarray, np.ndarray]:
  """What part of its keys each query has in this slot, too, and how far the
  results lie apart."""
  (keys, out), (keys_of_one, out_of_one) = given, of_one
  return (
    attention.shares(keys[slot, None], keys_of_one),
    attention.distances(out[slot, None], out_of_one),
  )
