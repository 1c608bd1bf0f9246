"""Public entry point: selects an implementation."""

import functools
from typing import Final

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels import operands
from pallas_kernels.ops.sparse_mla import chunked_xla
from pallas_kernels.ops.sparse_mla import reference
from pallas_kernels.ops.sparse_mla.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.ops.sparse_mla.mosaic_tpu import op as mosaic_tpu

IMPLEMENTATIONS: Final = {
  "mosaic_tpu": mosaic_tpu.sparse_mla,
  "mosaic_gpu": mosaic_gpu.sparse_mla,
  "chunked_xla": chunked_xla.sparse_mla,
  "reference": reference.sparse_mla,
}


def sparse_mla(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"] | operands.QuantizedLatents,
  indices: Int[Array, "B T K"],
  latent_rank: int,
  scale: float,
  *,
  deterministic: bool = False,
  implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """Attention of each query to its selected keys, in absorbed MLA form.

  All heads share one key row `[c; kr]` of width C+R, whose first C values are
  the value too: `out[t, n] = sum_j softmax_j(scale q[t, n] . kv[i_j]) c[i_j]`.
  Softmax and accumulation in fp32. Differentiable in `q` and `kv`, through both
  results, unless latents are in 8 bits. Work and memory are O(T K), except for
  `reference`'s gathered copy.

  Args:
    q: Absorbed queries `[q_nope Wuk^T; q_rope]`.
    kv: Latents and rotated keys `[c; kr]`; or with latents in 8 bits, from
      `latents.quantize`, which are read as numbers of q's dtype, exactly, if
      that is bfloat16 or float32.
    indices: Selected keys of each query. Entries outside [0, S) are ignored, at
      any position. An index that occurs twice counts twice.
    latent_rank: C.
    scale: Multiplies the logits: (H+R)^-1/2 m^2, as without absorption.
    deterministic: Whether kv's gradient must be bitwise reproducible. On a
      Hopper GPU it then takes almost three times as long; kernels elsewhere are
      deterministic anyway. Plain XLA on a GPU also needs
      --xla_gpu_deterministic_ops.
    implementation: A name; `None` takes the fastest, see `dispatch.call`.

  Returns:
    The output, mixed latents in q's dtype, and the logsumexp (natural, fp32) of
    the scaled logits. A query without a valid key gives 0 and -inf.

  Raises:
    ValueError: `latent_rank` exceeds the width of the rows, or is not that of
      latents in 8 bits; or such an attention is differentiated.
  """
  if not 0 < latent_rank <= kv.shape[-1]:
    raise ValueError(
      f"{latent_rank=} must lie in 1..{kv.shape[-1]}, kv's width."
    )
  if isinstance(kv, operands.QuantizedLatents):
    if latent_rank != (C := kv.values.shape[-1]):
      raise ValueError(f"{latent_rank=} must be {C}, the width of kv.values.")
    q, kv = _without_gradient((q, kv))
  implementations = dict(IMPLEMENTATIONS)
  if deterministic:
    implementations["mosaic_gpu"] = functools.partial(
      mosaic_gpu.sparse_mla, deterministic=True
    )
  args = q, kv, indices, latent_rank, scale
  return dispatch.call("sparse_mla", implementations, implementation, *args)


@jax.custom_vjp
def _without_gradient(operands):
  return operands


def _refuse(operands):
  del operands
  raise ValueError(
    "sparse_mla: latents in 8 bits are for inference, and there is no gradient "
    "of an attention to them; give kv as rows [c; kr]."
  )


_without_gradient.defvjp(_refuse, _refuse)
