"""A page to try checkpoints: one question, two of them side by side, and the article that the answer should come from.

The page is served to this machine only. A question is asked exactly as generate.py asks it.

    python tools/page.py --checkpoint outputs/demo
    python tools/page.py --checkpoint outputs/demo --checkpoint outputs/other --articles data/sample_articles.jsonl

Needs `pip install -r requirements-tools.txt`.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import torch  # noqa: E402
from open_book import bigrams, read_passages  # noqa: E402
from score import UserError as BadFile  # noqa: E402
from transformers import TextIteratorStreamer  # noqa: E402

import generate  # noqa: E402
from generate import UserError  # noqa: E402

held: dict[str, tuple] = {}  # the models of the checkpoints that are side by side: at most two


def load(name: str, prompted_as: str) -> tuple:
    """(model, tokenizer) of a checkpoint, asked with the prompt of `prompted_as`. Raises UserError."""
    if name in held:
        return held[name]
    device, dtype = generate.device_and_dtype()
    model = generate.load_model(name, dtype).to(device).eval()
    tokenizer = generate.load_tokenizer(prompted_as)
    generate.encode([[generate.turn("user", "?", tokenizer)]], tokenizer, model)
    held[name] = model, tokenizer
    return held[name]


def stream(question: str, name: str, prompted_as: str, max_new_tokens: int) -> Iterator[tuple[str, str]]:
    """Yields the answer as far as it is said, and behind it how long it took and how it ended."""
    model, tokenizer = load(name, prompted_as)
    batch = generate.encode([[generate.turn("user", question, tokenizer)]], tokenizer, model)
    stop = generate.stop_tokens(model.generation_config, tokenizer)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = generate.sampling(generate.GenerateArguments(max_new_tokens=max_new_tokens))
    settings |= {"eos_token_id": stop, "pad_token_id": tokenizer.pad_token_id, "streamer": streamer}
    found = []

    def run():
        try:
            with torch.inference_mode():
                found.append(model.generate(**batch, **settings)[0, batch["input_ids"].shape[1] :].tolist())
        finally:
            streamer.end()  # else the page would wait for ever for what failed

    start, said, thread = time.perf_counter(), "", Thread(target=run)
    thread.start()
    for piece in streamer:
        said += piece
        yield said, "…"
    thread.join()
    if not found:
        raise RuntimeError("the model could not answer; the terminal says why")
    ids, seconds = found[0], time.perf_counter() - start
    how = "스스로 끝냄" if ids[-1] in stop else f"{max_new_tokens}토큰에서 잘림"
    yield said.strip(), f"{len(ids)}토큰 · {seconds:.1f}초 · {how}"


def evidence_finder(path: Path):
    """A function from a question to the HTML of the article that BM25 finds, its best paragraph marked."""
    import bm25s

    passages = read_passages(path)
    index = bm25s.BM25()
    index.index([bigrams(passage["text"]) for passage in passages], show_progress=False)

    def find(question: str) -> str:
        found, scores = index.retrieve([bigrams(question)], k=1, show_progress=False)
        if not scores[0][0]:
            return "<p>이 질문과 맞는 글이 없습니다.</p>"
        best = passages[found[0][0]]
        parts = [passage["text"].partition("\n")[2] for passage in passages if passage["title"] == best["title"]]
        marked = best["text"].partition("\n")[2]
        lines = [
            f"<p><mark style='background: #fff3b0'>{escape(p)}</mark></p>" if p == marked else f"<p>{escape(p)}</p>"
            for p in parts
        ]
        return f"<h3>{escape(best['title'])}</h3>{''.join(lines)}"

    return find


def build(models: dict[str, tuple[str, str]], find, max_new_tokens: int):
    """The page. `models`: {how it is called: (checkpoint, whose prompt it is asked with)}."""
    import gradio as gr

    names = list(models)

    def answer(question: str, left: str, right: str):
        question, shown = question.strip(), ["", "", "", ""]
        if not question:
            raise gr.Error("질문을 적어 주세요.", print_exception=False)
        article = find(question)
        for other in set(held) - {left, right}:  # before another is read
            del held[other]
        yield (*shown, article)
        for side, name in enumerate((left, right)):
            shown[2 * side + 1] = "불러오는 중 …"
            yield (*shown, article)
            try:
                for shown[2 * side], shown[2 * side + 1] in stream(question, *models[name], max_new_tokens):
                    yield (*shown, article)
            except UserError as e:
                raise gr.Error(str(e), print_exception=False) from None

    # Fonts of the machine: the default theme would fetch its own from outside.
    font = ["system-ui", "Noto Sans CJK KR", "sans-serif"]
    theme = gr.themes.Default(font=font, font_mono=["monospace"])
    with gr.Blocks(title="두 체크포인트 견주기", analytics_enabled=False) as page:
        gr.Markdown("## 두 체크포인트에 같은 질문")
        with gr.Row():
            question = gr.Textbox(label="질문", placeholder="관평은 누구의 아들인가?", scale=8, autofocus=True)
            button = gr.Button("묻기", variant="primary", scale=1, min_width=90)
        outputs = []
        with gr.Row():
            chosen = []
            for label, name in (("왼쪽", names[0]), ("오른쪽", names[-1])):
                with gr.Column(min_width=280):
                    chosen.append(gr.Dropdown(names, value=name, label=label))
                    said = gr.Textbox(
                        label="답", lines=8, max_lines=12, interactive=False, elem_id=f"answer-{len(chosen)}"
                    )
                    about = gr.Textbox(
                        show_label=False, container=False, interactive=False, elem_id=f"about-{len(chosen)}"
                    )
                    outputs += [said, about]
            with gr.Column(min_width=280):
                outputs.append(gr.HTML("<p>질문에 맞는 글이 여기에 나옵니다.</p>", elem_id="evidence", max_height=460))
        gr.on(
            [button.click, question.submit], answer, [question, *chosen], outputs,
            concurrency_limit=1, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return page, theme


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", required=True, help="checkpoint, run folder or hub model")
    parser.add_argument(
        "--articles", type=Path, default=ROOT / "data/sample_articles.jsonl", help="JSONL: title, text"
    )
    parser.add_argument("--base_model", default="auto", help="as generate.py takes it: auto, none, a name or folder")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens after which an answer is cut off")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--no_browser", action="store_true", help="only print the address")
    args = parser.parse_args()
    try:
        import bm25s  # noqa: F401
        import gradio  # noqa: F401
    except ImportError as e:
        raise UserError(f"{e.name} is missing: pip install -r requirements-tools.txt") from None
    for name, value, (low, high) in (
        ("port", args.port, (1, 65535)),
        ("max_new_tokens", args.max_new_tokens, generate.RANGES["max_new_tokens"]),
    ):
        if not low <= value <= high:
            raise UserError(f"--{name} must be from {low} to {high}, not {value}")
    asked = {name: generate.expand(name) for name in args.checkpoint}
    models = {path: (path, path) for found in asked.values() for path, _ in found}
    if base := generate.base_of(asked, args.base_model):
        models = {base[0]: base, **models}
    with socket.socket() as free:
        if free.connect_ex(("127.0.0.1", args.port)) == 0:
            raise UserError(f"port {args.port} is taken; choose another with --port")
    if not torch.accelerator.is_available():
        generate.keep_memory()
    page, theme = build(models, evidence_finder(args.articles), args.max_new_tokens)
    print(f"http://127.0.0.1:{args.port}  (Ctrl-C ends it)", flush=True)
    page.queue().launch(
        server_name="127.0.0.1", server_port=args.port, share=False, inbrowser=not args.no_browser, theme=theme,
        quiet=True, footer_links=[], enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (UserError, BadFile) as e:
        print(f"page.py: {e}", file=sys.stderr)
        sys.exit(2)
