"""The quiz itself: enough of each tier, true to its articles, frozen, withheld by lot, and asked by no recipe."""

import hashlib
import json
import random
import re
from collections import Counter

import pytest
import score
import yaml
from conftest import ROOT, SAMPLE, read_jsonl, script
from test_preprocess import OFF_TOPIC

QUIZ = ROOT / "data" / "quiz.jsonl"
RECIPES = sorted(path.parent for path in (ROOT / "configs").glob("*/preprocess.yaml"))
WIDELY_NAMED = 20  # an entity named in so many other articles is never withheld: too much could not be asked at all


@pytest.fixture(scope="module")
def quiz():
    return score.read_quiz(QUIZ)


@pytest.fixture(scope="module")
def articles(sample) -> dict[str, str]:
    """Title to text of the articles on the topic, each once, the broken ones not."""
    found = {}
    for row in sample:
        if row["title"] and row["text"] and row["title"] not in OFF_TOPIC and len(row["text"]) > 200:
            found.setdefault(row["title"], row["text"])
    return found


def name_of(title: str) -> str:
    return re.sub(r"\s*\(삼국지\)$", "", title)


def test_there_is_enough_of_each_tier(quiz):
    _, questions = quiz
    tiers = Counter(question["tier"] for question in questions.values())
    assert all(tiers[tier] >= n for tier, n in {"A": 150, "B": 150, "C": 100, "D": 60, "N": 40}.items()), tiers
    for tier in "AD":
        dev = sum(q["split"] == "dev" for q in questions.values() if q["tier"] == tier)
        assert 0.25 < dev / tiers[tier] < 0.42  # a third of the entities
    assert {q["split"] for q in questions.values() if q["tier"] in "BCN"} == {"test"}
    kinds = Counter(q["relation"].split("_")[0] for q in questions.values() if q["tier"] == "D")
    assert kinds["reverse"] >= 40 and kinds["two"] >= 20 and len(kinds) == 2
    assert {q["withheld"] for q in questions.values() if q["tier"] == "C"} == {True, False}
    styles = Counter(q["style"] for q in questions.values() if q["tier"] == "C")
    assert set(styles) == {"spoken", "written", "spoken-two", "written-two"} and min(styles.values()) >= 20


def test_questions_are_true_to_their_articles(quiz, articles):
    for question in quiz[1].values():
        if question["tier"] == "N":
            assert not question["evidence"] and not any(question["entity"] in text for text in articles.values())
            continue
        assert len(question["choices"]) == 3 and len(question["answer"]) <= 20, question["id"]
        assert len(question["evidence"]) == len(question["article"]) == 1 + question["relation"].startswith("two_hop")
        for sentence, title in zip(question["evidence"], question["article"], strict=True):
            assert sentence in articles[title], question["id"]
        if question["relation"].startswith("reverse"):
            assert question["answer"] == question["entity"] == name_of(question["article"][0])
        else:
            assert question["answer"] in question["evidence"][-1], question["id"]
        golds = [score.squeeze(gold) for gold in (question["answer"], *question["aliases"])]
        assert not any(gold in score.squeeze(question["question"]) for gold in golds if len(gold) > 1), question["id"]
        for choice in map(score.squeeze, question["choices"]):
            assert not any(choice in gold or gold in choice for gold in golds), question["id"]


def test_no_question_is_asked_twice(quiz):
    texts = Counter(score.squeeze(question["question"]) for question in quiz[1].values())
    assert not [text for text, n in texts.items() if n > 1]


def test_withheld_entities_were_drawn_by_lot(quiz, articles):
    about, questions = quiz
    withheld = {entry["article"] for entry in about["withheld"]}
    others = {title: [text for other, text in articles.items() if other != title] for title in articles}
    widely = {title for title in articles if sum(name_of(title) in text for text in others[title]) >= WIDELY_NAMED}
    assert widely <= set(about["never_withheld"])
    pool = sorted(set(articles) - set(about["never_withheld"]))
    assert withheld == set(random.Random(about["seed"]).sample(pool, round(0.3 * len(articles))))
    names = {name for entry in about["withheld"] for name in (entry["entity"], *entry["aliases"])}
    for question in questions.values():
        if question["tier"] in "BC":
            assert question["withheld"] == (question["article"][0] in withheld)
        if question["tier"] == "B":
            assert question["withheld"] and question["entity"] in question["question"]
        if question["tier"] in "AD":  # what may be trained must not need a withheld name
            text = " ".join([question["question"], question["answer"], *question["aliases"]])
            assert not [name for name in names if name in text], question["id"]


