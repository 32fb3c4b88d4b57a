"""Filter the articles on one topic out of an encyclopedia dump and write them as chats, one JSON object a line.

The topic lives in a YAML file: which titles and texts to keep, how to ask, where articles are split. Writes
train.jsonl, report.json, SOURCES.md and lengths.png to `output_dir`, whole or not at all; the same input gives the
same bytes.

    python preprocess.py                                          # configs/three_kingdoms/preprocess.yaml
    python preprocess.py --config configs/demo/preprocess.yaml
    python preprocess.py --data_files dump.parquet --output_dir data/mine
"""

import argparse
import difflib
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import get_args, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.json
import yaml
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


class UserError(Exception):
    """A mistake of the user: told in one sentence, without a traceback, exit code 2."""


@dataclass
class PreprocessArguments:
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
    source_license: str = field(default="not stated", metadata={"help": "Licence of the data, for SOURCES.md."})
    source_attribution: str = field(default="not stated", metadata={"help": "Whom to name, for SOURCES.md."})
    source_date: str = field(default="not stated", metadata={"help": "Date of the data, for SOURCES.md."})
    output_dir: str = field(default="data/three_kingdoms", metadata={"help": "Folder that the files are written to."})


class Parser(TrlParser):
    def error(self, message: str):
        raise UserError(message)


def parse_args(dataclass_types, default_config: str) -> tuple:
    """TrlParser, with the values of the YAML file checked as those of the command line are, which wins.

    Returns the dataclass instances and the path of the YAML file. Raises UserError for an unreadable file, an unknown
    key (with the nearest known one) and a value of the wrong type. The three scripts share it word for word.
    """
    parser = Parser(dataclass_types, allow_abbrev=False)
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    hints = {name: hint for cls in dataclass_types for name, hint in get_type_hints(cls).items()}
    dict_fields = {name for cls in dataclass_types for name in getattr(cls, "_VALID_DICT_FIELDS", [])}
    argv, path = list(sys.argv[1:]), default_config
    for i, arg in enumerate(argv):
        if arg == "--config" or arg.startswith("--config="):
            inline = arg.partition("=")[2]
            if not inline and i + 1 == len(argv):
                raise UserError("--config needs the path of a YAML file")
            path = inline or argv[i + 1]
            del argv[i : i + (1 if inline else 2)]
            break
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as e:
        raise UserError(f"cannot read the config file {path}: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(config).__name__}")
    for arg in [arg for arg in argv if re.fullmatch(r"--\w+=", arg)]:  # `--key=` unsets what the YAML file says
        argv.remove(arg)
        config[arg[2:-1]] = None
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
    except (UserError, ValueError) as e:
        raise UserError(f"{path} with the command line: {e}") from None
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
    except (pa.ArrowInvalid, OSError) as e:
        raise UserError(f"data_files: {files[0]} cannot be read as {suffix}: {first_line(e)}") from None
    for name in columns:
        if name not in there:
            raise UserError(f"{files[0]} has no column {name!r}; its columns are {', '.join(there)}")
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
    return str(error).strip().split("\n")[0].rstrip(".")


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
        gone = table.filter(mask)["title"]
        dropped[rule] = {"rows": len(gone), "samples": gone.slice(0, 3).to_pylist()}
        if keywords:
            dropped[rule]["keywords"] = count_each(gone, keywords)
        return table.filter(pc.invert(mask))

    titles = dataset.to_table(columns=[args.title_column])[args.title_column].cast(pa.string())
    table = pa.table({"row": pa.array(range(len(titles)), pa.int64()), "title": titles})
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
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as e:
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
        except OSError as e:
            raise UserError(f"chat_template_path: cannot read {chat_template_path}: {e.strerror}") from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer {name_or_path} has no chat template; name a Jinja file in chat_template_path")
    tokenizer.chat_template = re.sub(
        r"strftime_now\(\s*([\"'])(.*?)\1\s*\)",
        lambda call: json.dumps(FIXED_DATE.strftime(call[2])),
        tokenizer.chat_template,
    )
    return tokenizer


