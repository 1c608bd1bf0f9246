"""The configs of the 671B model against the paper's numbers."""

import pytest

from train import config as config_lib
from train.learn import optimizer as optimizer_lib

# DeepSeek-V3.2, 2.1.1: rate of each part, steps, sequences of a step.
WARMUP = {"indexer": 1e-3}, 1000, 16
SPARSE = {"model": 7.3e-6, "indexer": 7.3e-6}, 15_000, 480


@pytest.mark.parametrize(
  "name, paper",
  [
    ("v32_671b_warmup", WARMUP),
    ("v32_671b_warmup_v6e", WARMUP),
    ("v32_671b_sparse", SPARSE),
    ("v32_671b_sparse_tpu7x", SPARSE),
  ],
)
def test_a_stage_is_as_in_the_paper(name, paper):
  cfg = config_lib.load(f"configs/{name}.py")
  (stage,) = cfg.stages
  rates = optimizer_lib.rates(cfg.optimizer, stage)
  plateau = stage.steps // 2
  actual = {part: pytest.approx(rate(plateau)) for part, rate in rates.items()}
  assert (actual, stage.steps, stage.batch_size) == paper
  assert stage.seq_len == 131_072
