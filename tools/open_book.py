r"""Write a quiz as open-book prompts: each question with the passage that BM25 finds, and with the right passage.

What the base model answers to these bounds what a model of its size can answer from memory. Each question is asked
with 0 and with 3 worked examples in the prompt; score.py takes the better number on the development split.

    python tools/open_book.py --quiz data/quiz.jsonl --articles data/sample_articles.jsonl --output_file prompts.jsonl
    python generate.py --checkpoint models/gemma-3-270m --chat_template_path tools/plain_template.jinja \
        --prompts_file prompts.jsonl --max_new_tokens 32 --output_file open_book.jsonl
    python tools/score.py --quiz data/quiz.jsonl --answers answers.jsonl --open_book open_book.jsonl

The template without turns is for a base model, which never saw any; leave it out for a chat model.
Needs `pip install -r requirements-eval.txt`.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from score import UserError, read_objects, read_quiz, write  # noqa: E402

EXAMPLES = 3
SEED = 42


def read_passages(path: Path) -> list[dict]:
    """The paragraphs of articles (JSONL with title and text) as [{"title", "text"}]; in each the title stands first.

    Raises UserError with the line number of a bad line.
    """
    passages = []
    for where, row in read_objects(path):
        try:
            title, text = row["title"] or "", row["text"] or ""
            passages += [{"title": title, "text": f"{title}\n{part}"} for part in text.split("\n") if part.strip()]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{where}: not an article; a line has `title` and `text`") from None
    if not passages:
        raise UserError(f"{path} holds no text")
    return passages


def bigrams(text: str) -> list[str]:
    """The words of a text as overlapping pairs of characters: finds Korean words whatever particle they carry."""
    return [word[i : i + 2] for word in text.split() for i in range(max(1, len(word) - 1))]


def gold_passage(question: dict, passages: list[dict]) -> str:
    """The paragraphs that hold the evidence of a question, one or two. Raises UserError when one is in none."""
    found = []
    for sentence, title in zip(question["evidence"], question["article"], strict=True):
        holds = [p["text"] for p in passages if p["title"] == title and sentence in p["text"]]
        if not holds:
            raise UserError(f"{question['id']}: its evidence stands in no paragraph of the article {title!r}")
        if holds[0] not in found:
            found.append(holds[0])
    return "\n\n".join(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiz", type=Path, required=True, help="the questions")
    parser.add_argument(
        "--articles", type=Path, required=True, help="JSONL with title and text: where the answers stand"
    )
    parser.add_argument("--output_file", type=Path, required=True, help="JSONL of prompts for generate.py")
    parser.add_argument(
        "--prompt",
        default="글을 읽고 물음에 짧게 답하세요.\n\n글: {passage}\n\n물음: {question}\n답:",
        help="what is asked, in the language of the quiz, with {passage} and {question}",
    )
    args = parser.parse_args()
    if "{passage}" not in args.prompt or "{question}" not in args.prompt:
        raise UserError("--prompt needs {passage} and {question}")
    try:
        import bm25s
    except ImportError:
        raise UserError("bm25s is missing; pip install -r requirements-eval.txt") from None

    _, questions = read_quiz(args.quiz)
    passages = read_passages(args.articles)
    golds = {
        question_id: gold_passage(question, passages)
        for question_id, question in questions.items()
        if question["evidence"]
    }
    index = bm25s.BM25()
    index.index([bigrams(passage["text"]) for passage in passages], show_progress=False)
    found, _ = index.retrieve([bigrams(q["question"]) for q in questions.values()], k=1, show_progress=False)
    retrieved = {question_id: passages[best[0]]["text"] for question_id, best in zip(questions, found, strict=True)}

    # Worked examples: of the development split, so that no question that is reported was seen with its answer.
    dev = [question_id for question_id in golds if questions[question_id]["split"] == "dev"]
    if len(dev) < EXAMPLES:
        raise UserError(f"{args.quiz}: {EXAMPLES} questions with evidence and split dev are needed as worked examples")
    worked = random.Random(SEED).sample(dev, EXAMPLES)

    def ask(question_id: str, passage: str) -> str:
        return args.prompt.replace("{question}", questions[question_id]["question"]).replace("{passage}", passage)

    lead = "".join(
        f"{ask(question_id, ' '.join(questions[question_id]['evidence']))} {questions[question_id]['answer']}\n\n\n"
        for question_id in worked
    )
    rows = []
    for kind, texts in (("BM25", retrieved), ("gold", golds)):
        for examples in (0, EXAMPLES):
            for question_id, text in texts.items():
                if question_id not in worked:
                    prompt = (lead if examples else "") + ask(question_id, text)
                    row = {"id": question_id, "passage": kind, "examples": examples, "prompt": prompt}
                    rows.append({**row, "question": questions[question_id]["question"]})
    write(args.output_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    right = sum(retrieved[question_id] in text for question_id, text in golds.items())
    print(f"BM25 finds the passage that answers for {right} of {len(golds)} questions")
    print(f"wrote {len(rows):,} prompts to {args.output_file}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"open_book.py: {e}", file=sys.stderr)
        sys.exit(2)
