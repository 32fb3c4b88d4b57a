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
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markdown import Markdown

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import score as scoring  # noqa: E402
from watch import development_questions  # noqa: E402

from generate import UserError, step_of  # noqa: E402

DEFAULTS = {
    "titles": None, "search": "grid", "trials": 20, "tier": "all", "measure": "contains", "prune": 5, "keep": "best",
}  # fmt: skip
STOPPED = 75  # train.py's exit code when it was asked to stop
DRAWN_WITH = 42
OURS = ("output_dir", "resume", "dry_run", "reproduce")  # keys of train.py that the sweep sets, or cannot do with
LOWER_IS_BETTER = ("invented", "seq_rep_4", "copied_80", "copied_share", "longest_run")
ENOUGH = 10  # runs for Optuna's importance, which asks what the best tenth has in common


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
    for key in ("train", "quiz", "output_dir", "tier", "measure"):
        if not isinstance(config[key], str):
            raise UserError(f"{path}: `{key}` must be text, not {config[key]}")
    for key, choices in (("search", ("grid", "random")), ("keep", ("best", "all"))):
        if config[key] not in choices:
            raise UserError(f"{path}: `{key}` must be one of {', '.join(choices)}, not {config[key]}")
    for key, least in (("trials", 1), ("prune", 0)):
        if type(config[key]) is not int or config[key] < least:
            raise UserError(f"{path}: `{key}` must be a whole number from {least}, not {config[key]}")
    if not isinstance(config["space"], dict) or not config["space"]:
        raise UserError(f"{path}: `space` names no parameter")
    for name, values in config["space"].items():
        if name in OURS:
            raise UserError(f"{path}: `{name}` cannot be varied")
        good = isinstance(values, list) and values and all(isinstance(value, str | int | float) for value in values)
        good = good and len(set(values)) == len(values)
        if isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
            with suppress(TypeError, ValueError):
                low, high = float(values["low"]), float(values["high"])
                good = config["search"] == "random" and low < high and (low > 0 or not values.get("log"))
        if not good:
            what = "a list of values, each once, or with search: random {low: …, high: …, log: true}"
            raise UserError(f"{path}: `{name}` needs {what}")
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

    drawn = [{name: one(values) for name, values in space.items()} for _ in range(config["trials"])]
    return [settings for i, settings in enumerate(drawn) if settings not in drawn[:i]]


def start(command: list, log: Path, gpu: str | None) -> subprocess.Popen:
    """Starts a program in a process group of its own: Ctrl-C is for the sweep, which then tells the others."""
    environment = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}
    command = [sys.executable, *map(str, command)]
    with open(log, "a", encoding="utf-8") as f:
        return subprocess.Popen(command, stdout=f, stderr=f, env=environment, cwd=ROOT, process_group=0)


def finish(process: subprocess.Popen, log: Path, stop: threading.Event):
    """Waits for a program. Raises UserError with its last line where it failed, Interrupted when told to stop."""
    while process.poll() is None:
        if stop.wait(0.2):
            process.terminate()
            process.wait()
            raise Interrupted
    if process.returncode:
        said = log.read_text(encoding="utf-8").strip().splitlines() or ["no reason given"]
        raise UserError(f"{said[-1]} (see {log})")


def score(checkpoint: Path, folder: Path, config: dict, gpu: str | None, stop: threading.Event) -> float:
    """Asks a checkpoint the development questions, unless that was done, and returns the score."""
    step, log = step_of(checkpoint), folder / "log.txt"
    answers, scores = folder / f"answers-{step}.jsonl", folder / f"scores-{step}.json"
    if not scores.exists():
        asked = ["generate.py", "--config", "configs/quiz.yaml", "--base_model", "none", "--checkpoint", checkpoint]
        questions = folder.parent / "questions.jsonl"
        finish(start([*asked, "--prompts_file", questions, "--output_file", answers], log, gpu), log, stop)
        scored = ["tools/score.py", "--quiz", config["quiz"], "--split", "dev", "--answers", answers]
        finish(start([*scored, "--output_file", scores], log, gpu), log, stop)
    return read_score(scores, config)[0]


