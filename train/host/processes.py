"""Several processes that run one program, one for each host of a pod.

The first of them alone writes the log, the metrics and what else a person
reads; checkpoints are written by all, together.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
from importlib import metadata
from importlib import util
import itertools
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
import traceback
from typing import Any, Final

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from dsa_jax import ranges
from train.host import program

# A process that says nothing for so long is dead; the others end as well.
_SILENCE_SECONDS = 30
_START_SECONDS = 60  # in which all must have been started
# The others are waited for as long as they are alive: they may be compiling.
_MEETING_SECONDS = 3600
# Flag of XLA that holds the options of one backend.
_CPU_OPTIONS = "xla_backend_extra_options"
# How often all have met. No meeting has the name of another.
_meetings = itertools.count()

# Where what is said goes too, see `log_to`; and whether it did the last time.
_log: pathlib.Path | None = None
_logs = True
# What a terminal obeys rather than shows, and half characters; lines stay.
_CONTROLS: Final = {
  i: f"\\x{i:02x}"
  for i in (*range(32), *range(127, 160))
  if chr(i) not in "\n\t"
} | {
  i: f"\\u{i:04x}"
  for i in (
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
  )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
  """Where the other processes are. By default there are none."""

  auto: bool = False
  """Find them as JAX does: on TPU pods, under Slurm, Open MPI or Kubernetes."""
  coordinator: ranges.Text | None = None
  """Address of the first process, HOST:PORT, in place of `auto`. It is waited
  for, and so are the others, for a minute."""
  processes: ranges.Count | None = None
  """How many there are; with `coordinator`."""
  process: ranges.Index | None = None
  """The number of this one, from 0; with `coordinator`."""

  def __post_init__(self):
    ranges.check(self)
    given = [self.coordinator, self.processes, self.process]
    if self.auto and any(x is not None for x in given):
      raise ValueError(
        "distributed.auto finds the processes itself: leave out coordinator, "
        "processes and process."
      )
    if any(x is not None for x in given) and None in given:
      raise ValueError(
        f"{self.coordinator=}, {self.processes=} and {self.process=} belong "
        "together: give all three, or distributed.auto alone."
      )
    if self.coordinator is not None:
      host, _, port = self.coordinator.rpartition(":")
      is_port = re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16
      if not host or not is_port:
        raise ValueError(
          f"{self.coordinator=} is no HOST:PORT, such as host0:8476."
        )
    if self.processes is not None and self.process is not None:
      if self.process >= self.processes:
        raise ValueError(f"{self.process=} must be below {self.processes=}.")


def configure_platform(devices: pathlib.Path = pathlib.Path("/dev")) -> None:
  """Settles where JAX runs, and how XLA compiles there; call it before either.

  JAX is kept on the CPU where there is nothing else. An installed libtpu (it
  compiles for TPUs anywhere) is otherwise tried as a device, and complains.
  Nothing changes where a platform is chosen already, as JAX does where it sees
  a TPU; where there is any device file of one; or where a plug-in for other
  devices, such as CUDA's, is installed.

  On a CPU, XLA is told not to unroll loops, unless XLA_FLAGS has options for it
  already: its kernels are short and vectorised, so that a training step
  compiles a quarter faster and runs no slower.
  """
  chosen = jax.config.jax_platforms or "JAX_FORCE_TPU_INIT" in os.environ
  files = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
  plugins = metadata.entry_points(group="jax_plugins")
  others = files or plugins or util.find_spec("jax_plugins")
  if not chosen and not others:
    jax.config.update("jax_platforms", "cpu")
  flags = os.environ.get("XLA_FLAGS", "")
  if jax.config.jax_platforms == "cpu" and _CPU_OPTIONS not in flags:
    flags += f" --{_CPU_OPTIONS}=xla_cpu_disable_loop_unrolling=true"
    os.environ["XLA_FLAGS"] = flags.strip()


def start(cfg: DistributedConfig) -> None:
  """Meets the other processes, if there are any, before JAX does anything.

  Raises:
    ValueError: They cannot be found. If they do not all come within a minute,
      the program ends with a line that says so: JAX, which waits, would abort.
  """
  if not cfg.auto and cfg.coordinator is None:
    return
  impatience = threading.Timer(_START_SECONDS, _give_up)
  impatience.daemon = True
  impatience.start()
  try:
    if cfg.coordinator is not None:
      host, _, port = cfg.coordinator.rpartition(":")
      socket.getaddrinfo(host.strip("[]"), int(port))
      print(
        f"waiting for {cfg.processes} processes at {cfg.coordinator}, for"
        f" {_START_SECONDS} seconds at most",
        file=sys.stderr,
      )
    jax.distributed.initialize(
      cfg.coordinator,
      cfg.processes,
      cfg.process,
      initialization_timeout=2 * _START_SECONDS,
      heartbeat_timeout_seconds=_SILENCE_SECONDS,
      shutdown_timeout_seconds=_SILENCE_SECONDS,
    )
  except (ValueError, RuntimeError, OSError) as e:
    raise ValueError(_unmet(str(e).splitlines()[0])) from e
  finally:
    impatience.cancel()


def _give_up() -> None:
  why = f"not all came within {_START_SECONDS} seconds"
  program.say(f"error: {_unmet(why)}\n")
  os._exit(1)  # the main thread is in JAX, and does not hear


def _unmet(why: str) -> str:
  return (
    f"The processes of this run do not meet ({why}). Check that all are "
    "started, with the same --distributed.coordinator and "
    "--distributed.processes and each its own --distributed.process, or with "
    "--distributed.auto."
  )


def meet(place: str) -> None:
  """Waits for all processes to come to `place`.

  By way of the coordinator: a collective of the devices may be waited for much
  shorter than a compilation of one process can take (on CPUs for 30 seconds).
  """
  if jax.process_count() > 1:
    ocp.multihost.get_barrier_sync_fn()(
      key=f"{place} {next(_meetings)}", timeout_ms=1000 * _MEETING_SECONDS
    )


def check_mesh(mesh: jax.sharding.Mesh) -> None:
  """Raises a ValueError if some process has no device of the mesh."""
  if jax.process_count() > 1 and mesh.size != jax.device_count():
    raise ValueError(
      f"The mesh takes {mesh.size} devices, but the {jax.process_count()} "
      f"processes have {jax.device_count()}: all must be used. Change the mesh."
    )


def number() -> int:
  """Returns the number of this process, from 0."""
  return jax.process_index()


def all_agree(here: bool) -> bool:
  """Whether it is so in every process; all call."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(np.array(here)).all())


