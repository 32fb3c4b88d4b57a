"""A sweep through its command line: all runs, what each parameter does, a kill in between, pruning, mistakes."""

import json
import re
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, read_jsonl, script


@pytest.fixture(scope="module")
def by_heart(recipe, tmp_path_factory):
    """A recipe that learns the answers to four development questions by heart, and a quiz of these: (recipe, quiz)."""
    folder = tmp_path_factory.mktemp("by_heart")
    header, *questions = read_jsonl(ROOT / "data/quiz.jsonl")
    del header["about"]["sha256"]
    asked = [question for question in questions if question["split"] == "dev" and question["tier"] == "A"][:4]
    chats = []
    for i, question in enumerate(asked):
        turns = [("user", question["question"]), ("assistant", question["answer"])]
        chats.append({"id": f"{i}", "messages": [{"role": role, "content": text} for role, text in turns]})
    for name, rows in (("quiz.jsonl", [header, *asked]), ("train.jsonl", chats)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(lines, encoding="utf-8")
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    settings |= {"train_file": str(folder / "train.jsonl"), "max_steps": 80, "save_steps": 40}
    (folder / "train.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "train.yaml", folder / "quiz.jsonl"


def write_config(folder, by_heart, **keys) -> str:
    recipe, quiz = map(str, by_heart)
    config = {"train": recipe, "quiz": quiz, "output_dir": str(folder / "sweep"), "tier": "A", "measure": "exact"}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(config | {"prune": 0} | keys), encoding="utf-8")
    return str(path)


def test_a_sweep_that_is_killed_goes_on(by_heart, tmp_path):
    """2 x 2 runs; SIGKILL while the second trains; the first is not made again, and the report holds all four."""
    space = {"learning_rate": [0.003, 0.0], "seed": [1, 2]}
    config = write_config(tmp_path, by_heart, space=space)
    folder = tmp_path / "sweep"
    command = [sys.executable, ROOT / "tools/sweep.py", "--config", config]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
        until = time.monotonic() + 300
        while len(list(folder.glob("*/run"))) < 2:
            assert sweep.poll() is None, sweep.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.2)
        sweep.kill()
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*/answers-*.jsonl")}
    assert len(first) == 2  # steps 40 and 80 of the first run
    result = script("tools/sweep.py", "--config", config)
    assert "3 of 4 runs to do" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in first} == first
    report = (folder / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (0\.003|0\.0) \| ([12]) \| ([\d.]+) \[", report, re.M)
    assert {row[:2] for row in rows} == {(rate, seed) for rate in ("0.003", "0.0") for seed in "12"}
    learned, not_learned = ([float(score) for rate, _, score in rows if rate == wanted] for wanted in ("0.003", "0.0"))
    assert not_learned[0] == not_learned[1] and min(learned) > max(not_learned)
    (effect,) = re.findall(
        r"^\| learning_rate \| 0\.0 \| 0\.003 \| 2 \| (-[\d.]+) \[(-[\d.]+), (-[\d.]+)\] \|$", report, re.M
    )
    gained = sum(not_learned) / 2 - sum(learned) / 2
    assert float(effect[0]) == pytest.approx(gained, abs=0.1) and float(effect[1]) <= float(effect[0]) <= float(
        effect[2]
    )
    assert (folder / "effects.png").stat().st_size > 5_000
    # the best run's weights are there, and no other's
    assert len(list(folder.glob("*/run/final"))) == 1
    again = script("tools/sweep.py", "--config", config)
    assert "0 of 4 runs to do" in again.stdout
    other = script("tools/sweep.py", "--config", write_config(tmp_path, by_heart, space=space, tier="all"), ok=False)
    assert other.returncode == 2 and "another recipe, quiz or score" in other.stderr


def test_what_is_worse_than_the_median_is_stopped(by_heart, tmp_path):
    """The second run learns nothing: it ends at its first save, step 40."""
    config = write_config(tmp_path, by_heart, space={"learning_rate": [0.003, 0.0]}, prune=1)
    result = script("tools/sweep.py", "--config", config)
    report = (tmp_path / "sweep/report.md").read_text(encoding="utf-8")
    assert re.search(r"^\| 0\.0 \| [\d.]+ \[.*\] \| 40, pruned \|", report, re.M), report
    assert "learning_rate 0.0: pruned" in result.stdout
    (pruned,) = (folder for folder in (tmp_path / "sweep").glob("*/") if not (folder / "scores-80.json").exists())
    assert (pruned / "scores-40.json").exists() and "SIGTERM: stopping" in (pruned / "log.txt").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"space": {"learning_rat": [1]}}, "did you mean `learning_rate`"),
        ({"space": {}}, "`space` names no parameter"),
        ({"space": {"seed": {"low": 1, "high": 2}}}, "`seed` needs a list of values"),
        ({"space": {"seed": [1]}, "searc": "grid"}, "unknown key `searc`"),
        ({"space": {"seed": [1]}, "quiz": str(ROOT / "data/neutral.jsonl")}, "no questions of the split dev"),
        ({"space": {"seed": [1]}, "prune": "yes"}, "`prune` must be a whole number"),
    ],
)
def test_mistakes(keys, told, by_heart, tmp_path):
    result = script("tools/sweep.py", "--config", write_config(tmp_path, by_heart, **keys), ok=False)
    assert result.returncode == 2 and told in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_random_search_draws_the_same_each_time():
    from sweep import effects, settings_of

    space = {"learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}, "warmup_steps": [0, 10]}
    config = {"space": space, "search": "random", "trials": 40}
    drawn = settings_of(config)
    assert drawn == settings_of(config) and len({json.dumps(one) for one in drawn}) == 40
    assert all(1e-5 <= one["learning_rate"] <= 1e-3 for one in drawn)
    assert 10 < sum(one["learning_rate"] < 1e-4 for one in drawn) < 30  # by its logarithm
    found = effects([(one, 0.5 + 0.1 * (one["warmup_steps"] == 10)) for one in drawn], config)
    (warm,) = (row for row in found if row["value"] == 10)
    assert warm["effect"] == [0.1, 0.1, 0.1]
    (rate,) = (row for row in found if row["parameter"] == "learning_rate")
    assert rate["effect"][1] < 0 < rate["effect"][2]  # it has no effect here
