"""Asynchronous copies of 16 bytes from device to shared memory (`cp.async`).

Each is issued by one thread, so that a warpgroup gathers rows from anywhere;
TMA on Hopper moves boxes of neighbouring rows only.
"""

from typing import Final

from jaxlib.mlir.dialects import nvvm

from pallas_kernels.hopper import threads
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import U32

BYTES: Final = 16


def start(
  target: Place,
  source: Place,
  size: U32 | None = None,
  *,
  prefetch: int | None = None,
  to: int = 0,
  at: int = 0,
  where: Bool | None = None,
) -> None:
  """Starts a copy from `source + at` to `target + to`.

  Args:
    target: In shared memory, a multiple of 16.
    source: In device memory, likewise.
    size: Bytes to read, 0 or 16; the rest become 0. 16 by default.
    prefetch: Bytes that are also brought to L2: 64, 128 or 256.
    to: Constant offset of the target.
    at: Constant offset of the source.
    where: The threads that copy; all by default.
  """
  hint = f".L2::{prefetch}B" if prefetch else ""
  args = [target.value, source.value]
  text = f"cp.async.cg.shared.global{hint} [$0+{to}], [$1+{at}], {BYTES}"
  if size is not None:
    text += f", ${len(args)}"
    args.append(size.value)
  if where is not None:
    text = f"@${len(args)} {text}"
    args.append(where.value)
  threads.assembly(text + ";", args)


def wait_all() -> None:
  """Waits for all copies of this thread."""
  threads.assembly("cp.async.wait_all;")


def commit() -> None:
  """Makes a group of this thread's copies since the last; it may be empty."""
  nvvm.cp_async_commit_group()


def wait(in_flight: int) -> None:
  """Waits until at most `in_flight` groups of this thread are pending."""
  nvvm.cp_async_wait_group(in_flight)
