"""Train several recipes on the same articles with the same number of tokens, quiz each, and print the table.

Each run leaves one result file in benchmarks/results/<name of the config>/, with its answers; a run whose file is
there is not made again, so a comparison that was stopped goes on.

    python benchmarks/compare.py --config benchmarks/compare.yaml            # make the runs that are missing
    python benchmarks/compare.py --config benchmarks/compare.yaml --table    # only print what there is
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import score  # noqa: E402
from score import UserError  # noqa: E402

MEASURES = {  # of the table: (group, measure)
    "A exact": ("A", "exact"),
    "B exact": ("B", "exact"),
    "A + B contains, uncapped": ("A+B", "contains_uncapped"),
    "C contains": ("C", "contains"),
    "N invented": ("N", "invented"),
    "copied 80+": ("all", "copied_80"),
    "ended": ("all", "ended"),
}
# glibc's allocator, as in the Makefile: otherwise much of each step on a CPU goes to fresh pages.
ALLOCATOR = {"THP_MEM_ALLOC_ENABLE": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "200000000000"}


def run(*command) -> tuple[str, float]:
    """Runs one of our programs from the repository's root: (its standard output, seconds). Raises UserError."""
    print("$ python " + shlex.join(map(str, command)), flush=True)
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={"HF_HUB_OFFLINE": "1", **ALLOCATOR, **os.environ},
        check=False,
    )
    if result.returncode:
        raise UserError(f"{command[0]} returned {result.returncode}; what it said stands above")
    return result.stdout, time.perf_counter() - start


def slug(name: str) -> str:
    """A recipe's name as part of a path."""
    return re.sub(r"\W+", "_", name)


def slice_of(quiz: Path, titles: list[str], output: Path):
    """Writes the questions of a quiz on these articles, and those on what never was."""
    about, questions = score.read_quiz(quiz)
    about = {key: value for key, value in about.items() if key != "sha256"}
    rows = [q for q in questions.values() if q["tier"] == "N" or (q["article"] and set(q["article"]) <= set(titles))]
    score.write(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [{"about": about}, *rows]))


def to_keep(answers: Path) -> list[dict]:
    """What a result file keeps of each answer: all that score.py measures."""
    keys = ("id", "answer", "ended", "passage", "examples")
    return [{key: row[key] for key in keys if key in row} for _, row in score.read_objects(answers)]


def make_run(config: dict, name: str, recipe: dict, seed: int, work: Path, quiz: Path) -> dict:
    """Preprocess, train, ask and measure: one result."""
    data, output = work / slug(name), work / f"{slug(name)}-{seed}"
    run(
        "preprocess.py", *shlex.split(config["preprocess"]), *shlex.split(recipe["preprocess"]),
        "--data_files", config["articles"], "--only_titles", *config["titles"], "--output_dir", data,
    )  # fmt: skip
    train = [
        "train.py", *shlex.split(config["train"]), *shlex.split(recipe["train"]), "--train_file", data / "train.jsonl",
        "--model_name_or_path", config["model_name_or_path"], "--seed", seed, "--output_dir", output,
        "--save_strategy", "no",
    ]  # fmt: skip
    plan, _ = run(*train, "--dry_run")
    step_tokens = int(re.search(r"accumulation = ([\d,]+) tokens", plan)[1].replace(",", ""))
    steps = max(1, round(config["tokens"] / step_tokens))
    about, questions = score.read_quiz(Path(config["quiz"]))
    if leaked := score.leaks(score.read_chats(data / "train.jsonl"), about, questions):
        raise UserError(f"{data}/train.jsonl gives the quiz away: {leaked[0]}")
    told, train_seconds = run(*train, "--max_steps", steps)
    answers = output / "answers.jsonl"
    _, answer_seconds = run(
        "generate.py", *shlex.split(config["generate"]), "--checkpoint", output / "final", "--base_model", "none",
        "--prompts_file", quiz, "--output_file", answers,
    )  # fmt: skip
    log = [json.loads(line) for _, line in score.read_lines(output / "training_log.jsonl")]
    result = {
        "seed": seed, "steps": steps, "tokens": steps * step_tokens,
        "kept": re.search(r"kept: ([\d.]+%)", told)[1],
        "loss": [entry["loss"] for entry in log if "loss" in entry][-1],
        "train_minutes": round(train_seconds / 60, 1), "answer_minutes": round(answer_seconds / 60, 1),
        "answers": to_keep(answers),
    }  # fmt: skip
    shutil.rmtree(output / "final")  # a gigabyte; the result file holds what was found
    return result


