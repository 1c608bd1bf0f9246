"""Ranges of config fields: each field has one, and nothing gets past it."""

import copy
import dataclasses
import typing
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import dsa_jax
from dsa_jax import config as model_lib
from dsa_jax import ranges
from dsa_jax import sharding
from train import config as config_lib
from train.data import corpus as corpus_lib
from train.data import retrieval as retrieval_lib
from train.host import mesh as mesh_lib
from train.host import processes
from train.learn import guards
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.run import checkpoint as checkpoint_lib
from train.run import metrics as metrics_lib

# One of each config that a run has.
CONFIGS = (
  model_lib.tiny(),
  model_lib.YarnConfig(),
  sharding.ShardingRules(),
  stages_lib.StageConfig(kind="pretrain", steps=1, seq_len=4, batch_size=1),
  optimizer_lib.OptimizerConfig(peak_lr=1.0),
  corpus_lib.DataConfig(),
  corpus_lib.SourceConfig(),
  retrieval_lib.RetrievalConfig(),
  mesh_lib.MeshConfig(),
  processes.DistributedConfig(),
  checkpoint_lib.CheckpointConfig(),
  guards.GuardConfig(),
  metrics_lib.LogConfig(),
)
RUN = config_lib.TrainConfig(
  run_dir="run",
  model=CONFIGS[0],
  stages=(dataclasses.replace(CONFIGS[3], batch_size=8),),
  optimizer=CONFIGS[4],
)
FIELDS = [
  pytest.param(cfg, field, id=f"{type(cfg).__name__}.{field.name}")
  for cfg in (RUN, *CONFIGS)
  for field in dataclasses.fields(cfg)
]


def leaves(kind: Any, stated: tuple[Any, ...] = ()):
  """The plain types in an annotation, and what is stated of each."""
  if isinstance(kind, typing.TypeAliasType):
    yield from leaves(kind.__value__, stated)
  elif typing.get_origin(kind) is Annotated:
    yield from leaves(typing.get_args(kind)[0], kind.__metadata__)
  elif typing.get_origin(kind) is Literal:
    yield Literal, stated
  elif parts := typing.get_args(kind):
    for part in parts:
      if part is not Ellipsis:
        yield from leaves(part, stated)
  else:
    yield kind, stated


@pytest.mark.parametrize(("cfg", "field"), FIELDS)
def test_every_field_states_its_range(cfg, field):
  wanted = {int: ranges.Interval, float: ranges.Interval, str: ranges.Length}
  for kind, stated in leaves(field.type):
    if kind in wanted:
      assert any(isinstance(x, wanted[kind]) for x in stated)


def test_every_config_of_a_run_is_tried():
  kinds = {type(cfg) for cfg in (RUN, *CONFIGS)}
  for cfg in (RUN, *CONFIGS):
    for field in dataclasses.fields(cfg):
      for kind, _ in leaves(field.type):
        assert not dataclasses.is_dataclass(kind) or kind in kinds


def remade(cfg: Any, name: str, value: Any) -> Any:
  """As `dataclasses.replace`, whose types jaxtyping would check in tests."""
  made = copy.copy(cfg)
  object.__setattr__(made, name, value)
  made.__post_init__()
  return made


HOSTILE = (
  *(float("nan"), float("inf"), float("-inf"), -1, -1.0, 10**12, 2**64),
  *(10**5000, 1e300, -1e-300, 2.5, np.int64(2), np.float32(2), b"x", 1j),
  *(
    "",
    "nan",
    "half \ud800 a pair",
    "NUL \0",
    [],
    [1],
    (),
    (None,),
    {},
    object,
  ),
)


def admits(kind: Any, value: Any) -> bool:
  """Whether a value is of a kind: said once more, and more simply."""
  if value is None:
    return any(leaf is type(None) for leaf, _ in leaves(kind))
  for leaf, stated in leaves(kind):
    if leaf is Literal or type(value) is not leaf:
      if not (leaf is float and type(value) is int):
        continue
    for bound in stated:
      size = len(value) if isinstance(bound, ranges.Length) else value
      if bound.least <= size <= bound.most:
        return not isinstance(value, str) or value.isprintable()
  return False


