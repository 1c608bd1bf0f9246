"""The engine's compiled programs: pure functions of parameters and state.

`prefill` caches a part of each of a few prompts, all but its last token.
`decode` feeds that token, and then what it samples, several steps in one call:
it alone samples, so that a token depends on its own sequence, seed and
position, and on nothing else. Shapes never change, whoever is there.

Pool and slots are donated, and updated in place.

Letters: B slots, T tokens of a step (1, or 2 with a draft), P pages of a
sequence, V vocabulary, n steps of a call, L layers, J experts a token.
"""

import dataclasses
import functools
from typing import Any, Final

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt16, UInt32
import numpy as np

from dsa_jax import cache as cache_lib
from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import losses
from dsa_jax import sharding
from dsa_jax import transformer
from dsa_jax.engine import sampling
from dsa_jax.engine import state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """What programs are compiled for."""

  attention: frame_lib.Attention
  steps: int
  """n, the most of one call."""
  speculates: bool
  """Whether MTP drafts a token, which is verified with the next."""
  kept: bool
  """What to return besides tokens: which tokens could have been drawn,"""
  experts: bool
  """the experts of each token,"""
  selected: bool
  """the keys that each layer read."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """Parts of prompts, one a row; rows of a group of devices are together."""

  tokens: Int[np.ndarray | Array, "R T"]
  next_tokens: Int[np.ndarray | Array, "R T"]
  """The token after each."""
  pages: Int[np.ndarray | Array, "R P"]
  offset: Int[np.ndarray | Array, " R"]
  """Tokens cached before."""
  count: Int[np.ndarray | Array, " R"]
  """Tokens in the chunk."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
  """What was asked for of a chunk; None for what was not."""

  log_probs: Float[Array | np.ndarray, "R T"] | None
  """Of the next token."""
  experts: UInt16[Array | np.ndarray, "Lmoe R T J"] | None
  selected: Int[Array | np.ndarray, "L R T K"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
  """What the steps of a call gave, with n in front; None for what was not
  asked for."""

  tokens: Int[Array | np.ndarray, "*n B T"]
  """-1 where none was sampled."""
  drafted: Bool[Array | np.ndarray, "*n B"]
  """Whether a draft was verified."""
  log_probs: Float[Array | np.ndarray, "*n B T"]
  """Under the distribution that it was drawn from."""
  untruncated: Float[Array | np.ndarray, "*n B T"]
  """With the temperature alone."""
  kept: UInt32[Array | np.ndarray, "*n B T W"] | None
  """Which tokens could have been drawn, see `sampling.sample`."""
  experts: UInt16[Array | np.ndarray, "*n Lmoe B T J"] | None
  """Of the tokens that were fed, of which each gave one."""
  selected: Int[Array | np.ndarray, "*n L B T K"] | None


# What XLA puts in CUDA graphs: its defaults in jax 0.11, and WHILE. Otherwise
# it asks the host before each step whether there is one.
_IN_GRAPHS: Final = (
  "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,"
  "WHILE"
)

make_pool = jax.jit(cache_lib.make_pool, static_argnums=(0, 1, 2, 3, 4))
make_slots = jax.jit(state.empty, static_argnums=(0, 1))

type Model = nnx.GraphDef[transformer.Transformer]


@functools.partial(
  jax.jit,
  static_argnames=("graphdef", "kind", "with_log_probs"),
  donate_argnames="pool",
)
def prefill(
  graphdef: Model,
  params: nnx.State,
  pool: cache_lib.Pool,
  chunk: Chunk,
  *,
  kind: Kind,
  with_log_probs: bool,
) -> tuple[cache_lib.Pool, Prefilled]:
  """Caches the tokens of a chunk.

  Args:
    graphdef: The model without its parameters.
    params: Its parameters.
    pool: The cache.
    chunk: The tokens.
    kind: What this is compiled for.
    with_log_probs: Whether to return those of the next tokens.
  """
  model = nnx.merge(graphdef, params)
  cfg, T = model.config, chunk.tokens.shape[1]
  frame = frame_lib.make_cached_frame(
    *(cfg, chunk.pages, pool.page_size, chunk.offset, chunk.count, T),
    attention=kind.attention,
  )
  done = model.decode(chunk.tokens, frame, pool)
  pool = done.pool
  if kind.speculates:
    pool = model.draft(chunk.next_tokens, done.hidden, frame, pool)[1]
  log_probs = None
  if with_log_probs:
    targets = sharding.put(chunk.next_tokens, cfg.rules("batch", None))
    nats = losses.cross_entropy(model.head, done.hidden, targets)
    log_probs = _everywhere(cfg, -nats)
  return pool, Prefilled(
    log_probs,
    _everywhere(cfg, _small(done.experts)) if kind.experts else None,
    _everywhere(cfg, done.selected) if kind.selected else None,
  )


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="slots")
def admit(
  cfg: config_lib.ModelConfig,
  slots: state.Slots,
  fresh: state.Slots,
  is_fresh: Bool[np.ndarray | Array, " B"],
) -> state.Slots:
  """Puts sequences into slots, whoever was there."""
  del cfg  # the mesh is in its rules
  return state.admitted(slots, fresh, is_fresh)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="pool")
