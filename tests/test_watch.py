"""Training can be watched: TensorBoard by one key, curves without it, answers and scores of every save beside them."""

import shutil

import pytest
from conftest import ROOT, read_jsonl, script


@pytest.fixture(scope="module")
def watched(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("watched") / "run"
    script("train.py", "--config", recipe, "--output_dir", run, "--report_to", "tensorboard")
    config = run.with_name("generate.yaml")
    config.write_text(
        "prompt: ['조조는 누구인가?', '<script>alert(1)</script>은?']\nmax_new_tokens: 8\n", encoding="utf-8"
    )
    asked = ("tools/watch.py", "--run", run, "--config", config, "--quiz", ROOT / "data/quiz.jsonl", "--once")
    return run, asked, script(*asked)


def test_speed_and_memory_are_logged(watched):
    run, _, _ = watched
    logged = [entry for entry in read_jsonl(run / "training_log.jsonl") if "loss" in entry]
    assert len(logged) == 8
    for entry in logged:
        assert entry["tokens_per_second"] > 0 and 0.1 < entry["memory_gib"] < 20 and "mfu" not in entry  # no GPU


def test_answers_and_scores_of_every_save(watched):
    run, asked, result = watched
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["step 4", "step 8"]
    assert {path.name for path in (run / "watch").iterdir()} == {
        "questions.jsonl", "samples-4.jsonl", "samples-8.jsonl", "quiz-4.jsonl", "quiz-8.jsonl", "scores.json",
        "report.html", "watch.html",
    }  # fmt: skip
    page = (run / "watch/watch.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "<script" not in page and "&lt;script&gt;" in page
    assert {row["split"] for row in read_jsonl(run / "watch/quiz-8.jsonl")} == {"dev"}
    before = (run / "watch/samples-8.jsonl").stat().st_mtime_ns
    script(*asked)  # nothing is asked twice
    assert (run / "watch/samples-8.jsonl").stat().st_mtime_ns == before


def test_tensorboard_has_it_all(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _, _ = watched
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = events.Tags()["scalars"]
    for name in ("loss", "learning_rate", "grad_norm", "mean_token_accuracy", "tokens_per_second", "memory_gib"):
        assert len(events.Scalars(f"train/{name}")) == 8, found
    assert [event.step for event in events.Scalars("quiz/exact/A")] == [4, 8]
    assert [event.step for event in events.Tensors("answers/text_summary")] == [4, 8]
    assert "조조는 누구인가?" in events.Tensors("answers/text_summary")[0].tensor_proto.string_val[0].decode()


def test_mistakes(tmp_path):
    missing = script("tools/watch.py", "--run", tmp_path, "--config", tmp_path / "none.yaml", ok=False)
    assert missing.returncode == 2 and missing.stderr.startswith("watch.py: there is no ")
    asked = ("--run", tmp_path, "--config", ROOT / "configs/demo/generate.yaml", "--quiz", ROOT / "data/neutral.jsonl")
    no_dev = script("tools/watch.py", *asked, ok=False)
    assert no_dev.returncode == 2 and "no questions of the split dev" in no_dev.stderr
    nothing = script("tools/watch.py", *asked[:4], "--once", ok=False)
    assert nothing.returncode == 2 and "holds no whole checkpoint" in nothing.stderr


def test_questions_that_cannot_be_asked_stop_it(watched, tmp_path):
    run, _, _ = watched
    (tmp_path / "generate.yaml").write_text("promt: ['조조는?']\n", encoding="utf-8")
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("watch"))
    asked = ("--run", tmp_path / "run", "--config", tmp_path / "generate.yaml", "--once")
    result = script("tools/watch.py", *asked, ok=False)
    assert result.returncode == 2 and "did you mean `prompt`" in result.stderr, result.stderr
