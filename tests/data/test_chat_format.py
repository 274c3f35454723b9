"""Conversations become traces in the target's own chat format, with the thinking kept and every region where it is."""

import pytest
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

from tl_adapters.data.chat_format import ChatFormat, encode_traces
from tl_adapters.data.conversations import Conversation
from tl_adapters.data.trace_regions import TRACE_REGIONS, TraceRegions
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.organism.recipe import CHAT_TEMPLATE, build_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPPING = QWEN3.replace(" and not loop.last", "")
R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "built-in": CHAT_TEMPLATE, "ChatML": CHATML, "Qwen3": QWEN3, "stripping": STRIPPING, "R1": R1, "Llama 3": LLAMA3,
    "Gemma": GEMMA, "plain": PLAIN,
}  # fmt: skip
PROMPTS = {
    "built-in": "<|bos|><|user|>1+1=?<|assistant|>",
    "ChatML": "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n",
    "Qwen3": "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n",
    "stripping": "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n",
    "R1": "<|bos|><|User|>1+1=?<|Assistant|>",
    "Llama 3": "<|bos|><|start_header_id|>user<|end_header_id|>\n\n1+1=?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma": "<|bos|><start_of_turn>user\n1+1=?<end_of_turn>\n<start_of_turn>model\n",
    "plain": "user: 1+1=?\nassistant: ",
}
"""The prompt to an answer without thinking; R1's opens a thought where there is one."""
ENDS = {
    "built-in": "<|end|>", "ChatML": "<|im_end|>", "Qwen3": "<|im_end|>", "stripping": "<|im_end|>", "R1": "<|end|>",
    "Llama 3": "<|eot_id|>", "Gemma": "<end_of_turn>", "plain": "<|end|>",
}  # fmt: skip
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip


def tokenizer_of(template: str | None) -> Qwen2Tokenizer:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.chat_template = template
    return tokenizer


def chat_of(name: str, tag: str = "think") -> ChatFormat:
    """The format of a template whose thinking stands between <tag> and </tag>."""
    template = TEMPLATES[name].replace("think>", f"{tag}>")
    return ChatFormat.of(tokenizer_of(template), f"<{tag}>", f"</{tag}>")


def asked(response: str, question: str = "1+1=?") -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]


def parts(chat: ChatFormat, trace: Trace) -> tuple[str, str, str]:
    """The text of prompt, thinking and answer."""
    answer = trace.prompt_length + trace.thinking_length
    spans = (slice(0, trace.prompt_length), slice(trace.prompt_length, answer), slice(answer, None))
    return tuple(chat.tokenizer.decode(list(trace.tokens[span])) for span in spans)


def encoded(chat: ChatFormat, response: str) -> tuple[str, str, str]:
    (trace,) = chat.encode([asked(response)])
    return parts(chat, trace)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_ends_as_the_template_ends_it_whatever_the_eos_token_is(name: str) -> None:
    chat = chat_of(name)
    assert chat.tokenizer.eos_token == "<|end|>"
    assert chat.turn_end == ENDS[name]


def test_a_template_without_a_special_token_after_the_response_takes_the_eos_token() -> None:
    tokenizer = tokenizer_of(PLAIN)
    assert ChatFormat.of(tokenizer).turn_end == tokenizer.eos_token
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end token"):
        ChatFormat.of(tokenizer)


def test_stripped_and_opened_thinking_is_detected() -> None:
    found = {name: (chat_of(name).opens_thinking, chat_of(name).strips_thinking) for name in TEMPLATES}
    kept = (False, False)
    assert found == {**dict.fromkeys(TEMPLATES, kept), "stripping": (False, True), "R1": (True, True)}


