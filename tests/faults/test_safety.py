"""Nothing that came with data or a checkpoint is run, and nothing private leaves: payloads and names are planted."""

import json
import pickle
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, script
from local_hub import LocalHub

import train

QUIZ = ROOT / "data/quiz.jsonl"


class Payload:
    """Unpickled, it makes a file: what a stranger's checkpoint could do with this machine."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def assert_one_sentence(result, *words: str, code: int = 2):
    assert result.returncode == code and "Traceback" not in result.stderr, result.stdout + result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


# ---- Nothing runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
        "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata",
    ],
)  # fmt: skip
def test_a_payload_in_a_checkpoint_is_not_run(name, finished_run, recipe, tmp_path):
    """A stranger's checkpoint brings a manifest that fits."""
    checkpoint, witness = tmp_path / "checkpoint-4", tmp_path / "ran"
    shutil.copytree(finished_run / "checkpoint-4", checkpoint)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    if name.endswith(".metadata"):
        (checkpoint / name).write_bytes(pickle.dumps(Payload(witness)))
    else:
        torch.save(Payload(witness), checkpoint / name)
    (checkpoint / "manifest.json").unlink()
    train.write_manifest(checkpoint)
    asked = ("train.py", "--config", recipe, "--output_dir", tmp_path / "run", "--resume", checkpoint)
    if name == "training_args.bin":  # which nothing reads
        script(*asked)
    else:
        assert_one_sentence(script(*asked, ok=False), f"cannot go on from {checkpoint}")
    assert not witness.exists()


