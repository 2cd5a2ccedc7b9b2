r"""Memory and time of a pretraining step on a TPU slice that is not at hand.

  python tpu/plan.py --config=configs/pretrain_gemma2_2b.py --topology=v5p:4x4x4
  python tpu/plan.py --config=configs/pretrain_gemma2_2b.py \
    --topology=v5e:16x16 --search

Compiles the real step for the slice (on this machine, with the extra "tpu"),
and prints bytes a chip by kind, whether they fit, FLOPs, what chips send each
other by mesh axis, and the least time of a step. --search tries meshes,
remats and parts of the batch (accumulate), the most promising first, until one
fits. --out writes plan.json and plan.md.
"""

import argparse
import json
import math
import os
import pathlib

# The devices are described: none is opened.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from gemma_funnel import atomic, checks, cli  # noqa: E402
from gemma_funnel.training import aot  # noqa: E402

_FLAGS = {
  "topology": dict(
    required=True, metavar="NAME", help="such as v5p:4x4x4, v5e:16x16, v6e:8x8"
  ),
  "slices": dict(type=int, default=1, metavar="N", help="of it (mesh.slice)"),
  "search": dict(action="store_true", help="tries meshes and remats"),
  "most": dict(
    type=int, default=6, metavar="N", help="compilations of a search"
  ),
  "out": dict(metavar="DIR", help="a folder for plan.json and plan.md"),
}

_HEADER = (
  "| mesh | remat | parts | fits | parameters | optimizer | activations "
  "| temporaries | total of GiB | PFLOP a step | sent GiB "
  "| compute / send / memory s | least step s | MFU at most |"
)


def run(config, **flags) -> None:
  """Prints the plan, or those of a search."""
  values = argparse.Namespace(**flags)
  checks.require_int("slices", values.slices, 1)
  checks.require_int("most", values.most, 1)
  config.mesh.slice = values.slices
  if values.out:  # Before what takes minutes.
    os.makedirs(values.out, exist_ok=True)
  devices = aot.slice_devices(values.topology, values.slices)
  kind = devices[0].device_kind
  what = f"{len(devices)} x {kind} ({values.topology}" + (
    f", {values.slices} slices)" if values.slices > 1 else ")"
  )
  shape = f"batch {config.batch_size} x {config.length}, funnel {config.funnel}"
  lines = [f"{what}: {shape}", "", _HEADER, "|" + "---|" * _HEADER.count(" |")]
  print("\n".join(lines), flush=True)
  found = []
  plans = (
    aot.search(config, devices, most=values.most)
    if values.search
    else [aot.plan(config, devices)]
  )
  for plan in plans:
    found.append(plan)
    lines.append(_line(plan))
    print(lines[-1], flush=True)
  lines += ["", _verdict(found, len(devices))]
  print("\n".join(lines[-2:]), flush=True)
  if values.out:
    folder = pathlib.Path(values.out)
    atomic.write_text(folder / "plan.md", "\n".join(lines) + "\n")
    record = dict(
      topology=values.topology,
      slices=values.slices,
      device=kind,
      devices=len(devices),
      config=json.loads(config.to_json()),
      plans=[plan.as_row() for plan in found],
    )
    encoded = json.dumps(record, indent=1)
    atomic.write_text(folder / "plan.json", f"{encoded}\n")


def _line(plan: aot.Plan) -> str:
  row = plan.as_row()
  line = (
    f"| {row['mesh']} | {row['remat']} | {row['accumulate']} | {row['fits']} "
    f"| {row['parameters']:.2f} | {row['optimizer']:.2f} "
  )
  if plan.error is not None:
    return f"{line}| {plan.error} | | | | | | | |"
  axes = [f"{axes} {x:.2f}" for axes, x in row["sent"].items()]
  sent = ", ".join(axes) or "none"
  times = " / ".join(
    f"{row[name]:.3g}" for name in ("compute_s", "send_s", "memory_s")
  )
  return (
    f"{line}| {row['activations']:.2f} | {row['temporaries']:.2f} "
    f"| {row['total']:.2f} of {row['of']:.0f} | {row['flops'] / 1e15:.2f} "
    f"| {sent} | {times} | {row['step_s']:.3g} | {row['mfu_bound']:.0%} |"
  )


def _verdict(found: list[aot.Plan], count: int) -> str:
  fitting = [plan for plan in found if plan.fits]
  if not found:
    return "No mesh divides the model, the batch and the devices."
  if not fitting:
    return f"Nothing fits on {count} chips: more of them, or larger ones."
  best = min(fitting, key=lambda plan: plan.step_s)
  mesh = [f"--config.mesh.{axis}={n}" for axis, n in best.mesh.items()]
  chips = math.prod(best.mesh.values())
  return (
    f"Fastest that fits on {chips} chips: {' '.join(mesh)} "
    f"--config.model.remat={best.remat} --config.accumulate={best.accumulate}"
  )


if __name__ == "__main__":
  cli.main(run, "tpu/plan.py", _FLAGS)
