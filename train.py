"""Teach a causal language model the chats of train.jsonl: full fine-tuning with TRL's SFTTrainer, FSDP2 over GPUs.

Prints what will run before the first step, goes on from the last complete checkpoint of the same run, and leaves
self-contained checkpoints, `final` (an ordinary Hugging Face folder), training_log.jsonl and loss.png in `output_dir`.

    accelerate launch --config_file accelerate_fsdp.yaml train.py    # two GPUs, configs/three_kingdoms/train.yaml
    python train.py --config configs/demo/train.yaml                 # one GPU, or the CPU
    python train.py --dry_run                                        # only tell: steps, tokens, memory, disk
"""

import argparse
import ctypes
import difflib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_type_hints

import psutil
import torch
import yaml
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset, disable_progress_bars
from jinja2 import TemplateError
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import SFTConfig, SFTTrainer, TrlParser, pack_dataset
from trl.trainer import utils as trl_utils

# The date that a chat template prints when it asks for today's: Meta's own default for Llama 3.2.
FIXED_DATE = datetime(2024, 7, 26)
# What may change between the start of a run and its resumption, by how its name begins: where things are and what is
# logged, saved and shown, not what is learned. The rows are known by their digest, data_sha256.
FREE_SETTINGS = tuple(
    "settings config versions step train_file output_dir logging log_ save eval hub push report_to run_name project "
    "trackio dataloader_num dataloader_p disable_tqdm resume do_ ddp_timeout dataset_num_proc local_rank debug "
    "include_ torch_empty skip_memory restore prediction".split()
)
# Settings named in the model card.
CARD_SETTINGS = (
    "learning_rate lr_scheduler_type warmup_steps num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps max_length packing packing_strategy completion_only_loss optim weight_decay seed bf16"
).split()


class UserError(Exception):
    """A mistake of the user: told in one sentence, without a traceback, exit code 2."""


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
    freeze_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Leave the embeddings, and the output layer tied to them, as they are: faster, less memory."
        },
    )
    allow_truncation: bool = field(
        default=False, metadata={"help": "Cut rows longer than max_length instead of refusing them."}
    )


@dataclass
class TrainingArguments(SFTConfig):
    """SFTConfig, in bf16 where the hardware has it, else in fp32, unless the recipe or accelerate's file says."""

    output_dir: str | None = field(
        default="outputs/three_kingdoms", metadata={"help": "Folder for checkpoints, the final model and the log."}
    )

    def __post_init__(self):
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


# ---- Rows ----------------------------------------------------------------------------------------------------------


