"""How long preprocess.py takes on a dump of the real one's size, beside the article's loop and beside plain reading.

Makes a dump of made-up Korean (571,308 articles, about 2 GB of text, parquet), then in turn, each in a process of its
own: reads the two columns that are needed; runs the article's way (load_dataset with an empty cache, its loop, select,
map, to_json); runs preprocess.py with the article's recipe; runs its filter alone, over parquet and over the cache in
which the article's loop has its rows. Both must keep the same articles.

    python benchmarks/preprocess.py                             # 571,308 rows, three rounds
    python benchmarks/preprocess.py --rows 285654 571308 1142616 --rounds 1 --only "preprocess.py" # how it grows
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs/blog/preprocess.yaml"
FILES, ROW_GROUP = 4, 1000  # rows of a group, as the hub's older files have

READ = """
import sys, pyarrow.dataset
dump = pyarrow.dataset.dataset(sys.argv[1:], format="parquet")
for batch in dump.to_batches(columns=["title", "text"], batch_size=1024, batch_readahead=2):
    pass
"""
LOOP = """
import sys, time, yaml
from datasets import disable_progress_bars, load_dataset
disable_progress_bars()
recipe, output, *files = sys.argv[1:]
recipe = yaml.safe_load(open(recipe, encoding="utf-8"))
titles, texts, excluded = (recipe[key] for key in
    ("include_title_keywords", "include_text_keywords", "exclude_title_keywords"))
dataset = load_dataset("parquet", data_files=files, split="train")
start, keep = time.perf_counter(), []
for i, item in enumerate(dataset):
    if any(k in item["title"] for k in titles) and any(k in item["text"] for k in texts):
        if not any(k in item["title"] for k in excluded):
            keep.append(i)
print("filter", time.perf_counter() - start)
kept = dataset.select(keep)
kept = kept.map(lambda row: {"messages": [
    {"role": "user", "content": f"삼국지에서 {row['title']}에 대해 알려줘."},
    {"role": "assistant", "content": row["text"]}]}, remove_columns=kept.column_names)
kept.to_json(output, force_ascii=False)
"""
FILTER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import preprocess
config, cached, *files = sys.argv[2:]
sys.argv = ["preprocess.py", "--config", config, "--data_files", *files]
args, _ = preprocess.parse_args([preprocess.PreprocessArguments], config)
columns = ["title", "text"]
if cached == "cached":  # what open_hub reads, and what the article's loop runs over
    from datasets import load_dataset
    table = load_dataset("parquet", data_files=files, split="train").data.table
    dataset = preprocess.pa.dataset.dataset(table.select(columns))
else:
    dataset = preprocess.open_files(files, columns)
start = time.perf_counter()
preprocess.filter_articles(dataset, args)
print("filter", time.perf_counter() - start)
"""
CACHED = "its filter alone, from the cache that the loop reads"


