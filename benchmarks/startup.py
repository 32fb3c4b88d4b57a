"""Seconds until something is seen: --help of the three scripts, and train.py's first step with a tiny model.

Beside them what the libraries take to be imported alone, without which a script does not know its own options. Each is
a process of its own, in turn; the files are in the system's cache after the first round, which is not counted,
unless there is one only.

    python benchmarks/startup.py --config configs/demo/train.yaml      # its rows and tokenizer, a small Llama
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml
from trainer import ROOT, small_llama

IMPORTS = ("import torch", "from trl import SFTConfig", "from trl import SFTTrainer")


def seconds(command: list, until: str | None = None) -> float:
    """How long a command takes, or takes to print a line that begins with `until`."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    seen = None
    for line in process.stdout:
        if until and seen is None and line.startswith(until):
            seen = time.perf_counter() - start
    if process.wait() or (until and seen is None):
        sys.exit(f"{command[0]} failed")
    return seen if until else time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="train.yaml whose rows and tokenizer are taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/benchmark_startup", help="for what is written")
    args = parser.parse_args()
    small_llama(args.work / "small", yaml.safe_load(args.config.read_text("utf-8"))["model_name_or_path"])
    step = ["train.py", "--config", args.config, "--model_name_or_path", args.work / "small", "--output_dir"]
    step += [args.work / "run", "--max_steps", 1, "--logging_steps", 1, "--disable_tqdm", "true"]
    step += ["--save_strategy", "no"]
    jobs = {f"{name}.py --help": ([f"{name}.py", "--help"], None) for name in ("preprocess", "train", "generate")}
    jobs |= {"train.py, to the first step": (step, "{'loss'")}
    jobs |= {f"only `{line}`": (["-c", line], None) for line in IMPORTS}
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(1 if args.rounds == 1 else 0, args.rounds + 1):  # 0: not counted
        for name, (command, until) in jobs.items():
            shutil.rmtree(args.work / "run", ignore_errors=True)
            taken = seconds(command, until)
            found[name] += [taken] if turn else []
    print(f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}")
    print("| | seconds (median) | all rounds |\n|-|-|-|")
    for name, all_ in found.items():
        print(f"| {name} | {statistics.median(all_):.1f} | {', '.join(f'{one:.1f}' for one in all_)} |")


if __name__ == "__main__":
    main()