def test_a_payload_in_a_model_is_not_run(tiny_model, recipe, tmp_path):
    model, witness = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").unlink()
    torch.save(Payload(witness), model / "pytorch_model.bin")
    asked = ("train.py", "--config", recipe, "--model_name_or_path", model, "--output_dir", tmp_path / "run")
    assert_one_sentence(script(*asked, ok=False), f"cannot load {model}")
    asked = ("generate.py", "--checkpoint", model, "--prompt", "조조는?")
    assert_one_sentence(script(*asked, ok=False))
    assert not witness.exists()


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(where, tiny_model, recipe, chats, tmp_path):
    """auto_map names classes of Python files beside the weights. Nobody is asked, and nothing is run."""
    model, witness = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model, model)
    (model / "planted.py").write_text(f"open({str(witness)!r}, 'w')\n")
    config = json.loads((model / where).read_text(encoding="utf-8"))
    if where == "config.json":
        config |= {
            "model_type": "planted",
            "auto_map": {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"},
        }
    else:
        config |= {"tokenizer_class": "Planted", "auto_map": {"AutoTokenizer": ["planted.T", "planted.T"]}}
    (model / where).write_text(json.dumps(config), encoding="utf-8")
    if where == "tokenizer_config.json":  # else the model's own class would do
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}), encoding="utf-8")
    for line in (
        ("train.py", "--config", recipe, "--model_name_or_path", model, "--output_dir", tmp_path / "run", "--dry_run"),
        ("generate.py", "--checkpoint", model, "--prompt", "조조는?"),
        ("preprocess.py", "--config", "configs/demo/preprocess.yaml", "--tokenizer_name_or_path", model,
         "--output_dir", tmp_path / "data"),
    ):  # fmt: skip
        result = script(*line, ok=False, timeout=120)
        if result.returncode:  # or it does without the planted class
            assert_one_sentence(result, str(model))
        assert not witness.exists() and "[y/N]" not in result.stdout


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(10**12) %}{% endfor %}", "{{ 1 +"],
)
def test_a_hostile_chat_template(template, tiny_model, recipe, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(template)
    for line in (
        ("train.py", "--config", recipe, "--model_name_or_path", model, "--output_dir", tmp_path / "run", "--dry_run"),
        ("generate.py", "--checkpoint", model, "--prompt", "조조는?"),
        ("preprocess.py", "--config", "configs/blog/preprocess.yaml", "--tokenizer_name_or_path", model,
         "--data_files", "data/sample_articles.jsonl", "--output_dir", tmp_path / "data"),
    ):  # fmt: skip
        assert_one_sentence(script(*line, ok=False, timeout=120), "template")
    assert not (tmp_path / "data").exists()


HOSTILE = [
    "<script>document.title='ran'</script>",
    "<img src=x onerror=\"document.title='ran'\">",
    '"><svg onload="document.title=\'ran\'">',
    "</style><script>document.title='ran'</script>",
    "</title></script><script>document.title='ran'</script>",
    "<a href=\"javascript:document.title='ran'\">조조</a>",
    "<iframe srcdoc=\"<script>parent.document.title='ran'</script>\"></iframe>",
    "{{ 7 * 7 }}{% raw %}&lt;b&gt;",
]


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory) -> Path:
    """report.html of a quiz whose every text, and of answers whose every name, would run in a page."""
    folder = tmp_path_factory.mktemp("hostile")
    about = json.loads(QUIZ.read_text(encoding="utf-8").split("\n")[0])
    del about["about"]["sha256"]
    chats, questions, answers = [], [], []
    for number, text in enumerate(HOSTILE):
        question = {"id": f"A-{number}", "tier": "A", "split": "test", "entity": text, "question": f"{number} {text}",
                    "answer": text, "aliases": [text + "!"], "evidence": [text], "article": [text]}  # fmt: skip
        questions.append(question)
        chats.append({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text * 3}]})
        for model in ("models/base", f"outputs/{HOSTILE[1]}"):
            answers.append({"id": question["id"], "prompt": question["question"], "answer": text * 3, "ended": True,
                            "checkpoint": model, "step": 0 if model == "models/base" else 5})  # fmt: skip
    for name, rows in (("quiz", [about, *questions]), ("answers", answers), ("train", chats)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    script("tools/score.py", "--quiz", folder / "quiz.jsonl", "--answers", folder / "answers.jsonl",
           "--train_file", folder / "train.jsonl", "--report", folder / "report")  # fmt: skip
    return folder / "report" / "report.html"


def test_the_report_holds_no_tag_but_its_own(hostile_report):
    found = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    Tags().feed(hostile_report.read_text(encoding="utf-8"))
    tags = {tag for tag, _ in found}
    assert not tags & {"img", "iframe", "object", "embed"} and sum(tag == "script" for tag, _ in found) == 1
    assert not [a for _, attributes in found for a in attributes if a.startswith("on") or a == "srcdoc"]
    assert not [of for _, of in found if "javascript:" in (of.get("href") or "")]
    assert "{{ 7 * 7 }}" in hostile_report.read_text(encoding="utf-8")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_nothing_in_the_report_runs_in_a_browser(hostile_report, tmp_path):
    """Its own script runs, for it counts the questions; none that came with a text does."""
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    dumped = subprocess.run(
        [*browser, "--virtual-time-budget=3000", "--dump-dom", hostile_report.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    assert f"{len(HOSTILE)} of {len(HOSTILE)} questions" in dumped
    assert "<title>ran" not in dumped and ": scores and answers</title>" in dumped


# ---- Nothing leaves ------------------------------------------------------------------------------------------------

PEOPLE = ["고운말쓰기1987", "R:planted_contributor", "203.0.113.77", "2001:db8::dead:beef"]


def test_contributors_and_addresses_reach_no_output(sample, tiny_model, recipe, tmp_path):
    """Planted in a dump as the hub has it, then looked for in every file and line of every stage, cards included."""
    rows = [row for row in sample if (row["title"] or "").strip() and (row["text"] or "").strip()]
    columns = {
        "namespace": ["0"] * len(rows),
        "title": [row["title"] for row in rows],
        "text": [row["text"] for row in rows],
        "contributors": [",".join(PEOPLE)] * len(rows),
    }
    pq.write_table(pa.table(columns), tmp_path / "dump.parquet")
    data, out, said = tmp_path / "data", tmp_path / "run", []
    exported, report, answers = tmp_path / "exported", tmp_path / "report", tmp_path / "answers.jsonl"
    for line in (
        ("preprocess.py", "--config", "configs/blog/preprocess.yaml", "--data_files", tmp_path / "dump.parquet",
         "--tokenizer_name_or_path", tiny_model, "--output_dir", data),
        ("train.py", "--config", recipe, "--train_file", data / "train.jsonl", "--allow_truncation", "true",
         "--max_steps", "2", "--save_steps", "1", "--output_dir", out),
        ("generate.py", "--checkpoint", out, "--prompts_file", QUIZ, "--max_new_tokens", "1", "--batch_size", "64",
         "--output_file", answers),
        ("tools/score.py", "--quiz", QUIZ, "--answers", answers, "--train_file", data / "train.jsonl",
         "--report", report),
        ("tools/export.py", "--checkpoint", out, "--output_dir", exported),
    ):  # fmt: skip
        result = script(*line)
        said.append(result.stdout + result.stderr)
    files = [p for folder in (data, out, exported, report) for p in folder.rglob("*") if p.is_file()] + [answers]
    assert len(files) > 30
    for person in PEOPLE:
        assert not any(person in text for text in said)
        assert [path for path in files if person.encode() in path.read_bytes()] == []


TOKEN = "hf_PlantedTokenThatNobodyMaySee"


def test_tokens_reach_no_file_and_no_line(recipe, tmp_path):
    env = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "OPENAI_API_KEY": TOKEN, "WANDB_API_KEY": TOKEN}
    result = script("train.py", "--config", recipe, "--output_dir", tmp_path / "run", env=env)
    assert TOKEN not in result.stdout + result.stderr
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()] == []
    result = script("train.py", "--config", recipe, "--hub_token", TOKEN, "--output_dir", tmp_path / "other", ok=False)
    assert_one_sentence(result, "keeps no token")
    assert TOKEN not in result.stdout + result.stderr and not (tmp_path / "other").exists()


def test_publishing_asks_for_the_licence(finished_run, recipe, tmp_path):
    assert "push_to_hub" not in "".join(p.read_text(encoding="utf-8") for p in ROOT.glob("configs/**/*.yaml"))
    result = script("train.py", "--config", recipe, "--push_to_hub", "--output_dir", tmp_path / "run", ok=False)
    assert_one_sentence(result, "train.py publishes nothing", "tools/export.py")
    checkpoint = tmp_path / "checkpoint-8"
    shutil.copytree(finished_run / "checkpoint-8", checkpoint)
    made = json.loads((checkpoint / "recipe.json").read_text(encoding="utf-8"))
    (tmp_path / "SOURCES.md").write_text("# Sources\n\n- Data: x\n- Licence: CC BY-NC-SA 2.0 KR\n", encoding="utf-8")
    made |= {"model_name_or_path": "meta-llama/Llama-3.2-1B-Instruct", "train_file": str(tmp_path / "train.jsonl")}
    (checkpoint / "recipe.json").write_text(json.dumps(made), encoding="utf-8")
    asked = ("tools/export.py", "--checkpoint", checkpoint, "--output_dir", tmp_path / "exported", "--push_to_hub")
    result = script(*asked, "me/demo", ok=False)
    assert_one_sentence(result, "say under which licence", "that of the data is CC BY-NC-SA 2.0 KR", "meta-llama/")
    result = script(*asked, "me/demo", "--licence", "other", ok=False)
    assert_one_sentence(result, "asks for a name that begins with Llama, not me/demo")
    assert not (tmp_path / "exported").exists()
    asked = (*asked, "me/Llama-demo", "--licence", "cc-by-nc-sa-2.0")
    assert_one_sentence(script(*asked, ok=False), "the card tells what the quiz says")
    scores = {"A": {"n": 9, "exact": [0.5, 0.25, 0.75], "ended": [1, 1, 1]}, "N": {"n": 4, "invented": [0.25, 0, 0.5]}}
    models = [{"step": step, "passage": None, "scores": scores} for step in (4, 8)]
    found = {"quiz": "quiz.jsonl", "split": "test", "notes": ["it is small"], "models": models}
    (tmp_path / "scores.json").write_text(json.dumps(found), encoding="utf-8")
    asked = (*asked, "--scores", tmp_path / "scores.json")
    result = script(*asked, ok=False)  # offline: the last step fails
    assert_one_sentence(result, "is written, but not published", "hf upload me/Llama-demo")
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-nc-sa-2.0" and front["base_model"] == "meta-llama/Llama-3.2-1B-Instruct"
    assert "| A | 9 | 50.0 [25, 75] | – | – | 100.0 [100, 100] |" in card and "Note: it is small" in card
    assert "## Limits" in card and "## Settings" in card
    assert "Built with Llama" in card and "CC BY-NC-SA 2.0 KR" in card
    shutil.rmtree(tmp_path / "exported")
    with LocalHub() as hub:
        env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        result = script(*asked, env=env)
    assert "published" in result.stdout and TOKEN not in result.stdout + result.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}
    assert hub.commits == {"me/Llama-demo": files} and files["README.md"] == card.encode()
    assert {who for _, path, who in hub.requests if path.startswith("/api/")} == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in files.values())
