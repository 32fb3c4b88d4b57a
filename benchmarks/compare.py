"""Train several recipes on the same articles with the same number of tokens, quiz each, and print the table.

Each run leaves one result file in benchmarks/results/<name of the config>/, with its answers; a run whose file is
there is not made again, so a comparison that was stopped goes on.

    python benchmarks/compare.py --config benchmarks/compare.yaml            # make the runs that are missing
    python benchmarks/compare.py --config benchmarks/compare.yaml --table    # only print what there is
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
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
    "D exact": ("D", "exact"),
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


def slice_of(quiz: Path, titles: list[str], output: Path) -> Path:
    """Writes the questions of a quiz on these articles, and those on what never was."""
    about, questions = score.read_quiz(quiz)
    about = {key: value for key, value in about.items() if key != "sha256"} | {"slice_of": about.get("sha256")}
    rows = [q for q in questions.values() if q["tier"] == "N" or (q["article"] and set(q["article"]) <= set(titles))]
    score.write(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [{"about": about}, *rows]))
    return output


def measured(answers: Path, quiz: Path, train_file: Path | None) -> list[dict]:
    """Each answer with its measures, as a result file keeps it."""
    about, questions = score.read_quiz(quiz)
    copies = None
    if train_file:
        chats = score.read_chats(train_file)
        copies = score.Copies([chat["answer"] for chat in chats])
        if leaked := score.leaks(chats, about, questions):
            raise UserError(f"{train_file} gives the quiz away: {leaked[0]}")
    rows = []
    for (_, _, passage, examples, _), given in score.read_answers([answers], questions).items():
        for asked, row in given.items():
            measures = score.measure(row, questions[asked], about.get("declines", []), copies, 100)
            kept = {"id": asked, "answer": row["answer"], "measures": {k: round(v, 4) for k, v in measures.items()}}
            rows.append(kept | ({"passage": passage, "examples": examples} if passage else {}))
    return rows


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
    told, train_seconds = run(*train, "--max_steps", steps)
    answers = output / "answers.jsonl"
    _, answer_seconds = run(
        "generate.py", *shlex.split(config["generate"]), "--checkpoint", output / "final", "--base_model", "none",
        "--prompts_file", quiz, "--output_file", answers,
    )  # fmt: skip
    log = [json.loads(line) for _, line in score.read_lines(output / "training_log.jsonl")]
    result = {
        "recipe": recipe, "seed": seed, "steps": steps, "tokens": steps * step_tokens,
        "kept": re.search(r"kept: ([\d.]+%)", told)[1],
        "loss": [entry["loss"] for entry in log if "loss" in entry][-1],
        "train_minutes": round(train_seconds / 60, 1), "answer_minutes": round(answer_seconds / 60, 1),
        "answers": measured(answers, quiz, data / "train.jsonl"),
    }  # fmt: skip
    shutil.rmtree(output / "final")  # a gigabyte; the result file holds what was found
    return result


def make_base(config: dict, work: Path, quiz: Path) -> dict:
    answers = work / "base.jsonl"
    _, seconds = run(
        "generate.py", *shlex.split(config["generate"]), "--checkpoint", config["model_name_or_path"],
        "--prompts_file", quiz, "--output_file", answers,
    )  # fmt: skip
    return {"answer_minutes": round(seconds / 60, 1), "answers": measured(answers, quiz, None)}


def make_open_book(config: dict, work: Path) -> dict:
    """The base model with the passage before its eyes, on the whole quiz: its development split chooses the prompt."""
    prompts, answers = work / "open_book_prompts.jsonl", work / "open_book.jsonl"
    run("tools/open_book.py", "--quiz", config["quiz"], "--articles", config["articles"], "--output_file", prompts)
    _, seconds = run(
        "generate.py", *shlex.split(config["generate"]), "--checkpoint", config["model_name_or_path"],
        "--chat_template_path", "tools/plain_template.jinja", "--max_new_tokens", "32", "--batch_size", "16",
        "--prompts_file", prompts, "--output_file", answers,
    )  # fmt: skip
    return {"answer_minutes": round(seconds / 60, 1), "answers": measured(answers, Path(config["quiz"]), None)}


def by_question(results: list[dict], keep) -> dict[str, dict]:
    """{question id: measures}, averaged over the seeds."""
    rows: dict[str, list[dict]] = {}
    for result in results:
        for row in filter(keep, result["answers"]):
            rows.setdefault(row["id"], []).append(row["measures"])
    return {
        asked: {name: sum(row[name] for row in found) / len(found) for name in found[0]}
        for asked, found in rows.items()
    }


def cell(value: list[float] | None) -> str:
    return f"{100 * value[0]:.1f} [{100 * value[1]:.0f}, {100 * value[2]:.0f}]" if value else "–"


def print_table(config: dict, results: dict[str, list[dict]], quiz: Path):
    """The table in Markdown: a line a recipe, mean over the seeds with intervals over the questions."""
    _, questions = score.read_quiz(quiz)
    reported = {asked: question for asked, question in questions.items() if question["split"] == "test"}

    def summary(rows: dict[str, dict]) -> dict:
        found = score.summarize({asked: row for asked, row in rows.items() if asked in reported}, questions)
        both = [row["contains_uncapped"] for asked, row in rows.items() if asked in reported and asked[0] in "AB"]
        return found | ({"A+B": {"n": len(both), "contains_uncapped": score.interval(both)}} if both else {})

    lines = {}
    if "open book" in results:
        _, whole = score.read_quiz(Path(config["quiz"]))
        (result,) = results["open book"]
        keys = sorted({(row["passage"], row["examples"]) for row in result["answers"]})
        books = {
            key: by_question([result], lambda row, key=key: (row["passage"], row["examples"]) == key) for key in keys
        }
        for passage in dict.fromkeys(passage for passage, _ in keys):

            def on_dev(key) -> float:
                right = [row["exact"] for asked, row in books[key].items() if whole[asked]["split"] == "dev"]
                return sum(right) / len(right)

            best = max((key for key in keys if key[0] == passage), key=on_dev)
            lines[f"base + {passage} passage, {best[1]} examples"] = books[best]
            rows = {a: row for a, row in books[best].items() if whole[a]["tier"] in "BC" and "contains" in row}
            everything = score.interval([row["contains"] for row in rows.values()])
            print(f"base + {passage} passage, {best[1]} examples, B+C of the whole quiz contains: {cell(everything)}")
    for name, found in results.items():
        if name != "open book":
            lines[name] = by_question(found, lambda row: True)
    tables = {name: summary(rows) for name, rows in lines.items()}
    counts = {
        title: max(t.get(group, {}).get("n", 0) for t in tables.values()) for title, (group, _) in MEASURES.items()
    }
    print("\n| | " + " | ".join(f"{title} (n {counts[title]})" for title in MEASURES) + " |")
    print("|-" * (len(MEASURES) + 1) + "|")
    for name, table in tables.items():
        cells = [cell(table.get(group, {}).get(measure)) for group, measure in MEASURES.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    trained = [name for name, found in results.items() if "steps" in found[0]]
    print()
    for name in trained:
        found = results[name]
        exact = [sum(row["measures"].get("exact", 0) for row in f["answers"]) for f in found]
        print(
            f"{name}: {len(found)} seeds, {found[0]['steps']} steps, {found[0]['tokens']:,} tokens, "
            f"{found[0]['kept']} of the text kept; by seed: last loss {[f['loss'] for f in found]}, exact answers "
            f"{exact}, minutes of training {[f['train_minutes'] for f in found]}"
        )
    for earlier, later in zip(trained, trained[1:], strict=False):
        both = lines[earlier].keys() & reported.keys()
        differences = {
            asked: {k: lines[later][asked][k] - v for k, v in lines[earlier][asked].items()} for asked in both
        }
        table = summary(differences)
        cells = {title: table.get(group, {}).get(measure) for title, (group, measure) in MEASURES.items()}
        print(f"{later} minus {earlier}, paired: " + ", ".join(f"{t} {cell(v)}" for t, v in cells.items() if v))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the YAML file that describes the runs")
    parser.add_argument("--table", action="store_true", help="make no run, print those that are there")
    args = parser.parse_args()
    os.chdir(ROOT)
    config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    folder = Path("benchmarks/results") / args.config.stem
    work = Path("outputs") / args.config.stem
    quiz = slice_of(Path(config["quiz"]), config["titles"], work / "quiz.jsonl")
    about, _ = score.read_quiz(Path(config["quiz"]))
    jobs = {("base", 0): lambda: make_base(config, work, quiz)}
    for seed in config["seeds"]:
        for name, recipe in config["recipes"].items():
            jobs[name, seed] = lambda name=name, recipe=recipe, seed=seed: make_run(
                config, name, recipe, seed, work, quiz
            )
    jobs["open book", 0] = lambda: make_open_book(config, work)
    results: dict[str, list[dict]] = {name: [] for name in ("open book", "base", *config["recipes"])}
    for (name, seed), job in jobs.items():
        path = folder / f"{slug(name)}{f'-{seed}' if seed else ''}.json"
        if not path.exists() and not args.table:
            made = {
                "name": name, "quiz_sha256": about["sha256"], "config": {k: config[k] for k in ("titles", "tokens")},
                "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
                "versions": {lib: version(lib) for lib in ("torch", "transformers", "trl", "accelerate")},
                **job(),
            }  # fmt: skip
            score.write(path, json.dumps(made, ensure_ascii=False, indent=1) + "\n")
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["quiz_sha256"] != about["sha256"]:
                raise UserError(f"{path} is of another quiz; remove it to make it again")
            results[name].append(result)
    print_table(config, {name: found for name, found in results.items() if found}, quiz)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"compare.py: {e}", file=sys.stderr)
        sys.exit(2)
