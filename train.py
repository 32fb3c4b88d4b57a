"""Teach a causal language model the chats of train.jsonl with TRL's SFTTrainer: all its weights, FSDP2 over GPUs.

Prints what will run before the first step, goes on from the last complete checkpoint of the same run, and leaves
self-contained checkpoints, `final` (an ordinary Hugging Face folder), training_log.jsonl and loss.png in `output_dir`.

    accelerate launch --config_file accelerate_fsdp.yaml train.py    # two GPUs, configs/three_kingdoms/train.yaml
    python train.py --config configs/small_gpu/train.yaml            # LoRA, a GPU of 12 GB
    python train.py --config configs/demo/train.yaml                 # the CPU
    python train.py --dry_run                                        # only tell: steps, tokens, memory, disk
"""

import argparse
import copy
import ctypes
import difflib
import errno
import hashlib
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_type_hints

import psutil
import torch
import yaml
from filelock import FileLock, Timeout
from jinja2 import TemplateError
from safetensors import SafetensorError
from tqdm import tqdm
from trl import ModelConfig, SFTConfig, TrlParser

# The date that a chat template prints when it asks for today's: Meta's own default for Llama 3.2.
FIXED_DATE = datetime(2024, 7, 26)
# What may change between the start of a run and its resumption, by how its name begins: where things are and what is
# logged, saved and shown, not what is learned. The rows are known by their digest, data_sha256.
FREE_SETTINGS = tuple(
    "settings config step train_file output_dir logging log_ save eval hub push report_to run_name project "
    "trackio dataloader_num dataloader_p disable_tqdm resume do_ ddp_timeout dataset_num_proc local_rank debug "
    "include_ torch_empty skip_memory restore prediction".split()
)
# Further, how a step is divided, as long as it takes as many sequences, and what gives the same but for rounding.
STEP_SETTINGS = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
FREE_BUT_FOR_ROUNDING = ("version", "device", *STEP_SETTINGS)
# Settings named in the model card.
CARD_SETTINGS = (
    "learning_rate lr_scheduler_type warmup_steps num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps max_length packing packing_strategy completion_only_loss optim weight_decay seed bf16"
).split()

# What a number of the recipe must lie between, where the libraries would fail late or in their own words.
RANGES = {
    "max_length": (8, 2**20), "per_device_train_batch_size": (1, 2**31), "per_device_eval_batch_size": (1, 2**31),
    "gradient_accumulation_steps": (1, 2**31), "num_train_epochs": (1e-6, 1e6), "max_steps": (-1, 2**31),
    "learning_rate": (0, 1e15), "weight_decay": (0, 1e3), "max_grad_norm": (0, 1e15), "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1), "dataloader_num_workers": (0, 1024), "logging_steps": (1e-9, 2**31),
    "save_steps": (1e-9, 2**31), "eval_steps": (1e-9, 2**31), "save_total_limit": (1, 2**31),
    "warmup_steps": (0, 2**31),
}  # fmt: skip

LORA_RANGES = {"lora_r": (1, 2**16), "lora_alpha": (1, 2**16), "lora_dropout": (0, 0.99)}

# The exit code of a run that was asked to stop and saved: sysexits.h calls it EX_TEMPFAIL, try again later.
STOPPED = 75

# What a chat template raises that cannot render: it is a program, and may divide by zero as well.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, AttributeError)


class UserError(Exception):
    """A mistake of the user: told in one sentence, without a traceback, exit code 2."""

    def __init__(self, message: str):
        line = " ".join(message.split())  # it may hold what was given: lines, or any length
        super().__init__(line if len(line) <= 1500 else f"{line[:1500]} …")


class BadNumbers(Exception):
    """Loss, gradient or a module's output is not finite: told by the process that saw it, exit code 3."""


def check_ranges(arguments, ranges: dict[str, tuple[float, float]]):
    for name, (low, high) in ranges.items():
        value = getattr(arguments, name)
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):  # false of NaN
            raise ValueError(f"{name} must be from {low:g} to {high:g}, not {value}")


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(
        default="meta-llama/Llama-3.2-1B-Instruct", metadata={"help": "Model to teach: hub name or folder."}
    )
    train_file: str = field(default="data/three_kingdoms/train.jsonl", metadata={"help": "Chats, one a line."})
    eval_file: list[str] | None = field(
        default=None,
        metadata={"help": "For eval_strategy: chats held out, or a quiz, of which the development split is used."},
    )
    resume: str = field(
        default="auto", metadata={"help": "auto: go on from the last complete checkpoint; never; or a checkpoint."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Tell what would run and stop; exit code 1 if it cannot."})
    reproduce: str | None = field(
        default=None,
        metadata={"help": "Tell whether this command would make this checkpoint again and stop; exit code 1 if not."},
    )
    freeze_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Leave the embeddings, and the output layer tied to them, as they are: faster, less memory."
        },
    )
    use_peft: bool = field(
        default=False,
        metadata={
            "help": "LoRA: learn small matrices beside the weights, which stay as they are; `final` has the sum."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "With use_peft: the rank of these matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "With use_peft: their product counts alpha / r times."})
    lora_dropout: float = field(default=0.0, metadata={"help": "With use_peft: the share of their input dropped."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "With use_peft: the layers that get them; all-linear: all but the output layer."},
    )
    allow_truncation: bool = field(
        default=False, metadata={"help": "Cut rows longer than max_length instead of refusing them."}
    )
    detect_anomaly: bool = field(
        default=False, metadata={"help": "Slow: name the module whose output is the first to be NaN or infinite."}
    )

    def __post_init__(self):
        check_ranges(self, LORA_RANGES)
        for f in fields(self):
            usual = f.default_factory() if f.default is MISSING else f.default
            if f.name.startswith("lora_") and not self.use_peft and getattr(self, f.name) != usual:
                raise ValueError(f"{f.name} does nothing without use_peft: true")

    @property
    def lora(self) -> dict:
        """The settings of LoRA by the names that they have in TRL's ModelConfig; empty without use_peft."""
        return {k: v for k, v in vars(self).items() if k.startswith("lora_")} if self.use_peft else {}


@dataclass
class TrainingArguments(SFTConfig):
    """SFTConfig, in bf16 where the hardware has it, else in fp32, unless the recipe or accelerate's file says."""

    output_dir: str | None = field(
        default="outputs/three_kingdoms", metadata={"help": "Folder for checkpoints, the final model and the log."}
    )

    def __post_init__(self):
        check_ranges(self, RANGES)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and computes_bf16()
        self.dataloader_pin_memory &= torch.cuda.is_available()  # torch warns at each epoch otherwise
        # Without a GPU accelerate joins its processes only when told that they are to use the CPU: else each would
        # train alone, all into one folder. (ACCELERATE_TORCH_DEVICE: accelerate was told a device by name.)
        self.use_cpu |= not torch.accelerator.is_available() and "ACCELERATE_TORCH_DEVICE" not in os.environ
        super().__post_init__()
        if self.n_gpu > 1:  # Trainer would split batches with nn.DataParallel, which SFTTrainer refuses
            say(f"note: of {self.n_gpu} GPUs one is used; accelerate launch --config_file accelerate_fsdp.yaml: all")
            self._n_gpu = 1


def computes_bf16() -> bool:
    """Whether the GPU, or the CPU where there is none, computes in bf16; other CPUs emulate it, very slowly."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: ARM


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


def check_processes():
    """Raises UserError when the launcher started more processes than there are GPUs."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if torch.cuda.is_available() and processes > gpus and os.environ.get("ACCELERATE_USE_CPU") != "true":
        raise UserError(f"{processes} processes were started for {gpus} GPUs; launch with --num_processes={gpus}")


def tell(function: Callable, *args):
    """What a function returns; its UserError or BadNumbers is told in a sentence and ends the program."""
    try:
        return function(*args)
    except UserError as e:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train.py: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BadNumbers as e:
        print(f"train.py: process {os.environ.get('RANK', 0)}: {e}", file=sys.stderr, flush=True)
        sys.exit(3)


if __name__ == "__main__":  # --help and mistakes are told here, before libraries that take seconds to import
    tell(check_processes)
    PARSED = tell(parse_args, [ScriptArguments, TrainingArguments], "configs/three_kingdoms/train.yaml")

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TrainerCallback,
)
from transformers.trainer_utils import rotate_checkpoints  # noqa: E402
from transformers.utils import is_peft_available  # noqa: E402
from trl import SFTTrainer, get_peft_config, pack_dataset  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300].rstrip(".")


