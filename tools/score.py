"""Score the answers of every checkpoint against a quiz, without a model: what it knows, invents, repeats and copies.

Reads the answers that generate.py wrote and the quiz; prints a table, writes scores.json beside the answers and, with
--report, one HTML page that opens without server or network. docs/quiz.md describes the quiz and the scores.

    python tools/score.py --quiz my_quiz.jsonl                                           # only check a quiz
    python tools/score.py --quiz data/quiz.jsonl --answers outputs/demo/quiz/answers.jsonl
    python tools/score.py --quiz data/quiz.jsonl --answers a.jsonl --split dev           # to choose settings by
    python tools/score.py --quiz data/quiz.jsonl --answers a.jsonl --train_file data/demo/train.jsonl --report DIR
"""

import argparse
import hashlib
import json
import math
import os
import re
import string
import sys
import unicodedata
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

TIERS = {
    "A": "facts whose question forms training may use, asked in a form that it never uses",
    "B": "the document was trained, no question about its subject ever was",
    "C": "written by hand, as people ask",
    "D": "reverse and two-hop",
    "N": "things that never were",
}
CAP = 100  # characters beyond which an answer that contains the right one only recites
RESAMPLES = 2000
# A trailing particle or copula that an answer may carry beyond its words: 관우다, 관우가, 219년입니다.
PARTICLES = (
    "이다 다 입니다 이었다 였다 이었습니다 였습니다 이에요 예요 이었어요 였어요 이야 야 이요 요 임 이라고 라고 "
    "은 는 이 가 께서 을 를 의 에 에서 에게 한테 와 과 로 으로 도"
).split()


class UserError(Exception):
    """A mistake of the user: told in one sentence, without a traceback, exit code 2."""


# ---- Files ---------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a text file that are not blank, as ("FILE, line N", line). Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def read_objects(path: Path) -> list[tuple[str, dict]]:
    """The JSON objects of a file, one a line, as ("FILE, line N", object). Raises UserError."""
    found = []
    for where, line in read_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{where}: not JSON") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: not an object but a {type(row).__name__}")
        found.append((where, row))
    return found


def read_quiz(path: Path) -> tuple[dict, dict[str, dict]]:
    """A quiz as (what its first line says about it, {id: question}), every field there.

    Raises UserError with the line number of the first bad line, and when the quiz is not the one that the first line's
    sha256 froze.
    """
    about, questions = {}, {}
    for where, row in read_objects(path):
        if "about" in row and "question" not in row and not about and not questions:
            about = check_about(row["about"], where)
            continue
        question = check_question(row, where)
        if question["id"] in questions:
            raise UserError(f"{where}: the id {question['id']} was used before")
        questions[question["id"]] = question
    if not questions:
        raise UserError(f"{path} holds no questions")
    withheld = {entry["entity"] for entry in about.get("withheld", [])}
    for question in questions.values() if withheld else []:
        if question["tier"] == "B" and question.get("entity", "") not in withheld | {""}:
            raise UserError(
                f"{path} ({question['id']}): tier B asks about {question['entity']}, which is not among what the "
                "first line withholds: preprocess.py would make questions about it"
            )
    # The digest of everything but itself.
    lines = [line for _, line in read_lines(path)][1:]
    rest = json.dumps({k: v for k, v in about.items() if k != "sha256"}, ensure_ascii=False, sort_keys=True)
    digest = hashlib.sha256("\n".join([rest, *lines]).encode()).hexdigest()
    if about.get("sha256", digest) != digest:
        raise UserError(
            f"{path}: the quiz is not the one that its first line froze; figures of the two must not be compared. "
            f"If the change is meant, write the new sha256 there: {digest}"
        )
    return {"declines": [], "reserved_forms": [], "withheld": []} | about, questions


