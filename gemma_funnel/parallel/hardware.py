"""Peaks of accelerators, as their makers publish them.

FLOP/s are dense bfloat16 ones, bandwidths bytes a second, of one chip as jax
counts devices.

Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e) and the NVIDIA A100, H100
and H200 data sheets. "ICI" is the sum of a chip's links to others of its slice,
as published in bits; NVLink for GPUs.
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of a chip."""

  flops: float  # bfloat16 FLOP/s.
  memory: int  # Bytes.
  bandwidth: float  # Of memory, bytes/s.
  link: float  # Between chips, bytes/s out of each.


_GB = 10**9
_GIB = 1 << 30
# By what jax calls the device.
CHIPS: dict[str, Chip] = {
  "TPU v4": Chip(275e12, 32 * _GIB, 1228 * _GB, 300 * _GB),
  "TPU v5 lite": Chip(197e12, 16 * _GIB, 819 * _GB, 200 * _GB),
  "TPU v5": Chip(459e12, 95 * _GIB, 2765 * _GB, 600 * _GB),
  "TPU v6 lite": Chip(918e12, 32 * _GIB, 1640 * _GB, 448 * _GB),
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * _GB, 1555 * _GB, 300 * _GB),
  "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * _GB, 2039 * _GB, 300 * _GB),
  "NVIDIA H100 80GB HBM3": Chip(989.4e12, 80 * _GB, 3350 * _GB, 450 * _GB),
  "NVIDIA H100 PCIe": Chip(756e12, 80 * _GB, 2000 * _GB, 300 * _GB),
  "NVIDIA H200": Chip(989.4e12, 141 * _GB, 4800 * _GB, 450 * _GB),
}
_ALIASES = {
  "TPU v5e": "TPU v5 lite",
  "TPU v5p": "TPU v5",
  "TPU v6e": "TPU v6 lite",
}


def chip_of(device: jax.Device) -> Chip | None:
  """Peaks of a device; None if it is not known."""
  kind = device.device_kind
  return CHIPS.get(_ALIASES.get(kind, kind))
