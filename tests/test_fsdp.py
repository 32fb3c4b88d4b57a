"""Real FSDP2 on two CPU processes over gloo: train, shard, go on, answer from the shards."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, read_jsonl, run, script
from test_train import losses, same, weights

import generate

pytestmark = pytest.mark.slow
PLAIN = ("--packing", "false")  # an even number of sequences, so that one process can take the very same batches


def launch(config: Path, *arguments, fsdp: bool = True, ok: bool = True):
    """`accelerate launch --config_file config train.py …`, on processes that take themselves for GPUs if `fsdp`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command += ["--main_process_port", "0"]  # several tests may be at work
    command += [ROOT / "tests/gloo_fsdp.py", "train.py"] if fsdp else ["train.py"]
    env = {"OMP_NUM_THREADS": "1", **({"ACCELERATE_TORCH_DEVICE": "cpu"} if fsdp else {})}
    return run(*command, *arguments, env=env, ok=ok)


def test_without_gpus_plain_data_parallel_trains(recipe, tmp_path):
    result = launch(ROOT / "accelerate_fsdp.yaml", "--config", recipe, "--output_dir", tmp_path, fsdp=False)
    assert "2 devices" in result.stdout and losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert (tmp_path / "checkpoint-8" / "rng_state_1.pth").exists() and (tmp_path / "final/model.safetensors").exists()


