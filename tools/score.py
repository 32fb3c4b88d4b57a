"""Score the answers of every checkpoint against a quiz, without a model: what it knows, invents, repeats and copies.

Reads the answers that generate.py wrote and the quiz; prints a table, writes scores.json beside the answers and, with
--report, one HTML page that opens without server or network.

    python tools/score.py --quiz my_quiz.jsonl                                           # only check a quiz
    python tools/score.py --quiz data/quiz.jsonl --answers outputs/demo/quiz/answers.jsonl
    python tools/score.py --quiz data/quiz.jsonl --answers a.jsonl --split dev           # to choose settings by
    python tools/score.py --quiz data/quiz.jsonl --answers a.jsonl --train_file data/demo/train.jsonl --report DIR

Scores are per cent, with 95% bootstrap intervals over the questions. From 0 to 0 means that none of n was right; the
true share can still be up to about 3/n.
"""

import argparse
import hashlib
import io
import json
import os
import re
import string
import sys
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

TIERS = {
    "A": "facts whose question forms training may use, asked in a form that it never uses",
    "B": "the document was trained, no question about its subject ever was",
    "C": "written by hand, as people ask",
    "D": "reverse and two-hop",
    "N": "things that never were",
}
RESAMPLES = 10_000
ROLES = ("user", "assistant")
# A trailing particle or copula that an answer may carry beyond its words: 관우이다, 관우가, 219년입니다.
PARTICLES = (
    "이다 다 입니다 이었다 였다 이었습니다 였습니다 이에요 예요 이야 야 이요 요 임 "
    "은 는 이 가 을 를 의 에 에서 에게 와 과 로 으로 도"
).split()


class UserError(Exception):
    """A mistake of the user: told in one sentence, without a traceback, exit code 2."""


# ---- Files ---------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_quiz(path: Path) -> tuple[dict, dict[str, dict]]:
    """A quiz as (what its first line says about it, {id: question}), every question with all fields.

    Raises UserError with the line number of the first bad line, and when the questions are not those that the first
    line's sha256 froze.
    """
    about, questions, lines, digest = {}, {}, read_lines(path), hashlib.sha256()
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{where}: not JSON") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a question but a {type(row).__name__}")
        if "about" in row and number == lines[0][0]:
            about = row["about"]
            continue
        digest.update(line.encode() + b"\n")
        question = check_question(row, where)
        if question["id"] in questions:
            raise UserError(f"{where}: the id {question['id']} was used before")
        questions[question["id"]] = question
    if not questions:
        raise UserError(f"{path} holds no questions")
    if about.get("sha256", digest.hexdigest()) != digest.hexdigest():
        raise UserError(
            f"{path}: the questions are not those that its first line froze; figures of the two must not be compared. "
            f"If the change is meant, write the new sha256 there: {digest.hexdigest()}"
        )
    return about, questions


def check_question(row: dict, where: str) -> dict:
    """A question with every field, absent ones empty. Raises UserError that begins with `where`."""
    row = {"split": "test", "aliases": [], "choices": [], "evidence": [], "article": [], "withheld": False, **row}
    for key in ("id", "question"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where}: a question needs the text `{key}`")
    where = f"{where} ({row['id']})"
    if row.get("tier") not in TIERS:
        raise UserError(f"{where}: unknown tier {row.get('tier')!r}; the tiers are {', '.join(TIERS)}")
    if row["split"] not in ("dev", "test"):
        raise UserError(f"{where}: split is dev or test, not {row['split']!r}")
    for key in ("evidence", "article"):  # a single text will do
        row[key] = [row[key]] if isinstance(row[key], str) else row[key]
    for key in ("aliases", "choices", "evidence", "article"):
        if not isinstance(row[key], list) or not all(isinstance(text, str) and text.strip() for text in row[key]):
            raise UserError(f"{where}: `{key}` is a list of texts")
    if row["tier"] == "N":
        if row.get("answer"):
            raise UserError(f"{where}: tier N asks for what never was, so it has no `answer`")
        return {**row, "answer": ""}
    if not isinstance(row.get("answer"), str) or not squeeze(row["answer"]):
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


