"""Preflight checks: everything short of training, and whether it fits."""

from collections.abc import Iterator
import math
import os
import pathlib
import shutil

import jax
import numpy as np

from train import config as config_lib
from train import loop
from train.data import corpus as corpus_lib
from train.host import ownership
from train.host import processes
from train.learn import batches as batches_lib
from train.learn import step as step_lib
from train.run import metrics as metrics_lib
from train.run import origin as origin_lib
from train.run import run_folder

# Of each stage's first batch: rows, and characters of a document.
_ROWS, _CHARACTERS = 2, 120
# A run that is stopped saves too; the disk should hold as many of these.
_INTERRUPTIONS = 3


def report(cfg: config_lib.TrainConfig) -> None:
  """Opens and prints all that a run needs; changes nothing in its folder.

  Raises:
    ValueError: The run cannot begin or go on, or fit; see also `loop.Run`.
  """
  run = loop.Run(cfg)
  with jax.set_mesh(run.mesh):
    processes.say(run.summary())
    processes.say(_short(cfg))
    if processes.is_first():
      for i in range(len(cfg.stages)):
        for line in _sample(cfg, run.corpus, i):
          processes.say(line)
    states = [run.shapes(stage) for stage in cfg.stages]
  processes.say(_memory(states, run.mesh))
  processes.say(_disk(cfg, [_size(state) for state in states]))
  processes.say(_origin(cfg, run))
  if owner := ownership.find(cfg.run_dir):
    processes.say(f"owned    by {owner}: it would have to end first")
  processes.say("ok")


def _short(cfg: config_lib.TrainConfig) -> str:
  """Describes what the run's summary leaves out."""
  optimizer, save, log = cfg.optimizer, cfg.checkpoint, cfg.log
  return (
    f"learns   at {optimizer.peak_lr:g}, the indexer at"
    f" {optimizer.indexer_lr:g}; moments in {optimizer.moments}; seed"
    f" {cfg.seed}\n"
    f"saves    every {save.every} steps, evaluates every {log.eval_every},"
    f" samples every {log.sample_every}"
  )


def _sample(
  cfg: config_lib.TrainConfig, corpus: corpus_lib.Corpus, i: int
) -> Iterator[str]:
  """The beginnings of documents in the first rows that stage `i` trains on."""
  stage = cfg.stages[i]
  batches = corpus.batches(
    seq_len=stage.seq_len,
    batch_size=stage.batch_size // cfg.data.shards,
    seed=cfg.seed + i,
  )
  batch = next(batches)
  batches.close()
  rate = batch["bytes"].sum() / max((batch["segment_ids"] > 0).sum(), 1)
  yield f"batch    stage {i} begins with; {rate:.2f} bytes a token"
  for row in range(min(_ROWS, len(batch["tokens"]))):
    tokens, segments = batch["tokens"][row], batch["segment_ids"][row]
    padding = np.sum(segments == 0)
    padded = f", {padding} of them padding" if padding else ""
    yield (
      f"  row {row}: {len(tokens)} tokens{padded}; documents: {segments.max()}"
    )
    for segment in range(1, segments.max() + 1):
      piece = tokens[segments == segment]
      text = corpus.tokenizer.decode(piece)
      more = "..." if len(text) > _CHARACTERS else ""
      yield f"    {len(piece):>6} | {text[:_CHARACTERS]!r}{more}"


def _size(state: step_lib.TrainState) -> int:
  """Bytes of a checkpoint."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _memory(states: list[step_lib.TrainState], mesh: jax.sharding.Mesh) -> str:
  """Compares the largest state on a device with the device's memory."""
  held = max(
    sum(
      int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
      for x in jax.tree.leaves(step_lib.on_mesh(state, mesh))
    )
    for state in states
  )
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get("bytes_limit")
  if limit is not None and held > limit:
    raise ValueError(
      f"Parameters and optimizer take {metrics_lib.size(held)} of each device,"
      f" which has {metrics_lib.size(limit)}: raise --mesh.fsdp or another axis"
      " that shares them."
    )
  known = "unknown" if limit is None else metrics_lib.size(limit)
  return (
    f"memory   {metrics_lib.size(held)} of parameters and optimizer a device;"
    f" its memory: {known}. Gradients and activations come besides:"
    " --compile-only counts them"
  )


def _disk(cfg: config_lib.TrainConfig, sizes: list[int]) -> str:
  """Compares the disk space that checkpoints need with what is free.

  Those of stages' ends stay; the newest do, and what else is asked for; and one
  more is written before the oldest goes. They are no more than are saved.
  """
  folder = pathlib.Path(cfg.run_dir).resolve()
  there = run_folder.checkpoints(folder)
  while not folder.exists():
    folder = folder.parent
  if not os.access(folder, os.W_OK):
    raise ValueError(f"{folder} cannot be written to; give another --run-dir.")
  save, steps = cfg.checkpoint, cfg.total_steps
  number = save.keep + save.keep_best + 1
  if save.keep_every is not None:
    number += steps // math.lcm(save.every, save.keep_every)
  number = min(number, steps // save.every + _INTERRUPTIONS)
  largest = max(sizes)
  needed = sum(sizes) + number * largest
  left = max(needed - len(there) * largest, 0)
  free = shutil.disk_usage(folder).free
  size = metrics_lib.size
  if left > free:
    raise ValueError(
      f"Checkpoints of {size(largest)} will take {size(needed)}, {size(left)}"
      f" of it new, but {folder} has {size(free)} free: lower"
      f" --checkpoint.keep={cfg.checkpoint.keep}, make room, or give another"
      " --run-dir."
    )
  return (
    f"disk     checkpoints of {size(largest)}: {size(needed)} with those of"
    f" {len(sizes)} stages' ends; {size(free)} free"
  )


def _origin(cfg: config_lib.TrainConfig, run: loop.Run) -> str:
  """Opens what the run begins with; compares it with the model and the data."""
  found = origin_lib.find(pathlib.Path(cfg.run_dir).resolve())
  if cfg.resume and found:
    origin = origin_lib.Origin(str(found), cfg.model)
    batches_lib.compare(run.corpus, origin.progress().get("data", {}))
    return f"resumes  {origin}"
  if run.origin is not None:
    return f"begins   with the parameters of {run.origin}"
  return f"begins   with random parameters, seed {cfg.seed}"
