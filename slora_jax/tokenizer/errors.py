# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a tokenizer, or with what is asked of it."""


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or cannot do what is asked of it."""
