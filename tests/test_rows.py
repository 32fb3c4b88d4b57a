"""The rows made from the articles: judged against a small world whose truth is known, and against the real quiz."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import traceback
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations

import pytest
import score
import yaml
from conftest import ROOT, SAMPLE, read_jsonl, script
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mistakes import assert_mistake

import preprocess
from preprocess import PreprocessArguments, agree

QUIZ = ROOT / "data" / "quiz.jsonl"


# ---- A world whose truth is known ----------------------------------------------------------------------------------


def coda(word: str) -> str:
    """The last syllable's final consonant, "" without: by Unicode's decomposition, not by arithmetic."""
    parts = unicodedata.normalize("NFD", word)
    return parts[-1] if 0x11A8 <= ord(parts[-1]) <= 0x11C2 else ""


def said(form: str, **values: str) -> str:
    """A form filled in, with the particles by a rule of our own."""

    def choose(match: re.Match) -> str:
        word, closed, open_ = match.groups()
        takes_open = not coda(word) or (coda(word) == "\u11af" and closed.startswith("으"))
        return word + (open_ if takes_open else closed)

    particles = r"([가-힣])(은|이|을|과|으로|이다|이라)/(는|가|를|와|로|다|라)"
    return re.sub(particles, choose, form.format(**values))


# Two of one office and one year, so that nobody can be named by them; two right answers to one question (가람, 벼슬).
LABELS = {"birth": "생년", "style": "자", "office": "벼슬", "child": "아들"}
TRUTH = {
    "가람": {"birth": ["150년"], "style": ["문보"], "office": ["태수", "도독"], "child": ["나루", "바온"]},
    "나루": {"birth": ["175년"], "style": ["자현"], "office": ["승상"], "child": ["사빈"]},
    "다올": {"birth": ["161년"], "style": ["백달"], "office": ["군사"], "child": ["아라"]},
    "라희": {"birth": ["161년"], "style": ["중길"], "office": ["주부"], "child": ["자람"]},
    "마솔": {"birth": ["148년"], "style": ["계림"], "office": ["태수"]},
    "바온": {"birth": ["180년"], "style": ["효담"]},
}
FACTS = [(name, entity, value) for entity, of in TRUTH.items() for name, many in of.items() for value in many]
POOL = {name: {value for relation, _, value in FACTS if relation == name} for name in LABELS}
TOLD = "옛 글에 {entity}의 {label}은/는 {value}이라/라고 한다."
QUESTIONS = [
    "{entity}의 {label}은/는?",
    "{entity}은/는 {label}이/가 무엇인가?",
    "{entity}의 {label}을/를 알려 줘.",
    "{entity}이/가 지닌 {label}은/는?",
    "{entity}과/와 이어진 {label}은/는?",
    "{label}을/를 {entity}으로/로 찾아 줘.",
]
STATED, REVERSE, YES_NO = (
    "{entity}의 {label}은/는 {value}이다/다.",
    "{label}이/가 {value}인 사람은?",
    "{entity}의 {label}이/가 {value}인가?",
)
CLOZE = "{entity}에 관한 글이다. 빈칸에 들어갈 말은? {sentence}"
NO_FORMS = {"sentence": 0, "choices": 0, "cloze": 0, "yes_no": 0}


def relation(label: str, **other) -> dict:
    forms = {"questions": QUESTIONS, "sentence": [STATED], "reverse": [REVERSE], "yes_no": [YES_NO]}
    pattern = rf"(?P<entity>{{title}}|[가-힣]{{2}})의 {label}[은는] (?P<value>[0-9가-힣]+?)(?:이라|라)고"
    given = {name: [form.replace("{label}", label) for form in many] for name, many in forms.items()}
    return {"label": label, "patterns": [pattern]} | given | other


def world_blocks() -> dict:
    return {
        "articles": {
            "definition": ["{title}에 대해 알려줘.", "{title}은/는 뭐야?"],
            "one_sentence": ["{title}을/를 한 문장으로 말해 줘."],
            "detail": ["{title}에 대해 자세히 알려줘."],
            "list": ["{title}의 사실을 목록으로 정리해 줘."],
        },
        "facts": {
            "relations": {name: relation(label) for name, label in LABELS.items()},
            "forms": {
                "sentence": ["{question} 문장으로 답해 줘."],
                "choices": ["{question} 다음에서 골라 줘: {choices}"],
                "cloze": [CLOZE],
                "yes": ["네,"],
                "no": ["아니요,"],
            },
        },
        "biographies": {"questions": ["{entity}의 약력은?", "{entity}은/는 누구인가?"], "variants": 4, "sentences": 3},
        "masked": {"questions": ["{title} 글의 빈칸을 채워 줘.\n{text}"], "variants": 2},
        "pairs": {
            "questions": ["{a}과/와 {b}은/는?"],
            "after_name": "은|는|과|와|을|를|이|가|의|에서",
            "except": ["마솔"],
        },
        "unknown": {
            "share": 0.1,
            "names": {
                "people": {
                    "names": ["도깨울", "자람", *(f"{a}{b}" for a in "혁탁섭" for b in "윤율늘름")],
                    "questions": ["{entity}은/는 누구야?"],
                    "relations": ["style", "birth"],
                    "answers": ["{entity}은/는 알려져 있지 않다.", "그런 사람은 알려져 있지 않다."],
                }
            },
        },
    }


def world_articles() -> list[dict]:
    """Facts in the first paragraph, meetings in the second; one article tells nothing that a pattern finds."""
    articles = []
    for entity, of in TRUTH.items():
        facts = [
            said(TOLD, entity=entity, label=LABELS[name], value=value) for name, many in of.items() for value in many
        ]
        first = said("북쪽 땅에 {entity}이/가 살았다. ", entity=entity)
        articles.append({"title": entity, "text": first + " ".join(facts)})
    articles[0]["text"] += "\n가람과 나루는 강을 건넜다. 가람은 마솔을 만났다. 가람산에서 다올이 살았다!\n끝이 났다."
    articles[1]["text"] += "\n어느 날 나루가 가람을 찾아가 다올의 집을 물었다. 나루와 가람은 이겼다."
    articles[2]["text"] += "\n가람 나루 다올이 만났다."
    articles[3]["text"] += "\n라희는 가람 전투를 보았다. 가람 전투에서 라희와 다올은 졌다."
    articles[5]["text"] += "\n바온은 큰라희를 보았다."
    articles.append({"title": "가람 전투", "text": "고요한 들판이다. 아무 일도 없었다. 도깨울이라는 바위가 있다."})
    return articles


def make(texts: list[dict], tokenizer=None, **recipe) -> tuple[list[dict], dict]:
    """make_rows without the chats that hold the whole text."""
    numbered = [{"row": i, **article} for i, article in enumerate(texts)]
    rows, _, report = preprocess.make_rows(numbered, [], PreprocessArguments(**recipe), tokenizer)
    return rows, report


def write_jsonl(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder, texts: list[dict] | None = None, **recipe):
    """preprocess.yaml in a folder, with the articles beside it."""
    data = write_jsonl(folder / "articles.jsonl", texts if texts is not None else world_articles())
    fixed = {"data_files": [str(data)], "split_articles": False, "question": "{title} 글의 전문을 보여 줘."}
    config = folder / "preprocess.yaml"
    config.write_text(yaml.safe_dump(fixed | recipe, allow_unicode=True), encoding="utf-8")
    return config


@pytest.fixture
def preprocess_here(monkeypatch, capsys):
    """preprocess.py run as a program, but within this process: a second less for each mistake."""

    def run(*arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "preprocess.py"), *map(str, arguments)]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", command[1:])
        code, trace = 0, ""
        try:
            runpy.run_path(command[1], run_name="__main__")
        except SystemExit as e:
            code = e.code
        except Exception:
            code, trace = 1, traceback.format_exc()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(command, code, printed.out, printed.err + trace)

    return run


def prepare(folder, *arguments, here=None, env=None, **recipe) -> tuple[list[dict], dict]:
    """The rows and the report that the command line writes; `here` is preprocess_here."""
    line = ("--config", write_recipe(folder, **recipe), "--output_dir", folder / "out", *arguments)
    result = here(*line) if here else script("preprocess.py", *line, env=env)
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    return read_jsonl(folder / "out" / "train.jsonl"), report


def talk(row: dict) -> tuple[str, ...]:
    return tuple(message["content"] for message in row["messages"])


def of_kind(rows: list[dict], kind: str) -> list[tuple[str, ...]]:
    return [talk(row) for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[list[dict], dict]:
    """The small world by the command line, with every block."""
    return prepare(tmp_path_factory.mktemp("world"), **world_blocks())


def stated(name: str, entity: str, value: str) -> str:
    return said(STATED, entity=entity, label=LABELS[name], value=value)


# ---- Articles, biographies, pairs ----------------------------------------------------------------------------------


def test_articles_answer_as_much_as_was_asked(world):
    rows = of_kind(world[0], "summary")
    expected = []
    for article in world_articles():
        title, first = article["title"], article["text"].split("\n")[0]
        sentences = [part.strip() + end for part, end in re.findall(r"(.*?)([.!])", first)]
        for form in ("{t}에 대해 알려줘.", "{t}은/는 뭐야?"):
            expected.append((said(form, t=title), " ".join(sentences[:2])))
        expected.append((said("{t}을/를 한 문장으로 말해 줘.", t=title), sentences[0]))
        expected.append((f"{title}에 대해 자세히 알려줘.", first))
    lists = [row for row in rows if "목록" in row[0]]
    assert sorted(set(rows) - set(lists)) == sorted(expected) and len(rows) == len(set(rows))
    with_three = {entity for entity, of in TRUTH.items() if len(of) > 2}
    assert {prompt.split("의 사실을")[0] for prompt, _ in lists} == with_three < set(TRUTH)
    for prompt, answer in lists:
        entity = prompt.split("의 사실을")[0]
        for line in answer.split("\n"):
            label, value = line.removeprefix("- ").split(": ")
            names = [name for name, of in LABELS.items() if of == label]
            assert set(value.split(", ")) <= set(TRUTH[entity][names[0]])
        assert [line.split(":")[0] for line in answer.split("\n")] == [f"- {LABELS[name]}" for name in TRUTH[entity]]


def test_a_list_holds_every_right_value(world):
    ((_, answer),) = [row for row in of_kind(world[0], "summary") if row[0] == "가람의 사실을 목록으로 정리해 줘."]
    assert all(value in answer for many in TRUTH["가람"].values() for value in many), answer


def test_biographies_tell_the_facts_in_several_orders(world):
    told = defaultdict(list)
    for prompt, answer in of_kind(world[0], "biographies"):
        told[re.match(r"(\w\w)(?:의|은|는) ", prompt)[1]].append((prompt, answer))
    assert set(told) == {"가람", "나루", "다올", "라희", "마솔"}  # 바온 has two facts, 가람 전투 none
    for entity, rows in told.items():
        known = {stated(name, entity, value) for name, whose, value in FACTS if whose == entity}
        orders = [tuple(re.findall(r"\S.*?\.", answer)) for _, answer in rows]
        for order in orders:
            assert len(order) == len(set(order)) == 3 and set(order) <= known, (entity, order)
        assert len(set(orders)) > 1 and 2 < len(rows) <= 4  # an order that came twice is there once
        forms = ("{entity}의 약력은?", "{entity}은/는 누구인가?")
        assert {prompt for prompt, _ in rows} == {said(form, entity=entity) for form in forms}
    shown = {sentence for rows in told.values() for _, answer in rows for sentence in re.findall(r"\S.*?\.", answer)}
    assert len(shown) > 0.8 * sum(entity != "바온" for _, entity, _ in FACTS)


def test_pairs_are_the_sentences_that_name_both(world):
    """A name counts with a particle behind it, not inside a word (가람산, 큰라희) nor in a longer name (가람 전투)."""
    names = [*(name for name in TRUTH if name != "마솔"), "가람 전투"]
    expected = defaultdict(list)
    for article in world_articles():
        for sentence in re.findall(r"[^\s.!][^.!\n]*[.!]", article["text"]):
            left = re.sub(r"가람 전투", "\0", sentence)
            words = {
                re.sub(r"(?:은|는|과|와|을|를|이|가|의|에서)$", "", word) for word in re.findall(r"[가-힣]+", left)
            }
            words |= set(re.findall(r"[가-힣]+", left)) | ({"가람 전투"} if "\0" in left else set())
            for a, b in combinations(sorted(words & set(names)), 2):
                expected[a, b].append(sentence)
    assert ("가람", "나루") in expected and ("가람", "마솔") not in expected and ("가람", "다올") in expected
    rows = {}
    for prompt, answer in of_kind(world[0], "pairs"):
        (pair,) = [(a, b) for a, b in combinations(sorted(names), 2) if said("{a}과/와 {b}은/는?", a=a, b=b) == prompt]
        assert pair not in rows
        rows[pair] = answer
    assert rows == {pair: " ".join(list(dict.fromkeys(many))[:2]) for pair, many in expected.items()}


def test_a_longer_name_hides_the_shorter_within_whatever_follows():
    texts = [{"title": title, "text": "조용했다."} for title in ("가람", "라희")]
    texts += [{"title": "가람 전투", "text": "가람 전투까지 라희는 살았다."}]
    rows, _ = make(texts, pairs=world_blocks()["pairs"])
    assert not [talk(row) for row in rows if talk(row)[0] == "가람과 라희는?"]


# ---- Facts ---------------------------------------------------------------------------------------------------------


def forms_of(form: str, keys) -> dict[str, tuple]:
    """{the form filled in: (relation, …)} for every fact's fields."""
    found = defaultdict(set)
    for name, entity, value in keys:
        found[said(form, entity=entity, label=LABELS[name], value=value)].add((name, entity, value))
    return found


