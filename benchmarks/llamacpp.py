"""Whether llama.cpp says of the exported model what generate.py says of the checkpoint: tokens, answers, speed.

The checkpoint is exported as GGUF, served by llama.cpp (xllamacpp of requirements-test.txt) on the loopback,
and asked questions taken evenly from a quiz, each as a chat. Compared are the tokens of the prompts, as llama.cpp
renders the template and cuts the text, and the likeliest answers. Where two answers part, the two tokens and how far
apart transformers saw them are printed: hundredths of a nat are a matter of rounding.

    python benchmarks/llamacpp.py --checkpoint outputs/demo
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import Request, urlopen

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
import xllamacpp  # noqa: E402

import generate  # noqa: E402


class LlamaCpp:
    """llama.cpp's server, in this process."""

    def __init__(self, gguf: Path):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(gguf), 2048, 1, 0
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body) -> dict:
        request = Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request) as response:
            return json.load(response)


@torch.inference_mode()
def parting(model, tokenizer, question: str, ours: str, theirs: str) -> str:
    """Where two answers part, and how much more likely transformers holds the one it took, in nats."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (ours, theirs)]
    end = tokenizer.eos_token_id
    same = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(len(answer) for answer in ids))
    took = [answer[same] if same < len(answer) else end for answer in ids]
    prompt = generate.encode([[generate.turn("user", question, tokenizer)]], tokenizer)["input_ids"]
    logits = model(torch.cat([prompt, torch.tensor([ids[0][:same]], dtype=torch.long)], 1)).logits[0, -1]
    a, b = (tokenizer.decode(token) for token in took)
    return f"{question!r}: token {same + 1} {a!r}, not {b!r}, {(logits[took[0]] - logits[took[1]]).item():.3f} nats"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, run folder or hub model")
    parser.add_argument("--quiz", type=Path, default=ROOT / "data/quiz.jsonl", help="where the questions are from")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--outtype", nargs="+", default=["f16", "q8_0"], choices=["f16", "q8_0"])
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.quiz.read_text(encoding="utf-8").splitlines()]
    questions = [line["question"] for line in lines if "question" in line]
    questions = [questions[i * len(questions) // args.questions] for i in range(args.questions)]
    generate.keep_memory()
    name, _ = generate.expand(args.checkpoint)[-1]
    model, tokenizer = generate.load_model(name, torch.float32).eval(), generate.load_tokenizer(name)
    start, ours = time.perf_counter(), []
    for i in range(0, len(questions), 8):
        settings = generate.GenerateArguments(max_new_tokens=args.max_new_tokens)
        ours += generate.answer(questions[i : i + 8], model, tokenizer, settings)
    rate = sum(row["tokens"] for row in ours) / (time.perf_counter() - start)
    print(f"{name}, {len(questions)} questions, at most {args.max_new_tokens} tokens; generate.py: fp32, batches of 8")
    print("| | MiB | prompts of the same tokens | same answers | tokens a second |\n|-|-|-|-|-|")
    print(f"| generate.py | – | – | – | {rate:.1f} |", flush=True)
    parted = []
    for outtype in args.outtype:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "gguf"
            command = [sys.executable, ROOT / "tools/export.py", "--checkpoint", name, "--output_dir", out]
            subprocess.run([*command, "--format", "gguf", "--outtype", outtype], check=True, capture_output=True)
            llama = LlamaCpp(gguf := out / f"model-{outtype}.gguf")
            same_tokens, same_answers, said, seconds = 0, 0, 0, 0.0
            for question, our in zip(questions, ours, strict=True):
                chat = [generate.turn("user", question, tokenizer)]
                text = llama.post("/apply-template", messages=chat)["prompt"]
                tokens = llama.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
                same_tokens += tokens == generate.encode([chat], tokenizer)["input_ids"][0].tolist()
                found = llama.post(
                    "/v1/chat/completions", messages=chat, temperature=0, max_tokens=args.max_new_tokens
                )
                their = found["choices"][0]["message"]["content"].strip()
                said += found["usage"]["completion_tokens"]
                seconds += found["timings"]["prompt_ms"] / 1000 + found["timings"]["predicted_ms"] / 1000
                same_answers += their == our["answer"]
                if their != our["answer"]:
                    parted.append(f"{outtype}: {parting(model, tokenizer, question, our['answer'], their)}")
            size = gguf.stat().st_size / 2**20
            print(
                f"| llama.cpp, {outtype} | {size:.0f} | {same_tokens} | {same_answers} | {said / seconds:.1f} |",
                flush=True,
            )
            del llama
    print("\n".join(parted))


if __name__ == "__main__":
    try:
        main()
    except generate.UserError as e:
        sys.exit(f"generate.py: {e}")
