"""Settings that every test runs under."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")  # libtpu may be installed
# Two along each axis of the mesh; before the backend starts.
jax.config.update("jax_num_cpu_devices", 32)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of the time here; what is compiled is small.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    "--update-golden",
    action="store_true",
    help="rewrite the files in tests/golden/ instead of comparing with them",
  )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
  """Whether golden files are to be rewritten."""
  return request.config.getoption("--update-golden")
