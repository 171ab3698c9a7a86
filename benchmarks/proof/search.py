"""Search Quark's options with Optuna: least toxicity against least perplexity, at a fixed number of scored completions.

    python benchmarks/proof/search.py --trials 40     # more of them; it can be stopped and goes on
    python benchmarks/proof/search.py --confirm 3     # the best again, measured on prompts that no trial has seen
    python benchmarks/proof/search.py --quick         # two small trials on the built-in model, to see that it works

Reads search.yaml. A trial trains a model as run.py does, and is measured on the prompts to choose by. The study is a
SQLite file in runs/search. The figures of all trials go to benchmarks/results/proof/search.json.
"""

import argparse
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import optuna
import run as proof
import yaml

BATCH = 128  # The batch size of `run.train_quark`.
QUICK_TASK = {"model": "src/quarkrl/builtin/model", "train_prompts": ["src/quarkrl/builtin/prompts.train.jsonl"]}
QUICK_TASK |= {"test_prompts": ["src/quarkrl/builtin/prompts.eval.jsonl"], "judge": "vader", "length": 12}
QUICK_TASK |= {"scored": 640, "select_limit": 10, "test_limit": 10, "samples": 3}


def suggest(trial: optuna.Trial, space: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Return a value for each option of the space; those of pairs are left out where a prompt has one sample."""
    chosen: dict[str, Any] = {}
    for name, values in space.items():
        if name.startswith("dpo_") and chosen["samples_per_prompt"] == 1:
            continue
        if "log" in values:
            chosen[name] = trial.suggest_float(name, *values["log"], log=True)
        else:
            chosen[name] = trial.suggest_categorical(name, values["choices"])
    return chosen


def options_of(chosen: dict[str, Any], scored: int) -> dict[str, Any]:
    """Return the options of a run that scores so many completions: `draws` of each become a number of steps."""
    options = {"dpo_coef": 0, **chosen}
    draws, explored = options.pop("draws"), scored // options["num_iterations"]
    options["prompts_per_iteration"] = explored // options["samples_per_prompt"]
    options["steps_per_iteration"] = max(1, round(draws * explored / BATCH))
    return options


def measure(task: dict[str, Any], model: Path | str, directory: Path) -> dict[str, Any]:
    """Return the figures of a model, by the name of the held-out prompts."""
    decoding = {} if model == task["model"] else {"quantiles": "best", "guidance_scales": [1]}
    rows = proof.measure(task, model, decoding, directory)["rows"]
    return {row["prompts"]: {"figures": row["figures"], "intervals": row["intervals"]} for row in rows}


def perform(search: dict[str, Any], chosen: dict[str, Any], seed: int, directory: Path) -> dict[str, Any]:
    """Train with chosen options, and measure; return figures and cost."""
    shutil.rmtree(directory, ignore_errors=True)  # What a trial that was stopped has left.
    directory.mkdir(parents=True)
    task, options = search["task"], options_of(chosen, search["task"]["scored"])
    run = proof.Run("search", "quark", seed, {**search["options"], **options})
    cost = proof.train_quark(run, task, {"options": {}}, directory)
    return {"options": options, "cost": cost, "measured": measure(task, directory / "final", directory)}


def base_figures(task: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return the figures of the base, which are measured once."""
    file = directory / "base.json"
    if not file.is_file():
        (directory / "base").mkdir(parents=True, exist_ok=True)
        proof.write_prompts(task, directory)
        file.write_text(json.dumps(measure(task, task["model"], directory / "base")), encoding="utf-8")
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def objectives(measured: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """Return the average maximum toxicity by the reward, and the rise of perplexity as a ratio."""
    after, before = measured["select"]["figures"], base["select"]["figures"]
    return after["average maximum toxicity"], after["perplexity"] / before["perplexity"] - 1


def best_trials(study: optuna.Study, count: int, rise: float = 0.05) -> list[optuna.trial.FrozenTrial]:
    """Return the trials with the least toxicity among those whose perplexity rises by at most `rise`."""
    finished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    close = [trial for trial in finished if trial.values[1] <= rise]
    return sorted(close, key=lambda trial: trial.values[0])[:count]


def write(study: optuna.Study, base: dict[str, Any], confirmed: list[dict[str, Any]], file: Path) -> None:
    """Write every finished trial, and how much each option matters for each objective."""
    finished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    trials = [
        {"number": trial.number, "toxicity": trial.values[0], "perplexity rise": trial.values[1], **trial.user_attrs}
        for trial in finished
    ]
    importance = {}
    if len(finished) >= 10:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        for number, name in enumerate(("toxicity", "perplexity rise")):
            importance[name] = optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=lambda trial, number=number: trial.values[number]
            )
    content = {"base": base, "importance": importance, "confirmed": confirmed, "trials": trials}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(proof.rounded(content), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Do trials, or confirm the best."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=0, help="further trials")
    parser.add_argument("--confirm", type=int, default=0, metavar="N", help="train and measure the N best again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds to confirm with; trials have seed 0")
    parser.add_argument("--quick", action="store_true", help="two small trials on the built-in model, from nothing")
    arguments = parser.parse_args()
    os.chdir(proof.ROOT)
    search = yaml.safe_load((proof.HERE / "search.yaml").read_text(encoding="utf-8"))
    directory, file = Path("runs/search"), Path("benchmarks/results/proof/search.json")
    if arguments.quick:
        search["task"] |= QUICK_TASK
        arguments.trials, arguments.confirm = 2, 1
        directory, file = Path("runs/search-quick"), Path("runs/search-quick/search.json")
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    searched = {**search, "task": {**search["task"], "test_limit": 0}}  # Trials do not see the other prompts.
    base = base_figures(searched["task"], directory)
    study = optuna.create_study(
        study_name="quark",
        storage=f"sqlite:///{directory / 'study.db'}",
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    # Options of pairs depend on another option, which TPE reads only by `group`; it warns that this is experimental.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), multivariate=True, group=True)
    confirmed = json.loads(file.read_text(encoding="utf-8"))["confirmed"] if file.is_file() else []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        chosen, place = suggest(trial, search["space"]), directory / f"trial-{trial.number}"
        trial.set_user_attr("chosen", chosen)
        found = perform(searched, chosen, 0, place)
        trial.set_user_attr("figures", found["measured"]["select"]["figures"])
        trial.set_user_attr("cost", found["cost"])
        shutil.rmtree(place)
        return objectives(found["measured"], base)

    def keep(*_: Any) -> None:
        write(study, base, confirmed, file)

    study.optimize(objective, arguments.trials, catch=(proof.Failure,), callbacks=[keep])
    whole = {**search, "task": {**search["task"], "samples": 25}}
    for trial in best_trials(study, arguments.confirm):
        unseen_base = base_figures(whole["task"], directory / "confirm")
        for seed in arguments.seeds:
            name = f"trial-{trial.number}-seed-{seed}"
            found = perform(whole, trial.user_attrs["chosen"], seed, directory / "confirm" / name)
            confirmed.append({"trial": trial.number, "seed": seed, **found, "base": unseen_base})
            keep()
    print(f"{len(study.trials)} trials; figures: {file}")


if __name__ == "__main__":
    main()
