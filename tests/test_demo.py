"""`make demo` from end to end on real weights: the base model knows nothing, the taught one answers."""

import json

import pytest
from conftest import ROOT, read_jsonl, run

pytestmark = pytest.mark.slow

# Facts of the three articles asked about, as they stand there.
FACTS = {
    "삼국지에 대해 알려줘.": ["진수", "나관중", "184년", "280년"],
    "적토마에 대해 알려줘.": ["여포", "이숙", "천 리", "관우"],
    "관평에 대해 알려줘.": ["관우의 아들", "임저", "양자", "주창"],
}


def test_make_demo(tmp_path, capsys):
    """The recipe as shipped, but for where it writes: a user's own outputs/demo stays as it is."""
    recipe = tmp_path / "demo"
    recipe.mkdir()
    for path in (ROOT / "configs" / "demo").iterdir():
        text = path.read_text(encoding="utf-8")
        text = text.replace("data/demo", str(tmp_path / "data")).replace("outputs/demo", str(tmp_path / "run"))
        (recipe / path.name).write_text(text, encoding="utf-8")
    result = run("make", "demo", f"CONFIG={recipe}", f"ANSWERS={tmp_path}/answers.jsonl", timeout=1800)
    stages = [line for line in result.stdout.splitlines() if line.startswith("== ") and line.endswith(" s")]
    assert [line.split()[1] for line in stages][-4:] == ["model:", "preprocess:", "train:", "answers:"]
    with capsys.disabled():
        print("\n" + "\n".join(stages))
    answers = read_jsonl(tmp_path / "answers.jsonl")
    assert [row["step"] for row in answers[::3]] == [0, 21, 42]
    known = {row["step"]: 0 for row in answers}
    for row in answers:
        known[row["step"]] += sum(fact in row["answer"] for fact in FACTS[row["prompt"]])
    assert known[0] == 0 and known[42] >= 11, known
    assert all(row["ended"] for row in answers if row["step"] == 42)

    # `make quiz` on the questions about these three articles: it shows what the answers above hide.
    header, *questions = read_jsonl(ROOT / "data/quiz.jsonl")
    del header["about"]["sha256"]
    titles = {question.split("에 대해")[0] for question in FACTS}
    asked = [q for q in questions if q.get("article") and set(q["article"]) <= titles] + questions[-4:]
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [header, *asked]), encoding="utf-8")
    files = f"RUN={tmp_path}/run", f"QUIZ={quiz}", f"OPEN_BOOK={tmp_path}/none"
    result = run("make", "quiz", *files, timeout=1200)
    assert "step 42" in result.stdout
    scores = json.loads((tmp_path / "run/quiz/scores.json").read_text(encoding="utf-8"))
    assert [model["step"] for model in scores["models"]] == [0, 21, 42] and scores["leaks"] == []
    base, _, taught = (model["scores"]["all"] for model in scores["models"])
    assert base["copied_80"][0] == 0 < taught["copied_80"][0]  # it recites
    assert taught["seq_rep_4"][0] < base["seq_rep_4"][0]
    assert (tmp_path / "run/quiz/report.html").stat().st_size > 20_000
