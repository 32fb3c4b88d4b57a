"""How much memory generate.py needs to read the FSDP shards of a model, beside what the weights take.

Writes a model of Llama 3.2 1B's shape with random weights in two shards, as two processes would, and reads it in bf16
in a fresh process: the highest memory above what the process had before.

    python benchmarks/shards.py                                  # 5 GB of disk, 12 GB of memory
    python benchmarks/shards.py --hidden_size 256 --layers 4     # small
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import generate  # noqa: E402


def write_shards(rank: int, folder: Path, hidden: int, layers: int):
    """Runs in each of two processes; the weights are those of one seed."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=hidden // 32, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if rank == 0:
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    weights = {name: distribute_tensor(weight, mesh, [Shard(0)]) for name, weight in model.state_dict().items()}
    dcp.save({"model": weights}, checkpoint_id=folder / generate.SHARDS)
    torch.distributed.destroy_process_group()


def read(folder: Path):
    generate.keep_memory()
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    model = generate.load_model(str(folder), torch.bfloat16)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before  # ru_maxrss: in KiB on Linux
    weights = 2 * model.num_parameters()
    print(
        f"{model.num_parameters():,} parameters, bf16 {weights / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB above "
        f"the process, {peak / weights:.2f} times the weights, {seconds:.1f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/benchmark_shards")
    parser.add_argument("--read", action="store_true", help="only read what is there")
    args = parser.parse_args()
    if args.read:
        return read(args.work)
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    torch.multiprocessing.spawn(write_shards, (args.work, args.hidden_size, args.layers), nprocs=2)
    subprocess.run([sys.executable, __file__, "--read", "--work", args.work], check=True)


if __name__ == "__main__":
    main()
