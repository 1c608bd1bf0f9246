"""Generation: as many tokens for each row of a batch of prompts.

Letters: B batch, T tokens of the prompt, X tokens in all.
"""

from typing import Annotated, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from dsa_jax import frame as frame_lib
from dsa_jax import ranges
from dsa_jax import transformer
from dsa_jax.engine import engine as engine_lib
from dsa_jax.engine import request as request_lib

_PAGE: Final = 64
_STEPS: Final = 32  # of a call
_CHUNK: Final = 1024  # tokens

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

  Makes an engine for this one batch, compiled once for a shape, a number of
  tokens and a way of attending. Requests that come and go, of many lengths, are
  for an `Engine` that stays.

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
      empty, or padding alone; an id is not in the vocabulary; the temperature
      samples, but there is no key; the rows do not divide among the devices
      that share a batch; or this is called under `jax.jit`.
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
  ids_BT = np.asarray(tokens, np.int32)
  groups = model.config.rules.shards("batch")
  if (B := len(ids_BT)) % groups:
    raise ValueError(
      f"generate: {B} prompts do not divide among the {groups} devices that "
      "share a batch; give a multiple, or the model's config rules with "
      "batch=None."
    )
  engine = _engine(model, *ids_BT.shape, max_new_tokens, attention, groups)
  seeds = [0] * B
  if not greedy and rng is not None:
    seeds = np.asarray(jax.random.bits(rng, (B,), jnp.uint32)).tolist()
  rows = [row[row != pad_id] if pad_id is not None else row for row in ids_BT]
  each = [
    request_lib.SamplingParams(
      max_tokens=max_new_tokens,
      temperature=0.0 if greedy else temperature,
      seed=seed,
    )
    for seed in seeds
  ]
  new_BX = [samples[0].tokens for samples in engine.generate(rows, each)]
  return jnp.asarray(np.concatenate([ids_BT, new_BX], 1))


def _engine(model, B, T, max_new_tokens, attention, groups):
  """An engine in which all rows run at once."""
  # A page to spare for each row: the engine begins no row without.
  pages = B * (-(-(T + max_new_tokens) // _PAGE) + 1)
  least = groups * -(-model.config.top_k // _PAGE)
  return engine_lib.Engine(
    model,
    slots=B,
    pool_tokens=max(pages, least) * _PAGE,
    page=_PAGE,
    chunk=min(T, _CHUNK),
    lanes=B // groups,
    steps=min(max_new_tokens, _STEPS),
    max_length=T + max_new_tokens,
    attention=attention,
  )


def _check_prompts(tokens, pad_id: int | None, vocab: int) -> None:
  """Refuses what is no array of ids, and a row without a token."""
  if isinstance(tokens, jax.core.Tracer):
    raise ValueError(
      "generate: it runs programs of its own; call it outside of jax.jit."
    )
  if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
    raise ValueError(
      "generate: the tokens are shared among processes; give each process all "
      "of them, as a NumPy array."
    )
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