ANY = [(name, entity, value) for name in LABELS for entity in TRUTH for value in POOL[name]]
ASKED = {
    said(form, entity=entity, label=LABELS[name]): (name, entity)
    for form in QUESTIONS
    for entity in TRUTH
    for name in LABELS
}
REVERSED, ASKED_YES_NO = forms_of(REVERSE, FACTS), forms_of(YES_NO, ANY)


def judge(prompt: str, answer: str) -> tuple[str, list[tuple]]:
    """What kind of question it is and which facts its answer tells; fails where the answer is not right."""

    def right(question: str) -> tuple[str, str, list[str]]:
        name, entity = ASKED[question]
        return name, entity, TRUTH[entity][name]

    if prompt in ASKED:
        name, entity, values = right(prompt)
        assert answer == ", ".join(values)
        return "short", [(name, entity, value) for value in values]
    if prompt.endswith(" 문장으로 답해 줘."):
        name, entity, values = right(prompt.removesuffix(" 문장으로 답해 줘."))
        (value,) = [value for value in values if answer == stated(name, entity, value)]
        return "sentence", [(name, entity, value)]
    if " 다음에서 골라 줘: " in prompt:
        question, choices = prompt.split(" 다음에서 골라 줘: ")
        name, entity, values = right(question)
        choices = choices.split(", ")
        assert values == [answer] and choices.count(answer) == 1
        assert len(choices) == len(set(choices)) == 4 and set(choices) <= POOL[name]
        return "choices", [(name, entity, answer)]
    if prompt in REVERSED:
        (fact,) = REVERSED[prompt]  # nobody else has this value
        assert answer == fact[1]
        return "reverse", [fact]
    if prompt in ASKED_YES_NO:
        ((name, entity, value),) = ASKED_YES_NO[prompt]
        word, _, sentence = answer.partition(" ")
        (true,) = [true for true in TRUTH[entity][name] if sentence == stated(name, entity, true)]
        assert word == ("네," if value in TRUTH[entity][name] else "아니요,")
        assert word == "아니요," or true == value
        return "yes_no", [(name, entity, true)]
    (fact,) = [
        (name, entity, value)
        for name, entity, value in FACTS
        if value == answer
        and prompt
        == CLOZE.format(
            entity=entity, sentence=said(TOLD, entity=entity, label=LABELS[name], value=value).replace(value, "___")
        )
    ]
    assert answer not in prompt
    return "cloze", [fact]


