"""LoRA: adapters are small, go on after a kill, and become whole models wherever a whole model is wanted."""

import json
import shutil

import pytest
import torch
from conftest import script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import generate
import train

LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_alpha", "8")


@pytest.fixture(scope="module")
def adapted(recipe, tmp_path_factory):
    """The output folder of the recipe run once with LoRA."""
    output_dir = tmp_path_factory.mktemp("lora") / "out"
    result = script("train.py", "--config", recipe, *LORA, "--output_dir", output_dir)
    assert ", 8,192 of them learned (LoRA)" in result.stdout  # rank x (in + out) of 7 layers in each of 2 blocks
    return output_dir


def test_a_checkpoint_is_an_adapter_and_final_the_whole_model(adapted, tiny_model):
    checkpoint, final = adapted / "checkpoint-8", adapted / "final"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in adapter.values()) == 8_192
    assert not (checkpoint / "model.safetensors").exists() and not (checkpoint / "README.md").exists()
    assert (checkpoint / "config.json").exists() and (checkpoint / "chat_template.jinja").exists()
    assert json.loads((checkpoint / "recipe.json").read_text(encoding="utf-8"))["lora_r"] == 4

    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(final).state_dict()
    assert set(after) == set(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 14 and all("_proj" in name for name in changed)
    assert "LoRA of rank 4, merged" in (final / "README.md").read_text(encoding="utf-8")
    merged = generate.load_model(str(checkpoint), torch.float32).state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in merged.items())


def test_it_goes_on_as_if_nothing_had_been(adapted, recipe, tmp_path):
    """Killed behind its first checkpoint, it ends with the same weights, bit for bit."""
    output = tmp_path / "out"
    shutil.copytree(adapted, output)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoint-8")
    other = script("train.py", "--config", recipe, *LORA, "--lora_r", "8", "--output_dir", output, ok=False)
    assert other.returncode == 2 and "lora_r: 4 -> 8" in other.stderr
    result = script("train.py", "--config", recipe, *LORA, "--output_dir", output)
    assert f"going on from {output}/checkpoint-4" in result.stdout
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (output, adapted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_adapters_are_asked_and_exported_as_whole_models(adapted, tmp_path):
    answers = tmp_path / "answers.jsonl"
    asked = ("--checkpoint", adapted, "--prompt", "조조에 대해 알려줘.", "--max_new_tokens", "8")
    script("generate.py", *asked, "--output_file", answers)
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [0, 4, 8]
    script("tools/export.py", "--checkpoint", adapted / "checkpoint-8", "--output_dir", tmp_path / "exported",
           "--dtype", "float32")  # fmt: skip
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "exported", adapted / "final"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_learned_stays_in_fp32(recipe, tmp_path):
    """With bf16 arithmetic the weights that stay as they are are held in bf16, the adapter in fp32."""
    result = script("train.py", "--config", recipe, *LORA, "--bf16", "true", "--max_steps", "2", "--output_dir",
                    tmp_path / "out", "--save_steps", "2")  # fmt: skip
    assert "bf16 over fp32 weights" in result.stdout
    adapter = load_file(tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    final = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert {weight.dtype for weight in final.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--lora_r", "0"), "lora_r must be from 1 to"),
        (("--use_peft", "false"), "lora_r does nothing without use_peft: true"),
        (("--lora_target_modules", "nowhere"), "use_peft: "),
        (("--lora_target_modules", "lm_head"), "lm_head"),
    ],
)
def test_mistakes(given, said, recipe, tmp_path):
    result = script("train.py", "--config", recipe, *LORA, *given, "--output_dir", tmp_path / "out", ok=False)
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr


def test_without_peft_it_says_what_to_install(adapted, recipe, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(recipe), *LORA])
    monkeypatch.setattr(train, "is_peft_available", lambda: False)
    parsed = train.parse_args([train.ScriptArguments, train.TrainingArguments], "")
    with pytest.raises(train.UserError, match="requirements-tools.txt"):
        train.main(*parsed)
    monkeypatch.setattr(generate, "find_spec", lambda name: None)
    with pytest.raises(generate.UserError, match="requirements-tools.txt"):
        generate.load_model(str(adapted / "checkpoint-8"), torch.float32)
