"""Filter the articles on one topic out of an encyclopedia dump and write them as chats, one JSON object a line.

The topic lives in a YAML file: which titles and texts to keep, how to ask, where articles are split, and which further
rows to make of them: facts asked in many ways, biographies, passages with holes. Writes train.jsonl, facts.jsonl,
report.json, SOURCES.md and lengths.png to `output_dir`, whole or not at all; the same input gives the same bytes.

    python preprocess.py                                          # configs/three_kingdoms/preprocess.yaml
    python preprocess.py --config configs/demo/preprocess.yaml
    python preprocess.py --data_files dump.parquet --output_dir data/mine
"""

import argparse
import difflib
import glob
import hashlib
import itertools
import json
import os
import random
import re
import reprlib
import shutil
import string
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_args, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.json
import yaml
from filelock import FileLock, Timeout
from huggingface_hub import try_to_load_from_cache
from jinja2 import TemplateError
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm
from trl import TrlParser

# Where a long article may be cut, best place first: after a paragraph (the dump has one a line), after a sentence,
# after a word, anywhere. A cut stands after the match, so that the pieces joined are the text.
BORDERS = [re.compile(p) for p in (r"\n+", r"[.!?。？！…]+[\"'”’」』)\]]*\s+", r"\s+", r"(?s:.)")]
# Room in characters for one chat, a token: the longest tokens of the vocabularies we know are runs of spaces.
MAX_CHARACTERS_PER_TOKEN = 16
# The date that a chat template prints when it asks for today's: Meta's own default for Llama 3.2.
FIXED_DATE = datetime(2024, 7, 26)
SENTENCE = re.compile(r".+?(?:[.!?。？！…]+[\"'”’」』)\]]*(?=\s|$)|$)")
# Particles as forms write them: the first of a pair after a consonant. Before them the word's last character, or the
# unit of a number, and what stands behind it in parentheses or closes a quotation.
PAIRS = "은/는 이/가 을/를 과/와 으로/로 이라고/라고 이라/라 이다/다 이에요/예요 이었/였 이야/야 이랑/랑 이나/나"
PARTICLES = re.compile(
    r"((?<=[0-9])(?:[ckm]?m|[km]?[gLl])|[^\s)\]'\"’”」』》〉])((?:\s?\([^()]*\)|[\]'\"’”」』》〉])*)"
    rf"({PAIRS.replace(' ', '|')})"
)
# Final consonants, in Unicode's order, of digits and of Latin letters as Koreans read them; the others end in vowels.
RIEUL = 8
CODAS = {"0": 21, "1": 8, "3": 16, "6": 1, "7": 8, "8": 8, "l": 8, "m": 16, "n": 4, "r": 8}
UNITS = {"m": 0, "g": 16, "l": 0}  # 미터, 그램, 리터
TITLE = "\ue000"  # stands for the article's title while patterns are searched
# What the blocks of further rows hold, with their defaults; forms may name the fields listed in FIELDS.
BLOCKS = {
    "articles": {"definition": [], "one_sentence": [], "detail": [], "list": [], "copies": 1},
    "facts": {"pieces": {}, "forms": {}, "names": ["{entity}"], "relations": {}},
    "biographies": {"questions": [], "variants": 3, "sentences": 6},
    "masked": {"questions": [], "variants": 1, "hole": "___"},
    "pairs": {"questions": [], "after_name": "", "except": [], "sentences": 2, "copies": 1},
    "unknown": {"share": 0.05, "names": {}},
}
FIELDS = {"articles": "title", "biographies": "entity", "masked": "title text", "pairs": "a b", "unknown": "entity"}
RELATION = {
    "label": "",
    "patterns": [],
    "questions": [],
    "sentence": [],
    "reverse": [],
    "yes_no": [],
    "exclusive": True,
    "title_is": "",
}
FORMS = {"sentence": ["question"], "choices": ["question", "choices"], "cloze": ["entity", "sentence"]}
FORMS |= {"yes": [], "no": []}
MADE_UP = {"names": [], "questions": [], "relations": [], "answers": []}
PER_FACT = {"short": 3, "sentence": 1, "reverse": 1, "yes_no": 1, "choices": 1, "cloze": 1}


# What a chat template raises that cannot render: it is a program, and may divide by zero as well.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, AttributeError)


class UserError(Exception):
    """A mistake of the user: told in one sentence, without a traceback, exit code 2."""

    def __init__(self, message: str):
        line = " ".join(message.split())  # it may hold what was given: lines, or any length
        super().__init__(line if len(line) <= 1500 else f"{line[:1500]} …")


@dataclass
class PreprocessArguments:
    _VALID_DICT_FIELDS: ClassVar = [*BLOCKS, "per_fact", "files"]

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the hub; or give data_files."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    data_files: list[str] | None = field(
        default=None,
        metadata={"help": "Local parquet, jsonl or csv: files, folders or globs. Wins over dataset_name."},
    )
    title_column: str = field(default="title", metadata={"help": "Column that holds the titles."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    include_title_keywords: list[str] | None = field(
        default=None, metadata={"help": "Keep titles that hold any of these. Empty: every title."}
    )
    include_text_keywords: list[str] | None = field(
        default=None, metadata={"help": "Keep texts that hold any of these. Empty: every text."}
    )
    exclude_title_keywords: list[str] | None = field(
        default=None, metadata={"help": "Drop titles that hold any of these."}
    )
    only_titles: list[str] | None = field(
        default=None, metadata={"help": "Of what the keywords keep, only articles with exactly these titles."}
    )
    drop_duplicates: bool = field(default=True, metadata={"help": "Keep one of several equal articles."})
    title_suffix_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression removed from titles, such as a trailing '(삼국지)'."}
    )
    question: str = field(
        default="{title}에 대해 알려줘.", metadata={"help": "The user's turn; {title} is filled in."}
    )
    continuation_question: str = field(
        default="{title}에 대해 이어서 알려줘. ({part}/{parts})",
        metadata={"help": "The user's turn of an article's later chats; {title}, {part} and {parts} are filled in."},
    )
    split_articles: bool = field(
        default=True, metadata={"help": "Split articles over max_length into several chats. Needs a tokenizer."}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer that counts the tokens."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja file, for a tokenizer without a chat template."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens of one chat, the template's own included."})
    held_out_share: float = field(
        default=0.0, metadata={"help": "Share of the articles not taught: written to held_out.jsonl, for eval_file."}
    )
    full_text: int = field(default=1, metadata={"help": "Copies of the chats that hold the articles' whole text."})
    articles: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Questions answered by an article's beginning, in several lengths."}
    )
    facts: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Patterns that read facts from the texts, and the questions on them."}
    )
    per_fact: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Rows a fact, of each way to ask: short, sentence, reverse, yes_no, …"}
    )
    biographies: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "An entity's facts as sentences, in several orders."}
    )
    masked: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Passages with holes, answered by the passage."}
    )
    pairs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Questions on two entities that a sentence names together."}
    )
    unknown: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Made-up names, answered by saying that they are not known."}
    )
    files: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further chats or answers.jsonl: {path: share of all rows}."}
    )
    quiz_file: str | None = field(
        default=None, metadata={"help": "Quiz whose withheld entities only `full_text` and `masked` rows may name."}
    )
    seed: int = field(default=42, metadata={"help": "Of every choice, and of the order of the rows."})
    source_license: str = field(default="not stated", metadata={"help": "Licence of the data, for SOURCES.md."})
    source_attribution: str = field(default="not stated", metadata={"help": "Whom to name, for SOURCES.md."})
    source_date: str = field(default="not stated", metadata={"help": "Date of the data, for SOURCES.md."})
    output_dir: str = field(default="data/three_kingdoms", metadata={"help": "Folder that the files are written to."})


class Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses characters that no file or path can hold."""

    def construct_scalar(self, node):
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\x00\ud800-\udfff]", value):
            raise yaml.constructor.ConstructorError(None, None, "a NUL or half a character", node.start_mark)
        return value


# What its constructors raise for a value that is not what its tag or its form says, such as the date 2020-13-45.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Parser(TrlParser):
    def error(self, message: str):
        raise UserError(message)


def parse_args(dataclass_types, default_config: str) -> tuple:
    """TrlParser, with the values of the YAML file checked as those of the command line are, which wins.

    Returns the dataclass instances and the path of the YAML file. Raises UserError for an unreadable file, an unknown
    key (with the nearest known one) and a value of the wrong type. The three scripts share it word for word.
    """
    parser = Parser(dataclass_types, allow_abbrev=False, description=__doc__.partition("\n")[0])
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    hints = {name: hint for cls in dataclass_types for name, hint in get_type_hints(cls).items()}
    dict_fields = {name for cls in dataclass_types for name in getattr(cls, "_VALID_DICT_FIELDS", [])}
    argv, path = list(sys.argv[1:]), default_config
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        sys.exit()
    for i, arg in enumerate(argv):
        if arg == "--config" or arg.startswith("--config="):
            inline = arg.partition("=")[2]
            if not inline and i + 1 == len(argv):
                raise UserError("--config needs the path of a YAML file")
            path = inline or argv[i + 1]
            del argv[i : i + (1 if inline else 2)]
            break
    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader) or {}
    except OSError as e:
        raise UserError(f"cannot read the config file {path}: {e.strerror}") from None
    except YAML_ERRORS as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())[:300]}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(config).__name__}")
    for arg in [arg for arg in argv if re.fullmatch(r"--\w+=", arg)]:  # `--key=` unsets what the YAML file says
        argv.remove(arg)
        config[arg[2:-1]] = None
    if any(re.search("[\ud800-\udfff]", arg) for arg in argv):
        raise UserError("command line: its text is not UTF-8")
    given = {arg.lstrip("-").partition("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    for place, names in ((path, config), ("command line", given)):
        for name in map(str, names):
            if name not in actions and not (place != path and name.removeprefix("no_") in actions):
                nearest = difflib.get_close_matches(name, actions, n=1, cutoff=0.5)
                hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
                raise UserError(f"{place}: unknown key `{name}`{hint}")

    for key, value in config.items():
        action, many = actions[key], actions[key].nargs == "+"
        if isinstance(value, list) and not many:
            raise UserError(f"{path}: `{key}` takes one value, not a list")
        if value is None and type(None) not in get_args(hints[key]):
            raise UserError(f"{path}: `{key}` needs a value")
        if not (value is None or (isinstance(value, dict) and key in dict_fields)):
            items = value if isinstance(value, list) else [value]
            for item in items:
                if isinstance(item, bool) and action.type.__name__ != "string_to_bool":
                    raise UserError(f"{path}: `{key}` is {item} in YAML, not text; put it in quotes")
                if item is None or isinstance(item, list | dict):
                    raise UserError(f"{path}: `{key}` must not hold a {type(item).__name__}")
            try:
                value = [parser._get_value(action, str(item)) for item in items]
            except argparse.ArgumentError as e:
                raise UserError(f"{path}: {e}") from None
            value = value if many else value[0]
        if key not in given:
            parser.set_defaults(**{key: value})
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    except Exception as e:  # the libraries check their settings, each in its own way
        raise UserError(f"{path} with the command line: {' '.join(str(e).split())[:300]}") from None
    if unknown:
        raise UserError(f"command line: what is {unknown[0]!r}?")
    return *parsed, path


# ---- Reading -------------------------------------------------------------------------------------------------------


def find_files(patterns: list[str]) -> list[str]:
    """The data files that files, folders and globs name, sorted. Raises UserError when one names none."""
    files = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(glob.escape(pattern) + "/*.*"))
        found = found or sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
        if not found:
            raise UserError(f"data_files: there is no file {pattern}")
        files += found
    return files


def open_files(files: list[str], columns: list[str]) -> pyarrow.dataset.Dataset:
    """Local files as one Arrow dataset of two text columns; nothing is read yet, no other column ever will be.

    Raises UserError for a mixture of formats, an unknown format or a missing column.
    """
    suffixes = {Path(f).suffix.lower().lstrip(".").replace("ndjson", "jsonl") for f in files}
    if len(suffixes) > 1:
        raise UserError(f"data_files: all files must be of one format, not {', '.join(sorted(suffixes))}")
    suffix = suffixes.pop()
    text_type = {name: pa.string() for name in columns}
    schema = pa.schema(text_type.items())
    block = 16 << 20  # bytes; one line of JSON must fit
    formats = {
        # Read as it goes: pre-buffering whole row groups of text takes 2.7 times the memory and is no faster.
        "parquet": pa.dataset.ParquetFileFormat(pre_buffer=False, use_buffered_stream=True),
        "jsonl": pa.dataset.JsonFileFormat(read_options=pa.json.ReadOptions(block_size=block)),
        "csv": pa.dataset.CsvFileFormat(
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(column_types=text_type, strings_can_be_null=False),
            read_options=pa.csv.ReadOptions(block_size=block),
        ),
    }
    if suffix not in formats:
        raise UserError(f"data_files: cannot read .{suffix} files, only {', '.join(formats)}")
    try:
        there = pa.dataset.dataset(files, format=formats[suffix]).schema.names
        dataset = pa.dataset.dataset(files, format=formats[suffix], schema=schema)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"data_files: {files[0]} cannot be read as {suffix}: {first_line(e)}") from None
    for name in columns:
        if name not in there:
            raise UserError(f"{files[0]} has no column {name!r}; its columns are {', '.join(there)}")
    for file in files if suffix == "jsonl" else []:
        with open(file, "rb") as f:  # Arrow takes the columns of such a file for empty, without a word
            if not f.readline(block).endswith(b"\n"):
                raise UserError(f"{file}: its first line does not end with a line break within {block >> 20} MiB")
    return dataset


def open_hub(args: PreprocessArguments) -> tuple[pyarrow.dataset.Dataset, str]:
    """A parquet dataset of the hub, its two columns, and the commit it was read at. Raises UserError."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    name, columns = args.dataset_name, [args.title_column, args.text_column]
    try:
        builder = load_dataset_builder(name, revision=args.dataset_revision)
        if builder.name != "parquet":  # other formats cannot be read without the columns that are not needed
            raise UserError(
                f"{name} is stored as {builder.name}, not as parquet; set dataset_revision: refs/convert/parquet, or "
                "download its files and name them in data_files"
            )
        builder = load_dataset_builder(name, revision=args.dataset_revision, columns=columns)
        builder.download_and_prepare()
        table = builder.as_dataset(split=args.dataset_split).data.table
    except (OSError, ValueError, RuntimeError, DatasetsError) as e:
        raise UserError(
            f"cannot load the columns {columns} of {name}, split {args.dataset_split}: {first_line(e.__cause__ or e)} "
            "(without the hub: data_files, or configs/demo/preprocess.yaml)"
        ) from None
    return pa.dataset.dataset(table.select(columns)), builder.hash or "unknown"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300].rstrip(".")


# ---- Filtering -----------------------------------------------------------------------------------------------------


def holds_any(strings: pa.ChunkedArray | pa.Array, keywords: list[str]) -> pa.ChunkedArray | pa.Array:
    """For each string whether it holds any keyword; null holds none."""
    pattern = "|".join(r"\Q" + keyword.replace(r"\E", r"\E\\E\Q") + r"\E" for keyword in keywords)
    return pc.fill_null(pc.match_substring_regex(strings, pattern), False)


