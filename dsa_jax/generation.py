"""Generation: prefill, then one token a step, in one compiled program.

Letters: B batch, T tokens of the prompt, V vocabulary.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsa_jax import cache as cache_lib
from dsa_jax import frame as frame_lib
from dsa_jax import transformer


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
    ValueError: An empty prompt, no tokens to make, a negative temperature,
      sampling without a key, or rules that share a sequence among devices.
  """
  if tokens.shape[1] < 1:
    raise ValueError("generate: the prompt is empty; give at least one token.")
  if max_new_tokens < 1:
    raise ValueError(f"generate: {max_new_tokens=} must be at least 1.")
  if temperature < 0:
    raise ValueError(f"generate: {temperature=} must be at least 0.")
  if temperature > 0 and rng is None:
    raise ValueError(
      f"generate: {temperature=} samples: give rng=jax.random.key(seed)."
    )
  if model.config.rules.shards("seq") > 1:
    raise ValueError(
      "generate: the mesh shares a sequence among devices, but tokens come one "
      "at a time: give the model's config rules with seq=None."
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
    greedy=temperature == 0,
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
