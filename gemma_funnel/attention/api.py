"""Attention over streams: one function, and the table of its kernels.

Every kernel computes, for query t and the keys s that are visible to it,

  softmax_s(softcap * tanh(q_t . k_s / softcap)) . v_s

(without the cap where `softcap` is None). Key s is visible to query t if both
are in one segment, e_s <= e_t (causal; e is the last token of a slot), and
|p_t - p_s| < window (p is its position). A query that sees nothing (padding)
gets zeros. Positions are those of the original text, so a window means the same
in a funnel.
"""

from collections.abc import Callable
import dataclasses
import importlib.util

import jax

from gemma_funnel.attention import blocked, flash, masks
from gemma_funnel.attention.masks import AttentionSpec
from gemma_funnel.stream import Stream


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A way to compute attention, and its limits.

  All do softcaps, windows, packing and padding.

  Attributes:
    attend: (q_BTNH, k_BSKH, v_BSKH, queries, keys, spec) -> o_BTNH.
    unequal: takes a query stream that is not the key stream.
    nonuniform: takes a window where slots are not evenly spaced.
    any_length: takes lengths that are no multiples of 128.
    softmax_dtypes: of logits and weights.
    platforms: where it runs; () is anywhere.
    module: that it needs.
    skips: hidden keys that cost no time.
  """

  attend: Callable[..., jax.Array]
  unequal: bool = True
  nonuniform: bool = True
  any_length: bool = True
  softmax_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
  platforms: tuple[str, ...] = ()
  module: str | None = None
  skips: str = "the future, outside the window"


KERNELS: dict[str, Kernel] = {
  "reference": Kernel(blocked.reference_attention, skips="nothing"),
  # Unequal streams: skips only where neither is packed.
  "blocked": Kernel(blocked.blocked_attention),
  # tokamax's Triton backward has no softcap: Hopper and later have one.
  # Unequal streams go by a mask alone: nothing is skipped.
  "tokamax": Kernel(
    flash.tokamax_attention,
    softmax_dtypes=("float32",),
    platforms=("gpu",),
    module="tokamax",
  ),
  # jax's own: tokamax's TPU kernel takes neither a window nor a mask that
  # differs from row to row.
  "splash": Kernel(
    flash.splash_attention,
    unequal=False,
    nonuniform=False,
    any_length=False,
    softmax_dtypes=("float32",),
    platforms=("tpu",),
    module="jax.experimental.pallas.ops.tpu.splash_attention",
  ),
}


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  queries: Stream,
  keys: Stream,
  *,
  kernel: str = "auto",
  **spec,
) -> jax.Array:
  """Attention of `queries` to `keys`.

  Args:
    q_BTNH: queries, already scaled and rotated.
    k_BSKH: keys; query head n reads key head n // (N / K).
    v_BSKH: values.
    queries, keys: where the T queries and the S keys stand. Kernels that take
      no `unequal` streams want one and the same object. Two streams that are
      not `packed` must both cover the whole of the same rows, as those from
      before and after a reduction do; a part of a row, or a cache, is packed.
    kernel: "auto" or a name in `KERNELS`.
    **spec: the fields of `AttentionSpec`: causal, window, softcap,
      softmax_dtype.

  Returns:
    [B, T, N, H] in the dtype of `q_BTNH`.

  Raises:
    ValueError: the kernel cannot do what is asked.
  """
  spec = AttentionSpec(**spec)
  name = choose_kernel(kernel, queries, keys, spec)
  return KERNELS[name].attend(q_BTNH, k_BSKH, v_BSKH, queries, keys, spec)


def choose_kernel(
  kernel: str, queries: Stream, keys: Stream, spec: AttentionSpec
) -> str:
  """The name of the kernel that attends: `kernel`, or the best for "auto".

  Raises:
    ValueError: no kernel has this name, or it lacks something; the message
      names what, and the kernels that would do.
  """
  lacks = {name: _lacks(name, queries, keys, spec) for name in KERNELS}
  if kernel == "auto":
    platform = target_platform()
    order = {"tpu": ("splash",), "gpu": ("tokamax",)}.get(platform, ())
    if platform == "gpu" and spec.softcap and not _has_capped_backward():
      order = ()
    order = (*order, "blocked")
    return next((name for name in order if not lacks[name]), "reference")
  if kernel not in KERNELS:
    raise ValueError(
      f"attention kernel {kernel!r}: expected 'auto' or one of {list(KERNELS)}"
    )
  if lacks[kernel]:
    able = [name for name in KERNELS if not lacks[name]]
    raise ValueError(
      f"attention kernel {kernel!r} cannot do this: "
      f"{'; '.join(lacks[kernel])}. Here these can: {able}"
    )
  return kernel


def target_platform() -> str:
  """The platform compiled for: the ambient mesh's, or the default backend's.

  Under `jax.set_mesh` of a described topology that is a TPU, whatever the host.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def _lacks(name: str, queries, keys, spec: AttentionSpec) -> list[str]:
  """What a kernel lacks for this; empty if it can do it."""
  kernel, platform = KERNELS[name], target_platform()
  uniform = queries.uniform and keys.uniform
  length = queries.segment_BT.shape[1] // masks.num_context_shards(queries)
  lacks = []
  if kernel.platforms and platform not in kernel.platforms:
    lacks.append(f"it runs on {'/'.join(kernel.platforms)}, not on {platform}")
  elif kernel.module and importlib.util.find_spec(kernel.module) is None:
    lacks.append(f"the package {kernel.module} is not installed")
  if queries is not keys and not kernel.unequal:
    lacks.append("queries and keys must be the same stream")
  if spec.window is not None and not uniform and not kernel.nonuniform:
    lacks.append("with a window, slots must be evenly spaced")
  if length % 128 and not kernel.any_length:
    lacks.append(f"the length must be a multiple of 128, not {length}")
  if spec.softmax_dtype not in kernel.softmax_dtypes:
    lacks.append(f"softmax_dtype must be one of {kernel.softmax_dtypes}")
  return lacks


def _has_capped_backward() -> bool:
  """Whether this GPU runs a flash backward pass that knows the softcap."""
  capability = getattr(jax.devices()[0], "compute_capability", "0")
  return float(capability) >= 9.0