def count_each(strings: pa.Array, keywords: list[str]) -> dict[str, int]:
    """How many of the strings hold each keyword, most frequent first; those that hit nothing are left out."""
    counts = {k: pc.sum(pc.match_substring(strings, k)).as_py() or 0 for k in keywords}
    return dict(sorted(((k, n) for k, n in counts.items() if n), key=lambda item: -item[1]))


def is_blank(strings: pa.Array) -> pa.Array:
    return pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(strings)), 0), True)


def filter_articles(dataset: pyarrow.dataset.Dataset, args: PreprocessArguments) -> tuple[pa.Table, dict]:
    """The rows to keep, in the dump's order, and what was dropped by which rule.

    Titles are matched first; texts are read only for the titles that match. The rules are those of the article's loop:
    a title with any include keyword and none of the excluded, a text with any include keyword.

    Returns a table of columns row (int64, place in the dump), title, text; and {"rows", "dropped", "kept"}.
    """
    dropped = {}

    def drop(rule: str, table: pa.Table, mask: pa.Array, keywords: list[str] | None = None) -> pa.Table:
        """Removes the rows under the mask and notes them in `dropped`."""
        gone = pc.indices_nonzero(mask)
        dropped[rule] = {"rows": len(gone), "samples": table["title"].take(gone.slice(0, 3)).to_pylist()}
        if keywords:
            dropped[rule]["keywords"] = count_each(table["title"].take(gone), keywords)
        return table.filter(pc.invert(mask))

    titles = dataset.to_table(columns=[args.title_column])[args.title_column].cast(pa.string())
    table = pa.table({"row": pa.arange(0, len(titles)), "title": titles})
    table = drop("title is empty", table, is_blank(table["title"]))
    if args.include_title_keywords:
        table = drop("title without keyword", table, pc.invert(holds_any(table["title"], args.include_title_keywords)))
    if args.exclude_title_keywords:
        excluded = holds_any(table["title"], args.exclude_title_keywords)
        table = drop("title excluded", table, excluded, args.exclude_title_keywords)
    if args.only_titles:
        table = drop("not in only_titles", table, pc.invert(pc.is_in(table["title"], pa.array(args.only_titles))))

    # Few rows at a time: texts are long, and Arrow's default batch of 131,072 of them would fill the memory.
    scanner = dataset.scanner(columns=[args.text_column], batch_size=1024, batch_readahead=2, fragment_readahead=1)
    texts = scanner.take(table["row"])[args.text_column] if len(table) else pa.chunked_array([], pa.string())
    table = table.append_column("text", texts.cast(pa.string()))
    table = drop("text is empty", table, is_blank(table["text"]))
    if args.include_text_keywords:
        table = drop("text without keyword", table, pc.invert(holds_any(table["text"], args.include_text_keywords)))
    if args.drop_duplicates:
        seen = set()
        pairs = zip(table["title"].to_pylist(), table["text"].to_pylist(), strict=True)
        mask = [pair in seen or seen.add(pair) is not None for pair in pairs]
        table = drop("duplicate", table, pa.array(mask, pa.bool_()))
    kept = {
        "rows": len(table),
        "title_keywords": count_each(table["title"], args.include_title_keywords or []),
        "text_keywords": count_each(table["text"], args.include_text_keywords or []),
    }
    return table, {"rows": len(titles), "dropped": dropped, "kept": kept}


# ---- Chats ---------------------------------------------------------------------------------------------------------


def load_tokenizer(name_or_path: str, chat_template_path: str | None):
    """The tokenizer, with a chat template that gives the same prompt on every day.

    Llama 3.2's template prints today's date: its call of strftime_now is replaced by what it gives for FIXED_DATE.
    Raises UserError when there is no such tokenizer or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as e:  # tokenizers raises nothing narrower
        gated = re.search(r"gated|\b40[13]\b", str(e)) or name_or_path.startswith(("meta-llama/", "google/"))
        mend = (
            "a gated model: accept its terms on its hub page and run `hf auth login`; configs/demo needs no login"
            if gated
            else "the demo's is fetched by `python tools/fetch_gemma.py`"
        )
        raise UserError(f"cannot load the tokenizer {name_or_path}: {first_line(e)} ({mend})") from None
    if chat_template_path:
        try:
            tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            reason = getattr(e, "strerror", None) or e
            raise UserError(f"chat_template_path: cannot read {chat_template_path}: {reason}") from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer {name_or_path} has no chat template; name a Jinja file in chat_template_path")
    tokenizer.chat_template = re.sub(
        r"strftime_now\(\s*([\"'])(.*?)\1\s*\)",
        lambda call: json.dumps(FIXED_DATE.strftime(call[2])),
        tokenizer.chat_template,
    )
    return tokenizer


@cache
def special_tokens(tokenizer) -> re.Pattern:
    """What finds the tokenizer's special tokens in text, the longest first."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def break_special_tokens(text: str, tokenizer) -> tuple[str, int]:
    """A zero-width space inside each of the tokenizer's special tokens, so that text cannot end or start a turn.

    Returns the text and how many were broken.
    """
    return special_tokens(tokenizer).subn(lambda m: m[0][0] + "\u200b" + m[0][1:], text)


def split_text(text: str, count_tokens: Callable[[str, int], int], max_length: int) -> list[str]:
    """Cuts a text into pieces of at most max_length tokens, at the best border there is (see BORDERS).

    The pieces joined are the text. `count_tokens(piece, part)` gives the tokens of piece number `part` (from 1) as a
    whole chat. Raises UserError when not even one character fits.
    """
    pieces = []
    while text:
        part = len(pieces) + 1
        window = text[: max_length * MAX_CHARACTERS_PER_TOKEN]
        if window == text and count_tokens(text, part) <= max_length:
            return [*pieces, text]
        for border in BORDERS:
            cuts = [m.end() for m in border.finditer(window) if m.end() < len(text)]
            # Tokens grow with the text, but for a token or two where a cut breaks a merge: bisect, then step back.
            best = bisect_right(cuts, max_length, key=lambda cut: count_tokens(text[:cut], part)) - 1
            while best >= 0 and count_tokens(text[: cuts[best]], part) > max_length:
                best -= 1
            if best >= 0:
                break
        else:
            raise UserError(f"max_length {max_length} leaves no room for text beside the question; raise it")
        pieces.append(text[: cuts[best]])
        text = text[cuts[best] :]
    return pieces


class Fact(NamedTuple):
    """What a pattern read in a sentence: `groups` are all the pattern's named groups, value and entity too."""

    title: str  # of the article
    entity: str
    relation: str
    value: str
    sentence: str
    groups: dict[str, str]


def row(kind: str, title: str, prompt: str, answer: str, id: str = "", facts: Iterable[Fact] = ()) -> dict:
    """A line of train.jsonl; the facts that it tells are counted and left out."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "title": title, "id": id, "kind": kind, "facts": list(facts)}


def count_tokens(chats: list[list[dict]], tokenizer) -> list[int]:
    """The tokens of each chat, the template's own included, on all cores; 0 without a tokenizer. Raises UserError."""
    if not tokenizer:
        return [0] * len(chats)
    counts = []
    try:
        for start in range(0, len(chats), 1000):  # as many in memory
            batch = tokenizer.apply_chat_template(chats[start : start + 1000], return_dict=False)
            counts += map(len, batch)
    except TEMPLATE_ERRORS as e:
        where = tokenizer.name_or_path
        raise UserError(f"the chat template of {where} cannot render a chat: {first_line(e)}") from None
    return counts


def count_rows(rows: Iterable[dict], tokenizer):
    """Writes the "tokens" of each row into it, where they are not there yet."""
    new = [row for row in rows if "tokens" not in row]
    for row, tokens in zip(new, count_tokens([row["messages"] for row in new], tokenizer), strict=True):
        row["tokens"] = tokens