def check_about(about: dict, where: str) -> dict:
    """What a quiz says about itself, once it is seen to be of the right types. Raises UserError."""
    if not isinstance(about, dict):
        raise UserError(f"{where}: `about` is an object, not a {type(about).__name__}")
    for key in ("declines", "reserved_forms"):
        if not is_texts(about.get(key, [])):
            raise UserError(f"{where}: `{key}` is a list of texts")
    for pattern in about.get("declines", []):
        try:
            re.compile(pattern)
        except re.error as e:
            raise UserError(f"{where}: {pattern!r} in `declines` is not a regular expression: {e}") from None
    for form in about.get("reserved_forms", []):
        if form.count("{}") != 1 or not squeeze(form):
            raise UserError(f"{where}: the reserved form {form!r} needs words and one {{}} for the name")
    for entry in about.get("withheld", []) if isinstance(about.get("withheld", []), list) else [None]:
        if (
            not isinstance(entry, dict)
            or not is_texts([entry.get("entity")])
            or not is_texts(entry.get("aliases", []))
        ):
            raise UserError(f'{where}: `withheld` is a list of {{"entity": …, "aliases": […]}}')
    return about


def check_question(row: dict, where: str) -> dict:
    """A question with every field, absent ones empty. Raises UserError that begins with `where`."""
    row = {"split": "test", "aliases": [], "choices": [], "evidence": [], "article": [], "withheld": False, **row}
    for key in ("id", "question"):
        if not is_texts([row.get(key)]):
            raise UserError(f"{where}: a question needs the text `{key}`")
    where = f"{where} ({row['id']})"
    if row.get("tier") not in list(TIERS):
        raise UserError(f"{where}: unknown tier {row.get('tier')!r}; the tiers are {', '.join(TIERS)}")
    if row["split"] not in ("dev", "test"):
        raise UserError(f"{where}: split is dev or test, not {row['split']!r}")
    if not isinstance(row["withheld"], bool):
        raise UserError(f"{where}: `withheld` is true or false")
    for key in ("evidence", "article"):  # a single text will do
        row[key] = [row[key]] if isinstance(row[key], str) else row[key]
    for key in ("aliases", "choices", "evidence", "article"):
        if not is_texts(row[key]):
            raise UserError(f"{where}: `{key}` is a list of texts")
    if len(row["evidence"]) != len(row["article"]):
        raise UserError(f"{where}: each sentence of `evidence` needs the title of its `article`")
    if row["tier"] == "N":
        if row.get("answer"):
            raise UserError(f"{where}: tier N asks for what never was, so it has no `answer`")
        return {**row, "answer": ""}
    if not is_texts([row.get("answer")]):
        raise UserError(f"{where}: there is no `answer`; only tier N goes without")
    golds = {squeeze(text) for text in (row["answer"], *row["aliases"])}
    right = [choice for choice in row["choices"] if squeeze(choice) in golds]
    if right:
        raise UserError(f"{where}: the wrong choices hold the answer {right[0]!r}")
    if len({squeeze(choice) for choice in row["choices"]}) < len(row["choices"]):
        raise UserError(f"{where}: a choice stands there twice")
    if row["evidence"] and not any(row["answer"] in text for text in row["evidence"] + row["article"]):
        raise UserError(
            f"{where}: the answer {row['answer']!r} stands neither in its evidence nor in its article's title"
        )
    return row


def is_texts(values) -> bool:
    """Whether it is a list of texts that hold more than spaces and punctuation."""
    return isinstance(values, list) and all(isinstance(text, str) and squeeze(text) for text in values)


