# SPDX-License-Identifier: Apache-2.0
"""A request's text as it grows, and the stop strings that end it."""

from collections.abc import Sequence

from slora_jax.core import SamplingParams
from slora_jax.tokenizer import Detokenizer, Tokenizer


class OutputText:
    """What the caller sees, and beside it what stop strings are looked for in.

    The two differ by the special tokens that `skip_special_tokens` leaves out: a stop string may
    be one of them, or lie across it.

    Args:
        tokenizer: of the model.
        prompt: what the output continues.
        params: of the request.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt, params.skip_special_tokens)
        self._stops, self._includes_stop = params.stop, params.include_stop_str_in_output
        hides = params.skip_special_tokens and params.stop
        self._hidden = tokenizer.special_ids if hides else frozenset[int]()
        self._seen = ""
        self._searched = ""  # with the hidden tokens' texts
        self._hidden_at: list[tuple[int, int]] = []  # where they begin in it, how long they are
        self._fresh = 0  # characters of `_searched` that are new
        self._taken = 0  # characters of `_seen` already handed out
        # What might turn out to be the beginning of a stop string is not handed out yet.
        self._held_back = max((len(stop) - 1 for stop in params.stop), default=0)

    def append(self, token: int) -> None:
        """Takes the next token."""
        self._add(self._detokenizer.append(token))
        if token in self._hidden:
            text = self._tokenizer.token_text(token)
            self._hidden_at.append((len(self._searched), len(text)))
            self._searched += text
            self._fresh += len(text)

    def flush(self) -> None:
        """Takes what no further token will complete."""
        self._add(self._detokenizer.flush())

    def cut_at_stop(self) -> str | None:
        """Cuts the text at the first stop string that ends in what is new, and says which it is."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            start = max(len(self._searched) - self._fresh - len(stop) + 1, 0)
            at = self._searched.find(stop, start)
            if at >= 0 and (best is None or at < best[0]):
                best = at, stop
        if best is None:
            return None
        at, stop = best
        hidden = sum(min(length, at - start) for start, length in self._hidden_at if start < at)
        self._seen = self._seen[: at - hidden] + (stop if self._includes_stop else "")
        return stop

    def take(self, finished: bool) -> tuple[str, str]:
        """What can be shown by now, and what of it is new."""
        end = len(self._seen)
        if not finished:
            end = max(end - self._held_back, self._taken)
        fresh, self._taken = self._seen[self._taken : end], end
        return self._seen[:end], fresh

    def _add(self, text: str) -> None:
        self._seen += text
        self._fresh = len(text)
        if self._stops:
            self._searched += text