@pytest.mark.parametrize(("cfg", "field"), FIELDS)
def test_hostile_values_are_refused_by_name(cfg, field):
  """Or they are in the range: no other error, and nothing else is taken."""
  for value in (*HOSTILE, None, True):
    try:
      made = remade(cfg, field.name, value)
    except ValueError as e:
      text = str(e)
      assert field.name in text and "\n" not in text and len(text) < 600
      continue
    assert getattr(made, field.name) is value
    kinds = {leaf for leaf, _ in leaves(field.type)}
    is_flag = isinstance(value, bool) and bool in kinds
    is_axes = isinstance(cfg, sharding.ShardingRules) and value == ()
    is_types = field.name == "indexer_types" and value == ()
    assert is_flag or is_axes or is_types or admits(field.type, value), value


@dataclasses.dataclass(frozen=True)
class Example:
  share: Annotated[float, ranges.Interval(0, 1, open="high")] = 0.5
  scale: ranges.Positive = 1.0
  count: ranges.Count | None = None
  kind: Literal["a", "b"] = "a"
  level: Literal[0, 1] = 0
  parts: Annotated[tuple[ranges.Index, ...], ranges.Length(1, 2, "entries")] = (
    0,
  )
  kinds: tuple[Literal["a", "b"], ...] = ()
  names: dict[str, int] | None = None


@pytest.mark.parametrize(
  ("name", "value", "says"),
  [
    ("share", 1.0, "at least 0 and below 1"),
    ("share", 0.99999999, "at least 0 and below 1"),  # 1 in fp32
    ("share", float("nan"), "a finite number"),
    ("share", True, "a finite number"),
    ("share", "0.5", "a finite number"),
    ("share", 10**400, "at least 0 and below 1"),
    ("scale", 0, "above 0"),
    ("scale", 1e-46, "above 0"),  # 0 in fp32
    ("scale", 1e-39, "above 0"),  # flushed to 0 there
    ("count", 0, "at least 1 and at most 2147483647, or None"),
    ("count", 2.0, "a whole number, or None"),
    ("count", 2**31, "at most 2147483647, or None"),
    ("kind", "c", '"a" or "b"'),
    ("kind", 1, '"a" or "b"'),
    ("level", 2, "must be 0 or 1"),
    ("level", True, "must be 0 or 1"),
    ("level", "1", "must be 0 or 1"),
    ("parts", [1], "a tuple"),
    ("parts", (), "1 to 2 entries long"),
    ("parts", (0, 1, 2), "1 to 2 entries long"),
    ("parts", (1, -1), "at most 2147483647; its entry 1 is -1"),
    ("kinds", ("a", "a", "c"), 'a tuple of "a" or "b"; its entry 2 is \'c\''),
  ],
)
def test_says_what_must_be(name, value, says):
  found = ranges.violation(Example, name, value)
  assert found is not None and found.startswith("must be ") and says in found
  example = Example()
  object.__setattr__(example, name, value)
  with pytest.raises(ValueError, match=rf"^{name}=.* must be "):
    ranges.check(example)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *(("share", 0), ("share", 0.0), ("share", 0.9999999), ("scale", 1e-37)),
    *(("scale", 3), ("count", None), ("count", 2**31 - 1), ("kind", "b")),
    *(("parts", (0, 1)), ("parts", (2**31 - 1,))),
  ],
)
def test_what_is_in_range_is_taken(name, value):
  assert ranges.violation(Example, name, value) is None


def test_seeds_are_distinct():
  """2^32 would be the seed 0."""
  import jax

  largest = ranges.Seed.__metadata__[0].most
  keys = [jax.random.key_data(jax.random.key(x)) for x in (0, 1, largest)]
  assert len({tuple(np.asarray(key)) for key in keys}) == 3
  assert (keys[0] == jax.random.key_data(jax.random.key(largest + 1))).all()


@pytest.mark.parametrize(
  "damage",
  [
    lambda v: v.pop("yarn"),
    lambda v: v.pop("indexer_types"),
    lambda v: v.pop("vocab_size"),
    lambda v: v.update(surprise=1),
    lambda v: v.update(yarn=None),
    lambda v: v.update(yarn=[]),
    lambda v: v.update(indexer_types=3),
    lambda v: v.update(indexer_types="full"),
    lambda v: v.update(num_layers="4"),
    lambda v: v.update(rope_theta=float("nan")),
    lambda v: v["yarn"].update(beta_fast=1),
    lambda v: v["yarn"].update(factor=None),
  ],
)
def test_a_damaged_dict_is_no_model(damage):
  values = model_lib.tiny().to_dict()
  assert dsa_jax.ModelConfig.from_dict(values) == model_lib.tiny()
  damage(values)
  with pytest.raises(ValueError):
    dsa_jax.ModelConfig.from_dict(values)