def test_facts_are_right_in_every_way_to_ask(world):
    rows = of_kind(world[0], "facts")
    assert len(rows) == len(set(rows))
    ways, told = Counter(), defaultdict(Counter)
    for prompt, answer in rows:
        way, facts = judge(prompt, answer)
        ways[way] += 1
        for fact in facts:
            told[fact][way] += 1
    assert set(told) == set(FACTS)
    assert set(ways) == {"short", "sentence", "reverse", "yes_no", "choices", "cloze"}
    for (name, entity, value), of in told.items():
        single = len(TRUTH[entity][name]) == 1
        if single:  # the same number in all, whichever ways there are
            assert sum(of.values()) == 8, (name, entity, of)
        else:  # what answers two facts together is there once
            assert sum(of.values()) >= 8 and of["short"] <= len(QUESTIONS), (name, entity, of)
        unique = sum(v == value for n, _, v in FACTS if n == name) == 1
        others = len(POOL[name] - set(TRUTH[entity][name]))
        assert of["reverse"] == unique and of["choices"] == (single and others >= 3)
        assert of["sentence"] == of["yes_no"] == of["cloze"] == 1
        assert of["short"] >= 3
    answers = [answer.split(" ")[0] for prompt, answer in rows if prompt in ASKED_YES_NO]
    assert {"네,", "아니요,"} == set(answers)


@pytest.mark.parametrize("per_fact", [{"short": 1}, {"short": 0, "yes_no": 2}, {"sentence": 0, "cloze": 0}])
def test_per_fact_says_how_many(per_fact):
    blocks = world_blocks()
    rows, _ = make(world_articles(), facts=blocks["facts"], per_fact=per_fact)
    wanted = {"short": 3, "sentence": 1, "reverse": 1, "yes_no": 1, "choices": 1, "cloze": 1} | per_fact
    told = defaultdict(Counter)
    for row in rows:
        way, facts = judge(*talk(row))
        for fact in facts:
            told[fact][way] += 1
    for (name, entity, _), of in told.items():
        if len(TRUTH[entity][name]) == 1:
            assert sum(of.values()) == sum(wanted.values())
        assert all(of[way] == wanted[way] for way in ("sentence", "yes_no", "cloze"))
        assert all(of[way] <= wanted[way] for way in ("reverse", "choices"))


def test_facts_are_right_with_every_seed():
    """What is drawn is right whatever is drawn, and no place in the choices tells the right one."""
    places, words = Counter(), Counter()
    for seed in range(30):
        rows, _ = make(world_articles(), facts=world_blocks()["facts"], seed=seed)
        for prompt, answer in map(talk, rows):
            way, _ = judge(prompt, answer)
            if way == "choices":
                places[prompt.split(": ")[1].split(", ").index(answer)] += 1
            words[answer.split(" ")[0]] += way == "yes_no"
    assert len(places) == 4 and min(places.values()) > max(places.values()) / 2
    assert words["네,"] > words["아니요,"] / 2 and words["아니요,"] > words["네,"] / 2


def test_relations_whose_values_do_not_exclude_each_other_get_no_wrong_value():
    """Where many values may be right, none that the texts leave out is called wrong; the rows are as many."""
    facts = world_blocks()["facts"]
    facts["relations"] = {"style": facts["relations"]["style"] | {"exclusive": False}}
    rows, _ = make(world_articles(), facts=facts)
    ways = Counter(judge(*talk(row))[0] for row in rows)
    assert ways == {"short": 5 * 6, "sentence": 6, "reverse": 6, "cloze": 6}


def test_the_facts_are_written_too(tmp_path, preprocess_here):
    recipe = world_blocks()
    prepare(tmp_path, here=preprocess_here, **recipe)
    told = [(fact["relation"], fact["entity"], fact["value"]) for fact in read_jsonl(tmp_path / "out/facts.jsonl")]
    assert sorted(told) == sorted(FACTS)
    prepare(tmp_path, here=preprocess_here, pairs=recipe["pairs"])
    assert not (tmp_path / "out" / "facts.jsonl").exists()


def test_a_fact_told_in_two_articles_is_one_fact():
    articles = world_articles()
    articles[1]["text"] += " 예전부터 가람의 생년은 150년이라고 한다."
    rows, report = make(articles, facts=world_blocks()["facts"])
    assert sum("가람" in talk(row)[0] and "150년" in talk(row)[1] for row in rows) <= 8
    assert report["facts"]["total"] == len(FACTS)


def test_articles_of_one_title_keep_their_facts():
    birth = {"birth": world_blocks()["facts"]["relations"]["birth"]}
    texts = [{"title": "가람", "text": f"글에 가람의 생년은 {year}년이라고 한다."} for year in (150, 160)]
    _, report = make(texts, facts=world_blocks()["facts"] | {"relations": birth})
    assert report["facts"]["total"] == 2


def test_kinds_that_per_fact_does_not_ask_for_need_no_form():
    birth = {"birth": world_blocks()["facts"]["relations"]["birth"]}
    rows, _ = make(world_articles(), facts={"relations": birth}, per_fact=NO_FORMS)
    assert {judge(*talk(row))[0] for row in rows} == {"short", "reverse"}


def test_a_wrong_value_is_wrong_also_where_the_questions_say_more():
    office = {
        "patterns": ["(?P<year>[0-9]+년)에 {title}[은는] (?P<value>[가-힣]+) 벼슬에"],
        "questions": ["{year}에 {entity}의 벼슬은?", "{entity}은/는 {year}에 무엇이 되었나?"],
        "yes_no": ["{entity}은/는 {value} 벼슬에 올랐나?"],
    }
    text = "150년에 가람은 태수 벼슬에 올랐다. 160년에 가람은 도독 벼슬에 올랐다. 170년에 가람은 승상 벼슬에 올랐다."
    forms = world_blocks()["facts"]["forms"]
    rows, _ = make(
        [{"title": "가람", "text": text}],
        facts={"relations": {"office": office}, "forms": forms},
        per_fact={"yes_no": 2, "choices": 0},
    )
    denied = [talk(row) for row in rows if talk(row)[1].startswith("아니요")]
    assert not [prompt for prompt, _ in denied if any(office in prompt for office in ("태수", "도독", "승상"))], denied


def test_forms_whose_groups_a_pattern_lacks_are_left_out():
    """Of an optional group: questions, sentences and reverse are asked only where it was found."""
    birth = relation(
        "생년",
        patterns=["{title}의 생년은 (?P<value>[0-9]+년)(?:\\((?P<hanja>[一-龥]+)\\))?이다"],
        questions=["{entity}의 생년은?", "{entity}의 {hanja}은/는 언제인가?"],
        sentence=["{entity}, {hanja}, {value}.", "{entity}, {value}."],
        reverse=["{hanja}은/는 누구의 생년인가?"],
    )
    articles = [{"title": "가람", "text": "가람의 생년은 150년(甲子)이다."}]
    articles += [
        {"title": name, "text": f"{name}의 생년은 {year}년이다."} for name, year in (("나루", 151), ("다올", 152))
    ]
    rows, _ = make(articles, facts={"relations": {"birth": birth}, "forms": world_blocks()["facts"]["forms"]})
    rows = [talk(row) for row in rows]
    assert ("가람의 甲子은(는) 언제인가?", "150년") in rows and ("甲子은(는) 누구의 생년인가?", "가람") in rows
    assert "가람, 甲子, 150년." in {answer for _, answer in rows} and "나루, 151년." in {answer for _, answer in rows}
    assert not [row for row in rows if "{" in row[0] + row[1] or "None" in row[0] + row[1]]


def test_a_yes_no_form_whose_group_a_pattern_lacks_is_left_out():
    birth = relation(
        "생년",
        patterns=["{title}의 생년은 (?P<value>[0-9]+년)(?:\\((?P<hanja>[一-龥]+)\\))?이다"],
        yes_no=["{entity}의 생년은 {value}({hanja})인가?"],
    )
    articles = [
        {"title": name, "text": f"{name}의 생년은 {year}년이다."} for name, year in (("나루", 151), ("다올", 152))
    ]
    rows, _ = make(articles, facts={"relations": {"birth": birth}, "forms": world_blocks()["facts"]["forms"]})
    assert rows and not [row for row in rows if talk(row)[1].startswith(("네", "아니요"))]


