"""How many tokens a second train.py does beside a bare PyTorch loop: same model, batches, dtype and optimizer.

The bare loop is what a reader would write: model(**batch).loss, backward, clip, fused AdamW, no trainer, no logging.
A second one leaves the positions without a label out of the output layer, as train.py does. Each runs in a process of
its own, in turn; the time of a step is the median from the fourth on. The losses of all three must agree.

    python benchmarks/trainer.py --config configs/demo/train.yaml           # Gemma 3 270M, the demo's rows
    python benchmarks/trainer.py --config configs/demo/train.yaml --small   # a small Llama with random weights
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
WAYS = ("train.py", "bare loop", "bare loop, labelled positions only")


def bare(settings: list[str], labelled_only: bool, steps: int):
    """Trains on the batches of train.py's first steps; prints {"seconds", "tokens", "loss"} of each step."""
    sys.path.insert(0, str(ROOT))
    sys.argv = ["train.py", *settings]
    import torch
    from transformers import AutoModelForCausalLM, set_seed
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    import train

    script_args, args, _ = train.parse_args([train.ScriptArguments, train.TrainingArguments], "")
    train.keep_memory()
    name = script_args.model_name_or_path
    tokenizer = train.load_tokenizer(name, args.chat_template_path)
    stop = train.stop_tokens(name, tokenizer, args.eos_token)
    args.completion_only_loss = args.completion_only_loss is not False
    rows = train.read_rows(script_args.train_file)
    dataset, _ = train.prepare(rows, script_args.train_file, tokenizer, stop, args, False, packing=args.packing)
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(not script_args.freeze_embeddings)
    model.train()
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate, weight_decay=0.0, fused=True
    )
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    for step in range(steps):
        batch = collate([dataset[step % len(dataset)]])
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            labels = batch.pop("labels")
            if labelled_only:
                hidden = model.model(**batch, use_cache=False).last_hidden_state
                where = labels[:, 1:] != -100
                logits = model.lm_head(hidden[:, :-1][where])
                loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][where])
            else:
                loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        tokens = batch["input_ids"].numel()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": tokens, "loss": loss.item()}), flush=True)


def trainer(settings: list[str], steps: int, work: Path) -> list[dict]:
    """{"seconds", "tokens", "loss"} of each step of train.py, from when its log lines come."""
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *settings, "--output_dir", output, "--max_steps", str(steps)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    found, last, seen = [], None, 0
    for line in process.stdout:
        if line.startswith("{'loss'"):
            entry, now = json.loads(line.replace("'", '"')), time.perf_counter()
            tokens = float(entry["num_tokens"])
            found.append({"seconds": now - (last or now), "tokens": tokens - seen, "loss": float(entry["loss"])})
            last, seen = now, tokens
    if process.wait():
        sys.exit("train.py failed")
    return found


def small_llama(folder: Path, tokenizer: str):
    """A Llama of 3.1 million parameters and the embedding of its vocabulary, with random weights."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
        eos_token_id=GenerationConfig.from_pretrained(tokenizer).eos_token_id, bos_token_id=words.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="train.yaml whose model, rows and settings are taken")
    parser.add_argument("--small", action="store_true", help="a small Llama with random weights instead of its model")
    parser.add_argument("--steps", type=int, default=20, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run, in turn")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/benchmark_trainer", help="for what is written")
    parser.add_argument("--bare", choices=WAYS[1:], help=argparse.SUPPRESS)
    args, more = parser.parse_known_args()
    settings = ["--config", args.config, *more]
    if args.bare:
        return bare(settings, args.bare == WAYS[2], args.steps)
    if args.small:
        import yaml

        small_llama(args.work / "small", yaml.safe_load(Path(args.config).read_text("utf-8"))["model_name_or_path"])
        settings += ["--model_name_or_path", str(args.work / "small")]
    quiet = "--logging_steps 1 --disable_tqdm true --save_strategy no --report_to none --lr_scheduler_type constant"
    quiet = [*quiet.split(), *"--warmup_steps 0 --weight_decay 0 --train_sampling_strategy sequential".split()]
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        losses = {}
        for way in WAYS:
            if way == WAYS[0]:
                steps = trainer([*settings, *quiet], args.steps, args.work)
            else:
                with tempfile.TemporaryFile("w+") as f:
                    me = [sys.executable, __file__, "--bare", way, "--steps", str(args.steps), *settings, *quiet]
                    subprocess.run(me, cwd=ROOT, check=True, stdout=f, env={**os.environ, "HF_HUB_OFFLINE": "1"})
                    f.seek(0)
                    steps = [json.loads(line) for line in f if line.startswith('{"seconds"')]
            losses[way] = [step["loss"] for step in steps]
            later = steps[3:]
            rates[way].append(statistics.median(step["tokens"] / step["seconds"] for step in later))
        for way in WAYS[1:]:
            apart = max(abs(a - b) / b for a, b in zip(losses[way], losses[WAYS[0]], strict=True))
            print(f"{way}: its losses are within {apart:.1%} of those of train.py")
    print(f"\n{' '.join(settings)}; {os.cpu_count()} cores, {platform.machine()}, {platform.system()}")
    print("| | tokens a second (median of rounds) | all rounds |\n|-|-|-|")
    for way, found in rates.items():
        print(f"| {way} | {statistics.median(found):,.0f} | {', '.join(f'{rate:,.0f}' for rate in found)} |")
    for way in WAYS[1:]:
        print(f"train.py : {way} = {statistics.median(rates[WAYS[0]]) / statistics.median(rates[way]):.2f}")


if __name__ == "__main__":
    main()
