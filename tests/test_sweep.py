"""A sweep through its command line: all runs, what each parameter does, kills in between, pruning, mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, read_jsonl, script
from filelock import FileLock


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
    settings |= {"train_file": str(folder / "train.jsonl"), "max_steps": 240, "save_steps": 120}
    (folder / "train.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "train.yaml", folder / "quiz.jsonl"


def write_config(folder, by_heart, **keys) -> str:
    recipe, quiz = map(str, by_heart)
    config = {"train": recipe, "quiz": quiz, "output_dir": str(folder / "sweep"), "tier": "A", "measure": "exact"}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(config | {"prune": 0} | keys), encoding="utf-8")
    return str(path)


def stop_when(there, config: str, number: int) -> subprocess.CompletedProcess:
    """Starts a sweep, and sends it a signal as soon as there() holds."""
    command = [sys.executable, ROOT / "tools/sweep.py", "--config", config]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
        until = time.monotonic() + 300
        while not there():
            assert sweep.poll() is None, sweep.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.1)
        sweep.send_signal(number)
        said = sweep.communicate(timeout=120)[0]
    return subprocess.CompletedProcess(command, sweep.returncode, said)


def of(folder) -> list[psutil.Process]:
    """The programs at work for a sweep."""
    return [process for process in psutil.process_iter(["cmdline"])
            if f"{folder}/" in " ".join(process.info["cmdline"] or [])]  # fmt: skip


def table(report: str) -> dict[tuple[str, str], list[str]]:
    """{(learning rate, seed): [score, loss, step]} of a report."""
    rows = re.findall(r"^\| ([\d.]+) \| (\d) \| ([^|]+) \| ([\d.]+) \| ([^|]+) \|", report, re.M)
    return {row[:2]: row[2:] for row in rows}


@pytest.fixture(scope="module")
def pruned(by_heart, tmp_path_factory):
    """A sweep of two runs that nothing disturbs, of which the second learns nothing: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("pruned")
    space = {"learning_rate": [0.003, 0.0], "seed": [2]}
    result = script("tools/sweep.py", "--config", write_config(folder, by_heart, space=space, prune=1))
    return folder / "sweep", result.stdout