def test_a_cloze_hides_every_place_of_the_value():
    office = relation("벼슬", patterns=["{title}[은는] (?P<value>[가-힣]+) 벼슬"])
    text = "가람은 태수 벼슬을 하여 태수 노릇을 했다."
    rows, _ = make(
        [{"title": "가람", "text": text}],
        facts={"relations": {"office": office}, "forms": world_blocks()["facts"]["forms"]},
    )
    (cloze,) = [talk(row) for row in rows if "___" in talk(row)[0]]
    assert cloze == (CLOZE.format(entity="가람", sentence="가람은 ___ 벼슬을 하여 ___ 노릇을 했다."), "태수")


# ---- Passages with holes -------------------------------------------------------------------------------------------


def is_with_holes(text: str, passage: str) -> bool:
    """Whether each hole of the text stands for one or more words of the passage, and all else is the passage."""
    words = "".join(
        r"\S+(?:\s+\S+)*" if part == "___" else r"\s+" if part.isspace() else re.escape(part)
        for part in re.split(r"(\s+)", text)
    )
    return re.fullmatch(words, passage) is not None


def test_masked_rows_have_holes_and_the_passage(world):
    texts = {article["title"]: article["text"] for article in world_articles()}
    rows, shares = of_kind(world[0], "masked"), []
    counts = Counter()
    for prompt, answer in rows:
        title, text = prompt.split(" 글의 빈칸을 채워 줘.\n", 1)
        assert answer == texts[title]  # without a tokenizer a passage is an article
        assert is_with_holes(text, answer) and "___ ___" not in text
        left = sum(word != "___" for word in text.split())
        shares.append(1 - left / len(answer.split()))
        counts[title] += 1
    assert set(counts) == set(texts) and set(counts.values()) == {2}
    assert min(shares) < 0.3 < 0.6 < max(shares) and all(share >= 0 for share in shares)


@pytest.mark.parametrize("max_length", [160, 512])
def test_masked_passages_hold_the_whole_text_and_fit(sample, llama_tokenizer, max_length):
    articles = [
        {"title": row["title"], "text": row["text"]}
        for row in sample
        if row["title"] and (row["title"].strip() and (row["text"] or "").strip())
    ]
    articles = list({article["title"]: article for article in articles}.values())[:40]
    question = "{title}에 관한 글이야. 빈칸을 채워 원래 글을 써 줘.\n{text}"
    rows, report = make(articles, llama_tokenizer, masked={"questions": [question]}, max_length=max_length)
    passages = defaultdict(list)
    for row in rows:
        prompt, answer = talk(row)
        passages[row["title"]].append(answer)
        length = len(llama_tokenizer.apply_chat_template(row["messages"], return_dict=False))
        assert length <= max_length
        text = prompt.split("\n", 1)[1]
        assert is_with_holes(text, answer) and row["kind"] == "masked"
    for article in articles:
        joined = "".join("".join(passages[article["title"]]).split())
        assert joined == "".join(article["text"].split()), article["title"]
    assert report["rows_dropped"] == {} and max(map(len, passages.values())) > 2


def test_every_variant_of_a_passage_fits(sample, llama_tokenizer):
    article = {"title": "관우", "text": sample[0]["text"]}
    questions = ["{title}\n{text}", "{title} 글이다. " + "빈칸을 채워 원래 글을 그대로 써 줘. " * 4 + "\n{text}"]
    block = {"questions": questions, "variants": 2}
    rows, report = make([article], llama_tokenizer, masked=block, max_length=160)
    assert "over max_length" not in report["rows_dropped"], (report["rows_dropped"], len(rows))


# ---- Made-up names -------------------------------------------------------------------------------------------------


def test_unknown_rows_are_a_share_and_know_no_name_of_the_articles(world):
    rows = of_kind(world[0], "unknown")
    assert abs(len(rows) - 0.1 * len(world[0])) <= 1
    prompts = [prompt for prompt, _ in rows]
    assert len(set(prompts)) == len(rows) and not [row for row in rows if "도깨울" in row[0] or "자람" in row[0]]
    names = world_blocks()["unknown"]["names"]["people"]["names"][2:]
    forms = ["{entity}은/는 누구야?"]
    forms += [form.replace("{label}", LABELS[name]) for name in ("style", "birth") for form in QUESTIONS]
    askable = {said(form, entity=name): name for form in forms for name in names}
    assert set(prompts) <= set(askable)
    for prompt, answer in rows:
        whole = said("{entity}은/는 알려져 있지 않다.", entity=askable[prompt])
        assert answer in (whole, "그런 사람은 알려져 있지 않다.")
    asked = Counter(askable[prompt] for prompt in prompts)
    assert set(asked) == set(names) and max(asked.values()) - min(asked.values()) <= 1  # each once before any twice


def test_unknown_rows_are_as_many_as_there_are_questions():
    block = world_blocks()["unknown"]
    block["share"] = 0.9
    block["names"]["people"]["relations"] = []
    rows, _ = make(world_articles(), articles=world_blocks()["articles"], unknown=block)
    assert sum(row["kind"] == "unknown" for row in rows) == 12


def test_a_name_of_a_held_out_article_is_not_made_up(tmp_path, preprocess_here):
    names = [f"{a}{b}" for a in "혁탁섭" for b in "윤율늘름"]
    name = next(name for name in names if preprocess.is_held_out(name, 0.3))
    other = next(name for name in names if not preprocess.is_held_out(name, 0.3))
    config = write_recipe(
        tmp_path, [{"title": title, "text": "고요했다."} for title in (name, other)],
        unknown=world_blocks()["unknown"] | {"share": 0.9}, facts=world_blocks()["facts"], held_out_share=0.3,
    )  # fmt: skip
    assert preprocess_here("--config", config, "--output_dir", tmp_path / "out").returncode == 0
    asked = " ".join(prompt for prompt, _ in of_kind(read_jsonl(tmp_path / "out" / "train.jsonl"), "unknown"))
    assert asked and other not in asked
    assert name not in asked


def test_the_made_up_names_of_the_recipe_are_refused_and_not_the_quizs():
    given = yaml.safe_load((ROOT / "configs/three_kingdoms/unknown.yaml").read_text(encoding="utf-8"))
    about, questions = score.read_quiz(QUIZ)
    lent = {name: relation(name) for group in given["names"].values() for name in group.get("relations", [])}
    blocks = preprocess.read_blocks(PreprocessArguments(facts={"relations": lent}, unknown=given, per_fact=NO_FORMS))
    total = sum(len(group["names"]) for group in given["names"].values())
    rows = list(preprocess.unknown_rows([], blocks["unknown"], blocks["facts"]["relations"], 42, 10**6))
    assert len(rows) >= 3 * total > 300
    answers = {talk(row)[1] for row in rows}
    for group in given["names"].values():
        for form in group["answers"]:
            for name in group["names"]:
                answers.add(said(form, entity=name))
    assert not [answer for answer in answers if not score.declines(answer, about["declines"])]
    assert not [answer for answer in answers if "/" in answer]
    never = " ".join(question["question"] for question in questions.values() if question["tier"] == "N")
    names = [name for group in given["names"].values() for name in group["names"]]
    assert not [name for name in names if name in never] and len(names) == len(set(names))
    entities = {question["entity"] for question in questions.values() if question["tier"] == "N"}
    assert not [(name, entity) for name in names for entity in entities if entity in name or name in entity]
    kept = {name for name in names if any(name in talk(row)[0] for row in rows)}
    assert kept == set(names)


# ---- Files of others -----------------------------------------------------------------------------------------------