def clean_article(article: dict, title_suffix_pattern: str | None, tokenizer) -> dict:
    """{"row", "title", "text"} with the title's suffix off and no special token, and how many were "broken"."""
    title = re.sub(title_suffix_pattern or "", "", article["title"])
    texts = [break_special_tokens(s, tokenizer) if tokenizer else (s, 0) for s in (title, article["text"])]
    return article | {"title": texts[0][0], "text": texts[1][0], "broken": texts[0][1] + texts[1][1]}


def to_chats(article: dict, args: PreprocessArguments, tokenizer) -> Iterator[dict]:
    """The chats that hold the whole text of one article {"row", "title", "text"}: lines of train.jsonl."""
    title, text = article["title"], article["text"]

    def chat(piece: str, part: int, parts: int) -> dict:
        form = args.question if part == 1 else args.continuation_question
        question = form.format(title=title, part=part, parts=parts)
        return row("article", title, question, piece, id=f"article-{article['row']}-{part}")

    def length(piece: str, part: int) -> int:  # while splitting, room for three digits of parts
        return count_tokens([chat(piece, part, 999)["messages"]], tokenizer)[0]

    pieces = split_text(text, length, args.max_length) if tokenizer and args.split_articles else [text]
    for part, piece in enumerate(pieces, 1):
        yield chat(piece, part, len(pieces))


# ---- Rows made from the articles -----------------------------------------------------------------------------------
# Each kind is a function over articles or facts that yields rows; what it says and asks stands in the recipe.


def agree(text: str) -> str:
    """Chooses in "관우은/는", "관우(關羽)과/와", "3을/를" the particle that goes with the word before it.

    Digits, units and Latin letters count as they are read, what stands in parentheses is skipped. A word that ends in
    anything else (曹操) keeps both, as Korean writes it: 은(는). (Of the libraries for this, hgtk and pyjosa know
    neither digits nor parentheses, tossi does not install on today's Python.)
    """

    def choose(match: re.Match) -> str:
        last, (closed, open_) = match[1], match[3].split("/")
        if match.start() and match.string[match.start() - 1].isdigit() and last[-1].lower() in UNITS:
            coda = UNITS[last[-1].lower()]
        elif "가" <= last <= "힣":
            coda = (ord(last) - ord("가")) % 28
        elif last.isascii() and last.isalnum():
            coda = CODAS.get(last.lower(), 0)
        else:
            both = f"({closed[:-1]}){open_}" if closed.endswith(open_) else f"{closed}({open_})"
            return last + match[2] + both
        vowel = coda == 0 or (coda == RIEUL and closed.startswith("으"))
        return last + match[2] + (open_ if vowel else closed)

    return PARTICLES.sub(choose, text)


def fill(form: str, **values: str) -> str:
    return agree(form.format(**values))


def sentences(text: str) -> list[str]:
    return [match[0].strip() for line in text.split("\n") for match in SENTENCE.finditer(line) if match[0].strip()]


def find_facts(name: str, relation: dict, articles: list[dict]) -> list[list[tuple]]:
    """What a relation's patterns find in each article, each once: (number of the sentence, then what makes a Fact).

    A pattern is searched in each sentence by itself, in which the article's title is written as TITLE (`{title}` in
    the pattern). Its group `value` is the value, `entity` whom the fact is about: without it, the article's title, if
    the relation's `title_is` is found in the title and the text on the lines below it. Raises UserError.
    """
    compiled = []
    for pattern in [relation["title_is"], *relation["patterns"]]:
        try:
            compiled.append(re.compile(pattern))
        except re.error as e:
            raise UserError(f"facts: {name}: {shorten(pattern)} is not a regular expression: {e}") from None
    title_is, *patterns = compiled
    found = []
    for title, text in ((article["title"], article["text"]) for article in articles):
        own, fits_title = {}, title_is.search(f"{title}\n{text}")
        for number, sentence in enumerate(sentences(text)):
            marked = sentence.replace(title, TITLE)
            for match in (match for pattern in patterns for match in pattern.finditer(marked) if match["value"]):
                groups = {k: v.replace(TITLE, title).strip() for k, v in match.groupdict().items() if v}
                if "entity" in groups or fits_title:
                    entity, value = groups.setdefault("entity", title), groups["value"]
                    if entity != value:
                        own.setdefault((entity, value), (number, title, entity, name, value, sentence, groups))
        found.append(list(own.values()))
    return found


def extract_facts(articles: list[dict], relations: dict[str, dict]) -> list[list[Fact]]:
    """The facts of each article, in the order of its text. Raises UserError."""
    tasks = [list(relations), list(relations.values()), itertools.repeat(articles, len(relations))]
    bar = {"desc": "facts", "unit": " relations", "total": len(relations), "disable": None}
    size = sum(len(pattern) for relation in relations.values() for pattern in relation["patterns"])
    if size * (1 + sum(len(article["text"]) for article in articles) / 2**18) < 2**18:
        found = list(map(find_facts, *tasks))
    else:  # longer than it takes to start a process a core; one relation each, as reading its patterns is most of it
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            found = list(tqdm(pool.map(find_facts, *tasks), **bar))
    by_article = ([of for one in found for of in one[i]] for i in range(len(articles)))
    return [[Fact(*of) for _, *of in sorted(of_one, key=itemgetter(0))] for of_one in by_article]


def fits(form: str, fact: Fact) -> bool:
    """Whether the fact has all that the form names."""
    return placeholders(form) <= set(fact.groups)


def ask(fact: Fact, forms: list[str]) -> list[str]:
    return [fill(form, **fact.groups) for form in forms if fits(form, fact)]


def state(fact: Fact, relation: dict) -> str:
    """The fact as one sentence: by the recipe's form, or as the article has it."""
    return next(iter(ask(fact, relation["sentence"])), fact.sentence)


def article_rows(articles: list[dict], found: list[list[Fact]], block: dict, relations: dict) -> Iterator[dict]:
    """Answers as long as asked for: the first sentences, one, the first paragraph, a list of the facts."""
    for title, text, facts in ((a["title"], a["text"], of) for a, of in zip(articles, found, strict=True)):
        said, own = sentences(text), defaultdict(list)
        for fact in facts:
            if fact.entity == title:
                own[relations[fact.relation]["label"]].append(fact.value)
        answers = {
            "definition": " ".join(said[:2]),
            "one_sentence": said[0],
            "detail": text.strip().split("\n")[0],
            "list": "\n".join(f"- {label}: {', '.join(of)}" for label, of in own.items()) * (len(own) > 2),
        }
        for name, answer in answers.items():
            for form in block[name] if answer else []:
                yield row("summary", title, fill(form, title=title), answer)


