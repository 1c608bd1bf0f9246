"""Chooses how an op is computed: by name, or the fastest that fits here."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import contextvars
import functools
from typing import Any, Final
import warnings

import jax

# The backend that each kernel is written for. Every other implementation runs
# anywhere; of these, `chunked_xla` is the one that is chosen automatically.
KERNEL_BACKEND: Final = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}
PORTABLE: Final = "chunked_xla"


# Where `record` collects; None: nowhere.
_record: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
  "record", default=None
)


@contextlib.contextmanager
def record() -> Iterator[dict[str, str]]:
  """Collects which implementation each op that is traced inside comes to."""
  chosen: dict[str, str] = {}
  token = _record.set(chosen)
  try:
    yield chosen
  finally:
    _record.reset(token)


def platform() -> str:
  """ "cpu", "gpu" or "tpu": what the mesh in context is made of, or otherwise
  the default backend."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def call(
  op: str,
  implementations: Mapping[str, Callable[..., Any]],
  implementation: str | None,
  *args: Any,
  **kwargs: Any,
) -> Any:
  """Runs `op` by the implementation named, or by the best one for the backend.

  Args:
    op: The op's name, for messages.
    implementations: Implementations by name.
    implementation: A name takes that one, and its `NotImplementedError` reaches
      the caller. `None` tries the kernels of the platform, then
      `chunked_xla`; an accelerator that ends there is told so once.
    *args: The op's arguments.
    **kwargs: The op's arguments.

  Returns:
    What the implementation returns.

  Raises:
    ValueError: The name is not one of `implementations`.
    NotImplementedError: The implementation named cannot do these inputs.
  """
  if implementation is not None:
    if implementation not in implementations:
      known = ", ".join(implementations)
      raise ValueError(
        f"{op}: {implementation=} is unknown; take one of {known}."
      )
    return _run(op, implementations, implementation, *args, **kwargs)
  backend = platform()
  refusals = []
  for name in implementations:
    if KERNEL_BACKEND.get(name) == backend:
      try:
        return _run(op, implementations, name, *args, **kwargs)
      except NotImplementedError as e:
        refusals.append(f"{name}: {e}")
  if backend != "cpu":
    _warn_portable(op, backend, "; ".join(refusals) or "there is none yet")
  return _run(op, implementations, PORTABLE, *args, **kwargs)


def _run(op, implementations, name, /, *args, **kwargs):
  result = implementations[name](*args, **kwargs)
  if (chosen := _record.get()) is not None:
    chosen[op] = name
  return result


@functools.cache  # once for each op and reason
def _warn_portable(op: str, backend: str, reason: str) -> None:
  warnings.warn(
    f"{op} runs as plain XLA ({PORTABLE}) on {backend}, far below the speed of "
    f"a kernel ({reason}).",
    stacklevel=2,
  )
