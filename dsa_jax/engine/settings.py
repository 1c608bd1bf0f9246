"""The sizes and choices that an engine is made with."""

import dataclasses
from typing import Annotated, Literal

from dsa_jax import cache as cache_lib
from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import ranges

type Extra = Literal["kept", "experts", "selected"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How an engine is made; see `Engine`."""

  slots: ranges.Count
  pool_tokens: ranges.Count
  page: Annotated[int, ranges.Interval(1, 2**16)]
  chunk: Annotated[int, ranges.Interval(1, 2**16)]
  lanes: Annotated[int, ranges.Interval(1, 2**14)]
  steps: Annotated[int, ranges.Interval(1, 2**12)]
  max_length: ranges.Count | None
  attention: frame_lib.Attention
  index_key_dtype: cache_lib.StoredDType | None
  latent_dtype: cache_lib.StoredDType | None
  speculate: bool
  returns: tuple[Extra, ...]

  def __post_init__(self):
    ranges.check(self)

  def pages(self, groups: int) -> int:
    """Pages of each group of devices that share a batch."""
    return self.pool_tokens // (groups * self.page)

  def check(self, cfg: config_lib.ModelConfig, groups: int) -> None:
    """Raises a ValueError for what this model on this mesh cannot do."""
    cache_lib.check_dtypes(cfg, self.index_key_dtype, self.latent_dtype)
    if self.slots % groups:
      raise ValueError(
        f"Engine: slots={self.slots} do not divide among the {groups} devices "
        "that share a batch; give a multiple."
      )
    room = self.pages(groups) * self.page
    least = groups * -(-cfg.top_k // self.page) * self.page
    if self.attention == "sparse" and room < cfg.top_k:
      raise ValueError(
        f"Engine: pool_tokens={self.pool_tokens} give each of {groups} groups "
        f"of devices {room}, but the model's attention reads top_k={cfg.top_k} "
        f"keys; give at least {least}."
      )
    if room < self.page:
      raise ValueError(
        f"Engine: pool_tokens={self.pool_tokens} are less than a page of "
        f"{self.page} for each of {groups} groups of devices; give more."
      )
    if self.speculate and not cfg.num_mtp_layers:
      raise ValueError(
        "Engine: speculate=True, but the model has no MTP block to draft with; "
        "leave it out."
      )
    if "experts" in self.returns and not cfg.num_moe_layers:
      raise ValueError(
        'Engine: returns has "experts", but no layer of the model has any.'
      )
    if "selected" in self.returns and self.attention == "dense":
      raise ValueError(
        'Engine: returns has "selected", but dense attention selects no keys.'
      )
