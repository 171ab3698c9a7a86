"""Chat templates with the structure of those that popular models have, and chats to try them on.

The texts and tags are shortened. What the originals do is kept: the order of the parts, what is trimmed, defaults,
refusals, tool calls, dates, and whether BOS is written.
"""

from __future__ import annotations

from helpers.tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

# A system message with the date; tools; each text trimmed; a header of two tags and an empty line.
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{{- "Known until: December 2023\\n" }}
{{- "Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message and message.tool_calls %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("one tool call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|end|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}' }}
        {{- "<|eot|>" }}
    {%- elif message.role == 'tool' %}
        {{- "<|start|>ipython<|end|>\\n\\n" + message.content | tojson + "<|eot|>" }}
    {%- else %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
LLAMA_3_DATED = LLAMA_3.replace(
    '    {%- set date_string = "26 Jul 2024" %}\n',
    """    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
""",
)

# A system message by default; tool results of one turn share a message of the user.
QWEN_2_5 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The last question of the user is searched from the end; thoughts before it are dropped.
QWEN_3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (tool_call.function or tool_call) | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Roles must alternate; the system message goes into the last question; an answer ends with EOS.
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {{- (tool_call.function | tojson)[:-1] + ', "id": "' + tool_call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("unknown role") }}
    {%- endif %}
{%- endfor %}
"""

# On one line; no system message; the assistant is called model.
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

# The system message goes into the first question; content is a text or parts.
GEMMA_3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""

# On one line; a separator token in place of the newline; other roles are left out.
PHI_4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + (message['content'] or '') + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

# A system message by default, written in the loop.
SMOLLM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# ChatML as training libraries write it, to learn from the answers only.
CHATML_WITH_GENERATION = """{%- for message in messages -%}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' -}}
        {%- generation -%}
        {{ message.content + '<|im_end|>' }}
        {%- endgeneration -%}
        {{ '\\n' }}
    {%- else %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# Macros that call themselves and each other, as templates that describe tools do.
MACROS = """{%- macro describe(value) -%}
    {%- if value is mapping -%}
        {%- for key in value if value[key] is not none %}{{ key }}:{{ describe(value[key]) }};{% endfor -%}
    {%- else -%}{{ leaf(value) }}{%- endif -%}
{%- endmacro -%}
{%- macro leaf(value) -%}<{{ value }}>{%- endmacro -%}
{{- bos_token or '' }}
{%- for message in messages %}{{ describe(message) }}
{% endfor %}
"""

_IM = ["<|im_start|>", "<|im_end|>", "<|im_sep|>"]
_TURN = ["<start_of_turn>", "<end_of_turn>"]
# The template, the special tokens in it, and whether its tokenizer has a BOS.
CHAT_TEMPLATES: dict[str, tuple[str, list[str], bool]] = {
    "Llama 3": (LLAMA_3, ["<|start|>", "<|end|>", "<|eot|>"], True),
    "Llama 3, dated": (LLAMA_3_DATED, ["<|start|>", "<|end|>", "<|eot|>"], True),
    "Qwen 2.5": (QWEN_2_5, _IM, False),
    "Qwen 3": (QWEN_3, _IM, False),
    "Mistral": (MISTRAL, ["[INST]", "[/INST]", "[TOOL_CALLS]"], True),
    "Gemma 2": (GEMMA_2, _TURN, True),
    "Gemma 3": (GEMMA_3, _TURN, True),
    "Phi 4": (PHI_4, _IM, True),
    "SmolLM 2": (SMOLLM_2, _IM, True),
    "ChatML": (CHATML, _IM, False),
    "generation blocks": (CHATML_WITH_GENERATION, _IM, False),
    "macros": (MACROS, [], True),
}

_QUESTION = {"role": "user", "content": "What is 2 + 2?"}
_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [2, "ü"]}}}
    ],
}
_RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "add", "content": "4"}
CHATS: dict[str, list[dict]] = {
    "one question": [_QUESTION],
    "a system message": [{"role": "system", "content": "Be brief.\n"}, _QUESTION],
    "several turns": [_QUESTION, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}],
    "a tool call": [_QUESTION, _CALL, _RESULT],
    "tool calls and a question": [_QUESTION, _CALL, _RESULT, {"role": "assistant", "content": "4."}, _QUESTION],
    "special tokens in text": [{"role": "user", "content": "<bos> <eos><|im_end|> [INST]<|reward|></s>"}],
    "BOS first": [{"role": "user", "content": "<bos>hello"}],
    "unicode": [{"role": "user", "content": "naïve ☃ 你好 🇺🇳 e\u0301\u00a0\u200bא"}],
    "blanks around": [{"role": "user", "content": "  \n two blanks \t\n "}],
    "one letter": [{"role": "user", "content": "a"}],
    "an unfinished answer": [_QUESTION, {"role": "assistant", "content": "It is"}],
    "an unfinished answer, blank behind": [_QUESTION, {"role": "assistant", "content": " It is "}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "2 + 2?"}]}],
}


def chat_tokenizer(name: str, **options) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with one of `CHAT_TEMPLATES` and the special tokens in it."""
    template, tokens, bos = CHAT_TEMPLATES[name]
    tokenizer = tiny_tokenizer(bos=bos, chat_template=template, **options)
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def flatten(chat: list[dict]) -> list[dict]:
    """The chat with the parts of a message joined to one text."""
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message["content"], list)
        else message
        for message in chat
    ]
