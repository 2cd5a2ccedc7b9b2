"""Attention over streams: one function, its kernels, and what each can do.

Every kernel computes, for query t and the keys s that it may see,

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
from gemma_funnel.stream import Stream


@dataclasses.dataclass(frozen=True)
class Capability:
  """What a kernel can do. `platforms` is where it runs, () is anywhere.

  `packed` covers packing and padding; `unequal` is a query stream that is not
  the key stream; `uneven`, slots that are not evenly spaced, where there is a
  window; `skips` is what it does not spend time on.
  """

  softcap: bool
  window: bool
  packed: bool
  unequal: bool
  uneven: bool
  any_length: bool
  softmax_dtypes: tuple[str, ...]
  platforms: tuple[str, ...]
  module: str | None
  skips: str


CAPABILITIES: dict[str, Capability] = {
  "reference": Capability(
    softcap=True,
    window=True,
    packed=True,
    unequal=True,
    uneven=True,
    any_length=True,
    softmax_dtypes=("float32", "bfloat16", "float16"),
    platforms=(),
    module=None,
    skips="nothing",
  ),
  # Unequal streams: skips only where neither is packed.
  "blocked": Capability(
    softcap=True,
    window=True,
    packed=True,
    unequal=True,
    uneven=True,
    any_length=True,
    softmax_dtypes=("float32", "bfloat16", "float16"),
    platforms=(),
    module=None,
    skips="the future, outside the window",
  ),
  # tokamax's Triton backward has no softcap: Hopper and later have one.
  # Unequal streams go by a mask alone: nothing is skipped.
  "tokamax": Capability(
    softcap=True,
    window=True,
    packed=True,
    unequal=True,
    uneven=True,
    any_length=True,
    softmax_dtypes=("float32",),
    platforms=("gpu",),
    module="tokamax",
    skips="the future, outside the window",
  ),
  # jax's own: tokamax's TPU kernel takes neither a window nor a mask that
  # differs from row to row.
  "splash": Capability(
    softcap=True,
    window=True,
    packed=True,
    unequal=False,
    uneven=False,
    any_length=False,
    softmax_dtypes=("float32",),
    platforms=("tpu",),
    module="jax.experimental.pallas.ops.tpu.splash_attention",
    skips="the future, outside the window",
  ),
}


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  queries: Stream,
  keys: Stream,
  *,
  causal: bool,
  window: int | None,
  softcap: float | None,
  softmax_dtype: str = "float32",
  kernel: str = "auto",
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
    causal: whether the future is hidden.
    window: positions that a query sees, itself included; None is all.
    softcap: cap of the logits; None is none.
    softmax_dtype: dtype of logits and weights; sums are float32.
    kernel: "auto" or a name in `CAPABILITIES`.

  Returns:
    [B, T, N, H] in the dtype of `q_BTNH`.

  Raises:
    ValueError: the kernel cannot do what is asked.
  """
  name = choose_kernel(
    kernel,
    softcap=softcap,
    window=window,
    packed=queries.packed or keys.packed,
    unequal=queries is not keys,
    uneven=not (queries.even and keys.even),
    length=q_BTNH.shape[1] // masks.parts(queries),
    softmax_dtype=softmax_dtype,
  )
  return _KERNELS[name](
    q_BTNH,
    k_BSKH,
    v_BSKH,
    queries,
    keys,
    causal=causal,
    window=window,
    softcap=softcap,
    softmax_dtype=softmax_dtype,
  )


def target_platform() -> str:
  """The platform compiled for: the ambient mesh's, or the default backend's.

  Under `jax.set_mesh` of a described topology that is a TPU, whatever the host.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def choose_kernel(kernel: str, **request) -> str:
  """The kernel that does `request` (the keyword arguments of `_lacks`).

  Raises:
    ValueError: `kernel` is none, or lacks something; it names what, and the
      kernels that would do.
  """
  if kernel == "auto":
    platform = target_platform()
    order = {"tpu": ("splash",), "gpu": ("tokamax",)}.get(platform, ())
    if platform == "gpu" and request["softcap"] and not _has_capped_backward():
      order = ()
    for name in (*order, "blocked"):
      if not _lacks(name, **request):
        return name
    return "reference"
  if kernel not in CAPABILITIES:
    raise ValueError(
      f"attention kernel {kernel!r}: expected 'auto' or one of "
      f"{list(CAPABILITIES)}"
    )
  lacks = _lacks(kernel, **request)
  if lacks:
    able = [name for name in CAPABILITIES if not _lacks(name, **request)]
    raise ValueError(
      f"attention kernel {kernel!r} cannot do this: {'; '.join(lacks)}. "
      f"Here these can: {able}"
    )
  return kernel


def _lacks(
  name, *, softcap, window, packed, unequal, uneven, length, softmax_dtype
) -> list[str]:
  """What kernel `name` lacks for a request; empty if it can do it."""
  can = CAPABILITIES[name]
  platform = target_platform()
  lacks = []
  if can.platforms and platform not in can.platforms:
    lacks.append(f"it runs on {'/'.join(can.platforms)}, not on {platform}")
  elif can.module and importlib.util.find_spec(can.module) is None:
    lacks.append(f"the package {can.module} is not installed")
  if softcap is not None and not can.softcap:
    lacks.append("it has no softcap")
  if window is not None and not can.window:
    lacks.append("it has no window")
  if packed and not can.packed:
    lacks.append("it has no segments or padding")
  if unequal and not can.unequal:
    lacks.append("queries and keys must be the same stream")
  if uneven and window is not None and not can.uneven:
    lacks.append("with a window, slots must be evenly spaced")
  if length % 128 and not can.any_length:
    lacks.append(f"the length must be a multiple of 128, not {length}")
  if softmax_dtype not in can.softmax_dtypes:
    lacks.append(f"softmax_dtype must be one of {can.softmax_dtypes}")
  return lacks


def _has_capped_backward() -> bool:
  """Whether this GPU runs a flash backward pass that knows the softcap."""
  capability = getattr(jax.devices()[0], "compute_capability", "0")
  return float(capability) >= 9.0


_KERNELS: dict[str, Callable[..., jax.Array]] = {
  "reference": blocked.reference_attention,
  "blocked": blocked.blocked_attention,
  "tokamax": flash.tokamax_attention,
  "splash": flash.splash_attention,
}
