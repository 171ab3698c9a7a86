"""The page: its components, and what they do. Gradio is imported here only."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from quarkrl.data.chats import reads_chats
from quarkrl.errors import UserError
from quarkrl.playground.answers import answer
from quarkrl.playground.cards import columns_html, error_html
from quarkrl.playground.form import QUANTILE, default_settings, fill_form, quantile_choices, read_form
from quarkrl.playground.settings import MAX_SAMPLES, Settings
from quarkrl.playground.subject import Subject

STYLE = Path(__file__).with_name("page.css")
# Fonts of the system: the page asks no other host for anything.
THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
    font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
)
_UNCHANGED: Any = (gr.skip(), gr.skip())
# Gradio's own parameters of a URL, such as __theme, stay as they are.
_SHARE = """() => {
  const columns = document.querySelector('.q-columns');
  if (!columns) return;
  const query = new URLSearchParams(columns.dataset.query);
  for (const [name, value] of new URLSearchParams(location.search)) if (name.startsWith('__')) query.set(name, value);
  history.replaceState(null, '', query.size ? '?' + query : location.pathname);
}"""
_COPY = """async () => {
  const button = document.querySelector('#q-copy');
  try { await navigator.clipboard.writeText(location.href); button.textContent = 'Link copied'; }
  catch { button.textContent = 'Copy the address above'; }
  setTimeout(() => { button.textContent = 'Copy link'; }, 2000);
}"""


def build_page(subject: Subject) -> gr.Blocks:
    """Return the page of a subject, to be launched."""
    defaults = default_settings(subject.generator.conditioning, **subject.defaults)
    with gr.Blocks(title=f"{subject.name} · quarkrl play", analytics_enabled=False) as page:
        gr.HTML(_head_html(subject), elem_classes="q-flush")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                inputs = _prompt_inputs(subject, defaults)
                with gr.Row(elem_classes="q-actions"):
                    run = gr.Button("Generate", variant="primary", scale=0, min_width=160)
                    copy = gr.Button("Copy link", scale=0, min_width=120, elem_id="q-copy")
                error = gr.HTML("", elem_classes="q-flush")
                results = gr.HTML("", elem_classes="q-flush")
            with gr.Column(scale=1, min_width=260):
                inputs |= _number_inputs(defaults)
        session = Session(subject, defaults, tuple(inputs))
        # One queue for the model: a second tab waits.
        options: dict[str, Any] = {"inputs": [*inputs.values()], "outputs": [error, results], "concurrency_id": "model"}
        options |= {"show_progress_on": error, "trigger_mode": "always_last"}
        gr.on([run.click, inputs["prompt"].submit], session.answer, **options).then(fn=None, js=_SHARE)
        radios = [component for name, component in inputs.items() if name.startswith(QUANTILE)]
        if radios:
            gr.on([radio.input for radio in radios], session.answer_if_prompt, **options).then(fn=None, js=_SHARE)
        copy.click(fn=None, js=_COPY)
        # Outside the queue: it must not overwrite what the user has begun to type.
        restored = page.load(session.restore, None, [*inputs.values(), error], queue=False)
        restored.then(session.answer_shared, **options)
    return page


@dataclass(frozen=True)
class Session:
    """What the page's events call: values of components in, values of components out.

    Attributes:
        subject: the model, its reward and its prompts.
        defaults: the settings of a page without a query.
        names: of the components, in the order of their values.
    """

    subject: Subject
    defaults: Settings
    names: tuple[str, ...]

    def answer(self, *values: Any) -> Iterator[tuple[str, str]]:
        """Yield the error line and the columns, again with each finished column."""
        try:
            settings = read_form(dict(zip(self.names, values, strict=True)), self.defaults)
            prompt = "" if settings.chat else settings.prompt
            for columns in answer(self.subject, settings):
                yield "", columns_html(columns, prompt, settings.to_query(self.defaults))
        except UserError as error:
            yield error_html(str(error)), ""

    def answer_if_prompt(self, *values: Any) -> Iterator[tuple[str, str]]:
        """Answer unless there is no prompt yet, which only `answer` reports."""
        if dict(zip(self.names, values, strict=True))["prompt"].strip():
            yield from self.answer(*values)
        else:
            yield _UNCHANGED

    def answer_shared(self, request: gr.Request, *values: Any) -> Iterator[tuple[str, str]]:
        """Answer the prompt in the address of the page, if it has one."""
        if request.query_params.get("prompt", "").strip():
            yield from self.answer(*values)
        else:
            yield _UNCHANGED

    def restore(self, request: gr.Request) -> list[Any]:
        """Return the values that the URL's query sets, and the error line."""
        query = {name: text for name, text in request.query_params.items() if not name.startswith("__")}
        if not query:
            return [gr.skip()] * (len(self.names) + 1)
        conditioning, message = self.subject.generator.conditioning, ""
        form = fill_form(self.defaults, conditioning)
        try:
            form = fill_form(Settings.from_query(query, self.defaults), conditioning)
        except UserError as error:
            message = f"address of the page: {error}"
        return [*(form[name] for name in self.names), error_html(message)]


def _head_html(subject: Subject) -> str:
    levels = f"quantiles 0 (worst) to {subject.num_quantiles - 1} (best)" if subject.num_quantiles else "no quantiles"
    reward = "scored by " + " and ".join(subject.scorer.names) if subject.scorer else "without scores"
    return f'<header class="q-head"><h1>{escape(subject.name)}</h1><p>{escape(levels)} · {escape(reward)}</p></header>'


def _prompt_inputs(subject: Subject, defaults: Settings) -> dict[str, Any]:
    """The inputs above the columns, by the name of their setting; `quantile:NAME` for each attribute."""
    inputs: dict[str, Any] = {}
    can_chat = reads_chats(subject.generator.tokenizer)
    inputs["prompt"] = gr.Textbox(
        defaults.prompt, label="Prompt", lines=1, max_lines=10, autofocus=True, placeholder="Type some text, then Enter"
    )
    if subject.examples:
        gr.Examples([[text] for text in subject.examples], [inputs["prompt"]], label="Prompts to try")
    if can_chat:
        with gr.Row():
            inputs["chat"] = gr.Checkbox(defaults.chat, label="Chat: the prompt is a message of the user")
            inputs["system_prompt"] = gr.Textbox(defaults.system_prompt, label="System message", lines=1)
    for name in subject.attributes:
        label = "Quantile" if len(subject.attributes) == 1 else f"Quantile of {name}"
        inputs[f"{QUANTILE}{name}"] = gr.Radio(
            quantile_choices(subject.num_quantiles),
            value=str(subject.num_quantiles - 1),
            label=label,
            info="Best and worst are always shown; one between them gets a column of its own.",
        )
    return inputs


def _number_inputs(defaults: Settings) -> dict[str, Any]:
    """The inputs beside the columns, by the name of their setting."""
    return {
        "guidance_scale": gr.Slider(
            0, 5, defaults.guidance_scale, step=0.1, label="Guidance", info="1 is off; more steers further from worst"
        ),
        "guidance_rule": gr.Radio(["both", "lower"], value=defaults.guidance_rule, label="Guidance rule"),
        "temperature": gr.Slider(0.1, 2, defaults.temperature, step=0.05, label="Temperature"),
        "top_p": gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="Top-p"),
        "max_new_tokens": gr.Number(defaults.max_new_tokens, precision=0, minimum=1, label="Length in tokens"),
        "num_return_sequences": gr.Slider(1, MAX_SAMPLES, defaults.num_return_sequences, step=1, label="Samples"),
        "seed": gr.Number(defaults.seed, precision=0, minimum=0, label="Seed"),
    }
