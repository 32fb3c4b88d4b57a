"""What is learned (and only that), what a checkpoint holds, and how a run goes on."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA_LIKE_TEMPLATE, ROOT, read_jsonl, run, script
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
import train


def losses(output_dir: Path) -> list[float]:
    return [entry["loss"] for entry in read_jsonl(output_dir / "training_log.jsonl") if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("which", ["tokenizer", "llama_tokenizer"])
def test_loss_is_on_the_answer_and_its_end_of_turn(which, request):
    tokenizer = request.getfixturevalue(which)
    messages = [
        {"role": "user", "content": "조조의 자는?"},
        {"role": "assistant", "content": "맹덕(孟德)이다."},
        {"role": "user", "content": "그럼 유비는?"},
        {"role": "assistant", "content": "현덕이다."},
    ]
    row = train.tokenize_chat(messages, tokenizer, [tokenizer.eos_token_id], answers_only=True)
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "맹덕(孟德)이다.<|eot_id|>현덕이다.<|eot_id|>"
    assert all(label in (-100, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))
    row = train.tokenize_chat(messages, tokenizer, [tokenizer.eos_token_id], answers_only=False)
    assert row["labels"] == row["input_ids"]


def test_white_space_behind_the_end_of_turn_is_not_learned(tokenizer, monkeypatch):
    """Gemma's and Qwen's own templates put a line break behind it."""
    template = LLAMA_LIKE_TEMPLATE.replace('trim + "<|eot_id|>"', 'trim + "<|eot_id|>\\n"')
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [{"role": "user", "content": "자는?"}, {"role": "assistant", "content": "맹덕이다."}]
    row = train.tokenize_chat(messages, tokenizer, [tokenizer.eos_token_id], answers_only=True)
    assert tokenizer.decode(row["input_ids"]).endswith("<|eot_id|>\n")
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "맹덕이다.<|eot_id|>"


def test_a_prompt_is_the_same_on_every_day(finished_run, recipe, chats, monkeypatch):
    """Whatever renders the checkpoint's own files gives the prompt that was trained on, also in other years."""
    import transformers.utils.chat_template_utils as utils

    raw = AutoTokenizer.from_pretrained(train.yaml.safe_load(recipe.read_text())["model_name_or_path"])
    assert "strftime_now" in raw.chat_template
    messages = read_jsonl(chats)[0]["messages"]
    trained = AutoTokenizer.from_pretrained(finished_run / "checkpoint-4")
    first = train.load_tokenizer(raw.name_or_path)
    row = train.tokenize_chat(messages, first, [first.eos_token_id], answers_only=True)
    prompt = row["input_ids"][: next(i for i, label in enumerate(row["labels"]) if label != -100)]

    class LaterDay(utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)

    monkeypatch.setattr(utils, "datetime", LaterDay)
    assert "03 Feb 2031" in raw.apply_chat_template(messages, tokenize=False)
    later = trained.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert later == prompt and "26 Jul 2024" in trained.decode(later)


