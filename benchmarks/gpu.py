"""Tokens a second, MFU and memory of training Llama 3.2 1B's shape on a GPU: the article's settings, `trl sft`, ours.

The weights are drawn at random, since speed does not depend on them; tokenizer, rows and settings are real. Each way
of benchmarks/gpu.yaml runs in a process of its own, in turn; a way that does not run is told and left out.

    python benchmarks/gpu.py --tokenizer meta-llama/Llama-3.2-1B-Instruct
    python benchmarks/gpu.py --tokenizer FOLDER --hidden_size 64 --layers 2 --steps 6     # small, without a GPU

MFU is the share of the GPU's dense bf16 peak that a model's own arithmetic takes: per token 6 FLOPs a parameter (two
forward, four backward; the tied embedding counts once, as output layer) and 6 x layers x width x row for attention
(scores and values, 4 x width a pair of tokens, three times for forward and backward, half of the pairs as a token sees
only those before it), `row` the mean tokens of a document. What is computed twice (activation checkpointing) is not
counted, and LoRA's base weights need no gradients: 4 FLOPs a parameter there. Peaks are those of TRL's table.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
# Runs a program or module as it is and prints the most memory that it had: of the GPU, or of the process without one.
PEAK = """
import atexit, resource, runpy, sys
def tell():
    import torch
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("peak", torch.cuda.max_memory_reserved() if torch.cuda.is_available() else own)
atexit.register(tell)
sys.argv = sys.argv[1:]
run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
run(sys.argv[0], run_name="__main__")
"""
COMMON = "--disable_tqdm true --logging_steps 2 --save_strategy no --eval_strategy no --report_to none"


def make_model(folder: Path, tokenizer: str, hidden: int, layers: int):
    """Llama 3.2 1B's config with random weights, or a smaller one of its kind, with a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), head_dim=64,
        max_position_embeddings=131072, tie_word_embeddings=True, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where 1.2 billion numbers are drawn in no time
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)