def make_base(config: dict, work: Path, quiz: Path) -> dict:
    answers = work / "base.jsonl"
    _, seconds = run(
        "generate.py", *shlex.split(config["generate"]), "--checkpoint", config["model_name_or_path"],
        "--prompts_file", quiz, "--output_file", answers,
    )  # fmt: skip
    return {"answer_minutes": round(seconds / 60, 1), "answers": to_keep(answers)}


def make_open_book(config: dict, work: Path) -> dict:
    """The base model with the passage before its eyes, on the whole quiz: its development split chooses the prompt."""
    prompts, answers = work / "open_book_prompts.jsonl", work / "open_book.jsonl"
    run("tools/open_book.py", "--quiz", config["quiz"], "--articles", config["articles"], "--output_file", prompts)
    _, seconds = run(
        "generate.py", *shlex.split(config["generate"]), "--checkpoint", config["model_name_or_path"],
        "--chat_template_path", "tools/plain_template.jinja", "--max_new_tokens", "32", "--batch_size", "16",
        "--prompts_file", prompts, "--output_file", answers,
    )  # fmt: skip
    return {"answer_minutes": round(seconds / 60, 1), "answers": to_keep(answers)}


def cell(value: list[float] | None) -> str:
    return f"{100 * value[0]:.1f} [{100 * value[1]:.0f}, {100 * value[2]:.0f}]" if value else "–"


