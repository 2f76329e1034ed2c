from stages.common.chat.template import encode_prompt
from stages.common.messages import Message
from stages.export.modelfile import format_modelfile, read_chat_format
from tests.stages.common.chat_templates import FAMILIES, make_family_tokenizer
from tests.tiny import make_tokenizer

# A default system message, as SmolLM2 and Qwen2 have; and a mark at the start, as Llama 3 has.
DEFAULT_SYSTEM = (
    "<|im_start|>{% if messages[0]['role'] != 'system' %}system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }} {{ m['content'] }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}x"


def format_of(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return read_chat_format(tokenizer)


def test_the_template_is_written_in_the_language_of_ollama():
    chat_format = read_chat_format(make_tokenizer())
    assert chat_format.to_ollama() == (
        "{{ range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_what_stands_only_in_conversations_without_a_system_message_is_kept():
    chat_format = format_of(DEFAULT_SYSTEM)
    assert chat_format.to_ollama().startswith(
        "{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}{{ range .Messages }}"
    )
    assert chat_format.render([("user", "Hi")]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n[user] Hi<|im_end|>\n[assistant] "
    )
    assert chat_format.render([("system", "S"), ("user", "Hi")]) == (
        "<|im_start|>[system] S<|im_end|>\n[user] Hi<|im_end|>\n[assistant] "
    )


def test_the_prompt_of_ollama_is_the_one_of_training():
    """With Qwen3's empty think block before the answer, and with the day that Llama 3 was trained on."""
    thinking = make_family_tokenizer(FAMILIES["qwen-3"])
    chat_format = read_chat_format(thinking)
    assert chat_format.opening == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat_format.assistant.before == "<|im_start|>assistant\n"
    dated = make_family_tokenizer(FAMILIES["llama-3"])
    for tokenizer in (thinking, dated):
        asked = encode_prompt(tokenizer, [Message("system", "S"), Message("user", "Hi")])
        rendered = read_chat_format(tokenizer).render([("system", "S"), ("user", "Hi")])
        assert rendered == tokenizer.decode(asked)


def test_a_template_that_does_more_than_wrap_is_left_to_ollama():
    assert format_of(NUMBERED) is None
    assert format_of(NO_SYSTEM) is None
    assert "TEMPLATE" not in format_modelfile("model.gguf", None, None, [])


def test_the_modelfile_names_file_prompt_and_ends():
    text = format_modelfile(
        "model.gguf", "Answer in JSON.", read_chat_format(make_tokenizer()), ["<|im_end|>"]
    )
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}')
    assert text.endswith(
        '"""\nSYSTEM """Answer in JSON."""\nPARAMETER temperature 0\nPARAMETER stop "<|im_end|>"\n'
    )
