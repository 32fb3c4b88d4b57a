"""Hostile and broken input, 300 cases and more a script: the right result or one sentence, and nothing half-done.

Most run in this process, through parse_args and main as the scripts do; ten of each through the command line.
Hypothesis draws the same cases in every run (derandomize).
"""

import json
import re
import signal
import string
import sys
import unicodedata
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, SAMPLE, read_jsonl, script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import generate
import preprocess
import train

CLASSES = {
    preprocess: [preprocess.PreprocessArguments],
    train: [train.ScriptArguments, train.TrainingArguments],
    generate: [generate.GenerateArguments],
}
ARTICLES = [
    {"title": "관평", "text": "관평은 촉한의 장수이며 나관중의 소설에도 나온다. 자는 탄지이다.\n\n219년에 죽었다."},
    {"title": "적벽 대전", "text": "적벽 대전은 208년에 일어난 싸움이다. 나관중이 소설로 썼다."},
]


def cases(number: int):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


@contextmanager
def at_most(seconds: int):
    """A case that hangs fails."""

    def late(number, frame):
        raise AssertionError(f"not done in {seconds} s")

    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def outcome(module, *line) -> str | None:
    """Runs a script in this process: None if it did its work, else the one sentence that it told its user."""
    earlier, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, line)]
    try:
        with at_most(60):
            module.main(*module.parse_args(CLASSES[module], default_config=""))
    except module.UserError as e:
        told = str(e)
        assert "\n" not in told and 10 < len(told) < 2000, told[:3000]
        return told
    except SystemExit as e:  # of a dry run
        assert module is train and e.code in (0, 1), e.code
    finally:
        sys.argv = earlier
    return None


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---- What is drawn -------------------------------------------------------------------------------------------------

ODD = [
    "", " ", "\ufeff", "\u200b", "\u202e뒤집힌", "\x00", "\x1b[31m", "<|eot_id|>", "<start_of_turn>", "가" * 5000,
    "관평".encode()[:4], unicodedata.normalize("NFD", "관평"), "\r\n", "\u2028", "🀄", "{title}", "{", "%s", "../..",
    "~", "-", "=", "!!python/object/apply:os.system [id]", "*a", "&a", "<<", "null", "no", "1e999", ".nan", "0x",
    "2020-13-45", "\\ud800", b"\xff", b"\xed\xa0\x80", b"\x00", b"\xfe\xff",
]  # fmt: skip
pieces = st.sampled_from([one if isinstance(one, bytes) else one.encode("utf-8", "surrogatepass") for one in ODD])
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.sampled_from([one for one in ODD if isinstance(one, str)]) | st.text(string.printable + "가나다", max_size=12)
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(string.ascii_letters, max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip

# of the right type and yet odd
extremes = st.sampled_from(
    [
        -1,
        0,
        1,
        3,
        2**31,
        2**63,
        10**30,
        0.0,
        -0.5,
        0.3,
        1e-320,
        1e308,
        float("nan"),
        float("inf"),
        True,
        False,
        "auto",
        "x",
    ]
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The content with one to three places cut, doubled, or with something odd put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 24))
        how = draw(st.sampled_from(["cut", "double", "put", "end"]))
        part = content[start : start + length]
        middle = {"cut": b"", "double": part + part, "put": draw(pieces), "end": b""}[how]
        content = content[:start] + middle + (b"" if how == "end" else content[start + length :])
    return content


