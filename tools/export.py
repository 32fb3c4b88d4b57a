"""Write any checkpoint, FSDP shards too, as an ordinary Hugging Face folder in bf16, tied weights stored once.

    python tools/export.py --checkpoint outputs/three_kingdoms/checkpoint-1500 --output_dir exported
    python tools/export.py --checkpoint outputs/three_kingdoms --output_dir exported      # the run's last checkpoint

With --push_to_hub the folder is also published, under a licence that the data and the base model must allow.

    python tools/export.py --checkpoint outputs/demo --output_dir exported --push_to_hub me/gemma-demo --licence gemma
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).parent.parent))
from generate import UserError, expand, load_model, load_tokenizer  # noqa: E402
from train import first_base, is_llama, model_card, read_recipe  # noqa: E402


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint or run folder, or hub model")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the weights"
    )
    parser.add_argument("--push_to_hub", metavar="NAME", help="also publish it as this model on the hub")
    parser.add_argument("--licence", help="for push_to_hub: as the hub writes it, such as gemma or cc-by-nc-sa-2.0")
    args = parser.parse_args()
    if args.output_dir.exists():
        raise UserError(f"{args.output_dir} exists; choose a folder that does not")
    name, _ = expand(args.checkpoint)[-1]
    made = Path(name) / "recipe.json"
    recipe = read_recipe(Path(name)) if made.exists() else None
    if args.push_to_hub:
        check_publishing(recipe, args.push_to_hub, args.licence)
    model, tokenizer = load_model(name, getattr(torch, args.dtype)), load_tokenizer(name)
    beside = args.output_dir.with_name(args.output_dir.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if recipe:
            shutil.copy(made, beside)
            (beside / "README.md").write_text(model_card(recipe, args.licence), encoding="utf-8")
        os.replace(beside, args.output_dir)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"cannot write {args.output_dir}: {getattr(e, 'strerror', None) or e}") from None
    size = sum(path.stat().st_size for path in args.output_dir.glob("*.safetensors"))
    print(f"wrote {name} to {args.output_dir}: {model.num_parameters():,} parameters, {size / 2**20:,.0f} MiB")
    if args.push_to_hub:
        publish(args.output_dir, args.push_to_hub)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"export.py: {e}", file=sys.stderr)
        sys.exit(2)
