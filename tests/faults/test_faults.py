"""Runs that are killed, told to stop, damaged, out of room or out of numbers: nothing that was finished may be lost.

Each through the command line. Every run here is told to save every two steps, so that many kills fall into a save.
FAULTS kills a mode (`make faults` takes 40, the usual test run 4).
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, script
from filelock import FileLock
from test_train import losses, same, weights

import train

KILLS = int(os.environ.get("FAULTS", "4"))
STEPS = 24
LONG = ("--max_steps", str(STEPS), "--save_steps", "2", "--save_total_limit", "2", "--packing", "false")


def command(mode: str, config: Path, *arguments, launch=()) -> tuple[list[str], dict[str, str]]:
    """The command line of train.py and its environment: "plain", or "fsdp" on two processes (see gloo_fsdp.py).

    `launch`: further words for the launcher.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, ROOT / "train.py"]
    if mode == "fsdp":
        env["ACCELERATE_TORCH_DEVICE"] = "cpu"
        start = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            config,
            "--main_process_port",
            "0",
            *launch,
        ]
        start += [ROOT / "tests/gloo_fsdp.py", "train.py"]
    return [str(part) for part in (*start, *arguments)], env


class Job:
    """A run of train.py in a process group of its own, which is killed as one."""

    def __init__(self, mode: str, config: Path, *arguments, log: Path, launch=(), **kwargs):
        line, env = command(mode, config, *arguments, launch=launch)
        self.log = log
        with open(log, "w", encoding="utf-8") as f:
            self.process = subprocess.Popen(
                line, cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT, start_new_session=True, **kwargs
            )

    def wait_for(self, seen, timeout: float = 120) -> bool:
        """Until something is seen (True) or the process has ended (False)."""
        end = time.time() + timeout
        while time.time() < end:
            if seen():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        raise AssertionError(f"nothing happened in {timeout} s:\n{self.said()}")

    def kill(self):
        """The launcher's processes are in sessions of their own and would go on without it: all are killed at once."""
        whole = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        whole += [child for launcher in whole for child in launcher.children(recursive=True)]
        for process in whole:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(whole, timeout=30)

    def end(self, timeout: float = 300) -> int:
        return self.process.wait(timeout)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def fp32_config(tmp_path_factory) -> Path:
    config = yaml.safe_load((ROOT / "accelerate_fsdp.yaml").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("accelerate") / "fp32.yaml"
    path.write_text(yaml.safe_dump({**config, "mixed_precision": "no"}))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe, fp32_config, tmp_path_factory):
    """{mode: the folder of a run that nothing disturbed}, made when asked for."""
    made = {}

    def get(mode: str) -> Path:
        if mode not in made:
            folder = tmp_path_factory.mktemp(mode)
            job = Job(mode, fp32_config, "--config", recipe, *LONG, "--output_dir", folder / "run", log=folder / "log")
            assert job.end() == 0, job.said()
            made[mode] = folder / "run"
        return made[mode]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "fsdp"])