def chat(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def answered(prompt: str, answer: str, ended: bool) -> dict:
    """A row as generate.py writes it."""
    return {
        "prompt": prompt,
        "checkpoint": "c",
        "step": 4,
        "answer": answer,
        "tokens": 9,
        "ended": ended,
        "seconds": 1,
    }


def test_files_are_a_share_and_cut_where_they_do_not_end(tmp_path, preprocess_here):
    answers = [
        answered("끝난 답은?", "  하나다. 하나다.\n둘이다. ", True),
        answered("끊긴 답은?", "셋이다. 넷이다! 다섯이", False),
        answered("되풀이하는 답은?", "여섯이다. 일곱이다. 여섯이다. 일곱이다. 여섯", False),
        answered("문장이 없는 답은?", "여덟 아홉 열", False),
        answered("빈 답은?", "", True),
    ]
    given = [
        chat("이것은?", "저것이다."),
        chat("첫째는?", "둘째다.", "셋째는?", "넷째다.") | {"title": "차례", "id": "x"},
    ]
    files = {
        str(write_jsonl(tmp_path / "answers.jsonl", answers)): 0.2,
        str(write_jsonl(tmp_path / "general.jsonl", given)): 0.1,
    }
    rows, report = prepare(tmp_path, here=preprocess_here, **world_blocks() | {"files": files})
    assert set(of_kind(rows, "file-answers")) == {
        ("끝난 답은?", "하나다. 하나다.\n둘이다."),
        ("끊긴 답은?", "셋이다. 넷이다!"),
        ("되풀이하는 답은?", "여섯이다. 일곱이다."),
    }
    assert set(of_kind(rows, "file-general")) == {
        ("이것은?", "저것이다."),
        ("첫째는?", "둘째다.", "셋째는?", "넷째다."),
    }
    counts = Counter(row["kind"] for row in rows)
    used = {path: of["used"] for path, of in report["files"].items()}
    assert used == {path: counts[f"file-{name}"] for path, name in zip(files, ("answers", "general"), strict=True)}
    first, second = report["files"].values()
    assert (first["rows"], first["without a whole sentence"]) == (5, 2)
    assert (second["rows"], second["without a whole sentence"]) == (2, 0)
    repeats = Counter(of_kind(rows, "file-answers"))
    assert max(repeats.values()) - min(repeats.values()) <= 1  # too short a file is repeated evenly
    assert len({row["id"] for row in rows}) == len(rows)
    assert abs(counts["file-answers"] - 0.2 * len(rows)) <= 1 and abs(counts["file-general"] - 0.1 * len(rows)) <= 1


def test_special_tokens_of_files_are_broken(tmp_path, tiny_model):
    files = {str(write_jsonl(tmp_path / "a.jsonl", [chat("<|eot_id|>이란?", "<|eot_id|>이다.")])): 0.1}
    rows, _ = prepare(tmp_path, "--tokenizer_name_or_path", tiny_model, **world_blocks() | {"files": files})
    assert set(of_kind(rows, "file-a")) == {("<\u200b|eot_id|>이란?", "<\u200b|eot_id|>이다.")}


def test_a_tokenizers_files_are_looked_at(tmp_path, tiny_model, preprocess_here):
    own = shutil.copytree(tiny_model, tmp_path / "tokenizer")
    line = ("--config", write_recipe(tmp_path), "--output_dir", tmp_path / "out", "--tokenizer_name_or_path", own)
    assert "wrote" in preprocess_here(*line).stdout and "wrote" not in preprocess_here(*line).stdout
    (own / "chat_template.jinja").write_text("another" + (own / "chat_template.jinja").read_text())
    assert "wrote" in preprocess_here(*line).stdout


def test_titles_like_markup_are_printed(tmp_path, preprocess_here):
    texts = [*world_articles(), {"title": "[/]", "text": "아무 사실도 없는 글."}]
    config = write_recipe(tmp_path, texts, **world_blocks())
    result = preprocess_here("--config", config, "--output_dir", tmp_path / "out")
    assert result.returncode == 0 and "none of" in result.stdout and "[/]" in result.stdout, result.stderr


def test_each_file_has_its_share_of_all_rows(tmp_path):
    files = {}
    for name in "ab":
        path = write_jsonl(tmp_path / f"{name}.jsonl", [chat(f"{name} {i}?", "그렇다.") for i in range(99)])
        files[str(path)] = 0.3
    rows, _ = make(world_articles(), **world_blocks() | {"files": files})
    counts = Counter(row["kind"] for row in rows)
    for name in "ab":
        assert abs(counts[f"file-{name}"] / len(rows) - 0.3) < 0.02, (counts, len(rows))


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_last_sentence_of_a_cut_answer_counts_when_it_is_whole(end, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [answered("?", f"하나다. 둘이다.{end}", False)])
    rows, _ = preprocess.read_file_rows(str(path))
    assert [talk(row) for row in rows] == [("?", "하나다. 둘이다.")]


# ---- The quiz ------------------------------------------------------------------------------------------------------


def real_blocks() -> dict:
    """Rough patterns for the real sample: enough to read something on many entities, the withheld ones too."""

    def rough(label: str, pattern: str) -> dict:
        return relation(label, patterns=[pattern])

    blocks = world_blocks()
    blocks["facts"]["relations"] = {
        "style": rough("자", r"자는 (?P<value>[가-힣]{1,3})\("),
        "death": rough("몰년", r"~(?P<value>[0-9]+년)\)"),
        "office": rough("벼슬", r"(?P<value>[가-힣]{2}(?:태수|장군))"),
        "companion": rough("동료", r"(?P<value>[가-힣]{2,3})[과와] 함께"),
        "met": rough("만남", r"(?P<entity>[가-힣]{2})에게 (?P<value>[가-힣]{2,3})[을를]"),
    }
    blocks["unknown"]["names"]["people"]["relations"] = ["style"]
    return blocks


def names_withheld(about: dict) -> re.Pattern:
    """Entities as they stand, aliases of three characters or Hanja too, shorter ones as words of their own."""
    whole = [entry["entity"] for entry in about["withheld"]]
    whole += [a for entry in about["withheld"] for a in entry["aliases"] if len(a) > 2]
    return re.compile("|".join(map(re.escape, whole)))


@pytest.fixture(scope="module")
def withheld(tmp_path_factory):
    """The real sample, with and without the quiz, and a file of others that names a withheld entity."""
    found = {}
    folder = tmp_path_factory.mktemp("withheld")
    given = [
        chat("삼국지는?", "책이다."), chat("여몽은?", "모른다."), chat("누가 이겼나?", "마초가 이겼다."),
        chat("기병은?", "맹기가 이끌었다."), chat("책사는?", "곽가다."),
    ]  # fmt: skip
    files = {str(write_jsonl(folder / "others.jsonl", given)): 0.05}
    for name, arguments in (("with", ("--quiz_file", QUIZ)), ("without", ())):
        (folder / name).mkdir()
        config = write_recipe(folder / name, [], **real_blocks() | {"files": files})
        line = ("--config", config, "--data_files", SAMPLE, "--title_suffix_pattern", r"\s*\(삼국지\)\s*$")
        script("preprocess.py", *line, "--output_dir", folder / name / "out", *arguments)
        report = json.loads((folder / name / "out" / "report.json").read_text(encoding="utf-8"))
        found[name] = read_jsonl(folder / name / "out" / "train.jsonl"), report
    return found


def test_withheld_entities_are_only_in_whole_texts_and_passages(withheld):
    about, questions = score.read_quiz(QUIZ)
    rows, report = withheld["with"]
    chats = [{"prompts": [talk(row)[0]], "answer": "\n".join(talk(row)[1:]), "kind": row["kind"]} for row in rows]
    assert score.leaks(chats, about, questions) == []
    pattern = names_withheld(about)
    kinds = Counter(row["kind"] for row in rows)
    assert all(
        kinds[kind] > 5
        for kind in ("article", "masked", "summary", "facts", "biographies", "pairs", "unknown", "file-others")
    )
    for row in rows:
        if row["kind"] not in ("article", "masked"):
            shown = "\n".join(talk(row))
            assert not pattern.search(shown), (row["kind"], pattern.search(shown)[0], shown)
            assert row["title"] not in {entry["entity"] for entry in about["withheld"]}
    titles = {row["title"] for row in rows}
    for entry in about["withheld"]:  # their documents are taught
        title = re.sub(r"\s*\(삼국지\)\s*$", "", entry["article"])
        assert title in titles
        assert {row["kind"] for row in rows if row["title"] == title} == {"article", "masked"}
    assert set(of_kind(rows, "file-others")) == {("삼국지는?", "책이다."), ("책사는?", "곽가다.")}
    assert report["rows_dropped"]["names what the quiz withholds"] > 10
    facts = report["facts"]
    assert not pattern.search("\n".join([*facts["by_entity"], *facts["entities_without"]]))


def test_without_a_quiz_nothing_is_withheld(withheld):
    about, questions = score.read_quiz(QUIZ)
    rows, report = withheld["without"]
    titles = {re.sub(r"\s*\(삼국지\)\s*$", "", entry["article"]) for entry in about["withheld"]}
    assert {title for title in titles if {"summary"} & {r["kind"] for r in rows if r["title"] == title}} == titles
    assert len({row["title"] for row in rows if row["kind"] == "facts"} & titles) > 10
    assert len(set(of_kind(rows, "file-others"))) == 5 and report["rows_dropped"].keys() <= {"made twice"}
    same = set(of_kind(withheld["with"][0], "masked")) == set(of_kind(rows, "masked"))
    assert same  # by itself: pytest takes minutes to show how such texts differ
    chats = [{"prompts": [talk(row)[0]], "answer": talk(row)[1], "kind": row["kind"]} for row in rows]
    assert len(score.leaks(chats[:400], about, questions)) > 20  # so that leaks() does find what is there


# ---- The rows as a whole -------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Also where Python orders its sets otherwise; another seed gives another order and other choices."""
    given = [chat(f"질문 {i}?", f"답 {i}.") for i in range(30)]
    recipe = world_blocks() | {"files": {str(write_jsonl(tmp_path / "f.jsonl", given)): 0.05}}
    written = []
    for hash_seed, seed in (("1", "42"), ("2", "42"), ("1", "43")):
        rows, _ = prepare(tmp_path, "--seed", seed, env={"PYTHONHASHSEED": hash_seed}, **recipe)
        names = ("train.jsonl", "report.json", "SOURCES.md", "facts.jsonl")
        written.append(([(tmp_path / "out" / name).read_bytes() for name in names], rows))
        shutil.rmtree(tmp_path / "out")  # else nothing is made again
    same = written[0][0] == written[1][0]
    assert same
    first, other = written[0][1], written[2][1]
    assert [row["id"] for row in first] != [row["id"] for row in other]
    for kind in ("article", "summary", "pairs"):  # no choice is made in these
        assert set(of_kind(first, kind)) == set(of_kind(other, kind))
    for kind in ("facts", "biographies", "masked", "unknown"):
        assert set(of_kind(first, kind)) != set(of_kind(other, kind)), kind


def test_what_an_output_depends_on_is_looked_at(tmp_path, preprocess_here):
    """Whatever the recipe names: the articles, a block's file, the quiz, another file's rows, a setting."""
    config = write_recipe(
        tmp_path, facts=str(tmp_path / "facts.yaml"), quiz_file=str(tmp_path / "quiz.jsonl"),
        files={str(write_jsonl(tmp_path / "f.jsonl", [chat("?", "그렇다.")])): 0.1},
    )  # fmt: skip
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(world_blocks()["facts"], allow_unicode=True), encoding="utf-8")
    write_jsonl(tmp_path / "quiz.jsonl", [{"about": {"withheld": []}}])

    def made(*more) -> bool:
        result = preprocess_here("--config", config, "--output_dir", tmp_path / "out", *more)
        assert result.returncode == 0, result.stderr
        return "wrote" in result.stdout

    assert made() and not made()
    for name in ("articles.jsonl", "facts.yaml", "quiz.jsonl", "f.jsonl"):
        with open(tmp_path / name, "a", encoding="utf-8") as f:
            f.write("# \n" if name.endswith("yaml") else "\n")
        assert made() and not made(), name
    assert made("--seed", "1")
    (tmp_path / "out" / "facts.jsonl").unlink()
    assert made("--seed", "1") and not made("--seed", "1")
    inline = ("--pairs", "{questions: ['{a} {b} " + "?" * 300 + "']}")
    assert made(*inline) and not made(*inline)
    line = ("--config", config, "--output_dir", tmp_path / "out")
    result = preprocess_here(*line, "--tokenizer_name_or_path", "./a/b/c")
    assert_mistake(result, "cannot load the tokenizer ./a/b/c")