def make_dump(folder: Path, rows: int, seed: int = 42) -> list[str]:
    """A dump in FILES parquet files: lengths log-normal around 1,270 characters, one title in 800 with a keyword."""
    if (folder / "done").exists():
        return sorted(map(str, folder.glob("*.parquet")))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    syllables = [chr(code) for code in rng.choice(np.arange(0xAC00, 0xD7A4), 600, replace=False)]
    # no made-up word may hold a keyword by chance
    keywords = recipe["include_title_keywords"] + recipe["include_text_keywords"]
    words = {"".join(draw.choices(syllables, k=draw.randint(1, 5))) for _ in range(30_000)}
    words = sorted(word for word in words if not any(keyword in word for keyword in keywords))
    pool = " ".join(np.array(words)[rng.integers(0, len(words), 4_000_000)])
    pool = pool.replace(" " + words[0] + " ", ".\n")  # a line now and then, as the dump has its paragraphs
    schema = pa.schema([(name, pa.string()) for name in ("title", "text", "contributors", "namespace")])
    for number in range(FILES):
        with pq.ParquetWriter(folder / f"train-{number}.parquet", schema) as writer:
            share = [rows * (number + i) // FILES for i in (0, 1)]
            for first in range(*share, ROW_GROUP):
                count = min(ROW_GROUP, share[1] - first)
                lengths = np.minimum(rng.lognormal(6.6, 1.05, count).astype(int) + 20, 200_000)
                starts = rng.integers(0, len(pool) - 200_000, count)
                titles = [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(count)]
                texts = [pool[s : s + n] for s, n in zip(starts, lengths, strict=True)]
                for i in range(count):
                    if draw.random() < 1 / 800:
                        titles[i] += " " + draw.choice(
                            recipe["include_title_keywords"] + recipe["exclude_title_keywords"]
                        )
                        if draw.random() < 0.8:
                            middle = len(texts[i]) // 2
                            texts[i] = texts[i][:middle] + " 나관중 " + texts[i][middle:]
                contributors = [f"user{n},192.0.2.{n % 256}" for n in rng.integers(0, 99999, count)]
                columns = titles, texts, contributors, ["0"] * count
                writer.write_table(pa.table([pa.array(c, pa.string()) for c in columns], schema=schema))
    (folder / "done").touch()
    return sorted(map(str, folder.glob("*.parquet")))


def measure(command: list, env: dict) -> tuple[float, float, str]:
    """(seconds, peak memory in MiB, standard output) of a process, its memory looked at every 20 ms."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
            stdout=output,
        )
        while process.poll() is None:
            with suppress(psutil.Error):
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"{command[0]} returned {process.returncode}")
        output.seek(0)
        return seconds, peak / 2**20, output.read()


def kept(path: Path) -> list[str]:
    """The answers of a file of chats, in order: the texts that were kept."""
    return [json.loads(line)["messages"][1]["content"] for line in path.read_text(encoding="utf-8").splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[571_308], help="articles of the dump; several sizes")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured, in turn")
    parser.add_argument("--only", nargs="+", help="measure only these")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/benchmark_preprocess", help="4 GB of room")
    args = parser.parse_args()
    for rows in args.rows:
        files = make_dump(args.work / f"dump-{rows}", rows)
        bytes_ = sum(os.path.getsize(f) for f in files)
        ours, theirs, cache = args.work / "ours", args.work / "theirs.jsonl", args.work / "cache"
        job = ["preprocess.py", "--config", RECIPE, "--data_files", *files, "--output_dir", ours]
        jobs = {
            "reading the two columns": ["-c", READ, *files],
            "the article's way": ["-c", LOOP, RECIPE, theirs, *files],
            CACHED: ["-c", FILTER, ROOT, RECIPE, "cached", *files],
            "preprocess.py": job,
            "preprocess.py, a second time": job,
            "its filter alone, from parquet": ["-c", FILTER, ROOT, RECIPE, "parquet", *files],
        }
        jobs = {name: job for name, job in jobs.items() if name in (args.only or jobs)}
        both = {"preprocess.py", "the article's way"} <= set(jobs)  # else a file may be of an earlier run
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(args.rounds):
            for name, job in jobs.items():
                if name != CACHED:
                    shutil.rmtree(cache, ignore_errors=True)
                if name == "preprocess.py":
                    shutil.rmtree(ours, ignore_errors=True)
                seconds, peak, output = measure(job, {"HF_DATASETS_CACHE": str(cache)})
                found.setdefault(name, []).append((seconds, peak))
                for line in output.splitlines():
                    if line.startswith("filter "):
                        inner = name if name.startswith("its filter") else "the article's loop alone"
                        if inner == name:
                            found[name].pop()
                        found.setdefault(inner, []).append((float(line.split()[1]), peak))
            if both:
                assert kept(ours / "train.jsonl") == kept(theirs), "the two do not keep the same articles"
        print(f"\n{rows:,} articles, {bytes_ / 1e9:.2f} GB of parquet in {FILES} files, {ROW_GROUP:,} rows a group")
        print(f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}; files in the system's cache")
        if ours.exists():
            print(f"kept: {len(kept(ours / 'train.jsonl'))} articles" + " by both" * both)
        print("| | seconds (median of rounds) | all rounds | peak memory, MiB |\n|-|-|-|-|")
        for name, pairs in found.items():
            seconds = [pair[0] for pair in pairs]
            print(f"| {name} | {statistics.median(seconds):.2f} | {', '.join(f'{s:.2f}' for s in seconds)} "
                  f"| {max(pair[1] for pair in pairs):,.0f} |")  # fmt: skip
        middle = {name: statistics.median(pair[0] for pair in pairs) for name, pairs in found.items()}
        for over, under in (
            ("the article's loop alone", CACHED),
            ("the article's loop alone", "its filter alone, from parquet"),
            ("the article's way", "preprocess.py"),
            ("preprocess.py", "reading the two columns"),
            ("preprocess.py", "preprocess.py, a second time"),
        ):
            if over in middle and under in middle:
                print(f"{over} : {under} = {middle[over] / middle[under]:.2f}")


if __name__ == "__main__":
    main()