def read_score(path: Path, config: dict) -> list[float]:
    """[mean, low, high] of what is measured."""
    return json.loads(path.read_text(encoding="utf-8"))["models"][0]["scores"][config["tier"]][config["measure"]]


def end_orphans(run: Path):
    """Ends the training of a sweep that was killed; it saves and the sweep goes on from there."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "train.py" in command and str(run) in command:
            with suppress(psutil.NoSuchProcess):
                process.resume()
                process.terminate()
                process.wait()


def run_trial(trial, settings: dict, config: dict, gpu: str | None, stop: threading.Event) -> float:
    """Trains one setting, scores each checkpoint as it is saved, and returns the last score."""
    import optuna

    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(config["output_dir"]) / digest  # of the same settings always the same: an interrupted run goes on
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
            saved = [*run.glob("checkpoint-*/manifest.json"), *run.glob("final/manifest.json")]  # it is written last
            whole = {step_of(path.parent): path.parent for path in saved}
            for step in sorted(set(whole) - scored):
                # Training waits meanwhile: it would take the cores, and remove the checkpoint that is asked.
                if not ended:
                    training.send_signal(signal.SIGSTOP)
                if (whole[step] / "manifest.json").exists():  # else it was removed for a newer one
                    scored.add(step)
                    value = score(whole[step], folder, config, gpu, stop)
                    trial.report(value, step)
                    if config["prune"] and not ended and trial.should_prune():
                        raise optuna.TrialPruned
                training.send_signal(signal.SIGCONT)
            if ended:
                break
            if stop.wait(0.2):
                raise Interrupted
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
    finish(training, log, stop)
    return value


def best_first(trials: list, config: dict) -> list:
    return sorted(trials, key=lambda trial: trial.value, reverse=config["measure"] not in LOWER_IS_BETTER)


def fits(settings: dict, space: dict) -> bool:
    """Whether a run belongs to the space as it is now: it may have been changed since."""
    return settings.keys() == space.keys() and all(
        float(values["low"]) <= settings[name] <= float(values["high"]) if isinstance(values, dict)
        else settings[name] in values
        for name, values in space.items()
    )  # fmt: skip


def free_weights(study, config: dict):
    """Removes the weights of all finished runs but the best, unless all are to be kept."""
    import optuna

    if config["keep"] == "all":
        return
    done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and "folder" in t.user_attrs]
    complete = [trial for trial in done if trial.state == optuna.trial.TrialState.COMPLETE]
    best = best_first(complete, config)[0] if complete else None
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

    def tell(parameter: str, value, against, n: int, effect: list[float] | None):
        found.append({"parameter": parameter, "value": value, "against": against, "n": n, "effect": effect})

    for name, values in config["space"].items():
        if config["search"] == "grid":
            blocks: dict[str, dict] = {}
            for settings, value in trials:
                others = json.dumps({k: v for k, v in settings.items() if k != name}, sort_keys=True)
                blocks.setdefault(others, {})[settings[name]] = value
            first = values[0]
            for value in values[1:]:
                pairs = [block[value] - block[first] for block in blocks.values() if {value, first} <= set(block)]
                effect = scoring.interval(pairs, list(map(str, range(len(pairs))))) if pairs else None
                tell(name, value, first, len(pairs), effect)
            continue
        if isinstance(values, dict):
            middle = sorted(settings[name] for settings, _ in trials)[len(trials) // 2] if trials else 0
            halves = [(f"≥ {middle:g}", lambda v, middle=middle: v >= middle)]
        else:
            halves = [(value, lambda v, value=value: v == value) for value in values if len(values) > 1]
        for label, holds in halves:
            mine = np.array([value for settings, value in trials if holds(settings[name])])
            rest = np.array([value for settings, value in trials if not holds(settings[name])])
            effect = None
            if len(mine) and len(rest):
                draw = np.random.default_rng(0)
                drawn = [draw.choice(group, (scoring.RESAMPLES, len(group))).mean(1) for group in (mine, rest)]
                low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
                effect = [round(float(value), 4) for value in (mine.mean() - rest.mean(), low, high)]
            tell(name, label, "the others", len(mine), effect)
    return found


def importances(trials: list[tuple[dict, float]], config: dict) -> dict[str, float]:
    """Optuna's importance of each parameter (PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255), the largest first."""
    import optuna

    ranges = {
        name: optuna.distributions.FloatDistribution(float(of["low"]), float(of["high"]), log=bool(of.get("log")))
        if isinstance(of, dict) else optuna.distributions.CategoricalDistribution(of)
        for name, of in config["space"].items() if isinstance(of, dict) or len(of) > 1
    }  # fmt: skip
    study = optuna.create_study(direction=direction(config))
    for settings, value in trials:
        chosen = {name: settings[name] for name in ranges}
        study.add_trial(optuna.trial.create_trial(params=chosen, distributions=ranges, value=value))
    return optuna.importance.get_param_importances(study)


