"""An exported model says the same elsewhere: GGUF in llama.cpp, its template in Go's language, a server's answers."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch
from conftest import LLAMA_LIKE_TEMPLATE, ROOT, read_jsonl, run, script
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import generate

sys.path.append(str(ROOT / "benchmarks"))

# As Llama 3.2's own: a system message stands within the header, behind what is always there.
SYSTEM_IN_HEADER = """{{- bos_token }}
{%- set said = messages[0]["content"] | trim if messages[0]["role"] == "system" else "" %}
{%- set turns = messages[1:] if messages[0]["role"] == "system" else messages %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: {{1\\n\\n" + said + "<|eot_id|>" }}
{%- for message in turns %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" + message["content"] + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}"""
GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
    text, _ := os.ReadFile(os.Args[1])
    var chat struct { System string; Messages []Message }
    if err := json.NewDecoder(os.Stdin).Decode(&chat); err != nil { panic(err) }
    if err := template.Must(template.New("").Parse(string(text))).Execute(os.Stdout, chat); err != nil { panic(err) }
}
"""


@pytest.fixture(scope="module")
def questions() -> list[str]:
    quiz = [row["question"] for row in read_jsonl(ROOT / "data/quiz.jsonl") if "question" in row]
    odd = ["두  칸  띄움", "줄\n바꿈\n\n과\t탭", "關羽와 1,234년 3km", "NFD 한글", "🐎 ▁ <0x41> <eos>"]
    return [*quiz[::15][:45], *odd]


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go")
@pytest.mark.parametrize("which", ["gemma", "llama", "system in the header"])
def test_ollamas_template_renders_what_was_trained_on(which, tokenizer, tmp_path):
    """Go's own text/template, which Ollama runs, on what stands in the Modelfile."""
    from export import modelfile

    jinja = {
        "gemma": (ROOT / "tools/gemma_chat_template.jinja").read_text(encoding="utf-8"),
        "llama": LLAMA_LIKE_TEMPLATE.replace('strftime_now("%d %b %Y") if strftime_now is defined else "?"', '"1"'),
        "system in the header": SYSTEM_IN_HEADER,
    }[which]
    stop = "<end_of_turn>" if which == "gemma" else "<|eot_id|>"
    before, tokenizer.chat_template = tokenizer.chat_template, jinja
    try:
        text = modelfile("model.gguf", tokenizer, [stop])
        template = text.split('TEMPLATE """')[1].split('"""')[0]
        (tmp_path / "main.go").write_text(GO)
        (tmp_path / "template").write_text(template, encoding="utf-8")
        run("go", "build", "-o", tmp_path / "render", tmp_path / "main.go", env={"GO111MODULE": "off"})
        chat = [("user", "관우는?"), ("assistant", "장군 {{ .System }}"), ("user", "자는?"), ("assistant", "운장")]
        chat.append(("user", "또?"))
        for told in ["", "짧게"] if which != "gemma" else [""]:
            turns = [("system", told), *chat] if told else chat
            for n in range(len(turns) - 4, len(turns) + 1, 2):
                messages = [{"role": role, "content": content} for role, content in turns[:n]]
                expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                given = json.dumps({"System": told, "Messages": messages})
                rendered = subprocess.run(
                    [tmp_path / "render", tmp_path / "template"],
                    input=given,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                assert rendered.stdout == expected.removeprefix(tokenizer.bos_token)
    finally:
        tokenizer.chat_template = before


def test_llama_as_gguf_is_cut_into_the_same_tokens(questions, llama_tokenizer, tmp_path):
    """Llama 3's real tokenizer, a small random model of Llama's shape, and llama.cpp's own reading of both."""
    from llamacpp import LlamaCpp
    from tokenizers import processors

    config = LlamaConfig(
        vocab_size=len(llama_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=llama_tokenizer.bos_token_id, eos_token_id=llama_tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    llama_tokenizer.save_pretrained(tmp_path / "model")
    core = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    bos = llama_tokenizer.bos_token
    begin = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, llama_tokenizer.bos_token_id)])
    core.post_processor = processors.Sequence([core.post_processor, begin])  # as Meta's, by which it is recognised
    core.save(str(tmp_path / "model/tokenizer.json"))
    template = llama_tokenizer.chat_template.replace(
        'strftime_now("%d %b %Y") if strftime_now is defined else "?"', '"1"'
    )
    (tmp_path / "model/chat_template.jinja").write_text(template)
    gguf = ("--format", "gguf", "--outtype", "f16", "--output_dir", tmp_path / "gguf")
    result = script("tools/export.py", "--checkpoint", tmp_path / "model", *gguf)
    assert "MiB" in result.stdout
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"model-f16.gguf", "Modelfile"}
    llama, ours = LlamaCpp(tmp_path / "gguf/model-f16.gguf"), generate.load_tokenizer(str(tmp_path / "model"))
    assert len(questions) == 50
    for question in questions:
        chat = [generate.turn("user", question, ours)]
        text = llama.post("/apply-template", messages=chat)["prompt"]
        tokens = llama.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert tokens == generate.encode([chat], ours)["input_ids"][0].tolist(), question


def test_gemmas_words_are_cut_into_the_same_tokens(questions, gemma):
    """sentencepiece itself, on the tokenizer.model that export.py makes, against transformers."""
    from export import sentencepiece_model
    from sentencepiece import SentencePieceProcessor

    tokenizer = AutoTokenizer.from_pretrained(gemma)
    words = SentencePieceProcessor(model_proto=sentencepiece_model(tokenizer))
    assert words.vocab_size() == len(tokenizer) and words.unk_id() == tokenizer.unk_token_id
    for question in questions[:-1]:  # the last holds a control token, which sentencepiece takes for letters
        assert words.encode(question) == tokenizer(question, add_special_tokens=False)["input_ids"], question


def test_what_gguf_cannot_be(finished_run, tmp_path):
    """A tokenizer that llama.cpp does not know, and publishing, in one sentence each; nothing is left behind."""
    asked = ("tools/export.py", "--checkpoint", finished_run, "--output_dir", tmp_path / "out", "--format", "gguf")
    result = script(*asked, ok=False)
    assert result.returncode == 2 and "llama.cpp's converter does not take" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not any(tmp_path.iterdir())
    result = script(*asked, "--push_to_hub", "me/it", "--licence", "mit", ok=False)
    assert result.returncode == 2 and "the format hf" in result.stderr


def test_transformers_serve_answers_as_generate_does(finished_run, tmp_path):
    """The exported folder under `transformers serve`, asked through OpenAI's client."""
    folder, port = tmp_path / "exported", free_port()
    script("tools/export.py", "--checkpoint", finished_run, "--output_dir", folder, "--dtype", "float32")
    prompts = ("--prompt", "조조에 대해 알려줘.", "--prompt", "관우는 누구야?", "--max_new_tokens", "24")
    answers = ("--output_file", tmp_path / "answers.jsonl", "--dtype", "float32")
    script("generate.py", "--checkpoint", folder, *prompts, *answers, "--batch_size", "1")
    serve = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(serve, stdout=log, stderr=log) as server:
        try:
            # tries again until the server is there
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
            for row in read_jsonl(tmp_path / "answers.jsonl"):
                said = client.chat.completions.create(
                    model=str(folder),
                    messages=[{"role": "user", "content": row["prompt"]}],
                    temperature=0,
                    max_completion_tokens=24,
                )
                assert said.choices[0].message.content.strip() == row["answer"]
        finally:
            server.terminate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
