from saescale.scaling.compute import flops_per_token


def test_counts_of_the_paper() -> None:
    plain = flops_per_token(768, 32768, 32)
    assert plain.sparse == 2 * 32768 * 768 + 8 * 32 * 768
    assert plain.dense == 12 * 32768 * 768


def test_auxk_and_multi_topk_cost_what_they_select() -> None:
    assert flops_per_token(64, 512, 8, k_aux=32, multi_k=32).sparse == 2 * 512 * 64 + 8 * (8 + 32 + 32) * 64
