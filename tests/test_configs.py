"""Every YAML file we ship, every path and command of the READMEs, and the code that the scripts share."""

import inspect
import re
import sys

import pytest
import yaml
from conftest import ROOT, script

import generate
import preprocess
import train

CLASSES = {
    "preprocess.yaml": [preprocess.PreprocessArguments],
    "train.yaml": [train.ScriptArguments, train.TrainingArguments],
    "generate.yaml": [generate.GenerateArguments],
}
BLOCKS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.stem in preprocess.BLOCKS)
SWEEP = ROOT / "configs/sweep.yaml"
RECIPES = sorted(set((ROOT / "configs").rglob("*.yaml")) - {*BLOCKS, SWEEP})
CLASSES["quiz.yaml"] = CLASSES["generate.yaml"]  # configs/quiz.yaml: how a quiz is asked, of any recipe's run
WRITTEN = (
    "train.jsonl",
    "facts.jsonl",
    "answers.jsonl",
    "report.json",
    "SOURCES.md",
    "training_log.jsonl",
    "report.md",
)  # by the scripts
DOCS = [ROOT / "README.md", ROOT / "README.ko.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_recipe_is_here():
    folders = {path.parent for path in RECIPES} - {ROOT / "configs"}
    assert {folder.name for folder in folders} >= {"three_kingdoms", "blog", "demo", "instruments", "small_gpu"}
    for folder in folders:
        own = set(CLASSES) - {"quiz.yaml"} - ({"preprocess.yaml"} if folder.name == "small_gpu" else set())
        assert set(folder.iterdir()) - set(BLOCKS) == {folder / name for name in own}


@pytest.mark.parametrize("path", BLOCKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_blocks_are_read(path):
    """Each file of a block, with the facts beside it, whose questions `unknown` borrows; both name who uses them."""
    facts = str(path.with_name("facts.yaml"))
    blocks = preprocess.read_blocks(preprocess.PreprocessArguments(**{"facts": facts, path.stem: str(path)}))
    assert blocks[path.stem]
    for name, relation in blocks["facts"]["relations"].items():
        assert relation["patterns"] and relation["questions"] and relation["label"] != name, name
    recipe = yaml.safe_load(path.with_name("preprocess.yaml").read_text(encoding="utf-8"))
    assert recipe[path.stem] == str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_parse(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--config", str(path)])
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    *parsed, used = train.parse_args(CLASSES[path.name], default_config="nowhere.yaml")
    assert used == str(path)
    values = {name: value for arguments in parsed for name, value in vars(arguments).items()}
    for key, value in config.items():
        assert values[key] == value or key == "report_to", key
    recipe = path.parent.name
    assert values.get("output_dir", recipe).endswith(recipe) and (values.get("checkpoint") or [recipe])[0].endswith(
        recipe
    )
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert "Prerequisite" in head and "Override" in head
    assert ("generate.py" if path.stem == "quiz" else f"{path.stem}.py") in head


def test_the_command_line_wins_over_yaml(monkeypatch, tmp_path):
    (tmp_path / "generate.yaml").write_text("prompt: [a, b]\nseed: 1\ncheckpoint: [x]\nmax_new_tokens: 7\n")
    line = ["generate.py", "--config", str(tmp_path / "generate.yaml"), "--prompt", "c", "--prompt", "d", "--seed=2"]
    monkeypatch.setattr(sys, "argv", line)
    args, _ = generate.parse_args([generate.GenerateArguments], "")
    assert (args.prompt, args.seed, args.checkpoint, args.max_new_tokens) == (["c", "d"], 2, ["x"], 7)


def test_blog_recipe_is_the_articles():
    config = yaml.safe_load((ROOT / "configs/blog/train.yaml").read_text(encoding="utf-8"))
    article = {
        "max_steps": 2000, "per_device_train_batch_size": 1, "learning_rate": 5e-5, "logging_steps": 10,
        "save_steps": 100, "packing": True, "max_length": 1024, "completion_only_loss": False,
    }  # fmt: skip
    assert {key: config[key] for key in article} == article
    lists = yaml.safe_load((ROOT / "configs/blog/preprocess.yaml").read_text(encoding="utf-8"))
    assert {f"삼국지 {i}" for i in range(1, 16)} < set(lists["exclude_title_keywords"])
    assert [len(lists[f"{name}_keywords"]) for name in ("include_title", "include_text", "exclude_title")] == [
        9,
        8,
        93,
    ]


def test_demo_and_default_share_their_keywords():
    demo, default = (
        yaml.safe_load((ROOT / f"configs/{name}/preprocess.yaml").read_text(encoding="utf-8"))
        for name in ("demo", "three_kingdoms")
    )
    for name in ("include_title_keywords", "include_text_keywords", "exclude_title_keywords"):
        assert demo[name] == default[name] and len(demo[name]) == len(set(demo[name]))
    demo["articles"].pop("copies")  # three articles and twenty facts need their own balance
    for name in (*preprocess.BLOCKS, "question", "continuation_question", "per_fact", "full_text"):
        assert demo[name] == default[name], name


def test_accelerate_reads_every_key_of_its_file():
    """accelerate ignores a misspelt fsdp_ key: each must be an option of its launcher and reach its plugin."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.dataclasses import FullyShardedDataParallelPlugin

    known = {action.dest for action in launch_command_parser()._actions}
    plugin = inspect.getsource(FullyShardedDataParallelPlugin) + inspect.getsource(
        sys.modules["accelerate.utils.launch"].prepare_multi_gpu_env
    )
    files = sorted(ROOT.glob("accelerate*.yaml"))
    assert files
    for path in files:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key in config["fsdp_config"]:
            assert key in known and key.removeprefix("fsdp_").upper() in plugin, key
        assert set(config) <= set(ClusterConfig.__dataclass_fields__), path


def test_the_sweep_varies_a_recipe_that_is_here():
    from sweep import read_config, settings_of

    config = read_config(SWEEP)
    assert (ROOT / config["train"]).exists() and (ROOT / config["quiz"]).exists()
    assert len(settings_of(config)) == 6


@pytest.mark.parametrize("name", ["parameters.md", "parameters.ko.md"])
def test_every_key_of_train_yaml_is_explained(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    for path in ROOT.glob("configs/*/train.yaml"):
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.parent.name != "blog":  # the article's, as it was
            assert [key for key in keys if f"`{key}`" not in text] == [], path


def test_the_scripts_share_their_parser_word_for_word():
    for name in ("parse_args", "Parser", "Loader", "UserError"):
        assert len({inspect.getsource(getattr(module, name)) for module in (preprocess, train, generate)}) == 1
    for name in ("keep_memory", "MetadataUnpickler"):
        assert inspect.getsource(getattr(train, name)) == inspect.getsource(getattr(generate, name))


def test_the_readme_shows_the_committed_results(tmp_path):
    """The table of both READMEs is what the benchmark prints from the result files beside it."""
    command = ("benchmarks/compare.py", "--config", ROOT / "benchmarks/compare.yaml", "--table")
    printed = [line for line in script(*command).stdout.splitlines() if line.startswith("| ")]
    lines = [line for line in printed if " (n " in line or " [" in line]
    assert len(lines) == 6  # head, two bounds, base, the article's way, lossless chats
    (tmp_path / "c.yaml").write_text("seeds: [1]\n")
    result = script(command[0], "--config", tmp_path / "c.yaml", ok=False)
    assert result.returncode == 2 and "does not say quiz, articles" in result.stderr
    for name in ("README.md", "README.ko.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert [line for line in lines if line.partition(" |")[2] not in text] == []


@pytest.mark.parametrize("readme", DOCS, ids=lambda path: path.name)
def test_readme_names_what_exists(readme):
    text = readme.read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@", text)
    made = ("data/", "outputs/", "models/", "configs/mine", "my_", "exported")
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|yaml|txt|md|jsonl|toml))`", text):
        if not path.startswith(made) or path in (
            "data/sample_articles.jsonl",
            "data/quiz.jsonl",
            "data/neutral.jsonl",
            "data/neutral_prompts.jsonl",
            "data/instruments_articles.jsonl",
            "data/instruments_quiz.jsonl",
        ):
            assert (ROOT / path).exists() or any(ROOT.glob(f"configs/*/{path}")) or path in WRITTEN, path
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (readme.parent / target).exists(), target
    commands = re.findall(r"^(?:accelerate launch|python) .*$", text, re.MULTILINE)
    assert len(commands) >= 6 or not readme.name.startswith("README")
    for command in commands:
        words = command.split()
        name = next(word for word in words if word.endswith(".py"))
        assert (ROOT / name).exists(), command
        parser = None
        for module, classes in ((preprocess, "preprocess.yaml"), (train, "train.yaml"), (generate, "generate.yaml")):
            if module.__name__ + ".py" == name:
                parser = module.Parser(CLASSES[classes])
        options = [
            word.partition("=")[0].lstrip("-") for word in words[words.index(name) + 1 :] if word.startswith("--")
        ]
        for option in options:
            if parser:
                assert option == "config" or option in {action.dest for action in parser._actions}, command
            else:
                assert f'"--{option}"' in (ROOT / name).read_text(encoding="utf-8"), command
        for path in re.findall(r"(?:configs|tools)/[\w/.-]+", command):
            assert (ROOT / path).exists() or "configs/mine" in path, command
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