def read_answers(paths: list[Path], questions: dict[str, dict]) -> dict[tuple, dict[str, dict]]:
    """The answers of each model: {(checkpoint, step, passage, examples, file): {question id: answer row}}.

    passage and examples are those of open_book.py's prompts, None and 0 elsewhere; file is the stem of the file's name
    where there are several, so that one checkpoint asked in two ways can be compared. Of an answer to an open-book
    prompt the first line counts: a base model shown worked examples goes on with the next one. Raises UserError for an
    answer to a question that the quiz does not have, a second answer, and models that were not asked the same.
    """
    models: dict[tuple, dict[str, dict]] = {}
    for path in paths:
        stem = Path(path).stem if len(paths) > 1 else ""
        for number, line in read_lines(path):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
                key = (row["checkpoint"], row["step"], row.get("passage"), row.get("examples", 0), stem)
                asked, answer, _ = row["id"], row["answer"] + "", row["ended"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{where}: not an answer to a quiz; generate.py --prompts_file QUIZ --output_file FILE makes them"
                ) from None
            if asked not in questions:
                raise UserError(f"{where}: the quiz has no question {asked}; were the answers made with another quiz?")
            if not key[2] and row.get("question", questions[asked]["question"]) != questions[asked]["question"]:
                raise UserError(f"{where}: {asked} was another question when it was answered")
            if asked in models.setdefault(key, {}):
                raise UserError(f"{where}: {key[0]} has answered {asked} before")
            models[key][asked] = {**row, "answer": answer.strip().split("\n")[0] if key[2] else answer}
    closed = {key: set(rows) for key, rows in models.items() if not key[2]}
    for (first, ids), (other, others) in pairwise(closed.items()):
        if ids != others:
            missing = sorted(ids ^ others)
            raise UserError(
                f"{first[0]} and {other[0]} did not answer the same questions: {len(missing)} differ, first "
                f"{missing[0]}; answer them again"
            )
    return models


def read_chats(path: Path) -> list[dict]:
    """The rows of a training file as [{"question", "answer", "kind"}], the words of user and assistant.

    Raises UserError with the line number of a bad line.
    """
    chats = []
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
            said = {role: "\n".join(m["content"] for m in row["messages"] if m["role"] == role) for role in ROLES}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a chat as train.py takes it") from None
        chats.append({"question": said["user"], "answer": said["assistant"], "kind": row.get("kind")})
    return chats


def leaks(chats: list[dict], about: dict, questions: dict[str, dict]) -> list[str]:
    """Why a quiz cannot judge a model trained on these chats: a sentence for each chat that gives something away.

    No chat may ask a quiz question or use a form that the quiz reserves (in "{}이/가 난 해는?" any name stands for {},
    either particle for 이/가), and only whole articles and masked passages may name an entity that the quiz withholds.
    """
    asked = {squeeze(question["question"]): question["id"] for question in questions.values()}
    forms = []
    for form in about.get("reserved_forms", []):
        parts = re.split(r"\{\}(?:(\w+)/(\w+))?", form)  # text, particle, particle, text, …
        pattern = re.escape(squeeze(parts[0]))
        for i in range(1, len(parts), 3):
            pattern += (
                r".{1,30}" + (f"(?:{parts[i]}|{parts[i + 1]})" if parts[i] else "") + re.escape(squeeze(parts[i + 2]))
            )
        forms.append((form, re.compile(pattern)))
    names = [name for entry in about.get("withheld", []) for name in (entry["entity"], *entry["aliases"])]
    found = []
    for chat in chats:
        question = squeeze(chat["question"])
        if question in asked:
            found.append(f"{chat['question']!r} is question {asked[question]} of the quiz")
        found += [
            f"{chat['question']!r} has the form {form!r}" for form, pattern in forms if pattern.fullmatch(question)
        ]
        if chat["kind"] not in ("article", "masked"):
            text = chat["question"] + "\n" + chat["answer"]
            found += [f"{chat['question']!r} or its answer names {name}" for name in names if name in text]
    return found


# ---- Measures of one answer ----------------------------------------------------------------------------------------


def korquad_normalize(text: str) -> str:
    """KorQuAD 1.0's normalisation, from its evaluate-v1.0.py: brackets and quotes to spaces, ASCII punctuation out."""
    text = re.sub("['\"《》<>〈〉()‘’]", " ", text).lower()
    return " ".join(text.translate(str.maketrans("", "", string.punctuation)).split())


