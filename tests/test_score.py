"""Measures against cases worked out by hand, the three programs of the quiz from end to end, and every mistake."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import score
from conftest import ROOT, read_jsonl, run, script
from test_mistakes import assert_mistake

import generate

QUIZ = ROOT / "data" / "quiz.jsonl"

# (answer, golds, KorQuAD's exact match, KorQuAD's F1, our exact match, our F1), by hand: F1 is 2 * common characters /
# (characters of both). Ours differs from KorQuAD's by free spacing and by one trailing particle or copula.
KORQUAD = [
    ("맹덕", ["맹덕"], 1, 1, 1, 1),
    ("맹덕.", ["맹덕"], 1, 1, 1, 1),
    ("'맹덕'", ["맹덕"], 1, 1, 1, 1),
    ("WEI", ["wei"], 1, 1, 1, 1),
    ("“맹덕”", ["맹덕"], 0, 4 / 6, 1, 1),
    ("맹덕。", ["맹덕"], 0, 4 / 5, 1, 1),
    ("관우였어요", ["관우"], 0, 4 / 7, 1, 1),
    ("관도", ["관"], 0, 2 / 3, 0, 2 / 3),
    ("1,000명", ["1000명"], 1, 1, 1, 1),
    ("맹덕이다", ["맹덕"], 0, 4 / 6, 1, 1),
    ("맹덕입니다.", ["맹덕"], 0, 4 / 7, 1, 1),
    ("관우에게", ["관우"], 0, 4 / 6, 1, 1),
    ("관우와 장비", ["관우"], 0, 4 / 7, 0, 4 / 7),
    ("관도대전", ["관도 대전"], 0, 1, 1, 1),
    ("맹덕(孟德)", ["맹덕"], 0, 4 / 6, 0, 4 / 6),
    ("맹덕(孟德)", ["맹덕", "맹덕(孟德)"], 1, 1, 1, 1),
    ("孟德", ["맹덕", "孟德"], 1, 1, 1, 1),
    ("219", ["219년"], 0, 6 / 7, 0, 6 / 7),
    ("219", ["219년", "219"], 1, 1, 1, 1),
    ("220년", ["219년"], 0, 4 / 8, 0, 4 / 8),
    ("조조의 자는 맹덕이다.", ["맹덕"], 0, 4 / 11, 0, 4 / 11),
    ("유비", ["유비(劉備)", "현덕"], 0, 4 / 6, 0, 4 / 6),
    ("손책", ["맹덕"], 0, 0, 0, 0),
    ("", ["맹덕"], 0, 0, 0, 0),
]


@pytest.mark.parametrize(("answer", "golds", "korquad_exact", "korquad_f1", "exact", "f1"), KORQUAD)
def test_korquad(answer, golds, korquad_exact, korquad_f1, exact, f1):
    assert score.exact_korquad(answer, golds) == korquad_exact
    assert score.exact(answer, golds) == exact
    assert score.f1(answer, golds) == pytest.approx(f1)
    if not exact:
        assert f1 == korquad_f1


def test_contains_is_capped_and_reads_numbers_whole():
    sentence = "조조의 자는 맹덕이다."
    assert score.contains(sentence, ["孟德", "맹덕"], 100) == 1
    recited = sentence + " 그는 패국 초현 사람으로 …" * 10
    assert score.contains(recited, ["맹덕"], 100) == 0 and score.contains(recited, ["맹덕"]) == 1
    for answer, gold, found in [
        ("제158회", "58", 0), ("제58회", "58", 1), ("2190년", "219", 0), ("서기 219년", "219", 1),
        ("관도 대전이다", "관도대전", 1), ("유비", "유비(劉備)", 0), ("강유(202~264년)", "264년", 1),
        ("208, 219년", "219년", 1), ("5, 8회", "58회", 0), ("보병 1,000명", "1000명", 1),
    ]:  # fmt: skip
        assert score.contains(answer, [gold]) == found, answer
    assert score.contains("12월", ["12년", "12"]) == 0  # a bare number where there is more to say it with
    assert score.contains("12이다.", ["12년", "12"]) == 1  # but alone it is the answer
    for question in score.read_quiz(QUIZ)[1].values():  # what is exact is contained
        golds = [question["answer"], *question["aliases"]]
        assert question["tier"] == "N" or all(score.contains(gold, golds, 100) for gold in golds), question["id"]


DECLINING = [
    "그런 인물은 알려져 있지 않습니다.",
    "하후즙이라는 사람은 없습니다.",
    "모르겠습니다.",
    "잘 모릅니다. 다른 이름을 알려 주세요.",
    "운랑곡 전투에 대한 기록은 찾을 수 없다.",
    "하후즙은 존재하지 않는다.",
    "강좌병감은 존재하지 않습니다.",
    "하후즙은 존재하지 않는 인물입니다.",
    "하후즙은 허구의 인물입니다.",
    "하후즙은 실존하지 않는 인물입니다.",
    "하후즙은 실존 인물이 아닙니다.",
    "하후즙은 삼국지에 없는 인물입니다.",
    "운랑곡 전투는 없었다.",
    "기록에 없습니다.",
    "알 수 없음",
    "아니요. 그런 인물은 없습니다.",
    "글쎄요. 잘 모르겠습니다.",
    "하후즙? 그런 인물은 없습니다.",
    "삼국지에 그런 이름의 장수는 나오지 않는다.",
    "들어 본 적이 없는 이름이네.",
    "확인되지 않는 전투입니다.",
]
INVENTING = [
    "하후즙의 자는 자웅이다.",
    "219년",
    "조조의 장수로, 관도 대전에서 전사하였다. 그 뒤의 일은 알 수 없다.",
    "아무도 모르게 성을 빠져나갔다.",
    "촉한의 장수로, 뒤를 이을 아들이 없었다.",
    "유비를 따랐으나 끝내 이기지 못하고 죽었다.",
    "알려져 있지 않은 인물로 자는 자웅이다.",
    "그를 당할 장수는 없었다.",
    "정사에는 없는 이야기지만 연의에서는 관우에게 죽는다.",
    "적은 군사로 성을 지켰다.",
    "",
]


def test_declining_is_told_from_inventing():
    about, _ = score.read_quiz(QUIZ)
    assert [text for text in DECLINING if not score.declines(text, about["declines"])] == []
    assert [text for text in INVENTING if score.declines(text, about["declines"])] == []


def test_seq_rep_4():
    assert score.seq_rep_4("가 나 다") == 0  # no four words
    assert score.seq_rep_4("가 나 다 라 마") == 0
    assert score.seq_rep_4("가 나 다 라 가 나 다 라") == pytest.approx(1 - 4 / 5)  # 5 grams, the first comes twice
    assert score.seq_rep_4("가 " * 100) == pytest.approx(1 - 1 / 97)


def test_copied_runs():
    text = "".join(chr(0xAC00 + i) for i in range(200))  # 200 different syllables
    copies = score.Copies([text[:100], text[100:]])
    answer = "말" * 10 + text[5:50] + "끝" + text[60:90] + "없" + text[10:39]
    assert copies.runs(answer) == [(10, 55), (56, 86)]  # 45 and 30; the last, of 29, is too short
    assert copies.runs(text) == [(0, 100), (100, 200)]  # no run goes from one text into the next
    assert copies.runs("") == [] and score.Copies([]).runs(answer) == []
    parts = copies.marks(answer, copies.runs(answer))
    assert "".join(part for part, _ in parts) == answer and [len(p) for p, copied in parts if copied] == [45, 30]


def test_copied_runs_that_overlap():
    text = "".join(chr(0xAC00 + i) for i in range(105))
    copies = score.Copies([text[:40], text[5:105]])  # the longer one begins inside the first
    assert copies.runs(text) == [(0, 40), (5, 105)]
    assert copies.marks(text, copies.runs(text)) == [(text[:40], True), (text[40:], True)]
    measures = score.measure({"answer": text, "ended": True}, {"tier": "N", "answer": "", "aliases": []}, [], copies)
    assert (measures["longest_run"], measures["copied_share"], measures["copied_80"]) == (100, 1, 1)


def test_intervals():
    alone = [str(i) for i in range(200)]
    assert score.interval([1.0] * 200, alone) == [1, 1, 1]
    values = np.random.default_rng(1).integers(0, 2, 200).astype(float)
    mean, low, high = score.interval(values.tolist(), alone)
    error = 1.96 * np.sqrt(mean * (1 - mean) / 200)  # the normal approximation
    assert mean == values.mean() and (low, high) == pytest.approx((mean - error, mean + error), abs=0.015)


def test_intervals_know_that_questions_cluster():
    """Ten questions about each of 20 entities, of which all are known or none: 20 draws, not 200."""
    known = np.random.default_rng(2).integers(0, 2, 20).astype(float)
    values, entities = np.repeat(known, 10).tolist(), [str(i) for i in range(20) for _ in range(10)]
    mean, low, high = score.interval(values, entities)
    error = 1.96 * np.sqrt(mean * (1 - mean) / 20)
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.05)


def test_pairing_sees_what_separate_intervals_do_not():
    ids = [str(i) for i in range(100)]
    questions = {question_id: {"tier": "B", "withheld": True} for question_id in ids}  # each of its own entity
    one = {asked: {"exact": float(i % 2)} for i, asked in enumerate(ids)}
    two = {asked: {"exact": float(i % 2 or i < 20)} for i, asked in enumerate(ids)}  # 10 more of 100
    apart = [score.summarize(rows, questions)["B"]["exact"] for rows in (one, two)]
    assert apart[0][2] > apart[1][1]  # they overlap
    mean, low, _, p = score.compare(one, two, questions)["B"]["exact"]
    assert mean == pytest.approx(0.1) and low > 0 and p == pytest.approx(2 / 2**10)  # ten wins, no loss
    assert score.compare(one, one, questions)["B"]["exact"] == [0, 0, 0, 1]
    together = {question_id: {**question, "entity": "조조"} for question_id, question in questions.items()}
    assert score.compare(one, two, together)["B"]["exact"][3] == 1  # all about one entity: no evidence at all
    four = {asked: {"exact": float(i % 2 or i < 8)} for i, asked in enumerate(ids)}
    assert score.compare(one, four, questions)["B"]["exact"][3] == 0.125  # four wins can be chance


def test_groups():
    groups = score.groups_of
    assert groups({"tier": "C", "withheld": True}) == ["C", "C withheld", "B+C", "all"]
    assert groups({"tier": "B", "withheld": True}) == ["B", "A+B", "B+C", "all"]
    assert groups({"tier": "N", "withheld": False}) == ["N", "all"]


# ---- From end to end -----------------------------------------------------------------------------------------------

ROWS = [
    {"id": "A-1", "tier": "A", "question": "조조의 자는?", "answer": "맹덕", "aliases": ["孟德"], "split": "dev",
     "choices": ["현덕", "운장", "익덕"], "evidence": "조조(曹操)의 자는 맹덕(孟德)이다.", "article": "조조"},
    {"id": "A-2", "tier": "A", "question": "유비의 자는?", "answer": "현덕", "choices": ["맹덕", "운장", "익덕"]},
    {"id": "B-1", "tier": "B", "question": "관평의 아버지는?", "answer": "관우", "withheld": True},
    {"id": "C-1", "tier": "C", "question": "관평이 누구 아들이야?", "answer": "관우", "withheld": True},
    {"id": "D-1", "tier": "D", "question": "자가 맹덕인 인물은?", "answer": "조조"},
    {"id": "N-1", "tier": "N", "question": "하후즙의 자는?"},
]  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def answers_of(rows: dict[str, str], **fields) -> list[dict]:
    fields = {"checkpoint": "outputs/x/checkpoint-8", "step": 8, "ended": True, "tokens": 3, "seconds": 0.1} | fields
    return [{"id": asked, "answer": answer, **fields} for asked, answer in rows.items()]


@pytest.fixture
def quiz(tmp_path):
    return write_rows(tmp_path / "quiz.jsonl", [{"about": {"declines": ["모르"], "reserved_forms": []}}, *ROWS])


def test_answers_to_scores_to_report(finished_run, chats, quiz, tmp_path):
    answers = tmp_path / "answers.jsonl"
    script(
        "generate.py", "--config", ROOT / "configs/quiz.yaml", "--checkpoint", finished_run, "--prompts_file", quiz,
        "--max_new_tokens", "24", "--output_file", answers,
    )  # fmt: skip
    assert [row["step"] for row in read_jsonl(answers)] == [0] * 6 + [4] * 6 + [8] * 6  # the first line asks nothing
    result = script(
        "tools/score.py", "--quiz", quiz, "--answers", answers, "--train_file", chats,
        "--log", finished_run / "training_log.jsonl", "--report", tmp_path / "report",
    )  # fmt: skip
    assert "step 8 against base" in result.stdout and "base" in result.stdout
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert [model["step"] for model in scores["models"]] == [0, 4, 8] and scores["split"] == "test"
    last = scores["models"][-1]["scores"]
    assert last["A"]["n"] == 1  # A-1 is of the development split
    assert {"exact", "exact_korquad", "f1", "contains", "copied_share", "longest_run"} <= set(last["B"])
    assert set(last["N"]) & {"exact", "invented"} == {"invented"}
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 3 and "관평이 누구 아들이야?" in page and "training" in page
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)  # opens without a network


def test_scores_are_what_the_answers_say(quiz, tmp_path):
    base = answers_of({row["id"]: "조조" for row in ROWS}, checkpoint="m", step=0)
    taught = {
        "A-1": "맹덕",
        "A-2": "현덕이다.",
        "B-1": "관우",
        "C-1": "관우의 아들이야.",
        "D-1": "유비",
        "N-1": "모르겠다.",
    }
    path = write_rows(tmp_path / "answers.jsonl", base + answers_of(taught, ended=False))
    book = [
        *answers_of({"A-1": "맹덕", "B-1": "관우\n\n글: 다음"}, passage="gold", examples=3, checkpoint="m", step=None),
        *answers_of({"A-1": "몰라", "B-1": "관평"}, passage="gold", examples=0, checkpoint="m", step=None),
    ]
    books = write_rows(tmp_path / "book.jsonl", book)
    result = script("tools/score.py", "--quiz", quiz, "--answers", path, "--open_book", books)
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    bound, first, last = scores["models"]
    assert (bound["passage"], bound["examples"]) == ("gold", 3)  # better on A-1, of the development split
    assert bound["scores"]["B"]["exact"][0] == 1  # the first line of "관우\n\n글: 다음"
    means = {tier: {k: v[0] for k, v in last["scores"][tier].items() if k != "n"} for tier in last["scores"]}
    assert [means[tier]["exact"] for tier in "ABCD"] == [1, 1, 0, 0] and means["C"]["contains"] == 1
    assert means["N"]["invented"] == 0 and first["scores"]["N"]["invented"][0] == 1
    assert means["C withheld"]["f1"] == pytest.approx(4 / 9, abs=1e-4) and "C rest" not in means
    assert means["B+C"]["exact"] == 0.5 and means["all"]["ended"] == 0
    comparison = scores["comparisons"][0]
    assert comparison["difference"]["B"]["exact"][0] == 1 and comparison["same_answers"] == 0
    assert "bounds nothing" not in result.stdout
    script("tools/score.py", "--quiz", quiz, "--answers", path, "--split", "dev")
    dev = json.loads((tmp_path / "scores-dev.json").read_text(encoding="utf-8"))
    assert [list(model["scores"]) for model in dev["models"]] == [["A", "A+B", "all"]] * 2
    weak = write_rows(tmp_path / "weak.jsonl", [{**row, "answer": "몰라"} for row in book])
    result = script("tools/score.py", "--quiz", quiz, "--answers", path, "--open_book", weak)
    assert "answers 0% of B+C" in result.stdout and "bounds nothing" in result.stdout


def test_one_checkpoint_asked_in_two_ways(quiz, tmp_path):
    texts = {row["id"]: "조조" for row in ROWS}
    one = write_rows(tmp_path / "one.jsonl", answers_of(texts))
    two = write_rows(tmp_path / "two.jsonl", answers_of(texts | {"B-1": "관우"}))
    result = script("tools/score.py", "--quiz", quiz, "--answers", one, two)
    assert f"step 8 ({two}) against step 8 ({one}): 4 of 5 answers are the same" in result.stdout


def test_two_runs_in_one_file_have_two_names(quiz, tmp_path):
    texts = {row["id"]: "조조" for row in ROWS}
    rows = answers_of(texts) + answers_of(texts, checkpoint="outputs/y/checkpoint-8")
    path = write_rows(tmp_path / "answers.jsonl", rows)
    script("tools/score.py", "--quiz", quiz, "--answers", path, "--report", tmp_path)
    models = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["models"]
    assert [model["name"] for model in models] == ["step 8, outputs/x", "step 8, outputs/y"]
    assert "tier A, outputs/y" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_training_on_the_quiz_is_told(quiz, tmp_path):
    answers = write_rows(tmp_path / "answers.jsonl", answers_of({row["id"]: "조조" for row in ROWS}))
    turns = [{"role": "user", "content": "관평의 아버지는?"}, {"role": "assistant", "content": "관우"}]
    train_file = write_rows(tmp_path / "train.jsonl", [{"messages": turns}])
    result = script("tools/score.py", "--quiz", quiz, "--answers", answers, "--train_file", train_file)
    assert "gives the quiz away in 1 places" in result.stdout and "asks question B-1" in result.stdout


def test_open_book_prompts(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    result = script(
        "tools/open_book.py",
        "--quiz",
        QUIZ,
        "--articles",
        ROOT / "data/sample_articles.jsonl",
        "--output_file",
        prompts,
    )
    about, questions = score.read_quiz(QUIZ)
    rows = read_jsonl(prompts)
    kinds = {(row["passage"], row["examples"]) for row in rows}
    assert kinds == {("BM25", 0), ("BM25", 3), ("gold", 0), ("gold", 3)}
    left_out = set(questions) - {row["id"] for row in rows}
    assert len(left_out) == 3 and all(questions[asked]["split"] == "dev" for asked in left_out)
    for row in rows:
        question = questions[row["id"]]
        assert question["question"] in row["prompt"] and row["question"] == question["question"]
        for asked in left_out:
            assert (questions[asked]["question"] in row["prompt"]) == (row["examples"] == 3)
        if row["passage"] == "gold":
            assert all(sentence in row["prompt"] for sentence in question["evidence"])
    assert not any(questions[row["id"]]["tier"] == "N" for row in rows if row["passage"] == "gold")
    right, of = map(int, re.search(r"answers for (\d+) of (\d+)", result.stdout).groups())
    assert of == sum(question["tier"] != "N" for question in questions.values()) and right > 0.5 * of


def test_a_base_model_is_asked_in_plain_text(finished_run):
    tokenizer = generate.load_tokenizer(str(finished_run / "final"), str(ROOT / "tools/plain_template.jinja"))
    asked = [generate.turn("user", "글: 조조의 자는 맹덕이다.\n답:", tokenizer)]
    ids = generate.encode([asked], tokenizer)["input_ids"][0]
    assert tokenizer.decode(ids) == "<|begin_of_text|>글: 조조의 자는 맹덕이다.\n답:"


@pytest.mark.slow
def test_lm_eval_runs_the_tasks(finished_run, tmp_path):
    arguments = f"pretrained={finished_run}/final,dtype=float32"
    result = run(
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--apply_chat_template",
        "--include_path", "tools/lm_eval_tasks", "--tasks", "quiz_choice,neutral_ko", "--device", "cpu",
        "--limit", "5", "--output_path", tmp_path, "--log_samples", env={"HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert "acc_norm" in result.stdout and "byte_perplexity" in result.stdout
    _, questions = score.read_quiz(QUIZ)
    for tier in "ABCD":
        (path,) = tmp_path.rglob(f"samples_quiz_choice_{tier.lower()}_*.jsonl")
        samples = read_jsonl(path)
        assert len(samples) == 5
        for sample in samples:
            question = questions[sample["doc"]["id"]]
            assert question["split"] == "test" and question["tier"] == tier
            asked = [pair["arg_1"] for pair in sample["arguments"].values()]
            assert asked == sorted([question["answer"], *question["choices"]])
            assert asked[int(sample["target"])] == question["answer"]
            assert all(question["question"] in pair["arg_0"] for pair in sample["arguments"].values())


# ---- Mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", ("line 3: not JSON",)),
        ("[]", ("line 3: not an object but a list",)),
        ({"aliases": ["()"]}, ("line 3 (x): `aliases` is a list of texts",)),
        ({"tier": ["A"]}, ("line 3 (x): unknown tier ['A']",)),
        ({"id": None}, ("line 3", "needs the text `id`")),
        ({"question": " "}, ("line 3", "needs the text `question`")),
        ({"answer": None}, ("line 3 (x): there is no `answer`; only tier N",)),
        ({"answer": "."}, ("line 3 (x): there is no `answer`",)),
        ({"tier": "E"}, ("line 3 (x): unknown tier 'E'; the tiers are A, B, C, D, N",)),
        ({"tier": "N"}, ("line 3 (x): tier N asks for what never was",)),
        ({"id": "A-2"}, ("line 3", "id A-2 was used before")),
        ({"split": "train"}, ("line 3 (x): split is dev or test",)),
        ({"withheld": "false"}, ("line 3 (x): `withheld` is true or false",)),
        ({"choices": "c"}, ("line 3 (x): `choices` is a list of texts",)),
        ({"choices": ["유 비", "조조"]}, ("line 3 (x): the wrong choices hold the answer '유 비'",)),
        ({"aliases": ["현덕"], "choices": ["현덕"]}, ("line 3 (x): the wrong choices hold the answer '현덕'",)),
        ({"choices": ["조조", "조조"]}, ("line 3 (x): a choice stands there twice",)),
        ({"evidence": "유비가 졌다."}, ("line 3 (x): each sentence of `evidence` needs the title of its `article`",)),
        ({"evidence": "조조가 졌다.", "article": "조조"}, ("line 3 (x): the answer '유비' stands neither in its",)),
    ],
)
def test_bad_quiz_lines(change, words, tmp_path):
    path = write_rows(tmp_path / "quiz.jsonl", [{"about": {"language": "ko"}}, ROWS[1]])
    row = {"id": "x", "tier": "A", "question": "이릉 대전에서 진 사람은?", "answer": "유비"}
    line = change if isinstance(change, str) else json.dumps(row | change, ensure_ascii=False)
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    assert_mistake(script("tools/score.py", "--quiz", path, ok=False), str(path), *words)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ("삼국지", "`about` is an object, not a str"),
        ({"declines": "모르"}, "`declines` is a list of texts"),
        ({"declines": ["(모르"]}, "'(모르' in `declines` is not a regular expression"),
        ({"reserved_forms": ["{0}의 자는?"]}, "the reserved form '{0}의 자는?' needs words and one {}"),
        ({"withheld": ["조조"]}, "`withheld` is a list of"),
    ],
)
def test_bad_first_lines(about, words, tmp_path):
    path = write_rows(tmp_path / "quiz.jsonl", [{"about": about}, *ROWS])
    assert_mistake(script("tools/score.py", "--quiz", path, ok=False), "line 1", words)


def test_a_changed_quiz_is_told(tmp_path):
    text = QUIZ.read_text(encoding="utf-8")
    (tmp_path / "quiz.jsonl").write_text(text.replace('"answer": "문화"', '"answer": "문화(文和)"'), encoding="utf-8")
    result = script("tools/score.py", "--quiz", tmp_path / "quiz.jsonl", ok=False)
    assert_mistake(result, "not the one that its first line froze")
    frozen = re.search("[0-9a-f]{64}", result.stderr)[0]
    about, _ = score.read_quiz(QUIZ)
    changed = (tmp_path / "quiz.jsonl").read_text(encoding="utf-8").replace(about["sha256"], frozen)
    (tmp_path / "quiz.jsonl").write_text(changed, encoding="utf-8")
    assert "678 questions" in script("tools/score.py", "--quiz", tmp_path / "quiz.jsonl").stdout


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*answers_of({"A-9": "x"})], ("line 1: the quiz has no question A-9",)),
        ([*answers_of({"A-2": "x"}), *answers_of({"A-2": "x"})], ("line 2", "has answered A-2 before")),
        ([{"answer": "x"}], ("line 1: not an answer to a quiz; generate.py",)),
        ([*answers_of({"A-2": "x"}, step="8")], ("line 1: not an answer to a quiz; generate.py",)),
        ([*answers_of({"A-2": "x"}, passage="gold")], ("line 1: only answers to open_book.py's prompts belong",)),
        ([], ("answers.jsonl holds no answers",)),
        ([*answers_of({"A-2": "x"}, question="다른 질문?")], ("A-2 was another question when it was answered",)),
        (
            [*answers_of({"A-2": "x", "B-1": "x"}), *answers_of({"A-2": "x"}, step=9)],
            ("did not answer the same questions: 1 differ, first B-1",),
        ),
        ([*answers_of({"A-1": "x"})], ("no answer is to a question of the split test",)),
    ],
)
def test_bad_answers(rows, words, quiz, tmp_path):
    path = write_rows(tmp_path / "answers.jsonl", rows)
    assert_mistake(script("tools/score.py", "--quiz", quiz, "--answers", path, ok=False), *words)
    assert not (tmp_path / "scores.json").exists()


def test_answers_to_other_questions_are_named_and_the_rest_is_scored(quiz, tmp_path):
    texts = {row["id"]: "조조" for row in ROWS}
    path = write_rows(tmp_path / "answers.jsonl", answers_of(texts | {"A-9": "x"}))
    result = script("tools/score.py", "--quiz", quiz, "--answers", path, ok=False)
    assert_mistake(result, "1 answers were left out, the rest is scored", "line 7: the quiz has no question A-9")
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["models"][0]["scores"]["D"]["exact"][0] == 1


def test_other_mistakes(quiz, tmp_path):
    answers = write_rows(tmp_path / "answers.jsonl", answers_of({row["id"]: "조조" for row in ROWS}))
    scoring = ("tools/score.py", "--quiz", quiz, "--answers", answers)
    assert_mistake(script("tools/score.py", "--quiz", tmp_path / "no.jsonl", ok=False), "cannot read")
    assert_mistake(script(*scoring, "--train_file", quiz, ok=False), "line 1: not a chat as train.py takes it")
    assert_mistake(script(*scoring, "--output_file", tmp_path / "quiz.jsonl/x", ok=False), "cannot write")
    assert_mistake(script(*scoring, "--log", ROOT / "README.md", ok=False), "line 1: not JSON")
    assert_mistake(script(*scoring, "--open_book", answers, ok=False), "only answers to open_book.py's prompts belong")
    book = ("tools/open_book.py", "--quiz", quiz, "--output_file", tmp_path / "p.jsonl", "--articles")
    assert_mistake(script(*book, quiz, ok=False), "line 1: not an article")
    articles = write_rows(tmp_path / "articles.jsonl", [{"title": "조조", "text": "다른 글"}])
    assert_mistake(script(*book, articles, ok=False), "A-1: its evidence stands in no paragraph of the article '조조'")
    articles = write_rows(tmp_path / "articles.jsonl", [{"title": "조조", "text": ROWS[0]["evidence"]}])
    assert_mistake(script(*book, articles, ok=False), "3 questions with evidence and split dev are needed")
    assert_mistake(script(*book, articles, "--prompt", "x", ok=False), "--prompt needs {passage} and {question}")


def test_a_checkpoint_that_cannot_end_is_named_and_the_others_answer(finished_run, quiz, tmp_path):
    mute = tmp_path / "mute"
    shutil.copytree(finished_run / "final", mute)
    for name, keys in (("generation_config.json", ["eos_token_id"]), ("tokenizer_config.json", ["eos_token"])):
        settings = json.loads((mute / name).read_text(encoding="utf-8"))
        (mute / name).write_text(json.dumps({k: v for k, v in settings.items() if k not in keys}), encoding="utf-8")
    config = json.loads((mute / "config.json").read_text(encoding="utf-8"))
    (mute / "config.json").write_text(json.dumps({**config, "eos_token_id": None}), encoding="utf-8")
    asking = ("generate.py", "--prompts_file", quiz, "--max_new_tokens", "4", "--output_file", tmp_path / "a.jsonl")
    result = script(*asking, "--checkpoint", mute, "--checkpoint", finished_run / "final", ok=False)
    assert_mistake(result, "1 of 2 models did not answer", str(mute))
    assert f"skipping {mute}" in result.stderr and "cannot end an answer" in result.stderr
    assert {row["checkpoint"] for row in read_jsonl(tmp_path / "a.jsonl")} == {str(finished_run / "final")}
    (tmp_path / "a.jsonl").unlink()
    assert_mistake(script(*asking, "--checkpoint", mute, ok=False), "cannot end an answer")
    assert not (tmp_path / "a.jsonl").exists()
