"""How fast generate.py answers beside the way of the article, one question at a time, and whether the answers differ.

One model in one process; the questions are answered in turn by the article's loop (chat template, model.generate,
decode) and by generate.py's function in batches of several sizes. The answers of all must agree in fp32; how many
differ in bf16 is printed.

    python benchmarks/generate.py --model models/gemma-3-270m                    # 64 questions, 256 new tokens
    python benchmarks/generate.py --model models/gemma-3-270m --dtype float32 --questions 16 --max_new_tokens 64
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import generate  # noqa: E402


@torch.inference_mode()
def one_at_a_time(questions: list[str], model, tokenizer, tokens: int) -> list[tuple[str, int]]:
    """(answer, tokens) of each question."""
    answers = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
            eos_token_id=generate.stop_tokens(model.generation_config, tokenizer), pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append((tokenizer.decode(new, skip_special_tokens=True).strip(), len(new)))
    return answers


def in_batches(questions: list[str], model, tokenizer, tokens: int, size: int) -> list[tuple[str, int]]:
    args = generate.GenerateArguments(max_new_tokens=tokens)
    batches = [questions[i : i + size] for i in range(0, len(questions), size)]
    rows = [row for batch in batches for row in generate.answer(batch, model, tokenizer, args)]
    return [(row["answer"], row["tokens"]) for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model with a chat template")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16; auto: as generate.py takes it")
    parser.add_argument("--quiz", type=Path, default=ROOT / "data/quiz.jsonl", help="where the questions are from")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=1, help="how often each is measured, in turn")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.quiz.read_text(encoding="utf-8").splitlines()]
    questions = [line["question"] for line in lines if "question" in line][: args.questions]
    device, auto = generate.device_and_dtype()
    if device.type == "cpu":
        generate.keep_memory()
    dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
    model, tokenizer = generate.load_model(args.model, dtype).to(device).eval(), generate.load_tokenizer(args.model)
    common = (model, tokenizer, args.max_new_tokens)
    ways = {"one at a time": lambda: one_at_a_time(questions, *common)}
    ways |= {f"batches of {n}": lambda n=n: in_batches(questions, *common, n) for n in args.batch_sizes}
    in_batches(questions[:2], model, tokenizer, 8, 2)  # what is done once
    found, speeds = {}, {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way()
            speeds[name].append(sum(tokens for _, tokens in found[name]) / (time.perf_counter() - start))
            print(f"{name}: {speeds[name][-1]:.1f} tokens a second", flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"{args.model}, {len(questions)} questions, {args.max_new_tokens} new tokens, {dtype}, {where}")
    print("| | tokens a second (median) | times as fast | answers that differ |\n|-|-|-|-|")
    alone = statistics.median(speeds["one at a time"])
    for name, rates in speeds.items():
        differ = sum(a != b for (a, _), (b, _) in zip(found[name], found["one at a time"], strict=True))
        rate = statistics.median(rates)
        print(f"| {name} | {rate:.1f} | {rate / alone:.2f} | {differ} of {len(questions)} |")
    if dtype == torch.float32 and any(found[name] != found["one at a time"] for name in ways):
        sys.exit("in float32 the answers should not differ")


if __name__ == "__main__":
    try:
        main()
    except generate.UserError as e:
        sys.exit(f"generate.py: {e}")