def test_packed_documents_see_only_themselves(tiny_model, chats):
    tokenizer = train.load_tokenizer(str(tiny_model))
    args = train.TrainingArguments(
        output_dir="x", packing=True, max_length=512, completion_only_loss=True, use_cpu=True
    )
    packed, numbers = train.prepare(
        train.read_rows(chats), "chats", tokenizer, [tokenizer.eos_token_id], args, False, packing=True
    )
    assert numbers["tokens_kept"] == numbers["tokens"] and numbers["sequences"] < numbers["rows"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    collator = train.SFTTrainer(
        model=model,
        args=train.TrainingArguments(
            output_dir="x", packing=True, max_length=512, use_cpu=True, dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=packed,
        processing_class=tokenizer,
    ).data_collator
    sequence = packed[0]
    assert len(sequence["seq_lengths"]) > 1
    batch = collator([sequence])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        start = 0
        for length in sequence["seq_lengths"]:
            alone = model(input_ids=batch["input_ids"][:, start : start + length]).logits[0]
            assert torch.allclose(together[start : start + length], alone, atol=1e-5)
            start += length


def test_every_checkpoint_is_self_contained(finished_run):
    for name in ("checkpoint-4", "checkpoint-8", "final"):
        folder = finished_run / name
        there = {path.name for path in folder.iterdir()}
        assert {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "chat_template.jinja",
            "recipe.json",
        } <= there
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.pad_token == "<|finetune_right_pad_id|>" != tokenizer.eos_token
        assert set(model.generation_config.eos_token_id) == {1, 2}  # <|end_of_text|> and <|eot_id|>: both still end
        assert json.loads((folder / "recipe.json").read_text())["settings"]["learning_rate"] == 1e-3
    assert same(weights(finished_run / "checkpoint-8"), weights(finished_run / "final"))
    card = (finished_run / "final" / "README.md").read_text(encoding="utf-8")
    assert "base_model: " in card and "learning_rate: 0.001" in card and "It answers from memory" in card
    assert not (finished_run / "final" / "training_args.bin").exists()  # a pickle
    log = losses(finished_run)
    assert len(log) == 8 and log[-1] < log[0]
    assert (finished_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_of_held_out_rows_and_of_the_quiz(recipe, chats, tmp_path):
    """Each file has its own loss and accuracy; of the quiz the development split, so that the rest stays unseen."""
    held_out = tmp_path / "held_out.jsonl"
    shutil.copy(chats, held_out)
    result = script(
        "train.py", "--config", recipe, "--output_dir", tmp_path / "run", "--eval_file", held_out, "data/quiz.jsonl",
        "--eval_strategy", "steps", "--eval_steps", "4",
    )  # fmt: skip
    questions = [row for row in read_jsonl(ROOT / "data/quiz.jsonl") if row.get("split") == "dev"]
    assert f"evaluate: {held_out} (24 rows), data/quiz.jsonl ({len(questions)} rows) every 4 steps" in result.stdout
    log = read_jsonl(tmp_path / "run" / "training_log.jsonl")
    for name in ("held_out", "quiz"):
        for measure in ("loss", "mean_token_accuracy"):
            assert [entry["step"] for entry in log if f"eval_{name}_{measure}" in entry] == [4, 8]
    assert not any("eval_mean_token_accuracy" in entry for entry in log)
    held_out_losses = [entry["eval_held_out_loss"] for entry in log if "eval_held_out_loss" in entry]
    assert held_out_losses[1] < held_out_losses[0]  # these were trained on, so it falls

    # The logged loss of the quiz is that of its answers alone, from the very model that was saved.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype=torch.float32).eval()
    tokenizer = train.load_tokenizer(str(tmp_path / "run" / "final"))
    rows = train.read_rows(ROOT / "data/quiz.jsonl", evaluation=True)
    loss, tokens = 0.0, 0
    for row in rows:
        example = train.tokenize_chat(row["messages"], tokenizer, [1, 2], answers_only=True)
        labels = torch.tensor([example["labels"]])
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([example["input_ids"]]), labels=labels).loss.item()
        loss, tokens = loss + mean * (labels != -100).sum().item(), tokens + (labels != -100).sum().item()
    logged = [entry["eval_quiz_loss"] for entry in log if "eval_quiz_loss" in entry][-1]
    assert abs(logged - loss / tokens) < 0.02 * logged  # the mean over batches is not quite that over tokens


def test_a_killed_run_goes_on_as_if_nothing_had_been(recipe, tmp_path):
    """SIGKILL some steps after a checkpoint: the next start ends in the same losses and weights, bit for bit."""
    long = ("--config", recipe, "--max_steps", "60", "--save_steps", "10", "--save_total_limit", "2")
    script("train.py", *long, "--output_dir", tmp_path / "whole")
    command = [sys.executable, ROOT / "train.py", *long, "--output_dir", tmp_path / "killed"]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint-20" / "manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "final").exists()
    assert "going on from" in script("train.py", *long, "--output_dir", tmp_path / "killed").stdout
    assert same(weights(tmp_path / "killed" / "final"), weights(tmp_path / "whole" / "final"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    kept = sorted(folder.name for folder in (tmp_path / "killed").glob("checkpoint-*"))
    assert kept == ["checkpoint-50", "checkpoint-60"]


def test_a_half_written_checkpoint_is_skipped(finished_run, recipe, tmp_path):
    """As after a SIGKILL while checkpoint-8 was being written."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "final")
    (run / "training_log.jsonl").unlink()
    (run / "checkpoint-8" / "manifest.json").unlink()
    result = script("train.py", "--config", recipe, "--output_dir", run)
    assert f"skipping {run}/checkpoint-8: it was not written to its end" in result.stdout
    assert f"going on from {run}/checkpoint-4" in result.stdout
    assert same(weights(run / "final"), weights(finished_run / "final"))
    assert losses(run) == losses(finished_run)
    again = script("train.py", "--config", recipe, "--output_dir", run)
    assert "this run is finished" in again.stdout


def test_a_run_killed_while_its_final_model_was_written_writes_it(finished_run, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    os.rename(run / "final", run / "final.partial")
    result = script("train.py", "--config", recipe, "--output_dir", run)
    assert f"going on from {run}/checkpoint-8" in result.stdout
    assert same(weights(run / "final"), weights(finished_run / "final"))
    assert losses(run) == losses(finished_run) and not (run / "final.partial").exists()


def test_a_run_with_other_settings_is_not_resumed(finished_run, recipe, chats, tmp_path):
    result = script("train.py", "--config", recipe, "--output_dir", finished_run, "--learning_rate", "2e-3", ok=False)
    assert result.returncode == 2 and "learning_rate: 0.001 -> 0.002" in result.stderr
    other = tmp_path / "train.jsonl"
    other.write_text("".join(chats.read_text(encoding="utf-8").splitlines(keepends=True)[:20]), encoding="utf-8")
    result = script("train.py", "--config", recipe, "--output_dir", finished_run, "--train_file", other, ok=False)
    assert result.returncode == 2 and "data_sha256" in result.stderr
    result = script("train.py", "--config", recipe, "--output_dir", finished_run, "--resume", "never", ok=False)
    assert result.returncode == 2 and "earlier run" in result.stderr


def test_dry_run_tells_the_numbers(recipe, chats, tmp_path):
    result = script("train.py", "--config", recipe, "--dry_run", "--output_dir", tmp_path / "run")
    rows = len(read_jsonl(chats))
    for part in (f"{rows} rows", "100.0% of the tokens", "1 devices x 1 sequences x 1 accumulation", "steps: 8 ="):
        assert part in result.stdout
    assert "memory: about" in result.stdout and "disk:" in result.stdout and not (tmp_path / "run").exists()
    result = script(
        "train.py", "--config", recipe, "--dry_run", "--per_device_train_batch_size", "999999999", ok=False
    )
    assert result.returncode == 1 and "cannot fit" in result.stdout


def test_truncation_is_refused_or_told(recipe, tmp_path):
    result = script("train.py", "--config", recipe, "--max_length", "60", "--dry_run", ok=False)
    assert result.returncode == 2 and "row article-" in result.stderr and "over max_length 60" in result.stderr
    result = script("train.py", "--config", recipe, "--max_length", "60", "--dry_run", "--allow_truncation")
    assert "tokens over max_length 60 are cut off" in result.stdout


def test_the_exact_1b_shape_is_counted(llama_tokenizer_folder, chats, tmp_path):
    """Llama 3.2 1B's published shape with the real tokenizer: 1,235,814,400 parameters, 19.8 GB of states."""
    from transformers import LlamaConfig

    folder = tmp_path / "Llama-3.2-1B-Instruct"
    shutil.copytree(llama_tokenizer_folder, folder)
    LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
        eos_token_id=[128001, 128008, 128009],
    ).save_pretrained(folder)  # fmt: skip
    result = script(
        "train.py",
        "--dry_run",
        "--model_name_or_path",
        folder,
        "--train_file",
        chats,
        "--output_dir",
        tmp_path,
        "--bf16",
        "true",
        ok=False,
    )
    assert result.returncode in (0, 1) and "dry run: " in result.stdout  # 1: this machine is too small for it
    assert "1,235,814,400 parameters" in result.stdout
    # 16 bytes a parameter are 18.4 GiB, autocast's copy 2.3, the fp32 gradient of the output layer 1.0
    assert "weights, gradients, Adam 21.7 GiB" in result.stdout, result.stdout


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    train.check_processes()  # no GPU: any number of CPU processes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(train.UserError, match="4 processes were started for 2 GPUs; launch with --num_processes=2"):
        train.check_processes()


def test_the_card_names_a_llama_as_its_licence_asks():
    recipe = {"train_file": "x/train.jsonl", "data_sha256": "0", "settings": {"learning_rate": 1e-5}, "versions": {}}
    card = train.model_card({**recipe, "model_name_or_path": "meta-llama/Llama-3.2-1B-Instruct"})
    assert "# Llama-3.2-1B-Instruct, taught one topic" in card and "Built with Llama" in card
    assert "# Llama-3-8B, taught" in train.model_card({**recipe, "model_name_or_path": "meta-llama/Meta-Llama-3-8B"})
    assert "Built with Llama" not in train.model_card({**recipe, "model_name_or_path": "TinyLlama/TinyLlama-1.1B"})


def test_a_base_model_can_be_given_a_template_and_its_end_of_turn(recipe, tiny_model, tmp_path):
    """A base model's eos is not what a chat template ends a turn with; eos_token names it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").unlink()
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        config = json.loads((base / name).read_text())
        config.update({"eos_token": "<|end_of_text|>"} if name.startswith("tok") else {"eos_token_id": 1})
        (base / name).write_text(json.dumps(config))
    run = ("train.py", "--config", recipe, "--model_name_or_path", base, "--output_dir", tmp_path / "run")
    run += ("--chat_template_path", tiny_model / "chat_template.jinja", "--max_steps", "2")
    result = script(*run, ok=False)
    assert result.returncode == 2 and "name its end-of-turn token in eos_token" in result.stderr
    script(*run, "--eos_token", "<|eot_id|>")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert set(final.generation_config.eos_token_id) == {1, 2}


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3", "gpt2"])
def test_other_kinds_of_models_learn_too(kind, recipe, tokenizer, tmp_path):
    """The demo's kind, one with another norm and untied weights, and one from before rotary positions."""
    from transformers import CONFIG_MAPPING

    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    if kind == "gpt2":
        size = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 1024}
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    config = CONFIG_MAPPING[kind](**size, eos_token_id=eos, bos_token_id=bos, pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = ("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "run", "--packing", "false")
    script("train.py", "--config", recipe, *run)
    found = losses(tmp_path / "run")
    assert sum(found[-3:]) < sum(found[:3])  # each step has other rows
    result = script("generate.py", "--checkpoint", tmp_path / "run", "--prompt", "조조?", "--max_new_tokens", "4")
    assert "step 4" in result.stdout and "step 8" in result.stdout


def test_only_labelled_positions_go_through_the_output_layer(recipe, tmp_path):
    """Elsewhere than on GPUs TRL would score the prompts too; see where main sets _use_triton."""
    watch = tmp_path / "watch.py"
    watch.write_text(
        f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import train
scored, apply = [], train.LogProbs.apply
def watched(hidden, *rest):
    scored.append(len(hidden))
    return apply(hidden, *rest)
train.LogProbs.apply = watched
train.main(*train.parse_args([train.ScriptArguments, train.TrainingArguments], ""))
print("scored", sum(scored))
"""
    )
    once = ("--max_steps", "-1", "--num_train_epochs", "1", "--save_strategy", "no", "--output_dir", tmp_path / "out")
    said = run(sys.executable, watch, "--config", recipe, *once).stdout
    labelled = int(re.search(r"loss on: ([\d,]+) tokens", said)[1].replace(",", ""))
    assert int(re.search(r"scored (\d+)", said)[1]) == labelled


@pytest.mark.parametrize(("capability", "able"), [("avx512_bf16", True), ("bf16", True), ("avx512_f", False)])
def test_bf16_is_taken_where_the_cpu_has_it(monkeypatch, capability, able):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True, "avx2": True})
    assert train.computes_bf16() == able
    assert generate.device_and_dtype()[1] == (torch.bfloat16 if able else torch.float32)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_freed_memory_is_kept():
    """Of 200 MB freed and taken again the kernel hands out hardly a page anew; without it, every one."""
    code = """if True:
        import resource, sys, torch, train
        sys.argv[1:] and train.keep_memory()
        faults = lambda: (torch.ones(50_000_000), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)[1]
        print(min(-faults() + faults() for _ in range(3)))"""  # the first may meet a hole that is too small
    plain, kept = (int(run(sys.executable, "-c", code, *argument).stdout) for argument in ((), ("keep",)))
    assert kept < 1_000 < 40_000 < plain


@pytest.mark.parametrize("softcapping", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_give_what_trl_computes_twice(softcapping, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16), torch.randn(500, 16)
    targets = torch.randint(500, (37,))
    found = []
    for way in (train.LogProbs, train.LogProbs.__base__):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = way.apply(h, w, None, targets, 1.5, 128, softcapping, 0.7, ("log_probs", "entropy", "is_top1"))
        (outputs[0] * torch.arange(37)).sum().backward()
        found.append([outputs[0], outputs[1], outputs[4].float(), h.grad, w.grad])
    for ours, trl in zip(*found, strict=True):
        rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (0.05, 0.1)
        torch.testing.assert_close(ours, trl, rtol=rtol, atol=atol)


def test_steps_whose_logits_do_not_fit_go_trls_way(monkeypatch):
    monkeypatch.setattr(train.LogProbs, "most", 0)
    hidden = torch.randn(3, 4, requires_grad=True)
    outputs = train.LogProbs.apply(hidden, torch.randn(5, 4), None, torch.tensor([0, 1, 4]), 1.0, 2, None, 1.0, ())
    assert outputs[0].grad_fn.name().startswith("LogProbs") and outputs[1] is None


def test_mfu_is_the_share_of_what_the_gpu_can(monkeypatch):
    """1,000 tokens in a second through two GPUs: 6 FLOP a weight and token, 12 x layers x width x length to attend."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=500, head_dim=16,
                         num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(train.trl_utils, "get_peak_flops", lambda name, dtype: 1e9 if "H200" in name else None)
    arguments = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    trainer = SimpleNamespace(_total_train_tokens=1500, counted=500, args=arguments, row_tokens=100, clock=0.0)
    trainer.recipe = {}
    trainer.model = SimpleNamespace(config=config)
    monkeypatch.setattr("time.monotonic", lambda: 1.0)
    found = train.Trainer.speed(trainer)
    model = LlamaForCausalLM(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name and "embed" not in name)
    expected = 1000 * (6 * weights + 12 * 2 * 64 * 100) / (2 * 1e9)
    assert found["tokens_per_second"] == 1000 and found["memory_gib"] == 3
    assert found["mfu"] == pytest.approx(100 * expected, abs=0.1)
    assert (trainer.counted, trainer.clock) == (1500, 1.0)
