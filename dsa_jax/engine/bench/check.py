"""Checks of the engine on the device that it runs on.

Letters: B slots, T tokens of each, P pages of a slot, L layers, V vocabulary,
K chosen keys.
"""

import functools
from typing import Any, Final

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import dsa_jax
from dsa_jax import cache as cache_lib
from dsa_jax import frame as frame_lib
from dsa_jax.engine import weights
from dsa_jax.engine.bench import attention
from dsa_jax.engine.bench import models
from dsa_jax.engine.bench import pools
from dsa_jax.engine.bench import rows

_REQUESTS: Final = 8
_SLOTS: Final = 4  # of the engine that has them
_TEMPERATURES: Final = (0.0, 0.3, 0.7, 1.0)
# Of two programs, that sum in other orders: rms of the difference of logits,
# over their deviation, and what part of a layer's selected keys is the same.
_FAR: Final = 0.05
_SAME_KEYS: Final = 0.95


def check(args) -> None:
  """Compares samples in company with those alone, and a large pool with small
  ones.

  Raises:
    Wrong: One of them differs.
  """
  pools.check_lengths(args, 2)
  if min(args.slots) < 2:
    raise ValueError("--slots 1: a check compares with another slot; give 2.")
  model = models.make_model(models.config_of(args))
  company(model, args)
  for slots in args.slots:
    for length in args.lengths:
      big_pool(model, slots, length, args)


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


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(graphdef, params, pool, pages, tokens, offset):
  """Logits [B, T, V] and selected keys [L, B, T, K] of tokens."""
  model, T = nnx.merge(graphdef, params), tokens.shape[1]
  frame = frame_lib.make_cached_frame(
    *(model.config, pages, pools.PAGE, offset, jnp.full_like(offset, T), T)
  )
  done = model.decode(tokens, frame, pool)
  return model.head(done.hidden), done.selected, done.pool


@jax.jit
def _one_slot(pool: cache_lib.Pool, pages) -> cache_lib.Pool:
  """A pool of this slot's pages alone, in order."""
  L = pool.layers
  first = jnp.arange(L, dtype=jnp.int32)[:, None] * (
    len(pool.k_index.values) // L
  )
  at = (first + pages[None]).reshape(-1)
  return jax.tree.map(lambda x: x[at], pool)


def big_pool(model: dsa_jax.Transformer, B: int, length: int, args) -> None:
  """A step on a large pool gives what it gives on a pool of one sequence.

  Slots in the middle and at both ends are compared: with the same sequence, and
  with the one in the next slot, which must be another one.
  """
  cfg = weights.config_for_decoding(model.config)
  graphdef, params, _ = weights.prepare(model, cfg)
  T = 2 if args.speculate else 1
  per_slot = pools.pages_of(cfg, length)
  pages = pools.scattered(B, per_slot)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, cfg.vocab_size, (B, T)).astype(np.int32)
  offset = np.full(B, length - T, np.int32)
  pool = pools.make_pool(cfg, B * per_slot, args)
  elements = jax.tree.leaves(pool.kv)[0].size
  few = sorted({0, B // 2, B - 1})
  alone = {}
  for i in few:  # before the pool is donated
    own = np.arange(per_slot, dtype=np.int32)[None]
    alone[i] = _read(
      _step(
        *(graphdef, params, _one_slot(pool, pages[i]), own),
        *(tokens[i : i + 1], offset[i : i + 1]),
      )
    )
  logits, selected = _read(_step(graphdef, params, pool, pages, tokens, offset))
  wrong = []
  for i in few:
    of_one, keys_of_one = alone[i][0][0], alone[i][1][:, 0]
    own, other = (
      (_distance(logits[j], of_one), _least_share(selected[:, j], keys_of_one))
      for j in (i, (i + 1) % B)
    )
    right = own[0] < _FAR <= other[0] and own[1] >= _SAME_KEYS > other[1]
    rows.say(
      mode="check",
      what="big pool",
      slots=B,
      length=length,
      latents=elements,
      beyond_int32=elements > 2**31,
      slot=i,
      rms_over_deviation=round(own[0], 5),
      of_the_next_slot=round(other[0], 5),
      same_keys=round(own[1], 4),
      keys_of_the_next_slot=round(other[1], 4),
      right=right,
    )
    if not right:
      wrong.append(i)
  if wrong:
    raise rows.Wrong(
      f"a pool of {B} slots of {length} tokens: logits or selected keys of "
      f"slots {wrong} are not those of each sequence in a pool of its own."
    )


def _read(given: tuple[Any, Any, Any]) -> tuple[np.ndarray, np.ndarray]:
  logits, selected, _ = given
  return np.asarray(logits, np.float32), np.asarray(selected)


def _distance(x: np.ndarray, y: np.ndarray) -> float:
  """Rms of the difference, over the deviation of y."""
  return float(np.sqrt(np.square(x - y).mean()) / y.std())


def _least_share(found: np.ndarray, expected: np.ndarray) -> float:
  """Of all layers and tokens [L, T, K], the least that is the same."""
  return float(attention.shares(found, expected).min())
