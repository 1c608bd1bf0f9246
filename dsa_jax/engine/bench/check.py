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
_COMPARED: Final = 8  # slots of a large pool
# Of two programs, that sum in other orders: rms of the difference of logits,
# over their deviation, and what part of a layer's selected keys is the same.
# Where two experts or keys are as good, they may choose other ones, and what
# follows in that token's step differs by more.
_FAR: Final = 0.05
_SAME_KEYS: Final = 0.95
_EXACT: Final = 0.25  # of the tokens, at least, are within these limits
_HALF: Final = 0.5  # of both measures, where another sequence begins


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

  Up to 8 slots, those at both ends among them, are compared: with the same
  sequence, and with the one in the next slot, which must be another one. A
  wrong address would be seen in all, whose pages lie all over the pool.

  Raises:
    Wrong: A slot is another sequence, or too few tokens are exact.
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
  few = np.unique(np.linspace(0, B - 1, _COMPARED).astype(int)).tolist()
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
  rows.say(
    mode="check",
    what="big pool",
    slots=B,
    length=length,
    latents=elements,
    beyond_int32=elements > 2**31,
  )
  exact, wrong = [], []
  for i in few:
    of_one, keys_of_one = alone[i][0][0], alone[i][1][:, 0]
    own, other = (
      (_distances(logits[j], of_one), _shares(selected[:, j], keys_of_one))
      for j in (i, (i + 1) % B)
    )
    right = _is_one(*own, *other)
    rows.say(
      mode="check",
      what="big pool",
      slot=i,
      rms_over_deviation=round(float(own[0].max()), 5),
      of_the_next_slot=round(float(other[0].min()), 5),
      same_keys=round(float(own[1].min()), 4),
      keys_of_the_next_slot=round(float(other[1].max()), 4),
      right=right,
    )
    exact.extend((own[0] < _FAR) & (own[1] >= _SAME_KEYS))
    if not right:
      wrong.append(i)
  _judge(B, length, float(np.mean(exact)), wrong)


def _is_one(
  far: np.ndarray,
  same: np.ndarray,
  other_far: np.ndarray,
  other_same: np.ndarray,
) -> bool:
  """Whether each token is of the same sequence, and not of the other."""
  is_own = (far < _HALF) & (same >= _HALF)
  is_other = (other_far < _HALF) | (other_same >= _HALF)
  return bool((is_own & ~is_other).all())


def _judge(B: int, length: int, exact: float, wrong: list[int]) -> None:
  """Says what part of the tokens is exact; raises `Wrong` if too few are, or a
  slot is wrong."""
  right = exact >= _EXACT and not wrong
  rows.say(mode="check", what="big pool", exact=round(exact, 4), right=right)
  found = f"slots {wrong}" if wrong else f"all but {exact:.0%} of the tokens"
  if not right:
    raise rows.Wrong(
      f"a pool of {B} slots of {length} tokens: logits or selected keys of "
      f"{found} are not those of each sequence in a pool of its own."
    )


def _read(given: tuple[Any, Any, Any]) -> tuple[np.ndarray, np.ndarray]:
  logits, selected, _ = given
  return np.asarray(logits, np.float32), np.asarray(selected)


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """For each token [T, V], rms of the difference over y's deviation."""
  return np.sqrt(np.square(x - y).mean(-1)) / y.std(-1)


def _shares(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
  """For each token of [L, T, K], the least of all layers that is the same."""
  return attention.shares(found, expected).min(0)