def squeeze(text: str) -> str:
    """korquad_normalize without any spaces: spacing is free in much of Korean."""
    return korquad_normalize(text).replace(" ", "")


def exact_korquad(answer: str, golds: list[str]) -> float:
    """1 when the answer is one of `golds` by KorQuAD 1.0's definition (Lim et al. 2019, arXiv 1909.07005)."""
    return float(korquad_normalize(answer) in map(korquad_normalize, golds))


def exact(answer: str, golds: list[str]) -> float:
    """KorQuAD's exact match, with spacing left free and one trailing particle or copula allowed: 운장이다 for 운장."""
    answer = squeeze(answer)
    return float(any(answer == gold + end for gold in map(squeeze, golds) for end in ("", *PARTICLES)))


def f1(answer: str, golds: list[str]) -> float:
    """KorQuAD's F1 over characters, the best of `golds`; 1 where `exact` is."""
    if exact(answer, golds):
        return 1.0
    best, given = 0.0, squeeze(answer)
    for gold in map(squeeze, golds):
        common = sum((Counter(given) & Counter(gold)).values())
        best = max(best, 2 * common / (len(given) + len(gold)) if common else 0.0)
    return best


def contains(answer: str, golds: list[str], cap: int | None = None) -> float:
    """1 when one of `golds` stands in an answer of at most `cap` characters; a number not as part of a longer one."""
    if cap is not None and len(answer) > cap:
        return 0.0
    answer = squeeze(answer)
    return float(
        any(re.search(rf"(?<!\d(?=\d)){re.escape(gold)}(?!(?<=\d)\d)", answer) for gold in map(squeeze, golds))
    )


def declines(answer: str, patterns: list[str]) -> float:
    """1 when the first sentence of the answer says that no such thing is known, by one of the quiz's `declines`."""
    first = re.split(r"(?<=[.!?])\s|\n", answer.strip(), maxsplit=1)[0]
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
        self.grams = {hash(text[i : i + self.RUN]) for text in texts for i in range(len(text) - self.RUN + 1)}
        self.text = "\0".join(texts)

    def runs(self, answer: str) -> list[tuple[int, int]]:
        """The (start, end) of each copied run, longest first from the left."""
        found, start = [], 0
        while start + self.RUN <= len(answer):
            end = start + self.RUN
            if hash(answer[start:end]) not in self.grams or answer[start:end] not in self.text:
                start += 1
                continue
            while end < len(answer) and answer[start : end + 1] in self.text:
                end += 1
            found.append((start, end))
            start = end
        return found


def measure(answer: dict, question: dict, declined: list[str], copies: Copies | None, cap: int) -> dict:
    """Every measure of one answer; knowledge is measured where there is an answer to know, invention for tier N."""
    text, golds = answer["answer"], [question["answer"], *question["aliases"]]
    scores = {"ended": float(answer["ended"]), "seq_rep_4": seq_rep_4(text), "declines": declines(text, declined)}
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
        scores["longest_run"] = float(max((end - start for start, end in runs), default=0))
        scores["copied_share"] = sum(end - start for start, end in runs) / len(text) if text else 0.0
        scores["copied_80"] = float(scores["longest_run"] >= 80)
    return scores


# ---- Summaries -----------------------------------------------------------------------------------------------------


def groups_of(question: dict) -> list[str]:
    """The groups whose scores a question enters: its tier, tier C both ways, and B+C together."""
    groups = [question["tier"]]
    if question["tier"] == "C":
        groups.append("C withheld" if question["withheld"] else "C rest")
    return groups + ["B+C"] * (question["tier"] in "BC") + ["all"]


