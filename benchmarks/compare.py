"""Train several recipes on the same articles with the same number of tokens, quiz each, and print the table.

Each run leaves one result file in benchmarks/results/<name of the config>/, with its answers; a run whose file is
there is not made again, so a comparison that was stopped goes on.

    python benchmarks/compare.py --config benchmarks/knowledge.yaml            # make the runs that are missing
    python benchmarks/compare.py --config benchmarks/knowledge.yaml --table    # only print what there is
    python benchmarks/compare.py --config benchmarks/knowledge.yaml --check    # do the recipes still make those rows?
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
    "D contains": ("D", "contains"),
    "N invented": ("N", "invented"),
    "A declined": ("A", "declines"),
    "copied 80+": ("all", "copied_80"),
    "seq-rep-4": ("all", "seq_rep_4"),
    "ended": ("all", "ended"),
}
# Settings that a run gets from here, whatever its YAML files say.
OWN_SETTINGS = (
    "data_files only_titles output_dir train_file model_name_or_path max_steps num_train_epochs seed save_strategy "
    "save_steps save_total_limit logging_steps report_to eval_file eval_strategy eval_steps quiz_file"
).split()


def run(*command) -> tuple[str, float]:
    """Runs one of our programs from the repository's root: (its standard output, seconds). Raises UserError."""
    print("$ python " + shlex.join(map(str, command)), flush=True)
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={"HF_HUB_OFFLINE": "1", **os.environ},
        check=False,
    )
    if result.returncode:
        raise UserError(f"{command[0]} returned {result.returncode}; what it said stands above")
    return result.stdout, time.perf_counter() - start


def settings_of(command: str) -> dict:
    """What a command line `--config FILE --key value …` sets: the values of the file, then its own."""
    words, said = shlex.split(command), {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--") and not following.startswith("--"):
            value = yaml.safe_load(following)
            said |= yaml.safe_load(Path(following).read_text("utf-8")) if word == "--config" else {word[2:]: value}
    return {key: value for key, value in sorted(said.items()) if key not in OWN_SETTINGS}


def perplexity(model: Path | str, work: Path, dtype: str) -> float:
    """Perplexity a byte on the passages outside the topic, by lm-evaluation-harness."""
    output = work / "perplexity"
    shutil.rmtree(output, ignore_errors=True)
    run(
        "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype={dtype}",
        "--include_path", "tools/lm_eval_tasks", "--tasks", "neutral_ko", "--batch_size", "8", "--output_path", output,
    )  # fmt: skip
    found = json.loads(next(output.rglob("results_*.json")).read_text(encoding="utf-8"))
    return round(found["results"]["neutral_ko"]["byte_perplexity,none"], 4)


def computed_in(config: dict) -> str:
    """What the answers are computed in, where the recipe says, else float32: the same for every line of a table."""
    return settings_of(config["generate"])["dtype"].replace("auto", "float32")


def slug(name: str) -> str:
    """A recipe's name as part of a path."""
    return re.sub(r"\W+", "_", name)


def slice_of(quiz: Path, titles: list[str], output: Path):
    """Writes the questions of a quiz on these articles (without titles: on all), and those on what never was."""
    about, questions = score.read_quiz(quiz)
    about = {key: value for key, value in about.items() if key != "sha256"}
    rows = [
        q for q in questions.values()
        if not titles or q["tier"] == "N" or (q["article"] and set(q["article"]) <= set(titles))
    ]  # fmt: skip
    score.write(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [{"about": about}, *rows]))


def to_keep(answers: Path) -> list[dict]:
    """What a result file keeps of each answer: all that score.py measures."""
    keys = ("id", "answer", "ended", "passage", "examples")
    return [{key: row[key] for key in keys if key in row} for _, row in score.read_objects(answers)]


def make_rows(config: dict, name: str, work: Path) -> tuple[Path, str]:
    """Preprocesses for a recipe: the folder, and the sha256 of its train.jsonl."""
    data = work / slug(name)
    run(
        "preprocess.py", *shlex.split(config["preprocess"]), *shlex.split(config["recipes"][name]["preprocess"]),
        "--data_files", config["articles"], "--quiz_file", config["quiz"],
        *(["--only_titles", *config["titles"]] if config["titles"] else ["--only_titles="]),
        "--output_dir", data,
    )  # fmt: skip
    return data, hashlib.sha256((data / "train.jsonl").read_bytes()).hexdigest()