def is_first() -> bool:
  """Whether this process speaks for all."""
  return jax.process_index() == 0


def visible(text: str) -> str:
  """The text with what a terminal would obey, such as ESC, as \\xNN."""
  return text.translate(_CONTROLS)


def say(text: str) -> None:
  """Prints, in the first process, and writes to the log if there is one.

  Whatever is in the text, a terminal shows it and obeys none of it.
  """
  if is_first():
    text = visible(text)
    print(text, flush=True)
    _write(text)


@contextlib.contextmanager
def log_to(file: str | pathlib.Path) -> Iterator[None]:
  """Inside, what is said is appended to `file` too, each line with its time.

  So is the traceback of an exception that leaves.
  """
  global _log
  before, _log = _log, pathlib.Path(file)
  try:
    yield
  except BaseException:
    if is_first():
      _write(visible(traceback.format_exc()))
    raise
  finally:
    _log = before


def _write(text: str) -> None:
  global _logs
  if _log is None:
    return
  now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
  lines = [f"{now} {line}".rstrip() + "\n" for line in text.splitlines()]
  try:
    # Closed each time: a mounted bucket shows what is in closed files only.
    with _log.open("a", encoding="utf-8") as out:
      out.write("".join(lines))
    _logs = True
  except OSError as e:  # no reason to end a run, and it is printed
    if _logs:
      print(f"{_log} could not be written: {e}", file=sys.stderr)
    _logs = False


def fetch[Tree](tree: Tree) -> Tree:
  """NumPy arrays of global ones, everywhere the whole; all processes call."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(
    lambda x: (
      np.asarray(x)
      if x.is_fully_replicated
      else multihost_utils.process_allgather(x, tiled=True)
    ),
    tree,
  )


def put(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """A global array of one that every process has whole."""
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def put_parts(
  parts: dict[int, np.ndarray],
  shape: Sequence[int],
  axis: int,
  sharding: jax.sharding.Sharding,
) -> jax.Array:
  """A global array of equal parts along `axis`; each process has its own.

  Args:
    parts: By number, those that `parts_here` names.
    shape: Of the whole.
    axis: The dimension that is cut into parts.
    sharding: Where the array goes.
  """
  size = next(iter(parts.values())).shape[axis]

  def piece(index):
    begin, end, _ = index[axis].indices(shape[axis])
    first = begin // size
    here = [parts[i] for i in range(first, -(-end // size))]
    whole = np.concatenate(here, axis)
    cut = slice(begin - first * size, end - first * size)
    return whole[(*index[:axis], cut, *index[axis + 1 :])]

  return jax.make_array_from_callback(tuple(shape), sharding, piece)


def parts_here(
  number: int,
  shape: Sequence[int],
  axis: int,
  sharding: jax.sharding.Sharding,
) -> list[int]:
  """Which of `number` equal parts along `axis` this process's devices need."""
  size = shape[axis] // number
  needed = set()
  places = sharding.addressable_devices_indices_map(tuple(shape))
  for index in places.values():
    assert index is not None  # a device of this process has a part
    begin, end, _ = index[axis].indices(shape[axis])
    needed |= set(range(begin // size, -(-end // size)))
  return sorted(needed)


def gather_json(own: dict[int, Any]) -> dict[int, Any]:
  """Merges what each process gives under keys of its own."""
  if jax.process_count() == 1:
    return own
  text = json.dumps(own).encode()
  sizes = multihost_utils.process_allgather(np.array(len(text)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(text)] = np.frombuffer(text, np.uint8)
  everyone = multihost_utils.process_allgather(padded)
  together: dict[int, Any] = {}
  for size, row in zip(sizes, everyone):
    said = json.loads(row[: int(size)].tobytes())
    together |= {int(number): value for number, value in said.items()}
  return together


def asked_to_stop(here: bool, step: int) -> bool:
  """Whether to stop after this step: the same answer in all processes.

  Of several, JAX hears the notice (SIGTERM) and makes them agree on a step.
  """
  if jax.process_count() == 1:
    return here
  return multihost_utils.reached_preemption_sync_point(step)
