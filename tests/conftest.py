"""Settings that every test runs under."""

from collections.abc import Iterator
import gc
import pathlib
import signal
from typing import Final

import jax
import pytest

# Who starts the tests may ignore these (`&`, `nohup`); programs that they start
# would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
jax.config.update("jax_platforms", "cpu")  # libtpu may be installed
# Two along each axis of the mesh; before the backend starts.
jax.config.update("jax_num_cpu_devices", 32)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of the time here; what is compiled is small.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# Tracing makes millions of objects that live on: to look at them all again and
# again takes an eighth of a test's time.
gc.set_threshold(200_000, 50, 100)

_MOST_MAPS: Final = 20_000


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    "--update-golden",
    action="store_true",
    help="rewrite the files in tests/golden/ instead of comparing with them",
  )


def pytest_make_parametrize_id(val: object) -> str | None:
  """Sizes and options are shown as they are: `T=95,S=300`, `300x330x1`."""
  match val:
    case dict():
      return ",".join(f"{k}={_shown(x)}" for k, x in val.items()) or "default"
    case tuple() | list() if val:
      between = "x" if all(isinstance(x, int) for x in val) else " "
      return between.join(map(_shown, val))
    case bytes():
      return _shown(val)
  return None  # pytest's own


def _shown(value: object) -> str:
  # They may be compressed, with the time at which that was done: each worker
  # would collect tests of other names.
  if isinstance(value, bytes):
    return "bytes"
  return getattr(value, "__name__", None) or str(value)


@pytest.fixture(scope="session", autouse=True)
def compile_once(pytestconfig: pytest.Config) -> None:
  """What one worker has compiled, none compiles again, nor a later session."""
  assert pytestconfig.cache is not None
  folder = pytestconfig.cache.mkdir("compiled")
  jax.config.update("jax_compilation_cache_dir", str(folder))


@pytest.fixture(scope="module", autouse=True)
def drop_programs() -> Iterator[None]:
  """Drops what is compiled, after a file, before there is no room for it.

  A program has some 20 memory maps. Linux lets a process have 65,530, and where
  one more is asked for, XLA crashes.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
  """Whether golden files are to be rewritten."""
  return request.config.getoption("--update-golden")
