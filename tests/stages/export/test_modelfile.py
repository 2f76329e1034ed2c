from stages.export.modelfile import modelfile, read_wrapping
from tests.tiny import make_tokenizer

# A default system message, as SmolLM2 and Qwen2 have; and a mark at the start, as Llama 3 has.
DEFAULT_SYSTEM = (
    "<|im_start|>{% if messages[0]['role'] != 'system' %}system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }} {{ m['content'] }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}x"


def wrapping_of(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return read_wrapping(tokenizer)


def test_the_template_is_written_in_the_language_of_ollama():
    wrapping = read_wrapping(make_tokenizer())
    assert wrapping.in_go() == (
        "{{ range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_what_stands_only_in_conversations_without_a_system_message_is_kept():
    wrapping = wrapping_of(DEFAULT_SYSTEM)
    assert wrapping.in_go().startswith(
        "{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}{{ range .Messages }}"
    )
    assert wrapping.render([("user", "Hi")]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n[user] Hi<|im_end|>\n[assistant] "
    )
    assert wrapping.render([("system", "S"), ("user", "Hi")]) == (
        "<|im_start|>[system] S<|im_end|>\n[user] Hi<|im_end|>\n[assistant] "
    )


def test_a_template_that_does_more_than_wrap_is_left_to_ollama():
    assert wrapping_of(NUMBERED) is None
    assert wrapping_of(NO_SYSTEM) is None
    assert "TEMPLATE" not in modelfile("model.gguf", None, None, [])


def test_the_modelfile_names_file_prompt_and_ends():
    text = modelfile("model.gguf", "Answer in JSON.", read_wrapping(make_tokenizer()), ["<|im_end|>"])
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}')
    assert text.endswith(
        '"""\nSYSTEM """Answer in JSON."""\nPARAMETER temperature 0\nPARAMETER stop "<|im_end|>"\n'
    )