def test_a_sweep_that_is_killed_goes_on(by_heart, pruned, tmp_path):
    """SIGKILL while the second of two runs trains; with another value it is 2 x 2; SIGTERM while the third trains. No
    run is made twice, and the second ends as it does when nothing disturbs it."""
    space = {"learning_rate": [0.003], "seed": [1, 2]}
    config = write_config(tmp_path, by_heart, space=space)
    folder = tmp_path / "sweep"

    def second_waits() -> bool:
        """Whether training of the second run was told to wait for its score: a kill leaves it waiting."""
        return len(list(folder.glob("*/run"))) == 2 and len(list(folder.glob("*/scores-240.json"))) == 1 and any(
            process.status() == psutil.STATUS_STOPPED for process in of(folder)
        )  # fmt: skip

    killed = stop_when(second_waits, config, signal.SIGKILL)
    assert "2 of 2 runs to do" in killed.stdout
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*/scores-*.json")}
    assert len(first) >= 2  # steps 120 and 240 of the first run
    # a kill may also leave Optuna's lock, and half a line
    (folder / "study.log.lock").symlink_to("study.log")
    with open(folder / "study.log", "a") as f:
        f.write('{"op_code":')

    config = write_config(tmp_path, by_heart, space=space | {"learning_rate": [0.003, 0.0]})
    stopped = stop_when(lambda: len(list(folder.glob("*/run"))) == 3, config, signal.SIGTERM)
    assert stopped.returncode == 75 and "stopped; the same command goes on" in stopped.stdout, stopped.stdout
    assert "3 of 4 runs to do" in stopped.stdout
    assert of(folder) == []  # nothing runs on

    result = script("tools/sweep.py", "--config", config)
    assert "2 of 4 runs to do" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in first} == first
    report = (folder / "report.md").read_text(encoding="utf-8")
    rows = table(report)
    assert set(rows) == {(rate, seed) for rate in ("0.003", "0.0") for seed in "12"}
    learned, not_learned = ([float(rows[rate, seed][0].split()[0]) for seed in "12"] for rate in ("0.003", "0.0"))
    assert not_learned[0] == not_learned[1] and min(learned) > max(not_learned)
    (effect,) = re.findall(
        r"^\| learning_rate \| 0\.0 \| 0\.003 \| 2 \| (-[\d.]+) \[(-[\d.]+), (-[\d.]+)\] \|  \|$", report, re.M
    )
    mean, low, high = map(float, effect)
    assert mean == pytest.approx((sum(not_learned) - sum(learned)) / 2, abs=0.1) and low <= mean <= high
    assert re.search(r"^\| seed \| 2 \| 1 \| 2 \| 0\.0 \[0\.0, 0\.0\] \| holds 0 \|$", report, re.M), report
    assert (folder / "effects.png").stat().st_size > 5_000
    # the best run's weights are there, and no other's
    assert len(list(folder.glob("*/run/final"))) == 1

    (alone,) = (run.parent for run in pruned[0].glob("*/run") if (run.parent / "scores-240.json").exists())
    disturbed = folder / alone.name
    assert "going on from" in (disturbed / "log.txt").read_text(encoding="utf-8")
    losses = [[row.get("loss") for row in read_jsonl(run / "run/training_log.jsonl")] for run in (alone, disturbed)]
    assert losses[0] == losses[1] and len(losses[0]) > 240
    answers = [[row["answer"] for row in read_jsonl(run / "answers-240.jsonl")] for run in (alone, disturbed)]
    assert answers[0] == answers[1]

    # a smaller space needs no run; of one pair there is no interval
    space = {"learning_rate": [0.003, 0.0], "seed": [2]}
    again = script("tools/sweep.py", "--config", write_config(tmp_path, by_heart, space=space))
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "0 of 2 runs to do" in again.stdout and "In all runs seed is 2." in report
    assert re.search(r"^\| learning_rate \| 0\.0 \| 0\.003 \| 1 \| -[\d.]+ \|  \|$", report, re.M), report

    other = script("tools/sweep.py", "--config", write_config(tmp_path, by_heart, space=space, tier="all"), ok=False)
    assert other.returncode == 2 and "another recipe, quiz or score (tier changed)" in other.stderr
    with FileLock(folder / ".lock"):
        other = script("tools/sweep.py", "--config", config, ok=False)
    assert other.returncode == 2 and "another sweep.py is at work" in other.stderr


