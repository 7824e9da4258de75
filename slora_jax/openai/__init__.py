# SPDX-License-Identifier: Apache-2.0
"""The OpenAI API's requests, responses and errors as plain data: no HTTP, no engine, no JAX."""
