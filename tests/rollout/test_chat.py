"""From data rows to prompt tokens: the chat template, raw prompts, and what is refused.

The character tokenizer has one token per character and writes `<bos><user>...<assistant>`; the tokenizers that add special tokens by
themselves are made from it with a post-processor, as Llama's and DeepSeek's have one.
"""

import copy

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rollout.chat import decode_completion, encode_prompts, encode_repaired
from rollout.config import PromptsConfig
from rollout.self_repair import RepairedAnswer

BOS, EOS = 1, 2


@pytest.fixture
def tokenizer_adding_both(tokenizer):
    """A tokenizer that puts <bos> before and <eos> after every text, unless told to add no special tokens."""
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    return adding


def encode(row: dict, tokenizer, **settings) -> list[int]:
    return encode_prompts([row], PromptsConfig(**settings), tokenizer, "law/prompts")[0]


def text_of(tokens: list[int], tokenizer) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False)


def test_a_prompt_becomes_one_user_turn_that_the_assistant_is_to_answer(tokenizer):
    assert text_of(encode({"prompt": "2+2="}, tokenizer), tokenizer) == "<bos><user>2+2=<assistant>"


def test_every_character_of_a_prompt_is_one_token(tokenizer):
    tokens = encode({"prompt": "a b"}, tokenizer)
    assert tokens == [tokenizer.convert_tokens_to_ids(token) for token in ("<bos>", "<user>", "a", " ", "b", "<assistant>")]


def test_messages_are_rendered_turn_by_turn(tokenizer):
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("tool", "t")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert text_of(encode({"messages": messages}, tokenizer), tokenizer) == "<bos><system>s<user>u<assistant>a<eos><tool>t<assistant>"


def test_a_template_that_writes_bos_gets_no_second_one_from_the_tokenizer(tokenizer, tokenizer_adding_both):
    assert encode({"prompt": "hi"}, tokenizer_adding_both) == encode({"prompt": "hi"}, tokenizer)


def test_rows_are_encoded_in_order(tokenizer):
    rows = [{"prompt": text} for text in ("first", "second one", "3")]
    assert encode_prompts(rows, PromptsConfig(), tokenizer, "law") == [encode(row, tokenizer) for row in rows]


def test_the_system_prompt_stands_before_a_conversation_without_one(tokenizer):
    assert text_of(encode({"prompt": "u"}, tokenizer, system_prompt="be brief"), tokenizer) == "<bos><system>be brief<user>u<assistant>"


def test_a_conversation_keeps_its_own_system_prompt(tokenizer):
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "u"}]
    assert text_of(encode({"messages": messages}, tokenizer, system_prompt="other"), tokenizer) == "<bos><system>own<user>u<assistant>"


