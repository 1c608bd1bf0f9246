"""train.main on a tiny run, as the fault harness launches it.

python -m tests.faults.program WORK BATCHES STAGES [OPTION ...]

STAGES are the kinds of its stages, with commas between. WORK holds the run's
text and what was compiled; `Attempt` makes it. A checksum of each batch, as
this process has it, is appended to the file BATCHES. Nothing in train/ knows of
this.
"""

import dataclasses
import pathlib
import sys
import zlib

from train.host import program

if __name__ == "__main__":
  program.begin()

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax import embed
from tests.train import runs
from train import config as config_lib
from train import main
from train.data import corpus as corpus_lib
from train.learn import batches as batches_lib
from train.run import checkpoint as checkpoint_lib


def config(work: pathlib.Path, kinds: list[str]) -> config_lib.TrainConfig:
  """Stages that a CPU traces, loads and trains in some seconds each.

  A block of the data is used up within a stage, S = 5 K, and each shard of the
  data is a process's own where there are two.
  """
  cfg = runs.config(work)
  return dataclasses.replace(
    cfg,
    # One kind of layer, so that there is less to trace.
    model=dataclasses.replace(runs.MODEL, num_dense_layers=0, num_mtp_layers=0),
    data=dataclasses.replace(
      cfg.data,
      sources=(corpus_lib.SourceConfig(path=f"{work}/text/*.txt"),),
      shards=2,
    ),
    stages=tuple(
      dataclasses.replace(stage, steps=20)
      for stage in cfg.stages
      if stage.kind in kinds
    ),
    checkpoint=checkpoint_lib.CheckpointConfig(every=4, keep=2),
    log=dataclasses.replace(cfg.log, eval_every=6),
  )


def checksum(batch: dict[str, jax.Array]) -> str:
  """Of the parts of the arrays that lie in this process."""
  crc = 0
  for name in sorted(batch):
    for part in batch[name].addressable_shards:
      crc = zlib.crc32(np.asarray(part.data).tobytes(), crc)
  return f"{crc:08x}"


def note_batches(work: pathlib.Path, batches: pathlib.Path) -> None:
  """Has every batch noted, and poisons those that WORK/poisoned names.

  A file WORK/poison asks for the next batch to be named there. It then is
  poisoned whenever it comes again, as it would be on a disk.
  """
  read = batches_lib.Batches.__next__
  poison, poisoned = work / "poison", work / "poisoned"

  def noted(self):
    batch = read(self)
    name = checksum(batch)
    with batches.open("a", encoding="utf-8") as out:
      out.write(name + "\n")
    if poison.exists():
      with poisoned.open("a", encoding="utf-8") as out:
        out.write(name + "\n")
      poison.unlink()
    if poisoned.exists() and name in poisoned.read_text(encoding="utf-8"):
      batch = batch | {"tokens": jnp.full_like(batch["tokens"], -1)}
    return batch

  batches_lib.Batches.__next__ = noted


def embed_poison() -> None:
  """Makes token -1 not a number; no token can do that to the model as it is."""
  call = embed.Embed.__call__

  def poisonous(self, tokens):
    return jnp.where((tokens < 0)[..., None], jnp.nan, call(self, tokens))

  embed.Embed.__call__ = poisonous


def prepare(work: pathlib.Path, kinds: list[str]) -> None:
  """Has train.main compile fast, and train what `config` gives."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 1)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # Compiling is most of the time here.
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  config_lib.load = lambda path: config(work, kinds)


if __name__ == "__main__":
  work, batches = map(pathlib.Path, sys.argv[1:3])
  prepare(work, sys.argv[3].split(","))
  note_batches(work, batches)
  embed_poison()
  sys.argv = ["train.main", "--config=tiny", *sys.argv[4:]]
  program.run(main.main)