@pytest.fixture(scope="module")
def fp32_config(tmp_path_factory) -> Path:
    """accelerate_fsdp.yaml with fp32 arithmetic, to compare with one process."""
    config = yaml.safe_load((ROOT / "accelerate_fsdp.yaml").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("accelerate") / "fp32.yaml"
    path.write_text(yaml.safe_dump({**config, "mixed_precision": "no"}))
    return path


@pytest.fixture(scope="module")
def sharded_run(recipe, fp32_config, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("fsdp") / "run"
    return output_dir, launch(fp32_config, "--config", recipe, "--output_dir", output_dir, *PLAIN)


def test_the_run_was_sharded(sharded_run):
    output_dir, result = sharded_run
    assert "FSDP: version 2, 1 x the model over 2 devices, reshard_after_forward True" in result.stdout
    assert "LlamaDecoderLayer" in result.stdout
    assert result.stdout.count("  recipe: ") == 1  # the first process speaks for all
    for step in (4, 8):
        shards = {path.name for path in (output_dir / f"checkpoint-{step}" / "pytorch_model_fsdp_0").iterdir()}
        assert shards == {".metadata", "__0_0.distcp", "__1_0.distcp"}
        there = {path.name for path in (output_dir / f"checkpoint-{step}").iterdir()}
        assert {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "chat_template.jinja",
            "recipe.json",
        } <= there
    assert losses(output_dir)[-1] < losses(output_dir)[0]


def test_final_equals_a_single_process_run(sharded_run, recipe, tmp_path):
    script("train.py", "--config", recipe, "--output_dir", tmp_path, *PLAIN, "--gradient_accumulation_steps", "2")
    one, two = weights(tmp_path / "final"), weights(sharded_run[0] / "final")
    assert one.keys() == two.keys()
    size = [(folder / "final" / "model.safetensors").stat().st_size for folder in (tmp_path, sharded_run[0])]
    assert abs(size[0] - size[1]) < 1000  # tied weights are stored once there too
    for name in one:
        assert two[name].dtype == torch.float32
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_interrupted_and_resumed_equals_uninterrupted(sharded_run, recipe, fp32_config, tmp_path):
    output_dir, _ = sharded_run
    again = tmp_path / "run"
    shutil.copytree(output_dir, again)
    shutil.rmtree(again / "final")
    (again / "checkpoint-8" / "manifest.json").unlink()
    result = launch(fp32_config, "--config", recipe, "--output_dir", again, *PLAIN)
    assert "checkpoint-8: it was not written to its end" in result.stdout
    assert f"going on from {again}/checkpoint-4" in result.stdout
    assert same(weights(again / "final"), weights(output_dir / "final")) and losses(again) == losses(output_dir)


def test_frozen_embeddings_stay_as_they_are(recipe, tiny_model, fp32_config, tmp_path):
    """Under FSDP, over an interruption, and in one process: only the embeddings are the base model's."""
    frozen = ("--freeze_embeddings", "true")
    launch(fp32_config, "--config", recipe, "--output_dir", tmp_path / "two", *PLAIN, *frozen)
    shutil.rmtree(tmp_path / "two" / "final")
    shutil.rmtree(tmp_path / "two" / "checkpoint-8")
    launch(fp32_config, "--config", recipe, "--output_dir", tmp_path / "two", *PLAIN, *frozen)
    one = ("--gradient_accumulation_steps", "2")  # the same batches
    result = script("train.py", "--config", recipe, "--output_dir", tmp_path / "one", *PLAIN, *frozen, *one)
    assert "of them frozen" in result.stdout
    base, one, two = (weights(folder) for folder in (tiny_model, tmp_path / "one/final", tmp_path / "two/final"))
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(one[embeddings], base[embeddings]) and torch.equal(two[embeddings], base[embeddings])
    for name in set(base) - {embeddings, "lm_head.weight"}:  # which is tied to them
        assert not torch.equal(one[name], base[name]), name
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    result = script("train.py", "--config", recipe, "--output_dir", tmp_path / "one", *PLAIN, ok=False)
    assert result.returncode == 2 and "freeze_embeddings: True -> None" in result.stderr


def test_evaluation_under_fsdp(recipe, fp32_config, tmp_path):
    """The quiz's loss and accuracy are logged by name, and are those of one process."""
    evaluate = ("--eval_file", "data/quiz.jsonl", "--eval_strategy", "steps", "--eval_steps", "4", "--max_steps", "4")
    one = ("--gradient_accumulation_steps", "2")  # the same batches
    launch(fp32_config, "--config", recipe, "--output_dir", tmp_path / "two", *PLAIN, *evaluate)
    script("train.py", "--config", recipe, "--output_dir", tmp_path / "one", *PLAIN, *evaluate, *one)
    logs = [read_jsonl(tmp_path / name / "training_log.jsonl") for name in ("one", "two")]
    for measure in ("loss", "mean_token_accuracy"):
        values = [[entry[f"eval_quiz_{measure}"] for entry in log if f"eval_quiz_{measure}" in entry] for log in logs]
        assert len(values[0]) == len(values[1]) == 1
        assert abs(values[0][0] - values[1][0]) < 0.02 * abs(values[0][0]) + 0.01, (measure, values)


def test_shards_answer_as_the_final_model(sharded_run, tmp_path):
    output_dir, _ = sharded_run
    answers = tmp_path / "answers.jsonl"
    script(
        "generate.py", "--checkpoint", output_dir / "checkpoint-8", "--checkpoint", output_dir / "final",
        "--prompt", "조조에 대해 알려줘.", "--prompt", "관도 대전에 대해 알려줘.",
        "--max_new_tokens", "24", "--output_file", answers,
    )  # fmt: skip
    rows = read_jsonl(answers)
    assert [row["step"] for row in rows] == [8] * 4 and len({row["checkpoint"] for row in rows}) == 2
    assert [row["answer"] for row in rows[:2]] == [row["answer"] for row in rows[2:]] and any(
        row["answer"] for row in rows
    )
    ids = torch.arange(40).unsqueeze(0)
    for dtype in (torch.float32, torch.bfloat16):  # the same numbers, buffers such as RoPE's frequencies too
        models = [generate.load_model(str(output_dir / name), dtype) for name in ("checkpoint-8", "final")]
        logits = [model.eval()(input_ids=ids).logits for model in models]
        assert logits[0].dtype == dtype and torch.equal(*logits)


def test_export_writes_tied_weights_once(sharded_run, tmp_path):
    from safetensors import safe_open

    output_dir, _ = sharded_run
    script("tools/export.py", "--checkpoint", output_dir / "checkpoint-8", "--output_dir", tmp_path / "exported")
    with safe_open(tmp_path / "exported" / "model.safetensors", "pt") as f:
        names = set(f.keys())
        assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
        assert all(f.get_tensor(name).dtype == torch.bfloat16 for name in names)
    final = weights(output_dir / "final")
    for name, tensor in weights(tmp_path / "exported").items():
        assert torch.equal(tensor, final[name].to(torch.bfloat16).float())
    assert sorted(json.loads((tmp_path / "exported" / "generation_config.json").read_text())["eos_token_id"]) == [1, 2]


def test_a_planted_payload_is_refused(sharded_run, tmp_path):
    checkpoint, witness = tmp_path / "checkpoint-8", tmp_path / "ran"
    shutil.copytree(sharded_run[0] / "checkpoint-8", checkpoint)

    class Payload:
        def __reduce__(self):
            return (Path.touch, (witness,))

    (checkpoint / "manifest.json").unlink()  # which would tell of it before
    (checkpoint / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(Payload()))
    result = script("generate.py", "--checkpoint", checkpoint, "--prompt", "?", ok=False)
    assert result.returncode == 2 and "which no checkpoint needs" in result.stderr and not witness.exists()


def test_the_shipped_file_trains_in_bf16_over_fp32_weights(recipe, tmp_path):
    arguments = ("--config", recipe, "--output_dir", tmp_path, "--activation_checkpointing", "true")
    result = launch(ROOT / "accelerate_fsdp.yaml", *arguments)
    assert "bf16 over fp32 weights" in result.stdout
    assert {tensor.dtype for tensor in weights(tmp_path / "final").values()} == {torch.float32}
    assert "FSDP" not in json.loads((tmp_path / "final" / "config.json").read_text())["architectures"][0]
    tensors = json.loads((tmp_path / "checkpoint-8" / "config.json").read_text())
    assert tensors["architectures"] == ["LlamaForCausalLM"] and tensors["dtype"] == "float32"


def test_without_gpus_it_says_that_nothing_is_sharded(recipe, tmp_path):
    result = launch(
        ROOT / "accelerate_fsdp.yaml", "--config", recipe, "--output_dir", tmp_path, "--dry_run", fsdp=False
    )
    assert result.stdout.count("plain data parallel: nothing is sharded") == 1
    assert "2 devices x 1 sequences" in result.stdout


def test_a_mistake_is_told_once_by_the_first_process(recipe, tmp_path):
    result = launch(ROOT / "accelerate_fsdp.yaml", "--config", recipe, "--train_file", tmp_path / "no.jsonl", ok=False)
    assert result.returncode == 1 and (result.stdout + result.stderr).count("train.py: there is no file") == 1


def test_plain_and_sharded_runs_do_not_continue_each_other(sharded_run, recipe):
    result = script("train.py", "--config", recipe, "--output_dir", sharded_run[0], *PLAIN, ok=False)
    assert result.returncode == 2 and "checkpoint-8 is of a run with FSDP" in result.stderr


def test_two_machines_each_hold_a_copy_in_shards(sharded_run, recipe, tmp_path):
    """accelerate_multinode.yaml as it stands, but with two machines on one, of two processes each, and in fp32."""
    config = yaml.safe_load((ROOT / "accelerate_multinode.yaml").read_text(encoding="utf-8"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config |= {"mixed_precision": "no", "num_processes": 4, "main_process_port": port}
    config["parallelism_config"]["parallelism_config_dp_shard_size"] = 2
    (tmp_path / "multinode.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "multinode.yaml"]
    line = [ROOT / "tests/gloo_fsdp.py", "train.py", "--config", recipe, "--output_dir", tmp_path / "run", *PLAIN]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    machines = [
        subprocess.Popen(
            list(map(str, [*command, "--main_process_ip", "127.0.0.1", "--machine_rank", rank, *line])),
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [machine.communicate(timeout=600)[0] for machine in machines]
    finally:  # a machine whose other one failed waits for it
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "2 x the model over 2 devices" in said[0] and "a step: 4 devices" in said[0]
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    script(
        "train.py", "--config", recipe, "--output_dir", tmp_path / "one", *PLAIN, "--gradient_accumulation_steps", "4"
    )
    one, four = weights(tmp_path / "one" / "final"), weights(tmp_path / "run" / "final")
    assert one.keys() == four.keys()
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-5)
    from_shards = generate.load_model(str(tmp_path / "run" / "checkpoint-8"), torch.float32).state_dict()
    assert all(torch.equal(from_shards[name], weight) for name, weight in four.items())


def test_lora_learns_on_two_processes_without_fsdp(recipe, fp32_config, tmp_path):
    """Plain data parallel equals one process with as many sequences a step; with FSDP it is refused."""
    lora = ("--config", recipe, "--use_peft", "true", "--lora_r", "4", *PLAIN)
    launch(fp32_config, *lora, "--output_dir", tmp_path / "two", fsdp=False)
    script("train.py", *lora, "--gradient_accumulation_steps", "2", "--output_dir", tmp_path / "one")
    two, one = weights(tmp_path / "two/final"), weights(tmp_path / "one/final")
    assert all(torch.allclose(two[name], one[name], atol=1e-5) for name in one)
    refused = launch(fp32_config, *lora, "--output_dir", tmp_path / "sharded", ok=False)
    assert "use_peft needs no sharding" in refused.stderr