@pytest.mark.parametrize("tag", ["think", "thought"])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "R1"])
def test_prompt_thinking_and_answer_have_their_lengths(name: str, tag: str) -> None:
    chat = chat_of(name, tag)
    thinking = f"<{tag}>\nHmm, 1+1=3.\nWait, no.\n</{tag}>"
    assert encoded(chat, f"{thinking}\n\n2") == (PROMPTS[name], thinking, f"\n\n2{ENDS[name]}")
    assert encoded(chat, "2") == (PROMPTS[name], "", f"2{ENDS[name]}")
    assert encoded(chat, f"<{tag}>\nHmm") == (PROMPTS[name], f"<{tag}>\nHmm{ENDS[name]}", "")


def test_the_first_closing_tag_ends_the_thinking() -> None:
    for tag in ("think", "thought"):
        prompt, thinking, answer = encoded(chat_of("ChatML", tag), f"<{tag}>a</{tag}>b</{tag}>c")
        assert (thinking, answer) == (f"<{tag}>a</{tag}>", f"b</{tag}>c<|im_end|>")


def test_a_closing_tag_in_the_question_ends_nothing() -> None:
    chat = chat_of("ChatML")
    (trace,) = chat.encode([asked("<think>a</think>b", question="What is </think>?")])
    assert parts(chat, trace)[1:] == ("<think>a</think>", "b<|im_end|>")


@pytest.mark.parametrize("tag", ["think", "thought"])
@pytest.mark.parametrize("opening", ["", "<{}>\n", "\n<{}>\n", "<{}>"])
def test_a_thought_that_the_prompt_opens_is_opened_once(opening: str, tag: str) -> None:
    chat = chat_of("R1", tag)
    prompt, thinking, answer = encoded(chat, f"{opening.format(tag)}1+1=2.\n</{tag}>\n\n2")
    assert prompt == f"{PROMPTS['R1']}<{tag}>\n"
    assert (thinking, answer) == (f"1+1=2.\n</{tag}>", "\n\n2<|end|>")


@pytest.mark.parametrize("tag", ["think", "thought"])
def test_a_response_without_thinking_opens_none_and_is_all_answer(tag: str) -> None:
    assert encoded(chat_of("R1", tag), "2") == (PROMPTS["R1"], "", "2<|end|>")


@pytest.mark.parametrize("tag", ["think", "thought"])
def test_a_thought_that_never_ends_is_thinking_to_the_last_token(tag: str) -> None:
    chat = chat_of("R1", tag)
    assert encoded(chat, f"<{tag}>\nHmm") == (f"{PROMPTS['R1']}<{tag}>\n", "Hmm<|end|>", "")


@pytest.mark.parametrize("name", ["ChatML", "Qwen3", "stripping", "R1", "Llama 3"])
def test_everything_before_the_last_response_is_prompt(name: str) -> None:
    chat = chat_of(name)
    turns = [
        {"role": "system", "content": "Be kind."},
        *asked("<think>\nfirst thought</think>first answer"),
        *asked("<think>\nlast thought</think>last answer", question="Sure?"),
    ]
    (trace,) = chat.encode([turns])
    prompt, thinking, answer = parts(chat, trace)
    places = [prompt.index(text) for text in ("Be kind.", "1+1=?", "first answer", "Sure?")]
    assert places == sorted(places)
    strips = name in ("Qwen3", "stripping", "R1")
    assert ("first thought" in prompt) == (not strips)
    assert thinking == ("last thought</think>" if name == "R1" else "<think>\nlast thought</think>")
    assert answer == f"last answer{ENDS[name]}"
    whole = prompt + thinking + answer
    assert whole.count("last thought") == 1 and whole.count("<think>") == (1 if strips else 2)