def run(name: str, command: list[str], work: Path) -> dict | None:
    """{"rate": tokens a second, "peak": bytes, and what train.py's plan says}; None where it does not run.

    The rate is that of all steps but the first ones, in which a GPU's kernels are chosen and compiled.
    """
    shutil.rmtree(work / "run", ignore_errors=True)
    with open(work / "errors.txt", "w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", PEAK, *map(str, command), "--output_dir", work / "run"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        points, found = [], {}
        for line in process.stdout:
            if line.startswith("{'loss'"):
                tokens = float(re.search(r"'num_tokens': '?([\d.e+]+)", line)[1])
                points.append((time.perf_counter(), tokens))
            for key, pattern in (
                ("peak", r"^peak (\d+)"),
                ("estimate", r"memory: about ([\d.,]+) GiB"),
                ("tokens", r"rows, ([\d,]+) tokens"),
                ("rows", r"([\d,]+) rows"),
                ("lora", r"([\d,]+) of them learned \(LoRA\)"),
            ):
                if match := re.search(pattern, line):
                    found[key] = float(match[1].replace(",", ""))
        shutil.rmtree(work / "run", ignore_errors=True)
        if process.wait():
            errors.seek(0)
            print(f"{name} does not run: {(errors.read().strip().splitlines() or ['?'])[-1][:300]}", flush=True)
            return None
    points = points[len(points) // 3 :]
    (start, before), (end, after) = points[0], points[-1]
    return found | {"rate": (after - before) / (end - start)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks/gpu.yaml", help="the ways")
    parser.add_argument(
        "--tokenizer", required=True, help="Llama 3's, as a folder or a hub name, with a chat template"
    )
    parser.add_argument("--hidden_size", type=int, default=2048, help="Llama 3.2 1B's")
    parser.add_argument("--layers", type=int, default=16, help="Llama 3.2 1B's")
    parser.add_argument("--train_file", type=Path, help="rows for all ways, in place of their own")
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    parser.add_argument("--rounds", type=int, default=1, help="how often each way is run, in turn")
    parser.add_argument("--only", nargs="+", help="only these ways")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/benchmark_gpu", help="3 GB of room")
    args, more = parser.parse_known_args()
    recipe = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    ways = {name: way for name, way in recipe["ways"].items() if name in (args.only or recipe["ways"])}
    if unknown := set(args.only or []) - set(recipe["ways"]):
        sys.exit(f"--only: {args.config} has no way {', '.join(unknown)}; its ways are {', '.join(recipe['ways'])}")
    model = args.work / f"llama-{args.hidden_size}-{args.layers}"
    if not (model / "tokenizer_config.json").exists():  # written last
        making = (model, args.tokenizer, args.hidden_size, args.layers)
        maker = get_context("spawn").Process(target=make_model, args=making)  # what it takes of the GPU is given back
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit(f"no model with the tokenizer {args.tokenizer} could be made; why stands above")

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.utils import get_peak_flops

    cuda = torch.cuda.is_available()
    found: dict[str, list[dict]] = {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            common = ["--model_name_or_path", model, "--max_steps", args.steps, *COMMON.split(), *more]
            if name == "trl sft":
                ours = yaml.safe_load((ROOT / "configs/three_kingdoms/train.yaml").read_text(encoding="utf-8"))
                rows, train_file = args.work / "rows", args.train_file or ROOT / ours["train_file"]
                if not train_file.exists():
                    sys.exit(f"there is no file {train_file}; {args.config} says how it is made")
                rows.mkdir(exist_ok=True)  # load_dataset takes a folder
                shutil.copy(train_file, rows / "train.jsonl")
                here = [] if cuda else ["--use_cpu", "true", "--bf16", "false"]
                command = ["trl.scripts.sft", "--dataset_name", rows, *here, *common]
            else:
                own = ["--train_file", args.train_file] if args.train_file else []
                command = ["train.py", *shlex.split(way), "--eval_file=", *own, *common]
            if result := run(name, command, args.work):
                found.setdefault(name, []).append(result)

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    peak = get_peak_flops(torch.cuda.get_device_name(), "bfloat16") if cuda else None
    device = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"\nLlama of {parameters:,} parameters, {args.steps} steps, {args.rounds} rounds; {device}")
    if peak:
        print(f"peak in bf16: {peak / 1e12:,.0f} TFLOP/s")
    print(f"| | tokens a second | : {recipe['reference']} | MFU | peak memory, GiB | estimated | on one of two GPUs |")
    print("|-|-|-|-|-|-|-|")
    reference = found.get(recipe["reference"])
    gathered = 2 * (config.vocab_size * config.hidden_size + parameters // config.num_hidden_layers)
    for name, results in found.items():
        rate = statistics.median(result["rate"] for result in results)
        told = results[0]
        lora = "lora" in told
        rows = told if "rows" in told else found.get("configs/three_kingdoms", [{}])[0]  # what `trl sft` has, too
        row = rows["tokens"] / rows["rows"] if rows else 0
        flops = (4 if lora else 6) * parameters + 6 * config.num_hidden_layers * config.hidden_size * row
        ratio = f"{rate / statistics.median(r['rate'] for r in reference):.2f}" if reference else "–"
        most = max(result["peak"] for result in results)
        # fp32 weights, gradients, Adam's two moments: half of them, and a block and the embedding gathered
        half = f"{(most - 8 * parameters + gathered) / 2**30:.1f}" if cuda and not lora else "–"
        mfu = f"{flops * rate / peak:.1%}" if peak and row else "–"
        estimate = f"{told['estimate']:.1f}" if "estimate" in told else "–"
        print(f"| {name} | {rate:,.0f} | {ratio} | {mfu} | {most / 2**30:.1f} | {estimate} | {half} |")


if __name__ == "__main__":
    main()
