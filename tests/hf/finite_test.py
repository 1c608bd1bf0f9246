"""Weights that are no numbers are found, wherever they are."""

import ml_dtypes
import numpy as np
import pytest

from dsa_jax.hf import config_json
from dsa_jax.hf import files
from dsa_jax.hf import finite
from dsa_jax.hf import load
from dsa_jax.hf import save
from tests.hf import folders

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("at", [(0, 0), (4, 2), (6, 8)])
@pytest.mark.parametrize(
  ("dtype", "value"),
  [
    *((dtype, x) for dtype in (np.float32, BF16) for x in (NAN, INF, -INF)),
    (np.float32, -NAN),
    (np.float32, 3.4e38),  # infinite as a bfloat16
    (np.float32, -3.4e38),
    (E4M3, NAN),
    (E4M3, -NAN),
  ],
)
def test_what_is_no_number(dtype, value, at):
  array = np.random.default_rng(0).standard_normal((7, 9)).astype(dtype)
  finite.check(array, "fine")
  finite.check(array.T, "fine")
  array[at] = value
  for x, place in ((array, at), (array.T, at[::-1])):
    with pytest.raises(ValueError, match="w has .* at ") as raised:
      finite.check(x, "w")
    assert str(list(place)) in str(raised.value)


@pytest.mark.parametrize("dtype", [np.float32, BF16, E4M3])
def test_all_other_values_pass(dtype):
  """Of 8 and 16 bits all that are finite; of float32, as bfloat16."""
  width = np.dtype(dtype).itemsize
  bits = np.arange(2 ** (8 * min(width, 2)), dtype=f"u{min(width, 2)}")
  values = bits.view(BF16 if width > 1 else E4M3)
  values = values[np.isfinite(values)].astype(dtype)
  finite.check(values, "all")
  finite.check(values[:0], "none")


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF, 1e38, -INF])
def test_what_is_no_scale(value):
  scale = np.full((3, 2), 1e-4, np.float32)
  finite.check_scale(scale, "fine")
  scale[1, 1] = value
  with pytest.raises(ValueError, match=r"s has .* at \[1, 1\], which is no sc"):
    finite.check_scale(scale, "s")


def test_every_e8m0_but_nan_and_the_largest_is_a_scale():
  bits = np.arange(247, dtype=np.uint8)
  finite.check_scale(bits.view(ml_dtypes.float8_e8m0fnu), "s")
  for bad in (np.uint8(247), np.uint8(255)):
    scale = np.array([bad]).view(ml_dtypes.float8_e8m0fnu)
    with pytest.raises(ValueError, match="no scale"):
      finite.check_scale(scale, "s")


class TestOfAFolder:
  """Each kind of tensor, as loading and converting read it."""

  LAYER = "model.layers.2."

  def read(self, folder):
    stored = files.Folder(folder)
    cfg = config_json.read(stored, None)
    for tensor in load.wanted(stored, cfg, None):
      load.read(stored, tensor)

  @pytest.mark.parametrize(
    ("name", "value"),
    [
      ("input_layernorm.weight", NAN),
      ("mlp.gate.e_score_correction_bias", NAN),
      ("mlp.gate.e_score_correction_bias", -INF),
      ("mlp.experts.3.down_proj.weight", NAN),
      ("mlp.experts.3.down_proj.weight_scale_inv", 0),
      ("self_attn.o_proj.weight_scale_inv", -1),
      ("self_attn.o_proj.weight_scale_inv", INF),
      ("self_attn.indexer.weights_proj.weight", INF),
    ],
  )
  def test_is_refused_by_tensor_file_and_place(self, tmp_path, name, value):
    found = folders.tensors("fp8")
    array = found[self.LAYER + name]
    array[(-1,) * array.ndim] = value
    folders.write(tmp_path, found)
    with pytest.raises(ValueError) as raised:
      self.read(tmp_path)
    place = str([size - 1 for size in array.shape])
    for part in (self.LAYER + name, "-of-00003.safetensors", place):
      assert part in str(raised.value)

  def test_is_refused_by_its_e8m0_scale(self, tmp_path):
    found = folders.tensors("fp8", scales="E8M0")
    self_read = self.LAYER + "self_attn.o_proj.weight_scale_inv"
    found[self_read].view(np.uint8)[0, 0] = 255
    folders.write(tmp_path, found)
    with pytest.raises(ValueError, match=f"{self_read} in .* has nan at"):
      self.read(tmp_path)

  def test_is_not_written(self, tmp_path):
    """A model that diverged: the error names a tensor, and there is no file."""
    folders.write(tmp_path / "in", folders.tensors("bf16"))
    cfg = config_json.read(files.Folder(tmp_path / "in"), None)
    out = save.Export(cfg, tmp_path / "out", "bf16", 10**9, None)

    def fetch(place):
      part = np.ones(place.shape, np.float32)
      if place.leaf == "moe_layers.attention.out_NUD":
        part[-1, -1, -1] = NAN
      return part

    out.plan(fetch)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.o_proj.weight.*"):
      out.write(0, fetch)
    assert not list((tmp_path / "out").iterdir())