def copy_pages(
  cfg: config_lib.ModelConfig,
  pool: cache_lib.Pool,
  source: Int[np.ndarray | Array, "G X"],
  target: Int[np.ndarray | Array, "G X"],
) -> cache_lib.Pool:
  """Copies pages of each group of devices, in all layers; -1 for none."""

  def own(stored, source_1X, target_1X):
    pages = len(stored) // pool.layers
    first_L1 = jnp.arange(pool.layers, dtype=jnp.int32)[:, None] * pages
    rows = stored.at[first_L1 + source_1X].get(mode="clip")
    to_LX = jnp.where(target_1X < 0, len(stored), first_L1 + target_1X)
    return stored.at[to_LX].set(rows, mode="drop")

  rules = cfg.rules
  per_page, per_group = rules("batch"), rules("batch", None)
  run = sharding.local(
    own, (per_page, per_group, per_group), per_page, differentiable=False
  )
  move = lambda stored: run(
    stored, *(sharding.put(x, per_group) for x in (source, target))
  )
  return jax.tree.map(move, pool)


@functools.partial(
  jax.jit,
  static_argnames=("graphdef", "kind"),
  donate_argnames=("pool", "slots"),
  compiler_options={"xla_gpu_enable_command_buffer": _IN_GRAPHS},
)
def decode(
  graphdef: Model,
  params: nnx.State,
  pool: cache_lib.Pool,
  slots: state.Slots,
  pages: Int[np.ndarray | Array, "B P"],
  stays: Bool[np.ndarray | Array, " B"],
  hurries: Bool[np.ndarray | Array, ""],
  *,
  kind: Kind,
) -> tuple[cache_lib.Pool, state.Slots, Decoded]:
  """Samples up to n tokens for each sequence, or 2 n with drafts.

  Args:
    graphdef: The model without its parameters.
    params: Its parameters.
    pool: The cache.
    slots: The sequences.
    pages: Of each slot's sequence, with room for all that is sampled.
    stays: Slots whose sequences go on; the others end before the first step.
    hurries: Whether to return as soon as a sequence ends, for one that waits.
    kind: What this is compiled for.
  """
  model = nnx.merge(graphdef, params)
  step = functools.partial(_step, model, pages=pages, kind=kind)
  slots = dataclasses.replace(slots, live=slots.live & stays)
  results = _nothing(model.config, kind, len(stays))
  lives = slots.live

  def goes_on(carry):
    i, _, slots, _ = carry
    ended = jnp.any(lives & ~slots.live)
    return (i < kind.steps) & slots.live.any() & ~(hurries & ended)

  def body(carry):
    i, pool, slots, results = carry
    pool, slots, result = step(pool, slots)
    results = jax.tree.map(
      lambda xs, x: jax.lax.dynamic_update_index_in_dim(xs, x, i, 0),
      *(results, result),
    )
    return i + 1, pool, slots, results

  _, pool, slots, results = jax.lax.while_loop(
    goes_on, body, (jnp.int32(0), pool, slots, results)
  )
  return pool, slots, results