@lru_cache
def resamples(n: int) -> np.ndarray:
    """The weights of n questions in each bootstrap resample: [RESAMPLES, n], rows that sum to 1."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n


def interval(values: list[float]) -> list[float]:
    """[mean, low, high]: the mean and its 95% percentile bootstrap interval (Efron and Tibshirani 1993, ch. 13)."""
    low, high = np.percentile(resamples(len(values)) @ np.array(values), [2.5, 97.5])
    return [round(float(value), 4) for value in (np.mean(values), low, high)]


def summarize(scores: dict[str, dict], questions: dict[str, dict]) -> dict[str, dict]:
    """{group: {"n": questions, measure: interval}} of one model's {question id: measures}.

    A measure is averaged over the questions of the group that have it: tier N has no answer to be exact about.
    """
    groups: dict[str, list[dict]] = {}
    for asked, row in scores.items():
        for group in groups_of(questions[asked]):
            groups.setdefault(group, []).append(row)
    order = [*TIERS, "C withheld", "C rest", "B+C", "all"]
    return {
        group: {
            "n": len(groups[group]),
            **{name: interval([row[name] for row in groups[group] if name in row])
               for name in dict.fromkeys(name for row in groups[group] for name in row)},
        }
        for group in sorted(groups, key=order.index)
    }  # fmt: skip


def compare(scores: dict[str, dict], other: dict[str, dict], questions: dict[str, dict]) -> dict[str, dict]:
    """other minus scores on the same questions, by group: {group: {"n", measure: [difference, low, high]}}."""
    differences = {
        asked: {name: other[asked][name] - value for name, value in row.items()} for asked, row in scores.items()
    }
    return summarize(differences, questions)


def short_name(key: tuple) -> str:
    """A model's name in tables: its folder, its step, and the passage it was given."""
    name, step, passage, examples, file = key
    path = Path(name)
    label = "base" if step == 0 else f"step {step:,}" if step is not None else path.name
    label = f"{label} ({file})" if file else label
    return f"{label} + {passage} passage, {examples} examples" if passage else label


def best_bounds(open_book: dict[tuple, dict[str, dict]], questions: dict[str, dict]) -> list[tuple]:
    """For each passage kind the key whose number of worked examples is better on the development split."""

    def on_dev(key: tuple) -> float:
        right = [row["exact"] for asked, row in open_book[key].items() if questions[asked]["split"] == "dev"]
        return sum(right) / len(right) if right else 0.0

    kinds = dict.fromkeys(key[2] for key in open_book)
    return [max((key for key in open_book if key[2] == kind), key=on_dev) for kind in kinds]


COLUMNS = {  # of the table: (group, measure)
    "A exact": ("A", "exact"),
    "B exact": ("B", "exact"),
    "B F1": ("B", "f1"),
    "C contains": ("C", "contains"),
    "D exact": ("D", "exact"),
    "N invented": ("N", "invented"),
    "copied 80+": ("all", "copied_80"),
    "seq-rep-4": ("all", "seq_rep_4"),
    "ended": ("all", "ended"),
}


def print_table(models: list[dict], console: Console):
    columns = {
        title: place
        for title, place in COLUMNS.items()
        if any(place[1] in model["scores"].get(place[0], {}) for model in models)
    }
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.title = "per cent, with 95% intervals over the questions"
    table.add_column("model", overflow="fold")
    for title, (group, _) in columns.items():
        n = max(model["scores"].get(group, {}).get("n", 0) for model in models)
        lines = [*title.replace("seq-rep", "seq- rep").split(), f"[dim]n {n}[/]"]
        table.add_column("\n".join(lines), justify="right", no_wrap=True)
    for model in models:
        cells = []
        for group, name in columns.values():
            value = model["scores"].get(group, {}).get(name)
            cells.append(f"{100 * value[0]:.1f}\n[dim]{100 * value[1]:.0f}–{100 * value[2]:.0f}[/]" if value else "–")
        table.add_row(model["name"], *cells, style="dim" if model["passage"] else "")
    console.print(table)


# ---- Report --------------------------------------------------------------------------------------------------------