def read_answers(
    paths: list[Path], questions: dict[str, dict], open_book: bool = False
) -> tuple[dict[tuple, dict[str, dict]], list[str]]:
    """The answers of each model, {(checkpoint, step, passage, examples, file): {question id: answer}}.

    passage and examples are those of open_book.py's prompts, None and 0 elsewhere; file is empty unless there are
    several, so that one checkpoint asked in two ways can be compared. Of an answer to an open-book prompt the first
    line counts: a base model shown worked examples goes on with the next one. Also returns what is wrong with answers
    that are left out: to questions that the quiz does not have, or asks otherwise. Raises UserError for a file that
    does not hold answers, a second answer to a question, and models that were not asked the same.
    """
    models, wrong = {}, []
    for path in paths:
        for where, row in read_objects(path):
            kinds = {"checkpoint": str, "step": int | None, "id": str, "answer": str, "ended": bool}
            if any(key not in row or not isinstance(row[key], kind) for key, kind in kinds.items()):
                raise UserError(f"{where}: not an answer to a quiz; generate.py --prompts_file QUIZ makes them")
            passage, examples = row.get("passage"), row.get("examples", 0)
            if not isinstance(passage, str | None) or not isinstance(examples, int):
                raise UserError(f"{where}: `passage` and `examples` are open_book.py's names; give yours others")
            if bool(passage) != open_book:
                raise UserError(
                    f"{where}: only answers to open_book.py's prompts belong in --open_book, and only there"
                )
            question = questions.get(row["id"])
            if not question:
                wrong.append(f"{where}: the quiz has no question {row['id']}; was it another quiz?")
                continue
            if row.get("question", question["question"]) != question["question"]:
                wrong.append(f"{where}: {row['id']} was another question when it was answered")
                continue
            file = str(path) if len(paths) > 1 else ""
            answers = models.setdefault((row["checkpoint"], row["step"], passage, examples, file), {})
            if row["id"] in answers:
                raise UserError(f"{where}: {row['checkpoint']} has answered {row['id']} before")
            answer = row["answer"].strip().split("\n")[0] if passage else row["answer"]
            answers[row["id"]] = {**row, "answer": answer}
    if not models:
        raise UserError(wrong[0] if wrong else f"{paths[0]} holds no answers")
    for (first, ids), (other, others) in pairwise((key, set(rows)) for key, rows in models.items() if not open_book):
        if ids != others:
            raise UserError(
                f"{first[0]} and {other[0]} did not answer the same questions: {len(ids ^ others)} differ, first "
                f"{min(ids ^ others)}; answer them again"
            )
    return models, wrong


def read_chats(path: Path) -> list[dict]:
    """The rows of a training file as [{"prompts", "answer", "kind"}]: what user and system say, turn by turn, and what
    the assistant does. Raises UserError with the line number of a bad line.
    """
    chats = []
    for where, row in read_objects(path):
        try:
            prompts = [turn["content"] + "" for turn in row["messages"] if turn["role"] != "assistant"]
            answer = "\n".join(turn["content"] for turn in row["messages"] if turn["role"] == "assistant")
        except (KeyError, TypeError):
            raise UserError(f"{where}: not a chat as train.py takes it") from None
        chats.append({"prompts": prompts, "answer": answer, "kind": row.get("kind")})
    return chats


def leaks(chats: list[dict], about: dict, questions: dict[str, dict]) -> list[str]:
    """Why a quiz cannot judge a model trained on these chats: a sentence for each thing that is given away.

    No prompt may hold a quiz question or have a form that the quiz reserves (in "{}이/가 난 해는?" any name stands for
    {}, either particle for 이/가), and only whole articles and masked passages, by the `kind` that preprocess.py gives
    a row, may name an entity that the quiz withholds.
    """
    known = {squeeze(question["question"]): question["id"] for question in questions.values()}
    forms = []
    for form in about["reserved_forms"]:
        before, one, other, after = re.fullmatch(
            r"(.*)\{\}(?:(\w{1,2})/(\w{1,2}?)(?=\s|$))?(.*)", form, re.DOTALL
        ).groups()
        particle = f"(?:{one}|{other})" if one else ""
        forms.append((form, re.compile(re.escape(squeeze(before)) + ".{1,30}" + particle + re.escape(squeeze(after)))))
    names = {}  # a short alias such as 사계 begins other words too (사계절): it counts only as a word of its own
    for entry in about["withheld"]:
        names[entry["entity"]] = re.compile(re.escape(entry["entity"]))
        for alias in entry.get("aliases", []):
            whole = rf"(?<!\w){re.escape(alias)}(?:{'|'.join(PARTICLES)})?(?!\w)"
            names[alias] = re.compile(whole if len(alias) < 3 else re.escape(alias))
    found = []
    for chat in chats:
        for prompt in chat["prompts"]:
            shown, text = repr(prompt[:80]), squeeze(prompt)
            sentences = [text, *map(squeeze, re.split(r"(?<=[.?!])\s|\n", prompt))]
            found += [f"{shown} asks question {known[question]}" for question in known if question in text]
            found += [
                f"{shown} has the form {form!r}" for form, pattern in forms if any(map(pattern.fullmatch, sentences))
            ]
        if chat["kind"] not in ("article", "masked"):
            text = "\n".join([*chat["prompts"], chat["answer"]])
            shown = repr("".join(chat["prompts"][-1:])[:80])
            found += [f"{shown} or its answer names {name}" for name, pattern in names.items() if pattern.search(text)]
    return found