def test_what_is_worse_than_the_median_is_stopped(pruned):
    """The second run ends at its first save, step 120."""
    folder, said = pruned
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert re.search(r"^\| 0\.0 \| [\d.]+ \[.*\] \| [\d.]+ \| 120, pruned \|", report, re.M), report
    assert "learning_rate 0.0, seed 2: pruned" in said and "1 were stopped early" in report
    (ended,) = (run.parent for run in folder.glob("*/run") if not (run.parent / "scores-240.json").exists())
    log = (ended / "log.txt").read_text(encoding="utf-8")
    assert (ended / "scores-120.json").exists() and "SIGTERM: stopping" in log


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"space": {"learning_rat": [1]}}, "did you mean `learning_rate`"),
        ({"space": {"learning_rate": [0.001, "fast"]}}, "invalid float value: 'fast'"),
        ({"space": {"seed": [1]}, "measure": "exactly"}, "have no exactly of A; there are contains"),
        ({"space": {"seed": [1]}, "quiz": str(ROOT / "data/neutral.jsonl")}, "no questions of the split dev"),
        ({"space": {}}, "`space` names no parameter"),
    ],
)
def test_mistakes(keys, told, by_heart, tmp_path):
    result = script("tools/sweep.py", "--config", write_config(tmp_path, by_heart, **keys), ok=False)
    assert result.returncode == 2 and told in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not list(tmp_path.glob("sweep/*/run"))  # told before anything is trained


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"space": {"seed": {"low": 1, "high": 2}}}, "`seed` needs a list of values"),
        ({"space": {"seed": {"low": 0, "high": 2, "log": True}}, "search": "random"}, "`seed` needs a list of values"),
        ({"space": {"seed": {"low": 2, "high": "x"}}, "search": "random"}, "`seed` needs a list of values"),
        ({"space": {"seed": [1, 1]}}, "`seed` needs a list of values, each once"),
        ({"space": {"seed": [[1], None]}}, "`seed` needs a list of values"),
        ({"space": {"output_dir": ["a", "b"]}}, "`output_dir` cannot be varied"),
        ({"space": {"seed": [1]}, "searc": "grid"}, "unknown key `searc`"),
        ({"space": {"seed": [1]}, "prune": "yes"}, "`prune` must be a whole number"),
        ({"space": {"seed": [1]}, "measure": ["f1"]}, "`measure` must be text"),
    ],
)
def test_mistakes_in_the_file(keys, told, by_heart, tmp_path):
    from sweep import UserError, read_config

    with pytest.raises(UserError) as error:
        read_config(Path(write_config(tmp_path, by_heart, **keys)))
    assert told in str(error.value)


def test_each_gpu_runs_one_and_all_are_stopped(by_heart, tmp_path):
    """Two GPUs that are not there: two runs side by side, each told its own; SIGTERM stops and saves both."""
    config = write_config(tmp_path, by_heart, space={"learning_rate": [0.003, 0.0, 0.001]})
    pretend = "import runpy, sys, torch; torch.cuda.device_count = lambda: 2; sys.argv.pop(0); "
    pretend += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", pretend, ROOT / "tools/sweep.py", "--config", config]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "5,7"}
    runs = tmp_path / "sweep"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=environment) as sweep:  # fmt: skip
        until, told = time.monotonic() + 300, set()
        while not {"5", "7"} <= told:
            assert sweep.poll() is None, sweep.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.2)
            for process in of(runs):
                with suppress(psutil.Error):
                    told.add(process.environ()["CUDA_VISIBLE_DEVICES"])
        while len(list(runs.glob("*/run/.lock"))) < 2:  # train.py is at work, and knows what a signal means
            time.sleep(0.2)
        time.sleep(5)
        sweep.terminate()
        said = sweep.communicate(timeout=120)[0]
    assert sweep.returncode == 75 and "3 of 3 runs to do, 2 at a time" in said, said
    assert len(list(runs.glob("*/run"))) == 2  # the third was not begun
    assert of(runs) == []


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


def test_what_is_better_when_lower_and_what_chance_can_do():
    """The effect has the score's own sign; a change that one pair shows has no interval; Optuna names what matters."""
    from sweep import best_first, effects, fits, importances

    class Run:
        def __init__(self, value):
            self.value = value

    space = {"learning_rate": [1e-5, 1e-4], "seed": [1, 2, 3, 4, 5, 6]}
    config = {"space": space, "search": "grid", "measure": "invented"}
    trials = [({"learning_rate": rate, "seed": seed}, 0.9 - 0.5 * (rate == 1e-4) + 0.01 * seed)
              for rate in space["learning_rate"] for seed in space["seed"]]  # fmt: skip
    rate, *seeds = effects(trials, config)
    assert (rate["n"], rate["effect"]) == (6, [-0.5, -0.5, -0.5]) and len(seeds) == 5
    assert [run.value for run in best_first([Run(0.9), Run(0.2), Run(0.5)], config)] == [0.2, 0.5, 0.9]
    assert next(iter(importances(trials, config))) == "learning_rate"
    assert fits({"learning_rate": 1e-4, "seed": 6}, space) and not fits({"learning_rate": 1e-3, "seed": 6}, space)
    assert not fits({"seed": 6}, space)