def figure(title: str, lines: list[tuple[str, list, list, list | None]], xlabel: str, ylabel: str) -> str:
    """An SVG of lines (label, x, y, [low, high] or None); a label that begins with `=` is a horizontal bound."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "score"}
    chart, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for label, x, y, band in lines:
        if label.startswith("="):
            axes.axhline(y[0], color="grey", linestyle=":", linewidth=1)
            axes.annotate(label[1:], (1, y[0]), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=7)
            continue
        (line,) = axes.plot(x, y, marker="o", markersize=3, label=label)
        if band:
            axes.fill_between(x, band[0], band[1], color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=(0, 100 if ylabel == "per cent" else None))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    chart.savefig(text, format="svg", metadata={"Date": None})
    plt.close(chart)
    return text.getvalue()[text.getvalue().index("<svg") :]


def figures(models: list[dict], log: list[dict]) -> list[str]:
    """Scores over steps with intervals, the bounds as lines, and the losses of the training log."""
    trained = sorted((m for m in models if m["step"] is not None and not m["passage"]), key=lambda m: m["step"])
    charts = []
    for title, name, groups in (
        ("exact match", "exact", "ABCD"),
        ("contains (capped)", "contains", "ABCD"),
        ("invented", "invented", "N"),
    ):
        lines = []
        for group in groups:
            points = [(m["step"], m["scores"][group][name]) for m in trained if name in m["scores"].get(group, {})]
            if points:
                x, values = [step for step, _ in points], [[100 * v for v in value] for _, value in points]
                band = [[v[1] for v in values], [v[2] for v in values]]
                lines.append((f"tier {group}", x, [v[0] for v in values], band))
        for m in models:
            if m["passage"] and name in m["scores"].get("B+C", {}) and lines:
                lines.append((f"=B+C, {m['name']}", [], [100 * m["scores"]["B+C"][name][0]], None))
        if lines:
            charts.append(figure(title, lines, "step", "per cent"))
    for ending, title in (("loss", "loss"), ("mean_token_accuracy", "token accuracy")):
        names = dict.fromkeys(
            key for entry in log for key in entry if re.fullmatch(rf"(eval_\w+_|eval_)?{ending}", key)
        )
        lines = []
        for name in names:
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            label = name.removesuffix(ending).strip("_").replace("eval_", "evaluation: ") or "training"
            lines.append((label, *map(list, zip(*points, strict=True)), None))
        if lines:
            charts.append(figure(title, lines, "step", title))
    return charts


def marked(text: str, copies: Copies | None) -> list[tuple[str, bool]]:
    """A text cut into (part, whether it is copied)."""
    parts, last = [], 0
    for start, end in copies.runs(text) if copies else []:
        parts += [(text[last:start], False), (text[start:end], True)]
        last = end
    return [part for part in [*parts, (text[last:], False)] if part[0]]


def write_report(folder: Path, result: dict, answers: dict, scores: dict, questions: dict, copies, log: list[dict]):
    """report.html: figures, the table, and every question with all answers side by side."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = []
    for asked, question in questions.items():
        cells = []
        for key, given in answers.items():
            if asked in given:
                row = scores[key][asked]
                right = row["exact"] or row["contains"] if question["answer"] else not row["invented"]
                cells.append({"parts": marked(given[asked]["answer"], copies), "right": bool(right), **given[asked]})
        if cells:
            rows.append({**question, "cells": cells})
    page = environment.get_template("report.html.jinja").render(
        result=result, columns=COLUMNS, tiers=TIERS, rows=rows, names=[short_name(key) for key in answers],
        figures=figures(result["models"], log),
    )  # fmt: skip
    write(folder / "report.html", page)


def write(path: Path, text: str):
    """Writes a file whole or not at all. Raises UserError."""
    beside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


