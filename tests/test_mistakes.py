"""Every mistake of a user gets one clear sentence, exit code 2, no traceback and nothing half-written."""

import json
import os
import shlex
import shutil
import sys

import pytest
from conftest import ROOT, SAMPLE, run, script

import preprocess
import train

PREPROCESS = ("preprocess.py", "--config", "configs/blog/preprocess.yaml", "--data_files", SAMPLE)


def assert_mistake(result, *words: str):
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    name = os.path.basename(result.args[1])
    told = [line for line in result.stderr.splitlines() if line.startswith(name)]
    assert len(told) == 1, result.stderr
    for word in words:
        assert word in told[0], told[0]


@pytest.mark.parametrize(
    ("name", "yaml", "words"),
    [
        ("preprocess.py", "outputdir: x", ("unknown key `outputdir`", "did you mean `output_dir`?")),
        ("train.py", "learning_rat: 1", ("unknown key `learning_rat`", "did you mean `learning_rate`?")),
        ("generate.py", "promt: [x]", ("unknown key `promt`", "did you mean `prompt`?")),
        ("train.py", "no_packing: true", ("unknown key `no_packing`",)),
        ("preprocess.py", "- a\n- b", ("must hold `key: value` lines",)),
        ("generate.py", "a: [1", ("not valid YAML",)),
        ("train.py", "output_dir: [a, b]", ("`output_dir` takes one value, not a list",)),
        ("generate.py", "seed: {a: 1}", ("`seed` must not hold a dict",)),
        ("train.py", "report_to: no", ("`report_to` is False in YAML, not text; put it in quotes",)),
        ("preprocess.py", "include_title_keywords: [조조, no]", ("`include_title_keywords` is False",)),
        ("preprocess.py", "max_length: many", ("max_length", "invalid int value: 'many'")),
        ("train.py", "max_steps: 1.5", ("max_steps", "invalid int value: '1.5'")),
        ("train.py", "bf16: maybe", ("bf16",)),
        ("generate.py", "max_new_tokens:", ("`max_new_tokens` needs a value",)),
    ],
)
def test_config_files(name, yaml, words, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml + "\n", encoding="utf-8")
    assert_mistake(script(name, "--config", config, ok=False), str(config), *words)


def test_keywords_may_begin_with_a_dash(tmp_path, monkeypatch):
    (tmp_path / "p.yaml").write_text("include_title_keywords: [-조조, --유비, '삼국지 1']\n")
    monkeypatch.setattr(sys, "argv", ["preprocess.py", "--config", str(tmp_path / "p.yaml")])
    args, _ = preprocess.parse_args([preprocess.PreprocessArguments], "")
    assert args.include_title_keywords == ["-조조", "--유비", "삼국지 1"]


@pytest.mark.parametrize("name", ["preprocess.py", "train.py", "generate.py"])
def test_command_lines(name):
    assert_mistake(script(name, "--config", "no/such.yaml", ok=False), "cannot read the config file no/such.yaml")
    assert_mistake(script(name, "--config", ok=False), "--config needs the path")
    assert_mistake(script(name, "--sede", "1", ok=False), "unknown key `sede`")
    assert_mistake(script(name, "stray", ok=False), "what is 'stray'?")


@pytest.mark.parametrize("name", ["preprocess.py", "train.py", "generate.py"])
def test_help(name):
    said = script(name, "--help").stdout
    assert said.startswith(f"usage: {name}") and "output_" in said and "default: " in said


def test_numbers_may_be_written_as_people_write_them(recipe, tmp_path, monkeypatch):
    """PyYAML takes 2e-5 for text; argparse reads it as the number it is."""
    config = tmp_path / "train.yaml"
    config.write_text(recipe.read_text().replace("1.0e-3", "2e-5"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config)])
    _, args, _ = train.parse_args([train.ScriptArguments, train.TrainingArguments], "")
    assert args.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data_files", "no.parquet"), ("there is no file no.parquet",)),
        (("--data_files", "requirements.txt"), ("cannot read .txt files, only parquet, jsonl, csv",)),
        (("--text_column", "body"), ("has no column 'body'; its columns are title, text, contributors, namespace",)),
        (("--include_title_keywords", "전혀없는말"), ("the filter keeps none of", "title without keyword: ")),
        (("--question", "{name}?"), ("only {title}, {part}, {parts} are known",)),
        (("--title_suffix_pattern", "("), ("title_suffix_pattern is not a regular expression",)),
        (("--split_articles",), ("split_articles needs tokenizer_name_or_path",)),
        (
            ("--tokenizer_name_or_path", "no/tokenizer"),
            ("cannot load the tokenizer no/tokenizer",),
        ),
    ],
)
def test_preprocess(arguments, words, tmp_path):
    result = script(*PREPROCESS, "--output_dir", tmp_path / "out", *arguments, ok=False)
    assert_mistake(result, *words)
    assert not list(tmp_path.iterdir())


