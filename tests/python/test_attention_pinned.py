"""Which of torch's attention kernels vattn lets torch choose from: on cuda never cuDNN's, with a mask or without.

Tensors say cuda:0 by the stand-in (pretend_cuda.py), in a process of its own; what torch may choose from is read at
each call of its attention.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import FAKE_CUDA, ON_GPU, check_child

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(FAKE_CUDA is None or ON_GPU, reason="needs the fake driver library")

PROGRAM = """
    import ctypes
    import torch
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode
    from types import SimpleNamespace
    from pretend_cuda import pretending

    from vattn.attention import attend_one
    from vattn.transformers.attention import attention_forward

    WITHOUT_CUDNN = {{SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}}
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is scaled_dot_product_attention:
                seen.append((args[0].shape, (kwargs or {{}}).get("attn_mask"), set(_cur_sdpa_kernel_backends())))
            return func(*args, **(kwargs or {{}}))

    def of(device, rows=2, mask_heads=None, key_rows=2):
        torch.manual_seed(0)
        query = torch.randn(rows, 4, 1, 16, device=device)
        key, value = (torch.randn(key_rows, 2, 9, 16, device=device) for _ in "kv")
        mask = None
        if mask_heads:
            mask = torch.ones(rows, mask_heads, 1, 9, dtype=torch.bool, device=device)
            mask[0, :, :, :3] = False
        seen.clear()
        out, _ = attention_forward(SimpleNamespace(is_causal=True), query, key, value, mask)
        (call,) = seen
        return out, *call

    everything = set(_cur_sdpa_kernel_backends(with_priority=True))
    order = torch._C._get_sdp_priority_order()
    with pretending(ctypes.CDLL({fake!r})), Watch():
        for more in ({{}}, {{"mask_heads": 1}}, {{"mask_heads": 4}}, {{"rows": 1}}, {{"rows": 1, "mask_heads": 1}}):
            out, shape, mask, may = of("cuda:0", **more)
            assert may == WITHOUT_CUDNN, (more, may)
            assert (mask is not None) == ("mask_heads" in more)
            if "rows" not in more:
                assert tuple(shape) == (2, 2, 2, 16), "groups are not folded, so efficient would refuse the call"
            on_cpu = of("cpu", **more)
            assert on_cpu[3] == everything, "a CPU chooses as always"
            assert torch.allclose(out.cpu(), on_cpu[0], atol=1e-6)
    assert set(_cur_sdpa_kernel_backends()) == everything
    assert torch._C._get_sdp_priority_order() == order, "torch's own order is as it was"
"""


def test_torch_may_not_choose_cudnns_kernel_for_a_decode_step_with_padding_or_without() -> None:
    assert FAKE_CUDA is not None
    env = {"VATTN_CUDA_LIBRARY": FAKE_CUDA, "PYTHONPATH": str(Path(__file__).parent)}
    check_child(PROGRAM.format(fake=FAKE_CUDA), timeout=200, env=env)
