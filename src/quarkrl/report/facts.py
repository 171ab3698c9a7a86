"""What a report says about a run beside its results: options, provenance, time and memory."""

from typing import Any

from quarkrl.report.run_files import RunFiles

Facts = list[tuple[str, str]]


def model_name(run: RunFiles) -> str:
    """The model that the run started from."""
    start = run.facts.get("start")
    name = run.options.get("model") or (start.get("name") if isinstance(start, dict) else None)
    return str(name or "model")


def facts_of_run(run: RunFiles) -> dict[str, Facts]:
    """Return lines of name and value by heading: the options set, all options, provenance, time and memory."""
    sections = {
        "Options of this run": [(name, in_words(value)) for name, value in run.options.items() if name != "output_dir"],
        "Provenance": _provenance(run),
        "Time and memory": _time_and_memory(run),
    }
    return {heading: lines for heading, lines in sections.items() if lines}


def in_words(value: Any) -> str:
    """Return an option's value as text."""
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else str(value)


def _provenance(run: RunFiles) -> Facts:
    lines: Facts = []
    for key, label in (("start", "model before training"), ("reference", "reference")):
        if isinstance(identity := run.facts.get(key), dict):
            lines.append((label, str(identity.get("name"))))
            lines += [
                (f"{label}, {name}", str(identity[name]))
                for name in ("revision", "parameters", "sha256")
                if identity.get(name)
            ]
    for name in ("prompts", "eval_prompts"):
        if digest := run.identity.get(name):
            lines.append((f"{name.replace('_', ' ')}, sha256", str(digest)))
    for reward in run.identity.get("rewards") or []:
        if isinstance(reward, dict):
            parts = ", ".join(f"{name} {in_words(value)}" for name, value in reward.items() if name != "name")
            lines.append((f"reward {reward.get('name')}", parts))
    lines += [(str(name), str(version)) for name, version in (run.identity.get("versions") or {}).items()]
    if run.results:
        protocol = run.results.protocol
        lines += [
            (f"evaluation, {name.replace('_', ' ')}", in_words(protocol[name]))
            for name in ("date", "device", "threads", "samples_per_prompt", "seed", "perplexity_model")
            if protocol.get(name) is not None
        ]
    return lines


def _time_and_memory(run: RunFiles) -> Facts:
    lines: Facts = []
    for name, label in (("seconds_sample", "sampling"), ("seconds_score", "scoring")):
        if seconds := [value for _, value in run.logged(name)]:
            lines.append((f"{label}, all iterations", duration(sum(seconds))))
    if runtime := run.logged("train_runtime"):
        lines.append(("training in all", duration(runtime[-1][1])))
    if run.history:
        lines.append(("samples in the pool", f"{len(run.history):,}"))
    if peaks := [max(value for _, value in run.logged(name)) for name in ("peak_memory_gb",) if run.logged(name)]:
        lines.append(("peak memory", f"{peaks[0]:.2f} GB"))
    return lines


def duration(seconds: float) -> str:
    """Return a time in the units that people use."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
