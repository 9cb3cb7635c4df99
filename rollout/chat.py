"""From data rows to the token ids of prompts, the same for student and teacher.

A row is a prompt string (made into one user turn unless the domain is `raw`) or a list of messages that ends in a user or tool
turn. The beginning-of-sequence token is never doubled: a chat template writes it itself, so its text is tokenised without special
tokens, and a raw prompt that already begins with it gets no second one.
"""

import json
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rollout.config import PromptsConfig
from rollout.errors import first_sentence
from rollout.self_repair import RepairedAnswer

Turns = list[tuple[str, str]]
"""What a row itself says: role and text of each turn."""


def encode_prompts(rows: list[dict[str, Any]], cfg: PromptsConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> list[list[int]]:
    """Token ids of the rows, in order; row 7 is called "WHERE:7" in errors.

    Raises ValueError where a row has neither prompt nor messages, or both, or not of their types, where messages end in an assistant
    turn, where a conversation meets a tokenizer without a chat template, or where nothing is left after rendering.
    """
    if not cfg.raw and tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: set prompts.raw=true to use prompts as they are")
    texts = [_render(row, cfg, tokenizer, f"{where}:{index}") for index, row in enumerate(rows)]
    encoded = tokenizer(texts, add_special_tokens=cfg.raw)["input_ids"]
    if cfg.raw:
        encoded = [_trim_special(tokens, tokenizer) for tokens in encoded]
    for index, tokens in enumerate(encoded):
        if not tokens:
            raise ValueError(f"row {where}:{index} is empty")
    return encoded


def turns_of(row: dict[str, Any], raw: bool, name: str) -> Turns:
    """What the row says, without template and system prompt of the run; tool calls as JSON. Raises ValueError as `encode_prompts` does."""
    turns = []
    for turn in _messages(row, raw, name):
        calls = [json.dumps(turn["tool_calls"], sort_keys=True, ensure_ascii=False, default=str)] if turn.get("tool_calls") else []
        turns.append((turn["role"], "\n".join([turn.get("content") or "", *calls])))
    return turns


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text as it is, with the beginning-of-sequence token of tokenizers that write one."""
    return _trim_special(tokenizer(text)["input_ids"], tokenizer)


def encode_answer(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a reference answer as a completion: its text and the end of the sequence."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode_repaired(repaired: RepairedAnswer, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[bool]]:
    """(token ids of an answer with repaired errors and the end of the sequence, which of them are errors).

    Characters between two tokens (spaces, with some tokenizers) count as the later one's. Raises ValueError, naming the row, where a token holds an error
    and a right character, where an error is in no token, and for a tokenizer that does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"the errors of row {where} cannot be found among its tokens, since {type(tokenizer).__name__} gives no offsets: set repair_rate=0")
    encoded = tokenizer(repaired.text, add_special_tokens=False, return_offsets_mapping=True)
    errors, is_error, found, end = set(repaired.errors), [], set(), 0
    for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        own = set(range(min(first, end), last))  # a character of several tokens is in each of them
        if own & errors and own - errors:
            part = repaired.text[min(own) : max(own) + 1]
            raise ValueError(f"the errors of row {where} are no whole tokens: {part!r} is one (id {token}) and only partly wrong; set repair_rate=0")
        is_error.append(bool(own & errors))
        found, end = found | own, max(end, last)
    if not errors <= found:
        raise ValueError(f"the errors of row {where} are no whole tokens: {repaired.text!r} has one that is in none; set repair_rate=0")
    return [*encoded["input_ids"], tokenizer.eos_token_id], [*is_error, False]


def decode_completion(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Completion text for a grader: without the closing end-of-sequence token and other special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _render(row: dict[str, Any], cfg: PromptsConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    messages = _messages(row, cfg.raw, name)
    if cfg.raw:
        return row["prompt"]
    if cfg.system_prompt is not None and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": cfg.system_prompt}, *messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **cfg.template_kwargs)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses row {name}: {first_sentence(error)}") from error


def _messages(row: dict[str, Any], raw: bool, name: str) -> list[dict[str, Any]]:
    """The row's conversation; a prompt is one user turn. Raises ValueError for what is none."""
    messages, prompt = row.get("messages"), row.get("prompt")
    if (messages is None) == (prompt is None):
        raise ValueError(f"row {name} needs exactly one of prompt and messages; map the columns with prompts.columns")
    if raw and prompt is None:
        raise ValueError(f"row {name} holds messages, which raw=true cannot render: set raw to false")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"the prompt of row {name} is {type(prompt).__name__}, not text: map another column with prompts.columns")
    if messages is None:
        return [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError(f"the messages of row {name} must be a list of turns with a role and content each, not {messages!r}")
    for turn in messages:
        if not isinstance(turn.get("role"), str) or not (isinstance(turn.get("content"), str) or turn.get("tool_calls")):
            raise ValueError(f"a turn of row {name} lacks a role, or has neither content nor tool_calls: {turn!r}")
    if messages[-1].get("role") not in ("user", "tool"):
        raise ValueError(f"the messages of row {name} must end in a user or tool turn, not {messages[-1].get('role')!r}")
    return messages


def _trim_special(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without a second beginning-of-sequence token, and without an end that some tokenizers append to every text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and tokens[:2] == [bos, bos]:
        tokens = tokens[1:]
    appends_eos = tokenizer("")["input_ids"][-1:] == [eos]
    return tokens[:-1] if appends_eos and tokens[-1:] == [eos] else tokens
