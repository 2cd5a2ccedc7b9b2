"""Prepared TensorFlow Datasets, read by index without tensorflow.

Datasets prepared as array_record are read. Those prepared as tfrecord, TFDS's
default, need tensorflow and are refused.
"""

from collections.abc import Sequence
import os
import re
from typing import Any


def one_line(error: Exception) -> str:
  """The start of an error's message, without its line ends."""
  return " ".join(str(error).split())[:200]


def open_split(
  dataset: str, split: str, data_dir: str | None = None, key: str = "split"
) -> Sequence[Any]:
  """The data source of a split, as tfds.data_source returns it.

  It is opened by its folder. By its name, TFDS would look for the dataset's
  code first, and then insist on the version and the file format of the code.

  Args:
    dataset: "NAME[:VERSION]"; the latest version by default.
    split: a split of it, such as "train" or "train[:90%]".
    data_dir: None is $TFDS_DATA_DIR or ~/tensorflow_datasets.
    key: the option that names the split, for errors.

  Raises:
    ValueError: it is not prepared as array_record, or has no such split.
  """
  default = os.path.join("~", "tensorflow_datasets")
  data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or default
  data_dir = os.path.expanduser(data_dir)

  def not_prepared(why: str) -> ValueError:
    return ValueError(
      f"dataset={dataset!r}: cannot be read from data_dir {data_dir}: {why}; "
      "prepare it, as array_record, where there is a network: python -c "
      '"import tensorflow_datasets as tfds, tensorflow_datasets.text; '
      f"tfds.builder('{dataset}', data_dir='{data_dir}', "
      "file_format='array_record').download_and_prepare()\""
    )

  name, _, version = dataset.partition(":")
  folder = os.path.join(data_dir, *name.split("/"))
  versions = [
    name
    for name in (os.listdir(folder) if os.path.isdir(folder) else ())
    if re.fullmatch(r"\d+\.\d+\.\d+", name)
    and os.path.isfile(os.path.join(folder, name, "dataset_info.json"))
  ]
  versions.sort(key=lambda name: [int(part) for part in name.split(".")])
  if not versions:
    raise not_prepared("it is not there")
  if version and version not in versions:
    raise not_prepared(f"it has the versions {versions}")
  folder = os.path.join(folder, version or versions[-1])
  import tensorflow_datasets as tfds

  try:
    source = tfds.builder_from_directory(folder).as_data_source(split=split)
    if len(source):
      source[0]  # Raises if it cannot be decoded.
    return source
  except Exception as e:  # TFDS raises of every kind.
    if "Unknown split" not in str(e):
      raise not_prepared(one_line(e)) from e
    where = f"{key}={split!r}: dataset {dataset!r} in {folder}"
    raise ValueError(f"{where}: {one_line(e)}") from e
