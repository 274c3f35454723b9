"""Documents are what the template, or the model that responds, would write: in text, in ids, region by region."""

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_folders import CLOSING_TEMPLATE, GEMMA_TEMPLATE, KINDS, R1_TEMPLATE, write_tokenizer
from transformers import PreTrainedTokenizerBase

from tl_adapters import PairedModel
from tl_adapters.checkpoints.tokenizers import load_tokenizer
from tl_adapters.config import ConfigError, DataConfig
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.chat_template import THINK_TAGS, set_template_date
from tl_adapters.data.conversations import THINKING_FIELDS, Conversation
from tl_adapters.data.documents import EncodedDocuments, open_documents
from tl_adapters.data.template_differences import template_differences
from tl_adapters.data.trace_regions import TRACE_REGIONS, TraceRegions
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.evaluation.tasks import MathProblem
from tl_adapters.generation.compare_variants import tokenize_question
from tl_adapters.generation.responses import respond
from tl_adapters.study.doctor import diagnose

THOUGHT = "<think>\nHmm, 3.\n</think>\n\n2"


def tokenizer_of(name: str, folder: Path, template: str | None = None) -> PreTrainedTokenizerBase:
    write_tokenizer(folder, name, **({} if template is None else {"chat_template": template}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def asked(response: str, question: str = "1+1=?", **fields: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response, **fields}]


def text_of(chat: ChatFormat, conversation: Conversation) -> str:
    return "".join(chat.render(conversation))


def regions_of(chat: ChatFormat, trace: Trace) -> dict[str, str]:
    codes = TraceRegions(chat).codes(trace)
    return {
        name: chat.tokenizer.decode([t for t, c in zip(trace.tokens, codes, strict=True) if c == code])
        for code, name in enumerate(TRACE_REGIONS)
    }


def whole(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    return tokenizer.apply_chat_template([dict(m) for m in conversation], tokenize=False)


@pytest.mark.parametrize("response", ["2", THOUGHT, "It is 2, é and 日本."])
@pytest.mark.parametrize("name", ["Qwen3", "Llama 2", "Gemma", "Llama 3.2", "Qwen2 with its own"])
def test_a_document_is_the_templates_own_rendering_in_text_and_ids(name: str, response: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, tmp_path)
    chat, turns = ChatFormat.of(tokenizer), asked(response)
    template = whole(tokenizer, turns)
    (trace,) = chat.encode([turns])
    text = text_of(chat, turns)
    assert template.startswith(text) and template[len(text) :].strip() == ""
    assert list(trace.tokens) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(trace.tokens) == tokenizer.apply_chat_template(turns, return_dict=False)[: len(trace.tokens)]
    regions = regions_of(chat, trace)
    assert regions["question"].strip() == "1+1=?"
    assert regions["answer"].strip() == response.rpartition("</think>")[2].strip()
    assert regions["thinking"].strip() == ("Hmm, 3." if response == THOUGHT else "")
    assert regions["end"].strip() == chat.turn_end.strip()
    assert trace.tokens[-1] in chat.end_tokens
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert (
        list(trace.tokens[: trace.prompt_length])[: len(tokenizer(prompt)["input_ids"])]
        == tokenizer(tokenizer.decode(trace.tokens[: trace.prompt_length]), add_special_tokens=False)["input_ids"][
            : len(tokenizer(prompt)["input_ids"])
        ]
        or name == "Llama 2"
    )


@pytest.mark.parametrize("name", KINDS)
def test_differences_between_template_and_documents_are_listed(name: str, tmp_path: Path) -> None:
    messages = {d.message for d in template_differences(ChatFormat.of(tokenizer_of(name, tmp_path)))}
    expected = {
        "R1-Distill-Llama": {"strips the thinking"},
        "Qwen3": {"after the end of a response"},
        "Llama 2": set(),
        "Gemma": {"after the end of a response", "refuses a conversation with a system turn"},
        "Llama 3.2": set(),
        "Qwen2 that closes": {"after the end of a response", "does not write before a finished response"},
        "Qwen2 with its own": {"after the end of a response"},
    }[name]
    assert len(messages) == len(expected) and all(any(part in message for message in messages) for part in expected)
    assert all(d.intended for d in template_differences(ChatFormat.of(tokenizer_of(name, tmp_path))))


def test_an_unintended_difference_is_shown_from_where_it_begins(tmp_path: Path) -> None:
    template = KINDS["Llama 3.2"].template.replace(
        "+ date_string", "+ ('Long. ' if messages | length > 1 else '') + date_string"
    )
    found = template_differences(ChatFormat.of(tokenizer_of("Llama 3.2", tmp_path, template)))
    assert found and not any(d.intended for d in found)
    ours, _, theirs = found[0].message.partition("where the template writes")
    assert "Today Date: " in ours and "Today Date: Long. " in theirs
    headless = KINDS["Llama 3.2"].template.replace("{{ bos_token }}", "")
    (difference,) = template_differences(ChatFormat.of(tokenizer_of("Llama 3.2", tmp_path, headless)))
    assert not difference.intended and "'<|begin_of_text|>' before a text, the template does not" in difference.message


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", " <|im_end|>\n\n"])
@pytest.mark.parametrize("name", ["Qwen3", "Qwen2 that closes"])
def test_a_response_ends_once(end: str, name: str, tmp_path: Path) -> None:
    chat = ChatFormat.of(tokenizer_of(name, tmp_path))
    for response in (THOUGHT, "2", "<think>\nHmm"):
        assert text_of(chat, asked(response + end)).count("<|im_end|>") == 2
    (trace,) = chat.encode([asked(f"{THOUGHT}{end}")])
    assert regions_of(chat, trace)["end"] == "<|im_end|>" and trace.thinking_length > 0


def test_a_thinking_that_the_prompt_closes_is_not_closed_before_a_response_that_thinks(tmp_path: Path) -> None:
    chat = ChatFormat.of(tokenizer_of("Qwen2 that closes", tmp_path))
    prompt, response = chat.render(asked(THOUGHT))
    assert (prompt, response) == ("<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n", f"{THOUGHT}<|im_end|>")
    assert chat.render(asked("2"))[0] == f"{prompt}<think>\n\n</think>\n\n"
    plain, thinking = chat.encode([asked("2"), asked(THOUGHT)])
    assert plain.thinking_length == 0 and regions_of(chat, plain)["thinking"] == ""
    assert regions_of(chat, thinking)["thinking"] == "\nHmm, 3.\n"
    assert regions_of(chat, plain)["question"] == regions_of(chat, thinking)["question"] == "1+1=?"


@pytest.mark.parametrize("before", [" ", "\n", "Answer: ", "<|im_start|>"])
def test_the_templates_text_before_a_response_is_in_the_document(before: str, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] }} [A]{% else %}{{ '"
        + before.replace("\n", "\\n")
        + "' }}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of("Qwen3", tmp_path, template)
    chat = ChatFormat.of(tokenizer)
    for response in ("2", THOUGHT):
        assert text_of(chat, asked(response)) == whole(tokenizer, asked(response))
    (trace,) = chat.encode([asked(THOUGHT)])
    assert regions_of(chat, trace)["answer"].strip() == "2"


@pytest.mark.parametrize("space", ["\n", "\n\n", "  "])
def test_an_added_token_of_spaces_ends_no_turn(space: str, tmp_path: Path) -> None:
    template = GEMMA_TEMPLATE.replace("'<end_of_turn>\\n'", f"'{space}<end_of_turn>\\n'".replace("\n", "\\n"))
    chat = ChatFormat.of(tokenizer_of("Gemma", tmp_path, template))
    assert chat.turn_end == f"{space}<end_of_turn>"
    assert [chat.tokenizer.decode([i]) for i in chat.end_tokens] == ["<eos>", "<end_of_turn>"]


# -- thinking that the template opens -------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<think>\n1+1=3.\n"])
@pytest.mark.parametrize("template", [R1_TEMPLATE, R1_TEMPLATE.replace("<think>\\n'", "<think>'"), CLOSING_TEMPLATE])
def test_an_opened_prompt_has_its_tag_once(template: str, opening: str, tmp_path: Path) -> None:
    name = "Qwen2 that closes" if template == CLOSING_TEMPLATE else "R1-Distill-Llama"
    chat = ChatFormat.of(tokenizer_of(name, tmp_path, template))
    prompt = chat.prompt(asked("2")[:1], opening)
    assert prompt.count("<think>") == 1 and "</think>" not in prompt
    assert prompt.rstrip().endswith(opening.rstrip())
    assert chat.prompt(asked("2")[:1], "First, ") == chat.prompt(asked("2")[:1]) + "First, "


def test_no_caller_opens_a_thinking_twice(bos_pair: PairedModel) -> None:
    tokenizer = bos_pair.model.tokenizer
    tag = tokenizer.convert_tokens_to_ids("<think>")
    assert tokenize_question(tokenizer, "1+1=?", open_thinking=True).count(tag) == 1
    assert tokenize_question(tokenizer, "1+1=?").count(tag) == 1
    for prefill in (ChatFormat.think_start, f"{ChatFormat.think_start}1+1=3.\n"):
        (said,) = respond(bos_pair.model, [MathProblem("1+1=?", "2")], max_new_tokens=2, prefill=prefill)
        assert said.prompt.count(tag) == 1
        trace = Trace((*said.prompt, *tokenizer("2</think>3", add_special_tokens=False)["input_ids"]), len(said.prompt))
        regions = regions_of(ChatFormat.of(tokenizer), trace)
        assert regions["answer"] == "3" and regions["thinking"].endswith("2")


# -- thinking in a field of its own ---------------------------------------------------------------------------------

ROWS: dict[str, dict[str, Any]] = {
    **{f"turn: {f}": {"messages": asked("2", **{f: "Hmm, 3."})} for f in THINKING_FIELDS},
    **{f"column: {f}": {"prompt": "1+1=?", f: "Hmm, 3.", "response": "2"} for f in ("reasoning", "thinking")},
    "column beside turns": {"messages": asked("2"), "reasoning": "Hmm, 3."},
    "conversations": {
        "conversations": [{"from": "human", "value": "1+1=?"}, {"from": "gpt", "value": "2", "thinking": "Hmm, 3."}]
    },
    "with line breaks": {"messages": asked("\n\n2", reasoning_content="\nHmm, 3.\n")},
}  # fmt: skip


def documents(
    row: dict[str, Any] | list[dict[str, Any]], chat: ChatFormat, folder: Path, **options: Any
) -> EncodedDocuments:
    rows = row if isinstance(row, list) else [row]
    (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return open_documents(DataConfig(source=str(folder / "d.jsonl"), **options), chat, 128)


@pytest.mark.parametrize("name", ["Qwen3", "Llama 3.2", "R1-Distill-Llama"])
@pytest.mark.parametrize("row", ROWS)
def test_thinking_in_a_field_or_column_is_in_the_document(row: str, name: str, tmp_path: Path) -> None:
    chat = ChatFormat.of(tokenizer_of(name, tmp_path))
    data = documents(ROWS[row], chat, tmp_path)
    (trace,) = data.traces()
    regions = regions_of(chat, trace)
    assert (regions["thinking"].strip(), regions["answer"].strip()) == ("Hmm, 3.", "2")
    assert data.survey().without_thinking == 0
    assert trace.tokens == chat.encode([asked(THOUGHT)])[0].tokens


def test_a_named_column_is_read_and_a_response_that_thinks_already_is_unchanged(tmp_path: Path) -> None:
    chat = ChatFormat.of(tokenizer_of("Qwen3", tmp_path))
    row = {"prompt": "1+1=?", "why": "Hmm, 3.", "response": "2", "rules": "Be kind."}
    (trace,) = documents(row, chat, tmp_path, thinking_column="why", system_column="rules").traces()
    text = chat.tokenizer.decode(trace.tokens)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>") and "Hmm, 3." in text
    both = {"prompt": "1+1=?", "reasoning": "other", "response": THOUGHT}
    assert "other" not in chat.tokenizer.decode(documents(both, chat, tmp_path).traces()[0].tokens)


def test_a_system_column_comes_first_and_only_where_there_is_no_system_turn(tmp_path: Path) -> None:
    chat = ChatFormat.of(tokenizer_of("Qwen3", tmp_path))
    own = [{"role": "system", "content": "Own."}, *asked("2")]
    for row, expected in (({"messages": asked("2")}, "Think."), ({"messages": own}, "Own.")):
        (trace,) = documents({"system": "Think.", **row}, chat, tmp_path).traces()
        assert chat.tokenizer.decode(trace.tokens).startswith(f"<|im_start|>system\n{expected}<|im_end|>")
    assert "system" not in chat.tokenizer.decode(
        documents({"system": "", "messages": asked("2")}, chat, tmp_path).traces()[0].tokens
    )


def test_the_thinking_of_an_earlier_turn_goes_where_the_template_wants_it(tmp_path: Path) -> None:
    turns = [*asked("2", reasoning="first"), *asked("3", question="And?", reasoning="last")]
    tokenizer = tokenizer_of("Qwen3", tmp_path)
    text = text_of(ChatFormat.of(tokenizer), turns)
    assert "first" not in text and text.count("last") == 1  # Qwen3's drops the thinking of earlier turns
    keeps = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.thinking %}({{ m.thinking }}){% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert "(first)2" in text_of(ChatFormat.of(tokenizer_of("Qwen3", tmp_path, keeps)), turns)


def test_thinking_that_was_cut_off_is_thinking(tmp_path: Path) -> None:
    for name in ("Qwen3", "R1-Distill-Llama", "Llama 2"):
        chat = ChatFormat.of(tokenizer_of(name, tmp_path))
        rows = [{"messages": asked("<think>\nHmm")}, {"messages": asked("", reasoning_content="Hmm")}]
        for row in rows:
            data = documents(row, chat, tmp_path)
            (trace,) = data.traces()
            assert trace.thinking_length == len(trace.tokens) - trace.prompt_length
            regions = regions_of(chat, trace)
            assert regions["thinking"].strip() == "Hmm" and regions["answer"] == ""
            assert data.survey().without_thinking == 0


@pytest.mark.parametrize("tags", THINK_TAGS)
@pytest.mark.parametrize("name", ["Qwen3", "Llama 2"])
def test_thinking_is_found_in_every_published_form(tags: tuple[str, str], name: str, tmp_path: Path) -> None:
    chat = ChatFormat.of(tokenizer_of(name, tmp_path, KINDS["Llama 2"].template if name == "Llama 2" else None))
    start, end = tags
    response = f"{start}\nHmm, 3.\n{end}\n\n2"
    (trace,) = chat.encode([asked(response)])
    regions = regions_of(chat, trace)
    assert (regions["thinking"].strip(), regions["answer"].strip()) == ("Hmm, 3.", "2")
    assert (regions["think_start"].strip(), regions["think_end"].strip()) == tags
    begun = chat.tokenizer.decode(trace.tokens[trace.prompt_length :][: trace.thinking_length])
    assert begun.strip().endswith(end)
    (cut,) = chat.encode([asked(f"{start}\nHmm")])
    assert cut.thinking_length == len(cut.tokens) - cut.prompt_length


def test_the_targets_own_form_is_found(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("Llama 3.2", tmp_path)
    assert ChatFormat.of(tokenizer).think_start == "<think>" and not ChatFormat.of(tokenizer).writes_thinking
    tokenizer.add_tokens(["[THINK]", "[/THINK]"])
    chat = ChatFormat.of(tokenizer)
    assert (chat.think_start, chat.think_end, chat.writes_thinking) == ("[THINK]", "[/THINK]", True)
    assert ChatFormat.of(tokenizer, "<a>", "</a>").think_start == "<a>"


def test_a_corpus_without_thinking_is_a_warning_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    thinker, other = (ChatFormat.of(tokenizer_of(n, tmp_path / n)) for n in ("Qwen3", "Llama 3.2"))
    rows = [{"messages": asked(str(i))} for i in range(3)]
    with caplog.at_level(logging.WARNING):
        documents(rows, other, tmp_path).log_survey()
        documents([*rows, {"messages": asked(THOUGHT)}], thinker, tmp_path).log_survey()
        assert "thinking" not in caplog.text
        documents(rows, thinker, tmp_path).log_survey()
    assert "None of the 3 documents has thinking, and the target thinks" in caplog.text


def test_doctor_warns_of_a_corpus_without_thinking(tmp_path: Path) -> None:
    from helpers.hub_folders import write_pair

    from tl_adapters.config import RunConfig

    base, target = write_pair(tmp_path, "Qwen3")
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": asked("2")}) + "\n")
    config = RunConfig(base=str(base), target=str(target), data=DataConfig(source=str(tmp_path / "d.jsonl")))
    found = [f for f in diagnose(config, tmp_path) if f.subject == "thinking"]
    assert [f.level for f in found] == ["warning"] and "None of the 1 documents" in found[0].message


# -- templates that write the date ----------------------------------------------------------------------------------

FORMS = ("%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y", "%H:%M %j", "%d%%")


@pytest.mark.parametrize("form", FORMS)
def test_a_template_writes_the_date_it_is_given(form: str, tmp_path: Path) -> None:
    template = KINDS["Llama 3.2"].template.replace("%d %b %Y", form)
    tokenizer = tokenizer_of("Llama 3.2", tmp_path, template)
    day = datetime.date(2025, 2, 3)
    text = text_of(ChatFormat.of(tokenizer, date=day), asked("2"))
    assert f"Today Date: {datetime.datetime(2025, 2, 3).strftime(form)}\n\n" in text
    set_template_date(tokenizer, day)
    assert text_of(ChatFormat.of(tokenizer), asked("2")) == text
    assert ChatFormat.of(tokenizer).date == day


def test_without_a_date_it_is_todays_and_only_where_the_template_writes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of("Llama 3.2", tmp_path)
    today = datetime.date.today()
    assert ChatFormat.of(tokenizer).date in (today, datetime.date.today())
    assert (
        text_of(ChatFormat.of(tokenizer), asked("2"))
        == whole(tokenizer, asked("2"))[: len(text_of(ChatFormat.of(tokenizer), asked("2")))]
    )
    assert ChatFormat.of(tokenizer_of("Qwen3", tmp_path)).date is None
    monkeypatch.setattr("tl_adapters.data.chat_template._today", lambda: datetime.date(2031, 5, 6))
    assert "06 May 2031" in text_of(ChatFormat.of(tokenizer), asked("2"))


def test_regions_of_a_trace_of_another_day_are_right(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("Llama 3.2", tmp_path)
    days = [datetime.date(2025, 2, 3), datetime.date(2026, 11, 26), datetime.date(2024, 12, 31)]
    formats = [ChatFormat.of(tokenizer, date=day) for day in days]
    for chat in formats:
        (trace,) = chat.encode([asked(THOUGHT)])
        for other in formats:
            assert TraceRegions(other).codes(trace) == TraceRegions(chat).codes(trace)
            assert regions_of(other, trace)["question"] == "1+1=?"


def test_an_invalid_date_is_refused() -> None:
    with pytest.raises(ConfigError, match="template_date is '3 Feb': give a date such as 2026-02-28, or null"):
        DataConfig(template_date="3 Feb")


def test_a_template_that_refuses_is_still_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\['user'\].*no"):
        ChatFormat.of(tokenizer_of("Qwen3", tmp_path, "{{ raise_exception('no') }}"))
