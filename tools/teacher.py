r"""Let a larger chat model ask further questions on the articles, each answered by words of its passage. Never needed.

The teacher, a local model or an OpenAI-compatible server (vLLM, Ollama), is shown the passages of train.jsonl one by
one; a question whose answer does not stand in the passage word for word is thrown away and counted. What is kept are
rows for the block `files` of preprocess.py. The same command goes on where it was stopped: what is done stands in
OUTPUT_FILE.progress.jsonl. A server's key is taken from the environment variable OPENAI_API_KEY alone.

    python tools/teacher.py --train_file data/demo/train.jsonl --quiz data/quiz.jsonl --model MODEL \
        --output_file data/demo/teacher.jsonl
    python tools/teacher.py --train_file data/demo/train.jsonl --quiz data/quiz.jsonl --model MODEL \
        --base_url http://localhost:8000/v1 --output_file data/demo/teacher.jsonl
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import chain, islice
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from score import UserError, leaks, read_objects, read_quiz, squeeze, write  # noqa: E402

TIMEOUT = 600  # seconds for one reply: a large model on a CPU takes minutes
WAITS = (1, 3, 10)  # seconds before a server that is down or busy is asked again
# A line of a reply, whatever number, bullet or bold type stands around its label; and an answer behind its question.
ITEM = re.compile(r"[\W\d_]*(?:(질문|물음|문제|Q)|정답|답변|답|A)[\s\d*_]*[:：](?:\*\*)?(.*)", re.IGNORECASE)
INLINE = re.compile(r"[\s/|](?:정답|답변|답)[ *]*[:：]")


def read_passages(path: Path, quiz: tuple[dict, dict] | None) -> tuple[dict[str, dict], int]:
    """The whole articles of a training file as {"teacher-ARTICLE-PASSAGE": {"title", "text"}}, copies once.

    Also returns how many passages are left out, of articles on what the quiz withholds. Raises UserError.
    """
    withheld = set()
    for entry in quiz[0]["withheld"] if quiz else []:
        withheld |= {entry["entity"], entry.get("article"), *entry.get("aliases", [])}
    passages = {}
    for where, row in read_objects(path):
        if row.get("kind") == "article":
            try:
                name = "teacher-" + row["id"].removeprefix("article-")
                passages.setdefault(name, {"title": row["title"] + "", "text": row["messages"][-1]["content"] + ""})
            except (KeyError, IndexError, TypeError, AttributeError):
                raise UserError(f"{where}: not an article as preprocess.py writes it") from None
    if not passages:
        raise UserError(f"{path} holds no row of the kind `article`, as preprocess.py writes them")
    shown = {name: passage for name, passage in passages.items() if passage["title"] not in withheld}
    return shown, len(passages) - len(shown)


def read_reply(reply: str, ended: bool) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a reply, either of them perhaps empty; answers stay as they were written."""
    lines = reply.rpartition("</think>")[2].partition("<think>")[0].split("\n")
    if not ended:
        lines.pop()  # half an answer may stand in the passage too
    pairs, question = [], ""
    for asks, text in (item.groups() for item in map(ITEM.match, lines) if item):
        answer = [text]
        if asks:
            question, *answer = INLINE.split(text, maxsplit=1)
        if answer:
            pairs.append((question.strip(" \t*/|"), answer[0].strip()))
            question = ""
    return pairs


def refuse(question: str, answer: str, passage: str, seen: set[str], quiz: tuple[dict, dict] | None) -> str | None:
    """Why a question is thrown away, None if it is kept; `seen` are the kept ones, squeezed."""
    if not squeeze(question):
        return "no question"
    if not squeeze(answer) or answer not in passage:
        return "not a span"
    if squeeze(answer) in squeeze(question):
        return "question contains the answer"
    if squeeze(question) in seen:
        return "asks the same as another"
    if quiz and leaks([{"prompts": [question], "answer": answer, "kind": "teacher"}], *quiz):
        return "gives the quiz away"
    return None


# ---- Teachers: both yield (reply, whether it ended by itself) for each prompt --------------------------------------


