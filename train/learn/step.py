"""The training step: pure, compiled once a stage.

Letters: B sequences, T tokens, A microbatches, L layers, E experts.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Final, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

import dsa_jax
from dsa_jax import losses as losses_lib
from dsa_jax import moe
from dsa_jax import transformer
from train.learn import guards
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib

type Batch = dict[str, jax.Array]  # of `BATCH_DTYPES`
type Parameters = tuple[nnx.State, nnx.State]
"""A model's parameters, and its routers' biases."""
type Metrics = dict[str, jax.Array]

BATCH_DTYPES: Final = {
  "tokens": "int32",
  "segment_ids": "int32",
  "positions": "int32",
  "bytes": "float32",
  "sources": "int32",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes."""

  step: Any  # Int[Array, ""]
  """Steps done, over all stages."""
  params: nnx.State
  router_bias: nnx.State
  opt_state: optax.OptState
  guard: guards.GuardState

  @property
  def parameters(self) -> Parameters:
    """What the model computes with, whatever stage trains it."""
    return self.params, self.router_bias


type TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Model:
  """The parts of a module: what to merge parameters with."""

  graphdef: nnx.GraphDef[dsa_jax.Transformer]

  def merge(
    self, params: nnx.State, router_bias: nnx.State
  ) -> dsa_jax.Transformer:
    return nnx.merge(self.graphdef, params, router_bias)


def split(
  model: dsa_jax.Transformer,
) -> tuple[Model, nnx.State, nnx.State]:
  """The model's structure, its parameters, and its routers' biases."""
  graphdef, params, bias = nnx.split(model, nnx.Param, moe.RouterBias)
  return Model(graphdef), params, bias


def init(
  cfg: dsa_jax.ModelConfig, seed: int
) -> tuple[Model, Callable[[jax.Array], Parameters]]:
  """The model's structure, and what makes parameters and biases from a key."""

  def make(key):
    return dsa_jax.Transformer(cfg, rngs=nnx.Rngs(key))

  model, _, _ = split(nnx.eval_shape(lambda: make(jax.random.key(seed))))
  return model, jax.jit(lambda key: split(make(key))[1:])


@functools.partial(jax.jit, static_argnames=("cfg", "stage"))
def begin_stage(
  cfg: optimizer_lib.OptimizerConfig,
  stage: stages_lib.StageConfig,
  params: nnx.State,
  router_bias: nnx.State,
  step: Int[Array, ""] | int = 0,
) -> TrainState:
  """The state in which a stage begins: its optimizer knows nothing yet."""
  optimizer = optimizer_lib.make_optimizer(cfg, stage)
  trained, _ = optimizer_lib.split(params, stage)
  opt_state = optimizer.init(trained)
  return TrainState(
    jnp.int32(step), params, router_bias, opt_state, guards.begin()
  )