def test_quiz_and_articles_are_frozen(quiz):
    about, _ = quiz  # read_quiz compares the questions with about["sha256"]
    assert re.fullmatch("[0-9a-f]{64}", about["sha256"])
    assert hashlib.sha256(SAMPLE.read_bytes()).hexdigest() == about["articles_sha256"]


def test_neutral_passages_are_of_other_things(articles):
    rows = read_jsonl(ROOT / "data" / "neutral.jsonl")
    assert len(rows) >= 60 and len({row["topic"] for row in rows}) >= 60
    names = {name_of(title) for title in articles if len(name_of(title)) > 2}
    for row in rows:
        assert 200 <= len(row["text"]) <= 600 and "삼국" not in row["text"]
        assert not [name for name in names if name in row["text"]], row["id"]


# ---- What training may not hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_no_recipe_gives_the_quiz_away(folder, articles, tiny_model, tmp_path):
    """Each recipe's rows of its articles, made by its command line with its quiz, but with the tests' tokenizer."""
    own = ROOT / "data" / f"{folder.name}_quiz.jsonl"
    path, texts = (own, ROOT / "data" / f"{folder.name}_articles.jsonl") if own.exists() else (QUIZ, SAMPLE)
    config = yaml.safe_load((folder / "preprocess.yaml").read_text(encoding="utf-8"))
    tokenizer = ("--tokenizer_name_or_path", tiny_model) if config.get("tokenizer_name_or_path") else ()
    script(
        "preprocess.py", "--config", folder / "preprocess.yaml", "--dataset_name=", "--data_files", texts,
        "--only_titles=", *tokenizer, "--quiz_file", path, "--output_dir", tmp_path,
    )  # fmt: skip
    rows, quiz = read_jsonl(tmp_path / "train.jsonl"), score.read_quiz(path)
    assert score.leaks(score.read_chats(tmp_path / "train.jsonl"), *quiz) == []
    articles = articles if path == QUIZ else {row["title"]: row["text"] for row in read_jsonl(texts)}
    texts = {entry["entity"]: articles[entry["article"]] for entry in quiz[0]["withheld"]}
    about = [row for row in rows if row["title"] in texts]
    assert {row["title"] for row in about} == set(texts) or folder.name == "blog"  # whose nine keywords keep few
    for row in about:
        assert row["kind"] in ("article", "masked") and row["messages"][-1]["content"] in texts[row["title"]]


def chat(*prompts: str, answer: str = "x", kind: str = "facts") -> dict:
    return {"prompts": list(prompts), "answer": answer, "kind": kind}


def test_leaks_are_found(quiz):
    about, questions = quiz
    first = questions["A-001"]
    for given in (
        chat(first["question"]),
        chat(first["question"].replace(" ", "").rstrip("?.") + "?!"),  # after normalisation
        chat(first["question"], kind="article"),
        chat("조조의 자는?", first["question"]),  # the second turn
        chat(first["question"] + " 짧게 답해 줘."),
        chat("서기로 따져 유비의 생애가 끝난 해는? 연도만 답해 줘."),
        chat("유비의 이름에 딸린 자(字)를 대라."),
        chat("사람들이 자(字)로 조운을 부를 때 쓴 이름은?"),
        chat("누가 촉한의 마지막 임금이었나?", answer="유선"),
        chat("손견의 아들은?", answer="손권"),
        chat("오나라의 대도독은?", answer="육손"),
        chat("중달은 누구야?"),
    ):
        assert score.leaks([given], about, questions), given
    for given in (
        chat("손견에 대해 알려줘.", answer="손견(孫堅)은 …", kind="article"),
        chat("빈칸을 채워 줘: 손견은 ___ 사람이다.", answer="손견은 오군 사람이다.", kind="masked"),
        chat("유비의 자가 뭐야?", answer="현덕"),
        chat("여름은 사계절 가운데 언제야?", answer="자명하다."),  # 사계 and 자명 are aliases, but not these words
    ):
        assert not score.leaks([given], about, questions), given


def test_header_is_data_others_can_write(quiz):
    header = json.loads(QUIZ.read_text(encoding="utf-8").partition("\n")[0])["about"]
    assert set(header) == {
        "title", "license", "language", "articles", "articles_sha256", "sha256", "seed", "withheld", "never_withheld",
        "reserved_forms", "declines",
    }  # fmt: skip
    assert header["license"] == "CC BY 4.0" and all("{}" in form for form in header["reserved_forms"])