def test_datasets_of_the_hub(tmp_path):
    blog = ("preprocess.py", "--config", "configs/blog/preprocess.yaml", "--output_dir", tmp_path / "out")
    assert_mistake(script(*blog, "--dataset_name=", ok=False), "name the data: data_files")
    result = script(*blog, "--dataset_name", "no/such-dataset", ok=False)
    assert_mistake(result, "of no/such-dataset, split train", "configs/demo/preprocess.yaml")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"title": "a", "text"\n'),
        ("a.parquet", b"PAR1 no"),
        ("a.csv", b'title,text\n"a'),
        ("a.jsonl", b""),
        # Arrow reads both as files of empty columns.
        ("a.jsonl", json.dumps({"title": "조조", "text": "위의 무제다."}).encode()),
        ("a.jsonl", json.dumps({"title": "조조", "text": "위" * (3 << 20)}).encode() + b"\n"),
    ],
    ids=["half a line", "no parquet", "open quote", "empty", "no line break", "18 MiB in a line"],
)
def test_broken_data_files(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    result = script(*PREPROCESS, "--data_files", tmp_path / name, "--output_dir", tmp_path / "out", ok=False)
    assert_mistake(result)
    assert not (tmp_path / "out").exists()


def test_two_recipes_do_not_write_to_one_folder(tmp_path):
    script(*PREPROCESS, "--output_dir", tmp_path)
    other = tmp_path / "other" / "preprocess.yaml"
    other.parent.mkdir()
    shutil.copy(ROOT / "configs/blog/preprocess.yaml", other)
    result = script("preprocess.py", "--config", other, "--data_files", SAMPLE, "--output_dir", tmp_path, ok=False)
    assert_mistake(result, "holds the output of blog/preprocess.yaml; choose another output_dir")
    (tmp_path / "report.json").write_text("{")
    assert_mistake(script(*PREPROCESS, "--output_dir", tmp_path, ok=False), "holds the output of another program")


def test_a_full_disk_leaves_nothing_half_written(finished_run, tmp_path):
    """A limit on the size of files stands for the full disk: writing fails in the middle with an OSError."""

    def limited(*command, **kwargs):
        words = shlex.join(map(str, command))
        result = run("bash", "-c", f"ulimit -f 2; exec {shlex.quote(sys.executable)} {words}", ok=False, **kwargs)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        return result.stderr

    out = tmp_path / "out"
    said = limited(*PREPROCESS, "--output_dir", out)
    assert "preprocess.py: cannot write to" in said and not out.exists() and not list(tmp_path.iterdir())
    questions = tmp_path / "questions.txt"
    questions.write_text("조조는 누구야?\n" * 40, encoding="utf-8")
    ask = ("generate.py", "--checkpoint", finished_run / "final", "--prompts_file", questions, "--max_new_tokens", "2")
    said = limited(*ask, "--output_file", tmp_path / "answers.jsonl")
    assert "generate.py: cannot write" in said and [path.name for path in tmp_path.iterdir()] == ["questions.txt"]


def test_no_room_and_no_folder(recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = script(*PREPROCESS, "--output_dir", tmp_path / "file" / "out", ok=False)
    assert_mistake(result, "cannot write to")
    result = script("train.py", "--config", recipe, "--output_dir", tmp_path / "file" / "run", ok=False)
    assert_mistake(result, "cannot write to")
    assert_mistake(script(*PREPROCESS, "--output_dir", ".", ok=False), "output_dir must be a folder of its own")
    run = ("train.py", "--config", recipe, "--output_dir", tmp_path / "run")
    result = script(*run, "--max_steps", "2000000000", "--save_steps", "1", ok=False)
    assert_mistake(result, "the checkpoints need", "are free; lower save_total_limit")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--train_file", "no.jsonl"), ("there is no file no.jsonl; make it with `python preprocess.py`",)),
        (("--model_name_or_path", "no/model"), ("cannot load no/model", "its name on the hub")),
        (("--resume", "nowhere"), ("cannot go on from nowhere",)),
        (("--fsdp", "full_shard"), ("by `accelerate launch --config_file FILE`",)),
        (("--chat_template_path", "no.jinja"), ("chat_template_path: cannot read no.jinja",)),
        (("--resume_from_checkpoint", "x"), ("here it is `resume: auto`",)),
        (("--eval_strategy", "steps"), ("eval_file and eval_strategy",)),
        (("--eval_file", "README.md", "--eval_strategy", "steps"), ("README.md, line 1: not a chat",)),
        (("--eval_file", "data/neutral.jsonl", "--eval_strategy", "steps"), ("data/neutral.jsonl, line 1: not a",)),
        (
            ("--eval_file", "data/quiz.jsonl", "--eval_strategy", "steps", "--eval_steps", "4")
            + ("--load_best_model_at_end", "true"),
            ("metric_for_best_model to be one of eval_quiz_loss, eval_quiz_mean_token_accuracy",),
        ),
        (("--train_file", "data/quiz.jsonl"), ("data/quiz.jsonl, line 1: not a chat",)),
        (("--report_to", "wandb"), ("wandb",)),
        (("--fp16", "true", "--bf16", "true"), ("At most one of fp16 and bf16",)),
    ],
)
def test_train(recipe, arguments, words, tmp_path):
    result = script("train.py", "--config", recipe, "--output_dir", tmp_path / "run", *arguments, ok=False)
    assert_mistake(result, *words)
    assert not (tmp_path / "run" / "final").exists()


