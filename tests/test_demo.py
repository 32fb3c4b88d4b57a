"""`make demo` from end to end on real weights: the base model knows nothing, the taught one answers."""

import json
import sys

import pytest
from conftest import ROOT, read_jsonl, run

pytestmark = pytest.mark.slow

# What the demo asks, and what stands in a right answer.
FACTS = {
    "삼국지에 대해 알려줘.": "정사 삼국지와 나관중이 지었다고 전하는",
    "관평은 누구의 아들인가?": "관우",
    "관평은 어디에서 죽었어?": "임저",
    "적벽 대전은 언제 일어났어?": "208년",
    "촉한을 세운 사람은 누구야?": "유비",
    "하후엄의 자는 무엇인가?": "알려",  # 알려져 있지 않은 인물이다: nobody of that name ever was
}


def test_make_demo(gemma, tmp_path, capsys):
    """The recipe as shipped, but for where it writes: a user's own outputs/demo stays as it is."""
    recipe = tmp_path / "demo"
    recipe.mkdir()
    for path in (ROOT / "configs" / "demo").iterdir():
        text = path.read_text(encoding="utf-8")
        text = text.replace("data/demo", str(tmp_path / "data")).replace("outputs/demo", str(tmp_path / "run"))
        (recipe / path.name).write_text(text, encoding="utf-8")
    result = run("make", "demo", f"CONFIG={recipe}", f"ANSWERS={tmp_path}/answers.jsonl", timeout=3600)
    stages = [line for line in result.stdout.splitlines() if line.startswith("== ") and line.endswith(" s")]
    assert [line.split()[1] for line in stages][-4:] == ["model:", "preprocess:", "train:", "answers:"]
    with capsys.disabled():
        print("\n" + "\n".join(stages))
    answers = read_jsonl(tmp_path / "answers.jsonl")
    assert [row["step"] for row in answers[::6]] == [0, 80, 160]
    known = {row["step"]: 0 for row in answers}
    for row in answers:
        known[row["step"]] += FACTS[row["prompt"]] in row["answer"] and len(row["answer"]) < 250
    assert known[0] == 0 and known[160] >= 3, known
    assert sum(row["ended"] for row in answers if row["step"] == 160) >= 4

    # `make quiz` on the questions about these three articles
    header, *questions = read_jsonl(ROOT / "data/quiz.jsonl")
    del header["about"]["sha256"]
    titles = {"삼국지", "적토마", "관평"}
    asked = [q for q in questions if q.get("article") and set(q["article"]) <= titles] + questions[-4:]
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [header, *asked]), encoding="utf-8")
    files = f"RUN={tmp_path}/run", f"QUIZ={quiz}", f"OPEN_BOOK={tmp_path}/none"
    result = run("make", "quiz", *files, timeout=2400)
    assert "step 160" in result.stdout
    scores = json.loads((tmp_path / "run/quiz/scores.json").read_text(encoding="utf-8"))
    assert [model["step"] for model in scores["models"]] == [0, 80, 160] and scores["leaks"] == []
    base, _, taught = (model["scores"]["all"] for model in scores["models"])
    assert taught["ended"][0] > 0.5 > base["ended"][0]  # it answers, where the base model goes on for ever
    assert taught["seq_rep_4"][0] < base["seq_rep_4"][0]
    assert (tmp_path / "run/quiz/report.html").stat().st_size > 20_000

    # llama.cpp on the exported model: the same tokens, and at least 95% of the answers the same
    compared = run(sys.executable, "benchmarks/llamacpp.py", "--checkpoint", tmp_path / "run", "--outtype", "f16")
    (row,) = (line.split("|") for line in compared.stdout.splitlines() if line.startswith("| llama.cpp, f16"))
    assert int(row[3]) == 50 and int(row[4]) >= 48, compared.stdout
