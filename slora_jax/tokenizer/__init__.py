# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, chat templates, and streaming detokenization.

The engine itself works on token ids and needs none of this.
"""

from slora_jax.tokenizer.detokenizer import Detokenizer
from slora_jax.tokenizer.errors import TokenizerError
from slora_jax.tokenizer.loading import load_tokenizer
from slora_jax.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer", "TokenizerError", "load_tokenizer"]