def ask_model(prompts: list[str], args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """The replies of a model that generate.py loads and asks, greedily. Raises UserError."""
    import torch  # takes its time to load, and a server needs none

    import generate

    device, auto = generate.device_and_dtype()
    try:
        tokenizer = generate.load_tokenizer(args.model)
        model = generate.load_model(args.model, auto if args.dtype == "auto" else getattr(torch, args.dtype))
        model = model.to(device).eval()
        generate.stop_tokens(model.generation_config, tokenizer)
    except generate.UserError as e:
        raise UserError(str(e).replace("; --base_model none leaves a run's base model out", "")) from None
    greedy = generate.GenerateArguments(max_new_tokens=args.max_new_tokens)
    for i in range(0, len(prompts), args.batch_size):
        for reply in generate.answer(prompts[i : i + args.batch_size], model, tokenizer, greedy):
            yield reply["answer"], reply["ended"]


def ask_server(prompts: list[str], args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """The replies of an OpenAI-compatible server, `batch_size` requests at once. Raises UserError."""
    try:
        parts = urlsplit(args.base_url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not re.fullmatch(r"[!-~]+", args.base_url):
        raise UserError(f"--base_url is an address such as http://localhost:8000/v1, not {args.base_url}")
    url = args.base_url.rstrip("/") + "/chat/completions"
    with ThreadPoolExecutor(args.batch_size) as pool:
        yield from pool.map(lambda prompt: request_reply(url, prompt, args), prompts)


def request_reply(url: str, prompt: str, args: argparse.Namespace) -> tuple[str, bool]:
    """One reply at temperature 0, asked for again where the server is down or busy. Raises UserError."""
    body = {"model": args.model, "messages": [{"role": "user", "content": prompt}]}
    body |= {"temperature": 0, "max_tokens": args.max_new_tokens}
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # not for whom a redirect names
    for wait in (*WAITS, None):
        try:
            with urlopen(request, timeout=TIMEOUT) as response:
                choice = json.load(response)["choices"][0]
                return (choice["message"]["content"] or "") + "", choice.get("finish_reason") != "length"
        except HTTPError as e:
            reason, passes = f"{e.code} {error_message(e)}", e.code in (408, 429) or e.code >= 500
        except (OSError, HTTPException) as e:
            cause = getattr(e, "reason", e)
            reason, passes = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__, True
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            reason, passes = "the reply is not a chat completion; a --base_url usually ends in /v1", False
        if wait is None or not passes:
            raise UserError(f"{url}: {reason}")
        time.sleep(wait)


def error_message(error: HTTPError) -> str:
    """What a server says of its error: {"error": {"message": …}}, {"error": …} or {"message": …}."""
    try:
        said = json.load(error)
        said = said.get("error", said)
        return " ".join((said if isinstance(said, str) else said["message"]).split())
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError):
        return error.reason


# ---- Files ---------------------------------------------------------------------------------------------------------


def read_finished(output: Path, progress: Path, settings: dict, digests: dict[str, str]) -> tuple[dict, list[dict]]:
    """What an earlier run finished, as ({passage: its line of the progress file}, rows of the output file).

    Finished is a passage of the same digest whose rows are all there; a half-written last line is passed over. Raises
    UserError where the files were not made by this tool, or with other settings.
    """
    foreign = UserError(f"{output} and {progress} were not made here, or are damaged; choose another --output_file")
    found, of_passage = [], defaultdict(list)
    try:
        for path in (progress, output):
            data = path.read_bytes() if path.exists() else b""
            found.append([json.loads(line) for line in data[: data.rfind(b"\n") + 1].split(b"\n") if line])
        (before, *lines), rows = found[0] or [settings], found[1]
        for row in rows:
            of_passage[row["id"].rpartition("-")[0]].append(row)
        changed = [key for key in settings if before[key] != settings[key]]
        finished = {
            line["id"]: line
            for line in lines
            if digests.get(line["id"]) == line["sha256"] and len(of_passage[line["id"]]) == line["kept"]
        }
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise foreign from None
    if data and not found[0]:
        raise foreign
    if changed:
        raise UserError(f"{output} was begun with another {' and '.join(changed)}; choose another --output_file")
    return finished, [row for name in finished for row in of_passage[name]]


def to_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append(path: Path, rows: list[dict]):
    """Adds lines to a file. Raises UserError."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as f:
            f.write(to_lines(rows))
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", type=Path, required=True, help="train.jsonl of preprocess.py")
    parser.add_argument("--model", required=True, help="chat model: a folder or hub name, or the server's name for it")
    parser.add_argument("--base_url", help="OpenAI-compatible server in place of a local model, with its /v1")
    parser.add_argument("--output_file", type=Path, required=True, help="JSONL of chats, for the block `files`")
    parser.add_argument("--quiz", type=Path, help="quiz to keep apart: its questions, and all that it withholds")
    parser.add_argument("--questions", type=int, default=5, help="questions asked for, a passage")
    parser.add_argument(
        "--prompt_file",
        type=Path,
        default=Path(__file__).with_name("teacher_prompt.txt"),
        help="what the teacher is told, with {passage}, {title} and {questions}",
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens after which a reply is cut off")
    parser.add_argument("--batch_size", type=int, default=8, help="passages, or requests to a server, at once")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of a local model"
    )
    parser.add_argument("--limit", type=int, help="only the first passages, so many")
    args = parser.parse_args()
    for name in ("questions", "max_new_tokens", "batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    try:
        template = args.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {args.prompt_file}: {getattr(e, 'strerror', None) or e}") from None
    if "{passage}" not in template:
        raise UserError(f"{args.prompt_file} needs {{passage}}, where the passage goes")

    quiz = read_quiz(args.quiz) if args.quiz else None
    passages, left_out = read_passages(args.train_file, quiz)
    output, progress = args.output_file, args.output_file.with_name(f"{args.output_file.name}.progress.jsonl")
    settings = {
        "model": args.model,
        "prompt": digest(template.encode()),
        "questions": args.questions,
        "max_new_tokens": args.max_new_tokens,
        "quiz": digest(args.quiz.read_bytes()) if quiz else None,
    }
    template = template.replace("{questions}", str(args.questions))
    prompts = {
        name: template.replace("{title}", passage["title"]).replace("{passage}", passage["text"])
        for name, passage in passages.items()
    }
    digests = {name: digest(f"{args.model}\n{prompt}".encode()) for name, prompt in prompts.items()}
    finished, rows = read_finished(output, progress, settings, digests)
    todo = [name for name in list(passages)[: args.limit] if name not in finished]
    print(f"{len(passages):,} passages ({left_out:,} more left out for the quiz), {len(finished):,} done before, "
          f"{len(todo):,} to show {args.model} now")  # fmt: skip

    teacher = ask_server if args.base_url else ask_model
    replies = teacher([prompts[name] for name in todo], args) if todo else ()
    replies = iter(tqdm(replies, total=len(todo), unit=" passages", disable=None))
    first = list(islice(replies, 1))  # before anything is written: a mistake leaves nothing behind
    write(progress, to_lines([settings, *finished.values()]))
    write(output, to_lines(rows))
    examples = [question for question, _ in read_reply(template, True)]  # a small model repeats the prompt's own
    seen = {squeeze(question) for question in [*examples, *(row["messages"][0]["content"] for row in rows)]}
    for name, (reply, ended) in zip(todo, chain(first, replies), strict=True):
        title, text = passages[name].values()
        kept, dropped, pairs = [], Counter(), read_reply(reply, ended)
        for question, answer in pairs:
            if reason := refuse(question, answer, text, seen, quiz):
                dropped[reason] += 1
                continue
            seen.add(squeeze(question))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            kept.append({"messages": messages, "title": title, "id": f"{name}-{len(kept) + 1}", "kind": "teacher"})
        if not pairs:
            dropped["unreadable reply"] = 1
        finished[name] = {"id": name, "sha256": digests[name], "kept": len(kept), "dropped": dropped}
        append(output, kept)  # and then the line of progress: rows without one are dropped when the run goes on
        append(progress, [finished[name]])
    thrown = sum((Counter(line["dropped"]) for line in finished.values()), Counter())
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in thrown.most_common()) or "nothing"
    questions = sum(line["kept"] for line in finished.values())
    print(f"wrote {output}: {questions:,} questions on {len(finished):,} passages; thrown away: {reasons}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"teacher.py: {e}", file=sys.stderr)
        sys.exit(2)