def read_rows(path: str, evaluation: bool = False) -> list[dict]:
    """The chats of a JSONL file as [{"id", "messages"}]; for evaluation also the development questions of a quiz.

    Raises UserError with the line number of a bad line.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as f:
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
                except (ValueError, KeyError, TypeError):
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
        return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **kwargs)

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
        except (ValueError, TemplateError) as e:  # TemplateError: such as a role that the chat template does not know
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
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
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
    except (OSError, ValueError) as e:
        raise cannot_load(name_or_path, e) from None
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
    if "strftime_now(" in tokenizer.chat_template:
        raise UserError(f"the chat template of {name_or_path} prints a date in a way that cannot be fixed; edit it")
    if tokenizer.pad_token is None:  # SFTTrainer would take eos; Llama 3 has a token for it that it does not name
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        tokenizer.pad_token = next((token for token in special if "pad" in token.lower()), tokenizer.eos_token)
    return tokenizer


def cannot_load(name: str, error: Exception) -> UserError:
    """One sentence for a model that cannot be loaded: what was said, and the mend."""
    reason = str(error).strip().split("\n")[0].rstrip(".")
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
    config, parameters: int, frozen: int, args: SFTConfig, sharded: bool, longest: int
) -> tuple[int, int]:
    """Bytes a device needs: (states, activations). Read from the libraries' code, not yet checked on GPUs.

    States: fp32 weights, gradients and Adam's two moments, 16 bytes a parameter (a frozen one 4), over the shards.
    Beside them, whole on each device: the loss's fp32 gradient of the output layer; data parallel's buckets of
    gradients (4 bytes a parameter); under FSDP2 with accumulation the gradients that wait (4 bytes); a block and the
    embedding gathered.
    Activations, per token and layer: what attention and MLP keep for the backward pass, 9 hidden vectors and 4 of the
    MLP's width; with checkpointing one hidden vector a layer, and one layer in full. The loss works on tiles of at
    most 4,096 tokens x 32,768 words. Attention's mask of a packed sequence: one byte a pair of tokens.
    """
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    mlp = getattr(text, "intermediate_size", None) or 4 * hidden
    width = 4 if args.mixed_precision == "no" else 2  # bytes of a number in the arithmetic
    tokens = args.per_device_train_batch_size * longest
    head = text.vocab_size * hidden
    states = (16 * parameters - 12 * frozen) // (args.world_size if sharded else 1) + 4 * head
    if sharded:
        states += (head + (parameters - head) // layers) * width
        states += 4 * parameters * (args.gradient_accumulation_steps > 1)
    else:
        states += 4 * parameters * (args.world_size > 1) + parameters * width * (width == 2)  # autocast's copy
    a_layer = tokens * width * (9 * hidden + 4 * mlp)
    kept = layers * tokens * width * hidden + a_layer if args.activation_checkpointing else layers * a_layer
    return states, kept + min(tokens, 4096) * min(text.vocab_size, 32768) * width * 2 + tokens * tokens


# ---- Runs and checkpoints ------------------------------------------------------------------------------------------


def why_incomplete(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None.

    Trainer writes the weights, the optimizer, the RNG state of each process and, once all have (see _save_rng_state),
    trainer_state.json.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        json.loads((checkpoint / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "it was not written to its end"
    return None


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, or None to start. Names the incomplete ones it skips. Raises UserError."""
    if resume not in ("auto", "never"):
        reason = why_incomplete(Path(resume))
        if reason:
            raise UserError(f"resume: cannot go on from {resume}: {reason}")
        return Path(resume)
    found = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    found.sort(key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    if resume == "never" and found:
        raise UserError(f"{output_dir} holds {len(found)} checkpoints of an earlier run; choose another output_dir")
    for checkpoint in found:
        reason = why_incomplete(checkpoint)
        if not reason:
            return checkpoint
        say(f"skipping {checkpoint}: {reason}")
    return None


def make_recipe(script_args: ScriptArguments, args: SFTConfig, config: str, fsdp: str | None, revision: str | None):
    """What was run, as JSON data: written into every checkpoint, compared when a run goes on."""
    settings = {k: v for k, v in args.to_dict().items() if v is not None}
    with open(script_args.train_file, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {
        "config": config,
        "model_name_or_path": script_args.model_name_or_path,
        "model_revision": revision,
        "train_file": script_args.train_file,
        "data_sha256": digest,
        **({"freeze_embeddings": True} if script_args.freeze_embeddings else {}),
        "num_processes": args.world_size,
        "sharding": fsdp,
        "settings": json.loads(json.dumps(settings, default=str)),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets")},
    }


def differences(then: dict, now: dict) -> list[str]:
    """What differs between two recipes in a way that makes them different runs, as 'key: then -> now'."""
    then, now = ({**recipe, **recipe["settings"]} for recipe in (then, now))
    keys = [k for k in sorted({*then, *now}) if not k.startswith(FREE_SETTINGS)]
    return [f"{k}: {then.get(k)} -> {now.get(k)}" for k in keys if then.get(k) != now.get(k)]


def write_log(output_dir: Path, history: list[dict]):
    """training_log.jsonl and the loss curve, loss.png, each whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    beside = output_dir / "training_log.jsonl.partial"
    beside.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
    os.replace(beside, output_dir / "training_log.jsonl")
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for key in dict.fromkeys(key for entry in history for key in entry if re.fullmatch("loss|eval_.+_loss", key)):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        label = "training" if key == "loss" else f"evaluation: {key[5:-5]}"
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output_dir / "loss.partial.png", dpi=120)
    plt.close(figure)
    os.replace(output_dir / "loss.partial.png", output_dir / "loss.png")


def model_card(recipe: dict) -> str:
    """README.md of a trained model: what it is, from which data, under which terms, with which settings."""
    base = recipe["model_name_or_path"].rstrip("/")
    if (Path(base) / "recipe.json").exists():  # trained before: the terms are those of the first base
        base = json.loads((Path(base) / "recipe.json").read_text(encoding="utf-8"))["model_name_or_path"].rstrip("/")
    name, sources = base.split("/")[-1], Path(recipe["train_file"]).with_name("SOURCES.md")
    llama = re.match(r"(meta-)?llama", name, re.IGNORECASE)
    terms = (
        "Built with Llama. The Llama licence applies: keep this line, ship the agreement with the weights, and let "
        "the name of what you distribute begin with Llama."
        if llama
        else f"The terms of {base} apply to these weights."
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"base_model: {base}",
        "tags: [trl, sft]",
        "---",
        f"# {name if not llama else 'Llama' + name[llama.end() :]}, taught one topic",
        f"{base}, fully fine-tuned with TRL's SFTTrainer on {recipe['train_file']} "
        f"(sha256 {recipe['data_sha256']}). It answers from memory and can be wrong.",
        "## Licence",
        terms,
        "## Data",
        sources.read_text(encoding="utf-8").partition("\n\n")[2] if sources.exists() else "Sources not recorded.",
        "## Settings",
        *(f"- {key}: {recipe['settings'][key]}" for key in CARD_SETTINGS if key in recipe["settings"]),
        "- " + ", ".join(f"{key} {value}" for key, value in recipe["versions"].items()),
    ]
    return "\n".join(lines) + "\n"


class Trainer(SFTTrainer):
    """SFTTrainer whose every checkpoint-N can be used without the run that made it."""

    recipe: dict  # set by main

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Also writes configs, tokenizer and recipe: with sharded FSDP the base class writes nothing at all."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_log(Path(self.args.output_dir), self.state.log_history)
            self.save_companions(Path(output_dir or self.args.output_dir))

    def save_companions(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
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
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs):
        """Called by SFTTrainer at each save; the card is written once, with the final model."""

    def _run_epoch(self, **kwargs):
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:  # a run killed behind its last checkpoint: the base class would train one step too many
            self.control.should_training_stop = True

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json, written next by one process, says all is there

    def save_final(self):
        """Gathers the whole model on the first process and writes output_dir/final, whole or not at all."""
        state_dict = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            final = Path(self.args.output_dir) / "final"
            beside = final.with_name("final.partial")
            shutil.rmtree(beside, ignore_errors=True)
            model = self.accelerator.unwrap_model(self.model)
            for tied in model.all_tied_weights_keys:  # gathered, they no longer share memory: store them once
                state_dict.pop(tied, None)
            model.save_pretrained(beside, state_dict=state_dict)
            write_log(final.parent, self.state.log_history)
            self.save_companions(beside)
            (beside / "README.md").write_text(model_card(self.recipe), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
        self.accelerator.wait_for_everyone()


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


def check_processes():
    """Raises UserError when the launcher started more processes than there are GPUs."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if torch.cuda.is_available() and processes > gpus and os.environ.get("ACCELERATE_USE_CPU") != "true":
        raise UserError(f"{processes} processes were started for {gpus} GPUs; launch with --num_processes={gpus}")


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


def print_plan(script_args, args, config, model_config, numbers: dict, fsdp) -> tuple[int, str | None]:
    """Prints every number of the run before it starts. Returns the steps, and why it cannot fit (or None)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    parameters = sum(p.numel() for p in model.parameters())
    processes, batch = args.world_size, args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    batches = -(-numbers["sequences"] // (batch * processes))
    steps_an_epoch = -(-batches // accumulation)
    steps = args.max_steps if args.max_steps > 0 else int(-(-args.num_train_epochs * steps_an_epoch // 1))
    step_tokens = numbers["tokens_kept"] / numbers["sequences"] * batch * processes * accumulation

    frozen = model.get_input_embeddings().weight.numel() if script_args.freeze_embeddings else 0
    longest = numbers["longest"]
    states, activations = estimate_memory(model_config, parameters, frozen, args, fsdp is not None, longest)
    if args.device.type == "cuda":
        there, where = torch.cuda.mem_get_info(args.device)[0], "a GPU"
    else:  # processes on one machine share its memory
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        there, where = psutil.virtual_memory().available // local, "a process"
    every = steps_an_epoch if args.save_strategy == "epoch" else args.save_steps  # below 1 a share of all steps
    saves = 0 if args.save_strategy == "no" else -(-steps // max(1, int(every if every >= 1 else every * steps)))
    saves = min(saves, args.save_total_limit + 1) if args.save_total_limit else saves  # one more while rotating
    full = fsdp is not None and "FULL" in str(fsdp.state_dict_type)
    # fp32 weights and Adam's two moments; final: weights
    disk = parameters * ((16 if full else 12) * saves + 4) - 8 * frozen * saves
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
        + (f" ({frozen:,} of them frozen)" if frozen else "")
        + f", {precision}, on {args.device.type}",
        "data": f"{script_args.train_file}: {numbers['rows']:,} rows, {numbers['tokens']:,} tokens in "
        f"{numbers['sequences']:,} sequences of at most {numbers['longest']:,}",
        "kept": f"{numbers['tokens_kept'] / numbers['tokens']:.1%} of the tokens"
        + (f"; {cut:,} tokens over max_length {args.max_length:,} are cut off" if cut else ""),
        "loss on": f"{numbers['tokens_with_loss']:,} tokens"
        + (" (answers and their end-of-turn)" if args.completion_only_loss else " (prompts too)"),
        "a step": f"{processes} devices x {batch} sequences x {accumulation} accumulation = {step_tokens:,.0f} tokens",
        "steps": f"{steps:,} = {steps / steps_an_epoch:.1f} epochs = {steps * step_tokens:,.0f} tokens",
        "memory": f"about {gigabytes(states + activations)} {where} (weights, gradients, Adam {gigabytes(states)}; "
        f"activations {gigabytes(activations)}), there is {gigabytes(there)}",
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
            f"version {fsdp.fsdp_version}, reshard_after_forward {fsdp.reshard_after_forward}, {policy}"
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
    if states + activations > there:
        return steps, (
            f"about {gigabytes(states + activations)} of memory {where} are needed and {gigabytes(there)} are there; "
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
    if args.packing and not args.max_length:
        raise UserError("packing needs max_length")
    if args.device.type == "cpu":
        keep_memory()
    disable_progress_bars()  # those of datasets: one for each step of packing, in every process
    output_dir, name = Path(args.output_dir), script_args.model_name_or_path
    model_kwargs = {
        "dtype": torch.float32,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    hub = {key: model_kwargs[key] for key in ("revision", "trust_remote_code") if key in model_kwargs}
    try:
        model_config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as e:
        raise cannot_load(name, e) from None
    tokenizer = load_tokenizer(name, args.chat_template_path, **hub)
    stop_ids = stop_tokens(name, tokenizer, args.eos_token, **hub)
    args.completion_only_loss = args.completion_only_loss is not False

    how = (tokenizer, stop_ids, args, script_args.allow_truncation)
    path = script_args.train_file
    dataset, numbers = prepare(read_rows(path), path, *how, packing=args.packing)
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
    steps, obstacle = print_plan(script_args, args, config, model_config, numbers, fsdp)
    if script_args.dry_run:
        say(f"dry run: it cannot fit: {obstacle}" if obstacle else "dry run: stopping before the first step")
        sys.exit(1 if obstacle else 0)

    commit = getattr(model_config, "_commit_hash", None) or hub.get("revision")
    recipe = make_recipe(script_args, args, config, fsdp.state_dict_type.name if fsdp else None, commit)
    checkpoint, final = find_checkpoint(script_args.resume, output_dir), output_dir / "final"
    finished = (final / "recipe.json").exists()
    if checkpoint or finished:
        earlier = checkpoint or final
        then = json.loads((earlier / "recipe.json").read_text(encoding="utf-8"))
        changed = differences(then, recipe)
        if changed:
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
        model = AutoModelForCausalLM.from_pretrained(name, **model_kwargs)
    except (OSError, ValueError, ImportError) as e:
        raise cannot_load(name, e) from None
    model.get_input_embeddings().requires_grad_(not script_args.freeze_embeddings)
    # What SFTTrainer would do to the rows is done; the template, with its date fixed, is in the tokenizer.
    args.dataset_kwargs, args.chat_template_path, args.model_init_kwargs = {"skip_prepare_dataset": True}, None, None
    if args.device.type == "cpu":
        # TRL leaves the positions without a label out of the output layer only where it uses Triton, since shapes that
        # change make other devices compile again. A CPU compiles nothing; of the rows in configs/ half are prompts.
        trl_utils._use_triton = lambda device: True
    try:
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=eval_datasets or None,
            processing_class=tokenizer,
        )
    except (ImportError, RuntimeError, ValueError) as e:  # settings that exclude each other, a tracker not installed
        if isinstance(e, RuntimeError) and "to be installed" not in str(e):
            raise
        raise UserError(str(e).strip().split("\n")[0]) from None
    assert trainer.is_fsdp_enabled == (fsdp is not None), "accelerate decided otherwise than fsdp_settings"
    trainer.recipe = recipe
    if fsdp and args.mixed_precision == "bf16":  # accelerate would also sum gradients in bf16, across GPUs and batches
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_final()
    say(
        f"wrote {output_dir}/final, training_log.jsonl, loss.png; ask it: python generate.py --checkpoint {output_dir}"
    )


if __name__ == "__main__":
    try:
        check_processes()
        main(*parse_args([ScriptArguments, TrainingArguments], default_config="configs/three_kingdoms/train.yaml"))
    except UserError as e:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train.py: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