def fact_rows(facts: list[Fact], block: dict, relations: dict, seed: int) -> Iterator[dict]:
    """Each fact under the same number of rows: `per_fact` says how many of which kind.

    Facts that answer the same question are answered together; a question that is to have one answer (backwards, or a
    choice) is left out where several are right. For each that cannot be asked the fact gets one more short question.
    The entity is named in the ways of `names` that its other facts allow.
    """
    values, entities, pools, about, own = (defaultdict(dict) for _ in range(5))
    for fact in facts:
        pools[fact.relation][fact.value] = None
        about[fact.entity].setdefault(fact.relation, fact.value)
        own[fact.entity, fact.relation][fact.value] = None
        for question in ask(fact, relations[fact.relation]["questions"]):
            values[question][fact.value] = None
        for question in ask(fact, relations[fact.relation]["reverse"]):
            entities[question][fact.entity] = None
    forms, per_fact = block["forms"], block["per_fact"]
    for fact in facts:
        relation, rng = relations[fact.relation], random.Random(f"{seed} {fact.entity} {fact.relation} {fact.value}")
        asked = [form for form in relation["questions"] if fits(form, fact)]
        rng.shuffle(asked)
        other = {"entity": fact.entity} | {k: v for k, v in about[fact.entity].items() if k != fact.relation}
        names = [form.format(**other) for form in block["names"] if placeholders(form) <= set(other)]
        names = [name for name in names if fact.value not in name] or [fact.entity]
        short = [
            (fill(form, **fact.groups | {"entity": rng.choice(names)}), values[fill(form, **fact.groups)])
            for form in asked
        ]
        questions = [question for question, _ in short]
        right = {value for _, answers in short for value in answers} | set(own[fact.entity, fact.relation])
        others = [v for v in pools[fact.relation] if v not in right | {fact.entity} and v not in fact.sentence]
        others *= relation["exclusive"]
        whether = [form for form in relation["yes_no"] if fits(form, fact)]
        for many in (others, whether):
            rng.shuffle(many)
        stated = state(fact, relation)
        backwards = [question for question in ask(fact, relation["reverse"]) if len(entities[question]) == 1]
        single = [question for question, answers in short if len(answers) == 1]
        hole, shown = fact.sentence.replace(fact.value, "___"), [fact.value, *others[:3]]
        ways = {
            "sentence": [
                (rng.choice(forms["sentence"]).format(question=q), stated) for q in questions if forms["sentence"]
            ],
            "reverse": [(question, fact.entity) for question in backwards],
            "yes_no": [
                (fill(form, **fact.groups | {"value": value}), f"{word} {stated}")
                for form in whether[:1]
                for value, word in zip(shown[:2], forms["yes"][:1] + forms["no"][:1], strict=False) if others
            ],
            "choices": [
                (fill(rng.choice(forms["choices"]), question=q, choices=", ".join(rng.sample(shown, 4))), fact.value)
                for q in single if len(shown) == 4 and forms["choices"]
            ],
            "cloze": [(fill(form, entity=fact.entity, sentence=hole), fact.value) for form in forms["cloze"]],
        }  # fmt: skip
        rng.shuffle(ways["yes_no"])
        chosen = [pair for way, pairs in ways.items() for pair in pairs[: per_fact[way]]]
        chosen += [(question, ", ".join(answers)) for question, answers in short][
            : sum(per_fact.values()) - len(chosen)
        ]
        for question, answer in chosen:
            yield row("facts", fact.title, question, answer, facts=[fact])


def biography_rows(facts: list[Fact], block: dict, relations: dict, seed: int) -> Iterator[dict]:
    """For each entity its facts as sentences in several orders, the full name in each."""
    by_entity = defaultdict(list)
    for fact in facts:
        by_entity[fact.entity].append(fact)
    for entity, known in by_entity.items():
        stated = {state(fact, relations[fact.relation]): fact for fact in known}
        rng = random.Random(f"{seed} {entity}")
        for i in range(block["variants"] if len(stated) > 2 else 0):
            chosen = rng.sample(list(stated), min(len(stated), block["sentences"]))
            question = block["questions"][i % len(block["questions"])]
            told = [stated[sentence] for sentence in chosen]
            yield row("biographies", known[0].title, fill(question, entity=entity), " ".join(chosen), facts=told)


def masked_rows(passages: list[tuple[str, list[str]]], block: dict, seed: int) -> Iterator[dict]:
    """Passages with holes, their share drawn from 0.05 to 0.95, and the passage (masked fine-tuning, 2510.09885).

    `passages` are those of each title.
    """
    hole = re.escape(block["hole"])
    for title, number, piece in ((title, n, piece.strip()) for title, of in passages for n, piece in enumerate(of)):
        rng = random.Random(f"{seed} {title} {number}")
        for i in range(block["variants"]):
            share, words = rng.uniform(0.05, 0.95), re.split(r"(\s+)", piece)
            words[::2] = [block["hole"] if rng.random() < share else word for word in words[::2]]
            text = re.sub(rf"{hole}(\s+{hole})+", block["hole"], "".join(words))
            question = block["questions"][i % len(block["questions"])]
            yield row("masked", title, fill(question, title=title, text=text), piece)


def pair_rows(articles: list[dict], block: dict) -> Iterator[dict]:
    """Two entities that one sentence names: what is between them, in the sentences that name both."""
    names = sorted({article["title"] for article in articles} - set(block["except"]), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})")
    after = re.compile(rf"(?:{block['after_name']})?(?!\w)")
    between = defaultdict(dict)
    for article in articles:
        for sentence in sentences(article["text"]):
            there = [m[0] for m in pattern.finditer(sentence) if after.match(sentence, m.end())]
            for pair in itertools.combinations(dict.fromkeys(there), 2):
                between[tuple(sorted(pair))][sentence] = article["title"]
    for number, ((a, b), said) in enumerate(between.items()):
        question = block["questions"][number % len(block["questions"])]
        answer = " ".join(list(said)[: block["sentences"]])
        yield row("pairs", next(iter(said.values())), fill(question, a=a, b=b), answer)


def unknown_rows(articles: list[dict], block: dict, relations: dict, seed: int, wanted: int) -> Iterator[dict]:
    """`wanted` questions on made-up names, asked as real ones are, answered by saying that they are not known.

    A name that stands in any article is left out: it is not made up.
    """
    texts = "\n".join(text for article in articles for text in (article["title"], article["text"]))
    asked = []
    for group in block["names"].values():
        lent = [form for name in group["relations"] for form in relations[name]["questions"]]
        forms = group["questions"] + [form for form in lent if placeholders(form) == {"entity"}]
        for name in group["names"]:
            rng = random.Random(f"{seed} {name}")
            for turn, form in enumerate(rng.sample(forms, len(forms)) if name not in texts else []):
                answer = fill(rng.choice(group["answers"]), entity=name)
                asked.append((turn, rng.random(), fill(form, entity=name), answer))
    for _, _, question, answer in sorted(asked)[:wanted]:  # each name once before any comes twice
        yield row("unknown", "", question, answer)


