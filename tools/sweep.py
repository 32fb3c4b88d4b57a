"""Train one recipe in many settings, score each by the quiz, and tell what each parameter does, with intervals.

Optuna keeps the study, so that a sweep that was stopped goes on, and prunes what is worse than the median. Each run is
train.py, generate.py and tools/score.py as one would start them by hand: one at a time on each GPU, or on the CPU.

    python tools/sweep.py --config configs/sweep.yaml

Needs `pip install -r requirements-tools.txt`.
"""

import argparse
import hashlib
import itertools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from rich.console import Console
from rich.markdown import Markdown

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from score import RESAMPLES, interval  # noqa: E402
from watch import development_questions  # noqa: E402

from generate import UserError, step_of  # noqa: E402

DEFAULTS = {
    "titles": None, "search": "grid", "trials": 20, "tier": "all", "measure": "contains", "prune": 5, "keep": "best",
}  # fmt: skip
STOPPED = 75  # train.py's exit code when it was asked to stop
DRAWN_WITH = 42


class Interrupted(Exception):
    """Somebody stopped a training run; it was saved, and so the sweep can go on from it."""


def read_config(path: Path) -> dict:
    """sweep.yaml with its defaults. Raises UserError."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f"cannot read {path}: {' '.join(str(e).split())[:300]}") from None
    needed = {"train", "quiz", "output_dir", "space"}
    if not isinstance(config, dict) or not needed <= set(config):
        raise UserError(f"{path} must name train, quiz, output_dir and space")
    known = needed | set(DEFAULTS)
    if unknown := set(config) - known:
        raise UserError(f"{path}: unknown key `{min(unknown)}`; known are {', '.join(sorted(known))}")
    config = DEFAULTS | config
    for key, choices in (("search", ("grid", "random")), ("keep", ("best", "all"))):
        if config[key] not in choices:
            raise UserError(f"{path}: `{key}` must be one of {', '.join(choices)}, not {config[key]}")
    for key, least in (("trials", 1), ("prune", 0)):
        if type(config[key]) is not int or config[key] < least:
            raise UserError(f"{path}: `{key}` must be a whole number from {least}, not {config[key]}")
    if not isinstance(config["space"], dict) or not config["space"]:
        raise UserError(f"{path}: `space` names no parameter")
    for name, values in config["space"].items():
        ranged = isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}
        if not (isinstance(values, list) and values) and not (ranged and config["search"] == "random"):
            raise UserError(f"{path}: `{name}` needs a list of values, or with search: random {{low: …, high: …}}")
    return config


def settings_of(config: dict) -> list[dict]:
    """All combinations, or as many draws as `trials` says, the same each time."""
    space = config["space"]
    if config["search"] == "grid":
        return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    draw = random.Random(DRAWN_WITH)

    def one(values):
        if isinstance(values, list):
            return draw.choice(values)
        low, high = float(values["low"]), float(values["high"])
        return float(f"{low * (high / low) ** draw.random() if values.get('log') else draw.uniform(low, high):.4g}")

    return [{name: one(values) for name, values in space.items()} for _ in range(config["trials"])]


def start(command: list, log: Path, gpu: str | None) -> subprocess.Popen:
    environment = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}
    with open(log, "a", encoding="utf-8") as f:
        return subprocess.Popen([sys.executable, *map(str, command)], stdout=f, stderr=f, env=environment, cwd=ROOT)


def finish(process: subprocess.Popen, log: Path):
    """Waits for a program. Raises UserError with its last line where it failed."""
    if process.wait():
        raise UserError((log.read_text(encoding="utf-8").strip().splitlines() or ["no reason given"])[-1])


def score(checkpoint: Path, folder: Path, config: dict, gpu: str | None) -> float:
    """Asks a checkpoint the development questions, unless that was done, and returns the score."""
    step, log = step_of(checkpoint), folder / "log.txt"
    answers, scores = folder / f"answers-{step}.jsonl", folder / f"scores-{step}.json"
    if not scores.exists():
        asked = ["generate.py", "--config", "configs/quiz.yaml", "--base_model", "none", "--checkpoint", checkpoint]
        questions = folder.parent / "questions.jsonl"
        finish(start([*asked, "--prompts_file", questions, "--output_file", answers], log, gpu), log)
        scored = ["tools/score.py", "--quiz", config["quiz"], "--split", "dev", "--answers", answers]
        finish(start([*scored, "--output_file", scores], log, gpu), log)
    found = json.loads(scores.read_text(encoding="utf-8"))["models"][0]["scores"]
    try:
        value = found[config["tier"]][config["measure"]][0]
    except KeyError:
        raise UserError(f"the development questions have no {config['measure']} of {config['tier']}") from None
    return -value if config["measure"] == "invented" else value


def end_orphans(run: Path):
    """Ends the training of a sweep that was killed; it saves and the sweep goes on from there."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "train.py" in command and str(run) in command:
            process.resume()
            process.terminate()
            process.wait()