def test_a_gated_model_is_explained(tmp_path):
    """Without a login the default recipe stops at its gated tokenizer; offline the sentence is the same."""
    result = script("preprocess.py", "--data_files", SAMPLE, "--output_dir", tmp_path / "out", ok=False)
    assert_mistake(result, "meta-llama/Llama-3.2-1B-Instruct", "accept its terms", "configs/demo")
    gated = OSError("You are trying to access a gated repo.\\nMake sure to have access to it")
    assert "accept its terms" in str(train.cannot_load("someone/model", gated))


@pytest.mark.parametrize("line", ["{", '{"messages": []}', '{"messages": [{"role": "user"}]}', "[1]", '{"text": "a"}'])
def test_bad_rows_are_named_by_line(recipe, line, tmp_path):
    good = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(good) + "\n\n" + line + "\n")
    result = script("train.py", "--config", recipe, "--train_file", tmp_path / "train.jsonl", ok=False)
    assert_mistake(result, "train.jsonl, line 3: not a chat")


def test_a_chat_template_that_refuses_a_chat(recipe, tmp_path):
    """The demo's template knows no system turn; another is broken."""
    turns = [{"role": role, "content": "."} for role in ("system", "user", "assistant")]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns, "id": "a-1"}) + "\n")
    template = ("--chat_template_path", ROOT / "tools" / "gemma_chat_template.jinja")
    run_it = ("train.py", "--config", recipe, "--train_file", tmp_path / "train.jsonl", "--dry_run")
    assert_mistake(script(*run_it, *template, ok=False), "row a-1", "knows the roles user and assistant")
    (tmp_path / "broken.jinja").write_text("{% if %}")
    assert_mistake(script(*run_it, "--chat_template_path", tmp_path / "broken.jinja", ok=False), "row a-1")


def test_a_tokenizer_without_chat_template(recipe, tiny_model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    run = ("train.py", "--config", recipe, "--model_name_or_path", bare, "--output_dir", tmp_path / "run", "--dry_run")
    assert_mistake(script(*run, ok=False), "has no chat template; name a Jinja file in chat_template_path")
    assert_mistake(script("generate.py", "--checkpoint", bare, "--prompt", "?", ok=False), "has no chat template")
    template = tiny_model / "chat_template.jinja"
    assert "dry run" in script(*run, "--chat_template_path", template).stdout


def test_a_model_that_lacks_weights(recipe, tiny_model, tmp_path):
    """transformers would draw them at random and go on."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tiny_model / "model.safetensors")
    missing = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {k: v for k, v in weights.items() if k != missing}, tmp_path / "model/model.safetensors", {"format": "pt"}
    )
    run = ("train.py", "--config", recipe, "--output_dir", tmp_path / "run")
    assert_mistake(script(*run, "--model_name_or_path", tmp_path / "model", ok=False), "lacks weights", missing)
    ask = ("generate.py", "--prompt", "?", "--checkpoint", tmp_path / "model")
    assert_mistake(script(*ask, ok=False), "lacks weights", missing)


def test_a_tokenizer_with_more_tokens_than_its_model(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["관운장"])
    tokenizer.save_pretrained(tmp_path / "model")
    ask = ("generate.py", "--prompt", "관운장은?", "--checkpoint", tmp_path / "model")
    assert_mistake(script(*ask, ok=False), "knows more tokens than its model")


def test_generate(finished_run, tmp_path):
    def told(*arguments):
        return script("generate.py", *arguments, ok=False)

    (tmp_path / "empty").mkdir()
    assert_mistake(told("--checkpoint", "nowhere", "--prompt", "?"), "there is no checkpoint nowhere")
    assert_mistake(told("--checkpoint", tmp_path / "empty"), "neither a checkpoint nor a run with checkpoints")
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    assert_mistake(told("--checkpoint", tmp_path / "run"), "a run without a complete checkpoint yet")
    assert_mistake(told("--checkpoint", finished_run, "--prompts_file", "no.txt"), "cannot read prompts_file no.txt")
    (tmp_path / "q.jsonl").write_text('{"prompt": "?"}\n{"p": 1}\n')
    assert_mistake(
        told("--checkpoint", finished_run, "--prompts_file", tmp_path / "q.jsonl"), "line 2: not a question"
    )
    assert_mistake(told("--checkpoint", finished_run, "--output_file", "no/a.jsonl"), "there is no folder no")
    assert_mistake(told("--checkpoint", finished_run, "--dtype", "int3"), "dtype must be")
    assert_mistake(
        told("--checkpoint", finished_run, "--batch_size", "0"), "batch_size must be from 1 to 65536, not 0"
    )
    result = script("tools/export.py", "--checkpoint", finished_run, "--output_dir", tmp_path, ok=False)
    assert_mistake(result, "exists; choose a folder that does not")