def test_a_refused_role_is_one_error_that_names_the_roles() -> None:
    chat = chat_of("Gemma")
    with pytest.raises(DataError, match=r"\['system', 'user'\].*System role not supported") as caught:
        chat.encode([asked("2"), [{"role": "system", "content": "Be kind."}, *asked("2")]])
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"\['user'\].*never"):
        ChatFormat.of(tokenizer_of("{{ raise_exception('never') }}"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')"), "asked or answered"),
        (CHATML.replace("m['content']", "''"), "asked or answered"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_reported(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatFormat.of(tokenizer_of(template))


def test_a_missing_tokenizer_is_refused() -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        ChatFormat.of(None)
    with pytest.raises(DataError, match="no tokenizer"):
        encode_traces([("1+1=?", "2")], None)


def test_conversations_are_encoded_in_their_order_and_none_is_none() -> None:
    chat = chat_of("ChatML")
    assert chat.encode([]) == []
    responses = ["<think>a</think>b", "c", "<think>dddd</think>e"]
    together = chat.encode([asked(response) for response in responses])
    assert together == [trace for response in responses for trace in chat.encode([asked(response)])]


def test_traces_end_as_the_tokenizer_ends_them() -> None:
    tokenizer = build_tokenizer()
    (trace,) = encode_traces([("47+85=?", "<think>47+85=132.\n</think>132")], tokenizer)
    assert tokenizer.decode(trace.tokens) == (
        "<|bos|><|user|>47+85=?<|assistant|><think>47+85=132.\n</think>132<|end|>"
    )
    assert tokenizer.decode(trace.tokens[: trace.prompt_length]).endswith("<|assistant|>")
    assert trace.tokens[trace.prompt_length + trace.thinking_length - 1] == tokenizer.convert_tokens_to_ids("</think>")


def test_traces_are_cut_at_max_tokens() -> None:
    tokenizer = build_tokenizer()
    pairs = [("47+85=?", "<think>47+85=132.\n</think>132"), ("1+1=?", "2")]
    whole, short = encode_traces(pairs, tokenizer)
    cut, same = encode_traces(pairs, tokenizer, max_tokens=12)
    assert len(whole.tokens) > 12 >= len(short.tokens)
    assert cut.tokens == whole.tokens[:12] and same == short
    assert cut.prompt_length + cut.thinking_length == 12 and cut.prompt_length == whole.prompt_length


def test_any_text_survives_the_round_trip() -> None:
    tokenizer = build_tokenizer()
    response = "<think>\n ünïcödé 🤔\t  spaces \n\n</think>\r\n\\boxed{½}  "
    (trace,) = encode_traces([(" 1 , 2 ?\n", response)], tokenizer)
    assert tokenizer.decode(trace.tokens) == f"<|bos|><|user|> 1 , 2 ?\n<|assistant|>{response}<|end|>"


def by_region(chat: ChatFormat, response: str, question: str) -> dict[str, str]:
    """Region to the text of its tokens, in one piece."""
    (trace,) = chat.encode([asked(response, question)])
    codes = TraceRegions(chat).codes(trace)
    assert len(codes) == len(trace.tokens)
    return {
        name: chat.tokenizer.decode([t for t, c in zip(trace.tokens, codes, strict=True) if c == code])
        for code, name in enumerate(TRACE_REGIONS)
    }


@pytest.mark.parametrize("tag", ["think", "reason"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_token_is_in_its_region(name: str, tag: str) -> None:
    """Found from the template, also where a tag is several tokens or the prompt opens the thinking."""
    chat = chat_of(name, tag)
    regions = by_region(chat, f"<{tag}>\n9, no 8.\n</{tag}>\n8", "3+5=?")
    # Without a special token after it, a question may share its last token with the template: that token is its own.
    assert regions["question"].rstrip() == "3+5=?"
    assert "".join(regions["template"].split()) == "".join(PROMPTS[name].replace("1+1=?", "").split())
    assert regions["think_start"] == f"<{tag}>" and regions["think_end"] == f"</{tag}>"
    assert regions["thinking"].strip() == "9, no 8." and regions["answer"].strip() == "8"
    assert regions["end"].strip() == ENDS[name]
    plain = by_region(chat, "8", "3+5=?")
    assert plain["question"].rstrip() == "3+5=?" and plain["answer"].strip() == "8"
    assert plain["think_start"] == plain["thinking"] == plain["think_end"] == ""
    endless = by_region(chat, f"<{tag}>\n9, no", "3+5=?")
    assert endless["thinking"].strip() == "9, no" and endless["think_end"] == endless["answer"] == ""