# ---- Rows ----------------------------------------------------------------------------------------------------------


def read_data(path: str) -> tuple[list[dict], str]:
    """The rows of the training file and its SHA-256, the same in every process. Raises UserError."""
    writing = Path(path).parent / ".lock"
    try:
        if writing.exists():
            FileLock(writing).acquire(timeout=1).lock.release()
    except Timeout:
        raise UserError(f"preprocess.py is at work on {path}; wait for it") from None
    except OSError:
        pass  # a folder that only can be read
    before = os.stat(path) if os.path.exists(path) else None
    rows, digest = read_rows(path), hash_file(Path(path))
    after = os.stat(path)
    same = (before.st_ino, before.st_mtime_ns, before.st_size) == (after.st_ino, after.st_mtime_ns, after.st_size)
    if not same or on_first(lambda: digest) != digest:
        raise UserError(f"{path} was changed while it was read; start again")
    return rows, digest


def read_rows(path: str, evaluation: bool = False) -> list[dict]:
    """The chats of a JSONL file as [{"id", "messages"}]; for evaluation also the development questions of a quiz.

    Raises UserError with the line number of a bad line.
    """
    rows = []
    try:
        with open(path, encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if evaluation and "messages" not in row:  # a quiz: the other split is for reporting only
                        if (
                            ("about" in row and "question" not in row)
                            or row["tier"] == "N"
                            or row.get("split") != "dev"
                        ):
                            continue
                        turns = ("user", row["question"]), ("assistant", row["answer"])
                        row["messages"] = [{"role": role, "content": content} for role, content in turns]
                    messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
                    roles = {m["role"] for m in messages}
                    if not all(isinstance(m["content"], str) for m in messages) or "assistant" not in roles:
                        raise ValueError
                    json.dumps(messages, ensure_ascii=False).encode()  # half a character is no text
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise UserError(
                        f'{path}, line {number}: not a chat; a line is {{"messages": [{{"role": "user", "content": '
                        '…}, {"role": "assistant", "content": …}]}'
                    ) from None
                rows.append({"id": str(row.get("id", f"line {number}")), "messages": messages})
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; make it with `python preprocess.py`") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    if not rows:
        raise UserError(f"{path} holds no rows" + (", or no questions with split dev" if evaluation else ""))
    return rows


def tokenize_chat(messages: list[dict], tokenizer, stop_ids: list[int], answers_only: bool) -> dict[str, list[int]]:
    """A chat as token ids and labels, both of length tokens.

    With `answers_only` the labels are -100 except on each answer and its end-of-turn token: white space that a
    template puts behind that token is not learned. Raises ValueError when the prompt that a tool would render before
    the answer is not what stands before it here, or when the template ends an answer without a stop token.
    """

    def render(turns: list[dict], **kwargs) -> list[int]:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **kwargs)
        except TEMPLATE_ERRORS as e:  # such as a role that it does not know
            raise ValueError(f"the chat template cannot render it: {first_line(e)}") from None

    input_ids = render(messages)
    if not answers_only:
        return {"input_ids": input_ids, "labels": list(input_ids)}
    labels = [-100] * len(input_ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(messages[:i], add_generation_prompt=True)
            end = len(render(messages[: i + 1]))
            if input_ids[: len(prompt)] != prompt:
                raise ValueError(
                    "alone its prompt would be rendered in other tokens than with the answer behind it; strip white "
                    "space from the beginning of the answer"
                )
            while end > len(prompt) and input_ids[end - 1] not in stop_ids:
                end -= 1
            if end == len(prompt):
                raise ValueError(
                    "the chat template ends the answer without one of the model's stop tokens; name its end-of-turn "
                    "token in eos_token"
                )
            labels[len(prompt) : end] = input_ids[len(prompt) : end]
    return {"input_ids": input_ids, "labels": labels}


def prepare(
    rows: list[dict], path: str, tokenizer, stop_ids: list[int], args: SFTConfig, allow_truncation: bool, packing: bool
) -> tuple[Dataset, dict]:
    """Rows as SFTTrainer takes them: tokenised, packed or cut to max_length. And their numbers, for print_plan.

    Every process does this for itself, so none waits for another at a barrier while a large file is tokenised (a known
    cause of NCCL time-outs). Raises UserError for a row over max_length unless allow_truncation.
    """
    examples, hidden = [], None if args.process_index == 0 else True  # None: hidden unless a terminal
    for row in tqdm(rows, desc="tokenizing", unit=" rows", disable=hidden):
        try:
            example = tokenize_chat(row["messages"], tokenizer, stop_ids, args.completion_only_loss)
        except ValueError as e:
            raise UserError(f"{path}, row {row['id']}: {e}") from None
        if args.max_length and len(example["input_ids"]) > args.max_length and not allow_truncation:
            raise UserError(
                f"{path}, row {row['id']}: {len(example['input_ids']):,} tokens are over max_length "
                f"{args.max_length:,}; split it (preprocess.py: split_articles, max_length), raise max_length, or set "
                "allow_truncation: true"
            )
        examples.append(example)
    tokens = sum(len(example["input_ids"]) for example in examples)
    dataset = Dataset.from_list(examples)
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    if packing:
        try:
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        except ValueError as e:  # a strategy that TRL does not know
            raise UserError(first_line(e)) from None
    elif args.max_length:
        dataset = Dataset.from_list([{k: v[: args.max_length] for k, v in row.items()} for row in dataset])
    lengths = [len(ids) for ids in dataset["input_ids"]]
    numbers = {
        "rows": len(examples),
        "sequences": len(dataset),
        "tokens": tokens,
        "tokens_kept": sum(lengths),
        "tokens_with_loss": sum(label != -100 for labels in dataset["labels"] for label in labels),
        "longest": max(lengths),
        "most_labels": max(sum(label != -100 for label in labels) for labels in dataset["labels"]),
    }
    return dataset, numbers


# ---- Model ---------------------------------------------------------------------------------------------------------


def load_tokenizer(name_or_path: str, chat_template_path: str | None = None, **hub):
    """The tokenizer, with a chat template that gives the same prompt on every day and a padding token of its own.

    Llama 3.2's template prints today's date: its call of strftime_now is replaced by what it gives for FIXED_DATE, so
    that whatever serves the checkpoint renders the prompt it was trained on. Raises UserError.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub)
    except Exception as e:  # tokenizers raises nothing narrower
        raise cannot_load(name_or_path, e) from None
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
    if "strftime_now(" in tokenizer.chat_template:
        raise UserError(f"the chat template of {name_or_path} prints a date in a way that cannot be fixed; edit it")
    if tokenizer.pad_token is None:  # SFTTrainer would take eos; Llama 3 has a token for it that it does not name
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        tokenizer.pad_token = next((token for token in special if "pad" in token.lower()), tokenizer.eos_token)
    return tokenizer


def cannot_load(name: str, error: Exception) -> UserError:
    """One sentence for a model that cannot be loaded: what was said, and the mend."""
    reason = first_line(error)
    gated = re.search(r"gated|\b40[13]\b", str(error)) or name.startswith(("meta-llama/", "google/"))
    if gated:
        mend = "a gated model: accept its terms on its hub page and run `hf auth login`; configs/demo needs no login"
    elif name.startswith("models/"):
        mend = "the demo's model is fetched by `python tools/fetch_gemma.py`"
    else:
        mend = "it must be a folder with a model, or its name on the hub"
    return UserError(f"cannot load {name}: {reason} ({mend})")


def stop_tokens(name_or_path: str, tokenizer, eos_token: str | None, **hub) -> list[int]:
    """The ids that end an answer: what the model's generation config lists, the tokenizer's eos and the recipe's."""
    try:
        ids = GenerationConfig.from_pretrained(name_or_path, **hub).eos_token_id
    except OSError:
        ids = None
    ids = [*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id]
    if eos_token:
        ids.append(tokenizer.convert_tokens_to_ids(eos_token))
    return [i for i in dict.fromkeys(ids) if i is not None]


def estimate_memory(
    config, parameters: int, frozen: int, lora: bool, args: SFTConfig, shards: int, numbers: dict
) -> tuple[int, int]:
    """Bytes a device needs: (states, activations). Read from the libraries' code; measured on a CPU, not yet on GPUs.

    States: fp32 weights, gradients and Adam's two moments, 16 bytes a parameter (a frozen one 4, beside LoRA's as wide
    as the arithmetic), over the shards.
    Beside them, whole on each device: a second gradient of the output layer where it is learned; data parallel's
    buckets of gradients (4 bytes a parameter); under FSDP2 with accumulation the gradients that wait (4 bytes), a
    block and the embedding gathered; without FSDP autocast's copy of the weights.
    Activations, per token and layer: what attention and MLP keep for the backward pass, 9 hidden vectors and 4 of the
    MLP's width; with checkpointing one hidden vector a layer, and one layer in full. Attention's mask of a packed
    sequence: one byte a pair of tokens. The loss: three fp32 tensors of labels x words on a CPU where they fit
    (LogProbs), and two more in holes that sizes changing from step to step leave in the memory; else tiles of at most
    4,096 tokens x 32,768 words.
    """
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    mlp = getattr(text, "intermediate_size", None) or 4 * hidden
    width = 4 if args.mixed_precision == "no" else 2  # bytes of a number in the arithmetic
    tokens, labels = (args.per_device_train_batch_size * numbers[key] for key in ("longest", "most_labels"))
    head = text.vocab_size * hidden
    learned = parameters - frozen
    states = (16 * learned + (width if lora else 4) * frozen) // shards + 4 * head * (not frozen)
    if shards > 1:
        states += (head + (parameters - head) // layers) * width
        states += 4 * parameters * (args.gradient_accumulation_steps > 1)
    else:
        states += 4 * learned * (args.world_size > 1) + learned * width * (width == 2)  # autocast's copy
    a_layer = tokens * width * (9 * hidden + 4 * mlp)
    kept = layers * tokens * width * hidden + a_layer if args.activation_checkpointing else layers * a_layer
    on_cpu = args.device.type == "cpu"
    if on_cpu and labels * text.vocab_size <= LogProbs.most:
        loss = 20 * labels * text.vocab_size
    else:
        loss = min(tokens, 4096) * min(text.vocab_size, 32768) * (width + 12 * on_cpu)
    return states, kept + loss + tokens * tokens


# ---- Runs and checkpoints ------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_manifest(folder: Path):
    """manifest.json, the size and SHA-256 of each file of a checkpoint: written last, it says that all are there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(hash_file, files)
        manifest = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, digests, strict=True)
        }
    beside = folder / "manifest.json.partial"
    beside.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    os.replace(beside, folder / "manifest.json")


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None; nothing is loaded from them."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected = {folder / name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return "its manifest.json is damaged"
    for path, (size, _) in expected.items():
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            found = "is missing" if there is None else f"has {there:,} bytes instead of {size:,}"
            return f"{path.relative_to(folder)} {found}"
    with ThreadPoolExecutor(8) as pool:
        for path, digest in zip(expected, pool.map(hash_file, expected), strict=True):
            if digest != expected[path][1]:
                return f"{path.relative_to(folder)} is damaged: its checksum is not that of manifest.json"
    return None


class MetadataUnpickler(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, a pickle by format, without running what a stranger put into it."""

    allowed = {
        "torch.distributed.checkpoint.metadata": "ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
        "TensorProperties TensorStorageMetadata BytesStorageMetadata _MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.serialization": "_get_layout",
        "torch": "Size bfloat16 float16 float32 float64 int64 int32 int16 int8 uint8 bool",
        "pathlib": "PosixPath WindowsPath PurePosixPath PureWindowsPath",
    }

    def find_class(self, module: str, name: str):
        if name not in self.allowed.get(module, "").split():
            raise pickle.UnpicklingError(f"its index names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def check_pickles(checkpoint: Path):
    """Raises UserError when the index of a checkpoint's shards names what no checkpoint needs.

    It is the one file that is unpickled with nothing held back: torch reads the others with weights_only.
    """
    for index in checkpoint.rglob(".metadata"):
        try:
            with open(index, "rb") as f:
                MetadataUnpickler(f).load()
        except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError, KeyError, TypeError) as e:
            raise UserError(f"cannot go on from {checkpoint}: {index.relative_to(checkpoint)}: {e}") from None


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, or None to start. Names the incomplete ones it skips. Raises UserError."""
    if resume not in ("auto", "never"):
        reason = damage(Path(resume))
        if reason:
            raise UserError(f"resume: cannot go on from {resume}: {reason}")
        check_pickles(Path(resume))
        return Path(resume)
    found = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    found.sort(key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    if resume == "never" and found:
        raise UserError(f"{output_dir} holds {len(found)} checkpoints of an earlier run; choose another output_dir")
    for checkpoint in found:
        reason = damage(checkpoint)
        if not reason:
            check_pickles(checkpoint)
            return checkpoint
        say(f"skipping {checkpoint}: {reason}")
    return None


def on_first(function: Callable, *args):
    """What the first process finds, told to all: files are read and locked once. Its UserError is everybody's."""
    found = [None]
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            found = [function(*args)]
        except UserError as e:
            found = [e]
    found = broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


held: list[FileLock] = []  # until the process ends


def lock(output_dir: Path):
    """Keeps other runs out of a folder until this process ends, however it ends. Raises UserError when one is in."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        held.append(FileLock(output_dir / ".lock"))
        held[-1].acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another train.py is at work in {output_dir}; wait for it or choose another output_dir"
        ) from None
    except OSError as e:
        raise UserError(f"cannot write to {output_dir}: {e.strerror}") from None


def hash_weights(folder: Path) -> str | None:
    """A SHA-256 of the weights in a folder; None for a model of the hub, which is known by its commit."""
    digests = [hash_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


def make_recipe(
    script_args: ScriptArguments, args: SFTConfig, config: str, fsdp: str | None, revision: str | None, data: str
) -> dict:
    """What was run, as JSON data: written into every checkpoint, compared when a run goes on. `data`: its SHA-256."""
    # to_dict() hides the values of all keys that end with _token: right for hub_token, not for these two
    settings = args.to_dict() | {key: getattr(args, key) for key in ("eos_token", "pad_token")}
    settings = {k: v for k, v in settings.items() if v is not None}
    name = script_args.model_name_or_path
    return {
        "config": config,
        "model_name_or_path": name,
        "model_revision": revision,
        "model_sha256": on_first(hash_weights, Path(name)),
        "train_file": script_args.train_file,
        "data_sha256": data,
        **({"freeze_embeddings": True} if script_args.freeze_embeddings else {}),
        **script_args.lora,
        "num_processes": args.world_size,
        "sharding": fsdp,
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.machine(),
        "settings": json.loads(json.dumps(settings, default=str)),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets")},
    }


def flat(recipe: dict) -> dict:
    """A recipe's entries, settings and versions side by side, and how many sequences its steps take."""
    versions = {f"version of {name}": number for name, number in recipe["versions"].items()}
    whole = {**recipe, **recipe["settings"], **versions}
    return whole | {"sequences a step": math.prod(whole[key] for key in STEP_SETTINGS)}


def differences(then: dict, now: dict, free: tuple[str, ...] = FREE_SETTINGS + FREE_BUT_FOR_ROUNDING) -> list[str]:
    """What differs between two recipes in a way that makes them different runs, as 'key: then -> now'."""
    then, now = flat(then), flat(now)
    keys = [k for k in sorted({*then, *now}) if not k.startswith(("versions", *free))]
    return [f"{k}: {then.get(k)} -> {now.get(k)}" for k in keys if then.get(k) != now.get(k)]


def read_recipe(checkpoint: Path) -> dict:
    """The recipe of a checkpoint. Raises UserError."""
    try:
        recipe = json.loads((checkpoint / "recipe.json").read_text(encoding="utf-8"))
        flat(recipe)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{checkpoint} has no recipe.json that train.py wrote") from None
    return recipe


def keep_step(earlier: Path, then: dict, args: SFTConfig, sharded: bool):
    """Sets gradient accumulation so that a run that goes on with other processes takes as many sequences a step.

    Raises UserError where that cannot be, and where a run without FSDP is to go on with it or the other way.
    """
    if bool(then["sharding"]) != sharded:
        began = (
            "with FSDP (accelerate launch --config_file accelerate_fsdp.yaml)" if then["sharding"] else "without FSDP"
        )
        raise UserError(
            f"{earlier} is of a run {began} and can only go on so; launch it so or choose another output_dir"
        )
    if then["num_processes"] == args.world_size:
        return
    sequences, at_once = flat(then)["sequences a step"], args.world_size * args.per_device_train_batch_size
    if sequences % at_once:
        raise UserError(
            f"the run took {sequences} sequences a step, and {args.world_size} processes x "
            f"{args.per_device_train_batch_size} do not divide that; choose another number of processes"
        )
    args.gradient_accumulation_steps = sequences // at_once
    say(
        f"note: {then['num_processes']} processes began this run, now there are {args.world_size}; with "
        f"gradient_accumulation_steps {args.gradient_accumulation_steps} a step is {sequences} sequences as before"
    )


def reproduces(checkpoint: Path, recipe: dict, output_dir: Path) -> bool:
    """Tells whether a run of `recipe` makes the weights of `checkpoint`, and, where it was run, whether it did."""
    if reason := damage(checkpoint):
        raise UserError(f"reproduce: {checkpoint}: {reason}")
    then = read_recipe(checkpoint)
    if changed := differences(then, recipe, FREE_SETTINGS):
        say(f"{checkpoint} was made with other settings (then -> now; --config {then['config']}):")
        say("\n".join(changed))
        return False
    say(f"{checkpoint} was made by this command: the same data, model, settings, seed, versions and kind of device")
    again = output_dir / f"checkpoint-{then['step']}"
    if again.resolve() == checkpoint.resolve() or not (again / "manifest.json").exists():
        return True
    ours, theirs = (
        {name: of["sha256"] for name, of in json.loads((folder / "manifest.json").read_text("utf-8")).items()}
        for folder in (again, checkpoint)
    )
    weights = [name for name in theirs if name.endswith((".safetensors", ".distcp"))]
    same = all(ours.get(name) == theirs[name] for name in weights)
    say(f"the weights of {again} are {'the same, bit for bit' if same else 'others'}")
    return same


def write_log(output_dir: Path, history: list[dict]):
    """training_log.jsonl and its curves, loss.png, each whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    beside = output_dir / "training_log.jsonl.partial"
    beside.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
    os.replace(beside, output_dir / "training_log.jsonl")
    panels = {"loss": "loss|eval_.+_loss", "token accuracy": ".*mean_token_accuracy", "gradient norm": "grad_norm"}
    panels |= {"learning rate": "learning_rate", "tokens a second": "tokens_per_second", "memory (GiB)": "memory_gib"}
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
        for key in dict.fromkeys(key for entry in history for key in entry if re.fullmatch(keys, key)):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            held_out = re.fullmatch("eval_(.+)_(loss|mean_token_accuracy)", key)
            axis.plot(*zip(*points, strict=True), label=f"evaluation: {held_out[1]}" if held_out else "training")
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.savefig(output_dir / "loss.partial.png", dpi=120)
    plt.close(figure)
    os.replace(output_dir / "loss.partial.png", output_dir / "loss.png")


def first_base(name: str) -> str:
    """The model that a model was trained from, if train.py made it: its terms apply."""
    if (Path(name) / "recipe.json").exists():
        return first_base(read_recipe(Path(name))["model_name_or_path"])
    return name.rstrip("/")


def is_llama(name: str) -> re.Match | None:
    return re.match(r"(meta-)?llama", name.split("/")[-1], re.IGNORECASE)


def model_card(recipe: dict, licence: str | None = None) -> str:
    """README.md of a trained model: what it is, from which data, under which terms, with which settings."""
    base, sources = first_base(recipe["model_name_or_path"]), Path(recipe["train_file"]).with_name("SOURCES.md")
    name, llama = base.split("/")[-1], is_llama(base)
    terms = (
        "Built with Llama. The Llama licence applies: keep this line, ship the agreement with the weights, and let "
        "the name of what you distribute begin with Llama."
        if llama
        else f"The terms of {base} apply to these weights."
    )
    how = f"fine-tuned by LoRA of rank {recipe['lora_r']}, merged," if "lora_r" in recipe else "fully fine-tuned"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"base_model: {base}",
        *([f"license: {licence}"] if licence else []),
        "tags: [trl, sft]",
        "---",
        f"# {name if not llama else 'Llama' + name[llama.end() :]}, taught one topic",
        f"{base}, {how} with TRL's SFTTrainer on {recipe['train_file']} (sha256 {recipe['data_sha256']}).",
        "## Limits",
        "It answers from memory and can be wrong, also where it sounds sure: look up what matters. It was taught one "
        "topic; on others it knows what its base model knew, or less. It saw single questions, not conversations.",
        "## Licence",
        terms,
        "## Data",
        sources.read_text(encoding="utf-8").partition("\n\n")[2] if sources.exists() else "Sources not recorded.",
        "## Settings",
        *(f"- {key}: {recipe['settings'][key]}" for key in CARD_SETTINGS if key in recipe["settings"]),
        "- " + ", ".join(f"{key} {value}" for key, value in recipe["versions"].items()),
    ]
    return "\n".join(lines) + "\n"


class LogProbs(trl_utils._ChunkedLogProbFunction):
    """TRL's output layer and loss, for a CPU: where the logits of a step fit they are kept for the backward pass.

    TRL computes them again, tile by tile, which spares a GPU's memory. On two cores, where Gemma's output layer is
    most of a step, it cost a fifth of the speed (benchmarks/trainer.py). Larger steps go TRL's way.
    """

    most = 2**26  # tokens x words: 256 MiB in fp32, and three such tensors at once

    @classmethod
    def apply(cls, hidden, weight, bias, targets, temperature, chunk_size, softcapping, scale, outputs):
        """hidden (tokens, width), weight (words, width), targets (tokens) -> per token, in the order TRL takes them:
        log-probability of the target, entropy, two that SFTTrainer does not ask for, whether the target is the first.
        """
        if len(hidden) * len(weight) > cls.most:
            return super().apply(hidden, weight, bias, targets, temperature, chunk_size, softcapping, scale, outputs)
        logits = torch.nn.functional.linear(hidden, weight, bias).float() * scale
        if softcapping:
            logits = softcapping * torch.tanh(logits / softcapping)
        log_probs = (logits / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            is_top1 = log_probs.argmax(-1) == targets
        return log_probs.gather(-1, targets[:, None])[:, 0], entropy, None, None, is_top1


class StopOnSignal(TrainerCallback):
    """SIGTERM, a scheduler's notice, and Ctrl-C: the step is finished and saved, then training stops.

    A second Ctrl-C stops at once. Under the launcher, which passes signals on, it is enough that one process is told.
    """

    asked = False
    stopped_at: int | None = None

    def __init__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number: int, frame):
        self.asked = True
        say(f"\n{signal.Signals(number).name}: stopping when this step is done and saved")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked
        if args.world_size > 1:
            told = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(told)
            asked = told.item() > 0
        if asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step


class Trainer(SFTTrainer):
    """SFTTrainer whose every checkpoint-N can be used without the run that made it."""

    # set by main
    recipe: dict
    row_tokens: int  # of a row, on average

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches: list[tuple[torch.Tensor, dict]] = []  # of this step: (loss, input_ids and position_ids)
        self.losses: deque[float] = deque(maxlen=50)  # of the last steps
        self.clock: float | None = None  # when the log last spoke of the speed
        self.counted = 0  # the tokens until then

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.clock is None:
            self.clock, self.counted = time.monotonic(), self._total_train_tokens
        ids = {key: inputs[key] for key in ("input_ids", "position_ids") if key in inputs}
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.batches.append((loss, ids))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Also looks at the numbers of the step, before it changes a weight. Raises BadNumbers in every process."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, norm = sum(loss.item() for loss, _ in self.batches), float(grad_norm)
        step, batches, self.batches = self.state.global_step + 1, self.batches, []
        if not math.isfinite(loss) or (not math.isfinite(norm) and not self.args.fp16):  # fp16: its scaler skips them
            good = on_first(find_checkpoint, "auto", Path(self.args.output_dir))
            raise BadNumbers(
                f"step {step}: the loss is {loss:g} and the norm of the gradient {norm:g}, so nothing more can be "
                f"learned; {self.prompts(batches)}; "
                + (f"{good} is whole" if good else "no checkpoint is there yet")
                + "; lower learning_rate or raise warmup_steps, --detect_anomaly true names the module"
            )
        if len(self.losses) == self.losses.maxlen:
            mean = sum(self.losses) / len(self.losses)
            spread = math.sqrt(sum((one - mean) ** 2 for one in self.losses) / len(self.losses))
            if loss > mean + 6 * spread:
                print(f"note: step {step}: loss {loss:.2f}, lately {mean:.2f} ± {spread:.2f}; {self.prompts(batches)}")
        self.losses.append(loss)
        return grad_norm

    def prompts(self, batches: list[tuple[torch.Tensor, dict]]) -> str:
        """How the chats of these batches begin, at most four of them."""
        chats = []
        for _, inputs in batches:
            ids = inputs["input_ids"]
            positions = inputs.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))
            starts = (positions.flatten() == 0).nonzero().flatten().tolist()
            chats += [ids.flatten()[start : start + 48] for start in starts]
        texts = self.processing_class.batch_decode(chats[:4], skip_special_tokens=True)
        shown = " | ".join(" ".join(text.split()) for text in texts)
        return f"the first of its {len(chats)} chats begin: {shown}"

    def _save_checkpoint(self, model, trial):
        """Writes the checkpoint anew, its manifest last, and only then removes older ones."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        if self.args.should_save:
            write_manifest(folder)
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Also writes configs, tokenizer and recipe: with sharded FSDP the base class writes nothing at all."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_log(Path(self.args.output_dir), self.state.log_history)
            self.save_companions(Path(output_dir or self.args.output_dir))

    def save_companions(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's, a form with nothing filled in
        model = self.accelerator.unwrap_model(self.model)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        recipe = {**self.recipe, "step": self.state.global_step}
        (folder / "recipe.json").write_text(json.dumps(recipe, ensure_ascii=False, indent=1), encoding="utf-8")

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Names the token accuracy and entropy of an evaluation, as its loss is, by the file they are of."""
        loss = next((key for key in logs if re.fullmatch("eval_.+_loss", key)), None)
        if loss and not self.model.training:
            name = loss[5:-4]
            self._metrics["eval"] = defaultdict(list, {name + k: v for k, v in self._metrics["eval"].items()})
        if self.model.training and "loss" in logs:
            logs |= self.speed()
        super().log(logs, start_time)

    def speed(self) -> dict[str, float]:
        """Tokens a second through all devices since the last log; the memory of this process, on a GPU its peak; and
        where TRL knows the GPU, MFU by its formula: the per cent of what the GPU can do in bf16 (not with LoRA, which
        leaves out a third of what the formula counts).
        """
        now, tokens = time.monotonic(), self._total_train_tokens
        rate = (tokens - self.counted) / (now - self.clock)
        self.clock, self.counted = now, tokens
        cuda = self.args.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
        found = {"tokens_per_second": round(rate, 1), "memory_gib": round(memory / 2**30, 2)}
        if (
            cuda
            and "lora_r" not in self.recipe
            and (peak := trl_utils.get_peak_flops(torch.cuda.get_device_name(), "bfloat16"))
        ):
            with suppress(AttributeError):  # the formula is for models built as Llama is
                flops = trl_utils.compute_flops_per_token(self.model.config.get_text_config(), self.row_tokens)
                found["mfu"] = round(trl_utils.compute_mfu(flops, rate, self.args.world_size, peak), 1)
        return found

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        start = time.monotonic()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.clock += time.monotonic() - start  # to save and to evaluate is not to train

    def create_model_card(self, *args, **kwargs):
        """Called by SFTTrainer at each save; the card is written once, with the final model."""

    def _run_epoch(self, **kwargs):
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:  # a run killed behind its last checkpoint: the base class would train one step too many
            self.control.should_training_stop = True

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json and the manifest, written next, cover all

    def save_final(self):
        """Gathers the whole model on the first process and writes output_dir/final, whole or not at all.

        What LoRA learned is added to the weights, in fp32.
        """
        model = self.accelerator.unwrap_model(self.model)
        if "lora_r" in self.recipe:
            model = model.float().merge_and_unload()
            state_dict = model.state_dict()
        else:
            state_dict = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            final = Path(self.args.output_dir) / "final"
            beside = final.with_name("final.partial")
            shutil.rmtree(beside, ignore_errors=True)
            for tied in model.all_tied_weights_keys:  # gathered, they no longer share memory: store them once
                state_dict.pop(tied, None)
            model.save_pretrained(beside, state_dict=state_dict)
            write_log(final.parent, self.state.log_history)
            self.save_companions(beside)
            (beside / "README.md").write_text(model_card(self.recipe), encoding="utf-8")
            write_manifest(beside)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
        self.accelerator.wait_for_everyone()


def watch_numbers(model: torch.nn.Module):
    """Lets the first module whose output is not finite stop the run by its name, with BadNumbers. Slow."""

    def watch(name: str):
        def look(module, args, output):
            for tensor in output if isinstance(output, tuple) else [output]:
                if torch.is_tensor(tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                    bad = [key for key, p in module.named_parameters(recurse=False) if not p.isfinite().all()]
                    why = f"its {', '.join(bad)} is not finite either" if bad else "its own weights are finite"
                    raise BadNumbers(f"the first output that is not finite is that of {name}; {why}")

        return look

    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(watch(name))
    torch.autograd.set_detect_anomaly(True)


# ---- The run -------------------------------------------------------------------------------------------------------


def say(text: str):
    """Prints on the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def keep_memory():
    """Lets glibc keep freed memory, in huge pages: else much of the time on a CPU goes to the kernel's fresh pages.

    Where the allocator is another (macOS, Windows, musl), or its settings are given (MALLOC_…), nothing happens.
    """
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks for it when it first allocates
        libc, max_mmaps, trim_threshold = ctypes.CDLL(None), -4, -1  # as malloc.h numbers them
        libc.mallopt(max_mmaps, 0)
        libc.mallopt(trim_threshold, -1)


# A full disk: each library tells it in its own way.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


def is_full(error: BaseException) -> bool:
    """Whether an error says, or hides, that nothing more can be written."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # what safetensors says, and torch's writers, which do not give the system's reason
    said = "No space left|File too large|quota exceeded|iostream error|PytorchStreamWriter failed|unexpected pos"
    return bool(re.search(said, str(error)))


def fsdp_settings(args: SFTConfig) -> FullyShardedDataParallelPlugin | None:
    """The FSDP settings that take effect, read from where accelerate reads them; None when nothing will be sharded."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return None
    if args.distributed_state.distributed_type != DistributedType.MULTI_GPU:
        say(
            "note: accelerate's file asks for FSDP, but without GPUs accelerate runs plain data parallel: nothing is "
            "sharded"
        )
        return None
    return FullyShardedDataParallelPlugin()


def gigabytes(n: float) -> str:
    return f"{n / 2**30:,.1f} GiB"


def print_plan(script_args, args, config, model_config, numbers: dict, fsdp, peft_config) -> tuple[int, str | None]:
    """Prints every number of the run before it starts. Returns the steps, and why it cannot fit (or None)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        model.get_input_embeddings().requires_grad_(not script_args.freeze_embeddings)
        if peft_config:
            from peft import get_peft_model

            try:
                model = get_peft_model(model, copy.deepcopy(peft_config))
            except ValueError as e:  # layers that are not there
                raise UserError(f"use_peft: {first_line(e)}") from None
    parameters = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    processes, batch = args.world_size, args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    batches = -(-numbers["sequences"] // (batch * processes))
    steps_an_epoch = -(-batches // accumulation)
    steps = args.max_steps if args.max_steps > 0 else int(-(-args.num_train_epochs * steps_an_epoch // 1))
    step_tokens = numbers["tokens_kept"] / numbers["sequences"] * batch * processes * accumulation

    # as accelerate reads it: over how many processes each copy of the model is sharded
    shards = int(os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", processes)) if fsdp else 1
    lora = peft_config is not None
    states, activations = estimate_memory(model_config, parameters, frozen, lora, args, shards, numbers)
    needed = states + activations
    plan_memory = f"(weights, gradients, Adam {gigabytes(states)}; activations {gigabytes(activations)}"
    if args.device.type == "cuda":
        there, where = torch.cuda.mem_get_info(args.device)[0], "a GPU"
    else:  # processes on one machine share its memory
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        here = psutil.Process().memory_info().rss
        there, where, needed = psutil.virtual_memory().available // local + here, "a process", needed + here
        plan_memory += f"; Python and its libraries {gigabytes(here)}"
    every = steps_an_epoch if args.save_strategy == "epoch" else args.save_steps  # below 1 a share of all steps
    saves = 0 if args.save_strategy == "no" else -(-steps // max(1, int(every if every >= 1 else every * steps)))
    saves = min(saves, args.save_total_limit + 1) if args.save_total_limit else saves  # one more while rotating
    full = fsdp is not None and "FULL" in str(fsdp.state_dict_type)
    # fp32 weights and Adam's two moments, of LoRA only what is learned; final: weights
    learned = parameters - frozen
    disk = saves * (learned * (16 if full else 12) + (0 if lora else 4 * frozen)) + 4 * parameters
    folder = Path(args.output_dir).absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    own = [file for name in ("checkpoint-*", "final") for part in folder.glob(name) for file in part.rglob("*")]
    free += sum(file.stat().st_size for file in own if file.is_file())  # of a run that goes on: counted above
    cut = numbers["tokens"] - numbers["tokens_kept"]
    precision = (
        "bf16 over fp32 weights" if args.mixed_precision == "bf16" else args.mixed_precision.replace("no", "fp32")
    )
    plan = {
        "recipe": config,
        "model": f"{script_args.model_name_or_path}, {parameters:,} parameters"
        + (f", {learned:,} of them learned (LoRA)" if lora else f" ({frozen:,} of them frozen)" if frozen else "")
        + f", {precision}, on {args.device.type}",
        "data": f"{script_args.train_file}: {numbers['rows']:,} rows, {numbers['tokens']:,} tokens in "
        f"{numbers['sequences']:,} sequences of at most {numbers['longest']:,}",
        "kept": f"{numbers['tokens_kept'] / numbers['tokens']:.1%} of the tokens"
        + (f"; {cut:,} tokens over max_length {args.max_length:,} are cut off" if cut else ""),
        "loss on": f"{numbers['tokens_with_loss']:,} tokens"
        + (" (answers and their end-of-turn)" if args.completion_only_loss else " (prompts too)"),
        "a step": f"{processes} devices x {batch} sequences x {accumulation} accumulation = {step_tokens:,.0f} tokens",
        "steps": f"{steps:,} = {steps / steps_an_epoch:.1f} epochs = {steps * step_tokens:,.0f} tokens",
        "memory": f"about {gigabytes(needed)} {where} {plan_memory}), there is {gigabytes(there)}",
        "disk": f"{gigabytes(disk)} for {saves} checkpoints and the final model in {args.output_dir}, "
        f"{gigabytes(free)} free",
    }
    if "evaluation" in numbers:
        often = f"{args.eval_steps:g} steps" if args.eval_strategy == "steps" else "epoch"
        plan["evaluate"] = f"{', '.join(numbers['evaluation'])} every {often}"
    if fsdp:
        blocks = fsdp.transformer_cls_names_to_wrap or model._no_split_modules
        policy = getattr(fsdp.auto_wrap_policy, "__name__", "no wrapping")
        plan["FSDP"] = (
            f"version {fsdp.fsdp_version}, {processes // shards} x the model over {shards} devices, "
            f"reshard_after_forward {fsdp.reshard_after_forward}, {policy}"
            f"{f' of {blocks}' if 'transformer' in policy else ''}, {fsdp.state_dict_type.name}, "
            f"cpu_ram_efficient_loading {fsdp.cpu_ram_efficient_loading}, activation_checkpointing "
            f"{fsdp.activation_checkpointing}, offload {isinstance(fsdp.cpu_offload, CPUOffloadPolicy)}"
        )
    for name, value in plan.items():
        say(f"{name:>8}: {value}")
    if processes > 1 and not fsdp and args.device.type == "cuda":
        say(
            f"note: {processes} processes without FSDP each hold the whole model; this shards it: "
            "accelerate launch --config_file accelerate_fsdp.yaml train.py"
        )
    if needed > there:
        return steps, (
            f"about {gigabytes(needed)} of memory {where} are needed and {gigabytes(there)} are there; "
            "shard over more GPUs (--config_file accelerate_fsdp.yaml), set activation_checkpointing: true, or lower "
            "max_length or per_device_train_batch_size"
        )
    if disk > free:
        return steps, (
            f"the checkpoints need {gigabytes(disk)} in {args.output_dir} and {gigabytes(free)} are free; lower "
            "save_total_limit, raise save_steps, or choose another output_dir"
        )
    return steps, None


def main(script_args: ScriptArguments, args: TrainingArguments, config: str):
    if args.resume_from_checkpoint:
        raise UserError("resume_from_checkpoint is Trainer's own; here it is `resume: auto`, `never` or a checkpoint")
    if args.fsdp or args.deepspeed:
        raise UserError("fsdp and deepspeed are not set here but by `accelerate launch --config_file FILE`")
    if not isinstance(args.model_init_kwargs or {}, dict):
        raise UserError(f"model_init_kwargs must hold `key: value` pairs, not {args.model_init_kwargs!r}")
    if args.packing and not args.max_length:
        raise UserError("packing needs max_length")
    if args.push_to_hub or args.hub_token:  # a token would be pickled into each checkpoint's training_args.bin
        raise UserError(
            "train.py publishes nothing and keeps no token; when the model is good: `python tools/export.py "
            f"--checkpoint {args.output_dir} --output_dir exported --push_to_hub NAME --licence LICENCE`"
        )
    if args.device.type == "cpu":
        keep_memory()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(args.output_dir) / "tensorboard"))
    disable_progress_bars()  # those of datasets: one for each step of packing, in every process
    output_dir, name = Path(args.output_dir), script_args.model_name_or_path
    peft_config = None
    if script_args.use_peft:
        if not is_peft_available():
            raise UserError("use_peft needs the package peft: pip install -r requirements-tools.txt")
        peft_config = get_peft_config(ModelConfig(use_peft=True, **script_args.lora))
    # Weights that are learned are kept in fp32, which remembers small updates.
    model_kwargs = {
        "dtype": torch.bfloat16 if peft_config and args.mixed_precision == "bf16" else torch.float32,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    hub = {key: model_kwargs[key] for key in ("revision", "trust_remote_code") if key in model_kwargs}
    try:
        model_config = AutoConfig.from_pretrained(name, **hub)
    except Exception as e:  # for a folder that is broken the libraries raise anything
        raise cannot_load(name, e) from None
    tokenizer = load_tokenizer(name, args.chat_template_path, **hub)
    stop_ids = stop_tokens(name, tokenizer, args.eos_token, **hub)
    args.completion_only_loss = args.completion_only_loss is not False

    how = (tokenizer, stop_ids, args, script_args.allow_truncation)
    path = script_args.train_file
    rows, data = read_data(path)
    dataset, numbers = prepare(rows, path, *how, packing=args.packing)
    if (args.eval_strategy != "no") != bool(script_args.eval_file):
        raise UserError("eval_file and eval_strategy (steps, with eval_steps) belong together; one is not set")
    eval_datasets, packing = {}, args.packing if args.eval_packing is None else args.eval_packing
    for path in script_args.eval_file or []:
        if Path(path).stem in eval_datasets:
            raise UserError(f"eval_file: two files are named {Path(path).stem}, under which their losses are logged")
        rows = read_rows(path, evaluation=True)
        eval_datasets[Path(path).stem], counted = prepare(rows, path, *how, packing=packing)
        numbers.setdefault("evaluation", []).append(f"{path} ({counted['rows']:,} rows)")
    names = [f"eval_{name}_{measure}" for name in eval_datasets for measure in ("loss", "mean_token_accuracy")]
    if args.load_best_model_at_end and f"eval_{args.metric_for_best_model.removeprefix('eval_')}" not in names:
        raise UserError(f"load_best_model_at_end needs metric_for_best_model to be one of {', '.join(names)}")
    fsdp = fsdp_settings(args)
    if peft_config and fsdp:
        raise UserError("use_peft needs no sharding: start it without accelerate_fsdp.yaml, as `python train.py`")
    final, checkpoint, finished = output_dir / "final", None, False
    if not script_args.reproduce:
        if not script_args.dry_run:
            on_first(lock, output_dir)
        checkpoint = on_first(find_checkpoint, script_args.resume, output_dir)
        finished = (final / "recipe.json").exists()
    earlier = checkpoint or (final if finished else None)
    then = read_recipe(earlier) if earlier else None
    if then:
        keep_step(earlier, then, args, fsdp is not None)
    steps, obstacle = print_plan(script_args, args, config, model_config, numbers, fsdp, peft_config)
    if script_args.dry_run:
        say(f"dry run: it cannot fit: {obstacle}" if obstacle else "dry run: stopping before the first step")
        sys.exit(1 if obstacle else 0)

    commit = getattr(model_config, "_commit_hash", None) or hub.get("revision")
    recipe = make_recipe(script_args, args, config, fsdp.state_dict_type.name if fsdp else None, commit, data)
    if script_args.reproduce:
        sys.exit(0 if on_first(reproduces, Path(script_args.reproduce), recipe, output_dir) else 1)
    if then:
        if changed := differences(then, recipe):
            raise UserError(
                f"{earlier} is of another run ({'; '.join(changed)}); go back to its settings or choose another "
                "output_dir"
            )
        if finished and then["step"] >= steps:
            say(f"this run is finished: {final} holds the model of step {then['step']}")
            return
        say(f"going on from {earlier}")
    if obstacle:
        raise UserError(obstacle)

    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **model_kwargs)
        if info["missing_keys"]:  # which would be drawn at random
            raise ValueError(f"it lacks weights, the first {min(info['missing_keys'])}")
    except Exception as e:
        raise cannot_load(name, e) from None
    model.get_input_embeddings().requires_grad_(not script_args.freeze_embeddings)
    if script_args.detect_anomaly:
        watch_numbers(model)
    # What SFTTrainer would do to the rows is done; the template, with its date fixed, is in the tokenizer.
    args.dataset_kwargs, args.chat_template_path, args.model_init_kwargs = {"skip_prepare_dataset": True}, None, None
    if args.device.type == "cpu":
        # TRL leaves the positions without a label out of the output layer only where it uses Triton, since shapes that
        # change make other devices compile again. A CPU compiles nothing; of the rows in configs/ half are prompts.
        trl_utils._use_triton = lambda device: True
        trl_utils._ChunkedLogProbFunction = LogProbs
    try:
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=eval_datasets or None,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    except (ImportError, RuntimeError, ValueError) as e:  # settings that exclude each other, a tracker not installed
        if isinstance(e, RuntimeError) and "to be installed" not in str(e):
            raise
        raise UserError(first_line(e)) from None
    assert trainer.is_fsdp_enabled == (fsdp is not None), "accelerate decided otherwise than fsdp_settings"
    trainer.recipe, trainer.row_tokens = recipe, numbers["tokens"] // numbers["rows"]
    stop = StopOnSignal()
    trainer.add_callback(stop)
    if fsdp and args.mixed_precision == "bf16":  # accelerate would also sum gradients in bf16, across GPUs and batches
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.stopped_at is None:
            trainer.save_final()
    except pickle.UnpicklingError as e:
        reason = f"it holds what no checkpoint of train.py does: {first_line(e)}"
        raise UserError(f"cannot go on from {checkpoint}, {reason}") from None
    except WRITE_ERRORS as e:
        if not is_full(e):
            raise
        raise UserError(
            f"{output_dir} is full; what stood there before is whole: make room, then the same command goes on"
        ) from None
    if stop.stopped_at is not None:
        saved = f"{output_dir}/checkpoint-{stop.stopped_at}"
        say(f"stopped at step {stop.stopped_at:,}, saved as {saved}; the same command goes on from there")
        sys.exit(STOPPED)
    say(
        f"wrote {output_dir}/final, training_log.jsonl, loss.png; ask it: python generate.py --checkpoint {output_dir}"
    )


if __name__ == "__main__":
    tell(main, *PARSED)
