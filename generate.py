"""Ask every checkpoint the same questions and show the answers side by side, the base model first.

A checkpoint is a Hugging Face folder, a folder of FSDP shards (read directly), a run folder (all its checkpoints in
step order) or a hub model. With `output_file` the answers are also written as JSONL.

    python generate.py                                                   # the run of configs/three_kingdoms
    python generate.py --checkpoint outputs/demo/checkpoint-42 --prompt "삼국지에 대해 알려줘."
    python generate.py --checkpoint outputs/demo --prompts_file questions.jsonl --output_file answers.jsonl
    python generate.py --checkpoint outputs/demo/final --interactive
"""

import argparse
import ctypes
import difflib
import hashlib
import importlib
import json
import os
import pickle
import platform
import re
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import get_args, get_type_hints

import torch
import transformers  # by name alone: what is taken from it is imported when it is first used
import yaml
from jinja2 import TemplateError
from rich.console import Console
from rich.markup import escape
from tqdm import tqdm
from trl import TrlParser

SHARDS = "pytorch_model_fsdp_0"  # accelerate's name for the folder of sharded weights
RANGES = {
    "max_new_tokens": (1, 2**20), "batch_size": (1, 2**16), "temperature": (1e-3, 1e3), "top_p": (1e-3, 1),
    "top_k": (0, 2**31 - 1), "repetition_penalty": (1e-3, 1e3), "seed": (0, 2**32 - 1),
}  # fmt: skip
SHOWN = 3  # questions whose answers are printed when all go into a file


# What a chat template raises that cannot render: it is a program, and may divide by zero as well.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, AttributeError)


class UserError(Exception):
    """A mistake of the user: told in one sentence, without a traceback, exit code 2."""

    def __init__(self, message: str):
        line = " ".join(message.split())  # it may hold what was given: lines, or any length
        super().__init__(line if len(line) <= 1500 else f"{line[:1500]} …")