def test_killed_at_any_moment(mode, undisturbed, recipe, fp32_config, tmp_path):
    """SIGKILL between steps, within a save and within the last one: losses and weights are those of `undisturbed`."""
    whole, run, chance = undisturbed(mode), tmp_path / "run", random.Random(7)
    kinds = ["saving", "random", "final", "saving"] * (KILLS // 4)
    for number, kind in enumerate(kinds):
        job = Job(mode, fp32_config, "--config", recipe, *LONG, "--output_dir", run, log=tmp_path / "log")
        before = set(run.glob("checkpoint-*"))
        if kind == "final":
            hit = job.wait_for((run / "final.partial").exists)
        else:  # the first new checkpoint, or some time behind it
            hit = job.wait_for(lambda before=before: set(run.glob("checkpoint-*")) - before)
        time.sleep(chance.uniform(0, 0.02 if kind != "random" else 1.0))
        job.kill()
        assert hit or "wrote" in job.said() or "finished" in job.said(), job.said()
        there = list(run.glob("checkpoint-*"))
        assert 1 <= len(there) <= 3, there  # two and the one being written
        for folder in there:
            if (folder / "manifest.json").exists():
                assert train.damage(folder) is None
        if kind == "final" or (run / "final").exists():  # go back, so that further kills find something to do
            final = Job(mode, fp32_config, "--config", recipe, *LONG, "--output_dir", run, log=tmp_path / "log")
            assert final.end() == 0, final.said()
            assert same(weights(run / "final"), weights(whole / "final")), f"kill {number}, {kind}"
            assert losses(run) == losses(whole)
            if number + 1 < len(kinds):
                shutil.rmtree(run)
                start = Job(mode, fp32_config, "--config", recipe, *LONG, "--output_dir", run, log=tmp_path / "log")
                start.wait_for((run / "checkpoint-2" / "manifest.json").exists)
                start.kill()
    last = Job(mode, fp32_config, "--config", recipe, *LONG, "--output_dir", run, log=tmp_path / "log")
    assert last.end() == 0, last.said()
    assert same(weights(run / "final"), weights(whole / "final")) and losses(run) == losses(whole)
    kept = sorted(folder.name for folder in run.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "fsdp"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves(mode, number, undisturbed, recipe, fp32_config, tmp_path):
    """A scheduler's notice or Ctrl-C: the step is finished and saved, the exit code is 75, the next start goes on."""
    if mode == "fsdp" and number == signal.SIGINT:
        pytest.skip("the launcher's own doing, as with SIGTERM")
    run = tmp_path / "run"
    job = Job(
        mode, fp32_config, "--config", recipe, *LONG, "--save_steps", "100", "--output_dir", run, log=tmp_path / "log"
    )
    job.wait_for(lambda: "'loss'" in job.said())
    os.killpg(job.process.pid, number) if mode == "plain" else job.process.send_signal(number)
    code = job.end(60)
    assert "stopped at step" in job.said() and "Traceback" not in job.said().partition("stopped at step")[0], (
        job.said()
    )
    assert code == train.STOPPED or mode == "fsdp"
    saved = list(run.glob("checkpoint-*"))
    assert len(saved) == 1 and train.damage(saved[0]) is None and not (run / "final").exists()
    again = Job(mode, fp32_config, "--config", recipe, *LONG, "--output_dir", run, log=tmp_path / "log")
    assert again.end() == 0 and "going on from" in again.said()
    assert same(weights(run / "final"), weights(undisturbed(mode) / "final"))
    assert losses(run) == losses(undisturbed(mode))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(first, second, undisturbed, recipe, fp32_config, tmp_path):
    """FSDP2 on two processes and then on one, or the other way: the steps hold the same sequences."""
    run, whole = tmp_path / "run", undisturbed("fsdp")  # on two processes, a sequence each
    start = ("--num_processes", str(first)), ("--num_processes", str(second))
    accumulation = ("--gradient_accumulation_steps", str(2 // first))
    job = Job("fsdp", fp32_config, "--config", recipe, *LONG, *accumulation, "--output_dir", run,
              log=tmp_path / "log", launch=start[0])  # fmt: skip
    job.wait_for((run / "checkpoint-8" / "manifest.json").exists)
    job.process.send_signal(signal.SIGTERM)
    job.end(60)
    again = Job("fsdp", fp32_config, "--config", recipe, *LONG, *accumulation, "--output_dir", run,
                log=tmp_path / "log", launch=start[1])  # fmt: skip
    assert again.end() == 0, again.said()
    told = f"with gradient_accumulation_steps {2 // second} a step is 2 sequences as before"
    assert told in again.said() and again.said().count("note: ") == 1 and "going on from" in again.said()
    assert losses(run) == pytest.approx(losses(whole), rel=2e-4)
    for name, weight in weights(whole / "final").items():
        assert (weights(run / "final")[name] - weight).abs().max() < 1e-3, name


@pytest.mark.slow
def test_a_run_does_not_change_between_plain_and_fsdp(undisturbed, recipe, fp32_config, tmp_path):
    for mode, other in (("plain", "fsdp"), ("fsdp", "plain")):
        run = tmp_path / mode
        shutil.copytree(undisturbed(mode), run)
        shutil.rmtree(run / "final")
        job = Job(other, fp32_config, "--config", recipe, *LONG, "--output_dir", run, log=tmp_path / "log")
        assert job.end() != 0 and "can only go on so" in job.said(), job.said()


@pytest.mark.slow
def test_damaged_shards_are_named_and_left_out(undisturbed, recipe, fp32_config, tmp_path):
    """A shard that is missing, and one of another checkpoint."""
    whole, run = undisturbed("fsdp"), tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    shard = Path("pytorch_model_fsdp_0", "__1_0.distcp")
    shutil.copy(run / f"checkpoint-{STEPS - 2}" / shard, run / f"checkpoint-{STEPS}" / shard)
    asked = script("generate.py", "--checkpoint", run / f"checkpoint-{STEPS}", "--prompt", "조조는?", ok=False)
    assert asked.returncode == 2 and "__1_0.distcp is damaged" in asked.stderr
    job = Job("fsdp", fp32_config, "--config", recipe, *LONG, "--output_dir", run, log=tmp_path / "log")
    assert job.end() == 0 and f"skipping {run}/checkpoint-{STEPS}: {shard} is damaged" in job.said(), job.said()
    assert f"going on from {run}/checkpoint-{STEPS - 2}" in job.said()
    assert same(weights(run / "final"), weights(whole / "final"))
    shutil.rmtree(run / "final")
    (run / f"checkpoint-{STEPS}" / shard).unlink()
    (run / f"checkpoint-{STEPS - 2}" / shard).unlink()
    asked = script("generate.py", "--checkpoint", run / f"checkpoint-{STEPS}", "--prompt", "조조는?", ok=False)
    assert asked.returncode == 2 and "__1_0.distcp" in asked.stderr and "Traceback" not in asked.stderr
    job = Job("fsdp", fp32_config, "--config", recipe, *LONG, "--dry_run", "--output_dir", run, log=tmp_path / "log")
    assert job.end() == 0 and job.said().count(f"{shard} is missing") == 2, job.said()


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_along(recipe, fp32_config, tmp_path):
    """SIGKILL of one of two processes: the launcher ends soon and names it; nothing is left behind."""
    endless = ("--config", recipe, "--max_steps", "100000", "--save_strategy", "no", "--output_dir", tmp_path / "run")
    job = Job("fsdp", fp32_config, *endless, log=tmp_path / "log")
    job.wait_for(lambda: "'loss'" in job.said())
    workers = [p for p in psutil.Process(job.process.pid).children() if p.environ().get("RANK")]
    assert len(workers) == 2
    next(p for p in workers if p.environ()["RANK"] == "1").kill()
    assert job.end(90) != 0
    assert "local_rank: 1" in job.said() and "Signal 9 (SIGKILL)" in job.said()
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)


@pytest.mark.slow
@pytest.mark.skipif(KILLS < 40, reason="20,000 steps: make faults")
def test_soak(recipe, chats, fp32_config, tmp_path):
    """20,000 steps, a save every 50, an evaluation every 500: flat memory, flat time, all files accounted for."""
    run = tmp_path / "run"
    long = ("--max_steps", "20000", "--save_steps", "50", "--save_total_limit", "2", "--eval_strategy", "steps")
    long += ("--eval_steps", "500", "--eval_file", chats, "--logging_steps", "50", "--output_dir", run)
    job, samples = Job("plain", fp32_config, "--config", recipe, *long, log=tmp_path / "log"), []
    process = psutil.Process(job.process.pid)
    while job.process.poll() is None:
        steps = [int(folder.name.split("-")[1]) for folder in run.glob("checkpoint-*")]
        with suppress(psutil.Error):
            samples.append((time.time(), max(steps, default=0), process.memory_info().rss))
        time.sleep(1)
    assert job.process.returncode == 0, job.said()[-3000:]
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    rates = [(part[-1][1] - part[0][1]) / (part[-1][0] - part[0][0]) for part in (second, last)]
    memory = [sorted(rss for *_, rss in part)[len(part) // 2] for part in (second, last)]
    print(
        f"steps a second {rates[0]:.1f}, then {rates[1]:.1f}; memory {memory[0] >> 20} MiB, then {memory[1] >> 20} MiB"
    )
    assert rates[1] > 0.7 * rates[0] and memory[1] < 1.05 * memory[0]
    assert {path.name for path in run.iterdir()} == {
        ".lock", "checkpoint-19950", "checkpoint-20000", "final", "loss.png", "training_log.jsonl",
    }  # fmt: skip
    assert len(losses(run)) == 400


@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped", "missing", "of another run", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_left_out(how, finished_run, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "final")
    weights_file = run / "checkpoint-8" / "model.safetensors"
    content = weights_file.read_bytes()
    if how == "truncated":
        weights_file.write_bytes(content[:-1000])
    elif how == "emptied":
        weights_file.write_bytes(b"")
    elif how == "flipped":
        middle = len(content) // 2
        weights_file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "missing":
        weights_file.unlink()
    elif how == "of another run":  # of the same size
        shutil.copy(run / "checkpoint-4" / "model.safetensors", weights_file)
    else:
        (run / "checkpoint-8" / "manifest.json").write_text("{")
    if how in ("truncated", "flipped", "of another run"):
        asked = script("generate.py", "--checkpoint", run / "checkpoint-8", "--prompt", "조조는?", ok=False)
        assert asked.returncode == 2 and "checkpoint-8/model.safetensors is damaged" in asked.stderr
    result = script("train.py", "--config", recipe, "--output_dir", run)
    named = "manifest.json" if how == "no manifest" else "model.safetensors"
    assert f"skipping {run}/checkpoint-8: " in result.stdout and named in result.stdout
    assert f"going on from {run}/checkpoint-4" in result.stdout
    assert same(weights(run / "final"), weights(finished_run / "final"))
    if how == "flipped":
        asked = script("train.py", "--config", recipe, "--output_dir", run, "--resume", run / "checkpoint-8")
        assert "this run is finished" in asked.stdout


def test_two_runs_do_not_share_a_folder(recipe, fp32_config, tmp_path):
    endless = ("--config", recipe, "--max_steps", "100000", "--save_strategy", "no", "--output_dir", tmp_path / "run")
    job = Job("plain", fp32_config, *endless, log=tmp_path / "log")
    try:
        job.wait_for((tmp_path / "run" / ".lock").exists)
        second = script("train.py", *endless, ok=False)
        assert second.returncode == 2 and "another train.py is at work" in second.stderr
    finally:
        job.kill()


def test_data_that_are_being_written_are_not_read(recipe, chats, tmp_path, monkeypatch):
    data = tmp_path / "train.jsonl"
    shutil.copy(chats, data)
    asked = ("train.py", "--config", recipe, "--train_file", data, "--output_dir", tmp_path / "run", "--dry_run")
    with FileLock(tmp_path / ".lock"):
        result = script(*asked, ok=False)
        assert result.returncode == 2 and f"preprocess.py is at work on {data}" in result.stderr
        line = ("preprocess.py", "--config", "configs/demo/preprocess.yaml", "--tokenizer_name_or_path=")
        result = script(*line, "--split_articles", "false", "--output_dir", tmp_path, ok=False)
        assert result.returncode == 2 and "another preprocess.py is writing" in result.stderr
    script(*asked)

    def read_slowly(path):
        rows = read_rows(path)
        shutil.copy(chats, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        return rows

    read_rows = train.read_rows
    monkeypatch.setattr(train, "read_rows", read_slowly)
    with pytest.raises(train.UserError, match="was changed while it was read"):
        train.read_data(str(data))


def test_the_same_command_makes_the_same_weights(finished_run, recipe, chats, tmp_path):
    """Two runs are equal bit for bit; --reproduce tells so, and what another command does differently."""
    again = ("train.py", "--config", recipe, "--output_dir", tmp_path / "run")
    asked = (*again, "--reproduce", finished_run / "checkpoint-8")
    told = script(*asked).stdout
    assert "was made by this command" in told and "bit for bit" not in told and not (tmp_path / "run").exists()
    script(*again)
    assert "checkpoint-8 are the same, bit for bit" in script(*asked).stdout
    assert same(weights(tmp_path / "run" / "final"), weights(finished_run / "final"))
    other = tmp_path / "train.jsonl"
    other.write_text("".join(chats.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    result = script(*asked, "--train_file", other, "--seed", "7", ok=False)
    assert result.returncode == 1 and "data_sha256: " in result.stdout and "seed: 42 -> 7" in result.stdout
    recorded = tmp_path / "run" / "checkpoint-8" / "recipe.json"
    recipe_then = json.loads(recorded.read_text(encoding="utf-8"))
    recipe_then["versions"]["torch"] = "1.0"
    recipe_then["model_sha256"] = "0" * 64
    recorded.write_text(json.dumps(recipe_then), encoding="utf-8")
    train.write_manifest(recorded.parent)
    result = script(*again, "--reproduce", recorded.parent, ok=False)
    assert result.returncode == 1 and "version of torch: 1.0 -> " in result.stdout
    assert "model_sha256: 0000" in result.stdout
    recorded.write_text("{}", encoding="utf-8")
    result = script(*again, "--reproduce", recorded.parent, ok=False)
    assert result.returncode == 2 and "recipe.json has 2 bytes instead of" in result.stderr


def test_a_step_that_cannot_be_kept_is_refused(finished_run, tmp_path):
    then = train.read_recipe(finished_run / "checkpoint-4")
    args = argparse.Namespace(world_size=3, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    with pytest.raises(train.UserError, match="took 1 sequences a step, and 3 processes x 1 do not divide that"):
        train.keep_step(Path("run"), then, args, sharded=False)
    other = {**then, "num_processes": 2, "settings": {**then["settings"], "gradient_accumulation_steps": 6}}
    train.keep_step(Path("run"), other, args, sharded=False)
    assert args.gradient_accumulation_steps == 4
    assert train.differences(other, then) == ["sequences a step: 12 -> 1"]


def limited(size: int, *line) -> subprocess.CompletedProcess:
    """One of our programs where no file may grow beyond `size` bytes, in place of a disk that is full."""
    return subprocess.run(
        [sys.executable, *map(str, line)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("what", ["optimizer.pt", "final"])
def test_a_full_disk_is_told_and_the_job_goes_on(what, finished_run, recipe, tmp_path):
    """Within a checkpoint: the weights fit, the optimizer's state does not. And where the last save begins."""
    run = tmp_path / "run"
    if what == "final":
        shutil.copytree(finished_run, run)
        shutil.rmtree(run / "final")
        size = (finished_run / "final" / "model.safetensors").stat().st_size
    else:
        size = (finished_run / "checkpoint-4" / "optimizer.pt").stat().st_size
    full = limited(size - 1000, "train.py", "--config", recipe, "--output_dir", run)
    assert full.returncode == 2 and f"{run} is full" in full.stderr and "Traceback" not in full.stderr, full.stderr
    assert not (run / "final").exists()
    again = script("train.py", "--config", recipe, "--output_dir", run)
    assert ("checkpoint-4: it was not written to its end" in again.stdout) == (what == "optimizer.pt")
    assert same(weights(run / "final"), weights(finished_run / "final"))
    assert not list(run.glob("*.partial*"))


def test_a_full_disk_leaves_earlier_data_as_they_were(tmp_path):
    """preprocess.py: what an earlier run wrote stays, whole, and nothing half-written beside it."""
    line = ("preprocess.py", "--config", "configs/demo/preprocess.yaml", "--tokenizer_name_or_path=",
            "--split_articles", "false", "--output_dir", tmp_path / "data")  # fmt: skip
    script(*line)
    earlier = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    full = limited(20_000, *line, "--seed", "7")
    assert full.returncode == 2 and full.stderr.startswith("preprocess.py: cannot write to"), full.stderr
    assert full.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == earlier
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_a_full_disk_leaves_earlier_answers_and_reports(finished_run, tmp_path):
    answers, quiz = tmp_path / "answers.jsonl", ROOT / "data/quiz.jsonl"
    line = ("generate.py", "--checkpoint", finished_run / "final", "--prompts_file", quiz, "--max_new_tokens", "1",
            "--batch_size", "64", "--output_file", answers)  # fmt: skip
    script(*line)
    earlier = answers.read_bytes()
    full = limited(20_000, *line)
    assert full.returncode == 2 and f"cannot write {answers}" in full.stderr and answers.read_bytes() == earlier
    line = ("tools/score.py", "--quiz", quiz, "--answers", answers, "--report", tmp_path / "report")
    script(*line)
    report = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    full = limited(20_000, *line)
    assert full.returncode == 2 and "cannot write" in full.stderr and "Traceback" not in full.stderr, full.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == report
    full = limited(20_000, "tools/export.py", "--checkpoint", finished_run, "--output_dir", tmp_path / "exported")
    assert full.returncode == 2 and "cannot write" in full.stderr and full.stderr.count("Traceback") == 0, full.stderr
    assert not list(tmp_path.glob("exported*"))


def test_bad_numbers_stop_the_run(recipe, tmp_path):
    """A learning rate of a thousand: the step, the chats and the last whole checkpoint are named."""
    mad = ("--learning_rate", "1e12", "--max_grad_norm", "0", "--save_steps", "1", "--max_steps", "50")
    result = script("train.py", "--config", recipe, *mad, "--output_dir", tmp_path / "run", ok=False)
    assert result.returncode == 3 and "Traceback" not in result.stderr, result.stderr
    assert "step " in result.stderr and "chats begin: " in result.stderr and "is whole" in result.stderr
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
    assert str(last) in result.stderr and not (tmp_path / "run" / "final").exists()


def test_detect_anomaly_names_the_module(tiny_model, recipe, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    planted = load_file(model / "model.safetensors")
    planted["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(planted, model / "model.safetensors", metadata={"format": "pt"})
    asked = ("--config", recipe, "--model_name_or_path", model, "--output_dir", tmp_path / "run")
    result = script("train.py", *asked, ok=False)
    assert result.returncode == 3 and "--detect_anomaly" in result.stderr
    result = script("train.py", *asked, "--detect_anomaly", "true", ok=False)
    assert result.returncode == 3 and "that of model.layers.1.mlp.down_proj; its weight" in result.stderr


def test_a_spike_of_the_loss_is_noted_with_its_chats(recipe, chats, tmp_path):
    rows = [json.loads(line) for line in chats.read_text(encoding="utf-8").splitlines()][:1]
    odd = {"messages": [{"role": "user", "content": "이상한 줄"}, {"role": "assistant", "content": "#@!%^&*~" * 12}]}
    path = tmp_path / "train.jsonl"
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows * 150 + [odd]), encoding="utf-8"
    )
    settings = ("--packing", "false", "--shuffle_dataset", "false", "--max_steps", "151", "--save_strategy", "no")
    result = script(
        "train.py",
        "--config",
        recipe,
        "--train_file",
        path,
        *settings,
        "--train_sampling_strategy",
        "sequential",
        "--output_dir",
        tmp_path / "run",
    )
    assert "note: step 151: loss" in result.stdout and "이상한 줄" in result.stdout, result.stdout[-2000:]
