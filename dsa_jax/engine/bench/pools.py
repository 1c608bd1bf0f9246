"""A pool of random rows, and the engine's programs on it, each alone.

Where sequences end is data, not a shape: one pool and one compiled program, for
the longest, serve all lengths.

Letters: B slots, P pages of a sequence, T tokens of a chunk.
"""

import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Int
import numpy as np

from dsa_jax import cache as cache_lib
from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax.engine import programs
from dsa_jax.engine import state
from dsa_jax.engine import weights

PAGE: Final = 128


def pages_of(cfg: config_lib.ModelConfig, length: int) -> int:
  """Pages of a slot for so many tokens; an engine's least is K."""
  return -(-max(length, cfg.top_k) // PAGE)


def scattered(slots: int, per_slot: int) -> Int[np.ndarray, "B P"]:
  """The pages of each slot, of a pool that has no others, in no order."""
  pages = np.random.default_rng(0).permutation(slots * per_slot)
  return pages.astype(np.int32).reshape(slots, per_slot)


def dtypes(args) -> dict[str, Any]:
  """What the cache holds keys in, as `Engine` takes it."""
  names = "index_key_dtype", "latent_dtype"
  return {name: getattr(args, name) for name in names}


def make_pool(cfg: config_lib.ModelConfig, pages: int, args) -> cache_lib.Pool:
  """A pool of random rows."""
  pool = programs.make_pool(cfg, pages, PAGE, *dtypes(args).values())
  key = jax.random.key(1)
  return dataclasses.replace(
    pool,
    kv=_random_rows(key, pool.kv, cfg.kv_rank + cfg.rope_head_dim),
    k_index=_random_rows(key, pool.k_index, cfg.index_head_dim),
  )


@functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
def _random_rows(key, stored, width):
  """A page at a time: the generator's own temporaries are small."""
  pages, size = jax.tree.leaves(stored)[0].shape[:2]

  def page(key):
    return cache_lib.as_stored(stored, jax.random.normal(key, (size, width)))

  return jax.lax.map(page, jax.random.split(key, pages))


class Decoding:
  """The decoding program on a pool of random rows, all slots equally long.

  Each call samples the last tokens of sequences of the length that `end_at` was
  given, the longest at first.
  """

  def __init__(
    self, model, slots: int, longest: int, args, attention: frame_lib.Attention
  ):
    """Makes the pool, and compiles.

    Args:
      model: The model.
      slots: B.
      longest: The most tokens that a slot will have.
      args: With `steps`, `speculate` and the cache's dtypes.
      attention: "sparse" or "dense".
    """
    cfg = weights.config_for_decoding(model.config)
    graphdef, self._params, _ = weights.prepare(model, cfg)
    per_slot = pages_of(cfg, longest)
    self._pool = make_pool(cfg, slots * per_slot, args)
    self._pages = scattered(slots, per_slot)
    blank = state.blank(slots)
    blank.how.temperature[:], blank.how.seed[:] = 1, np.arange(slots)
    blank.left[:], blank.live[:] = 2**30, True
    self._slots = jax.tree.map(jnp.asarray, blank)
    self._fed = most_fed(args)
    self.end_at(longest)
    arguments = (self._params, self._pool, self._slots, *self._rest())
    kind = _kind(args, attention)
    lowered = programs.decode.lower(graphdef, *arguments, kind=kind)
    self._program = lowered.compile()
    self.memory: Any = self._program.memory_analysis()
    self.pool_bytes = sum(x.nbytes for x in jax.tree.leaves(self._pool))

  def end_at(self, length: int) -> None:
    """Lets sequences have this length, at most, after each call."""
    self._first = np.full(len(self._pages), length - self._fed, np.int32)

  def _rest(self):
    stays = np.ones(len(self._pages), bool)
    return self._pages, stays, np.asarray(False)

  def __call__(self) -> programs.Decoded:
    # A copy, since it is donated.
    slots = dataclasses.replace(self._slots, length=jnp.array(self._first))
    self._pool, self._slots, given = self._program(
      self._params, self._pool, slots, *self._rest()
    )
    return given


def most_fed(args) -> int:
  """The most tokens that a slot is fed in a call."""
  return args.steps * (2 if args.speculate else 1)


def check_lengths(args, fed: int) -> None:
  """Raises a ValueError for sequences that are too short to be timed."""
  for length in args.lengths:
    if length <= fed:
      raise ValueError(
        f"--lengths {length}: {args.mode} feeds each sequence {fed} tokens "
        f"until it has that length; give more than {fed}."
      )


class Prefilling:
  """The prefill program on a pool of random rows, one prompt's.

  Each call caches the chunk that follows as many tokens as `begin_at` was
  given, none at first.
  """

  def __init__(self, model, longest: int, args, attention: frame_lib.Attention):
    """Makes the pool, and compiles.

    Args:
      model: The model.
      longest: The most tokens that will be cached before the chunk.
      args: With `chunk`, T, and what `Decoding` needs.
      attention: "sparse" or "dense".
    """
    cfg = weights.config_for_decoding(model.config)
    graphdef, self._params, _ = weights.prepare(model, cfg)
    pages, T = pages_of(cfg, longest + args.chunk), args.chunk
    self._pool = make_pool(cfg, pages, args)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, T))
    tokens = tokens.astype(np.int32)
    offset, count = np.array([[0], [T]], np.int32)
    self._chunk = programs.Chunk(
      tokens, tokens, scattered(1, pages), offset, count
    )
    lowered = programs.prefill.lower(
      *(graphdef, self._params, self._pool, self._chunk),
      kind=_kind(args, attention),
      with_log_probs=False,
    )
    self._program = lowered.compile()

  def begin_at(self, offset: int) -> None:
    """Lets so many tokens be cached before the chunk."""
    self._chunk = dataclasses.replace(
      self._chunk, offset=np.full(1, offset, np.int32)
    )

  def __call__(self) -> cache_lib.Pool:
    """Returns the pool, to be waited for."""
    self._pool, _ = self._program(self._params, self._pool, self._chunk)
    return self._pool


def _kind(args, attention) -> programs.Kind:
  return programs.Kind(
    attention=attention,
    steps=args.steps,
    speculates=args.speculate,
    kept=False,
    experts=False,
    selected=False,
  )
