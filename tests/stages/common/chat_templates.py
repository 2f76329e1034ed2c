"""Chat templates of known model families, in their essential form, with tokenizers that have their tokens."""

from dataclasses import dataclass

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

LLAMA_3 = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' }}"
    "{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

QWEN_25 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

QWEN_3 = (
    "{%- set ns = namespace(last=0) %}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' %}{%- set reasoning = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n'"
    " + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# The form that only thinks: its prompt opens the block.
QWEN_3_THINKING = QWEN_3.replace(
    "{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
    "{{- '<|im_start|>assistant\n<think>\n' }}",
)

GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

GEMMA_3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif -%}{%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)

MISTRAL_1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)

MISTRAL_3 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST]' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST]' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
)

PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

PHI_4 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content']"
    " + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

SMOLLM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SMOLLM_3 = (
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}"
    "{{- '<|im_start|>system\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\nReasoning Mode: '"
    " ~ ('/think' if enable_thinking else '/no_think') ~ '<|im_end|>\n' }}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

GRANITE = (
    "{%- for message in messages %}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>'"
    " + message['content'] + '<|end_of_text|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)

# The roles are text, not tokens; the line behind an answer is left out after the last.
OLMO_2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# The end of sequence behind every message, and nothing that opens an answer.
GPT_2 = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"

NO_END = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "ASSISTANT: {{ message['content'] }}\n{% else %}USER: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A chat template, its tokens, and what must be learned of `ANSWER`.

    Attributes:
        special: its special tokens; the first is bos, the second eos.
        added: added tokens that are not special.
        prompt_end: the end of the prompt.
        learned: behind the answer, as text.
        takes_system: whether a system message is allowed.
    """

    template: str
    special: tuple[str, ...]
    prompt_end: str
    learned: str
    added: tuple[str, ...] = ()
    takes_system: bool = True


IM = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
THINK = ("<think>", "</think>")
TURNS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
ROLES = ("<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
HEADERS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
PHI = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
EMPTY_THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"

FAMILIES = {
    "chatml": Family(CHATML, IM, "<|im_start|>assistant\n", "<|im_end|>"),
    "gemma-2": Family(GEMMA_2, TURNS, "<start_of_turn>model\n", "<end_of_turn>", takes_system=False),
    "gemma-3": Family(GEMMA_3, TURNS, "<start_of_turn>model\n", "<end_of_turn>"),
    "gpt-2": Family(GPT_2, ("<|endoftext|>", "<|endoftext|>"), "light on<|endoftext|>", "<|endoftext|>"),
    "granite": Family(GRANITE, ROLES, "<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>"),
    "llama-3": Family(LLAMA_3, HEADERS, "assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral-1": Family(MISTRAL_1, ("<s>", "</s>"), "light on [/INST] ", " </s>", takes_system=False),
    "mistral-3": Family(MISTRAL_3, ("<s>", "</s>", "[INST]", "[/INST]"), "light on[/INST]", "</s>"),
    "olmo-2": Family(OLMO_2, ("<|endoftext|>", "<|endoftext|>"), "<|assistant|>\n", "<|endoftext|>"),
    "phi-3": Family(PHI_3, PHI, "<|assistant|>\n", "<|end|>"),
    "phi-4": Family(PHI_4, (*IM, "<|im_sep|>"), "<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
    "qwen-2.5": Family(QWEN_25, IM, "<|im_start|>assistant\n", "<|im_end|>", ("<|fim_prefix|>",)),
    "qwen-3": Family(QWEN_3, IM, EMPTY_THOUGHT, "<|im_end|>", THINK),
    "qwen-3-thinking": Family(QWEN_3_THINKING, IM, EMPTY_THOUGHT, "<|im_end|>", THINK),
    "smollm-2": Family(SMOLLM_2, IM, "<|im_start|>assistant\n", "<|im_end|>"),
    "smollm-3": Family(SMOLLM_3, IM, "<|im_start|>assistant\n", "<|im_end|>", THINK),
}


def make_family_tokenizer(family: Family):
    """Return a byte-level tokenizer with the tokens and the template of a family."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("<", "|"), ("|", ">"), ("e", "n"), ("i", "m"), ("<|", "im"), ("t", "h"), ("<", "/")]
    vocabulary = {byte: number for number, byte in enumerate(alphabet)}
    for pair in merges:
        vocabulary.setdefault("".join(pair), len(vocabulary))
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in family.special])
    built.add_tokens([AddedToken(text, normalized=False) for text in family.added])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token=family.special[0], eos_token=family.special[1]
    )
    tokenizer.chat_template = family.template
    return tokenizer


def make_sentencepiece_tokenizer(kind: str):
    """Return a tokenizer as of Llama 2 (bpe) or T5 (unigram): its control tokens are pieces of the model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    control = ["<unk>", "<s>", "</s>"]
    pieces = [
        *control,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *map(chr, range(33, 127)),
        "</",
        "s>",
    ]
    if kind == "bpe":
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        merges = [("<", "/"), ("s", ">"), ("</", "s>")]
        model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    else:
        model = models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], 0, byte_fallback=True)
    built = Tokenizer(model)
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    built.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = MISTRAL_1
    return tokenizer
