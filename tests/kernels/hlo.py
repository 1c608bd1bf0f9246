"""What a compiled program says of the arrays in it."""

import math
import re

import jax

_SHAPE = re.compile(r"\b(?:pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]+)\]")
_PRODUCT = re.compile(r".*(?:dot_general|ragged_dot).*")
_FP32 = re.compile(r"tensor<[\dx]*f32>")


def arrays(compiled: jax.stages.Compiled) -> set[tuple[int, ...]]:
  """The shape of every array, also of those inside a fusion or a loop."""
  text = compiled.as_text()
  assert text is not None, "This backend does not say."
  shapes = _SHAPE.findall(text)
  return {tuple(map(int, shape.split(","))) for shape in shapes}


def arrays_of(
  compiled: jax.stages.Compiled, elements: int
) -> list[tuple[int, ...]]:
  """The shapes of at least so many elements, largest first."""
  large = [x for x in arrays(compiled) if math.prod(x) >= elements]
  return sorted(large, key=math.prod, reverse=True)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
  """What the program takes besides its arguments and results."""
  memory = compiled.memory_analysis()
  assert memory is not None, "This backend does not say."
  return memory.temp_size_in_bytes


def inexact_products(lowered: jax.stages.Lowered) -> list[str]:
  """Products of two fp32 factors that a TPU or a GPU may round."""
  lines = _PRODUCT.findall(lowered.as_text())
  assert lines, "There is no product in this program."
  return [
    line
    for line in lines
    if len(_FP32.findall(line.split("->")[0])) == 2
    and len(re.findall("HIGHEST", line)) < 2
  ]