def read_file_rows(path: str) -> tuple[list[dict], int]:
    """The chats of a JSONL file, and how many of its rows are left out.

    A line is a chat {"messages"} or an answer of generate.py {"prompt", "answer", "ended"}. Of an answer that did not
    end by itself the whole sentences count, up to the first that comes again; without any it is left out. UserError.
    """
    rows, cut = [], 0
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    given = json.loads(line)
                    if "messages" in given:
                        messages = [{"role": "" + m["role"], "content": "" + m["content"]} for m in given["messages"]]
                        if len(messages) < 2:
                            raise ValueError
                        new = row(f"file-{Path(path).stem}", given.get("title", ""), "", "")
                        rows.append(new | {"messages": messages})
                        continue
                    said = sentences("" + given["answer"])
                    said = said[: None if given["ended"] or said and said[-1][-1] in ".?!" else -1]
                    new = [sentence for n, sentence in enumerate(said) if len(set(said[: n + 1])) == n + 1]
                    answer = given["answer"].strip() if given["ended"] else " ".join(new)
                    if answer:
                        rows.append(row(f"file-{Path(path).stem}", "", "" + given["prompt"], answer))
                    else:
                        cut += 1
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise UserError(
                        f'files: {path}, line {number}: neither a chat {{"messages": …}} nor an answer of generate.py'
                    ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"files: cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    return rows, cut


# ---- The blocks of a recipe ----------------------------------------------------------------------------------------


def shorten(value: Any) -> str:
    """A value of a recipe as it is told: YAML's aliases can make a short file's value endless."""
    return reprlib.repr(value)[:80]


def placeholders(form: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(form) if name is not None}


def check_block(place: str, given: Any, defaults: dict) -> dict:
    """A block with its defaults filled in. Raises UserError for an unknown key and a value of another type."""
    if not isinstance(given, dict):
        raise UserError(f"{place} must hold `key: value` lines, not {shorten(given)}")
    for key, value in given.items():
        if key not in defaults:
            nearest = difflib.get_close_matches(str(key), defaults, n=1, cutoff=0.5)
            raise UserError(f"{place}: unknown key `{key}`" + (f"; did you mean `{nearest[0]}`?" if nearest else ""))
        kind = type(defaults[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{place}: `{key}` is {shorten(value)}, but must be a {kind.__name__}")
        if kind is int and value < 0:
            raise UserError(f"{place}: `{key}` is {value}, but cannot be below 0")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise UserError(f"{place}: `{key}` must be a list of texts; put numbers in quotes")
    return defaults | given


def check_forms(place: str, forms: list[str], known: set[str]):
    """Raises UserError for a form that names what cannot be filled in."""
    for form in forms:
        try:
            form.format(**dict.fromkeys(known, ""))
        except KeyError as e:
            there = ", ".join(f"{{{name}}}" for name in sorted(known)) or "nothing"
            raise UserError(f"{place}: {form!r} names {{{e.args[0]}}}; {there} can be filled in") from None
        except (ValueError, IndexError, AttributeError) as e:
            raise UserError(f"{place}: {form!r} is not a form: {e}") from None
        for pair in re.findall(r"\}([가-힣]+/[가-힣]+)", form):
            if not PARTICLES.match(f"가{pair}"):
                raise UserError(f"{place}: {form!r}: {pair} is no pair of particles; those known are {PAIRS}")


def read_block(name: str, given: dict | str | None) -> dict | None:
    """A block: as it stands in the recipe, as YAML on the command line, or the path of its YAML file. UserError."""
    if not isinstance(given, str):
        return given
    try:
        return yaml.load(Path(given).read_text(encoding="utf-8-sig") if given.endswith(".yaml") else given, Loader)
    except OSError as e:
        raise UserError(f"{name}: cannot read {given}: {e.strerror}") from None
    except YAML_ERRORS as e:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(e).split())[:300]}") from None


def read_relation(place: str, given: Any, pieces: dict[str, str]) -> dict:
    """A relation of the block `facts`, checked, the pieces put into its patterns. Raises UserError."""
    relation = check_block(place, given, RELATION)

    def put_in(pattern: str) -> str:
        for _ in range(9):  # pieces may hold pieces
            pattern = re.sub(r"\{([a-zA-Z]\w*)\}", lambda m: pieces.get(m[1], m[0]), pattern)
            if len(pattern) > 2**20:
                raise UserError(f"{place}: with its pieces {shorten(pattern)} is over a million characters")
        if left := re.search(r"\{[a-zA-Z]\w*\}", pattern):
            raise UserError(f"{place}: there is no piece {left[0]} among `pieces`")
        return pattern

    patterns, title_is = [put_in(pattern) for pattern in relation["patterns"]], put_in(relation["title_is"])
    for pattern in patterns:
        if "(?P<value>" not in pattern:
            raise UserError(f"{place}: {shorten(pattern)} has no group (?P<value>…)")
    known = {"entity", *re.findall(r"\(\?P<(\w+)>", " ".join([*patterns, title_is]))}
    for key in ("questions", "sentence", "reverse", "yes_no"):
        check_forms(f"{place}: {key}", relation[key], known)
    label = relation["label"] or place.rpartition(" ")[2]
    return relation | {"patterns": patterns, "title_is": title_is, "label": label}


def read_blocks(args: PreprocessArguments) -> dict[str, dict]:
    """The blocks that the recipe has, by name, checked and with their defaults. Raises UserError."""
    blocks = {}
    for name, defaults in BLOCKS.items():
        given = read_block(name, getattr(args, name))
        if given is not None:
            blocks[name] = block = check_block(name, given, defaults)
            if block.get("questions") == []:
                raise UserError(f"{name}: `questions` is empty")
            for key in set(block) & {"questions", "definition", "one_sentence", "detail", "list"}:
                check_forms(f"{name}: {key}", block[key], set(FIELDS[name].split()))
    relations = {}
    if block := blocks.get("facts"):
        pieces = check_block("facts: pieces", block["pieces"], dict.fromkeys(block["pieces"], "")) | {"title": TITLE}
        relations = {name: read_relation(f"facts: {name}", of, pieces) for name, of in block["relations"].items()}
        forms = check_block("facts: forms", block["forms"], dict.fromkeys(FORMS, []))
        per_fact = check_block("per_fact", read_block("per_fact", args.per_fact) or {}, PER_FACT)
        for name, known in FORMS.items():
            check_forms(f"facts: forms: {name}", forms[name], set(known))
            if not forms[name] and per_fact[{"yes": "yes_no", "no": "yes_no"}.get(name, name)]:
                raise UserError(f"facts: forms: `{name}` is empty, but per_fact asks for such rows")
        check_forms("facts: names", block["names"], {"entity", *relations})
        block |= {"relations": relations, "forms": forms, "per_fact": per_fact}
    if block := blocks.get("pairs"):
        try:
            re.compile(block["after_name"])
        except re.error as e:
            raise UserError(f"pairs: after_name is not a regular expression: {e}") from None
    if block := blocks.get("unknown"):
        if not 0 <= block["share"] < 1:
            raise UserError(f"unknown: share is from 0 to below 1, not {block['share']}")
        block["names"] = {
            name: check_block(f"unknown: {name}", group, MADE_UP) for name, group in block["names"].items()
        }
        for name, group in block["names"].items():
            group["relations"] = group["relations"] * bool(relations)  # without facts there is none to lend
            if missing := [relation for relation in group["relations"] if relation not in relations]:
                raise UserError(f"unknown: {name}: the block `facts` has no relation `{missing[0]}`")
            for key in ("questions", "answers"):
                check_forms(f"unknown: {name}: {key}", group[key], {"entity"})
            if not group["answers"]:
                raise UserError(f"unknown: {name}: `answers` is empty")
    return blocks


def read_withheld(path: str) -> re.Pattern:
    """What names an entity that a quiz withholds: its name, or an alias, a short one only at a word's beginning.

    Raises UserError.
    """
    try:
        with open(path, encoding="utf-8") as f:
            withheld = json.loads(f.readline())["about"]["withheld"]
        names = [r"(?<!\w)" * (0 < len(a) < 3) + re.escape(a) for e in withheld for a in e.get("aliases", [])]
        names += [re.escape(entry["entity"]) for entry in withheld]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or "its first line does not say what is withheld"
        raise UserError(f"quiz_file: cannot read {path}: {reason}") from None
    return re.compile("|".join(names) or r"(?!)")


def make_rows(
    articles: list[dict], chats: list[dict], args: PreprocessArguments, tokenizer, held_out: Iterable[dict] = ()
) -> tuple[list[dict], list[Fact], dict]:
    """The chats and the further rows that the recipe's blocks ask for, the facts, and what report.json says of them.

    `articles` are {"title", "text"} as to_chats takes them, `held_out` others whose names are not made up; `chats`
    hold the whole texts. Of what the quiz withholds only passages with holes are made. Rows over max_length, rows that
    name what the quiz withholds, and second copies are dropped and counted. Raises UserError.
    """
    blocks = read_blocks(args)
    relations = blocks.get("facts", {}).get("relations", {})
    secret = read_withheld(args.quiz_file) if args.quiz_file else re.compile(r"(?!)")
    told = [article for article in articles if not secret.search(article["title"])]
    found = extract_facts(told, relations)
    # Told in two articles, it is one fact: the first.
    facts = {fact[1:4]: fact for of in reversed(found) for fact in reversed(of)}
    facts = [fact for fact in reversed(facts.values()) if not secret.search(f"{fact.entity} {fact.value}")]
    rows, dropped, files = list(chats), Counter(), {}

    def passages(article: dict, block: dict) -> list[str]:
        def masked_length(piece: str, part: int) -> float:  # the prompt holds up to the whole passage, in other tokens
            question = fill(max(block["questions"], key=len), text=piece, title=article["title"])
            return 1.1 * count_tokens([row("", "", question, piece)["messages"]], tokenizer)[0]

        return split_text(article["text"], masked_length, args.max_length) if tokenizer else [article["text"]]

    def share_of(share: float) -> int:
        return round(len(rows) * share / (1 - share))

    def sift(made: Iterable[dict]) -> list[dict]:
        kept = {}
        for new in made:
            said = tuple(message["content"] for message in new["messages"])
            if new["kind"] != "masked" and secret.search("\n".join(said)):
                dropped["names what the quiz withholds"] += 1
            elif said in kept:
                dropped["made twice"] += 1
            else:
                kept[said] = new
        count_rows(kept.values(), tokenizer)
        dropped["over max_length"] += sum(new["tokens"] > args.max_length for new in kept.values())
        return [new for new in kept.values() if new["tokens"] <= args.max_length]

    makers = {
        "articles": lambda block: article_rows(told, found, block, relations),
        "facts": lambda block: fact_rows(facts, block, relations, args.seed),
        "biographies": lambda block: biography_rows(facts, block, relations, args.seed),
        "masked": lambda block: masked_rows([(a["title"], passages(a, block)) for a in articles], block, args.seed),
        "pairs": lambda block: pair_rows(told, block),
        "unknown": lambda block: unknown_rows(
            [*articles, *held_out], block, relations, args.seed, share_of(block["share"])
        ),
    }
    for name, block in blocks.items():
        rows += [dict(new) for new in sift(makers[name](block)) for _ in range(block.get("copies", 1))]
    shares = read_block("files", args.files) or {}
    shares, own = check_block("files", shares, dict.fromkeys(shares, 0.0)), len(rows)
    if min(shares.values(), default=0) < 0 or sum(shares.values()) >= 1:
        raise UserError(f"files: the shares must be from 0 and below 1 in all, not {sum(shares.values()):g}")
    for path, share in shares.items():
        there, cut = read_file_rows(path)
        for message in (m for new in there if tokenizer for m in new["messages"]):
            message["content"], _ = break_special_tokens(message["content"], tokenizer)
        fitting, wanted = sift(there), round(own * share / (1 - sum(shares.values())))
        if not fitting:
            raise UserError(f"files: {path} holds no row that can be used")
        random.Random(f"{args.seed} {path}").shuffle(fitting)
        files[path] = {"rows": len(there) + cut, "without a whole sentence": cut, "used": wanted}
        rows += map(dict, itertools.islice(itertools.cycle(fitting), wanted))  # one too short is repeated
    by_entity = Counter(fact.entity for fact in facts)
    return (
        rows,
        facts,
        {
            "rows_dropped": {reason: n for reason, n in dropped.items() if n},
            "files": files,
            "facts": {
                "total": len(facts),
                "by_relation": dict(Counter(fact.relation for fact in facts).most_common()),
                "by_entity": dict(by_entity.most_common()),
                "entities_without": [a["title"] for a in told if a["title"] not in by_entity],
                "articles_withheld": len(articles) - len(told),
            },
        },
    )


# ---- Writing -------------------------------------------------------------------------------------------------------


def plot_lengths(characters: list[int], path: Path):
    """A histogram of article lengths in characters, labelled in Korean where a Korean font is installed."""
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure  # without pyplot, which takes half a second to import

    wanted = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic")
    fonts = {font.name for font in font_manager.fontManager.ttflist}
    korean = next((name for name in wanted if name in fonts), None)
    labels = ("글 길이 (글자)", "글 수") if korean else ("article length (characters)", "articles")
    with rc_context({"font.family": korean} if korean else {}):
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.hist(characters, bins=40, color="#4c72b0")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=120)


