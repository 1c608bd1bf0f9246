"""A stage's batches on the devices.

Letters: A microbatches, B sequences of a step, T tokens.
"""

from typing import Any

import jax
import numpy as np

from dsa_jax import sharding
from train.data import corpus as corpus_lib
from train.host import processes
from train.learn import stages as stages_lib
from train.learn import step as step_lib


class Batches:
  """Global arrays [A, B / A, T]; each process reads its own rows only.

  A row of all microbatches comes from one shard of the corpus, so that the data
  are the same on every mesh and for every number of processes.
  """

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    stage: stages_lib.StageConfig,
    rules: sharding.ShardingRules,
    seed: int,
    shards: int,
  ):
    """Opens the shards that this process's devices need; needs a mesh."""
    rows = stage.batch_size // stage.microbatches
    self._shape = (stage.microbatches, rows, stage.seq_len)
    self._sharding = jax.NamedSharding(
      jax.sharding.get_mesh(), rules(None, "batch", None) or jax.P()
    )
    here = processes.parts_here(shards, self._shape, 1, self._sharding)
    self._shards = {
      shard: corpus.batches(
        seq_len=stage.seq_len,
        batch_size=stage.batch_size // shards,
        seed=seed,
        shard=shard,
      )
      for shard in here
    }
    self._remember()

  def __next__(self) -> step_lib.Batch:
    """The next batch.

    Raises:
      DataError: The data of some shard cannot be read; `get_state` is still
        that of the batch before, whichever shards have moved on.
    """
    read = {shard: next(rows) for shard, rows in self._shards.items()}
    self._remember()
    A, _, T = self._shape
    batch = {}
    for name in step_lib.BATCH_DTYPES:
      parts = {s: x[name].reshape(A, -1, T) for s, x in read.items()}
      batch[name] = processes.put_parts(parts, self._shape, 1, self._sharding)
    return batch

  def get_state(self) -> dict[str, corpus_lib.State]:
    """Where every shard stands; all processes call, and all get the same."""
    everywhere = processes.gather_json(self._states)
    return {str(shard): state for shard, state in sorted(everywhere.items())}

  def set_state(self, state: dict[str, corpus_lib.State]) -> None:
    """Goes back to where `get_state` was called, on whatever mesh.

    Raises:
      DataError: It is of other data, or of another number of shards.
    """
    for shard, rows in self._shards.items():
      if str(shard) not in state:
        raise corpus_lib.DataError(
          f"The saved data have {len(state)} shards, and shard {shard} is not "
          "one of them: give the same data.shards."
        )
      rows.set_state(state[str(shard)])
    self._remember()

  def _remember(self) -> None:
    self._states = {s: rows.get_state() for s, rows in self._shards.items()}

  def close(self) -> None:
    for rows in self._shards.values():
      rows.close()


def compare(corpus: corpus_lib.Corpus, state: dict[str, Any]) -> None:
  """Compares the data with those that `Batches.get_state` was called on.

  In whatever stage that was: the places in it may mean nothing to this one.

  Raises:
    DataError: They have changed, see `Corpus.compare`.
  """
  if state:
    corpus.compare(state["0"].get("manifest"))


def put_rows(x: np.ndarray, rules: sharding.ShardingRules) -> jax.Array:
  """An array [B, ...] that every process has, its rows over the devices."""
  spec = rules("batch", *(None,) * (x.ndim - 1)) or jax.P()
  sharded = jax.NamedSharding(jax.sharding.get_mesh(), spec)
  return processes.put(x, sharded)
