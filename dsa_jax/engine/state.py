"""What the device knows of the sequences that are being decoded.

Every array is the same on all devices of a mesh, so that each process can read
what comes of them.

Letters: B slots.
"""

import dataclasses
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from dsa_jax import config as config_lib
from dsa_jax import sharding
from dsa_jax.engine import request as request_lib
from dsa_jax.engine import sampling
from dsa_jax.engine import sequence as sequence_lib

STOP_IDS: Final = request_lib.MOST_STOP_IDS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """Sequences, one a slot."""

  how: sampling.Sampling
  length: Int[Array | np.ndarray, " B"]
  """Tokens in the cache."""
  pending: Int[Array | np.ndarray, " B"]
  """The token after them, known, but not yet in the cache."""
  draft: Int[Array | np.ndarray, " B"]
  """What MTP expects after that one; -1 for nothing."""
  left: Int[Array | np.ndarray, " B"]
  """Tokens that may still be sampled."""
  live: Bool[Array | np.ndarray, " B"]
  """Slots that have a sequence, and tokens left."""
  stop_ids: Int[Array | np.ndarray, "B 8"]
  """Tokens that end a sequence; -1 fills them up."""


def empty(cfg: config_lib.ModelConfig, slots: int) -> Slots:
  """Slots without sequences."""
  return jax.tree.map(
    lambda x: sharding.put(x, cfg.rules(*(None,) * x.ndim)), blank(slots)
  )


def blank(slots: int) -> Slots:
  """The same on the host, where they can be written to."""
  zeros = lambda dtype: np.zeros(slots, dtype)
  return Slots(
    how=sampling.Sampling(
      temperature=zeros(np.float32),
      top_k=zeros(np.int32),
      top_p=np.ones(slots, np.float32),
      min_p=zeros(np.float32),
      seed=zeros(np.uint32),
    ),
    length=zeros(np.int32),
    pending=zeros(np.int32),
    draft=np.full(slots, -1, np.int32),
    left=zeros(np.int32),
    live=zeros(bool),
    stop_ids=np.full((slots, STOP_IDS), -1, np.int32),
  )


def admitted(
  slots: Slots, fresh: Slots, is_fresh: Bool[Array | np.ndarray, " B"]
) -> Slots:
  """The slots with these sequences in those that are fresh."""
  choose = lambda new, old: jnp.where(
    is_fresh.reshape(-1, *(1,) * (old.ndim - 1)), new, old
  )
  return jax.tree.map(choose, fresh, slots)


def write(slots: Slots, slot: int, sequence: sequence_lib.Sequence) -> None:
  """Writes a sequence whose prompt is cached into a slot, on the host."""
  params = sequence.prompt.request.params
  slots.how.temperature[slot] = params.temperature
  slots.how.top_k[slot] = params.top_k
  slots.how.top_p[slot] = params.top_p
  slots.how.min_p[slot] = params.min_p
  slots.how.seed[slot] = sequence.seed
  slots.length[slot] = sequence.target
  slots.pending[slot] = sequence.known[sequence.target]
  slots.left[slot] = params.max_tokens - len(sequence.tokens)
  slots.live[slot] = True
  slots.stop_ids[slot, : len(params.stop_ids)] = params.stop_ids
