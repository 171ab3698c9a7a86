"""The page: its components, and what they do. Gradio is imported here only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from quarkrl.data.chats import reads_chats
from quarkrl.errors import UserError
from quarkrl.playground.answers import Column, answer
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
_SAME: Any = gr.skip()
_UNCHANGED: Any = (_SAME,) * 5
# Gradio's own parameters of a URL, such as __theme, stay as they are.
_SHARE = """() => {
  const columns = document.querySelector('.q-columns');
  const query = new URLSearchParams(columns ? columns.dataset.query : '');
  for (const [name, value] of new URLSearchParams(location.search)) if (name.startsWith('__')) query.set(name, value);
  history.replaceState(null, '', query.size ? '?' + query : location.pathname);
}"""
# The columns above the box grow, so that it leaves the window.
_SHOW_REPLY = "() => document.querySelector('#q-reply')?.scrollIntoView({block: 'nearest'})"
_FOCUS_PROMPT = "() => document.querySelector('#q-prompt textarea').focus()"
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
                outputs, send, again = _outputs()
            with gr.Column(scale=1, min_width=260):
                inputs |= _number_inputs(defaults)
        session = Session(subject, defaults, tuple(inputs))
        values = [outputs["shown"], *inputs.values()]
        # One queue for the model: a second tab waits.
        options: dict[str, Any] = {"outputs": [*outputs.values()], "concurrency_id": "model"}
        options |= {"show_progress_on": outputs["error"], "trigger_mode": "always_last"}
        gr.on([run.click, inputs["prompt"].submit], session.answer, values, **options).then(fn=None, js=_SHARE)
        radios = [component for name, component in inputs.items() if name.startswith(QUANTILE)]
        if radios:
            changed = gr.on([radio.input for radio in radios], session.answer_if_prompt, values, **options)
            changed.then(fn=None, js=_SHARE)
        said = gr.on([send.click, outputs["reply"].submit], session.reply, [outputs["reply"], *values], **options)
        said.then(fn=None, js=_SHARE).then(fn=None, js=_SHOW_REPLY)
        started = again.click(session.start_again, None, [inputs["prompt"], *outputs.values()], queue=False)
        started.then(fn=None, js=_SHARE).then(fn=None, js=_FOCUS_PROMPT)
        copy.click(fn=None, js=_COPY)
        # Outside the queue: it must not overwrite what the user has begun to type.
        restored = page.load(session.restore, None, [*inputs.values(), outputs["error"], outputs["shown"]], queue=False)
        restored.then(session.answer_shared, values, **options)
    return page


class Shown(NamedTuple):
    """What the page shows.

    Attributes:
        settings: of the columns, with all messages of a conversation.
        columns: finished; none for the address of a page that is to be answered.
    """

    settings: Settings
    columns: Sequence[Column] = ()


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

    def answer(self, shown: Shown | None, *values: Any) -> Iterator[tuple]:
        """Yield the outputs, again with each finished turn. The same first message keeps its conversation."""
        try:
            settings = self._read(values)
            if shown and settings.messages[0] == shown.settings.messages[0] and settings.chat:
                settings = replace(settings, replies=shown.settings.replies)
            yield from self._answer(settings)
        except UserError as error:
            yield _show(error=str(error))

    def answer_if_prompt(self, shown: Shown | None, *values: Any) -> Iterator[tuple]:
        """Answer unless there is no prompt yet, which only `answer` reports."""
        if dict(zip(self.names, values, strict=True))["prompt"].strip():
            yield from self.answer(shown, *values)
        else:
            yield _UNCHANGED

    def answer_shared(self, request: gr.Request, shown: Shown | None, *values: Any) -> Iterator[tuple]:
        """Answer the prompt in the address of the page, if it has one."""
        if request.query_params.get("prompt", "").strip():
            yield from self.answer(shown, *values)
        else:
            yield _UNCHANGED

    def reply(self, text: str, shown: Shown | None, *values: Any) -> Iterator[tuple]:
        """Answer one more message. If a setting has changed, answer the whole conversation again."""
        if shown is None or not text.strip():
            yield _UNCHANGED
            return
        before = shown.settings
        try:
            now = replace(self._read(values), prompt=before.prompt, chat=True, replies=before.replies)
            settings = replace(now, replies=(*now.replies, text))
            for n, outputs in enumerate(self._answer(settings, shown.columns if now == before else ())):
                yield outputs if n else (*outputs[:-2], "", outputs[-1])
        except UserError as error:
            yield _show(columns_html(shown.columns, before, before.to_query(self.defaults)), shown, str(error), text)

    def start_again(self) -> tuple:
        """Forget the conversation: return an empty prompt, and empty outputs."""
        return "", *_show(reply="")

    def _read(self, values: Sequence[Any]) -> Settings:
        return read_form(dict(zip(self.names, values, strict=True)), self.defaults)

    def _answer(self, settings: Settings, earlier: Sequence[Column] = ()) -> Iterator[tuple]:
        query = settings.to_query(self.defaults)
        for columns in answer(self.subject, settings, earlier):
            yield _show(columns_html(columns, settings, query), Shown(settings, columns))

    def restore(self, request: gr.Request) -> list[Any]:
        """Return the values that the URL's query sets, the error line, and the conversation to answer."""
        query = {name: text for name, text in request.query_params.items() if not name.startswith("__")}
        if not query:
            return [gr.skip()] * (len(self.names) + 2)
        conditioning, message, settings = self.subject.generator.conditioning, "", self.defaults
        try:
            settings = Settings.from_query(query, self.defaults)
            form = fill_form(settings, conditioning)
        except UserError as error:
            form, settings = fill_form(self.defaults, conditioning), self.defaults
            message = f"address of the page: {error}"
        return [*(form[name] for name in self.names), error_html(message), Shown(settings)]


