"""A task whose optimum is known: walk from one node of a directed graph to another in as few steps as possible.

    python benchmarks/proof/paths.py        # models/paths: a tiny model of random walks, and prompts.jsonl

A prompt is `from a to k :`, a completion the nodes that a walk visits, such as `d c k b`. Only the part up to the first
visit of the goal counts. The model has learned random walks, each with one of its own nodes as the goal, as the
trajectories of the Decision Transformer (2106.01345, section 3).
"""

import json
import random
from collections import deque
from pathlib import Path

NODES = [f"{letter}{number}" for letter in "abcdef" for number in range(5)]
EDGES_OF_A_NODE = 3
STEPS = 8  # Of a walk; the longest of the shortest ones has fewer.
DIRECTORY = Path("models/paths")
TRAINING_STEPS, BATCH, LEARNING_RATE = 800, 128, 5e-3


def make_graph() -> dict[str, list[str]]:
    """Return the successors of each node: the next one in a circle through all, and some at random."""
    rng = random.Random(0)
    circle = rng.sample(NODES, len(NODES))
    graph = {node: [circle[(i + 1) % len(circle)]] for i, node in enumerate(circle)}
    for node, successors in graph.items():
        others = [other for other in NODES if other != node and other not in successors]
        successors += rng.sample(others, EDGES_OF_A_NODE - 1)
    return graph


def distances(graph: dict[str, list[str]], start: str) -> dict[str, int]:
    """Return the fewest steps from a node to each other node."""
    found, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for successor in graph[node]:
            if successor not in found:
                found[successor] = found[node] + 1
                queue.append(successor)
    return found


GRAPH = make_graph()
DISTANCES = {node: distances(GRAPH, node) for node in NODES}


def steps_to_goal(prompt: str, completion: str) -> int | None:
    """Return after how many steps a walk reaches the goal of its prompt; None if it leaves the graph or never does."""
    _, node, _, goal, _ = prompt.split()
    for steps, successor in enumerate(completion.split(), start=1):
        if successor not in GRAPH[node]:
            return None
        if successor == goal:
            return steps
        node = successor
    return None


def optimality(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """Reward: the fewest possible steps divided by those of the walk, so 1 for a shortest walk; 0 without arrival."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        _, start, _, goal, _ = prompt.split()
        steps = steps_to_goal(prompt, completion)
        rewards.append(DISTANCES[start][goal] / steps if steps else 0.0)
    return rewards


def arrival(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """Judge: whether a walk arrives at all."""
    return [float(steps_to_goal(*pair) is not None) for pair in zip(prompts, completions, strict=True)]


# What 1 - reward measures: that a walk misses the optimum, or the goal.
optimality.unwanted = arrival.unwanted = "miss"  # type: ignore[attr-defined]


def random_walk(rng: random.Random) -> str:
    """Return a random walk as a text. Its goal is one of its nodes."""
    start = node = rng.choice(NODES)
    walk = [node := rng.choice(GRAPH[node]) for _ in range(STEPS)]
    goal = rng.choice([visited for visited in walk if visited != start])
    return f"from {start} to {goal} : {' '.join(walk)}"


def make_task(directory: Path) -> None:
    """Train the model, and write it and the prompts of all pairs of nodes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "from", "to", ":", *NODES]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    torch.manual_seed(0)
    # Rotary positions: learned ones would not bear a token in front of the prompt.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=64, tie_word_embeddings=True, **sizes, **ends)
    model, rng = LlamaForCausalLM(config), random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        ids = tokenizer([random_walk(rng) for _ in range(BATCH)], return_tensors="pt").input_ids
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    pairs = [(start, goal) for start in NODES for goal in NODES if start != goal]
    random.Random(2).shuffle(pairs)
    lines = [json.dumps({"prompt": f"from {start} to {goal} :"}) + "\n" for start, goal in pairs]
    (directory / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    make_task(DIRECTORY)
    print(DIRECTORY)
