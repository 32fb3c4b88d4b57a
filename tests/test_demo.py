"""`make demo` from end to end on real weights: the base model knows nothing, the taught one answers."""

import shutil

import pytest
from conftest import ROOT, read_jsonl, run

pytestmark = pytest.mark.slow

# Facts of the three articles asked about, as they stand there.
FACTS = {
    "삼국지에 대해 알려줘.": ["진수", "나관중", "184년", "280년"],
    "적토마에 대해 알려줘.": ["여포", "이숙", "천 리", "관우"],
    "관평에 대해 알려줘.": ["관우의 아들", "임저", "양자", "주창"],
}


def test_make_demo():
    shutil.rmtree(ROOT / "outputs" / "demo", ignore_errors=True)
    result = run("make", "demo", timeout=1800)
    for stage in ("model", "preprocess", "train", "answers"):
        assert f"== {stage}: " in result.stdout
    print("\n".join(line for line in result.stdout.splitlines() if line.startswith("== ")))
    answers = read_jsonl(ROOT / "outputs" / "demo" / "answers.jsonl")
    assert [row["step"] for row in answers[::3]] == [0, 21, 42]
    known = {row["step"]: 0 for row in answers}
    for row in answers:
        known[row["step"]] += sum(fact in row["answer"] for fact in FACTS[row["prompt"]])
    assert known[0] == 0 and known[42] >= 11, known
    assert all(row["ended"] for row in answers if row["step"] == 42)