def break_special_tokens(text: str, tokenizer) -> tuple[str, int]:
    """A zero-width space inside each of the tokenizer's special tokens, so that text cannot end or start a turn.

    Returns the text and how many were broken.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    return re.subn(pattern, lambda m: m[0][0] + "\u200b" + m[0][1:], text) if special else (text, 0)


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


def to_chats(article: dict, args: PreprocessArguments, tokenizer) -> Iterator[dict]:
    """The chats of one article {"row", "title", "text"}, with the tokens of each (None without a tokenizer).

    Yields {"chat": the line of train.jsonl, "tokens": int | None, "broken": special tokens broken in it}.
    """
    title, text, broken = article["title"], article["text"], 0
    if args.title_suffix_pattern:
        title = re.sub(args.title_suffix_pattern, "", title)
    if tokenizer:
        (title, in_title), (text, in_text) = (break_special_tokens(s, tokenizer) for s in (title, text))
        broken = in_title + in_text

    def messages(piece: str, part: int, parts: int) -> list[dict]:
        form = args.question if part == 1 else args.continuation_question
        question = form.format(title=title, part=part, parts=parts)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": piece}]

    def count_tokens(
        piece: str, part: int, parts: int = 999
    ) -> int:  # while splitting, room for three digits of parts
        return len(tokenizer.apply_chat_template(messages(piece, part, parts), return_dict=False))

    pieces = split_text(text, count_tokens, args.max_length) if tokenizer and args.split_articles else [text]
    for part, piece in enumerate(pieces, 1):
        yield {
            "chat": {
                "messages": messages(piece, part, len(pieces)),
                "title": title,
                "id": f"article-{article['row']}-{part}",
                "kind": "article",
            },
            "tokens": count_tokens(piece, part, len(pieces)) if tokenizer else None,
            "broken": broken if part == 1 else 0,
        }


# ---- Writing -------------------------------------------------------------------------------------------------------


def plot_lengths(characters: list[int], path: Path):
    """A histogram of article lengths in characters, labelled in Korean where a Korean font is installed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

    wanted = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic")
    fonts = {font.name for font in font_manager.fontManager.ttflist}
    korean = next((name for name in wanted if name in fonts), None)
    labels = ("글 길이 (글자)", "글 수") if korean else ("article length (characters)", "articles")
    with plt.rc_context({"font.family": korean} if korean else {}):
        figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
        axes.hist(characters, bins=40, color="#4c72b0")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=120)
        plt.close(figure)


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
    recipe = "/".join(Path(config).parts[-2:])
    if (output_dir / "report.json").exists():
        try:
            other = json.loads((output_dir / "report.json").read_text(encoding="utf-8"))["recipe"]
        except (OSError, ValueError, KeyError, TypeError):
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
        revision = ", ".join(f"sha256 {hash_file(f)}" for f in files)
    elif args.dataset_name:
        dataset, revision = open_hub(args)
        source = f"{args.dataset_name}, split {args.dataset_split}"
    else:
        raise UserError("name the data: data_files for local files or dataset_name for the hub")
    tokenizer = None
    if args.tokenizer_name_or_path:
        tokenizer = load_tokenizer(args.tokenizer_name_or_path, args.chat_template_path)

    try:
        table, report = filter_articles(dataset, args)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as e:
        raise UserError(f"{source} cannot be read: {first_line(e)}") from None
    if not len(table):
        losses = ", ".join(f"{rule}: {drop['rows']:,}" for rule, drop in report["dropped"].items())
        raise UserError(
            f"the filter keeps none of {report['rows']:,} rows ({losses}); look at the keywords in {config}"
        )

    articles = tqdm(table.to_pylist(), desc="chats", unit=" articles", disable=None)
    try:
        chats = [chat for article in articles for chat in to_chats(article, args, tokenizer)]
    except TemplateError as e:
        raise UserError(f"the chat template of {args.tokenizer_name_or_path} cannot render a chat: {e}") from None
    parts = [int(c["chat"]["id"].rpartition("-")[2]) for c in chats]
    lengths = [len(text) for text in table["text"].to_pylist()]
    counts = [c["tokens"] for c in chats] if tokenizer else []
    taught, held_out = [], []
    for chat in chats:
        (held_out if is_held_out(chat["chat"]["title"], args.held_out_share) else taught).append(chat["chat"])
    if not taught:
        raise UserError(f"held_out_share {args.held_out_share} leaves no article to teach")
    report = {
        "recipe": recipe,
        **report,
        "articles": len(table),
        "articles_split": parts.count(2),
        "chats": len(chats),
        "held_out_chats": len(held_out),
        "characters": sum(lengths),
        "max_length": args.max_length,
        "tokens": {"total": sum(counts), "cut": sum(max(0, n - args.max_length) for n in counts)}
        if tokenizer
        else None,
        "special_tokens_broken": sum(c["broken"] for c in chats),
    }
    sources = (
        f"# Sources\n\n- Data: {source}\n- Revision: {revision}\n- Licence: {args.source_license}\n"
        f"- Attribution: {args.source_attribution}\n- Date of the data: {args.source_date}\n"
    )
    files = {"train.jsonl": taught} | ({"held_out.jsonl": held_out} if args.held_out_share else {})

    # Everything is written beside and then renamed, train.jsonl last: who sees it sees all.
    beside = output_dir.with_name(output_dir.name + ".partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / "SOURCES.md").write_text(sources, encoding="utf-8")
        plot_lengths(lengths, beside / "lengths.png")
        (beside / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        for name, rows in files.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (beside / name).write_text(lines, encoding="utf-8")
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "held_out.jsonl").unlink(missing_ok=True)  # of an earlier recipe, if this one holds none out
        written = ["SOURCES.md", "lengths.png", "report.json", *reversed(files)]
        for name in written:
            os.replace(beside / name, output_dir / name)
    except OSError as e:
        raise UserError(f"cannot write to {output_dir}: {e.strerror}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print_report(report)
    print(f"wrote {output_dir}/" + ", ".join(reversed(written)))


def is_held_out(title: str, share: float) -> bool:
    """Whether an article belongs to the `share` that is not taught: by its title, so the same in any dump."""
    return int(hashlib.sha256(title.encode()).hexdigest()[:8], 16) < share * 2**32


def hash_file(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        main(*parse_args([PreprocessArguments], default_config="configs/three_kingdoms/preprocess.yaml"))
    except UserError as e:
        print(f"preprocess.py: {e}", file=sys.stderr)
        sys.exit(2)
