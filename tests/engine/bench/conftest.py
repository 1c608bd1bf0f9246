"""Fixtures of the benchmark's tests."""

import jaxtyping
import pytest

from pallas_kernels.bench import timing


@pytest.fixture
def unchecked():
  """What is lowered has shapes for arrays."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def measured_once(monkeypatch):
  """Measurements take no longer than they must."""
  for name in ("_BATCH_SECONDS", "_ALL_SECONDS"):
    monkeypatch.setattr(timing, name, 0.0)