def write(path: Path, text: str):
    """Writes a file whole or not at all. Raises UserError."""
    beside = path.parent / f"{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as e:
        with suppress(OSError):
            beside.unlink()
        raise UserError(f"cannot write {path}: {e.strerror}") from None


# ---- Measures of one answer ----------------------------------------------------------------------------------------


def korquad_normalize(text: str) -> str:
    """KorQuAD 1.0's normalisation, from its evaluate-v1.0.py: brackets and quotes to spaces, ASCII punctuation out."""
    text = re.sub("['\"《》<>〈〉()‘’]", " ", text).lower()
    return " ".join(text.translate(str.maketrans("", "", string.punctuation)).split())


def squeeze(text: str) -> str:
    """Letters and digits only, in Unicode's NFKC: spacing and punctuation are free. Numbers are kept apart by |."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"[^\w|]|_", "", re.sub(r"(?<=\d)[\W_]+(?=\d)", "|", text.replace("|", " ")))


def exact_korquad(answer: str, golds: list[str]) -> float:
    """1 when the answer is one of `golds` by KorQuAD 1.0's definition (Lim et al. 2019, arXiv 1909.07005)."""
    return float(korquad_normalize(answer) in map(korquad_normalize, golds))


def exact(answer: str, golds: list[str]) -> float:
    """KorQuAD's exact match, with spacing and punctuation left free and one trailing particle or copula allowed.

    After a gold answer of one syllable no particle is: 관도 is not 관.
    """
    answer = squeeze(answer)
    return float(
        any(answer == gold + end for gold in map(squeeze, golds) for end in ("", *PARTICLES * (len(gold) > 1)))
    )


def f1(answer: str, golds: list[str]) -> float:
    """KorQuAD's F1 over characters, the best of `golds`; 1 where `exact` is."""
    if exact(answer, golds):
        return 1.0
    best, given = 0.0, korquad_normalize(answer).replace(" ", "")
    for gold in (korquad_normalize(gold).replace(" ", "") for gold in golds):
        common = sum((Counter(given) & Counter(gold)).values())
        best = max(best, 2 * common / (len(given) + len(gold)) if common else 0.0)
    return best


def contains(answer: str, golds: list[str], cap: int | None = None) -> float:
    """1 when one of `golds` stands in an answer of at most `cap` characters, or is all of it.

    A number counts only whole, and a bare one (219 beside 219년) only where nothing else is given: it stands in too
    many other things.
    """
    if exact(answer, golds):
        return 1.0
    if cap is not None and len(answer) > cap:
        return 0.0
    text = squeeze(answer)
    golds = list(map(squeeze, golds))
    golds = [gold for gold in golds if not gold.isdigit()] or golds
    return float(any(re.search(rf"(?<!\d(?=\d)){re.escape(gold)}(?!(?<=\d)\d)", text) for gold in golds))


def declines(answer: str, patterns: list[str]) -> float:
    """1 when the answer begins by saying that no such thing is known, by one of the quiz's `declines`.

    Its first sentence counts, and the second after one of a word or two ("아니요."): what comes later may be invented.
    """
    sentences = re.split(r"(?<=[.!?])\s+|\n+", answer.strip())
    first = " ".join(sentences[: 2 if len(sentences[0].split()) < 3 else 1])
    return float(any(re.search(pattern, first) for pattern in patterns))


