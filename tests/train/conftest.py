"""What the tests of whole runs share."""

import pytest

import dsa_jax
from tests.train import runs
from train import evaluation
from train import stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of documents."""
  folder = tmp_path_factory.mktemp("text")
  runs.write_text(folder)
  return folder


@pytest.fixture
def unmeasured(monkeypatch):
  """Runs are not evaluated, which would compile as much again."""
  monkeypatch.setattr(evaluation.Evaluation, "__call__", lambda *_, last: 0.0)


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
  """Runs that share a stage share its step: most of a short run is tracing."""
  compile_step, steps = stage.Stage._compile, {}

  def compile_once(self, state, batch):
    cfg = self._cfg
    key = (
      *(self._model_config, self._stage, cfg.optimizer, cfg.mesh, cfg.kernels),
      *(cfg.guard.spike_deviations, cfg.log.every, len(cfg.data.sources)),
      dsa_jax.Transformer.losses,  # tests of guards replace it
    )
    if key not in steps:
      steps[key] = compile_step(self, state, batch)
    return steps[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stage.Stage, "_compile", compile_once)
    yield
