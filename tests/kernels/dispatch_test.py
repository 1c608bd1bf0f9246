"""Which implementation is called, and with what."""

import contextlib
import functools
import importlib
import inspect
import types
from unittest import mock
import warnings

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels import operands
from tests.kernels import inputs

B, T, S, K, N = inputs.B, inputs.T, inputs.S, inputs.K, inputs.N
C, R, HR, U = inputs.C, inputs.R, inputs.H + inputs.R, inputs.U
M, I = inputs.M, inputs.I
f32, i32 = (
  functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
  for dtype in (jnp.float32, jnp.int32)
)
INDEX = operands.Index(
  jnp.zeros((B, T, M, I)), jnp.zeros((B, S, I)), jnp.zeros((B, T, M))
)
# What each op takes and what it returns.
CALLS = {
  "indexer_topk": (
    {
      "index": INDEX,
      "start": i32((B, T)),
      "end": i32((B, T)),
      "top_k": K,
      "pages": i32((B, 3)),
      "score_dtype": "float8_e4m3fn",
    },
    (i32((B, T, K)), f32((B, T, K))),
  ),
  "sparse_mla": (
    {
      "q": f32((B, T, N, C + R)),
      "kv": f32((B, S, C + R)),
      "indices": i32((B, T, K)),
      "latent_rank": C,
      "scale": 0.5,
    },
    (f32((B, T, N, C)), f32((B, T, N))),
  ),
  "sparse_mla_with_loss": (
    {
      "q": f32((B, T, N, C + R)),
      "kv": f32((B, S, C + R)),
      "indices": i32((B, T, K)),
      "index": INDEX,
      "latent_rank": C,
      "scale": 0.5,
      "heads_axis": "tensor",
      "measure": False,
    },
    (f32((B, T, N, C)), f32((B, T, N)), f32((B, T))),
  ),
  "dense_mla": (
    {
      "q": f32((B, T, N, HR)),
      "k": f32((B, S, N, HR)),
      "v": f32((B, S, N, U)),
      "start": i32((B, T)),
      "end": i32((B, T)),
      "scale": 0.5,
      "indices": i32((B, T, K)),
    },
    (f32((B, T, N, U)), f32((B, T, N))),
  ),
  "sparse_indexer_loss": (
    {
      "index": INDEX,
      "attended": operands.Attended(
        *(jnp.zeros((B, T, N, C + R)), jnp.zeros((B, S, C + R))),
        jnp.zeros((B, T, N)),
      ),
      "indices": i32((B, T, K)),
      "scale": 0.5,
      "heads_axis": "tensor",
      "measure": False,
    },
    f32((B, T)),
  ),
  "dense_indexer_loss": (
    {
      "index": INDEX,
      "attended": operands.Attended(
        *(jnp.zeros((B, T, N, HR)), jnp.zeros((B, S, N, HR))),
        jnp.zeros((B, T, N)),
      ),
      "start": i32((B, T)),
      "end": i32((B, T)),
      "scale": 0.5,
      "heads_axis": "tensor",
      "measure": False,
    },
    f32((B, T)),
  ),
  "grouped_matmul": (
    {"x": f32((T, C)), "w": f32((N, C, U)), "sizes": i32((N,))},
    f32((T, U)),
  ),
  "grouped_mlp": (
    {
      "x": f32((T, C)),
      "sizes": i32((N,)),
      "gate": f32((B * N, C, U)),
      "up": f32((B * N, C, U)),
      "down": f32((B * N, U, C)),
      "first": i32(()),
    },
    f32((T, C)),
  ),
}


def refuse(*args, **kwargs):
  raise NotImplementedError("no such shape")


@contextlib.contextmanager
def backend(name, kind="NVIDIA H200"):
  with (
    mock.patch.object(jax, "default_backend", return_value=name),
    mock.patch.object(dispatch, "device_kind", return_value=kind),
  ):
    yield


@pytest.fixture
def ops():
  """Implementations that return their name; none has warned yet."""
  dispatch._warn_portable.cache_clear()
  dispatch._ask_capability.cache_clear()
  names = "mosaic_tpu", "mosaic_gpu", "chunked_xla", "reference"
  return {name: mock.Mock(return_value=name) for name in names}


def call(ops, implementation=None):
  return dispatch.call("op", ops, implementation, 1, two=2)


def assert_silent(ops, expected, implementation=None):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert call(ops, implementation) == expected


@pytest.mark.parametrize("name", ["mosaic_tpu", "mosaic_gpu", "reference"])
def test_a_name_takes_that_one_on_any_backend(ops, name):
  assert_silent(ops, name, implementation=name)
  ops.pop(name).assert_called_once_with(1, two=2)
  for other in ops.values():
    other.assert_not_called()


def test_an_unknown_name_is_told_the_known_ones(ops):
  names = "mosaic_tpu, mosaic_gpu, chunked_xla, reference"
  with pytest.raises(ValueError, match=f"op.*'triton'.*{names}"):
    call(ops, "triton")


def test_a_refusal_of_the_one_named_reaches_the_caller(ops):
  ops["mosaic_tpu"].side_effect = refuse
  with backend("tpu"), pytest.raises(NotImplementedError, match="shape"):
    call(ops, "mosaic_tpu")