@dataclass
class GenerateArguments:
    checkpoint: list[str] | None = field(
        default=None,
        metadata={"action": "extend", "help": "Checkpoint, run folder or hub model; repeat it to compare several."},
    )
    prompt: list[str] | None = field(default=None, metadata={"action": "extend", "help": "Question; repeatable."})
    prompts_file: str | None = field(
        default=None,
        metadata={"help": "Questions, in place of `prompt`: plain lines, or JSONL with `prompt` or `question`."},
    )
    interactive: bool = field(
        default=False, metadata={"help": "Type questions; the answer of one checkpoint streams."}
    )
    base_model: str = field(
        default="auto", metadata={"help": "Model that answers first: auto (the run's own), none, or a name or folder."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja file in place of the template that each checkpoint brings."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens after which an answer is cut off."})
    batch_size: int = field(default=8, metadata={"help": "Questions answered at once."})
    engine: str = field(default="transformers", metadata={"help": "transformers, or vllm where it is installed."})
    do_sample: bool = field(default=False, metadata={"help": "Sample; otherwise the likeliest token each time."})
    temperature: float = field(default=0.7, metadata={"help": "With do_sample: below 1 sharpens, above 1 flattens."})
    top_p: float = field(default=0.9, metadata={"help": "With do_sample: from the likeliest tokens of this total."})
    top_k: int = field(default=50, metadata={"help": "With do_sample: from this many likeliest tokens; 0 for all."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1 makes words already said less likely."})
    seed: int = field(default=42, metadata={"help": "With do_sample: the same seed gives the same answers."})
    dtype: str = field(
        default="auto",
        metadata={"help": "float32, bfloat16, float16; auto: bfloat16 on GPUs and CPUs that compute in it."},
    )
    output_file: str | None = field(default=None, metadata={"help": "JSONL file for the answers."})


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


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


def step_of(checkpoint: Path) -> int | None:
    """The training step of a checkpoint, from its recipe.json or its name; None when it has none."""
    step, number = read_recipe(checkpoint).get("step"), re.fullmatch(r"checkpoint-(\d{1,12})", checkpoint.name)
    return step if type(step) is int else int(number[1]) if number else None


def read_recipe(checkpoint: Path) -> dict:
    """recipe.json, which train.py writes; empty where there is none that can be read."""
    try:
        recipe = json.loads((checkpoint / "recipe.json").read_text(encoding="utf-8"))
        return recipe if isinstance(recipe, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def has_weights(folder: Path) -> bool:
    return (folder / SHARDS / ".metadata").exists() or any(folder.glob("*.safetensors"))


def expand(name: str) -> list[tuple[str, int | None]]:
    """The (path or hub name, step) that a --checkpoint stands for: itself, or the checkpoints of a run in step order.

    A checkpoint that was not written to its end is named and left out; `final` is left out where the last checkpoint
    is of the same step. Raises UserError when there is none.
    """
    folder = Path(name)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or folder.parent.exists():
            raise UserError(f"there is no checkpoint {name}")
        return [(name, None)]
    if has_weights(folder):
        if not (folder / "config.json").exists():
            raise UserError(f"{name} has weights but no config.json; train.py writes both")
        return [(name, step_of(folder))]
    found = sorted(folder.glob("checkpoint-*"), key=lambda c: step_of(c) or 0)
    complete = [c for c in found if (c / "trainer_state.json").exists() and has_weights(c)]
    for checkpoint in found:
        if checkpoint not in complete:
            print(f"skipping {checkpoint}: it was not written to its end", file=sys.stderr)
    final = folder / "final"
    if has_weights(final) and not (complete and step_of(final) == step_of(complete[-1])):
        complete.append(final)
    if not complete:
        what = (
            "a run without a complete checkpoint yet" if found else "neither a checkpoint nor a run with checkpoints"
        )
        raise UserError(f"{name} is {what}")
    return [(str(c), step_of(c)) for c in complete]


def base_of(asked: dict[str, list[tuple[str, int | None]]], base_model: str) -> tuple[str, str] | None:
    """The base model that answers first, and the checkpoint whose prompt it is asked with: its run's, so that both are
    asked the same. `asked` is what expand gives for each --checkpoint; `auto` takes the base of the first run among
    them, and a single checkpoint is asked alone.
    """
    if base_model == "none":
        return None
    if base_model != "auto":
        return base_model, base_model
    for name, found in asked.items():
        base = read_recipe(Path(found[0][0])).get("model_name_or_path")
        if found[0][0] != name and isinstance(base, str):
            return base, found[0][0]
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


def read_shards(shards: Path, weights: dict[str, torch.Tensor]):
    """Reads FSDP shards into these tensors: torch's reader, with the index read by MetadataUnpickler."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class ShardReader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs) -> Metadata:
            with open(Path(self.path) / ".metadata", "rb") as f:
                metadata = MetadataUnpickler(f).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    reader = ShardReader(shards)
    reader.read_metadata()  # torch hides its errors behind its own
    dcp.load({"model": weights}, storage_reader=reader, no_dist=True)


def keep_memory():
    """Lets glibc keep freed memory, in huge pages: else much of the time on a CPU goes to the kernel's fresh pages.

    Where the allocator is another (macOS, Windows, musl), or its settings are given (MALLOC_…), nothing happens.
    """
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks for it when it first allocates
        libc, max_mmaps, trim_threshold = ctypes.CDLL(None), -4, -1  # as malloc.h numbers them
        libc.mallopt(max_mmaps, 0)
        libc.mallopt(trim_threshold, -1)


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """Where to compute, and in what: bfloat16, but float32 on a CPU that only emulates bfloat16, very slowly."""
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    able = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: ARM
    return device, torch.bfloat16 if able or device.type != "cpu" else torch.float32


def check_weights(folder: Path):
    """Raises UserError when a file of weights is not what train.py wrote: manifest.json knows its SHA-256."""
    manifest = folder / "manifest.json"
    if not manifest.exists():  # of another program, or of the hub
        return
    try:
        digests = json.loads(manifest.read_text(encoding="utf-8"))
        digests = {name: entry["sha256"] for name, entry in digests.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{manifest} is damaged") from None
    for name, expected in digests.items():
        if name.endswith(".safetensors") or name.startswith(SHARDS):
            try:
                with open(folder / name, "rb") as f:
                    found = hashlib.file_digest(f, "sha256").hexdigest()
            except OSError as e:
                raise UserError(f"cannot read {folder / name}: {e.strerror}") from None
            if found != expected:
                raise UserError(f"{folder / name} is damaged: its checksum is not that of manifest.json")


def load_model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a folder, FSDP shards, a LoRA adapter or the hub, on the CPU and in `dtype`. Raises UserError."""
    shards = Path(name) / SHARDS
    check_weights(Path(name))
    try:
        if (Path(name) / "adapter_config.json").exists():
            return load_adapter(name, dtype)
        if not shards.is_dir() or any(Path(name).glob("*.safetensors")):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
            if info["missing_keys"]:  # which would be drawn at random
                raise ValueError(f"it lacks weights, the first {min(info['missing_keys'])}")
            return model
        from transformers.initialization import no_init_weights

        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        with no_init_weights():  # as from_pretrained does: buffers keep their precision, and no weight is made twice
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
        read_shards(shards, model.state_dict())
        model.generation_config = transformers.GenerationConfig.from_pretrained(name)
        return model
    except UserError:  # of an adapter's base
        raise
    except Exception as e:  # for a folder that is broken the libraries raise anything
        raise cannot_load(name, e) from None


def load_adapter(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model that a LoRA adapter was trained from, with what it learned added to the weights in fp32."""
    if not find_spec("peft"):
        raise UserError(
            f"{name} is a LoRA adapter, which needs the package peft: pip install -r requirements-tools.txt"
        )
    from peft import PeftModel

    base = json.loads((Path(name) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    model = PeftModel.from_pretrained(load_model(base, torch.float32), name).merge_and_unload()
    model.generation_config = transformers.GenerationConfig.from_pretrained(name)
    return model.to(dtype)


def load_tokenizer(name: str, chat_template_path: str | None = None):
    """The tokenizer of a checkpoint, padding on the left as generation needs it. Raises UserError."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
    except Exception as e:  # tokenizers raises nothing narrower
        raise cannot_load(name, e) from None
    if chat_template_path:
        try:
            tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            reason = getattr(e, "strerror", None) or e
            raise UserError(f"chat_template_path: cannot read {chat_template_path}: {reason}") from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {name} has no chat template; checkpoints of train.py have one")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def cannot_load(name: str, error: Exception) -> UserError:
    """One sentence for a model that cannot be loaded: what was said, and the mend."""
    reason = (str(error).strip() or type(error).__name__).split("\n")[0][:300].rstrip(".")
    gated = re.search(r"gated|\b40[13]\b", str(error)) or name.startswith(("meta-llama/", "google/"))
    login = "a gated model: accept its terms on its hub page and run `hf auth login`"
    mend = login if gated else "it must be a folder that train.py wrote, or a model's name on the hub"
    return UserError(f"cannot load {name}: {reason} ({mend}; --base_model none leaves a run's base model out)")


# ---- Questions -----------------------------------------------------------------------------------------------------


def read_prompts(path: str) -> list[dict]:
    """Questions of a file as rows with a `prompt`: plain lines, or JSON objects whose other fields are kept.

    A quiz's first line, {"about": …}, asks nothing. Raises UserError with the line number of a bad line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read prompts_file {path}: {getattr(e, 'strerror', None) or e}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = {"prompt": line.strip()}
        if path.endswith((".jsonl", ".json")):
            try:
                row = json.loads(line)
                if isinstance(row, dict) and "about" in row and not {"prompt", "question"} & set(row):
                    continue
                row = {**row, "prompt": row.get("prompt") or row["question"]}
                json.dumps(row, ensure_ascii=False).encode()  # half a character could not be written
                if not isinstance(row["prompt"], str):
                    raise TypeError
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise UserError(
                    f'{path}, line {number}: not a question; a line is {{"prompt": "…"}} or {{"question": "…"}}'
                ) from None
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no questions")
    return rows


def break_special_tokens(text: str, tokenizer) -> str:
    """A zero-width space inside each of the tokenizer's special tokens, as preprocess.py does to articles."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    return re.sub(pattern, lambda m: m[0][0] + "\u200b" + m[0][1:], text) if special else text


# ---- Answers -------------------------------------------------------------------------------------------------------


def sampling(args: GenerateArguments) -> dict:
    """The arguments of model.generate that the recipe decides."""
    kwargs = {"max_new_tokens": args.max_new_tokens, "repetition_penalty": args.repetition_penalty}
    if args.do_sample:
        return {**kwargs, "do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    return {**kwargs, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def stop_tokens(config, tokenizer) -> list[int]:
    """The ids that end an answer, of a model's generation config and its tokenizer. Raises UserError."""
    ids = config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    ids = [i for i in dict.fromkeys([*ids, tokenizer.eos_token_id]) if i is not None]
    if not ids:
        raise UserError(
            f"{tokenizer.name_or_path} cannot end an answer: neither its generation_config.json nor its tokenizer "
            "names an eos token"
        )
    return ids


def turn(role: str, text: str, tokenizer) -> dict[str, str]:
    return {"role": role, "content": break_special_tokens(text, tokenizer)}


def encode(chats: list[list[dict[str, str]]], tokenizer, model: torch.nn.Module | None = None):
    """Chats as one left-padded batch, each rendered by the checkpoint's own chat template.

    Returns {"input_ids", "attention_mask"}, each [chats, tokens]. Raises UserError where it cannot.
    """
    try:
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
    except TEMPLATE_ERRORS as e:
        reason = str(e).strip().split("\n")[0]
        raise UserError(f"the chat template of {tokenizer.name_or_path} cannot render a prompt: {reason}") from None
    if model is None:
        return batch
    if batch["input_ids"].max() >= model.get_input_embeddings().weight.shape[0]:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} knows more tokens than its model")
    return batch.to(model.device)


@torch.inference_mode()
def answer(questions: list[str], model: torch.nn.Module, tokenizer, args: GenerateArguments) -> list[dict]:
    """Answers one batch of questions: [{"answer", "tokens", "ended", "seconds"}] (seconds: the batch's share)."""
    start = time.perf_counter()
    batch = encode([[turn("user", question, tokenizer)] for question in questions], tokenizer, model)
    stop = stop_tokens(model.generation_config, tokenizer)
    output = model.generate(**batch, **sampling(args), eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    seconds = (time.perf_counter() - start) / len(questions)
    return [read_answer(ids, stop, tokenizer, seconds) for ids in output[:, batch["input_ids"].shape[1] :].tolist()]


def read_answer(ids: list[int], stop: list[int], tokenizer, seconds: float) -> dict:
    """{"answer", "tokens", "ended", "seconds"} of generated ids: up to the first token that ends an answer."""
    end = next((i for i, token in enumerate(ids) if token in stop), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    tokens = len(ids) if end is None else end + 1
    return {"answer": text, "tokens": tokens, "ended": end is not None, "seconds": round(seconds, 3)}


def answer_with_vllm(
    questions: list[str], name: str, tokenizer, args: GenerateArguments, dtype: torch.dtype
) -> list[dict]:
    """As `answer`, of all questions at once, by vLLM, which loads the model itself. Raises UserError.

    vLLM reads whole models only: of FSDP shards and LoRA adapters it is given a copy in a temporary folder.
    """
    check_weights(Path(name))
    prompts = [
        encode([[turn("user", question, tokenizer)]], tokenizer)["input_ids"][0].tolist() for question in questions
    ]
    with tempfile.TemporaryDirectory() as copy:
        try:
            from vllm import LLM, SamplingParams

            stop = stop_tokens(transformers.GenerationConfig.from_pretrained(name), tokenizer)
            if Path(name).is_dir() and not any(Path(name).glob("model*.safetensors")):
                load_model(name, dtype).save_pretrained(copy)
                name = copy
            room = max(map(len, prompts)) + args.max_new_tokens
            eager = not torch.cuda.is_available()  # a CPU would compile for minutes
            llm = LLM(
                name, dtype=str(dtype)[6:], max_model_len=room, skip_tokenizer_init=True, seed=args.seed,
                enforce_eager=eager,
            )  # fmt: skip
        except UserError:
            raise
        except Exception as e:  # vLLM raises anything
            raise cannot_load(name, e) from None
        start = time.perf_counter()
        how = {k: v for k, v in sampling(args).items() if k in ("temperature", "top_p", "top_k") and v is not None}
        params = SamplingParams(
            **(how if args.do_sample else {"temperature": 0}), repetition_penalty=args.repetition_penalty,
            max_tokens=args.max_new_tokens, stop_token_ids=stop, detokenize=False, seed=args.seed,
        )  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        seconds = (time.perf_counter() - start) / len(questions)
        del llm  # the next checkpoint needs its memory
        return [read_answer(list(o.outputs[0].token_ids), stop, tokenizer, seconds) for o in outputs]


def show(answers: list[dict], console: Console, limit: int | None = None):
    """Prints each question, or the first `limit`, with the answers of all checkpoints below it.

    Lines said over and over are counted.
    """
    questions = list(dict.fromkeys(row["prompt"] for row in answers))
    for question in questions[:limit]:
        console.rule(f"[bold]{escape(question)}", align="left")
        for row in (row for row in answers if row["prompt"] == question):
            ended = "ended by itself" if row["ended"] else "cut off"
            step = "" if row["step"] is None else f", step {row['step']:,}"
            about = f"{row['checkpoint']}{step}: {row['tokens']} tokens, {ended}, {row['seconds']:.1f} s"
            console.print(f"[cyan]{escape(about)}[/]")
            for line, copies in groupby(row["answer"].split("\n")):
                times = len(list(copies))
                console.print(escape(line) + (f" [dim](x {times})[/]" if times > 1 else ""))
            console.print()
    if limit and len(questions) > limit:
        console.print(f"… and {len(questions) - limit:,} more questions")


def chat(model: torch.nn.Module, tokenizer, args: GenerateArguments):
    """A conversation until an empty line; answers stream, Ctrl-C cuts one short, /reset forgets what was said.

    Training shows one question at a time: after /reset a question is asked as there.
    """
    with suppress(ImportError):  # there is none on Windows
        importlib.import_module("readline")  # arrows, and a backspace that knows Hangul
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = stop_tokens(model.generation_config, tokenizer)
    turns: list[dict[str, str]] = []
    print("Ask; /reset begins anew, an empty line ends.")
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            said = ""
        if not said:
            return
        if said == "/reset":
            turns = []
            continue
        batch = encode([[*turns, turn("user", said, tokenizer)]], tokenizer, model)
        settings = sampling(args) | {"eos_token_id": stop, "pad_token_id": tokenizer.pad_token_id}
        try:
            with torch.inference_mode():
                output = model.generate(**batch, **settings, streamer=streamer)
        except KeyboardInterrupt:
            streamer.end()  # what was cut short is not remembered
            continue
        answer = tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        turns += [turn("user", said, tokenizer), turn("assistant", answer, tokenizer)]


def main(args: GenerateArguments, config: str):
    if not args.checkpoint:
        raise UserError("name a checkpoint: --checkpoint outputs/demo")
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be auto, float32, bfloat16 or float16, not {args.dtype}")
    if args.engine not in ("transformers", "vllm"):
        raise UserError(f"engine must be transformers or vllm, not {args.engine}")
    if args.engine == "vllm" and args.interactive:
        raise UserError("interactive answers come from transformers; for vllm there is `vllm serve`")
    if args.engine == "vllm" and not find_spec("vllm"):
        raise UserError("engine vllm needs the package vllm, best in an environment of its own; transformers is there")
    for name, (low, high) in RANGES.items():
        if not low <= getattr(args, name) <= high:  # false of NaN
            raise UserError(f"{name} must be from {low:g} to {high:g}, not {getattr(args, name)}")
    # What is asked: (model, its step, whose tokenizer and prompt).
    asked = {name: expand(name) for name in args.checkpoint}
    checkpoints = [(path, step, path) for found in asked.values() for path, step in found]
    if args.interactive:
        checkpoints = checkpoints[-1:]
    elif base := base_of(asked, args.base_model):
        checkpoints.insert(0, (base[0], 0, base[1]))
    rows = []
    if not args.interactive:
        rows = read_prompts(args.prompts_file) if args.prompts_file else [{"prompt": p} for p in args.prompt or []]
        if not rows:
            raise UserError("no questions: give --prompt, --prompts_file or --interactive")
    if args.output_file and not Path(args.output_file).absolute().parent.is_dir():
        raise UserError(f"output_file: there is no folder {Path(args.output_file).parent}")

    device, auto = device_and_dtype()
    if device.type == "cpu":
        keep_memory()
    dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
    answers, failed = [], []
    for name, step, prompted_as in checkpoints:
        try:
            tokenizer = load_tokenizer(prompted_as, args.chat_template_path)
            encode([[turn("user", "?", tokenizer)]], tokenizer)
            if args.engine == "vllm":
                results = answer_with_vllm([row["prompt"] for row in rows], name, tokenizer, args, dtype)
            else:
                model = load_model(name, dtype).to(device).eval()
                stop_tokens(model.generation_config, tokenizer)
        except UserError as e:
            if len(checkpoints) == 1:
                raise
            failed.append(name)  # the others still answer
            print(f"skipping {name}: {e}", file=sys.stderr)
            continue
        if args.interactive:
            return chat(model, tokenizer, args)
        if args.engine == "transformers":
            transformers.set_seed(args.seed)
            results = []
            for i in tqdm(range(0, len(rows), args.batch_size), desc=name, unit="batch", disable=None):
                questions = [row["prompt"] for row in rows[i : i + args.batch_size]]
                results += answer(questions, model, tokenizer, args)
            del model
        for row, result in zip(rows, results, strict=True):
            own = {"prompt": row["prompt"], "checkpoint": name, "step": step, **result}
            # A question's own fields go along; one of the same name, such as a quiz's answer, as row_answer.
            answers.append({**{f"row_{k}" if k in own else k: v for k, v in row.items() if k != "prompt"}, **own})
    show(answers, Console(highlight=False), limit=SHOWN if args.output_file else None)

    if args.output_file and answers:
        beside = Path(f"{args.output_file}.partial")
        try:
            beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers), encoding="utf-8")
            os.replace(beside, args.output_file)
        except OSError as e:
            beside.unlink(missing_ok=True)
            raise UserError(f"cannot write {args.output_file}: {e.strerror}") from None
        print(f"wrote {args.output_file}")
    if failed:
        raise UserError(f"{len(failed)} of {len(checkpoints)} models did not answer: {', '.join(failed)}")


if __name__ == "__main__":
    try:
        main(*parse_args([GenerateArguments], default_config="configs/three_kingdoms/generate.yaml"))
    except UserError as e:
        print(f"generate.py: {e}", file=sys.stderr)
        sys.exit(2)
