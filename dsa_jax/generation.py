"""Generation: prefill, then one token a step, in one compiled program.

Letters: B batch, T tokens of the prompt, V vocabulary.
"""

import dataclasses
import functools
from typing import Annotated

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from dsa_jax import cache as cache_lib
from dsa_jax import frame as frame_lib
from dsa_jax import ranges
from dsa_jax import transformer

# The cache grows with them, from the beginning.
type _NewTokens = Annotated[int, ranges.Interval(1, 2**20)]
type _Temperature = Annotated[float, ranges.Interval(0, 1e6)]


def generate(
  model: transformer.Transformer,
  tokens: frame_lib.Ids,
  max_new_tokens: int,
  temperature: int | float = 0.0,
  rng: jax.Array | None = None,
  *,
  pad_id: int | None = None,
  attention: frame_lib.Attention = "sparse",
) -> Int[Array, "B X"]:
  """Continues each row by `max_new_tokens` tokens.

  Compiled once for a shape, a number of tokens and a way of attending.

  Args:
    model: The model.
    tokens: Prompts; shorter ones are filled up with `pad_id`.
    max_new_tokens: At least 1.
    temperature: 0 takes the likeliest token; above it, samples.
    rng: A `jax.random.key`; needed to sample.
    pad_id: This token is left out of the prompts, wherever it stands. By
      default every token counts.
    attention: "sparse" reads K chosen keys a query, "dense" all of them.

  Returns:
    Prompts and continuations, [B, T + max_new_tokens].

  Raises:
    ValueError: An argument is not of its kind or out of its range; a prompt is
      empty, or padding alone; an id is not in the vocabulary (seen where the
      tokens are known: not under `jax.jit`); the temperature samples, but there
      is no key; or the rules share a sequence among devices, or the rows among
      more than they divide by.
  """
  vocab = model.config.vocab_size
  ranges.require("generate: max_new_tokens", max_new_tokens, _NewTokens)
  ranges.require("generate: temperature", temperature, _Temperature)
  ranges.require("generate: attention", attention, frame_lib.Attention)
  if pad_id is not None:
    ids = Annotated[int, ranges.Interval(0, vocab - 1)]
    ranges.require("generate: pad_id", pad_id, ids)
  _check_prompts(tokens, pad_id, vocab)
  # What fp32 takes for 0 would be divided by.
  greedy = temperature < np.finfo(np.float32).tiny
  if not greedy and rng is None:
    raise ValueError(
      f"generate: {temperature=} samples: give rng=jax.random.key(seed)."
    )
  if rng is not None and not _is_key(rng):
    raise ValueError(
      f"generate: rng={ranges.shown(rng)} is no key; give jax.random.key(seed)."
    )
  if model.config.rules.shards("seq") > 1:
    raise ValueError(
      "generate: the mesh shares a sequence among devices, but tokens come one "
      "at a time: give the model's config rules with seq=None."
    )
  if len(tokens) % (rows := model.config.rules.shards("batch")):
    raise ValueError(
      f"generate: {len(tokens)} prompts do not divide among the {rows} devices "
      "that share a batch; give a multiple, or the model's config rules with "
      "batch=None."
    )
  graphdef, state = nnx.split(model)
  return _generate(
    graphdef,
    state,
    jnp.asarray(tokens, jnp.int32),
    jnp.float32(temperature),
    jax.random.key(0) if rng is None else rng,
    jnp.int32(-1 if pad_id is None else pad_id),
    max_new_tokens=max_new_tokens,
    attention=attention,
    greedy=greedy,
  )


def _check_prompts(tokens, pad_id: int | None, vocab: int) -> None:
  """Refuses what is no array of ids, and a row without a token."""
  if (
    not isinstance(tokens, jax.Array | np.ndarray)
    or not jnp.issubdtype(tokens.dtype, jnp.integer)
    or tokens.dtype.kind not in "iu"  # to NumPy, spans of time are integers
  ):
    raise ValueError("generate: the tokens must be an array of whole numbers.")
  if tokens.ndim != 2 or tokens.size == 0:
    raise ValueError(
      f"generate: the prompts have shape {tokens.shape}, which is empty or not "
      "[B, T]; give at least one token."
    )
  if isinstance(tokens, jax.core.Tracer) or (
    isinstance(tokens, jax.Array) and not tokens.is_fully_addressable
  ):
    return  # the ids are not here
  ids_BT = np.asarray(tokens)
  for b, t in np.argwhere((ids_BT < 0) | (ids_BT >= vocab)):
    raise ValueError(
      f"generate: tokens[{b}, {t}]={ids_BT[b, t]} is no id: the vocabulary has "
      f"{vocab}, from 0."
    )
  if pad_id is not None:
    for (b,) in np.argwhere((ids_BT == pad_id).all(1)):
      raise ValueError(
        f"generate: row {b} of the tokens is padding alone ({pad_id=}); give "
        "it a token, or leave it out."
      )


def _is_key(rng) -> bool:
  return (
    isinstance(rng, jax.Array)
    and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    and rng.shape == ()
  )


@functools.partial(
  jax.jit, static_argnames=("graphdef", "max_new_tokens", "attention", "greedy")
)
def _generate(
  graphdef,
  state,
  tokens,
  temperature,
  rng,
  pad_id,
  max_new_tokens,
  attention,
  greedy,
):
  model = nnx.merge(graphdef, state)
  B, T = tokens.shape
  # Padding goes to the front: what is left of a row is one range of keys.
  real_BT = tokens != pad_id
  order_BT = jnp.argsort(real_BT, stable=True)
  prompts_BT = jnp.take_along_axis(tokens, order_BT, 1)
  cache = cache_lib.make_cache(
    model.config, B, T + max_new_tokens, attention=attention
  )
  cache = dataclasses.replace(cache, start=T - real_BT.sum(1, dtype=jnp.int32))

  def choose(logits_BV, key):
    if greedy:
      return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    # The best is 0, however low the temperature: none overflows.
    logits_BV -= logits_BV.max(-1, keepdims=True)
    return jax.random.categorical(key, logits_BV / temperature).astype(
      jnp.int32
    )

  def step(carry, key):
    last_B, cache = carry
    logits_BV, cache = model.decode(last_B[:, None], cache)
    next_B = choose(logits_BV, key)
    return (next_B, cache), next_B

  keys = jax.random.split(rng, max_new_tokens)
  logits_BV, cache = model.decode(prompts_BT, cache)
  first_B = choose(logits_BV, keys[0])
  _, rest = jax.lax.scan(step, (first_B, cache), keys[1:])
  return jnp.concatenate([tokens, first_B[:, None], rest.T], 1)