# ---- Main ----------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiz", type=Path, required=True, help="the questions; README.md describes the format")
    parser.add_argument(
        "--answers", type=Path, nargs="+", default=[], help="answers of generate.py; without: check the quiz"
    )
    parser.add_argument(
        "--open_book", type=Path, help="the base model's answers to open_book.py's prompts: the bounds"
    )
    parser.add_argument("--train_file", type=Path, help="what was trained on, to find what is copied from it")
    parser.add_argument(
        "--split", choices=["test", "dev"], default="test", help="dev: the questions to choose settings by"
    )
    parser.add_argument("--contains_cap", type=int, default=100, help="characters beyond which an answer only recites")
    parser.add_argument("--log", type=Path, help="training_log.jsonl, for the report's loss")
    parser.add_argument("--report", type=Path, help="folder for report.html")
    parser.add_argument("--output_file", type=Path, help="default: scores.json beside the first answers")
    args = parser.parse_args()

    about, questions = read_quiz(args.quiz)
    if not args.answers:
        tiers = Counter(question["tier"] for question in questions.values())
        print(
            f"{args.quiz}: {len(questions)} questions, "
            + ", ".join(f"{n} {tier}" for tier, n in sorted(tiers.items()))
        )
        return
    answers = read_answers(args.answers, questions)
    open_book = read_answers([args.open_book], questions) if args.open_book else {}
    chats = read_chats(args.train_file) if args.train_file else []
    copies = Copies([chat["answer"] for chat in chats]) if chats else None
    leaked = leaks(chats, about, questions)
    declined = about.get("declines", [])
    if not declined and any(question["tier"] == "N" for question in questions.values()):
        print(f'note: the first line of {args.quiz} has no "declines", so every answer to tier N counts as invented')

    every = {
        key: {
            asked: measure(row, questions[asked], declined, copies, args.contains_cap) for asked, row in rows.items()
        }
        for key, rows in {**answers, **open_book}.items()
    }
    bounds = best_bounds({key: every[key] for key in open_book}, questions)
    chosen = {asked for asked, question in questions.items() if question["split"] == args.split}
    kept = {key: {asked: row for asked, row in every[key].items() if asked in chosen} for key in [*bounds, *answers]}
    if not any(kept[key] for key in answers):
        raise UserError(f"no answer is to a question of the split {args.split}")
    models = [
        {
            "name": short_name(key), "checkpoint": key[0], "step": key[1], "passage": key[2], "examples": key[3],
            "scores": summarize(kept[key], questions),
        }
        for key in kept if kept[key]
    ]  # fmt: skip
    closed = list(answers)
    comparisons = [
        {
            "of": short_name(later), "with": short_name(earlier),
            "same_answers": sum(answers[later][q]["answer"] == answers[earlier][q]["answer"] for q in kept[later]),
            "difference": compare(kept[earlier], kept[later], questions),
        }
        for earlier, later in dict.fromkeys([*((closed[0], key) for key in closed[1:]), *pairwise(closed)])
    ]  # fmt: skip
    result = {
        "quiz": str(args.quiz), "quiz_sha256": about.get("sha256"), "split": args.split,
        "train_file": str(args.train_file) if args.train_file else None, "contains_cap": args.contains_cap,
        "models": models, "comparisons": comparisons, "leaks": leaked,
    }  # fmt: skip

    console = Console(highlight=False)
    print_table(models, console)
    answered, whole = len(next(iter(kept.values()))), len(chosen)
    if answered < whole:
        print(f"{answered} of the {whole} questions of the split {args.split} were asked")
    if comparisons:
        last = comparisons[len(closed) - 2]
        print(f"{last['of']} against {last['with']}: {last['same_answers']} of {answered} answers are the same")
        for title, (group, name) in COLUMNS.items():
            value = last["difference"].get(group, {}).get(name)
            if value and group in "ABCDN":
                sign = "" if value[1] > 0 or value[2] < 0 else ", within chance"
                print(f"{last['of']} against {last['with']}, {title}: {100 * value[0]:+.1f} "
                      f"[{100 * value[1]:+.1f}, {100 * value[2]:+.1f}]{sign}")  # fmt: skip
    if leaked:
        print(
            f"warning: {args.train_file} gives the quiz away in {len(leaked)} places, so that these figures flatter; "
            f"the first: {leaked[0]}"
        )
    gold = next((model for model in models if model["passage"] == "gold"), None)
    if gold and (contained := gold["scores"].get("B+C", gold["scores"]["all"]).get("contains", [0])[0]) < 0.3:
        print(
            f"note: with the gold passage before its eyes the base model answers {100 * contained:.0f}% of B+C; under "
            "30% that line bounds nothing"
        )
    output = args.output_file or args.answers[0].with_name("scores.json")
    write(output, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    written = [str(output)]
    if args.report:
        log = [json.loads(line) for _, line in read_lines(args.log)] if args.log else []
        write_report(
            args.report, result, answers, every, {q: questions[q] for q in questions if q in chosen}, copies, log
        )
        written.append(str(args.report / "report.html"))
    print("wrote " + ", ".join(written))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"score.py: {e}", file=sys.stderr)
        sys.exit(2)
