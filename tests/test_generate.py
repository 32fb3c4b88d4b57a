"""Which checkpoints are asked, with which prompt, and what is written about the answers."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, read_jsonl, script

import generate


def test_a_run_is_asked_in_step_order_after_its_base(finished_run, tiny_model, tmp_path):
    answers = tmp_path / "answers.jsonl"
    questions = tmp_path / "questions.jsonl"
    rows = [
        {"id": "q1", "question": "조조의 자는?", "tier": "A", "answer": "맹덕"},
        {"id": "q2", "prompt": "유비의 자는?"},
    ]
    questions.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    result = script(
        "generate.py", "--checkpoint", finished_run, "--prompts_file", questions, "--max_new_tokens", "12",
        "--output_file", answers,
    )  # fmt: skip
    written = read_jsonl(answers)
    expected = [(str(tiny_model), 0), (f"{finished_run}/checkpoint-4", 4), (f"{finished_run}/checkpoint-8", 8)]
    assert [(row["checkpoint"], row["step"]) for row in written] == [pair for pair in expected for _ in range(2)]
    assert [row["id"] for row in written] == ["q1", "q2"] * 3 and written[0]["tier"] == "A"
    assert written[0]["prompt"] == "조조의 자는?" and written[0]["question"] == "조조의 자는?"
    assert written[0]["row_answer"] == "맹덕"  # a field of the name of one of ours is kept beside it
    for row in written:
        assert 0 < row["tokens"] <= 12 and (row["ended"] or row["tokens"] == 12) and row["seconds"] > 0
    assert "step 8" in result.stdout and "조조의 자는?" in result.stdout
    assert not any("final" in row["checkpoint"] for row in written)  # the same step as checkpoint-8


def test_final_is_asked_where_the_last_checkpoint_is_another(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoint-8")
    asked = {str(run): generate.expand(str(run))}
    assert asked[str(run)] == [(f"{run}/checkpoint-4", 4), (f"{run}/final", 8)]
    assert generate.base_of(asked, "none") is None and generate.base_of(asked, "x/y") == ("x/y", "x/y")
    one = str(run / "final")
    assert generate.base_of({one: generate.expand(one)}, "auto") is None  # one checkpoint was asked for
    assert generate.base_of(asked, "auto")[1] == f"{run}/checkpoint-4"  # asked with its own run's prompt


def test_twenty_checkpoints_are_asked_one_model_at_a_time(finished_run, tmp_path, monkeypatch, capsys):
    """Each is gone before the next is read, and nothing but weights is read: the optimizer's files are broken here."""
    run, alive, load = tmp_path / "run", weakref.WeakSet(), generate.load_model
    for step in range(1, 21):
        folder = shutil.copytree(finished_run / "checkpoint-8", run / f"checkpoint-{step}")
        recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        (folder / "recipe.json").write_text(json.dumps({**recipe, "step": step}), encoding="utf-8")
        (folder / "optimizer.pt").write_bytes(b"no optimizer")

    def load_alone(*args):
        assert not list(alive)
        alive.add(model := load(*args))
        return model

    monkeypatch.setattr(generate, "load_model", load_alone)
    arguments = {"checkpoint": [str(run)], "prompt": ["조조의 자는?"], "max_new_tokens": 2}
    generate.main(generate.GenerateArguments(**arguments), "")
    shown = capsys.readouterr().out
    assert [int(step) for step in re.findall(r", step (\d+):", shown)] == list(range(21))


def test_half_written_checkpoints_are_named_and_left_out(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "checkpoint-8" / "trainer_state.json").unlink()
    assert [step for _, step in generate.expand(str(run))] == [4, 8]
    assert "checkpoint-8: it was not written to its end" in capsys.readouterr().err


def test_answers_do_not_depend_on_the_batch_size(finished_run):
    tokenizer = generate.load_tokenizer(str(finished_run / "final"))
    model = generate.load_model(str(finished_run / "final"), torch.float32).eval()
    questions = [
        "조조?",
        "유비에 대해 아주 자세히 알려줘. 긴 질문이다.",
        "관우",
        "적벽 대전은 언제 있었어?",
        "하나 더",
    ]
    args = generate.GenerateArguments(max_new_tokens=16)
    together = generate.answer(questions, model, tokenizer, args)
    alone = [generate.answer([question], model, tokenizer, args)[0] for question in questions]
    assert [a["answer"] for a in together] == [a["answer"] for a in alone]
    assert [a["tokens"] for a in together] == [a["tokens"] for a in alone]