def direction(config: dict) -> str:
    return "minimize" if config["measure"] in LOWER_IS_BETTER else "maximize"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_interval(value: list[float]) -> str:
    mean, low, high = map(percent, value)
    return f"{mean} [{low}, {high}]"


def write_report(study, config: dict) -> str:
    """report.md and effects.png, once there are any, in the output folder. Returns the text."""
    import optuna

    states, folder, space = optuna.trial.TrialState, Path(config["output_dir"]), config["space"]
    names = [name for name, values in space.items() if len(values) > 1]  # a range has two ends
    every = [t for t in study.get_trials(deepcopy=False) if "folder" in t.user_attrs]
    shown = [trial for trial in every if fits(trial.user_attrs["settings"], space)]
    complete = best_first([trial for trial in shown if trial.state == states.COMPLETE], config)
    pruned = [trial for trial in shown if trial.state == states.PRUNED]
    what = f"{config['measure']} of {config['tier']}"
    lines = [f"# {config['train']}: {what}, in per cent", ""]
    lines += ["Development questions, 95% intervals over entities; the loss is the last that was logged."]
    lines += [f"In all runs {name} is {value[0]}." for name, value in space.items() if name not in names]
    lines += ["", "| " + " | ".join([*names, "score", "loss", "step", "minutes", "folder"]) + " |"]
    lines += ["|-" * (len(names) + 5) + "|"]
    for trial in [*complete, *pruned]:
        settings, mine = trial.user_attrs["settings"], folder / trial.user_attrs["folder"]
        step, told = max(trial.intermediate_values, default=None), trial.user_attrs.get("failed", "no checkpoint")
        if step is not None:
            told = with_interval(read_score(mine / f"scores-{step}.json", config))
        log = mine / "run/training_log.jsonl"
        logged = scoring.read_objects(log) if log.exists() else []
        loss = [f"{row['loss']:.2f}" for _, row in logged if "loss" in row][-1:] or ["–"]
        early = ", NaN" if "failed" in trial.user_attrs else ", pruned"
        ended = f"{step}{'' if trial.state == states.COMPLETE else early}"
        minutes = sum(t.user_attrs.get("minutes", 0) for t in every if t.user_attrs["folder"] == mine.name)
        cells = [*(f"{settings[name]}" for name in names), told, *loss, ended, f"{minutes:.1f}", mine.name]
        lines.append("| " + " | ".join(cells) + " |")
    runs = [(trial.user_attrs["settings"], trial.value) for trial in complete]
    rows = effects(runs, config)
    lines += ["", "## What each parameter does", ""]
    lines += ["Change of the score, of the runs that went to their end. An interval that holds 0 says"]
    lines += ["nothing yet; with fewer than five runs or pairs (n) it is too narrow."]
    if pruned:
        lines += [f"{len(pruned)} were stopped early and are missing here, which makes effects look smaller."]
    lines += ["", "| parameter | value | against | n | effect | |", "|-|-|-|-|-|-|"]
    for row in rows:
        effect = row["effect"]
        # of one there is no interval
        told = "not run" if not effect else with_interval(effect) if row["n"] > 1 else percent(effect[0])
        verdict = "holds 0" if effect and effect[1] <= 0 <= effect[2] and row["n"] > 1 else ""
        cells = [row["parameter"], row["value"], row["against"], row["n"], told, verdict]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if len(complete) >= ENOUGH:
        told = ", ".join(f"{name} {share:.0%}" for name, share in importances(runs, config).items())
        lines += ["", f"Optuna's importance for being among the best tenth (PED-ANOVA, without intervals): {told}."]
    text = "\n".join(lines) + "\n"
    scoring.write(folder / "report.md", text)
    draw([row for row in rows if row["effect"] and row["n"] > 1], what, folder / "effects.png")
    return text