def make_run(config: dict, name: str, recipe: dict, seed: int, work: Path, quiz: Path) -> dict:
    """Preprocess, train, ask and measure: one result."""
    (data, data_sha256), output = make_rows(config, name, work), work / f"{slug(name)}-{seed}"
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
        "data_sha256": data_sha256, "seed": seed, "steps": steps, "tokens": steps * step_tokens,
        "kept": re.search(r"kept: ([\d.]+%)", told)[1],
        "loss": [entry["loss"] for entry in log if "loss" in entry][-1],
        "dev_loss": [entry["eval_quiz_loss"] for entry in log if "eval_quiz_loss" in entry][-1:],
        "kinds": json.loads((data / "report.json").read_text(encoding="utf-8"))["kinds"],
        "train_minutes": round(train_seconds / 60, 1), "answer_minutes": round(answer_seconds / 60, 1),
        "perplexity": perplexity(output / "final", output, computed_in(config)), "answers": to_keep(answers),
    }  # fmt: skip
    shutil.rmtree(output / "final")  # a gigabyte; the result file holds what was found
    return result


def make_base(config: dict, work: Path, quiz: Path) -> dict:
    answers = work / "base.jsonl"
    _, seconds = run(
        "generate.py", *shlex.split(config["generate"]), "--checkpoint", config["model_name_or_path"],
        "--prompts_file", quiz, "--output_file", answers,
    )  # fmt: skip
    outside = perplexity(config["model_name_or_path"], work, computed_in(config))
    return {"answer_minutes": round(seconds / 60, 1), "perplexity": outside, "answers": to_keep(answers)}


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


def print_table(config: dict, results: dict[str, list[dict]], split: str, shown: list[str], plot: Path | None):
    """The table in Markdown: a line a recipe, the mean over its seeds with intervals over the questions."""
    about, questions = score.read_quiz(Path(config["quiz"]))
    articles = [row for _, row in score.read_objects(Path(config["articles"])) if row["text"]]
    copies = score.Copies([row["text"] for row in articles if row["title"] in (config["titles"] or [row["title"]])])
    answered = {row["id"] for row in results["base"][0]["answers"]}
    asked = {q for q in answered if questions[q]["split"] == split}

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
            whole = {q: row for q, row in rows.items() if questions[q]["split"] == split}
            value = cell(score.summarize(whole, questions)["B+C"]["contains"]) if split == "test" else "not asked"
            mark = " (the development split's choice)" if key in chosen else ""
            print(f"{score.short_name(key)}, B+C of the whole quiz contains: {value}{mark}")
        lines |= {score.short_name(key): on_slice(books[key]) for key in chosen}
    made = {name: found for name, found in results.items() if found and name != "open book"}
    lines |= {name: on_slice(measured([r for one in found for r in one["answers"]])) for name, found in made.items()}
    tables = {name: score.summarize(rows, questions) for name, rows in lines.items()}
    columns = {title: at for title, at in MEASURES.items() if at[0] in tables["base"]}
    print("\n| | " + " | ".join(f"{title} (n {tables['base'][at[0]]['n']})" for title, at in columns.items()) + " |")
    print("|-" * (len(columns) + 1) + "|")
    for name, table in tables.items():
        if name in shown or not shown:
            cells = [cell(table.get(group, {}).get(measure)) for group, measure in columns.values()]
            print(f"| {name} | " + " | ".join(cells) + " |")
    print(
        "\n| | seeds | steps | tokens | of the text kept | minutes of training | loss of the development answers "
        "| perplexity a byte outside the topic |"
    )
    print("|-|-|-|-|-|-|-|-|")
    for name, found in made.items():
        minutes, outside = (
            " ".join(f"{one.get(key, '–')}" for one in found) for key in ("train_minutes", "perplexity")
        )
        numbers = (
            (f"{found[0]['steps']} | {found[0]['tokens']:,}", found[0]["kept"]) if name != "base" else ("– | –", "–")
        )
        if name in shown or not shown:
            losses = " ".join(f"{loss:.2f}" for one in found for loss in one.get("dev_loss", [])) or "–"
            print(f"| {name} | {len(found)} | {numbers[0]} | {numbers[1]} | {minutes} | {losses} | {outside} |")
    print()
    for earlier, later in pairwise(
        name for name in config["recipes"] if name in made and (name in shown or not shown)
    ):
        table = score.compare(lines[earlier], lines[later], questions)
        found = {title: table.get(group, {}).get(measure) for title, (group, measure) in columns.items()}
        print(f"{later} minus {earlier}, paired: "
              + ", ".join(f"{title} {cell(v)} p {v[3]:.2g}" for title, v in found.items() if v))  # fmt: skip
    if plot:
        draw(tables, columns, plot)


