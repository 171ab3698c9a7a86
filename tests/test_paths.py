"""The proof's task with a known optimum (benchmarks/proof/paths.py)."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "proof"))
import paths


def shortest_walk(start: str, goal: str) -> list[str]:
    """The nodes of a shortest walk: each step goes to a node that is nearer to the goal."""
    walk, node = [], start
    while node != goal:
        node = min(paths.GRAPH[node], key=lambda successor: paths.DISTANCES[successor].get(goal, 99))
        walk.append(node)
    return walk


def test_every_goal_can_be_reached_within_the_steps_of_a_walk():
    assert all(len(found) == len(paths.NODES) for found in paths.DISTANCES.values())
    assert max(max(found.values()) for found in paths.DISTANCES.values()) <= paths.STEPS


@pytest.mark.parametrize(("start", "goal"), [("a0", "f4"), ("c2", "a1"), ("e3", "e4")])
def test_a_shortest_walk_has_the_reward_1_whatever_follows_and_a_detour_less(start, goal):
    prompt, walk = f"from {start} to {goal} :", shortest_walk(start, goal)
    assert paths.optimality([prompt] * 2, [" ".join(walk), " ".join([*walk, "nowhere"])]) == [1.0, 1.0]
    first = next(node for node in paths.GRAPH[start] if node not in (walk[0], goal))
    detour = [first, *shortest_walk(first, goal)]
    assert paths.optimality([prompt], [" ".join(detour)]) == [len(walk) / len(detour)]


def test_a_walk_that_leaves_the_graph_or_never_arrives_has_the_reward_0():
    goal = next(node for node in paths.NODES if node not in ("a0", *paths.GRAPH["a0"]))
    prompt = f"from a0 to {goal} :"
    walks = [goal, "", paths.GRAPH["a0"][0]]
    assert paths.optimality([prompt] * 3, walks) == paths.arrival([prompt] * 3, walks) == [0.0] * 3


def test_a_random_walk_follows_edges_to_its_own_goal():
    text = paths.random_walk(random.Random(0))
    prompt, walk = text.split(" : ")
    assert paths.steps_to_goal(prompt + " :", walk) is not None
    assert len(walk.split()) == paths.STEPS