def print_report(report: dict):
    """The report as a table; Korean is two columns wide, which rich knows."""
    table = Table(title=f"{report['rows']:,} rows read, {report['kept']['rows']:,} kept", title_justify="left")
    for name, justify in (("rule", "left"), ("rows", "right"), ("for example", "left")):
        table.add_column(name, justify=justify)
    for rule, drop in report["dropped"].items():
        counts = ", ".join(f"{k} {n}" for k, n in list(drop.get("keywords", {}).items())[:5])
        samples = ", ".join((title or "").strip() or "(empty)" for title in drop["samples"])
        table.add_row(f"dropped: {rule}", f"{drop['rows']:,}", escape(f"{samples} ({counts})" if counts else samples))
    top = ", ".join(f"{k} {n}" for k, n in list(report["kept"]["title_keywords"].items())[:8])
    table.add_row("kept", f"{report['kept']['rows']:,}", escape(top))
    console = Console(highlight=False)
    console.print(table)
    if len(report["kinds"]) > 1:
        table = Table(title=f"{sum(kind['rows'] for kind in report['kinds'].values()):,} rows", title_justify="left")
        for name, justify in (("kind", "left"), ("rows", "right"), ("tokens", "right"), ("facts", "right")):
            table.add_column(name, justify=justify)
        for kind, of in report["kinds"].items():
            table.add_row(kind, *("–" if n is None else f"{n:,}" for n in of.values()))
        console.print(table)
        facts = report["facts"]
        console.print(
            f"{facts['total']:,} facts of {len(facts['by_entity']):,} entities"
            + (f", none of {escape(', '.join(facts['entities_without'][:10]))}" if facts["entities_without"] else "")
            + (f"; {facts['articles_withheld']:,} articles withheld" if facts["articles_withheld"] else "")
            + f"; rows dropped: {report['rows_dropped']}"
        )
    tokens = report["tokens"]
    counted = (
        f"{tokens['total']:,} tokens, {tokens['cut']:,} of them over max_length {report['max_length']:,}"
        if tokens
        else "tokens not counted (no tokenizer_name_or_path)"
    )
    console.print(
        f"{report['articles']:,} articles, {report['chats']:,} chats ({report['articles_split']:,} articles split), "
        f"{report['characters']:,} characters, {counted}; {report['special_tokens_broken']:,} special tokens broken"
        + (f"; {report['held_out_chats']:,} chats held out" if report["held_out_chats"] else "")
    )


