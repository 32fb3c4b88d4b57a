"""Test-only launcher: real FSDP2 on CPU processes over gloo.

    accelerate launch --config_file … tests/gloo_fsdp.py train.py …

Without a GPU accelerate would silently run plain data parallel. This answers its one question about the backend as a
machine with GPUs would, and then runs the script as if it had been launched itself. ACCELERATE_TORCH_DEVICE=cpu must
be set before accelerate is imported.
"""

import os
import runpy
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
