"""The benchmarks run as their docs say, at sizes that take seconds; what they measure is not judged here."""

import re
from pathlib import Path

import pytest
from conftest import script


def test_preprocess_keeps_what_the_article_keeps(tmp_path):
    result = script("benchmarks/preprocess.py", "--rows", "8000", "--rounds", "1", "--work", tmp_path)
    assert "kept: 1 articles by both" in result.stdout
    filters = "the article's loop alone : its filter alone, from "
    for pair in (
        f"{filters}parquet",
        f"{filters}the cache that the loop reads",
        "preprocess.py : reading the two columns",
    ):
        assert float(re.search(rf"{pair} = ([\d.]+)", result.stdout)[1]) > 0


def test_trainer_and_bare_loop_do_the_same_work(recipe, tmp_path):
    """Both see the same batches: the losses of their steps are the same."""
    arguments = ("--config", recipe, "--rounds", "1", "--steps", "6", "--work", tmp_path)
    result = script("benchmarks/trainer.py", *arguments)
    apart = [float(percent) for percent in re.findall(r"its losses are within ([\d.]+)%", result.stdout)]
    assert len(apart) == 2 and max(apart) < 0.1
    assert float(re.search(r"train.py : bare loop = ([\d.]+)", result.stdout)[1]) > 0


def test_batches_answer_as_one_at_a_time(finished_run):
    """The benchmark itself ends with an error where answers differ in float32."""
    sizes = ("--questions", "6", "--max_new_tokens", "8", "--batch_sizes", "4", "--dtype", "float32")
    result = script("benchmarks/generate.py", "--model", finished_run / "final", *sizes)
    assert "| batches of 4 |" in result.stdout and "0 of 6" in result.stdout


def test_shards_are_read(tmp_path):
    result = script("benchmarks/shards.py", "--hidden_size", "64", "--layers", "2", "--work", tmp_path / "shards")
    assert float(re.search(r"([\d.]+) times the weights", result.stdout)[1]) > 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_estimated(recipe, tmp_path):
    result = script("benchmarks/memory.py", "--config", recipe, "--steps", "6", "--work", tmp_path / "run")
    _, _, ratio, steps = map(float, re.findall(r"\| ([\d.]+)(?= \|)", result.stdout.splitlines()[-1]))
    assert steps == 6 and 0.8 < ratio < 1.25


def test_ways_to_train_on_a_gpu(tiny_model, chats, tmp_path):
    """All that needs no GPU: the article's settings, `trl sft` and ours side by side, and a way that cannot run."""
    ways = ["the article's settings", "trl sft", "configs/three_kingdoms", "configs/small_gpu"]
    flash = "… FlashAttention 2"  # not installed here
    small = ("--tokenizer", tiny_model, "--hidden_size", "64", "--layers", "2", "--steps", "6", "--train_file", chats)
    result = script("benchmarks/gpu.py", *small, "--work", tmp_path / "work", "--only", *ways, flash)
    table = dict(re.findall(r"^\| (.+?) \| ([\d,]+) \|", result.stdout, re.MULTILINE))
    assert list(table) == ways and all(float(rate.replace(",", "")) > 0 for rate in table.values())
    assert f"{flash} does not run: " in result.stdout


def test_startup_is_timed(recipe, tmp_path):
    result = script("benchmarks/startup.py", "--config", recipe, "--rounds", "1", "--work", tmp_path / "work")
    table = dict(re.findall(r"^\| (.+?) \| ([\d.]+) \|", result.stdout, re.MULTILINE))
    assert len(table) == 7 and all(float(seconds) > 0 for seconds in table.values())
    print(result.stdout)