def run_trial(trial, config: dict, gpu: str | None) -> float:
    """Trains one setting, scores each checkpoint as it is saved, and returns the last score."""
    import optuna

    settings = {}
    for name, values in config["space"].items():  # what main put into the queue
        if isinstance(values, dict):
            low, high = float(values["low"]), float(values["high"])
            settings[name] = trial.suggest_float(name, low, high, log=bool(values.get("log")))
        else:
            settings[name] = trial.suggest_categorical(name, values)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(config["output_dir"]).absolute() / digest
    run, log = folder / "run", folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    trial.set_user_attr("folder", digest)
    trial.set_user_attr("settings", settings)
    end_orphans(run)
    began, value = time.monotonic(), None
    given = [part for name, chosen in settings.items() for part in (f"--{name}", chosen)]
    training = start(["train.py", "--config", config["train"], *given, "--output_dir", run], log, gpu)
    scored: set[int] = set()
    try:
        while True:
            ended = training.poll() is not None
            whole = {step_of(path.parent): path.parent for path in run.glob("checkpoint-*/manifest.json")}
            for step in sorted(set(whole) - scored):
                scored.add(step)
                # Training waits meanwhile: it would take the cores, and remove the checkpoint that is asked.
                if not ended:
                    training.send_signal(signal.SIGSTOP)
                value = score(whole[step], folder, config, gpu)
                trial.report(value, step)
                if config["prune"] and not ended and trial.should_prune():
                    raise optuna.TrialPruned
                training.send_signal(signal.SIGCONT)
            if ended:
                break
            time.sleep(1)
    finally:
        if training.poll() is None:
            training.send_signal(signal.SIGCONT)
            training.send_signal(signal.SIGTERM)
            training.wait()
        trial.set_user_attr("minutes", round((time.monotonic() - began) / 60, 1))
    if training.returncode == STOPPED:
        raise Interrupted
    if training.returncode == 3:  # the numbers went bad: a result too
        trial.set_user_attr("failed", log.read_text(encoding="utf-8").strip().splitlines()[-1])
        raise optuna.TrialPruned
    finish(training, log)
    if value is None:
        raise UserError(f"{config['train']} saved no checkpoint; set save_steps")
    return value


def free_weights(study, config: dict):
    """Removes the weights of all finished runs but the best."""
    import optuna

    done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and "folder" in t.user_attrs]
    complete = [trial for trial in done if trial.state == optuna.trial.TrialState.COMPLETE]
    best = max(complete, key=lambda trial: trial.value) if complete else None
    for trial in done:
        if trial is not best and trial.state != optuna.trial.TrialState.FAIL:
            run = Path(config["output_dir"]) / trial.user_attrs["folder"] / "run"
            for folder in (*run.glob("checkpoint-*"), run / "final"):
                shutil.rmtree(folder, ignore_errors=True)


