"""Write any checkpoint, FSDP shards too, as an ordinary Hugging Face folder in bf16, tied weights stored once.

python tools/export.py --checkpoint outputs/three_kingdoms/checkpoint-1500 --output_dir exported
python tools/export.py --checkpoint outputs/three_kingdoms --output_dir exported      # the run's last checkpoint
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from generate import UserError, expand, load_model, load_tokenizer  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint or run folder, or hub model")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the weights"
    )
    args = parser.parse_args()
    if args.output_dir.exists():
        raise UserError(f"{args.output_dir} exists; choose a folder that does not")
    name, _ = expand(args.checkpoint)[-1]
    model, tokenizer = load_model(name, getattr(torch, args.dtype)), load_tokenizer(name)
    beside = args.output_dir.with_name(args.output_dir.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        for extra in ("README.md", "recipe.json"):
            if (Path(name) / extra).exists():
                shutil.copy(Path(name) / extra, beside)
        os.replace(beside, args.output_dir)
    except OSError as e:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"cannot write {args.output_dir}: {e.strerror or e}") from None
    size = sum(path.stat().st_size for path in args.output_dir.glob("*.safetensors"))
    print(f"wrote {name} to {args.output_dir}: {model.num_parameters():,} parameters, {size / 2**20:,.0f} MiB")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"export.py: {e}", file=sys.stderr)
        sys.exit(2)