def _nothing(cfg: config_lib.ModelConfig, kind: Kind, slots: int) -> Decoded:
  """Results of steps that have not been taken."""
  n, T = kind.steps, 2 if kind.speculates else 1
  J, words = cfg.experts_per_token, -(-cfg.vocab_size // 32)

  def filled(shape, dtype, value=0):
    return jnp.full(
      (n, *shape),
      value,
      dtype,
      out_sharding=cfg.rules(*(None,) * (len(shape) + 1)),
    )

  each = slots, T
  experts = (cfg.num_moe_layers, *each, J)
  selected = (cfg.num_layers, *each, cfg.top_k)
  return Decoded(
    filled(each, jnp.int32, -1),
    filled((slots,), jnp.bool),
    filled(each, jnp.float32),
    filled(each, jnp.float32),
    filled((*each, words), jnp.uint32) if kind.kept else None,
    filled(experts, jnp.uint16) if kind.experts else None,
    filled(selected, jnp.int32) if kind.selected else None,
  )


def _step(model, pool, slots, *, pages, kind):
  """One token for each sequence, or two where a draft was right."""
  cfg, live = model.config, slots.live
  # A draft is verified where its own successor could still be sampled.
  drafted = live & (slots.draft >= 0) & (slots.left > 1)
  tokens_BT = slots.pending[:, None]
  if kind.speculates:
    draft_B = jnp.maximum(slots.draft, 0)
    tokens_BT = jnp.stack([slots.pending, draft_B], 1)
  T = tokens_BT.shape[1]

  def frame_of(count):
    return frame_lib.make_cached_frame(
      *(cfg, pages, pool.page_size, slots.length, count, T),
      attention=kind.attention,
    )

  frame = frame_of(jnp.where(live, 1 + drafted, 0).astype(jnp.int32))
  done = model.decode(tokens_BT, frame, pool)
  pool = done.pool
  logits_BTV = model.head(done.hidden)
  drawn = _sample(cfg, logits_BTV, slots.how, slots.length + 1, kind.kept)
  y_BT = drawn.tokens
  stops_BT = jnp.any(y_BT[..., None] == slots.stop_ids[:, None], -1)
  given_BT = live[:, None]
  if kind.speculates:
    accepted = drafted & (y_BT[:, 0] == slots.draft) & ~stops_BT[:, 0]
    given_BT = jnp.stack([live, accepted], 1)
  count_B = given_BT.sum(1, dtype=jnp.int32)
  last_B1 = jnp.maximum(count_B - 1, 0)[:, None]
  last = lambda x_BT: jnp.take_along_axis(x_BT, last_B1, 1)[:, 0]
  left = slots.left - count_B
  after = dataclasses.replace(
    slots,
    length=slots.length + count_B,
    pending=jnp.where(live, last(y_BT), slots.pending),
    left=left,
    live=live & (left > 0) & ~last(stops_BT),
  )
  if kind.speculates:
    hidden, pool = model.draft(y_BT, done.hidden, frame_of(count_B), pool)
    at_B11 = sharding.put(last_B1, cfg.rules("batch", None))[..., None]
    hidden_B1D = jnp.take_along_axis(hidden, at_B11, 1)
    guess = _sample(
      *(cfg, model.head(hidden_B1D), slots.how, after.length + 1, False)
    )
    after = dataclasses.replace(after, draft=guess.tokens[:, 0])
  result = Decoded(
    jnp.where(given_BT, y_BT, -1),
    drafted if kind.speculates else jnp.zeros_like(live),
    drawn.log_probs,
    drawn.untruncated,
    drawn.kept,
    _everywhere(cfg, _small(done.experts)) if kind.experts else None,
    _everywhere(cfg, done.selected) if kind.selected else None,
  )
  return pool, after, result


def _sample(cfg, logits_BTV, how, position_B, keep):
  """Samples at T positions in a row, of which `position_B` is the first."""
  rules, T = cfg.rules, logits_BTV.shape[1]
  each, tree = jax.tree.flatten(how)

  def own(logits_BTV, position_B, *each):
    position_BT = position_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    drawn = sampling.sample(
      logits_BTV.reshape(-1, logits_BTV.shape[-1]),
      jax.tree.unflatten(tree, [jnp.repeat(x, T) for x in each]),
      position_BT.reshape(-1),
      keep=keep,
    )
    return [x.reshape(-1, T, *x.shape[1:]) for x in jax.tree.leaves(drawn)]

  run = sharding.local(
    own,
    (rules("batch", None, None), *[rules("batch")] * (1 + len(each))),
    [rules("batch", None)] * 3 + [rules("batch", None, None)] * keep,
    differentiable=False,
  )
  drawn = _everywhere(cfg, run(logits_BTV, position_B, *each))
  return sampling.Sampled(*drawn, *[None] * (not keep))


def _small(experts: Int[Array, "..."] | None) -> UInt16[Array, "..."]:
  """Numbers of experts in as few bytes as hold them."""
  assert experts is not None  # the model has some, see `engine`
  return experts.astype(jnp.uint16)


def _everywhere(cfg: config_lib.ModelConfig, tree: Any) -> Any:
  """Arrays as every device, and so every process, has them whole."""
  return jax.tree.map(
    lambda x: sharding.put(x, cfg.rules(*(None,) * x.ndim)), tree
  )
