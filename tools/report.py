"""report.html for score.py: figures over steps, the table, and every question with all answers side by side.

The template is report.html.jinja; what it shows comes from score.py's result and the answers it was made from.
"""

import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from jinja2 import Environment, FileSystemLoader  # noqa: E402
from score import COLUMNS, TIERS  # noqa: E402

plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False}


def figure(title: str, lines: list[tuple], bounds: list[tuple], ylabel: str) -> str:
    """An SVG of lines (label, steps, values, [low, high] or None) and of horizontal bounds (label, value)."""
    chart, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for label, x, y, band in lines:
        (line,) = axes.plot(x, y, marker="o", markersize=3, label=label)
        if band:
            axes.fill_between(x, *band, color=line.get_color(), alpha=0.15, linewidth=0)
    for label, value in bounds:
        axes.axhline(value, color="grey", linestyle=":", linewidth=1)
        axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=7)
    axes.set(xlabel="step", ylabel=ylabel, title=title, ylim=(0, 100 if ylabel == "per cent" else None))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    chart.savefig(text, format="svg", metadata={"Date": None})
    plt.close(chart)
    return text.getvalue()[text.getvalue().index("<svg") :]


def figures(models: list[dict], log: list[dict]) -> list[str]:
    """Scores over steps with intervals, a line a run and tier, the bounds across; and the losses of training."""
    runs: dict[tuple, list[dict]] = {}
    for model in models:
        if model["step"] and not model["passage"]:
            runs.setdefault((str(Path(model["checkpoint"]).parent), model["file"]), []).append(model)
    base = [model for model in models if model["step"] == 0][:1]  # of step 0, where every run begins
    charts = []
    for title, name, groups in (
        ("exact match", "exact", ["A", "B", "C", "D"]),
        ("contains (capped)", "contains", ["A", "B", "C", "D", "B+C"]),
        ("invented", "invented", ["N"]),
    ):
        lines = []
        for run, trained in runs.items():
            for group in groups:
                steps = sorted([*base, *trained], key=lambda model: model["step"])
                points = [(m["step"], m["scores"][group][name]) for m in steps if name in m["scores"].get(group, {})]
                if points:
                    x, values = [step for step, _ in points], [[100 * v for v in value] for _, value in points]
                    label = f"tier {group}" + (f", {' '.join(filter(None, run))}" if len(runs) > 1 else "")
                    lines.append((label, x, [v[0] for v in values], [[v[1] for v in values], [v[2] for v in values]]))
        bounds = [
            (f"B+C, {m['name']}", 100 * m["scores"]["B+C"][name][0])
            for m in models if m["passage"] and name in m["scores"].get("B+C", {})
        ]  # fmt: skip
        if lines:
            charts.append(figure(title, lines, bounds, "per cent"))
    for measure, title in (("loss", "loss"), ("mean_token_accuracy", "token accuracy")):
        lines = []
        for name in dict.fromkeys(
            key for entry in log for key in entry if re.fullmatch(rf"(eval_.+_)?{measure}", key)
        ):
            points = [(entry["step"], entry[name]) for entry in log if name in entry and "step" in entry]
            label = "training" if name == measure else f"evaluation: {name[5 : -len(measure) - 1]}"
            if points:
                lines.append((label, *map(list, zip(*points, strict=True)), None))
        if lines:
            charts.append(figure(title, lines, [], title))
    return charts


def render(result: dict, answers: dict, measures: dict, names: dict, questions: dict, copies, log: list[dict]) -> str:
    """The page. `answers` and `measures` are {model: {question id: …}}, `names` {model: name}, `questions` to show."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = []
    for question_id, question in questions.items():
        cells = []
        for key, given in answers.items():
            if question_id in given:
                row, text = measures[key][question_id], given[question_id]["answer"]
                right = row["exact"] or row["contains"] if question["answer"] else not row["invented"]
                parts = copies.marks(text, copies.runs(text)) if copies else [(text, False)]
                cells.append({**given[question_id], "name": names[key], "right": bool(right), "parts": parts})
        if cells:
            rows.append({**question, "cells": cells})
    return environment.get_template("report.html.jinja").render(
        result=result, columns=COLUMNS, tiers=TIERS, rows=rows, figures=figures(result["models"], log)
    )
