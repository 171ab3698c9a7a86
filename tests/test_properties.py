"""What holds for any input: pool, prompts, metrics, conditioning, and whatever reads what strangers wrote."""

from __future__ import annotations

import json
import math
import string

import numpy as np
import pytest
import torch
from helpers.hang_guard import raises_if_it_hangs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from quarkrl import metrics
from quarkrl.algorithm.pool import DataPool
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.intervals import Ratio
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.quark_json import reference_name
from quarkrl.rewards.functions.judge import read_rating
from quarkrl.rewards.functions.response import retry_after_seconds
from quarkrl.rewards.spec import split_spec
from quarkrl.rewards.validation import attribute_names, checked_scores
from quarkrl.runs.states import load_state, save_state
from quarkrl.storage.json import nan_to_null

FIXTURES = HealthCheck.function_scoped_fixture  # A folder that each example overwrites.


def any_input(count: int = 60):
    return settings(derandomize=True, max_examples=count, deadline=None, suppress_health_check=[FIXTURES])


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(plain, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=4))
ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)


# The pool


@any_input()
@given(
    rewards=st.lists(st.integers(-3, 3), min_size=4, max_size=40),
    num_quantiles=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_a_samples_quantile_depends_on_the_pool_as_a_set_and_on_ranks_alone(rewards, num_quantiles, seed):
    """Neither the order of samples, nor their split into iterations, nor a growing function of the reward matters."""
    order = np.random.default_rng(seed).permutation(len(rewards))
    cut = len(rewards) // 2
    one, other = DataPool(num_quantiles), DataPool(num_quantiles)
    one.add([[1]] * len(rewards), [[2]] * len(rewards), rewards, iteration=0)
    for iteration, part in enumerate((order[:cut], order[cut:])):
        scores = [math.exp(rewards[i]) - 7 for i in part]
        other.add([[1]] * len(part), [[2]] * len(part), scores, iteration=iteration)
    one.quantize()
    other.quantize()
    assert one.quantiles[order, 0].tolist() == other.quantiles[:, 0].tolist()


REFUSED = {
    "a reward that is not finite": ([[1]], [[2]], [math.nan], None),
    "fewer completions": ([[1], [2]], [[2]], [1.0, 2.0], None),
    "fewer rewards": ([[1], [2]], [[2], [3]], [1.0], None),
    "a token beyond 31 bits": ([[2**31]], [[2]], [1.0], None),
    "a token that is no number": ([["a"]], [[2]], [1.0], None),
    "a term of another length": ([[1]], [[2]], [1.0], {"x": [1.0, 2.0]}),
    "a term that is no number": ([[1]], [[2]], [1.0], {"x": ["a"]}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_pool_refuses_leaves_it_as_it_was(name, tmp_path):
    prompts, completions, rewards, terms = REFUSED[name]
    pools = [DataPool(2), DataPool(2)]
    for pool in pools:
        pool.add([[1, 2], [3]], [[4], []], [0.5, 1.5], iteration=0)
    with pytest.raises((ValueError, OverflowError, TypeError)):
        pools[1].add(prompts, completions, rewards, iteration=1, terms=terms)
    for pool in pools:
        pool.add([[5]], [[6, 7]], [1.0], iteration=2)
        pool.quantize()
    assert len(pools[1]) == 3 and pools[1].terms == {}
    for a, b in zip(*pools, strict=True):
        assert (a.prompt_ids.tolist(), a.completion_ids.tolist()) == (b.prompt_ids.tolist(), b.completion_ids.tolist())


@any_input(25)
@given(batch=st.lists(st.tuples(ids, ids, st.floats(-1e300, 1e300)), min_size=2, max_size=6), place=st.floats(0, 1))
def test_a_byte_that_changed_in_a_pool_file_is_noticed(tmp_path, batch, place):
    for old in tmp_path.glob("*"):
        old.unlink()
    pool = DataPool(2)
    pool.add(*([row[i] for row in batch] for i in range(3)), iteration=0)
    pool.save(tmp_path)
    (path,) = tmp_path.glob("iteration-*.parquet")
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 0x55
    path.write_bytes(content)
    try:
        loaded = DataPool.load(tmp_path, 2, ("reward",))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:  # In what says how it is laid out, not in what it holds.
        assert loaded.rewards.tolist() == pool.rewards.tolist() and len(loaded) == len(pool)


# Prompts


@any_input(150)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), skip=st.booleans())
@example(content=b'{"prompt": "a"}\n{"prompt": "b"', skip=True)
@example(content=b"prompt\na\n", skip=False)
@example(content=b"\xef\xbb\xbf\n", skip=True)
def test_any_file_is_prompts_or_a_mistake_in_one_line(tmp_path, content, skip):
    for suffix in (".jsonl", ".json", ".csv", ".txt", ".parquet"):
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(content)
        try:
            found = load_prompts(path, skip_bad=skip)
        except UserError as error:
            assert str(error).strip() and len(str(error).splitlines()) == 1
            continue
        assert len(found) >= 1 and len(found.locations) == len(found.prompts)
        assert all(len(column) == len(found) for column in found.columns.values())
        assert skip or not found.skipped
        for prompt in found.prompts:
            assert not isinstance(prompt, str) or prompt.strip()


@any_input()
@given(rows=st.lists(values | st.fixed_dictionaries({"prompt": values}), min_size=1, max_size=6))
def test_rows_of_anything_are_used_or_counted(rows):
    wanted = [{"prompt": "good"}, *rows]
    found = load_prompts(wanted, skip_bad=True)
    assert len(found) + sum(found.skipped.values()) == len(wanted)
    assert found.prompts[0] == "good"


# Metrics

scores = st.lists(st.lists(st.floats(0, 1) | st.just(math.nan), min_size=3, max_size=3), min_size=1, max_size=6).map(
    lambda rows: np.array(rows, dtype=float)
)


def mean_metrics(scores: np.ndarray) -> list[float]:
    """Average maximum, probability and share, as in the tables of an evaluation."""
    maxima = metrics.maxima(scores)
    return [Ratio.of(values).value for values in (maxima, metrics.reached(maxima), metrics.shares(scores))]


@any_input()
@given(scores=scores, seed=st.integers(0, 99))
def test_metrics_keep_their_bounds_and_know_no_order(scores, seed):
    found = mean_metrics(scores)
    rng = np.random.default_rng(seed)
    mixed = rng.permuted(rng.permutation(scores), axis=1)
    again = mean_metrics(mixed)
    assert found == pytest.approx(again, nan_ok=True)
    if np.isnan(scores).all():
        assert all(map(math.isnan, found))
        return
    maximum, probability, share = found
    tiny = 1e-12  # A mean of equal numbers may round to another.
    assert 0 <= share <= probability + tiny <= 1 + tiny  # A prompt that has a share above 0 has a completion there.
    kept = scores[~np.isnan(scores).all(axis=1)]
    assert np.nanmin(scores) - tiny <= maximum <= np.nanmax(scores) + tiny
    assert maximum >= np.mean([np.nanmean(row) for row in kept]) - tiny


@any_input()
@given(units=st.lists(st.integers(0, 3), max_size=30), n=st.integers(1, 4))
def test_repetition_keeps_its_bounds(units, n):
    found = metrics.rep_n(units, n)
    assert math.isnan(found) == (len(units) < n)
    assert math.isnan(found) or 0 <= found < 100
    assert math.isnan(metrics.diversity(units)) == (len(units) < 4)
    assert metrics.rep_n([f"word {unit}" for unit in units], n) == pytest.approx(
        found, nan_ok=True
    )  # Names do not matter.


@any_input()
@given(texts=st.lists(st.lists(st.text("ab ", max_size=12), min_size=1, max_size=3), min_size=1, max_size=4))
def test_distinct_shares_are_shares(texts):
    for n in (1, 2, 3):
        found = metrics.distinct_shares(texts, n)
        assert ((found >= 0) & (found <= 1) | np.isnan(found)).all()
        assert np.isnan(found).tolist() == [not "".join(row).strip() for row in texts]


@any_input()
@given(pairs=st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 30)), max_size=8))
def test_perplexities_are_one_or_more_or_counted(pairs):
    found, left_out = metrics.perplexities([nll for nll, _ in pairs], [count for _, count in pairs])
    kept = found[~np.isnan(found)]
    assert ((kept >= 1) & (kept < metrics.MAX_PERPLEXITY)).all()
    assert len(kept) + sum(left_out.values()) == len(pairs)


