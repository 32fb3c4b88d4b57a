"""Ask each checkpoint of a run as it is saved: sample answers and the quiz score beside the curves of training.

A second program beside train.py: it reads saved checkpoints only, on the CPU unless --gpu names one, and ends when the
run is finished. What it writes lies in RUN/watch: watch.html, the curves with the answers of every save, and with
--quiz report.html, the scores on the development questions. With `report_to: tensorboard` in train.yaml both also
stand in TensorBoard.

    python tools/watch.py --run outputs/demo --config configs/demo/generate.yaml --quiz data/quiz.jsonl
    tensorboard --logdir outputs/demo/tensorboard
"""

import argparse
import json
import os
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path

from jinja2 import Environment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from generate import UserError, step_of  # noqa: E402

PAGE = """<!doctype html>
<html lang="ko"><meta charset="utf-8"><title>{{ run }}</title>
{% if not finished %}<meta http-equiv="refresh" content="30">{% endif %}
<style>
body { font-family: sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5 }
img { max-width: 100% }
td { vertical-align: top; padding: .3rem .8rem .3rem 0; white-space: pre-wrap }
td:first-child { text-align: right; color: #666; white-space: nowrap }
.open { color: #a33 }
</style>
<h1>{{ run }}</h1>
{% if curves %}<img src="data:image/png;base64,{{ curves }}" alt="loss.png">{% endif %}
{% if quiz %}<p>퀴즈 채점: <a href="report.html">report.html</a></p>{% endif %}
{% for question, answers in samples.items() %}
<h2>{{ question }}</h2>
<table>{% for row in answers %}
<tr><td>{{ row.step }}</td><td{% if not row.ended %} class="open"{% endif %}>{{ row.answer }}{% if not row.ended %} … (끝내지 못함){% endif %}</td></tr>
{%- endfor %}</table>
{% endfor %}
</html>
"""  # noqa: E501


def ask(checkpoint: Path, out: Path, gpu: str, *arguments) -> bool:
    """Runs generate.py on one checkpoint; False where it was removed before it could answer. Raises UserError."""
    command = [sys.executable, ROOT / "generate.py", "--checkpoint", checkpoint, "--base_model", "none"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    result = subprocess.run(
        [*command, "--output_file", out, *arguments], env=environment, capture_output=True, text=True
    )
    if result.returncode and (checkpoint / "manifest.json").exists():
        raise UserError((result.stderr.strip().splitlines() or [f"generate.py ended with {result.returncode}"])[-1])
    if result.returncode:
        print(f"skipping {checkpoint}: it was removed before it could be asked", file=sys.stderr)
    return not result.returncode


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def development_questions(quiz: Path, out: Path, titles: list[str] | None = None):
    """Writes the development questions of a quiz, with `titles` those on these articles; the others are for reporting.

    Raises UserError where there are none.
    """
    try:
        rows = [row for row in read_rows(quiz) if isinstance(row, dict) and row.get("split") == "dev"]
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the quiz {quiz}: {e}") from None
    if titles:
        rows = [row for row in rows if row.get("article") and set(row["article"]) <= set(titles)]
    if not rows:
        raise UserError(f"{quiz} has no questions of the split dev{' on these titles' if titles else ''}")
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def score(run: Path, folder: Path, quiz: Path) -> dict[int, dict]:
    """Runs score.py on all answers so far. Returns {step: scores}."""
    command = [sys.executable, ROOT / "tools/score.py", "--quiz", quiz, "--split", "dev", "--report", folder]
    command += ["--output_file", folder / "scores.json", "--answers", *sorted(folder.glob("quiz-*.jsonl"), key=number)]
    if (log := run / "training_log.jsonl").exists():
        command += ["--log", log]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(result.stderr.strip().splitlines()[-1])
    models = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["models"]
    return {model["step"]: model["scores"] for model in models}


def number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def write_page(run: Path, folder: Path, quiz: bool, finished: bool):
    samples: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("samples-*.jsonl"), key=number):
        for row in read_rows(path):
            samples.setdefault(row["prompt"], []).append(row)
    curves = run / "loss.png"
    image = b64encode(curves.read_bytes()).decode() if curves.exists() else ""
    page = Environment(autoescape=True).from_string(PAGE)
    text = page.render(run=run, curves=image, quiz=quiz, samples=samples, finished=finished)
    beside = folder / "watch.html.partial"
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, folder / "watch.html")


def to_tensorboard(run: Path, samples: list[dict], scores: dict | None, step: int):
    """Scores as scalars and answers as text, beside what train.py writes there."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard"), filename_suffix=".watch") as writer:
        text = "\n\n".join(f"**{row['prompt']}**\n\n{row['answer']}" for row in samples)
        writer.add_text("answers", text, step)
        for tier, measures in (scores or {}).items():
            for name in {"exact", "contains", "invented"} & set(measures):
                writer.add_scalar(f"quiz/{name}/{tier}", measures[name][0], step)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of train.py; it need not be there yet")
    parser.add_argument("--config", type=Path, required=True, help="generate.yaml whose questions are asked")
    parser.add_argument("--quiz", type=Path, help="its development questions are asked and scored too")
    parser.add_argument("--gpu", default="", help="number of a GPU to ask on; without: the CPU")
    parser.add_argument("--once", action="store_true", help="ask what is there and stop")
    args = parser.parse_args()
    if not args.config.exists():
        raise UserError(f"there is no {args.config}")
    folder = args.run / "watch"
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "questions.jsonl"
    if args.quiz:
        development_questions(args.quiz, questions)
    tried: set[int] = set()
    while True:
        final = args.run / "final"
        finished = (final / "manifest.json").exists()
        # the manifest is written last: what has one is whole
        whole = [path.parent for path in args.run.glob("checkpoint-*/manifest.json")]
        whole = {step_of(path): path for path in [*whole, *([final] if finished else [])]}
        for step in sorted(set(whole) - tried):
            tried.add(step)
            samples, answers, config = folder / f"samples-{step}.jsonl", folder / f"quiz-{step}.jsonl", args.config
            known = samples.exists()
            if not known and not ask(whole[step], samples, args.gpu, "--config", config):
                continue
            scores = None
            if args.quiz:
                how = ("--config", ROOT / "configs/quiz.yaml", "--prompts_file", questions)
                if answers.exists() or ask(whole[step], answers, args.gpu, *how):
                    scores = score(args.run, folder, args.quiz).get(step)
            write_page(args.run, folder, bool(args.quiz), finished)
            if not known and (args.run / "tensorboard").is_dir():
                to_tensorboard(args.run, read_rows(samples), scores, step)
            told = f", A exact {scores['A']['exact'][0]:.0%}" if scores and "A" in scores else ""
            print(f"step {step:,}: {folder}/watch.html{told}", flush=True)
        if args.once and not whole:
            raise UserError(f"{args.run} holds no whole checkpoint")
        if finished or args.once:
            write_page(args.run, folder, bool(args.quiz), finished)
            return
        time.sleep(5)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"watch.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
