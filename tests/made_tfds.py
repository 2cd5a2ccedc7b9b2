"""TFDS sets prepared as array_record, with texts of our own."""

import tensorflow_datasets as tfds

TEXT = tfds.features.Text()


def prepare(data_dir, name, features, splits, file_format="array_record"):
  """Writes a set as TFDS does; its own writer needs no tensorflow."""
  set_, _, config = name.partition("/")

  class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, _):
      return {key: enumerate(rows) for key, rows in splits.items()}

    def _generate_examples(self):
      raise NotImplementedError

  Made.name = set_
  builder = Made(data_dir=str(data_dir), file_format=file_format)
  builder.download_and_prepare()


def prepare_sst2(data_dir):
  """GLUE's SST-2, by its names and columns, of 20, 6 and 3 texts."""
  splits = {
    "train": _sentences(20),
    "validation": _sentences(6, 100),
    "test": _sentences(3, 200, -1),
  }
  label = tfds.features.ClassLabel(names=["negative", "positive"])
  prepare(data_dir, "glue/sst2", {"sentence": TEXT, "label": label}, splits)


def _sentences(count, start=0, label=None):
  return [
    {"sentence": f"text é {i}", "label": i % 2 if label is None else label}
    for i in range(start, start + count)
  ]