def on_mesh[Tree](tree: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """The same shapes, with their specs on `mesh`."""

  def shape_on_mesh(x):
    spec = x.sharding.spec if x.sharding else jax.P()
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(shape_on_mesh, tree)


def make_train_step(
  model: Model,
  stage: stages_lib.StageConfig,
  optimizer: optax.GradientTransformation,
  guard: guards.GuardConfig,
  measure_every: int = 1,
  num_sources: int = 1,
) -> jax.stages.Wrapped:
  """`train_step(state, batch) -> (state, metrics)`, with `state` donated.

  Only what the stage trains is differentiated, and all else stays bit for bit;
  so does all but the count of steps where `guard` does not believe the step.

  Each array of the batch is [A, B / A, T]. Losses are means over what the whole
  batch holds, so that neither A nor padding nor packing changes them:
    lm: nats over tokens with a next one in their document; mtp: likewise
    index: KL over queries that see a key, summed over layers; of layers that
      share an indexer, their mean
    balance: over sequences, summed over layers
  The KL and recall of each layer ("index_per_layer", "recall_per_layer") are
  measured in one step of `measure_every`; in the others they are 0. "tokens"
  are counted by source, "skipped" since the stage began, "in_a_row" up to here.
  """

  @jax.jit(donate_argnames="state")
  def train_step(state: TrainState, batch: Batch):
    counts = _counts(batch["segment_ids"])
    measure = (state.step + 1) % measure_every == 0
    trained, frozen = optimizer_lib.split(state.params, stage)

    gradient = jax.grad(functools.partial(_loss, model, stage), has_aux=True)
    grads, aux = _accumulate(
      lambda part: gradient(
        *(trained, frozen, state.router_bias, part, counts, measure)
      ),
      batch,
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    bias = state.router_bias
    if stage.trains_model:
      bias = balance(bias, aux["load"], stage.router_bias_rate)
    norms = optimizer_lib.norms(grads)
    loss = aux["parts"].get("lm", jnp.float32(0))
    believed, guard_state = guards.judge(
      state.guard,
      jnp.stack([loss, norms["grad_norm"]]),
      optax.tree.norm(updates),
      guard.spike_deviations,
    )
    trained, opt_state, bias = jax.tree.map(
      lambda new, old: jnp.where(believed, new, old),
      (optax.apply_updates(trained, updates), opt_state, bias),
      (trained, state.opt_state, state.router_bias),
    )
    metrics = {
      **aux["parts"],
      **norms,
      "bytes": _next_bytes(batch),
      "targets": counts["lm"],
      "tokens": _tokens_by_source(batch, num_sources),
      "skipped": guard_state.skipped,
      "in_a_row": guard_state.in_a_row,
      **load_metrics(aux["load"]),
    }
    if aux["recall"] is not None:
      held, queries = aux["recall"]
      # NaN where none can be asked.
      metrics["recall_per_layer"] = held / queries
    params = optimizer_lib.merge(trained, frozen)
    state = TrainState(state.step + 1, params, bias, opt_state, guard_state)
    return state, metrics

  return train_step


def _loss(model, stage, trained, frozen, router_bias, batch, counts, measure):
  """The loss of a microbatch, and what the step does with its parts."""
  params = optimizer_lib.merge(trained, frozen)
  losses = model.merge(params, router_bias).losses(
    batch["tokens"],
    batch["positions"],
    batch["segment_ids"],
    attention=stage.attention,
    lm_loss=stage.trains_model,
    index_loss=stage.trains_indexer,
    measure=measure,
  )
  parts, total = {}, jnp.float32(0)
  if losses.lm is not None:
    parts["lm"] = losses.lm.sum() / counts["lm"]
    total += parts["lm"]
  if losses.mtp is not None:
    parts["mtp"] = losses.mtp.sum() / counts["mtp"]
    total += stage.mtp_weight * parts["mtp"]
  if losses.balance is not None and stage.trains_model:
    parts["balance"] = losses.balance.sum() / counts["rows"]
    total += stage.balance_weight * parts["balance"]
  if losses.index is not None:
    parts["index_per_layer"] = losses.index.sum((1, 2)) / counts["queries"]
    total += parts["index_per_layer"].sum()
  load = jnp.zeros((0, 1)) if losses.load is None else losses.load
  return total, {"parts": parts, "load": load, "recall": recall(losses)}


def _accumulate[Sums](gradient: Callable[[Batch], Sums], batch: Batch) -> Sums:
  """Sums `gradient(part)` over the microbatches of a batch [A, B / A, T].

  In fp32, whatever the dtype of the parameters.
  """

  @jax.jit  # traced once, for its shapes and for the scan
  def of_part(part):
    return jax.tree.map(lambda x: x.astype(jnp.float32), gradient(part))

  def microbatch(total, part):
    return jax.tree.map(jnp.add, total, of_part(part)), None

  shapes = jax.eval_shape(of_part, {name: x[0] for name, x in batch.items()})
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), shapes
  )
  return jax.lax.scan(microbatch, zeros, batch)[0]


