"""Constrained decoding: which tokens may come next, so that the answer fits a JSON schema.

llguidance is exact: an unsatisfiable schema, or an unsupported keyword, is an error before the first token.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from services.engines.protocol import Sampling, SchemaUnsupported

if TYPE_CHECKING:
    import numpy as np

# White space between elements, as `json.dumps` writes it. Small models under a grammar tend to generate
# endless white space, so no more than that.
WHITESPACE = "[ ]?"
# Memory of one answer's grammar: llguidance takes 1 to 2 kB for a state. Its own limits of a step, 200,000
# units of lexing and 50,000 items, are about 17 ms and stay.
MAX_LEXER_STATES = 25_000
MAX_COMPILED = 32  # grammars that are kept

# Compiling drops the interpreter's lock; in a thread of its own, so that no other work waits for it.
_COMPILER = ThreadPoolExecutor(1, thread_name_prefix="grammar")
State = TypeVar("State")


async def compile_apart(prepare: Callable[[Sampling], State], sampling: Sampling) -> State:
    """Return `prepare(sampling)`, which compiles a grammar, without blocking the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_COMPILER, prepare, sampling)


def compile_schema(schema: str, tokens: Any) -> Any:
    """Compile a JSON schema for a vocabulary in llguidance's form; return llguidance's matcher.

    Raises:
        SchemaUnsupported: it cannot be compiled, or no answer satisfies it.
    """
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(set_whitespace(schema))
        matcher = _make_matcher(tokens, grammar)
    except SchemaUnsupported:
        raise
    except ValueError as error:
        raise SchemaUnsupported(f"the JSON schema cannot be compiled: {error}") from error
    if matcher.is_error():
        reason = matcher.get_error().partition("\n")[0]
        raise SchemaUnsupported(f"the JSON schema cannot be compiled: {reason}")
    return matcher


def compile_grammar(grammar: str, tokens: Any) -> Any:
    """Compile a grammar in llguidance's form of Lark; return llguidance's matcher.

    Raises:
        SchemaUnsupported: it cannot be compiled, or no answer fits it.
    """
    from llguidance import LLMatcher

    try:
        matcher = _make_matcher(tokens, LLMatcher.grammar_from_lark(grammar))
    except ValueError as error:
        raise SchemaUnsupported(f"the JSON schemas cannot be compiled: {error}") from error
    if matcher.is_error():
        reason = matcher.get_error().partition("\n")[0]
        raise SchemaUnsupported(f"the JSON schemas cannot be compiled: {reason}")
    return matcher


def set_whitespace(schema: str) -> str:
    """Return a JSON schema with the white space that we allow, as llguidance reads it under every engine.

    Raises:
        SchemaUnsupported: it is not an object.
    """
    parsed = json.loads(schema)
    if parsed is True:
        parsed = {}
    if not isinstance(parsed, dict):
        raise SchemaUnsupported("the JSON schema must be an object; false allows no answer")
    own = parsed.get("x-guidance")
    options = {**(own if isinstance(own, dict) else {}), "whitespace_pattern": WHITESPACE}
    return json.dumps({**parsed, "x-guidance": options})


def _make_matcher(tokens: Any, grammar: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    return LLMatcher(tokens, grammar, log_level=0, limits=limits)


class Grammars:
    """Compiles schemas for one tokenizer.

    Args:
        vocab_size: number of logits, which may exceed the number of tokens in the tokenizer.
        end_id: the token that ends an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_id: int) -> None:
        from llguidance.hf import from_tokenizer

        self.vocab_size = vocab_size
        self._compiled: OrderedDict[str, Any] = OrderedDict()  # grammars of calls, the newest last
        # Now, while the model is loaded: it takes half a second, most of it with the interpreter's lock.
        size = max(vocab_size, len(tokenizer))
        self._tokens = from_tokenizer(tokenizer, n_vocab=size, eos_token=end_id)

    def compile_for(self, sampling: Sampling) -> Grammar | None:
        """Return the grammar of an answer's grammar, JSON schema or choices; None where it may be any text.

        Raises:
            SchemaUnsupported: as `compile`.
        """
        if sampling.grammar is not None:
            again = partial(self._compile_again, sampling.grammar)
            return Grammar(self._compile_once(sampling.grammar), self.vocab_size, again)
        if sampling.json_schema is not None:
            return self.compile(sampling.json_schema)
        return self.compile_choices(sampling.choices) if sampling.choices else None

    def compile_choices(self, choices: Sequence[str]) -> Grammar:
        """Return the grammar of answers that are one of these texts."""
        from llguidance import LLMatcher

        alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        grammar = LLMatcher.grammar_from_lark(f"start: {alternatives}")
        return Grammar(_make_matcher(self._tokens, grammar), self.vocab_size)

    def compile(self, schema: str) -> Grammar:
        """Compile a JSON schema; raise SchemaUnsupported if that is not possible."""
        return Grammar(compile_schema(schema, self._tokens), self.vocab_size)

    def _compile_once(self, grammar: str) -> Any:
        """Return a matcher; a client sends the same tools with every request of a conversation."""
        matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            matcher = compile_grammar(grammar, self._tokens)
        self._compiled[grammar] = matcher
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return matcher.deep_copy()

    def _compile_again(self, grammar: str) -> Any:
        self._compiled.pop(grammar, None)
        return compile_grammar(grammar, self._tokens)


class Grammar:
    """The state of constrained decoding in one answer.

    Args:
        compile_again: returns another matcher. All that are copied from one share their states, so that one
            answer may find the limits reached by others.
    """

    __slots__ = ("_compile_again", "_mask", "_matcher", "_taken", "_vocab_size")

    def __init__(self, matcher: Any, vocab_size: int, compile_again: Callable[[], Any] | None = None) -> None:
        from llguidance.numpy import allocate_token_bitmask

        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask = allocate_token_bitmask(1, vocab_size)
        self._compile_again = compile_again
        self._taken: list[int] = []

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next; booleans of shape (vocabulary,).

        Raises:
            SchemaUnsupported: the grammar outgrew its limits.
        """
        import numpy as np

        self._fill()
        if self._matcher.is_error() and self._compile_again is not None:
            self._start_again()
            self._fill()
        self._check()
        bits = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")
        return bits[: self._vocab_size].astype(bool)

    def take(self, token: int) -> None:
        """Advance by one token, which `allowed` holds.

        Raises:
            SchemaUnsupported: the grammar outgrew its limits.
        """
        self._matcher.consume_token(token)
        if self._compile_again is not None:
            self._taken.append(token)
            if self._matcher.is_error():
                self._start_again()
        self._check()

    def _fill(self) -> None:
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask, 0)

    def _start_again(self) -> None:
        """Take all tokens with a matcher that has no states of other answers."""
        assert self._compile_again is not None
        self._matcher, self._compile_again = self._compile_again(), None
        self._matcher.consume_tokens(self._taken)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise SchemaUnsupported(f"the grammar of the JSON schema outgrew its limits: {reason}")