def draw(tables: dict[str, dict], columns: dict[str, tuple[str, str]], path: Path):
    """Bars with their intervals, a panel a measure, a bar a recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, panels = (
        list(tables)[::-1],
        [t for t in ("A exact", "B exact", "C contains", "N invented", "copied 80+", "ended") if t in columns],
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 0.35 * len(names) + 1), sharey=True, layout="constrained")
    for axis, title in zip(axes, panels, strict=True):
        group, measure = columns[title]
        found = [tables[name].get(group, {}).get(measure) for name in names]
        values = [[100 * v for v in (one or [0] * 3)[:3]] for one in found]
        for at in (i for i, one in enumerate(found) if not one):
            axis.annotate("not asked", (2, at), va="center", color="grey", size=8)
        mean = [v[0] for v in values]
        axis.barh(names, mean, color="#4c72b0", height=0.6)
        axis.hlines(range(len(names)), [v[1] for v in values], [v[2] for v in values], color="black", linewidth=1)
        axis.set(title=f"{title} (n {tables['base'][group]['n']})", xlim=(0, 100), xlabel="%")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the YAML file that describes the runs")
    parser.add_argument("--table", action="store_true", help="make no run, print those that are there")
    parser.add_argument(
        "--check", action="store_true", help="preprocess again: are the results those of today's rows?"
    )
    parser.add_argument("--split", choices=["dev", "test"], default="test", help="dev: what settings may be chosen by")
    parser.add_argument("--rows", nargs="+", default=[], help="make and print only these lines of the table")
    parser.add_argument("--plot", type=Path, help="also draw the table to this PNG")
    args = parser.parse_args()
    try:
        config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
        if isinstance(config, dict) and "like" in config:  # another of these files, but for what stands here
            other = yaml.safe_load((ROOT / config["like"]).read_text(encoding="utf-8"))
            config = other | config | {"recipes": other.get("recipes", {}) | config.get("recipes", {})}
    except (OSError, yaml.YAMLError) as e:
        raise UserError(f"cannot read {args.config}: {getattr(e, 'strerror', None) or e}") from None
    needed = "quiz articles model_name_or_path tokens seeds titles preprocess train generate recipes".split()
    missing = [key for key in needed if not isinstance(config, dict) or key not in config]
    if missing:
        raise UserError(f"{args.config} does not say {', '.join(missing)}; benchmarks/knowledge.yaml is an example")
    os.chdir(ROOT)
    folder, work = Path("benchmarks/results") / args.config.stem, Path("outputs") / args.config.stem
    about, _ = score.read_quiz(Path(config["quiz"]))
    asking = {  # what the base model's answers depend on
        "quiz_sha256": about["sha256"],
        "articles_sha256": hashlib.sha256(Path(config["articles"]).read_bytes()).hexdigest(),
        "model_name_or_path": config["model_name_or_path"],
        "generate": settings_of(config["generate"]),
    }

    def made_with(name: str) -> dict:
        """What a result depends on: the runs of which anything here has changed are refused."""
        if name == "open book":
            return asking
        slice_, recipe = asking | {"titles": config["titles"]}, config["recipes"].get(name, {})
        if not recipe:
            return slice_
        return slice_ | {"tokens": config["tokens"], "train": settings_of(f"{config['train']} {recipe['train']}")}

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    quiz = work / "quiz.jsonl"
    if not args.table and not args.check:
        slice_of(Path(config["quiz"]), config["titles"], quiz)
        for path, command in config.get("prepare", {}).items():
            if not Path(path).exists():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                run(*shlex.split(command))
    jobs = {("base", 0): lambda: make_base(config, work, quiz)}
    for name, recipe in config["recipes"].items():
        for seed in recipe.get("seeds", config["seeds"]):
            jobs[name, seed] = partial(make_run, config, name, recipe, seed, work, quiz)
    jobs["open book", 0] = lambda: make_open_book(config, work)
    results: dict[str, list[dict]] = {name: [] for name in ("open book", "base", *config["recipes"])}
    for (name, seed), job in jobs.items():
        path = folder / f"{slug(name)}{f'-{seed}' if seed else ''}.json"
        wanted = not args.rows or name in args.rows
        if wanted and not path.exists() and not args.table and not args.check:
            made = {
                "name": name, "made_with": made_with(name), "commit": commit,
                "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
                "versions": {lib: version(lib) for lib in ("torch", "transformers", "trl", "accelerate")},
                **job(),
            }  # fmt: skip
            score.write(path, json.dumps(made, ensure_ascii=False, indent=1) + "\n")
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key, value in made_with(name).items() if result["made_with"].get(key) != value]
            if changed:
                raise UserError(f"{path} was made with another {', '.join(changed)}; remove it to make it again")
            results[name].append(result)
    for name, recipe in config["recipes"].items() if args.check else []:
        if absent := [f for f in config.get("prepare", {}) if f in recipe["preprocess"] and not Path(f).exists()]:
            print(f"{name!r} is not looked at: {absent[0]} is not here; without --check it is made")
        elif results[name] and {one["data_sha256"] for one in results[name]} != {make_rows(config, name, work)[1]}:
            raise UserError(f"the rows of {name!r} are not those that its results were made with; remove them")
    if not results["base"]:
        raise UserError(f"there are no results in {folder} yet; leave out --table")
    print_table(config, results, args.split, args.rows, args.plot)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"compare.py: {e}", file=sys.stderr)
        sys.exit(2)
