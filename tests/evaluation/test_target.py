"""`--target`: the smallest guidance scale whose figure meets a bound, and the model's default that it becomes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from helpers.errors import error_message
from helpers.evaluation_helpers import PROMPTS, NoA, row_with, save_plain_model, save_quantile_model, short

from quarkrl.cli.main import main
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.evaluate import evaluate
from quarkrl.evaluation.target import Target, search
from quarkrl.rewards import Scorer
from quarkrl.sampling.generator import QuarkGenerator


def measure(scale):
    """A made-up control curve: the reward rises with the scale by 0.1, and its interval is 0.08 wide."""
    return row_with("best", 0.1 * scale, guidance_scale=scale)


def test_a_search_bisects_between_the_last_scale_that_misses_and_the_first_that_meets():
    choice = search(Target.parse("reward>=0.37"), measure, (1, 2, 8))
    # 1 and 2 miss, 8 meets; 5 meets, 3.5 misses, 4.25 meets; from 3.5 to 4.25 the reward rises by 0.075 > 0.04: 3.88
    assert [row.guidance_scale for row in choice.rows] == [1, 2, 3.5, 3.88, 4.25, 5, 8]
    assert choice.row.guidance_scale == 3.88
    assert choice.describe().startswith("target reward>=0.37: γ = 3.88 meets it: reward 0.388 ±0.04 (γ = 1: 0.1)")
    assert "The 95 % interval reaches 0.358, which misses it." in choice.describe()


def test_a_search_ends_at_the_first_scale_that_meets():
    choice = search(Target.parse("toxicity probability <= 0.95"), measure, (4, 1, 2))
    assert [row.guidance_scale for row in choice.rows] == [1] and choice.row.guidance_scale == 1


def test_a_search_without_success_names_the_nearest_scale():
    choice = search(Target.parse("reward >= 0.9"), measure, (1, 2, 4))
    assert choice.row is None and choice.to_json()["guidance_scale"] is None and choice.to_json()["nearest"] == 4
    assert choice.describe().startswith("target reward >= 0.9: no γ up to 4 meets it. The nearest is γ = 4: reward 0.4")


@pytest.mark.parametrize("text", ["toxicity", "toxicity<0.1", "toxicity<=", "<=1", "toxicity<=x", "toxicity<=nan"])
def test_another_form_of_target_is_an_error_with_an_example(text):
    error_message(lambda: Target.parse(text), "Write for example 'toxicity<=0.02'.")


def test_a_metric_that_is_not_measured_is_an_error_before_sampling(trained):
    def never(**_):
        raise AssertionError

    with pytest.raises(UserError, match="must name a figure of this evaluation, which are reward, perplexity"):
        evaluate(trained, load_prompts(PROMPTS), Scorer(never), short(target="rewrad<=1"))


def test_an_evaluation_with_a_target_measures_the_curve_and_all_sets(trained):
    sets = {"in": load_prompts(PROMPTS), "out": load_prompts(["a"])}
    options = short(target="a-ness<=-1", guidance_scales=(1, 2), quantiles=("all",))
    evaluation = evaluate(trained, sets, Scorer(NoA()), options)
    assert [row.name for row in evaluation.rows_of("in")] == ["reference", "0", "1", "2", "best γ=2"]
    nearest = evaluation.protocol["target"]["nearest"]
    assert evaluation.protocol["target"]["guidance_scale"] is None and nearest in (1, 2)
    assert [row.name for row in evaluation.rows_of("out")][4:] == (["best γ=2"] if nearest == 2 else [])
    assert set(evaluation.rows[0].figures) == {*_metric_names(evaluation)}


def _metric_names(evaluation):
    from quarkrl.evaluation.panel import Panel

    return Panel(scorer=Scorer(NoA()), perplexity_model=None).metric_names


def test_a_plain_model_has_no_target(plain):
    with pytest.raises(UserError, match=r"target: .* was not trained with Quark"):
        evaluate(plain, load_prompts(PROMPTS), Scorer(NoA()), short(target="a-ness<=1"))


def test_a_saved_target_is_the_default_of_the_best_quantile(tmp_path, capsys):
    directory = tmp_path / "final"
    directory.mkdir()
    save_quantile_model(directory, save_plain_model(tmp_path))
    command = ["evaluate", str(directory), "--prompts", "prompts.txt", "--reward", "repetition", "--samples", "2"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    command[3] = str(prompts)
    command += ["--guidance_scales", "1.5", "--max_new_tokens", "5", "--resamples", "10", "--reference", "none"]
    assert main([*command, "--save_guidance"]) == 2
    assert "save_guidance: must have a target." in capsys.readouterr().err
    assert main([*command, "--target", "dist-1<=-1", "--save_guidance"]) == 0
    assert "default guidance: unchanged" in capsys.readouterr().err
    assert main([*command, "--target", "dist-1<=1", "--save_guidance"]) == 0
    assert "target dist-1<=1: γ = 1.5 meets it: dist-1" in capsys.readouterr().out
    recorded = json.loads((directory / "quark.json").read_text())["default_guidance"]
    assert recorded == {
        "guidance_scale": 1.5,
        "target": "dist-1<=1",
        "guidance_from": "worst",
        "guidance_rule": "both",
    }
    assert "γ = 1.5" in (directory / "README.md").read_text()
    generator = QuarkGenerator.from_pretrained(directory)
    options = {"seed": 3, "max_new_tokens": 8}
    texts = generator.generate(PROMPTS, **options)
    assert texts == generator.generate(PROMPTS, guidance_scale=1.5, **options)
    assert texts != generator.generate(PROMPTS, guidance_scale=1, **options)
    worst = generator.generate(PROMPTS, "worst", **options)
    assert worst == generator.generate(PROMPTS, "worst", guidance_scale=1, **options)


def test_a_damaged_default_is_an_error(tmp_path, trained):
    directory = tmp_path / "final"
    shutil.copytree(trained, directory)
    facts = json.loads((directory / "quark.json").read_text())
    (directory / "quark.json").write_text(json.dumps({**facts, "default_guidance": {"guidance_scale": "x"}}))
    error_message(lambda: QuarkGenerator.from_pretrained(directory), "quark.json is damaged (default_guidance")


def test_a_missing_figure_does_not_meet_a_target():
    row = row_with("best", 0.5)
    assert np.isnan(row.figures["diversity"]) and not Target.parse("diversity>=0").is_met(row)
