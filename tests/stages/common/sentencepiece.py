"""Tokenizers as converted from SentencePiece: bytes, characters, learned pieces, and all their merges."""

from tests.stages.common.chat_templates import Family

CORPUS = [
    "Turn on the lights, please. Don't turn off the lights; we'll see 12345 and 2024.",
    "HELLO World, camelCase and PascalCase\n\n\tif x == 10:\n        return x  # done",
    'question 1 {"n":1} question 2 {"n":2} été naïve café 你好 你好 Привет мир banana bananas',
]
# How Llama 2, Gemma and Mistral 7B v0.3 treat blanks.
STYLES = ("prefix", "plain", "first")
RUN = 16  # Llama 2's longest run of blanks


def make_learned_tokenizer(style: str, family: Family):
    """Return a tokenizer with the tokens and the template of a family."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", *family.special]
    pieces, merges = learn_pieces(special)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    built = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    set_blanks(built, style)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if style == "prefix" else parts)
    built.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    built.add_tokens([AddedToken(text, normalized=False) for text in family.added])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token="<unk>", bos_token=special[1], eos_token=special[2]
    )
    tokenizer.chat_template = family.template
    return tokenizer


def set_blanks(built, style):
    from tokenizers import normalizers, pre_tokenizers

    replace = normalizers.Replace(" ", "▁")
    if style == "prefix":
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif style == "plain":
        built.normalizer = replace
        built.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


def learn_pieces(special):
    """Return pieces in the order of their ids, and the merges as transformers sorts them by the scores."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    found = sorted(learner.get_vocab(), key=learner.token_to_id)
    runs = ["▁" * size for size in range(2, RUN + 1)]
    grown = [piece for piece in found if len(piece) > 1 and piece not in runs]
    letters = sorted({"▁", *map(chr, range(33, 127)), *(piece for piece in found if len(piece) == 1)})
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *grown, *runs]
    known = set(pieces)
    scores = dict.fromkeys(runs, -1e9) | {piece: -float(place) for place, piece in enumerate(grown)}
    splits = [
        (piece[:end], piece[end:])
        for piece in (*grown, *runs)
        for end in range(1, len(piece))
        if piece[:end] in known and piece[end:] in known
    ]
    splits.sort(key=lambda pair: (scores["".join(pair)], len(pair[0]), len(pair[1])), reverse=True)
    return pieces, splits