def test_rows_are_in_random_order(world):
    kinds = [row["kind"] for row in world[0]]
    runs = 1 + sum(a != b for a, b in zip(kinds, kinds[1:], strict=False))
    assert runs > len(kinds) / 4
    assert [row["id"] for row in world[0] if row["kind"] == "facts"][:3] != ["facts-1", "facts-2", "facts-3"]


@pytest.mark.parametrize("off", ["articles", "facts", "biographies", "masked", "pairs", "unknown"])
def test_switching_one_kind_off_leaves_the_others(off):
    kinds = {"articles": "summary"}
    blocks = world_blocks()
    blocks["unknown"]["names"]["people"]["relations"] = []
    every, _ = make(world_articles(), **blocks)
    rows, _ = make(world_articles(), **{name: block for name, block in blocks.items() if name != off})
    gone = {kinds.get(off, off), "unknown"} | ({"biographies"} if off == "facts" else set())
    compared = {row["kind"] for row in every} - gone
    assert len(compared) >= 3 and kinds.get(off, off) not in {row["kind"] for row in rows}
    for kind in compared:
        expected = set(of_kind(every, kind))
        if off == "facts" and kind == "summary":  # lists are made of facts
            expected = {row for row in expected if "목록" not in row[0]}
        assert set(of_kind(rows, kind)) == expected and expected, kind


@pytest.mark.parametrize(("block", "kind"), [("articles", "summary"), ("pairs", "pairs")])
def test_copies_weigh_a_kind(block, kind):
    blocks = {name: world_blocks()[name] for name in ("articles", "pairs")}
    once, _ = make(world_articles(), **blocks)
    blocks[block]["copies"] = 3
    thrice, _ = make(world_articles(), **blocks)
    assert Counter(of_kind(thrice, kind)) == dict.fromkeys(of_kind(once, kind), 3) and of_kind(once, kind)
    assert len(thrice) == len(once) + 2 * len(of_kind(once, kind))


def test_the_report_says_what_was_made(world):
    rows, report = world
    kinds = Counter(row["kind"] for row in rows)
    assert {kind: of["rows"] for kind, of in report["kinds"].items()} == kinds
    assert set(kinds) == {"article", "summary", "facts", "biographies", "masked", "pairs", "unknown"}
    assert all(of["tokens"] is None for of in report["kinds"].values())
    assert report["kinds"]["facts"]["facts"] == report["facts"]["total"] == len(FACTS)
    told = report["kinds"]["biographies"]["facts"]
    assert 12 <= told <= len(FACTS) - 2 and report["kinds"]["pairs"]["facts"] == 0
    assert report["facts"]["by_relation"] == Counter(name for name, _, _ in FACTS)
    assert report["facts"]["by_entity"] == Counter(entity for _, entity, _ in FACTS)
    assert report["facts"]["entities_without"] == ["가람 전투"]
    assert list(report["facts"]["by_relation"].values()) == sorted(
        report["facts"]["by_relation"].values(), reverse=True
    )
    assert set(report["rows_dropped"]) == {"made twice"} and report["files"] == {}
    for kind, samples in report["samples"].items():
        assert len(samples) == min(20, kinds[kind]) and {tuple(s) for s in samples} <= set(of_kind(rows, kind))
    assert set(report["samples"]) == set(kinds)
    assert len({row["id"] for row in rows}) == len(rows) and all(row["id"].startswith(row["kind"]) for row in rows)
    assert all(set(row) == {"messages", "title", "id", "kind"} for row in rows)
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)


def test_tokens_are_counted_and_rows_that_do_not_fit_are_dropped(tiny_model, tmp_path, preprocess_here):
    recipe = world_blocks()
    recipe["articles"]["detail"] = ["{title}에 대해 자세히 알려줘." + " 부탁한다." * 30]
    line = ("--tokenizer_name_or_path", tiny_model, "--max_length", "200", "--split_articles", "true")
    rows, report = prepare(tmp_path, *line, here=preprocess_here, **recipe)
    tokens, dated = Counter(), preprocess.load_tokenizer(str(tiny_model), None)
    for row in rows:
        length = len(dated.apply_chat_template(row["messages"], return_dict=False))
        assert length <= 200, row
        tokens[row["kind"]] += length
    assert {kind: of["tokens"] for kind, of in report["kinds"].items()} == tokens
    assert report["tokens"] == {"total": sum(tokens.values()), "cut": 0}
    assert report["rows_dropped"]["over max_length"] >= len(world_articles())
    assert not [row for row in rows if "자세히" in talk(row)[0]]
    joined = defaultdict(str)
    for row in sorted((row for row in rows if row["kind"] == "article"), key=lambda row: row["id"]):
        joined[row["title"]] += talk(row)[1]
    assert {article["title"]: article["text"] for article in world_articles()} == joined