def draw(rows: list[dict], what: str, path: Path):
    """The effects with their intervals, one below the other."""
    from matplotlib.figure import Figure  # without pyplot, which is for one thread

    if not rows:
        return
    axis = Figure(figsize=(7, 1 + 0.4 * len(rows)), layout="constrained").subplots()
    for place, row in enumerate(reversed(rows)):
        mean, low, high = (100 * value for value in row["effect"])
        axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
    axis.axvline(0, color="grey", linewidth=1)
    labels = [f"{row['parameter']} {row['value']} ({row['n']})" for row in reversed(rows)]
    axis.set_yticks(range(len(rows)), labels)
    axis.set(xlabel=f"change of {what}, per cent points", ylim=(-0.5, len(rows) - 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    axis.figure.savefig(path, dpi=120)


def fingerprint(config: dict) -> dict:
    """What must not change while a sweep goes on: digests of recipe, quiz and rows, and what is measured."""
    try:
        files = {key: hashlib.sha256(Path(config[key]).read_bytes()).hexdigest() for key in ("train", "quiz")}
        recipe = yaml.safe_load(Path(config["train"]).read_text(encoding="utf-8"))
        for path in config["space"].get("train_file") or [recipe["train_file"]]:
            if (ROOT / path).is_file():  # else train.py will tell
                files[path] = hashlib.sha256((ROOT / path).read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
    except (ValueError, LookupError, TypeError, yaml.YAMLError):
        raise UserError(f"{config['train']} is no recipe with a train_file") from None
    return files | {key: config[key] for key in ("tier", "measure", "titles")}


def check_measure(config: dict):
    """Raises UserError where the development questions do not give the score that is asked for."""
    _, questions = scoring.read_quiz(Path(config["quiz"]))
    asked = [row["id"] for _, row in scoring.read_objects(Path(config["output_dir"]) / "questions.jsonl")]
    blank, copies = {"answer": "", "ended": True}, scoring.Copies([""])
    found = scoring.summarize({q: scoring.measure(blank, questions[q], [], copies) for q in asked}, questions)
    known = found.get(config["tier"], {}).keys() - {"n"}
    if config["measure"] not in known:
        there = f"; there are {', '.join(sorted(known))}" if known else f"; there are the groups {', '.join(found)}"
        raise UserError(f"the development questions have no {config['measure']} of {config['tier']}{there}")


def check_settings(missing: list[dict], tried: list[dict], config: dict):
    """Lets train.py plan, without a step, runs in which each value stands once. Raises UserError."""

    def values(settings: dict) -> set:
        return {(k, None if isinstance(config["space"].get(k), dict) else v) for k, v in settings.items()}

    seen = set().union(*map(values, tried))
    while missing:
        settings = max(missing, key=lambda settings: len(values(settings) - seen))
        if values(settings) <= seen:
            return
        command = [sys.executable, "train.py", "--config", config["train"], "--dry_run"]
        command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        command += ["--output_dir", str(Path(config["output_dir"]) / "dry_run")]
        checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if checked.returncode:
            raise UserError((checked.stderr.strip() or checked.stdout.strip()).splitlines()[-1])
        if not seen:
            print(checked.stdout.strip())
        seen |= values(settings)


def open_study(folder: Path, config: dict):
    """The study in the folder, new or to be gone on with. Raises UserError where it is another one."""
    import optuna

    path = folder / "study.log"
    # This process alone is at work here, so what a killed one left can go: Optuna's lock, half a line.
    path.with_name("study.log.lock").unlink(missing_ok=True)
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole[0]) + len(whole[1]))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=config["prune"])
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction=direction(config), pruner=pruner, load_if_exists=True
    )
    now, then = fingerprint(config), study.user_attrs.get("fingerprint", {})
    if changed := [key for key in then if then[key] != now.get(key, then[key])]:
        what = f"{folder} holds a sweep of another recipe, quiz or score ({', '.join(changed)} changed)"
        raise UserError(f"{what}; choose another output_dir")
    study.set_user_attr("fingerprint", then | now)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):  # of a sweep that was killed
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def run_all(study, missing: list[dict], config: dict):
    """Runs all settings, one at a time on each GPU. The first error, or a signal, stops and saves them all."""
    import optuna

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    names = names[: torch.cuda.device_count()] or [None]
    gpus: queue.Queue[str | None] = queue.Queue()
    for name in names:
        gpus.put(name)
    print(f"{len(missing)} of {len(settings_of(config))} runs to do, {len(names)} at a time, in "
          f"{config['output_dir']}", flush=True)  # fmt: skip
    began, left, stop, states = time.monotonic(), len(missing), threading.Event(), optuna.trial.TrialState

    def one(settings: dict) -> tuple[dict, str]:
        gpu, state = gpus.get(), states.FAIL
        try:
            if stop.is_set():
                raise Interrupted
            trial, value = study.ask(), None
            try:
                value = run_trial(trial, settings, config, gpu, stop)
                state = states.COMPLETE
            except optuna.TrialPruned:
                state = states.PRUNED
            finally:
                study.tell(trial, value, state=state)
            return settings, "pruned" if value is None else percent(value)
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(len(names)) as pool:
        try:
            for done in as_completed([pool.submit(one, settings) for settings in missing]):
                settings, value = done.result()
                left -= 1
                free_weights(study, config)
                write_report(study, config)
                each = (time.monotonic() - began) / 60 / (len(missing) - left)
                told = ", ".join(f"{name} {of}" for name, of in settings.items())
                print(f"{told}: {value}; {left} left, about {each * left:.0f} minutes", flush=True)
        except BaseException:
            print("stopping what runs; it is saved first", file=sys.stderr, flush=True)
            stop.set()
            raise


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
    for key in ("train", "quiz", "output_dir"):
        config[key] = str(Path(config[key]).absolute())
    folder, wanted = Path(config["output_dir"]), settings_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another sweep.py is at work in {folder}") from None
    study = open_study(folder, config)
    development_questions(Path(config["quiz"]), folder / "questions.jsonl", config["titles"])
    check_measure(config)
    states = optuna.trial.TrialState
    tried = [trial for trial in study.get_trials(deepcopy=False) if "settings" in trial.user_attrs]
    known = [trial.user_attrs["settings"] for trial in tried if trial.state in (states.COMPLETE, states.PRUNED)]
    missing = [settings for settings in wanted if settings not in known]
    check_settings(missing, [trial.user_attrs["settings"] for trial in tried], config)
    run_all(study, missing, config)
    free_weights(study, config)  # once more, for a sweep that was killed before it could
    Console().print(Markdown(write_report(study, config)))
    print(f"wrote {folder}/report.md, effects.png")


def interrupt(number, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except (UserError, scoring.UserError) as e:
        print(f"sweep.py: {e}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Interrupted):
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(STOPPED)