def effects(trials: list[tuple[dict, float]], config: dict) -> list[dict]:
    """What each value of each parameter changes: [{"parameter", "value", "against", "n", "effect"}]; effect is [mean,
    low, high], or None where nothing can be compared.

    In a grid the runs that differ in nothing else are compared, pair by pair, and pairs are drawn for the interval
    (score.py's bootstrap). Draws have no such pairs: the runs in the upper half of a range, or with a value, are
    compared with the others, and for the interval runs are drawn on both sides.
    """
    found = []
    for name, values in config["space"].items():
        if config["search"] == "grid":
            blocks: dict[str, dict] = {}
            for settings, value in trials:
                others = json.dumps({k: v for k, v in settings.items() if k != name}, sort_keys=True)
                blocks.setdefault(others, {})[settings[name]] = value
            for value in values[1:]:
                pairs = [
                    block[value] - block[values[0]] for block in blocks.values() if {value, values[0]} <= set(block)
                ]
                effect = interval(pairs, [str(i) for i in range(len(pairs))]) if pairs else None
                row = {"parameter": name, "value": value, "against": values[0], "n": len(pairs), "effect": effect}
                found.append(row)
            continue
        if isinstance(values, dict):
            middle = sorted(settings[name] for settings, _ in trials)[len(trials) // 2] if trials else 0
            halves = [(f"≥ {middle:g}", lambda v, middle=middle: v >= middle)]
        else:
            halves = [(value, lambda v, value=value: v == value) for value in values]
        for label, holds in halves:
            mine, rest = (
                np.array([value for settings, value in trials if holds(settings[name]) == wanted])
                for wanted in (True, False)
            )
            effect = None
            if len(mine) and len(rest):
                draw = np.random.default_rng(0)
                drawn = [draw.choice(group, (RESAMPLES, len(group))).mean(1) for group in (mine, rest)]
                low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
                effect = [round(float(value), 4) for value in (mine.mean() - rest.mean(), low, high)]
            row = {"parameter": name, "value": label, "against": "the others", "n": len(mine), "effect": effect}
            found.append(row)
    return found


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def write_report(study, config: dict):
    """report.md and effects.png, once there are any, in the output folder. Returns the text."""
    import matplotlib
    import optuna

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    states, folder = optuna.trial.TrialState, Path(config["output_dir"])
    finished = [t for t in study.get_trials(deepcopy=False) if t.state in (states.COMPLETE, states.PRUNED)]
    complete = sorted((t for t in finished if t.state == states.COMPLETE), key=lambda trial: -trial.value)
    what, names = f"{config['measure']} of {config['tier']}", list(config["space"])
    lines = [
        f"# {config['train']}: {what}, in per cent",
        "",
        "Development questions, 95% intervals over entities.",
        "",
    ]
    lines += ["| " + " | ".join([*names, "score", "step", "minutes", "folder"]) + " |", "|-" * (len(names) + 4) + "|"]
    for trial in [*complete, *(t for t in finished if t.state == states.PRUNED)]:
        step = max(trial.intermediate_values, default=None)
        told = trial.user_attrs.get("failed", "no checkpoint")
        if step is not None:
            path = folder / trial.user_attrs["folder"] / f"scores-{step}.json"
            score = json.loads(path.read_text("utf-8"))["models"][0]["scores"][config["tier"]][config["measure"]]
            told = f"{percent(score[0])} [{percent(score[1])}, {percent(score[2])}]"
        ended = f"{step}{'' if trial.state == states.COMPLETE else ', pruned'}"
        cells = [*(f"{trial.user_attrs['settings'][name]}" for name in names), told, ended]
        lines.append("| " + " | ".join([*cells, f"{trial.user_attrs['minutes']}", trial.user_attrs["folder"]]) + " |")
    rows = effects([(trial.user_attrs["settings"], trial.value) for trial in complete], config)
    lines += [
        "",
        "## What each parameter does",
        "",
        "Of the runs that went to their end. An interval that holds 0 says",
    ]
    lines += ["nothing yet; with fewer than five runs or pairs (n) it is too narrow.", ""]
    lines += ["| parameter | value | against | n | effect |", "|-|-|-|-|-|"]
    for row in rows:
        effect = row["effect"]
        told = f"{percent(effect[0])} [{percent(effect[1])}, {percent(effect[2])}]" if effect else "not run"
        lines.append(f"| {row['parameter']} | {row['value']} | {row['against']} | {row['n']} | {told} |")
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    shown = [row for row in rows if row["effect"]]
    if not shown:
        return text
    figure, axis = plt.subplots(figsize=(7, 1 + 0.4 * len(shown)), layout="constrained")
    for place, row in enumerate(reversed(shown)):
        mean, low, high = (100 * value for value in row["effect"])
        axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
    axis.axvline(0, color="grey", linewidth=1)
    labels = [f"{row['parameter']} {row['value']} ({row['n']})" for row in reversed(shown)]
    axis.set_yticks(range(len(shown)), labels)
    axis.set(xlabel=f"change of {what}, per cent points", ylim=(-0.5, len(shown) - 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "effects.png", dpi=120)
    plt.close(figure)
    return text


def fingerprint(config: dict) -> dict:
    """What must not change while a sweep goes on."""
    try:
        files = {key: hashlib.sha256(Path(config[key]).read_bytes()).hexdigest() for key in ("train", "quiz")}
    except OSError as e:
        raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
    return files | {key: config[key] for key in ("tier", "measure", "titles")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, default=Path("configs/sweep.yaml"), help="what to vary, and how to score"
    )
    config = read_config(parser.parse_args().config)
    try:
        import optuna
    except ImportError:
        raise UserError("optuna is missing: pip install -r requirements-tools.txt") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for key in ("train", "quiz"):
        config[key] = str(Path(config[key]).absolute())
    same, folder, wanted = fingerprint(config), Path(config["output_dir"]), settings_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    development_questions(Path(config["quiz"]), folder / "questions.jsonl", config["titles"])
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.log")))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=config["prune"])
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction="maximize", pruner=pruner, load_if_exists=True
    )
    if study.user_attrs.get("fingerprint", same) != same:
        raise UserError(f"{folder} holds a sweep of another recipe, quiz or score; choose another output_dir")
    study.set_user_attr("fingerprint", same)
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):  # of a sweep that was killed
        study.tell(trial.number, state=states.FAIL)
    known = [
        t.system_attrs["fixed_params"]
        for t in study.get_trials(states=(states.COMPLETE, states.PRUNED, states.WAITING))
    ]
    missing = [settings for settings in wanted if settings not in known]
    if not known:
        first = [part for name, value in missing[0].items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "train.py", "--config", config["train"], "--dry_run", *first]
        command += ["--output_dir", str(folder / "dry_run")]
        checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if checked.returncode:
            raise UserError((checked.stderr.strip() or checked.stdout.strip()).splitlines()[-1])
        print(checked.stdout.strip())
    for settings in missing:
        study.enqueue_trial(settings)
    left = len(study.get_trials(states=(states.WAITING,)))
    gpus: queue.Queue[str | None] = queue.Queue()
    for gpu in map(str, range(torch.cuda.device_count())):
        gpus.put(gpu)
    if gpus.empty():
        gpus.put(None)
    workers = gpus.qsize()
    print(f"{left} of {len(wanted)} runs to do, {workers} at a time, in {folder}", flush=True)
    began = time.monotonic()

    def objective(trial) -> float:
        gpu = gpus.get()
        try:
            return run_trial(trial, config, gpu)
        finally:
            gpus.put(gpu)

    def told(study, trial):
        if trial.state == states.FAIL:
            return
        if config["keep"] == "best":
            free_weights(study, config)
        write_report(study, config)
        waiting = len(study.get_trials(deepcopy=False, states=(states.WAITING,)))
        each = (time.monotonic() - began) / 60 / max(1, left - waiting)
        value = "pruned" if trial.state == states.PRUNED else percent(trial.value)
        settings = ", ".join(f"{name} {value}" for name, value in trial.user_attrs["settings"].items())
        print(f"{settings}: {value}; {waiting} left, about {each * waiting:.0f} minutes", flush=True)

    try:
        study.optimize(objective, n_trials=left, n_jobs=workers, callbacks=[told]) if left else None
    except (KeyboardInterrupt, Interrupted):
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(STOPPED)
    Console().print(Markdown(write_report(study, config)))
    print(f"wrote {folder}/report.md, effects.png")


def interrupt(number, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except UserError as e:
        print(f"sweep.py: {e}", file=sys.stderr)
        sys.exit(2)