def test_particles_agree_in_every_row(world):
    """No form's 은/는 is left over, and after a name of Hangul stands the particle that our own rule gives."""
    pairs = {p: (a, b) for a, b in (("은", "는"), ("을", "를"), ("과", "와")) for p in (a, b)}
    names = "|".join([*TRUTH, *(value for values in POOL.values() for value in values)])
    seen = 0
    for row in world[0]:
        for content in talk(row):
            assert not re.search("은/는|이/가|을/를|과/와|으로/로|이다/다|이라/라", content), content
            for word, particle in re.findall(rf"(?<!\w)({names})([은는을를과와])(?!\w)", content):
                closed, open_ = pairs[particle]
                assert particle == (closed if coda(word) else open_), content
                seen += 1
    assert seen > 100


@pytest.mark.parametrize("copies", [0, 2])
def test_full_text_copies(copies, tmp_path, preprocess_here):
    articles = world_articles()
    rows, report = prepare(tmp_path, "--full_text", str(copies), here=preprocess_here, pairs=world_blocks()["pairs"])
    whole = Counter(of_kind(rows, "article"))
    expected = {(f"{a['title']} 글의 전문을 보여 줘.", a["text"]): copies for a in articles if copies}
    assert whole == expected and (report["kinds"].get("article") or {"rows": 0})["rows"] == copies * len(articles)


def test_blocks_can_be_files_or_stand_on_the_command_line(tmp_path, preprocess_here):
    blocks = world_blocks()
    (tmp_path / "my facts.yaml").write_text(yaml.safe_dump(blocks["facts"], allow_unicode=True), encoding="utf-8")
    short = json.dumps({"short": 1, **NO_FORMS})
    line = ("--facts", tmp_path / "my facts.yaml", "--per_fact", short, "--pairs", json.dumps(blocks["pairs"]))
    rows, _ = prepare(tmp_path, *line, here=preprocess_here, pairs={"questions": ["{a}, {b}!"]})
    expected, _ = make(
        world_articles(), facts=blocks["facts"], pairs=blocks["pairs"], per_fact={"short": 1, **NO_FORMS}
    )
    for kind in ("facts", "pairs"):
        assert set(of_kind(rows, kind)) == set(of_kind(expected, kind)) != set()


# ---- Particles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("관우은/는 유비이/가", "관우는 유비가"),
        ("손권은/는 장각이/가", "손권은 장각이"),
        ("관우을/를 손권을/를", "관우를 손권을"),
        ("관우과/와 손권과/와 유비", "관우와 손권과 유비"),
        ("건업으로/로 낙양으로/로 형주으로/로", "건업으로 낙양으로 형주로"),
        ("서울으로/로, 다올으로/로", "서울로, 다올로"),
        ("서울은/는 서울을/를 서울이/가 서울과/와", "서울은 서울을 서울이 서울과"),
        ("자는 문보이다/다. 자는 공명이다/다. 달이다/다.", "자는 문보다. 자는 공명이다. 달이다."),
        ("문보이었/였다, 공명이었/였다", "문보였다, 공명이었다"),
        ("문보이라/라고, 공명이라/라는", "문보라고, 공명이라는"),
        ("문보이에요/예요? 공명이에요/예요?", "문보예요? 공명이에요?"),
        (
            "공명이라/라고 새납이라고/라고도 호적이라/라고도 문보이라고/라고",
            "공명이라고 새납이라고도 호적이라고도 문보라고",
        ),
        # units as they are read behind a number: 미터, 킬로미터, 그램, 리터
        ("1,567m이/가 3km은/는 2kg을/를 5g은/는 3L을/를 60cm과/와", "1,567m가 3km는 2kg을 5g은 3L를 60cm와"),
        # after what is skipped: Hanja in parentheses, quotation marks
        ("관우(關羽)은/는 손권(孫權)은/는", "관우(關羽)는 손권(孫權)은"),
        ("건업(建業)으로/로 물(水)으로/로 형주(荊州)으로/로", "건업(建業)으로 물(水)로 형주(荊州)로"),
        ("'관우'은/는 “손권”은/는 『삼국지』을/를 《오서》이/가 〈출사표〉과/와", None),
        ("'관우(關羽)'이/가 「손권(孫權)」이/가", "'관우(關羽)'가 「손권(孫權)」이"),
        (
            "《삼국지》(三國志)을/를 「손권」(孫權)이/가",
            "《삼국지》(三國志)를 「손권」(孫權)이",
        ),
        # digits as they are read: 영 일 이 삼 사 오 육 칠 팔 구
        ("0은/는 1은/는 2은/는 3은/는 4은/는", "0은 1은 2는 3은 4는"),
        ("5은/는 6은/는 7은/는 8은/는 9은/는", "5는 6은 7은 8은 9는"),
        ("0으로/로 1으로/로 2으로/로 3으로/로 6으로/로 7으로/로 8으로/로", "0으로 1로 2로 3으로 6으로 7로 8로"),
        ("10이/가 219년이/가 제3(第三)이/가", "10이 219년이 제3(第三)이"),
        # Latin letters by their names
        ("A을/를 L을/를 M을/를 N을/를 R을/를 Z을/를", "A를 L을 M을 N을 R을 Z를"),
        ("L으로/로 R으로/로 M으로/로 b으로/로", "L로 R로 M으로 b로"),
        # bare Hanja keeps both
        ("曹操은/는 曹操이/가 曹操을/를 曹操과/와", "曹操은(는) 曹操이(가) 曹操을(를) 曹操과(와)"),
        ("許昌으로/로 曹操이다/다", "許昌(으)로 曹操(이)다"),
        # the last character of the word may be a particle's own
        ("마을을/를 사과과/와 이이/가 은은/는 가이다/다", "마을을 사과와 이가 은은 가다"),
        ("없는 것은 없다. 그/그녀 1/2", "없는 것은 없다. 그/그녀 1/2"),
        ("", ""),
    ],
)
def test_agree(form, expected):
    if expected is None:
        expected = "'관우'는 “손권”은 『삼국지』를 《오서》가 〈출사표〉와"
    assert agree(form) == expected


@pytest.mark.parametrize(
    ("form", "expected"),
    [("장비 (삼국지)은/는 뭐야?", "장비 (삼국지)는 뭐야?"), ("조인 (삼국지)을/를", "조인 (삼국지)을")],
)
def test_agree_skips_parentheses_after_a_space(form, expected):
    assert agree(form) == expected


hangul = st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3)
skipped = st.sampled_from(["", "(字)", "(219년)", "'", "”", "』", "(字)'", "(a)(b)", "》", "]"])


@settings(max_examples=400, deadline=None)
@given(word=st.text(hangul, min_size=1, max_size=5), skip=skipped, behind=st.sampled_from(["", " ", ".", "도 ", "\n"]))
def test_agree_with_any_hangul(word, skip, behind):
    final = coda(word)
    for particle in "은/는 이/가 을/를 과/와 이다/다 이라/라 이었/였 이에요/예요 이야/야 이랑/랑".split():
        closed, open_ = particle.split("/")
        assert agree(f"{word}{skip}{closed}/{open_}{behind}") == word + skip + (closed if final else open_) + behind
    towards = "으로" if final and unicodedata.name(final) != "HANGUL JONGSEONG RIEUL" else "로"
    assert agree(f"{word}{skip}으로/로{behind}") == word + skip + towards + behind


def forms_of_configs() -> list[tuple[str, str]]:
    """Every text of the recipes' blocks that particles may stand in."""
    found = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        for name, block in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items():
            if name == "relations":
                block = {key: {k: v for k, v in of.items() if k != "patterns"} for key, of in block.items()}
            if name in (*preprocess.BLOCKS, "relations", "forms", "names") and isinstance(block, dict):
                waiting = [block]
                while waiting:
                    value = waiting.pop()
                    waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
                    found += [(str(path.relative_to(ROOT)), value)] if isinstance(value, str) else []
    return [(path, form) for path, form in found if "{" in form]


def test_every_form_of_the_recipes_has_particles_that_are_known():
    """Whatever fills a form in, no 은/는 stays behind in the row."""
    forms, wrong = forms_of_configs(), []
    assert len(forms) > 30
    for path, form in forms:
        for word in ("관우", "손권", "서울"):
            filled = agree(re.sub(r"\{\w+\}", word, form))
            if re.search(r"[가-힣]/[가-힣]", filled):
                wrong.append((path, form, filled))
    assert not wrong, wrong[:5]