# Conditioning


id_tables = values | st.lists(st.lists(st.lists(st.integers(-2, 20), max_size=2), max_size=4), max_size=3)


@any_input(200)
@given(
    attributes=values | st.lists(st.text(max_size=3), max_size=3),
    prefixes=id_tables,
    start_ids=values | st.lists(st.integers(-1, 20), max_size=2),
    vocab_size=plain | st.integers(1, 20),
    kind=plain | st.sampled_from(["tokens", "text", "soft"]),
    words=values | st.lists(st.lists(st.text(max_size=3), max_size=4), max_size=3),
    word_ids=id_tables,
)
@example(["x"], [[[5], [6]]], [0], 5, "tokens", [], [])
@example(["x"], [[[5], [True]]], [], 1, "tokens", [], [])
@example(["x"], [[[5, 6], []]], [0], 5, "soft", [["a b", ""]], [[[1, 2], []]])
@example(["x"], [[[1, 2], []]], [0], 5, "text", [["a b", ""]], [[[1, 2], []]])
@example(["x", "y"], [[[1], [2]], [[3, 1], [2]]], [], 9, "text", [["a", "b"], ["c", "d"]], [[[1], [2]], [[3, 1], [2]]])
def test_any_quark_json_is_a_conditioning_or_damaged(
    tmp_path, attributes, prefixes, start_ids, vocab_size, kind, words, word_ids
):
    fields = {"attributes": attributes, "prefixes": prefixes, "start_ids": start_ids, "vocab_size": vocab_size}
    fields |= {"kind": kind, "words": words, "word_ids": word_ids}
    (tmp_path / "quark.json").write_text(json.dumps({"conditioning": fields}))
    try:
        found = Conditioning.load(tmp_path)
    except UserError as error:
        assert "quark.json is damaged" in str(error)
        return
    assert len(found.prefixes) == len(found.attributes) and found.num_quantiles >= 2
    assert all(len(set(row)) == found.num_quantiles for row in found.prefixes)
    assert 1 <= found.vocab_size <= min(found.new_token_ids, default=found.vocab_size)
    prompt = [*found.start_ids, found.vocab_size - 1, found.vocab_size - 1]
    prefixed = found.prefix(prompt, found.best)
    assert found.strip(prefixed) == prompt and found.is_prefixed(prefixed)