def test_template_kwargs_reach_the_template(tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = tokenizer.chat_template + "{% if thinking %}?{% endif %}"
    assert text_of(encode({"prompt": "u"}, thinking, template_kwargs={"thinking": True}), tokenizer) == "<bos><user>u<assistant>?"
    assert text_of(encode({"prompt": "u"}, thinking), tokenizer) == "<bos><user>u<assistant>"


def test_a_raw_prompt_is_used_as_it_is(tokenizer):
    assert text_of(encode({"prompt": "def f(x):"}, tokenizer, raw=True), tokenizer) == "def f(x):"


def test_a_raw_prompt_gets_one_bos_where_the_tokenizer_adds_it_and_no_end(tokenizer_adding_both, tokenizer):
    assert encode({"prompt": "hi"}, tokenizer_adding_both, raw=True) == [BOS, *tokenizer("hi")["input_ids"]]


def test_a_raw_prompt_that_begins_with_bos_gets_no_second_one(tokenizer_adding_both, tokenizer):
    assert encode({"prompt": "<bos>hi"}, tokenizer_adding_both, raw=True) == [BOS, *tokenizer("hi")["input_ids"]]


def test_raw_prompts_need_no_chat_template(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert encode({"prompt": "hi"}, plain, raw=True) == tokenizer("hi")["input_ids"]


def test_a_tokenizer_without_chat_template_is_refused(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template: set prompts\.raw=true"):
        encode({"prompt": "hi"}, plain)


@pytest.mark.parametrize("role", ["assistant", "system"])
def test_messages_that_do_not_end_in_a_user_or_tool_turn_are_refused(tokenizer, role):
    messages = [{"role": "user", "content": "u"}, {"role": role, "content": "x"}]
    with pytest.raises(ValueError, match=f"messages of row law/prompts:0 must end in a user or tool turn, not '{role}'"):
        encode({"messages": messages}, tokenizer)


def test_raw_with_messages_is_refused(tokenizer):
    with pytest.raises(ValueError, match="row law/prompts:0 holds messages, which raw=true cannot render"):
        encode({"messages": [{"role": "user", "content": "u"}]}, tokenizer, raw=True)


@pytest.mark.parametrize("row", [{}, {"answer": "4"}, {"prompt": "p", "messages": [{"role": "user", "content": "u"}]}])
def test_a_row_needs_exactly_one_of_prompt_and_messages(tokenizer, row):
    with pytest.raises(ValueError, match="row law/prompts:0 needs exactly one of prompt and messages"):
        encode(row, tokenizer)


@pytest.mark.parametrize("messages", [[], "user: hi"])
def test_messages_that_are_no_list_of_turns_are_refused(tokenizer, messages):
    with pytest.raises(ValueError, match="messages of row law/prompts:0 must be a list of turns"):
        encode({"messages": messages}, tokenizer)


@pytest.mark.parametrize("raw", [True, False])
def test_a_prompt_that_is_no_text_is_refused(tokenizer, raw):
    with pytest.raises(ValueError, match="prompt of row law/prompts:0 is int, not text"):
        encode({"prompt": 7}, tokenizer, raw=raw)


def test_the_row_of_an_empty_raw_prompt_is_named(tokenizer):
    with pytest.raises(ValueError, match="row law/prompts:1 is empty"):
        encode_prompts([{"prompt": "a"}, {"prompt": ""}], PromptsConfig(raw=True), tokenizer, "law/prompts")


def test_a_completion_is_decoded_without_its_end_and_other_special_tokens(tokenizer):
    assert decode_completion([*tokenizer("{p(1); k(2)}")["input_ids"], EOS], tokenizer) == "{p(1); k(2)}"


# Answers with repaired errors


def tokenizer_of_pieces(pieces: list[str], separator: str = "") -> PreTrainedTokenizerFast:
    """The longest pieces win; the separator belongs to no token."""
    tokens = ["<unk>", "<pad>", "<eos>", *pieces]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    ordered = sorted(pieces, key=len, reverse=True)
    splits = [pre_tokenizers.Split(Regex(separator), behavior="removed")] if separator else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.Split(Regex("|".join(ordered)), behavior="isolated")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def errors_of(text: str, errors: tuple[int, ...], tokenizer) -> list[tuple[str, bool]]:
    tokens, is_error = encode_repaired(RepairedAnswer(text=text, errors=errors), tokenizer, "law/prompts:3")
    return list(zip(tokenizer.convert_ids_to_tokens(tokens), is_error, strict=True))


def test_a_repaired_answer_of_characters_has_its_errors_where_the_text_has_them_and_an_end(tokenizer):
    assert errors_of("19<8<2", (1, 3), tokenizer) == [("1", False), ("9", True), ("<", False), ("8", True), ("<", False), ("2", False), ("<eos>", False)]


def test_a_token_of_several_wrong_characters_is_one_error():
    found = errors_of("198<<2", (1, 2), tokenizer_of_pieces(["1", "2", "98", "<<"]))
    assert found == [("1", False), ("98", True), ("<<", False), ("2", False), ("<eos>", False)]


@pytest.mark.parametrize(("errors", "part"), [((1,), "19"), ((0,), "19"), ((3,), "8<")])
def test_a_token_that_is_partly_wrong_is_refused_with_its_row(errors, part):
    with pytest.raises(ValueError, match=rf"the errors of row law/prompts:3 are no whole tokens: '{part}' is one"):
        errors_of("19<8<2", errors, tokenizer_of_pieces(["19", "<", "8<", "2"]))


def test_a_character_between_two_tokens_is_the_later_ones():
    """So a wrong token with its space is an error where both are wrong, and refused where the space is right."""
    spaced = tokenizer_of_pieces(["1", "9", "<", "2"], separator=" ")
    assert errors_of("1 9<2", (1, 2), spaced) == [("1", False), ("9", True), ("<", False), ("2", False), ("<eos>", False)]
    with pytest.raises(ValueError, match="' 9' is one"):
        errors_of("1 9<2", (2,), spaced)
    with pytest.raises(ValueError, match="has one that is in none"):
        errors_of("12 ", (2,), spaced)


def test_each_of_the_tokens_of_a_wrong_character_is_an_error():
    """Three bytes of one character, as byte-level tokenizers have them."""
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(["<unk>", "<eos>", *pre_tokenizers.ByteLevel.alphabet()])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    _, is_error = encode_repaired(RepairedAnswer(text="a€<b", errors=(1,)), PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), "law")
    assert is_error == [False, True, True, True, False, False, False]


def test_a_tokenizer_without_offsets_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match=r"row law/prompts:3 cannot be found among its tokens, since .* gives no offsets: set repair_rate=0"):
        errors_of("19<2", (1,), tokenizer)