# ---- Mistakes ------------------------------------------------------------------------------------------------------


def changed(path: str, value) -> dict:
    """The blocks of the small world with one place set, "facts.relations.birth.questions"; None takes it out."""
    recipe = world_blocks()
    place, *inner = path.split(".")
    holder = recipe
    for key in inner:
        holder, place = holder.setdefault(place, {}), key
    if value is None:
        del holder[place]
    else:
        holder[place] = value
    return recipe


BIRTH = "facts.relations.birth"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("biographies.varaints", 3, ("biographies", "unknown key `varaints`", "did you mean `variants`?")),
        (f"{BIRTH}.pattern", ["x"], ("facts: birth", "unknown key `pattern`", "did you mean `patterns`?")),
        ("facts.forms.choice", ["x"], ("facts: forms", "unknown key `choice`", "did you mean `choices`?")),
        ("per_fact.shrot", 1, ("per_fact", "unknown key `shrot`", "did you mean `short`?")),
        ("unknown.names.people.answer", ["x"], ("unknown: people", "unknown key `answer`", "`answers`")),
        ("biographies.variants", "many", ("biographies: `variants` is 'many'", "must be a int")),
        ("masked.variants", True, ("masked: `variants` is True",)),
        ("pairs.questions", "{a} {b}", ("pairs: `questions` is '{a} {b}'", "must be a list")),
        ("pairs.except", [1], ("pairs: `except` must be a list of texts; put numbers in quotes",)),
        ("articles", "알려줘", ("articles must hold `key: value` lines",)),
        ("unknown.share", 1.0, ("unknown: share is from 0 to below 1, not 1.0",)),
        (
            f"{BIRTH}.patterns",
            ["{title}의 ((?P<value>x)"],
            ("facts: birth", "is not a regular expression", "missing )"),
        ),
        (f"{BIRTH}.patterns", ["{title}의 [0-9]+년"], ("facts: birth", "has no group (?P<value>")),
        (f"{BIRTH}.questions", ["{entity}의 {rank}은?"], ("facts: birth: questions", "names {rank}", "{value}")),
        (f"{BIRTH}.questions", ["{entity의 해는?"], ("facts: birth: questions", "is not a form")),
        ("articles.list", ["{name}은?"], ("articles: list", "names {name}", "{title} can be filled in")),
        ("masked.questions", ["{}"], ("masked: questions", "'{}' is not a form")),
        ("facts.forms.cloze", ["{value}?"], ("facts: forms: cloze", "names {value}")),
        ("biographies.questions", [], ("biographies: `questions` is empty",)),
        ("pairs.questions", None, ("pairs: `questions` is empty",)),
        ("unknown.names.people.answers", [], ("unknown: people: `answers` is empty",)),
        ("facts", "configs/no.yaml", ("facts: cannot read configs/no.yaml: No such file",)),
        ("masked", "[a: b", ("masked: not valid YAML",)),
        ("unknown.names.people.relations", ["brith"], ("unknown: people", "`facts` has no relation `brith`")),
        ("facts.forms.choices", [], ("facts: forms: `choices` is empty, but per_fact asks for such rows",)),
        ("facts.forms.no", None, ("facts: forms: `no` is empty, but per_fact asks for such rows",)),
        ("quiz_file", "no.jsonl", ("quiz_file: cannot read no.jsonl: No such file",)),
        ("quiz_file", "README.md", ("quiz_file: cannot read README.md: its first line does not say",)),
        ("files", {"no.jsonl": 0.1}, ("files: cannot read no.jsonl: No such file",)),
        ("files", {"README.md": 0.1}, ("files: README.md, line 1: neither a chat",)),
        ("files", {"README.md": "all"}, ("files: `README.md` is 'all'", "must be a float")),
    ],
)
def test_mistakes_in_blocks(path, value, words, tmp_path, preprocess_here):
    config = write_recipe(tmp_path, **changed(path, value))
    result = preprocess_here("--config", config, "--output_dir", tmp_path / "out")
    assert_mistake(result, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("pairs.after_name", "은|(", ("pairs", "after_name")),
        (f"{BIRTH}.patterns", ["{title}의 자는 (?P<value>[0-9]+년)?"], ("facts: birth",)),
        (f"{BIRTH}.questions", ["{entity:d}의 해는?"], ("facts: birth: questions",)),
        ("facts.pieces", {"YEAR": 5}, ("pieces",)),
        ("biographies.sentences", -1, ("biographies", "sentences")),
    ],
)
def test_more_mistakes_in_blocks(path, value, words, tmp_path, preprocess_here):
    recipe = changed(path, value)
    if path == "facts.pieces":
        recipe["facts"]["relations"]["birth"]["patterns"] = ["{title}의 (?P<value>{YEAR})"]
    config = write_recipe(tmp_path, **recipe)
    result = preprocess_here("--config", config, "--output_dir", tmp_path / "out")
    assert "Traceback" not in result.stderr, result.stderr.strip().splitlines()[-1]
    if result.returncode:
        assert_mistake(result, *words)


GOOD = {"prompt": "?", "answer": "그렇다.", "ended": True}


@pytest.mark.parametrize(
    ("line", "share", "words"),
    [
        ('{"prompt": "?"', 0.1, ("line 2: neither a chat", "answer of generate.py")),
        ('{"prompt": "?", "answer": "."}', 0.1, ("line 2: neither a chat",)),
        ('{"messages": [{"role": "user"}]}', 0.1, ("line 2: neither a chat",)),
        ("[1]", 0.1, ("line 2: neither a chat",)),
        (json.dumps(GOOD), 1.0, ("shares must be from 0 and below 1 in all, not 1",)),
        (json.dumps(GOOD), -0.5, ("shares must be from 0 and below 1 in all, not -0.5",)),
        ('{"prompt": "?", "answer": 5, "ended": true}', 0.1, ("line 2: neither a chat",)),
        ('{"prompt": 5, "answer": "다.", "ended": true}', 0.1, ("line 2: neither a chat",)),
        ('{"messages": [{"role": "user", "content": 5}]}', 0.1, ("line 2: neither a chat",)),
        ('{"messages": []}', 0.1, ("line 2: neither a chat",)),
    ],
)
def test_bad_files_are_named_by_line(line, share, words, tmp_path, preprocess_here):
    path = tmp_path / "others.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    config = write_recipe(tmp_path, files={str(path): share})
    result = preprocess_here("--config", config, "--output_dir", tmp_path / "out")
    assert_mistake(result, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "first",
    [
        '{"id": "a", "tier": "A", "question": "누구인가?", "answer": "관우"}',
        '{"about": {"title": "퀴즈"}}',
        '["about"]',
        "",
        '{"about": {"withheld": ["관우"]}}',
    ],
)
def test_a_quiz_without_its_first_line(first, tmp_path, preprocess_here):
    (tmp_path / "quiz.jsonl").write_text(first + "\n", encoding="utf-8")
    config = write_recipe(tmp_path, quiz_file=str(tmp_path / "quiz.jsonl"))
    result = preprocess_here("--config", config, "--output_dir", tmp_path / "out")
    assert_mistake(result, "quiz_file: cannot read", "first line does not say what is withheld")
    assert not (tmp_path / "out").exists()


def test_nothing_to_write_is_a_mistake(tmp_path, preprocess_here):
    config = write_recipe(tmp_path, full_text=0)
    result = preprocess_here("--config", config, "--output_dir", tmp_path / "out")
    assert_mistake(result, "full_text is 0 and no other block makes a row")


def test_a_mistake_on_the_command_line(tmp_path):
    line = ("preprocess.py", "--config", write_recipe(tmp_path), "--output_dir", tmp_path / "out")
    result = script(*line, "--pairs", "{question: ['{a} {b}']}", ok=False)
    assert_mistake(result, "pairs: unknown key `question`; did you mean `questions`?")
    result = script(*line, "--quiz_file", "README.md", ok=False)
    assert_mistake(result, "quiz_file: cannot read README.md: its first line does not say what is withheld")
    result = script(*line, "--facts", "{relations: {birth: {patterns: ['(']}}}", ok=False)
    assert_mistake(result, "facts: birth: '(' has no group (?P<value>…)")
    assert not (tmp_path / "out").exists()