def recall(
  losses: transformer.Losses,
) -> tuple[jax.Array, jax.Array] | None:
  """Sum of each layer's recall over the queries that count; their number."""
  if losses.recall is None or losses.recall_queries is None:
    return None
  counted = losses.recall_queries
  held = jnp.where(counted, losses.recall, 0.0).sum((1, 2))
  return held, counted.sum(dtype=jnp.float32)


@functools.lru_cache  # stages of one model share what is compiled
def make_eval_step(
  model: Model, attention: Literal["dense", "sparse"]
) -> Callable[[Parameters, Batch], dict[str, jax.Array]]:
  """Sums over a batch [B, T]: nats of its targets, the bytes they stand for,
  and of sparse attention each layer's recall and the number of its queries."""

  @jax.jit
  def eval_step(parameters: Parameters, batch: Batch):
    losses = model.merge(*parameters).losses(
      batch["tokens"],
      batch["positions"],
      batch["segment_ids"],
      attention=attention,
      lm_loss=True,
      index_loss=attention == "sparse",
    )
    assert losses.lm is not None  # it was asked for
    sums = {"nats": losses.lm.sum(), "bytes": _next_bytes(batch)}
    if (held := recall(losses)) is not None:
      sums["recall"], sums["queries"] = held
    return sums

  return eval_step


def balance[Biases](
  bias: Biases, load: Float[Array, "L E"], rate: float
) -> Biases:
  """Moves the bias of overloaded experts down and of idle ones up, by `rate`.

  (DeepSeek-V3, 2.1.2.) `load` is over the whole batch. Its layers come in the
  order of the leaves of `bias`: moe_layers, then mtp.
  """
  step = rate * jnp.sign(load.mean(-1, keepdims=True) - load)
  leaves, treedef = jax.tree.flatten(bias)
  moved, first = [], 0
  for leaf in leaves:
    layers = leaf.size // load.shape[-1]
    moved.append(leaf + step[first : first + layers].reshape(leaf.shape))
    first += layers
  return jax.tree.unflatten(treedef, moved)


def _counts(segment_ids: Int[Array, "A B T"]) -> dict[str, jax.Array]:
  """Counts what the losses average over: tokens, queries, rows; at least 1."""
  counts = {
    "lm": losses_lib.has_target(segment_ids, 1),
    "mtp": losses_lib.has_target(segment_ids, 2),
    "queries": segment_ids > 0,
    "rows": jnp.ones(segment_ids.shape[:2], bool),
  }
  # As integers: in fp32 a sum of ones may stand still at 2^24.
  return {
    name: jnp.maximum(marked.sum(dtype=jnp.int32), 1).astype(jnp.float32)
    for name, marked in counts.items()
  }


def _tokens_by_source(batch: Batch, num_sources: int) -> Int[Array, " sources"]:
  real, source = batch["segment_ids"] > 0, batch["sources"]
  return jnp.stack(
    [(real & (source == i)).sum(dtype=jnp.int32) for i in range(num_sources)]
  )


def _next_bytes(batch: Batch) -> Float[Array, ""]:
  """UTF-8 bytes of all targets."""
  has_target = losses_lib.has_target(batch["segment_ids"])
  return jnp.where(has_target, losses_lib.shift(batch["bytes"], 1), 0).sum()


def load_metrics(load: Float[Array, "L E"]) -> Metrics:
  """How the batch's tokens are spread.

  max_load: of the busiest expert of any layer, 1 being its share
  dead_experts: those of all layers that have none
  collapsed_layers: those in which half of the experts or more have none
  """
  if not load.size:
    return {}
  share = load / jnp.maximum(load.mean(-1, keepdims=True), 1)
  dead = (load == 0).sum(-1)
  return {
    "max_load": share.max(),
    "dead_experts": dead.sum(),
    "collapsed_layers": (2 * dead >= load.shape[-1]).sum(),
  }
