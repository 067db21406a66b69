"""Renders each template beside this file with transformers' own code, and writes golden.json.

    pip install transformers==5.24.0 jinja2==3.1.6 && python golden.py
"""
import json
import pathlib

from transformers.utils.chat_template_utils import render_jinja_template

here = pathlib.Path(__file__).parent
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
weather = {"type": "function", "function": {"name": "weather", "description": "Says <it> & \"more\"",
           "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
                          "required": [], "additionalProperties": {}}}}
user = {"role": "user", "content": "Hello, who are you?"}
long = {"role": "user", "content": "  spaces around\nand a line; ünïcödé 日本 🙂 <b>&amp;</b> \\ \"q\" 'a'  "}
answer = {"role": "assistant", "content": "I am a model. "}
system = {"role": "system", "content": "Be brief.\nAnd kind."}
thinks = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
named = {"role": "user", "content": "Hi", "name": "bob"}
call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {
    "name": "weather", "arguments": {"place": "Bern é", "days": 2, "deep": {"a": [1, 2.5, None, True]}}}}]}
result = {"role": "tool", "content": "sunny"}
CHATS = {
    "one": [user], "system": [system, user], "turns": [system, user, answer, long],
    "ends": [user, answer], "thinks": [user, thinks, user, thinks], "named": [named, answer, named],
    "wrong": [user, user], "tools": [user, call, result], "role": [{"role": "critic", "content": "Hm"}],
}
cases = []
for path in sorted(here.glob("*.jinja")):
    for chat, messages in CHATS.items():
        for settings in (
            {}, {"add_generation_prompt": True}, {"continue_final_message": True},
            {"add_generation_prompt": True, "tools": [weather]},
            {"add_generation_prompt": True, "arguments": {"enable_thinking": False, "date_string": "26 Jul 2024"}},
        ):
            options = dict(settings)
            arguments = options.pop("arguments", {})
            case = {"template": path.name, "chat": chat, **settings}
            try:
                text, _ = render_jinja_template(
                    [json.loads(json.dumps(messages))], chat_template=path.read_text(), **options, **SPECIAL, **arguments)
                case["text"] = text[0]
            except Exception as error:
                case["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            cases.append(case)
(here / "golden.json").write_text(json.dumps({"special": SPECIAL, "chats": CHATS, "cases": cases},
                                             ensure_ascii=False, indent=0) + "\n")
print(len(cases), sum("error" in case for case in cases))