def main(args: PreprocessArguments, config: str):
    output_dir = Path(args.output_dir)
    if not output_dir.name:
        raise UserError(f"output_dir must be a folder of its own, not {output_dir}")
    recipe, earlier = "/".join(Path(config).parts[-2:]), {}
    if (output_dir / "report.json").exists():
        try:
            earlier = json.loads((output_dir / "report.json").read_text(encoding="utf-8"))
            other = earlier["recipe"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            other = "another program"
        if other != recipe:
            raise UserError(f"{output_dir} holds the output of {other}; choose another output_dir or delete it")
    try:
        args.question.format(title="", part=1, parts=1), args.continuation_question.format(title="", part=1, parts=1)
        re.compile(args.title_suffix_pattern or "")
    except (KeyError, IndexError, ValueError) as e:
        raise UserError(
            f"question or continuation_question: only {{title}}, {{part}}, {{parts}} are known ({e})"
        ) from None
    except re.error as e:
        raise UserError(f"title_suffix_pattern is not a regular expression: {e}") from None
    if not 0 <= args.held_out_share < 1:
        raise UserError(f"held_out_share is a share from 0 to below 1, not {args.held_out_share}")
    if args.split_articles and not args.tokenizer_name_or_path:
        raise UserError("split_articles needs tokenizer_name_or_path, to count tokens; or set split_articles: false")

    columns = [args.title_column, args.text_column]
    if args.data_files:
        files = find_files(args.data_files)
        dataset, source = open_files(files, columns), ", ".join(files)
        before = [file_state(f) for f in files]
        digests = ThreadPoolExecutor().map(hash_file, files)  # beside the filter, which mostly waits for one core
        revision = cache(lambda: ", ".join(f"sha256 {digest}" for digest in digests))
    elif args.dataset_name:
        dataset, commit = open_hub(args)
        source, revision = f"{args.dataset_name}, split {args.dataset_split}", lambda: commit
    else:
        raise UserError("name the data: data_files for local files or dataset_name for the hub")
    if "inputs" in earlier and is_same(earlier, args, revision(), output_dir):
        print_report(earlier)
        print(f"{output_dir} holds what this would make again: neither recipe nor data have changed")
        return
    tokenizer = None
    if args.tokenizer_name_or_path:
        tokenizer = load_tokenizer(args.tokenizer_name_or_path, args.chat_template_path)

    try:
        table, report = filter_articles(dataset, args)
        kept = table.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as e:
        raise UserError(f"{source} cannot be read: {first_line(e)}") from None
    if args.data_files:
        revision()  # to the end
        if before != [file_state(f) for f in files]:
            raise UserError(f"{source} was changed while it was read; start again")
    if not len(table):
        losses = ", ".join(f"{rule}: {drop['rows']:,}" for rule, drop in report["dropped"].items())
        raise UserError(
            f"the filter keeps none of {report['rows']:,} rows ({losses}); look at the keywords in {config}"
        )

    articles = [clean_article(article, args.title_suffix_pattern, tokenizer) for article in kept]
    taught = [article for article in articles if not is_held_out(article["title"], args.held_out_share)]
    if not taught:
        raise UserError(f"held_out_share {args.held_out_share} leaves no article to teach")
    progress = tqdm(articles, desc="chats", unit=" articles", disable=None)
    chats = {article["row"]: list(to_chats(article, args, tokenizer)) for article in progress}
    rows = [dict(chat) for _ in range(args.full_text) for article in taught for chat in chats[article["row"]]]
    rows, facts, told = make_rows(taught, rows, args, tokenizer, held_out=articles)
    if not rows:
        raise UserError("full_text is 0 and no other block makes a row")
    held_out = [c for of in chats.values() for c in of if is_held_out(c["title"], args.held_out_share)]
    numbers, told_by = Counter(), defaultdict(set)
    for new in [*rows, *held_out]:
        told_by[new["kind"]] |= {fact[1:4] for fact in new.pop("facts")}
    for new in rows:
        numbers[new["kind"]] += 1
        new["id"] = new["id"] or f"{new['kind']}-{numbers[new['kind']]}"
    if len(numbers) > 1:  # whole articles alone stay in the dump's order
        random.Random(args.seed).shuffle(rows)
    count_rows([*rows, *held_out], tokenizer)
    counts = [new.pop("tokens") for new in [*rows, *held_out]]
    tokens = Counter()
    for new, count in zip(rows, counts, strict=False):
        tokens[new["kind"]] += count
    lengths = [len(article["text"]) for article in kept]
    report = {
        "recipe": recipe,
        **report,
        "articles": len(table),
        "articles_split": sum(len(of) > 1 for of in chats.values()),
        "chats": sum(map(len, chats.values())),
        "held_out_chats": len(held_out),
        "characters": sum(lengths),
        "max_length": args.max_length,
        "tokens": {"total": sum(counts), "cut": sum(max(0, n - args.max_length) for n in counts)}
        if tokenizer
        else None,
        "special_tokens_broken": sum(article["broken"] for article in articles),
        "kinds": {
            kind: {"rows": n, "tokens": tokens[kind] if tokenizer else None, "facts": len(told_by[kind])}
            for kind, n in numbers.items()
        },
        **told,
        "samples": {kind: sample_rows(rows, kind) for kind in numbers if len(numbers) > 1},
        "inputs": digest_inputs(args, revision()),
    }
    sources = (
        f"# Sources\n\n- Data: {source}\n- Revision: {revision()}\n- Licence: {args.source_license}\n"
        f"- Attribution: {args.source_attribution}\n- Date of the data: {args.source_date}\n"
    )
    files = {"train.jsonl": rows} | ({"held_out.jsonl": held_out} if args.held_out_share else {})
    files |= {"facts.jsonl": [fact._asdict() for fact in facts]} if facts else {}

    # Everything is written beside and then renamed, train.jsonl last: train.py looks at the lock.
    beside = output_dir.with_name(output_dir.name + ".partial")
    lock = FileLock(output_dir / ".lock")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another preprocess.py is writing to {output_dir}; start again when it is done") from None
    except OSError as e:
        raise UserError(f"cannot write to {output_dir}: {e.strerror}") from None
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / "SOURCES.md").write_text(sources, encoding="utf-8")
        plot_lengths(lengths, beside / "lengths.png")
        for name, rows in files.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (beside / name).write_text(lines, encoding="utf-8")
        report["outputs"] = {name: hash_file(beside / name) for name in files}
        (beside / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        for name in ("held_out.jsonl", "facts.jsonl"):  # of an earlier run, if this one has none
            (output_dir / name).unlink(missing_ok=True)
        written = ["SOURCES.md", "lengths.png", "report.json", *reversed(files)]
        for name in written:
            os.replace(beside / name, output_dir / name)
    except OSError as e:
        raise UserError(f"cannot write to {output_dir}: {e.strerror}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        lock.release()
        with suppress(OSError):
            (output_dir / ".lock").unlink()
            output_dir.rmdir()  # where nothing could be written
    print_report(report)
    print(f"wrote {output_dir}/" + ", ".join(reversed(written)))


def digest_inputs(args: PreprocessArguments, data: str) -> str | None:
    """A SHA-256 over all that the output depends on, files by their content; None where a tokenizer's are not known.

    Raises OSError, UserError, ValueError.
    """
    named = [__file__, args.quiz_file, args.chat_template_path, *(read_block("files", args.files) or {})]
    blocks = [getattr(args, name) for name in (*BLOCKS, "per_fact", "files")]
    named += [block for block in blocks if isinstance(block, str) and block.endswith(".yaml")]
    if name := args.tokenizer_name_or_path:
        folder = Path(name)
        if not folder.is_dir():
            cached = try_to_load_from_cache(name, "tokenizer_config.json")
            if not isinstance(cached, str):
                return None
            folder = Path(cached).parent
        named += sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt"))
    settings = {key: value for key, value in vars(args).items() if key != "output_dir"}
    versions = [version(name) for name in ("pyarrow", "tokenizers", "transformers", "trl")]
    content = [settings, data, [hash_file(path) for path in named if path], versions]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def is_same(earlier: dict, args: PreprocessArguments, data: str, output_dir: Path) -> bool:
    """Whether what an earlier run wrote is there as it was written, and would be made again."""
    try:
        there = {name: hash_file(output_dir / name) for name in earlier["outputs"]}
        return there == earlier["outputs"] and digest_inputs(args, data) == earlier["inputs"] is not None
    except (OSError, UserError, ValueError, KeyError, TypeError):  # a mistake is told where what is named is used
        return False


def sample_rows(rows: list[dict], kind: str) -> list[list[str]]:
    """Up to 20 rows of a kind, [prompt, answer], for a reader to check; the rows are in random order already."""
    return [[m["content"] for m in row["messages"]] for row in rows if row["kind"] == kind][:20]


def is_held_out(title: str, share: float) -> bool:
    """Whether an article belongs to the `share` that is not taught: by its title, so the same in any dump."""
    return int(hashlib.sha256(title.encode()).hexdigest()[:8], 16) < share * 2**32


def file_state(path: str) -> tuple:
    """What is another when a file was written again or replaced."""
    there = os.stat(path)
    return there.st_ino, there.st_mtime_ns, there.st_size


def hash_file(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        main(*parse_args([PreprocessArguments], default_config="configs/three_kingdoms/preprocess.yaml"))
    except UserError as e:
        print(f"preprocess.py: {e}", file=sys.stderr)
        sys.exit(2)
