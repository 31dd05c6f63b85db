"""One process of several: runs commands one after another.

python -m tests.multiprocess.worker --do='[["train", "--config=..."], ...]'
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import json
import sys

from absl import flags

from experiments.core import cli, runtime

FLAGS = cli.new_flags(cluster=True)
_DO = flags.DEFINE_string("do", None, "Commands.", flag_values=FLAGS)


def main(argv):
  """Ends with the first status that is not 0."""
  del argv
  runtime.setup()
  from experiments import evaluate, train
  from experiments.core import device_context
  from research.sharding import Layout

  mains = {"train": train.main, "evaluate": evaluate.main}
  with runtime.cluster(cli.cluster(FLAGS)):
    for sizes in ({"data": 2, "fsdp": 2}, {"tensor": 4, "data": 1}):
      with device_context.on_mesh(Layout(**sizes)) as here:
        print("share", here.share, flush=True)
    for name, *arguments in json.loads(_DO.value):
      status = cli.call(mains[name], [name, *arguments])
      if status:
        sys.exit(status)


if __name__ == "__main__":
  cli.run(main)
