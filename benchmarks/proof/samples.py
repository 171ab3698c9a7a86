"""Sample a model on prompts and score the completions: `samples.py MODEL PROMPTS REWARD LENGTH OUTPUT`.

Writes a prompt, its eight completions and their rewards in each row: what DPO and SFT learn from.
"""

import json
import sys
from pathlib import Path

from quarkrl import QuarkGenerator
from quarkrl.rewards.registry import resolve


def main() -> None:
    """Write the scored samples."""
    model, prompts, reward, length, output = sys.argv[1:]
    texts = [json.loads(line)["prompt"] for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    generator = QuarkGenerator.from_pretrained(model)
    options = {
        "max_new_tokens": int(length),
        "min_new_tokens": int(length),
        "top_p": 1.0,
        "num_return_sequences": 8,
        "seed": 0,
    }
    function, rows = resolve(reward), []
    for text, completions in zip(texts, generator.generate(texts, **options), strict=True):
        rewards = [float(value) for value in function(prompts=[text] * len(completions), completions=completions)]
        rows.append({"prompt": text, "completions": completions, "rewards": rewards})
    temporary = Path(output + ".part")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(output)


if __name__ == "__main__":
    main()