def _head_html(subject: Subject) -> str:
    levels = f"quantiles 0 (worst) to {subject.num_quantiles - 1} (best)" if subject.num_quantiles else "no quantiles"
    reward = "scored by " + " and ".join(subject.scorer.names) if subject.scorer else "without scores"
    return f'<header class="q-head"><h1>{escape(subject.name)}</h1><p>{escape(levels)} · {escape(reward)}</p></header>'


def _outputs() -> tuple[dict[str, Any], gr.Button, gr.Button]:
    """What answers change, by name, and the buttons that reply and start again."""
    outputs: dict[str, Any] = {"results": gr.HTML("", elem_classes="q-flush")}
    outputs["error"] = gr.HTML("", elem_classes="q-flush")
    outputs["shown"] = gr.State()
    with gr.Column(visible=False, elem_id="q-reply") as box:
        outputs["reply"] = gr.Textbox(
            label="Next message",
            info="Each column continues with its own first answer.",
            lines=1,
            max_lines=10,
            placeholder="Type a message, then Enter",
        )
        with gr.Row(elem_classes="q-actions"):
            send = gr.Button("Reply", variant="primary", scale=0, min_width=160)
            again = gr.Button("Start again", scale=0, min_width=160)
    outputs["box"] = box
    return outputs, send, again


def _show(html: str = "", shown: Shown | None = None, error: str = "", reply: Any = _SAME) -> tuple:
    """Values of `_outputs`. The box for a reply is there if a chat is shown."""
    return html, error_html(error), shown, reply, gr.update(visible=bool(shown and shown.settings.chat))


def _prompt_inputs(subject: Subject, defaults: Settings) -> dict[str, Any]:
    """The inputs above the columns, by the name of their setting; `quantile:NAME` for each attribute."""
    inputs: dict[str, Any] = {}
    can_chat = reads_chats(subject.generator.tokenizer)
    inputs["prompt"] = gr.Textbox(
        defaults.prompt,
        label="Prompt",
        lines=1,
        max_lines=10,
        autofocus=True,
        placeholder="Type some text, then Enter",
        elem_id="q-prompt",
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