@pytest.mark.parametrize(
  "name, expected",
  [("tpu", "mosaic_tpu"), ("gpu", "mosaic_gpu"), ("cpu", "chunked_xla")],
)
def test_each_backend_takes_its_own(ops, name, expected):
  with backend(name):
    assert_silent(ops, expected)
  ops.pop(expected).assert_called_once_with(1, two=2)
  for other in ops.values():
    other.assert_not_called()


@pytest.mark.parametrize(
  "name, kernel", [("tpu", "mosaic_tpu"), ("gpu", "mosaic_gpu")]
)
def test_a_refusal_falls_back_and_says_so_once(ops, name, kernel):
  ops[kernel].side_effect = refuse
  with backend(name):
    with pytest.warns(UserWarning, match=f"op .*{kernel}: no such shape"):
      assert call(ops) == "chunked_xla"
    assert_silent(ops, "chunked_xla")
  assert ops[kernel].call_count == 2
  ops["reference"].assert_not_called()


def test_a_backend_without_a_kernel_says_so_once(ops):
  with backend("rocm"):
    with pytest.warns(UserWarning, match="op .*rocm.*there is none"):
      assert call(ops) == "chunked_xla"
    assert_silent(ops, "chunked_xla")


def test_a_warning_names_the_shapes_once_each(ops):
  ops["mosaic_gpu"].side_effect = refuse

  def call(length):
    return dispatch.call("op", ops, None, jnp.zeros((2, length)), 3)

  with backend("gpu"):
    with pytest.warns(UserWarning, match=r"float32\[2,5\]. .*chunked_xla"):
      call(5)
    with pytest.warns(UserWarning, match=r"float32\[2,6\]"):
      call(6)
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      call(5)


@pytest.mark.parametrize("name", ["tpu", "gpu", "cpu"])
def test_no_kernel_is_chosen_where_none_is_allowed(ops, name):
  with backend(name), dispatch.kernels(False):
    assert_silent(ops, "chunked_xla")
    assert_silent(ops, "mosaic_gpu", implementation="mosaic_gpu")


def here(kind, capability):
  """As if there were one device, of this kind."""
  device = types.SimpleNamespace(
    device_kind=kind, compute_capability=capability
  )
  return mock.patch.object(jax, "devices", return_value=[device])


@pytest.mark.parametrize(
  "kind", ["NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA H20-3e"]
)
def test_a_hopper_that_is_listed_need_not_be_here(ops, kind):
  with backend("gpu", kind=kind):
    assert_silent(ops, "mosaic_gpu")


def test_a_hopper_that_is_not_listed_is_asked_and_named_once(ops):
  kind = "NVIDIA H100 64GB"
  with backend("gpu", kind=kind), here(kind, "9.0"):
    with pytest.warns(UserWarning, match=f"{kind}.*devices.py.*sparsely.*Add"):
      assert call(ops) == "mosaic_gpu"
    assert_silent(ops, "mosaic_gpu")


@pytest.mark.parametrize(
  "kind, capability",
  [
    ("NVIDIA A100-SXM4-80GB", "8.0"),  # is listed
    ("NVIDIA B200", "10.0"),
    ("NVIDIA L4", "8.9"),
    ("AMD Instinct MI300X", "gfx942"),
  ],
)
def test_a_gpu_that_is_no_hopper_is_told_so(ops, kind, capability):
  with backend("gpu", kind=kind), here(kind, capability):
    with pytest.warns(UserWarning, match=f"op .*{kind}.* {capability}.*9.0"):
      assert call(ops) == "chunked_xla"
  ops["mosaic_gpu"].assert_not_called()


def test_a_gpu_that_nothing_is_known_of_is_told_so(ops):
  with backend("gpu", kind="NVIDIA H300"), here("NVIDIA H200", "9.0"):
    with pytest.warns(UserWarning, match="op .*NVIDIA H300.*9.0.*devices.py"):
      assert call(ops) == "chunked_xla"
    assert_silent(ops, "chunked_xla")
  ops["mosaic_gpu"].assert_not_called()


def test_an_error_is_no_refusal(ops):
  ops["mosaic_tpu"].side_effect = ValueError("a bug")
  with backend("tpu"), pytest.raises(ValueError, match="a bug"):
    call(ops)


@pytest.mark.parametrize("op", [*CALLS])
@pytest.mark.parametrize("implementation", [None, "chunked_xla", "reference"])
def test_hands_each_argument_to_the_parameter_of_its_name(op, implementation):
  arguments, results = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype) if hasattr(x, "shape") else x,
    CALLS[op],
  )

  api = importlib.import_module(f"pallas_kernels.ops.{op}.api")
  taken = implementation or "chunked_xla"
  signature = inspect.signature(api.IMPLEMENTATIONS[taken])
  spies = {
    name: mock.Mock(return_value=results) for name in api.IMPLEMENTATIONS
  }
  with mock.patch.dict(api.IMPLEMENTATIONS, spies):
    actual = getattr(pallas_kernels, op)(
      **arguments, implementation=implementation
    )
  assert actual is results
  call = spies[taken].call_args
  received = signature.bind(*call.args, **call.kwargs).arguments
  assert set(received) == set(arguments)
  for name, value in arguments.items():
    assert received[name] is value