def test_an_answer_ends_at_any_of_the_stop_tokens(finished_run):
    tokenizer = generate.load_tokenizer(str(finished_run / "final"))
    model = generate.load_model(str(finished_run / "final"), torch.float32).eval()
    assert set(generate.stop_tokens(model.generation_config, tokenizer)) == {1, 2}
    favourite = torch.full((len(tokenizer),), -1e9)
    favourite[1] = 1e9  # <|end_of_text|>, which is not the tokenizer's eos
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + favourite)
    (answer,) = generate.answer(["조조?"], model, tokenizer, generate.GenerateArguments(max_new_tokens=16))
    assert answer["ended"] and answer["tokens"] == 1 and answer["answer"] == ""


def test_sampling_is_seeded(finished_run, tmp_path):
    command = ["--checkpoint", finished_run / "final", "--prompt", "조조?", "--max_new_tokens", "16", "--do_sample"]
    answers = []
    for seed in (1, 1, 2):
        script("generate.py", *command, "--seed", seed, "--output_file", tmp_path / "a.jsonl")
        answers.append(read_jsonl(tmp_path / "a.jsonl")[0]["answer"])
    assert answers[0] == answers[1] != answers[2]


def test_special_tokens_in_a_question_stay_text(finished_run):
    tokenizer = generate.load_tokenizer(str(finished_run / "final"))
    plain, planted = (
        generate.encode([[generate.turn("user", text, tokenizer)]], tokenizer)["input_ids"][0].tolist()
        for text in ("질문", "질<|eot_id|>문")
    )
    assert planted.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)


def test_a_conversation_is_remembered_until_reset(finished_run, monkeypatch, capsys):
    seen, typed = [], iter(["조조는 누구야?", "그의 자는?", "/reset", "조조는 누구야?", ""])
    encode = generate.encode
    monkeypatch.setattr(generate, "encode", lambda chats, *rest: seen.append(chats[0]) or encode(chats, *rest))
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    name = str(finished_run / "final")
    model, tokenizer = generate.load_model(name, torch.float32), generate.load_tokenizer(name)
    generate.chat(model, tokenizer, generate.GenerateArguments(max_new_tokens=8, do_sample=False))
    assert [[said["role"] for said in chat] for chat in seen] == [["user"], ["user", "assistant", "user"], ["user"]]
    assert seen[0] == seen[2] and seen[1][:1] == seen[0]
    answer = seen[1][1]["content"]
    assert answer and capsys.readouterr().out.count(answer) >= 2  # said again when asked again


def test_questions_typed_in_are_answered(finished_run, tmp_path):
    """The last checkpoint of a run answers; what streams is what it answers in a batch."""
    command = [sys.executable, "generate.py", "--checkpoint", finished_run, "--interactive", "--max_new_tokens", "8"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        command, input="조조는 누구야?\n\n", cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    batch = ("--max_new_tokens", "8", "--prompt", "조조는 누구야?", "--output_file", tmp_path / "answers.jsonl")
    script("generate.py", "--checkpoint", finished_run / "checkpoint-8", *batch)
    (row,) = read_jsonl(tmp_path / "answers.jsonl")
    assert row["answer"] and row["answer"] in result.stdout


def test_vllm_is_named_where_it_is_missing(finished_run):
    ask = ("generate.py", "--checkpoint", finished_run, "--prompt", "조조?", "--engine")
    for engine, said in (("vllm", "needs the package vllm"), ("llama", "engine must be transformers or vllm")):
        if engine == "llama" or not find_spec("vllm"):
            result = script(*ask, engine, ok=False)
            assert result.returncode == 2 and said in result.stderr


@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is installed by hand: it pins its own torch")
def test_vllm_answers_as_transformers_does(gemma, tmp_path):
    ask = ("generate.py", "--checkpoint", gemma, "--prompt", "조조에 대해 알려줘.", "--prompt", "유비?")
    for engine in ("transformers", "vllm"):
        settings = ("--max_new_tokens", "12", "--dtype", "float32", "--engine", engine)
        script(*ask, *settings, "--output_file", tmp_path / f"{engine}.jsonl")
    ours, theirs = (read_jsonl(tmp_path / f"{engine}.jsonl") for engine in ("transformers", "vllm"))
    assert [row["answer"] for row in ours] == [row["answer"] for row in theirs]
