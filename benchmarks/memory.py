"""What train.py's plan says of memory beside what the process then has at most (VmHWM: Linux, without a GPU).

What follows is for train.py:

    python benchmarks/memory.py --config configs/demo/train.yaml --steps 30
    python benchmarks/memory.py --config configs/demo/train.yaml --steps 20 --freeze_embeddings false
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="train.yaml; further settings for train.py may follow")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/benchmark_memory", help="for what is written")
    args, more = parser.parse_known_args()
    shutil.rmtree(args.work, ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", args.config, *more, "--output_dir", args.work, "--max_steps",
         str(args.steps), "--logging_steps", "1", "--disable_tqdm", "true", "--save_strategy", "no"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    peak = 0.0
    for line in process.stdout:
        if found := re.search(r"memory: about ([0-9.,]+) GiB", line):
            estimate = float(found[1].replace(",", ""))
        if line.startswith("{'loss'"):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
    shutil.rmtree(args.work, ignore_errors=True)
    if process.wait():
        sys.exit("train.py failed")
    print("| settings | estimate, GiB | peak, GiB | estimate : peak | steps |\n|-|-|-|-|-|")
    settings = " ".join([args.config, *more])
    print(f"| {settings} | {estimate:.2f} | {peak:.2f} | {estimate / peak:.2f} | {args.steps} |")


if __name__ == "__main__":
    main()
