"""Selects an op's implementation: by name, or the fastest supported here."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import contextvars
import functools
from typing import Any, Final, Literal
import warnings

import jax

from pallas_kernels import devices

type Implementation = Literal[
  "mosaic_tpu", "mosaic_gpu", "chunked_xla", "reference"
]
# Backend of each kernel. Every other implementation runs anywhere; of these,
# `chunked_xla` is the only one selected automatically.
KERNEL_BACKEND: Final = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}
PORTABLE: Final = "chunked_xla"
# Compute capability that the "mosaic_gpu" kernels need.
HOPPER: Final = "9.0"


# Whether ops may select kernels automatically.
_allowed: contextvars.ContextVar[bool] = contextvars.ContextVar(
  "allowed", default=True
)
# Destination of `record`, if active.
_record: contextvars.ContextVar[dict[str, list[str]] | None] = (
  contextvars.ContextVar("record", default=None)
)


@contextlib.contextmanager
def record() -> Iterator[dict[str, list[str]]]:
  """Records the implementations of each op that is traced inside.

  Names come in the order of their first use.
  """
  chosen: dict[str, list[str]] = {}
  token = _record.set(chosen)
  try:
    yield chosen
  finally:
    _record.reset(token)


@contextlib.contextmanager
def kernels(allowed: bool) -> Iterator[None]:
  """Allows or forbids automatic selection of kernels for ops traced inside.

  If forbidden, ops run as plain XLA, for comparison. Programs traced before are
  not affected.
  """
  token = _allowed.set(allowed)
  try:
    yield
  finally:
    _allowed.reset(token)


def platform() -> str:
  """Platform of the mesh in context, or else the default backend: "cpu", "gpu"
  or "tpu"."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def device_kind() -> str:
  """Device kind of the mesh in context, or else of the default device."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device or jax.devices()[0]).device_kind


def call(
  op: str,
  implementations: Mapping[str, Callable[..., Any]],
  implementation: str | None,
  *args: Any,
  **kwargs: Any,
) -> Any:
  """Runs `op` with the named implementation, or the best one for the backend.

  Args:
    op: The op's name, for messages.
    implementations: Implementations by name.
    implementation: A name selects that one, and its `NotImplementedError`
      reaches the caller. `None` tries the kernels of the platform, then
      `chunked_xla`; on an accelerator this fallback warns, with the reason,
      once for each shape.
    *args: The op's arguments.
    **kwargs: The op's arguments.

  Returns:
    The implementation's result.

  Raises:
    ValueError: The name is not one of `implementations`.
    NotImplementedError: The named implementation does not support these inputs.
  """
  if implementation is not None:
    if implementation not in implementations:
      known = ", ".join(implementations)
      raise ValueError(
        f"{op}: {implementation=} is unknown; take one of {known}."
      )
    return _run(op, implementations, implementation, *args, **kwargs)
  if not _allowed.get():
    return _run(op, implementations, PORTABLE, *args, **kwargs)
  backend = platform()
  refusals = []
  for name in implementations:
    if KERNEL_BACKEND.get(name) == backend:
      try:
        if name == "mosaic_gpu":
          _check_hopper()
        return _run(op, implementations, name, *args, **kwargs)
      except NotImplementedError as e:
        refusals.append(f"{name}: {e}")
  if backend != "cpu":
    reason = "; ".join(refusals) or "there is none yet"
    _warn_portable(op, backend, _shapes(args), reason)
  return _run(op, implementations, PORTABLE, *args, **kwargs)


def _check_hopper() -> None:
  kind = device_kind()
  known = devices.of(kind)
  capability = known.compute_capability if known else _ask_capability(kind)
  if capability is None:
    raise NotImplementedError(
      f"nothing is known of {kind!r}: if its compute capability is {HOPPER},"
      " add it to pallas_kernels/devices.py"
    )
  if capability != HOPPER:
    raise NotImplementedError(
      f"the compute capability of {kind!r} is {capability}, the kernels are for"
      f" {HOPPER}"
    )


@functools.cache  # once per kind
def _ask_capability(kind: str) -> str | None:
  """Compute capability of a device that is here; None if there is no such."""
  here = (x for x in jax.devices() if x.device_kind == kind)
  capability = getattr(next(here, None), "compute_capability", None)
  if capability == HOPPER:
    warnings.warn(
      f"{kind!r} is not in pallas_kernels/devices.py. It runs the kernels, but"
      " always attends sparsely, which is slower on short sequences. Add it.",
      stacklevel=2,
    )
  return capability


def _run(op, implementations, name, /, *args, **kwargs):
  result = implementations[name](*args, **kwargs)
  if (chosen := _record.get()) is not None:
    names = chosen.setdefault(op, [])
    if name not in names:
      names.append(name)
  return result


def _shapes(args: tuple[Any, ...]) -> str:
  """Formats the arrays' types, as in "bfloat16[1,8,4,576] int32[1,8,64]"."""
  return " ".join(
    f"{x.dtype}[{','.join(map(str, x.shape))}]"
    for x in jax.tree.leaves(args)
    if isinstance(x, jax.Array)
  )


@functools.cache  # once per op, shape and reason
def _warn_portable(op: str, backend: str, shapes: str, reason: str) -> None:
  warnings.warn(
    f"{op} runs as plain XLA ({PORTABLE}) on {backend}, far below the speed of "
    f"a kernel ({reason}). Its arguments are {shapes or 'no arrays'}. Give it "
    f"what a kernel takes, or implementation={PORTABLE!r} to run without this "
    "warning.",
    stacklevel=2,
  )