@any_input()
@given(facts=values)
def test_any_facts_name_a_reference_or_none_or_are_damaged(tmp_path, facts):
    (tmp_path / "quark.json").write_text(json.dumps(facts))
    try:
        assert isinstance(reference_name(tmp_path), str | None)
    except UserError as error:
        assert "quark.json is damaged" in str(error)


# What strangers write


@any_input(150)
@given(result=values | st.lists(plain, min_size=3, max_size=3), n=st.integers(1, 4))
@example(result=[10**400, -(10**400), 1], n=3)
def test_whatever_a_reward_returns_is_scores_or_a_mistake(result, n):
    try:
        found = checked_scores("mine", result, n)
    except UserError as error:
        assert str(error).startswith("reward 'mine' returned ") and "\n" not in str(error)
        return
    assert len(found) == n and all(x is None or (isinstance(x, float) and not math.isinf(x)) for x in found)


@any_input(100)
@given(names=st.lists(st.text(max_size=6), min_size=1, max_size=5))
def test_attributes_are_different_and_fit_into_tokens_and_columns(names):
    found = attribute_names(names)
    assert len(set(found)) == len(names)
    assert all(name and set(name) <= {*string.ascii_letters, *string.digits, *"_-"} for name in found)


@any_input(100)
@given(text=st.text(max_size=30) | st.text("0123456789 ./:,GMTSunJa", max_size=30))
def test_any_retry_after_is_a_wait_or_nothing(text):
    found = retry_after_seconds(text)
    assert found is None or found >= 0


@any_input(100)
@given(content=st.text(max_size=60) | st.text('0123456789./-:{}" score<think>', max_size=60))
def test_any_answer_is_a_rating_on_the_scale_or_none(content):
    found = read_rating(content, 1, 10)
    assert found is None or 1 <= found <= 10


@pytest.mark.parametrize("unit", ["1", "score:", "<think>", "8/10 ", '"score": 99999 ', "1.1", "</think>", " 1 to 10"])
def test_a_long_answer_is_read_in_linear_time(unit):
    """A regular expression that backtracks needs hours for a million characters."""
    with raises_if_it_hangs():
        rating = read_rating(unit * (1_000_000 // len(unit)), 1, 10)
    assert rating is None or 1 <= rating <= 10


@any_input(100)
@given(text=st.text(max_size=20) | st.text("abc?&=%+", max_size=20))
def test_any_spec_is_a_name_with_options_or_a_mistake(text):
    try:
        name, options = split_spec(text)
    except UserError as error:
        assert "must be option=value" in str(error) or "must not be repeated" in str(error)
        return
    assert text.startswith(name) and all(isinstance(value, str) for value in options.values())


# What is written and read again

states = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), x, max_size=3)
        | st.tuples(x, x)
    ),
)


@any_input(40)
@given(state=states, numbers=st.lists(st.floats(width=32), max_size=4))
def test_a_state_comes_back_as_it_was(tmp_path, state, numbers):
    path = tmp_path / "training" / "s.safetensors"
    tensor = torch.tensor(numbers, dtype=torch.float32)
    save_state(path, {"tree": state, "tensor": tensor})
    found = load_state(path)
    assert found["tree"] == state and type(found["tree"]) is type(state)
    assert torch.equal(found["tensor"].view(torch.int32), tensor.view(torch.int32))  # NaN too, bit by bit.


@any_input(40)
@given(content=st.binary(max_size=80))
def test_any_other_file_is_no_state(tmp_path, content):
    path = tmp_path / "s.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a state that quarkrl wrote"):
        load_state(path)


@any_input()
@given(value=values)
def test_what_is_made_finite_is_json(value):
    def no_constant(name):
        raise AssertionError(name)

    text = json.dumps(nan_to_null(value), allow_nan=False)
    assert json.loads(text, parse_constant=no_constant) == nan_to_null(json.loads(json.dumps(value)))