def print_table(config: dict, results: dict[str, list[dict]]):
    """The table in Markdown: a line a recipe, the mean over its seeds with intervals over the questions."""
    about, questions = score.read_quiz(Path(config["quiz"]))
    articles = [row for _, row in score.read_objects(Path(config["articles"])) if row["title"] in config["titles"]]
    copies = score.Copies([row["text"] for row in articles])
    asked = {row["id"] for row in results["base"][0]["answers"] if questions[row["id"]]["split"] == "test"}

    def measured(rows: list[dict]) -> dict[str, dict]:
        """{question id: measures}, averaged over the answers of several seeds."""
        found: dict[str, list[dict]] = {}
        for row in rows:
            row = row | {"answer": row["answer"].strip().split("\n")[0]} if "passage" in row else row
            found.setdefault(row["id"], []).append(score.measure(row, questions[row["id"]], about["declines"], copies))
        return {q: {name: sum(row[name] for row in of) / len(of) for name in of[0]} for q, of in found.items()}

    def on_slice(rows: dict[str, dict]) -> dict[str, dict]:
        return {question_id: row for question_id, row in rows.items() if question_id in asked}

    lines = {}
    for result in results["open book"]:
        keys = sorted({("base", None, row["passage"], row["examples"], "") for row in result["answers"]})
        books = {
            key: measured([r for r in result["answers"] if (r["passage"], r["examples"]) == key[2:4]]) for key in keys
        }
        chosen = score.best_bounds(books, questions)
        for key, rows in books.items():
            whole = {q: row for q, row in rows.items() if questions[q]["split"] == "test"}
            value = cell(score.summarize(whole, questions)["B+C"]["contains"])
            mark = " (the development split's choice)" if key in chosen else ""
            print(f"{score.short_name(key)}, B+C of the whole quiz contains: {value}{mark}")
        lines |= {score.short_name(key): on_slice(books[key]) for key in chosen}
    lines |= {
        name: on_slice(measured([row for result in found for row in result["answers"]]))
        for name, found in results.items() if name != "open book"
    }  # fmt: skip
    tables = {name: score.summarize(rows, questions) for name, rows in lines.items()}
    counts = {title: tables["base"][group]["n"] for title, (group, _) in MEASURES.items()}
    print("\n| | " + " | ".join(f"{title} (n {counts[title]})" for title in MEASURES) + " |")
    print("|-" * (len(MEASURES) + 1) + "|")
    for name, table in tables.items():
        cells = [cell(table.get(group, {}).get(measure)) for group, measure in MEASURES.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()
    trained = [name for name in config["recipes"] if results[name]]
    for name in trained:
        found = results[name]
        uncapped = [score.summarize(on_slice(measured(f["answers"])), questions)["A+B"] for f in found]
        shares = [round(100 * summary["contains_uncapped"][0], 1) for summary in uncapped]
        print(
            f"{name}: {found[0]['steps']} steps, {found[0]['tokens']:,} tokens, {found[0]['kept']} of the text kept; "
            f"by seed: last loss {[round(f['loss'], 3) for f in found]}, A + B contains, uncapped {shares}, minutes "
            f"of training {[f['train_minutes'] for f in found]}"
        )
    for earlier, later in pairwise(trained):
        table = score.compare(lines[earlier], lines[later], questions)
        found = {title: table.get(group, {}).get(measure) for title, (group, measure) in MEASURES.items()}
        print(f"{later} minus {earlier}, paired: "
              + ", ".join(f"{title} {cell(v)} p {v[3]:.2g}" for title, v in found.items() if v))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the YAML file that describes the runs")
    parser.add_argument("--table", action="store_true", help="make no run, print those that are there")
    args = parser.parse_args()
    try:
        config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise UserError(f"cannot read {args.config}: {getattr(e, 'strerror', None) or e}") from None
    needed = "quiz articles model_name_or_path tokens seeds titles preprocess train generate recipes".split()
    missing = [key for key in needed if not isinstance(config, dict) or key not in config]
    if missing:
        raise UserError(f"{args.config} does not say {', '.join(missing)}; benchmarks/compare.yaml is an example")
    os.chdir(ROOT)
    folder, work = Path("benchmarks/results") / args.config.stem, Path("outputs") / args.config.stem
    about, _ = score.read_quiz(Path(config["quiz"]))
    # What the results depend on; seeds may be added.
    made_with = {key: value for key, value in config.items() if key != "seeds"} | {
        "quiz_sha256": about["sha256"],
        "recipes_sha256": hashlib.sha256(
            b"".join(Path(path).read_bytes() for path in re.findall(r"configs/\S+\.yaml", str(config)))
        ).hexdigest(),
        "articles_sha256": hashlib.sha256(Path(config["articles"]).read_bytes()).hexdigest(),
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    quiz = work / "quiz.jsonl"
    if not args.table:
        slice_of(Path(config["quiz"]), config["titles"], quiz)
    jobs = {("base", 0): lambda: make_base(config, work, quiz)}
    for seed in config["seeds"]:
        for name, recipe in config["recipes"].items():
            jobs[name, seed] = partial(make_run, config, name, recipe, seed, work, quiz)
    jobs["open book", 0] = lambda: make_open_book(config, work)
    results: dict[str, list[dict]] = {name: [] for name in ("open book", "base", *config["recipes"])}
    for (name, seed), job in jobs.items():
        path = folder / f"{slug(name)}{f'-{seed}' if seed else ''}.json"
        if not path.exists() and not args.table:
            made = {
                "name": name, "made_with": made_with, "commit": commit,
                "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
                "versions": {lib: version(lib) for lib in ("torch", "transformers", "trl", "accelerate")},
                **job(),
            }  # fmt: skip
            score.write(path, json.dumps(made, ensure_ascii=False, indent=1) + "\n")
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key, value in made_with.items() if result["made_with"].get(key) != value]
            if changed:
                raise UserError(f"{path} was made with another {', '.join(changed)}; remove it to make it again")
            results[name].append(result)
    if not results["base"]:
        raise UserError(f"there are no results in {folder} yet; leave out --table")
    print_table(config, results)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"compare.py: {e}", file=sys.stderr)
        sys.exit(2)