def seq_rep_4(answer: str) -> float:
    """Share of repeated 4-grams of words, 1 - distinct / all (Welleck et al. 2020, arXiv 1908.04319)."""
    words = answer.split()
    grams = list(zip(*(words[i:] for i in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Copies:
    """Finds what an answer has word for word from the texts of a training file, in runs of RUN characters or more.

    As in Lee et al. 2022 (arXiv 2107.06499), but over characters, so that no tokenizer is needed.
    """

    RUN = 30

    def __init__(self, texts: list[str]):
        self.text = "\0".join(texts)
        hashes = (hash(self.text[i : i + self.RUN]) for i in range(len(self.text) - self.RUN + 1))
        self.hashes = np.unique(
            np.fromiter(hashes, dtype=np.int64)
        )  # 8 bytes a character, to look into the text rarely

    def runs(self, answer: str) -> list[tuple[int, int]]:
        """The (start, end) of each copied run that is part of no longer one, in order; they may overlap."""
        found, end = [], 0
        for start in range(len(answer) - self.RUN + 1):
            gram = answer[start : start + self.RUN]
            place = self.hashes.searchsorted(hash(gram))
            if place == len(self.hashes) or self.hashes[place] != hash(gram) or gram not in self.text:
                continue
            longest = max(end, start + self.RUN)  # what was found to end here from further left does so from here too
            while longest < len(answer) and answer[start : longest + 1] in self.text:
                longest += 1
            if longest > end:
                found.append((start, longest))
                end = longest
        return found

    @staticmethod
    def marks(answer: str, runs: list[tuple[int, int]]) -> list[tuple[str, bool]]:
        """The answer cut into (part, whether it lies in one of its copied runs)."""
        parts, last = [], 0
        for start, end in runs:
            parts += [(answer[last:start], False)] * (start > last) + [(answer[max(start, last) : end], True)]
            last = end
        return parts + [(answer[last:], False)] * (last < len(answer))


def measure(answer: dict, question: dict, patterns: list[str], copies: Copies | None, cap: int = CAP) -> dict:
    """Every measure of one answer; knowledge is measured where there is an answer to know, invention for tier N."""
    text, golds = answer["answer"], [question["answer"], *question["aliases"]]
    scores = {"ended": float(answer["ended"]), "seq_rep_4": seq_rep_4(text), "declines": declines(text, patterns)}
    if question["tier"] == "N":
        scores["invented"] = 1 - scores["declines"]
    else:
        scores |= {
            "exact": exact(text, golds),
            "exact_korquad": exact_korquad(text, golds),
            "f1": f1(text, golds),
            "contains": contains(text, golds, cap),
            "contains_uncapped": contains(text, golds),
        }
    if copies:
        runs = copies.runs(text)
        copied = sum(len(part) for part, is_copied in copies.marks(text, runs) if is_copied)
        scores["longest_run"] = float(max((end - start for start, end in runs), default=0))
        scores["copied_share"] = copied / len(text) if text else 0.0
        scores["copied_80"] = float(scores["longest_run"] >= 80)
    return scores


# ---- Summaries -----------------------------------------------------------------------------------------------------


def groups_of(question: dict) -> list[str]:
    """The groups whose scores a question enters: its tier, tier C both ways, A+B and B+C, and all."""
    tier = question["tier"]
    both_ways = ["C withheld" if question["withheld"] else "C rest"] * (tier == "C")
    return [tier, *both_ways, *["A+B"] * (tier in "AB"), *["B+C"] * (tier in "BC"), "all"]


@lru_cache
def resamples(n: int) -> np.ndarray:
    """How often each of n clusters stands in each bootstrap resample: [RESAMPLES, n]."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float32)


def interval(values: list[float], clusters: list[str]) -> list[float]:
    """[mean, low, high]: the mean and its 95% percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Whole clusters are drawn (Cameron, Gelbach and Miller 2008): the questions about one entity are known or not
    together, and drawing them one by one would promise more than so few entities can tell.
    """
    names, member = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(member, weights=values), np.bincount(member)
    weights = resamples(len(names))
    low, high = np.percentile((weights @ sums) / (weights @ counts), [2.5, 97.5])
    return [round(float(value), 4) for value in (np.mean(values), low, high)]


def summarize(scores: dict[str, dict], questions: dict[str, dict]) -> dict[str, dict]:
    """{group: {"n": questions, measure: interval}} of one model's {question id: measures}.

    A measure is averaged over the questions of the group that have it: tier N has no answer to be exact about.
    Questions cluster by `entity`; one that names none stands alone.
    """
    groups: dict[str, list[str]] = {}
    for question_id in scores:
        for group in groups_of(questions[question_id]):
            groups.setdefault(group, []).append(question_id)
    order = [*TIERS, "C withheld", "C rest", "A+B", "B+C", "all"]
    summary = {}
    for group in sorted(groups, key=order.index):
        summary[group] = {"n": len(groups[group])}
        for name in dict.fromkeys(name for member in groups[group] for name in scores[member]):
            members = [member for member in groups[group] if name in scores[member]]
            entities = [str(questions[member].get("entity") or member) for member in members]
            summary[group][name] = interval([scores[member][name] for member in members], entities)
    return summary


def compare(scores: dict[str, dict], other: dict[str, dict], questions: dict[str, dict]) -> dict[str, dict]:
    """other minus scores, question by question: {group: {"n", measure: [difference, low, high, p]}}.

    p is of the exact two-sided sign test over the entities of whose questions one model got more.
    """
    differences = {
        question_id: {name: other[question_id][name] - value for name, value in row.items()}
        for question_id, row in scores.items()
    }
    summary = summarize(differences, questions)
    for group, measures in summary.items():
        for name in measures.keys() - {"n"}:
            gains = Counter()
            for question_id, row in differences.items():
                if group in groups_of(questions[question_id]):
                    gains[questions[question_id].get("entity") or question_id] += row.get(name, 0)
            more, less = (sum(sign * gain > 1e-9 for gain in gains.values()) for sign in (1, -1))
            tail = sum(math.comb(more + less, k) for k in range(min(more, less) + 1)) / 2 ** (more + less)
            measures[name].append(min(1.0, 2 * tail))
    return summary


def short_name(key: tuple) -> str:
    """A model's name in tables: base, its step or its folder; the passage it had; its file if there are several."""
    checkpoint, step, passage, examples, file = key
    label = "base" if step == 0 else f"step {step:,}" if step is not None else Path(checkpoint).name
    label = f"base + {passage} passage, {examples} examples" if passage else label
    return f"{label} ({file})" if file else label


def name_models(keys: list[tuple]) -> dict[tuple, str]:
    """short_name of each, with the run's folder where two would have the same."""
    counts = Counter(map(short_name, keys))
    return {key: short_name(key) + (f", {Path(key[0]).parent}" if counts[short_name(key)] > 1 else "") for key in keys}


def best_bounds(open_book: dict[tuple, dict[str, dict]], questions: dict[str, dict]) -> list[tuple]:
    """For each kind of passage the key whose number of worked examples is better on the development split."""

    def on_dev(key: tuple) -> float:
        right = [row.get("contains", 0) for q, row in open_book[key].items() if questions[q]["split"] == "dev"]
        return sum(right) / len(right) if right else 0.0

    kinds = dict.fromkeys((key[0], key[2]) for key in open_book)
    return [max((key for key in open_book if (key[0], key[2]) == kind), key=on_dev) for kind in kinds]


COLUMNS = {  # of the tables: (group, measure)
    "A exact": ("A", "exact"),
    "B exact": ("B", "exact"),
    "B F1": ("B", "f1"),
    "C contains": ("C", "contains"),
    "C withheld contains": ("C withheld", "contains"),
    "C rest contains": ("C rest", "contains"),
    "D exact": ("D", "exact"),
    "N invented": ("N", "invented"),
    "copied 80+": ("all", "copied_80"),
    "seq-rep-4": ("all", "seq_rep_4"),
    "ended": ("all", "ended"),
}
REPORT_ONLY = ("B F1", "C withheld contains", "C rest contains")  # a terminal has 80 columns


def print_table(models: list[dict], console: Console):
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.title = "per cent, with 95% intervals"
    table.add_column("model", overflow="fold")
    shown = {
        title: place
        for title, place in COLUMNS.items()
        if title not in REPORT_ONLY and any(place[1] in model["scores"].get(place[0], {}) for model in models)
    }
    for title, (group, _) in shown.items():
        n = max(model["scores"].get(group, {}).get("n", 0) for model in models)
        lines = [*title.replace("seq-rep", "seq- rep").split(), f"[dim]n {n}[/]"]
        table.add_column("\n".join(lines), justify="right", no_wrap=True)
    for model in models:
        values = [model["scores"].get(group, {}).get(name) for group, name in shown.values()]
        cells = [f"{100 * v[0]:.1f}\n[dim]{100 * v[1]:.0f}–{100 * v[2]:.0f}[/]" if v else "–" for v in values]
        table.add_row(escape(model["name"]), *cells, style="dim" if model["passage"] else "")
    console.print(table)


def told(comparison: dict, title: str) -> str | None:
    """One line on a column of COLUMNS of a paired comparison; None where it was not measured."""
    group, name = COLUMNS[title]
    value = comparison["difference"].get(group, {}).get(name)
    if not value or title in REPORT_ONLY or group == "all":
        return None
    change, low, high = (f"{100 * v:+.1f}" for v in value[:3])
    chance = "" if value[3] < 0.05 else ", within chance"
    return (
        f"{comparison['of']} against {comparison['with']}, {title}: {change} [{low}, {high}], p {value[3]:.2g}{chance}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiz", type=Path, required=True, help="the questions; docs/quiz.md describes the format")
    parser.add_argument(
        "--answers", type=Path, nargs="+", default=[], help="answers of generate.py; without: only check the quiz"
    )
    parser.add_argument(
        "--open_book", type=Path, help="the base model's answers to open_book.py's prompts: the bounds"
    )
    parser.add_argument(
        "--train_file",
        type=Path,
        help="what was trained on, to find what is copied; default: what the checkpoints name",
    )
    parser.add_argument(
        "--split", choices=["test", "dev"], default="test", help="dev: the questions to choose settings by"
    )
    parser.add_argument("--contains_cap", type=int, default=CAP, help="characters beyond which an answer only recites")
    parser.add_argument("--log", type=Path, help="training_log.jsonl, for the report's loss")
    parser.add_argument("--report", type=Path, help="folder for report.html")
    parser.add_argument(
        "--output_file", type=Path, help="default: scores.json, or scores-dev.json, beside the answers"
    )
    args = parser.parse_args()

    if args.contains_cap < 1:
        raise UserError("--contains_cap is a number of characters, at least 1")
    about, questions = read_quiz(args.quiz)
    if not args.answers:
        tiers = Counter(question["tier"] for question in questions.values())
        counts = ", ".join(f"{n} {tier}" for tier, n in sorted(tiers.items()))
        print(f"{args.quiz}: {len(questions)} questions, {counts}")
        return
    answers, wrong = read_answers(args.answers, questions)
    open_book, more_wrong = read_answers([args.open_book], questions, open_book=True) if args.open_book else ({}, [])
    log = [row for _, row in read_objects(args.log)] if args.log else []
    train_file = args.train_file or train_file_of(list(answers)[-1][0])
    chats = read_chats(train_file) if train_file else []
    copies = Copies([chat["answer"] for chat in chats]) if chats else None

    measures = {
        key: {
            question_id: measure(row, questions[question_id], about["declines"], copies, args.contains_cap)
            for question_id, row in rows.items()
        }
        for key, rows in {**open_book, **answers}.items()
    }
    bounds = best_bounds({key: measures[key] for key in open_book}, questions)
    reported = {question_id for question_id, question in questions.items() if question["split"] == args.split}
    closed = list(answers)
    asked = reported & set(answers[closed[0]])
    scores = {key: {q: row for q, row in measures[key].items() if q in asked} for key in [*bounds, *answers]}
    names = name_models(list(scores))
    if not scores[closed[0]]:
        raise UserError(f"no answer is to a question of the split {args.split}")
    models = [
        {
            "name": names[key], "checkpoint": key[0], "step": key[1], "passage": key[2], "examples": key[3],
            "file": key[4], "scores": summarize(rows, questions),
        }
        for key, rows in scores.items() if rows
    ]  # fmt: skip
    comparisons = [
        {
            "of": names[later], "with": names[earlier],
            "same_answers": sum(answers[later][q]["answer"] == answers[earlier][q]["answer"] for q in scores[later]),
            "difference": compare(scores[earlier], scores[later], questions),
        }
        for earlier, later in dict.fromkeys([*((closed[0], key) for key in closed[1:]), *pairwise(closed)])
    ]  # fmt: skip

    notes = []
    if len(asked) < len(reported):
        notes.append(f"{len(asked)} of the {len(reported)} questions of the split {args.split} were asked")
    if not chats:
        notes.append("no training file was found, so nothing is said of copies and leaks; name it with --train_file")
    if not about["declines"] and any(questions[question_id]["tier"] == "N" for question_id in asked):
        notes.append(f"the first line of {args.quiz} has no `declines`: every answer to tier N counts as invented")
    leaked = leaks(chats, about, questions)
    if leaked:
        notes.append(f"{train_file} gives the quiz away in {len(leaked)} places, so that these figures flatter; the "
                     f"first: {leaked[0]}")  # fmt: skip
    for model in models:
        group = "B+C" if "B+C" in model["scores"] else "all"
        if model["passage"] == "gold" and model["scores"][group].get("contains", [0])[0] < 0.3:
            contained = 100 * model["scores"][group].get("contains", [0])[0]
            notes.append(f"with the gold passage before its eyes the base model answers {contained:.0f}% of {group}; "
                         "under 30% that line bounds nothing")  # fmt: skip
    result = {
        "quiz": str(args.quiz), "quiz_sha256": about.get("sha256"), "split": args.split,
        "train_file": str(train_file) if train_file else None, "contains_cap": args.contains_cap,
        "models": models, "comparisons": comparisons, "leaks": leaked, "notes": notes,
    }  # fmt: skip

    print_table(models, Console(highlight=False))
    if comparisons:
        last = comparisons[len(closed) - 2]
        print(f"{last['of']} against {last['with']}: {last['same_answers']} of {len(asked)} answers are the same")
        for line in filter(None, (told(last, title) for title in COLUMNS)):
            print(line)
    for note in notes:
        print(f"note: {note}")
    default = "scores.json" if args.split == "test" else "scores-dev.json"
    output = args.output_file or args.answers[0].with_name(default)
    write(output, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(f"wrote {output}")
    if args.report:
        from report import render  # matplotlib takes its time to load

        shown = {question_id: question for question_id, question in questions.items() if question_id in asked}
        write(args.report / "report.html", render(result, answers, measures, names, shown, copies, log))
        print(f"wrote {args.report / 'report.html'}")
    wrong += more_wrong
    if wrong:
        raise UserError(f"{len(wrong)} answers were left out, the rest is scored; {wrong[0]}")


def train_file_of(checkpoint: str) -> Path | None:
    """The training file that a checkpoint's recipe.json names, if both are there."""
    try:
        path = Path(json.loads((Path(checkpoint) / "recipe.json").read_text(encoding="utf-8"))["train_file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if path.exists() else None


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"score.py: {e}", file=sys.stderr)
        sys.exit(2)
