import torch
from torch.utils.flop_counter import FlopCounterMode

from saescale.scaling.compute import topk_flops


def test_counts_of_the_paper() -> None:
    plain = topk_flops(768, 32768, tokens=10, selected=10 * 32)
    assert plain.sparse == 10 * (2 * 32768 * 768 + 8 * 32 * 768)
    assert plain.dense == 10 * 12 * 32768 * 768


def test_the_dense_equivalent_is_what_torch_counts() -> None:
    d, n, tokens = 24, 96, 50
    x, b_pre, W_enc, W_dec = (torch.randn(*size, requires_grad=True) for size in
                              ((tokens, d), (d,), (n, d), (n, d)))  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        (((x.detach() - b_pre) @ W_enc.T).relu() @ W_dec - x.detach()).square().sum().backward()
    assert topk_flops(d, n, tokens=tokens, selected=0).dense == counter.get_total_flops()


def test_each_reconstruction_and_auxk_cost_what_they_select_and_while_they_do() -> None:
    more = topk_flops(64, 512, tokens=10, selected=300, selected_aux=70, dead=90, reconstructions=2)
    assert more.sparse == 10 * 2 * 512 * 64 + 8 * (300 + 70) * 64
    assert more.dense == 10 * 20 * 512 * 64 + 8 * 90 * 64
    assert topk_flops(64, 512, tokens=10, selected=300) == (10 * 2 * 512 * 64 + 8 * 300 * 64, 10 * 12 * 512 * 64)
