# SPDX-License-Identifier: Apache-2.0
"""The operations that read and write the page pool, one folder each.

They know arrays, pages and segments, and nothing of requests, adapters' names or HTTP. Each folder
holds the operation's definition (its docstring is the contract) and its implementations; every
implementation passes the same suite. `reference.py` is plain `jax.numpy` and runs everywhere.
"""

from pallas_kernels.kv_write import kv_write as kv_write
from pallas_kernels.layout import PageLayout as PageLayout
from pallas_kernels.lora_delta import lora_delta as lora_delta
from pallas_kernels.lora_expand import lora_expand as lora_expand
from pallas_kernels.lora_lookup import lora_lookup as lora_lookup
from pallas_kernels.lora_shrink import lora_shrink as lora_shrink
from pallas_kernels.paged_decode import paged_decode as paged_decode
from pallas_kernels.paged_prefill import paged_prefill as paged_prefill
from pallas_kernels.rope_kv_write import rope_kv_write as rope_kv_write
from pallas_kernels.segments import Adapters as Adapters
from pallas_kernels.segments import Modules as Modules
from pallas_kernels.skinny_matmul import FEW_TOKENS as FEW_TOKENS
from pallas_kernels.skinny_matmul import silu_gated as silu_gated
from pallas_kernels.skinny_matmul import skinny_matmul as skinny_matmul
