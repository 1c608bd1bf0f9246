"""Chooses how an op is computed: by name, or the fastest that fits here."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any, Final
import warnings

import jax

# The backend that each kernel is written for. Every other implementation runs
# anywhere; of these, `chunked_xla` is the one that is chosen automatically.
KERNEL_BACKEND: Final = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}
PORTABLE: Final = "chunked_xla"


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
      the caller. `None` tries the kernels of the default backend, then
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
    return implementations[implementation](*args, **kwargs)
  backend = jax.default_backend()
  refusals = []
  for name, compute in implementations.items():
    if KERNEL_BACKEND.get(name) == backend:
      try:
        return compute(*args, **kwargs)
      except NotImplementedError as e:
        refusals.append(f"{name}: {e}")
  if backend != "cpu":
    _warn_portable(op, backend, "; ".join(refusals) or "there is none yet")
  return implementations[PORTABLE](*args, **kwargs)


@functools.cache  # once for each op and reason
def _warn_portable(op: str, backend: str, reason: str) -> None:
  warnings.warn(
    f"{op} runs as plain XLA ({PORTABLE}) on {backend}, far below the speed of "
    f"a kernel ({reason}).",
    stacklevel=2,
  )