@st.composite
def replaced(draw, tree):
    """The tree of a YAML or JSON file with one node anywhere in it replaced, removed or given another name."""
    tree = json.loads(json.dumps(tree))
    node, path = tree, []
    while isinstance(node, dict | list) and node and (not path or draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        path.append((node, key))
        node = node[key]
    parent, key = path[-1]
    how = draw(st.sampled_from(["value", "value", "remove", "name"]))
    if how == "value":
        parent[key] = draw(values)
    elif how == "remove" or isinstance(parent, list):
        del parent[key]
    else:
        parent[key + draw(st.sampled_from(["x", " ", "\u200b", "_"]))] = parent.pop(key)
    return tree


def as_yaml(tree) -> str:
    return yaml.dump(tree, allow_unicode=True, sort_keys=False)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
HAND_MADE_YAML = [
    BOMB, *(BOMB.replace("\ni: ", f"\n{key}: ") for key in ("articles", "prompt", "question")),
    "[" * 20_000, "{a: " * 5_000, "a: &a [*a]", "articles: &a {definition: *a}", "*x",
    "a: !!python/object:os.system x",
    "a: !!int ''", "a: !!float x", "a: !!bool x", "a: !!timestamp x", "a: 2020-13-45", "a: !!binary x", "<<: 3",
    "? [a, b]\n: c", "1: 2", "null: 3", "true: x", "- x", "text", "3", "''", "\x00", '"output_dir": "a\\0b"',
    '"output_dir": "\\ud800"', "output_dir: " + "가" * 3000, "seed: " + "9" * 5000, "a: b: c", "\tx: y",
    "%YAML 9.9\n---\na: 1",
    "--- 1\n--- 2", "seed: 1\nseed: 2", "seed: [1, 2]", "seed: 1.5", "seed: yes", "output_dir: null", "output_dir: []",
    b"\xff\xfe" + "seed: 1".encode("utf-16-le"), b"seed: \xff", b"\xef\xbb\xbfseed: 1\n", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a space and Korean in its name, which all that is drawn here gets to see."""
    return tmp_path_factory.mktemp("한글 폴더")


# ---- preprocess.py -------------------------------------------------------------------------------------------------

BLOG = yaml.safe_load((ROOT / "configs/blog/preprocess.yaml").read_text(encoding="utf-8"))
DEMO = yaml.safe_load((ROOT / "configs/demo/preprocess.yaml").read_text(encoding="utf-8"))
FACTS = yaml.safe_load((ROOT / "configs/instruments/facts.yaml").read_text(encoding="utf-8"))
UNKNOWN = yaml.safe_load((ROOT / "configs/instruments/unknown.yaml").read_text(encoding="utf-8"))
PLAIN = {"data_files": None, "split_articles": False, "tokenizer_name_or_path": None, "output_dir": None}


def preprocess_case(folder: Path, recipe: dict | str | bytes, dump: Path, *line) -> str | None:
    """Runs preprocess.py on a recipe; what it wrote is whole or nothing."""
    out = folder / "out"
    if isinstance(recipe, dict):
        recipe = as_yaml(recipe)
    config = write(folder / "recipe.yaml", recipe)
    told = outcome(preprocess, "--config", config, "--data_files", dump, "--output_dir", out, *line)
    assert not list(folder.glob("*.partial*")) and not (out / ".lock").exists()
    assert out.exists() == (told is None), told
    if told is None:
        rows = read_jsonl(out / "train.jsonl")
        assert rows and all(isinstance(m["content"], str) for row in rows for m in row["messages"])
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    return told


@pytest.fixture(scope="module")
def dump(folder) -> Path:
    return write(folder / "원본 dump.jsonl", jsonl(ARTICLES))


@cases(150)
@given(st.data())
def test_preprocess_recipes(folder, dump, data):
    keys = [f.name for f in fields(preprocess.PreprocessArguments) if f.name not in ("output_dir", "data_files")]
    recipe = {**BLOG, **PLAIN, data.draw(st.sampled_from(keys)): data.draw(extremes | values)}
    recipe = {key: value for key, value in recipe.items() if key not in ("output_dir", "data_files")}
    preprocess_case(folder, recipe, dump)


@pytest.mark.parametrize("text", HAND_MADE_YAML)
def test_preprocess_hand_made_yaml(text, folder, dump):
    preprocess_case(folder, text, dump, "--split_articles", "false", "--tokenizer_name_or_path=")


@cases(50)
@given(
    replaced(
        {"facts": FACTS, "unknown": UNKNOWN, **{k: DEMO[k] for k in ("articles", "biographies", "masked", "pairs")}}
    )
)
def test_preprocess_blocks(folder, dump, blocks):
    recipe = {"split_articles": False, **blocks} if isinstance(blocks, dict) else blocks
    preprocess_case(folder, recipe, dump)


@cases(50)
@given(damaged(jsonl(ARTICLES).encode()), st.sampled_from(["jsonl", "csv"]))
@example(jsonl([{"title": "관평", "text": "나관중 \ud800"}]).encode("utf-8", "surrogatepass"), "jsonl")
@example(b'{"title": "a", "text": "\\ud800"}\n', "jsonl")
@example(b"[" * 100_000, "jsonl")
@example(b'{"title": ' * 5000, "jsonl")
@example(b'{"title": "a", "text": ["x"]}\n', "jsonl")
@example(b'{"title": 3, "text": {"a": 1}}\n', "jsonl")
@example(b'title,text\n"a,b\n', "csv")
@example(b"title,text\na,b,c\n", "csv")
@example(b"title;text\na;b\n", "csv")
@example(b"text,title,text\na,b,c\n", "csv")
@example(b"\xff\xfet\x00", "csv")
def test_preprocess_dumps(folder, content, kind):
    if kind == "csv" and content.startswith(b"{"):
        content = b'title,text\n"' + content[:40].replace(b'"', b'""') + b'","' + content[40:] + b'"\n'
    preprocess_case(folder, {"split_articles": False}, write(folder / f"fuzz.{kind}", content))


@cases(30)
@given(st.data())
def test_preprocess_quiz_and_files(folder, dump, data):
    about = (ROOT / "data/quiz.jsonl").read_text(encoding="utf-8").split("\n")[0].encode()
    answers = {"prompt": "조조는?", "answer": "위나라의 왕이다.", "ended": True, "checkpoint": "x"}
    quiz = write(folder / "quiz.jsonl", data.draw(damaged(about)))
    more = write(folder / "more.jsonl", data.draw(damaged(jsonl([answers, {"messages": []}]).encode())))
    preprocess_case(folder, {"split_articles": False, "quiz_file": str(quiz)}, dump)
    preprocess_case(folder, {"split_articles": False, "files": {str(more): 0.1}}, dump)


PARQUETS = {
    "nested": {"title": [["a"]], "text": [{"b": 1}]},
    "numbers": {"title": [1], "text": [2.5]},
    "nulls": {"title": pa.array([None, None], pa.string()), "text": pa.array([None, None], pa.string())},
    "null type": {"title": pa.nulls(2), "text": pa.nulls(2)},
    "no text": {"title": ["a"]},
    "binary": {"title": pa.array([b"\xff"]), "text": pa.array([b"\xfe"])},
    "no rows": {"title": pa.array([], pa.string()), "text": pa.array([], pa.string())},
    "dictionary": {"title": pa.array(["가", "가"]).dictionary_encode(), "text": ["나", "다"]},
    "large": {"title": pa.array(["가"], pa.large_string()), "text": pa.array(["나"], pa.large_string())},
    "timestamps": {"title": pa.array([0], pa.timestamp("s")), "text": ["x"]},
}


@pytest.mark.parametrize("name", PARQUETS)
def test_preprocess_parquet(name, folder):
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table(PARQUETS[name]), path)
    told = preprocess_case(folder, {"split_articles": False}, path)
    if name in ("large", "dictionary"):
        assert told is None
    elif name in ("nested", "no text", "no rows", "nulls", "null type", "binary"):
        assert told
    preprocess_case(folder, {"split_articles": False}, write(folder / "cut.parquet", path.read_bytes()[:-9]))


def test_preprocess_keeps_what_is_odd_but_whole(folder, tiny_model):
    """NFD, marks of direction and of zero width, special tokens, an article of 10 MB: kept, and the tokens broken."""
    long = "나관중 이야기. " * 400_000
    rows = [
        {"title": unicodedata.normalize("NFD", "관평"), "text": unicodedata.normalize("NFD", "관평은 장수이다.")},
        {"title": "\u202e적벽\u200b 대전", "text": "<|eot_id|>과 <|start_header_id|>\u200b이 든 글\x07."},
        {"title": "긴 글", "text": long},
    ]
    dump, out = write(folder / "odd.jsonl", jsonl(rows)), folder / "odd out"
    line = ("--config", write(folder / "odd.yaml", "max_length: 256\n"), "--data_files", dump, "--output_dir", out)
    assert outcome(preprocess, *line, "--split_articles", "false") is None
    texts = [row["messages"][1]["content"] for row in read_jsonl(out / "train.jsonl")]
    assert texts == [row["text"] for row in rows]
    write(dump, jsonl(rows[:2]))
    assert outcome(preprocess, *line, "--tokenizer_name_or_path", tiny_model) is None
    texts = [row["messages"][1]["content"] for row in read_jsonl(out / "train.jsonl")]
    assert "<|eot_id|>" not in texts[1] and texts[1].replace("\u200b", "") == rows[1]["text"].replace("\u200b", "")
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["special_tokens_broken"] == 2


# ---- train.py ------------------------------------------------------------------------------------------------------


def train_case(folder: Path, recipe: str | bytes, *line) -> str | None:
    """A dry run: it reads the recipe, the rows, the tokenizer, and tells what would run."""
    before = sorted(folder.rglob("*"))
    config = write(folder / "train.yaml", recipe)
    told = outcome(train, "--config", config, "--output_dir", folder / "run", *line, "--dry_run", "true")
    assert sorted({*folder.rglob("*")} - {config}) == [path for path in before if path != config]
    return told


@cases(300)
@given(st.data())
def test_train_recipes(folder, recipe, data):
    # not those that choose the hardware: it is chosen once a process
    never = ("dry_run output_dir use_cpu local_rank full_determinism ddp_backend deepspeed fsdp fsdp_config "
                "accelerator_config parallelism_config torch_compile tf32 log_level log_level_replica")  # fmt: skip
    keys = [f.name for cls in CLASSES[train] for f in fields(cls) if f.init and f.name not in never.split()]
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    tree[data.draw(st.sampled_from(sorted(keys)))] = data.draw(extremes | values)
    train_case(folder, as_yaml({k: v for k, v in tree.items() if k != "output_dir"}))


@pytest.mark.parametrize("text", HAND_MADE_YAML)
def test_train_hand_made_yaml(text, folder, tiny_model, chats):
    train_case(folder, text, "--model_name_or_path", tiny_model, "--train_file", chats)


GOOD_CHAT = {
    "id": "a-1",
    "messages": [{"role": "user", "content": "조조는?"}, {"role": "assistant", "content": "위왕"}],
}


@cases(90)
@given(replaced([GOOD_CHAT, GOOD_CHAT]))
@example([{"messages": "x"}])
@example([{"messages": [{"role": ["assistant"], "content": "x"}]}])
@example([{"messages": [{"role": "assistant", "content": "\x00"}]}])
@example([{"messages": [{"role": "assistant", "content": "  x "}, {"role": "assistant", "content": "y"}]}])
@example([{"messages": {"role": "assistant", "content": "x"}}])
@example([GOOD_CHAT["messages"]])
@example([[]])
@example([3, None])
def test_train_rows(folder, recipe, rows):
    text = recipe.read_text(encoding="utf-8")
    train_case(
        folder, text, "--train_file", write(folder / "rows.jsonl", jsonl(rows if isinstance(rows, list) else [rows]))
    )


@cases(90)
@given(damaged(jsonl([GOOD_CHAT, GOOD_CHAT]).encode()))
@example(b"[" * 100_000)
@example(b'{"messages": ' * 10_000)
@example(b"\xff\xfe{")
@example(b"\xef\xbb\xbf" + jsonl([GOOD_CHAT]).encode())
@example(jsonl([GOOD_CHAT]).replace("위왕", "\\ud800").encode())
@example(jsonl([GOOD_CHAT]).replace("위왕", "가" * 3_300_000).encode())
@example(jsonl([GOOD_CHAT]).replace("위왕", "<|eot_id|>").encode())
@example(b'{"messages": 1' + b"0" * 5000 + b"}")
@example(b"\n\n\n")
@example(b"")
def test_train_bytes(folder, recipe, content):
    train_case(folder, recipe.read_text(encoding="utf-8"), "--train_file", write(folder / "bytes.jsonl", content))


# ---- generate.py ---------------------------------------------------------------------------------------------------


def generate_case(folder: Path, *line) -> str | None:
    """Answers of two tokens into a file, which is whole or not there."""
    answers = folder / "answers.jsonl"
    told = outcome(generate, *line, "--output_file", answers)
    assert not list(folder.glob("*.partial*"))
    assert answers.exists() == (told is None or "did not answer" in told), told
    if answers.exists():
        assert all(isinstance(row["answer"], str) for row in read_jsonl(answers))
        answers.unlink()
    return told


SHORT = "max_new_tokens: 2\n"


@cases(150)
@given(st.data())
def test_generate_recipes(folder, tiny_model, data):
    never = ("interactive", "output_file", "max_new_tokens", "checkpoint")
    keys = [f.name for f in fields(generate.GenerateArguments) if f.name not in never]
    recipe = {
        "max_new_tokens": 2,
        "prompt": ["조조는?"],
        data.draw(st.sampled_from(keys)): data.draw(extremes | values),
    }
    generate_case(folder, "--config", write(folder / "g.yaml", as_yaml(recipe)), "--checkpoint", tiny_model)


@pytest.mark.parametrize("text", HAND_MADE_YAML)
def test_generate_hand_made_yaml(text, folder, tiny_model):
    line = ("--checkpoint", tiny_model, "--prompt", "?", "--max_new_tokens", "2")
    generate_case(folder, "--config", write(folder / "g.yaml", text), *line)


QUESTIONS = [{"prompt": "조조는 누구인가?", "id": "a"}, {"question": "적벽은?", "answer": "208년"}, {"about": {}}]


@cases(110)
@given(damaged(jsonl(QUESTIONS).encode()), st.sampled_from(["jsonl", "txt"]))
@example(b"[" * 100_000, "jsonl")
@example(b'"x"\n3\nnull\n', "jsonl")
@example(b'{"prompt": ["x"]}', "jsonl")
@example(b'{"prompt": "\\ud800"}', "jsonl")
@example(b'{"prompt": "x", "k": "\\ud800"}', "jsonl")
@example(b"\xed\xa0\x80", "txt")
@example(b"\x00", "txt")
@example(b"<|eot_id|><|begin_of_text|>", "txt")
@example("가 ".encode() * 1_000, "txt")
@example(b"", "txt")
@example(b"\n \n", "jsonl")
def test_generate_questions(folder, tiny_model, content, kind):
    path, config = write(folder / f"질문 {kind}.{kind}", content), write(folder / "g.yaml", SHORT)
    generate_case(folder, "--config", config, "--checkpoint", tiny_model, "--prompts_file", path)


@cases(90)
@given(st.data())
def test_generate_checkpoints(folder, finished_run, data):
    """One file of a checkpoint damaged, of those that a stranger or a bad disk may have spoiled."""
    whole = finished_run / "final"
    names = sorted(path.name for path in whole.iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))
    name = data.draw(st.sampled_from(names))
    content = (whole / name).read_bytes()
    if name.endswith(".safetensors"):
        content = content[: data.draw(st.integers(0, len(content)))]
    elif data.draw(st.booleans()) and name.endswith(".json") and len(content) < 50_000:
        content = json.dumps(data.draw(replaced(json.loads(content)))).encode()
    else:
        content = data.draw(damaged(content))
    checkpoint = folder / "checkpoint-8"
    checkpoint.mkdir(exist_ok=True)
    for path in whole.iterdir():
        if path.name != "manifest.json" or name == "manifest.json":
            write(checkpoint / path.name, path.read_bytes() if path.name != name else content)
    if name != "manifest.json":
        (checkpoint / "manifest.json").unlink(missing_ok=True)
    line = ("--config", write(folder / "g.yaml", SHORT), "--prompt", "?")
    generate_case(folder, *line, "--checkpoint", checkpoint)
    generate_case(folder, *line, "--checkpoint", checkpoint, "--base_model", "auto", "--checkpoint", whole)


# ---- Through the command line --------------------------------------------------------------------------------------

CSV, DEEP, SURROGATE = b'title,text\n"a\n', b"[" * 100_000, b'{"messages": "\\ud800"}\n'
TO_READ = ("--split_articles", "false", "--data_files")
COMMANDS = [
    *[("preprocess.py", {"c.yaml": text}, ("--config", "c.yaml")) for text in HAND_MADE_YAML[:5]],
    ("preprocess.py", {"d.csv": CSV}, (*TO_READ, "d.csv")),
    ("preprocess.py", {"d.jsonl": DEEP}, (*TO_READ, "d.jsonl")),
    ("preprocess.py", {"d.parquet": b"PAR1"}, (*TO_READ, "d.parquet")),
    ("preprocess.py", {"q.jsonl": DEEP}, (*TO_READ, SAMPLE, "--quiz_file", "q.jsonl")),
    ("preprocess.py", {}, (*TO_READ, SAMPLE, "--question", "{\udcff}")),
    *[("train.py", {"c.yaml": text}, ("--config", "c.yaml")) for text in HAND_MADE_YAML[:5]],
    *[("train.py", {"t.jsonl": text}, ("--train_file", "t.jsonl")) for text in (DEEP, SURROGATE, b"\xff", b"", b"{}")],
    *[("generate.py", {"c.yaml": text}, ("--config", "c.yaml", "--checkpoint", "MODEL"))
      for text in HAND_MADE_YAML[:5]],
    *[("generate.py", {"p.jsonl": text}, ("--checkpoint", "MODEL", "--prompts_file", "p.jsonl"))
      for text in (DEEP, b'{"prompt": "\\ud800"}', b"\xff", b"", b"{}")],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_the_command_line_tells_it_in_one_line(number, tiny_model, tmp_path):
    name, files, line = COMMANDS[number]
    for file, content in files.items():
        write(tmp_path / file, content)
    line = [tmp_path / word if word in files else tiny_model if word == "MODEL" else word for word in line]
    if name != "generate.py":
        line += ["--output_dir", tmp_path / "out"]
    if name == "train.py":
        line += ["--model_name_or_path", tiny_model]
    if "--config" not in line:
        line += ["--config", write(tmp_path / "empty.yaml", "")]
    result = script(name, *line, ok=False, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert len(re.findall(rf"^{name}: ", result.stderr, re.MULTILINE)) == 1, result.stderr
    assert not list(tmp_path.glob("out*"))
