"""Compare vLLM with the built-in sampler, side by side in one process, at several completion lengths.

    make test-vllm    # makes .venv-vllm
    .venv-vllm/bin/python benchmarks/engines.py --model models/smollm2-135m-instruct --output benchmarks/results

Both complete the same prompts with the same policy on its best reward token, in turns, without EOS. So both sample the
same number of tokens. `synchronize` is the time to replace and check vLLM's weights, once per rollout.
Fails if vLLM's log-probabilities are not the policy's.
"""

import statistics
import tempfile
import time
from typing import Any

import measure

from quarkrl import QuarkConfig, QuarkTrainer
from quarkrl.builtin import model_path, prompts_path
from quarkrl.sampling.strategy import Sampling


def seconds_of(call: Any, *arguments: Any) -> float:
    """Return the time that a call takes."""
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def main() -> None:
    """Measure each length in turn; both engines sample in every repeat."""
    parser = measure.parser(__doc__)
    parser.add_argument("--model", default="builtin", help="a directory, a name, or builtin (default)")
    parser.add_argument("--lengths", type=int, nargs="+", help="default 20 128 512, or 20 with --quick")
    parser.add_argument("--completions", type=int, help="per measurement; default 64, or 8 with --quick")
    parser.add_argument("--batch_size", type=int, default=64, help="of the built-in sampler, and vLLM's largest batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="γ; default 1, without guidance")
    options = parser.parse_args()
    lengths = options.lengths or ([20] if options.quick else [20, 128, 512])
    count = options.completions or (8 if options.quick else 64)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        config = QuarkConfig(
            output_dir=work,
            engine="vllm",
            max_completion_length=max(lengths),
            generation_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            eval_guidance_scale=options.guidance_scale,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        model = str(model_path()) if options.model == "builtin" else options.model
        prompts = str(prompts_path("train"))
        trainer = QuarkTrainer(model, measure.reward, config, prompts)
        engine, ids = trainer.engine, trainer.prompts.ids[:count]
        engine.synchronize()
        synchronize = statistics.median(seconds_of(engine.synchronize) for _ in range(options.repeats))
        for length in lengths:
            sampling = Sampling(length, length, top_p=1.0)
            uniforms = sampling.uniforms(count, length)
            times: dict[str, list[float]] = {"builtin": [], "vllm": []}
            for _ in range(options.repeats + 1):  # The first warms up.
                for name, side in {"builtin": engine.builtin, "vllm": engine}.items():
                    with side.policy(options.guidance_scale) as complete:
                        times[name].append(seconds_of(sample, complete, ids, sampling, uniforms, options.batch_size))
            rates = {name: count * length / statistics.median(values[1:]) for name, values in times.items()}
            rows.append(
                {
                    "completion length": length,
                    "built-in, tokens/s": rates["builtin"],
                    "vLLM, tokens/s": rates["vllm"],
                    "vLLM / built-in": rates["vllm"] / rates["builtin"],
                    "synchronize, s": synchronize,
                    "log-probability difference": max(engine.differences),
                }
            )
    measure.report("engines", "cpu", {"engines": rows}, options.output)


def sample(complete: Any, ids: list[list[int]], sampling: Sampling, uniforms: Any, size: int) -> None:
    """Complete prompts in batches."""
    for start in range(0, len(ids), size):
        rows = slice(start, start + size)
        completions = complete(ids[rows], sampling, uniforms[rows])
        assert all(len(completion) == sampling.max_new_tokens for completion in completions)


if __name__ == "__main__":
    main()
